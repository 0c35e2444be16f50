"""The plugin on tiny pipelines of diffusers' real classes."""

import copy
import gc
import inspect
import re
import sys

import diffusers
import pytest
import tiny_pipelines
import torch
from accelerate import Accelerator
from benchmarks_memory import SavedTensors
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from helpers import NO_ACCELERATOR, relative, run_two_processes
from peft import LoraConfig

from adt_pipeline import ConstrainedPipeline, find_denoiser
from adt_utils import constrained_step

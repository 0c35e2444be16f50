# Copyright 2026 The ADT training example authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Adversarial Diffusion Tuning (ADT) of Stable Diffusion XL. Needs `adt_utils.py` beside it.

On one GPU with 24 GB, low-rank adapters:

    accelerate launch --mixed_precision bf16 train_adt_sdxl.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --dataset_name DATASET --caption_column text --train_batch_size 1 --gradient_accumulation_steps 8 \
        --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix \
        --use_lora --rank 32 --learning_rate 1e-5 --gradient_checkpointing --offload_text_encoders \
        --validation_prompts "a lighthouse at dusk" --output_dir sdxl-adt-lora

On four GPUs, the paper's setting (global batch 8):

    accelerate launch --multi_gpu --num_processes 4 --mixed_precision bf16 train_adt_sdxl.py ... --train_batch_size 2

On two machines, on each of them with its own rank:

    accelerate launch --multi_gpu --num_machines 2 --num_processes 8 --machine_rank RANK --main_process_ip HOST \
        --main_process_port 29500 --mixed_precision bf16 train_adt_sdxl.py ... --train_batch_size 1

A run that was stopped goes on exactly where it was with `--resume_from_checkpoint latest`. All randomness derives from
the seed, the iteration and an image's index in the global batch, so that neither resuming nor the number of processes
changes a run.
"""

import argparse
import contextlib
import gc
import hashlib
import json
import logging
import math
import os
import resource
import shutil
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import accelerate
import datasets
import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, init_empty_weights
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, ProjectConfiguration, gather_object
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params, free_memory
from diffusers.utils import make_image_grid
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import AutoConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, Dinov2Model

from adt_utils import (
    GRADIENT_PATHS,
    REFUSED_SAMPLERS,
    DiffAugment,
    FeatureNetwork,
    ProjectedDiscriminator,
    SiameseDiscriminator,
    discriminator_loss,
    generator_loss,
    largest_group,
    select_train_steps,
    signal_and_noise_levels,
    simulate_inference,
    starting_latents,
    update_spectral_norm,
)


logger = get_logger(__name__)

# The sampler's class, the paper's number of steps, and the spacing that diffusers' users have with it by default.
# Copied from train_adt_sd15.SAMPLERS
SAMPLERS = {
    "ddim": (DDIMScheduler, 50, "leading"),
    "dpmsolver++": (DPMSolverMultistepScheduler, 30, "linspace"),
    "euler": (EulerDiscreteScheduler, 50, "linspace"),
}
# `StableDiffusionXLPipeline` takes a scheduler's configuration as it is.
PIPELINE_SCHEDULER_OPTIONS = {}
# Options that may change when a run is resumed: they do not change what an iteration computes.
# Copied from train_adt_sd15.FREE_ON_RESUME
FREE_ON_RESUME = {
    "allow_tf32", "cache_dir", "checkpointing_steps", "checkpoints_total_limit", "dataloader_num_workers",
    "discriminator_norm_group", "foreach_ema", "fuse_lora", "gradient_accumulation_steps", "gradient_checkpointing",
    "hub_model_id", "logging_dir", "max_train_steps", "num_train_epochs", "num_validation_images", "offload_ema",
    "output_dir", "push_to_hub", "report_to", "resume_from_checkpoint", "tracker_project_name", "train_batch_size",
    "validation_prompts", "validation_steps",
}  # fmt: skip
# Options that plain fine-tuning ignores, beside the discriminator's.
# Copied from train_adt_sd15.ADVERSARIAL_OPTIONS
ADVERSARIAL_OPTIONS = {
    "adversarial_gradient_ratio", "augmentation_pairing", "augmentation_policy", "diffusion_loss_weight",
    "generator_start_step", "generator_update_interval", "gradient_path", "num_gradient_steps",
}  # fmt: skip
# Options that plain fine-tuning alone uses.
# Copied from train_adt_sd15.FINE_TUNING_OPTIONS
FINE_TUNING_OPTIONS = set()
# Options that say something about the user's machine, which a published file has no business with.
# Copied from train_adt_sd15.PRIVATE_OPTIONS
PRIVATE_OPTIONS = {"output_dir", "logging_dir", "cache_dir", "train_data_dir", "resume_from_checkpoint"}
# What the model card says of the scheduler's configuration.
# Copied from train_adt_sd15.SAMPLER_FACTS
SAMPLER_FACTS = ("timestep_spacing", "prediction_type")
# Components that may stay in half precision, where the base pipeline has them so, beside ones in float32.
# Copied from train_adt_sd15.HALF_PRECISION_COMPONENTS
HALF_PRECISION_COMPONENTS = ()
CARD_TAGS = [
    "text-to-image", "diffusers", "diffusers-training", "stable-diffusion-xl", "adversarial-diffusion-tuning",
]  # fmt: skip
FREE_ON_RESUME |= {"cache_text_embeddings", "offload_text_encoders"}
PRIVATE_OPTIONS |= {"cache_text_embeddings"}
# How many prompts' embeddings a file of the cache holds, about 300 MB in bfloat16.
PROMPTS_PER_FILE = 1000
# A cosine's range is 2, and so is the hinge's margin; scores this far apart leave the generator little to learn from.
# Copied from train_adt_sd15.SATURATION_GAP
SATURATION_GAP, SATURATION_ITERATIONS = 1.8, 300


# Copied from train_adt_sd15.ADTError
class ADTError(RuntimeError):
    """An error whose message is all that the user needs: bad input, or a run that cannot go on."""


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(
        description="Adversarial Diffusion Tuning of Stable Diffusion XL.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_arguments(parser)
    add_schedule_arguments(parser)
    group = parser.add_argument_group("SDXL")
    group.add_argument(
        "--rollout_time_ids",
        choices=["inference", "image"],
        default="inference",
        help="The sizes and crop that the rollout is conditioned on: those of the pipeline's call, or the image's.",
    )
    group.add_argument(
        "--offload_text_encoders",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Keep the text encoders in CPU memory while they are not needed.",
    )
    group.add_argument(
        "--cache_text_embeddings", default=None, help="Folder for all captions' embeddings, computed once."
    )
    parser.set_defaults(
        sampler="ddim",
        output_dir="sdxl-adt",
        tracker_project_name="adt-sdxl",
        resolution=1024,
        learning_rate=1e-6,
        discriminator_learning_rate=1e-6,
        guidance_scale=5.0,
    )
    args = parser.parse_args(input_args)
    check_args(args, parser)
    if args.cache_text_embeddings is not None:
        cache = Path(args.cache_text_embeddings).absolute()
        for path in (cache, *cache.parents):
            if path.exists() and not path.is_dir():
                parser.error(f"--cache_text_embeddings {args.cache_text_embeddings}: {path} is a file.")
        if cache.is_relative_to(Path(args.output_dir).absolute()):
            parser.error("--cache_text_embeddings must not lie in --output_dir, which is what is published.")
        if args.offload_text_encoders:
            parser.error("--cache_text_embeddings frees the text encoders: there is nothing to offload.")
    return args


# Copied from train_adt_sd15.add_arguments
def add_arguments(parser):
    """The options that all the scripts have; what differs between them is set as a default in `parse_args`."""
    boolean = argparse.BooleanOptionalAction

    group = parser.add_argument_group("model")
    group.add_argument("--pretrained_model_name_or_path", required=True, help="Hub id or folder of the base pipeline.")
    group.add_argument("--revision", default=None, help="Revision of the base pipeline on the Hub.")
    group.add_argument("--variant", default=None, help="Variant of the base pipeline's weights, such as fp16.")
    group.add_argument(
        "--pretrained_vae_model_name_or_path", default=None, help="Another VAE than the base pipeline's."
    )

    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", default=None, help="Hub id or folder of a dataset with images and captions.")
    group.add_argument("--dataset_config_name", default=None, help="Configuration of the dataset.")
    group.add_argument(
        "--train_data_dir", default=None, help="Folder of images with a metadata.jsonl, instead of --dataset_name."
    )
    group.add_argument("--image_column", default="image", help="Column with the images.")
    group.add_argument("--caption_column", default="text", help="Column with a caption or a list of captions.")
    group.add_argument("--max_train_samples", type=int, default=None, help="Use this many images, drawn by the seed.")
    group.add_argument("--cache_dir", default=None, help="Where models and datasets from the Hub are stored.")
    group.add_argument("--resolution", type=int, help="Side of the square training images.")
    group.add_argument("--center_crop", action=boolean, default=False, help="Crop the centre, not at random.")
    group.add_argument("--random_flip", action=boolean, default=False, help="Mirror half of the images.")
    group.add_argument(
        "--image_interpolation_mode",
        choices=[mode.name.lower() for mode in Image.Resampling],
        default="lanczos",
        help="How images are resized.",
    )
    group.add_argument(
        "--proportion_empty_prompts",
        type=float,
        default=0.0,
        help="Share of captions replaced by the empty prompt, in the diffusion loss alone.",
    )
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="Processes that load images.")

    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", help="Where the tuned pipeline and checkpoints are written.")
    group.add_argument("--seed", type=int, default=0, help="All randomness derives from it.")
    group.add_argument("--train_batch_size", type=int, default=2, help="Images a process and micro-batch.")
    group.add_argument("--max_train_steps", type=int, default=None, help="Iterations; 20000 where nothing is said.")
    group.add_argument("--num_train_epochs", type=int, default=None, help="Instead of --max_train_steps.")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="Micro-batches an iteration.")
    group.add_argument(
        "--gradient_checkpointing", action=boolean, default=False, help="Less memory for about a third more time."
    )
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default=None, help="Else accelerate's.")
    group.add_argument("--allow_tf32", action=boolean, default=False, help="Faster float32 on Ampere and later.")
    group.add_argument("--learning_rate", type=float, help="The generator's.")
    group.add_argument(
        "--scale_lr",
        action=boolean,
        default=False,
        help="Multiply both learning rates by processes, batch size and accumulation steps.",
    )
    group.add_argument(
        "--lr_scheduler",
        choices=[kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT],
        default="constant_with_warmup",
        help="Of both optimizers, each counted in its own updates.",
    )
    group.add_argument("--lr_warmup_steps", type=int, default=500, help="In generator updates.")
    group.add_argument("--lr_num_cycles", type=int, default=1, help="Of cosine_with_restarts.")
    group.add_argument("--lr_power", type=float, default=1.0, help="Of polynomial.")
    group.add_argument("--use_8bit_adam", action=boolean, default=False, help="The generator's; needs bitsandbytes.")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="Of both optimizers.")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="Of both optimizers.")
    group.add_argument("--adam_weight_decay", type=float, default=1e-2, help="Of both optimizers.")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="Of both optimizers.")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="Gradients are clipped to it, each network's.")
    group.add_argument("--use_ema", action=boolean, default=False, help="Average the generator's weights.")
    group.add_argument("--ema_decay", type=float, default=0.9999, help="Of that average, in generator updates.")
    group.add_argument("--offload_ema", action=boolean, default=False, help="Keep the average in CPU memory.")
    group.add_argument(
        "--foreach_ema", action=boolean, default=False, help="Update the average with fused operations."
    )
    group.add_argument(
        "--noise_offset", type=float, default=0.0, help="Scale of a constant added to the diffusion loss's noise."
    )

    group = parser.add_argument_group("LoRA")
    group.add_argument(
        "--use_lora", action=boolean, default=False, help="Train low-rank adapters, not the network's own weights."
    )
    group.add_argument("--rank", type=int, default=16, help="Of the adapters.")
    group.add_argument("--lora_alpha", type=float, default=None, help="Adapters are scaled by it over rank; the rank.")
    group.add_argument("--lora_dropout", type=float, default=0.0, help="Of the adapters, in the diffusion loss.")
    group.add_argument(
        "--lora_target_modules", nargs="+", default=["to_q", "to_k", "to_v", "to_out.0"], help="Layers that get one."
    )
    group.add_argument(
        "--fuse_lora", action=boolean, default=False, help="Save the full pipeline, with the adapters fused, as well."
    )

    group = parser.add_argument_group("inference during training")
    group.add_argument("--sampler", help=f"One of {', '.join(SAMPLERS)}.")
    group.add_argument(
        "--num_inference_steps",
        type=int,
        default=None,
        help="The sampler's; " + ", ".join(f"{name} {steps}" for name, (_, steps, *_) in SAMPLERS.items()) + ".",
    )
    group.add_argument("--guidance_scale", type=float, help="No guidance at 1 or less.")

    group = parser.add_argument_group("adversarial tuning")
    group.add_argument("--num_gradient_steps", type=int, default=3, help="K, the sampler steps that send gradient.")
    group.add_argument(
        "--gradient_path", choices=GRADIENT_PATHS, default="adt", help="The backward path; drtune for the ablation."
    )
    group.add_argument("--generator_update_interval", type=int, default=5, help="Iterations a generator update.")
    group.add_argument(
        "--generator_start_step", type=int, default=0, help="Iterations in which only the discriminator trains."
    )
    group.add_argument(
        "--adversarial_loss_weight",
        default="1.0",
        help="A number; 0 for plain fine-tuning; auto to balance the gradients, see --adversarial_gradient_ratio.",
    )
    group.add_argument(
        "--adversarial_gradient_ratio",
        type=float,
        default=1.0,
        help="With auto: the norm of the adversarial gradient at the predictions, over the diffusion loss's.",
    )
    group.add_argument("--diffusion_loss_weight", type=float, default=0.5, help="Lambda.")

    group = parser.add_argument_group("discriminator")
    group.add_argument(
        "--discriminator_model_name_or_path", default="facebook/dinov2-small", help="A DINOv2 model, which is frozen."
    )
    group.add_argument(
        "--discriminator_layers",
        type=int,
        nargs="+",
        default=[-1, 2, 5, 8, 11],
        help="Its blocks that are used; -1 is the patch embedding. ViT-L: 5 10 14 19 23.",
    )
    group.add_argument("--discriminator_resolution", type=int, default=518, help="Side of the images that it sees.")
    group.add_argument(
        "--discriminator_norm_group",
        type=int,
        default=None,
        help="Images to a batch norm group; the largest divisor of the batch size that is at most 8.",
    )
    group.add_argument(
        "--discriminator_type", choices=["siamese", "projected"], default="siamese", help="projected: the ablation."
    )
    group.add_argument(
        "--discriminator_similarity", choices=["cosine", "dot"], default="cosine", help="Of the siamese outputs."
    )
    group.add_argument(
        "--discriminator_reduction",
        choices=["token", "pooled"],
        default="token",
        help="Average the similarities over tokens, or the outputs before them.",
    )
    group.add_argument("--discriminator_ema_decay", type=float, default=0.99, help="Of the twin heads.")
    group.add_argument("--discriminator_learning_rate", type=float, help="The discriminator's.")
    group.add_argument("--discriminator_lr_warmup_steps", type=int, default=1000, help="In discriminator updates.")
    group.add_argument(
        "--augmentation_policy",
        nargs="*",
        choices=DiffAugment.POLICIES,
        default=list(DiffAugment.POLICIES),
        help="Differentiable augmentation; nothing behind the flag for none.",
    )
    group.add_argument(
        "--augmentation_pairing",
        choices=["independent", "shared", "input"],
        default="independent",
        help="The reference's augmentation: its own draw, the scored image's, or none.",
    )

    group = parser.add_argument_group("checkpoints, validation and reports")
    group.add_argument("--checkpointing_steps", type=int, default=500, help="Iterations between checkpoints.")
    group.add_argument("--checkpoints_total_limit", type=int, default=None, help="Keep this many, the newest.")
    group.add_argument(
        "--resume_from_checkpoint", default=None, help="A checkpoint's folder or name in --output_dir, or latest."
    )
    group.add_argument("--validation_prompts", nargs="+", default=None, help="Prompts to sample during training.")
    group.add_argument("--num_validation_images", type=int, default=4, help="Images for each of them.")
    group.add_argument("--validation_steps", type=int, default=1000, help="Iterations between validations.")
    group.add_argument("--report_to", default="tensorboard", help="tensorboard, wandb, comet_ml, all or none.")
    group.add_argument("--logging_dir", default="logs", help="TensorBoard's folder in --output_dir.")
    group.add_argument("--tracker_project_name", help="The tracker's project.")
    group.add_argument("--push_to_hub", action=boolean, default=False, help="Upload the tuned pipeline.")
    group.add_argument("--hub_model_id", default=None, help="Its repository; the output folder's name by default.")
    group.add_argument("--hub_token", default=None, help="Else the token of `hf auth login`. It is never written.")


# Copied from train_adt_sd15.add_schedule_arguments
def add_schedule_arguments(parser):
    """The options of models with a variance-preserving schedule."""
    group = parser.add_argument_group("noise schedule")
    group.add_argument(
        "--prediction_type",
        choices=["epsilon", "v_prediction"],
        default=None,
        help="What the UNet predicts, where the base pipeline's scheduler states it wrongly.",
    )
    group.add_argument(
        "--timestep_spacing",
        choices=["leading", "trailing", "linspace"],
        default=None,
        help="ddim: leading, else linspace; trailing where the schedule has zero terminal SNR.",
    )
    group.add_argument("--guidance_rescale", type=float, default=0.0, help="For zero-terminal-SNR checkpoints: 0.7.")
    group.add_argument("--snr_gamma", type=float, default=None, help="Min-SNR weighting of the diffusion loss; 5.0.")


# Copied from train_adt_sd15.check_args
def check_args(args, parser):
    """Refuses what can be told from the options alone, and fills in those that depend on others."""
    if (args.dataset_name is None) == (args.train_data_dir is None):
        parser.error("give either --dataset_name or --train_data_dir.")
    if args.train_data_dir is not None and not os.path.isdir(args.train_data_dir):
        parser.error(f"--train_data_dir {args.train_data_dir} is not a folder.")
    if os.path.exists(args.output_dir) and not os.path.isdir(args.output_dir):
        parser.error(f"--output_dir {args.output_dir} is a file.")
    if args.sampler in REFUSED_SAMPLERS:
        parser.error(
            f"--sampler {args.sampler} cannot be tuned with: {REFUSED_SAMPLERS[args.sampler]}; choose from "
            f"{', '.join(SAMPLERS)}."
        )
    if args.sampler not in SAMPLERS:
        parser.error(f"--sampler {args.sampler} is not known; choose from {', '.join(SAMPLERS)}.")
    if args.adversarial_loss_weight != "auto":
        try:
            args.adversarial_loss_weight = float(args.adversarial_loss_weight)
        except ValueError:
            parser.error(f"--adversarial_loss_weight {args.adversarial_loss_weight} is neither a number nor auto.")
        if not 0 <= args.adversarial_loss_weight < math.inf:
            parser.error("--adversarial_loss_weight must not be negative.")
    elif args.diffusion_loss_weight == 0:
        parser.error("--adversarial_loss_weight auto needs a diffusion loss to balance: --diffusion_loss_weight is 0.")
    if args.hub_token is not None and args.report_to not in ("tensorboard", "none"):
        parser.error(
            f"--hub_token would reach {args.report_to}, which records the command line: use `hf auth login` or the "
            "HF_TOKEN environment variable."
        )
    positive = [
        "resolution", "train_batch_size", "gradient_accumulation_steps", "num_gradient_steps",
        "generator_update_interval", "adversarial_gradient_ratio", "discriminator_resolution", "checkpointing_steps",
        "num_validation_images", "validation_steps", "max_grad_norm", "learning_rate", "discriminator_learning_rate",
        "rank",
    ]  # fmt: skip
    optional = [
        "max_train_steps", "num_train_epochs", "max_train_samples", "num_inference_steps", "snr_gamma",
        "discriminator_norm_group", "checkpoints_total_limit", "lora_alpha",
    ]  # fmt: skip
    for name in positive + [name for name in optional if getattr(args, name, None) is not None]:
        if not getattr(args, name) > 0:
            parser.error(f"--{name} must be greater than 0, not {getattr(args, name)}.")
    for name in ("diffusion_loss_weight", "generator_start_step", "lr_warmup_steps", "discriminator_lr_warmup_steps",
                 "guidance_scale", "noise_offset", "dataloader_num_workers"):  # fmt: skip
        if not getattr(args, name) >= 0:
            parser.error(f"--{name} must not be negative, not {getattr(args, name)}.")
    for name in (
        "proportion_empty_prompts",
        "guidance_rescale",
        "ema_decay",
        "discriminator_ema_decay",
        "lora_dropout",
    ):
        if not 0 <= getattr(args, name, 0) <= 1:
            parser.error(f"--{name} must lie in [0, 1], not {getattr(args, name)}.")
    if args.discriminator_norm_group and args.train_batch_size % args.discriminator_norm_group:
        parser.error(
            f"--discriminator_norm_group {args.discriminator_norm_group} does not divide --train_batch_size "
            f"{args.train_batch_size}."
        )
    if args.fuse_lora and not args.use_lora:
        parser.error("--fuse_lora needs --use_lora.")
    if args.lora_dropout > 0 and args.diffusion_loss_weight == 0 and args.adversarial_loss_weight != 0:
        parser.error("--lora_dropout acts in the diffusion loss alone, and --diffusion_loss_weight is 0.")
    if args.lora_alpha is None:
        args.lora_alpha = float(args.rank)
    if args.num_inference_steps is None:
        args.num_inference_steps = SAMPLERS[args.sampler][1]
    if args.max_train_steps is None and args.num_train_epochs is None:
        args.max_train_steps = 20_000


# Copied from train_adt_sd15.make_generator
def make_generator(seed: int, purpose: str, *key: int) -> torch.Generator:
    """A CPU generator that depends on its arguments alone, so that an iteration can be drawn again anywhere."""
    entropy = [seed % 2**63, zlib.crc32(purpose.encode()), *key]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1)


# Copied from train_adt_sd15.draw_per_image
def draw_per_image(function, shape, seed, purpose, iteration, positions):
    """(B, *shape): one draw of `torch.rand` or `torch.randn` for each image, by its index in the global batch."""
    return torch.stack(
        [function(shape, generator=make_generator(seed, purpose, iteration, position)) for position in positions]
    )


# Copied from train_adt_sd15.load_image_caption_dataset
def load_image_caption_dataset(args):
    """Loads the train split and checks its columns; images stay undecoded. Returns a `datasets.Dataset`."""
    try:
        if args.dataset_name is not None:
            loaded = datasets.load_dataset(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir)
        else:
            loaded = datasets.load_dataset("imagefolder", data_dir=args.train_data_dir, cache_dir=args.cache_dir)
    except Exception as error:  # of a dozen kinds, pyarrow's and the Hub's among them
        name = args.dataset_name or args.train_data_dir
        raise ADTError(f"The dataset {name} cannot be read: {error.__cause__ or error}") from error
    if "train" not in loaded:
        raise ADTError(f"The dataset has no train split, only {', '.join(loaded)}.")
    dataset = loaded["train"]
    for option in ("image_column", "caption_column"):
        if getattr(args, option) not in dataset.column_names:
            raise ADTError(
                f"--{option} {getattr(args, option)} is not a column of the dataset, which has "
                f"{', '.join(dataset.column_names)}."
            )
    if not isinstance(dataset.features[args.image_column], datasets.Image):
        raise ADTError(f"--image_column {args.image_column} does not hold images.")
    if len(dataset) == 0:
        raise ADTError("The dataset is empty.")
    if args.max_train_samples is not None and args.max_train_samples < len(dataset):
        order = torch.randperm(len(dataset), generator=make_generator(args.seed, "samples"))
        dataset = dataset.select(sorted(order[: args.max_train_samples].tolist()))
    return dataset.cast_column(args.image_column, datasets.Image(decode=False))


# Copied from train_adt_sd15.open_image
def open_image(record) -> Image.Image:
    """Decodes `{"bytes": ..., "path": ...}` to RGB, upright."""
    with datasets.Image().decode_example(record) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


# Copied from train_adt_sd15.check_dataset
def check_dataset(dataset, indices, args) -> int:
    """Decodes the images at `indices` and looks at their captions. Returns how many captions are empty.

    Raises:
        ADTError: naming the first image that does not decode, or a caption that is no text.
    """

    def check(index):
        row = dataset[index]
        record = row[args.image_column]
        name = f"image {index} of the dataset" + (f" ({record['path']})" if record and record["path"] else "")
        if record is None:
            raise ADTError(f"The {name} is missing.")
        try:
            open_image(record)
        except Exception as error:  # PIL raises half a dozen kinds, SyntaxError among them
            raise ADTError(f"The {name} does not decode: {error}") from error
        captions = row[args.caption_column]
        captions = (captions or [""]) if isinstance(captions, list) else [captions]
        if not all(caption is None or isinstance(caption, str) for caption in captions):
            raise ADTError(
                f"The caption of {name} in column {args.caption_column} is neither text nor a list of texts."
            )
        return sum(not (caption or "").strip() for caption in captions)

    with ThreadPoolExecutor(max(4, args.dataloader_num_workers)) as pool:
        return sum(tqdm(pool.map(check, indices), total=len(indices), desc="Checking images", leave=False))


# Copied from train_adt_sd15.transform_image
def transform_image(image, generator, args):
    """Resizes, flips and crops as the diffusers examples do, with four draws from `generator`.

    Returns:
        pixel values (3, resolution, resolution) in [-1, 1], and the crop's top left corner (y, x) in the resized
        image as it was cropped, which is mirrored if the crop is.
    """
    u_flip, u_top, u_left = torch.rand(3, generator=generator).tolist()
    short = min(image.size)
    size = [args.resolution * side // short for side in image.size]
    image = image.resize(size, Image.Resampling[args.image_interpolation_mode.upper()])
    if args.random_flip and u_flip < 0.5:
        image = ImageOps.mirror(image)
    spare_left, spare_top = (side - args.resolution for side in size)
    if args.center_crop:
        left, top = round(spare_left / 2), round(spare_top / 2)
    else:
        left, top = int(u_left * (spare_left + 1)), int(u_top * (spare_top + 1))
    image = image.crop((left, top, left + args.resolution, top + args.resolution))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1, (top, left)


# Copied from train_adt_sd15.choose_caption
def choose_caption(captions, generator) -> str:
    """One of several captions; the empty prompt where there is none."""
    if isinstance(captions, list):
        captions = captions[int(torch.rand(1, generator=generator).item() * len(captions))] if captions else ""
    return captions or ""


class ImageCaptionDataset(torch.utils.data.Dataset):
    """Images and captions by `(dataset index, iteration, position in the global batch)`.

    An item has `pixel_values` (3, resolution, resolution) in [-1, 1], `caption` and `position`, and SDXL's conditions
    `original_size` (height, width) and `crop_top_left` (y, x). Crop, flip and the choice among several captions are
    drawn from the seed, the iteration and the position.
    """

    def __init__(self, dataset, args):
        self.dataset = dataset
        self.args = args

    def __getitem__(self, key):
        index, iteration, position = key
        row = self.dataset[index]
        generator = make_generator(self.args.seed, "image", iteration, position)
        image = open_image(row[self.args.image_column])
        pixel_values, crop_top_left = transform_image(image, generator, self.args)
        caption = choose_caption(row[self.args.caption_column], generator)
        return {
            "pixel_values": pixel_values,
            "caption": caption,
            "position": position,
            "original_size": (image.height, image.width),
            "crop_top_left": crop_top_left,
        }


def collate_fn(examples):
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "captions": [example["caption"] for example in examples],
        "positions": [example["position"] for example in examples],
        "original_sizes": torch.tensor([example["original_size"] for example in examples]),
        "crop_top_lefts": torch.tensor([example["crop_top_left"] for example in examples]),
    }


# Copied from train_adt_sd15.GlobalBatchSampler
class GlobalBatchSampler(torch.utils.data.Sampler):
    """The micro-batches of one process, as lists of keys for `ImageCaptionDataset`, from `first_iteration` on.

    The images are an endless row of permutations of the dataset; iteration `k` takes the `k`-th global batch of it.
    An image's position there is `(micro * processes + process) * batch + j`, so that processes, micro-batches and
    larger batches can stand for each other.
    """

    def __init__(self, dataset_size, args, num_processes=1, process_index=0, first_iteration=0):
        self.dataset_size = dataset_size
        self.args = args
        self.num_processes, self.process_index = num_processes, process_index
        self.first_iteration = first_iteration
        self.permutation = lru_cache(maxsize=2)(self.draw_permutation)

    def draw_permutation(self, epoch):
        return torch.randperm(self.dataset_size, generator=make_generator(self.args.seed, "epoch", epoch)).tolist()

    def dataset_index(self, n):
        epoch, offset = divmod(n, self.dataset_size)
        return self.permutation(epoch)[offset]

    def __len__(self):
        return (self.args.max_train_steps - self.first_iteration) * self.args.gradient_accumulation_steps

    def __iter__(self):
        batch_size, micro_batches = self.args.train_batch_size, self.args.gradient_accumulation_steps
        global_batch_size = batch_size * self.num_processes * micro_batches
        for iteration in range(self.first_iteration, self.args.max_train_steps):
            for micro in range(micro_batches):
                first = (micro * self.num_processes + self.process_index) * batch_size
                yield [
                    (self.dataset_index(iteration * global_batch_size + position), iteration, position)
                    for position in range(first, first + batch_size)
                ]


# Copied from train_adt_sd15.make_sampler
def make_sampler(args, base_scheduler_config, device):
    """The scheduler of the rollout, of validation and of the saved pipeline, with `set_timesteps` called.

    `from_config` fills a missing key with the class default, and some of those are wrong here: DDIM's would clip the
    latents, and spacings differ between classes. They are set explicitly.

    Raises:
        ADTError: where the sampler does not suit the model.
    """
    config = dict(base_scheduler_config)
    if "beta_schedule" not in config:
        raise ADTError(f"The base pipeline's scheduler, {config.get('_class_name')}, has no schedule of betas.")
    scheduler_class, _, spacing = SAMPLERS[args.sampler]
    prediction_type = args.prediction_type or config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ADTError(
            f"--sampler {args.sampler} does not suit a model that predicts '{prediction_type}': this script tunes "
            "epsilon and v_prediction models."
        )
    if config.get("rescale_betas_zero_snr", False):
        spacing = "trailing"  # the only spacing that starts at the last timestep, where the SNR is zero
        if prediction_type == "epsilon":
            raise ADTError("A schedule with zero terminal SNR needs a v_prediction model: epsilon says nothing there.")
    length = config.get("num_train_timesteps", 1000)
    too_many = f"--num_inference_steps {args.num_inference_steps} is too many for a schedule of {length} timesteps."
    if args.num_inference_steps > length:
        raise ADTError(too_many)
    options = {"prediction_type": prediction_type, "timestep_spacing": args.timestep_spacing or spacing}
    options |= PIPELINE_SCHEDULER_OPTIONS
    if args.sampler == "ddim":
        options |= {"clip_sample": False, "thresholding": False}
    if args.sampler == "dpmsolver++":
        options |= {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
        options |= {"thresholding": False, "final_sigmas_type": "zero"}
    config = {name: value for name, value in config.items() if name not in ("clip_sample", "thresholding")}
    sampler = scheduler_class.from_config(config, **options)
    sampler.set_timesteps(args.num_inference_steps, device=device)
    if sampler.timesteps.max() >= length:
        raise ADTError(too_many)
    if len(sampler.timesteps.unique()) != args.num_inference_steps:
        raise ADTError(
            f"--sampler {args.sampler} with --timestep_spacing {options['timestep_spacing']} has no "
            f"{args.num_inference_steps} distinct timesteps."
        )
    return sampler


# Copied from train_adt_sd15.inference_options
def inference_options(args) -> dict:
    """What the pipeline is called with, beside the prompt and the size, to sample as in training."""
    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    if args.guidance_rescale:
        options["guidance_rescale"] = args.guidance_rescale
    return options


def check_models(args, device=None):
    """Checks everything that the models' configurations tell, before any weight is loaded.

    Returns:
        the sampler, its timesteps on `device`; the scheduler of plain fine-tuning; the side of the images that the
        pipeline makes by default.
    """
    hub = {"revision": args.revision, "cache_dir": args.cache_dir}
    path = args.pretrained_model_name_or_path
    try:
        index = StableDiffusionXLPipeline.load_config(path, **hub)
        unet_config = UNet2DConditionModel.load_config(path, subfolder="unet", **hub)
        scheduler_config = DDPMScheduler.load_config(path, subfolder="scheduler", **hub)
    except OSError as error:
        raise ADTError(f"--pretrained_model_name_or_path {path} is not a readable pipeline: {error}") from error
    if index["_class_name"] != "StableDiffusionXLPipeline":
        raise ADTError(f"{path} is a {index['_class_name']}; this script tunes a StableDiffusionXLPipeline.")
    vae_path = args.pretrained_vae_model_name_or_path
    try:
        if vae_path is None:
            vae_config = AutoencoderKL.load_config(path, subfolder="vae", **hub)
        else:
            vae_config = AutoencoderKL.load_config(vae_path, cache_dir=args.cache_dir)
    except OSError as error:
        source = f"{path} has no readable VAE" if vae_path is None else f"{vae_path} is not a readable VAE"
        raise ADTError(f"{source}: {error}") from error

    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    if args.resolution % factor:
        raise ADTError(f"--resolution {args.resolution} is not divisible by the VAE's factor {factor}.")
    if unet_config["in_channels"] != vae_config["latent_channels"]:
        raise ADTError(
            f"The UNet of {path} takes {unet_config['in_channels']} channels and the VAE of {vae_path or path} makes "
            f"{vae_config['latent_channels']}: they are not a text-to-image model's."
        )
    if unet_config.get("time_cond_proj_dim") is not None:
        raise ADTError(f"{path} has its guidance distilled into the UNet, so guidance cannot be simulated.")
    if unet_config.get("addition_embed_type") != "text_time" or None in index["text_encoder"]:
        raise ADTError(f"{path} is no SDXL base model: it lacks a text encoder or the conditions on sizes.")
    if vae_config.get("latents_mean") is not None:
        raise ADTError(f"The VAE of {vae_path or path} shifts its latents by a mean, which this script does not know.")
    sampler = make_sampler(args, scheduler_config, device)
    noise_scheduler = DDPMScheduler.from_config(scheduler_config, prediction_type=sampler.config.prediction_type)
    check_feature_network(args)
    check_lora(args, UNet2DConditionModel, unet_config)
    return sampler, noise_scheduler, unet_config["sample_size"] * factor


# Copied from train_adt_sd15.check_feature_network
def check_feature_network(args):
    if args.adversarial_loss_weight == 0:
        return
    path = args.discriminator_model_name_or_path
    try:
        config = AutoConfig.from_pretrained(path, cache_dir=args.cache_dir)
    except (OSError, ValueError) as error:
        raise ADTError(f"--discriminator_model_name_or_path {path} is not readable: {error}") from error
    try:
        FeatureNetwork.check_config(config, args.discriminator_layers, args.discriminator_resolution)
    except ValueError as error:
        raise ADTError(str(error)) from error


# Copied from train_adt_sd15.check_lora
def check_lora(args, model_class, config):
    """Refuses a target that is no layer of the network, which is built without weights for it."""
    if not args.use_lora:
        return
    with init_empty_weights():
        modules = model_class.from_config(config).named_modules()
    layers = [name for name, module in modules if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
    for target in args.lora_target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise ADTError(f"--lora_target_modules {target} is no linear or convolutional layer of the network.")


class PromptEncoder:
    """Prompts to what the network is conditioned on, as `StableDiffusionXLPipeline` computes it.

    One prompt at a time, so that a prompt's embedding does not depend on the batch that it is in.
    """

    def __init__(self, args, accelerator):
        path, hub = args.pretrained_model_name_or_path, hub_options(args)
        tokenizer_hub = {name: value for name, value in hub.items() if name != "variant"}
        self.device = accelerator.device
        self.resting_device = torch.device("cpu") if args.offload_text_encoders else self.device
        self.tokenizers = [
            CLIPTokenizer.from_pretrained(path, subfolder=subfolder, **tokenizer_hub)
            for subfolder in ("tokenizer", "tokenizer_2")
        ]
        self.text_encoders = [
            CLIPTextModel.from_pretrained(path, subfolder="text_encoder", **hub),
            CLIPTextModelWithProjection.from_pretrained(path, subfolder="text_encoder_2", **hub),
        ]
        for text_encoder in self.text_encoders:
            text_encoder.requires_grad_(False).eval().to(self.resting_device, dtype=weight_dtype(accelerator))
        self.cache = None
        # The pipeline's unconditional branch, which also stands for a dropped caption.
        index = StableDiffusionXLPipeline.load_config(path, **tokenizer_hub)
        self.negative = self([""])
        if index.get("force_zeros_for_empty_prompt", True):
            self.negative = {name: torch.zeros_like(value) for name, value in self.negative.items()}

    @torch.no_grad()
    def encode(self, prompt) -> dict:
        hidden_states = []
        for tokenizer, text_encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            tokens = tokenizer(
                prompt,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            output = text_encoder(tokens.input_ids.to(self.device), output_hidden_states=True)
            hidden_states.append(output.hidden_states[-2])
        return {"prompt_embeds": torch.cat(hidden_states, dim=-1), "pooled_prompt_embeds": output.text_embeds}

    def __call__(self, prompts) -> dict:
        """`prompt_embeds` (B, L, C), both encoders' penultimate layers, and `pooled_prompt_embeds` (B, P)."""
        if self.cache is not None:
            return {name: value.to(self.device) for name, value in self.cache.read(prompts).items()}
        for text_encoder in self.text_encoders:
            text_encoder.to(self.device)
        result = concatenate([self.encode(prompt) for prompt in prompts])
        for text_encoder in self.text_encoders:
            text_encoder.to(self.resting_device)
        return result

    def use_cache(self, prompts, args, accelerator):
        """Computes the prompts' embeddings, unless a cache of theirs is there, and frees the text encoders."""
        self.cache = EmbeddingCache(args, self.fingerprint())
        self.cache.prepare(prompts, self.encode, accelerator)
        self.tokenizers = self.text_encoders = None
        free_memory()

    def fingerprint(self) -> str:
        """Of all that an embedding depends on beside its prompt: tokenizers, weights and their precision."""
        digest = hashlib.sha256()
        for tokenizer in self.tokenizers:
            digest.update(f"{tokenizer.model_max_length} {tokenizer.pad_token}".encode())
            with tempfile.TemporaryDirectory() as directory:
                tokenizer.save_pretrained(directory)
                for file in sorted(Path(directory).iterdir()):
                    if file.name != "tokenizer_config.json":  # it may name its folder
                        digest.update(file.read_bytes())
        for text_encoder in self.text_encoders:
            config = json.loads(text_encoder.config.to_json_string(use_diff=False))
            for name in ("_name_or_path", "dtype", "torch_dtype", "transformers_version"):
                config.pop(name, None)
            digest.update(json.dumps(config, sort_keys=True).encode())
            for name, value in sorted(text_encoder.state_dict().items()):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


class EmbeddingCache:
    """All captions' embeddings in safetensors files of a folder, read by memory map; `manifest.json` comes last.

    The manifest names the encoder and the dataset it was made for, and each prompt's file and row.
    """

    def __init__(self, args, fingerprint):
        self.directory = Path(args.cache_text_embeddings)
        self.manifest_file = self.directory / "manifest.json"
        self.encoder_name = public_options(args)["pretrained_model_name_or_path"]
        self.dataset_name = public_options(args)["dataset_name"] or Path(args.train_data_dir).name
        self.fingerprint = fingerprint
        self.rows, self.files = {}, {}

    def prepare(self, prompts, encode, accelerator):
        """Opens the cache, which is made first, in parts by all processes, where it is not there.

        Raises:
            ADTError: if the cache is of another encoder, lacks a prompt, is damaged, or is not seen by all processes.
        """
        if not any(gather_object([self.manifest_file.is_file()])):
            self.write(prompts, encode, accelerator)
        self.require_everywhere([self.manifest_file.name])
        try:
            manifest = json.loads(self.manifest_file.read_text())
        except json.JSONDecodeError as error:
            raise ADTError(f"--cache_text_embeddings {self.manifest_file} is damaged.") from error
        if manifest["fingerprint"] != self.fingerprint:
            raise ADTError(
                f"--cache_text_embeddings {self.directory} was made with the text encoders of {manifest['encoder']}, "
                f"in {manifest['dtype']}; those of {self.encoder_name} are others now. Name another folder."
            )
        missing = [prompt for prompt in prompts if prompt not in manifest["prompts"]]
        if missing:
            raise ADTError(
                f"--cache_text_embeddings {self.directory} was made for the dataset {manifest['dataset']}, or for "
                f"fewer of its images; of the captions of {self.dataset_name} it lacks {len(missing)}, one of them "
                f"{missing[0]!r}."
            )
        for name, size in manifest["files"].items():
            file = self.directory / name
            if not file.is_file() or file.stat().st_size != size:
                raise ADTError(f"--cache_text_embeddings {self.directory} is damaged: {name} is missing or truncated.")
        self.rows = manifest["prompts"]

    def require_everywhere(self, names):
        if not all(gather_object([all((self.directory / name).is_file() for name in names)])):
            raise ADTError(
                f"--cache_text_embeddings {self.directory} must be on a file system that all processes share."
            )

    def write(self, prompts, encode, accelerator):
        self.directory.mkdir(parents=True, exist_ok=True)
        parts = [prompts[first : first + PROMPTS_PER_FILE] for first in range(0, len(prompts), PROMPTS_PER_FILE)]
        names = [f"embeddings-{n:05d}.safetensors" for n in range(len(parts))]
        own = range(accelerator.process_index, len(parts), accelerator.num_processes)
        for n in tqdm(own, desc="Encoding captions", disable=not accelerator.is_local_main_process):
            embeddings = concatenate([encode(prompt) for prompt in parts[n]])
            save_file(embeddings, self.directory / names[n])
        accelerator.wait_for_everyone()
        self.require_everywhere(names)
        if accelerator.is_main_process:
            manifest = {
                "encoder": self.encoder_name,
                "dtype": str(weight_dtype(accelerator)).removeprefix("torch."),
                "dataset": self.dataset_name,
                "fingerprint": self.fingerprint,
                "files": {name: (self.directory / name).stat().st_size for name in names},
                "prompts": {
                    prompt: [name, row]
                    for name, part in zip(names, parts, strict=True)
                    for row, prompt in enumerate(part)
                },
            }
            partial = self.directory / ".manifest-partial.json"
            partial.write_text(json.dumps(manifest))
            partial.rename(self.manifest_file)
        accelerator.wait_for_everyone()

    def read(self, prompts) -> dict:
        """The prompts' embeddings on the CPU, dict of (B, ...)."""
        rows = []
        for prompt in prompts:
            name, row = self.rows[prompt]
            if name not in self.files:
                self.files[name] = safe_open(self.directory / name, framework="pt")
            file = self.files[name]
            rows.append({key: file.get_slice(key)[row : row + 1] for key in file.keys()})
        return concatenate(rows)


def list_captions(dataset, args) -> list[str]:
    """Every caption that a run may draw, once, and the empty one."""
    found = {""}
    for captions in dataset[args.caption_column]:
        found.update(caption or "" for caption in (captions if isinstance(captions, list) else [captions]))
    return sorted(found)


def make_conditions(examples, positive, negative, dropped, args):
    """What the network is conditioned on, for the two guidance branches and for the diffusion loss.

    The time ids are (original height, width, crop's top, left, target height, width): in the diffusion loss this
    image's, in the rollout what the pipeline passes at inference, unless `--rollout_time_ids image`.

    Args:
        positive: the prompts' embeddings, dict of (B, ...).
        negative: those of the pipeline's unconditional branch, dict of (1, ...).
        dropped: (B,), which images' captions are dropped. In the diffusion loss only: the sampler is run with them.
    """
    negative = {name: value.expand_as(positive[name]) for name, value in negative.items()}
    target_sizes = torch.full_like(examples["original_sizes"], args.resolution)
    image_ids = torch.cat([examples["original_sizes"], examples["crop_top_lefts"], target_sizes], dim=1)
    inference_ids = torch.cat([target_sizes, torch.zeros_like(target_sizes), target_sizes], dim=1)
    device = positive["prompt_embeds"].device
    image_ids, inference_ids = image_ids.float().to(device), inference_ids.float().to(device)
    rollout_ids = {"time_ids": image_ids if args.rollout_time_ids == "image" else inference_ids}
    loss = {name: torch.where(expand(dropped, value), negative[name], value) for name, value in positive.items()}
    return {
        "negative": negative | rollout_ids,
        "positive": positive | rollout_ids,
        "loss": loss | {"time_ids": image_ids},
    }


def call_unet(unet, sample, timestep, condition):
    added = {"text_embeds": condition["pooled_prompt_embeds"], "time_ids": condition["time_ids"]}
    return unet(sample, timestep, encoder_hidden_states=condition["prompt_embeds"], added_cond_kwargs=added).sample


def validation_pipeline(unet, vae, sampler):
    """A pipeline that is given embeddings and returns latents."""
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=type(sampler).from_config(sampler.config),
        add_watermarker=False,
    )


# Copied from train_adt_sd15.absent_components
def absent_components(args) -> dict:
    """Components that the base pipeline lacks and `from_pretrained` must be told so."""
    return {}


# Copied from train_adt_sd15.unused_components
def unused_components(args) -> dict:
    """Components that the pipeline must be loaded without to sample as in training."""
    return {}


def inference_note(args) -> str:
    """What the model card says about this family's inference beyond the sampler."""
    if args.adversarial_loss_weight == 0:
        return ""
    if args.rollout_time_ids == "image":
        condition = "each training image's own size and crop (`original_size`, `crops_coords_top_left`)"
    else:
        condition = f"the original size {args.resolution}x{args.resolution} and no crop, the pipeline's defaults"
    return f" It was\nconditioned on {condition}."


# Copied from train_adt_sd15.hub_options
def hub_options(args) -> dict:
    return {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}


# Copied from train_adt_sd15.weight_dtype
def weight_dtype(accelerator) -> torch.dtype:
    """Of frozen weights. What trains is in float32."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


# Copied from train_adt_sd15.concatenate
def concatenate(conditions) -> dict:
    return {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}


# Copied from train_adt_sd15.expand
def expand(values, like):
    """(B,) to (B, 1, ...), with as many dimensions as `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def load_vae(args, accelerator):
    """The frozen VAE, in float32, since SDXL's own overflows in half precision.

    One that was made for half precision (`force_upcast` off in its configuration) runs in bfloat16 under bf16. Not in
    float16: a score's gradient with respect to a pixel is too small for it.
    """
    dtype = torch.float32
    if args.pretrained_vae_model_name_or_path is None:
        vae = AutoencoderKL.from_pretrained(args.pretrained_model_name_or_path, subfolder="vae", **hub_options(args))
    else:
        vae = AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path, cache_dir=args.cache_dir)
        if not vae.config.force_upcast and accelerator.mixed_precision == "bf16":
            dtype = torch.bfloat16
    vae.requires_grad_(False).eval().type(dtype).to(accelerator.device)
    if args.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    return vae


# Copied from train_adt_sd15.load_unet
def load_unet(args, accelerator):
    """The network that trains: its own weights in float32, or adapters in float32 over frozen, lighter weights."""
    unet = UNet2DConditionModel.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="unet", **hub_options(args)
    )
    unet.float()
    if args.use_lora:
        unet.requires_grad_(False).type(weight_dtype(accelerator)).to(accelerator.device)
        torch.manual_seed(args.seed)  # the adapters' first weights, the same on every process
        config = LoraConfig(
            r=args.rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            init_lora_weights="gaussian",
            target_modules=args.lora_target_modules,
        )
        unet.add_adapter(config)
        cast_training_params(unet)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


# Copied from train_adt_sd15.trainable_parameters
def trainable_parameters(model) -> list:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# Copied from train_adt_sd15.encode_images
def encode_images(vae, pixel_values, posterior_noise):
    """pixel_values: (B, 3, H, W) in [-1, 1]; posterior_noise as the latents. Returns scaled latents, float32."""
    with torch.no_grad():
        posterior = vae.encode(pixel_values.to(vae.dtype)).latent_dist
        latents = posterior.mean.float() + posterior.std.float() * posterior_noise
    check_vae(latents, "encodes images to", vae)
    return latents * vae.config.scaling_factor


# Copied from train_adt_sd15.decode_latents
def decode_latents(vae, latents):
    """latents: (B, C, h, w), scaled. Returns (B, 3, H, W) in about [-1, 1], float32.

    One image at a time and checkpointed: what a backward through the decoder stores is one image's.
    """

    def decode(one):
        return vae.decode((one / vae.config.scaling_factor).to(vae.dtype)).sample.float()

    images = torch.cat([checkpoint(decode, one, use_reentrant=False) for one in latents.split(1)])
    check_vae(images, "decodes finite latents to", vae)
    return images


# Copied from train_adt_sd15.check_vae
def check_vae(values, what, vae):
    if not values.isfinite().all():
        raise ADTError(
            f"The VAE, in {str(vae.dtype).removeprefix('torch.')}, {what} values that are not finite: it is damaged, "
            "or not made for this precision. Name another one with --pretrained_vae_model_name_or_path."
        )


# Copied from train_adt_sd15.diffusion_loss
def diffusion_loss(unet, batch, timesteps, alpha, sigma, scheduler, args):
    """The model's own training loss on `alpha x_0 + sigma eps`, for the noise or the velocity `alpha eps - sigma x_0`.

    Weighted by `min(SNR, gamma) / SNR`, for velocities `/ (SNR + 1)`, where `args.snr_gamma` is given
    (https://arxiv.org/abs/2303.09556).

    Args:
        batch: `latents` and `loss_noise` (B, C, h, w), `x_0` and `eps`, and the `conditions`.
        timesteps: (B,).
        alpha, sigma: (B, 1, 1, 1), the levels at those timesteps.
        scheduler: says what the model predicts.

    Returns:
        the 0-d loss and the prediction (B, C, h, w) that it was computed from.
    """
    latents, noise, prediction_type = batch["latents"], batch["loss_noise"], scheduler.config.prediction_type
    sample = alpha * latents + sigma * noise
    prediction = call_unet(unet, sample, timesteps, batch["conditions"]["loss"]).float()
    target = noise if prediction_type == "epsilon" else alpha * noise - sigma * latents
    loss = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
    if args.snr_gamma is not None:
        snr = (alpha / sigma).square().flatten()
        loss = loss * snr.clamp(max=args.snr_gamma) / (snr if prediction_type == "epsilon" else snr + 1)
    return loss.mean(), prediction


# Copied from train_adt_sd15.timestep_density
def timestep_density(args):
    """What plain fine-tuning draws its timesteps by: a function (shape, generator) of values in [0, 1)."""
    return torch.rand


# Copied from train_adt_sd15.plain_noise_levels
def plain_noise_levels(density, noise_scheduler):
    """Timesteps (B,) and `alpha`, `sigma` (B, 1, 1, 1) of plain fine-tuning, from draws (B,) by `timestep_density`."""
    timesteps = (density * noise_scheduler.config.num_train_timesteps).long()
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(density.device)[timesteps].view(-1, 1, 1, 1)
    return timesteps, alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


# Copied from train_adt_sd15.no_sync_unless
def no_sync_unless(condition, accelerator, model):
    """Gradients synchronise over the processes in the last backward of an iteration only."""
    return contextlib.nullcontext() if condition else accelerator.no_sync(model)


# Copied from train_adt_sd15.prepare_batch
def prepare_batch(examples, iteration, args, accelerator, vae, prompt_encoder):
    """Step 1: encodes a micro-batch and draws its noise, by (seed, iteration, index in the global batch)."""
    device, positions = accelerator.device, examples["positions"]

    def draw(function, shape, purpose):
        return draw_per_image(function, shape, args.seed, purpose, iteration, positions).to(device)

    images = examples["pixel_values"].to(device)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (vae.config.latent_channels, images.shape[2] // factor, images.shape[3] // factor)
    latents = encode_images(vae, images, draw(torch.randn, shape, "posterior"))
    noise = draw(torch.randn, shape, "noise")
    dropped = draw(torch.rand, (), "caption dropout") < args.proportion_empty_prompts
    return {
        "images": images,
        "latents": latents,
        "noise": noise,
        # The offset is the diffusion loss's alone: inference starts from noise without one.
        "loss_noise": noise + args.noise_offset * draw(torch.randn, (shape[0], 1, 1), "noise offset"),
        "density": draw(timestep_density(args), (), "timestep"),  # of plain fine-tuning
        "conditions": make_conditions(
            examples, prompt_encoder(examples["captions"]), prompt_encoder.negative, dropped, args
        ),
        "augmentation": {
            purpose: draw(torch.rand, (DiffAugment.NUM_PARAMETERS,), f"augmentation {purpose}")
            for purpose in ("real", "fake", "generator", "reference")
        },
    }


# Copied from train_adt_sd15.make_predict
def make_predict(unet, conditions):
    """The network as `simulate_inference` calls it: branch 0 is the unconditional one, branch 1 the caption's."""
    rows = (conditions["negative"], conditions["positive"])

    def predict(model_input, timestep, branches):
        return call_unet(unet, model_input, timestep, concatenate([rows[branch] for branch in branches]))

    return predict


# Copied from train_adt_sd15.reference_features
def reference_features(batch, scored_as, args, augment, feature_network):
    """`F(T'(y))` for an image whose own augmentation is `scored_as`."""
    with torch.no_grad():
        if args.augmentation_pairing == "input":
            return feature_network(batch["images"])
        purpose = scored_as if args.augmentation_pairing == "shared" else "reference"
        return feature_network(augment(batch["images"], batch["augmentation"][purpose]))


# Copied from train_adt_sd15.check_latents
def check_latents(latents, when):
    if not latents.isfinite().all():
        raise ADTError(
            f"The sampler's latents are not finite {when}: the network's predictions overflow, or it has diverged. "
            "The last checkpoint stays as it is."
        )


# Copied from train_adt_sd15.check_finite
def check_finite(values, iteration):
    for name, value in values.items():
        if not math.isfinite(value):
            raise ADTError(
                f"The {name.replace('_', ' ')} became {value} at iteration {iteration + 1}: the run stops, and the "
                "last checkpoint stays as it is. A lower learning rate or adversarial weight may help."
            )


# Copied from train_adt_sd15.reduce_values
def reduce_values(values, accelerator) -> dict:
    """Means over the processes of a dict of 0-d tensors, as floats."""
    reduced = accelerator.reduce(torch.stack([value.float() for value in values.values()]), reduction="mean")
    return dict(zip(values, reduced.tolist(), strict=True))


# Copied from train_adt_sd15.finish_gradient_norms
def finish_gradient_norms(values, num_batches, accelerator):
    """From the mean over processes of the sums over micro-batches to the norm of the global batch's gradient."""
    for name in values.keys() & {"adversarial_gradient_norm", "diffusion_gradient_norm"}:
        values[name] = (values[name] / accelerator.num_processes) ** 0.5 / num_batches


# Copied from train_adt_sd15.apply_update
def apply_update(name, model, optimizer, lr_scheduler, iteration, args, accelerator) -> bool:
    """Clips the gradients and steps; returns whether it did: float16's loss scaling skips a step that overflowed."""
    norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    if accelerator.scaler is None:
        check_finite({f"gradient norm of the {name}": norm.item()}, iteration)
    optimizer.step()
    if not optimizer.step_was_skipped:
        lr_scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    return not optimizer.step_was_skipped


# Copied from train_adt_sd15.update_discriminator
def update_discriminator(batches, discriminator, optimizer, lr_scheduler, feature_network, augment, iteration, args,
                         accelerator):  # fmt: skip
    """Step 6: one update with the generated images detached, then the twin heads follow.

    Real and fake go through in two forwards, since one would mix their batch norm statistics, and each forward's
    backward comes before the next forward, since data parallelism needs that.
    """
    update_spectral_norm(accelerator.unwrap_model(discriminator))
    totals = {"discriminator_loss": 0.0, "real_score": 0.0, "fake_score": 0.0}
    for n, batch in enumerate(batches):
        for is_real, images, purpose in (
            (True, batch["images"], "real"),
            (False, batch["generated"].detach(), "fake"),
        ):
            with torch.no_grad():
                features = feature_network(augment(images, batch["augmentation"][purpose]))
                if is_real or args.augmentation_pairing == "shared":
                    reference = reference_features(batch, purpose, args, augment, feature_network)
            with no_sync_unless(not is_real and n == len(batches) - 1, accelerator, discriminator):
                scores = discriminator(features, reference)
                loss = discriminator_loss(**{"real_scores" if is_real else "fake_scores": scores})
                accelerator.backward(loss)
            totals["discriminator_loss"] += loss.detach() / len(batches)
            totals["real_score" if is_real else "fake_score"] += scores.detach().mean() / len(batches)
    values = reduce_values(totals, accelerator)
    check_finite(values, iteration)
    stepped = apply_update("discriminator", discriminator, optimizer, lr_scheduler, iteration, args, accelerator)
    if stepped and args.discriminator_type == "siamese":
        accelerator.unwrap_model(discriminator).update_twin()
    return values


# Copied from train_adt_sd15.update_generator
def update_generator(batches, unet, optimizer, lr_scheduler, sampler, start_index, discriminator,
                     feature_network, augment, iteration, args, accelerator):  # fmt: skip
    """Step 7: `-E[D(y_hat, y)] + lambda L_diff`, the first part by replaying the chosen steps one at a time."""
    # The score's gradient goes to the images, not to the discriminator, whose weights stay.
    # The unwrapped module, because data parallelism would wait for gradients of its parameters.
    scorer = accelerator.unwrap_model(discriminator).requires_grad_(False)
    totals = {"generator_loss": 0.0, "adversarial_gradient_norm": 0.0}
    vectors = []
    for batch in batches:
        features = feature_network(augment(batch["generated"], batch["augmentation"]["generator"]))
        reference = reference_features(batch, "generator", args, augment, feature_network)
        loss = generator_loss(scorer(features, reference))
        vectors.append(batch["rollout"].prediction_gradients(loss))
        totals["generator_loss"] += loss.detach() / len(batches)
        totals["adversarial_gradient_norm"] += batch["rollout"].guided_norm_squared(vectors[-1])
    set_discriminator_trainable(scorer)

    alpha, sigma = signal_and_noise_levels(sampler, start_index)
    if args.diffusion_loss_weight > 0:
        totals |= {"diffusion_loss": 0.0, "diffusion_gradient_norm": 0.0}
        unet.train()
        for batch in batches:
            device = batch["latents"].device
            level = torch.ones(len(batch["latents"]), 1, 1, 1, device=device)
            timesteps = sampler.timesteps[start_index].to(device).expand(len(batch["latents"]))
            with accelerator.no_sync(unet):
                loss, prediction = diffusion_loss(unet, batch, timesteps, alpha * level, sigma * level, sampler, args)
                weighted = args.diffusion_loss_weight * loss
                gradient = torch.autograd.grad(weighted, prediction, retain_graph=True)[0]
                accelerator.backward(weighted)
            totals["diffusion_loss"] += loss.detach() / len(batches)
            totals["diffusion_gradient_norm"] += gradient.square().sum()
        unet.eval()

    values = reduce_values(totals, accelerator)
    check_finite(values, iteration)
    finish_gradient_norms(values, len(batches), accelerator)
    weight = args.adversarial_loss_weight
    if weight == "auto":
        weight = 0.0
        if values["adversarial_gradient_norm"] > 0:
            target = args.adversarial_gradient_ratio * values["diffusion_gradient_norm"]
            weight = target / values["adversarial_gradient_norm"]
        values["adversarial_loss_weight"] = weight
    passes = []
    for batch, gradients in zip(batches, vectors, strict=True):
        predict = make_predict(unet, batch["conditions"])
        passes += batch["rollout"].replay(predict, [weight * gradient for gradient in gradients])
    for n, replay in enumerate(passes):
        with no_sync_unless(n == len(passes) - 1, accelerator, unet):
            accelerator.backward(replay())
    return values | {"stepped": apply_update("UNet", unet, optimizer, lr_scheduler, iteration, args, accelerator)}


# Copied from train_adt_sd15.set_discriminator_trainable
def set_discriminator_trainable(discriminator):
    discriminator.requires_grad_(True)
    if isinstance(discriminator, SiameseDiscriminator):
        discriminator.twin_heads.requires_grad_(False)


# Copied from train_adt_sd15.update_finetune
def update_finetune(batches, unet, optimizer, lr_scheduler, noise_scheduler, iteration, args, accelerator):
    """Plain fine-tuning: the diffusion loss at a timestep drawn for each image, no rollout, no discriminator."""
    unet.train()
    totals = {"diffusion_loss": 0.0, "diffusion_gradient_norm": 0.0}
    for n, batch in enumerate(batches):
        timesteps, alpha, sigma = plain_noise_levels(batch["density"], noise_scheduler)
        with no_sync_unless(n == len(batches) - 1, accelerator, unet):
            loss, prediction = diffusion_loss(unet, batch, timesteps, alpha, sigma, noise_scheduler, args)
            gradient = torch.autograd.grad(loss, prediction, retain_graph=True)[0]
            accelerator.backward(loss)
        totals["diffusion_loss"] += loss.detach() / len(batches)
        totals["diffusion_gradient_norm"] += gradient.square().sum()
    values = reduce_values(totals, accelerator)
    check_finite(values, iteration)
    finish_gradient_norms(values, len(batches), accelerator)
    return values | {"stepped": apply_update("UNet", unet, optimizer, lr_scheduler, iteration, args, accelerator)}


# Copied from train_adt_sd15.ema_weights
@contextlib.contextmanager
def ema_weights(ema_unet, unet):
    """The averaged weights in place of the trained ones, where there is an average."""
    if ema_unet is None:
        yield
        return
    ema_unet.store(trainable_parameters(unet))
    ema_unet.copy_to(trainable_parameters(unet))
    try:
        yield
    finally:
        ema_unet.restore(trainable_parameters(unet))


# Copied from train_adt_sd15.generate_validation_images
def generate_validation_images(unet, vae, conditions, negative, sampler, args, accelerator):
    """Samples every validation prompt with the training sampler and guidance, from the same noise each time.

    The prompts are shared out over the processes, so that none waits long for another.

    Args:
        conditions: each prompt's embeddings, dicts of (1, ...); negative: the unconditional branch's.

    Returns:
        on every process, a list of images for each prompt.
    """
    pipeline = validation_pipeline(unet, vae, sampler)
    pipeline.set_progress_bar_config(disable=True)
    training = unet.training
    unet.eval()
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (1, vae.config.latent_channels, args.resolution // factor, args.resolution // factor)
    images = []
    for n in range(accelerator.process_index, len(conditions), accelerator.num_processes):
        result = []
        for j in range(args.num_validation_images):
            noise = torch.randn(shape, generator=make_generator(args.seed, "validation", n, j))
            latents = pipeline(
                # In float32, since a pipeline may give the latents the embeddings' precision.
                **{name: value.float() for name, value in conditions[n].items()},
                **{f"negative_{name}": value.float() for name, value in negative.items()},
                latents=noise.to(accelerator.device),
                height=args.resolution,
                width=args.resolution,
                output_type="latent",
                **inference_options(args),
            ).images
            check_latents(latents, "in validation")
            with torch.no_grad():
                result += pipeline.image_processor.postprocess(decode_latents(vae, latents.float()))
        images.append((n, result))
    unet.train(training)
    return [result for _, result in sorted(gather_object(images), key=lambda item: item[0])]


# Copied from train_adt_sd15.log_validation
def log_validation(base_images, tuned_images, iteration, args, accelerator):
    """Writes a grid for each prompt, base images above tuned ones, and sends it to the trackers. Returns the grids."""
    if not accelerator.is_main_process:
        return []
    directory = Path(args.output_dir, "validation")
    directory.mkdir(parents=True, exist_ok=True)
    grids = []
    for n, (base, tuned) in enumerate(zip(base_images, tuned_images, strict=True)):
        grid = make_image_grid(base + tuned, rows=2, cols=len(base))
        grid.save(directory / f"iteration-{iteration:06d}-prompt-{n}.png")
        grids.append(grid)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            stacked = np.stack([np.asarray(grid) for grid in grids])
            tracker.writer.add_images("validation", stacked, iteration, dataformats="NHWC")
        elif tracker.name == "wandb":
            names = zip(grids, args.validation_prompts, strict=True)
            tracker.log_images({"validation": [grid for grid, _ in names]}, step=iteration)
    return grids


# Copied from train_adt_sd15.public_options
def public_options(args) -> dict:
    """The options for cards, trackers and files that may be published: no token, no path of this machine."""
    options = {
        name: value for name, value in vars(args).items() if name != "hub_token" and name not in PRIVATE_OPTIONS
    }
    for name, value in options.items():
        if name.endswith("name_or_path") or name == "dataset_name":
            options[name] = Path(value).name if value is not None and os.path.isdir(value) else value
    return options


# Copied from train_adt_sd15.checkpoint_config
def checkpoint_config(args, accelerator) -> dict:
    """What a checkpoint must agree with when a run is resumed."""
    ignored = FREE_ON_RESUME | {"hub_token"}
    if not args.use_lora:
        ignored |= {name for name in vars(args) if name.startswith("lora_")} | {"rank"}
    if args.adversarial_loss_weight == 0:
        ignored |= ADVERSARIAL_OPTIONS | {name for name in vars(args) if name.startswith("discriminator_")}
    else:
        ignored |= FINE_TUNING_OPTIONS
    config = {name: value for name, value in vars(args).items() if name not in ignored}
    config["global_batch_size"] = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    if args.adversarial_loss_weight != 0:
        config["discriminator_norm_group"] = args.discriminator_norm_group or largest_group(args.train_batch_size)
    config["mixed_precision"] = accelerator.mixed_precision
    if args.lr_scheduler not in ("constant", "constant_with_warmup"):
        config["max_train_steps"] = args.max_train_steps  # what the learning rate decays over
    return config


# Copied from train_adt_sd15.checkpoint_iteration
def checkpoint_iteration(path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


# Copied from train_adt_sd15.list_checkpoints
def list_checkpoints(output_dir) -> list[Path]:
    """The checkpoints in `output_dir`, by their iteration."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=checkpoint_iteration)


# Copied from train_adt_sd15.save_checkpoint
def save_checkpoint(iteration, args, accelerator):
    """Writes `checkpoint-N` aside and renames it, so that it appears whole or not at all; on every process."""
    final = Path(args.output_dir, f"checkpoint-{iteration}")
    partial = Path(args.output_dir, f".{final.name}-partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = {str(file.relative_to(partial)): file.stat().st_size for file in partial.rglob("*") if file.is_file()}
        manifest = {"iteration": iteration, "config": checkpoint_config(args, accelerator), "files": files}
        (partial / "adt_checkpoint.json").write_text(json.dumps(manifest, indent=2))
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        if args.checkpoints_total_limit is not None:
            # First those past this one, which a run left that was taken up again before them, then the oldest.
            others = [path for path in list_checkpoints(args.output_dir) if path != final]
            others.sort(key=lambda path: checkpoint_iteration(path) < iteration)
            for old in others[: max(0, len(others) + 1 - args.checkpoints_total_limit)]:
                shutil.rmtree(old)
        logger.info(f"Saved {final}")
    accelerator.wait_for_everyone()


# Copied from train_adt_sd15.find_checkpoint
def find_checkpoint(args, accelerator):
    """The checkpoint to resume from and its iteration; `(None, 0)` where there is nothing to resume from.

    Raises:
        ADTError: if the checkpoint is missing, truncated, or of another configuration.
    """
    if args.resume_from_checkpoint is None:
        return None, 0
    existing = list_checkpoints(args.output_dir)
    if args.resume_from_checkpoint == "latest":
        if not existing:
            logger.info(f"No checkpoint in {args.output_dir}: starting from the base pipeline.")
            return None, 0
        path = existing[-1]
    else:
        path = Path(args.resume_from_checkpoint)
        if not path.is_dir():
            path = Path(args.output_dir, args.resume_from_checkpoint)
        if not path.is_dir():
            raise ADTError(f"--resume_from_checkpoint {args.resume_from_checkpoint} does not exist.")
    older = [other for other in existing if other != path]
    hint = f" Try --resume_from_checkpoint {older[-1].name}." if older else ""
    manifest_file = path / "adt_checkpoint.json"
    if not manifest_file.is_file():
        raise ADTError(f"{path} is not a checkpoint of this script: it has no adt_checkpoint.json.{hint}")
    try:
        manifest = json.loads(manifest_file.read_text())
    except json.JSONDecodeError as error:
        raise ADTError(f"{manifest_file} is truncated.{hint}") from error
    for name, size in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise ADTError(f"The checkpoint {path} is truncated: {name} is missing or incomplete.{hint}")
    expected = checkpoint_config(args, accelerator)
    different = [
        f"{name} {manifest['config'].get(name)} (now {expected.get(name)})"
        for name in sorted(expected.keys() | manifest["config"].keys())
        if manifest["config"].get(name) != expected.get(name)
    ]
    if different:
        raise ADTError(f"The checkpoint {path} was made with another configuration: {', '.join(different)}.")
    if manifest["iteration"] > args.max_train_steps:
        raise ADTError(f"The checkpoint {path} is at iteration {manifest['iteration']}, past --max_train_steps.")
    return path, manifest["iteration"]


# Copied from train_adt_sd15.pipeline_loading
def pipeline_loading(sampler, mixed_precision, run, args) -> tuple[str, str]:
    """The model card's lines that load the result as `pipeline`, and the names that they import from diffusers."""
    options = public_options(args) if args.push_to_hub else vars(args)
    location = json.dumps(run.repo_id or args.output_dir)
    arguments = "".join(f", {name}=None" for name in unused_components(args))
    if not args.use_lora or args.fuse_lora:
        return f"pipeline = DiffusionPipeline.from_pretrained({location}{arguments})", "DiffusionPipeline"
    imports, lines = ["DiffusionPipeline", type(sampler).__name__], []
    # Said outright, since a base in half precision may load in several precisions.
    dtype = ", torch_dtype=torch." + ("bfloat16" if mixed_precision == "bf16" else "float32")
    arguments += dtype
    for name in ("revision", "variant"):
        if options[name] is not None:
            arguments += f", {name}={json.dumps(options[name])}"
    vae_path = options["pretrained_vae_model_name_or_path"]
    if vae_path is not None:
        imports.append("AutoencoderKL")
        lines.append(f"vae = AutoencoderKL.from_pretrained({json.dumps(vae_path)}{dtype})")
        arguments += ", vae=vae"
    base = json.dumps(options["pretrained_model_name_or_path"])
    lines.append(f"pipeline = DiffusionPipeline.from_pretrained({base}{arguments})")
    lines.append(f'pipeline.scheduler = {type(sampler).__name__}.from_pretrained({location}, subfolder="scheduler")')
    lines.append(f"pipeline.load_lora_weights({location})")
    return "\n".join(lines), ", ".join(sorted(imports))


# Copied from train_adt_sd15.save_model_card
def save_model_card(sampler, has_images, default_size, run, args, accelerator):
    """Writes README.md and adt_config.json into `output_dir`, always anew."""
    options = public_options(args)
    base = options["pretrained_model_name_or_path"]
    call = inference_options(args)
    if args.resolution != default_size:
        call |= {"height": args.resolution, "width": args.resolution}
    facts = {
        "base_model": base,
        "method": "fine-tuning" if args.adversarial_loss_weight == 0 else "adversarial diffusion tuning",
        "iterations": args.max_train_steps,
        "generator_updates": run.num_generator_updates,
        "global_batch_size": run.global_batch_size,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "inference": {
            "scheduler": type(sampler).__name__,
            **{name: sampler.config[name] for name in SAMPLER_FACTS if name in sampler.config},
            **call,
        },
        "training_options": options,
        "versions": {module.__name__: module.__version__ for module in (accelerate, diffusers, torch, transformers)},
    }
    Path(args.output_dir, "adt_config.json").write_text(json.dumps(facts, indent=2) + "\n")
    described = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts["inference"].items())

    prompt = args.validation_prompts[0] if args.validation_prompts else "a lighthouse at dusk"
    loading, imports = pipeline_loading(sampler, accelerator.mixed_precision, run, args)
    arguments = "".join(f", {name}={value}" for name, value in call.items())
    images = ""
    if has_images:
        rows = [
            f"**{text or '(empty prompt)'}**\n\n![{n}](images/prompt-{n}.png)"
            for n, text in enumerate(args.validation_prompts)
        ]
        images = (
            "## Before and after\n\nBase images above, tuned ones below, same seeds.\n\n" + "\n\n".join(rows) + "\n\n"
        )
    cells = {name: str(value).replace("|", "\\|") for name, value in sorted(options.items())}
    table = "\n".join(f"| `{name}` | {value} |" for name, value in cells.items())
    if args.adversarial_loss_weight == 0:
        kind = "plain fine-tuning with the diffusion loss"
        sampling = f"The saved scheduler and the call above ({described}) are a choice: training has not sampled."
    else:
        discriminator = "siamese" if args.discriminator_type == "siamese" else "projected"
        kind = (
            "Adversarial Diffusion Tuning: the sampler below was run with guidance during training, and a "
            f"{discriminator} discriminator on DINOv2 features told its images from the real ones"
        )
        sampling = (
            f"The saved scheduler is the one it was trained with, and the call above samples as in training "
            f"({described}). Other samplers work, but training has not seen them."
        )
    if args.fuse_lora:
        sampling += " The adapters are in the weights already: do not load the file with them on top."
    content = f"""# {Path(args.output_dir).resolve().name}

Tuned from `{base}` by {kind}.

## Usage

```python
import torch
from diffusers import {imports}

{loading}
pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
image = pipeline({json.dumps(prompt)}{arguments}).images[0]
image.save("image.png")
```

{sampling}{inference_note(args)}

{images}## Training

{args.max_train_steps} iterations of {run.global_batch_size} images, {accelerator.num_processes} processes, mixed
precision {accelerator.mixed_precision}, {run.num_generator_updates} updates of the diffusion model. The licence of the
base model applies. The same facts are in `adt_config.json`.

| option | value |
|---|---|
{table}
"""
    data = ModelCardData(
        library_name="diffusers",
        base_model=None if os.path.isdir(args.pretrained_model_name_or_path) else base,
        pipeline_tag="text-to-image",
        inference=True,
        tags=CARD_TAGS + ["lora"] * args.use_lora,
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{content}").save(Path(args.output_dir, "README.md"))


# Copied from train_adt_sd15.is_generator_iteration
def is_generator_iteration(iteration, args) -> bool:
    """Whether the 0-based `iteration` updates the generator."""
    if args.adversarial_loss_weight == 0:
        return True
    return iteration >= args.generator_start_step and (iteration + 1) % args.generator_update_interval == 0


# Copied from train_adt_sd15.make_generator_optimizer
def make_generator_optimizer(parameters, args):
    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        import bitsandbytes as bnb

        optimizer_class = bnb.optim.AdamW8bit
    return make_optimizer(optimizer_class, parameters, args.learning_rate, args)


# Copied from train_adt_sd15.make_optimizer
def make_optimizer(optimizer_class, parameters, learning_rate, args):
    return optimizer_class(
        parameters,
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


# Copied from train_adt_sd15.peak_memory_gb
def peak_memory_gb() -> float:
    """The device's peak allocation where there is a GPU, else the process's peak resident set; 10^9 bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# Copied from train_adt_sd15.start_accelerator
def start_accelerator(args):
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else torchrun's processes would not find each other on a CPU
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))
        ),
        # Else data parallelism holds a second copy of the gradients.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%m/%d/%Y %H:%M:%S", level=logging.INFO
    )
    quiet = not accelerator.is_local_main_process
    for library in (datasets, transformers, diffusers):
        library.utils.logging.set_verbosity_error() if quiet else library.utils.logging.set_verbosity_warning()
    if accelerator.distributed_type not in (
        DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU,
    ):  # fmt: skip
        raise ADTError(
            f"{accelerator.distributed_type.value} is not supported: two networks train in turn here, which sharded "
            "engines do not do under one accelerator. Use data parallelism (accelerate launch --multi_gpu)."
        )
    if args.use_8bit_adam and not transformers.utils.is_bitsandbytes_available():
        raise ADTError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes.")
    if args.adversarial_loss_weight == 0:
        logger.info(
            "--adversarial_loss_weight is 0: plain fine-tuning. --diffusion_loss_weight, --generator_update_interval, "
            "--generator_start_step and the discriminator's options are ignored."
        )
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return accelerator


# Copied from train_adt_sd15.Run
@dataclass
class Run:
    """What is known of a run once its data are checked, before any model is loaded."""

    dataset: datasets.Dataset
    global_batch_size: int
    batch_sampler: GlobalBatchSampler
    num_generator_updates: int
    checkpoint: Path | None  # to resume from
    first_iteration: int
    repo_id: str | None  # on the Hub


# Copied from train_adt_sd15.prepare_run
def prepare_run(args, accelerator) -> Run:
    """Loads and checks data and checkpoint, fills in what `args` leaves to them, and makes the Hub's repository."""
    dataset = load_image_caption_dataset(args)
    global_batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * len(dataset) / global_batch_size)
    if args.scale_lr:
        args.learning_rate *= global_batch_size
        args.discriminator_learning_rate *= global_batch_size
        args.scale_lr = False  # from here on the rates are what they say
    checkpoint, first_iteration = find_checkpoint(args, accelerator)
    batch_sampler = GlobalBatchSampler(
        len(dataset), args, accelerator.num_processes, accelerator.process_index, first_iteration
    )
    used = range(first_iteration * global_batch_size, args.max_train_steps * global_batch_size)[: len(dataset)]
    used = sorted({batch_sampler.dataset_index(n) for n in used})
    num_empty = check_dataset(dataset, used[accelerator.process_index :: accelerator.num_processes], args)
    num_empty = int(accelerator.reduce(torch.tensor(num_empty, device=accelerator.device), reduction="sum"))
    if num_empty:
        logger.warning(f"{num_empty} captions are empty; their images are trained on with the empty prompt.")
    num_generator_updates = sum(is_generator_iteration(k, args) for k in range(args.max_train_steps))
    if num_generator_updates == 0:
        logger.warning("The generator is never updated: --max_train_steps is too small for the first update.")
    repo_id = None
    if accelerator.is_main_process:
        os.makedirs(args.output_dir, exist_ok=True)
        if args.push_to_hub:
            repo_id = create_repo(
                repo_id=args.hub_model_id or Path(args.output_dir).name, exist_ok=True, token=args.hub_token
            ).repo_id
    return Run(
        dataset, global_batch_size, batch_sampler, num_generator_updates, checkpoint, first_iteration, repo_id
    )  # fmt: skip


# Copied from train_adt_sd15.make_feature_network
def make_feature_network(args):
    """The frozen network that the discriminator sees images through, in float32 for the same reason as the VAE."""
    model = Dinov2Model.from_pretrained(args.discriminator_model_name_or_path, cache_dir=args.cache_dir)
    return FeatureNetwork(model.float(), args.discriminator_layers, args.discriminator_resolution)


# Copied from train_adt_sd15.make_discriminator
def make_discriminator(feature_network, args):
    torch.manual_seed(args.seed)  # its first weights, the same on every process
    norm_group = args.discriminator_norm_group or largest_group(args.train_batch_size)
    if args.discriminator_type == "projected":
        return ProjectedDiscriminator(feature_network.channels, len(args.discriminator_layers), norm_group)
    return SiameseDiscriminator(
        feature_network.channels,
        len(args.discriminator_layers),
        similarity=args.discriminator_similarity,
        reduction=args.discriminator_reduction,
        ema_decay=args.discriminator_ema_decay,
        norm_group=norm_group,
    )


# Copied from train_adt_sd15.save_adapters with StableDiffusionPipeline->StableDiffusionXLPipeline
def save_adapters(unet, directory):
    """The adapters as `pytorch_lora_weights.safetensors`, which `load_lora_weights` takes."""
    StableDiffusionXLPipeline.save_lora_weights(
        directory,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )


# Copied from train_adt_sd15.load_adapters
def load_adapters(unet, directory):
    saved = load_file(os.path.join(directory, "pytorch_lora_weights.safetensors"))
    saved = {name.removeprefix("unet."): value for name, value in saved.items()}
    result = set_peft_model_state_dict(unet, saved)
    if result.unexpected_keys or len(saved) != len(trainable_parameters(unet)):
        raise ADTError(f"The adapters in {directory} are not those of this configuration.")


# Copied from train_adt_sd15.register_checkpoint_hooks
def register_checkpoint_hooks(unet, ema_unet, args, accelerator):
    """Has accelerate save and load the networks as safetensors, in the layout that pipelines load."""

    def save_model_hook(models, weights, output_dir):
        while models_left := len(weights):
            model = accelerator.unwrap_model(models[models_left - 1])
            weights.pop()
            if not accelerator.is_main_process:
                continue
            if model is not unet:
                save_file(model.state_dict(), os.path.join(output_dir, "discriminator.safetensors"))
            elif args.use_lora:
                save_adapters(unet, output_dir)
            else:
                unet.save_pretrained(os.path.join(output_dir, "unet"))
        if ema_unet is not None and accelerator.is_main_process:
            directory = os.path.join(output_dir, "unet_ema")
            with ema_weights(ema_unet, unet):
                save_adapters(unet, directory) if args.use_lora else unet.save_pretrained(directory)
            state = {name: value for name, value in ema_unet.state_dict().items() if name != "shadow_params"}
            Path(directory, "ema.json").write_text(json.dumps(state))

    def load_model_hook(models, input_dir):
        if ema_unet is not None:
            # Into the network first, whose own weights come next.
            directory = Path(input_dir, "unet_ema")
            load_unet_weights(directory)
            state = json.loads(Path(directory, "ema.json").read_text())
            weights = [parameter.detach().clone() for parameter in trainable_parameters(unet)]
            ema_unet.load_state_dict(state | {"shadow_params": weights})
            ema_unet.to("cpu" if args.offload_ema else accelerator.device)
        while models:
            model = accelerator.unwrap_model(models.pop())
            if model is unet:
                load_unet_weights(input_dir if args.use_lora else Path(input_dir, "unet"))
            else:
                model.load_state_dict(load_file(os.path.join(input_dir, "discriminator.safetensors")))

    def load_unet_weights(directory):
        if args.use_lora:
            load_adapters(unet, directory)
        else:
            unet.load_state_dict(UNet2DConditionModel.from_pretrained(directory).state_dict())

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)


# Copied from train_adt_sd15.train
def train(unet, vae, prompt_encoder, validation_conditions, sampler, noise_scheduler, default_size, run, args,
          accelerator):  # fmt: skip
    """The run from the loaded models to the saved result; its comments are numbered as the paper's algorithm."""
    adversarial = args.adversarial_loss_weight != 0
    scheduler_options = {"num_cycles": args.lr_num_cycles, "power": args.lr_power}
    unwrapped_unet = unet
    optimizer = make_generator_optimizer(trainable_parameters(unet), args)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max(1, run.num_generator_updates),
        **scheduler_options,
    )
    ema_unet = None
    if args.use_ema:
        ema_unet = EMAModel(trainable_parameters(unet), decay=args.ema_decay, foreach=args.foreach_ema)
        ema_unet.to("cpu" if args.offload_ema else accelerator.device)
    # The learning rate schedulers are not prepared: accelerate would step them once for each process. The frozen
    # models are not either.
    unet, optimizer = accelerator.prepare(unet, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)
    if adversarial:
        feature_network = make_feature_network(args).to(accelerator.device)
        augment = DiffAugment(args.augmentation_policy)
        discriminator = make_discriminator(feature_network, args)
        discriminator_optimizer = make_optimizer(
            torch.optim.AdamW, trainable_parameters(discriminator), args.discriminator_learning_rate, args
        )
        discriminator_lr_scheduler = get_scheduler(
            args.lr_scheduler,
            discriminator_optimizer,
            num_warmup_steps=args.discriminator_lr_warmup_steps,
            num_training_steps=args.max_train_steps,
            **scheduler_options,
        )
        discriminator, discriminator_optimizer = accelerator.prepare(discriminator, discriminator_optimizer)
        accelerator.register_for_checkpointing(discriminator_lr_scheduler)
    register_checkpoint_hooks(unwrapped_unet, ema_unet, args, accelerator)

    def validate():
        return generate_validation_images(
            unwrapped_unet, vae, validation_conditions, prompt_encoder.negative, sampler, args, accelerator
        )

    base_images = None
    if args.validation_prompts:
        # Before a checkpoint is loaded, so that the weights are the base pipeline's; there is no second copy of them.
        base_images = validate()
    if run.checkpoint is not None:
        accelerator.load_state(str(run.checkpoint))
        logger.info(f"Resuming from {run.checkpoint}")
    if args.report_to != "none":
        accelerator.init_trackers(
            args.tracker_project_name, config={name: str(value) for name, value in public_options(args).items()}
        )

    dataloader = torch.utils.data.DataLoader(
        ImageCaptionDataset(run.dataset, args),
        batch_sampler=run.batch_sampler,
        collate_fn=collate_fn,
        num_workers=args.dataloader_num_workers,
    )
    sampler_options = ", ".join(f"{name}={value}" for name, value in sorted(sampler.config.items()) if name[0] != "_")
    logger.info("***** Running training *****")
    logger.info(f"  Images = {len(run.dataset)}, global batch = {run.global_batch_size}")
    logger.info(
        f"  Iterations = {run.first_iteration} to {args.max_train_steps}, generator updates = "
        f"{run.num_generator_updates}"
    )
    logger.info(f"  Trained parameters = {sum(parameter.numel() for parameter in trainable_parameters(unet)):,}")
    logger.info(f"  Sampler = {type(sampler).__name__}, {args.num_inference_steps} steps ({sampler_options})")
    progress_bar = tqdm(
        range(args.max_train_steps),
        initial=run.first_iteration,
        desc="Iterations",
        disable=not accelerator.is_local_main_process,
    )
    saturated_for, saturation_warned, shown = 0, False, {}
    loader = iter(dataloader)
    for iteration in range(run.first_iteration, args.max_train_steps):
        started = time.perf_counter()
        # The global generator serves dropout alone, where the model has any.
        seed = make_generator(args.seed, "dropout", iteration, accelerator.process_index).initial_seed()
        torch.manual_seed(seed)
        updates_generator = is_generator_iteration(iteration, args)

        # 1. Encode the global batch's micro-batches.
        batches = [
            prepare_batch(next(loader), iteration, args, accelerator, vae, prompt_encoder)
            for _ in range(args.gradient_accumulation_steps)
        ]
        if not adversarial:
            values = update_finetune(
                batches, unet, optimizer, lr_scheduler, noise_scheduler, iteration, args, accelerator
            )
        else:
            # 2. One start index for the whole global batch. 3. The steps that send a gradient.
            path_generator = make_generator(args.seed, "path", iteration)
            start_index = torch.randint(args.num_inference_steps, (1,), generator=path_generator).item()
            train_steps = ()
            if updates_generator:
                train_steps = select_train_steps(
                    start_index, args.num_inference_steps, args.num_gradient_steps, path_generator
                )
            # 4. Simulate inference and 5. decode.
            unet.eval()
            for batch in batches:
                batch["rollout"] = simulate_inference(
                    make_predict(unet, batch["conditions"]),
                    sampler,
                    starting_latents(sampler, batch["latents"], batch["noise"], start_index),
                    start_index,
                    args.guidance_scale,
                    inference_options(args).get("guidance_rescale", 0.0),
                    train_steps,
                    args.gradient_path,
                )
                check_latents(batch["rollout"].latents, f"at iteration {iteration + 1}")
                batch["generated"] = decode_latents(vae, batch["rollout"].latents)
            # 6. Update the discriminator.
            values = {"start_index": start_index}
            values |= update_discriminator(
                batches, discriminator, discriminator_optimizer, discriminator_lr_scheduler, feature_network, augment,
                iteration, args, accelerator,
            )  # fmt: skip
            # 7. Update the generator.
            if updates_generator:
                values |= update_generator(
                    batches, unet, optimizer, lr_scheduler, sampler, start_index, discriminator,
                    feature_network, augment, iteration, args, accelerator,
                )  # fmt: skip
            values["discriminator_lr"] = discriminator_lr_scheduler.get_last_lr()[0]
            gap = values["real_score"] - values["fake_score"]
            saturated_for = saturated_for + 1 if gap > SATURATION_GAP else 0
            if saturated_for >= SATURATION_ITERATIONS and not saturation_warned:
                saturation_warned = True
                logger.warning(
                    f"The discriminator is saturated: its scores for real and generated images have been {gap:.2f} "
                    f"apart for {SATURATION_ITERATIONS} iterations. Lower --discriminator_learning_rate."
                )
        del batches
        stepped = values.pop("stepped", False)
        values["lr"] = lr_scheduler.get_last_lr()[0]
        if ema_unet is not None and stepped:
            if args.offload_ema:
                ema_unet.to(accelerator.device, non_blocking=True)
            ema_unet.step(trainable_parameters(unwrapped_unet))
            if args.offload_ema:
                ema_unet.to("cpu", non_blocking=True)

        seconds = time.perf_counter() - started
        values |= {
            "seconds_per_iteration": seconds,
            "images_per_second": run.global_batch_size / seconds,
            "peak_memory_gb": peak_memory_gb(),
        }
        shown |= values
        progress_bar.update(1)
        progress_bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})
        accelerator.log(values, step=iteration + 1)

        done = iteration + 1
        if done % args.checkpointing_steps == 0:
            save_checkpoint(done, args, accelerator)
        if args.validation_prompts and done % args.validation_steps == 0 and done < args.max_train_steps:
            with ema_weights(ema_unet, unwrapped_unet):
                tuned_images = validate()
            log_validation(base_images, tuned_images, done, args, accelerator)
    progress_bar.close()

    # The end: a result that pipelines load, with the sampler that it was trained with, its card, and the Hub.
    with ema_weights(ema_unet, unwrapped_unet):
        grids = []
        if args.validation_prompts:
            grids = log_validation(base_images, validate(), args.max_train_steps, args, accelerator)
        # The last that the processes do together: only the main one goes on, for as long as an upload takes.
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            save_result(unwrapped_unet, vae, sampler, default_size, grids, run, args, accelerator)


# Copied from train_adt_sd15.save_result with StableDiffusionPipeline->StableDiffusionXLPipeline
def save_result(unet, vae, sampler, default_size, grids, run, args, accelerator):
    """Writes the pipeline or the adapters, the scheduler, the card and its images, and uploads them when asked."""
    sampler = type(sampler).from_config(sampler.config)
    written = ["README.md", "adt_config.json"]  # what an upload takes, and nothing else that the folder may hold
    if args.use_lora:
        save_adapters(unet, args.output_dir)
        sampler.save_pretrained(os.path.join(args.output_dir, "scheduler"))
        written += ["pytorch_lora_weights.safetensors", "scheduler/*"]
    if not args.use_lora or args.fuse_lora:
        components = {"scheduler": sampler} | absent_components(args)
        if not args.use_lora:
            components["unet"] = unet
        if args.pretrained_vae_model_name_or_path is not None:
            components["vae"] = AutoencoderKL.from_pretrained(
                args.pretrained_vae_model_name_or_path, cache_dir=args.cache_dir
            )
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            args.pretrained_model_name_or_path, **components, **hub_options(args)
        )
        for name, component in pipeline.components.items():
            if isinstance(component, torch.nn.Module) and name not in HALF_PRECISION_COMPONENTS:
                component.float()  # a variant's half-precision parts do not work together with what was trained
        if args.use_lora:
            pipeline.load_lora_weights(args.output_dir, weight_name="pytorch_lora_weights.safetensors")
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
        pipeline.save_pretrained(args.output_dir)
        written += ["model_index.json", *(f"{name}/*" for name in pipeline.components)]
    for n, grid in enumerate(grids):
        file = Path(args.output_dir, "images", f"prompt-{n}.png")
        file.parent.mkdir(exist_ok=True)
        grid.save(file)
        written.append(f"images/{file.name}")
    save_model_card(sampler, bool(grids), default_size, run, args, accelerator)
    if args.push_to_hub:
        upload_folder(
            repo_id=run.repo_id,
            folder_path=args.output_dir,
            commit_message="End of training",
            allow_patterns=written,
            token=args.hub_token,
        )
    logger.info(f"Saved the result in {args.output_dir}")


# Copied from train_adt_sd15.end_run
def end_run(accelerator):
    """Closes the trackers and destroys the process group, once nothing of the training refers to either.

    A data-parallel wrapper that outlived the group's end would be the one to destroy it, holding Python's lock, while
    a thread of gloo's may still want that lock to free a tensor: the process then never ends.
    """
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


def main(args):
    accelerator = start_accelerator(args)
    # Everything that can be checked before a model is loaded.
    sampler, noise_scheduler, default_size = check_models(args, accelerator.device)
    run = prepare_run(args, accelerator)
    prompt_encoder = PromptEncoder(args, accelerator)
    validation_conditions = [prompt_encoder([prompt]) for prompt in args.validation_prompts or []]
    if args.cache_text_embeddings is not None:
        prompt_encoder.use_cache(list_captions(run.dataset, args), args, accelerator)
    vae = load_vae(args, accelerator)
    unet = load_unet(args, accelerator)
    train(
        unet, vae, prompt_encoder, validation_conditions, sampler, noise_scheduler, default_size, run, args,
        accelerator,
    )  # fmt: skip
    end_run(accelerator)


if __name__ == "__main__":
    try:
        main(parse_args())
    except ADTError as error:
        sys.exit(f"error: {error}")

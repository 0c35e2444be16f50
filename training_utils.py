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
"""What any of the training scripts needs, and no model family tells as its own story.

The sections can be read alone:

- options: `Nature`, `Options`, the groups of options that scripts share, `parse_options`;
- samplers of models with a variance-preserving schedule: `SAMPLERS`, `configure_sampler`;
- the run: `Family`, `Method`, `Run`, `start_accelerator`, `Progress`, `end_run`;
- frozen and trained networks: `load_vae`, `prepare_network`, `sample_posterior`, `decode_checkpointed`;
- a micro-batch: `Batch`, `Conditions`, `make_predict`;
- updates: `Totals`, `Trained`, `prepare_generator`.

`data_utils.py`, `adversary_utils.py` and `output_utils.py` stand on this module, and the scripts on all four.
"""

import argparse
import contextlib
import copy
import gc
import logging
import math
import os
import sys
import time
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Callable

import datasets
import diffusers
import psutil
import torch
import transformers
from accelerate import Accelerator, init_empty_weights
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, ProjectConfiguration
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params
from peft import LoraConfig
from PIL import Image
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from adt_utils import (
    GRADIENT_PATHS,
    REFUSED_SAMPLERS,
    DiffAugment,
    SimulatedInference,
)


logger = get_logger(__name__)
BOOLEAN = argparse.BooleanOptionalAction


class ADTError(RuntimeError):
    """An error whose message is all that the user needs: bad input, or a run that cannot go on."""


# Options


class Nature(Enum):
    """What an option is, beside its value. It is declared with the option, and what depends on it is derived."""

    FREE = "may change when a run is resumed, since it does not change what an iteration computes, but by rounding"
    NO_EFFECT = "leaves the result as it is, and may change when a run is resumed"
    BY_CONTENT = "is a place of data or of a model, which a resumed run recognises by their content"
    COUNTED = "is free, and a result's iterations and global batch size stand for it"
    PRIVATE = "says something about the user's machine, which a published file has no business with"
    SECRET = "is never written"
    ADVERSARIAL = "is ignored by plain fine-tuning"
    FINE_TUNING = "is ignored by ADT"
    LORA = "is ignored without --use_lora"


class Options(argparse.Namespace):
    """A run's options. `vars(args)` has what was parsed, and nothing else."""

    __slots__ = ("natures",)  # {name: its `Nature`s}; a slot, so that it is no option itself

    @property
    def adversarial(self) -> bool:
        """Whether there is an adversary: ADT, not plain fine-tuning."""
        return self.adversarial_loss_weight != 0

    def of_nature(self, *natures) -> set[str]:
        """The names of the options that have one of `natures`."""
        return {name for name, own in self.natures.items() if own.intersection(natures)}

    def replace(self, **values) -> "Options":
        """The same options but for `values`."""
        changed = copy.copy(self)
        for name, value in values.items():
            setattr(changed, name, value)
        return changed

    def public(self) -> dict:
        """The options for cards, trackers and files that may be published: no token, no path of this machine."""
        hidden = self.of_nature(Nature.PRIVATE, Nature.SECRET)
        options = {name: value for name, value in vars(self).items() if name in self.natures and name not in hidden}
        for name, value in options.items():
            if name.endswith("name_or_path") or name == "dataset_name":
                options[name] = Path(value).name if value is not None and os.path.isdir(value) else value
        return options


def adder(group, *shared):
    """A function that declares an option as `group.add_argument` does, with natures of its own beside the shared."""

    def add(flag, *natures, **declaration):
        group.add_argument(flag, **declaration).natures = frozenset(shared + natures)

    return add


def option_natures(parser) -> dict:
    return {
        action.dest: getattr(action, "natures", frozenset()) for action in parser._actions if action.dest != "help"
    }


def number(kind, check, rule):
    """A `type=` function: `kind(text)`, refused by the sentence "must `rule`, not `text`" unless `check(value)`."""

    def parse(text):
        value = kind(text)
        if not check(value):
            raise argparse.ArgumentTypeError(f"must {rule}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse's "invalid int value"
    return parse


positive_int = number(int, lambda value: value > 0, "be greater than 0")
positive_float = number(float, lambda value: value > 0, "be greater than 0")
non_negative_int = number(int, lambda value: value >= 0, "not be negative")
non_negative_float = number(float, lambda value: value >= 0, "not be negative")
share = number(float, lambda value: 0 <= value <= 1, "lie in [0, 1]")


def weight_or_auto(text):
    """A `type=` function: a finite weight that is not negative, or "auto"."""
    if text == "auto":
        return text
    try:
        weight = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is neither a number nor auto") from None
    if not 0 <= weight < math.inf:
        raise argparse.ArgumentTypeError(f"must not be negative, not {text}")
    return weight


def one_word(text):
    """A `type=` function for a secret: less the space around it, such as a file's line end, and never repeated."""
    word = text.strip()
    if not word.isascii() or not word.isprintable() or " " in word:
        raise argparse.ArgumentTypeError("must be one word of printable ASCII")  # else an HTTP error would quote it
    return word


def existing_folder(text):
    """A `type=` function: a folder that is there."""
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return text


def folder_to_write(text):
    """A `type=` function: a folder that is there or can be made."""
    path = Path(text).absolute()
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise argparse.ArgumentTypeError(f"{text}: {place} is a file")
    return text


def sampler_of(samplers):
    """A `type=` function: a key of `samplers`; one whose steps the path cannot express is refused with the reason."""

    def parse(text):
        if text in samplers:
            return text
        reason = f"cannot be tuned with: {REFUSED_SAMPLERS[text]}" if text in REFUSED_SAMPLERS else "is not known"
        raise argparse.ArgumentTypeError(f"{text} {reason}; choose from {', '.join(samplers)}")

    return parse


def add_arguments(parser, samplers):
    """The options of all the scripts, less the defaults that differ between them; `samplers` as in `parse_options`."""
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_training_arguments(parser)
    add_lora_arguments(parser)
    add_inference_arguments(parser, samplers)
    add_adversarial_arguments(parser)
    add_discriminator_arguments(parser)
    add_output_arguments(parser)


def add_model_arguments(parser):
    add = adder(parser.add_argument_group("model"))
    add("--pretrained_model_name_or_path", Nature.BY_CONTENT, required=True,
        help="Hub id or folder of the base pipeline.")  # fmt: skip
    add("--revision", default=None, help="Revision of the base pipeline on the Hub.")
    add("--variant", default=None, help="Variant of the base pipeline's weights, such as fp16.")
    add("--pretrained_vae_model_name_or_path", Nature.BY_CONTENT, default=None,
        help="Another VAE than the base pipeline's.")  # fmt: skip


def add_data_arguments(parser):
    add = adder(parser.add_argument_group("data"))
    add("--dataset_name", Nature.BY_CONTENT, default=None,
        help="Hub id or folder of a dataset with images and captions.")  # fmt: skip
    add("--dataset_config_name", Nature.BY_CONTENT, default=None, help="Configuration of the dataset.")
    add("--train_data_dir", Nature.BY_CONTENT, Nature.PRIVATE, type=existing_folder, default=None,
        help="Folder of images with a metadata.jsonl, instead of --dataset_name.")  # fmt: skip
    add("--image_column", default="image", help="Column with the images.")
    add("--caption_column", default="text", help="Column with a caption or a list of captions.")
    add("--max_train_samples", type=positive_int, default=None, help="Use this many images, drawn by the seed.")
    add("--cache_dir", Nature.NO_EFFECT, Nature.PRIVATE, default=None,
        help="Where models and datasets from the Hub are stored.")  # fmt: skip
    add("--resolution", type=positive_int, help="Side of the square training images.")
    add("--center_crop", action=BOOLEAN, default=False, help="Crop the centre, not at random.")
    add("--random_flip", action=BOOLEAN, default=False, help="Mirror half of the images.")
    add("--image_interpolation_mode", choices=[mode.name.lower() for mode in Image.Resampling], default="lanczos",
        help="How images are resized.")  # fmt: skip
    add("--proportion_empty_prompts", type=share, default=0.0,
        help="Share of captions replaced by the empty prompt, in the diffusion loss alone.")  # fmt: skip
    add("--dataloader_num_workers", Nature.NO_EFFECT, type=non_negative_int, default=4,
        help="Processes that load images, to each process that trains.")  # fmt: skip
    add("--check_images", Nature.NO_EFFECT, choices=["all", "sample", "none"], default="sample",
        help="Which of the images to decode before the run; all are done once and remembered.")  # fmt: skip
    # Where it makes a difference, there is no run without it.
    add("--skip_bad_images", Nature.NO_EFFECT, action=BOOLEAN, default=False,
        help="Replace images that do not decode by the next ones, and count them.")  # fmt: skip


def add_training_arguments(parser):
    add = adder(parser.add_argument_group("training"))
    add("--output_dir", Nature.NO_EFFECT, Nature.PRIVATE, type=folder_to_write,
        help="Where the tuned pipeline and checkpoints are written.")  # fmt: skip
    add("--seed", type=int, default=0, help="All randomness derives from it.")
    add("--train_batch_size", Nature.COUNTED, type=positive_int, default=2, help="Images a process and micro-batch.")
    add("--max_train_steps", Nature.COUNTED, type=positive_int, default=None,
        help="Iterations; 20000 where nothing is said.")  # fmt: skip
    add("--num_train_epochs", Nature.COUNTED, type=positive_int, default=None, help="Instead of --max_train_steps.")
    add("--max_train_time", Nature.NO_EFFECT, type=positive_float, default=None,
        help="Hours after which the run stops with a checkpoint, as it does at SIGTERM.")  # fmt: skip
    add("--gradient_accumulation_steps", Nature.COUNTED, type=positive_int, default=1,
        help="Micro-batches an iteration.")  # fmt: skip
    add("--gradient_checkpointing", Nature.NO_EFFECT, action=BOOLEAN, default=False,
        help="Less memory for about a third more time.")  # fmt: skip
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default=None, help="Else accelerate's.")
    add("--allow_tf32", Nature.FREE, action=BOOLEAN, default=False, help="Faster float32 on Ampere and later.")
    add("--learning_rate", type=positive_float, help="The generator's.")
    add("--scale_lr", action=BOOLEAN, default=False,
        help="Multiply the learning rates by the global batch size; cards have the product.")  # fmt: skip
    add("--lr_scheduler", choices=[kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT],
        default="constant_with_warmup", help="Of each optimizer, counted in its own updates.")  # fmt: skip
    add("--lr_warmup_steps", type=non_negative_int, default=500, help="In generator updates.")
    add("--lr_num_cycles", type=int, default=1, help="Of cosine_with_restarts.")
    add("--lr_power", type=float, default=1.0, help="Of polynomial.")
    add("--use_8bit_adam", action=BOOLEAN, default=False, help="The generator's; needs bitsandbytes.")
    add("--adam_beta1", type=float, default=0.9, help="Of each optimizer.")
    add("--adam_beta2", type=float, default=0.999, help="Of each optimizer.")
    add("--adam_weight_decay", type=float, default=1e-2, help="Of each optimizer.")
    add("--adam_epsilon", type=float, default=1e-8, help="Of each optimizer.")
    add("--max_grad_norm", type=positive_float, default=1.0, help="Gradients are clipped to it, each network's.")
    add("--use_ema", action=BOOLEAN, default=False, help="Average the generator's weights.")
    add("--ema_decay", type=share, default=0.9999, help="Of that average, in generator updates.")
    add("--offload_ema", Nature.NO_EFFECT, action=BOOLEAN, default=False, help="Keep the average in CPU memory.")
    add("--foreach_ema", Nature.NO_EFFECT, action=BOOLEAN, default=False,
        help="Update the average with fused operations.")  # fmt: skip
    add("--noise_offset", type=non_negative_float, default=0.0,
        help="Scale of a constant added to the diffusion loss's noise.")  # fmt: skip


def add_lora_arguments(parser):
    group = parser.add_argument_group("LoRA")
    add = adder(group)
    add("--use_lora", action=BOOLEAN, default=False, help="Train low-rank adapters, not the network's own weights.")
    add("--fuse_lora", Nature.NO_EFFECT, action=BOOLEAN, default=False,
        help="Save the full pipeline, with the adapters fused, as well.")  # fmt: skip
    add("--output_kohya_format", Nature.NO_EFFECT, action=BOOLEAN, default=False,
        help="Save the adapters for ComfyUI and kohya's tools as well.")  # fmt: skip
    add = adder(group, Nature.LORA)
    add("--rank", type=positive_int, default=16, help="Of the adapters.")
    add("--lora_alpha", type=positive_float, default=None, help="Adapters are scaled by it over rank; the rank.")
    add("--lora_dropout", type=share, default=0.0, help="Of the adapters, in the diffusion loss.")
    add("--lora_target_modules", nargs="+", default=["to_q", "to_k", "to_v", "to_out.0"],
        help="Layers that get one.")  # fmt: skip


def add_inference_arguments(parser, samplers):
    steps = ", ".join(f"{name} {steps}" for name, (_, steps, *_) in samplers.items())
    add = adder(parser.add_argument_group("inference during training"))
    add("--sampler", type=sampler_of(samplers), help=f"One of {', '.join(samplers)}.")
    add("--num_inference_steps", type=positive_int, default=None, help=f"The sampler's; {steps}.")
    add("--guidance_scale", type=non_negative_float, help="No guidance at 1 or less.")


def add_adversarial_arguments(parser):
    group = parser.add_argument_group("adversarial tuning")
    adder(group)(
        "--adversarial_loss_weight",
        type=weight_or_auto,
        default=1.0,
        help="A number; 0 for plain fine-tuning; auto to balance the gradients, see --adversarial_gradient_ratio.",
    )
    add = adder(group, Nature.ADVERSARIAL)
    add(
        "--adversarial_gradient_ratio",
        type=positive_float,
        default=1.0,
        help="With auto: the norm of the adversarial gradient at the predictions, over the diffusion loss's.",
    )
    add("--diffusion_loss_weight", type=non_negative_float, default=0.5, help="Lambda.")
    add("--num_gradient_steps", type=positive_int, default=3, help="K, the sampler steps that send gradient.")
    add("--gradient_path", choices=GRADIENT_PATHS, default="adt", help="The backward path; drtune for the ablation.")
    add("--generator_update_interval", type=positive_int, default=5, help="Iterations a generator update.")
    add("--generator_start_step", type=non_negative_int, default=0,
        help="Iterations in which only the discriminator trains.")  # fmt: skip


def add_discriminator_arguments(parser):
    add = adder(parser.add_argument_group("discriminator"), Nature.ADVERSARIAL)
    add("--discriminator_model_name_or_path", Nature.BY_CONTENT, default="facebook/dinov2-small",
        help="A DINOv2 model, which is frozen.")  # fmt: skip
    add("--discriminator_layers", type=int, nargs="+", default=[-1, 2, 5, 8, 11],
        help="Its blocks that are used; -1 is the patch embedding. ViT-L: 5 10 14 19 23.")  # fmt: skip
    add("--discriminator_resolution", type=positive_int, default=518, help="Side of the images that it sees.")
    add("--discriminator_norm_group", Nature.FREE, type=positive_int, default=None,
        help="Images to a batch norm group; the largest divisor of the batch size that is at most 8.")  # fmt: skip
    add("--discriminator_type", choices=["siamese", "projected"], default="siamese", help="projected: the ablation.")
    add("--discriminator_similarity", choices=["cosine", "dot"], default="cosine",
        help="Of the siamese outputs; with dot the hinge's margin acts, on each token.")  # fmt: skip
    add("--discriminator_reduction", choices=["token", "pooled"], default="token",
        help="Average the similarities over tokens, or the outputs before them.")  # fmt: skip
    add("--discriminator_ema_decay", type=share, default=0.99, help="Of the twin heads.")
    add("--discriminator_learning_rate", type=positive_float, help="The discriminator's.")
    add("--discriminator_lr_warmup_steps", type=non_negative_int, default=1000, help="In discriminator updates.")
    add("--real_images", choices=["dataset", "reconstructed"], default="dataset",
        help="What it calls real: the dataset's images, or what the VAE makes of them.")  # fmt: skip
    add("--mismatched_pair_weight", type=non_negative_float, default=0.0,
        help="Of real images against other captions' images as negatives of the siamese discriminator.")  # fmt: skip
    add("--augmentation_policy", nargs="*", choices=DiffAugment.POLICIES, default=list(DiffAugment.POLICIES),
        help="Differentiable augmentation; nothing behind the flag for none.")  # fmt: skip
    add("--augmentation_pairing", choices=["independent", "shared", "input"], default="independent",
        help="The reference's augmentation: its own draw, the scored image's, or none.")  # fmt: skip


def add_output_arguments(parser):
    add = adder(parser.add_argument_group("checkpoints, validation and reports"), Nature.NO_EFFECT)
    add("--checkpointing_steps", type=positive_int, default=500, help="Iterations between checkpoints.")
    add("--checkpoints_total_limit", type=non_negative_int, default=3, help="Keep this many, the newest; 0 for all.")
    add("--resume_from_checkpoint", Nature.PRIVATE, default=None,
        help="A checkpoint's folder or name in --output_dir, or latest.")  # fmt: skip
    add("--validation_prompts", nargs="+", default=None, help="Prompts to sample during training.")
    add("--num_validation_images", type=positive_int, default=4, help="Images for each of them.")
    add("--validation_steps", type=positive_int, default=1000, help="Iterations between validations.")
    add("--drift_tolerance", type=share, default=0.5,
        help="Warn of validation images that lost more of their likeness to the base's.")  # fmt: skip
    add("--drift_clip_model_name_or_path", default=None,
        help="A CLIP model, for their likeness to their prompts as well.")  # fmt: skip
    add("--stop_on_drift", action=BOOLEAN, default=False,
        help="End with the last checkpoint before it instead; each validation then writes one.")  # fmt: skip
    add("--report_to", default="tensorboard", help="tensorboard, wandb, comet_ml, all or none.")
    add("--logging_dir", Nature.PRIVATE, default="logs", help="TensorBoard's folder in --output_dir.")
    add("--tracker_project_name", help="The tracker's project.")
    add("--push_to_hub", action=BOOLEAN, default=False, help="Upload the tuned pipeline.")
    add("--hub_model_id", default=None, help="Its repository; the output folder's name by default.")
    add("--hub_token", Nature.SECRET, type=one_word, default=None,
        help="Else the token of `hf auth login`. It is never written.")  # fmt: skip


def add_schedule_arguments(parser):
    """The options of models with a variance-preserving schedule."""
    add = adder(parser.add_argument_group("noise schedule"))
    add("--prediction_type", choices=["epsilon", "v_prediction"], default=None,
        help="What the UNet predicts, where the base pipeline's scheduler states it wrongly.")  # fmt: skip
    add("--timestep_spacing", choices=["leading", "trailing", "linspace"], default=None,
        help="The base pipeline's own; where it states none, leading for ddim, else linspace; trailing where the "
        "schedule has zero terminal SNR.")  # fmt: skip
    add("--guidance_rescale", type=share, default=0.0, help="For zero-terminal-SNR checkpoints: 0.7.")
    add("--snr_gamma", type=positive_float, default=None, help="Min-SNR weighting of the diffusion loss; 5.0.")


def add_text_encoder_arguments(group):
    """The options of models whose text encoders are large."""
    add = adder(group)
    add("--offload_text_encoders", Nature.NO_EFFECT, action=BOOLEAN, default=False,
        help="Keep the text encoders in CPU memory while they are not needed.")  # fmt: skip
    add("--cache_text_embeddings", Nature.FREE, Nature.PRIVATE, type=folder_to_write, default=None,
        help="Folder for all captions' embeddings, computed once.")  # fmt: skip


def options_without_effect() -> set[str]:
    """Names of shared options that leave a result as it is, or that iterations and global batch size stand for."""
    parser = argparse.ArgumentParser()
    add_arguments(parser, samplers={})
    add_text_encoder_arguments(parser)
    return {name for name, own in option_natures(parser).items() if own & {Nature.NO_EFFECT, Nature.COUNTED}}


def parse_options(parser, samplers, input_args=None) -> Options:
    """Parses and checks the options, and fills in those that depend on others.

    Args:
        parser: has the options of `add_arguments` at least.
        samplers: {name: (class, default number of steps, ...)}.
    """
    args = parser.parse_args(input_args, namespace=Options())
    args.natures = option_natures(parser)
    check_options(args, parser)
    by_default = args.max_train_steps is None and args.num_train_epochs is None
    return args.replace(
        lora_alpha=float(args.rank) if args.lora_alpha is None else args.lora_alpha,
        num_inference_steps=args.num_inference_steps or samplers[args.sampler][1],
        max_train_steps=20_000 if by_default else args.max_train_steps,
    )


def check_options(args, parser):
    """Refuses what no option's own `type=` can tell."""
    if (args.dataset_name is None) == (args.train_data_dir is None):
        parser.error("give either --dataset_name or --train_data_dir.")
    if args.adversarial_loss_weight == "auto" and args.diffusion_loss_weight == 0:
        parser.error("--adversarial_loss_weight auto needs a diffusion loss to balance: --diffusion_loss_weight is 0.")
    if args.hub_token is not None and args.report_to not in ("tensorboard", "none"):
        parser.error(
            f"--hub_token would reach {args.report_to}, which records the command line: use `hf auth login` or the "
            "HF_TOKEN environment variable."
        )
    if args.discriminator_norm_group and args.train_batch_size % args.discriminator_norm_group:
        parser.error(
            f"--discriminator_norm_group {args.discriminator_norm_group} does not divide --train_batch_size "
            f"{args.train_batch_size}."
        )
    num_prompts = len(args.validation_prompts or []) if args.adversarial else 0
    for flag in ("stop_on_drift", "drift_clip_model_name_or_path"):
        if getattr(args, flag) and num_prompts < 2:
            parser.error(f"--{flag} needs an adversary and at least two --validation_prompts.")
    if args.adversarial and args.mismatched_pair_weight > 0:
        if args.discriminator_type == "projected":
            parser.error("--mismatched_pair_weight needs a discriminator that sees the pair: projected ones do not.")
        if args.augmentation_pairing == "shared":
            parser.error("--mismatched_pair_weight and --augmentation_pairing shared: the augmentation would tell.")
    for flag in ("fuse_lora", "output_kohya_format"):
        if getattr(args, flag) and not args.use_lora:
            parser.error(f"--{flag} needs --use_lora.")
    if args.lora_dropout > 0 and args.diffusion_loss_weight == 0 and args.adversarial:
        parser.error("--lora_dropout acts in the diffusion loss alone, and --diffusion_loss_weight is 0.")
    if getattr(args, "cache_text_embeddings", None) is not None:
        if Path(args.cache_text_embeddings).absolute().is_relative_to(Path(args.output_dir).absolute()):
            parser.error("--cache_text_embeddings must not lie in --output_dir, which is what is published.")
        if args.offload_text_encoders:
            parser.error("--cache_text_embeddings frees the text encoders: there is nothing to offload.")


def global_batch_size(args, accelerator) -> int:
    """Images an iteration, over all processes and micro-batches."""
    return args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps


def resolve_schedule(args, num_images, accelerator) -> Options:
    """The options with the iterations of `--num_train_epochs` and the learning rates of `--scale_lr` filled in."""
    batch_size = global_batch_size(args, accelerator)
    if args.max_train_steps is None:
        args = args.replace(max_train_steps=math.ceil(args.num_train_epochs * num_images / batch_size))
    if args.scale_lr:
        rates = ("learning_rate", "discriminator_learning_rate")
        scaled = {name: getattr(args, name) * batch_size for name in rates if name in args.natures}
        args = args.replace(**scaled, scale_lr=False)  # from here on the rates are what they say
    if count_generator_updates(args) == 0:
        logger.warning("The generator is never updated: --max_train_steps is too small for the first update.")
    return args


# Samplers of models with a variance-preserving schedule


# The class, the paper's number of steps, and what the configuration must say where `from_config` fills in a default
# that is wrong here (DDIM's would clip the latents) or differs between classes. The spacing is the class's usual one,
# for checkpoints that state none.
SAMPLERS = {
    "ddim": (DDIMScheduler, 50, {"timestep_spacing": "leading", "clip_sample": False, "thresholding": False}),
    "dpmsolver++": (
        DPMSolverMultistepScheduler,
        30,
        {
            "timestep_spacing": "linspace",
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "thresholding": False,
            "final_sigmas_type": "zero",
        },
    ),
    "euler": (EulerDiscreteScheduler, 50, {"timestep_spacing": "linspace"}),
}


def configure_sampler(name, base_config, timestep_spacing=None, **options):
    """The sampler `name` of `SAMPLERS` on the schedule of another scheduler's configuration.

    Args:
        base_config: as a file or a scheduler's `config` has it.
        timestep_spacing: where it is None, "trailing" for a schedule with zero terminal SNR, whose last timestep
            sampling must start at; else what `base_config` states, as those who put the sampler into the pipeline by
            `from_config` have it; else the class's usual one.
        options: configuration beside it.
    """
    sampler_class, _, own = SAMPLERS[name]
    config = {name: value for name, value in base_config.items() if name not in ("clip_sample", "thresholding")}
    stated = config.get("timestep_spacing")
    if "timestep_spacing" in config.get("_use_default_values", ()):  # the base's class filled it in, its file did not
        stated = None
    if config.get("rescale_betas_zero_snr", False):
        stated = "trailing"
    spacing = timestep_spacing or stated or own["timestep_spacing"]
    return sampler_class.from_config(config, **own | {"timestep_spacing": spacing} | options)


# The run


@dataclass(frozen=True)
class Family:
    """What the shared code needs to know of a model family; each script makes one of its own functions and constants.

    Attributes:
        pipeline_class, network_class: diffusers' classes; the network is what trains.
        network_name: the network in the pipeline: its attribute and its folder.
        without_text_encoders: what `pipeline_class` must be given to be made for embeddings alone.
        encode_images: (vae, images, posterior_noise) to latents, as `x_0`.
        decode_latents: (vae, latents) to images (B, 3, H, W) in about [-1, 1].
        inference_options: (args) to what the pipeline is called with to sample as in training.
        card_tags: the model card's.
        sampler_facts: what the model card says of the scheduler's configuration.
        kohya_adapters: (adapters as peft names them) to the same as kohya's scripts name them, without alphas.
        half_precision_components: may stay so, where the base pipeline has them so, beside ones in float32.
        absent_components: (args) to components that the base pipeline lacks and `from_pretrained` must be told so.
        unused_components: (args) to those that the pipeline must be loaded without to sample as in training.
        inference_note: (args) to what the model card says about inference beyond the sampler.
    """

    pipeline_class: type
    network_class: type
    network_name: str
    without_text_encoders: dict
    encode_images: Callable
    decode_latents: Callable
    inference_options: Callable
    card_tags: tuple
    sampler_facts: tuple
    kohya_adapters: Callable
    half_precision_components: tuple = ()
    absent_components: Callable = lambda args: {}
    unused_components: Callable = lambda args: {}
    inference_note: Callable = lambda args: ""


def is_generator_iteration(iteration, args) -> bool:
    """Whether the 0-based `iteration` updates the generator."""
    if not args.adversarial:
        return True
    return iteration >= args.generator_start_step and (iteration + 1) % args.generator_update_interval == 0


def count_generator_updates(args) -> int:
    return sum(is_generator_iteration(k, args) for k in range(args.max_train_steps))


@dataclass(frozen=True)
class Method:
    """What the shared code needs to know of a training method.

    Attributes:
        name: `adt_config.json`'s.
        kind: how the model card's first sentence ends, "Tuned from `base` by ...".
        sampling: what the card says of the call; `{described}` becomes what it samples by.
        count_updates: (args) to the generator's updates in a whole run.
    """

    name: str
    kind: str
    sampling: str
    count_updates: Callable = count_generator_updates


@dataclass(frozen=True)
class Run:
    """What is known of a run once its input is checked, before any model is loaded."""

    family: Family
    method: Method
    args: Options = field(repr=False)  # which may hold a token
    accelerator: Accelerator
    dataset: datasets.Dataset
    identity: dict  # what its checkpoints say of it, see `output_utils.identify_run`
    checkpoint: Path | None  # to resume from
    first_iteration: int  # 0-based
    default_size: int  # the side of the images that the pipeline makes by default
    repo_id: str | None  # on the Hub
    interruption: Any  # an `output_utils.Interruption`

    @property
    def global_batch_size(self) -> int:
        return global_batch_size(self.args, self.accelerator)

    @property
    def num_generator_updates(self) -> int:
        return self.method.count_updates(self.args)


def start_accelerator(args) -> Accelerator:
    """Starts accelerate and the logs.

    Raises:
        ADTError: for what this machine or launch cannot do.
    """
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
    check_launch(args, accelerator)
    if args.use_8bit_adam and not transformers.utils.is_bitsandbytes_available():
        raise ADTError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes.")
    if not args.adversarial and "adversarial_loss_weight" in args.natures:
        logger.info(
            "--adversarial_loss_weight is 0: plain fine-tuning. --diffusion_loss_weight, --generator_update_interval, "
            "--generator_start_step and the discriminator's options are ignored."
        )
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return accelerator


def check_launch(args, accelerator):
    """Refuses what accelerate was launched as and this program is not made for; says what a Mac's GPU runs in."""
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ADTError(
            f"{accelerator.distributed_type.value} is not supported: two networks train in turn here, which sharded "
            "engines do not do under one accelerator. Use data parallelism (accelerate launch --multi_gpu)."
        )
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        # It divides every loss, and this program has as many micro-batches as the option says.
        raise ADTError(
            f"accelerate accumulates {accelerator.gradient_accumulation_steps} micro-batches, by the environment "
            f"variable ACCELERATE_GRADIENT_ACCUMULATION_STEPS, and --gradient_accumulation_steps is "
            f"{args.gradient_accumulation_steps}: give the option alone."
        )
    device, precision = accelerator.device.type, accelerator.mixed_precision
    if precision == "fp16" and device == "cpu":
        raise ADTError("--mixed_precision fp16 needs a GPU; bf16 runs on a CPU, too.")
    if device == "mps" and precision == "no":
        logger.warning(
            "On this Mac's GPU the run is in float32; --mixed_precision bf16 halves what frozen weights take."
        )


class Progress:
    """What a run says while it goes on: a headline, a progress bar, and the trackers' values of each iteration."""

    def __init__(self, generator, sampler, run):
        args, accelerator = run.args, run.accelerator
        self.run = run
        self.shown = {}
        if args.report_to != "none":
            config = {name: str(value) for name, value in args.public().items()}  # trackers refuse lists
            accelerator.init_trackers(args.tracker_project_name, config=config)
        configuration = ", ".join(
            f"{name}={value}" for name, value in sorted(sampler.config.items()) if name[0] != "_"
        )
        num_parameters = sum(parameter.numel() for parameter in trainable_parameters(generator.network))
        logger.info("***** Running training *****")
        logger.info(f"  Images = {len(run.dataset)}, global batch = {run.global_batch_size}")
        logger.info(
            f"  Iterations = {run.first_iteration} to {args.max_train_steps}, generator updates = "
            f"{run.num_generator_updates}"
        )
        logger.info(f"  Trained parameters = {num_parameters:,}")
        logger.info(f"  Device = {accelerator.device}, mixed precision = {accelerator.mixed_precision}")
        logger.info(f"  Sampler = {type(sampler).__name__}, {args.num_inference_steps} steps ({configuration})")
        self.bar = tqdm(
            total=args.max_train_steps,
            initial=run.first_iteration,
            desc="Iterations",
            disable=not accelerator.is_local_main_process,
        )

    def log(self, values, iteration, started):
        """`values`: {name: float} of the 0-based `iteration`, which began when `time.perf_counter()` was `started`."""
        seconds = time.perf_counter() - started
        values = values | {
            "seconds_per_iteration": seconds,
            "images_per_second": self.run.global_batch_size / seconds,
            "peak_memory_gb": peak_memory_gb(),
        }
        self.shown |= values
        self.bar.update(1)
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in self.shown.items()})
        self.run.accelerator.log(values, step=iteration + 1)

    def close(self):
        self.bar.close()


def peak_memory_gb() -> float:
    """The device's peak allocation where there is a GPU, else the process's peak resident set; 10^9 bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 1e9
    import resource  # Unix's alone

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


STOPPED = 75  # the exit status of a run that can go on: EX_TEMPFAIL of sysexits.h, "try again later"


def end_run(run):
    """Closes the trackers and destroys the process group, once nothing of the training refers to either.

    Exits with the status `STOPPED` where the run has been interrupted.

    A data-parallel wrapper that outlived the group's end would be the one to destroy it, holding Python's lock, while
    a thread of gloo's may still want that lock to free a tensor: the process then never ends.
    """
    run.accelerator.free_memory()
    gc.collect()
    run.accelerator.end_training()
    if run.interruption.stopped_after is not None:
        sys.exit(STOPPED)


# Frozen and trained networks


@dataclass(frozen=True)
class FrozenModels:
    """What does not train: the VAE, the text encoders, and the schedules of the rollout and of plain fine-tuning."""

    vae: AutoencoderKL
    prompt_encoder: Any  # the script's
    sampler: Any  # with `set_timesteps` called
    noise_scheduler: Any


def hub_options(args) -> dict:
    return {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}


def weight_dtype(accelerator) -> torch.dtype:
    """Of frozen weights. What trains is in float32."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def trainable_parameters(model) -> list:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def load_vae_config(args) -> dict:
    """Of the VAE that `load_vae` loads. Raises `ADTError` where there is none."""
    path, vae_path = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
    try:
        if vae_path is not None:
            return AutoencoderKL.load_config(vae_path, cache_dir=args.cache_dir)
        return AutoencoderKL.load_config(path, subfolder="vae", revision=args.revision, cache_dir=args.cache_dir)
    except OSError as error:
        source = f"{path} has no readable VAE" if vae_path is None else f"{vae_path} is not a readable VAE"
        raise ADTError(f"{source}: {error}") from error


def load_vae(args) -> AutoencoderKL:
    """The base pipeline's VAE, or the one that is named instead."""
    if args.pretrained_vae_model_name_or_path is None:
        return AutoencoderKL.from_pretrained(args.pretrained_model_name_or_path, subfolder="vae", **hub_options(args))
    return AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path, cache_dir=args.cache_dir)


def freeze_vae(vae, dtype, args, accelerator) -> AutoencoderKL:
    vae.requires_grad_(False).eval().type(dtype).to(accelerator.device)
    if args.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    return vae


def vae_factor(vae_config) -> int:
    """By how much a VAE's latents are smaller than its images, a side."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def sample_posterior(vae, pixel_values, posterior_noise):
    """pixel_values: (B, 3, H, W) in [-1, 1]; posterior_noise as the latents. Returns unscaled latents, float32."""
    with torch.no_grad():
        posterior = vae.encode(pixel_values.to(vae.dtype)).latent_dist
        latents = posterior.mean.float() + posterior.std.float() * posterior_noise
    check_vae(latents, "encodes images to", vae)
    return latents


def decode_checkpointed(vae, latents):
    """latents: (B, C, h, w), unscaled. Returns (B, 3, H, W) in about [-1, 1], float32.

    One image at a time and checkpointed: what a backward through the decoder stores is one image's.
    """

    def decode(one):
        return vae.decode(one.to(vae.dtype)).sample.float()

    if latents.requires_grad:
        # The decoder draws nothing. Its own checkpointing, where on, is within this one: without it a backward would
        # hold all of one image's graph, without this one the blocks' inputs of all images.
        decode = partial(checkpoint, decode, use_reentrant=False, preserve_rng_state=False)
    images = torch.cat([decode(one) for one in latents.split(1)])
    check_vae(images, "decodes finite latents to", vae)
    return images


def check_vae(values, what, vae):
    if not values.isfinite().all():
        raise ADTError(
            f"The VAE, in {str(vae.dtype).removeprefix('torch.')}, {what} values that are not finite: it is damaged, "
            "or not made for this precision. Name another one with --pretrained_vae_model_name_or_path."
        )


def check_latents(latents, when):
    if not latents.isfinite().all():
        raise ADTError(
            f"The sampler's latents are not finite {when}: the network's predictions overflow, or it has diverged. "
            "The last checkpoint stays as it is."
        )


def check_lora(args, network_class, config):
    """Refuses a target that is no layer of the network, which is built without weights for it."""
    if not args.use_lora:
        return
    with init_empty_weights():
        modules = network_class.from_config(config).named_modules()
    layers = [name for name, module in modules if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
    for target in args.lora_target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise ADTError(f"--lora_target_modules {target} is no linear or convolutional layer of the network.")


def prepare_network(network, args, accelerator):
    """What trains is in float32: the network's own weights, or adapters over frozen, lighter weights."""
    network.float()
    if args.use_lora:
        network.requires_grad_(False).type(weight_dtype(accelerator)).to(accelerator.device)
        torch.manual_seed(args.seed)  # the adapters' first weights, the same on every process
        config = LoraConfig(
            r=args.rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            init_lora_weights="gaussian",
            target_modules=args.lora_target_modules,
        )
        network.add_adapter(config)
        cast_training_params(network)
    if args.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return network


# A micro-batch


@dataclass
class Conditions:
    """What the network is conditioned on, each a dict of (B, ...) that the script's `call_network` understands."""

    negative: dict  # the unconditional guidance branch
    positive: dict  # the captions'
    loss: dict  # the diffusion loss's, in which captions may be dropped


@dataclass
class Batch:
    """A micro-batch of one process, after step 1; steps 4 and 5 add the last two."""

    captions: list[str]
    images: torch.Tensor  # (B, 3, H, W) in [-1, 1]
    latents: torch.Tensor  # (B, C, h, w), `x_0`, as all that follows of this shape
    noise: torch.Tensor  # the rollout's `eps`
    loss_noise: torch.Tensor  # the diffusion loss's
    density: torch.Tensor  # (B,), which timesteps plain fine-tuning takes
    conditions: Conditions
    augmentation: dict  # {purpose: (B, DiffAugment.NUM_PARAMETERS)}
    rollout: SimulatedInference | None = None
    generated: torch.Tensor | None = None  # as `images`
    real_features: dict = field(default_factory=dict)  # {purpose: the features of `images`}, see `Adversary`


def concatenate(conditions) -> dict:
    return {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}


def expand(values, like):
    """(B,) to (B, 1, ...), with as many dimensions as `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def make_predict(network, conditions, call_network) -> Callable:
    """The network as `simulate_inference` calls it: branch 0 is the unconditional one, branch 1 the caption's.

    Args:
        call_network: (network, sample, timestep, condition) to the prediction; the script's.
    """
    of_branch = (conditions.negative, conditions.positive)

    def predict(model_input, timestep, branches):
        condition = concatenate([of_branch[branch] for branch in branches])
        return call_network(network, model_input, timestep, condition)

    return predict


# Updates


def check_finite(values, iteration):
    for name, value in values.items():
        if not math.isfinite(value):
            raise ADTError(
                f"The {name.replace('_', ' ')} became {value} at iteration {iteration + 1}: the run stops, and the "
                "last checkpoint stays as it is. A lower learning rate or adversarial weight may help."
            )


class Totals:
    """What an update logs: gathered over its micro-batches, then made the global batch's over all processes."""

    def __init__(self, num_batches):
        self.num_batches = num_batches
        self.means, self.squares = {}, {}

    def add_means(self, **values):
        """Values whose mean over the micro-batches is wanted; 0-d tensors."""
        for name, value in values.items():
            self.means[name] = self.means.get(name, 0.0) + value.detach() / self.num_batches

    def add_squared_norms(self, **squares):
        """Squared norms of a micro-batch's gradient; what is wanted is the norm of the global batch's."""
        for name, square in squares.items():
            self.squares[name] = self.squares.get(name, 0.0) + square

    def reduce(self, accelerator, iteration) -> dict:
        """{name: float}, the same on every process. Raises `ADTError` where one is not finite.

        A norm is `sqrt(sum over P processes and N micro-batches of |g|^2) / (P N)`, since the loss is their mean.
        """
        totals = self.means | self.squares
        reduced = accelerator.reduce(torch.stack([value.float() for value in totals.values()]), reduction="mean")
        values = dict(zip(totals, reduced.tolist(), strict=True))
        check_finite(values, iteration)
        for name in self.squares:
            values[name] = (values[name] / accelerator.num_processes) ** 0.5 / self.num_batches
        return values


@dataclass
class Trained:
    """A network that trains, and what trains it."""

    name: str  # in messages
    network: torch.nn.Module
    wrapped: torch.nn.Module  # the network as accelerate prepared it; call this one where a gradient is wanted
    optimizer: Any
    lr_scheduler: Any
    run: Run
    ema: EMAModel | None = None

    @property
    def lr(self) -> float:
        return self.lr_scheduler.get_last_lr()[0]

    def synchronise_if(self, condition):
        """A context for a forward and its backward: gradients synchronise in the last backward of an update only."""
        return contextlib.nullcontext() if condition else self.run.accelerator.no_sync(self.wrapped)

    def step(self, iteration) -> bool:
        """Clips the gradients and steps; returns whether it did: float16's loss scaling skips what overflowed."""
        accelerator = self.run.accelerator
        norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), self.run.args.max_grad_norm)
        if accelerator.scaler is None:
            check_finite({f"gradient norm of the {self.name}": norm.item()}, iteration)
        self.optimizer.step()
        stepped = not self.optimizer.step_was_skipped
        if stepped:
            self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if stepped and self.ema is not None:
            self.update_ema()
        return stepped

    def update_ema(self):
        if self.run.args.offload_ema:
            self.ema.to(self.run.accelerator.device, non_blocking=True)
        self.ema.step(trainable_parameters(self.network))
        if self.run.args.offload_ema:
            self.ema.to("cpu", non_blocking=True)

    @contextlib.contextmanager
    def frozen(self):
        """A context with the network to score by: the gradient goes to what it is given, its weights stay.

        It is not the wrapped one, because data parallelism would wait for gradients of its parameters.
        """
        trained = trainable_parameters(self.network)
        self.network.requires_grad_(False)
        try:
            yield self.network
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def averaged(self):
        """A context with the averaged weights in place of the trained ones, where there is an average."""
        return averaged_weights(self.network, self.ema)


@contextlib.contextmanager
def averaged_weights(network, ema):
    if ema is None:
        yield
        return
    parameters = trainable_parameters(network)
    own = [parameter.data for parameter in parameters]
    # Exchanged, not copied: `EMAModel.store` would move the weights to the CPU and back.
    for parameter, average in zip(parameters, ema.shadow_params, strict=True):
        parameter.data = average.to(parameter.device, parameter.dtype)
    try:
        yield
    finally:
        for parameter, data in zip(parameters, own, strict=True):
            parameter.data = data


def prepare_generator(network, run) -> Trained:
    """The network with its optimizer, schedule and average, prepared by accelerate."""
    args = run.args
    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        import bitsandbytes

        optimizer_class = bitsandbytes.optim.AdamW8bit
    ema = None
    if args.use_ema:
        ema = EMAModel(trainable_parameters(network), decay=args.ema_decay, foreach=args.foreach_ema)
        ema.to("cpu" if args.offload_ema else run.accelerator.device)
    optimizer = make_optimizer(optimizer_class, network, args.learning_rate, args)
    lr_scheduler = make_lr_scheduler(optimizer, args.lr_warmup_steps, run.num_generator_updates, args)
    return prepare_trained("generator", network, optimizer, lr_scheduler, run, ema)


def prepare_trained(name, network, optimizer, lr_scheduler, run, ema=None) -> Trained:
    # The learning rate schedule is not prepared: accelerate would step it once for each process. Frozen models are
    # not either.
    wrapped, optimizer = run.accelerator.prepare(network, optimizer)
    run.accelerator.register_for_checkpointing(lr_scheduler)
    return Trained(name, network, wrapped, optimizer, lr_scheduler, run, ema)


def make_optimizer(optimizer_class, network, learning_rate, args):
    return optimizer_class(
        trainable_parameters(network),
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def make_lr_scheduler(optimizer, num_warmup_steps, num_updates, args):
    """Both counted in the optimizer's own updates."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=max(1, num_updates),
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )

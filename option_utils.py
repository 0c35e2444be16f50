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
"""The options of the training scripts: their natures, checks of single values, and the groups that scripts share.

`Nature` and `Options` are what other code asks; a script's parser is made of `add_arguments` and its like, and read by
`parse_options`. `tests/test_training_utils.py` shows of each option that it acts.
"""

import argparse
import copy
import json
import math
import os
from enum import Enum
from pathlib import Path

from diffusers.optimization import SchedulerType
from PIL import Image

from adt_utils import GRADIENT_PATHS, REFUSED_SAMPLERS, DiffAugment
from bucket_utils import HAS_DEFAULT_BUCKETS, buckets_of, default_buckets
from config_utils import with_config
from speed_utils import ATTENTION_BACKENDS


BOOLEAN = argparse.BooleanOptionalAction
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "prodigy", "adamw_schedulefree")


class ADTError(RuntimeError):
    """An error whose message is all that the user needs: bad input, or a run that cannot go on."""


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
    STREAMING = "is ignored without --streaming"
    BUCKETS = "is ignored without --use_aspect_ratio_buckets"


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


def four_bit_config(text):
    """A `type=` function: options of diffusers' `BitsAndBytesConfig`, with `load_in_4bit`; JSON, or a file of it."""
    try:
        config = json.loads(text if text.startswith("{") else Path(text).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text} is no readable JSON file: {error}") from None
    if not isinstance(config, dict) or config.get("load_in_4bit") is not True:
        raise argparse.ArgumentTypeError(f'{text} does not say "load_in_4bit": true')
    return config


def comma_separated(text):
    """A `type=` function: a list of words."""
    return [word.strip() for word in text.split(",")]


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


def attention_backend(text):
    """A `type=` function: a key of `ATTENTION_BACKENDS`; of diffusers' other names the reason against it."""
    if text not in ATTENTION_BACKENDS:
        reason = "has no backward" if text.lstrip("_").startswith("sage") else "is not for these networks' attention"
        raise argparse.ArgumentTypeError(f"{text} {reason}; choose from {', '.join(ATTENTION_BACKENDS)}")
    return text


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
    add("--dataset_split", Nature.BY_CONTENT, default="train", help="Split of the dataset.")
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
        help="Processes that load images, to each that trains; as many when a stream is resumed.")  # fmt: skip
    add("--check_images", Nature.NO_EFFECT, choices=["all", "sample", "none"], default="sample",
        help="Which of the images to decode before the run; all are done once and remembered.")  # fmt: skip
    # Where it makes a difference, there is no run without it.
    add("--skip_bad_images", Nature.NO_EFFECT, action=BOOLEAN, default=False,
        help="Replace images that do not decode by the next ones, and count them.")  # fmt: skip
    add("--streaming", Nature.STREAMING, action=BOOLEAN, default=False,
        help="Read the dataset as it is needed, for one that does not fit the disk; the order differs.")  # fmt: skip
    add("--shuffle_buffer_size", Nature.STREAMING, type=positive_int, default=1000,
        help="With --streaming: rows that are shuffled together, of each process that trains.")  # fmt: skip
    add("--use_aspect_ratio_buckets", Nature.BUCKETS, action=BOOLEAN, default=False,
        help="Train each image at the size whose shape is the nearest, not square; validate at these.")  # fmt: skip
    add("--aspect_ratio_buckets", Nature.BUCKETS, type=buckets_of, default=None,
        help="Those sizes, as height,width;height,width; else from 1:2 to 2:1, of --resolution's pixels.")  # fmt: skip


def add_training_arguments(parser):
    add = adder(parser.add_argument_group("training"))
    add("--config", Nature.NO_EFFECT, Nature.PRIVATE, default=None,
        help="YAML or JSON file of options by name; what is typed beside it wins.")  # fmt: skip
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
    add("--shard", Nature.FREE, action=BOOLEAN, default=False,
        help="Divide the network, its gradients, optimizer and average among the processes.")  # fmt: skip
    add("--gradient_checkpointing", Nature.NO_EFFECT, action=BOOLEAN, default=False,
        help="Less memory for about a third more time.")  # fmt: skip
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default=None, help="Else accelerate's.")
    add("--compile", Nature.FREE, action=BOOLEAN, default=False,
        help="Compile the networks: a slower start, and faster iterations.")  # fmt: skip
    add("--attention_backend", Nature.FREE, type=attention_backend, default=None,
        help="PyTorch's kernel for the denoiser: flash, efficient, cudnn or math; its own choice.")  # fmt: skip
    add("--allow_tf32", Nature.FREE, action=BOOLEAN, default=False, help="Faster float32 on Ampere and later.")
    add("--learning_rate", type=positive_float, help="The generator's.")
    add("--scale_lr", action=BOOLEAN, default=False,
        help="Multiply the learning rates by the global batch size; cards have the product.")  # fmt: skip
    add("--lr_scheduler", choices=[kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT],
        default="constant_with_warmup", help="Of each optimizer, counted in its own updates.")  # fmt: skip
    add("--lr_warmup_steps", type=non_negative_int, default=500, help="In generator updates.")
    add("--lr_num_cycles", type=int, default=1, help="Of cosine_with_restarts.")
    add("--lr_power", type=float, default=1.0, help="Of polynomial.")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="The generator's; a discriminator's is adamw.")
    # What earlier scripts call it, which commands in many places still say.
    add("--use_8bit_adam", dest="optimizer", action="store_const", const="adamw8bit", help=argparse.SUPPRESS)
    add("--adam_beta1", type=float, default=0.9, help="Of each optimizer but adafactor.")
    add("--adam_beta2", type=float, default=0.999, help="Of each optimizer but adafactor.")
    add("--adam_weight_decay", type=float, default=1e-2, help="Of each optimizer.")
    add("--adam_epsilon", type=float, default=1e-8, help="Of each optimizer but adafactor.")
    add("--max_grad_norm", type=non_negative_float, default=1.0,
        help="Gradients are clipped to it, each network's; 0 for no clipping.")  # fmt: skip
    add("--fused_backward_pass", Nature.FREE, action=BOOLEAN, default=False,
        help="Apply each of the generator's gradients as soon as an update's last backward has made it.")  # fmt: skip
    add("--offload_gradients", Nature.FREE, action=BOOLEAN, default=False,
        help="With it: between an update's backwards, keep them in CPU memory.")  # fmt: skip
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
    add("--lora_dropout", type=share, default=0.0, help="Of the adapters; simulated inference has none.")
    add("--lora_layers", type=comma_separated, default=["to_q", "to_k", "to_v", "to_out.0"],
        help="Layers that get one, separated by commas.")  # fmt: skip
    add("--lora_target_modules", dest="lora_layers", nargs="+", help=argparse.SUPPRESS)  # its former name
    add("--use_dora", action=BOOLEAN, default=False, help="Decompose the weights into magnitude and direction: DoRA.")
    add("--bnb_quantization_config_path", type=four_bit_config, default=None,
        help="JSON file of a BitsAndBytesConfig, to have the frozen network in four bits; needs a GPU.")  # fmt: skip


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
    add("--replay_branches", Nature.FREE, choices=["separate", "together"], default="separate",
        help="Replay a step's guidance branches one by one, or in one pass of twice the memory.")  # fmt: skip
    add("--decoder_model_name_or_path", Nature.BY_CONTENT, default=None,
        help="A tiny autoencoder that decodes scored images in the VAE's place; an ablation.")  # fmt: skip
    add("--gradient_path", choices=GRADIENT_PATHS, default="adt", help="The backward path; drtune for the ablation.")
    add("--generator_update_interval", type=positive_int, default=5, help="Iterations a generator update.")
    add("--generator_start_step", type=non_negative_int, default=0,
        help="Iterations in which only the discriminator trains.")  # fmt: skip
    add("--rollouts_per_batch", Nature.FREE, type=positive_int, default=1,
        help="Iterations between generator updates whose rollouts run in one batch; more memory.")  # fmt: skip


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


def leave_out(parser, names, **defaults):
    """Takes options that do not act from a parser, which has their defaults, or `defaults`, as fixed values."""
    for action in [action for action in parser._actions if action.dest in names]:
        parser.set_defaults(**{action.dest: action.default})
        for group in parser._action_groups:
            if action in group._group_actions:
                group._remove_action(action)
        for flag in action.option_strings:
            del parser._option_string_actions[flag]
    parser.set_defaults(**defaults)


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
        samplers: {name: (class, default number of steps, ...)}; none where the sampler is the pipeline's own.
    """
    args = parser.parse_args(with_config(parser, input_args), namespace=Options())
    args.natures = option_natures(parser)
    check_options(args, parser)
    by_default = args.max_train_steps is None and args.num_train_epochs is None
    computed = args.use_aspect_ratio_buckets and args.aspect_ratio_buckets is None
    return args.replace(
        lora_alpha=float(args.rank) if args.lora_alpha is None else args.lora_alpha,
        num_inference_steps=args.num_inference_steps or (samplers[args.sampler][1] if samplers else None),
        max_train_steps=20_000 if by_default else args.max_train_steps,
        aspect_ratio_buckets=default_buckets(args.resolution) if computed else args.aspect_ratio_buckets,
    )


SHARD_EXCLUDES = {
    "use_lora": "what adapters train is small, and data parallelism alone is faster",
    "compile": "the weights are gathered between what would be compiled",
}
ROLLOUTS_EXCLUDE = {
    "compile": "each number of images on the path would be compiled anew",
    "streaming": "a checkpoint among those iterations would be behind where the stream is",
    "use_aspect_ratio_buckets": "the iterations' images differ in size",
}


def check_options(args, parser):
    """Refuses what no option's own `type=` can tell."""
    if (args.dataset_name is None) == (args.train_data_dir is None):
        parser.error("give either --dataset_name or --train_data_dir.")
    check_data_options(args, parser)
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
    if args.compile and args.use_aspect_ratio_buckets:
        parser.error("--compile does not go with --use_aspect_ratio_buckets: each size would be compiled anew.")
    for flag, reason in SHARD_EXCLUDES.items():
        if args.shard and getattr(args, flag):
            parser.error(f"--shard does not go with --{flag}: {reason}.")
    if args.shard and args.optimizer != "adamw":
        parser.error(f"--shard divides AdamW's state, not that of --optimizer {args.optimizer}.")
    if args.adversarial and args.rollouts_per_batch > 1:
        for flag, reason in ROLLOUTS_EXCLUDE.items():
            if getattr(args, flag):
                parser.error(f"--rollouts_per_batch does not go with --{flag}: {reason}.")
        if args.rollouts_per_batch > args.generator_update_interval:
            parser.error(
                f"--rollouts_per_batch {args.rollouts_per_batch} is more than --generator_update_interval "
                f"{args.generator_update_interval}: after an update the generator draws other images."
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
    for flag in ("fuse_lora", "output_kohya_format", "use_dora", "bnb_quantization_config_path"):
        if getattr(args, flag) and not args.use_lora:
            parser.error(f"--{flag} needs --use_lora.")
    if args.use_dora and args.output_kohya_format:
        parser.error("--output_kohya_format has no place for --use_dora's magnitudes.")
    check_optimizer_options(args, parser)
    if args.lora_dropout > 0 and args.diffusion_loss_weight == 0 and args.adversarial:
        parser.error("--lora_dropout acts in the diffusion loss alone, and --diffusion_loss_weight is 0.")
    if getattr(args, "cache_text_embeddings", None) is not None:
        if Path(args.cache_text_embeddings).absolute().is_relative_to(Path(args.output_dir).absolute()):
            parser.error("--cache_text_embeddings must not lie in --output_dir, which is what is published.")
        if args.offload_text_encoders:
            parser.error("--cache_text_embeddings frees the text encoders: there is nothing to offload.")


def check_optimizer_options(args, parser):
    """Refuses settings with which an optimizer would do nothing of use, or could not do what is asked for."""
    if args.optimizer == "prodigy" and ((args.learning_rate or 0) < 0.1 or args.scale_lr):
        parser.error(
            "--optimizer prodigy finds the step size itself, and --learning_rate is a factor of it: give 1, without "
            "--scale_lr."
        )
    if args.optimizer == "adamw_schedulefree":
        if args.lr_scheduler not in ("constant", "constant_with_warmup"):
            parser.error(f"--optimizer adamw_schedulefree needs a constant learning rate, not {args.lr_scheduler}.")
        if args.use_ema:
            parser.error("--optimizer adamw_schedulefree averages the weights itself: leave out --use_ema.")
    if args.fused_backward_pass:
        if args.optimizer in ("prodigy", "adamw_schedulefree"):
            parser.error(f"--fused_backward_pass: {args.optimizer} takes one step for all weights together.")
        if args.max_grad_norm > 0:
            parser.error(
                "--fused_backward_pass applies gradients before their norm is known: say that they are not clipped, "
                "by --max_grad_norm 0."
            )
    elif args.offload_gradients:
        parser.error("--offload_gradients needs --fused_backward_pass.")


def check_data_options(args, parser):
    if args.aspect_ratio_buckets is not None and not args.use_aspect_ratio_buckets:
        parser.error("--aspect_ratio_buckets needs --use_aspect_ratio_buckets.")
    if args.use_aspect_ratio_buckets and args.aspect_ratio_buckets is None and not HAS_DEFAULT_BUCKETS:
        parser.error("--use_aspect_ratio_buckets needs --aspect_ratio_buckets, since this diffusers has no default.")
    if not args.streaming:
        return
    reasons = {
        "use_aspect_ratio_buckets": "needs the size of each image at the start",
        "max_train_samples": "draws from the whole dataset",
        "cache_text_embeddings": "needs all captions at the start",
    }
    for flag, reason in reasons.items():
        if getattr(args, flag, None):
            parser.error(f"--{flag} {reason}, which --streaming does not know.")
    if args.num_train_epochs is not None and args.max_train_steps is None:
        parser.error("--num_train_epochs needs the number of images, which --streaming does not know: give "
                     "--max_train_steps.")  # fmt: skip
    if args.check_images == "all":
        parser.error("--check_images all would read the whole dataset, which is what --streaming avoids.")

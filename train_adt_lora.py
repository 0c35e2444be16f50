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
"""Adversarial Diffusion Tuning (ADT) of low-rank adapters, for any pipeline of diffusers that starts from an image.

FLUX.1, Qwen-Image, Z-Image and their like; SD1.5, SDXL and SD3, too, but their own scripts do more. Needs the
`*_utils.py` and `adt_pipeline.py` beside it. On one GPU:

    accelerate launch --mixed_precision bf16 train_adt_lora.py \
        --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \
        --dataset_name DATASET --caption_column text --resolution 1024 --train_batch_size 1 \
        --gradient_accumulation_steps 8 --gradient_checkpointing --offload_text_encoders \
        --validation_prompts "a lighthouse at dusk" --output_dir flux-adt-lora

On four GPUs, the same global batch:

    accelerate launch --multi_gpu --num_processes 4 --mixed_precision bf16 train_adt_lora.py ... \
        --train_batch_size 1 --gradient_accumulation_steps 2

On two machines, on each of them with its own rank:

    accelerate launch --multi_gpu --num_machines 2 --num_processes 8 --machine_rank RANK --main_process_ip HOST \
        --main_process_port 29500 --mixed_precision bf16 train_adt_lora.py ... --train_batch_size 1

The rollout is a call of the pipeline's image-to-image form by `adt_pipeline.ConstrainedPipeline`, with the pipeline's
own sampler, guidance and encoding; the diffusion loss is the start step's. This file knows no family. What it has of
the training is that of the family scripts: the loop, the draws, exact resuming, the result.
"""

import argparse
import contextlib
import inspect
import logging
import sys
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import diffusers
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from diffusers.pipelines.auto_pipeline import AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from torch.utils._pytree import tree_map, tree_map_only

from adt_pipeline import ConstrainedPipeline, Gradients
from adt_utils import (
    DiffAugment,
    check_scheduler,
    discriminator_loss,
    generator_loss,
    select_train_steps,
    update_spectral_norm,
)
from adversary_utils import adversarial_weight, check_adversary, make_adversary, score_gap
from data_utils import (
    OnDevice,
    check_used_images,
    digest_of,
    draw_per_image,
    images_per_epoch,
    load_image_caption_dataset,
    load_micro_batches,
    make_generator,
    normalize_pixels,
)
from option_utils import (
    BOOLEAN,
    Nature,
    add_adversarial_arguments,
    add_data_arguments,
    add_discriminator_arguments,
    add_lora_arguments,
    add_model_arguments,
    add_output_arguments,
    add_training_arguments,
    adder,
    leave_out,
    non_negative_float,
    parse_options,
    positive_int,
)
from output_utils import (
    Interruption,
    Validation,
    adt_or_plain,
    create_output,
    find_checkpoint,
    finish_run,
    identify_run,
    load_checkpoint,
    register_checkpoint_hooks,
    save_checkpoint,
)
from training_utils import (
    ADTError,
    Family,
    FrozenModels,
    Progress,
    Run,
    Totals,
    check_image_sizes,
    check_latents,
    check_lora,
    decode_checkpointed,
    end_run,
    freeze_vae,
    hub_options,
    is_generator_iteration,
    load_vae,
    network_options,
    prepare_generator,
    prepare_network,
    refuse_by_sentence,
    resolve_schedule,
    sample_posterior,
    start_accelerator,
    weight_dtype,
)


# Options of the family scripts that have nothing to act on here, or that were not made to.
ABSENT = {
    "use_lora", "fuse_lora", "output_kohya_format",  # the result is the adapters, by diffusers' names
    "shard", "fused_backward_pass", "offload_gradients",  # for a whole network
    "use_aspect_ratio_buckets", "aspect_ratio_buckets", "decoder_model_name_or_path",
    "noise_offset",  # the start, noise included, is the pipeline's
    "compile",  # not tried: pipelines differ in what they call the denoiser with
    "replay_branches",  # a call of the denoiser is replayed as the pipeline made it
    "rollouts_per_batch",  # a rollout is a call of the pipeline
}  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """The options that act here; what the pipeline has a default for is left to it."""
    parser = argparse.ArgumentParser(
        description="Adversarial Diffusion Tuning of low-rank adapters, for any pipeline that starts from an image.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_training_arguments(parser)
    add_lora_arguments(parser)
    add = adder(parser.add_argument_group("inference during training"))
    add("--num_inference_steps", type=positive_int, default=None, help="The sampler's; the pipeline's own.")
    add("--guidance_scale", type=non_negative_float, default=None, help="The pipeline's own.")
    add("--true_cfg_scale", type=non_negative_float, default=None,
        help="Guidance by a negative prompt, where the pipeline calls it so; its own.")  # fmt: skip
    add("--negative_prompt", default=None, help="Of guidance; the pipeline's own, empty.")
    add("--max_sequence_length", type=positive_int, default=None,
        help="Tokens of the prompt, where the pipeline's call has it; its own.")  # fmt: skip
    add_adversarial_arguments(parser)
    add_discriminator_arguments(parser)
    add_output_arguments(parser)
    add = adder(parser.add_argument_group("text encoders"))
    add("--offload_text_encoders", Nature.NO_EFFECT, action=BOOLEAN, default=False,
        help="Keep the text encoders in CPU memory while they are not needed.")  # fmt: skip
    leave_out(parser, ABSENT, use_lora=True)
    parser.set_defaults(
        output_dir="adt-lora",
        tracker_project_name="adt-lora",
        resolution=1024,
        train_batch_size=1,
        learning_rate=1e-5,
        discriminator_learning_rate=1e-5,
    )
    return parser


def parse_args(input_args=None):
    parser = make_parser()
    args = parse_options(parser, {}, input_args)
    if not args.adversarial:
        parser.error("--adversarial_loss_weight 0 is plain fine-tuning, which this script does not do.")
    return args


# The base pipeline, before and with its weights


@dataclass(frozen=True)
class Base:
    """What the base pipeline's configurations tell of it."""

    pipeline_class: type  # from text
    network_name: str
    components: dict  # {name: class} of those that are diffusers' own: the network, the VAE, the scheduler
    settings: dict  # what the pipeline is made with beside its components

    @property
    def network_class(self) -> type:
        return self.components[self.network_name]

    def make_pipelines(self, components):
        """The pipeline, from text and from an image, of the same components, without text encoders."""
        expected = inspect.signature(self.pipeline_class.__init__).parameters.values()
        absent = {own.name: None for own in expected if own.default is own.empty and own.name != "self"}
        pipeline = self.pipeline_class(**absent | self.settings | components)
        from_image = AutoPipelineForImage2Image.from_pipe(
            pipeline, requires_safety_checker=False, add_watermarker=False
        )
        for made in (pipeline, from_image):
            made.set_progress_bar_config(disable=True)
        return pipeline, from_image


def read_base(args) -> Base:
    """Reads `model_index.json`. Raises `ADTError` for what is no pipeline, or does not start from an image."""
    path, hub = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    try:
        index = DiffusionPipeline.load_config(path, **hub)
    except OSError as error:
        raise ADTError(f"--pretrained_model_name_or_path {path} is not a readable pipeline: {error}") from error
    name = index.get("_class_name")
    forms = {made.__name__: (key, made) for key, made in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.items()}
    if not isinstance(name, str) or name not in forms:
        raise ADTError(f"{path} is a {name}, which is none of the text-to-image pipelines that diffusers lists.")
    key, pipeline_class = forms[name]
    from_image = AUTO_IMAGE2IMAGE_PIPELINES_MAPPING.get(key)
    call = {} if from_image is None else inspect.signature(from_image.__call__).parameters
    if "strength" not in call:
        raise ADTError(f"{path} is a {name}, of which diffusers has no form that starts from a noised image.")
    if "control_image" in call:
        raise ADTError(f"{path} is a {name}, which wants a control image beside the prompt: there is none here.")
    network_name = next(
        (part for part in ("unet", "transformer") if index.get(part) not in (None, [None, None])), None
    )
    if network_name is None:
        raise ADTError(f"{path} has no denoiser: none of its components is a unet or a transformer.")
    accepted = inspect.signature(pipeline_class.__init__).parameters
    settings = {part: value for part, value in index.items() if part in accepted and not isinstance(value, list)}
    settings |= {part: False for part in ("requires_safety_checker", "add_watermarker") if part in accepted}
    components = {part: component_class(index, part, path) for part in ("scheduler", "vae", network_name)}
    return Base(pipeline_class, network_name, components, settings)


def component_class(index, part, path) -> type:
    """diffusers' class of a component, as `model_index.json` names it. Raises `ADTError` where it names none."""
    named, kind = index.get(part), None
    if isinstance(named, list) and len(named) == 2 and named[0] == "diffusers":
        kind = getattr(diffusers, str(named[1]), None)
    if not hasattr(kind, "load_config"):
        raise ADTError(f"{path} has no {part} of a class of diffusers: its model_index.json says {named}.")
    return kind


def check_models(args):
    """Checks everything that the models' configurations tell, before any weight is loaded.

    Returns:
        the `Base`, the options with the pipeline's own defaults filled in, and a digest of the scheduler's
        configuration, by which a checkpoint knows its noise levels: the call sets them, and a Hub's name may move on.
    """
    base, path = read_base(args), args.pretrained_model_name_or_path
    name, hub = base.pipeline_class.__name__, {"revision": args.revision, "cache_dir": args.cache_dir}
    if args.pretrained_vae_model_name_or_path is not None and base.components["vae"] is not diffusers.AutoencoderKL:
        raise ADTError(f"--pretrained_vae_model_name_or_path: {path} has no AutoencoderKL, but another VAE.")
    outline, configs = {}, {}
    for part, kind in base.components.items():
        other = args.pretrained_vae_model_name_or_path if part == "vae" else None
        try:
            configs[part] = (
                kind.load_config(path, subfolder=part, **hub)
                if other is None
                else kind.load_config(other, cache_dir=args.cache_dir)
            )
        except OSError as error:
            raise ADTError(f"The {part} of {other or path} is not readable: {error}") from error
        with init_empty_weights():
            outline[part] = kind.from_config(configs[part])
    if args.pretrained_vae_model_name_or_path is not None:
        check_other_vae(configs["vae"], outline["vae"].config, args)
    if f"{base.network_name}_lora_layers" not in inspect.signature(base.pipeline_class.save_lora_weights).parameters:
        raise ADTError(f"{path} is a {name}, whose adapters diffusers does not save.")
    config = configs[base.network_name]
    if config.get("time_cond_proj_dim") is not None:
        raise ADTError(f"{path} has its guidance distilled into the UNet, so guidance cannot be simulated.")
    try:
        check_scheduler(outline["scheduler"])
    except ValueError as error:
        raise ADTError(f"{error} Save {path} with such a scheduler.") from error
    pipeline, from_image = base.make_pipelines(outline)
    refuse_by_sentence(ConstrainedPipeline, from_image, args.num_gradient_steps, args.gradient_path)
    factor = max(
        from_image.image_processor.config.vae_scale_factor,
        from_image.vae_scale_factor * config.get("patch_size", 1),
    )
    check_image_sizes(args, factor, f"{factor}, the pipeline's")
    args = resolve_inference(args, pipeline, config)
    length = outline["scheduler"].config.num_train_timesteps
    if args.num_inference_steps > length:
        raise ADTError(
            f"--num_inference_steps {args.num_inference_steps} is too many for a schedule of {length} timesteps."
        )
    if args.num_gradient_steps > args.num_inference_steps:
        raise ADTError(
            f"--num_gradient_steps {args.num_gradient_steps} is more than the path has: --num_inference_steps is "
            f"{args.num_inference_steps}."
        )
    check_adversary(args)
    check_lora(args, base.network_class, config)
    scheduler = {key: value for key, value in configs["scheduler"].items() if key != "_diffusers_version"}
    return base, args, digest_of(sorted(scheduler.items()))


def check_other_vae(written, config, args):
    """Refuses a VAE that does not make the latents of the base's.

    Args:
        written: its configuration as its file has it.
        config: the same with the class's defaults filled in.
    """
    path, other = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
    hub = {"revision": args.revision, "cache_dir": args.cache_dir}
    with init_empty_weights():
        own = diffusers.AutoencoderKL.from_config(diffusers.AutoencoderKL.load_config(path, subfolder="vae", **hub))
    if config.latent_channels != own.config.latent_channels:
        raise ADTError(
            f"--pretrained_vae_model_name_or_path {other} has latents of {config.latent_channels} channels, and the "
            f"VAE of {path} of {own.config.latent_channels}."
        )
    for name in ("scaling_factor", "shift_factor"):
        if written.get(name) is None and config[name] != own.config[name]:
            raise ADTError(
                f"--pretrained_vae_model_name_or_path {other} says no {name}, and the VAE of {path} has "
                f"{own.config[name]}."
            )


def resolve_inference(args, pipeline, config):
    """The options with the pipeline's own steps and guidance filled in; None where it has no such argument to act.

    A network that was distilled from a guided one takes `guidance_scale` as an input. Some pipelines, such as
    Qwen-Image's, call guidance by a negative prompt `true_cfg_scale`, and have it only where there is such a prompt.
    """
    name, call = type(pipeline).__name__, inspect.signature(pipeline.__call__).parameters
    options = ("num_inference_steps", "guidance_scale", "true_cfg_scale", "max_sequence_length")
    given = {option: getattr(args, option) for option in options}
    values = {
        option: call[option].default if value is None and option in call else value for option, value in given.items()
    }
    if "max_sequence_length" not in call and given["max_sequence_length"] is not None:
        raise ADTError(f"--max_sequence_length: the call of a {name} has no such argument.")
    if "true_cfg_scale" not in call and given["true_cfg_scale"] is not None:
        raise ADTError(f"--true_cfg_scale: {name} has guidance by --guidance_scale.")
    if "true_cfg_scale" in call and not config.get("guidance_embeds", False):
        if given["guidance_scale"] is not None:
            raise ADTError(f"--guidance_scale does nothing with this {name}: give --true_cfg_scale.")
        values["guidance_scale"] = None
    negative_prompt = args.negative_prompt
    if "true_cfg_scale" in call and values["true_cfg_scale"] > 1:
        negative_prompt = negative_prompt or ""
    elif "true_cfg_scale" in call and negative_prompt is not None:
        raise ADTError("--negative_prompt needs a --true_cfg_scale above 1.")
    elif values["guidance_scale"] == 0 and "true_cfg_scale" not in call and negative_prompt is not None:
        raise ADTError("--negative_prompt does nothing with a guidance scale of 0, which is no guidance.")
    elif "true_cfg_scale" in call and values["true_cfg_scale"] == call["true_cfg_scale"].default:
        values["true_cfg_scale"] = None  # off, as it is where nothing is said
    return args.replace(**values, negative_prompt=negative_prompt)


def inference_options(args) -> dict:
    """What the pipeline is called with, beside the prompt and the size, to sample as in training."""
    names = ("num_inference_steps", "guidance_scale", "true_cfg_scale", "negative_prompt", "max_sequence_length")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def conditional_options(pipeline, args) -> dict:
    """What it is called with to predict for the prompt alone; a distilled guidance stays what it is."""
    names = ("num_inference_steps", "max_sequence_length")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "true_cfg_scale" in inspect.signature(pipeline.__call__).parameters:
        guidance = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
        return options | {"true_cfg_scale": 1.0} | guidance
    return options | {"guidance_scale": 0.0}  # Z-Image's guides at 1 already


class PromptEncoder:
    """`encode_prompt` of a pipeline that has the text encoders alone, in place of the tuned pipelines' own.

    Its embeddings are in float32 whatever the encoders' precision, since a pipeline gives its latents the embeddings'.
    They are kept until `forget`, since the diffusion loss asks for those of the rollout again.
    """

    def __init__(self, base, args, accelerator):
        accepted = inspect.signature(base.pipeline_class.__init__).parameters
        self.pipeline = base.pipeline_class.from_pretrained(
            args.pretrained_model_name_or_path,
            **{base.network_name: None, "vae": None},
            **{part: None for part in ("safety_checker", "image_encoder") if part in accepted},
            **{name: value for name, value in base.settings.items() if value is False},
            dtype=weight_dtype(accelerator),
            **hub_options(args),
        )
        # It would say of each caption, at each call, what is longer than an encoder reads.
        logging.getLogger("diffusers.pipelines").setLevel(logging.ERROR)
        networks = [part for part in self.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        for network in networks:
            network.requires_grad_(False).eval()
            network.to(torch.device("cpu") if args.offload_text_encoders else accelerator.device)
        self.on_device = OnDevice(networks if args.offload_text_encoders else [], accelerator.device)
        self.kept = {}

    @torch.no_grad()
    def __call__(self, *args, **options):
        key = repr((args, options))  # of prompts and settings; first, since a pipeline may write into the prompts
        if key not in self.kept:
            with self.on_device:
                embeddings = self.pipeline.encode_prompt(*args, **options)
            self.kept[key] = tree_map_only(
                torch.Tensor, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, embeddings
            )
        return tree_map(lambda own: own, self.kept[key])  # lists of its own, into which a pipeline may write

    def forget(self):
        self.kept.clear()


def load_pipelines(base, args, accelerator):
    """The pipeline from text and from an image, of the same networks: the one that trains, and a VAE in float32.

    In float32, since the gradient of a score with respect to a pixel is a small number.
    """
    path = args.pretrained_model_name_or_path
    network = base.network_class.from_pretrained(
        path, subfolder=base.network_name, **network_options(args, accelerator)
    )
    network = prepare_network(network, args, accelerator)
    scheduler = base.components["scheduler"].from_pretrained(
        path, subfolder="scheduler", revision=args.revision, cache_dir=args.cache_dir
    )
    pipelines = base.make_pipelines(
        {base.network_name: network, "vae": load_frozen_vae(base, args, accelerator), "scheduler": scheduler}
    )
    encoder = PromptEncoder(base, args, accelerator)
    for pipeline in pipelines:
        pipeline.encode_prompt = encoder
    return pipelines


def load_frozen_vae(base, args, accelerator):
    """It decodes one image at a time and checkpointed, so that what a backward stores is one image's."""
    if args.pretrained_vae_model_name_or_path is not None:
        vae = load_vae(args)
    else:
        vae_class = base.components["vae"]
        vae = vae_class.from_pretrained(args.pretrained_model_name_or_path, subfolder="vae", **hub_options(args))
    if "force_upcast" in vae.config:
        vae.register_to_config(force_upcast=False)  # for it is in float32 already
    checkpointing = args.gradient_checkpointing and vae._supports_gradient_checkpointing
    freeze_vae(vae, torch.float32, args.replace(gradient_checkpointing=checkpointing), accelerator)
    own = SimpleNamespace(decode=vae.decode, dtype=vae.dtype)

    def decode(latents, return_dict=True, generator=None):
        check_latents(latents, "behind a rollout")
        images = decode_checkpointed(own, latents)
        return SimpleNamespace(sample=images) if return_dict else (images,)

    vae.decode = decode
    return vae


def as_frames(vae, images):
    """Images as the VAE takes them: one of a video model takes a frame each, (B, 3, 1, H, W)."""
    return images.unsqueeze(2) if next(vae.decoder.parameters()).ndim == 5 else images


def encode_images(vae, images, posterior_noise):
    """(B, 3, H, W) in [-1, 1] to unscaled latents, float32; the pipelines scale them themselves."""
    return sample_posterior(vae, as_frames(vae, images), posterior_noise)


def decode_latents(vae, latents):
    """Unscaled latents to images (B, 3, H, W) in about [-1, 1], float32."""
    images = vae.decode(latents).sample
    return images[:, :, 0] if images.ndim == 5 else images


def make_family(base) -> Family:
    return Family(
        pipeline_class=base.pipeline_class,
        network_class=base.network_class,
        network_name=base.network_name,
        without_text_encoders={},
        encode_images=encode_images,
        decode_latents=decode_latents,
        inference_options=inference_options,
        card_tags=("text-to-image", "diffusers", "diffusers-training", "adversarial-diffusion-tuning"),
        sampler_facts=(),
        kohya_adapters=None,
        schedule_by_number=False,
    )


class PipelineValidation(Validation):
    """Validation by calls of the pipeline, prompts and all."""

    def __init__(self, pipeline, generator, adversary, models, run):
        self.pipeline = pipeline
        super().__init__(generator, adversary, models, run.args.validation_prompts or [], run)

    def draw(self):
        with self.pipeline.encode_prompt.on_device:
            return super().draw()

    def make_pipeline(self):
        return self.pipeline

    def draw_prompt(self, n, pipeline):
        args, images = self.run.args, []
        for j in range(args.num_validation_images):
            images += pipeline(
                self.conditions[n],
                generator=make_generator(args.seed, "validation", n, j),
                height=args.resolution,
                width=args.resolution,
                **inference_options(args),
            ).images
        return images


# Training


@dataclass
class Batch:
    """A micro-batch of one process, after step 1; steps 4 and 5 add the generated images."""

    captions: list[str]
    loss_captions: list[str]  # the diffusion loss's, in which captions may be dropped
    images: torch.Tensor  # (B, 3, H, W) in [-1, 1], what the discriminator calls real
    start_images: torch.Tensor  # as `images`, where the rollout starts
    seeds: list[int]  # (B,), of what the pipeline draws: the posterior, then the noise
    augmentation: dict  # {purpose: (B, DiffAugment.NUM_PARAMETERS)}
    generated: torch.Tensor | None = None  # as `images`
    real_features: dict = field(default_factory=dict)  # {purpose: the features of `images`}, see `Adversary`

    def call(self, pipeline, captions):
        """What the pipeline is called with to start from the images; each call draws the same."""
        size = dict(zip(("height", "width"), self.images.shape[2:], strict=True))
        accepted = inspect.signature(pipeline.__call__).parameters
        return {
            "prompt": list(captions),  # a copy, since Z-Image's pipeline writes into it
            "image": self.start_images / 2 + 0.5,
            "generator": [torch.Generator().manual_seed(seed) for seed in self.seeds],
        } | {name: side for name, side in size.items() if name in accepted}


def rollout_options(batch, args) -> dict:
    """`inference_options` for a batch: some pipelines take as many negative prompts as there are prompts."""
    options = inference_options(args)
    if "negative_prompt" in options:
        options["negative_prompt"] = [args.negative_prompt] * len(batch.captions)
    return options


def train(generator, adversary, tunable, validation, run):
    """The training loop, its comments numbered as the paper's algorithm."""
    args = run.args
    progress, prompt_encoder = Progress(generator, tunable.pipeline.scheduler, run), tunable.pipeline.encode_prompt
    loader = load_micro_batches(run, save_checkpoint)
    for iteration in range(run.first_iteration, args.max_train_steps):
        started = time.perf_counter()
        # The global generator serves dropout alone, where the model has any.
        dropout = make_generator(args.seed, "dropout", iteration, run.accelerator.process_index)
        torch.manual_seed(dropout.initial_seed())

        prompt_encoder.forget()
        # 1. The global batch's micro-batches.
        batches = [
            prepare_batch(next(loader), iteration, tunable, run) for _ in range(args.gradient_accumulation_steps)
        ]
        # 2. One start index for the whole global batch.
        num_steps = args.num_inference_steps
        path_generator = make_generator(args.seed, "path", iteration)
        start_index = torch.randint(num_steps, (1,), generator=path_generator).item()
        # 3. The steps that send a gradient.
        train_steps = None
        updates_generator = is_generator_iteration(iteration, args)
        if updates_generator:
            train_steps = select_train_steps(start_index, num_steps, args.num_gradient_steps, path_generator)
        # 4. Simulate inference and 5. decode.
        with prompt_encoder.on_device, torch.set_grad_enabled(updates_generator):
            for batch in batches:
                batch.generated = tunable(
                    **batch.call(tunable.pipeline, batch.captions), **rollout_options(batch, args),
                    start_index=start_index, train_steps=train_steps,
                )  # fmt: skip
        # 6. Update the discriminator.
        values = update_discriminator(batches, iteration, adversary, run)
        values |= {"start_index": start_index} | score_gap(values, start_index, num_steps)
        # 7. Update the generator.
        if updates_generator:
            values |= update_generator(batches, start_index, iteration, generator, adversary, tunable, run)
        adversary.warn_if_saturated(values)

        progress.log(values | {"lr": generator.lr}, iteration, started)
        del batches, batch
        done, stopping = iteration + 1, run.interruption.is_due(iteration + 1)
        if stopping or done % args.checkpointing_steps == 0:
            save_checkpoint(done, run)
        if not stopping and validation.is_due(done):
            validation.log(done)
        if stopping or validation.drifted:
            break
    progress.close()


def prepare_batch(examples, iteration, tunable, run) -> Batch:
    """Step 1: a micro-batch and its draws, by (seed, iteration, index in the global batch)."""
    args, device, positions = run.args, run.accelerator.device, examples["positions"]

    def draw(function, shape, purpose):
        return draw_per_image(function, shape, args.seed, purpose, iteration, positions).to(device)

    images = start_images = normalize_pixels(examples["pixel_values"].to(device, non_blocking=True))
    generators = [make_generator(args.seed, "start", iteration, position) for position in positions]
    seeds = [generator.initial_seed() for generator in generators]
    if args.real_images == "reconstructed":
        with torch.no_grad():
            images = reconstruct(tunable.pipeline.vae, start_images, generators)
    dropped = draw(torch.rand, (), "caption dropout") < args.proportion_empty_prompts
    return Batch(
        captions=examples["captions"],
        loss_captions=["" if drop else text for text, drop in zip(examples["captions"], dropped, strict=True)],
        images=images,
        start_images=start_images,
        seeds=seeds,
        augmentation={
            purpose: draw(torch.rand, (DiffAugment.NUM_PARAMETERS,), f"augmentation {purpose}")
            for purpose in ("real", "fake", "generator", "reference")
        },
    )


def reconstruct(vae, images, generators):
    """What the VAE makes of images, from the latents that the rollout starts from; each image by its generator."""
    posteriors = [vae.encode(image).latent_dist for image in as_frames(vae, images).split(1)]
    latents = [posterior.sample(generator) for posterior, generator in zip(posteriors, generators, strict=True)]
    return decode_latents(vae, torch.cat(latents))


# Copied from train_adt_sd15.update_discriminator
def update_discriminator(batches, iteration, adversary, run) -> dict:
    """Step 6: one update with the generated images detached, then the twin heads follow.

    Real, mismatched and fake pairs go through in forwards of their own, since one would mix their batch norm
    statistics, and each forward's backward comes before the next forward, since data parallelism needs that.
    """
    discriminator, totals = adversary.discriminator, Totals(len(batches))
    update_spectral_norm(discriminator.network)
    mismatched_weight, others = run.args.mismatched_pair_weight, None
    if mismatched_weight > 0:
        references = [adversary.reference_features(batch, "real") for batch in batches]
        others = adversary.mismatched_references(batches, references)
    for n, batch in enumerate(batches):
        real = adversary.real_features(batch, "real")
        with torch.no_grad():
            fake = adversary.features(batch, batch.generated.detach(), "fake")
        pairs = [
            ("real", real, adversary.reference_features(batch, "real"), 1.0),
            ("fake", fake, adversary.reference_features(batch, "fake"), 1.0),
        ]
        if others is not None:
            pairs.insert(1, ("mismatched", real, others[n], mismatched_weight))
        for kind, features, target, weight in pairs:
            with discriminator.synchronise_if(kind == "fake" and n == len(batches) - 1):
                scores = discriminator.wrapped(features, target)
                loss = weight * discriminator_loss(**{f"{kind}_scores": scores})
                run.accelerator.backward(loss)
            totals.add_means(**{"discriminator_loss": loss, f"{kind}_score": scores.mean()})
    values = totals.reduce(run.accelerator, iteration)
    adversary.step(iteration)
    return values | {"discriminator_lr": discriminator.lr}


def update_generator(batches, start_index, iteration, generator, adversary, tunable, run) -> dict:
    """Step 7: `-E[D(y_hat, y)] + lambda L_diff`, the first part by replaying the chosen steps one at a time."""
    args, accelerator = run.args, run.accelerator
    totals, gradients = Totals(len(batches)), []
    with adversary.discriminator.frozen() as scorer:
        for batch in batches:
            features = adversary.features(batch, batch.generated, "generator")
            loss = generator_loss(scorer(features, adversary.reference_features(batch, "generator")))
            gradients.append(tunable.gradients(loss))
            totals.add_means(generator_loss=loss)
            totals.add_squared_norms(adversarial_gradient_norm=gradients[-1].norm_squared)

    if args.diffusion_loss_weight > 0:
        generator.wrapped.train()
        # Dropped captions are new to the text encoders; the others have been encoded for the rollout.
        dropping = args.proportion_empty_prompts > 0
        with tunable.pipeline.encode_prompt.on_device if dropping else contextlib.nullcontext():
            for batch in batches:
                with generator.synchronise_if(False):
                    loss, prediction = diffusion_loss(batch, start_index, tunable, args)
                    weighted = args.diffusion_loss_weight * loss
                    gradient = torch.autograd.grad(weighted, prediction, retain_graph=True)[0]
                    accelerator.backward(weighted)
                totals.add_means(diffusion_loss=loss)
                totals.add_squared_norms(diffusion_gradient_norm=gradient.square().sum())
        generator.wrapped.eval()

    values = totals.reduce(accelerator, iteration)
    weight = values["adversarial_loss_weight"] = adversarial_weight(values, args)
    scaled = Gradients()
    for own in gradients:
        scaled |= {kept: [tree_map_only(torch.Tensor, lambda v: weight * v, v) for v in own[kept]] for kept in own}
    tunable.replay(scaled, accelerator)  # all micro-batches' together: the last pass alone synchronises
    generator.step(iteration)
    return values


def diffusion_loss(batch, start_index, tunable, args):
    """The model's own training loss, at the rollout's start: what the network predicts there, without guidance.

    Returns:
        the 0-d loss and the prediction, in the layout of the pipeline's latents, that it was computed from.
    """
    prediction, start = tunable.start_prediction(
        **batch.call(tunable.pipeline, batch.loss_captions),
        **conditional_options(tunable.pipeline, args),
        start_index=start_index,
    )
    return F.mse_loss(prediction.float(), start.target.float()), prediction


def try_out(tunable, args):
    """One step of a rollout, whose images are thrown away: what the pipeline refuses is found before the training."""
    side = args.resolution
    batch = Batch([""], [""], *[torch.zeros(1, 3, side, side, device=tunable.pipeline.device)] * 2, [0], {})
    with torch.no_grad():
        refuse_by_sentence(
            lambda: tunable(
                **batch.call(tunable.pipeline, batch.captions), **rollout_options(batch, args),
                start_index=args.num_inference_steps - 1,
            )
        )  # fmt: skip


def tune(base, run):
    """The run from its models' weights to the saved result.

    A function of its own, so that nothing refers to the trained networks any more when `end_run` closes the run.
    """
    args, accelerator = run.args, run.accelerator
    pipeline, from_image = load_pipelines(base, args, accelerator)
    models = FrozenModels(pipeline.vae, None, pipeline.scheduler, None)
    generator = prepare_generator(getattr(pipeline, base.network_name), run)
    tunable = ConstrainedPipeline(from_image, args.num_gradient_steps, args.gradient_path, network=generator.wrapped)
    try_out(tunable, args)
    adversary = make_adversary(models, run)
    register_checkpoint_hooks(generator, run)
    validation = PipelineValidation(pipeline, generator, adversary, models, run)
    load_checkpoint(run)
    with run.interruption:
        train(generator, adversary, tunable, validation, run)
        finish_run(generator, models, validation, run)


def main(args):
    accelerator = start_accelerator(args)
    interruption = Interruption(args, accelerator)
    # Everything that can be checked before a model is loaded.
    base, args, scheduler = check_models(args)
    dataset = load_image_caption_dataset(args)
    args = resolve_schedule(args, images_per_epoch(dataset, args, accelerator), accelerator)
    identity = identify_run(args, {}, dataset, accelerator)
    identity["models"]["scheduler"] = scheduler
    checkpoint, first_iteration = find_checkpoint(identity, args)
    check_used_images(dataset, first_iteration, args, accelerator)
    repo_id = create_output(args, accelerator)
    run = Run(
        make_family(base), adt_or_plain(args), args, accelerator, dataset, identity, checkpoint, first_iteration, None,
        repo_id, interruption,
    )  # fmt: skip
    tune(base, run)
    end_run(run)


if __name__ == "__main__":
    try:
        main(parse_args())
    except ADTError as error:
        sys.exit(f"error: {error}")

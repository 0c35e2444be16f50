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
"""Adversarial Diffusion Tuning (ADT) of Stable Diffusion 3 and 3.5. Needs the `*_utils.py` beside it.

On one GPU with 24 GB, low-rank adapters, without T5:

    accelerate launch --mixed_precision bf16 train_adt_sd3.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3-medium-diffusers \
        --dataset_name DATASET --caption_column text --train_batch_size 1 --gradient_accumulation_steps 8 \
        --use_lora --rank 32 --learning_rate 1e-5 --gradient_checkpointing --no_t5 --offload_text_encoders \
        --validation_prompts "a lighthouse at dusk" --output_dir sd3-adt-lora

On four GPUs, the paper's setting (global batch 8):

    accelerate launch --multi_gpu --num_processes 4 --mixed_precision bf16 train_adt_sd3.py ... --train_batch_size 2

On two machines, on each of them with its own rank:

    accelerate launch --multi_gpu --num_machines 2 --num_processes 8 --machine_rank RANK --main_process_ip HOST \
        --main_process_port 29500 --mixed_precision bf16 train_adt_sd3.py ... --train_batch_size 1

A run that was stopped goes on exactly where it was with `--resume_from_checkpoint latest`. All randomness derives from
the seed, the iteration and an image's index in the global batch, so that neither resuming nor the number of processes
changes a run.
"""

import argparse
import math
import re
import sys
import time

import torch
import torch.nn.functional as F
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    free_memory,
)
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from adt_utils import (
    DiffAugment,
    check_scheduler,
    discriminator_loss,
    generator_loss,
    signal_and_noise_levels,
    update_spectral_norm,
)
from adversary_utils import adversarial_weight, check_adversary, make_adversary, score_gap
from bucket_utils import image_sizes
from data_utils import (
    EmbeddingCache,
    OnDevice,
    check_used_images,
    draw_path,
    draw_per_image,
    fingerprint_text_encoders,
    images_per_epoch,
    list_captions,
    load_image_caption_dataset,
    load_micro_batches,
    make_generator,
    normalize_pixels,
)
from disk_utils import bytes_to_come
from option_utils import (
    Nature,
    add_arguments,
    add_text_encoder_arguments,
    adder,
    number,
    parse_options,
    positive_float,
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
    sampler_schedule,
    save_checkpoint,
)
from training_utils import (
    ADTError,
    Batch,
    Conditions,
    Family,
    FrozenModels,
    Progress,
    Run,
    Totals,
    check_decoder,
    check_image_sizes,
    check_latents,
    check_lora,
    concatenate,
    decode_checkpointed,
    end_run,
    expand,
    freeze_vae,
    hub_options,
    is_generator_iteration,
    load_decoder,
    load_vae,
    load_vae_config,
    make_predict,
    network_options,
    prepare_generator,
    prepare_network,
    resolve_schedule,
    roll_out,
    rollout_group,
    sample_posterior,
    start_accelerator,
    vae_factor,
    weight_dtype,
)


# The sampler's class and the paper's number of steps, which is also what the second one gets.
SAMPLERS = {
    "euler": (FlowMatchEulerDiscreteScheduler, 28),
    "dpmsolver++": (DPMSolverMultistepScheduler, 28),
}
MAX_MODE_SCALE = 2 / (math.pi - 2)  # up to which the mode density is one


def make_parser() -> argparse.ArgumentParser:
    """The options and this family's defaults, which are the paper's."""
    parser = argparse.ArgumentParser(
        description="Adversarial Diffusion Tuning of Stable Diffusion 3 and 3.5.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_arguments(parser, SAMPLERS)
    group = parser.add_argument_group("SD3")
    add_text_encoder_arguments(group)
    add = adder(group)
    add("--no_t5", action="store_true", help="Train, and sample, without T5, whose embeddings are then zeros.")
    add(
        "--max_sequence_length",
        type=number(int, lambda value: 1 <= value <= 512, "lie in [1, 512]"),
        default=256,
        help="Of T5's tokens, at most 512.",
    )
    add = adder(group, Nature.FINE_TUNING)
    add(
        "--weighting_scheme",
        choices=["sigma_sqrt", "logit_normal", "mode", "cosmap", "none"],
        default="logit_normal",
        help="Of the noise levels in plain fine-tuning.",
    )
    add("--logit_mean", type=float, default=0.0, help="Of logit_normal.")
    add("--logit_std", type=positive_float, default=1.0, help="Of logit_normal.")
    add(
        "--mode_scale",
        type=number(float, lambda value: -1 <= value <= MAX_MODE_SCALE, "lie in [-1, 1.75], where it is a density"),
        default=1.29,
        help="Of mode.",
    )
    parser.set_defaults(
        sampler="euler",
        output_dir="sd3-adt",
        tracker_project_name="adt-sd3",
        resolution=1024,
        learning_rate=1e-6,
        discriminator_learning_rate=1e-6,
        guidance_scale=7.0,
        lora_layers=[
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        ],
    )  # fmt: skip
    return parser


def parse_args(input_args=None):
    return parse_options(make_parser(), SAMPLERS, input_args)


def make_sampler(args, base_scheduler_config, image_seq_len):
    """The scheduler of the rollout, of validation and of the saved pipeline, its timesteps set and on the CPU.

    DPM-Solver++ takes the checkpoint's shift alone; `from_config` would make an epsilon model's solver of the rest.

    Args:
        base_scheduler_config: a `FlowMatchEulerDiscreteScheduler`'s.
        image_seq_len: the number of the transformer's image tokens, by which a checkpoint may shift its schedule.

    Raises:
        ADTError: where the sampler does not suit the model.
    """
    config = {name: value for name, value in base_scheduler_config.items() if name != "clip_sample"}
    length = config.get("num_train_timesteps", 1000)
    if args.num_inference_steps > length:
        raise ADTError(
            f"--num_inference_steps {args.num_inference_steps} is too many for a schedule of {length} timesteps."
        )
    if config.get("invert_sigmas", False):
        raise ADTError("The base pipeline's scheduler has invert_sigmas: it runs from the data to the noise.")
    mu = None
    if config.get("use_dynamic_shifting", False):
        mu = calculate_shift(
            image_seq_len,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
    if args.sampler == "euler":
        sampler = FlowMatchEulerDiscreteScheduler.from_config(config)
        sampler.set_timesteps(args.num_inference_steps, **({} if mu is None else {"mu": mu}))
    else:
        for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "shift_terminal"):
            if config.get(name):
                raise ADTError(f"--sampler dpmsolver++ has no {name} with flow matching, but the base pipeline does.")
        # A dynamic shift becomes the fixed one of this resolution.
        flow_shift = config.get("shift", 1.0)
        if mu is not None:
            flow_shift = mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)
        sampler = DPMSolverMultistepScheduler(
            num_train_timesteps=length,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=flow_shift,
            algorithm_type="dpmsolver++",
            solver_order=2,
            solver_type="midpoint",
            final_sigmas_type="zero",
        )
        sampler.set_timesteps(args.num_inference_steps)
    try:
        check_scheduler(sampler)
    except ValueError as error:
        raise ADTError(str(error)) from error
    return sampler


def inference_options(args) -> dict:
    """What the pipeline is called with, beside the prompt and the size, to sample as in training."""
    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    if args.max_sequence_length != 256:
        options["max_sequence_length"] = args.max_sequence_length
    return options


def check_models(args):
    """Checks everything that the models' configurations tell, before any weight is loaded.

    Returns:
        the sampler; the scheduler of plain fine-tuning; the side of the images that the pipeline makes by default.
    """
    hub = {"revision": args.revision, "cache_dir": args.cache_dir}
    path, vae_path = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
    try:
        index = StableDiffusion3Pipeline.load_config(path, **hub)
        transformer_config = SD3Transformer2DModel.load_config(path, subfolder="transformer", **hub)
        scheduler_config = FlowMatchEulerDiscreteScheduler.load_config(path, subfolder="scheduler", **hub)
    except OSError as error:
        raise ADTError(f"--pretrained_model_name_or_path {path} is not a readable pipeline: {error}") from error
    if index["_class_name"] != "StableDiffusion3Pipeline":
        raise ADTError(f"{path} is a {index['_class_name']}; this script tunes a StableDiffusion3Pipeline.")
    if scheduler_config.get("use_flow_sigmas", False):
        # A result of this script's with DPM-Solver++, whose shift is all that it kept.
        scheduler_config = {name: scheduler_config[name] for name in ("num_train_timesteps", "flow_shift")}
        scheduler_config["shift"] = scheduler_config.pop("flow_shift")
    elif scheduler_config["_class_name"] != "FlowMatchEulerDiscreteScheduler":
        raise ADTError(f"{path} has a {scheduler_config['_class_name']}: it is no flow-matching model.")
    vae_config = load_vae_config(args)
    check_decoder(args, vae_config)
    factor = vae_factor(vae_config)
    pixels = factor * transformer_config["patch_size"]  # a side of an image token
    check_image_sizes(args, pixels, f"{pixels}, the VAE's factor times the transformer's patch size")
    most = transformer_config["pos_embed_max_size"] * pixels
    for side in (args.resolution, *(side for size in image_sizes(args) for side in size)):
        if side > most:
            raise ADTError(f"{side} pixels a side are too many: {path} has positions for {most}.")
    if args.use_aspect_ratio_buckets and scheduler_config.get("use_dynamic_shifting", False):
        raise ADTError(f"{path} shifts its noise levels by the image's size, which --use_aspect_ratio_buckets varies.")
    if transformer_config["in_channels"] != vae_config["latent_channels"]:
        raise ADTError(
            f"The transformer of {path} takes {transformer_config['in_channels']} channels and the VAE of "
            f"{vae_path or path} makes {vae_config['latent_channels']}: they are not a text-to-image model's."
        )
    if vae_config.get("shift_factor") is None:
        raise ADTError(f"The VAE of {vae_path or path} has no shift_factor: it is no VAE of SD3's.")
    sampler = make_sampler(args, scheduler_config, (args.resolution // pixels) ** 2)
    noise_scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
    check_adversary(args)
    check_lora(args, SD3Transformer2DModel, transformer_config)
    return sampler, noise_scheduler, transformer_config["sample_size"] * factor


def absent_components(args) -> dict:
    """Components that the base pipeline lacks and `from_pretrained` must be told so."""
    index = StableDiffusion3Pipeline.load_config(
        args.pretrained_model_name_or_path, revision=args.revision, cache_dir=args.cache_dir
    )
    return {name: None for name in ("text_encoder_3", "tokenizer_3") if None in index.get(name, [None])}


def unused_components(args) -> dict:
    """Components that the pipeline must be loaded without to sample as in training."""
    return {"text_encoder_3": None, "tokenizer_3": None} if args.no_t5 else absent_components(args)


class PromptEncoder:
    """Prompts to what the network is conditioned on, as `StableDiffusion3Pipeline` computes it.

    One prompt at a time, so that a prompt's embedding does not depend on the batch that it is in; a cache encodes many
    together, once and for all.
    """

    def __init__(self, args, accelerator):
        path, hub = args.pretrained_model_name_or_path, hub_options(args)
        tokenizer_hub = {name: value for name, value in hub.items() if name != "variant"}
        self.device = accelerator.device
        self.max_sequence_length = args.max_sequence_length
        self.tokenizers = [
            CLIPTokenizer.from_pretrained(path, subfolder=subfolder, **tokenizer_hub)
            for subfolder in ("tokenizer", "tokenizer_2")
        ]
        self.text_encoders = [
            CLIPTextModelWithProjection.from_pretrained(path, subfolder=subfolder, **hub)
            for subfolder in ("text_encoder", "text_encoder_2")
        ]
        self.joint_attention_dim = SD3Transformer2DModel.load_config(path, subfolder="transformer", **tokenizer_hub)[
            "joint_attention_dim"
        ]
        if not unused_components(args):
            self.tokenizers.append(T5TokenizerFast.from_pretrained(path, subfolder="tokenizer_3", **tokenizer_hub))
            self.text_encoders.append(T5EncoderModel.from_pretrained(path, subfolder="text_encoder_3", **hub))
        for text_encoder in self.text_encoders:
            resting_device = torch.device("cpu") if args.offload_text_encoders else self.device
            text_encoder.requires_grad_(False).eval().to(resting_device, dtype=weight_dtype(accelerator))
            for name, module in text_encoder.named_modules():
                # T5's overflows in float16, and there alone: transformers, too, keeps it then.
                if name.endswith("DenseReluDense.wo") and weight_dtype(accelerator) == torch.float16:
                    module.float()
        # For more than one call: `train` opens it around an iteration's.
        self.on_device = OnDevice(self.text_encoders if args.offload_text_encoders else [], self.device)
        self.cache = None
        self.negative = self([""])  # the pipeline's unconditional branch, which also stands for a dropped caption

    @torch.no_grad()
    def encode(self, prompts) -> dict:
        def tokenize(tokenizer, max_length):
            tokens = tokenizer(
                prompts, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt"
            )
            return tokens.input_ids.to(self.device)

        hidden_states, pooled = [], []
        for tokenizer, text_encoder in zip(self.tokenizers[:2], self.text_encoders[:2], strict=True):
            tokens = tokenize(tokenizer, self.tokenizers[0].model_max_length)
            output = text_encoder(tokens, output_hidden_states=True)
            hidden_states.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        clip_embeds = torch.cat(hidden_states, dim=-1)
        if len(self.text_encoders) == 3:
            t5_embeds = self.text_encoders[2](tokenize(self.tokenizers[2], self.max_sequence_length))[0]
        else:
            t5_embeds = clip_embeds.new_zeros(len(prompts), self.max_sequence_length, self.joint_attention_dim)
        clip_embeds = F.pad(clip_embeds, (0, t5_embeds.shape[-1] - clip_embeds.shape[-1]))
        return {
            "prompt_embeds": torch.cat([clip_embeds, t5_embeds], dim=-2),
            "pooled_prompt_embeds": torch.cat(pooled, dim=-1),
        }

    def __call__(self, prompts) -> dict:
        """`prompt_embeds` (B, L, C), CLIP's tokens and then T5's, and `pooled_prompt_embeds` (B, P)."""
        if self.cache is not None:
            return {name: value.to(self.device) for name, value in self.cache.read(prompts).items()}
        with self.on_device:
            return concatenate([self.encode([prompt]) for prompt in prompts])

    def use_cache(self, directory, captions, accelerator, reserved=0):
        """Takes the captions' embeddings from a folder, where they are put first, and frees the text encoders.

        Args:
            reserved: bytes of the folder's disk that the run will take for other things.
        """
        fingerprint = fingerprint_text_encoders(
            self.tokenizers, self.text_encoders, self.max_sequence_length, self.joint_attention_dim
        )
        self.cache = EmbeddingCache(
            directory, captions, self.encode, fingerprint, self.negative, accelerator, reserved
        )
        self.tokenizers = self.text_encoders = None
        self.on_device = OnDevice([], self.device)
        free_memory()


# Copied from train_adt_sd15.make_conditions
def make_conditions(examples, positive, negative, dropped, args) -> Conditions:
    """What the network is conditioned on, for the two guidance branches and for the diffusion loss.

    Args:
        positive: the prompts' embeddings, dict of (B, ...).
        negative: those of the pipeline's unconditional branch, dict of (1, ...).
        dropped: (B,), which images' captions are dropped. In the diffusion loss only: the sampler is run with them.
    """
    negative = {name: value.expand_as(positive[name]) for name, value in negative.items()}
    loss = {name: torch.where(expand(dropped, value), negative[name], value) for name, value in positive.items()}
    return Conditions(negative, positive, loss)


def call_network(network, sample, timestep, condition):
    return network(
        hidden_states=sample,
        timestep=timestep.expand(len(sample)),
        encoder_hidden_states=condition["prompt_embeds"],
        pooled_projections=condition["pooled_prompt_embeds"],
    ).sample


def load_network(args, accelerator) -> SD3Transformer2DModel:
    path, options = args.pretrained_model_name_or_path, network_options(args, accelerator)
    transformer = SD3Transformer2DModel.from_pretrained(path, subfolder="transformer", **options)
    return prepare_network(transformer, args, accelerator)


def load_frozen_vae(args, accelerator):
    """In float32: the gradient of a score with respect to a pixel is a small number."""
    return freeze_vae(load_vae(args), torch.float32, args, accelerator)


def encode_images(vae, pixel_values, posterior_noise):
    """pixel_values: (B, 3, H, W) in [-1, 1]; posterior_noise as the latents. Returns scaled latents, float32."""
    return (sample_posterior(vae, pixel_values, posterior_noise) - vae.config.shift_factor) * vae.config.scaling_factor


def decode_latents(vae, latents):
    """latents: (B, C, h, w), scaled. Returns (B, 3, H, W) in about [-1, 1], float32."""
    return decode_checkpointed(vae, latents / vae.config.scaling_factor + vae.config.shift_factor)


def diffusion_loss(network, batch, timesteps, levels, scheduler, args):
    """The model's own training loss on `(1 - sigma) x_0 + sigma eps`, for the velocity `eps - x_0`.

    Weighted by `args.weighting_scheme` in plain fine-tuning; the paper's, in ADT, is not.

    Args:
        batch: its `latents` are `x_0` and its `loss_noise` is `eps`.
        timesteps: (B,).
        levels: `1 - sigma` and sigma, (B, 1, 1, 1) each, at those timesteps.
        scheduler: not used, since a flow-matching model predicts the velocity.

    Returns:
        the 0-d loss and the prediction (B, C, h, w) that it was computed from.
    """
    latents, noise = batch.latents, batch.loss_noise
    alpha, sigma = levels
    sample = alpha * latents + sigma * noise
    prediction = call_network(network, sample, timesteps, batch.conditions.loss).float()
    loss = F.mse_loss(prediction, noise - latents, reduction="none").mean(dim=(1, 2, 3))
    if not args.adversarial:
        loss = loss * compute_loss_weighting_for_sd3(args.weighting_scheme, sigmas=sigma).flatten()
    return loss.mean(), prediction


def timestep_density(args):
    """What plain fine-tuning draws its timesteps by: a function (shape, generator) of values in [0, 1]."""

    def draw(shape, generator):
        density = compute_density_for_timestep_sampling(
            args.weighting_scheme, 1, args.logit_mean, args.logit_std, args.mode_scale, generator=generator
        )
        return density.reshape(shape)

    return draw


def plain_noise_levels(density, noise_scheduler):
    """Plain fine-tuning's timesteps (B,) and levels, (B, 1, 1, 1) each, from draws (B,) by `timestep_density`.

    By index into the training schedule, the largest noise first.
    """
    length = noise_scheduler.config.num_train_timesteps
    indices = (density * length).long().clamp(max=length - 1)
    sigma = noise_scheduler.sigmas.to(density.device)[indices].view(-1, 1, 1, 1)
    return noise_scheduler.timesteps.to(density.device)[indices], (1 - sigma, sigma)


def inference_note(args) -> str:
    """What the model card says of T5."""
    if unused_components(args):
        return "\nIt was trained without T5, whose embeddings were zeros: load it without `text_encoder_3`, as above."
    return f"\nT5 saw {args.max_sequence_length} tokens (`max_sequence_length`)."


# The original model's names of what diffusers calls otherwise, and of a block's layers.
ORIGINAL_NAMES = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
# And of its queries, keys and values, in their order in the rows of one layer.
ORIGINAL_QKV = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}


def adapters_to_kohya(adapters) -> dict:
    """The adapters of the original model's layers, by kohya's names; the products `up @ down` are the same.

    Args:
        adapters: {`MODULE.lora_A.weight` (r, in), `MODULE.lora_B.weight` (out, r)} of diffusers' layers.

    Returns:
        {`lora_unet_MODULE.lora_down.weight`, `….lora_up.weight`}; (3 r, in) and (3 out, 3 r) for queries, keys and
        values, whose `up` is block-diagonal, and fewer than 3 r where not all three have adapters.
    """
    rows = {layer: (name, row) for name, layers in ORIGINAL_QKV.items() for row, layer in enumerate(layers)}
    downs, ups = {}, {}
    for module in (name.removesuffix(".lora_A.weight") for name in adapters if name.endswith(".lora_A.weight")):
        down, up = adapters[f"{module}.lora_A.weight"], adapters[f"{module}.lora_B.weight"]
        index, layer = re.fullmatch(r"(?:transformer_blocks\.(\d+)\.)?(.+)", module).groups()
        if layer in ("norm_out.linear", "norm1_context.linear") and len(up) == 2 * down.shape[1]:
            up = torch.cat(up.chunk(2)[::-1])  # shift and scale, which change places in an output's modulation
        name, row = rows.get(layer) or (ORIGINAL_NAMES[layer], None)
        if row is not None:
            up = torch.cat([up if n == row else torch.zeros_like(up) for n in range(3)])
        name = name if index is None else f"joint_blocks.{index}.{name}"
        downs.setdefault(name, []).append(down)
        ups.setdefault(name, []).append(up)
    kohya = {}
    for name in downs:
        kohya[f"lora_unet_{name.replace('.', '_')}.lora_down.weight"] = torch.cat(downs[name])
        kohya[f"lora_unet_{name.replace('.', '_')}.lora_up.weight"] = torch.cat(ups[name], dim=1)
    return kohya


FAMILY = Family(
    pipeline_class=StableDiffusion3Pipeline,
    network_class=SD3Transformer2DModel,
    network_name="transformer",
    without_text_encoders=dict.fromkeys(
        ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    ),
    encode_images=encode_images,
    decode_latents=decode_latents,
    inference_options=inference_options,
    card_tags=(
        "text-to-image", "diffusers", "diffusers-training", "sd3", "stable-diffusion-3",
        "adversarial-diffusion-tuning",
    ),
    sampler_facts=("prediction_type", "shift", "flow_shift", "use_dynamic_shifting"),
    kohya_adapters=adapters_to_kohya,
    half_precision_components=("text_encoder_3",),
    absent_components=absent_components,
    unused_components=unused_components,
    inference_note=inference_note,
)  # fmt: skip


# Copied from train_adt_sd15.train
def train(generator, adversary, models, validation, run):
    """The training loop, its comments numbered as the paper's algorithm; plain fine-tuning without an adversary."""
    args, sampler = run.args, models.sampler
    progress = Progress(generator, sampler, run)
    loader = load_micro_batches(run, save_checkpoint)
    ahead = {}  # by iteration: micro-batches that are encoded, and rolled out
    for iteration in range(run.first_iteration, args.max_train_steps):
        started = time.perf_counter()
        # The global generator serves dropout alone, where the model has any.
        dropout = make_generator(args.seed, "dropout", iteration, run.accelerator.process_index)
        torch.manual_seed(dropout.initial_seed())

        if iteration not in ahead:
            # Within this group the generator stays as it is, so that the rollouts can run together.
            group = rollout_group(iteration, args)
            # 1. Encode the global batch's micro-batches.
            with models.prompt_encoder.on_device:
                ahead = {
                    n: [prepare_batch(next(loader), n, models, run) for _ in range(args.gradient_accumulation_steps)]
                    for n in group
                }
            if adversary is not None:
                # 2. One start index for the whole global batch, and 3. the steps that send a gradient.
                paths = {n: draw_path(n, args) for n in group}
                # 4. Simulate inference.
                generator.wrapped.eval()
                roll_out(ahead, paths, generator, sampler, call_network, run)
        batches = ahead.pop(iteration)
        if adversary is None:
            values = update_finetune(batches, iteration, generator, models, run)
        else:
            # 5. Decode.
            for batch in batches:
                check_latents(batch.rollout.latents, f"at iteration {iteration + 1}")
                batch.generated = decode_latents(models.decoder, batch.rollout.latents)
            # 6. Update the discriminator.
            start_index, _ = paths[iteration]
            values = update_discriminator(batches, iteration, adversary, run)
            values |= {"start_index": start_index} | score_gap(values, start_index, args.num_inference_steps)
            # 7. Update the generator.
            if is_generator_iteration(iteration, args):
                values |= update_generator(batches, start_index, iteration, generator, adversary, models, run)
            adversary.warn_if_saturated(values)

        progress.log(values | {"lr": generator.lr}, iteration, started)
        del batches
        done, stopping = iteration + 1, run.interruption.is_due(iteration + 1)
        if stopping or done % args.checkpointing_steps == 0:
            save_checkpoint(done, run)
        if not stopping and validation.is_due(done):
            validation.log(done)
        if stopping or validation.drifted:
            break
    progress.close()


# Copied from train_adt_sd15.prepare_batch
def prepare_batch(examples, iteration, models, run) -> Batch:
    """Step 1: encodes a micro-batch and draws its noise, by (seed, iteration, index in the global batch)."""
    args, vae, encoder = run.args, models.vae, models.prompt_encoder
    device, positions = run.accelerator.device, examples["positions"]

    def draw(function, shape, purpose):
        return draw_per_image(function, shape, args.seed, purpose, iteration, positions).to(device)

    images = normalize_pixels(examples["pixel_values"].to(device, non_blocking=True))
    shape = (vae.config.latent_channels, *(side // vae_factor(vae.config) for side in images.shape[2:]))
    noise = draw(torch.randn, shape, "noise")
    latents = encode_images(vae, images, draw(torch.randn, shape, "posterior"))
    if args.adversarial and args.real_images == "reconstructed":
        with torch.no_grad():
            images = decode_latents(models.decoder, latents)
    dropped = draw(torch.rand, (), "caption dropout") < args.proportion_empty_prompts
    return Batch(
        captions=examples["captions"],
        images=images,
        latents=latents,
        noise=noise,
        # The offset is the diffusion loss's alone: inference starts from noise without one.
        loss_noise=noise + args.noise_offset * draw(torch.randn, (shape[0], 1, 1), "noise offset"),
        density=draw(timestep_density(args), (), "timestep"),
        conditions=make_conditions(examples, encoder(examples["captions"]), encoder.negative, dropped, args),
        augmentation={
            purpose: draw(torch.rand, (DiffAugment.NUM_PARAMETERS,), f"augmentation {purpose}")
            for purpose in ("real", "fake", "generator", "reference")
        },
    )


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


# Copied from train_adt_sd15.update_generator
def update_generator(batches, start_index, iteration, generator, adversary, models, run) -> dict:
    """Step 7: `-E[D(y_hat, y)] + lambda L_diff`, the first part by replaying the chosen steps one at a time."""
    args, accelerator, sampler = run.args, run.accelerator, models.sampler
    totals, vectors = Totals(len(batches)), []
    with adversary.discriminator.frozen() as scorer:
        for batch in batches:
            features = adversary.features(batch, batch.generated, "generator")
            loss = generator_loss(scorer(features, adversary.reference_features(batch, "generator")))
            vectors.append(batch.rollout.prediction_gradients(loss))
            totals.add_means(generator_loss=loss)
            totals.add_squared_norms(adversarial_gradient_norm=batch.rollout.guided_norm_squared(vectors[-1]))

    if args.diffusion_loss_weight > 0:
        generator.wrapped.train()
        for batch in batches:
            level = torch.ones(len(batch.latents), 1, 1, 1, device=accelerator.device)
            levels = [value * level for value in signal_and_noise_levels(sampler, start_index)]
            timesteps = sampler.timesteps[start_index].to(level.device).expand(len(level))
            with generator.synchronise_if(False):
                loss, prediction = diffusion_loss(generator.wrapped, batch, timesteps, levels, sampler, args)
                weighted = args.diffusion_loss_weight * loss
                gradient = torch.autograd.grad(weighted, prediction, retain_graph=True)[0]
                accelerator.backward(weighted)
            totals.add_means(diffusion_loss=loss)
            totals.add_squared_norms(diffusion_gradient_norm=gradient.square().sum())
        generator.wrapped.eval()

    values = totals.reduce(accelerator, iteration)
    weight = values["adversarial_loss_weight"] = adversarial_weight(values, args)
    passes = []
    for batch, gradients in zip(batches, vectors, strict=True):
        predict = make_predict(generator.wrapped, batch.conditions, call_network)
        vector = [weight * gradient for gradient in gradients]
        passes += batch.rollout.replay(predict, vector, together=args.replay_branches == "together")
    for n, replay in enumerate(passes):
        with generator.synchronise_if(n == len(passes) - 1):
            accelerator.backward(replay())
    generator.step(iteration)
    return values


# Copied from train_adt_sd15.update_finetune
def update_finetune(batches, iteration, generator, models, run) -> dict:
    """Plain fine-tuning: the diffusion loss at a timestep drawn for each image, no rollout, no discriminator."""
    totals, scheduler = Totals(len(batches)), models.noise_scheduler
    generator.wrapped.train()
    for n, batch in enumerate(batches):
        timesteps, levels = plain_noise_levels(batch.density, scheduler)
        with generator.synchronise_if(n == len(batches) - 1):
            loss, prediction = diffusion_loss(generator.wrapped, batch, timesteps, levels, scheduler, run.args)
            gradient = torch.autograd.grad(loss, prediction, retain_graph=True)[0]
            run.accelerator.backward(loss)
        totals.add_means(diffusion_loss=loss)
        totals.add_squared_norms(diffusion_gradient_norm=gradient.square().sum())
    values = totals.reduce(run.accelerator, iteration)
    generator.step(iteration)
    return values


# Copied from train_adt_sdxl.tune
def tune(sampler, noise_scheduler, run):
    """The run from its models' weights to the saved result.

    A function of its own, so that nothing refers to the trained networks any more when `end_run` closes the run.
    """
    args, accelerator = run.args, run.accelerator
    prompt_encoder = PromptEncoder(args, accelerator)
    with prompt_encoder.on_device:
        validation_conditions = [prompt_encoder([prompt]) for prompt in args.validation_prompts or []]
    if args.cache_text_embeddings is not None:
        captions, reserved = list_captions(run.dataset, args), bytes_to_come(args.cache_text_embeddings, run)
        prompt_encoder.use_cache(args.cache_text_embeddings, captions, accelerator, reserved)
    vae, decoder = load_frozen_vae(args, accelerator), load_decoder(args, accelerator)
    models = FrozenModels(vae, prompt_encoder, sampler, noise_scheduler, decoder)
    generator = prepare_generator(load_network(args, accelerator), run)
    adversary = make_adversary(models, run)
    register_checkpoint_hooks(generator, run)
    validation = Validation(generator, adversary, models, validation_conditions, run)
    load_checkpoint(run)
    with run.interruption:
        train(generator, adversary, models, validation, run)
        finish_run(generator, models, validation, run)


# Copied from train_adt_sd15.main
def main(args):
    accelerator = start_accelerator(args)
    interruption = Interruption(args, accelerator)
    # Everything that can be checked before a model is loaded.
    sampler, noise_scheduler, default_size = check_models(args)
    dataset = load_image_caption_dataset(args)
    args = resolve_schedule(args, images_per_epoch(dataset, args, accelerator), accelerator)
    identity = identify_run(args, sampler_schedule(sampler), dataset, accelerator)
    checkpoint, first_iteration = find_checkpoint(identity, args)
    check_used_images(dataset, first_iteration, args, accelerator)
    repo_id = create_output(args, accelerator)
    run = Run(
        FAMILY, adt_or_plain(args), args, accelerator, dataset, identity, checkpoint, first_iteration, default_size,
        repo_id, interruption,
    )  # fmt: skip
    tune(sampler, noise_scheduler, run)
    end_run(run)


if __name__ == "__main__":
    try:
        main(parse_args())
    except ADTError as error:
        sys.exit(f"error: {error}")

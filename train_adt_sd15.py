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
"""Adversarial Diffusion Tuning (ADT) of Stable Diffusion 1.5. Needs the `*_utils.py` beside it.

On one GPU:

    accelerate launch --mixed_precision bf16 train_adt_sd15.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --dataset_name DATASET --caption_column text --train_batch_size 2 --gradient_accumulation_steps 4 \
        --gradient_checkpointing --validation_prompts "a lighthouse at dusk" --output_dir sd15-adt

On four GPUs, the paper's setting (global batch 8):

    accelerate launch --multi_gpu --num_processes 4 --mixed_precision bf16 train_adt_sd15.py ... --train_batch_size 2

On two machines, on each of them with its own rank:

    accelerate launch --multi_gpu --num_machines 2 --num_processes 8 --machine_rank RANK --main_process_ip HOST \
        --main_process_port 29500 --mixed_precision bf16 train_adt_sd15.py ... --train_batch_size 1

A run that was stopped goes on exactly where it was with `--resume_from_checkpoint latest`. All randomness derives from
the seed, the iteration and an image's index in the global batch, so that neither resuming nor the number of processes
changes a run.
"""

import argparse
import sys
import time

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from adt_utils import (
    DiffAugment,
    discriminator_loss,
    generator_loss,
    signal_and_noise_levels,
    update_spectral_norm,
)
from adversary_utils import adversarial_weight, check_adversary, make_adversary, score_gap
from data_utils import (
    OnDevice,
    check_used_images,
    draw_path,
    draw_per_image,
    images_per_epoch,
    load_image_caption_dataset,
    load_micro_batches,
    make_generator,
    normalize_pixels,
)
from option_utils import add_arguments, add_schedule_arguments, parse_options
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
    unet_adapters_to_kohya,
)
from training_utils import (
    SAMPLERS,
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
    configure_sampler,
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


# What `StableDiffusionPipeline` changes in a scheduler's configuration, whatever it says.
PIPELINE_SCHEDULER_OPTIONS = {"steps_offset": 1}


def make_parser() -> argparse.ArgumentParser:
    """The options and this family's defaults, which are the paper's."""
    parser = argparse.ArgumentParser(
        description="Adversarial Diffusion Tuning of Stable Diffusion 1.5.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_arguments(parser, SAMPLERS)
    add_schedule_arguments(parser)
    parser.set_defaults(
        sampler="ddim",
        output_dir="sd15-adt",
        tracker_project_name="adt-sd15",
        resolution=512,
        learning_rate=5e-6,
        discriminator_learning_rate=5e-6,
        guidance_scale=7.0,
    )
    return parser


def parse_args(input_args=None):
    return parse_options(make_parser(), SAMPLERS, input_args)


def make_sampler(args, base_scheduler_config):
    """The scheduler of the rollout, of validation and of the saved pipeline, with `set_timesteps` called.

    Raises:
        ADTError: where the sampler does not suit the model.
    """
    config = dict(base_scheduler_config)
    if "beta_schedule" not in config:
        raise ADTError(f"The base pipeline's scheduler, {config.get('_class_name')}, has no schedule of betas.")
    prediction_type = args.prediction_type or config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ADTError(
            f"--sampler {args.sampler} does not suit a model that predicts '{prediction_type}': this script tunes "
            "epsilon and v_prediction models."
        )
    if config.get("rescale_betas_zero_snr", False) and prediction_type == "epsilon":
        raise ADTError("A schedule with zero terminal SNR needs a v_prediction model: epsilon says nothing there.")
    length = config.get("num_train_timesteps", 1000)
    too_many = f"--num_inference_steps {args.num_inference_steps} is too many for a schedule of {length} timesteps."
    if args.num_inference_steps > length:
        raise ADTError(too_many)
    options = {"prediction_type": prediction_type} | PIPELINE_SCHEDULER_OPTIONS
    sampler = configure_sampler(args.sampler, config, args.timestep_spacing, **options)
    sampler.set_timesteps(args.num_inference_steps)  # on the CPU, see `simulate_inference`
    if sampler.timesteps.max() >= length:
        raise ADTError(too_many)
    if len(sampler.timesteps.unique()) != args.num_inference_steps:
        raise ADTError(
            f"--sampler {args.sampler} with --timestep_spacing {sampler.config.timestep_spacing} has no "
            f"{args.num_inference_steps} distinct timesteps."
        )
    return sampler


def inference_options(args) -> dict:
    """What the pipeline is called with, beside the prompt and the size, to sample as in training."""
    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    if args.guidance_rescale:
        options["guidance_rescale"] = args.guidance_rescale
    return options


def check_models(args):
    """Checks everything that the models' configurations tell, before any weight is loaded.

    Returns:
        the sampler; the scheduler of plain fine-tuning; the side of the images that the pipeline makes by default.
    """
    hub = {"revision": args.revision, "cache_dir": args.cache_dir}
    path = args.pretrained_model_name_or_path
    try:
        index = StableDiffusionPipeline.load_config(path, **hub)
        unet_config = UNet2DConditionModel.load_config(path, subfolder="unet", **hub)
        scheduler_config = DDPMScheduler.load_config(path, subfolder="scheduler", **hub)
    except OSError as error:
        raise ADTError(f"--pretrained_model_name_or_path {path} is not a readable pipeline: {error}") from error
    if index["_class_name"] != "StableDiffusionPipeline":
        raise ADTError(f"{path} is a {index['_class_name']}; this script tunes a StableDiffusionPipeline.")
    vae_config = load_vae_config(args)
    check_decoder(args, vae_config)
    factor = vae_factor(vae_config)
    check_image_sizes(args, factor, f"the VAE's factor {factor}")
    if unet_config["in_channels"] != vae_config["latent_channels"]:
        raise ADTError(
            f"The UNet of {path} takes {unet_config['in_channels']} channels and the VAE of "
            f"{args.pretrained_vae_model_name_or_path or path} makes {vae_config['latent_channels']}: they are not a "
            "text-to-image model's."
        )
    if unet_config.get("time_cond_proj_dim") is not None:
        raise ADTError(f"{path} has its guidance distilled into the UNet, so guidance cannot be simulated.")
    sampler = make_sampler(args, scheduler_config)
    noise_scheduler = DDPMScheduler.from_config(scheduler_config, prediction_type=sampler.config.prediction_type)
    check_adversary(args)
    check_lora(args, UNet2DConditionModel, unet_config)
    return sampler, noise_scheduler, unet_config["sample_size"] * factor


class PromptEncoder:
    """Prompts to what the network is conditioned on, as `StableDiffusionPipeline` computes it.

    One prompt at a time, so that a prompt's embedding does not depend on the batch that it is in.
    """

    def __init__(self, args, accelerator):
        path, hub = args.pretrained_model_name_or_path, hub_options(args)
        tokenizer_hub = {name: value for name, value in hub.items() if name != "variant"}
        self.tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", **tokenizer_hub)
        self.text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder", **hub)
        self.text_encoder.requires_grad_(False).eval().to(accelerator.device, dtype=weight_dtype(accelerator))
        self.on_device = OnDevice([], accelerator.device)  # it is so small that it stays there
        self.negative = self([""])  # the pipeline's unconditional branch, which also stands for a dropped caption

    @torch.no_grad()
    def encode(self, prompt) -> dict:
        tokenizer, text_encoder = self.tokenizer, self.text_encoder
        tokens = tokenizer(
            prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).to(text_encoder.device)
        attention_mask = tokens.attention_mask if getattr(text_encoder.config, "use_attention_mask", False) else None
        return {"prompt_embeds": text_encoder(tokens.input_ids, attention_mask=attention_mask)[0]}

    def __call__(self, prompts) -> dict:
        """`prompt_embeds` (B, L, C)."""
        return concatenate([self.encode(prompt) for prompt in prompts])


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
    return network(sample, timestep, encoder_hidden_states=condition["prompt_embeds"]).sample


def load_network(args, accelerator) -> UNet2DConditionModel:
    path = args.pretrained_model_name_or_path
    unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", **network_options(args, accelerator))
    return prepare_network(unet, args, accelerator)


def load_frozen_vae(args, accelerator):
    """In float32: the gradient of a score with respect to a pixel is a small number."""
    return freeze_vae(load_vae(args), torch.float32, args, accelerator)


def encode_images(vae, pixel_values, posterior_noise):
    """pixel_values: (B, 3, H, W) in [-1, 1]; posterior_noise as the latents. Returns scaled latents, float32."""
    return sample_posterior(vae, pixel_values, posterior_noise) * vae.config.scaling_factor


def decode_latents(vae, latents):
    """latents: (B, C, h, w), scaled. Returns (B, 3, H, W) in about [-1, 1], float32."""
    return decode_checkpointed(vae, latents / vae.config.scaling_factor)


def diffusion_loss(network, batch, timesteps, levels, scheduler, args):
    """The model's own training loss on `alpha x_0 + sigma eps`, for the noise or the velocity `alpha eps - sigma x_0`.

    Weighted by `min(SNR, gamma) / SNR`, for velocities `/ (SNR + 1)`, where `args.snr_gamma` is given
    (https://arxiv.org/abs/2303.09556).

    Args:
        batch: its `latents` are `x_0` and its `loss_noise` is `eps`.
        timesteps: (B,).
        levels: alpha and sigma, (B, 1, 1, 1) each, at those timesteps.
        scheduler: says what the model predicts.

    Returns:
        the 0-d loss and the prediction (B, C, h, w) that it was computed from.
    """
    latents, noise, prediction_type = batch.latents, batch.loss_noise, scheduler.config.prediction_type
    alpha, sigma = levels
    sample = alpha * latents + sigma * noise
    prediction = call_network(network, sample, timesteps, batch.conditions.loss).float()
    target = noise if prediction_type == "epsilon" else alpha * noise - sigma * latents
    loss = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
    if args.snr_gamma is not None:
        snr = (alpha / sigma).square().flatten()
        loss = loss * snr.clamp(max=args.snr_gamma) / (snr if prediction_type == "epsilon" else snr + 1)
    return loss.mean(), prediction


def timestep_density(args):
    """What plain fine-tuning draws its timesteps by: a function (shape, generator) of values in [0, 1)."""
    return torch.rand


def plain_noise_levels(density, noise_scheduler):
    """Plain fine-tuning's timesteps (B,) and levels, (B, 1, 1, 1) each, from draws (B,) by `timestep_density`."""
    timesteps = (density * noise_scheduler.config.num_train_timesteps).long()
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(density.device)[timesteps].view(-1, 1, 1, 1)
    return timesteps, (alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())


FAMILY = Family(
    pipeline_class=StableDiffusionPipeline,
    network_class=UNet2DConditionModel,
    network_name="unet",
    without_text_encoders={
        **dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor")),
        "requires_safety_checker": False,
    },
    encode_images=encode_images,
    decode_latents=decode_latents,
    inference_options=inference_options,
    card_tags=("text-to-image", "diffusers", "diffusers-training", "stable-diffusion", "adversarial-diffusion-tuning"),
    sampler_facts=("timestep_spacing", "prediction_type"),
    kohya_adapters=unet_adapters_to_kohya,
)


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


def tune(sampler, noise_scheduler, run):
    """The run from its models' weights to the saved result.

    A function of its own, so that nothing refers to the trained networks any more when `end_run` closes the run.
    """
    args, accelerator = run.args, run.accelerator
    prompt_encoder = PromptEncoder(args, accelerator)
    validation_conditions = [prompt_encoder([prompt]) for prompt in args.validation_prompts or []]
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

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
"""Robust training of a diffusion model: its own loss under a free adversarial perturbation of the noisy latents.

    accelerate launch --mixed_precision bf16 -m related.train_robust --family sd15 \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --dataset_name DATASET --caption_column text --train_batch_size 8 --output_dir sd15-robust

The method is adversarial training as in *Adversarial training of diffusion and consistency models*
(https://arxiv.org/abs/2502.17099), for sampling in few steps, where the network sees its own errors. Each batch, with
its timesteps and noise, goes through `--robust_steps` passes, each with an update of the weights: the first as it is,
the others with a perturbation `delta` of the input that has followed the passes' own gradients ("free" adversarial
training). `x_0` stays what it was, so that `delta` is a part of the noise, `eps + delta / s`, and the target follows.

`--robust_steps 1 --input_perturbation 0.1` is the baseline, input perturbation (https://arxiv.org/abs/2301.11706):
random instead of adversarial, and the target does not follow.

`--learning_rate`'s schedule and the average count updates: three an iteration. At equal compute, plain fine-tuning has
three times the iterations.
"""

import sys
import time
from dataclasses import replace

import torch

from data_utils import draw_per_image, load_micro_batches, make_generator
from option_utils import non_negative_float, parse_options
from output_utils import Validation, finish_run, load_checkpoint, register_checkpoint_hooks, save_checkpoint
from related.related_utils import (
    FAMILIES,
    Perturbation,
    add_robust_arguments,
    check_robust_options,
    keep_first_layer_in_float32,
    load_prompt_encoder,
    make_parser,
    parse_family,
    perturbation_rms,
    shift_input,
    start_run,
    tagged_family,
)
from training_utils import ADTError, FrozenModels, Method, Progress, Totals, end_run, prepare_generator


DESCRIPTION = "Robust training of a diffusion model under adversarial perturbations."
# Below this `s` the target's `delta / s` is `delta / MIN_NOISE_LEVEL`: SD1.5's least level is 0.03, SD3's is 0.003.
MIN_NOISE_LEVEL = 0.03


def parse_args(input_args=None):
    family = parse_family(DESCRIPTION, input_args)
    parser = make_parser(
        family,
        DESCRIPTION,
        output_dir=f"{family}-robust",
        tracker_project_name=f"robust-{family}",
    )
    add = add_robust_arguments(parser, 3, "Passes of a batch, each with an update; 1 is plain.")
    add("--input_perturbation", type=non_negative_float, default=0.0,
        help="The baseline with --robust_steps 1: scale of the input's extra noise; 0.1.")  # fmt: skip
    args = parse_options(parser, FAMILIES[family].SAMPLERS, input_args)
    check_robust_options(args, parser)
    if args.input_perturbation > 0 and args.robust_steps > 1:
        parser.error("--input_perturbation is the baseline of adversarial perturbations: it needs --robust_steps 1.")
    return args


def make_family(args):
    return tagged_family(FAMILIES[args.family], "robust-diffusion-training")


def make_method(args) -> Method:
    kind = f"robust training: the diffusion loss under adversarial perturbations, {args.robust_steps} passes a batch"
    if args.robust_steps == 1:
        kind = "fine-tuning with the diffusion loss"
        if args.input_perturbation > 0:
            kind += f" under input perturbations of {args.input_perturbation:g}"
    return Method(
        name="robust diffusion training",
        kind=kind,
        sampling="The saved scheduler and the call above ({described}) are a choice: training has not sampled.",
        count_updates=lambda args: args.max_train_steps * args.robust_steps,
    )


def train(generator, models, validation, module, run):
    """The training loop, its comments numbered as the algorithm."""
    args = run.args
    progress = Progress(generator, models.sampler, run)
    loader = load_micro_batches(run, save_checkpoint)
    for iteration in range(run.first_iteration, args.max_train_steps):
        started = time.perf_counter()
        # The global generator serves dropout alone, where the model has any.
        dropout = make_generator(args.seed, "dropout", iteration, run.accelerator.process_index)
        torch.manual_seed(dropout.initial_seed())

        # 1. Encode the global batch's micro-batches; their timesteps and noise stay through the passes.
        micro_batches = [next(loader) for _ in range(args.gradient_accumulation_steps)]
        with models.prompt_encoder.on_device:
            batches = [module.prepare_batch(examples, iteration, models, run) for examples in micro_batches]
        values = {}
        if args.input_perturbation > 0:
            extra = [
                draw_input_noise(examples, batch, iteration, run)
                for examples, batch in zip(micro_batches, batches, strict=True)
            ]
            values = update_under_input_noise(batches, extra, iteration, generator, models, module, run)
        else:
            # 2. Passes: each updates the weights, and all but the last the perturbations.
            perturbations = [
                Perturbation(batch.latents, args.robust_step_size, args.robust_step_unit, args.robust_radius)
                for batch in batches
            ]
            for n_pass in range(args.robust_steps):
                is_last = n_pass == args.robust_steps - 1
                for perturbation in perturbations:
                    perturbation.delta.requires_grad_(not is_last)
                found = update(batches, perturbations, iteration, generator, models, module, run)
                values |= found if n_pass == 0 else {f"perturbed_{name}": value for name, value in found.items()}
                if not is_last:
                    for perturbation in perturbations:
                        perturbation.ascend()
            values["perturbation_rms"] = perturbation_rms(perturbations, run.accelerator)

        progress.log(values | {"lr": generator.lr}, iteration, started)
        done, stopping = iteration + 1, run.interruption.is_due(iteration + 1)
        if stopping or done % args.checkpointing_steps == 0:
            save_checkpoint(done, run)
        if not stopping and validation.is_due(done):
            validation.log(done)
        if stopping:
            break
    progress.close()


def perturbed_loss(network, batch, delta, timesteps, levels, scheduler, module, args):
    """The family's own loss at the input `x_t + delta`, for the target of the noise `eps + sg(delta) / s`.

    That noise, with the same `x_0`, is all that changes: the velocity's target moves by `(a / s) sg(delta)`, the
    flow's by `sg(delta) / s`. No gradient goes to `delta` through the target.

    Args:
        network: as accelerate prepared it.
        delta: (B, C, h, w).
        timesteps, levels: (B,), and `a` and `s`, (B, 1, 1, 1) each, as the family's `plain_noise_levels` gives them.

    Returns:
        the 0-d loss.
    """
    _, s = levels
    noise = delta.detach() / s.clamp(min=MIN_NOISE_LEVEL)
    shifted = replace(batch, loss_noise=batch.loss_noise + noise)
    # The loss makes its input from that noise, of which `s noise` is what `delta` is short of where `s` is floored.
    network = shift_input(network, delta - s * noise)
    return module.diffusion_loss(network, shifted, timesteps, levels, scheduler, args)[0]


def update(batches, perturbations, iteration, generator, models, module, run) -> dict:
    """One pass: one backward for the weights and the perturbations, and the weights' update."""
    totals, scheduler = Totals(len(batches)), models.noise_scheduler
    generator.wrapped.train()
    for n, (batch, perturbation) in enumerate(zip(batches, perturbations, strict=True)):
        timesteps, levels = module.plain_noise_levels(batch.density, scheduler)
        with generator.synchronise_if(n == len(batches) - 1):
            loss = perturbed_loss(
                generator.wrapped, batch, perturbation.delta, timesteps, levels, scheduler, module, run.args
            )
            run.accelerator.backward(loss)
        totals.add_means(diffusion_loss=loss)
    values = totals.reduce(run.accelerator, iteration)
    generator.step(iteration)
    return values


def draw_input_noise(examples, batch, iteration, run):
    """Standard normal, as the latents, by (seed, iteration, index in the global batch)."""
    shape, device = batch.latents.shape[1:], batch.latents.device
    return draw_per_image(
        torch.randn, shape, run.args.seed, "input perturbation", iteration, examples["positions"]
    ).to(device)


def update_under_input_noise(batches, extra, iteration, generator, models, module, run) -> dict:
    """The baseline: the network sees `a x_0 + s (eps + gamma xi)`, and its target is that of `eps`."""
    totals, scheduler, args = Totals(len(batches)), models.noise_scheduler, run.args
    generator.wrapped.train()
    for n, (batch, xi) in enumerate(zip(batches, extra, strict=True)):
        timesteps, levels = module.plain_noise_levels(batch.density, scheduler)
        network = shift_input(generator.wrapped, levels[1] * args.input_perturbation * xi)
        with generator.synchronise_if(n == len(batches) - 1):
            loss = module.diffusion_loss(network, batch, timesteps, levels, scheduler, args)[0]
            run.accelerator.backward(loss)
        totals.add_means(diffusion_loss=loss)
    values = totals.reduce(run.accelerator, iteration)
    generator.step(iteration)
    return values


def tune(sampler, noise_scheduler, module, run):
    """The run from its models' weights to the saved result.

    A function of its own, so that nothing refers to the trained network any more when `end_run` closes the run.
    """
    args, accelerator = run.args, run.accelerator
    prompt_encoder, validation_conditions = load_prompt_encoder(module, run, args.validation_prompts or [])
    models = FrozenModels(module.load_frozen_vae(args, accelerator), prompt_encoder, sampler, noise_scheduler)
    network = module.load_network(args, accelerator)
    keep_first_layer_in_float32(network)
    generator = prepare_generator(network, run)
    register_checkpoint_hooks(generator, run)
    validation = Validation(generator, None, models, validation_conditions, run)
    load_checkpoint(run)
    with run.interruption:
        train(generator, models, validation, module, run)
        finish_run(generator, models, validation, run)


def main(args):
    module = FAMILIES[args.family]
    run, sampler, noise_scheduler = start_run(module, make_family, make_method, args)
    tune(sampler, noise_scheduler, module, run)
    end_run(run)


if __name__ == "__main__":
    try:
        main(parse_args())
    except ADTError as error:
        sys.exit(f"error: {error}")

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
"""Consistency distillation of a diffusion model into 1 to 8 steps, plain or under adversarial perturbations.

    accelerate launch --mixed_precision bf16 -m related.train_lcm --family sd15 \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --dataset_name DATASET --caption_column text --train_batch_size 8 --use_lora --output_dir sd15-lcm

SD1.5 and SDXL follow *Latent Consistency Models* (https://arxiv.org/abs/2310.04378), in diffusers' convention: the
teacher, which is the base, takes one DDIM step of 50, with guidance of a scale drawn for each image, and the student
must say of the noisier point what it says of the other. The guidance goes into the student, whose network has no input
for it: sample without. SD3 has the same on its own schedule of 100 points, with Euler's step.

Full fine-tuning takes the target from an average of the weights, which is also what it saves; LoRA, from the adapters
as they are.

`--robust_steps 3` adds the free adversarial training of https://arxiv.org/abs/2502.17099: each batch goes through
three passes, each with an update of the weights, and the student's input gets a perturbation that follows the passes'
own gradients. The target is computed once, from the input as it is, and stays: where the paper puts the perturbation
is not known here. `--learning_rate`'s schedule and the average count updates, three an iteration.
"""

import sys
import time
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from data_utils import draw_per_image, load_micro_batches, make_generator
from option_utils import BOOLEAN, Nature, adder, non_negative_float, parse_options, positive_float, positive_int, share
from output_utils import Validation, finish_run, load_checkpoint, register_checkpoint_hooks, save_checkpoint
from related.related_utils import (
    FAMILIES,
    Perturbation,
    Teacher,
    add_robust_arguments,
    check_robust_options,
    keep_first_layer_in_float32,
    load_prompt_encoder,
    make_lcm_scheduler,
    make_parser,
    noise_levels,
    parse_family,
    perturbation_rms,
    predicted_noise,
    predicted_original,
    prediction_type,
    start_run,
    tagged_family,
)
from training_utils import (
    ADTError,
    FrozenModels,
    Method,
    Progress,
    Totals,
    concatenate,
    end_run,
    expand,
    prepare_generator,
)


DESCRIPTION = "Consistency distillation of a diffusion model into few steps."
NUM_POINTS = {"sd15": 50, "sdxl": 50, "sd3": 100}  # of the teacher's schedule
GUIDANCE_WEIGHTS = {"sd15": (5.0, 15.0), "sdxl": (3.0, 15.0), "sd3": (3.0, 3.0)}
# The consistency function's, which are `LCMScheduler`'s.
SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def parse_args(input_args=None):
    family = parse_family(DESCRIPTION, input_args)
    parser = make_parser(
        family,
        DESCRIPTION,
        without=(
            "sampler", "timestep_spacing", "guidance_rescale", "snr_gamma", "weighting_scheme", "logit_mean",
            "logit_std", "mode_scale", "proportion_empty_prompts", "noise_offset",
            # These mean something else here, and come below.
            "learning_rate", "use_ema", "ema_decay", "num_inference_steps", "guidance_scale",
        ),
        output_dir=f"{family}-lcm",
        tracker_project_name=f"lcm-{family}",
        rank=64,
        # SDXL's teacher knows an image by its own size and crop.
        **({"rollout_time_ids": "image"} if family == "sdxl" else {}),
    )  # fmt: skip
    add = adder(parser.add_argument_group("consistency distillation"))
    w_min, w_max = GUIDANCE_WEIGHTS[family]
    add("--w_min", type=non_negative_float, default=w_min,
        help="Least guidance weight of the teacher, cond + w (cond - uncond): a guidance scale of 1 + w.")  # fmt: skip
    add("--w_max", type=non_negative_float, default=w_max, help="Largest; each image's is drawn between them.")
    add("--huber_c", type=positive_float, default=0.001, help="Of the loss, sqrt(d^2 + c^2) - c.")
    add("--learning_rate", type=positive_float, default=None, help="1e-6; 1e-4 with --use_lora.")
    add("--use_ema", action=BOOLEAN, default=None,
        help="Take the target from an average of the weights, and save that; on but with --use_lora.")  # fmt: skip
    add("--ema_decay", type=share, default=0.95, help="Of that average, in updates.")
    add("--num_inference_steps", Nature.FREE, type=positive_int, default=4,
        help="Of validation and of the saved call; usually 1 to 8.")  # fmt: skip
    add("--guidance_scale", Nature.FREE, type=non_negative_float, default=0.0,
        help="Likewise. No guidance at 1 or less: the student has the teacher's already.")  # fmt: skip
    add_robust_arguments(parser, 1, "Passes of a batch, each with an update; 1 is plain, 3 the paper's.")
    args = parse_options(parser, FAMILIES[family].SAMPLERS, input_args)
    check_robust_options(args, parser)
    if args.w_min > args.w_max:
        parser.error(f"--w_min {args.w_min:g} is larger than --w_max {args.w_max:g}.")
    if args.num_inference_steps > NUM_POINTS[family]:
        parser.error(
            f"--num_inference_steps {args.num_inference_steps} is more than the {NUM_POINTS[family]} points that the "
            "student trains at."
        )
    learning_rate = args.learning_rate or (1e-4 if args.use_lora else 1e-6)
    # A schedule-free optimizer averages the weights itself.
    averages = not args.use_lora and args.optimizer != "adamw_schedulefree"
    use_ema = averages if args.use_ema is None else args.use_ema
    return args.replace(learning_rate=learning_rate, use_ema=use_ema)


# The student's points and its sampler


def check_schedule(noise_scheduler, args):
    length, num_points = noise_scheduler.config.num_train_timesteps, NUM_POINTS[args.family]
    if length < num_points:
        raise ADTError(f"The base pipeline's schedule has {length} timesteps: too few for {num_points} points.")


def training_points(noise_scheduler, module, args):
    """`t_0 = 0 < t_1 < ... < t_N`, (N + 1,): the teacher steps from one to that before it.

    Of a variance-preserving schedule they are `LCMScheduler`'s, for 1000 timesteps 19, 39, ..., 999, whole numbers;
    of flow matching the sampler's own, by sigma.
    """
    length, num_points = noise_scheduler.config.num_train_timesteps, NUM_POINTS[args.family]
    if prediction_type(noise_scheduler) == "flow_prediction":
        sampler, _, _ = module.check_models(args.replace(num_inference_steps=num_points))
        return sampler.sigmas.flip(0) * length
    skip = length // num_points
    return torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(1, num_points + 1) * skip - 1])


def make_sampler(noise_scheduler, module, args):
    """The scheduler of validation and of the saved pipeline: one step to `x_0`, then fresh noise for the next."""
    if prediction_type(noise_scheduler) == "flow_prediction":
        # Its timesteps are the call's sigmas, which the pipeline alone may know how to shift, by the image's size.
        return FlowMatchEulerDiscreteScheduler.from_config(noise_scheduler.config, stochastic_sampling=True)
    sampler = make_lcm_scheduler(noise_scheduler, NUM_POINTS[args.family], module)
    sampler.set_timesteps(args.num_inference_steps)
    return sampler


def make_family(args):
    """The family, with its result called as the student is meant to be."""
    module = FAMILIES[args.family]

    def inference_options(args):
        options = module.inference_options(args)
        if args.family == "sd3":
            # Of a number of steps this scheduler makes a last one at next to no noise.
            num_steps = options.pop("num_inference_steps")
            options = {"sigmas": [1 - n / num_steps for n in range(num_steps)]} | options
        return options

    facts = ("shift", "use_dynamic_shifting", "stochastic_sampling")
    if args.family != "sd3":
        facts = ("prediction_type", "original_inference_steps")
    tag = "latent-consistency-model"
    return tagged_family(module, tag, inference_options=inference_options, sampler_facts=facts)


def make_method(args) -> Method:
    weights = f"weights of {args.w_min:g} to {args.w_max:g}" if args.w_min < args.w_max else f"weight {args.w_max:g}"
    kind = f"consistency distillation from itself, with guidance {weights}"
    if args.robust_steps > 1:
        kind += f", under adversarial perturbations of the student's input, {args.robust_steps} passes a batch"
    return Method(
        name="consistency distillation",
        kind=kind,
        sampling="The saved scheduler and the call above ({described}) are what it is distilled for, with 1 to 8 "
        "steps. It has the guidance in itself: a scale above 1 adds to that.",
        count_updates=lambda args: args.max_train_steps * args.robust_steps,
    )


# The consistency function and the teacher's step


def boundary_scalings(timesteps):
    """`c_skip` and `c_out`, (B, 1, 1, 1) each, with which `f(z, 0) = z` exactly.

    `c_skip = d^2 / ((10 t)^2 + d^2)` and `c_out = 10 t / sqrt((10 t)^2 + d^2)`, where d is 0.5.
    """
    scaled = TIMESTEP_SCALING * timesteps.float().view(-1, 1, 1, 1)
    total = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / total.sqrt()


def consistency_function(prediction, sample, timesteps, levels, predicts):
    """`f(z, t) = c_skip z + c_out x_0`, with the network's `x_0`; with flow matching that is `z - sigma v` alone.

    Args:
        prediction, sample: (B, C, h, w).
        timesteps, levels: (B,), and their `a` and `s`, (B, 1, 1, 1) each.
        predicts: see `prediction_type`.
    """
    original = predicted_original(prediction, sample, levels, predicts)
    if predicts == "flow_prediction":
        return original  # which is `z` at sigma 0
    c_skip, c_out = boundary_scalings(timesteps)
    return c_skip * sample + c_out * original


def guide(conditional, unconditional, weights):
    """`cond + w (cond - uncond)`; weights: (B,)."""
    return conditional + expand(weights, conditional) * (conditional - unconditional)


def solver_step(prediction, sample, levels, next_levels, predicts):
    """`a' x_0 + s' eps`, with what `prediction` says of both: DDIM's step without noise, Euler's of a flow."""
    a, s = next_levels
    original = predicted_original(prediction, sample, levels, predicts)
    return a * original + s * predicted_noise(prediction, sample, levels, predicts)


def huber_loss(prediction, target, c):
    """0-d: the mean of `sqrt(d^2 + c^2) - c`."""
    return (((prediction - target).square() + c**2).sqrt() - c).mean()


# Training


@dataclass
class Pair:
    """A micro-batch at two neighbouring points: the student's, and the teacher's step from it to where the target is.

    Attributes:
        sample: (B, C, h, w), `z` at `timesteps`.
        timesteps, next_timesteps: (B,), of which the second are the smaller ones.
        weights: (B,), of the guidance.
        conditional, unconditional: what the network is conditioned on, dicts of (B, ...).
        target: (B, C, h, w), `f(z_hat, t)` at the second; step 2 adds it.
    """

    sample: torch.Tensor
    timesteps: torch.Tensor
    next_timesteps: torch.Tensor
    weights: torch.Tensor
    conditional: dict
    unconditional: dict
    target: torch.Tensor | None = None


def train(generator, teacher, points, models, validation, module, run):
    """The training loop, its comments numbered as the algorithm."""
    args = run.args
    progress = Progress(generator, models.sampler, run)
    loader = load_micro_batches(run, save_checkpoint)
    for iteration in range(run.first_iteration, args.max_train_steps):
        started = time.perf_counter()
        # The global generator serves dropout alone, where the model has any.
        dropout = make_generator(args.seed, "dropout", iteration, run.accelerator.process_index)
        torch.manual_seed(dropout.initial_seed())

        # 1. Encode the global batch's micro-batches, and noise each image to a point of its own.
        micro_batches = [next(loader) for _ in range(args.gradient_accumulation_steps)]
        with models.prompt_encoder.on_device:
            batches = [module.prepare_batch(examples, iteration, models, run) for examples in micro_batches]
        pairs = [
            draw_pair(examples, batch, iteration, points, models, run)
            for examples, batch in zip(micro_batches, batches, strict=True)
        ]
        # 2. Targets: the teacher's guided step to the point before, and what the average says there.
        generator.wrapped.eval()
        with generator.averaged():
            for pair in pairs:
                pair.target = find_target(pair, teacher, generator, models, module, run)
        # 3. Passes: each updates the weights, and all but the last the perturbations of the student's input.
        values = {}
        perturbations = [
            Perturbation(pair.sample, args.robust_step_size, args.robust_step_unit, args.robust_radius)
            for pair in pairs
        ]
        for n_pass in range(args.robust_steps):
            is_last = n_pass == args.robust_steps - 1
            for perturbation in perturbations:
                perturbation.delta.requires_grad_(not is_last)
            found = update(pairs, perturbations, iteration, generator, models, module, run)
            values |= found if n_pass == 0 else {f"perturbed_{name}": value for name, value in found.items()}
            if not is_last:
                for perturbation in perturbations:
                    perturbation.ascend()
        if args.robust_steps > 1:
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


def draw_pair(examples, batch, iteration, points, models, run) -> Pair:
    """Step 1: `z = a x_0 + s eps` at a point drawn for each image, by (seed, iteration, index in the global batch)."""
    args, device = run.args, batch.latents.device

    def draw(purpose):
        return draw_per_image(torch.rand, (), args.seed, purpose, iteration, examples["positions"])

    index = (draw("point") * (len(points) - 1)).long()
    timesteps = points[index + 1].to(device)
    a, s = noise_levels(models.noise_scheduler, timesteps)
    return Pair(
        sample=a * batch.latents + s * batch.noise,
        timesteps=timesteps,
        next_timesteps=points[index].to(device),
        weights=(args.w_min + (args.w_max - args.w_min) * draw("guidance weight")).to(device),
        conditional=batch.conditions.positive,
        unconditional=batch.conditions.negative,
    )


@torch.no_grad()
def find_target(pair, teacher, generator, models, module, run):
    """Step 2: `f(z_hat, t)` by the generator as it is now, where `z_hat` is the teacher's.

    Returns:
        (B, C, h, w), float32.
    """
    scheduler, predicts = models.noise_scheduler, prediction_type(models.noise_scheduler)
    next_levels = noise_levels(scheduler, pair.next_timesteps)
    unconditional, conditional = teacher(
        torch.cat([pair.sample] * 2),
        torch.cat([pair.timesteps] * 2),
        concatenate([pair.unconditional, pair.conditional]),
    ).chunk(2)
    guided = guide(conditional, unconditional, pair.weights)
    sample = solver_step(guided, pair.sample, noise_levels(scheduler, pair.timesteps), next_levels, predicts)
    with run.accelerator.autocast():
        prediction = module.call_network(generator.network, sample, pair.next_timesteps, pair.conditional).float()
    return consistency_function(prediction, sample, pair.next_timesteps, next_levels, predicts)


def consistency_loss(network, pair, delta, scheduler, module, args):
    """The distance of `f(z + delta, t)` from the target; no gradient goes to `delta` but through `f`.

    Args:
        network: as accelerate prepared it.
        delta: (B, C, h, w).

    Returns:
        the 0-d loss.
    """
    sample, levels = pair.sample + delta, noise_levels(scheduler, pair.timesteps)
    prediction = module.call_network(network, sample, pair.timesteps, pair.conditional).float()
    student = consistency_function(prediction, sample, pair.timesteps, levels, prediction_type(scheduler))
    return huber_loss(student, pair.target, args.huber_c)


def update(pairs, perturbations, iteration, generator, models, module, run) -> dict:
    """One pass: one backward for the weights and the perturbations, and the weights' update."""
    totals = Totals(len(pairs))
    generator.wrapped.train()
    for n, (pair, perturbation) in enumerate(zip(pairs, perturbations, strict=True)):
        with generator.synchronise_if(n == len(pairs) - 1):
            loss = consistency_loss(
                generator.wrapped, pair, perturbation.delta, models.noise_scheduler, module, run.args
            )
            run.accelerator.backward(loss)
        totals.add_means(consistency_loss=loss)
    values = totals.reduce(run.accelerator, iteration)
    generator.step(iteration)
    return values


def tune(points, noise_scheduler, module, run):
    """The run from its models' weights to the saved result.

    A function of its own, so that nothing refers to the trained network any more when `end_run` closes the run.
    """
    args, accelerator = run.args, run.accelerator
    prompt_encoder, validation_conditions = load_prompt_encoder(module, run, args.validation_prompts or [])
    sampler = make_sampler(noise_scheduler, module, args)
    models = FrozenModels(module.load_frozen_vae(args, accelerator), prompt_encoder, sampler, noise_scheduler)
    network = module.load_network(args, accelerator)
    teacher = Teacher(network, module.call_network, run)
    if args.robust_steps > 1:
        # After the teacher's copy, which would share the layer.
        keep_first_layer_in_float32(network)
    generator = prepare_generator(network, run)
    register_checkpoint_hooks(generator, run)
    validation = Validation(generator, None, models, validation_conditions, run)
    load_checkpoint(run)
    with run.interruption:
        train(generator, teacher, points, models, validation, module, run)
        finish_run(generator, models, validation, run)


def main(args):
    module = FAMILIES[args.family]
    run, _, noise_scheduler = start_run(module, make_family, make_method, args, check_schedule, training_points)
    tune(training_points(noise_scheduler, module, run.args), noise_scheduler, module, run)
    end_run(run)


if __name__ == "__main__":
    try:
        main(parse_args())
    except ADTError as error:
        sys.exit(f"error: {error}")

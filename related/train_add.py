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
"""Adversarial Diffusion Distillation (ADD): a student of one to four steps, which needs no guidance.

    accelerate launch --mixed_precision bf16 -m related.train_add --family sdxl \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix \
        --dataset_name DATASET --caption_column text --train_batch_size 1 --use_lora --output_dir sdxl-add

The method is https://arxiv.org/abs/2311.17042's. The student makes an image from noise, or from a noisy image at one
of four timesteps, in one step. A discriminator on DINOv2 features, conditioned on the caption and the real image,
tells it from real ones, and the frozen base, its teacher, says at a random level of fresh noise what it would make of
it.

The saved scheduler samples on the four timesteps, with fresh noise between them, and the model card has the call. The
text condition is the model's own pooled embedding and the image condition DINOv2's embedding, where the paper has
CLIP ViT-g's and a larger DINOv2's.
"""

import contextlib
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from adt_utils import discriminator_head, update_spectral_norm
from adversary_utils import check_feature_network, global_partners, make_feature_network, norm_group, of_partners
from data_utils import draw_per_image, load_micro_batches
from option_utils import (
    Nature,
    adder,
    non_negative_float,
    non_negative_int,
    parse_options,
    positive_float,
    positive_int,
    weight_or_auto,
)
from output_utils import Validation, finish_run, load_checkpoint, register_checkpoint_hooks, save_checkpoint
from related.related_utils import (
    FAMILIES,
    Teacher,
    load_prompt_encoder,
    make_lcm_scheduler,
    make_parser,
    noise_levels,
    one_step,
    parse_family,
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
    end_run,
    expand,
    make_lr_scheduler,
    make_optimizer,
    make_predict,
    prepare_generator,
    prepare_trained,
)


DESCRIPTION = "Adversarial Diffusion Distillation into one to four steps."
STUDENT_STEPS = 4
# https://arxiv.org/abs/2310.17590's, whose prediction stands for what a noisy image is not.
NEGATIVE_PROMPT = (
    "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, low-resolution, gloomy"
)
LEAST_SIGNAL = 0.01  # of `a`, which divides: flow matching's schedule begins at none
NFSD_CLEAN = 0.2  # the share of the schedule below which the unconditional prediction is taken for the correction


def parse_args(input_args=None):
    family = parse_family(DESCRIPTION, input_args)
    parser = make_parser(
        family,
        DESCRIPTION,
        without=(
            "sampler", "timestep_spacing", "guidance_scale", "guidance_rescale", "snr_gamma", "weighting_scheme",
            "logit_mean", "logit_std", "mode_scale", "proportion_empty_prompts", "noise_offset", "lora_dropout",
            "num_inference_steps",  # which means something else here, and comes below
        ),
        output_dir=f"{family}-add",
        tracker_project_name=f"add-{family}",
        learning_rate=1e-5,
        guidance_scale=0.0,
        lora_dropout=0.0,
    )  # fmt: skip
    group = parser.add_argument_group("distillation")
    add = adder(group)
    add("--adversarial_weight", type=weight_or_auto, default=1.0,
        help="0 for distillation alone; auto to give both losses the same gradient at the predictions.")  # fmt: skip
    add("--distillation_weight", type=non_negative_float, default=2.5, help="Lambda; 0 for the adversary alone.")
    add("--distillation_target", choices=["exponential", "sds", "nfsd"], default="exponential",
        help="What the teacher's difference is weighted by, or its noise-free target.")  # fmt: skip
    add("--distillation_space", choices=["pixel", "latent"], default="pixel", help="Where it is measured.")
    add("--teacher_guidance_scale", type=non_negative_float, default=None,
        help="None at 1 or less, as where nothing is said; 7.5 for nfsd.")  # fmt: skip
    add("--num_inference_steps", Nature.FREE, type=positive_int, default=STUDENT_STEPS,
        help="Of validation and of the saved call, 1 to 4; it trains for all of them.")  # fmt: skip
    add = adder(parser.add_argument_group("discriminator"))
    add("--discriminator_model_name_or_path", Nature.BY_CONTENT, default="facebook/dinov2-small",
        help="A DINOv2 model, which is frozen.")  # fmt: skip
    add("--discriminator_layers", type=int, nargs="+", default=[-1, 2, 5, 8, 11],
        help="Its blocks that are used; -1 is the patch embedding.")  # fmt: skip
    add("--discriminator_resolution", type=positive_int, default=518, help="Side of the images that it sees.")
    add("--discriminator_norm_group", type=positive_int, default=None,
        help="Images to a batch norm group; the largest divisor of the batch size that is at most 8.")  # fmt: skip
    add("--discriminator_condition", choices=["none", "text", "image", "both"], default="both",
        help="What beside the image it sees.")  # fmt: skip
    add("--mismatched_pair_weight", type=non_negative_float, default=0.0,
        help="Of real images under other captions' conditions as negatives.")  # fmt: skip
    add("--r1_weight", type=non_negative_float, default=1e-5, help="Of the penalty on the heads' input gradients.")
    add("--discriminator_learning_rate", type=positive_float, default=1e-5, help="The discriminator's.")
    add("--discriminator_lr_warmup_steps", type=non_negative_int, default=0, help="In discriminator updates.")
    args = parse_options(parser, FAMILIES[family].SAMPLERS, input_args)
    if args.teacher_guidance_scale is None:
        args = args.replace(teacher_guidance_scale=7.5 if args.distillation_target == "nfsd" else 1.0)
    args = args.replace(discriminator_norm_group=norm_group(args))
    if args.num_inference_steps > STUDENT_STEPS:
        parser.error(f"--num_inference_steps {args.num_inference_steps}: the student has {STUDENT_STEPS} steps.")
    if args.adversarial_weight == 0 and args.distillation_weight == 0:
        parser.error("--adversarial_weight and --distillation_weight are both 0: there is nothing to train by.")
    if args.mismatched_pair_weight > 0 and (args.adversarial_weight == 0 or args.discriminator_condition == "none"):
        parser.error("--mismatched_pair_weight needs a discriminator that sees a condition.")
    if args.adversarial_weight == "auto" and args.distillation_weight == 0:
        parser.error("--adversarial_weight auto needs a distillation loss to balance: --distillation_weight is 0.")
    return args


# The student's timesteps, in training and in use


def student_schedule(num_steps) -> list[float]:
    """Which of the shares 1, 3/4, 1/2, 1/4 of the schedule `num_steps` steps are made at; the first is always 1.

    It is `LCMScheduler`'s choice of its four.
    """
    return [1 - (n * STUDENT_STEPS // num_steps) / STUDENT_STEPS for n in range(num_steps)]


def make_student_sampler(noise_scheduler, num_steps, module):
    """The saved scheduler, with `set_timesteps` called: one step to `x_0`, then fresh noise for the next.

    Its timesteps for four steps are those that the student trains at; fewer are some of these.
    """
    if prediction_type(noise_scheduler) == "flow_prediction":
        if noise_scheduler.config.use_dynamic_shifting:
            raise ADTError("The base pipeline shifts its schedule with the resolution, which has no fixed four steps.")
        sampler = FlowMatchEulerDiscreteScheduler.from_config(noise_scheduler.config, stochastic_sampling=True)
        sampler.set_timesteps(sigmas=student_schedule(num_steps))
        return sampler
    sampler = make_lcm_scheduler(noise_scheduler, STUDENT_STEPS, module)
    sampler.set_timesteps(num_steps)
    return sampler


def student_grid(noise_scheduler, module, args):
    """The timesteps (4,) that the student trains at."""
    return make_student_sampler(noise_scheduler, STUDENT_STEPS, module).timesteps


def make_family(args):
    """The family, with the result called as it was trained: its few steps, no guidance."""
    module = FAMILIES[args.family]

    def inference_options(args):
        options = module.inference_options(args)
        if args.family != "sd3":
            return options
        # A number of steps would give this scheduler a last step at next to no noise.
        sigmas = {"sigmas": student_schedule(options.pop("num_inference_steps"))}
        return sigmas | options

    facts = (
        ("shift", "stochastic_sampling") if args.family == "sd3" else ("prediction_type", "original_inference_steps")
    )
    return tagged_family(
        module, "adversarial-diffusion-distillation", inference_options=inference_options, sampler_facts=facts
    )


def make_method(args) -> Method:
    parts = []
    if args.adversarial_weight != 0:
        parts.append("a discriminator on DINOv2 features told its images from real ones")
    if args.distillation_weight > 0:
        parts.append("the base said what it would make of them")
    return Method(
        name="adversarial diffusion distillation",
        kind=f"Adversarial Diffusion Distillation into one to four steps: {', and '.join(parts)}",
        sampling="The saved scheduler and the call above sample on the steps that it was trained for, without "
        "guidance ({described}).",
    )


# The discriminator


class ConditionedDiscriminator(nn.Module):
    """A score for each token and layer, projected on a condition: `<h(F(x)), W c> / sqrt(64)`; StyleGAN-T's form.

    Everything is computed in float32, under autocast too.

    Args:
        channels: C of the features.
        num_layers: how many feature layers there are, one head for each.
        condition_width: of `c`; 0 for none, and then a head's output is the score.
        norm_group: see `adt_utils.LocalBatchNorm`.
    """

    WIDTH = 64

    def __init__(self, channels, num_layers, condition_width=0, norm_group=None):
        super().__init__()
        width = self.WIDTH if condition_width else 1
        self.heads = nn.ModuleList(discriminator_head(channels, width, norm_group) for _ in range(num_layers))
        self.maps = nn.ModuleList(
            nn.Linear(condition_width, width) for _ in range(num_layers if condition_width else 0)
        )

    def forward(self, features, condition=None):
        """features: list of (B, C, L); condition: (B, condition_width). Returns a list of (B, L), one a head."""
        with torch.autocast(features[0].device.type, enabled=False):
            outputs = [head(x.float()) for head, x in zip(self.heads, features, strict=True)]
            if not self.maps:
                return [output.squeeze(1) for output in outputs]
            mapped = [linear(condition.float()) / self.WIDTH**0.5 for linear in self.maps]
            return [(output * c[:, :, None]).sum(1) for output, c in zip(outputs, mapped, strict=True)]


def hinge(scores, sign):
    """`E[max(0, 1 - sign D)]`, 0-d: the mean over images and tokens, summed over the heads as in the paper."""
    return sum(F.relu(1 - sign * score).mean() for score in scores)


def r1_penalty(scores, features):
    """`E |d D_k / d F_k|^2`, 0-d: of each head's score of real images, with respect to that head's own input.

    A head's score is the sum over its tokens. The mean is over images, the sum over heads. A batch norm group couples
    its images: what one image's input does to another's score counts, too.

    Args:
        scores: list of (B, L).
        features: the heads' inputs, list of (B, C, L) that require grad.
    """
    gradients = torch.autograd.grad(sum(score.sum() for score in scores), features, create_graph=True)
    return sum(gradient.square().sum(dim=(1, 2)).mean() for gradient in gradients)


@torch.no_grad()
def text_embedding(batch, prompt_encoder):
    """(B, C): the pooled text embedding that the model takes, or, as SD1.5 takes none, its text encoder's own."""
    if "pooled_prompt_embeds" in batch.conditions.positive:
        return batch.conditions.positive["pooled_prompt_embeds"].float()
    tokenizer, text_encoder = prompt_encoder.tokenizer, prompt_encoder.text_encoder
    tokens = tokenizer(
        batch.captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
        return_tensors="pt",
    ).input_ids.to(text_encoder.device)  # fmt: skip
    # One at a time, so that an embedding does not depend on the batch that it is in.
    return torch.cat([text_encoder(ids).pooler_output for ids in tokens.split(1)]).float()


def condition_width(prompt_encoder, feature_network, args) -> int:
    """Of what `make_condition` makes."""
    width = 0
    if args.discriminator_condition in ("text", "both"):
        pooled = prompt_encoder.negative.get("pooled_prompt_embeds")
        width += prompt_encoder.text_encoder.config.hidden_size if pooled is None else pooled.shape[1]
    if args.discriminator_condition in ("image", "both"):
        width += feature_network.channels
    return width


def make_condition(batch, pure_noise, prompt_encoder, feature_network, args):
    """`c`: the caption's embedding and the real image's, which is zero where the student has seen nothing of it.

    Args:
        pure_noise: (B,), whether the student starts from noise alone.

    Returns:
        (B, width); None without a condition, or without an adversary.
    """
    if args.adversarial_weight == 0:
        return None
    parts = []
    if args.discriminator_condition in ("text", "both"):
        parts.append(text_embedding(batch, prompt_encoder))
    if args.discriminator_condition in ("image", "both"):
        with torch.no_grad():
            embedding = feature_network.embed(batch.images)
        parts.append(embedding * ~expand(pure_noise, embedding))
    return torch.cat(parts, dim=1) if parts else None


def make_discriminator(prompt_encoder, feature_network, run):
    """The discriminator with its optimizer and schedule, prepared by accelerate."""
    args = run.args
    torch.manual_seed(args.seed)  # its first weights, the same on every process
    network = ConditionedDiscriminator(
        feature_network.channels,
        len(args.discriminator_layers),
        condition_width(prompt_encoder, feature_network, args),
        args.discriminator_norm_group,
    ).to(run.accelerator.device)
    optimizer = make_optimizer(torch.optim.AdamW, network, args.discriminator_learning_rate, args)
    lr_scheduler = make_lr_scheduler(optimizer, args.discriminator_lr_warmup_steps, args.max_train_steps, args)
    return prepare_trained("discriminator", network, optimizer, lr_scheduler, run)


# Training


@dataclass(frozen=True)
class Distillation:
    """A run's networks: two that train, the frozen ones, and the four timesteps of the student."""

    student: Any  # `Trained`, as the discriminator
    discriminator: Any  # this and its features' network are None without an adversary
    teacher: Teacher | None  # without a distillation loss
    feature_network: Any
    negative: dict  # NFSD's negative prompt's embeddings, (1, ...) each
    models: FrozenModels
    grid: torch.Tensor  # (4,), `grid[0]` is pure noise
    module: Any  # the family's script
    run: Any

    @property
    def predicts(self) -> str:
        return prediction_type(self.models.noise_scheduler)


@dataclass
class StudentBatch:
    """A micro-batch of one process, after step 2; step 3 adds the last two."""

    batch: Any  # `training_utils.Batch`
    sample: torch.Tensor  # (B, C, h, w), what the student starts from
    timesteps: torch.Tensor  # (B,), of the grid
    condition: torch.Tensor | None  # (B, width), the discriminator's
    teacher_timesteps: torch.Tensor  # (B,)
    teacher_levels: tuple  # `a` and `s`, (B, 1, 1, 1) each
    teacher_noise: torch.Tensor  # (B, C, h, w)
    path: Any = None  # `SimulatedInference`
    images: torch.Tensor | None = None  # (B, 3, H, W), the student's, attached to the path's prediction


def train(system, validation):
    """The training loop, its comments numbered as the algorithm."""
    run, student, models = system.run, system.student, system.models
    args = run.args
    progress = Progress(student, models.sampler, run)
    loader = load_micro_batches(run, save_checkpoint)
    for iteration in range(run.first_iteration, args.max_train_steps):
        started = time.perf_counter()
        # 1. Encode the global batch's micro-batches, and 2. draw what the student starts from.
        with models.prompt_encoder.on_device:
            batches = [
                prepare_student(next(loader), iteration, system) for _ in range(args.gradient_accumulation_steps)
            ]
        # 3. The student's images, in one step each.
        student.wrapped.eval()
        for batch in batches:
            predict = make_predict(student.wrapped, batch.batch.conditions, system.module.call_network)
            levels = noise_levels(models.noise_scheduler, batch.timesteps)
            batch.path = one_step(predict, batch.sample, batch.timesteps, levels, system.predicts)
            batch.images = system.module.decode_latents(models.vae, batch.path.latents)
        # 4. Update the discriminator, unless the teacher alone is asked for.
        values = {}
        if args.adversarial_weight != 0:
            values |= update_discriminator(batches, iteration, system)
        # 5. Update the student.
        values |= update_student(batches, iteration, system)

        progress.log(values | {"lr": student.lr}, iteration, started)
        del batches
        done, stopping = iteration + 1, run.interruption.is_due(iteration + 1)
        if stopping or done % args.checkpointing_steps == 0:
            save_checkpoint(done, run)
        if not stopping and validation.is_due(done):
            validation.log(done)
        if stopping:
            break
    progress.close()


def prepare_student(examples, iteration, system) -> StudentBatch:
    """Steps 1 and 2: one of the four timesteps for each image, at the first of which the student sees noise alone.

    That first level keeps a little of the image (`a = 0.07` on Stable Diffusion's schedules), which the student must
    not see, since in use there is none; its prediction is made into `x_0` with that `a` all the same.
    """
    run, models, module = system.run, system.models, system.module
    batch = module.prepare_batch(examples, iteration, models, run)

    def draw(function, shape, purpose):
        drawn = draw_per_image(function, shape, run.args.seed, purpose, iteration, examples["positions"])
        return drawn.to(run.accelerator.device)

    index = (draw(torch.rand, (), "student timestep") * STUDENT_STEPS).long()
    timesteps = system.grid[index]
    a, s = noise_levels(models.noise_scheduler, timesteps)
    pure_noise = index == 0
    noisy = torch.where(expand(pure_noise, batch.noise), batch.noise, a * batch.latents + s * batch.noise)
    teacher_timesteps, teacher_levels = module.plain_noise_levels(
        draw(torch.rand, (), "teacher timestep"), models.noise_scheduler
    )
    return StudentBatch(
        batch=batch,
        sample=noisy,
        timesteps=timesteps,
        condition=make_condition(batch, pure_noise, models.prompt_encoder, system.feature_network, run.args),
        teacher_timesteps=teacher_timesteps,
        teacher_levels=teacher_levels,
        teacher_noise=draw(torch.randn, batch.noise.shape[1:], "teacher noise"),
    )


def update_discriminator(batches, iteration, system) -> dict:
    """Step 4: hinge on real, on mismatched and on the student's images, and R1 on the real ones.

    They go through in forwards of their own, since one would mix their batch norm statistics, and each forward's
    backward comes before the next forward, since data parallelism needs that.
    """
    run, discriminator = system.run, system.discriminator
    totals, others = Totals(len(batches)), mismatched_conditions(batches, run)
    update_spectral_norm(discriminator.network)
    for n, batch in enumerate(batches):
        with torch.no_grad():
            real, fake = (system.feature_network(images) for images in (batch.batch.images, batch.images.detach()))
        if run.args.r1_weight > 0:
            real = [feature.requires_grad_() for feature in real]
        pairs = [("real", real, batch.condition, 1.0), ("fake", fake, batch.condition, 1.0)]
        if others is not None:
            detached = [feature.detach() for feature in real]
            pairs.insert(1, ("mismatched", detached, others[n], run.args.mismatched_pair_weight))
        for kind, features, condition, weight in pairs:
            with discriminator.synchronise_if(kind == "fake" and n == len(batches) - 1):
                scores = discriminator.wrapped(features, condition)
                loss = weight * hinge(scores, 1 if kind == "real" else -1)
                score = torch.stack([score.mean() for score in scores]).mean()
                totals.add_means(**{"discriminator_loss": loss, f"{kind}_score": score})
                if kind == "real" and run.args.r1_weight > 0:
                    penalty = r1_penalty(scores, features)
                    totals.add_means(r1=penalty)
                    loss = loss + run.args.r1_weight * penalty
                run.accelerator.backward(loss)
    values = totals.reduce(run.accelerator, iteration)
    discriminator.step(iteration)
    return values | {"discriminator_lr": discriminator.lr}


def mismatched_conditions(batches, run):
    """For each micro-batch the conditions of other captions' images, (B, width); None where there are to be none."""
    if run.args.mismatched_pair_weight == 0:
        return None
    partners = global_partners([batch.batch.captions for batch in batches], run.accelerator)
    if partners is None:
        return None
    return of_partners([batch.condition for batch in batches], partners, run.accelerator)


def update_student(batches, iteration, system) -> dict:
    """Step 5: `-sum over heads of E[D(x_0, c)] + lambda L_distill`, by replaying the one step."""
    run, student = system.run, system.student
    args, accelerator = run.args, run.accelerator
    totals, adversarial, distilled = Totals(len(batches)), [], []
    with contextlib.nullcontext() if system.discriminator is None else system.discriminator.frozen() as scorer:
        for batch in batches:
            prediction = batch.path.train_steps[0].prediction
            if scorer is not None:
                loss = -sum(score.mean() for score in scorer(system.feature_network(batch.images), batch.condition))
                adversarial.append(torch.autograd.grad(loss, prediction, retain_graph=True)[0])
                totals.add_means(generator_loss=loss)
                totals.add_squared_norms(adversarial_gradient_norm=adversarial[-1].square().sum())
            if args.distillation_weight > 0:
                loss = distillation_loss(batch, system)
                distilled.append(torch.autograd.grad(args.distillation_weight * loss, prediction)[0])
                totals.add_means(distillation_loss=loss)
                totals.add_squared_norms(distillation_gradient_norm=distilled[-1].square().sum())
            batch.images = None

    values = totals.reduce(accelerator, iteration)
    weight = args.adversarial_weight
    if weight == "auto":
        norm = values["adversarial_gradient_norm"]
        weight = values["adversarial_weight"] = values["distillation_gradient_norm"] / norm if norm > 0 else 0.0
    for n, batch in enumerate(batches):
        gradient = weight * adversarial[n] if adversarial else 0.0
        gradient = gradient + distilled[n] if distilled else gradient
        predict = make_predict(student.wrapped, batch.batch.conditions, system.module.call_network)
        [replay] = batch.path.replay(predict, [gradient])
        with student.synchronise_if(n == len(batches) - 1):
            accelerator.backward(replay())
    student.step(iteration)
    return values


# Distillation


def distillation_loss(batch, system):
    """`E[c(t) mean((x_0 - target)^2)]`, 0-d, in pixels or latents; no gradient goes to the target.

    - `exponential`: the teacher's `x_0` for `x_t = a sg(x_0) + s eps'`, `c = a`;
    - `sds`: the same with `c = a w / (2 s)`, whose gradient in latents is score distillation's,
      `w (eps_teacher - eps')`, for `w = s^2`, https://arxiv.org/abs/2209.14988's;
    - `nfsd`: see `noise_free_target`, `c = a`.
    """
    args, models, module = system.run.args, system.models, system.module
    original, (a, s) = batch.path.latents, batch.teacher_levels
    weight = a * s / 2 if args.distillation_target == "sds" else a
    make_target = noise_free_target if args.distillation_target == "nfsd" else teacher_target
    with torch.no_grad():
        target = make_target(a * original.detach() + s * batch.teacher_noise, batch, system)
        if args.distillation_space == "pixel":
            target = module.decode_latents(models.vae, target)
    own = batch.images if args.distillation_space == "pixel" else original
    return (weight.flatten() * (own - target).square().mean(dim=(1, 2, 3))).mean()


def teacher_target(sample, batch, system):
    """The teacher's `x_0` for `sample`, in one step: (B, C, h, w)."""
    conditions, timesteps = batch.batch.conditions, batch.teacher_timesteps
    prediction = system.teacher(sample, timesteps, conditions.positive)
    scale = system.run.args.teacher_guidance_scale
    if scale > 1:
        unconditional = system.teacher(sample, timesteps, conditions.negative)
        prediction = unconditional + scale * (prediction - unconditional)
    return predicted_original(prediction, sample, batch.teacher_levels, system.predicts)


def noise_free_target(sample, batch, system):
    """`x_0 - (s / a) (delta_D + g delta_C)`, (B, C, h, w): https://arxiv.org/abs/2310.17590's, without the noise.

    `delta_C = eps(y) - eps()` is the condition's direction; `delta_D`, the domain's, is `eps()` where there is little
    noise, else `eps() - eps(negative prompt)`.
    """
    conditions, timesteps, (a, s) = batch.batch.conditions, batch.teacher_timesteps, batch.teacher_levels

    def noise(condition):
        prediction = system.teacher(sample, timesteps, condition)
        return predicted_noise(prediction, sample, batch.teacher_levels, system.predicts)

    negative = {name: system.negative.get(name, value).expand_as(value) for name, value in conditions.positive.items()}
    conditional, unconditional, unwanted = map(noise, (conditions.positive, conditions.negative, negative))
    clean = timesteps < NFSD_CLEAN * system.models.noise_scheduler.config.num_train_timesteps
    domain = torch.where(expand(clean, sample), unconditional, unconditional - unwanted)
    direction = domain + system.run.args.teacher_guidance_scale * (conditional - unconditional)
    return batch.path.latents.detach() - s / a.clamp(min=LEAST_SIGNAL) * direction


def tune(noise_scheduler, module, run):
    """The run from its models' weights to the saved result.

    A function of its own, so that nothing refers to the trained networks any more when `end_run` closes the run.
    """
    args, accelerator = run.args, run.accelerator
    prompts = args.validation_prompts or []
    prompt_encoder, (negative, *validation_conditions) = load_prompt_encoder(module, run, [NEGATIVE_PROMPT, *prompts])
    sampler = make_student_sampler(noise_scheduler, args.num_inference_steps, module)
    models = FrozenModels(module.load_frozen_vae(args, accelerator), prompt_encoder, sampler, noise_scheduler)
    network = module.load_network(args, accelerator)
    teacher = Teacher(network, module.call_network, run) if args.distillation_weight > 0 else None
    student = prepare_generator(network, run)
    feature_network = discriminator = None
    if args.adversarial_weight != 0:
        feature_network = make_feature_network(args).to(accelerator.device)
        discriminator = make_discriminator(prompt_encoder, feature_network, run)
    register_checkpoint_hooks(student, run)
    validation = Validation(student, None, models, validation_conditions, run)
    load_checkpoint(run)
    grid = student_grid(noise_scheduler, module, args).to(accelerator.device)
    system = Distillation(student, discriminator, teacher, feature_network, negative, models, grid, module, run)
    with run.interruption:
        train(system, validation)
        finish_run(student, models, validation, run)


def check_method(noise_scheduler, args):
    """Refuses a feature network that does not suit its options, and a schedule that the student cannot have."""
    if args.adversarial_weight != 0:
        check_feature_network(args)
    module = FAMILIES[args.family]
    grid = student_grid(noise_scheduler, module, args)
    for num_steps in reversed(range(1, STUDENT_STEPS)):
        timesteps = make_student_sampler(noise_scheduler, num_steps, module).timesteps
        if not torch.isin(timesteps, grid).all():
            raise ADTError(
                f"The base pipeline's scheduler makes {num_steps} steps at {timesteps.tolist()}, which are not some "
                f"of its {STUDENT_STEPS} ({grid.tolist()}), at which the student trains: a `shift_terminal`, or "
                "`use_karras_sigmas` and its like, does that."
            )


def main(args):
    module = FAMILIES[args.family]
    run, _, noise_scheduler = start_run(module, make_family, make_method, args, check_method, student_grid)
    tune(noise_scheduler, module, run)
    end_run(run)


if __name__ == "__main__":
    try:
        main(parse_args())
    except ADTError as error:
        sys.exit(f"error: {error}")

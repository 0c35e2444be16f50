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
"""What the related systems share: the family scripts as parts, and a denoiser's prediction as other quantities.

- options, and a run's start: `FAMILIES`, `make_parser`, `parse_family`, `start_run`;
- `tagged_family`, `make_lcm_scheduler`;
- a prediction as other quantities: `noise_levels`, `predicted_original`, `predicted_noise`, the path `one_step`;
- the base network beside the tuned one: `Teacher`;
- a perturbed input: `Perturbation`, `shift_input`, `keep_first_layer_in_float32`.

Symbols: `x_t = a x_0 + s eps`; `a = sqrt(abar)`, `s = sqrt(1 - abar)` on a variance-preserving schedule, and
`a = 1 - sigma`, `s = sigma` with flow matching. A network predicts `eps`, the velocity `v = a eps - s x_0`, or the
flow `u = eps - x_0`.
"""

import argparse
import contextlib
import copy
from dataclasses import replace

import torch
from diffusers import LCMScheduler

import train_adt_sd3
import train_adt_sd15
import train_adt_sdxl
from adt_utils import SimulatedInference, TrainStep
from config_utils import read_config
from data_utils import check_used_images, images_per_epoch, list_captions, load_image_caption_dataset
from disk_utils import bytes_to_come
from option_utils import Nature, adder, leave_out, option_natures, positive_float, positive_int
from output_utils import Interruption, create_output, find_checkpoint, identify_run, sampler_schedule
from training_utils import Run, expand, resolve_schedule, start_accelerator, weight_dtype


FAMILIES = {"sd15": train_adt_sd15, "sdxl": train_adt_sdxl, "sd3": train_adt_sd3}


# Options and the start of a run


def parse_family(description, input_args=None, families=FAMILIES) -> str:
    """The `--family` of a command line, on which the other options depend; ends with the help where it has none."""
    parser = argparse.ArgumentParser(description=description, add_help=False)
    parser.add_argument("--family", choices=families, help="With it, --help shows all options.")
    parser.add_argument("--config", help=argparse.SUPPRESS)
    given = parser.parse_known_args(input_args)[0]
    name = given.family
    if name is None and given.config is not None:
        name = read_config(parser, given.config).get("family")
        if name not in (None, *families):
            parser.error(f"--config {given.config}: family must be one of {', '.join(families)}, not {name}.")
    if name is None:
        parser.add_argument("--help", "-h", action="help")
        parser.parse_known_args(input_args)
        parser.error("give --family.")
    return name


def make_parser(name, description, without=(), families=FAMILIES, **defaults) -> argparse.ArgumentParser:
    """The options of a family's script that act without a simulated inference, and its defaults.

    Args:
        name: a key of `FAMILIES`.
        without: names of more options that do not act. All these keep their defaults as fixed values.
        families: the names of those that the method has.
        defaults: in place of the family's, of options and of fixed values.
    """
    parser = FAMILIES[name].make_parser()
    parser.description = description
    drift = ("drift_tolerance", "drift_clip_model_name_or_path", "stop_on_drift")
    absent = {"adversarial_loss_weight", "rollout_time_ids", "shard", *drift, *without}
    absent |= {name for name, natures in option_natures(parser).items() if Nature.ADVERSARIAL in natures}
    leave_out(parser, absent, adversarial_loss_weight=0.0, **defaults)  # which is what "no simulated inference" means
    adder(parser)("--family", choices=families, required=True, help="The model family.")
    return parser


def add_robust_arguments(parser, robust_steps, steps_help):
    """The options of `Perturbation`. Returns the function that adds to their group."""
    add = adder(parser.add_argument_group("robust training"))
    add("--robust_steps", type=positive_int, default=robust_steps, help=steps_help)
    add("--robust_step_size", type=positive_float, default=0.0018, help="Of the perturbation, a pass.")
    add("--robust_step_unit", choices=["rms", "norm"], default="rms",
        help="The step size's: over an image's latents; norm is raw, 0.1 in the paper's code.")  # fmt: skip
    add("--robust_radius", type=positive_float, default=0.1, help="The perturbation's largest root mean square.")
    return add


def check_robust_options(args, parser):
    for name in ("robust_step_size", "robust_step_unit", "robust_radius"):
        if args.robust_steps == 1 and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is of perturbations, which --robust_steps 1 does not make.")


def start_run(module, make_family, make_method, args, check=lambda noise_scheduler, args: None, timesteps=None):
    """Checks everything that can be checked before a model is loaded, and starts accelerate.

    Args:
        module: the family's script.
        make_family, make_method: (args) to the run's `Family` and `Method`.
        check: (training schedule's scheduler, args), refuses what the method's own options name or cannot do.
        timesteps: (training schedule's scheduler, module, args) to those that the method trains at, a tensor, where
            they are not the timesteps of the family's sampler.

    Returns:
        the run, the sampler and the scheduler of the training schedule, as the family's `check_models` makes them.
    """
    accelerator = start_accelerator(args)
    interruption = Interruption(args, accelerator)
    sampler, noise_scheduler, default_size = module.check_models(args)
    check(noise_scheduler, args)
    dataset = load_image_caption_dataset(args)
    args = resolve_schedule(args, images_per_epoch(dataset, args, accelerator), accelerator)
    schedule = sampler_schedule(sampler)
    if timesteps is not None:
        schedule = {"timesteps": timesteps(noise_scheduler, module, args).tolist()}
    identity = identify_run(args, schedule, dataset, accelerator)
    checkpoint, first_iteration = find_checkpoint(identity, args)
    check_used_images(dataset, first_iteration, args, accelerator)
    repo_id = create_output(args, accelerator)
    run = Run(
        make_family(args), make_method(args), args, accelerator, dataset, identity, checkpoint, first_iteration,
        default_size, repo_id, interruption,
    )  # fmt: skip
    return run, sampler, noise_scheduler


def tagged_family(module, tag, **changes):
    """The module's `Family` with `tag` on its cards in place of ADT's, and other changes."""
    tags = [tag if own == "adversarial-diffusion-tuning" else own for own in module.FAMILY.card_tags]
    return replace(module.FAMILY, card_tags=tuple(tags), **changes)


def load_prompt_encoder(module, run, prompts):
    """The family's prompt encoder, and its embeddings of `prompts`, made before a cache takes the captions' place."""
    args, accelerator = run.args, run.accelerator
    prompt_encoder = module.PromptEncoder(args, accelerator)
    with prompt_encoder.on_device:
        conditions = [prompt_encoder([prompt]) for prompt in prompts]
    if getattr(args, "cache_text_embeddings", None) is not None:
        captions, reserved = list_captions(run.dataset, args), bytes_to_come(args.cache_text_embeddings, run)
        prompt_encoder.use_cache(args.cache_text_embeddings, captions, accelerator, reserved)
    return prompt_encoder, conditions


# Few steps


# What `LCMScheduler` has in common with the training schedule.
SCHEDULE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type",
)  # fmt: skip


def make_lcm_scheduler(noise_scheduler, num_points, module) -> LCMScheduler:
    """One step to `x_0`, then fresh noise for the next; its timesteps are some of `num_points`, and the last one."""
    return LCMScheduler(
        **{name: noise_scheduler.config[name] for name in SCHEDULE},
        original_inference_steps=num_points,
        **module.PIPELINE_SCHEDULER_OPTIONS,
    )


# A prediction as other quantities


def prediction_type(noise_scheduler) -> str:
    """`"epsilon"`, `"v_prediction"` or `"flow_prediction"`."""
    return noise_scheduler.config.get("prediction_type", "flow_prediction")


def noise_levels(noise_scheduler, timesteps):
    """`a` and `s`, (B, 1, 1, 1) each and float32, at `timesteps` (B,), whole numbers but with flow matching."""
    length = noise_scheduler.config.num_train_timesteps
    if prediction_type(noise_scheduler) == "flow_prediction":
        s = (timesteps.float() / length).view(-1, 1, 1, 1)
        return 1 - s, s
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps.long()].view(-1, 1, 1, 1)
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def predicted_original(prediction, sample, levels, predicts):
    """The one-step path: `x_0` as `prediction`, (B, C, h, w), has it for `sample`.

    `(x_t - s p) / a` of noise, `a x_t - s p` of a velocity, `x_t - s p` of a flow.
    """
    a, s = levels
    if predicts == "epsilon":
        return (sample - s * prediction) / a
    return (a if predicts == "v_prediction" else 1) * sample - s * prediction


def predicted_noise(prediction, sample, levels, predicts):
    """`eps` as `prediction`, (B, C, h, w), has it for `sample`: `p`, `s x_t + a p` or `x_t + a p`."""
    a, s = levels
    if predicts == "epsilon":
        return prediction
    return (s if predicts == "v_prediction" else 1) * sample + a * prediction


def one_step(predict, sample, timesteps, levels, predicts) -> SimulatedInference:
    """The network's `x_0` for `sample` in one step, as a path of one step: nothing of the network's graph is kept.

    `prediction_gradients` and `replay` of the result then give autograd's gradient.

    Args:
        predict: as `make_predict` makes it.
        sample: (B, C, h, w), float32.
        timesteps: (B,).
        levels: `a` and `s`, (B, 1, 1, 1) each.
    """
    with torch.no_grad():
        prediction = predict(sample, timesteps, (1,)).float()
    prediction = prediction.detach().requires_grad_()
    original = predicted_original(prediction, sample, levels, predicts)
    return SimulatedInference(original, [TrainStep(0, timesteps, sample, prediction)], (1,))


# The base network


class Teacher:
    """The base network: under LoRA the tuned one with its adapters off, else a copy, as light as frozen weights.

    Make it before accelerate prepares `network`, whose forward would be the copy's, too.
    """

    def __init__(self, network, call_network, run):
        self.network, self.call_network, self.run = network, call_network, run
        self.copy = None
        if not run.args.use_lora:
            frozen = copy.deepcopy(network).requires_grad_(False).eval()
            self.copy = frozen.type(weight_dtype(run.accelerator)).to(run.accelerator.device)

    @torch.no_grad()
    def __call__(self, sample, timesteps, condition):
        """(B, C, h, w), float32: the base's prediction."""
        with self.base() as network, self.run.accelerator.autocast():
            return self.call_network(network, sample, timesteps, condition).float()

    @contextlib.contextmanager
    def base(self):
        if self.copy is not None:
            yield self.copy
            return
        training = self.network.training
        self.network.eval().disable_adapters()
        try:
            yield self.network
        finally:
            self.network.enable_adapters()
            self.network.train(training)


# A perturbed input


def shift_input(network, shift):
    """`network` as a function of what it is given plus `shift`, (B, C, h, w), through which a gradient goes."""

    def shifted(*sample, hidden_states=None, **options):
        if hidden_states is not None:  # as SD3's is called
            return network(hidden_states=hidden_states + shift, **options)
        return network(sample[0] + shift, *sample[1:], **options)

    return shifted


def keep_first_layer_in_float32(network):
    """Keeps a perturbation that is smaller than half precision's steps: later layers see its effect, which is not."""
    layer = network.conv_in if hasattr(network, "conv_in") else network.pos_embed.proj
    forward = layer.float().forward
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.float()  # on a CPU its weights must not be lighter than its input, the first layer's output

    def full_precision(sample):
        with torch.autocast(sample.device.type, enabled=False):
            return forward(sample.float())

    layer.forward = full_precision


def per_image_norm(values):
    """(B, ...) to (B, 1, ...): the L2 norm of each image's."""
    return expand(values.flatten(1).norm(dim=1), values)


class Perturbation:
    """`delta` of a micro-batch, which follows the gradient of the loss: `delta += alpha g / |g|` for each image.

    It is projected to a ball. Sizes are root mean squares over an image's latents, which mean the same at every
    resolution, or, by `unit="norm"`, the raw L2 norms of https://arxiv.org/abs/2502.17099's code.

    Args:
        like: latents (B, C, h, w).
        step_size: `alpha`.
        radius: of the ball, always a root mean square.
    """

    def __init__(self, like, step_size, unit, radius):
        scale = like[0].numel() ** 0.5
        self.step_size = step_size * scale if unit == "rms" else step_size
        self.radius = radius * scale
        self.delta = torch.zeros_like(like, dtype=torch.float32)

    def ascend(self):
        """The step, by the gradient that a backward has left in `delta`; of any scale, since its norm is divided out.

        An image stays where it was if its gradient is zero, or not finite, which float16's loss scaling sets right.
        """
        gradient = self.delta.grad
        norm = per_image_norm(gradient)
        usable = (norm > 0) & norm.isfinite()
        delta = self.delta.detach() + torch.where(usable, self.step_size * gradient / norm, 0.0)
        delta = delta * (self.radius / per_image_norm(delta).clamp(min=self.radius))
        self.delta = delta


def perturbation_rms(perturbations, accelerator) -> float:
    """The root mean square over the global batch."""
    square = torch.stack([perturbation.delta.detach().square().mean() for perturbation in perturbations]).mean()
    return accelerator.reduce(square, reduction="mean").sqrt().item()

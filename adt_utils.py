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
"""What Adversarial Diffusion Tuning (ADT) is, apart from any model family, command line or accelerator.

- the constrained backward path through a sampler: `constrained_step`, `select_train_steps`, `starting_latents`,
  `simulate_inference`, `simulate_together` (equations 3, 4 and 10 to 13 of the paper);
- the discriminator: `DiffAugment`, `FeatureNetwork`, `SiameseDiscriminator`, `ProjectedDiscriminator` (3.1, A.2);
- the adversarial losses: `discriminator_loss`, `generator_loss` (equations 8 and 9), `mismatched_partners`.

Symbols: `x_i` are the latents before step `i` of the sampler's own path of `N` steps, `eps_theta` is the network's
prediction, `sg` stops the gradient, `F` is the frozen feature network, `h` a head, `h'` its twin, `q` a predictor.
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Callable, Optional, Sequence

import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized


# Solvers that people know by name and whose steps `constrained_step` cannot express as
# `x_{i+1} = a_i x_i + b_i eps_theta(x_i)`, a multistep solver's older predictions included.
REFUSED_SAMPLERS = {
    "unipc": "UniPC's corrector reuses stored samples, whose gradient the constrained path does not bound",
    "deis": "its multistep update has not been checked against the constrained path",
    "heun": "Heun's second stage reuses a stored sample",
    "kdpm2": "KDPM2's second stage reuses a stored sample",
    "dpmsolver_singlestep": "the singlestep DPM-Solver reuses a stored sample",
    "pndm": "PNDM reuses a stored sample in its Runge-Kutta and linear multistep phases",
    "lms": "LMS keeps a history of derivatives that depend on stored samples",
    "euler_ancestral": "ancestral sampling adds fresh noise at every step, so that the path is not deterministic",
    "ddpm": "DDPM adds fresh noise at every step, so that the path is not deterministic",
    "lcm": "LCM adds fresh noise at every step, so that the path is not deterministic",
}

GRADIENT_PATHS = ("adt", "drtune")


def check_scheduler(scheduler) -> None:
    """Raises `ValueError` where the constrained path does not hold for `scheduler`, a diffusers scheduler."""
    name = type(scheduler).__name__
    supported = (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
    )
    if not isinstance(scheduler, supported):
        raise ValueError(
            f"The constrained path does not hold for {name}: it needs a deterministic solver that reuses no stored "
            f"sample, one of {', '.join(cls.__name__ for cls in supported)}."
        )
    config = scheduler.config
    if config.get("clip_sample", False) or config.get("thresholding", False):
        raise ValueError(f"{name} clips its predicted sample; set `clip_sample=False` and `thresholding=False`.")
    if config.get("algorithm_type", "dpmsolver++") != "dpmsolver++":
        raise ValueError(f"{name} is supported with algorithm_type='dpmsolver++', not '{config.algorithm_type}'.")
    if config.get("stochastic_sampling", False):
        raise ValueError(f"{name} adds fresh noise at every step with `stochastic_sampling=True`.")


def constrained_step(scheduler, model_output, timestep, sample, gradient_path="adt"):
    """One sampler step with the constrained backward path of equation 11 (`adt`) or of equation 4 (`drtune`).

    The value is `scheduler.step`'s, bit for bit, whatever the path. Under `adt` the gradient to `sample` is the
    identity in the coordinates in which the network sees the latents, and the gradient to `model_output` is what the
    solver makes of it, a multistep solver's history included:

        x_{i+1} = x_i + sg((a_i - 1) x_i) + b_i eps_theta(sg(x_i))

    Under `drtune` the gradient to `sample` is the solver's own linear coefficient `a_i`.

    Args:
        scheduler: one of the schedulers that `check_scheduler` accepts, after `set_timesteps`; its state advances.
        model_output: (B, C, h, w), float32, the (guided) prediction for `sample`, which must have been made from the
            detached `sample`.
        timestep: the element of `scheduler.timesteps` for this step.
        sample: (B, C, h, w), float32, `x_i` in the scheduler's coordinates.
        gradient_path: `"adt"` or `"drtune"`.

    Returns:
        (B, C, h, w), `x_{i+1}`.

    Raises:
        ValueError: for a scheduler for which the path does not hold, or an unknown path.
    """
    check_scheduler(scheduler)
    if gradient_path not in GRADIENT_PATHS:
        raise ValueError(f"Unknown gradient path '{gradient_path}': choose from {', '.join(GRADIENT_PATHS)}.")
    if gradient_path == "drtune":
        return scheduler.step(model_output, timestep, sample, return_dict=False)[0]

    detached = sample.detach()
    next_sample = scheduler.step(model_output, timestep, detached, return_dict=False)[0]
    if not sample.requires_grad:
        return next_sample
    coefficient = 1.0
    if isinstance(scheduler, EulerDiscreteScheduler):
        # Euler works in x / alpha, but the network sees x = (x / alpha) / sqrt(1 + sigma^2): the identity there is
        # this ratio here, and gives back DDIM's coefficients.
        sigma, next_sigma = scheduler.sigmas[scheduler.step_index - 1], scheduler.sigmas[scheduler.step_index]
        coefficient = ((1 + next_sigma**2) / (1 + sigma**2)).sqrt()
    # In the scheduler's dtype, which for a prediction in bfloat16 is not that of float32 latents.
    return next_sample + (coefficient * (sample - detached)).to(next_sample.dtype)


def select_train_steps(start_index, num_inference_steps, num_gradient_steps, generator=None) -> list[int]:
    """Chooses the steps through which a generator update sends its gradient.

    Of the `n = N - i_0` steps that remain from `start_index`: all of them if `n <= K`, else K of them spaced evenly by
    `n // K`, from a random offset that keeps the last one on the path.

    Args:
        start_index: `i_0`, in `[0, N - 1]`.
        num_inference_steps: `N`.
        num_gradient_steps: `K`, at least 1.
        generator: CPU `torch.Generator` for the offset.

    Returns:
        ascending indices in `[start_index, N - 1]`.
    """
    remaining = num_inference_steps - start_index
    if not 0 <= start_index < num_inference_steps:
        raise ValueError(f"start_index must be in [0, {num_inference_steps - 1}], not {start_index}.")
    if num_gradient_steps < 1:
        raise ValueError(f"num_gradient_steps must be at least 1, not {num_gradient_steps}.")
    if remaining <= num_gradient_steps:
        return list(range(start_index, num_inference_steps))
    spacing = remaining // num_gradient_steps
    span = (num_gradient_steps - 1) * spacing + 1
    offset = torch.randint(remaining - span + 1, (1,), generator=generator).item()
    return [start_index + offset + k * spacing for k in range(num_gradient_steps)]


def starting_latents(scheduler, latents, noise, start_index):
    """The latents from which an image-to-image inference starts, `x_{i_0} = alpha x_0 + sigma eps` (equation 7).

    `alpha` and `sigma` are the sampler's own at `start_index`, in its own coordinates (`1 - sigma` and `sigma` for
    flow matching, `1` and `sigma` for Euler).

    Args:
        scheduler: a scheduler after `set_timesteps`; it is not changed.
        latents: (B, C, h, w), `x_0`, scaled as the network expects.
        noise: (B, C, h, w), standard normal.
        start_index: `i_0`, an index into `scheduler.timesteps`.

    Returns:
        (B, C, h, w).
    """
    scheduler = copy.deepcopy(scheduler)
    timesteps = scheduler.timesteps[start_index].expand(latents.shape[0])
    if hasattr(scheduler, "set_begin_index"):
        # So that the levels are read at this index, not looked up by a timestep that the training grid may lack.
        scheduler.set_begin_index(start_index)
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(latents, timesteps, noise)
    return scheduler.add_noise(latents, noise, timesteps)


def signal_and_noise_levels(scheduler, start_index) -> tuple[float, float]:
    """`alpha` and `sigma` of `x = alpha x_0 + sigma eps` at `start_index`, in the network's coordinates."""
    signal = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
    levels = starting_latents(scheduler, signal, 1 - signal, start_index)
    scheduler = copy.deepcopy(scheduler)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start_index)
    if hasattr(scheduler, "scale_model_input"):
        levels = scheduler.scale_model_input(levels, scheduler.timesteps[start_index])
    alpha, sigma = levels.flatten().tolist()
    return alpha, sigma


def classifier_free_guidance(prediction, guidance_scale, guidance_rescale=0.0):
    """Combines the two branches as the diffusers pipelines do, operation for operation.

    Args:
        prediction: (2B, C, h, w), the unconditional rows first.
        guidance_scale: `w` in `uncond + w (cond - uncond)`.
        guidance_rescale: `phi` of section 3.4 of https://arxiv.org/abs/2305.08891; 0 leaves the result as it is.

    Returns:
        (B, C, h, w).
    """
    unconditional, conditional = prediction.chunk(2)
    guided = unconditional + guidance_scale * (conditional - unconditional)
    if guidance_rescale > 0.0:
        dims = list(range(1, guided.ndim))
        rescaled = guided * (conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
        guided = guidance_rescale * rescaled + (1 - guidance_rescale) * guided
    return guided


@dataclass
class TrainStep:
    """What `SimulatedInference` keeps of one chosen step; nothing of it is larger than the latents."""

    index: int
    timestep: torch.Tensor
    model_input: torch.Tensor  # (branches * B, C, h, w), detached
    prediction: torch.Tensor  # (branches * B, C, h, w), a float32 leaf that requires grad


@dataclass
class SimulatedInference:
    """The result of `simulate_inference`, and the constant-memory backward that goes with it.

    Every network input on the constrained path is detached, so the K network graphs are independent of each other.
    The rollout therefore keeps none of them: `latents` depends on the chosen steps' predictions, which are leaves,
    through the solver's arithmetic alone. `prediction_gradients` gives `dL/dprediction`, and `replay` runs one chosen
    step and one guidance branch at a time through the network again. The sum is the gradient of equation 12,

        sum over chosen i of  b_i g d eps_theta(sg(x_i), t_i) / d theta   with   g = dL/dx_N

    and the peak is one network graph, whatever K is.
    """

    latents: torch.Tensor
    train_steps: list[TrainStep]
    branches: tuple[int, ...]

    def prediction_gradients(self, loss) -> list[torch.Tensor]:
        """`dL/dprediction` for each chosen step; frees the graph of `loss` (decoder, discriminator, solver).

        `torch.autograd.grad` rather than an engine's backward, which may scale the loss.
        """
        return list(torch.autograd.grad(loss, [step.prediction for step in self.train_steps]))

    def guided_norm_squared(self, gradients) -> torch.Tensor:
        """The squared norm of the gradients to the guided predictions, summed over the chosen steps; a 0-d tensor.

        The gradients to the branches sum to the gradient to the guided prediction: with scale `w` they are
        `(1 - w) g` and `w g`, which cancel in the parameters as far as the branches' Jacobians agree, so `g` measures
        the update better than they do.
        """
        return sum(torch.stack(gradient.chunk(len(self.branches))).sum(0).square().sum() for gradient in gradients)

    def replay(self, predict, gradients, together=False) -> list[Callable[[], torch.Tensor]]:
        """The passes whose backwards, added up, give the gradient of equation 12 to the network's parameters.

        Each pass is a function that runs the network with gradient on one stored input and returns the 0-d surrogate
        `<prediction, gradient>`; its value means nothing, its gradient is the vector-Jacobian product. Run each
        pass's backward before the next pass, and let gradients synchronise in the last one only.

        Args:
            predict: the function that `simulate_inference` was given, in the same mode (`eval()`).
            gradients: the vectors of `prediction_gradients`, scaled as wanted.
            together: whether a step's guidance branches are one pass, of twice the memory, and not one each.
        """

        passes = [self.branches] if together else [(branch,) for branch in self.branches]

        def run(step, gradient, row):
            model_input = step.model_input.chunk(len(passes))[row]
            prediction = predict(model_input, step.timestep, passes[row])
            return (prediction.float() * gradient.chunk(len(passes))[row]).sum()

        return [
            partial(run, step, gradient, row)
            for step, gradient in zip(self.train_steps, gradients, strict=True)
            for row in range(len(passes))
        ]


def simulate_inference(
    predict: Callable[[torch.Tensor, torch.Tensor, tuple[int, ...]], torch.Tensor],
    scheduler,
    latents: torch.Tensor,
    start_index: int = 0,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    train_steps: Sequence[int] = (),
    gradient_path: str = "adt",
) -> SimulatedInference:
    """Runs the sampler from `start_index` to the end exactly as the standard pipeline would (Algorithm 1).

    Latents and guidance stay in float32 whatever the network computes in, since some schedulers would otherwise cast
    the latents to its dtype at every step.

    Args:
        predict: `predict(model_input, timestep, branches)` runs the network, which the caller has put in `eval()`.
            `branches` is `(0, 1)` (unconditional and conditional rows, in this order), `(0,)` or `(1,)`;
            `model_input` has `len(branches) * B` rows; the result has its shape.
        scheduler: a scheduler that `check_scheduler` accepts, after `set_timesteps`; it is not changed. With its
            timesteps on the CPU, the rollout reads nothing back from the device of the latents.
        latents: (B, C, h, w), in the scheduler's coordinates, as `starting_latents` makes them.
        start_index: `i_0`.
        guidance_scale: guidance is on where it exceeds 1, as in the pipelines.
        guidance_rescale: see `classifier_free_guidance`.
        train_steps: indices of the steps that send a gradient, as `select_train_steps` chooses them.
        gradient_path: see `constrained_step`.

    Returns:
        `SimulatedInference`, whose `latents` are `x_N` (the estimate of `x_0`), float32, attached to the leaves of
        `train_steps`.
    """

    def predict_one(model_input, timestep, branches, active):
        return predict(model_input, timestep, branches)

    start = Start(latents, start_index, train_steps)
    return simulate_together(predict_one, scheduler, [start], guidance_scale, guidance_rescale, gradient_path)[0]


@dataclass
class Start:
    """Where one of the rollouts of `simulate_together` starts; as the arguments of `simulate_inference`."""

    latents: torch.Tensor
    start_index: int
    train_steps: Sequence[int] = ()


def simulate_together(
    predict: Callable[[torch.Tensor, torch.Tensor, tuple[int, ...], list[int]], torch.Tensor],
    scheduler,
    starts: Sequence[Start],
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    gradient_path: str = "adt",
) -> list[SimulatedInference]:
    """`simulate_inference` from several starts, in one batch that each joins when the path reaches its start index.

    So the network is called once a step, not once a step and start. All else is each rollout's own: its solver, with a
    multistep one's history and its lower order in its first steps, and its guidance. What comes out is what
    `simulate_inference` makes of each start, up to what the network's numerics owe to the size of a batch.

    Args:
        predict: `predict(model_input, timestep, branches, active)`, as `simulate_inference`'s; `active` are the
            indices of the starts that the path has reached, ascending, and `model_input` has `len(branches) * B` rows
            for each of them in turn, `B` its own.
        scheduler, guidance_scale, guidance_rescale, gradient_path: see `simulate_inference`.
        starts: one or more, with latents of one size and device.

    Returns:
        a `SimulatedInference` for each of the starts.
    """
    check_scheduler(scheduler)
    branches = (0, 1) if guidance_scale > 1 else (1,)
    # The network's timesteps are on its device. The schedulers' are on the CPU: DDIM asks for their values six times a
    # step, and each time the CPU would wait for the device.
    timesteps = scheduler.timesteps.cpu()
    device_timesteps = scheduler.timesteps.to(starts[0].latents.device, non_blocking=True)
    rollouts = []
    for start in starts:
        solver = copy.deepcopy(scheduler)  # a multistep solver's history and step index are this rollout's own
        if hasattr(solver, "set_begin_index"):
            solver.set_begin_index(start.start_index)
        solver.timesteps = timesteps
        rollouts.append((start, solver, SimulatedInference(start.latents.float(), [], branches)))

    for index in range(min(start.start_index for start in starts), len(timesteps)):
        active = [n for n, start in enumerate(starts) if start.start_index <= index]
        model_inputs = []
        with torch.no_grad():
            for _, solver, rollout in (rollouts[n] for n in active):
                model_input = torch.cat([rollout.latents] * len(branches))
                if hasattr(solver, "scale_model_input"):
                    model_input = solver.scale_model_input(model_input, timesteps[index])
                model_inputs.append(model_input)
            prediction = predict(torch.cat(model_inputs), device_timesteps[index], branches, active).float()
        predictions = prediction.split([len(model_input) for model_input in model_inputs])
        for n, model_input, prediction in zip(active, model_inputs, predictions, strict=True):
            start, solver, rollout = rollouts[n]
            if index in start.train_steps:
                prediction = prediction.detach().requires_grad_()
                rollout.train_steps.append(TrainStep(index, device_timesteps[index], model_input, prediction))
            guided = prediction
            if len(branches) == 2:
                guided = classifier_free_guidance(prediction, guidance_scale, guidance_rescale)
            rollout.latents = constrained_step(solver, guided, timesteps[index], rollout.latents, gradient_path)

    for start, _, rollout in rollouts:
        if len(rollout.train_steps) != len(set(start.train_steps)):
            raise ValueError(
                f"train_steps {sorted(start.train_steps)} are not all on the path from index {start.start_index}."
            )
    return [rollout for _, _, rollout in rollouts]


class DiffAugment:
    """Differentiable augmentation (https://arxiv.org/abs/2006.10738), a pure function of its drawn parameters.

    `DiffAugment(policy)(images, parameters)` applies color (brightness, saturation, contrast), translation by up to
    1/8 and cutout of a square of half the side, in this order, as far as they are in `policy`. Pixels that come in
    from outside or are cut out are 0, the middle of [-1, 1]; nothing is clamped.

    Args:
        policy: any of `"color"`, `"translation"`, `"cutout"`; empty for none.
    """

    NUM_PARAMETERS = 7
    POLICIES = ("color", "translation", "cutout")

    def __init__(self, policy: Sequence[str] = POLICIES):
        unknown = set(policy) - set(self.POLICIES)
        if unknown:
            raise ValueError(f"Unknown augmentation {sorted(unknown)}: choose from {', '.join(self.POLICIES)}.")
        self.policy = tuple(policy)

    def __call__(self, images, parameters):
        """images: (B, C, H, W) in [-1, 1]; parameters: (B, 7), uniform in [0, 1). Returns (B, C, H, W)."""
        brightness, saturation, contrast, shift_y, shift_x, cut_y, cut_x = parameters.to(images).unbind(1)
        if "color" in self.policy:
            images = self.brightness(images, brightness)
            images = self.saturation(images, saturation)
            images = self.contrast(images, contrast)
        if "translation" in self.policy:
            images = self.translation(images, shift_y, shift_x)
        if "cutout" in self.policy:
            images = self.cutout(images, cut_y, cut_x)
        return images

    @staticmethod
    def brightness(images, u):
        """`x + u - 0.5`; u: (B,)."""
        return images + (u - 0.5).view(-1, 1, 1, 1)

    @staticmethod
    def saturation(images, u):
        """`m_c + 2u (x - m_c)`, m_c the mean over the channels; u: (B,)."""
        mean = images.mean(dim=1, keepdim=True)
        return mean + 2 * u.view(-1, 1, 1, 1) * (images - mean)

    @staticmethod
    def contrast(images, u):
        """`m + (u + 0.5)(x - m)`, m the mean over the image; u: (B,)."""
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        return mean + (u + 0.5).view(-1, 1, 1, 1) * (images - mean)

    @staticmethod
    def translation(images, u_y, u_x):
        """Shifts by a whole number of pixels, uniform in [-side/8, side/8] on each axis; u: (B,)."""
        for dim, u in ((2, u_y), (3, u_x)):
            size = images.shape[dim]
            reach = int(size / 8 + 0.5)
            shift = (u * (2 * reach + 1)).floor().long() - reach
            source = torch.arange(size, device=images.device) - shift[:, None]  # (B, size)
            inside = (source >= 0) & (source < size)
            view = (-1, 1, size, 1) if dim == 2 else (-1, 1, 1, size)
            index = source.clamp(0, size - 1).view(view).expand_as(images)
            images = images.gather(dim, index) * inside.view(view)
        return images

    @staticmethod
    def cutout(images, u_y, u_x):
        """Zeroes a rectangle of half the sides; its centre is uniform over the image, so its edge may lie outside."""
        masks = []
        for dim, u in ((2, u_y), (3, u_x)):
            size = images.shape[dim]
            cut = int(size * 0.5 + 0.5)
            first = (u * (size + 1 - cut % 2)).floor().long() - cut // 2
            position = torch.arange(size, device=images.device)
            masks.append((position >= first[:, None]) & (position < first[:, None] + cut))
        cut_away = masks[0][:, None, :, None] & masks[1][:, None, None, :]
        return images * ~cut_away


class FeatureNetwork(nn.Module):
    """`F`: a frozen `transformers.Dinov2Model`, and the image path that leads into it.

    Args:
        model: the `Dinov2Model`; it is frozen and stays in `eval()`.
        layers: indices of the blocks whose outputs are used, without the final LayerNorm; -1 is the patch embedding.
        resolution: images are resized to this side, a multiple of the model's patch size, before they enter; ones
            that are not square to about as many pixels, see `input_size`.

    Raises:
        ValueError: for a layer that the model lacks or a resolution that its patches do not divide.
    """

    IMAGENET_MEAN = (0.485, 0.456, 0.406)
    IMAGENET_STD = (0.229, 0.224, 0.225)

    def __init__(self, model, layers: Sequence[int] = (-1, 2, 5, 8, 11), resolution: int = 518):
        super().__init__()
        self.check_config(model.config, layers, resolution)
        self.model = model.requires_grad_(False).eval()
        self.layers = tuple(layers)
        self.resolution = resolution
        self.register_buffer("mean", torch.tensor(self.IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    @staticmethod
    def check_config(config, layers, resolution) -> None:
        """Raises `ValueError`, before any weight is loaded, where `layers` or `resolution` do not suit `config`."""
        if config.model_type != "dinov2":
            raise ValueError(f"The discriminator's feature network must be a DINOv2 model, not '{config.model_type}'.")
        depth, patch = config.num_hidden_layers, config.patch_size
        missing = [layer for layer in layers if not -1 <= layer < depth]
        if missing:
            raise ValueError(
                f"discriminator_layers {missing}: the feature network has blocks 0 to {depth - 1}, and -1 for its "
                "patch embedding."
            )
        if len(set(layers)) != len(layers) or not layers:
            raise ValueError(f"discriminator_layers {list(layers)} must name each layer once, and at least one.")
        if resolution % patch or resolution < 2 * patch:
            raise ValueError(
                f"discriminator_resolution {resolution} is not a multiple of the feature network's patch size {patch} "
                "that holds at least two patches a side."
            )

    @property
    def channels(self) -> int:
        return self.model.config.hidden_size

    def train(self, mode: bool = True):
        return super().train(False)

    def input_size(self, height, width) -> tuple[int, int]:
        """What images are resized to: of about their shape and `resolution ** 2` pixels, in whole patches."""
        patch, stretch = self.model.config.patch_size, (height / width) ** 0.5
        sides = (self.resolution * stretch, self.resolution / stretch)
        return tuple(max(2, round(side / patch)) * patch for side in sides)

    def run_model(self, images, **options):
        size = self.input_size(*images.shape[-2:])
        if images.shape[-2:] != size:
            # Antialiased: plain bilinear would read, and send gradient to, a part of the pixels only.
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        return self.model(pixel_values=((images + 1) / 2 - self.mean) / self.std, **options)

    def forward(self, images) -> list[torch.Tensor]:
        """images: (B, 3, H, W) in [-1, 1]. Returns one (B, C, L) float32 tensor a layer.

        The CLS token is added to every patch token and dropped.
        """
        hidden_states = self.run_model(images, output_hidden_states=True).hidden_states
        features = [hidden_states[layer + 1].float() for layer in self.layers]
        return [(tokens[:, 1:] + tokens[:, :1]).transpose(1, 2) for tokens in features]

    def embed(self, images) -> torch.Tensor:
        """images: (B, 3, H, W) in [-1, 1]. Returns DINOv2's embedding of each, its last CLS token, (B, C) float32."""
        return self.run_model(images).pooler_output.float()


def largest_group(batch_size: int, limit: int = 8) -> int:
    """The largest divisor of `batch_size` that is at most `limit`: the default group of `LocalBatchNorm`."""
    return max(size for size in range(1, min(batch_size, limit) + 1) if batch_size % size == 0)


class LocalBatchNorm(nn.Module):
    """Batch norm over groups of consecutive samples and all their tokens, without running statistics.

    Args:
        channels: C.
        group_size: samples to a group; `None` for `largest_group` of each batch. The same group on more processes
            gives the same result.
    """

    def __init__(self, channels: int, group_size: Optional[int] = None, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.group_size = group_size
        self.eps = eps

    def forward(self, x):
        """x: (B, C, L). Returns (B, C, L). Raises `ValueError` if the group size does not divide B."""
        batch_size, channels, length = x.shape
        group_size = self.group_size or largest_group(batch_size)
        if batch_size % group_size:
            raise ValueError(f"The discriminator's norm group {group_size} does not divide the batch of {batch_size}.")
        groups = x.reshape(-1, group_size, channels, length)
        variance, mean = torch.var_mean(groups, dim=(1, 3), keepdim=True, correction=0)
        x = ((groups - mean) * torch.rsqrt(variance + self.eps)).reshape(x.shape)
        return x * self.weight[:, None] + self.bias[:, None]


class ResidualBlock(nn.Module):
    """`(f(x) + x) / sqrt(2)`."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x):
        return (self.block(x) + x) / 2**0.5


def discriminator_head(in_channels: int, out_channels: int, norm_group: Optional[int] = None) -> nn.Sequential:
    """`h`, or `q` with `in_channels = out_channels = 64`: maps (B, in_channels, L) to (B, out_channels, L).

    The residual block's kernel spans 9 tokens, with circular padding, so L must be at least 4.
    """

    def convolution(channels, kernel_size):
        padding = {"padding": kernel_size // 2, "padding_mode": "circular"} if kernel_size > 1 else {}
        return spectral_norm(nn.Conv1d(in_channels, channels, kernel_size, **padding))

    def block(kernel_size):
        return nn.Sequential(
            convolution(in_channels, kernel_size), LocalBatchNorm(in_channels, norm_group), nn.LeakyReLU(0.2)
        )

    return nn.Sequential(block(1), ResidualBlock(block(9)), convolution(out_channels, 1))


@torch.no_grad()
def update_spectral_norm(module: nn.Module) -> None:
    """One power iteration for each spectral-norm weight of `module`, which is left in `eval()`.

    In `train()` every forward would iterate, so that real and fake images would see different weights and the result
    would depend on the number of micro-batches. Train in `eval()` and call this once before each update.
    """
    for layer in module.modules():
        if is_parametrized(layer, "weight") and layer.parametrizations.weight.original.requires_grad:
            layer.train()
            _ = layer.weight  # computing the weight in train() is what iterates
    module.eval()


class SiameseDiscriminator(nn.Module):
    """`D(y, y_ref) = sim(q(h(F(T(y)))), sg(h'(F(T'(y_ref)))))` on the features of `FeatureNetwork` (equation 6).

    The heads `h` and predictors `q` train; the twin heads `h'` follow the heads by `update_twin`. Everything is
    computed in float32, under autocast too: a cosine in bfloat16 has two digits.

    Args:
        channels: C of the features.
        num_layers: how many feature layers there are, one head, predictor and twin for each.
        similarity: `"cosine"` (in [-1, 1], where the hinge is linear) or `"dot"` (divided by sqrt(64), where the
            margin acts, on each token as in `ProjectedDiscriminator`).
        reduction: `"token"` averages the similarities over tokens; `"pooled"` averages the outputs over tokens before
            the similarity.
        ema_decay: of the twin.
        norm_group: see `LocalBatchNorm`.
    """

    OUT_CHANNELS = 64

    def __init__(
        self,
        channels: int,
        num_layers: int,
        similarity: str = "cosine",
        reduction: str = "token",
        ema_decay: float = 0.99,
        norm_group: Optional[int] = None,
    ):
        super().__init__()
        if similarity not in ("cosine", "dot"):
            raise ValueError(f"Unknown similarity '{similarity}': choose from cosine, dot.")
        if reduction not in ("token", "pooled"):
            raise ValueError(f"Unknown reduction '{reduction}': choose from token, pooled.")
        self.similarity, self.reduction, self.ema_decay = similarity, reduction, ema_decay
        width = self.OUT_CHANNELS
        self.heads = nn.ModuleList(discriminator_head(channels, width, norm_group) for _ in range(num_layers))
        self.predictors = nn.ModuleList(discriminator_head(width, width, norm_group) for _ in range(num_layers))
        self.twin_heads = nn.ModuleList(discriminator_head(channels, width, norm_group) for _ in range(num_layers))
        self.twin_heads.load_state_dict(self.heads.state_dict())
        self.twin_heads.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        super().train(mode)
        self.twin_heads.eval()  # its spectral-norm vectors are copies and must not iterate on their own
        return self

    def forward(self, features, reference_features):
        """features, reference_features: lists of (B, C, L), of the scored and of the reference images.

        Returns the mean over layers and tokens of a cosine, (B,). Products are not averaged, (B, layers * L), or
        (B, layers) with `"pooled"`: a mean would let the hinge's margin act on the sum of tokens alone.
        """
        similarities = []
        with torch.autocast(features[0].device.type, enabled=False):
            for head, predictor, twin, x, reference in zip(
                self.heads, self.predictors, self.twin_heads, features, reference_features, strict=True
            ):
                output = predictor(head(x.float()))
                with torch.no_grad():
                    target = twin(reference.float())
                if self.reduction == "pooled":
                    output, target = output.mean(dim=2, keepdim=True), target.mean(dim=2, keepdim=True)
                if self.similarity == "cosine":
                    # The gradient of a cosine grows as one over the norm; eps bounds it at a zero vector.
                    similarities.append(F.cosine_similarity(output, target, dim=1, eps=1e-6).mean(dim=1))
                else:
                    similarities.append((output * target).sum(dim=1) / self.OUT_CHANNELS**0.5)
        if self.similarity == "dot":
            return torch.cat(similarities, dim=1)
        return torch.stack(similarities).mean(dim=0)

    @torch.no_grad()
    def update_twin(self) -> None:
        """`h' <- decay h' + (1 - decay) h` for the parameters; the spectral-norm vectors are copied."""
        for twin, parameter in zip(self.twin_heads.parameters(), self.heads.parameters(), strict=True):
            twin.mul_(self.ema_decay).add_(parameter, alpha=1 - self.ema_decay)
        for twin, buffer in zip(self.twin_heads.buffers(), self.heads.buffers(), strict=True):
            twin.copy_(buffer)


class ProjectedDiscriminator(nn.Module):
    """The single-score variant for the ablation: a plain score for each token, no twin, no reference.

    Args: see `SiameseDiscriminator`.
    """

    def __init__(self, channels: int, num_layers: int, norm_group: Optional[int] = None):
        super().__init__()
        self.heads = nn.ModuleList(discriminator_head(channels, 1, norm_group) for _ in range(num_layers))

    def forward(self, features, reference_features=None):
        """features: list of (B, C, L). Returns (B, layers * L). `reference_features` is not looked at."""
        with torch.autocast(features[0].device.type, enabled=False):
            return torch.cat([head(x.float()).flatten(1) for head, x in zip(self.heads, features, strict=True)], dim=1)


def mismatched_partners(captions) -> Optional[list[int]]:
    """For each image of a batch another one, whose caption differs: the next, and behind the last the first again.

    Args:
        captions: a list of B strings.

    Returns:
        B indices; None where all captions are equal, so that no pair of the batch is known to be a mismatch.
    """
    count = len(captions)
    if len(set(captions)) < 2:
        return None
    following = [[(n + step) % count for step in range(1, count)] for n in range(count)]
    return [next(m for m in others if captions[m] != captions[n]) for n, others in enumerate(following)]


def discriminator_loss(real_scores=None, fake_scores=None, mismatched_scores=None):
    """`E[max(0, 1 - D(y, y))] + E[max(0, 1 + D(sg(y_hat), y))]` (equation 9); 0-d.

    The terms may be asked for one at a time, since real and fake images go through the discriminator in forwards of
    their own, and each forward's backward comes before the next forward under data parallelism.

    `mismatched_scores` are of real images against other images' references, and add `E[max(0, 1 + D(y_i, y_j))]`. The
    paper has no such term: without one, telling real from generated, whatever the reference, is enough.
    """
    terms = []
    if real_scores is not None:
        terms.append(F.relu(1 - real_scores).mean())
    for scores in (fake_scores, mismatched_scores):
        if scores is not None:
            terms.append(F.relu(1 + scores).mean())
    if not terms:
        raise ValueError("discriminator_loss needs real_scores, fake_scores or mismatched_scores.")
    return sum(terms)


def generator_loss(fake_scores):
    """`-E[D(y_hat, y)]`, the adversarial part of the generator's loss (equation 8, first line); 0-d."""
    return -fake_scores.mean()

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
"""ADT's constrained path for any text-to-image pipeline of diffusers. Needs `adt_utils.py` beside it.

    pipeline = DiffusionPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")
    pipeline.transformer.enable_gradient_checkpointing()
    tunable = ConstrainedPipeline(pipeline, num_gradient_steps=3)
    images = tunable(prompt, num_inference_steps=28, guidance_scale=3.5)  # (B, 3, H, W) in about [-1, 1], attached
    tunable.backward(my_loss(images))  # gradients in pipeline.transformer

The pipeline's own, unchanged `__call__` runs. For its duration the denoiser is a stand-in that runs without gradient
and makes its output at K chosen steps a leaf, and the scheduler takes `adt_utils.constrained_step`; guidance, packing
and shifts are the pipeline's own arithmetic, which autograd follows from the leaves. The backward replays one call of
the denoiser at a time.
"""

import contextlib
import copy
import functools
import inspect
import re
import weakref
from dataclasses import dataclass
from typing import Optional, Sequence

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only


if __package__:  # loaded by diffusers from a folder or the Hub
    from .adt_utils import (
        GRADIENT_PATHS,
        check_scheduler,
        constrained_step,
        select_train_steps,
        signal_and_noise_levels,
    )
else:
    import adt_utils as utils  # with `from`, diffusers would tell users of a package to install it

    GRADIENT_PATHS, check_scheduler, constrained_step = (
        utils.GRADIENT_PATHS,
        utils.check_scheduler,
        utils.constrained_step,
    )
    select_train_steps, signal_and_noise_levels = utils.select_train_steps, utils.signal_and_noise_levels


# What a call of the denoiser may be given: of these a replay finds again what was there.
PLAIN = (torch.Tensor, torch.dtype, torch.device, bool, int, float, str, type(None))
DENOISERS = ("unet", "transformer")


def find_denoiser(pipeline) -> str:
    """The name of the one component through which the path goes, `"unet"` or `"transformer"`; else `ValueError`."""
    name = type(pipeline).__name__
    if not isinstance(pipeline, (DiffusionPipeline, ModularPipeline)):
        raise ValueError(f"{name} is not a pipeline of diffusers.")
    stages = [part for part in pipeline.components if re.search(r"unet|transformer|prior|^decoder$", part)]
    if len(stages) > 1:
        raise ValueError(f"{name} samples by {', '.join(stages)}: the path goes through one denoiser alone.")
    if not stages or stages[0] not in DENOISERS or getattr(pipeline, stages[0]) is None:
        raise ValueError(f"{name} has no denoiser: none of its components is a {' or a '.join(DENOISERS)}.")
    return stages[0]


def check_components(pipeline) -> None:
    """Raises `ValueError`, in one sentence, where the path does not hold for what `pipeline` is made of."""
    name, components = type(pipeline).__name__, pipeline.components
    find_denoiser(pipeline)
    check_scheduler(pipeline.scheduler)
    if components.get("safety_checker") is not None:
        raise ValueError(f"{name} would black out images that the loss needs; load it with safety_checker=None.")
    if getattr(pipeline, "watermark", None) is not None:
        raise ValueError(f"{name} would mark its images outside of PyTorch; load it with add_watermarker=False.")
    vae = components.get("vae")
    if vae is not None and vae.dtype == torch.float16 and vae.config.get("force_upcast", False):
        raise ValueError(f"{name} would cast its VAE back and forth between float16 and float32; load it in float32.")
    for part, component in components.items():
        for module in component.modules() if isinstance(component, nn.Module) else ():
            if hasattr(module, "_hf_hook"):
                raise ValueError(f"{name}'s {part} is offloaded, or spread over devices: its weights would have left.")
            registry = getattr(module, "_diffusers_hook", None)
            if registry is not None and registry.hooks:
                raise ValueError(
                    f"{name}'s {part} has hooks of diffusers ({', '.join(registry.hooks)}), under which a replay need "
                    "not repeat the call."
                )


def check_pipeline(pipeline) -> None:
    """Raises `ValueError`, in one sentence, where `pipeline` cannot be sent a gradient as it is."""
    name = type(pipeline).__name__
    find_denoiser(pipeline)
    if not hasattr(type(pipeline).__call__, "__wrapped__"):
        raise ValueError(f"{name}.__call__ is not wrapped in torch.no_grad, as diffusers' own pipelines are.")
    if any(base.__name__ == "PAGMixin" for base in type(pipeline).__mro__):
        raise ValueError(f"{name} puts other attention processors into its denoiser for the time of a call.")
    if not hasattr(pipeline, "image_processor"):
        raise ValueError(f"{name} has no image_processor, so where its images leave the decoder is not known.")
    check_components(pipeline)


@dataclass
class Start:
    """Where an image-to-image call started, `x_{i_0} = alpha x_0 + sigma eps`.

    The tensors are in the layout in which the scheduler sees the latents, the packed one where the pipeline packs.
    """

    index: int  # i_0
    timestep: torch.Tensor  # 0-d
    latents: torch.Tensor  # x_0
    noise: torch.Tensor  # eps
    levels: tuple[float, float]  # alpha and sigma, in the network's coordinates
    target: torch.Tensor  # what the scheduler's `model_output` should be there: the noise, or a velocity


@dataclass(eq=False)
class KeptCall:
    """One call of the denoiser at a chosen step; nothing of it is larger than the denoiser's inputs and outputs."""

    index: int  # of the step
    arguments: tuple  # (args, kwargs), detached, by reference
    versions: list[int]  # of their tensors, before the call
    leaves: list[torch.Tensor]  # at least float32, one for each floating tensor that the call returned
    weight_versions: list[int]
    autocast: functools.partial


class Gradients(dict):
    """`{KeptCall: vectors}` of `ConstrainedPipeline.gradients`.

    Attributes:
        norm_squared: of the gradients to what the scheduler was given at the chosen steps, the guided predictions,
            summed over the steps; a 0-d tensor. With guidance the gradients to its branches partly cancel in the
            parameters, so that this measures an update better than the vectors do.
    """


class FirstStep(Exception):
    """Ends a pipeline's call at its first step, which was given this prediction."""


def versions(tree) -> list[int]:
    return [leaf._version for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def detached(tree):
    return tree_map_only(torch.Tensor, torch.Tensor.detach, tree)


def in_float32(tensor):
    """In float32, or in float64 as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def floating_leaves(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


@contextlib.contextmanager
def evaluating(network):
    """`network` in `eval()`, so that no dropout makes rollout and replay differ; its modules' modes afterwards."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class StandIn(nn.Module):
    """The pipeline's denoiser during a call: `record(args, kwargs)` is called in its place."""

    def __init__(self, denoiser, record):
        super().__init__()
        self.denoiser, self.record = denoiser, record

    def __getattr__(self, name):
        modules = self.__dict__["_modules"]
        return modules[name] if name in modules else getattr(modules["denoiser"], name)

    def forward(self, *args, **kwargs):
        return self.record(args, kwargs)


class Call:
    """One call of a pipeline: its steps are counted, and what the chosen ones need for the replay is kept."""

    def __init__(self, tunable, train_steps, start_index=None, first_alone=False):
        self.tunable, self.network, self.train_steps = tunable, tunable.network, train_steps
        self.start_index, self.first_alone = start_index, first_alone
        self.scheduler = copy.deepcopy(tunable.pipeline.scheduler)
        self.index, self.timestep, self.noised, self.start, self.kept = None, None, None, None, []
        self.predictions = []  # what the scheduler was given at the chosen steps

    @contextlib.contextmanager
    def installed(self):
        """The stand-ins are the pipeline's while this lasts; its own components are not changed.

        The denoiser is in `eval()`, but for a call that ends at its first step, which a diffusion loss is made of.
        """
        pipeline, name = self.tunable.pipeline, self.tunable.name
        processor = copy.copy(pipeline.image_processor)
        processor.postprocess = lambda image, *args, **kwargs: image
        own = {part: pipeline.__dict__[part] for part in (name, "scheduler", "image_processor")}
        # Not by setattr, which would write what the stand-ins are into the pipeline's config.
        pipeline.__dict__ |= {
            name: StandIn(own[name], self.denoise),
            "scheduler": self.constrained_scheduler(),
            "image_processor": processor,
        }
        # What a ControlNet returns is the denoiser's input, through which no gradient goes: it need not keep a graph.
        others = [part for name, part in pipeline.components.items() if name not in (self.tunable.name, "vae")]
        hooks = [
            part.register_forward_pre_hook(lambda module, *inputs: detached(inputs), with_kwargs=True)
            for part in others
            if isinstance(part, nn.Module)
        ]
        try:
            with contextlib.nullcontext() if self.first_alone else evaluating(self.network):
                yield
        finally:
            pipeline.__dict__ |= own
            for hook in hooks:
                hook.remove()

    def constrained_scheduler(self):
        """One with the state of `self.scheduler` and of its class, whose steps are constrained."""
        # A proxy, since a class lives until the garbage collector comes.
        call, base = weakref.proxy(self), type(self.scheduler)

        @functools.wraps(base.step)  # the pipelines ask for its signature
        def step(face, model_output, timestep, sample, *args, return_dict=True, **kwargs):
            given = {name: value for name, value in kwargs.items() if name != "generator"}
            unknown = [name for name, value in given.items() if torch.is_tensor(value) or value]
            if args or unknown:
                raise ValueError(
                    f"The constrained path does not hold for {base.__name__}.step with {', '.join(unknown) or args}."
                )
            sample = call.step(model_output, timestep, sample)
            return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)

        def scale_model_input(face, sample, timestep=None, *args, **kwargs):
            call.timestep = timestep
            return base.scale_model_input(face, sample, timestep, *args, **kwargs)

        def add_noise(face, original_samples, noise, timesteps):
            return call.note_noise(original_samples, noise, base.add_noise(face, original_samples, noise, timesteps))

        def scale_noise(face, sample, timestep, noise=None):
            return call.note_noise(sample, noise, base.scale_noise(face, sample, timestep, noise))

        methods = {method.__name__: method for method in (step, scale_model_input, add_noise, scale_noise)}
        face_class = type(base.__name__, (base,), {name: methods[name] for name in methods if hasattr(base, name)})
        face = object.__new__(face_class)
        face.__dict__ = self.scheduler.__dict__
        return face

    def begin(self):
        """At the first call of the denoiser, when the schedule and the start are known: chooses the train steps."""
        scheduler, tunable = self.scheduler, self.tunable
        self.index = getattr(scheduler, "begin_index", None) or 0
        if getattr(scheduler, "begin_index", None) is None and self.timestep is not None:
            self.index = (scheduler.timesteps == self.timestep).nonzero()[0].item()
        path = range(self.index, len(scheduler.timesteps))
        if self.start_index not in (None, self.index):
            raise ValueError(
                f"{type(tunable.pipeline).__name__} starts at step {self.index} where start_index is "
                f"{self.start_index}."
            )
        if not torch.is_grad_enabled() or self.first_alone:
            self.train_steps = ()
        elif self.train_steps is None:
            self.train_steps = select_train_steps(path.start, path.stop, tunable.num_gradient_steps, tunable.generator)
        elif not set(self.train_steps) <= set(path):
            raise ValueError(
                f"train_steps {sorted(self.train_steps)} are not all on the path, {path.start} to {path.stop - 1}."
            )

    def denoise(self, args, kwargs):
        """The stand-in's call: without gradient, and at a chosen step with leaves for its floating outputs."""
        if self.index is None:
            self.begin()
        arguments, chosen = detached((args, kwargs)), self.index in self.train_steps
        before = None
        if self.first_alone:
            return self.network(*arguments[0], **arguments[1])
        if chosen:
            self.check_arguments(arguments)
            before = versions(arguments)
        with torch.no_grad():
            output = self.network(*arguments[0], **arguments[1])
        if not chosen:
            return output
        device, leaves = next(self.network.parameters()).device.type, []

        def leaf(tensor):
            if not tensor.is_floating_point():
                return tensor
            leaves.append(in_float32(tensor.detach()).requires_grad_())
            return leaves[-1].to(tensor.dtype, copy=True)  # a copy, since a pipeline may write into what it gets

        autocast = functools.partial(
            torch.autocast, device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)
        )
        output = tree_map_only(torch.Tensor, leaf, output)
        weights = versions(list(self.network.parameters()))
        self.kept.append(KeptCall(self.index, arguments, before, leaves, weights, autocast))
        return output

    def check_arguments(self, arguments):
        """Refuses what a replay would not find again as the call had it."""
        name = type(self.tunable.pipeline).__name__
        for value in tree_leaves(arguments):
            if not isinstance(value, PLAIN):
                raise ValueError(
                    f"{name} hands its denoiser a {type(value).__name__}, whose state a replay would lack."
                )
            if isinstance(value, torch.Tensor) and value.is_inference():
                raise ValueError(f"{name} was given a tensor made under torch.inference_mode; use torch.no_grad.")
        options = (value for key, value in arguments[1].items() if key.endswith("attention_kwargs") and value)
        if any(own.get("scale", 1.0) != 1.0 for own in options):
            if getattr(self.tunable.denoiser, "is_gradient_checkpointing", False):
                raise ValueError(
                    "diffusers recomputes a checkpointed call without its adapters' scale: set it by set_adapters."
                )

    def step(self, model_output, timestep, sample):
        if self.noised is not None and self.start is None:
            self.start = self.make_start(timestep, sample)
        if self.first_alone:
            raise FirstStep(model_output)
        if self.index in self.train_steps:
            self.predictions.append(model_output)
        self.index += 1
        return constrained_step(self.scheduler, model_output, timestep, sample, self.tunable.gradient_path)

    def note_noise(self, latents, noise, noised):
        """The first mixture of an image's latents and noise, from which the path starts."""
        if self.noised is not None or self.index is not None or not torch.is_grad_enabled():
            return noised
        self.noised = (latents, noise, noised.detach().requires_grad_())
        return self.noised[2]

    def make_start(self, timestep, sample) -> Start:
        """`Start`, brought into the layout of `sample`, which the pipeline made of the noised latents."""
        latents, noise, noised = self.noised
        # The layout is a linear map, and this is its derivative: that of the transposed one's.
        vector = torch.zeros_like(sample, requires_grad=True)
        (transposed,) = torch.autograd.grad(sample, noised, vector, create_graph=True)

        def arrange(tensor):
            return torch.autograd.grad(transposed, vector, tensor.to(noised), retain_graph=True)[0]

        if not torch.equal(arrange(noised.detach()), sample):
            raise ValueError(f"{type(self.tunable.pipeline).__name__} changes its start by more than its layout.")
        latents, noise = arrange(latents.expand_as(noised)), arrange(noise)
        alpha, sigma = signal_and_noise_levels(self.scheduler, self.index)
        target = {
            "epsilon": lambda: noise,
            "v_prediction": lambda: alpha * noise - sigma * latents,
            "flow_prediction": lambda: noise - latents,
            "sample": lambda: latents,
        }[self.scheduler.config.get("prediction_type", "flow_prediction")]()
        return Start(self.index, timestep, latents, noise, (alpha, sigma), target)


class ConstrainedPipeline:
    """A text-to-image or image-to-image pipeline of diffusers whose images can be sent a gradient.

    Everything of the pipeline but its denoiser is frozen (`requires_grad_(False)`).

    Args:
        pipeline: a `DiffusionPipeline` with one denoiser and a scheduler that `adt_utils.check_scheduler` accepts.
            Which parameters of the denoiser get a gradient is said by their `requires_grad`, as always.
        num_gradient_steps: K, the steps that send a gradient; `adt_utils.select_train_steps` chooses them.
        gradient_path: `"adt"` or `"drtune"`, see `adt_utils.constrained_step`.
        network: what `accelerator.prepare` made of the pipeline's denoiser, which is then called in its place.
        generator: CPU `torch.Generator` for the choice of the steps. Data parallel processes may choose differently.

    Attributes:
        start: `Start` of the last call, where it started from an image; else None.

    Raises:
        ValueError: for what cannot work, see `check`.
    """

    check = staticmethod(check_pipeline)

    def __init__(self, pipeline, num_gradient_steps=3, gradient_path="adt", network=None, generator=None):
        self.check(pipeline)
        if not isinstance(num_gradient_steps, int) or num_gradient_steps < 1:
            raise ValueError(f"num_gradient_steps must be a whole number of at least 1, not {num_gradient_steps}.")
        if gradient_path not in GRADIENT_PATHS:
            raise ValueError(f"Unknown gradient path '{gradient_path}': choose from {', '.join(GRADIENT_PATHS)}.")
        self.pipeline, self.name = pipeline, find_denoiser(pipeline)
        self.num_gradient_steps, self.gradient_path, self.generator = num_gradient_steps, gradient_path, generator
        self.wrapped, self.start = network, None
        self.check_network()
        # A call lives as long as a graph that leads to its leaves, so that images without a backward cost nothing.
        self.alive = weakref.WeakSet()
        for part, component in pipeline.components.items():
            if isinstance(component, nn.Module) and part != self.name:
                component.requires_grad_(False)

    @property
    def denoiser(self):
        return getattr(self.pipeline, self.name)

    @property
    def network(self):
        """What is called as the denoiser: `network` where it was given."""
        return self.denoiser if self.wrapped is None else self.wrapped

    def check_network(self):
        network = self.wrapped
        modules = network.modules() if isinstance(network, nn.Module) else ()
        if network is not None and all(module is not self.denoiser for module in modules):
            raise ValueError(f"network is not the pipeline's {self.name}, nor wrapped around it.")

    def __call__(
        self, *args, train_steps: Optional[Sequence[int]] = None, start_index: Optional[int] = None, **kwargs
    ):
        """Calls the pipeline with its own arguments; under `torch.no_grad` nothing is kept for a backward.

        Args:
            train_steps: the indices of the steps that send a gradient, in place of K chosen ones.
            start_index: of an image-to-image pipeline, the step at which it starts, in place of `strength`.
            output_type: `"pt"`, the default here, or `"latent"`.

        Returns:
            (B, 3, H, W) in about [-1, 1], not clamped, attached: `(x / 2 + 0.5).clamp(0, 1)` is the pipeline's own
            `output_type="pt"`, bit for bit. With `output_type="latent"` the latents that the pipeline returns.

        Raises:
            ValueError: for a pipeline or arguments for which the path does not hold, before the denoiser is first
                called, or where the scheduler first is.
        """
        if kwargs.get("output_type", "pt") not in ("pt", "latent"):
            raise ValueError(f"output_type must be 'pt' or 'latent', not '{kwargs['output_type']}'.")
        if kwargs.get("denoising_end") is not None:
            raise ValueError("denoising_end would end the path before its last steps.")
        if train_steps is not None and (isinstance(train_steps, int) or not train_steps):
            raise ValueError(f"train_steps must be a list of steps, not {train_steps}.")
        return self.record(lambda: self.run_pipeline(args, kwargs, start_index), train_steps, start_index)

    def run_pipeline(self, args, kwargs, start_index):
        options = {"output_type": "pt", **kwargs, "return_dict": False}
        if start_index is not None:
            options["strength"] = self.find_strength(start_index, kwargs)
        return type(self.pipeline).__call__.__wrapped__(self.pipeline, *args, **options)[0]

    def find_strength(self, start_index, options) -> float:
        """The `strength` of which the pipeline's own arithmetic makes the step `start_index`.

        The pipelines round `strength` times N in different ways, and not every whole number is such a product: the
        middle between two of them is asked for, above or below.
        """
        pipeline, name = self.pipeline, type(self.pipeline).__name__
        accepted = inspect.signature(pipeline.__call__).parameters
        if "strength" not in accepted or not hasattr(pipeline, "get_timesteps"):
            raise ValueError(f"{name} has no image-to-image form that starts on its path: there is no start_index.")
        if "strength" in options:
            raise ValueError("Give either start_index or strength.")
        steps = options.get("num_inference_steps", accepted["num_inference_steps"].default)
        if not 0 <= start_index < steps:
            raise ValueError(f"start_index must be in [0, {steps - 1}], not {start_index}.")
        remaining = steps - start_index
        for strength in ((remaining - 0.5) / steps, min(1.0, (remaining + 0.5) / steps)):
            if pipeline.get_timesteps(steps, strength, pipeline._execution_device)[1] == remaining:
                return strength
        raise ValueError(f"No strength has {name} start at step {start_index} of {steps}.")

    def start_prediction(self, *args, start_index: Optional[int] = None, **kwargs) -> tuple[torch.Tensor, Start]:
        """What the pipeline hands its scheduler at the step at which it starts from an image, for a diffusion loss.

        The prediction is attached to the denoiser's parameters as that of any network is: send the loss its own
        `backward()`. The denoiser is in the mode that it is in. Arguments as in a call; without guidance (of which the
        pipeline's own arguments decide) it is the conditional prediction.

        Returns:
            the prediction, in the layout and the convention of `Start.target`, and the start, whose `target` it
            should equal.

        Raises:
            ValueError: as a call does, under `torch.no_grad`, and where the pipeline starts from no image.
        """
        if not torch.is_grad_enabled():
            raise ValueError("start_prediction is for a loss with gradient, and is called under torch.no_grad.")
        self.check_tunable()
        call = Call(self, None, start_index, first_alone=True)
        try:
            with call.installed():
                self.run_pipeline(args, kwargs, start_index)
        except FirstStep as end:
            (prediction,) = end.args
        self.start = call.start
        if call.start is None:
            raise ValueError(f"{type(self.pipeline).__name__} did not start from an image, so there is no target.")
        return prediction, call.start

    def check_tunable(self):
        self.check(self.pipeline)
        self.check_network()
        if torch.is_grad_enabled() and not any(parameter.requires_grad for parameter in self.network.parameters()):
            raise ValueError(f"No parameter of the pipeline's {self.name} requires a gradient.")

    def record(self, run, train_steps=None, start_index=None):
        """What `run()` returns, the images or latents of one pass through the pipeline's loop, attached."""
        self.check_tunable()
        call = Call(self, train_steps, start_index)
        with call.installed():
            images = run()
        self.start = call.start
        if torch.is_grad_enabled() and not call.train_steps:
            raise ValueError(f"{type(self.pipeline).__name__} runs its own loop without gradient.")
        if {kept.index for kept in call.kept} != set(call.train_steps):
            raise ValueError(f"The pipeline ended before it had come to all of the steps {sorted(call.train_steps)}.")
        if call.kept:
            if not isinstance(images, torch.Tensor) or not images.requires_grad:
                raise ValueError(f"{type(self.pipeline).__name__} computes a part of its path without gradient.")
            images.grad_fn.metadata["call"] = call
            self.alive.add(call)
        return images

    def gradients(self, loss, retain_graph=False) -> Gradients:
        """`dL/dprediction` for the chosen steps of the calls whose images `loss` (0-d) was computed from.

        Frees the graph of `loss` (decoder, reward, solver) unless `retain_graph`. Each call of the denoiser that was
        kept has a list of float32 vectors, one for each floating tensor that it returned, None where the loss does not
        depend on it. Scale and add them as wanted (two losses' norms can be balanced here), and give them to `replay`.

        Raises:
            ValueError: for a loss without gradient to images, or with one to the denoiser's weights by another way.
        """
        kept = [kept for call in self.alive for kept in call.kept]
        leaves = [leaf for one in kept for leaf in one.leaves]
        predictions = [prediction for call in self.alive if call.kept for prediction in call.predictions]
        found, norm_squared = (), 0.0
        if leaves and isinstance(loss, torch.Tensor) and loss.requires_grad:
            weights = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
            found = torch.autograd.grad(
                loss, [*leaves, *predictions, *weights], allow_unused=True, retain_graph=retain_graph
            )
            to_predictions = found[len(leaves) : len(leaves) + len(predictions)]
            norm_squared = sum(vector.float().square().sum() for vector in to_predictions if vector is not None)
            if any(vector is not None for vector in found[len(leaves) + len(predictions) :]):
                raise ValueError(
                    f"A part of the loss leads to the {self.name}'s weights by another way than the images: send it "
                    "its own backward."
                )
            found = iter(found)
        vectors = {one: [next(found) for _ in one.leaves] for one in kept} if found else {}
        vectors = {one: own for one, own in vectors.items() if any(vector is not None for vector in own)}
        if not vectors:
            raise ValueError(
                "The loss has no gradient to images of this pipeline: it must be computed from them, with gradient, "
                "and they can be sent a gradient once."
            )
        gradients = Gradients(vectors)
        gradients.norm_squared = norm_squared
        return gradients

    def replay(self, gradients, accelerator=None) -> None:
        """Adds the gradient that `gradients` make to that of the denoiser's parameters, one kept call at a time.

        Data parallel gradients synchronise in the last pass alone (and there unless the caller's own `no_sync` or
        `accumulate` forbids it). `accelerator`, where given, runs the backward passes, and so divides for accumulation
        and scales under fp16.
        """
        network = self.network
        if accelerator is not None and accelerator.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            raise ValueError(f"Replays under {accelerator.distributed_type.value} have not been tried.")
        for kept in gradients:
            if versions(kept.arguments) != kept.versions:
                raise ValueError("A tensor that the denoiser was given has been written into before its replay.")
            if versions(list(network.parameters())) != kept.weight_versions:
                raise ValueError("The denoiser's weights have changed since the call: run backward before the update.")
        backward = torch.Tensor.backward if accelerator is None else accelerator.backward
        torch.clear_autocast_cache()  # of casts made without gradient, which some versions of PyTorch would use again
        with evaluating(network), torch.enable_grad():
            for n, (kept, vectors) in enumerate(gradients.items()):
                synchronises = n == len(gradients) - 1 or not hasattr(network, "no_sync")
                with contextlib.nullcontext() if synchronises else network.no_sync():
                    args, kwargs = kept.arguments
                    with kept.autocast():
                        outputs = floating_leaves(network(*args, **kwargs))
                    pairs = zip(outputs, vectors, strict=True)
                    backward(sum((in_float32(output) * own).sum() for output, own in pairs if own is not None))
                    del outputs, pairs
        for call in self.alive:
            call.kept = [kept for kept in call.kept if kept not in gradients]

    def backward(self, loss, accelerator=None) -> None:
        """Sends the gradient of `loss` (0-d), computed from images of this pipeline, to the denoiser's parameters."""
        self.replay(self.gradients(loss), accelerator)

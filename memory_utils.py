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
"""What has a run fit a card: other optimizers, gradients applied as they are made, a base in four bits.

- `check_memory_options`: what a machine or a launch cannot do, before any model is loaded;
- `make_library_optimizer`, `weights_to_use`, `optimizer_state_bytes`: the generator's optimizers beside AdamW;
- `FusedBackward`: an update within the last backward;
- `quantization_options`, `keep_norms_in_float32`: what the network is loaded with, and is then.

It knows the options and no run.
"""

import contextlib
from importlib.util import find_spec

import torch
from diffusers import BitsAndBytesConfig
from transformers.optimization import Adafactor

from option_utils import ADTError


# The package of each `--optimizer` that needs one.
LIBRARIES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "adamw_schedulefree": "schedulefree"}


def check_memory_options(args, accelerator):
    """Refuses a package that is missing, and what this machine or launch cannot do.

    Raises:
        ADTError
    """
    needed = {f"--optimizer {args.optimizer}": LIBRARIES.get(args.optimizer)}
    if args.bnb_quantization_config_path is not None:
        needed["--bnb_quantization_config_path"] = "bitsandbytes"
    for flag, library in needed.items():
        if library is not None and find_spec(library) is None:
            raise ADTError(f"{flag} needs {library}: pip install {library}.")
    if args.bnb_quantization_config_path is not None and not has_four_bits(accelerator.device):
        raise ADTError("--bnb_quantization_config_path needs a GPU: diffusers loads no weights in four bits on a CPU.")
    try:
        quantization_options(args, torch.float32, accelerator.device)
    except (TypeError, ValueError) as error:
        raise ADTError(f"--bnb_quantization_config_path is no BitsAndBytesConfig: {error}") from error
    if args.fused_backward_pass and accelerator.num_processes > 1:
        raise ADTError(
            "--fused_backward_pass is for one process: gradients of several are averaged before they are applied."
        )
    if args.fused_backward_pass and accelerator.mixed_precision == "fp16":
        raise ADTError(
            "--fused_backward_pass and --mixed_precision fp16: whether a scaled gradient has overflowed is known when "
            "all have been made; use bf16."
        )


def has_four_bits(device) -> bool:
    """Whether diffusers loads weights in four bits there."""
    return device.type != "cpu"


# Optimizers


def make_library_optimizer(parameters, args) -> torch.optim.Optimizer:
    """The generator's, where `--optimizer` is not torch's AdamW; the learning rate is scheduled as AdamW's is."""
    adam = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.optimizer == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **adam)
    if args.optimizer == "prodigy":
        import prodigyopt

        # As diffusers' scripts have it; without the guard a warm-up's small steps would spoil the estimate.
        return prodigyopt.Prodigy(parameters, **adam, use_bias_correction=True, safeguard_warmup=True)
    if args.optimizer == "adamw_schedulefree":
        import schedulefree

        optimizer = schedulefree.AdamWScheduleFree(parameters, **adam)
        optimizer.train()
        return optimizer
    # Without a first moment, which would be as large as the weights, and with the given learning rate.
    return Adafactor(
        parameters,
        lr=args.learning_rate,
        weight_decay=args.adam_weight_decay,
        scale_parameter=False,
        relative_step=False,
    )


@contextlib.contextmanager
def weights_to_use(optimizer):
    """A context with the weights that an optimizer means to be used, where they are not those that it trains at.

    A schedule-free one's are the average of its steps. The library's way back from them rounds: the weights come back
    from a copy in CPU memory instead, so that a validation leaves the run as it is.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data.copy_(value)


def optimizer_state_bytes(optimizer) -> int:
    """What its state will take once every parameter has been updated."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kind, total = type(optimizer).__name__, 0
    for parameter in parameters:
        size, *shape = parameter.numel(), *parameter.shape
        if kind == "Adafactor" and len(shape) >= 2:  # a row and a column of each matrix
            total += 4 * (size // shape[-1] + size // shape[-2])
        elif kind == "Adafactor":
            total += 4 * size
        elif kind == "AdamW8bit":
            total += 2 * size * (1 if size >= 4096 else 4)  # bitsandbytes keeps small ones in float32
        else:
            total += 4 * size * (4 if kind == "Prodigy" else 2)
    return total


class FusedBackward:
    """Applies each gradient in an update's last backward as soon as it is whole, and frees it.

    An update's gradient is the sum of several backwards': the diffusion loss's and each replay's. Those before the
    last are kept where they are, on the device, or in CPU memory.

    Each weight must have a step of its own: one optimizer, of one group, that makes nothing of all weights together.

    Args:
        optimizer: the library's own, not accelerate's wrapper.
        offload: whether gradients wait in CPU memory for the next backward's.
    """

    def __init__(self, optimizer, offload):
        self.optimizer, self.offload = optimizer, offload
        self.last, self.norms = False, []
        self.buffers, self.waiting = {}, set()  # by parameter: CPU memory, and whose gradients are in it now
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.register_post_accumulate_grad_hook(self.receive)

    @contextlib.contextmanager
    def applying_if(self, last):
        """A context for a forward and its backward; `last` for the last one of an update."""
        self.last = last
        try:
            yield
        finally:
            self.last = False

    def receive(self, parameter):
        """Takes the gradient that a backward has just made."""
        if self.offload:
            self.add_waiting(parameter)
        if self.last:
            self.apply(parameter)
        elif self.offload:
            if parameter not in self.buffers:
                pinned = parameter.device.type == "cuda"
                self.buffers[parameter] = torch.empty_like(parameter.grad, device="cpu", pin_memory=pinned)
            # In the order of the device's stream, as the copy back is.
            self.buffers[parameter].copy_(parameter.grad, non_blocking=True)
            self.waiting.add(parameter)
            parameter.grad = None

    def add_waiting(self, parameter):
        if parameter in self.waiting:
            self.waiting.remove(parameter)
            before = self.buffers[parameter].to(parameter.device, non_blocking=True)
            parameter.grad = before.clone() if parameter.grad is None else parameter.grad.add_(before)

    def apply(self, parameter):
        [group] = self.optimizer.param_groups
        everything, group["params"] = group["params"], [parameter]
        self.norms.append(torch.linalg.vector_norm(parameter.grad))
        self.optimizer.step()
        group["params"] = everything
        parameter.grad = None

    def finish(self) -> torch.Tensor:
        """Ends the update with the weights that had no part in the last backward; returns the gradient's norm, 0-d."""
        for parameter in self.optimizer.param_groups[0]["params"]:
            self.add_waiting(parameter)
            if parameter.grad is not None:
                self.apply(parameter)
        norms, self.norms = self.norms, []
        return torch.linalg.vector_norm(torch.stack(norms))


# A base in four bits


def quantization_options(args, dtype, device) -> dict:
    """What the trained network's `from_pretrained` is given beside the place: nothing without a configuration.

    Args:
        dtype: of the layers that are not quantized, and of the products with those that are.
    """
    config = args.bnb_quantization_config_path
    if config is None:
        return {}
    config = BitsAndBytesConfig(**{"bnb_4bit_compute_dtype": dtype} | config)
    return {"quantization_config": config, "dtype": dtype, "device_map": {"": device}}


def keep_norms_in_float32(network):
    """A layer in four bits gives back the precision that it was given, and on a CPU norms must not be lighter."""
    for module in network.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            module.float()

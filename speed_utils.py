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
"""Faster networks and optimizers, which compute what slower ones do but for rounding.

- `check_compiler`, `compile_blocks`, `compile_whole`, `compile_hidden_states`: `--compile`;
- `use_attention_backend`: `--attention_backend`;
- `fuse_optimizer`: AdamW in one kernel.

It stands on nothing of this project; what it refuses is a `ValueError` with a sentence for the user.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_outputs import BaseModelOutput


# Compiled networks


COMPILE_BACKEND = "inductor"
# A UNet's blocks are one function at three or four sizes; each is compiled for the rollout (both guidance branches,
# without gradient), the replay and the diffusion loss, validation and, in related systems, adapters that are off.
RECOMPILE_LIMIT = 128


def compile_options() -> dict:
    # Sizes are few and come back every iteration. With one kernel for all of them each would be slower.
    return {"backend": COMPILE_BACKEND, "dynamic": False}


def check_compiler(device) -> None:
    """Raises `ValueError` where nothing can be compiled for `device`, as without a C++ compiler or Triton."""
    try:
        torch.compile(lambda x: x.sin() + x, **compile_options())(torch.ones(8, device=device))
    except Exception as error:  # whatever it is, its message says what is missing
        cause = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        raise ValueError(f"--compile cannot compile for {device}: {type(error).__name__}: {cause}") from error


def compile_blocks(network) -> None:
    """Compiles a denoiser's repeated blocks, in place, so that names in checkpoints and results stay as they are.

    Equal blocks are compiled once. What is between them stays eager, which costs little and compiles much faster.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    if getattr(network, "_repeated_blocks", None):
        network.compile_repeated_blocks(**compile_options())
    else:  # as SD3's class, which does not name them
        for block in network.transformer_blocks:
            block.compile(**compile_options())


def compile_whole(module) -> None:
    """Compiles a module that is always called with one size, in place."""
    module.compile(**compile_options())


def compile_hidden_states(model) -> None:
    """Compiles the way of a frozen DINOv2 to its hidden states as one function, in place.

    It is a loop of its own, since what the library collects hidden states by, a lock and hooks, cannot be traced: its
    forward would fall into parts of layers, which are slower than eager ones.
    """

    def collect(pixel_values):
        hidden_states = [model.embeddings(pixel_values)]
        for layer in model.encoder.layer:
            output = layer(hidden_states[-1])
            hidden_states.append(output[0] if isinstance(output, tuple) else output)  # by the library's version
        return tuple(hidden_states)

    def forward(pixel_values, output_hidden_states=False):
        if output_hidden_states:
            return BaseModelOutput(hidden_states=compiled(pixel_values))
        return eager(pixel_values=pixel_values)

    compiled, eager = torch.compile(collect, **compile_options()), model.forward
    model.forward = forward


# Attention


# PyTorch's kernels, each with a backward.
ATTENTION_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


class AttentionProcessor:
    """Another processor under one kernel of PyTorch's attention: in a recomputation, too, since it is a forward.

    `set_attention_backend` of diffusers does not reach the processors of these networks, which call PyTorch's.
    """

    def __init__(self, processor, backend):
        self.processor, self.backend = processor, backend

    def __call__(self, attn, *args, **kwargs):
        with sdpa_kernel(self.backend):
            return self.processor(attn, *args, **kwargs)


def use_attention_backend(network, name, dtype, device) -> None:
    """Has all of a denoiser's attention computed by the kernel `name`, wherever the denoiser is called.

    Args:
        dtype, device: what it computes in, and where.

    Raises:
        ValueError: where the kernel cannot do that, forward and backward, for one of its layers.
    """
    backend = ATTENTION_BACKENDS[name]
    layers = [module for module in network.modules() if hasattr(module, "to_q") and hasattr(module, "heads")]
    for size in sorted({layer.to_q.out_features // layer.heads for layer in layers}):
        query = torch.zeros(1, 1, 16, size, dtype=dtype, device=device, requires_grad=True)
        try:
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(query, query, query).sum().backward()
        except RuntimeError as error:
            raise ValueError(
                f"--attention_backend {name} cannot do what this network needs, heads of {size} channels in "
                f"{str(dtype).removeprefix('torch.')} on {device}, forward and backward."
            ) from error
    network.set_attn_processor(
        {key: AttentionProcessor(processor, backend) for key, processor in network.attn_processors.items()}
    )


# Optimizers


def fuse_optimizer(optimizer) -> None:
    """Has PyTorch's AdamW update all parameters in one kernel, in place, without copies of them; others stay."""
    if type(optimizer) is torch.optim.AdamW:
        for group in optimizer.param_groups:
            group["fused"] = True

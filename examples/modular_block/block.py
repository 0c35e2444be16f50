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
"""FLUX.1's denoising as a modular block that can be sent a gradient. Needs `adt_pipeline.py` and `adt_utils.py`.

    block = ModularPipelineBlocks.from_pretrained(FOLDER_OR_REPOSITORY, trust_remote_code=True)
    blocks = FluxAutoBlocks()
    blocks.sub_blocks["denoise"] = block
    del blocks.sub_blocks["decode"]
    pipeline = blocks.init_pipeline("black-forest-labs/FLUX.1-dev")
    pipeline.load_components(dtype=torch.bfloat16)
    result = pipeline(prompt="a lighthouse at dusk", num_inference_steps=28, output=["images", "tunable"])
    result["tunable"].backward(my_loss(result["images"]))

It replaces the denoising step and, since diffusers runs each block without gradient, the decoding that follows it.
"""

import copy

import torch
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.flux.decoders import FluxDecodeStep
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam


if __package__:  # loaded by diffusers from a folder or the Hub, which brings the files that this one names
    from .adt_pipeline import ConstrainedPipeline, check_components
    from .adt_utils import GRADIENT_PATHS
else:
    import adt_pipeline as plugin  # with `from`, diffusers would tell users to install it
    import adt_utils as utils

    ConstrainedPipeline, check_components = plugin.ConstrainedPipeline, plugin.check_components
    GRADIENT_PATHS = utils.GRADIENT_PATHS


class ConstrainedBlocks(ConstrainedPipeline):
    """The path through the components of a `ModularPipeline`, which has no `__call__` of its own family."""

    check = staticmethod(check_components)


def differentiable(block):
    """`block`, in which neither it nor its sub-blocks are called without gradient any more."""
    cls = type(block)
    call = getattr(cls.__call__, "__wrapped__", cls.__call__)
    block.__class__ = type(cls.__name__, (cls,), {"__call__": call})
    for sub_block in block.sub_blocks.values():
        differentiable(sub_block)
    return block


class ConstrainedDenoiseStep(SequentialPipelineBlocks):
    """Denoises and decodes; `images` are (B, 3, H, W) in about [-1, 1], attached; `tunable` sends a gradient."""

    model_name = "flux"
    block_classes = [*FluxCoreDenoiseStep.block_classes, FluxDecodeStep]
    block_names = [*FluxCoreDenoiseStep.block_names, "decode"]

    def __init__(self):
        super().__init__()
        # A copy, since some of the blocks belong to diffusers' classes.
        blocks = copy.deepcopy(self.sub_blocks)
        for name, block in blocks.items():
            self.sub_blocks[name] = differentiable(block)

    @property
    def description(self):
        return "Denoising and decoding of FLUX.1 that can be sent a gradient through K steps, in constant memory."

    @property
    def inputs(self):
        return [
            *super().inputs,
            InputParam("num_gradient_steps", type_hint=int, default=3, description="K, the steps with a gradient."),
            InputParam("gradient_path", type_hint=str, default="adt", description=f"One of {GRADIENT_PATHS}."),
        ]

    @property
    def outputs(self):
        return [*super().outputs, OutputParam("tunable", description="Has `backward(loss)`.")]

    def __call__(self, components, state):
        tunable = ConstrainedBlocks(components, state.get("num_gradient_steps"), state.get("gradient_path"))

        def run():
            SequentialPipelineBlocks.__call__.__wrapped__(self, components, state)
            return state.get("images")

        with torch.enable_grad():
            state.set("images", tunable.record(run))
        state.set("tunable", tunable)
        return components, state

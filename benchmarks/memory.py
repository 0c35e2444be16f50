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
"""Counts the activations that autograd saves in each phase of an ADT iteration; needs no GPU.

    python benchmarks/memory.py                  # every model below
    python benchmarks/memory.py --model demo     # the demo's pipeline, on real tensors
    python benchmarks/memory.py --model sd15     # SD1.5's configuration, on fake tensors, which have shapes only

What is counted is the peak of live bytes in the storages that autograd keeps for its backward, parameters and buffers
left out, each storage once. The recomputation of checkpointed parts is counted too, and so are the bfloat16 copies
of the network's weights that autocast makes. Not counted are temporary buffers of a single operation, the allocator's
fragmentation, and each chosen step's input and prediction, which a rollout keeps and which are as large as latents.

The network has float32 weights and runs under bfloat16 autocast (norms in float32, as on CUDA); the VAE, DINOv2 and
the discriminator run in float32, as in `train_adt_sd15.py`. The VAE decodes one image at a time, checkpointed,
throughout, and the sampler has 8 steps. "Plain autograd" keeps K graphs, both guidance branches in one batch.
"""

import argparse
import contextlib
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import AutoModel, CLIPTextConfig, CLIPTextModel, Dinov2Config, Dinov2Model
from transformers.initialization import no_init_weights


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adt_utils import (  # noqa: E402
    DiffAugment,
    FeatureNetwork,
    SiameseDiscriminator,
    classifier_free_guidance,
    constrained_step,
    generator_loss,
    simulate_inference,
)


class SavedTensors:
    """A context in which `live` counts the bytes that autograd has saved, and `peak` is its maximum.

    Each storage counts once, however many saved tensors share it, until the last of them is released. Works on real
    and on fake tensors. It cannot see into `torch.utils.checkpoint(use_reentrant=False)`, which saves its
    recomputation by hooks of its own: use `counted_checkpoint` where that is to be measured.

    Args:
        modules: their parameters and buffers are not counted.
    """

    def __init__(self, *modules):
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        self.excluded = {self.key(tensor) for tensor in tensors}
        self.references = Counter()
        self.live = self.peak = 0

    @staticmethod
    def key(tensor):
        return tensor.untyped_storage()._cdata

    def pack(self, tensor):
        return SavedTensor(self, tensor)

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda saved: saved.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception):
        self.hooks.__exit__(*exception)


class SavedTensor:
    """Holds one saved tensor, as long as the graph does."""

    def __init__(self, counter, tensor):
        self.counter, self.tensor = counter, tensor
        self.key, self.size = counter.key(tensor), tensor.untyped_storage().nbytes()
        if self.key in counter.excluded:
            self.size = 0
        counter.references[self.key] += 1
        if counter.references[self.key] == 1:
            counter.live += self.size
            counter.peak = max(counter.peak, counter.live)

    def __del__(self):
        self.counter.references[self.key] -= 1
        if self.counter.references[self.key] == 0:
            del self.counter.references[self.key]
            self.counter.live -= self.size


class CountedCheckpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *args):
        ctx.function = function
        ctx.autocast = torch.is_autocast_enabled("cpu")
        ctx.tensors = [n for n, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
        ctx.args = [None if isinstance(arg, torch.Tensor) else arg for arg in args]
        ctx.save_for_backward(*(args[n] for n in ctx.tensors))
        return function(*args)

    @staticmethod
    def backward(ctx, gradient):
        args = list(ctx.args)
        for n, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            args[n] = tensor.detach().requires_grad_(tensor.requires_grad)
        with torch.enable_grad(), bf16_autocast(ctx.autocast):
            output = ctx.function(*args)
        torch.autograd.backward(output, gradient)
        return None, *(arg.grad if isinstance(arg, torch.Tensor) else None for arg in args)


def counted_checkpoint(function, *args):
    """`torch.utils.checkpoint`, whose recomputation `SavedTensors` can see; `function` returns one tensor."""
    return CountedCheckpoint.apply(function, *args)


class CudaNormAutocast(torch.overrides.TorchFunctionMode):
    """Computes norms in float32, as autocast does on CUDA and does not on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.group_norm, F.layer_norm):
            args = (args[0].float(), *args[1:])
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def bf16_autocast(enabled=True):
    with contextlib.ExitStack() as stack:
        if enabled:
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
            stack.enter_context(CudaNormAutocast())
        yield


@dataclass
class Model:
    """What the phases need of a model family."""

    title: str
    network: torch.nn.Module  # float32 weights, run under bfloat16 autocast
    forward: Callable  # (model_input, timestep, embeds) -> prediction
    vae: torch.nn.Module  # float32, as `features` and `discriminator`
    text_encoder: torch.nn.Module  # bfloat16
    features: FeatureNetwork
    discriminator: SiameseDiscriminator
    sampler: DDIMScheduler
    embeds: tuple[torch.Tensor, torch.Tensor]  # of the empty prompt and of the captions, each (B, L, C)
    latents: torch.Tensor  # (B, C, h, w)

    @property
    def parts(self):
        return {
            "network": self.network,
            "heads and predictors": torch.nn.ModuleList([self.discriminator.heads, self.discriminator.predictors]),
            "twin heads": self.discriminator.twin_heads,
            "feature network": self.features,
            "VAE": self.vae,
            "text encoder": self.text_encoder,
        }

    def predict(self, model_input, timestep, branches=(1,)):
        embeds = torch.cat([self.embeds[branch] for branch in branches])
        with bf16_autocast():
            return self.forward(model_input, timestep, embeds).float()

    def set_gradient_checkpointing(self, enabled):
        for module in (self.network, self.vae):
            if enabled:
                module.enable_gradient_checkpointing(counted_checkpoint)
            else:
                module.disable_gradient_checkpointing()


def decode(model, latents):
    def decode_one(one):
        return model.vae.decode(one / model.vae.config.scaling_factor).sample

    return torch.cat([counted_checkpoint(decode_one, one) for one in latents.split(1)])


def score(model, latents):
    """The adversarial loss of the decoded `latents`."""
    augment, parameters = DiffAugment(), torch.rand(len(latents), DiffAugment.NUM_PARAMETERS)
    images = decode(model, latents)
    with torch.no_grad():
        reference = model.features(augment(torch.zeros_like(images), parameters))
    return generator_loss(model.discriminator(model.features(augment(images, parameters)), reference))


def rollout(model, guidance_scale, train_steps):
    return simulate_inference(model.predict, model.sampler, model.latents, 0, guidance_scale, 0.0, train_steps)


def finetuning_step(model):
    prediction = model.predict(model.latents, model.sampler.timesteps[0])
    F.mse_loss(prediction, torch.zeros_like(prediction)).backward()


def scoring(model):
    latents = model.latents.clone().requires_grad_()
    torch.autograd.grad(score(model, latents), latents)


def replay_pass(model, guidance_scale):
    result = rollout(model, guidance_scale, [0])
    result.replay(model.predict, [torch.zeros_like(result.train_steps[0].prediction)])[0]().backward()


def generator_update(model, guidance_scale, num_gradient_steps):
    """An iteration's rollout, score, diffusion loss and replay."""
    result = rollout(model, guidance_scale, range(num_gradient_steps))
    gradients = result.prediction_gradients(score(model, result.latents))
    finetuning_step(model)
    for run in result.replay(model.predict, gradients):
        run().backward()


def plain_autograd_update(model, guidance_scale, num_gradient_steps):
    """The same gradient by one backward through K kept graphs, the two branches batched."""
    scheduler, latents = model.sampler, model.latents
    branches = (0, 1) if guidance_scale > 1 else (1,)
    for index, timestep in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(index < num_gradient_steps):
            prediction = model.predict(torch.cat([latents.detach()] * len(branches)), timestep, branches)
        if len(branches) == 2:
            prediction = classifier_free_guidance(prediction, guidance_scale)
        latents = constrained_step(scheduler, prediction, timestep, latents)
    score(model, latents).backward()


def measure(model, function, *args) -> int:
    """The peak of saved bytes while `function(model, *args)` runs."""
    model.network.zero_grad()
    with SavedTensors(*model.parts.values()) as saved:
        function(model, *args)
    return saved.peak


def phases(model, guidance_scale) -> dict[str, int]:
    everything = len(model.sampler.timesteps)
    return {
        "plain fine-tuning step": measure(model, finetuning_step),
        "rollout, K = 3": measure(model, rollout, guidance_scale, [0, 1, 2]),
        "replay, one pass (one step, one branch)": measure(model, replay_pass, guidance_scale),
        "scoring (decode, resize, DINOv2, discriminator)": measure(model, scoring),
        "generator update, K = 1": measure(model, generator_update, guidance_scale, 1),
        "generator update, K = 3": measure(model, generator_update, guidance_scale, 3),
        f"generator update, K = {everything} (all)": measure(model, generator_update, guidance_scale, everything),
        "plain autograd through kept graphs, K = 1": measure(model, plain_autograd_update, guidance_scale, 1),
        "plain autograd through kept graphs, K = 3": measure(model, plain_autograd_update, guidance_scale, 3),
    }


class StatelessDDIM(DDIMScheduler):
    """DDIM keeps nothing between steps, so one instance serves every rollout: real tensors cannot be deep-copied
    under a `FakeTensorMode`."""

    def __deepcopy__(self, memo):
        return self


def make_sampler(num_inference_steps):
    """DDIM on SD1.5's schedule. Its timesteps are integers: a fake tensor has no value to look a level up by."""
    with unset_fake_temporarily():
        sampler = StatelessDDIM(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        sampler.set_timesteps(num_inference_steps)
        sampler.timesteps = sampler.timesteps.tolist()
    return sampler


def sd_forward(unet):
    def forward(model_input, timestep, embeds):
        return unet(model_input, timestep, encoder_hidden_states=embeds).sample

    return forward


def freeze(module):
    return module.requires_grad_(False).eval()


def demo_model(args) -> Model:
    """The demo's pipeline and feature network, as its files say."""
    unet = UNet2DConditionModel.from_pretrained(args.pipeline, subfolder="unet").eval()
    vae = freeze(AutoencoderKL.from_pretrained(args.pipeline, subfolder="vae"))
    text_encoder = CLIPTextModel.from_pretrained(args.pipeline, subfolder="text_encoder")
    dinov2 = Dinov2Model.from_pretrained(args.discriminator)
    depth = dinov2.config.num_hidden_layers
    side = unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    patch = dinov2.config.patch_size
    layers = (-1, *range(depth)) if depth < 12 else (-1, 2, 5, 8, 11)
    features = FeatureNetwork(dinov2, layers, max(side // patch, 2) * patch)
    batch = args.train_batch_size
    return Model(
        title=f"The demo's pipeline with its DINOv2 at {features.resolution}, {batch} images of {side}x{side}",
        network=unet,
        forward=sd_forward(unet),
        vae=vae,
        text_encoder=text_encoder.to(torch.bfloat16),
        features=features,
        discriminator=freeze(SiameseDiscriminator(features.channels, len(layers))),
        sampler=make_sampler(8),
        embeds=(torch.randn(batch, text_encoder.config.max_position_embeddings, unet.config.cross_attention_dim),) * 2,
        latents=torch.randn(batch, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size),
    )


def sd15_model(args) -> Model:
    """Stable Diffusion 1.5 at 512x512 with DINOv2 ViT-S/14 at 518; call it under a `FakeTensorMode`."""
    unet = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
    ).eval()
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    with no_init_weights():
        features = FeatureNetwork(Dinov2Model(config))
        config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
        text_encoder = AutoModel.from_config(config, dtype=torch.bfloat16)
    batch = args.train_batch_size
    return Model(
        title=f"Stable Diffusion 1.5 with DINOv2 ViT-S/14 at 518, {batch} images of 512x512, on fake tensors",
        network=unet,
        forward=sd_forward(unet),
        vae=freeze(vae),
        text_encoder=text_encoder,
        features=features,
        discriminator=freeze(SiameseDiscriminator(features.channels, len(features.layers))),
        sampler=make_sampler(8),
        embeds=(torch.randn(batch, 77, 768),) * 2,
        latents=torch.randn(batch, 4, 64, 64),
    )


def state_rows(model):
    """What stays in memory throughout: name, parameters, gradients and AdamW's two moments, in bytes."""
    rows = []
    for name, module in model.parts.items():
        size = sum(parameter.nbytes for parameter in module.parameters())
        trains = name in ("network", "heads and predictors")
        rows.append((name, size, size if trains else 0, 2 * size if trains else 0))
    return [*rows, ("total", *(sum(row[n] for row in rows) for n in (1, 2, 3)))]


def table(header, rows):
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def readable(size) -> str:
    """In units of 10^9, 10^6 or 10^3 bytes, three significant digits."""
    unit, name = next(pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= pair[0] or pair[1] == "kB")
    return f"{size / unit:.3g} {name}"


def report(model, guidance_scale) -> str:
    columns = []
    for enabled in (False, True):
        model.set_gradient_checkpointing(enabled)
        columns.append(phases(model, guidance_scale))
    rows = [[phase, readable(size), readable(columns[1][phase])] for phase, size in columns[0].items()]
    peaks = table(["peak of saved activations", "without gradient checkpointing", "with it"], rows)
    states = table(
        ["throughout", "parameters", "gradients", "AdamW's states"],
        [[row[0], *(readable(size) if size else "-" for size in row[1:])] for row in state_rows(model)],
    )
    return f"## {model.title}\n\n{peaks}\n\n{states}\n"


MODELS = {"demo": (demo_model, False), "sd15": (sd15_model, True)}  # builder, and whether on fake tensors


def main():
    parser = argparse.ArgumentParser(description="Counts the activations saved in each phase of an ADT iteration.")
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--pipeline", default=str(ROOT / "demo/assets/pipeline"), help="The demo's pipeline.")
    parser.add_argument("--discriminator", default=str(ROOT / "demo/assets/dinov2"), help="The demo's DINOv2.")
    parser.add_argument("--train_batch_size", type=int, default=2)
    parser.add_argument("--guidance_scale", type=float, default=7.0)
    args = parser.parse_args()
    print(f"`{' '.join(['python benchmarks/memory.py', *sys.argv[1:]])}`\n")
    print("Counts of saved tensors, not a GPU measurement: temporary buffers and fragmentation come on top.\n")
    for name in MODELS if args.model == "all" else [args.model]:
        build, fake = MODELS[name]
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
            print(report(build(args), args.guidance_scale))


if __name__ == "__main__":
    main()

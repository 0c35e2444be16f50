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
    python benchmarks/memory.py --model sdxl sdxl-lora sd3 sd3-lora
    python benchmarks/memory.py --ladder         # what an iteration takes in all, option by option

What is counted is the peak of live bytes in the storages that autograd keeps for its backward, parameters and buffers
left out, each storage once. The recomputation of checkpointed parts is counted too, and so are the bfloat16 copies
of the network's weights that autocast makes. Not counted are temporary buffers of a single operation, the allocator's
fragmentation, and each chosen step's input and prediction, which a rollout keeps and which are as large as latents.

The network has float32 weights, or frozen bfloat16 ones with float32 adapters, and runs under bfloat16 autocast (norms
in float32, as on CUDA); the VAE, DINOv2 and the discriminator run in float32, as in the training scripts, but for the
VAE where the title says so. It decodes one image at a time, checkpointed, throughout, and the sampler has 8 steps.
"Plain autograd" keeps K graphs, both guidance branches in one batch.

The ladder adds what is there at the same time: weights, optimizer states, gradients, saved activations, and the copies
in bfloat16 that autocast keeps during a pass. On a GPU each of its commands says what it really takes: the progress
bar and the trackers have `peak_memory_gb`.
"""

import argparse
import contextlib
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import (
    AutoModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    T5Config,
    T5EncoderModel,
)
from transformers.initialization import no_init_weights


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from architectures import DINOV2, NETWORKS, VAES  # noqa: E402

from adt_utils import (  # noqa: E402
    DiffAugment,
    FeatureNetwork,
    SiameseDiscriminator,
    classifier_free_guidance,
    constrained_step,
    generator_loss,
    simulate_inference,
)
from memory_utils import make_library_optimizer, optimizer_state_bytes  # noqa: E402


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
    def forward(ctx, function, trigger, *args):
        ctx.function = function
        ctx.autocast = torch.is_autocast_enabled("cpu")
        ctx.tensors = [n for n, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
        ctx.args = [None if isinstance(arg, torch.Tensor) else arg for arg in args]
        ctx.save_for_backward(*(args[n] for n in ctx.tensors))
        return function(*args)

    @staticmethod
    def backward(ctx, *gradients):
        args = list(ctx.args)
        for n, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            args[n] = tensor.detach().requires_grad_(tensor.requires_grad)
        with torch.enable_grad(), bf16_autocast(ctx.autocast):
            outputs = ctx.function(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [pair for pair in zip(outputs, gradients, strict=True) if None not in pair and pair[0].requires_grad]
        if pairs:
            torch.autograd.backward(*zip(*pairs))
        return None, None, *(arg.grad if isinstance(arg, torch.Tensor) else None for arg in args)


def counted_checkpoint(function, *args):
    """`torch.utils.checkpoint`, whose recomputation `SavedTensors` can see."""
    # The trigger requires grad where the arguments do not: what trains may be inside, as adapters are.
    return CountedCheckpoint.apply(function, torch.ones((), requires_grad=True), *args)


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
    network: torch.nn.Module  # run under bfloat16 autocast
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
            if not module._supports_gradient_checkpointing:  # Qwen-Image's VAE
                continue
            if enabled:
                module.enable_gradient_checkpointing(counted_checkpoint)
            else:
                module.disable_gradient_checkpointing()


def decode(model, latents):
    def decode_one(one):
        one = one / model.vae.config.get("scaling_factor", 1.0)
        if isinstance(model.vae, AutoencoderKLQwenImage):  # a video's, of one frame
            return model.vae.decode(one[:, :, None].to(model.vae.dtype)).sample[:, :, 0].float()
        return model.vae.decode(one.to(model.vae.dtype)).sample.float()

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


class Integers(list):
    """Timesteps that are no tensor: a fake one has no value to look a level up by."""

    def to(self, *args, **kwargs):
        return self

    def cpu(self):
        return self


def make_sampler(num_inference_steps):
    """DDIM on SD1.5's schedule."""
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
        sampler.timesteps = Integers(sampler.timesteps.tolist())
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
    batch = args.train_batch_size or 2
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


def full_size_features():
    """DINOv2 ViT-S/14 at 518."""
    with no_init_weights():
        return FeatureNetwork(Dinov2Model(Dinov2Config(**DINOV2)))


@contextlib.contextmanager
def default_dtype(dtype):
    """Fake modules are made in their precision: `to` cannot convert them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def add_lora(network, target_modules=("to_q", "to_k", "to_v", "to_out.0")):
    """Adapters of rank 32 in float32 to frozen weights."""

    def convert(module, function):
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(function(parameter), parameter.requires_grad))
        return module

    network.requires_grad_(False)
    with mock.patch("torch.nn.Module._apply", convert):  # peft calls `to` on each adapter's layer
        network.add_adapter(LoraConfig(r=32, lora_alpha=32, target_modules=list(target_modules)))
    for module in network.modules():
        convert(module, lambda parameter: parameter.float() if parameter.requires_grad else parameter)
    return network


def sd15_model(args) -> Model:
    """Stable Diffusion 1.5 at 512x512; call it under a `FakeTensorMode`."""
    unet = UNet2DConditionModel(sample_size=64, **NETWORKS["sd15"]).eval()
    features = full_size_features()
    with no_init_weights():
        config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
        text_encoder = AutoModel.from_config(config, dtype=torch.bfloat16)
    batch = args.train_batch_size or 2
    return Model(
        title=f"Stable Diffusion 1.5 with DINOv2 ViT-S/14 at 518, {batch} images of 512x512, on fake tensors",
        network=unet,
        forward=sd_forward(unet),
        vae=freeze(AutoencoderKL(**VAES["sd15"])),
        text_encoder=text_encoder,
        features=features,
        discriminator=freeze(SiameseDiscriminator(features.channels, len(features.layers))),
        sampler=make_sampler(8),
        embeds=(torch.randn(batch, 77, 768),) * 2,
        latents=torch.randn(batch, 4, 64, 64),
    )


def sdxl_model(args, lora=False, half_vae=None) -> Model:
    """Stable Diffusion XL at 1024x1024; call it under a `FakeTensorMode`. Adapters' runs have the VAE in bfloat16."""
    half_vae = lora if half_vae is None else half_vae
    with default_dtype(torch.bfloat16 if lora else torch.float32):
        unet = UNet2DConditionModel(sample_size=128, **NETWORKS["sdxl"]).eval()
    if lora:
        add_lora(unet)

    def forward(model_input, timestep, embeds):
        rows = len(model_input)
        added = {"text_embeds": torch.zeros(rows, 1280), "time_ids": torch.zeros(rows, 6)}
        return unet(model_input, timestep, encoder_hidden_states=embeds, added_cond_kwargs=added).sample

    features = full_size_features()
    with no_init_weights(), default_dtype(torch.bfloat16):
        first = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
        second = CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32, projection_dim=1280
        )
        text_encoders = [CLIPTextModel(first), CLIPTextModelWithProjection(second)]
    batch = args.train_batch_size or (1 if lora else 2)
    with default_dtype(torch.bfloat16 if half_vae else torch.float32):
        vae = AutoencoderKL(**VAES["sdxl"])
    return Model(
        title=f"Stable Diffusion XL{', LoRA of rank 32, VAE in bfloat16,' if lora else ''} with DINOv2 ViT-S/14 at "
        f"518, {batch} image{'s' * (batch > 1)} of 1024x1024, on fake tensors",
        network=unet,
        forward=forward,
        vae=freeze(vae),
        text_encoder=torch.nn.ModuleList(text_encoders),
        features=features,
        discriminator=freeze(SiameseDiscriminator(features.channels, len(features.layers))),
        sampler=make_sampler(8),
        embeds=(torch.randn(batch, 77, 2048),) * 2,
        latents=torch.randn(batch, 4, 128, 128),
    )


def sd3_model(args, lora=False) -> Model:
    """Stable Diffusion 3 medium at 1024x1024; call it under a `FakeTensorMode`. What solver it is does not matter."""
    with default_dtype(torch.bfloat16 if lora else torch.float32):
        transformer = SD3Transformer2DModel(sample_size=128, **NETWORKS["sd3"]).eval()
    if lora:
        own = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
        text = [f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]
        add_lora(transformer, own + text)

    def forward(model_input, timestep, embeds):
        rows = len(model_input)
        return transformer(model_input, embeds, torch.zeros(rows, 2048), torch.full((rows,), float(timestep))).sample

    features = full_size_features()
    with no_init_weights(), default_dtype(torch.bfloat16):
        first = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
        second = CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32, projection_dim=1280
        )
        t5 = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
        text_encoders = [*map(CLIPTextModelWithProjection, (first, second)), T5EncoderModel(t5)]
    batch = args.train_batch_size or (1 if lora else 2)
    return Model(
        title=f"Stable Diffusion 3 medium{', LoRA of rank 32,' if lora else ''} with DINOv2 ViT-S/14 at 518, {batch} "
        f"image{'s' * (batch > 1)} of 1024x1024, on fake tensors",
        network=transformer,
        forward=forward,
        vae=freeze(AutoencoderKL(**VAES["sd3"])),
        text_encoder=torch.nn.ModuleList(text_encoders),
        features=features,
        discriminator=freeze(SiameseDiscriminator(features.channels, len(features.layers))),
        sampler=make_sampler(8),
        embeds=(torch.randn(batch, 77 + 256, 4096),) * 2,
        latents=torch.randn(batch, 16, 128, 128),
    )


def any_model(args, name) -> Model:
    """Adapters of `train_adt_lora.py` at 1024x1024, by the family's pipeline; call it under a `FakeTensorMode`.

    Without text encoders, which `--offload_text_encoders` takes off the card. The prompts have 512 tokens of T5's with
    FLUX.1, and 128 of Qwen's.
    """
    title, network_class = {
        "flux": ("FLUX.1-dev", FluxTransformer2DModel),
        "qwen-image": ("Qwen-Image", QwenImageTransformer2DModel),
        "z-image": ("Z-Image", ZImageTransformer2DModel),
    }[name]
    with default_dtype(torch.bfloat16):
        transformer = network_class(**NETWORKS[name]).eval()
    add_lora(transformer)

    def pack(latents):
        return latents.unflatten(2, (64, 2)).unflatten(4, (64, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpack(tokens):
        latents = tokens.unflatten(1, (64, 64)).unflatten(3, (16, 2, 2)).permute(0, 3, 1, 4, 2, 5)
        return latents.flatten(2, 3).flatten(3, 4)

    def forward(model_input, timestep, embeds):
        rows, time = len(model_input), torch.full((len(model_input),), float(timestep) / 1000)
        if name == "flux":
            return unpack(
                transformer(
                    pack(model_input), embeds, torch.zeros(rows, 768), time, torch.zeros(4096, 3),
                    torch.zeros(embeds.shape[1], 3), torch.full((rows,), 3.5),
                ).sample
            )  # fmt: skip
        if name == "qwen-image":
            shapes = [[(1, 64, 64)]] * rows
            return unpack(transformer(pack(model_input), embeds, None, time, img_shapes=shapes).sample)
        # Its pipeline has both branches of guidance in one call, and so has a replay.
        images = list(model_input.repeat(2, 1, 1, 1).to(torch.bfloat16).unsqueeze(2))
        both = torch.stack(transformer(images, time.repeat(2), list(embeds) * 2)[0]).squeeze(2)
        return both.chunk(2)[0] + 4.0 * (both.chunk(2)[0] - both.chunk(2)[1])

    features = full_size_features()
    batch = args.train_batch_size or 1
    tokens, channels = {"flux": (512, 4096), "qwen-image": (128, 3584), "z-image": (128, 2560)}[name]
    qwen = name == "qwen-image"
    return Model(
        title=f"{title}, LoRA of rank 32, with DINOv2 ViT-S/14 at 518, {batch} image{'s' * (batch > 1)} of 1024x1024, "
        "on fake tensors",
        network=transformer,
        forward=forward,
        vae=freeze(AutoencoderKLQwenImage(**VAES[name]) if qwen else AutoencoderKL(**VAES["sd3"])),
        text_encoder=torch.nn.Module(),
        features=features,
        discriminator=freeze(SiameseDiscriminator(features.channels, len(features.layers))),
        sampler=make_sampler(8),
        embeds=(torch.randn(batch, tokens, channels),) * 2,
        latents=torch.randn(batch, 16, 128, 128),
    )


# The ladder


@dataclass(frozen=True)
class Rung:
    """A run that fits a smaller card than the one before it."""

    options: str  # what its command says beside the family's
    model: str  # of `MODELS`
    images: int = 1
    half_vae: bool = True
    optimizer: str = "adamw"
    four_bits: bool = False  # the base's linear layers
    offload_gradients: bool = False


VAE = "--pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix"
ONE = "--train_batch_size 1 --gradient_accumulation_steps 8"
FUSED = "--fused_backward_pass --offload_gradients --max_grad_norm 0"
LORA = "--use_lora --rank 32"
BITS = "--bnb_quantization_config_path nf4.json"
LADDERS = {
    "Stable Diffusion XL, the whole network": [
        Rung("--train_batch_size 2 --gradient_accumulation_steps 4", "sdxl", images=2, half_vae=False),
        Rung(f"{ONE} {VAE}", "sdxl"),
        Rung(f"{ONE} {VAE} --optimizer adamw8bit", "sdxl", optimizer="adamw8bit"),
        Rung(f"{ONE} {VAE} --optimizer adafactor", "sdxl", optimizer="adafactor"),
        Rung(f"{ONE} {VAE} --optimizer adamw8bit {FUSED}", "sdxl", optimizer="adamw8bit", offload_gradients=True),
        Rung(f"{ONE} {VAE} --optimizer adafactor {FUSED}", "sdxl", optimizer="adafactor", offload_gradients=True),
    ],
    "Stable Diffusion XL, adapters": [
        Rung(f"{ONE} {VAE} {LORA}", "sdxl-lora"),
        Rung(f"{ONE} {VAE} {LORA} {BITS}", "sdxl-lora", four_bits=True),
    ],
    "Stable Diffusion 3 medium, the whole network": [
        Rung("--train_batch_size 2 --gradient_accumulation_steps 4", "sd3", images=2, half_vae=False),
        Rung(f"{ONE} --optimizer adamw8bit", "sd3", half_vae=False, optimizer="adamw8bit"),
        Rung(f"{ONE} --optimizer adafactor", "sd3", half_vae=False, optimizer="adafactor"),
    ],
    "Stable Diffusion 3 medium, adapters": [
        Rung(f"{ONE} {LORA}", "sd3-lora", half_vae=False),
        Rung(f"{ONE} {LORA} {BITS}", "sd3-lora", half_vae=False, four_bits=True),
    ],
} | {
    f"{title}, adapters": [
        Rung(f"{ONE} --rank 32", model, half_vae=False),
        Rung(f"{ONE} --rank 32 {BITS}", model, half_vae=False, four_bits=True),
    ]
    for title, model in (("FLUX.1-dev", "flux-lora"), ("Qwen-Image", "qwen-image-lora"), ("Z-Image", "z-image-lora"))
}  # fmt: skip


@cache
def measure_parts(name, images, half_vae) -> SimpleNamespace:
    """Of a model in bytes, or in what can be counted: what is there throughout, and for how long the rest is.

    `copies` are autocast's of the weights, `in_pass` a pass's with gradient: in its forward the copies beside what is
    saved, then what its backward makes.
    """
    build, _ = MODELS[name]
    with FakeTensorMode(allow_non_fake_inputs=True):
        args = argparse.Namespace(train_batch_size=images)
        model = build(args, half_vae=half_vae) if name == "sdxl" else build(args)
        model.set_gradient_checkpointing(True)
        layers = [
            module for module in model.network.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        ]
        cast = [p for module in layers for p in module.parameters(recurse=False) if p.requires_grad]
        copies = sum(2 * parameter.numel() for parameter in cast)
        with SavedTensors(*model.parts.values()) as saved:
            prediction = model.predict(model.latents, model.sampler.timesteps[0])
            saved_by_forward = saved.live
        del prediction
        frozen = [module.weight for module in layers if not module.weight.requires_grad]
        linear = {module.weight for module in layers if isinstance(module, torch.nn.Linear)}
        return SimpleNamespace(
            trained=[parameter for parameter in model.network.parameters() if parameter.requires_grad],
            weights=sum(parameter.nbytes for parameter in model.network.parameters()),
            # In four bits, with a float32 scale to each 64 weights.
            saved_by_four_bits=sum(w.nbytes - w.numel() * (1 / 2 + 4 / 64) for w in frozen if w in linear),
            # The discriminator with its gradient and AdamW's states; text encoders are gone once captions are cached.
            rest=sum(sum(row[1:]) for row in state_rows(model)[1:-1] if row[0] != "text encoder"),
            copies=copies,
            in_pass=max(copies + saved_by_forward, measure(model, finetuning_step)),
            scoring=measure(model, scoring),
        )


def ladder_row(rung) -> list[str]:
    """What is there in the phases of an iteration, each at one moment."""
    parts = measure_parts(rung.model, rung.images, rung.half_vae)
    weights = parts.weights - rung.four_bits * parts.saved_by_four_bits
    options = argparse.Namespace(
        optimizer=rung.optimizer, learning_rate=1e-6, adam_beta1=0.9, adam_beta2=0.999, adam_weight_decay=1e-2,
        adam_epsilon=1e-8,
    )  # fmt: skip
    make = torch.optim.AdamW if rung.optimizer == "adamw" else partial(make_library_optimizer, args=options)
    states = optimizer_state_bytes(make(parts.trained))
    sizes = [parameter.nbytes for parameter in parts.trained]
    gradients = max(sizes) if rung.offload_gradients else sum(sizes)
    moments = [parts.copies, parts.scoring, gradients + parts.in_pass]
    moments = [weights + states + parts.rest + moment for moment in moments]
    return [f"`{rung.options}`", *map(readable, [weights, states, parts.rest, *moments, max(moments)])]


def ladder(title) -> str:
    header = ["options", "weights", "optimizer", "other networks", "rollout", "scoring", "replay", "**peak**"]
    return f"## {title}\n\n{table(header, [ladder_row(rung) for rung in LADDERS[title]])}\n"


def state_rows(model):
    """What stays in memory throughout: name, parameters, gradients and AdamW's two moments, in bytes."""
    rows = []
    for name, module in model.parts.items():
        trains = name in ("network", "heads and predictors")
        size = sum(parameter.nbytes for parameter in module.parameters())
        # The discriminator is frozen for the counts, as it is while the generator is updated.
        own = [p for p in module.parameters() if p.requires_grad or name == "heads and predictors"]
        gradients = sum(parameter.nbytes for parameter in own) if trains else 0
        rows.append((name, size, gradients, 2 * gradients))
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


# The builder, and whether it is called on fake tensors. Whole reports of the last ones are for those who name them.
LADDER_ALONE = ("flux-lora", "qwen-image-lora", "z-image-lora")
MODELS = {
    "demo": (demo_model, False),
    "sd15": (sd15_model, True),
    "sdxl": (sdxl_model, True),
    "sdxl-lora": (partial(sdxl_model, lora=True), True),
    "sd3": (sd3_model, True),
    "sd3-lora": (partial(sd3_model, lora=True), True),
    **{name: (partial(any_model, name=name.removesuffix("-lora")), True) for name in LADDER_ALONE},
}


def main():
    parser = argparse.ArgumentParser(description="Counts the activations saved in each phase of an ADT iteration.")
    parser.add_argument(
        "--model", choices=MODELS, nargs="+", default=None, help="Else all, in the ladder or out of it."
    )
    parser.add_argument("--ladder", action="store_true", help="An iteration in all, option by option.")
    parser.add_argument("--pipeline", default=str(ROOT / "demo/assets/pipeline"), help="The demo's pipeline.")
    parser.add_argument("--discriminator", default=str(ROOT / "demo/assets/dinov2"), help="The demo's DINOv2.")
    parser.add_argument("--train_batch_size", type=int, default=None, help="2; 1 for the full-size LoRA models.")
    parser.add_argument("--guidance_scale", type=float, default=7.0)
    args = parser.parse_args()
    print(f"`{' '.join(['python benchmarks/memory.py', *sys.argv[1:]])}`\n")
    print("Counts of saved tensors, not a GPU measurement: temporary buffers and fragmentation come on top.\n")
    if args.ladder:
        for title, rungs in LADDERS.items():
            if args.model is None or rungs[0].model in args.model:
                print(ladder(title), flush=True)
        return
    for name in args.model or [name for name in MODELS if name not in LADDER_ALONE]:
        build, fake = MODELS[name]
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
            print(report(build(args), args.guidance_scale), flush=True)


if __name__ == "__main__":
    main()

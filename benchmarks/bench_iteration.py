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
"""Times an ADT iteration part by part, beside what it cannot do without; random weights, nothing is downloaded.

    python benchmarks/bench_iteration.py                                       # three small models, on a CPU
    python benchmarks/bench_iteration.py --family sdxl --use_lora --compile
    python benchmarks/bench_iteration.py --family sd3 --full_size --mixed_precision bf16 --gradient_checkpointing
    torchrun --nproc_per_node 2 benchmarks/bench_iteration.py --family sdxl --shard

Options that are not this program's are the training scripts', such as `--train_batch_size`, `--num_gradient_steps`,
`--replay_branches` and `--attention_backend`. `benchmarks/bench_gpu.sh` runs all on a GPU.

What is timed is the script's own `train`, in rounds of two iterations that both start at the path's first step: the
first updates the discriminator, the second the generator as well. Each round also times

- the floor: every call of a network that the iteration made, as often as it made it, by itself, and the optimizers;
- diffusers' pipeline over the same steps, which is what the rollout should cost;
- a step of plain fine-tuning;
- the generator's gradient by plain autograd, which keeps K graphs; by one process alone.

With `--compile` each round is made twice, eager and compiled, by the same networks, and has a column for each. Of
several processes, as with `--shard`, the first one's figures are printed; `gather` puts the network's parts together
for a rollout.

A ratio is taken within a round, and its median over the rounds is what is printed, so that a busy machine slows both
sides. On a CPU, seconds are the process's, of one thread; on a GPU, and of several processes, they are the clock's,
with the device waited for at each part's end; the first round's are the clock's in any case, since a compiler runs in
processes of its own. Captions' embeddings are made up, as if they came from a cache. Where `floor` has `encode` and
the optimizers in it, the JSON has the ratio without them, too.
"""

import argparse
import contextlib
import copy
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import diffusers
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from transformers import Dinov2Config, Dinov2Model


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from architectures import DINOV2, NETWORKS, VAES  # noqa: E402

import train_adt_sd3  # noqa: E402
import train_adt_sd15  # noqa: E402
import train_adt_sdxl  # noqa: E402
from adt_utils import SimulatedInference, classifier_free_guidance, constrained_step, generator_loss  # noqa: E402
from adversary_utils import Adversary  # noqa: E402
from data_utils import make_generator  # noqa: E402
from output_utils import adt_or_plain  # noqa: E402
from training_utils import (  # noqa: E402
    FrozenModels,
    Run,
    Totals,
    Trained,
    freeze_vae,
    make_predict,
    prepare_generator,
    prepare_network,
    start_accelerator,
)


MODULES = {"sd15": train_adt_sd15, "sdxl": train_adt_sdxl, "sd3": train_adt_sd3}
SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "clip_sample": False,
}  # fmt: skip
# A smaller one of each, so that a CPU takes a minute: the network's and the VAE's options in place of the published
# ones, the images' side, and the shapes of an image's embeddings.
SMALL = {
    "sd15": (
        {"cross_attention_dim": 256, "block_out_channels": (64, 128, 256, 256)}, 128, {"prompt_embeds": (77, 256)},
    ),
    "sdxl": (
        {
            "block_out_channels": (64, 128, 256), "transformer_layers_per_block": (1, 1, 3),
            "cross_attention_dim": 512, "attention_head_dim": (2, 4, 8), "addition_time_embed_dim": 64,
            "projection_class_embeddings_input_dim": 256 + 6 * 64,
        },
        128,
        {"prompt_embeds": (77, 512), "pooled_prompt_embeds": (256,)},
    ),
    "sd3": (
        {
            "num_layers": 6, "num_attention_heads": 4, "caption_projection_dim": 256, "pos_embed_max_size": 32,
            "joint_attention_dim": 512, "pooled_projection_dim": 256,
        },
        256,
        {"prompt_embeds": (77 + 77, 512), "pooled_prompt_embeds": (256,)},
    ),
}  # fmt: skip
SMALL_VAE = {"block_out_channels": (32, 64, 64, 64)}
SMALL_DINOV2 = {"hidden_size": 192, "num_attention_heads": 3, "image_size": 112}
# As published: the images' side and the shapes of an image's embeddings.
FULL = {
    "sd15": (512, {"prompt_embeds": (77, 768)}),
    "sdxl": (1024, {"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,)}),
    "sd3": (1024, {"prompt_embeds": (77 + 256, 4096), "pooled_prompt_embeds": (2048,)}),
}


def architecture(family, full_size):
    """Options of a family's network, VAE and DINOv2, the images' side, and the shapes of an image's embeddings."""
    network, vae, dinov2 = NETWORKS[family], VAES[family], DINOV2
    if full_size:
        return network, vae, dinov2, *FULL[family]
    own, *rest = SMALL[family]
    return network | own, vae | SMALL_VAE, dinov2 | SMALL_DINOV2, *rest


def parse_args(input_args=None):
    """This program's options, and a list of those of the training scripts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--full_size", action="store_true", help="The published architectures; needs a GPU.")
    parser.add_argument(
        "--num_steps", type=int, default=None, help="Of the path: 25, a random start's mean; small: 4."
    )
    parser.add_argument("--rounds", type=int, default=5, help="After one that is not counted.")
    parser.add_argument("--json", type=Path, default=None, help="A file to add all samples to, a line a family.")
    parser.add_argument("--trace", type=Path, default=None, help="A file for a profile of two more iterations.")
    parser.add_argument("--without_plain_autograd", action="store_true", help="Which needs much memory.")
    parser.add_argument("--compile", action="store_true", help="Beside the eager ones the compiled networks.")
    return parser.parse_known_args(input_args)


# What is timed


class Clock:
    """Seconds, and on a GPU peak bytes, of what `mark` names when it ends, summed over what has one name."""

    def __init__(self, accelerator):
        self.cuda = accelerator.device.type == "cuda"
        self.alone = accelerator.num_processes == 1
        self.reset()

    def reset(self):
        self.seconds, self.peak = defaultdict(float), defaultdict(int)
        self.start()

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.process_time() if self.alone and not self.cuda else time.perf_counter()

    def start(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.last = self.now()

    def mark(self, name):
        self.seconds[name] += self.now() - self.last
        if self.cuda:
            self.peak[name] = max(self.peak[name], torch.cuda.max_memory_allocated())
        self.start()

    def marked(self, function, after, before=None):
        """The same function, at whose end all since the last mark is `after`'s, at its beginning `before`'s."""

        def wrapper(*args, **kwargs):
            if before is not None:
                self.mark(before)
            result = function(*args, **kwargs)
            if after is not None:
                self.mark(after)
            return result

        return wrapper


class MadeUpPrompts:
    """A script's `PromptEncoder`, of random embeddings."""

    def __init__(self, shapes, device):
        generator = torch.Generator().manual_seed(0)
        self.on_device = contextlib.nullcontext()
        self.negative, self.positive = (
            {name: torch.randn(1, *shape, generator=generator).to(device) for name, shape in shapes.items()}
            for _ in range(2)
        )

    def __call__(self, prompts):
        return {name: value.expand(len(prompts), *value.shape[1:]) for name, value in self.positive.items()}


class System:
    """A family's networks with random weights, prepared as its script prepares them, and what is done with them."""

    def __init__(self, family, full_size, num_steps, options, folder):
        self.family, self.module = family, MODULES[family]
        network_options, vae_options, dinov2_options, resolution, shapes = architecture(family, full_size)
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(**dinov2_options)).save_pretrained(folder)
        self.args = self.module.parse_args([
            "--pretrained_model_name_or_path", "none", "--dataset_name", "none", "--report_to", "none",
            "--output_dir", str(folder), "--discriminator_model_name_or_path", str(folder),
            "--resolution", str(resolution),
            "--discriminator_resolution", str(dinov2_options["image_size"]), "--learning_rate", "1e-9",
            "--discriminator_learning_rate", "1e-9", "--num_inference_steps", str(num_steps),
            "--max_train_steps", "2", "--generator_update_interval", "2", "--lr_warmup_steps", "0", *options,
        ])  # fmt: skip
        self.args.seed = self.seed_of_first_steps()
        self.accelerator = start_accelerator(self.args)
        self.device = self.accelerator.device
        self.clock = Clock(self.accelerator)
        torch.manual_seed(0)  # the same weights on every process
        with torch.device(self.device):
            side = resolution // 8
            network = self.module.FAMILY.network_class(sample_size=side, **network_options)
            vae = freeze_vae(AutoencoderKL(**vae_options), torch.float32, self.args, self.accelerator)
        interruption = SimpleNamespace(is_due=lambda done: False, stopped_after=None)
        self.run = Run(
            self.module.FAMILY, adt_or_plain(self.args), self.args, self.accelerator, None, {}, None, 0, resolution,
            None, interruption,
        )  # fmt: skip
        sampler, noise_scheduler = self.make_schedulers(side)
        prompts = MadeUpPrompts(shapes, self.device)
        self.models = FrozenModels(vae, prompts, sampler, noise_scheduler)
        self.generator = prepare_generator(prepare_network(network, self.args, self.accelerator), self.run)
        self.adversary = Adversary(self.run)
        self.examples = self.make_examples(resolution)
        self.calls = Counter()
        self.count_calls()

    def seed_of_first_steps(self) -> int:
        """One by which both iterations start at the path's first step."""
        steps = self.args.num_inference_steps
        starts = (
            [torch.randint(steps, (1,), generator=make_generator(seed, "path", n)).item() for n in range(2)]
            for seed in range(100 * steps**2)
        )
        return next(seed for seed, start in enumerate(starts) if start == [0, 0])

    def make_schedulers(self, side):
        if self.family == "sd3":
            scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
            return self.module.make_sampler(self.args, scheduler.config, (side // 2) ** 2), scheduler
        scheduler = DDPMScheduler(**SCHEDULE)
        return self.module.make_sampler(self.args, scheduler.config), scheduler

    def make_examples(self, resolution) -> dict:
        """A micro-batch as the data loader gives it."""
        count, generator = self.args.train_batch_size, torch.Generator().manual_seed(0)
        size = (count, 3, resolution, resolution)
        return {
            "captions": [f"a made up picture {n}" for n in range(count)],
            "pixel_values": torch.randint(256, size, generator=generator, dtype=torch.uint8),
            "positions": list(range(count)),
            "original_sizes": torch.full((count, 2), resolution),
            "crop_top_lefts": torch.zeros(count, 2, dtype=torch.long),
        }

    def count_calls(self):
        """Has `calls` count (network, whether with gradient), in micro-batches: a pass of both branches is two."""
        networks = {
            "network": self.generator.network,
            "features": self.adversary.feature_network,
            "discriminator": self.adversary.discriminator.network,
        }
        for name, network in networks.items():

            def count(module, args, kwargs, name=name):
                rows = args[0] if args else kwargs["hidden_states"]
                rows = len(rows) if name == "network" else self.args.train_batch_size
                self.calls[name, torch.is_grad_enabled()] += rows / self.args.train_batch_size

            network.register_forward_pre_hook(count, with_kwargs=True)

    def train(self):
        """The script's training loop over two iterations. Returns each one's seconds and peaks by part."""
        module, clock, iterations = self.module, self.clock, []

        class Progress:
            def __init__(progress, *args):
                clock.reset()

            def log(progress, values, iteration, started):
                clock.mark("rest")
                iterations.append((dict(clock.seconds), dict(clock.peak), dict(self.calls)))
                self.calls.clear()
                clock.reset()

            def close(progress):
                pass

        @contextlib.contextmanager
        def marked_gathering(generator):
            with gathered(generator):
                if self.args.shard:
                    clock.mark("gather")
                yield

        def marked_passes(result, *args, **kwargs):
            return [clock.marked(one, "replay") for one in replay(result, *args, **kwargs)]

        def update_generator(*args):
            # Both updates total, step and so on; the marks are this one's.
            with contextlib.ExitStack() as stack:
                for owner, name, after, before in (
                    (SimulatedInference, "prediction_gradients", "score and its gradient", None),
                    (Totals, "reduce", None, "diffusion loss"),
                    (Trained, "step", "generator's optimizer", "replay"),
                ):
                    function = clock.marked(getattr(owner, name), after, before)
                    stack.enter_context(mock.patch.object(owner, name, function))
                return original_update(*args)

        self.calls.clear()
        replay, original_update, gathered = SimulatedInference.replay, module.update_generator, Trained.gathered
        with (
            mock.patch.multiple(
                module,
                Progress=Progress,
                load_micro_batches=lambda run, save: iter(lambda: self.examples, None),
                prepare_batch=clock.marked(module.prepare_batch, "encode"),
                roll_out=clock.marked(module.roll_out, "rollout"),
                decode_latents=clock.marked(module.decode_latents, "decode"),
                update_discriminator=clock.marked(module.update_discriminator, "discriminator"),
                update_generator=clock.marked(update_generator, "generator's optimizer"),
            ),
            mock.patch.object(SimulatedInference, "replay", marked_passes),
            mock.patch.object(Trained, "gathered", marked_gathering),
        ):
            validation = SimpleNamespace(is_due=lambda done: False, drifted=False)
            module.train(self.generator, self.adversary, self.models, validation, self.run)
        return iterations

    # What it is compared with

    def prepare(self):
        """A micro-batch after step 1, for what is measured by itself."""
        self.batch = self.module.prepare_batch(self.examples, 0, self.models, self.run)
        self.timestep = self.models.sampler.timesteps[0].to(self.device)
        self.predict = make_predict(self.generator.wrapped, self.batch.conditions, self.module.call_network)
        self.latents = self.batch.noise * getattr(self.models.sampler, "init_noise_sigma", 1.0)

    def stock_pipeline(self):
        sampler, family = self.models.sampler, self.module.FAMILY
        pipeline = family.pipeline_class(
            vae=self.models.vae,
            scheduler=type(sampler).from_config(sampler.config),
            **{family.network_name: self.generator.network},
            **family.without_text_encoders,
        )
        pipeline.set_progress_bar_config(disable=True)
        conditions = self.batch.conditions
        embeddings = {name: value for name, value in conditions.positive.items() if name != "time_ids"}
        embeddings |= {f"negative_{name}": value for name, value in conditions.negative.items() if name != "time_ids"}
        call = family.inference_options(self.args) | {"output_type": "latent"}
        call |= dict.fromkeys(("height", "width"), self.args.resolution)
        with self.generator.gathered(), self.accelerator.autocast():
            self.clock.start()
            pipeline(**embeddings, latents=self.batch.noise, **call)
            self.clock.mark("stock pipeline")

    def finetuning_step(self):
        run = SimpleNamespace(args=self.args.replace(adversarial_loss_weight=0.0), accelerator=self.accelerator)
        self.clock.start()
        self.module.update_finetune([self.batch], 0, self.generator, self.models, run)
        self.clock.mark("plain fine-tuning step")

    def score(self, images):
        features = self.adversary.features(self.batch, images, "generator")
        reference = self.adversary.reference_features(self.batch, "generator")
        with self.adversary.discriminator.frozen() as scorer:
            return generator_loss(scorer(features, reference))

    def plain_autograd(self):
        """The generator's adversarial gradient through K kept graphs; the last steps are those that send one."""
        scheduler = copy.deepcopy(self.models.sampler)
        chosen = range(self.args.num_inference_steps)[-self.args.num_gradient_steps :]
        self.batch.real_features.clear()
        latents, timesteps = self.latents, scheduler.timesteps
        self.clock.start()
        with self.accelerator.autocast():
            for index, timestep in enumerate(timesteps):
                model_input = torch.cat([latents.detach()] * 2)
                if hasattr(scheduler, "scale_model_input"):
                    model_input = scheduler.scale_model_input(model_input, timestep)
                with torch.set_grad_enabled(index in chosen):
                    prediction = self.predict(model_input, timestep.to(self.device), (0, 1)).float()
                guided = classifier_free_guidance(prediction, self.args.guidance_scale)
                latents = constrained_step(scheduler, guided, timestep, latents)
        loss = self.score(self.module.decode_latents(self.models.vae, latents))
        self.accelerator.backward(loss)
        self.clock.mark("plain autograd, K graphs")
        self.generator.optimizer.zero_grad(set_to_none=True)

    def bare_parts(self):
        """Each network's calls by themselves, and the optimizers."""
        clock, batch, vae = self.clock, self.batch, self.models.vae
        encode, decode = self.module.encode_images, self.module.decode_latents
        both, real_noise = torch.cat([batch.latents] * 2), torch.zeros_like(batch.latents)
        discriminator, feature_network = self.adversary.discriminator, self.adversary.feature_network
        self.generator.wrapped.eval()
        clock.start()
        with self.generator.gathered(), torch.no_grad(), self.accelerator.autocast():
            clock.mark("bare gather")
            for _ in range(self.args.num_inference_steps):  # one autocast casts a weight once, as in the rollout
                self.predict(both, self.timestep, (0, 1))
            clock.mark("forwards")
        for branch in (0, 1):
            with self.generator.synchronise_if(branch == 1):
                self.accelerator.backward(self.predict(batch.latents, self.timestep, (branch,)).float().mean())
        clock.mark("two forwards and backwards")
        self.generator.step(0)
        clock.mark("generator's step")
        encode(vae, batch.images, real_noise)
        clock.mark("bare encode")
        with torch.no_grad():
            decode(vae, batch.latents)
        clock.mark("bare decode")
        latents = batch.latents.clone().requires_grad_()
        torch.autograd.grad(decode(vae, latents).mean(), latents)
        clock.mark("bare decode and its gradient")
        with torch.no_grad():
            features = feature_network(batch.images)
        clock.mark("bare features")
        images = batch.images.clone().requires_grad_()
        torch.autograd.grad(sum(layer.mean() for layer in feature_network(images)), images)
        clock.mark("bare features and their gradient")
        self.accelerator.backward(discriminator.wrapped(features, features).mean())
        clock.mark("bare discriminator")
        self.adversary.step(0)
        clock.mark("discriminator's step")

    def floor(self, bare, calls, updates_generator) -> tuple[float, float]:
        """The seconds of all that an iteration calls, each by itself; and without the encoding and the optimizers.

        Args:
            bare: the seconds of `bare_parts`.
            calls: the iteration's.
        """
        total = calls["network", False] * bare["forwards"] / (2 * self.args.num_inference_steps)
        total += calls.get(("network", True), 0) * bare["two forwards and backwards"] / 2
        total += bare["bare decode and its gradient" if updates_generator else "bare decode"]
        total += calls["features", False] * bare["bare features"]
        total += calls.get(("features", True), 0) * bare["bare features and their gradient"]
        total += calls["discriminator", True] * bare["bare discriminator"]
        total += bare["bare gather"]  # of a network that is not sharded, nothing
        others = bare["bare encode"] + bare["discriminator's step"] + updates_generator * bare["generator's step"]
        return total + others, total

    def round(self, plain_autograd) -> tuple[dict, dict, list]:
        """Everything once. Returns seconds and peaks by name, and each iteration's calls."""
        (first, first_peak, first_calls), (second, second_peak, second_calls) = self.train()
        self.clock.reset()
        self.prepare()
        self.stock_pipeline()
        self.finetuning_step()
        if plain_autograd:
            self.plain_autograd()
        self.bare_parts()
        seconds, peaks = dict(self.clock.seconds), dict(self.clock.peak)
        for iteration, name in ((first, "discriminator iteration"), (second, "generator iteration")):
            seconds[name] = sum(iteration.values())
            seconds |= {f"{name}: {part}": value for part, value in iteration.items()}
        for iteration, name in ((first_peak, "discriminator iteration"), (second_peak, "generator iteration")):
            peaks |= {f"{name}: {part}": value for part, value in iteration.items()}
        for n, (calls, name) in enumerate(((first_calls, "discriminator"), (second_calls, "generator"))):
            whole, networks = self.floor(self.clock.seconds, calls, n == 1)
            seconds |= {f"{name} iteration's floor": whole, f"{name} iteration's networks": networks}
        # What a gradient by kept graphs is compared with: all of this but the diffusion loss and the optimizer.
        parts = ("rollout", "decode", "score and its gradient", "replay")
        seconds["adversarial gradient by replays"] = sum(second[part] for part in parts)
        return seconds, peaks, [first_calls, second_calls]


# (ratio, of what, to what); those that are measured.
RATIOS = {
    "rollout / stock pipeline": ("discriminator iteration: rollout", "stock pipeline"),
    "discriminator iteration / floor": ("discriminator iteration", "discriminator iteration's floor"),
    "generator iteration / floor": ("generator iteration", "generator iteration's floor"),
    "discriminator iteration / its networks": ("discriminator iteration", "discriminator iteration's networks"),
    "generator iteration / its networks": ("generator iteration", "generator iteration's networks"),
    "generator iteration / plain fine-tuning step": ("generator iteration", "plain fine-tuning step"),
    "gradient by replays / by K graphs": ("adversarial gradient by replays", "plain autograd, K graphs"),
}


# What is compared between the columns of eager and of compiled networks.
COMPILED = tuple(f"{name} iteration{part}" for name, part in (
    ("discriminator", ""), ("generator", ""), ("discriminator", ": rollout"), ("discriminator", ": decode"),
    ("discriminator", ": discriminator"), ("generator", ": score and its gradient"), ("generator", ": replay"),
))  # fmt: skip


def measure(family, args, options, folder) -> list[dict]:
    """The results of eager networks, and of compiled ones behind them."""
    num_steps = args.num_steps or (25 if args.full_size else 4)
    compiling = ["--compile"] * args.compile
    system = System(family, args.full_size, num_steps, [*options, *compiling], folder)
    plain_autograd = system.accelerator.num_processes == 1 and not args.without_plain_autograd
    stances = ["force_eager", "default"][: 1 + args.compile]
    rounds, first_rounds, graphs = {stance: [] for stance in stances}, {}, 0
    for n in range(1 + args.rounds):
        for stance in stances:
            started = time.perf_counter()
            with torch.compiler.set_stance(stance):
                result = system.round(plain_autograd)
            if n > 0:
                rounds[stance].append(result)
            else:
                first_rounds[stance] = time.perf_counter() - started
                graphs = compiled_graphs()
    recompiled = compiled_graphs() - graphs
    if args.trace is not None:  # of the compiled networks, where there are any
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities[: 1 + system.clock.cuda]) as profile:
            system.train()
        profile.export_chrome_trace(str(args.trace.with_stem(f"{args.trace.stem}-{family}")))
    results = [summarise(system, args, options, rounds["force_eager"], first_rounds["force_eager"])]
    if args.compile:
        compiled = summarise(system, args, [*options, *compiling], rounds["default"], first_rounds["default"])
        compiled |= {"compiled_graphs": graphs, "recompiled": recompiled}
        for name in COMPILED:
            pairs = zip(compiled["seconds"][name], results[0]["seconds"][name], strict=True)
            compiled["ratios"][f"{name} / eager"] = [above / below for above, below in pairs]
        results.append(compiled)
    return results


def summarise(system, args, options, rounds, first_round) -> dict:
    samples = {name: [seconds[name] for seconds, _, _ in rounds] for name in rounds[0][0]}
    ratios = {
        name: [above / below for above, below in zip(samples[first], samples[second], strict=True)]
        for name, (first, second) in RATIOS.items()
        if second in samples
    }
    trained = sum(p.numel() for p in system.generator.network.parameters() if p.requires_grad)
    return {
        "family": system.family,
        "processes": system.accelerator.num_processes,
        "full_size": args.full_size,
        "options": options,
        "num_steps": system.args.num_inference_steps,
        "num_gradient_steps": system.args.num_gradient_steps,
        "resolution": system.args.resolution,
        "batch": system.args.train_batch_size,
        "parameters": sum(p.numel() for p in system.generator.network.parameters()),
        "trained": trained,
        "mixed_precision": system.accelerator.mixed_precision,
        "device": torch.cuda.get_device_name() if system.clock.cuda else platform.machine() + " CPU, one thread",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "load": os.getloadavg()[0],
        "first_round_s": first_round,
        "compiled_graphs": 0,
        "recompiled": 0,
        "calls": [
            {f"{network}, gradient {grad}": count for (network, grad), count in calls.items()}
            for calls in rounds[0][2]
        ],
        "seconds": samples,
        "ratios": ratios,
        "peak_bytes": {name: max(peaks[name] for _, peaks, _ in rounds) for name in rounds[0][1]},
    }  # fmt: skip


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# What is printed


ROWS = (
    "discriminator iteration",
    *(
        f"discriminator iteration: {part}"
        for part in ("encode", "gather", "rollout", "decode", "discriminator", "rest")
    ),
    "generator iteration",
    *(
        f"generator iteration: {part}"
        for part in (
            "encode", "gather", "rollout", "decode", "discriminator", "score and its gradient", "diffusion loss",
            "replay", "generator's optimizer", "rest",
        )
    ),
    "stock pipeline",
    "plain fine-tuning step",
    "adversarial gradient by replays",
    "plain autograd, K graphs",
    "discriminator iteration's floor",
    "generator iteration's floor",
)  # fmt: skip


def spread(values) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def table(header, rows) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def title(result) -> str:
    return " ".join([result["family"], *result["options"]])


def value_or_nothing(values, name) -> str:
    return spread(values[name]) if name in values else ""


def report(results) -> str:
    """Tables of several results, one column each."""
    first = results[0]
    processes = f", {first['processes']} processes" if first["processes"] > 1 else ""
    lines = [
        f"{first['device']}{processes}, torch {first['torch']}, diffusers {first['diffusers']}, "
        f"{first['num_steps']} steps, K = {first['num_gradient_steps']}, mixed precision "
        f"{first['mixed_precision']}; medians of {len(first['seconds']['stock pipeline'])} rounds (least to most)",
        "",
    ]
    header = [title(result) for result in results]
    facts = [
        [name, *(f"{result[key]:,}" for result in results)]
        for name, key in (("parameters", "parameters"), ("images", "batch"), ("side", "resolution"))
    ]
    for n, name in enumerate(("discriminator", "generator")):
        for grad, what in ((False, "network evaluations of a micro-batch"), (True, "... with gradient")):
            key = f"network, gradient {grad}"
            facts.append([f"{name} iteration: {what}", *(f"{r['calls'][n].get(key, 0):g}" for r in results)])
    facts.append(["first round, s", *(f"{result['first_round_s']:.0f}" for result in results)])
    if any(result["compiled_graphs"] for result in results):
        facts.append(["compiled graphs", *(str(result["compiled_graphs"]) for result in results)])
        facts.append(["of these after the first round", *(str(result["recompiled"]) for result in results)])
    lines += [table(["", *header], facts), ""]
    names = dict.fromkeys(name for result in results for name in result["ratios"])
    ratios = [[name, *(value_or_nothing(result["ratios"], name) for result in results)] for name in names]
    lines += [table(["ratio", *header], ratios), ""]
    rows = [[name, *(spread(r["seconds"][name]) for r in results)] for name in ROWS if name in first["seconds"]]
    lines += [table(["seconds", *header], rows), ""]
    if first["peak_bytes"]:
        peaks = [
            [name, *(f"{r['peak_bytes'].get(name, 0) / 1e9:.2f}" for r in results)]
            for name in (*ROWS, "two forwards and backwards")
            if name in first["peak_bytes"]
        ]
        lines += [table(["peak GB", *header], peaks), ""]
    return "\n".join(lines)


def main(input_args=None):
    args, options = parse_args(input_args)
    torch.set_num_threads(torch.get_num_threads() if torch.cuda.is_available() else 1)
    results = []
    for family in args.family:
        with tempfile.TemporaryDirectory() as folder:
            own = measure(family, args, options, Path(folder))
        results += own
        if args.json is not None and PartialState().is_main_process:
            with args.json.open("a") as file:
                file.writelines(json.dumps(result) + "\n" for result in own)
    gc.collect()  # nothing refers to the process group any more
    is_main_process = PartialState().is_main_process
    PartialState().destroy_process_group()
    if not is_main_process:
        return
    print(f"`{' '.join(['python benchmarks/bench_iteration.py', *(input_args or sys.argv[1:])])}`\n")
    print(report(results))


if __name__ == "__main__":
    main()

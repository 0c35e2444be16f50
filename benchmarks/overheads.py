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
"""Measures what a run spends beside its networks: on data at its start, on casts in a rollout, on distances; and what
other ways to call them would save.

    python benchmarks/overheads.py                      # all of it, a few minutes on a CPU
    python benchmarks/overheads.py --only start casts

`benchmarks/overheads.md` has its figures, `docs/speed.md` those of `speed` and `dinov2`.
"""

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Dinov2Config, Dinov2Model


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from architectures import DINOV2, NETWORKS  # noqa: E402
from memory import SavedTensors  # noqa: E402

from adt_utils import simulate_inference  # noqa: E402
from data_utils import (  # noqa: E402
    GlobalBatchSampler,
    check_used_images,
    identify_data,
    load_image_caption_dataset,
    make_dataloader,
)
from evaluate_metrics import FrechetDistance  # noqa: E402
from speed_utils import compile_hidden_states, compile_options  # noqa: E402
from train_adt_sd15 import parse_args as parse_training_args  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--num_files", type=int, default=100, help="Images of 1024x1024 that are made.")
    parser.add_argument("--num_rows", type=int, default=160_000, help="Rows that repeat them: the paper's number.")
    return parser.parse_args()


def measure(title, function):
    """Prints the CPU seconds, the growth of the resident set and the bytes read, and returns the function's value."""
    process = psutil.Process()
    memory, read, started = process.memory_info().rss, process.io_counters().read_chars, time.process_time()
    value = function()
    seconds = time.process_time() - started
    memory, read = process.memory_info().rss - memory, process.io_counters().read_chars - read
    print(f"{title}: {seconds:.2f} CPU s, {memory / 1e6:+.0f} MB resident, {read / 1e6:.0f} MB read", flush=True)
    return value


def measure_start(args):
    """What a start looks up and decodes of images on disk."""
    accelerator = Accelerator(cpu=True)
    with tempfile.TemporaryDirectory() as folder:
        write_images(folder, args.num_files)
        options = {
            kind: parse_training_args([
                "--pretrained_model_name_or_path", "none", "--train_data_dir", folder, "--resolution", "1024",
                "--train_batch_size", "8", "--cache_dir", str(Path(folder, "cache")), "--check_images", kind,
            ])
            for kind in ("all", "sample")
        }  # fmt: skip
        dataset = load_image_caption_dataset(options["all"])
        for kind, title in (("all", "decoding all"), ("all", "the same again, remembered")):
            measure(
                f"start, {len(dataset)} images, {title}",
                lambda kind=kind: check_used_images(dataset, 0, options[kind], accelerator),
            )
        paths = [row["path"] for row in dataset["image"]]
        table = {
            "image": [{"path": paths[n % len(paths)], "bytes": None} for n in range(args.num_rows)],
            "text": [f"a made up picture {n}" for n in range(args.num_rows)],
        }
        rows = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image(decode=False))
        measure(
            f"start, {args.num_rows} rows, a sample decoded",
            lambda: check_used_images(rows, 0, options["sample"], accelerator),
        )
        measure(f"recognising {args.num_rows} rows", lambda: identify_data(rows, options["sample"]))


def measure_loading(args):
    """What the process that trains waits for images, while a device that needs no CPU computes."""
    with tempfile.TemporaryDirectory() as folder:
        write_images(folder, 24)
        options = parse_training_args([
            "--pretrained_model_name_or_path", "none", "--train_data_dir", folder, "--resolution", "1024",
            "--train_batch_size", "2", "--max_train_steps", "12", "--cache_dir", str(Path(folder, "cache")),
        ])  # fmt: skip
        dataset, accelerator = load_image_caption_dataset(options), Accelerator(cpu=True)
        for num_workers in (0, options.dataloader_num_workers):
            run = argparse.Namespace(
                args=options.replace(dataloader_num_workers=num_workers), dataset=dataset, accelerator=accelerator,
                first_iteration=0,
            )  # fmt: skip
            loader, waits = iter(make_dataloader(run)), []
            for _ in range(12):
                started = time.perf_counter()
                next(loader)
                waits.append(1e3 * (time.perf_counter() - started) / 2)
                time.sleep(1)
            usual, least, most = statistics.median(waits[2:]), min(waits[2:]), max(waits[2:])
            print(f"{num_workers} workers: {usual:.1f} ms an image ({least:.1f} to {most:.1f}) waited for", flush=True)


def write_images(folder, count):
    """Pictures of 1024x1024, with captions."""
    noise = np.random.default_rng(0).integers(0, 160, (1024, 1024, 3), dtype=np.uint8)
    rows = []
    for n in range(count):
        Image.fromarray(np.roll(noise, n, axis=0)).save(Path(folder, f"{n:06d}.png"))
        rows.append(f'{{"file_name": "{n:06d}.png", "text": "a made up picture {n}"}}')
    Path(folder, "metadata.jsonl").write_text("\n".join(rows))


def measure_order(args):
    """The permutation of five million images."""
    options = parse_training_args(["--pretrained_model_name_or_path", "none", "--dataset_name", "none"])
    measure("order of 5,000,000 images", lambda: next(iter(GlobalBatchSampler(5_000_000, options))))


class Casts(TorchDispatchMode):
    """Counts the casts of a network's weights."""

    def __init__(self, network):
        super().__init__()
        self.weights, self.count = {parameter.data_ptr() for parameter in network.parameters()}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.weights:
            self.count += 1
        return function(*args, **(kwargs or {}))


def measure_casts(args):
    """Ten steps of a tiny UNet in bfloat16, with an autocast for each forward and with one around them."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    config = {**UNet2DConditionModel.load_config(ROOT / "demo" / "assets" / "pipeline" / "unet")}
    network = accelerator.prepare(UNet2DConditionModel.from_config(config).eval())
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    scheduler.set_timesteps(10)
    latents = torch.randn(2, config["in_channels"], 8, 8)
    embeddings = torch.randn(4, 12, config["cross_attention_dim"])

    def roll_out():
        def predict(sample, timestep, branches):
            return network(sample, timestep, encoder_hidden_states=embeddings).sample

        return simulate_inference(predict, scheduler, latents, 0, 7.0).latents

    def roll_out_in_one():
        with accelerator.autocast():
            return roll_out()

    for title, function in (("an autocast a forward", roll_out), ("one autocast", roll_out_in_one)):
        with Casts(network) as casts:
            function()
        times = []
        for _ in range(9):
            started = time.process_time()
            function()
            times.append((time.process_time() - started) / 10)
        print(f"ten steps, {title}: {casts.count} casts of weights, {1e3 * sorted(times)[4]:.1f} CPU ms a step")
    print(f"the same latents: {torch.equal(roll_out(), roll_out_in_one())}")


def measure_distances(args):
    """A bootstrap of Fréchet distances at Inception's width: the real side once, then one for each resample."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(1, 0.01, 2048)[:, None]
    mixing = torch.randn(2048, 2048, generator=generator) * scale
    real, made = (torch.randn(5000, 2048, generator=generator) @ mixing for _ in range(2))
    distance = measure("distance, the real side", lambda: FrechetDistance(real, torch.device("cpu")))
    to_made = measure("distance, the other side", lambda: distance.to(made))
    measure("distance, one resample", lambda: to_made(torch.randint(5000, (5000,), generator=generator)))


def compare(title, function, other):
    """Prints by how much longer `other` takes, the median of three rounds in which both run."""

    def seconds(function):
        started = time.process_time()
        function()
        return time.process_time() - started

    ratios = [seconds(other) / seconds(function) for _ in range(4)][1:]
    print(f"{title}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def measure_speed(args):
    """Of SD1.5's UNet at half of its width, on 16x16 latents in float32, and of AdamW."""
    half = {"block_out_channels": (160, 320, 640, 640), "cross_attention_dim": 384}
    network = UNet2DConditionModel(sample_size=16, **NETWORKS["sd15"] | half).eval()
    channels_last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    embeddings = torch.randn(4, 77, 384)

    def forward(network):
        return network(torch.randn(4, 4, 16, 16), 500, encoder_hidden_states=embeddings).sample

    forward_alone = torch.no_grad()(forward)
    compare("forward, channels-last / usual", lambda: forward_alone(network), lambda: forward_alone(channels_last))
    compare(
        "forward and backward, channels-last / usual",
        lambda: forward(network).sum().backward(),
        lambda: forward(channels_last).sum().backward(),
    )

    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    scheduler.set_timesteps(2)

    def predict(sample, timestep, branches):
        return network(sample, timestep, encoder_hidden_states=embeddings[: len(sample)]).sample

    rollout = simulate_inference(predict, scheduler, torch.randn(2, 4, 16, 16), 0, 7.0, train_steps=[0])
    vectors = [torch.randn_like(step.prediction) for step in rollout.train_steps]

    def replay(together):
        for run in rollout.replay(predict, vectors, together):
            run().backward()

    compare("replay, branches together / separate", lambda: replay(False), lambda: replay(True))
    peaks = []
    for together in (False, True):
        with SavedTensors(network) as saved:
            replay(together)
        peaks.append(saved.peak)
    print(f"activations that a pass saves, together / separate: {peaks[1] / peaks[0]:.2f}")

    weights = [torch.nn.Parameter(torch.randn(1000, 1000)) for _ in range(20)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    steps = [torch.optim.AdamW(weights, fused=fused).step for fused in (False, True)]
    compare("AdamW, one kernel / many", *steps)


def measure_dinov2(args):
    """DINOv2 at half of its width on 112x112 images, in float32, compiled by layer and whole."""
    config = Dinov2Config(**DINOV2 | {"hidden_size": 192, "num_attention_heads": 3, "image_size": 112})
    eager = Dinov2Model(config).eval().requires_grad_(False)
    by_layer, whole = copy.deepcopy(eager), copy.deepcopy(eager)
    for layer in by_layer.encoder.layer:  # their forwards: the library's hooks on layers cannot be compiled
        layer.forward = torch.compile(layer.forward, **compile_options())
    compile_hidden_states(whole)
    images = torch.randn(2, 3, 112, 112, requires_grad=True)

    def gradient(model):
        hidden_states = model(pixel_values=images, output_hidden_states=True).hidden_states
        return torch.autograd.grad(sum(state.square().mean() for state in hidden_states), images)[0]

    expected = gradient(eager)
    for title, model in (("by layer", by_layer), ("whole", whole)):
        started = sum(os.times()[:4])  # with a C++ compiler's
        difference = (gradient(model) - expected).norm() / expected.norm()
        seconds = sum(os.times()[:4]) - started
        print(f"DINOv2 {title}: {seconds:.0f} CPU s at first, gradient {difference:.0e} from eager", flush=True)
        compare(f"forward and backward, {title} / eager", lambda: gradient(eager), lambda model=model: gradient(model))


MEASUREMENTS = {
    "start": measure_start,
    "loading": measure_loading,
    "order": measure_order,
    "casts": measure_casts,
    "distances": measure_distances,
    "speed": measure_speed,
    "dinov2": measure_dinov2,
}


def main():
    args = parse_args()
    torch.set_num_threads(1)
    for name in args.only:
        AcceleratorState._reset_state(True)  # of the measurement before, which may have been in another precision
        MEASUREMENTS[name](args)


if __name__ == "__main__":
    main()

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
"""Times intervals of generator updates with their rollouts one by one and together; random weights, no downloads.

    python benchmarks/rollouts.py                                               # three small models, on a CPU
    python benchmarks/rollouts.py --family sd15 --train_batch_size 1
    python benchmarks/rollouts.py --family sdxl --full_size --mixed_precision bf16 --gradient_checkpointing

Options that are not this program's are the training scripts'. What is timed is the script's own `train`, from one
generator update to the next, with the paper's steps and guidance and the start indices that seed 0 draws. Each
interval is run both ways, in turn, with the same draws. Models and seconds are those of `bench_iteration.py`.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.bench_iteration import MODULES, System, table  # noqa: E402
from data_utils import draw_path  # noqa: E402


NUM_STEPS = {"sd15": 50, "sdxl": 50, "sd3": 28}


def parse_args(input_args=None):
    """This program's options, and a list of those of the training scripts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--full_size", action="store_true", help="The published architectures; needs a GPU.")
    parser.add_argument("--num_steps", type=int, default=None, help="Of the path; the paper's.")
    parser.add_argument("--num_intervals", type=int, default=20, help="After one that is not counted.")
    return parser.parse_known_args(input_args)


def seconds_of(system, first_iteration, args) -> Counter:
    """Seconds of the script's iterations from one on, by part."""
    system.run = dataclasses.replace(system.run, first_iteration=first_iteration, args=args)
    seconds = Counter()
    for parts, _, _ in system.train():
        seconds.update(parts)
    return seconds


def measure(family, args, options, folder) -> list[str]:
    """A row of the table."""
    system = System(family, args.full_size, args.num_steps or NUM_STEPS[family], options, folder)
    own = system.args.replace(seed=0)
    interval, steps = own.generator_update_interval, own.num_inference_steps
    totals, ratios, calls = {1: Counter(), interval: Counter()}, [], Counter()
    for n in range(args.num_intervals + 1):
        iterations, seconds = range(n * interval, (n + 1) * interval), {}
        for together in sorted(totals, reverse=n % 2):
            changed = own.replace(max_train_steps=iterations.stop, rollouts_per_batch=together)
            seconds[together] = seconds_of(system, iterations.start, changed)
        if n == 0:
            continue
        lengths = [steps - draw_path(iteration, own)[0] for iteration in iterations]
        calls.update({1: sum(lengths), interval: max(lengths)})
        for together, parts in seconds.items():
            totals[together].update(parts)
        ratios.append(seconds[interval].total() / seconds[1].total())
        print(f"{family}, interval {n}, together / one by one: {ratios[-1]:.2f}", file=sys.stderr, flush=True)
    images = args.num_intervals * interval * own.train_batch_size
    separate, together = totals[1], totals[interval]
    return [
        f"{family}, {own.train_batch_size} a batch",
        f"{calls[1]} / {calls[interval]}",
        f"{together['rollout'] / separate['rollout']:.2f}",
        f"{together.total() / separate.total():.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{images / separate.total():.3g} / {images / together.total():.3g}",
    ]


HEADER = ["images", "calls, one by one / together", "rollouts, together / one by one",
          "a whole interval, together / one by one", "images a second, one by one / together"]  # fmt: skip


def main(input_args=None):
    args, options = parse_args(input_args)
    torch.set_num_threads(torch.get_num_threads() if torch.cuda.is_available() else 1)
    options = ["--generator_update_interval", "5", *options]
    rows = []
    for family in args.family:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(family, args, options, Path(folder)))
    print(f"`{' '.join(['python benchmarks/rollouts.py', *(sys.argv[1:] if input_args is None else input_args)])}`\n")
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()

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
"""Estimates on paper how an ADT iteration scales to many cards; needs no GPU, measures nothing.

    python benchmarks/scaling.py > benchmarks/scaling.md     # about a minute on a CPU

Counted: the operations of the full-size networks (`torch.utils.flop_counter`, on tensors that have shapes only), their
parameters, and how often each of them runs and is gathered or reduced. Published: the cards' peaks and bandwidths.
Assumed: the constants below that say so.
"""

import math
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from memory import sd3_model, sd15_model, sdxl_model, table  # noqa: E402


# Published, of an H100 SXM: dense peaks in FLOP/s, and bytes/s each way.
PEAK_BF16, PEAK_TF32 = 989e12, 494e12
NVLINK, INFINIBAND, CARDS_A_MACHINE = 450e9, 50e9, 8
# Assumed: the share of a peak that convolutions and attention reach; of a bandwidth that a collective does; and the
# seconds of a hop of one.
UTILISATION, BUS_UTILISATION, HOP_WITHIN, HOP_BETWEEN = 0.4, 0.8, 2e-6, 5e-6
# The method's defaults.
NUM_GRADIENT_STEPS, UPDATE_INTERVAL, BRANCHES, PAPER_BATCH, PAPER_IMAGES = 3, 5, 2, 8, 160_000
GRADIENT_PASSES = 1 + BRANCHES * NUM_GRADIENT_STEPS  # the diffusion loss's and the replays
DDP_BUCKET = 25e6  # bytes
CARDS = (1, 8, 64, 512)


@dataclass
class Work:
    """A family's counts, for one image."""

    num_steps: int
    network: float  # FLOPs of one forward, one guidance branch, as all that follow of one forward
    encoder: float
    decoder: float
    features: float
    discriminator: float  # of heads and predictors
    parameters: int  # the network's
    discriminator_parameters: int
    num_parts: int  # that `--shard` gathers the network in


def count_flops(function, *args) -> int:
    # Attention as two products of matrices, whose operations are known; a fused kernel does the same ones.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        function(*args)
    return counter.get_total_flops()


def count_parts(network) -> int:
    """Into how many parts `--shard` divides a network: its blocks that have weights of their own, and the rest."""
    blocks = [name for name, module in network.named_modules() if type(module).__name__ in network._no_split_modules]
    return len(
        {
            max((block for block in blocks if name.startswith(f"{block}.")), key=len, default="")
            for name, _ in network.named_parameters()
        }
    )


def count_work(build, num_steps) -> Work:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build(SimpleNamespace(train_batch_size=1))
        vae, discriminator = model.vae, model.discriminator
        side = 8 * model.latents.shape[-1]
        image = torch.zeros(1, 3, side, side)
        features = model.features(image)
        trained = torch.nn.ModuleList([discriminator.heads, discriminator.predictors])
        return Work(
            num_steps=num_steps,
            network=count_flops(model.predict, model.latents, model.sampler.timesteps[0]),
            encoder=count_flops(vae.encode, image),
            decoder=count_flops(vae.decode, model.latents),
            features=count_flops(model.features, image),
            # A twin head is as large as a head, so that what the pair takes is close to twice what trains.
            discriminator=count_flops(discriminator, features, features) / 2,
            parameters=sum(parameter.numel() for parameter in model.network.parameters()),
            discriminator_parameters=sum(parameter.numel() for parameter in trained.parameters()),
            num_parts=count_parts(model.network),
        )


FAMILIES = {
    "SD1.5, 512²": (sd15_model, 50),
    "SDXL, 1024²": (sdxl_model, 50),
    "SD3 medium, 1024²": (sd3_model, 28),
}


def compute_seconds(work) -> dict[str, float]:
    """Of one image, each part's share of an iteration: a fifth of what only a generator's update has.

    With gradient checkpointing, a pass and its backward are four forwards of the network, and a backward through
    frozen weights is one forward, and one more for what is computed again.
    """
    network = work.network / (PEAK_BF16 * UTILISATION)
    float32 = {
        name: getattr(work, name) / (PEAK_TF32 * UTILISATION)
        for name in ("encoder", "decoder", "features", "discriminator")
    }
    replays = BRANCHES * NUM_GRADIENT_STEPS
    return {
        "encode": float32["encoder"],
        "rollout": (work.num_steps + 1) / 2 * BRANCHES * network,
        "decode": float32["decoder"],
        # Features of the real image, of its reference and of the generated one; each pair's heads with a backward.
        "discriminator": 3 * float32["features"] + 2 * 4 * float32["discriminator"],
        "scoring's backward": 2 * (float32["decoder"] + float32["features"]) / UPDATE_INTERVAL,
        "diffusion loss": 4 * network / UPDATE_INTERVAL,
        "replays": replays * 4 * network / UPDATE_INTERVAL,
    }


def collective_seconds(size, cards, count=1, tree=False) -> tuple[float, float]:
    """Of `count` collectives that together gather, or reduce and scatter, `size` bytes: moving them, and hops.

    Every card sends and receives `(cards - 1) / cards` of the bytes. Between machines each card has a link of its
    own, so that eight rings cross side by side. A ring's message visits every card, a tree's, of all-reduces, few.
    """
    if cards == 1:
        return 0.0, 0.0
    machines = max(1, cards // CARDS_A_MACHINE)
    bandwidth = NVLINK if machines == 1 else min(NVLINK, CARDS_A_MACHINE * INFINIBAND)
    if tree:
        within, between = math.log2(cards / machines), math.log2(machines)
    else:
        between = machines if machines > 1 else 0
        within = cards - 1 - between
    moving = (cards - 1) / cards * size / (bandwidth * BUS_UTILISATION)
    return moving, count * (within * HOP_WITHIN + between * HOP_BETWEEN)


def exchanges(work, sharded) -> dict[str, tuple[float, float]]:
    """What is gathered and reduced in an iteration, in bytes; of the generator's update a fifth."""
    discriminator = 2 * 4 * work.discriminator_parameters
    if not sharded:
        # An all-reduce is a reduction and a gathering of float32, in the update's last backward alone.
        return {
            "generator": (4 * work.parameters / UPDATE_INTERVAL, 4 * work.parameters / UPDATE_INTERVAL),
            "discriminator": (discriminator / 2, discriminator / 2),
        }
    # bfloat16 weights before the rollout, and in each pass with gradient before its forward and its backward.
    return {
        "rollout": (2 * work.parameters, 0.0),
        "generator": (
            GRADIENT_PASSES * 2 * 2 * work.parameters / UPDATE_INTERVAL,
            GRADIENT_PASSES * 4 * work.parameters / UPDATE_INTERVAL,
        ),
        "discriminator": (discriminator / 2, discriminator / 2),
    }


def communication_seconds(work, cards, sharded) -> dict[str, tuple[float, float]]:
    """Seconds an iteration by what they are for, as `collective_seconds` has them; nothing of it hidden."""
    found = {}
    for name, (gathered, reduced) in exchanges(work, sharded).items():
        if name == "discriminator":
            count, tree = 2 * max(1, 4 * work.discriminator_parameters / DDP_BUCKET), True
        elif not sharded:
            count, tree = 2 * 4 * work.parameters / UPDATE_INTERVAL / DDP_BUCKET, True
        else:
            count, tree = (1 if name == "rollout" else 3 * GRADIENT_PASSES / UPDATE_INTERVAL) * work.num_parts, False
        found[name] = collective_seconds(gathered + reduced, cards, count, tree)
    return found


def hidden_behind(work, images, sharded) -> float:
    """Seconds of compute behind which the network's weights and gradients are exchanged."""
    parts = compute_seconds(work)
    if sharded:  # a part's gathering runs ahead of it, and its reduction behind it, in all passes with gradient
        return images * (parts["diffusion loss"] + parts["replays"])
    return images * parts["replays"] / (BRANCHES * NUM_GRADIENT_STEPS) / 2  # the last pass's backward, half of it


def estimate(work, cards, images, sharded) -> dict:
    """An iteration with `images` on each card.

    Returns:
        `best` and `worst`, seconds with all hidden that can be and with nothing; `efficiency`, the share of them that
        is compute, worst first; `gigabytes` a card of weights, gradients, optimizer and what the rollout gathers.
    """
    compute = images * sum(compute_seconds(work).values())
    parts = {name: sum(both) for name, both in communication_seconds(work, cards, sharded).items()}
    worst = compute + sum(parts.values())
    best = worst - min(parts["generator"], hidden_behind(work, images, sharded))
    divided = cards if sharded else 1
    # While weights are gathered in, or cast to, bfloat16 there are no gradients.
    state = max(16 / divided, 12 / divided + 2) * work.parameters
    return {
        "best": best, "worst": worst, "efficiency": (compute / worst, compute / best), "gigabytes": state / 1e9
    }  # fmt: skip


def hybrid_seconds(work, cards) -> float:
    """What `--shard` would exchange if each machine held the whole network and machines were data-parallel; worst."""
    within = sum(sum(communication_seconds(work, CARDS_A_MACHINE, True)[name]) for name in ("rollout", "generator"))
    size = 2 * 4 * work.parameters / CARDS_A_MACHINE / UPDATE_INTERVAL
    return within + size / (INFINIBAND * BUS_UTILISATION) + math.log2(cards / CARDS_A_MACHINE) * HOP_BETWEEN


def number(value) -> str:
    return f"{value:.3g}"


def percent(low, high) -> str:
    low, high = round(100 * low), round(100 * high)
    return f"{high} %" if low == high else f"{low}–{high} %"


def counts_table(works) -> str:
    titles = {
        "network": "network, one forward of one guidance branch",
        "encoder": "VAE's encoder",
        "decoder": "VAE's decoder",
        "features": "DINOv2 ViT-S/14 at 518",
        "discriminator": "heads and predictors",
    }
    rows = [
        [title, *(number(getattr(work, name) / 1e12) for work in works.values())] for name, title in titles.items()
    ]
    rows.append(["network's parameters, 10⁹", *(number(work.parameters / 1e9) for work in works.values())])
    rows.append(["parts that `--shard` makes of it", *(str(work.num_parts) for work in works.values())])
    return table(["10¹² operations of one image", *works], rows)


def compute_table(works) -> str:
    parts = {title: compute_seconds(work) for title, work in works.items()}
    rows = [[name, *(number(own[name]) for own in parts.values())] for name in next(iter(parts.values()))]
    rows.append(["**in all**", *(f"**{number(sum(own.values()))}**" for own in parts.values())])
    return table(["seconds of one image, an average iteration", *works], rows)


def bytes_table(works) -> str:
    rows = []
    for sharded in (False, True):
        for index, kind in enumerate(("gathered", "reduced")):
            found = [sum(pair[index] for pair in exchanges(work, sharded).values()) for work in works.values()]
            name = "`--shard`" if sharded else "data-parallel"
            rows.append([f"{name}, {kind}", *(number(size / 1e9) for size in found)])
    return table(["GB, an average iteration", *works], rows)


def scaling_table(work) -> str:
    rows = []
    for cards in CARDS:
        images = PAPER_BATCH if cards == 1 else 1
        for sharded in (False, True) if cards > 1 else (False,):
            found = estimate(work, cards, images, sharded)
            times = [number(found["best"]), number(found["worst"])]
            rows.append([
                str(cards), "`--shard`" if sharded else "data-parallel" if cards > 1 else "",
                str(cards * images), "–".join(dict.fromkeys(times)), percent(*found["efficiency"]),
                number(found["gigabytes"]),
            ])  # fmt: skip
    return table(["cards", "", "global batch", "seconds an iteration", "efficiency", "GB a card"], rows)


NAMES = {
    "rollout": "gathering the weights before the rollout",
    "generator": "the network's weights and gradients in its update",
    "discriminator": "the discriminator's gradients",
}


def limits_table(works) -> str:
    """Where the time goes that is no compute, at the most cards."""
    cards, rows = CARDS[-1], []
    for title, work in works.items():
        for sharded in (False, True):
            parts = communication_seconds(work, cards, sharded)
            for name, (moving, hops) in parts.items():
                kind = "`--shard`" if sharded else "data-parallel"
                rows.append([title, kind, NAMES[name], number(moving), number(hops)])
    return table([f"{cards} cards", "", "what is exchanged", "s, moving bytes", "s, hops"], rows)


def bullets(*items) -> str:
    """Each on lines of the width of this file's."""
    options = {"width": 119, "subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(f"- {item}", **options) for item in items)


def introduction() -> str:
    return bullets(
        f"Full fine-tuning by the defaults (guidance, K = {NUM_GRADIENT_STEPS}, an update of the network every "
        f"{UPDATE_INTERVAL} iterations) with `--gradient_checkpointing --mixed_precision bf16 --allow_tf32`. The "
        "start index is uniform, so that an average rollout makes (N + 1) / 2 of its N steps; an average iteration "
        "has a share of an update. Left out: text encoders (cached), data, validation, checkpoints, stragglers.",
        f"H100 SXM, {CARDS_A_MACHINE} to a machine. Published: {PEAK_BF16 / 1e12:.0f} TFLOP/s dense in bf16 (the "
        f"network) and {PEAK_TF32 / 1e12:.0f} in TF32 (VAE, DINOv2, discriminator); NVLink {NVLINK / 1e9:.0f} GB/s "
        f"and an InfiniBand link of {8 * INFINIBAND / 1e9:.0f} Gb/s a card, each way.",
        f"Assumed: {100 * UTILISATION:.0f} % of these peaks and {100 * BUS_UTILISATION:.0f} % of these bandwidths; a "
        f"hop of {HOP_WITHIN * 1e6:.0f} µs within a machine and of {HOP_BETWEEN * 1e6:.0f} µs between machines; parts "
        f"are gathered and reduced round rings, buckets of {DDP_BUCKET / 1e6:.0f} MB up and down trees.",
        "A range is from all communication hidden behind the update's passes that can be, to none. Efficiency is "
        "compute over everything. One card has the global batch in micro-batches.",
        "GB a card are the network's weights, gradients, AdamW's states, and what `--shard` gathers for the rollout. "
        "Activations and frozen networks come on top.",
    )


def conclusions(works) -> str:
    most, sdxl = CARDS[-1], works["SDXL, 1024²"]
    efficiency = {
        sharded: each({title: estimate(work, most, 1, sharded)["efficiency"] for title, work in works.items()})
        for sharded in (False, True)
    }
    hops = sum(both[1] for both in communication_seconds(sdxl, most, True).values())
    hybrid, compute = hybrid_seconds(sdxl, most), sum(compute_seconds(sdxl).values())
    iterations, fewer = PAPER_IMAGES // most, PAPER_IMAGES // 64
    return bullets(
        f"**The method, before the machine.** With the paper's global batch of {PAPER_BATCH}, its {PAPER_IMAGES:,} "
        f"images make {PAPER_IMAGES // PAPER_BATCH:,} iterations. With one image a card, {most} cards see them once "
        f"in {iterations}: {iterations // UPDATE_INTERVAL} updates of the network, fewer than its warm-up of 500. 64 "
        f"cards make {fewer:,} iterations and {fewer // UPDATE_INTERVAL} updates of them. So a global batch of 8 to "
        f"64 is what the paper's data bear; {most} cards want {most // PAPER_BATCH} times the images for its number "
        "of updates, and learning rates, warm-up and averages chosen anew. The paper reports no batch but its own.",
        f"**Data parallelism goes on to {most} cards**: {efficiency[False]}. A rollout exchanges nothing, and the "
        f"network's gradients are exchanged once in {UPDATE_INTERVAL} iterations.",
        f"**`--shard` is held up by hops, not by bytes**: {efficiency[True]} at {most} cards. SDXL's parts go round "
        f"{most} cards one after another, {number(hops)} s of an iteration. SD1.5 has the most parts for its size.",
        "**What to do.** (1) Shard where memory asks for it; within a machine it costs least. (2) More images a card: "
        f"with 4 on each of {most}, SDXL has {percent(*estimate(sdxl, most, 4, True)['efficiency'])}, if the method "
        f"bears a batch of {4 * most:,}. (3) Divide the network within a machine, and have machines data-parallel: "
        f"for SDXL at {most} cards {number(hybrid)} s of exchanges to {number(compute)} s of compute, nothing hidden. "
        "`--shard` does not do that. (4) For a batch of 64 on more than 64 cards: the two guidance branches on two "
        "cards, and the replays, which do not depend on each other, on as many. That is not done either.",
    )


def each(efficiencies) -> str:
    return ", ".join(f"{title.partition(',')[0]} {percent(*pair)}" for title, pair in efficiencies.items())


def report(works) -> str:
    families = "\n\n".join(f"### {title}\n\n{scaling_table(work)}" for title, work in works.items())
    return f"""\
# Scaling, on paper

`python benchmarks/scaling.py > benchmarks/scaling.md`. **An estimate, not a measurement**: operations and bytes are
counted, bandwidths are published ones, and utilisations are assumed.

{introduction()}

## What is counted

{counts_table(works)}

{compute_table(works)}

{bytes_table(works)}

## Cards

{families}

## What stops scaling first

{limits_table(works)}

{conclusions(works)}
"""


if __name__ == "__main__":
    print(report({title: count_work(*own) for title, own in FAMILIES.items()}), end="")

"""The related systems on the demo's base and worlds: few-step students, robust training, the diffusion-GAN hybrid.

    python demo/reproduce_related.py                                      # all of it: about seven hours on two cores
    python demo/reproduce_related.py --worlds shaded --seeds 0 --runs ADD "ADD, adversary only"

In each world and for each seed the base is `reproduce.py`'s `start`, the demo's pipeline after 2000 iterations of
fine-tuning; every system goes on from there. Few-step students are compared with their teacher, the start itself, in
as many steps and in 50; robust training with fine-tuning at equal updates (a third of the iterations), which is equal
compute, and at equal iterations; the hybrid with fine-tuning and with ADT. Each world's numbers go into
`benchmarks/related.json` when it is done, and `benchmarks/related.md` has the tables of all that stands there. What a
stopped call has finished is kept, and a run is taken up where it was.
"""

import argparse
import json
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from reproduce import COMMON, FOLLOWED, METHODS, STEPS, compare, folder, read_numbers
from reproduce import train as train_starts
from worlds import WORLDS

from demo import DEMO, FINE_TUNING, tune


ADD = [
    *COMMON, "--learning_rate", "5e-5", "--lr_warmup_steps", "10", "--discriminator_learning_rate", "2e-3",
    "--discriminator_layers", "-1", "1", "3", "5", "--discriminator_resolution", "32",
    "--adversarial_weight", "auto", "--use_ema", "--ema_decay", "0.97",
]  # fmt: skip
DISTILLED = [*ADD, "--teacher_guidance_scale", "3"]
LCM = [
    *COMMON, "--learning_rate", "1e-4", "--lr_warmup_steps", "10", "--w_min", "2", "--w_max", "2",
]  # fmt: skip
PLAIN = [*COMMON, "--learning_rate", "3e-4", "--lr_warmup_steps", "50"]
AVERAGED = ["--use_ema", "--ema_decay", "0.99"]
HYBRID = [
    *COMMON, "--learning_rate", "5e-5", "--lr_warmup_steps", "10", "--discriminator_learning_rate", "1e-3",
    "--discriminator_resolution", "32", "--generator_start_step", "100", "--hybrid_ramp_steps", "300",
]  # fmt: skip
UPDATES = 900
FEW, ROBUST, SHARP = "few steps", "robust training", "sharpness"
# {comparison: {run: (module, iterations, options)}}; the module is None for the family's own script.
RUNS = {
    FEW: {
        "ADD": ("related.train_add", 600, DISTILLED),
        "ADD, no guidance of the teacher": ("related.train_add", 600, ADD),
        "ADD, adversary only": (
            "related.train_add", 600, [*ADD, "--adversarial_weight", "1", "--distillation_weight", "0"]
        ),
        "ADD, distillation only": ("related.train_add", 600, [*DISTILLED, "--adversarial_weight", "0"]),
        "ADD, no condition": ("related.train_add", 600, [*DISTILLED, "--discriminator_condition", "none"]),
        "ADD, text condition": ("related.train_add", 600, [*DISTILLED, "--discriminator_condition", "text"]),
        "ADD, image condition": ("related.train_add", 600, [*DISTILLED, "--discriminator_condition", "image"]),
        "ADD, SDS": ("related.train_add", 600, [*DISTILLED, "--distillation_target", "sds"]),
        "ADD, NFSD": ("related.train_add", 600, [*DISTILLED, "--distillation_target", "nfsd"]),
        "consistency": ("related.train_lcm", UPDATES, LCM),
        "consistency, robust": ("related.train_lcm", UPDATES // 3, [*LCM, "--robust_steps", "3"]),
        "consistency, three times as long": ("related.train_lcm", 3 * UPDATES, LCM),
    },
    ROBUST: {
        "fine-tuning": (None, UPDATES, [*FINE_TUNING, *COMMON]),
        "robust, as many updates": ("related.train_robust", UPDATES // 3, PLAIN),
        "robust, as many iterations": ("related.train_robust", UPDATES, PLAIN),
        # What the passes alone do: three updates a batch, the same timesteps and noise, next to no perturbation.
        "three passes, unperturbed": ("related.train_robust", UPDATES // 3, [*PLAIN, "--robust_step_size", "1e-9"]),
        "robust, at a third of the rate": ("related.train_robust", UPDATES, [*PLAIN, "--learning_rate", "1e-4"]),
        "input perturbation": (
            "related.train_robust", UPDATES, [*PLAIN, "--robust_steps", "1", "--input_perturbation", "0.1"]
        ),
        # The last weights of a run at this rate differ more between seeds than the methods do.
        "fine-tuning, averaged": (None, UPDATES, [*FINE_TUNING, *COMMON, *AVERAGED]),
        "robust, averaged": ("related.train_robust", UPDATES // 3, [*PLAIN, *AVERAGED]),
        "robust, averaged, thirty times the size": (
            "related.train_robust", UPDATES // 3, [*PLAIN, *AVERAGED, "--robust_step_size", "0.054"]
        ),
    },
    SHARP: {
        "fine-tuning": (None, UPDATES, [*FINE_TUNING, *COMMON]),
        "fine-tuning at the hybrid's rate": (
            None, UPDATES, [*FINE_TUNING, *COMMON, "--learning_rate", "5e-5", "--lr_warmup_steps", "10"]
        ),
        "hybrid": ("related.train_hybrid", UPDATES + 100, HYBRID),
        "hybrid, a hundred times the weight": (
            "related.train_hybrid", UPDATES + 100, [*HYBRID, "--hybrid_loss_weight", "0.2"]
        ),
        "ADT": (None, STEPS, METHODS["ADT, recipe"]),
    },
}  # fmt: skip
ALL_RUNS = list(dict.fromkeys(name for runs in RUNS.values() for name in runs))
START, TEACHER = "start", "the start, as a teacher"
# How each comparison samples: (runs, options of `evaluate_adt.py`).
GUIDED = ["--sampler", "ddim:5", "ddim:10", "ddim:20", "ddim:50", "--guidance_scale", 3]
SHORT_AND_LONG = ["--sampler", "ddim:10", "ddim:50", "--guidance_scale", 3]
CONSISTENT = ["consistency", "consistency, robust", "consistency, three times as long"]
ADDS = [name for name in RUNS[FEW] if name not in CONSISTENT]
# The base's own spacing would begin a few steps far below the last timestep, one step at the first.
TRAILING = ["--timestep_spacing", "trailing", "--guidance_scale", 3]
SAMPLING = {
    FEW: [
        ([TEACHER], ["--sampler", "ddim:1", "ddim:2", "ddim:4", "ddim:8", "ddim:50", *TRAILING]),
        (ADDS, ["--sampler", "own:1", "own:2", "own:4", "--guidance_scale", 0]),
        (CONSISTENT, ["--sampler", "own:1", "own:2", "own:4", "own:8", "--guidance_scale", 0]),
    ],
    ROBUST: [([START, *RUNS[ROBUST]], GUIDED)],
    SHARP: [([START, *RUNS[SHARP]], SHORT_AND_LONG)],
}
METRICS = ("fid", "fdd", "precision", "recall", "sharpness")
# What stands beside the tables: the numbers of the texts, on other data, models and sizes.
REPORTED = {
    FEW: "Adversarial Diffusion Distillation, FID on COCO in one step: 20.6; adversary only 20.8, distillation only "
    "315.6; distillation by SDS 22.3, by NFSD 21.8; each of the two conditions better than none, both best. "
    "Consistency distillation with adversarial training: better than without, in latent consistency models of "
    "512×512; the text that was at hand has no number.",
    ROBUST: "FID in 20 steps, plain, input perturbation, adversarial training: CIFAR-10 10.58, 7.81, 6.60; ImageNet "
    "64×64 8.32, 8.40, 6.20.",
    SHARP: "The diffusion-GAN hybrid against plain diffusion: sharpness 0.0355 to 0.1385, precision 0.42 to 0.28, "
    "recall 0.14 to 0.03.",
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=DEMO.parent / "benchmarks" / "output")
    parser.add_argument("--report", type=Path, default=DEMO.parent / "benchmarks" / "related.md")
    parser.add_argument("--assets", type=Path, default=DEMO / "assets", help="What make_assets.py wrote.")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=["shaded", "glow"])
    parser.add_argument("--comparisons", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--runs", nargs="+", choices=ALL_RUNS, default=ALL_RUNS, help="Of the comparisons.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_images", type=int, default=512, help="For each number.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="Processes at a time, on one core each.")
    return parser.parse_args()


def train(args):
    """All runs. Returns `{(world, run, seed): folder}`, the starts under `START`."""
    starts = train_starts(argparse.Namespace(**vars(args), methods=[]))
    results = starts | {(world, TEACHER, seed): path for (world, _, seed), path in starts.items()}
    runs = {name: run for comparison in args.comparisons for name, run in RUNS[comparison].items()}
    runs = {name: run for name, run in runs.items() if name in args.runs}

    def tune_one(world, name, seed):
        module, steps, settings = runs[name]
        output = args.output_dir / folder(world) / f"seed-{seed}"
        options = SimpleNamespace(family="sd15", seed=seed, assets=args.assets, output_dir=output)
        options.data = output.parent / "data"
        if module is not None:
            networks = {"related.train_add": "dinov2", "related.train_hybrid": "resnet"}
            if module in networks:
                settings = [*settings, "--discriminator_model_name_or_path", args.assets / networks[module]]
        settings = [*settings, "--pretrained_vae_model_name_or_path", args.assets / "worlds" / "vae"]
        # ADT is `reproduce.py`'s, wherever that has run.
        place = "adt-recipe" if name == "ADT" else f"related-{folder(name)}"
        with open(output / f"{place}.log", "a") as log:
            start = starts[world, START, seed]
            results[world, name, seed] = tune(place, start, steps, settings, options, log, module)

    with ThreadPoolExecutor(args.jobs) as pool:
        for job in [pool.submit(tune_one, *key) for key in product(args.worlds, runs, args.seeds)]:
            job.result()
    return results


def evaluate(world, comparison, results, args) -> dict:
    """`{run: {steps: {seed: metrics}}}`, seeds and steps as strings, as JSON has them."""
    found = {}
    for names, sampling in SAMPLING[comparison]:
        names = [name for name in names if name in (START, TEACHER, *args.runs)]
        if not names:
            continue
        pipelines = {f"{folder(name)}-{seed}": (name, seed) for name in names for seed in args.seeds}
        paths = {key: results[world, *run] for key, run in pipelines.items()}
        runs, _ = compare(world, paths, args, sampling, METRICS, "report-related")
        for (pipeline, _, steps), metrics in runs.items():
            name, seed = pipelines[pipeline]
            found.setdefault(name, {}).setdefault(str(steps), {})[str(seed)] = metrics
    return found


def table(found) -> list[str]:
    """A comparison's rows: mean ± standard deviation over the seeds."""
    names = (*METRICS, FOLLOWED)
    lines = ["| run | steps | seeds | " + " | ".join(names) + " |", "|---|---:|---|" + "---:|" * len(names)]
    for run, of_steps in found.items():
        for steps, of_seed in of_steps.items():
            cells = []
            for name in names:
                values = np.array([metrics[name] for metrics in of_seed.values()])
                digits = 3 if name in ("precision", "recall", FOLLOWED) else 2
                spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
                cells.append(f"{values.mean():.{digits}f}{spread}")
            lines.append(f"| {run} | {steps} | {', '.join(sorted(of_seed))} | " + " | ".join(cells) + " |")
    return lines


def add_numbers(numbers, world, comparison, found, args):
    """Puts a comparison's numbers, `evaluate`'s, under its world, in place of older ones of the same runs."""
    own = numbers["worlds"].setdefault(world, {}).setdefault(comparison, {})
    for run, of_steps in found.items():
        for steps, of_seed in of_steps.items():
            own.setdefault(run, {}).setdefault(steps, {}).update(of_seed)
    args.report.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")


def write_report(numbers, args):
    lines = [
        "# The related systems on the demo's worlds",
        "",
        f"    python demo/reproduce_related.py --num_images {numbers['num_images']}",
        "",
        "with `--worlds`, `--comparisons`, `--runs` and `--seeds` for a part; the numbers of each run are in "
        "`related.json`, and these tables are of those that are there. Settings are in `demo/reproduce_related.py`, "
        "worlds in `demo/worlds.py`, the metrics those of `reproduction.md`. "
        f"`{START}` is the pipeline from which every run goes on, and the few-step students' teacher, which begins "
        "at the last timestep as they do (trailing timesteps); students are sampled without guidance, the others with "
        "guidance 3. What agrees with the texts and what does not is said in `related/README.md`.",
    ]
    for world, comparisons in numbers["worlds"].items():
        for comparison, found in comparisons.items():
            lines += ["", f"## {world}: {comparison}", "", *table(found)]
    lines += ["", "## What the texts report", ""]
    lines += [f"- **{comparison.capitalize()}.** {text}" for comparison, text in REPORTED.items()]
    lines += ["", f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}."]
    args.report.write_text("\n".join(lines) + "\n")
    print(args.report.read_text())


def main():
    args = parse_args()
    args.output_dir, args.assets = args.output_dir.resolve(), args.assets.resolve()
    os.environ["OMP_NUM_THREADS"] = "1"  # so that the number of runs at a time does not change their rounding
    numbers = read_numbers(args)
    print("Each run's output goes to a .log file beside its folder.")
    results = train(args)
    for world, comparison in product(args.worlds, args.comparisons):
        add_numbers(numbers, world, comparison, evaluate(world, comparison, results, args), args)
    write_report(numbers, args)


if __name__ == "__main__":
    main()

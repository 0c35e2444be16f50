"""ADT against fine-tuning on the worlds of `worlds.py`, over several seeds, at equal iterations and at equal compute.

    python demo/reproduce.py                                         # all of it: three to ten hours on two cores
    python demo/reproduce.py --worlds lines glow --seeds 0 --methods "fine-tuning, equal compute" "ADT, recipe"

In each world and for each seed the demo's base pipeline is fine-tuned once; from there every method goes on. Its VAE
is one that can draw all worlds, but for `lines, the demo's VAE`, where the VAE's floor is above the goal.
`evaluate_adt.py` compares a world's results on images and captions that no training saw, with the VAE's floor. Each
world's numbers go into `benchmarks/reproduction.json` when it is done, and `benchmarks/reproduction.md` has the tables
of all that stands there, whichever calls, on whichever machines, have added to it. What a stopped call has finished is
kept, and a run is taken up where it was.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from evaluator import load_evaluator
from make_assets import LOOKS
from matplotlib.figure import Figure
from PIL import Image
from shapes import ATTRIBUTES
from torch import nn
from worlds import WORLDS, draw, write_imagefolder

from demo import ADVERSARIAL, DEMO, FINE_TUNING, HOLDING, tune


NARROW_VAE = "lines, the demo's VAE"
SITUATIONS = [*(world for world in WORLDS if world != "flat"), NARROW_VAE]
START_STEPS = 2000  # of fine-tuning, after which more of it hardly changes the distance
STEPS = 300  # of each method
# The paper's global batch.
COMMON = ["--train_batch_size", "8"]
ADT = [*ADVERSARIAL, *COMMON, "--generator_start_step", "100"]
RECIPE = [*ADT, *HOLDING]
# What the paper says, but for the sizes: the learning rates are the demo's, as are the discriminator's layers.
PAPER = [
    *ADT, "--generator_start_step", "0", "--generator_update_interval", "5", "--adversarial_loss_weight", "1",
    "--augmentation_policy", "color", "translation", "cutout",
]  # fmt: skip
EQUAL_COMPUTE, PLAIN_RATE = "fine-tuning, equal compute", "fine-tuning at ADT's rate"
TINY_DECODER = "ADT, recipe, tiny decoder"  # of scored images; which is that of the VAE of all worlds
METHODS = {
    "fine-tuning": [*FINE_TUNING, *COMMON],
    EQUAL_COMPUTE: [*FINE_TUNING, *COMMON],
    PLAIN_RATE: [*FINE_TUNING, *COMMON, "--learning_rate", "5e-5", "--lr_warmup_steps", "10"],
    "ADT, as the paper": PAPER,
    "ADT": ADT,
    "ADT, pairs": [*ADT, "--mismatched_pair_weight", "1"],
    "ADT, recipe": RECIPE,
    "ADT, recipe, pair weight 3": [*RECIPE, "--mismatched_pair_weight", "3"],
    "ADT, recipe, gradient ratio 0.3": [*RECIPE, "--adversarial_gradient_ratio", "0.3"],
    "ADT, recipe, reconstructed": [*RECIPE, "--real_images", "reconstructed"],
    TINY_DECODER: RECIPE,
    "projected discriminator": [*ADT, "--discriminator_type", "projected"],
    "DRTune's path": [*ADT, "--gradient_path", "drtune"],
    # There is nothing to balance the weight by; Adam does not see its scale.
    "no diffusion loss": [*ADT, "--adversarial_loss_weight", "1", "--diffusion_loss_weight", "0"],
}
METRICS = ("fid", "fdd", "precision", "recall")
FOLLOWED = "prompt followed"
SAMPLER = "ddim:10"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=DEMO.parent / "benchmarks" / "output")
    parser.add_argument("--report", type=Path, default=DEMO.parent / "benchmarks" / "reproduction.md",
        help="The tables. Their plot and their numbers stand beside it, as .png and .json.")  # fmt: skip
    parser.add_argument("--assets", type=Path, default=DEMO / "assets", help="What make_assets.py wrote.")
    parser.add_argument("--worlds", nargs="+", choices=SITUATIONS, default=SITUATIONS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_images", type=int, default=512, help="For each number.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="Processes at a time, on one core each.")
    return parser.parse_args()


def folder(name):
    return name.replace("'", "").replace(",", "").replace(" ", "-").lower()


def equal_compute_steps(num_steps=STEPS, start=100, interval=2, sampler_steps=10, num_gradient_steps=3):
    """Iterations of fine-tuning that cost as many network evaluations as ADT's; a backward counts as two forwards.

    A rollout from a start that is uniform over the sampler's steps runs both guidance branches at each step that is
    left; an update replays `num_gradient_steps` of them, or all that are left, and has the diffusion loss.
    """
    left = range(1, sampler_steps + 1)
    rollout = 2 * np.mean(left)
    replays = 2 * np.mean([min(num_gradient_steps, steps) for steps in left])
    updates = sum(k >= start and (k + 1) % interval == 0 for k in range(num_steps))
    return round((num_steps * rollout + updates * 3 * (replays + 1)) / 3)


def train(args):
    """All runs. Returns `{(situation, method, seed): folder}`, the common starts under the method `start`."""
    results = {}
    for situation in args.worlds:
        data = args.output_dir / folder(situation) / "data"
        if not data.is_dir():
            write_imagefolder(data, situation.split(",")[0], 2000, seed=1)

    def run(situation, method, seed):
        output = args.output_dir / folder(situation) / f"seed-{seed}"
        options = SimpleNamespace(family="sd15", seed=seed, assets=args.assets, output_dir=output)
        options.data = output.parent / "data"
        output.mkdir(exist_ok=True)
        vae = args.assets / ("pipeline" if situation == NARROW_VAE else "worlds") / "vae"
        settings = [*METHODS.get(method, METHODS["fine-tuning"]), "--pretrained_vae_model_name_or_path", vae]
        if method == TINY_DECODER:
            settings += ["--decoder_model_name_or_path", args.assets / "worlds" / "tiny_decoder"]
        steps = {"start": START_STEPS, EQUAL_COMPUTE: equal_compute_steps()}.get(method, STEPS)
        start = args.assets / "pipeline" if method == "start" else results[situation, "start", seed]
        with open(output / f"{folder(method)}.log", "a") as log:
            results[situation, method, seed] = tune(folder(method), start, steps, settings, options, log)

    with ThreadPoolExecutor(args.jobs) as pool:
        for methods in (["start"], args.methods):
            keys = [key for key in product(args.worlds, methods, args.seeds) if key[:2] != (NARROW_VAE, TINY_DECODER)]
            for job in [pool.submit(run, *key) for key in keys]:
                job.result()
    return results


class EvaluatorFeatures(nn.Module):
    """The evaluator's features, standardised, behind the interface of an InceptionV3 file."""

    def __init__(self, evaluator, real):
        super().__init__()
        self.backbone = evaluator.backbone
        self.register_buffer("scale", evaluator(real).std(0))

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return self.backbone(2 * (images.float() / 255) - 1) / self.scale


def evaluate(situation, results, args):
    """Compares a world's results and its VAE's floor.

    Args:
        results: `{(method, seed): folder}`.

    Returns:
        the floor's metrics, and `{(method, seed): metrics}`.
    """
    pipelines = {f"{folder(method)}-{seed}": (method, seed) for method, seed in sorted(results)}
    paths = {name: results[key] for name, key in pipelines.items()}
    runs, floor = compare(situation, paths, args, ["--sampler", SAMPLER, "--guidance_scale", 3], METRICS, "report")
    return floor, {pipelines[name]: metrics for (name, _, _), metrics in runs.items()}


def compare(situation, pipelines, args, sampling, metrics, report_name):
    """Runs `evaluate_adt.py` on images and captions of a world that no training saw.

    Args:
        pipelines: `{name: folder}`.
        sampling: its options that say how they are sampled.
        metrics: names of its metrics' values.
        report_name: of its folder, in which a pipeline's name must mean one pipeline.

    Returns:
        `{(pipeline, sampler, steps): metrics}`, the share of followed prompts among them, and the VAE's floor.
    """
    world, directory = situation.split(",")[0], args.output_dir / folder(situation)
    test = directory / f"test-set-{args.num_images}" / "test"
    if not test.is_dir():
        write_imagefolder(test, world, args.num_images, seed=77)
    evaluator = load_evaluator(args.assets / "worlds" / "evaluator" / "model.safetensors", LOOKS)
    real, _, attributes = draw(world, args.num_images, seed=77)
    features = EvaluatorFeatures(evaluator, torch.from_numpy(real).permute(0, 3, 1, 2) / 255)
    torch.jit.script(features).save(directory / "evaluator.pt")

    report = directory / f"{report_name}-{args.num_images}"
    asked = dict.fromkeys("precision_recall" if name in ("precision", "recall") else name for name in metrics)
    command = [
        Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", args.jobs, "evaluate_adt.py",
        "--pipelines", *(f"{name}={path}" for name, path in pipelines.items()), "--vae_floor",
        "--dataset_name", test.parent, "--num_images", args.num_images, *sampling,
        "--metrics", *asked, "--inception_weights", directory / "evaluator.pt",
        "--dinov2_model_name_or_path", args.assets / "dinov2", "--dinov2_resolution", 32, "--batch_size", 128,
        "--num_bootstrap", 0, "--output_dir", report,
    ]  # fmt: skip
    subprocess.run([str(word) for word in command], check=True, cwd=DEMO.parent)

    saved, values = json.loads((report / "report.json").read_text()), {}
    for run in saved["runs"]:
        images = report / run["images"]["test"]
        arrays = [np.array(Image.open(images / f"{index:06d}.png")) for index in range(args.num_images)]
        own = values[run["pipeline"], run["sampler"], run["steps"]] = {
            name: run["metrics"][name]["value"] for name in metrics
        }
        own[FOLLOWED] = followed(np.stack(arrays), attributes, evaluator)
    [floor] = saved["floors"]  # one VAE, whatever the denoiser
    return values, {name: floor["metrics"][name]["value"] for name in metrics}


@torch.no_grad()
def followed(images, attributes, evaluator) -> float:
    """The share of uint8 `images` in which the evaluator sees all that the caption says."""
    logits = evaluator.logits(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    right = [logits[name].argmax(1) == torch.from_numpy(attributes[name]) for name in ATTRIBUTES]
    return torch.stack(right).all(0).float().mean().item()


# What is said of the numbers


def read_numbers(args) -> dict:
    """All numbers so far: `{"num_images": N, "worlds": {world: ...}}`.

    Here a world has `{"floor": metrics, "methods": {method: {seed: metrics}}}`; seeds are strings, as JSON has them.
    """
    file = args.report.with_suffix(".json")
    if not file.exists():
        return {"num_images": args.num_images, "worlds": {}}
    numbers = json.loads(file.read_text())
    if numbers["num_images"] != args.num_images:
        sys.exit(f"error: {file} is of {numbers['num_images']} images a number: --num_images {args.num_images} "
                 "needs another --report.")  # fmt: skip
    return numbers


def add_numbers(numbers, situation, floor, values, args):
    """Puts a world's numbers, as `evaluate` returns them, among the others, in place of older ones of the runs."""
    world = numbers["worlds"].setdefault(situation, {"methods": {}})
    world["floor"] = floor
    for (method, seed), metrics in values.items():
        world["methods"].setdefault(method, {})[str(seed)] = metrics
    args.report.with_suffix(".json").write_text(json.dumps(numbers, indent=1, sort_keys=True) + "\n")


def of_seeds(world, method, metric, seeds=None) -> np.ndarray:
    found = world["methods"][method]
    return np.array([found[seed][metric] for seed in seeds or sorted(found)])


def methods_of(world) -> list[str]:
    return [method for method in ("start", *METHODS) if method in world["methods"]]


def table(world) -> list[str]:
    """A world's rows: mean ± standard deviation over the seeds."""

    def cell(found, metric):
        digits = 2 if metric in ("fid", "fdd") else 3
        spread = f" ± {found.std(ddof=1):.{digits}f}" if len(found) > 1 else ""
        return f"{found.mean():.{digits}f}{spread}"

    names = (*METRICS, FOLLOWED)
    lines = ["| method | seeds | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(names)]
    for method in methods_of(world):
        cells = [cell(of_seeds(world, method, name), name) for name in names]
        lines.append(f"| {method} | {', '.join(sorted(world['methods'][method]))} | " + " | ".join(cells) + " |")
    cells = [cell(np.array([world["floor"][name]]), name) for name in METRICS]
    return [*lines, "| *the VAE's floor* | | " + " | ".join(cells) + " | |"]


def verdict(world, method) -> dict:
    """Whether `method` reaches what it should against fine-tuning at equal compute, over the seeds that both have.

    The distance: at most 0.6 times fine-tuning's, where the VAE's floor is below 0.3 times it; else at least half of
    what lies between the two is closed. The prompts: no fewer than fine-tuning's, within the larger standard
    deviation over the seeds.
    """
    seeds = sorted(set(world["methods"][method]) & set(world["methods"][EQUAL_COMPUTE]))
    plain, own = (of_seeds(world, name, "fid", seeds) for name in (EQUAL_COMPUTE, method))
    floor = world["floor"]["fid"]
    free = floor < 0.3 * plain.mean()
    goal = 0.6 * plain.mean() if free else (plain.mean() + floor) / 2
    plain_followed, own_followed = (of_seeds(world, name, FOLLOWED, seeds) for name in (EQUAL_COMPUTE, method))
    spread = max(plain_followed.std(ddof=1), own_followed.std(ddof=1)) if len(seeds) > 1 else 0.0
    return {
        "seeds": len(seeds),
        "ratio": own.mean() / plain.mean(),
        "goal": goal / plain.mean(),
        "distance": bool(own.mean() <= goal),
        "difference": own_followed.mean() - plain_followed.mean(),
        "spread": spread,
        # One seed has no spread.
        "prompts": bool(own_followed.mean() >= plain_followed.mean() - spread) if len(seeds) > 1 else None,
    }


def verdict_lines(worlds) -> list[str]:
    names = ["world", "method", "seeds", "distance over fine-tuning's", "goal", "", "prompts less fine-tuning's"]
    lines = ["| " + " | ".join([*names, "spread", ""]) + " |", "|---|---|---:|---:|---:|---|---:|---:|---|"]
    for situation, world in worlds.items():
        for method in methods_of(world):
            common = set(world["methods"][method]) & set(world["methods"].get(EQUAL_COMPUTE, ()))
            if method in (EQUAL_COMPUTE, "start") or not common:
                continue
            one = verdict(world, method)
            marks = [{True: "reached", False: "missed", None: "–"}[one[name]] for name in ("distance", "prompts")]
            lines.append(
                f"| {situation} | {method} | {one['seeds']} | {one['ratio']:.2f} | {one['goal']:.2f} | {marks[0]} | "
                f"{100 * one['difference']:+.1f} points | {100 * one['spread']:.1f} | {marks[1]} |"
            )
    return lines


def draw_frontier(worlds, path):
    """Distance against prompts followed, a panel for each world."""
    columns = min(3, len(worlds))
    rows = -(-len(worlds) // columns)
    figure = Figure(figsize=(4.5 * columns, 4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    colors = {method: f"C{n}" if n < 10 else f"C{n - 10}" for n, method in enumerate(("start", *METHODS))}
    handles = {}
    for axes, (situation, world) in zip(panels, worlds.items()):
        for method in methods_of(world):
            x, y = (of_seeds(world, method, metric) for metric in ("fid", FOLLOWED))
            style = {"fmt": "o" if method.startswith("ADT") else "s", "color": colors[method]}
            handles[method] = axes.errorbar(x.mean(), y.mean(), xerr=x.std(), yerr=y.std(), **style)
        handles["the VAE's floor"] = axes.axvline(world["floor"]["fid"], linestyle="--", color="gray")
        axes.set(title=situation, xlabel="Fréchet distance", ylabel=FOLLOWED, xlim=(0, None))
    for axes in panels[len(worlds) :]:
        axes.set_axis_off()
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=100)


def write_report(numbers, args):
    worlds = {situation: numbers["worlds"][situation] for situation in SITUATIONS if situation in numbers["worlds"]}
    lines = [
        "# Fine-tuning and ADT on several worlds",
        "",
        f"    python demo/reproduce.py --num_images {numbers['num_images']}",
        "",
        "with `--worlds`, `--methods` and `--seeds` for a part; the numbers of each run are in `reproduction.json`, "
        "and these tables are of those that are there. "
        "Worlds are in `demo/worlds.py`, settings in `demo/reproduce.py`. From the demo's base pipeline "
        f"(ε-prediction, Stable Diffusion 1.5's schedule, 32×32 pixels), batches of 8: `start` is {START_STEPS} "
        f"iterations of plain fine-tuning, and each method is {STEPS} iterations more from there, but for "
        f"“{EQUAL_COMPUTE}”: {equal_compute_steps()} iterations, as many network evaluations as ADT's. The seeds "
        f"decide the training alone. Each number is of {numbers['num_images']} images of captions and against images "
        f"that no training saw, drawn from the same noise with guidance 3 and {SAMPLER}: mean ± standard deviation "
        "over the seeds.",
        "",
        "`fid` is the Fréchet distance on standardised features of a classifier of all worlds, which no discriminator "
        "uses; `fdd`, precision and recall are on the DINOv2 that the discriminators use, which knows `flat` and "
        f"`shaded` only. `{FOLLOWED}` is the share of images in which the classifier sees all that the caption says. "
        "The VAE's floor is real images through the VAE and back: what no tuning of the denoiser gets below.",
        "",
        "![distance against prompts](reproduction.png)",
        "",
        "## Against fine-tuning at equal compute",
        "",
        *verdict_lines(worlds),
    ]
    for situation, world in worlds.items():
        lines += ["", f"## {situation}", "", *table(world)]
    lines += ["", f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}."]
    args.report.write_text("\n".join(lines) + "\n")
    draw_frontier(worlds, args.report.with_suffix(".png"))
    print(args.report.read_text())


def main():
    args = parse_args()
    args.output_dir, args.assets = args.output_dir.resolve(), args.assets.resolve()
    os.environ["OMP_NUM_THREADS"] = "1"  # so that the number of runs at a time does not change their rounding
    numbers = read_numbers(args)
    print("Each run's output goes to a .log file beside its folder.")
    results = train(args)
    for situation in args.worlds:
        own = {(method, seed): path for (world, method, seed), path in results.items() if world == situation}
        floor, values = evaluate(situation, own, args)
        add_numbers(numbers, situation, floor, values, args)
    write_report(numbers, args)


if __name__ == "__main__":
    main()

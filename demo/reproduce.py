"""The paper's comparison at the demo's size: fine-tuning, ADT and three ablations, over several seeds.

    python demo/reproduce.py

From the demo's base pipeline, which predicts the noise on Stable Diffusion 1.5's schedule, each seed is fine-tuned
once; from there every method gets the same number of iterations on the same images. `evaluate_adt.py` then compares
all of them on images and captions that no training saw, and `benchmarks/reproduction.md` gets the table. It takes one
to two hours on two CPU cores; what a stopped run has finished is kept, and the rest is taken up where it was.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from evaluator import load_evaluator
from PIL import Image
from shapes import ATTRIBUTES
from torch import nn
from worlds import draw, write_imagefolder

from demo import ADVERSARIAL, DEMO, FINE_TUNING, tune


# The demo's settings, each ablation with its one change. Without a diffusion loss there is nothing to balance the
# weight by, so that it is 1 there; Adam does not see its scale. The demo fine-tunes at a higher rate than ADT's, which
# the control has.
METHODS = {
    "fine-tuning": FINE_TUNING,
    "fine-tuning at ADT's rate": [*FINE_TUNING, "--learning_rate", "5e-5", "--lr_warmup_steps", "10"],
    "ADT": ADVERSARIAL,
    "projected discriminator": [*ADVERSARIAL, "--discriminator_type", "projected"],
    "DRTune's path": [*ADVERSARIAL, "--gradient_path", "drtune"],
    "no diffusion loss": [*ADVERSARIAL, "--adversarial_loss_weight", "1", "--diffusion_loss_weight", "0"],
}
# Table 3, FID of 5,000 images, Stable Diffusion 1.5.
PAPER = {
    "fine-tuning": 23.08,
    "ADT": 19.84,
    "projected discriminator": 22.35,
    "DRTune's path": 21.92,
    "no diffusion loss": 24.03,
}
SAMPLERS = ("ddim:10", "dpmsolver++:8")  # the training's, and one that training has not seen
METRICS = ("fid", "fdd", "precision", "recall")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=DEMO.parent / "benchmarks" / "output")
    parser.add_argument("--report", type=Path, default=DEMO.parent / "benchmarks" / "reproduction.md")
    parser.add_argument("--assets", type=Path, default=DEMO / "assets", help="What make_assets.py wrote.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fine_tuning_steps", type=int, default=600, help="Iterations up to the common start.")
    parser.add_argument("--steps", type=int, default=400, help="Iterations of each method.")
    parser.add_argument("--num_images", type=int, default=2048, help="For each number.")
    parser.add_argument("--jobs", type=int, default=2, help="Processes at a time, on one core each.")
    return parser.parse_args()


def folder(method):
    return method.replace("'", "").replace(" ", "-").lower()


def train(args):
    """All runs. Returns `{(method, seed): folder}`, the common starts under the method `start`."""
    base, results = args.assets / "pipeline", {}
    seeds = {
        seed: SimpleNamespace(
            family="sd15", seed=seed, assets=args.assets, output_dir=args.output_dir / f"seed-{seed}"
        )
        for seed in args.seeds
    }
    for options in seeds.values():
        if not (options.output_dir / "data").is_dir():
            write_imagefolder(options.output_dir / "data", "shaded", 2000, seed=1)

    def run(method, seed, start, steps, settings):
        with open(args.output_dir / f"seed-{seed}" / f"{folder(method)}.log", "a") as log:
            results[method, seed] = tune(folder(method), start, steps, settings, seeds[seed], log)

    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run, "start", seed, base, args.fine_tuning_steps, FINE_TUNING) for seed in args.seeds]
        for job in jobs:
            job.result()
        jobs = [
            pool.submit(run, method, seed, results["start", seed], args.steps, settings)
            for seed in args.seeds
            for method, settings in METHODS.items()
        ]
        for job in jobs:
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


def evaluate(results, args):
    """Compares all results. Returns `{pipeline: {sampler: metrics}}`."""
    test = args.output_dir / f"test-set-{args.num_images}" / "test"
    if not test.is_dir():
        write_imagefolder(test, "shaded", args.num_images, seed=77)
    evaluator = load_evaluator(args.assets / "evaluator" / "model.safetensors")
    real, _, attributes = draw("shaded", args.num_images, seed=77)
    features = EvaluatorFeatures(evaluator, torch.from_numpy(real).permute(0, 3, 1, 2) / 255)
    torch.jit.script(features).save(args.output_dir / "evaluator.pt")

    pipelines = {"base": args.assets / "pipeline"}
    pipelines |= {f"{folder(method)}-{seed}": path for (method, seed), path in results.items()}
    report = args.output_dir / "report"
    command = [
        Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", args.jobs, "evaluate_adt.py",
        "--pipelines", *(f"{name}={path}" for name, path in pipelines.items()),
        "--dataset_name", test.parent, "--num_images", args.num_images, "--sampler", *SAMPLERS, "--guidance_scale", 3,
        "--metrics", "fid", "fdd", "precision_recall", "--inception_weights", args.output_dir / "evaluator.pt",
        "--dinov2_model_name_or_path", args.assets / "dinov2", "--dinov2_resolution", 32, "--batch_size", 128,
        "--num_bootstrap", 20, "--output_dir", report,
    ]  # fmt: skip
    subprocess.run([str(word) for word in command], check=True, cwd=DEMO.parent)

    values = {}
    for run in json.loads((report / "report.json").read_text())["runs"]:
        metrics = {name: run["metrics"][name]["value"] for name in METRICS}
        images = report / run["images"]["test"]
        arrays = [np.array(Image.open(images / f"{index:06d}.png")) for index in range(args.num_images)]
        with torch.no_grad():
            logits = evaluator.logits(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255)
        followed = [logits[name].argmax(1) == torch.from_numpy(attributes[name]) for name in ATTRIBUTES]
        metrics["prompt followed"] = torch.stack(followed).all(0).float().mean().item()
        values.setdefault(run["pipeline"], {})[f"{run['sampler']}:{run['steps']}"] = metrics
    return values


def write_report(values, args):
    names = (*METRICS, "prompt followed")

    def of(method, sampler, name):
        pipelines = ["base"] if method == "base" else [f"{folder(method)}-{seed}" for seed in args.seeds]
        return np.array([values[pipeline][sampler][name] for pipeline in pipelines])

    def cell(method, sampler, name):
        found, digits = of(method, sampler, name), 2 if name in ("fid", "fdd") else 3
        spread = f" ± {found.std(ddof=1):.{digits}f}" if len(found) > 1 else ""
        return f"{found.mean():.{digits}f}{spread}"

    lines = [
        "# The paper's comparison at small scale",
        "",
        "    make reproduce",
        "",
        f"From the demo's base pipeline (ε-prediction, Stable Diffusion 1.5's schedule, 32×32 pixels): `start` is "
        f"{args.fine_tuning_steps} iterations of plain fine-tuning, and each method is {args.steps} iterations more "
        "from there. Fine-tuning and ADT have the demo's settings, with learning rates 3e-4 and 5e-5; the control has "
        "ADT's rate. The ablations are ADT with one change each, but that without a diffusion loss the adversarial "
        "weight is 1, since there is nothing to balance it by. "
        f"Seeds {', '.join(map(str, args.seeds))}, which decide the training alone. Each number is of "
        f"{args.num_images} images, of captions and against images that no training saw, drawn from the same noise "
        "with guidance 3: mean ± standard deviation over the seeds.",
        "",
        "`fid` is the Fréchet distance on the demo evaluator's standardised features, which no discriminator uses; "
        "`fdd`, precision and recall are on the DINOv2 that the discriminators use. `prompt followed` is the share of "
        "images in which the evaluator sees all that the caption says.",
    ]
    for sampler in SAMPLERS:
        lines += ["", f"## {sampler}", "", "| method | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
        for method in ("base", "start", *METHODS):
            lines.append(f"| {method} | " + " | ".join(cell(method, sampler, name) for name in names) + " |")
    lines += ["", "## Each seed's fid", "", "| method | sampler | " + " | ".join(map(str, args.seeds)) + " |"]
    lines += ["|---|---|" + "---:|" * len(args.seeds)]
    for method in METHODS:
        for sampler in SAMPLERS:
            lines.append(
                f"| {method} | {sampler} | " + " | ".join(f"{v:.2f}" for v in of(method, sampler, "fid")) + " |"
            )

    lines += ["", "## The paper's ordering", ""]
    paper = sorted(PAPER, key=PAPER.get)
    lines.append("Table 3 (FID-5k, best first): " + ", ".join(f"{name} {PAPER[name]}" for name in paper) + ".")
    for sampler in SAMPLERS:
        means = {method: of(method, sampler, "fid").mean() for method in PAPER}
        here = sorted(means, key=means.get)
        text = ", ".join(f"{name} {means[name]:.2f}" for name in here)
        lines.append(f"\nHere, {sampler}: {text}. The ordering {'holds' if here == paper else 'does not hold'}.")
        for method in METHODS:
            if method != "ADT":
                wins = int((of("ADT", sampler, "fid") < of(method, sampler, "fid")).sum())
                lines.append(f"- ADT is below {method} in {wins} of {len(args.seeds)} seeds.")
    lines += ["", f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}."]
    args.report.write_text("\n".join(lines) + "\n")
    print(args.report.read_text())


def main():
    args = parse_args()
    args.output_dir, args.assets = args.output_dir.resolve(), args.assets.resolve()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    print("This takes one to two hours on two cores; each run's output goes to a .log file beside its folder.")
    os.environ["OMP_NUM_THREADS"] = "1"  # so that the number of runs at a time does not change their rounding
    results = train(args)
    write_report(evaluate(results, args), args)


if __name__ == "__main__":
    main()

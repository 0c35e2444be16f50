"""Tunes a tiny Stable Diffusion from flat shapes to shaded ones, with and without ADT, and shows what came out.

    python demo/demo.py                 # SD1.5, whose base pipeline is in the repository
    python demo/demo.py --family sd3    # SD3, whose base pipeline is trained first
    python demo/demo.py --family flux   # FLUX.1, too: ADT of low-rank adapters, from the base, by train_adt_lora.py

It runs the same training script that a user with a real model runs, three times, or for FLUX once:

    fine-tuned    plain fine-tuning of the base pipeline
    longer        plain fine-tuning of that result, for as many iterations as ADT gets
    adt           ADT of the same result

and ends with `comparison.png` (rows: base, fine-tuned, fine-tuned longer, ADT, real; same prompts and seeds) and
`results.json`: for each row a Fréchet distance to real images on features that the discriminator does not use, and the
share of samples that show all that the prompt asks for. Finished runs are kept, and stopped ones are taken up again.
It ends with an error unless ADT's distance is clearly below the base's, and below fine-tuning longer's where that is.
"""

import argparse
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import make_image_grid
from evaluator import load_evaluator
from PIL import Image, ImageDraw
from shapes import ATTRIBUTES
from torchmetrics.image.fid import FrechetInceptionDistance
from worlds import draw, write_imagefolder


DEMO = Path(__file__).resolve().parent
# How each family is sampled in ADT's training and for the numbers.
SAMPLING = {
    "sd15": {"num_inference_steps": 10, "guidance_scale": 3.0},
    "sd3": {"num_inference_steps": 10, "guidance_scale": 3.0, "max_sequence_length": 1},
    "flux": {"num_inference_steps": 10, "true_cfg_scale": 3.0, "negative_prompt": "", "max_sequence_length": 16},
}
SCRIPTS = {"sd15": "train_adt_sd15.py", "sd3": "train_adt_sd3.py", "flux": "train_adt_lora.py"}
TRAINING = [
    "--resolution", "32", "--center_crop", "--train_batch_size", "16", "--checkpointing_steps", "200",
    "--checkpoints_total_limit", "1", "--report_to", "tensorboard", "--dataloader_num_workers", "0",
]  # fmt: skip
LONGER = "fine-tuned longer"
FINE_TUNING = ["--adversarial_loss_weight", "0", "--learning_rate", "3e-4", "--lr_warmup_steps", "50"]
ADVERSARIAL = [
    "--learning_rate", "5e-5", "--lr_warmup_steps", "10",
    "--adversarial_loss_weight", "auto",
    "--generator_start_step", "150", "--generator_update_interval", "2",
    "--discriminator_learning_rate", "2e-3", "--discriminator_lr_warmup_steps", "20",
    "--discriminator_layers", "-1", "1", "3", "5", "--discriminator_resolution", "32",
    "--augmentation_policy",
]  # fmt: skip
# Adapters start at zero, and here from the base, so that they also learn by the diffusion loss.
ADAPTERS = [*ADVERSARIAL, "--learning_rate", "1e-3", "--rank", "16"]
# What holds the prompt (`benchmarks/reproduction.md`).
HOLDING = ["--mismatched_pair_weight", "1", "--use_ema", "--ema_decay", "0.97"]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=SAMPLING, default="sd15")
    parser.add_argument("--output_dir", type=Path, default=None, help="output, or output-FAMILY, beside this file.")
    parser.add_argument("--assets", type=Path, default=DEMO / "assets", help="What make_assets.py wrote.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fine_tuning_steps", type=int, default=600, help="Iterations of plain fine-tuning.")
    parser.add_argument("--adt_steps", type=int, default=400, help="Iterations of ADT, and of fine-tuning longer.")
    parser.add_argument("--num_samples", type=int, default=500, help="Images for each number.")
    args = parser.parse_args()
    if args.output_dir is None:
        args.output_dir = DEMO / ("output" if args.family == "sd15" else f"output-{args.family}")
    return args


def tune(name, base, steps, options, args, log=None, module=None):
    """Runs a training script unless the same command's result is there. Returns the tuned pipeline's folder.

    `log` is a file for what the script prints, which else goes to the terminal. `module` is run in place of the
    family's script, such as `related.train_add`, and has all its options in `options`.
    """
    output = args.output_dir / name
    script, discriminator, sampling = ["-m", module, "--family", args.family], [], []
    if module is None:
        script = [SCRIPTS[args.family]]
        discriminator = ["--discriminator_model_name_or_path", args.assets / "dinov2"]
        sampling = [word for key, value in SAMPLING[args.family].items() for word in (f"--{key}", value)]
    command = [
        "accelerate", "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", *script, "--pretrained_model_name_or_path", base,
        "--train_data_dir", args.data, "--output_dir", output, "--max_train_steps", steps,
        "--seed", args.seed, *discriminator, "--resume_from_checkpoint", "latest", *TRAINING, *options, *sampling,
    ]  # fmt: skip
    command = [str(word) for word in command]
    # A result is this command's on these weights only.
    digest = hashlib.sha256()
    others = [option.glob("*.safetensors") for option in options if isinstance(option, Path)]
    for file in [*sorted(base.glob("*/*.safetensors")), *(file for files in others for file in sorted(files))]:
        digest.update(file.read_bytes())
    text = f"{shlex.join(command)}\n# base {digest.hexdigest()}\n".replace(str(DEMO.parent), ".")
    record = output / "command.txt"
    if record.is_file() and record.read_text() == text:
        if (output / "adt_config.json").is_file():
            print(f"{output} is there.", flush=True)
            return output
    else:
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        record.write_text(text)
    print(f"\n== {name}\n{shlex.join(command)}", flush=True)
    launcher = [str(Path(sys.executable).parent / command[0])] + command[1:]
    subprocess.run(launcher, check=True, cwd=DEMO.parent, stdout=log, stderr=log)
    return output


@torch.no_grad()
def sample(path, family, captions, seed):
    """Images (N, 3, 32, 32) in [0, 1], one for each caption; the same noise for every pipeline.

    Args:
        path: of a pipeline, or (of a base, of its adapters).
    """
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3" else {}
    base, *adapters = path if isinstance(path, tuple) else (path,)
    pipeline = DiffusionPipeline.from_pretrained(base, **absent)
    for folder in adapters:
        pipeline.load_lora_weights(folder)
    pipeline.set_progress_bar_config(disable=True)
    if family == "sd15" and not isinstance(pipeline.scheduler, DDIMScheduler):  # the base's
        pipeline.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, clip_sample=False, timestep_spacing="leading"
        )
    generator = torch.Generator().manual_seed(seed)
    options = SAMPLING[family] | {"height": 32, "width": 32, "output_type": "pt"}
    images = []
    for first in range(0, len(captions), 100):
        prompts = captions[first : first + 100]
        if "negative_prompt" in options:
            options["negative_prompt"] = [""] * len(prompts)
        images.append(pipeline(prompts, generator=generator, **options).images)
    return torch.cat(images).float()


class StandardisedFeatures(torch.nn.Module):
    """The evaluator's features, each divided by its standard deviation over real images."""

    num_features = 64

    def __init__(self, evaluator, real):
        super().__init__()
        self.evaluator = evaluator
        self.register_buffer("scale", evaluator(real).std(0))

    def forward(self, images):
        return self.evaluator(images) / self.scale


def measure(images, attributes, real, evaluator):
    """The Fréchet distance of `images` to `real`, and the share of them that show all that their prompt asks for."""
    distance = FrechetInceptionDistance(
        StandardisedFeatures(evaluator, real), normalize=True, input_img_size=(3, 32, 32)
    )
    distance.update(real, real=True)
    distance.update(images, real=False)
    logits = evaluator.logits(images)
    followed = [logits[name].argmax(1) == torch.from_numpy(attributes[name]) for name in ATTRIBUTES]
    return {
        "frechet_distance": distance.compute().item(),
        "prompt_followed": torch.stack(followed).all(0).float().mean().item(),
    }


def draw_comparison(rows, results, path):
    """Writes one row of eight images for each name in `rows`, with its numbers beside it."""
    size, label = 96, 250
    images = []
    for name, pixels in rows.items():
        text = name
        if name in results:
            text += f"\nFrechet distance {results[name]['frechet_distance']:.2f}"
            text += f"\nprompt followed {results[name]['prompt_followed']:.0%}"
        cell = Image.new("RGB", (label, size), "white")
        ImageDraw.Draw(cell).multiline_text((8, 24), text, fill="black", font_size=16)
        arrays = (pixels[:8].permute(0, 2, 3, 1) * 255).round().byte().numpy()
        pictures = [Image.fromarray(array).resize((size, size), Image.Resampling.NEAREST) for array in arrays]
        images.append([cell, *pictures])
    height, width = size * len(images), label + 8 * size
    sheet = Image.new("RGB", (width, height), "white")
    for n, (cell, *pictures) in enumerate(images):
        sheet.paste(cell, (0, n * size))
        sheet.paste(make_image_grid(pictures, rows=1, cols=len(pictures)), (label, n * size))
    sheet.save(path)


def main():
    args = parse_args()
    started = time.time()
    args.output_dir = args.output_dir.resolve()
    args.assets = args.assets.resolve()
    args.data = args.output_dir / "data"
    if not args.data.is_dir():
        write_imagefolder(args.data, "shaded", 2000, seed=1)

    base = args.assets / ("pipeline" if args.family == "sd15" else args.family)
    if not (base / "model_index.json").is_file():
        command = [sys.executable, DEMO / "make_assets.py", "--only", args.family, "--output_dir", args.assets]
        subprocess.run(command, check=True)
    if args.family == "flux":
        adapters = tune("adt", base, args.adt_steps, [*ADAPTERS, *HOLDING], args)
        pipelines = {"base": base, "ADT": (base, adapters)}
    else:
        fine_tuned = tune("fine-tuned", base, args.fine_tuning_steps, FINE_TUNING, args)
        longer = tune("longer", fine_tuned, args.adt_steps, FINE_TUNING, args)
        adt = tune("adt", fine_tuned, args.adt_steps, [*ADVERSARIAL, *HOLDING], args)
        pipelines = {"base": base, "fine-tuned": fine_tuned, LONGER: longer, "ADT": adt}

    real, captions, attributes = draw("shaded", args.num_samples, seed=2)
    real = torch.from_numpy(real).permute(0, 3, 1, 2) / 255
    other, _, _ = draw("shaded", args.num_samples, seed=3)
    evaluator = load_evaluator(args.assets / "evaluator" / "model.safetensors")
    rows, results = {}, {}
    for name, path in pipelines.items():
        rows[name] = sample(path, args.family, captions, seed=4)
        results[name] = measure(rows[name], attributes, real, evaluator)
    rows["real"] = torch.from_numpy(other).permute(0, 3, 1, 2) / 255
    results["real"] = measure(real, attributes, rows["real"], evaluator)
    rows["real"] = real
    draw_comparison(rows, results, args.output_dir / "comparison.png")
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    print(f"\n{'':20}{'Fréchet distance':>18}{'prompt followed':>18}")
    for name, values in results.items():
        print(f"{name:20}{values['frechet_distance']:18.3f}{values['prompt_followed']:18.1%}")
    print(f"\n{args.output_dir / 'comparison.png'}, {(time.time() - started) / 60:.1f} minutes")
    distances = {name: values["frechet_distance"] for name, values in results.items()}
    if not distances["ADT"] < min(0.8 * distances["base"], distances.get(LONGER, float("inf"))):
        sys.exit("error: ADT's distance is not clearly below the base's and below fine-tuning longer's.")


if __name__ == "__main__":
    main()

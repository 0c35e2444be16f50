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
"""Compares text-to-image pipelines on a set of captioned images: is the tuned one better, on what, and by how much?

    accelerate launch evaluate_adt.py --pipelines base=stable-diffusion-v1-5/stable-diffusion-v1-5 adt=sd15-adt \
        --dataset_name DATASET --split test --num_images 5000 --sampler ddim:50 dpmsolver++:30 --guidance_scale 7.0 \
        --metrics fdd precision_recall clip sharpness --output_dir report

Every pipeline draws each caption from the same noise, under every sampler and guidance scale. Images that are there
already are kept, so that a stopped evaluation goes on; other settings in the same folder are refused. It writes
`report.json` and `report.md`.
"""

import argparse
import contextlib
import hashlib
import inspect
import io
import json
import sys
import zlib
from itertools import combinations, product
from pathlib import Path

import datasets
import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image, ImageOps
from prdc import compute_prdc
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, CLIPModel, CLIPTokenizer


# The class, and what its configuration must say where `from_config`'s default would be wrong.
SAMPLERS = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "thresholding": False, "timestep_spacing": "leading"}),
    "dpmsolver++": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "thresholding": False, "timestep_spacing": "linspace"},
    ),
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "linspace"}),
    "own": (None, {}),  # the scheduler that the pipeline comes with
}
METRICS = {
    "fid": "Fréchet distance on InceptionV3 features, lower is better",
    "fdd": "Fréchet distance on DINOv2 features, lower is better",
    "precision_recall": "share of generated images near real ones, and of real ones near generated ones",
    "clip": "CLIP score, 100 times the cosine between image and caption",
    "sharpness": "variance of the Laplacian of the grey image in [0, 255]",
}
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
# Below this many images the Fréchet distances' bias is larger than most differences.
FEW_IMAGES = 2048


class EvaluationError(RuntimeError):
    """An error whose message is all that the user needs."""


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(
        description="Compares text-to-image pipelines on captioned images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--pipelines", nargs="+", required=True, metavar="NAME=PATH", help="Hub ids or folders.")
    parser.add_argument(
        "--lora", nargs="+", default=[], metavar="NAME=PATH", help="Adapters for the pipeline of that name."
    )
    parser.add_argument(
        "--dataset_name", required=True, help="Hub id or folder of a dataset with images and captions."
    )
    parser.add_argument("--dataset_config_name", default=None, help="Configuration of the dataset.")
    parser.add_argument("--split", default="test", help="Of the dataset.")
    parser.add_argument("--image_column", default="image", help="Column with the images.")
    parser.add_argument("--caption_column", default="text", help="Column with captions; of several, the first.")
    parser.add_argument("--num_images", type=int, default=5000, help="The first ones of the split; or all of it.")
    parser.add_argument("--cache_dir", default=None, help="Where models and datasets from the Hub are stored.")
    parser.add_argument(
        "--sampler", nargs="+", default=["own:50"], metavar="NAME:STEPS", help=f"Of {', '.join(SAMPLERS)}."
    )
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[7.0], help="One or several.")
    parser.add_argument("--resolution", type=int, default=None, help="Side of the images; the first pipeline's own.")
    parser.add_argument("--seed", type=int, default=0, help="Each image's noise derives from it and the index.")
    parser.add_argument("--batch_size", type=int, default=8, help="Images at a time.")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="To sample in.")
    parser.add_argument(
        "--metrics", nargs="+", default=["fdd", "precision_recall", "clip", "sharpness"], help="Names."
    )
    parser.add_argument("--dinov2_model_name_or_path", default="facebook/dinov2-base", help="For fdd and precision.")
    parser.add_argument("--dinov2_resolution", type=int, default=224, help="Side of the images that it sees.")
    parser.add_argument("--clip_model_name_or_path", default="openai/clip-vit-base-patch16", help="For clip.")
    parser.add_argument(
        "--inception_weights", default=None, help="For fid: InceptionV3 as TorchScript that takes uint8 images."
    )
    parser.add_argument("--nearest_k", type=int, default=5, help="Neighbours, for precision and recall.")
    parser.add_argument("--num_bootstrap", type=int, default=100, help="Resamples for the 95 %% intervals.")
    parser.add_argument("--output_dir", default="report", help="Where images and reports are written.")
    args = parser.parse_args(input_args)

    for option in ("pipelines", "lora"):
        pairs = [value.partition("=") for value in getattr(args, option)]
        if not all(name and path for name, _, path in pairs):
            parser.error(f"--{option} takes NAME=PATH, not {' '.join(getattr(args, option))}.")
        if len({name for name, _, _ in pairs}) < len(pairs):
            parser.error(f"--{option} has a name twice.")
        setattr(args, option, {name: path for name, _, path in pairs})
    for name in args.pipelines:
        if Path(name).name != name or name.startswith("."):
            parser.error(f"--pipelines: {name!r} cannot be a folder's name.")
    for name in args.lora.keys() - args.pipelines.keys():
        parser.error(f"--lora: there is no pipeline {name}.")
    samplers = []
    for value in args.sampler:
        name, _, steps = value.partition(":")
        if name not in SAMPLERS or not steps.isdigit() or int(steps) == 0:
            parser.error(f"--sampler {value}: give NAME:STEPS with one of {', '.join(SAMPLERS)}.")
        samplers.append((name, int(steps)))
    args.sampler = samplers
    unknown = [name for name in args.metrics if name not in METRICS]
    if unknown:
        parser.error(f"--metrics {' '.join(unknown)} not known; choose from {', '.join(METRICS)}.")
    if "fid" in args.metrics and args.inception_weights is None:
        parser.error(
            "--metrics fid needs --inception_weights: InceptionV3 as TorchScript, such as NVIDIA's "
            "inception-2015-12-05.pt from the StyleGAN3 release."
        )
    if args.inception_weights is not None and not Path(args.inception_weights).is_file():
        parser.error(f"--inception_weights {args.inception_weights} does not exist.")
    for name in ("num_images", "batch_size", "nearest_k", "dinov2_resolution"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} must be greater than 0, not {getattr(args, name)}.")
    if args.num_bootstrap < 0:
        parser.error(f"--num_bootstrap must not be negative, not {args.num_bootstrap}.")
    return args


def load_reference(args):
    """The first `num_images` rows, images undecoded, and their captions. Returns (dataset, captions)."""
    try:
        dataset = datasets.load_dataset(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir)
    except Exception as error:  # of a dozen kinds, pyarrow's and the Hub's among them
        raise EvaluationError(
            f"--dataset_name {args.dataset_name} cannot be read: {error.__cause__ or error}"
        ) from error
    if args.split not in dataset:
        raise EvaluationError(f"The dataset has no split {args.split}, only {', '.join(dataset)}.")
    dataset = dataset[args.split]
    for option in ("image_column", "caption_column"):
        if getattr(args, option) not in dataset.column_names:
            raise EvaluationError(
                f"--{option} {getattr(args, option)} is not a column of the dataset, which has "
                f"{', '.join(dataset.column_names)}."
            )
    if len(dataset) == 0:
        raise EvaluationError("The dataset is empty.")
    dataset = dataset.select(range(min(args.num_images, len(dataset))))
    dataset = dataset.cast_column(args.image_column, datasets.Image(decode=False))
    captions = [
        (caption[0] if caption else "") if isinstance(caption, list) else caption
        for caption in dataset[args.caption_column]
    ]
    return dataset, [caption or "" for caption in captions]


def open_reference(dataset, index, args) -> Image.Image:
    """Raises `EvaluationError`, naming the image, where it does not decode."""
    record = dataset[index][args.image_column]
    try:
        image = datasets.Image().decode_example(record)
        image.load()
    except Exception as error:  # PIL raises half a dozen kinds, and a missing record a TypeError
        name = f" ({record['path']})" if record and record["path"] else ""
        raise EvaluationError(f"Image {index} of the dataset{name} does not decode: {error}") from error
    return image


def load_index(path, args) -> dict:
    """The pipeline's `model_index.json`, refused unless it is a text-to-image pipeline's."""
    try:
        index = DiffusionPipeline.load_config(path, cache_dir=args.cache_dir)
    except OSError as error:
        raise EvaluationError(f"--pipelines: {path} is not a readable pipeline: {error}") from error
    parameters = inspect.signature(getattr(diffusers, index["_class_name"]).__call__).parameters
    if "prompt" not in parameters or "image" in parameters:
        raise EvaluationError(f"--pipelines: {path} is a {index['_class_name']}, which is not text-to-image.")
    return index


def load_pipeline(name, args, device):
    path = args.pipelines[name]
    index = load_index(path, args)
    # Components that are absent must be said to be; a safety checker would blacken images at random.
    absent = {key: None for key, value in index.items() if isinstance(value, list) and None in value}
    if "safety_checker" in index:
        absent |= {"safety_checker": None, "requires_safety_checker": False}
    pipeline = DiffusionPipeline.from_pretrained(
        path, torch_dtype=getattr(torch, args.dtype), cache_dir=args.cache_dir, **absent
    )
    if name in args.lora:
        pipeline.load_lora_weights(args.lora[name])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def make_scheduler(sampler, base):
    """The named sampler with the base scheduler's schedule.

    Raises:
        EvaluationError: where it does not suit the model.
    """
    scheduler_class, options = SAMPLERS[sampler]
    if scheduler_class is None:
        return base
    if isinstance(base, FlowMatchEulerDiscreteScheduler) or base.config.get("use_flow_sigmas", False):
        raise EvaluationError(f"--sampler {sampler} does not suit a flow-matching model: use own.")
    if base.config.get("rescale_betas_zero_snr", False):
        options = options | {"timestep_spacing": "trailing"}
    config = {name: value for name, value in base.config.items() if name not in ("clip_sample", "thresholding")}
    return scheduler_class.from_config(config, **options)


def image_generator(seed, index) -> torch.Generator:
    """An image's own generator: the same noise for every pipeline, whatever the batch."""
    entropy = [seed % 2**63, zlib.crc32(b"evaluation"), index]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1)


def generate(pipeline, captions, steps, guidance_scale, settings, directory, args, accelerator):
    """Draws the images that `directory` lacks, shared out over the processes.

    Raises:
        EvaluationError: if the folder has images of other settings.
    """
    file = directory / "settings.json"
    if file.is_file():
        before = json.loads(file.read_text())
        different = [name for name in settings if before.get(name) != settings[name]]
        if different:
            changes = ", ".join(f"{name} {before.get(name)} (now {settings[name]})" for name in different)
            raise EvaluationError(f"{directory} has images of other settings: {changes}. Name another --output_dir.")
    accelerator.wait_for_everyone()
    directory.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process and not file.is_file():
        partial = directory / ".settings-partial.json"
        partial.write_text(json.dumps(settings, indent=2))
        partial.rename(file)
    own = range(accelerator.process_index, len(captions), accelerator.num_processes)
    missing = [index for index in own if not (directory / f"{index:06d}.png").is_file()]
    bar = tqdm(total=len(missing), desc=str(directory), disable=not accelerator.is_local_main_process)
    for first in range(0, len(missing), args.batch_size):
        indices = missing[first : first + args.batch_size]
        images = pipeline(
            [captions[index] for index in indices],
            generator=[image_generator(args.seed, index) for index in indices],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            height=args.resolution,
            width=args.resolution,
        ).images
        for index, image in zip(indices, images, strict=True):
            partial = directory / f".{index:06d}-partial.png"
            image.save(partial)
            partial.rename(directory / f"{index:06d}.png")
        bar.update(len(indices))
    bar.close()
    accelerator.wait_for_everyone()


def square(image, size):
    """A PIL image to RGB, its short side to `size` (bicubic with antialiasing), and its centre."""
    return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size), Image.Resampling.BICUBIC)


def pixels(image) -> torch.Tensor:
    """(3, H, W), uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalise(images, statistics):
    """PIL images of one size to a float tensor (B, 3, H, W) as a network expects it."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    return torch.stack([(pixels(image) / 255 - mean) / std for image in images])


class Loaded:
    """A row of things that are loaded when a slice of it is taken: thousands of images do not fit into memory."""

    def __init__(self, load, count):
        self.load, self.count = load, count

    def __len__(self):
        return self.count

    def __getitem__(self, part):
        return [self.load(index) for index in range(*part.indices(self.count))]


def in_batches(function, items, batch_size):
    """`function` over slices of at most `batch_size` of `items`, concatenated."""
    with torch.no_grad():
        return torch.cat([function(items[n : n + batch_size]).cpu() for n in range(0, len(items), batch_size)])


class DINOv2Features:
    """The CLS token after the last block."""

    def __init__(self, args, device):
        self.resolution, self.device = args.dinov2_resolution, device
        self.model = AutoModel.from_pretrained(args.dinov2_model_name_or_path, cache_dir=args.cache_dir)
        self.model.float().eval().to(device)
        name = Path(args.dinov2_model_name_or_path).name
        self.record = {"features": f"{name}, CLS token", "resize": f"{self.resolution}, bicubic, centre crop"}

    def __call__(self, images):
        inputs = normalise([square(image, self.resolution) for image in images], IMAGENET)
        return self.model(inputs.to(self.device)).last_hidden_state[:, 0].double()


class InceptionFeatures:
    """InceptionV3's pooled features by a TorchScript that resizes its uint8 input itself."""

    def __init__(self, args, device):
        self.model, self.device = torch.jit.load(args.inception_weights, map_location=device).eval(), device
        self.record = {"features": f"InceptionV3, {Path(args.inception_weights).name}", "resize": "by the network"}

    def __call__(self, images):
        return self.model(
            torch.stack([pixels(image) for image in images]).to(self.device), return_features=True
        ).double()


class CLIPScore:
    """100 times the cosine between the image's and the caption's embedding."""

    def __init__(self, args, device):
        path, self.device = args.clip_model_name_or_path, device
        self.model = CLIPModel.from_pretrained(path, cache_dir=args.cache_dir).float().eval().to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(path, cache_dir=args.cache_dir)
        self.resolution = self.model.config.vision_config.image_size
        self.record = {"features": Path(path).name, "resize": f"{self.resolution}, bicubic, centre crop"}

    def __call__(self, pairs):
        inputs = normalise([square(image, self.resolution) for image, _ in pairs], CLIP)
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            [caption for _, caption in pairs], padding="max_length", max_length=length, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        output = self.model(pixel_values=inputs.to(self.device), **tokens.to(self.device))
        return 100 * (output.image_embeds * output.text_embeds).sum(1)


def laplacian_variance(images) -> torch.Tensor:
    """(B,): of the grey image (0.299 R + 0.587 G + 0.114 B, rounded), borders mirrored without the edge, as OpenCV."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=torch.float64).view(1, 1, 3, 3)
    values = []
    for image in images:
        grey = torch.from_numpy(np.array(image.convert("L"))).double()[None, None]
        values.append(F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="reflect"), kernel).var(correction=0))
    return torch.stack(values)


class Passthrough(nn.Module):
    """Lets torchmetrics take features where it expects images."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features


def frechet_distance(real, generated) -> float:
    """Of two sets of features, (N, C) and (M, C), float64. By one process, so that no other is waited for."""
    metric = FrechetInceptionDistance(Passthrough(real.shape[1]), sync_on_compute=False)
    metric.set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return metric.compute().item()


def precision_and_recall(real, generated, nearest_k) -> dict:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the numbers of images
        result = compute_prdc(real.float().numpy(), generated.float().numpy(), nearest_k)
    return {"precision": float(result["precision"]), "recall": float(result["recall"])}


def bootstrap_interval(function, count, args):
    """The 2.5 % and 97.5 % percentiles of `function(indices)` over resampled indices; None without resamples.

    Moved so that their mean is the value itself: a Fréchet distance grows when images are drawn twice.
    """
    if args.num_bootstrap == 0:
        return None
    generator = np.random.default_rng(args.seed)
    values = [function(torch.from_numpy(generator.integers(count, size=count))) for _ in range(args.num_bootstrap)]
    return (np.percentile(values, [2.5, 97.5]) - np.mean(values) + function(torch.arange(count))).tolist()


def measure(images, captions, reference, models, args) -> dict:
    """All metrics of one set of images: `{name: {"value", "interval", "n", ...}}`, with "scores" where per image."""
    count, results = len(images), {}

    def per_image(name, scores, record):
        mean = bootstrap_interval(lambda indices: scores[indices].mean().item(), count, args)
        results[name] = {"value": scores.mean().item(), "interval": mean, "n": count, **record}
        results[name]["scores"] = scores.tolist()

    for metric, key in (("fid", "inception"), ("fdd", "dinov2")):
        if metric in args.metrics:
            features = in_batches(models[key], images, args.batch_size)
            real = reference[key]
            interval = bootstrap_interval(
                lambda indices, real=real, features=features: frechet_distance(real, features[indices]), count, args
            )
            value = frechet_distance(real, features)
            results[metric] = {"value": value, "interval": interval, "n": count, **models[key].record}
    if "precision_recall" in args.metrics:
        features, real = in_batches(models["dinov2"], images, args.batch_size), reference["dinov2"]
        record = models["dinov2"].record | {"k": args.nearest_k}
        for name, value in precision_and_recall(real, features, args.nearest_k).items():
            # Not resampled: an image drawn twice is its own nearest neighbour.
            results[name] = {"value": value, "interval": None, "n": count, **record}
    if "clip" in args.metrics:
        pairs = Loaded(lambda index: (images[index : index + 1][0], captions[index]), count)
        per_image("clip", in_batches(models["clip"], pairs, args.batch_size).double(), models["clip"].record)
    if "sharpness" in args.metrics:
        per_image("sharpness", in_batches(laplacian_variance, images, args.batch_size), {"resize": "none"})
    return results


def win_rate(first, second) -> float:
    """The share of images in which the first one's score is higher; a tie is half a win."""
    first, second = np.asarray(first), np.asarray(second)
    return float((first > second).mean() + 0.5 * (first == second).mean())


def write_report(runs, warnings, args):
    """`report.json` with everything, and `report.md` with a row for each pipeline, sampler and guidance scale."""
    names = list(runs[0]["metrics"])
    lines = ["# Comparison", "", *(f"> {warning}" for warning in warnings), ""]
    lines += ["| pipeline | sampler | steps | guidance | " + " | ".join(names) + " |"]
    lines += ["|---|---|---:|---:|" + "---:|" * len(names)]
    for run in runs:
        cells = []
        for name in names:
            value, interval = run["metrics"][name]["value"], run["metrics"][name]["interval"]
            cells.append(f"{value:.4g}" + (f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else ""))
        row = [run["pipeline"], run["sampler"], run["steps"], run["guidance_scale"], *cells]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    wins = []
    for first, second in combinations(runs, 2):
        same = all(first[key] == second[key] for key in ("sampler", "steps", "guidance_scale"))
        for name in names if same else []:
            if "scores" in first["metrics"][name]:
                scores = (run["metrics"][name]["scores"] for run in (first, second))
                wins.append(
                    {key: first[key] for key in ("sampler", "steps", "guidance_scale")}
                    | {"metric": name, "first": first["pipeline"], "second": second["pipeline"]}
                    | {"win_rate": win_rate(*scores)}
                )
    if wins:
        lines += [
            "",
            "## Win rates",
            "",
            "| metric | sampler | guidance | wins | over | share |",
            "|---|---|---:|---|---|---:|",
        ]
        for win in wins:
            sampler = f"{win['sampler']} {win['steps']}"
            row = (
                win["metric"],
                sampler,
                win["guidance_scale"],
                win["first"],
                win["second"],
                f"{win['win_rate']:.1%}",
            )
            lines.append("| " + " | ".join(map(str, row)) + " |")
    lines += ["", "## How each number was made", ""]
    for name in names:
        record = {
            key: value for key, value in runs[0]["metrics"][name].items() if key not in ("value", "interval", "scores")
        }
        about = METRICS.get(name) or METRICS["precision_recall"]
        lines.append(f"- **{name}**: {about}. " + ", ".join(f"{key} {value}" for key, value in record.items()) + ".")
    lines.append(f"\nIntervals: 95 %, bootstrap over images, {args.num_bootstrap} resamples.")
    Path(args.output_dir, "report.md").write_text("\n".join(lines) + "\n")
    report = {"runs": runs, "win_rates": wins, "warnings": warnings}
    Path(args.output_dir, "report.json").write_text(json.dumps(report, indent=2) + "\n")


def main(args):
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    # Everything that can be refused before an image is made.
    indices = {name: load_index(path, args) for name, path in args.pipelines.items()}
    dataset, captions = load_reference(args)
    own = range(accelerator.process_index, len(captions), accelerator.num_processes)
    for index in tqdm(own, desc="Checking images", disable=not accelerator.is_local_main_process, leave=False):
        open_reference(dataset, index, args)
    if {"fdd", "precision_recall"} & set(args.metrics):
        patch_size = AutoConfig.from_pretrained(args.dinov2_model_name_or_path, cache_dir=args.cache_dir).patch_size
        if args.dinov2_resolution % patch_size:
            raise EvaluationError(f"--dinov2_resolution {args.dinov2_resolution} is not a multiple of {patch_size}.")
    if "precision_recall" in args.metrics and len(captions) <= args.nearest_k + 1:
        raise EvaluationError(f"--nearest_k {args.nearest_k} needs more than {args.nearest_k + 1} images.")
    warnings = []
    if {"fid", "fdd"} & set(args.metrics) and len(captions) < FEW_IMAGES:
        warnings.append(
            f"{len(captions)} images are few for a Fréchet distance: its bias grows as they get fewer. Compare only "
            "numbers with the same count."
        )

    runs, directories = [], []
    for name in indices:
        pipeline = load_pipeline(name, args, accelerator.device)
        if args.resolution is None:
            network = getattr(pipeline, "unet", None) or pipeline.transformer
            args.resolution = network.config.sample_size * pipeline.vae_scale_factor
        base = pipeline.scheduler
        for (sampler, steps), guidance_scale in product(args.sampler, args.guidance_scale):
            pipeline.scheduler = make_scheduler(sampler, base)
            settings = {
                "pipeline": args.pipelines[name],
                "lora": args.lora.get(name),
                "scheduler": type(pipeline.scheduler).__name__,
                "steps": steps,
                "guidance_scale": guidance_scale,
                "resolution": args.resolution,
                "seed": args.seed,
                "dtype": args.dtype,
                "captions": hashlib.sha256("\0".join(captions).encode()).hexdigest(),
            }
            directory = Path(args.output_dir, "images", name, f"{sampler}-{steps}-guidance-{guidance_scale:g}")
            generate(pipeline, captions, steps, guidance_scale, settings, directory, args, accelerator)
            runs.append({"pipeline": name, "sampler": sampler, "steps": steps, "guidance_scale": guidance_scale})
            directories.append(directory)
        del pipeline
    if not accelerator.is_main_process:
        return

    models = {}
    if {"fdd", "precision_recall"} & set(args.metrics):
        models["dinov2"] = DINOv2Features(args, accelerator.device)
    if "fid" in args.metrics:
        models["inception"] = InceptionFeatures(args, accelerator.device)
    if "clip" in args.metrics:
        models["clip"] = CLIPScore(args, accelerator.device)
    real = Loaded(lambda index: square(open_reference(dataset, index, args), args.resolution), len(captions))
    reference = {
        key: in_batches(models[key], real, args.batch_size) for key in ("dinov2", "inception") if key in models
    }
    for run, directory in zip(runs, directories, strict=True):
        images = Loaded(
            lambda index, directory=directory: Image.open(directory / f"{index:06d}.png").convert("RGB"), len(captions)
        )
        run["metrics"] = measure(images, captions, reference, models, args)
    write_report(runs, warnings, args)
    print(Path(args.output_dir, "report.md").read_text())


if __name__ == "__main__":
    try:
        main(parse_args())
    except EvaluationError as error:
        sys.exit(f"error: {error}")

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
`report.json`, `report.md` with its plots, and `report.html`, one file with a gallery and a blind comparison.

It needs `evaluate_metrics.py`, `evaluate_report.py`, `evaluate_report.html` and the `*_utils.py` beside it.
"""

import argparse
import functools
import hashlib
import inspect
import json
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import datasets
import diffusers
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LCMScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from tqdm.auto import tqdm

from data_utils import make_generator
from evaluate_metrics import (
    CHOICES,
    METRICS,
    NEED_REAL_IMAGES,
    QUALITY,
    EvaluationError,
    Loaded,
    check_options,
    load_networks,
    measure,
    reference_features,
    square,
)
from evaluate_report import ReportError, count_votes, load_card, update_model_card, write_report
from output_utils import list_checkpoints
from training_utils import SAMPLERS, configure_sampler, non_negative_int, positive_int


OWN = "own"  # the scheduler that the pipeline comes with
SAMPLER_NAMES = (*SAMPLERS, OWN)
FLOOR = "VAE floor"
# What `settings.json` has one of for each image, and its name for one.
ONE_EACH = {"prompts": "prompt", "originals": "original of image"}
# Below this many images the Fréchet distances' bias is larger than most differences.
FEW_IMAGES = 2048


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compares text-to-image pipelines on captioned images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--pipelines", nargs="+", default=[], metavar="NAME=PATH", help="Hub ids or folders.")
    parser.add_argument(
        "--lora", nargs="+", default=[], metavar="NAME=PATH", help="Adapters for the pipeline of that name."
    )
    parser.add_argument(
        "--checkpoints", nargs="+", default=[], metavar="NAME=RUN",
        help="Output folders of training runs, each of whose checkpoints is compared.",
    )  # fmt: skip
    parser.add_argument("--dataset_name", default=None, help="Hub id or folder of a dataset with images and captions.")
    parser.add_argument("--dataset_config_name", default=None, help="Configuration of the dataset.")
    parser.add_argument("--split", default="test", help="Of the dataset.")
    parser.add_argument("--image_column", default="image", help="Column with the images.")
    parser.add_argument("--caption_column", default="text", help="Column with captions; of several, the first.")
    parser.add_argument(
        "--num_images", type=positive_int, default=5000, help="The first ones of the split; or all of it."
    )
    parser.add_argument(
        "--quality_prompts", nargs="+", default=[], metavar="FILE",
        help="Prompts for hps and aesthetic, and for all without a dataset: a line each, or JSON lists as HPSv2's.",
    )  # fmt: skip
    parser.add_argument("--cache_dir", default=None, help="Where models and datasets from the Hub are stored.")
    parser.add_argument(
        "--sampler", nargs="+", default=["own:50"], metavar="NAME:STEPS", help=f"Of {', '.join(SAMPLER_NAMES)}."
    )
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[7.0], help="One or several.")
    parser.add_argument(
        "--resolution", type=positive_int, default=None, help="Side of the images; the first pipeline's own."
    )
    parser.add_argument(
        "--seed", type=non_negative_int, default=0, help="Each image's noise derives from it and the index."
    )
    parser.add_argument("--batch_size", type=positive_int, default=8, help="Images at a time.")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="To sample in.")
    parser.add_argument(
        "--metrics", nargs="+", default=["fdd", "precision_recall", "clip", "sharpness"],
        help=f"Of {', '.join(CHOICES)}.",
    )  # fmt: skip
    parser.add_argument("--dinov2_model_name_or_path", default="facebook/dinov2-base", help="For fdd and precision.")
    parser.add_argument("--dinov2_resolution", type=positive_int, default=224, help="Side of the images that it sees.")
    parser.add_argument(
        "--inception_weights", default=None, help="For fid: InceptionV3 as TorchScript; torch-fidelity's by default."
    )
    parser.add_argument("--clip_model_name_or_path", default="openai/clip-vit-base-patch16", help="For clip.")
    parser.add_argument("--hps_weights", default=None, help="For hps: a file of xswu/HPSv2, by default version 2.0's.")
    parser.add_argument(
        "--hps_clip_model_name_or_path", default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        help="For hps: configuration and tokenizer.",
    )  # fmt: skip
    parser.add_argument(
        "--aesthetic_weights", default=None, help="For aesthetic: LAION's file; by default trl-lib's copy on the Hub."
    )
    parser.add_argument(
        "--aesthetic_clip_model_name_or_path", default="openai/clip-vit-large-patch14", help="For aesthetic."
    )
    parser.add_argument("--nearest_k", type=positive_int, default=5, help="Neighbours, for precision and recall.")
    parser.add_argument(
        "--num_bootstrap", type=non_negative_int, default=100, help="Resamples for the 95 %% intervals."
    )
    parser.add_argument(
        "--vae_floor", action=argparse.BooleanOptionalAction, default=False,
        help="Also measures the real images as each pipeline's VAE gives them back.",
    )  # fmt: skip
    parser.add_argument("--num_gallery", type=non_negative_int, default=24, help="Prompts in report.html's gallery.")
    parser.add_argument(
        "--votes", nargs="+", default=[], metavar="FILE", help="Votes that the blind comparison in report.html saved."
    )
    parser.add_argument(
        "--update_model_card", default=None, metavar="PATH",
        help="A pipeline's card, or NAME=PATH for that of pipeline NAME: its results become the card's metadata.",
    )  # fmt: skip
    parser.add_argument("--output_dir", default="report", help="Where images and reports are written.")
    return parser


def parse_args(input_args=None):
    parser = make_parser()
    args = parser.parse_args(input_args)

    for option in ("pipelines", "lora", "checkpoints"):
        pairs = [value.partition("=") for value in getattr(args, option)]
        if not all(name and path for name, _, path in pairs):
            parser.error(f"--{option} takes NAME=PATH, not {' '.join(getattr(args, option))}.")
        if len({name for name, _, _ in pairs}) < len(pairs):
            parser.error(f"--{option} has a name twice.")
        setattr(args, option, {name: path for name, _, path in pairs})
    if not args.pipelines and not args.checkpoints:
        parser.error("--pipelines or --checkpoints must name what is compared.")
    for option in ("pipelines", "checkpoints"):
        for name in getattr(args, option):
            if Path(name).name != name or name.startswith(".") or "@" in name:
                parser.error(f"--{option}: {name!r} cannot be a folder's name.")
    for name in args.lora.keys() - args.pipelines.keys():
        parser.error(f"--lora: there is no pipeline {name}.")
    samplers = []
    for value in args.sampler:
        name, _, steps = value.partition(":")
        if name not in SAMPLER_NAMES or not steps.isdigit() or int(steps) == 0:
            parser.error(f"--sampler {value}: give NAME:STEPS with one of {', '.join(SAMPLER_NAMES)}.")
        samplers.append((name, int(steps)))
    args.sampler, args.guidance_scale = list(dict.fromkeys(samplers)), list(dict.fromkeys(args.guidance_scale))
    unknown = [name for name in args.metrics if name not in CHOICES]
    if unknown:
        parser.error(f"--metrics {' '.join(unknown)} not known; choose from {', '.join(CHOICES)}.")
    if args.dataset_name is None and not args.quality_prompts:
        parser.error("Name --dataset_name or --quality_prompts.")
    without = [name for name in args.metrics if name in NEED_REAL_IMAGES and args.dataset_name is None]
    if without:
        parser.error(f"--metrics {' '.join(without)} compare with real images: name --dataset_name.")
    if args.vae_floor and args.dataset_name is None:
        parser.error("--vae_floor takes real images: name --dataset_name.")
    return args


@dataclass
class Candidate:
    """A pipeline to compare: a saved one, or the network of a training run's checkpoint in its pipeline."""

    name: str
    path: str
    lora: str | None = None
    network: str | None = None  # a folder whose weights replace the pipeline's network
    run: str | None = None
    iteration: int | None = None
    training: dict | None = None  # the facts in `adt_config.json`
    scheduler: str | None = None  # a scheduler's configuration, in place of the pipeline's


def find_candidates(args) -> list[Candidate]:
    candidates = []
    for name, path in args.pipelines.items():
        lora = args.lora.get(name)
        candidate = Candidate(name, path, lora, training=read_training_facts(lora or path, args))
        if lora is not None:  # adapters come with the sampler that they were trained for
            candidate.scheduler = find_file(lora, "scheduler/scheduler_config.json", args)
        candidates.append(candidate)
    for run, folder in args.checkpoints.items():
        candidates += checkpoint_candidates(run, Path(folder))
    return candidates


def read_training_facts(path, args) -> dict | None:
    """What a training run wrote beside its result; None where there was none."""
    file = find_file(path, "adt_config.json", args)
    return None if file is None else json.loads(Path(file).read_text())


def find_file(path, name, args) -> str | None:
    """A file of a folder, or of a repository on the Hub; None where there is none."""
    if Path(path).is_dir():
        return str(Path(path, name)) if Path(path, name).is_file() else None
    try:
        return hf_hub_download(path, name, cache_dir=args.cache_dir)
    except (EntryNotFoundError, ValueError):  # the repository has none, or this is no repository
        return None
    except OSError as error:
        raise EvaluationError(f"--pipelines: {path} cannot be read from the Hub: {error}") from error


def checkpoint_candidates(run, folder) -> list[Candidate]:
    """The checkpoints of a training run as pipelines.

    Those of adapters go onto the base, others into the run's result, or into the base as long as there is none.
    """
    found = [path for path in list_checkpoints(folder) if (path / "adt_checkpoint.json").is_file()]
    if not found:
        raise EvaluationError(f"--checkpoints: {folder} has no checkpoints of a training run.")
    candidates = []
    for checkpoint in found:
        facts = json.loads((checkpoint / "adt_checkpoint.json").read_text())
        iteration, base = facts["iteration"], facts["config"]["pretrained_model_name_or_path"]
        candidate = Candidate(f"{run}@{iteration}", base, run=run, iteration=iteration)
        averaged = [path for path in (checkpoint / "unet_ema", checkpoint / "transformer_ema") if path.is_dir()]
        trained = [path for path in (checkpoint / "unet", checkpoint / "transformer") if path.is_dir()]
        if trained:
            candidate.network = str((averaged or trained)[0])
            if (folder / "model_index.json").is_file():
                candidate.path = str(folder)
        else:
            candidate.lora = str((averaged or [checkpoint])[0])
        if candidate.path != str(folder):  # the sampler of the run, as soon as that has a result
            file = folder / "scheduler" / "scheduler_config.json"
            candidate.scheduler = str(file) if file.is_file() else None
        candidates.append(candidate)
    return candidates


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
    if not all(isinstance(caption, str | list | None) for caption in dataset[args.caption_column]):
        raise EvaluationError(f"--caption_column {args.caption_column} has values that are no texts.")
    dataset = dataset.select(range(min(args.num_images, len(dataset))))
    dataset = dataset.cast_column(args.image_column, datasets.Image(decode=False))
    captions = [
        (caption[0] if caption else "") if isinstance(caption, list) else caption
        for caption in dataset[args.caption_column]
    ]
    return dataset, [caption or "" for caption in captions]


def load_prompts(files) -> list[str]:
    """The prompts of text files, a line each, and of JSON files, each a list or a dict of lists."""
    prompts = []
    for file in files:
        try:
            text = Path(file).read_text()
            found = json.loads(text) if Path(file).suffix == ".json" else text.splitlines()
        except (OSError, ValueError) as error:
            raise EvaluationError(f"--quality_prompts {file} cannot be read: {error}") from error
        if isinstance(found, dict):
            found = [prompt for part in found.values() for prompt in part]
        if not isinstance(found, list) or not all(isinstance(prompt, str) for prompt in found):
            raise EvaluationError(f"--quality_prompts {file} is not a list of prompts.")
        prompts += [prompt.strip() for prompt in found if prompt.strip()]
    if not prompts:
        raise EvaluationError("--quality_prompts has no prompts.")
    return prompts


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


def original_digest(record) -> str:
    """Sixteen hexadecimal digits for an undecoded image of the dataset, of its file's content."""
    content = Path(record["path"]).read_bytes() if record["bytes"] is None else record["bytes"]
    return hashlib.sha256(content).hexdigest()[:16]


def load_index(path, args) -> dict:
    """The pipeline's `model_index.json`, refused unless it is a text-to-image pipeline's."""
    try:
        index = DiffusionPipeline.load_config(path, cache_dir=args.cache_dir)
    except OSError as error:
        raise EvaluationError(f"--pipelines: {path} is not a readable pipeline: {error}") from error
    # diffusers' own list of what `AutoPipelineForText2Image` makes, less those that take a picture, too.
    pipelines = {pipeline.__name__: pipeline for pipeline in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}
    name = index["_class_name"]
    if name not in pipelines or "image" in inspect.signature(pipelines[name].__call__).parameters:
        raise EvaluationError(f"--pipelines: {path} is a {name}, which is not text-to-image.")
    return index


def absent_components(index) -> dict:
    """What must be said to be absent: what is, and a safety checker, which would blacken images at random."""
    absent = {key: None for key, value in index.items() if isinstance(value, list) and None in value}
    return absent | ({"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {})


def check_index(candidate, args):
    """Refuses what is no text-to-image pipeline, or has no VAE that `--vae_floor` could use."""
    index = load_index(candidate.path, args)
    if args.vae_floor and index.get("vae", [None])[-1] != "AutoencoderKL":
        raise EvaluationError(
            f"--vae_floor: the pipeline {candidate.name} has no AutoencoderKL, which could encode the real images."
        )


def find_folder(candidate, args) -> Path:
    """The pipeline's files on this machine, downloaded where need be."""
    if Path(candidate.path).is_dir():
        return Path(candidate.path)
    absent = absent_components(load_index(candidate.path, args))
    return Path(DiffusionPipeline.download(candidate.path, cache_dir=args.cache_dir, **absent))


def load_pipeline(candidate, args, device):
    absent = absent_components(load_index(candidate.path, args))
    dtype = getattr(torch, args.dtype)
    pipeline = DiffusionPipeline.from_pretrained(find_folder(candidate, args), torch_dtype=dtype, **absent)
    if candidate.network is not None:
        role = "unet" if hasattr(pipeline, "unet") else "transformer"
        network = type(getattr(pipeline, role)).from_pretrained(candidate.network, torch_dtype=dtype)
        pipeline.register_modules(**{role: network})
    if candidate.lora is not None:
        pipeline.load_lora_weights(candidate.lora, cache_dir=args.cache_dir)
    if candidate.scheduler is not None:
        config = json.loads(Path(candidate.scheduler).read_text())
        pipeline.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def make_scheduler(sampler, base):
    """The named sampler with the base scheduler's schedule.

    Raises:
        EvaluationError: where it does not suit the model.
    """
    if sampler == OWN:
        return base
    if isinstance(base, FlowMatchEulerDiscreteScheduler) or base.config.get("use_flow_sigmas", False):
        raise EvaluationError(f"--sampler {sampler} does not suit a flow-matching model: use own.")
    return configure_sampler(sampler, base.config)


def check_candidate(candidate, args) -> dict:
    """Loads the pipeline once before any image is made, and makes every sampler, to find what does not work.

    Returns what its images depend on: "weights" stands for its files of weights, by size and time (adapters on the Hub
    aside), "samplers" has each one's configuration, and "vae", with `--vae_floor`, is `vae_digest`'s.

    Raises:
        EvaluationError: where it cannot be loaded, or a sampler does not suit it.
    """
    try:
        pipeline = load_pipeline(candidate, args, "cpu")
    except EvaluationError:
        raise
    except Exception as error:  # diffusers, transformers, safetensors and peft have a dozen kinds
        adapters = f" with the adapters {candidate.lora}" if candidate.lora else ""
        raise EvaluationError(f"--pipelines: {candidate.path}{adapters} cannot be loaded: {error}") from error
    if args.resolution is None:
        args.resolution = default_resolution(pipeline, candidate)
    if args.resolution % pipeline.vae_scale_factor:
        raise EvaluationError(f"--resolution {args.resolution} is not a multiple of {pipeline.vae_scale_factor}.")
    samplers = {}
    for sampler, steps in args.sampler:
        scheduler = make_scheduler(sampler, pipeline.scheduler)
        if isinstance(scheduler, LCMScheduler) and steps > scheduler.config.original_inference_steps:
            raise EvaluationError(
                f"--sampler {sampler}:{steps}: {candidate.name} was distilled into "
                f"{scheduler.config.original_inference_steps} steps."
            )
        config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        samplers[sampler] = {"class": type(scheduler).__name__, **json.loads(json.dumps(config, default=str))}
    folder, index = find_folder(candidate, args), load_index(candidate.path, args)
    folders = [folder / name for name, value in index.items() if isinstance(value, list)]
    folders += [Path(path) for path in (candidate.network, candidate.lora) if path is not None]
    files = sorted(file for folder in folders for file in folder.glob("*.safetensors"))
    files += sorted(file for folder in folders for file in folder.glob("*.bin"))
    facts = [(file.parent.name, file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    weights = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    vae = vae_digest(pipeline.vae) if args.vae_floor else None
    return {"samplers": samplers, "weights": weights, "vae": vae}


def vae_digest(vae) -> str:
    """Sixteen hexadecimal digits for its weights. What scales latents is left out, as it cancels in `reconstruct`."""
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.float().numpy().tobytes())  # `reconstruct` takes them so, too
    return digest.hexdigest()[:16]


def find_floors(facts) -> list[dict]:
    """The report's "floors": one for each VAE, whichever pipelines have it. facts: {name: `check_candidate`'s}."""
    owners = {}
    for name, found in facts.items():
        owners.setdefault(found["vae"], []).append(name)
    return [
        {
            "name": FLOOR if len(owners) == 1 else f"{names[0]} ({FLOOR})",
            "pipelines": names,
            "vae": vae,
            "images": {"test": str(Path("images", "vae_floor", vae))},
        }
        for vae, names in owners.items()
    ]


def default_resolution(pipeline, candidate) -> int:
    """What the pipeline draws when nothing is said."""
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    size = getattr(getattr(network, "config", None), "sample_size", None)
    if not isinstance(size, int):
        raise EvaluationError(f"{candidate.path} does not say what size it draws: name --resolution.")
    return size * pipeline.vae_scale_factor


def check_settings(directory, settings):
    """Refuses a folder whose images are of other settings; more or fewer of the same prompts are no other settings.

    settings: with "prompts" or, for a VAE's floor, "originals", each a list of strings, one for each image.

    Raises:
        EvaluationError: naming what differs.
    """
    file = directory / "settings.json"
    if not file.is_file():
        return
    before = json.loads(file.read_text())
    changes = []
    for name in sorted(settings.keys() - set(ONE_EACH)):
        if before.get(name) != settings[name]:
            old, new = before.get(name), settings[name]
            if isinstance(new, dict) and isinstance(old, dict):  # a scheduler's configuration
                different = [key for key in new.keys() | old.keys() if old.get(key) != new.get(key)]
                old, new = ({key: values.get(key) for key in sorted(different)} for values in (old, new))
            changes.append(f"{name} {old} (now {new})")
    (name,) = settings.keys() & set(ONE_EACH)
    pairs = zip(before[name], settings[name], strict=False)
    changes += [f"{ONE_EACH[name]} {n} {old!r} (now {new!r})" for n, (old, new) in enumerate(pairs) if old != new][:1]
    if changes:
        raise EvaluationError(
            f"{directory} has images of other settings: {', '.join(changes)}. Name another --output_dir."
        )


def write_settings(directory, settings):
    """Writes `settings.json` unless the one that is there has these prompts, or originals, and more."""
    file, partial = directory / "settings.json", directory / ".settings-partial.json"
    (name,) = settings.keys() & set(ONE_EACH)
    if not file.is_file() or len(json.loads(file.read_text())[name]) < len(settings[name]):
        directory.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(settings, indent=2))
        partial.rename(file)


def draw(pipeline, captions, run, args, indices) -> list[Image.Image]:
    """What the pipeline makes of the captions with these indices, with a run's steps and guidance scale."""
    # An image's own: the same noise for every pipeline, whatever the batch.
    generators = [make_generator(args.seed, "evaluation", index) for index in indices]
    scheduler, steps = pipeline.scheduler, {"num_inference_steps": run["steps"]}
    if scheduler.config.get("stochastic_sampling", False):
        # A few-step flow-matching model's: by a number of steps the last would be made at next to no noise, and its
        # pipelines do not hand on the generator to the noise between the steps.
        steps = {"sigmas": few_step_sigmas(run["steps"], run.get("student_sigmas"))}
        scheduler.step = functools.partial(type(scheduler).step, scheduler, generator=generators)
    return pipeline(
        [captions[index] for index in indices],
        generator=generators,
        **steps,
        guidance_scale=run["guidance_scale"],
        height=args.resolution,
        width=args.resolution,
    ).images


def few_step_sigmas(num_steps, student_sigmas) -> list[float]:
    """What a few-step flow-matching model is called with: some of `student_sigmas`, where they are as many.

    Args:
        student_sigmas: what the model's training says that it is called with, a list; or None.
    """
    if student_sigmas is None or num_steps > len(student_sigmas):
        return [1 - n / num_steps for n in range(num_steps)]
    return [student_sigmas[n * len(student_sigmas) // num_steps] for n in range(num_steps)]


@torch.no_grad()
def reconstruct(vae, dataset, args, indices) -> list[Image.Image]:
    """The real images with these indices as the VAE, in float32, gives them back from its posterior's mode."""
    processor = VaeImageProcessor(do_resize=False)
    images = [square(open_reference(dataset, index, args), args.resolution) for index in indices]
    latents = vae.encode(processor.preprocess(images).to(vae.device)).latent_dist.mode()
    return processor.postprocess(vae.decode(latents).sample)


def generate(make, count, directory, args, accelerator):
    """Makes those of `count` images that `directory` lacks, shared out over the processes.

    make: a function from a list of indices to as many PIL images.
    """
    own = range(accelerator.process_index, count, accelerator.num_processes)
    missing = [index for index in own if not (directory / f"{index:06d}.png").is_file()]
    bar = tqdm(total=len(missing), desc=str(directory), disable=not accelerator.is_local_main_process)
    for first in range(0, len(missing), args.batch_size):
        indices = missing[first : first + args.batch_size]
        for index, image in zip(indices, make(indices), strict=True):
            partial = directory / f".{index:06d}-partial.png"
            image.save(partial)
            partial.rename(directory / f"{index:06d}.png")
        bar.update(len(indices))
    bar.close()
    accelerator.wait_for_everyone()


def generate_with(pipeline, name, report, sets, dataset, args, accelerator):
    """The images of the runs of the pipeline `name`, and of the floor of its VAE where none before it has that VAE."""
    base = pipeline.scheduler
    for run in report["runs"]:
        if run["pipeline"] == name:
            pipeline.scheduler = make_scheduler(run["sampler"], base)
            for kind, prompts in sets.items():
                make = functools.partial(draw, pipeline, prompts, run, args)
                generate(make, len(prompts), Path(args.output_dir, run["images"][kind]), args, accelerator)
    for floor in report["floors"]:
        if floor["pipelines"][0] == name:
            # Last, since the pipeline draws with it in --dtype.
            make = functools.partial(reconstruct, pipeline.vae.float(), dataset, args)
            generate(make, len(dataset), Path(args.output_dir, floor["images"]["test"]), args, accelerator)


def find_card(value, candidates) -> tuple[str, Path]:
    """The pipeline whose results a card gets, and the card's file.

    Raises:
        EvaluationError: where there is no such card, or not one pipeline that it belongs to.
    """
    names = [candidate.name for candidate in candidates]
    name, _, path = value.partition("=")
    if name not in names:
        name, path = None, value
    card = Path(path, "README.md") if Path(path).is_dir() else Path(path)
    load_card(card)
    if name is None:
        folder = card.parent.resolve()
        owners = [
            candidate.name
            for candidate in candidates
            if candidate.iteration is None and Path(candidate.lora or candidate.path).resolve() == folder
        ]
        if len(owners) != 1:
            raise EvaluationError(
                f"--update_model_card: {card} is in the folder of {len(owners)} of the pipelines; write NAME={value}, "
                f"with NAME of {', '.join(names)}."
            )
        name = owners[0]
    return name, card


def prompt_set(metric, sets) -> str:
    """Which prompts a metric takes: "quality" for quality scores where there are such prompts, else "test"."""
    return "quality" if "quality" in sets and (metric in QUALITY or "test" not in sets) else "test"


def main(args):
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    # Everything that can be refused before an image is made.
    candidates = find_candidates(args)
    for candidate in candidates:
        check_index(candidate, args)
    dataset, sets = None, {}
    if args.dataset_name is not None:
        dataset, sets["test"] = load_reference(args)
        own = range(accelerator.process_index, len(dataset), accelerator.num_processes)
        for index in tqdm(own, desc="Checking images", disable=not accelerator.is_local_main_process, leave=False):
            open_reference(dataset, index, args)
    if args.quality_prompts:
        sets["quality"] = load_prompts(args.quality_prompts)
    metrics = {name: [metric for metric in args.metrics if prompt_set(metric, sets) == name] for name in sets}
    sets = {name: prompts for name, prompts in sets.items() if metrics[name]}
    if args.vae_floor and "test" not in sets:
        raise EvaluationError("--vae_floor: the metrics are all of --quality_prompts, which have no real images.")
    if {"fid", "fdd"} & set(args.metrics) and len(dataset) < 2:
        raise EvaluationError("A Fréchet distance needs more than one image.")
    if "precision_recall" in args.metrics and len(dataset) <= args.nearest_k + 1:
        raise EvaluationError(f"--nearest_k {args.nearest_k} needs more than {args.nearest_k + 1} images.")
    check_options(args)
    card = None if args.update_model_card is None else find_card(args.update_model_card, candidates)
    networks = load_networks(args) if accelerator.is_main_process else {}
    facts = {candidate.name: check_candidate(candidate, args) for candidate in candidates}

    report = start_report(candidates, facts, sets, dataset, args)
    if accelerator.is_main_process:
        prepare_output(report, sets, facts, dataset, args)
    accelerator.wait_for_everyone()

    for candidate in candidates:
        pipeline = load_pipeline(candidate, args, accelerator.device)
        generate_with(pipeline, candidate.name, report, sets, dataset, args, accelerator)
        del pipeline  # before the next one is loaded
    if accelerator.is_main_process:
        for network in networks.values():
            network.to(accelerator.device)
        evaluate(report, sets, metrics, dataset, networks, card, args)
    accelerator.end_training()


def start_report(candidates, facts, sets, dataset, args) -> dict:
    """The report as far as it is known before images are made. facts: {name: `check_candidate`'s}."""
    runs = [
        {"pipeline": candidate.name, "sampler": sampler, "steps": steps, "guidance_scale": guidance_scale}
        for candidate, (sampler, steps), guidance_scale in product(candidates, args.sampler, args.guidance_scale)
    ]
    student_sigmas = {
        candidate.name: candidate.training["inference"]["sigmas"]
        for candidate in candidates
        if candidate.training is not None and candidate.training["inference"].get("stochastic_sampling", False)
    }
    for run in runs:
        if run["pipeline"] in student_sigmas:
            run["student_sigmas"] = student_sigmas[run["pipeline"]]
        setting = f"{run['sampler']}-{run['steps']}-guidance-{run['guidance_scale']:g}"
        run["images"] = {name: str(Path("images", name, run["pipeline"], setting)) for name in sets}
    report = {
        "settings": {
            "dataset_name": args.dataset_name,
            "dataset_config_name": args.dataset_config_name,
            "split": args.split,
            "num_images": None if dataset is None else len(dataset),
            "quality_prompts": ", ".join(Path(file).stem for file in args.quality_prompts) or None,
            "num_quality_prompts": len(sets["quality"]) if "quality" in sets else None,
            "resolution": args.resolution,
            "seed": args.seed,
            "dtype": args.dtype,
            "num_bootstrap": args.num_bootstrap,
        },
        "pipelines": [asdict(candidate) | {"weights": facts[candidate.name]["weights"]} for candidate in candidates],
        "runs": runs,
        "floors": find_floors(facts) if args.vae_floor else [],
        "warnings": [],
    }
    if "test" in sets and len(dataset) < FEW_IMAGES and NEED_REAL_IMAGES & set(args.metrics):
        report["warnings"].append(
            f"{len(dataset)} images are few for a Fréchet distance, whose bias grows as they get fewer, and for "
            "precision and recall. Compare only numbers with the same count."
        )
    return report


def prepare_output(report, sets, facts, dataset, args):
    """Makes all folders of images, once none of them has images of other settings, and counts the votes."""
    count_votes(args.votes, report)
    folders = {}
    for run, (name, prompts) in product(report["runs"], sets.items()):
        entry = next(pipeline for pipeline in report["pipelines"] if pipeline["name"] == run["pipeline"])
        folders[Path(args.output_dir, run["images"][name])] = {
            **{key: entry[key] for key in ("path", "lora", "network", "weights")},
            "scheduler": facts[run["pipeline"]]["samplers"][run["sampler"]],
            "steps": run["steps"],
            "guidance_scale": run["guidance_scale"],
            **{key: report["settings"][key] for key in ("resolution", "seed", "dtype")},
            "prompts": prompts,
        }
    for floor in report["floors"]:
        folders[Path(args.output_dir, floor["images"]["test"])] = {
            "vae": floor["vae"],
            "resolution": args.resolution,
            "originals": [original_digest(dataset[index][args.image_column]) for index in range(len(dataset))],
        }
    for directory, settings in folders.items():
        check_settings(directory, settings)
    try:
        for directory, settings in folders.items():
            write_settings(directory, settings)
    except OSError as error:
        raise EvaluationError(f"--output_dir {args.output_dir} cannot be written: {error}") from error


def open_image(file) -> Image.Image:
    try:
        return Image.open(file).convert("RGB")
    except OSError as error:
        raise EvaluationError(f"{file} does not decode: {error} Delete it, and it is drawn again.") from error


def evaluate(report, sets, metrics, dataset, networks, card, args):
    """Measures the images of every run and every floor, and writes the reports and the card."""
    real, reference = None, {}
    if "test" in sets:
        real = Loaded(lambda index: square(open_reference(dataset, index, args), args.resolution), len(dataset))
        reference = reference_features(real, networks, args)
    for metric, key in (("fid", "inception"), ("fdd", "dinov2")):
        if metric in args.metrics and len(dataset) <= reference[key].shape[1]:
            report["warnings"].append(
                f"{metric}: {len(dataset)} images are not more than the {reference[key].shape[1]} features, whose "
                "covariance is then singular."
            )
    for run in tqdm([*report["runs"], *report["floors"]], desc="Measuring"):
        run["metrics"] = {}
        for name, folder in run["images"].items():
            directory, prompts = Path(args.output_dir, folder), sets[name]
            images = Loaded(
                lambda index, directory=directory: open_image(directory / f"{index:06d}.png"), len(prompts)
            )
            against = reference if name == "test" else {}
            for metric, result in measure(images, prompts, metrics[name], against, networks, args).items():
                run["metrics"][metric] = {"prompts": name, **result}
        # In the order of the list of metrics, wherever their prompts came from.
        run["metrics"] = {name: run["metrics"][name] for name in METRICS if name in run["metrics"]}
    write_report(
        report, METRICS, sets, None if real is None else real.load, args.output_dir, args.num_gallery, args.votes
    )
    if card is not None:
        update_model_card(report, METRICS, *card)
    print(Path(args.output_dir, "report.md").read_text())


if __name__ == "__main__":
    try:
        main(parse_args())
    except (EvaluationError, ReportError) as error:
        sys.exit(f"error: {error}")

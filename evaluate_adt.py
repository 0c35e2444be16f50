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

Every pipeline draws each caption from the same noise, under every sampler and guidance scale, and else as it was
trained to be sampled. Images that are there already are kept, so that a stopped evaluation goes on; other settings in
the same folder are refused. It writes `report.json`, `report.md` with its plots, and `report.html`, one file with a
gallery and a blind comparison.

It needs the other `evaluate_*` files and the `*_utils.py` beside it.
"""

import argparse
import functools
import hashlib
import json
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from data_utils import make_generator
from evaluate_metrics import (
    CHOICES,
    METRICS,
    NEED_REAL_IMAGES,
    QUALITY,
    EvaluationError,
    ImageSet,
    Reference,
    caption_tokens,
    check_options,
    extract,
    load_networks,
    measure,
    needed,
    square,
)
from evaluate_pipelines import (
    GUIDANCE,
    OWN,
    SAMPLING,
    STUDENT_STEPS,
    check_candidate,
    check_index,
    find_candidates,
    guided_call,
    load_pipeline,
    make_scheduler,
    sampling_options,
    spacing_warnings,
)
from evaluate_report import ReportError, count_votes, load_card, update_model_card, write_report
from option_utils import non_negative_int, positive_int, share
from training_utils import SAMPLERS


logger = get_logger(__name__)
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
    parser.add_argument(
        "--vae", nargs="+", default=[], metavar="NAME=PATH",
        help="A VAE in place of the one that the pipeline or run of that name has, or was trained with.",
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
        "--timestep_spacing", choices=["leading", "trailing", "linspace"], default=None,
        help="Of the named samplers; by default the pipeline's own, else the sampler's usual one.",
    )  # fmt: skip
    add_sampling_arguments(parser.add_argument_group("how a model was trained to be sampled"))
    parser.add_argument(
        "--resolution", type=positive_int, default=None, help="Side of the images; the first pipeline's own."
    )
    parser.add_argument(
        "--seed", type=non_negative_int, default=0, help="Each image's noise derives from it and the index."
    )
    parser.add_argument("--batch_size", type=positive_int, default=8, help="Images at a time.")
    parser.add_argument(
        "--dataloader_num_workers", type=non_negative_int, default=4, help="Processes that read images to be measured."
    )
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="To sample in.")
    add_metric_arguments(parser)
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


def add_metric_arguments(parser):
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


def add_sampling_arguments(group):
    """`SAMPLING`, for every pipeline that takes it; where nothing is said, each is sampled as its training says."""
    group.add_argument(
        "--guidance_rescale", type=share, default=None, help="In place of what each pipeline was trained with."
    )
    group.add_argument("--max_sequence_length", type=positive_int, default=None, help="The same, of T5's tokens.")
    group.add_argument(
        "--t5", action=argparse.BooleanOptionalAction, default=None, help="The same, whether SD3 is given its T5."
    )
    group.add_argument(
        "--rollout_time_ids", choices=["inference", "image"], default=None,
        help="The same, of SDXL: the pipeline's own sizes and crop, or the real image's.",
    )  # fmt: skip


def parse_args(input_args=None):
    parser = make_parser()
    args = parser.parse_args(input_args)

    for option in ("pipelines", "lora", "checkpoints", "vae"):
        pairs = [value.partition("=") for value in getattr(args, option)]
        if not all(name and path for name, _, path in pairs):
            parser.error(f"--{option} takes NAME=PATH, not {' '.join(getattr(args, option))}.")
        if len({name for name, _, _ in pairs}) < len(pairs):
            parser.error(f"--{option} has a name twice.")
        setattr(args, option, {name: path for name, _, path in pairs})
    if not args.pipelines and not args.checkpoints:
        if args.dataset_name is None or NEED_REAL_IMAGES & set(args.metrics):
            parser.error("--pipelines or --checkpoints must name what is compared.")
        if args.resolution is None:
            parser.error("--resolution: there is no pipeline to say it.")
    for option in ("pipelines", "checkpoints"):
        for name in getattr(args, option):
            if Path(name).name != name or name.startswith(".") or "@" in name:
                parser.error(f"--{option}: {name!r} cannot be a folder's name.")
    for name in args.lora.keys() - args.pipelines.keys():
        parser.error(f"--lora: there is no pipeline {name}.")
    for name in args.vae.keys() - args.pipelines.keys() - args.checkpoints.keys():
        parser.error(f"--vae: there is no pipeline or run {name}.")
    samplers = []
    for value in args.sampler:
        name, _, steps = value.partition(":")
        if name not in SAMPLER_NAMES or not steps.isdigit() or int(steps) == 0:
            parser.error(f"--sampler {value}: give NAME:STEPS with one of {', '.join(SAMPLER_NAMES)}.")
        samplers.append((name, int(steps)))
    args.sampler, args.guidance_scale = list(dict.fromkeys(samplers)), list(dict.fromkeys(args.guidance_scale))
    if args.timestep_spacing is not None and all(name == OWN for name, _ in args.sampler):
        parser.error(f"--timestep_spacing is of the named samplers: {OWN} is as the pipeline has it.")
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
            if isinstance(new, dict) and isinstance(old, dict):  # such as a scheduler's configuration
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


def size_conditions(dataset, index, args) -> dict:
    """The sizes by which SDXL's training describes a real image: its own, and where `square` crops it, as (y, x)."""
    width, height = ImageOps.exif_transpose(open_reference(dataset, index, args)).size
    sides = [args.resolution * side // min(width, height) for side in (height, width)]
    corner = tuple(round((side - args.resolution) / 2) for side in sides)
    return {"original_size": (height, width), "crops_coords_top_left": corner}


def call_options(candidate, kind, dataset, args):
    """A function from an image's index in the set `kind` to what the pipeline's call is given by `sampling`."""
    names = (*SAMPLING[:2], *GUIDANCE)
    fixed = {name: candidate.sampling[name] for name in names if name in candidate.sampling}
    if candidate.sampling.get("rollout_time_ids") == "image" and kind == "test":
        return lambda index: fixed | size_conditions(dataset, index, args)
    return lambda index: fixed


def draw(pipeline, captions, run, options, args, indices) -> list[Image.Image]:
    """What the pipeline makes of the captions with these indices, with a run's steps and guidance scale.

    options: `call_options`. A call has one set of them, so that images with others take a call of their own.
    """
    calls, images = {}, {}
    for index in indices:
        calls.setdefault(tuple(options(index).items()), []).append(index)
    for call, part in calls.items():
        # An image's own: the same noise for every pipeline, whatever the batch.
        generators = [make_generator(args.seed, "evaluation", index) for index in part]
        scheduler, steps = pipeline.scheduler, {"num_inference_steps": run["steps"]}
        if scheduler.config.get("stochastic_sampling", False):
            # A few-step flow-matching model's: by a number of steps the last would be made at next to no noise, and
            # its pipelines do not hand on the generator to the noise between the steps.
            steps = {"sigmas": run.get("student_sigmas") or few_step_sigmas(run["steps"])}
            scheduler.step = functools.partial(type(scheduler).step, scheduler, generator=generators)
        made = pipeline(
            [captions[index] for index in part],
            generator=generators,
            **steps,
            **guided_call(pipeline, run["guidance_scale"], dict(call), len(part)),
            height=args.resolution,
            width=args.resolution,
        ).images
        images |= zip(part, made, strict=True)
    return [images[index] for index in indices]


def few_step_sigmas(num_steps, method=None) -> list[float]:
    """What a few-step flow-matching model is called with: evenly spaced from 1, or some of its own, `STUDENT_STEPS`.

    Args:
        method: what the model's training calls itself.
    """
    points = STUDENT_STEPS.get(method, num_steps)
    return [1 - n * points // num_steps / points for n in range(num_steps)]


@torch.no_grad()
def reconstruct(vae, dataset, args, indices) -> list[Image.Image]:
    """The real images with these indices as the VAE, in float32, gives them back from its posterior's mode."""
    processor = VaeImageProcessor(do_resize=False)
    images = [square(open_reference(dataset, index, args), args.resolution) for index in indices]
    latents = vae.encode(processor.preprocess(images).to(vae.device)).latent_dist.mode()
    return processor.postprocess(vae.decode(latents).sample)


def missing_images(directory, count, accelerator) -> list[int]:
    """Which of `count` images this process is to make: its share of those that `directory` lacks."""
    own = range(accelerator.process_index, count, accelerator.num_processes)
    return [index for index in own if not (directory / f"{index:06d}.png").is_file()]


def generate(make, indices, directory, args, accelerator):
    """Makes the images with these indices.

    make: a function from a list of indices to as many PIL images.
    """
    bar = tqdm(total=len(indices), desc=str(directory), disable=not accelerator.is_local_main_process)
    for first in range(0, len(indices), args.batch_size):
        part = indices[first : first + args.batch_size]
        for index, image in zip(part, make(part), strict=True):
            partial = directory / f".{index:06d}-partial.png"
            image.save(partial)
            partial.rename(directory / f"{index:06d}.png")
        bar.update(len(part))
    bar.close()


def generate_with(candidate, report, sets, dataset, args, accelerator):
    """What is missing of the images of a pipeline's runs, and of the floor of its VAE where no other before it has it.

    The pipeline is loaded once, and only by a process that has something to make.
    """
    jobs = []
    for run in report["runs"]:
        if run["pipeline"] == candidate.name:
            jobs += [(run, kind, run["images"][kind], len(prompts)) for kind, prompts in sets.items()]
    # Last, since the pipeline draws with its VAE in --dtype.
    floors = [floor for floor in report["floors"] if floor["pipelines"][0] == candidate.name]
    jobs += [(None, "test", floor["images"]["test"], len(dataset)) for floor in floors]
    pipeline = None
    for run, kind, images, count in jobs:
        directory = Path(args.output_dir, images)
        indices = missing_images(directory, count, accelerator)
        if indices and pipeline is None:
            pipeline = load_pipeline(candidate, args, accelerator.device)
            base = pipeline.scheduler
        if indices and run is None:
            make = functools.partial(reconstruct, pipeline.vae.float(), dataset, args)
        elif indices:
            pipeline.scheduler = make_scheduler(run["sampler"], base, args.timestep_spacing)
            options = call_options(candidate, kind, dataset, args)
            make = functools.partial(draw, pipeline, sets[kind], run, options, args)
        if indices:
            generate(make, indices, directory, args, accelerator)
    accelerator.wait_for_everyone()


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
        candidate.sampling = sampling_options(candidate, args)
    for name in SAMPLING:
        if getattr(args, name) is not None and not any(name in candidate.sampling for candidate in candidates):
            raise EvaluationError(f"--{name} is given, which none of the pipelines takes.")
    dataset, sets, captions = None, {}, None
    if args.dataset_name is not None:
        dataset, captions = load_reference(args)
        sets["test"] = captions
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
    networks = load_networks(args)
    facts = {candidate.name: check_candidate(candidate, args) for candidate in candidates}

    report = start_report(candidates, facts, sets, dataset, args)
    if accelerator.is_main_process:
        prepare_output(report, sets, facts, dataset, args)
    for warning in report["warnings"]:
        logger.warning(warning)
    accelerator.wait_for_everyone()

    real = None if dataset is None else read_real_images(dataset, captions, networks, args, accelerator)
    for candidate in candidates:
        generate_with(candidate, report, sets, dataset, args, accelerator)
    evaluate(report, sets, metrics, real, networks, args, accelerator)
    if accelerator.is_main_process:
        if dataset is not None:
            report["real_images"] = describe_real_images(real, captions, networks, args)
        finish_report(report, sets, dataset, card, args)
    accelerator.end_training()


def start_report(candidates, facts, sets, dataset, args) -> dict:
    """The report as far as it is known before images are made. facts: {name: `check_candidate`'s}."""
    runs = [
        {"pipeline": candidate.name, "sampler": sampler, "steps": steps, "guidance_scale": guidance_scale}
        for candidate, (sampler, steps), guidance_scale in product(candidates, args.sampler, args.guidance_scale)
    ]
    # By which it is called. Beside a number of steps they are the scheduler's, as `level_warnings` reads them.
    students = {
        candidate.name: candidate.method
        for candidate in candidates
        if "sigmas" in candidate.inference and "num_inference_steps" not in candidate.inference
    }
    for run in runs:
        if run["pipeline"] in students:
            run["student_sigmas"] = few_step_sigmas(run["steps"], students[run["pipeline"]])
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
            "timestep_spacing": args.timestep_spacing,
            "num_bootstrap": args.num_bootstrap,
        },
        "pipelines": [asdict(candidate) | {"weights": facts[candidate.name]["weights"]} for candidate in candidates],
        "runs": runs,
        "floors": find_floors(facts) if args.vae_floor else [],
        "real_images": None,
        # A run's checkpoints share theirs.
        "warnings": [
            *dict.fromkeys(warning for found in facts.values() for warning in found["warnings"]),
            *spacing_warnings(facts),
        ],
    }
    for entry in report["pipelines"]:
        del entry["options"], entry["inference"]  # which "training" has, a checkpoint's with paths of its machine
    if dataset is not None and len(dataset) < FEW_IMAGES and NEED_REAL_IMAGES & set(args.metrics):
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
            **{key: entry[key] for key in ("path", "lora", "network", "vae", "weights", "sampling")},
            "scheduler": facts[run["pipeline"]]["samplers"][run["sampler"]],
            "steps": run["steps"],
            "student_sigmas": run.get("student_sigmas"),
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
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        for directory, settings in folders.items():
            write_settings(directory, settings)
    except OSError as error:
        raise EvaluationError(f"--output_dir {args.output_dir} cannot be written: {error}") from error


def read_real_images(dataset, captions, networks, args, accelerator) -> dict:
    """What `extract` makes of them, which also finds one that does not decode before any image is drawn."""
    image_set = ImageSet(functools.partial(load_real_image, dataset, args), captions, needed(args.metrics))
    for network in networks.values():
        network.to(accelerator.device)
    [features] = extract([image_set], networks, args, accelerator)
    for network in networks.values():
        network.to("cpu")  # while the pipelines draw
    return features


def load_real_image(dataset, args, index) -> Image.Image:
    return square(open_reference(dataset, index, args), args.resolution)


def load_drawn_image(directory, index) -> Image.Image:
    file = directory / f"{index:06d}.png"
    try:
        return Image.open(file).convert("RGB")
    except OSError as error:
        raise EvaluationError(f"{file} does not decode: {error} Delete it, and it is drawn again.") from error


def evaluate(report, sets, metrics, real, networks, args, accelerator):
    """Measures the images of every run and every floor, each process its share of these.

    Args:
        metrics: {name of a set: its metrics}.
        real: `read_real_images`; None without a dataset.
    """
    entries = [*report["runs"], *report["floors"]]
    parts = [(number, kind) for number, entry in enumerate(entries) for kind in entry["images"]]
    image_sets = []
    for number, kind in parts:
        directory = Path(args.output_dir, entries[number]["images"][kind])
        load = functools.partial(load_drawn_image, directory)
        image_sets.append(ImageSet(load, sets[kind], needed(metrics[kind])))
    for network in networks.values():
        network.to(accelerator.device)
    read = extract(image_sets, networks, args, accelerator)
    bar = tqdm(read, total=len(parts), desc="Reading images", disable=not accelerator.is_local_main_process)
    own = [
        (number, kind, features)
        for (number, kind), features in zip(parts, bar, strict=True)
        if number % accelerator.num_processes == accelerator.process_index
    ]
    reference = Reference(real, args.metrics, accelerator.device) if "test" in sets else None
    measured = {}
    for number, kind, features in tqdm(own, desc="Measuring", disable=not accelerator.is_local_main_process):
        against = reference if kind == "test" else None
        for metric, result in measure(features, metrics[kind], against, networks, args).items():
            measured.setdefault(number, {})[metric] = {"prompts": kind, **result}
    for found in gather_object([measured]):
        for number, results in found.items():
            # In the order of the list of metrics, wherever their prompts came from.
            entries[number]["metrics"] = {name: results[name] for name in METRICS if name in results}
    for metric, key in (("fid", "inception"), ("fdd", "dinov2")):
        if metric in args.metrics and len(real[key]) <= real[key].shape[1]:
            report["warnings"].append(
                f"{metric}: {len(real[key])} images are not more than the {real[key].shape[1]} features, whose "
                "covariance is then singular."
            )


def describe_real_images(real, captions, networks, args) -> dict:
    """The report's "real_images": what Table A1 of the paper says of a dataset."""
    chosen = [name for name in args.metrics if name not in NEED_REAL_IMAGES]
    results = measure(real, chosen, None, networks, args)
    return {
        "n": len(captions),
        "caption_tokens": caption_tokens(captions, networks),
        "metrics": {name: {"prompts": "test", **results[name]} for name in METRICS if name in results},
    }


def finish_report(report, sets, dataset, card, args):
    """Writes the reports and the card."""
    real_image = None if dataset is None else functools.partial(load_real_image, dataset, args)
    write_report(report, METRICS, sets, real_image, args.output_dir, args.num_gallery, args.votes)
    if card is not None:
        update_model_card(report, METRICS, *card)
    print(Path(args.output_dir, "report.md").read_text())


if __name__ == "__main__":
    try:
        main(parse_args())
    except (EvaluationError, ReportError) as error:
        sys.exit(f"error: {error}")

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
"""The pipelines that `evaluate_adt.py` compares: what they are, how each is sampled, and loading them."""

import hashlib
import inspect
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LCMScheduler
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open

from evaluate_metrics import EvaluationError
from output_utils import list_checkpoints
from training_utils import configure_sampler


OWN = "own"  # the scheduler that the pipeline comes with
# Methods whose students know as many evenly spaced steps, and fewer as some of these. Others' are spaced anew.
STUDENT_STEPS = {"adversarial diffusion distillation": 4}
# The options that say how a model is sampled, beside the sampler, its steps, guidance and size.
SAMPLING = ("guidance_rescale", "max_sequence_length", "t5", "rollout_time_ids")
GUIDANCE = ("true_cfg_scale", "negative_prompt")  # and beside the guidance scale, where a model was trained with them
# What `from_pretrained` looks for in a model's folder, where it is not told otherwise.
WEIGHTS = (
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "model.safetensors", "pytorch_model.bin",
)  # fmt: skip


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
    vae: str | None = None  # in place of the pipeline's
    options: dict = field(default_factory=dict)  # what it was trained with
    inference: dict = field(default_factory=dict)  # how training says that it samples
    method: str | None = None  # what training calls itself
    sampling: dict = field(default_factory=dict)  # `sampling_options`


def find_candidates(args) -> list[Candidate]:
    candidates = []
    for name, path in args.pipelines.items():
        lora = args.lora.get(name)
        candidate = Candidate(name, path, lora, training=read_training_facts(lora or path, args))
        if candidate.training is not None:
            candidate.options = candidate.training["training_options"]
            candidate.inference = candidate.training["inference"]
            candidate.method = candidate.training.get("method")
        if lora is not None:  # adapters come with the sampler, and belong to the VAE, that they were trained for
            candidate.scheduler = find_file(lora, "scheduler/scheduler_config.json", args)
            candidate.vae = candidate.options.get("pretrained_vae_model_name_or_path")
        candidates.append(candidate)
    for run, folder in args.checkpoints.items():
        candidates += checkpoint_candidates(run, Path(folder), args)
    for candidate in candidates:
        candidate.vae = args.vae.get(candidate.run or candidate.name, candidate.vae)
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


def checkpoint_candidates(run, folder, args) -> list[Candidate]:
    """The checkpoints of a training run as pipelines.

    Those of adapters go onto the base, others into the run's result, or into the base as long as there is none.
    """
    found = [path for path in list_checkpoints(folder) if (path / "adt_checkpoint.json").is_file()]
    if not found:
        raise EvaluationError(f"--checkpoints: {folder} has no checkpoints of a training run.")
    result, candidates = read_training_facts(folder, args), []
    for checkpoint in found:
        facts = json.loads((checkpoint / "adt_checkpoint.json").read_text())
        iteration, base = facts["iteration"], facts["config"]["pretrained_model_name_or_path"]
        candidate = Candidate(f"{run}@{iteration}", base, run=run, iteration=iteration, options=facts["config"])
        if result is None:  # the run has not ended: by what the checkpoint says
            if "scheduler" not in facts["schedule"] and any(sampler == OWN for sampler, _ in args.sampler):
                raise EvaluationError(
                    f"--sampler {OWN}: {folder} has no result yet, with which the scheduler of its few steps is saved."
                )
            steps = facts["config"].get("num_inference_steps")
            candidate.inference = facts["schedule"] | {"num_inference_steps": steps}
        else:
            candidate.inference, candidate.method = result["inference"], result.get("method")
        averaged = [path for path in (checkpoint / "unet_ema", checkpoint / "transformer_ema") if path.is_dir()]
        trained = [path for path in (checkpoint / "unet", checkpoint / "transformer") if path.is_dir()]
        if trained:
            candidate.network = str((averaged or trained)[0])
            if (folder / "model_index.json").is_file():
                candidate.path = str(folder)
        else:
            candidate.lora = str((averaged or [checkpoint])[0])
        if candidate.path != str(folder):  # the sampler of the run, as soon as that has a result, and its VAE
            file = folder / "scheduler" / "scheduler_config.json"
            candidate.scheduler = str(file) if file.is_file() else None
            candidate.vae = candidate.options.get("pretrained_vae_model_name_or_path")
        candidates.append(candidate)
    return candidates


def text_to_image_pipelines() -> dict:
    """diffusers' own list of what `AutoPipelineForText2Image` makes, by name."""
    return {pipeline.__name__: pipeline for pipeline in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}


def load_index(path, args) -> dict:
    """The pipeline's `model_index.json`, refused unless it is a text-to-image pipeline's."""
    try:
        index = DiffusionPipeline.load_config(path, cache_dir=args.cache_dir)
    except OSError as error:
        raise EvaluationError(f"--pipelines: {path} is not a readable pipeline: {error}") from error
    pipelines, name = text_to_image_pipelines(), index["_class_name"]
    # Less those that take a picture, too.
    if name not in pipelines or "image" in inspect.signature(pipelines[name].__call__).parameters:
        raise EvaluationError(f"--pipelines: {path} is a {name}, which is not text-to-image.")
    return index


def sampling_options(candidate, args) -> dict:
    """How the pipeline is to be sampled, by the names in `SAMPLING` and `GUIDANCE`, less those that it has no use for.

    The command line's, else as the model was trained, else the pipeline's own default. It is what the training's
    `inference_options` and `unused_components` make of the same options.
    """
    index, options, sampling = load_index(candidate.path, args), candidate.options, {}
    call = inspect.signature(text_to_image_pipelines()[index["_class_name"]].__call__).parameters
    for name in ("guidance_rescale", "max_sequence_length"):
        if name in call:
            sampling[name] = options.get(name, call[name].default)
    if index.get("text_encoder_3", [None])[-1] == "T5EncoderModel":
        sampling["t5"] = not options.get("no_t5", False)
    if "crops_coords_top_left" in call:
        sampling["rollout_time_ids"] = options.get("rollout_time_ids", "inference")
    sampling |= {name: getattr(args, name) for name in sampling if getattr(args, name) is not None}
    return sampling | {name: options[name] for name in GUIDANCE if name in call and options.get(name) is not None}


def guided_call(pipeline, guidance_scale, options, count) -> dict:
    """What a pipeline is called with for `count` prompts, its guidance among it.

    With a pipeline such as Qwen-Image's, which has `true_cfg_scale` and whose network takes no guidance as an input,
    it is that one, and needs a negative prompt. It is off by default in FLUX.1's, and stays so for a network such as
    FLUX.1-schnell's, unless that was trained with it.
    """
    options, network = dict(options), pipeline.components.get("transformer")
    accepted = inspect.signature(pipeline.__call__).parameters
    by_true_scale = "true_cfg_scale" in accepted and not network.config.get("guidance_embeds", False)
    if by_true_scale and options.get("true_cfg_scale", accepted["true_cfg_scale"].default) > 1:
        options |= {"true_cfg_scale": guidance_scale, "negative_prompt": options.get("negative_prompt", "")}
    else:
        options["guidance_scale"] = guidance_scale
    if "negative_prompt" in options:  # some take as many as there are prompts
        options["negative_prompt"] = [options["negative_prompt"]] * count
    return options


def absent_components(candidate, index) -> dict:
    """What must be said to be absent: what is, a T5 that is not used, and a safety checker.

    The latter would blacken images at random.
    """
    absent = {key: None for key, value in index.items() if isinstance(value, list) and None in value}
    if not candidate.sampling.get("t5", True):
        absent |= {"text_encoder_3": None, "tokenizer_3": None}
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
    absent = absent_components(candidate, load_index(candidate.path, args))
    return Path(DiffusionPipeline.download(candidate.path, cache_dir=args.cache_dir, **absent))


def find_vae(candidate, args) -> Path:
    """The folder of the VAE that takes the place of the pipeline's, downloaded where need be.

    Raises:
        EvaluationError: where there is none. Of a VAE on the training's machine a published file tells the name alone.
    """
    try:
        files = [find_file(candidate.vae, name, args) for name in ("config.json", WEIGHTS[0])]
    except EvaluationError:
        files = [None]
    if None in files:
        raise EvaluationError(
            f"{candidate.name} belongs to the VAE {candidate.vae}, which cannot be found: name its folder with --vae "
            f"{candidate.run or candidate.name}=PATH."
        )
    return Path(files[0]).parent


def model_folders(candidate, args) -> dict:
    """{component: (class, folder)} of the pipeline's models, those that replace its own among them."""
    folder, index = find_folder(candidate, args), load_index(candidate.path, args)
    libraries, found = {"diffusers": diffusers, "transformers": transformers}, {}
    for name in index.keys() - absent_components(candidate, index).keys():
        if isinstance(index[name], list):
            library, kind = index[name]
            kind = getattr(libraries.get(library), kind, None)
            if isinstance(kind, type) and issubclass(kind, torch.nn.Module):
                found[name] = (kind, folder / name)
    if candidate.network is not None:
        role = "unet" if "unet" in found else "transformer"
        found[role] = (found[role][0], Path(candidate.network))
    if candidate.vae is not None:
        found["vae"] = (found["vae"][0], find_vae(candidate, args))
    return found


def outline_models(candidate, args) -> dict:
    """{component: model} without weights, whose files are opened to see that they are there and whole.

    Raises:
        EvaluationError: where a folder has none, or not all.
    """
    models = {}
    for name, (kind, folder) in model_folders(candidate, args).items():
        names = [file for file in WEIGHTS if (folder / file).is_file()]
        for shards in [folder / f"{file}.index.json" for file in WEIGHTS]:
            if shards.is_file():
                names += sorted(set(json.loads(shards.read_text())["weight_map"].values()))
        if not names:
            raise EvaluationError(f"{folder} has no weights, such as {WEIGHTS[0]}.")
        for file in names:
            if file.endswith(".safetensors"):
                with safe_open(folder / file, "pt"):
                    pass
            else:
                mapped = zipfile.is_zipfile(folder / file)  # else of an old format, which is read to its end
                torch.load(folder / file, map_location="meta", weights_only=True, mmap=mapped)
        with torch.device("meta"):
            if hasattr(kind, "load_config"):
                models[name] = kind.from_config(kind.load_config(folder))
            else:
                models[name] = kind(kind.config_class.from_pretrained(folder))
    return models


def load_pipeline(candidate, args, device):
    """The pipeline; on the device "meta" without its weights, which takes a moment, adapters and all.

    Raises:
        EvaluationError: where it cannot be loaded.
    """
    absent = absent_components(candidate, load_index(candidate.path, args))
    dtype = getattr(torch, args.dtype)
    try:
        if device == "meta":
            models = outline_models(candidate, args)
        else:  # only those that are not the pipeline's own
            replaced = {"vae": candidate.vae, "unet": candidate.network, "transformer": candidate.network}
            models = {
                name: kind.from_pretrained(folder, dtype=dtype)
                for name, (kind, folder) in model_folders(candidate, args).items()
                if replaced.get(name) is not None
            }
        pipeline = DiffusionPipeline.from_pretrained(find_folder(candidate, args), dtype=dtype, **absent, **models)
        if candidate.lora is not None:
            pipeline.load_lora_weights(candidate.lora, cache_dir=args.cache_dir)
    except Exception as error:  # diffusers, transformers, safetensors and peft have a dozen kinds
        adapters = f" with the adapters {candidate.lora}" if candidate.lora else ""
        raise EvaluationError(f"--pipelines: {candidate.path}{adapters} cannot be loaded: {error}") from error
    if candidate.scheduler is not None:
        config = json.loads(Path(candidate.scheduler).read_text())
        pipeline.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline if device == "meta" else pipeline.to(device)


def make_scheduler(sampler, base, timestep_spacing):
    """The named sampler with the base scheduler's schedule.

    Args:
        timestep_spacing: in place of the base scheduler's own, or where it states none, of the sampler's usual one.

    Raises:
        EvaluationError: where it does not suit the model.
    """
    if sampler == OWN:
        return base
    if isinstance(base, FlowMatchEulerDiscreteScheduler) or base.config.get("use_flow_sigmas", False):
        raise EvaluationError(f"--sampler {sampler} does not suit a flow-matching model: use own.")
    return configure_sampler(sampler, base.config, timestep_spacing)


def noise_levels(scheduler, steps, key, pipeline, args) -> list[float]:
    """The scheduler's "sigmas" or "timesteps", whichever `key` says, as the pipeline's call will set them."""
    scheduler, shift = type(scheduler).from_config(scheduler.config), {}
    if scheduler.config.get("use_dynamic_shifting", False):
        side = args.resolution // pipeline.vae_scale_factor // pipeline.transformer.config.patch_size
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        shift["mu"] = calculate_shift(side * side, *(scheduler.config[name] for name in names))
    scheduler.set_timesteps(steps, **shift)
    return [float(value) for value in getattr(scheduler, key)]


def level_warnings(candidate, scheduler, steps, pipeline, args) -> list[str]:
    """A sentence where the training's sampler, with its steps, has other noise levels now than training recorded."""
    inference = candidate.inference
    if (type(scheduler).__name__, steps) != (inference.get("scheduler"), inference.get("num_inference_steps")):
        return []
    for key in ("sigmas", "timesteps"):
        if key in inference:
            levels = noise_levels(scheduler, steps, key, pipeline, args)
            if len(levels) != len(inference[key]) or not np.allclose(levels, inference[key], rtol=1e-4, atol=1e-6):
                now, before = (", ".join(f"{value:.4g}" for value in both[:3]) for both in (levels, inference[key]))
                name = candidate.run or candidate.name
                return [
                    f"{name} is sampled by other {key} ({now}, ...) than it was trained with ({before}, ...) under "
                    f"the same sampler and {steps} steps."
                ]
    return []


def sampling_warnings(candidate, args) -> list[str]:
    """Where a pipeline cannot be sampled just as it was trained."""
    warnings, resolution = [], candidate.options.get("resolution", args.resolution)
    name = candidate.run or candidate.name
    if resolution != args.resolution:
        warnings.append(f"{name} was trained at {resolution} pixels a side, and draws {args.resolution} here.")
    if candidate.sampling.get("rollout_time_ids") == "image" and args.quality_prompts:
        warnings.append(
            f"{name} is sampled under the real images' sizes and crops; the quality prompts have no images, "
            "so that it draws those under the pipeline's own."
        )
    return warnings


def check_candidate(candidate, args) -> dict:
    """Makes the pipeline without its weights, and every sampler, to find what does not work before an image is made.

    Returns what its images depend on: "weights" stands for its files of weights, by size and time (adapters on the Hub
    aside), "samplers" has each one's configuration, and "vae", with `--vae_floor`, is `vae_digest`'s; and "warnings".

    Raises:
        EvaluationError: where it cannot be loaded, or a sampler does not suit it.
    """
    pipeline = load_pipeline(candidate, args, "meta")
    if args.resolution is None:
        args.resolution = candidate.options.get("resolution") or default_resolution(pipeline, candidate)
    if args.resolution % pipeline.vae_scale_factor:
        raise EvaluationError(f"--resolution {args.resolution} is not a multiple of {pipeline.vae_scale_factor}.")
    samplers, warnings = {}, sampling_warnings(candidate, args)
    for sampler, steps in args.sampler:
        scheduler = make_scheduler(sampler, pipeline.scheduler, args.timestep_spacing)
        most = STUDENT_STEPS.get(candidate.method, steps) if sampler == OWN else steps
        if isinstance(scheduler, LCMScheduler):
            most = scheduler.config.original_inference_steps
        if steps > most:
            raise EvaluationError(f"--sampler {sampler}:{steps}: {candidate.name} was distilled into {most} steps.")
        warnings += level_warnings(candidate, scheduler, steps, pipeline, args)
        config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        samplers[sampler] = {"class": type(scheduler).__name__, **json.loads(json.dumps(config, default=str))}
    models = model_folders(candidate, args)
    folders = [folder for _, folder in models.values()] + ([Path(candidate.lora)] if candidate.lora else [])
    files = sorted(file for folder in folders for file in (*folder.glob("*.safetensors"), *folder.glob("*.bin")))
    facts = [(file.parent.name, file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    weights = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    vae = None
    if args.vae_floor:
        kind, folder = models["vae"]
        vae = vae_digest(kind.from_pretrained(folder, dtype=getattr(torch, args.dtype)))
    return {"samplers": samplers, "weights": weights, "vae": vae, "warnings": warnings}


def spacing_warnings(facts) -> list[str]:
    """A sentence on each named sampler whose timesteps are spaced differently in the pipelines.

    Args:
        facts: {pipeline: `check_candidate`'s}.
    """
    warnings = []
    for sampler in dict.fromkeys(name for own in facts.values() for name in own["samplers"] if name != OWN):
        spacings = {name: own["samplers"][sampler]["timestep_spacing"] for name, own in facts.items()}
        if len(set(spacings.values())) > 1:
            described = ", ".join(f"{name} {spacing}" for name, spacing in spacings.items())
            warnings.append(
                f"{sampler} spaces its timesteps as each pipeline's scheduler states ({described}): "
                "--timestep_spacing gives all the same."
            )
    return warnings


def vae_digest(vae) -> str:
    """Sixteen hexadecimal digits for its weights. What scales latents is left out, as it cancels in `reconstruct`."""
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.float().numpy().tobytes())  # `reconstruct` takes them so, too
    return digest.hexdigest()[:16]


def default_resolution(pipeline, candidate) -> int:
    """What the pipeline draws when nothing is said."""
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    size = getattr(getattr(network, "config", None), "sample_size", None)
    if not isinstance(size, int):
        raise EvaluationError(f"{candidate.path} does not say what size it draws: name --resolution.")
    return size * pipeline.vae_scale_factor

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
"""What a run writes: checkpoints, validation images, the result with its model card, and its upload.

The sections can be read alone:

- checkpoints: `save_checkpoint`, `find_checkpoint`, `register_checkpoint_hooks`, `load_checkpoint`;
- validation: `Validation`;
- the result: `create_output`, `save_result`, `write_model_card`.
"""

import json
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import accelerate
import diffusers
import numpy as np
import torch
import transformers
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import AutoencoderKL
from diffusers.utils import make_image_grid
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from adversary_utils import DriftGuard, norm_group
from data_utils import make_generator
from training_utils import (
    ADTError,
    Method,
    Nature,
    averaged_weights,
    check_latents,
    global_batch_size,
    hub_options,
    trainable_parameters,
)


logger = get_logger(__name__)
GOOD = "validated"  # a file in a checkpoint whose validation images had not drifted
ADAPTERS = "pytorch_lora_weights.safetensors"  # what `load_lora_weights` looks for
KOHYA_ADAPTERS = "pytorch_lora_weights_kohya.safetensors"  # as diffusers' examples call it


# Checkpoints


def checkpoint_config(args, accelerator) -> dict:
    """What a checkpoint must agree with when a run is resumed."""
    natures = [Nature.FREE, Nature.NO_EFFECT, Nature.COUNTED, Nature.SECRET]
    natures += [Nature.FINE_TUNING if args.adversarial else Nature.ADVERSARIAL]
    natures += [] if args.use_lora else [Nature.LORA]
    ignored = args.of_nature(*natures)
    config = {name: value for name, value in vars(args).items() if name not in ignored}
    config["global_batch_size"] = global_batch_size(args, accelerator)
    if args.adversarial:
        config["discriminator_norm_group"] = norm_group(args)
    config["mixed_precision"] = accelerator.mixed_precision
    if args.lr_scheduler not in ("constant", "constant_with_warmup"):
        config["max_train_steps"] = args.max_train_steps  # what the learning rate decays over
    return config


def checkpoint_iteration(path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def list_checkpoints(output_dir) -> list[Path]:
    """The checkpoints in `output_dir`, by their iteration."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=checkpoint_iteration)


def save_checkpoint(iteration, args, accelerator):
    """Writes `checkpoint-N` aside and renames it, so that it appears whole or not at all; on every process."""
    final = Path(args.output_dir, f"checkpoint-{iteration}")
    partial = Path(args.output_dir, f".{final.name}-partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = {str(file.relative_to(partial)): file.stat().st_size for file in partial.rglob("*") if file.is_file()}
        manifest = {"iteration": iteration, "config": checkpoint_config(args, accelerator), "files": files}
        (partial / "adt_checkpoint.json").write_text(json.dumps(manifest, indent=2))
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        if args.checkpoints_total_limit is not None:
            # First those past this one, which a run left that was taken up again before them, then the oldest.
            kept = (final, last_good_checkpoint(args.output_dir))
            others = [path for path in list_checkpoints(args.output_dir) if path not in kept]
            others.sort(key=lambda path: checkpoint_iteration(path) < iteration)
            for old in others[: max(0, len(others) + 1 - args.checkpoints_total_limit)]:
                shutil.rmtree(old)
        logger.info(f"Saved {final}")
    accelerator.wait_for_everyone()


def last_good_checkpoint(directory) -> Path | None:
    """The newest that a validation found good, which `--checkpoints_total_limit` spares."""
    good = [path for path in list_checkpoints(directory) if (path / GOOD).is_file()]
    return good[-1] if good else None


def locate_checkpoint(args) -> Path | None:
    """The folder that `--resume_from_checkpoint` means; None where there is nothing to resume from."""
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint == "latest":
        existing = list_checkpoints(args.output_dir)
        if not existing:
            logger.info(f"No checkpoint in {args.output_dir}: starting from the base pipeline.")
        return existing[-1] if existing else None
    for path in (Path(args.resume_from_checkpoint), Path(args.output_dir, args.resume_from_checkpoint)):
        if path.is_dir():
            return path
    raise ADTError(f"--resume_from_checkpoint {args.resume_from_checkpoint} does not exist.")


def read_manifest(path, hint) -> dict:
    """What `save_checkpoint` wrote beside the state. Raises `ADTError` unless everything that it names is there."""
    file = path / "adt_checkpoint.json"
    if not file.is_file():
        raise ADTError(f"{path} is not a checkpoint of this script: it has no adt_checkpoint.json.{hint}")
    try:
        manifest = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ADTError(f"{file} is truncated.{hint}") from error
    for name, size in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise ADTError(f"The checkpoint {path} is truncated: {name} is missing or incomplete.{hint}")
    return manifest


def find_checkpoint(args, accelerator) -> tuple[Path | None, int]:
    """The checkpoint to resume from and its iteration; `(None, 0)` where there is nothing to resume from.

    Raises:
        ADTError: if the checkpoint is missing, truncated, or of another configuration.
    """
    path = locate_checkpoint(args)
    if path is None:
        return None, 0
    older = [other for other in list_checkpoints(args.output_dir) if other != path]
    manifest = read_manifest(path, f" Try --resume_from_checkpoint {older[-1].name}." if older else "")
    before, now = manifest["config"], checkpoint_config(args, accelerator)
    different = [
        f"{name} {before.get(name)} (now {now.get(name)})"
        for name in sorted(now.keys() | before.keys())
        if before.get(name) != now.get(name)
    ]
    if different:
        raise ADTError(f"The checkpoint {path} was made with another configuration: {', '.join(different)}.")
    if manifest["iteration"] > args.max_train_steps:
        raise ADTError(f"The checkpoint {path} is at iteration {manifest['iteration']}, past --max_train_steps.")
    return path, manifest["iteration"]


def save_adapters(network, family, directory):
    """The adapters as `pytorch_lora_weights.safetensors`, which `load_lora_weights` takes."""
    family.pipeline_class.save_lora_weights(
        directory,
        **{
            f"{family.network_name}_lora_layers": get_peft_model_state_dict(network),
            f"{family.network_name}_lora_adapter_metadata": network.peft_config["default"].to_dict(),
        },
    )


def load_adapters(network, family, directory):
    saved = load_file(os.path.join(directory, ADAPTERS))
    saved = {name.removeprefix(f"{family.network_name}."): value for name, value in saved.items()}
    result = set_peft_model_state_dict(network, saved)
    if result.unexpected_keys or len(saved) != len(trainable_parameters(network)):
        raise ADTError(f"The adapters in {directory} are not those of this configuration.")


def register_checkpoint_hooks(generator, run):
    """Has accelerate save and load the networks as safetensors, in the layout that pipelines load.

    A checkpoint then has, of these hooks, the network's folder (or its adapters' file), the same in `*_ema` with
    `ema.json`, and `discriminator.safetensors`; of accelerate, `optimizer.bin` and `custom_checkpoint_0.pkl` (the
    generator's optimizer and schedule), `optimizer_1.bin` and `custom_checkpoint_1.pkl` (the discriminator's) and each
    process's `random_states_*.pkl`; and of `save_checkpoint`, `adt_checkpoint.json`.
    """
    # The hooks live as long as the accelerator: they must not hold what data parallelism wraps, see `end_run`.
    network, ema = generator.network, generator.ema
    family, args, accelerator = run.family, run.args, run.accelerator

    def folder(directory):  # where `load_lora_weights` or `from_pretrained` looks
        return Path(directory) if args.use_lora else Path(directory, family.network_name)

    def averaged_folder(directory):
        return Path(directory, f"{family.network_name}_ema")

    def save_network(directory):
        save_adapters(network, family, directory) if args.use_lora else network.save_pretrained(directory)

    def load_network(directory):
        if args.use_lora:
            load_adapters(network, family, directory)
        else:
            network.load_state_dict(family.network_class.from_pretrained(directory).state_dict())

    def save_model_hook(models, weights, output_dir):
        weights.clear()  # what is left here, accelerate would save
        if not accelerator.is_main_process:
            return
        for model in map(accelerator.unwrap_model, models):
            if model is network:
                save_network(folder(output_dir))
            else:
                save_file(model.state_dict(), Path(output_dir, "discriminator.safetensors"))
        if ema is not None:
            with averaged_weights(network, ema):
                save_network(averaged_folder(output_dir))
            state = {name: value for name, value in ema.state_dict().items() if name != "shadow_params"}
            (averaged_folder(output_dir) / "ema.json").write_text(json.dumps(state))

    def load_model_hook(models, input_dir):
        if ema is not None:
            # Into the network first, whose own weights come next.
            load_network(averaged_folder(input_dir))
            state = json.loads((averaged_folder(input_dir) / "ema.json").read_text())
            weights = [parameter.detach().clone() for parameter in trainable_parameters(network)]
            ema.load_state_dict(state | {"shadow_params": weights})
            ema.to("cpu" if args.offload_ema else accelerator.device)
        for model in map(accelerator.unwrap_model, models):
            if model is network:
                load_network(folder(input_dir))
            else:
                model.load_state_dict(load_file(Path(input_dir, "discriminator.safetensors")))
        models.clear()  # what is left here, accelerate would load

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)


def load_checkpoint(run):
    """Continues from the run's checkpoint, where it has one: networks, optimizers, schedules, average."""
    if run.checkpoint is not None:
        run.accelerator.load_state(str(run.checkpoint))
        logger.info(f"Resuming from {run.checkpoint}")


# Validation


class Validation:
    """Images of the validation prompts, by the training sampler and guidance, from the same noise each time.

    The base pipeline's are drawn when this is made, which must be before a checkpoint is loaded: there is no second
    copy of the base's weights. Without validation prompts it does nothing.

    Args:
        conditions: each prompt's embeddings, dicts of (1, ...).

    Attributes:
        grids: the last images, one PIL image for each prompt, on the main process.
        drifted: whether the run is to end, because what it draws has drifted.
    """

    def __init__(self, generator, adversary, models, conditions, run):
        self.generator, self.models, self.conditions, self.run = generator, models, conditions, run
        self.base_images = self.draw()
        self.grids, self.drifted, self.guard = [], False, None
        if adversary is not None and len(conditions) > 1:
            prompts = run.args.validation_prompts
            self.guard = DriftGuard(adversary.feature_network, prompts, self.base_images, run.args)
        if run.accelerator.is_main_process:
            for path in list_checkpoints(run.args.output_dir):
                if checkpoint_iteration(path) > run.first_iteration:  # an earlier run's, or of one taken up before it
                    (path / GOOD).unlink(missing_ok=True)

    def is_due(self, done) -> bool:
        """After `done` iterations; the last validation belongs to the run's end."""
        args = self.run.args
        return bool(self.conditions) and done % args.validation_steps == 0 and done < args.max_train_steps

    def log(self, done):
        """Draws, logs a grid for each prompt, and looks for drift; with `--stop_on_drift` that decides on the run."""
        if not self.conditions:
            return
        args, accelerator = self.run.args, self.run.accelerator
        drifted = self.draw_and_check(done)
        if not args.stop_on_drift:
            return
        self.drifted = broadcast_object_list([drifted])[0]
        if not self.drifted:
            if done % args.checkpointing_steps != 0:  # else there is one already
                save_checkpoint(done, args, accelerator)
            if accelerator.is_main_process:
                Path(args.output_dir, f"checkpoint-{done}", GOOD).touch()

    def draw_and_check(self, done) -> bool:
        """Draws with the averaged weights, where there are any. Returns, on the main process, if there is drift."""
        with self.generator.averaged():
            tuned_images = self.draw()
        if not self.run.accelerator.is_main_process:
            return False
        self.grids = log_validation(self.base_images, tuned_images, done, self.run)
        if self.guard is None:
            return False
        kept, drifted = self.guard.check(tuned_images)
        self.run.accelerator.log(kept, step=done)
        return drifted

    def finish(self):
        """The run's last validation. Returns the run, cut off at the last good checkpoint where images have drifted.

        Checkpoints after that one are removed, so that a resumed run starts from it.

        Raises:
            ADTError: where no checkpoint is good.
        """
        args, accelerator = self.run.args, self.run.accelerator
        if not self.drifted:
            self.log(args.max_train_steps)
        if not self.drifted:
            return self.run
        good = last_good_checkpoint(args.output_dir)
        if good is None:
            raise ADTError(
                "The validation images drifted, as the warning says, and no earlier validation was good: nothing is "
                "saved but the checkpoints."
            )
        logger.warning(f"The run ends with {good}, the last before its validation images drifted.")
        accelerator.load_state(str(good))
        done = checkpoint_iteration(good)
        if accelerator.is_main_process:
            for path in list_checkpoints(args.output_dir):
                if checkpoint_iteration(path) > done:
                    shutil.rmtree(path)
        self.run = replace(self.run, args=args.replace(max_train_steps=done))
        self.draw_and_check(done)
        return self.run

    @torch.no_grad()
    def draw(self) -> list[list[Image.Image]]:
        """A list of images for each prompt, on every process; the prompts are shared out, so that none waits long."""
        if not self.conditions:
            return []
        accelerator, network, sampler = self.run.accelerator, self.generator.network, self.models.sampler
        family = self.run.family
        pipeline = family.pipeline_class(
            vae=self.models.vae,
            scheduler=type(sampler).from_config(sampler.config),
            **{family.network_name: network},
            **family.without_text_encoders,
        )
        pipeline.set_progress_bar_config(disable=True)
        training = network.training
        network.eval()
        own = range(accelerator.process_index, len(self.conditions), accelerator.num_processes)
        images = [(n, self.draw_prompt(n, pipeline)) for n in own]
        network.train(training)
        return [result for _, result in sorted(gather_object(images), key=lambda item: item[0])]

    def draw_prompt(self, n, pipeline) -> list[Image.Image]:
        args, vae = self.run.args, self.models.vae
        side = args.resolution // pipeline.vae_scale_factor
        negative = {f"negative_{name}": value for name, value in self.models.prompt_encoder.negative.items()}
        # In float32, since a pipeline may give the latents the embeddings' precision.
        embeddings = {name: value.float() for name, value in (self.conditions[n] | negative).items()}
        images = []
        for j in range(args.num_validation_images):
            generator = make_generator(args.seed, "validation", n, j)
            noise = torch.randn((1, vae.config.latent_channels, side, side), generator=generator)
            # A sampler that adds noise draws it from here in the pipelines that hand it no generator, such as SD3's.
            torch.manual_seed(generator.initial_seed())
            latents = pipeline(
                **embeddings,
                latents=noise.to(self.run.accelerator.device),
                generator=generator,  # of a sampler that adds noise
                height=args.resolution,
                width=args.resolution,
                output_type="latent",
                **self.run.family.inference_options(args),
            ).images
            check_latents(latents, "in validation")
            images += pipeline.image_processor.postprocess(self.run.family.decode_latents(vae, latents.float()))
        return images


def log_validation(base_images, tuned_images, done, run) -> list[Image.Image]:
    """Writes a grid for each prompt, base images above tuned ones, and sends it to the trackers. Returns the grids."""
    directory = Path(run.args.output_dir, "validation")
    directory.mkdir(parents=True, exist_ok=True)
    grids = []
    for n, (base, tuned) in enumerate(zip(base_images, tuned_images, strict=True)):
        grid = make_image_grid(base + tuned, rows=2, cols=len(base))
        grid.save(directory / f"iteration-{done:06d}-prompt-{n}.png")
        grids.append(grid)
    for tracker in run.accelerator.trackers:
        if tracker.name == "tensorboard":
            stacked = np.stack([np.asarray(grid) for grid in grids])
            tracker.writer.add_images("validation", stacked, done, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"validation": grids}, step=done)
    return grids


# The result


# The library's `load_or_create_model_card` would keep an old card that the folder has, and its template has sentences
# that somebody is to complete.
MODEL_CARD = """---
{{ card_data }}
---

# {{ name }}

Tuned from `{{ base }}` by {{ kind }}.

## Usage

```python
import torch
from diffusers import {{ imports }}

{{ loading }}
pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
image = pipeline({{ prompt }}{% for key, value in call.items() %}, {{ key }}={{ value }}{% endfor %}).images[0]
image.save("image.png")
```

{{ sampling }}

{% if image_prompts %}## Before and after

Base images above, tuned ones below, same seeds.

{% for text in image_prompts %}**{{ text or "(empty prompt)" }}**

![{{ loop.index0 }}](images/prompt-{{ loop.index0 }}.png)

{% endfor %}{% endif %}## Training

{{ facts.iterations }} iterations of {{ facts.global_batch_size }} images, {{ facts.num_processes }} processes, mixed
precision {{ facts.mixed_precision }}, {{ facts.generator_updates }} updates of the diffusion model. The licence of the
base model applies. The same facts are in `adt_config.json`.

| option | value |
|---|---|
{% for key, value in options.items() %}| `{{ key }}` | {{ value }} |
{% endfor %}"""
PLAIN = Method(
    name="fine-tuning",
    kind="plain fine-tuning with the diffusion loss",
    sampling="The saved scheduler and the call above ({described}) are a choice: training has not sampled.",
)
FUSED = " The adapters are in the weights already: do not load the file with them on top."
KOHYA = f"\n`{KOHYA_ADAPTERS}` has the same adapters for ComfyUI and tools that read kohya's files."


def adt_or_plain(args) -> Method:
    """What the options of a family's script ask for."""
    if not args.adversarial:
        return PLAIN
    return Method(
        name="adversarial diffusion tuning",
        kind="Adversarial Diffusion Tuning: the sampler below was run with guidance during training, and a "
        f"{args.discriminator_type} discriminator on DINOv2 features told its images from the real ones",
        sampling="The saved scheduler is the one it was trained with, and the call above samples as in training "
        "({described}). Other samplers work, but training has not seen them.",
    )


def create_output(args, accelerator) -> str | None:
    """Makes the output folder, and the Hub's repository where it is asked for, whose id it returns.

    Raises:
        ADTError: where the Hub cannot be reached, refuses the token or has no such place.
    """
    if not accelerator.is_main_process:
        return None
    repo_id = None
    if args.push_to_hub:
        name = args.hub_model_id or Path(args.output_dir).name
        try:
            repo_id = create_repo(repo_id=name, exist_ok=True, token=args.hub_token).repo_id
        except Exception as error:  # of the Hub's, of its library or of the network's
            raise ADTError(f"--push_to_hub: {name} cannot be made on the Hub: {one_line(error)}") from error
    os.makedirs(args.output_dir, exist_ok=True)
    return repo_id


def save_result(generator, models, grids, run):
    """Writes the pipeline or the adapters, the scheduler, the card and its images, and uploads them when asked.

    Raises:
        ADTError: where the upload fails, once all is written.
    """
    args, family = run.args, run.family
    sampler = type(models.sampler).from_config(models.sampler.config)
    written = ["README.md", "adt_config.json"]  # what an upload takes, and nothing else that the folder may hold
    with generator.averaged():
        if args.use_lora:
            save_adapters(generator.network, family, args.output_dir)
            sampler.save_pretrained(os.path.join(args.output_dir, "scheduler"))
            written += [ADAPTERS, "scheduler/*"]
            if args.output_kohya_format:
                save_kohya_adapters(generator.network, family, args)
                written.append(KOHYA_ADAPTERS)
        if not args.use_lora or args.fuse_lora:
            written += save_pipeline(generator.network, sampler, run)
    for n, grid in enumerate(grids):
        file = Path(args.output_dir, "images", f"prompt-{n}.png")
        file.parent.mkdir(exist_ok=True)
        grid.save(file)
        written.append(f"images/{file.name}")
    write_model_card(sampler, bool(grids), run)
    logger.info(f"Saved the result in {args.output_dir}")
    if args.push_to_hub:
        upload_result(written, run)


def upload_result(patterns, run):
    """Uploads the files of the output folder that match. Raises `ADTError`, with what to do, where that fails."""
    directory = run.args.output_dir
    try:
        upload_folder(
            repo_id=run.repo_id,
            folder_path=directory,
            commit_message="End of training",
            allow_patterns=patterns,
            token=run.args.hub_token,
        )
    except Exception as error:  # whatever it is, the result is there
        included = [word for pattern in patterns for word in ("--include", pattern)]
        command = shlex.join(["hf", "upload", run.repo_id, directory, ".", *included])
        raise ADTError(
            f"The result is saved in {directory}, but it could not be uploaded; to do so later: {command} "
            f"({one_line(error)})"
        ) from error


def one_line(error) -> str:
    line = " ".join(f"{type(error).__name__}: {error}".split())
    if type(error) is RuntimeError and error.__cause__ is not None:  # huggingface_hub's, which names the file alone
        line += f" {one_line(error.__cause__)}"
    return line


def unet_adapters_to_kohya(adapters) -> dict:
    """A UNet's adapters by kohya's names, {`lora_unet_MODULE.lora_down.weight`, `….lora_up.weight`}."""
    named = convert_state_dict_to_kohya({f"unet.{name}": value for name, value in adapters.items()})
    return {name: value for name, value in named.items() if not name.endswith(".alpha")}  # which are the ranks


def save_kohya_adapters(network, family, args):
    """The adapters as ComfyUI and kohya's scripts name them, each with its alpha.

    Such tools scale `up @ down` by alpha over the rank, and by 1 where there is no alpha.
    """
    adapters = family.kohya_adapters(get_peft_model_state_dict(network))
    ranks = {name: len(value) for name, value in adapters.items() if name.endswith(".lora_down.weight")}
    for name, rank in ranks.items():
        adapters[name.replace(".lora_down.weight", ".alpha")] = torch.tensor(rank * args.lora_alpha / args.rank)
    save_file(adapters, Path(args.output_dir, KOHYA_ADAPTERS), metadata={"format": "pt"})


def save_pipeline(network, sampler, run) -> list[str]:
    """The whole pipeline, adapters fused. Returns the patterns of what it wrote."""
    args, family = run.args, run.family
    components = {"scheduler": sampler} | family.absent_components(args)
    if not args.use_lora:
        components[family.network_name] = network
    if args.pretrained_vae_model_name_or_path is not None:
        vae_path = args.pretrained_vae_model_name_or_path
        components["vae"] = AutoencoderKL.from_pretrained(vae_path, cache_dir=args.cache_dir)
    pipeline = family.pipeline_class.from_pretrained(
        args.pretrained_model_name_or_path, **components, **hub_options(args)
    )
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module) and name not in family.half_precision_components:
            component.float()  # a variant's half-precision parts do not work together with what was trained
    if args.use_lora:
        pipeline.load_lora_weights(args.output_dir, weight_name=ADAPTERS)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    pipeline.save_pretrained(args.output_dir)
    return ["model_index.json", *(f"{name}/*" for name in pipeline.components)]


def pipeline_loading(sampler, run) -> tuple[str, str]:
    """The model card's lines that load the result as `pipeline`, and the names that they import from diffusers."""
    args = run.args
    options = args.public() if args.push_to_hub else vars(args)
    location = json.dumps(run.repo_id or args.output_dir)
    arguments = "".join(f", {name}=None" for name in run.family.unused_components(args))
    if not args.use_lora or args.fuse_lora:
        return f"pipeline = DiffusionPipeline.from_pretrained({location}{arguments})", "DiffusionPipeline"
    sampler_name = type(sampler).__name__
    imports, lines = ["DiffusionPipeline", sampler_name], []
    # Said outright, since a base in half precision may load in several precisions.
    dtype = ", dtype=torch." + ("bfloat16" if run.accelerator.mixed_precision == "bf16" else "float32")
    arguments += dtype
    for name in ("revision", "variant"):
        if options[name] is not None:
            arguments += f", {name}={json.dumps(options[name])}"
    vae_path = options["pretrained_vae_model_name_or_path"]
    if vae_path is not None:
        imports.append("AutoencoderKL")
        lines.append(f"vae = AutoencoderKL.from_pretrained({json.dumps(vae_path)}{dtype})")
        arguments += ", vae=vae"
    base = json.dumps(options["pretrained_model_name_or_path"])
    lines.append(f"pipeline = DiffusionPipeline.from_pretrained({base}{arguments})")
    lines.append(f'pipeline.scheduler = {sampler_name}.from_pretrained({location}, subfolder="scheduler")')
    lines.append(f"pipeline.load_lora_weights({location})")
    return "\n".join(lines), ", ".join(sorted(imports))


def training_facts(sampler, call, run) -> dict:
    """What `adt_config.json` says of the run, for programs."""
    args, accelerator = run.args, run.accelerator
    sampler_facts = {name: sampler.config[name] for name in run.family.sampler_facts if name in sampler.config}
    return {
        "base_model": args.public()["pretrained_model_name_or_path"],
        "method": run.method.name,
        "iterations": args.max_train_steps,
        "generator_updates": run.num_generator_updates,
        "global_batch_size": run.global_batch_size,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "inference": {"scheduler": type(sampler).__name__, **sampler_facts, **call},
        "training_options": args.public(),
        "versions": {module.__name__: module.__version__ for module in (accelerate, diffusers, torch, transformers)},
    }


def write_model_card(sampler, has_images, run):
    """Writes README.md and adt_config.json into the output folder, always anew."""
    args, family = run.args, run.family
    call = family.inference_options(args)
    if args.resolution != run.default_size:
        call |= {"height": args.resolution, "width": args.resolution}
    facts = training_facts(sampler, call, run)
    Path(args.output_dir, "adt_config.json").write_text(json.dumps(facts, indent=2) + "\n")

    described = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts["inference"].items())
    loading, imports = pipeline_loading(sampler, run)
    data = ModelCardData(
        library_name="diffusers",
        base_model=None if os.path.isdir(args.pretrained_model_name_or_path) else facts["base_model"],
        pipeline_tag="text-to-image",
        inference=True,
        tags=[*family.card_tags, *["lora"] * args.use_lora],
    )
    card = ModelCard.from_template(
        data,
        template_str=MODEL_CARD,
        name=Path(args.output_dir).resolve().name,
        base=facts["base_model"],
        kind=run.method.kind,
        loading=loading,
        imports=imports,
        prompt=json.dumps(args.validation_prompts[0] if args.validation_prompts else "a lighthouse at dusk"),
        call=call,
        sampling=run.method.sampling.format(described=described)
        + FUSED * args.fuse_lora
        + KOHYA * args.output_kohya_format
        + family.inference_note(args),
        image_prompts=args.validation_prompts if has_images else [],
        facts=facts,
        options={name: str(value).replace("|", "\\|") for name, value in sorted(facts["training_options"].items())},
    )
    card.save(Path(args.output_dir, "README.md"))

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

- what a run is recognised by: `identify_run`, `check_identity`;
- checkpoints: `save_checkpoint`, `find_checkpoint`, `register_checkpoint_hooks`, `load_checkpoint`;
- stopping before the end: `Interruption`;
- validation: `Validation`;
- the result: `create_output`, `finish_run`, `save_result`, `write_model_card`.
"""

import json
import os
import shlex
import shutil
import signal
import time
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
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from huggingface_hub import ModelCard, ModelCardData, auth_check, create_repo, upload_folder
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from adversary_utils import DriftGuard, norm_group
from bucket_utils import describe_sizes, drawn_sizes, make_padded_grid
from config_utils import CONFIG, write_config
from data_utils import digest_of, identify_data, make_generator
from disk_utils import (
    check_disk,
    checkpoint_iteration,
    free_gb,
    list_checkpoints,
    what_is_left,
    write_or_end,
    write_together,
    writing_error,
)
from option_utils import Nature
from sharding_utils import load_whole, own_parts, whole_network
from training_utils import (
    ADTError,
    Method,
    averaged_weights,
    check_latents,
    global_batch_size,
    hub_options,
    trainable_parameters,
)


logger = get_logger(__name__)
VALIDATION_IMAGES = "The validation images"  # in messages
GOOD = "validated"  # a file in a checkpoint whose validation images had not drifted
ADAPTERS = "pytorch_lora_weights.safetensors"  # what `load_lora_weights` looks for
KOHYA_ADAPTERS = "pytorch_lora_weights_kohya.safetensors"  # as diffusers' examples call it


# What a run is recognised by


# The share of the data's parts that may have images of other sizes, as those that were mended have.
MOST_MENDED = 0.25


def checkpoint_config(args, accelerator) -> dict:
    """The options that a run's checkpoints are made with, places of data and models included."""
    natures = [Nature.FREE, Nature.NO_EFFECT, Nature.COUNTED, Nature.SECRET]
    natures += [Nature.FINE_TUNING if args.adversarial else Nature.ADVERSARIAL]
    natures += [] if args.use_lora else [Nature.LORA]
    natures += [] if args.streaming else [Nature.STREAMING]
    natures += [] if args.use_aspect_ratio_buckets else [Nature.BUCKETS]
    ignored = args.of_nature(*natures)
    config = {name: value for name, value in vars(args).items() if name not in ignored}
    config["global_batch_size"] = global_batch_size(args, accelerator)
    if args.adversarial:
        config["discriminator_norm_group"] = norm_group(args)
    config["mixed_precision"] = accelerator.mixed_precision
    if args.lr_scheduler not in ("constant", "constant_with_warmup"):
        config["max_train_steps"] = args.max_train_steps  # what the learning rate decays over
    return config


def identify_run(args, schedule, dataset, accelerator) -> dict:
    """What a checkpoint says of its run, and a resumed run must agree with; from the main process, on every process.

    Args:
        schedule: where the method's path or noise levels come from a scheduler, see `sampler_schedule`.

    Returns:
        `config`, see `checkpoint_config`; `models`, {option: what the model is}; `data`, see `identify_data`;
        `schedule`.
    """
    identity = None
    if accelerator.is_main_process:
        config = checkpoint_config(args, accelerator)
        models = {
            name: identify_model(value)
            for name, value in config.items()
            if name.endswith("model_name_or_path") and value is not None
        }
        data = {"stream": dataset.identify()} if args.streaming else identify_data(dataset, args)
        identity = {"config": config, "models": models, "data": data, "schedule": schedule}
    return broadcast_object_list([identity])[0]


def sampler_schedule(sampler) -> dict:
    """What a sampler's noise levels are after `set_timesteps`, and by which class.

    Returns:
        {"scheduler": class's name, "timesteps": list}; with flow matching "sigmas" in place of these, the last one 0.
    """
    if "shift" in sampler.config or sampler.config.get("use_flow_sigmas", False):
        levels = {"sigmas": sampler.sigmas.tolist()}
    else:
        levels = {"timesteps": sampler.timesteps.tolist()}
    return {"scheduler": type(sampler).__name__} | levels


def identify_model(path) -> str:
    """A model on the Hub is its name; one in a folder is its files, wherever that is.

    The text of configurations counts, and of other files the name, the size and a few bytes from all over them: tuned
    weights have the size of the base's.
    """
    if not os.path.isdir(path):
        return path
    folders = [Path(path)]
    if (folders[0] / "model_index.json").is_file():  # a pipeline: what else is in there may change
        index = json.loads((folders[0] / "model_index.json").read_text())
        folders = [folders[0] / name for name in sorted(index) if (folders[0] / name).is_dir()]
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
    return f"a folder with the content {digest_of(map(describe_file, files))}"


def describe_file(file) -> list:
    """Its name, and its text or a sample of its bytes."""
    name, size = f"{file.parent.name}/{file.name}", file.stat().st_size
    if file.suffix in (".json", ".txt"):
        return [name, file.read_bytes()]
    with file.open("rb") as opened:
        blocks = []
        for n in range(16):
            opened.seek(max(0, size - 4096) * n // 15)
            blocks.append(opened.read(4096))
    return [name, size, blocks]


def check_identity(path, before, now, args):
    """Refuses a checkpoint of another run. Data and models in other places are the same if their content is.

    Args:
        before, now: as `identify_run` makes them; `before` is the checkpoint's.

    Raises:
        ADTError: naming what is different.
    """
    if not now.keys() <= before.keys():
        raise ADTError(
            f"The checkpoint {path} is an older version's, which did not record by what its data and models are "
            "recognised: it cannot be resumed."
        )
    places = args.of_nature(Nature.BY_CONTENT)
    different = [
        f"{name} {before['config'].get(name)} (now {now['config'].get(name)})"
        for name in sorted((now["config"].keys() | before["config"].keys()) - places)
        if before["config"].get(name) != now["config"].get(name)
    ]
    different += [
        f"{name} {before['models'].get(name)} (now {now['models'].get(name)})"
        for name in sorted(now["models"].keys() | before["models"].keys())
        if before["models"].get(name) != now["models"].get(name)
    ]
    if different:
        raise ADTError(f"The checkpoint {path} was made with another configuration: {', '.join(different)}.")
    of_data, data = before["data"], now["data"]
    if args.streaming and of_data != data:
        raise ADTError(f"The checkpoint {path} was made with the stream {of_data['stream']} (now {data['stream']}).")
    if of_data != data:
        others = sum(old != new for old, new in zip(of_data["sizes"], data["sizes"]))
        if {**of_data, "sizes": 0} == {**data, "sizes": 0} and others <= MOST_MENDED * len(data["sizes"]):
            logger.warning(f"{others} of {len(data['sizes'])} parts of the data have images of other sizes now.")
        else:
            what = f"{of_data['images']} images (now {data['images']})"
            if of_data["images"] == data["images"]:
                names = [name for name in ("captions", "names", "sizes") if of_data[name] != data[name]]
                what = "other captions" if names == ["captions"] else "image files of other names or sizes"
            raise ADTError(f"The checkpoint {path} was made with other data: {what}.")
    for name in ("sigmas", "timesteps"):
        old, new = (np.array(found["schedule"].get(name, [])) for found in (before, now))
        if old.shape != new.shape or not np.allclose(old, new, rtol=1e-4, atol=1e-6):
            raise ADTError(
                f"The checkpoint {path} was trained at other noise levels: the scheduler's {name} began with "
                f"{', '.join(f'{value:.5g}' for value in old[:3])} (now "
                f"{', '.join(f'{value:.5g}' for value in new[:3])}). Another version of diffusers may make them so."
            )


# Checkpoints


def save_checkpoint(iteration, run):
    """Writes `checkpoint-N` aside and renames it, so that it appears whole or not at all; on every process.

    Raises:
        ADTError: where it cannot be written, as on a full disk. What there is of it is removed then, and the others
            are left.
    """
    args, accelerator = run.args, run.accelerator
    final = Path(args.output_dir, f"checkpoint-{iteration}")
    partial = Path(args.output_dir, f".{final.name}-partial")
    if accelerator.is_main_process:
        for left in Path(args.output_dir).glob(".checkpoint-*-partial"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
    accelerator.wait_for_everyone()
    errors = gather_object([writing_error(lambda: accelerator.save_state(str(partial)))])
    if not any(errors):
        write = (lambda: write_manifest(partial, iteration, run)) if accelerator.is_main_process else (lambda: None)
        errors = gather_object([writing_error(write)])
    if any(errors):
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise ADTError(
            f"The checkpoint {final} could not be written, with {free_gb(args.output_dir):.1f} GB free: "
            f"{next(filter(None, errors))} {what_is_left(args.output_dir)}"
        )
    if accelerator.is_main_process:
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        if args.checkpoints_total_limit > 0:
            # First those past this one, which a run left that was taken up again before them, then the oldest.
            kept = (final, last_good_checkpoint(args.output_dir))
            others = [path for path in list_checkpoints(args.output_dir) if path not in kept]
            others.sort(key=lambda path: checkpoint_iteration(path) < iteration)
            for old in others[: max(0, len(others) + 1 - args.checkpoints_total_limit)]:
                shutil.rmtree(old)
        logger.info(f"Saved {final}")
    accelerator.wait_for_everyone()


def write_manifest(directory, iteration, run):
    files = {str(file.relative_to(directory)): file.stat().st_size for file in directory.rglob("*") if file.is_file()}
    manifest = {"iteration": iteration, **run.identity, "files": files}
    (directory / "adt_checkpoint.json").write_text(json.dumps(manifest, indent=2))


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


def find_checkpoint(identity, args) -> tuple[Path | None, int]:
    """The checkpoint to resume from and its iteration; `(None, 0)` where there is nothing to resume from.

    Args:
        identity: the run's, see `identify_run`.

    Raises:
        ADTError: if the checkpoint is missing, truncated, or of another run.
    """
    path = locate_checkpoint(args)
    if path is None:
        return None, 0
    older = [other for other in list_checkpoints(args.output_dir) if other != path]
    manifest = read_manifest(path, f" Try --resume_from_checkpoint {older[-1].name}." if older else "")
    check_identity(path, manifest, identity, args)
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
    `ema.json`, `discriminator.safetensors`, and each process's `stream_*.json` with `--streaming`; of accelerate,
    `optimizer.bin` and `custom_checkpoint_0.pkl` (the generator's optimizer and schedule), `optimizer_1.bin` and
    `custom_checkpoint_1.pkl` (the discriminator's) and each process's `random_states_*.pkl`; and of `save_checkpoint`,
    `adt_checkpoint.json`. What will not fit is refused.
    """
    check_disk(generator, run)
    # The hooks live as long as the accelerator: they must not hold what data parallelism wraps, see `end_run`.
    network, ema = generator.network, generator.ema
    family, args, accelerator = run.family, run.args, run.accelerator

    def folder(directory):  # where `load_lora_weights` or `from_pretrained` looks
        return Path(directory) if args.use_lora else Path(directory, family.network_name)

    def averaged_folder(directory):
        return Path(directory, f"{family.network_name}_ema")

    def save_network(directory):
        whole = whole_network(network, family.network_class)
        write_together(lambda: write_network(whole, directory), accelerator)

    def write_network(whole, directory):
        save_adapters(whole, family, directory) if args.use_lora else whole.save_pretrained(directory)

    def load_network(directory):
        if args.use_lora:
            load_adapters(network, family, directory)
        else:
            load_whole(network, family.network_class.from_pretrained(directory).state_dict())

    def save_model_hook(models, weights, output_dir):
        weights.clear()  # what is left here, accelerate would save
        if args.streaming:
            write_together(lambda: run.dataset.save(output_dir), accelerator, everywhere=True)
        for model in map(accelerator.unwrap_model, models):
            if model is network:
                save_network(folder(output_dir))
            else:
                file = Path(output_dir, "discriminator.safetensors")
                write_together(lambda: save_file(model.state_dict(), file), accelerator)
        if ema is not None:
            with averaged_weights(network, ema):
                save_network(averaged_folder(output_dir))
            state = {name: value for name, value in ema.state_dict().items() if name != "shadow_params"}
            file = averaged_folder(output_dir) / "ema.json"
            write_together(lambda: file.write_text(json.dumps(state)), accelerator)

    def load_model_hook(models, input_dir):
        if ema is not None:
            # Into the network first, whose own weights come next.
            load_network(averaged_folder(input_dir))
            state = json.loads((averaged_folder(input_dir) / "ema.json").read_text())
            weights = [part.detach().clone() for part in own_parts(trainable_parameters(network))]
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
    """Continues from the run's checkpoint, where it has one: networks, optimizers, schedules, average, stream."""
    if run.checkpoint is not None:
        load_state(run.checkpoint, run)
        if run.args.streaming:
            run.dataset.load(run.checkpoint)
        logger.info(f"Resuming from {run.checkpoint}")


def load_state(path, run):
    """Has accelerate load a checkpoint; where the network is sharded, without the whole state on a card."""
    options = {"map_location": "cpu", "load_kwargs": {"mmap": True}} if run.args.shard else {}
    run.accelerator.load_state(str(path), **options)


# Stopping before the end


class Interruption:
    """SIGTERM, Ctrl-C and `--max_train_time`, which end a run with a checkpoint after the iteration that it is in.

    As a context it takes the two signals. A second one ends the program at once, as the first does outside of it.

    Attributes:
        stopped_after: how many iterations are done where the run was stopped; else None.
        at_end: whether the result is being made, which a signal does not keep from being whole.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    # Within so many seconds signals are one: a launcher passes on what the scheduler has sent to every process.
    ONE_SIGNAL = 2.0

    def __init__(self, args, accelerator):
        self.args, self.accelerator = args, accelerator
        self.started, self.received, self.handlers = time.monotonic(), None, {}
        self.stopped_after, self.at_end = None, False

    def __enter__(self):
        for number in self.SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # ignored, as behind a shell's `&`
                self.handlers[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        if self.received is None:
            self.received = time.monotonic()
            if self.accelerator.is_local_main_process:
                what = b"The run is at its end" if self.at_end else b"Stopping after this iteration, with a checkpoint"
                # Not printed or logged: the program may be in the middle of either.
                os.write(2, b"\n" + what + b". A second signal stops at once.\n")
        elif time.monotonic() - self.received > self.ONE_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def is_due(self, done) -> bool:
        """Whether the run stops with its `done` iterations: on every process, if any of them has been told to."""
        hours = (time.monotonic() - self.started) / 3600
        told = self.received is not None or (
            self.args.max_train_time is not None and hours >= self.args.max_train_time
        )
        if self.accelerator.num_processes > 1:
            told = torch.tensor(float(told), device=self.accelerator.device)
            told = self.accelerator.reduce(told, reduction="sum").item() > 0
        if told:
            self.stopped_after = done
        return told


# Validation


class Validation:
    """Images of the validation prompts, by the training sampler and guidance, from the same noise each time.

    With aspect ratio buckets each prompt's images are at their sizes in turn, see `drawn_sizes`.
    The base pipeline's are drawn when this is made, which must be before a checkpoint is loaded: there is no second
    copy of the base's weights. They are kept in `validation/base`, for when the run is resumed. Without validation
    prompts it does nothing.

    Args:
        conditions: for each prompt what `draw_prompt` draws it by: its embeddings, a dict of (1, ...).

    Attributes:
        grids: the last images, one PIL image for each prompt, base images above tuned ones.
        drifted: whether the run is to end, because what it draws has drifted.
    """

    def __init__(self, generator, adversary, models, conditions, run):
        self.generator, self.models, self.conditions, self.run = generator, models, conditions, run
        self.sizes = drawn_sizes(run.dataset, run.args) if conditions else []
        self.base_images = self.find_base_images()
        self.grids, self.drifted, self.guard = [], False, None
        if adversary is not None and len(conditions) > 1:
            prompts = run.args.validation_prompts
            self.guard = DriftGuard(adversary.feature_network, prompts, self.base_images, run.args)
        if run.accelerator.is_main_process:
            for path in list_checkpoints(run.args.output_dir):
                if checkpoint_iteration(path) > run.first_iteration:  # an earlier run's, or of one taken up before it
                    (path / GOOD).unlink(missing_ok=True)

    def find_base_images(self) -> list[list[Image.Image]]:
        """The base's images as `draw` gives them: those that the same run has kept, else drawn now."""
        args, accelerator, sampler = self.run.args, self.run.accelerator, self.models.sampler
        if not self.conditions:
            return []
        # What a resumed run may have otherwise, and what has no part in them.
        elsewhere = args.of_nature(Nature.BY_CONTENT)
        elsewhere |= {"global_batch_size", "max_train_steps", "discriminator_norm_group"}
        record = {
            "prompts": args.validation_prompts,
            "images": args.num_validation_images,
            "sizes": self.sizes,
            "scheduler": {name: value for name, value in sampler.config.items() if name[0] != "_"},
            "call": self.run.family.inference_options(args),
            "models": self.run.identity["models"],
            "options": {name: value for name, value in self.run.identity["config"].items() if name not in elsewhere},
        }
        directory, record = Path(args.output_dir, "validation", "base"), json.dumps(record, indent=2, default=str)
        found = None
        if accelerator.is_main_process:
            found = read_images(directory, record, len(self.conditions), args.num_validation_images)
        found = broadcast_object_list([found])[0]
        if found is not None:
            return found
        images = self.draw()
        write_or_end(VALIDATION_IMAGES, lambda: write_images(directory, record, images), self.run)
        return images

    def is_due(self, done) -> bool:
        """After `done` iterations; the last validation belongs to the run's end."""
        args = self.run.args
        return bool(self.conditions) and done % args.validation_steps == 0 and done < args.max_train_steps

    def log(self, done):
        """Draws, logs a grid for each prompt, and looks for drift; with `--stop_on_drift` that decides on the run."""
        if not self.conditions:
            return
        args = self.run.args
        drifted = self.draw_and_check(done)
        if not args.stop_on_drift:
            return
        self.drifted = broadcast_object_list([drifted])[0]
        if not self.drifted:
            if done % args.checkpointing_steps != 0:  # else there is one already
                save_checkpoint(done, self.run)
            mark = Path(args.output_dir, f"checkpoint-{done}", GOOD)
            write_or_end(f"The mark of {mark.parent.name}", mark.touch, self.run)

    def draw_and_check(self, done) -> bool:
        """Draws with the averaged weights, where there are any. Returns, on the main process, if there is drift."""
        with self.generator.averaged():
            tuned_images = self.draw()
        pairs = zip(self.base_images, tuned_images, strict=True)
        self.grids = [make_padded_grid(base + tuned, rows=2) for base, tuned in pairs]
        write_or_end(VALIDATION_IMAGES, lambda: log_validation(self.grids, done, self.run), self.run)
        if self.guard is None or not self.run.accelerator.is_main_process:
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
        load_state(good, self.run)
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
        accelerator, network = self.run.accelerator, self.generator.network
        pipeline = self.make_pipeline()
        pipeline.set_progress_bar_config(disable=True)
        training = network.training
        network.eval()
        own = range(accelerator.process_index, len(self.conditions), accelerator.num_processes)
        with self.generator.gathered():
            images = [(n, self.draw_prompt(n, pipeline)) for n in own]
        network.train(training)
        return [result for _, result in sorted(gather_object(images), key=lambda item: item[0])]

    def make_pipeline(self):
        family, sampler = self.run.family, self.models.sampler
        return family.pipeline_class(
            vae=self.models.vae,
            scheduler=type(sampler).from_config(sampler.config),
            **{family.network_name: self.generator.network},
            **family.without_text_encoders,
        )

    def draw_prompt(self, n, pipeline) -> list[Image.Image]:
        args, vae = self.run.args, self.models.vae
        negative = {f"negative_{name}": value for name, value in self.models.prompt_encoder.negative.items()}
        # In float32, since a pipeline may give the latents the embeddings' precision.
        embeddings = {name: value.float() for name, value in (self.conditions[n] | negative).items()}
        images = []
        for j in range(args.num_validation_images):
            generator = make_generator(args.seed, "validation", n, j)
            height, width = self.sizes[j % len(self.sizes)]
            latent_sides = (side // pipeline.vae_scale_factor for side in (height, width))
            noise = torch.randn((1, vae.config.latent_channels, *latent_sides), generator=generator)
            # A sampler that adds noise draws it from here in the pipelines that hand it no generator, such as SD3's.
            torch.manual_seed(generator.initial_seed())
            latents = pipeline(
                **embeddings,
                latents=noise.to(self.run.accelerator.device),
                generator=generator,  # of a sampler that adds noise
                height=height,
                width=width,
                output_type="latent",
                **self.run.family.inference_options(args),
            ).images
            check_latents(latents, "in validation")
            images += pipeline.image_processor.postprocess(self.run.family.decode_latents(vae, latents.float()))
        return images


def read_images(directory, record, num_prompts, num_images) -> list[list[Image.Image]] | None:
    """The images that `write_images` wrote with the same `record`; None where there are none, or not all."""
    file = directory / "record.json"
    if not file.is_file() or file.read_text() != record:
        return None
    images = [[directory / f"prompt-{n}-{j}.png" for j in range(num_images)] for n in range(num_prompts)]
    if not all(file.is_file() for row in images for file in row):
        return None
    logger.info(f"The base's validation images are {directory}'s.")
    return [[Image.open(file).convert("RGB") for file in row] for row in images]


def write_images(directory, record, images):
    """Writes lists of images, and last the `record` of what they depend on, a text."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for n, row in enumerate(images):
        for j, image in enumerate(row):
            image.save(directory / f"prompt-{n}-{j}.png")
    (directory / "record.json").write_text(record)


def log_validation(grids, done, run):
    """Writes the grids of images, one for each prompt, and sends them to the trackers."""
    directory = Path(run.args.output_dir, "validation")
    directory.mkdir(parents=True, exist_ok=True)
    for n, grid in enumerate(grids):
        grid.save(directory / f"iteration-{done:06d}-prompt-{n}.png")
    for tracker in run.accelerator.trackers:
        if tracker.name == "tensorboard":
            stacked = np.stack([np.asarray(grid) for grid in grids])
            tracker.writer.add_images("validation", stacked, done, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"validation": grids}, step=done)


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
        ADTError: where the Hub cannot be reached, refuses the token or has no such place, or the token may not write.
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
        try:
            # With `exist_ok` a token that may only read passes where the repository is there.
            auth_check(repo_id, token=args.hub_token, write=True)
        except Exception as error:
            raise ADTError(f"--push_to_hub: {repo_id} cannot be written with this token: {one_line(error)}") from error
    os.makedirs(args.output_dir, exist_ok=True)
    return repo_id


def finish_run(generator, models, validation, run):
    """The last validation, and the saved result; of a run that was stopped, where it goes on.

    Raises:
        ADTError: where the result cannot be written, as on a full disk.
    """
    args, accelerator, interruption = run.args, run.accelerator, run.interruption
    if validation.drifted:
        interruption.stopped_after = None  # it ends in any case
    if interruption.stopped_after is not None:
        logger.info(
            f"Stopped after {interruption.stopped_after} of {args.max_train_steps} iterations, with "
            f"{Path(args.output_dir, f'checkpoint-{interruption.stopped_after}')}: the same command with "
            "--resume_from_checkpoint latest goes on there."
        )
        return
    interruption.at_end = True
    run = validation.finish()
    with generator.averaged():
        network = whole_network(generator.network, run.family.network_class)
        # The last that the processes do together: only the main one goes on, for as long as an upload takes.
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return
        error = writing_error(lambda: save_result(network, models, validation.grids, run))
    if error is not None:
        raise ADTError(
            f"The result in {args.output_dir} is not whole: it could not be written, with "
            f"{free_gb(args.output_dir):.1f} GB free: {error} {what_is_left(args.output_dir)}"
        )


def save_result(network, models, grids, run):
    """Writes the pipeline or the adapters, the scheduler, the card and its images, and uploads them when asked.

    Args:
        network: the whole one, with the weights that are wanted.

    Raises:
        ADTError: where the upload fails, once all is written.
    """
    args, family = run.args, run.family
    sampler = type(models.sampler).from_config(models.sampler.config)
    # What an upload takes, and nothing else that the folder may hold.
    written = ["README.md", "adt_config.json", CONFIG]
    if args.use_lora:
        save_adapters(network, family, args.output_dir)
        sampler.save_pretrained(os.path.join(args.output_dir, "scheduler"))
        written += [ADAPTERS, "scheduler/*"]
        if args.output_kohya_format:
            save_kohya_adapters(network, family, args)
            written.append(KOHYA_ADAPTERS)
    if not args.use_lora or args.fuse_lora:
        written += save_pipeline(network, sampler, run)
    for n, grid in enumerate(grids):
        file = Path(args.output_dir, "images", f"prompt-{n}.png")
        file.parent.mkdir(exist_ok=True)
        grid.save(file)
        written.append(f"images/{file.name}")
    write_model_card(models.sampler, bool(grids), run)
    filled_in = args.replace(mixed_precision=run.accelerator.mixed_precision)
    hidden = args.of_nature(Nature.PRIVATE, Nature.SECRET)
    write_config(filled_in, run.accelerator.num_processes, hidden, Path(args.output_dir, CONFIG))
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


def training_facts(inference, run) -> dict:
    """What `adt_config.json` says of the run, for programs."""
    args, accelerator = run.args, run.accelerator
    return {
        "base_model": args.public()["pretrained_model_name_or_path"],
        "method": run.method.name,
        "iterations": args.max_train_steps,
        "generator_updates": run.num_generator_updates,
        "global_batch_size": run.global_batch_size,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "inference": inference,
        "training_options": args.public(),
        "versions": {module.__name__: module.__version__ for module in (accelerate, diffusers, torch, transformers)},
    }


def write_model_card(sampler, has_images, run):
    """Writes README.md and adt_config.json into the output folder, always anew.

    Args:
        sampler: with `set_timesteps` called, unless the call has sigmas of its own.
    """
    args, family = run.args, run.family
    call = family.inference_options(args)
    height, width = drawn_sizes(run.dataset, args)[0]
    if (height, width) != (run.default_size, run.default_size):
        call |= {"height": height, "width": width}
    sampler_facts = {name: sampler.config[name] for name in family.sampler_facts if name in sampler.config}
    inference = {"scheduler": type(sampler).__name__, **sampler_facts, **call}
    described = ", ".join(f"{name.replace('_', ' ')} {value or repr(value)}" for name, value in inference.items())
    # A few-step student's sigmas are what it is called with; the others are for comparison, not for a call.
    schedule = sampler_schedule(sampler) if family.schedule_by_number else {}
    facts = training_facts(schedule | inference, run)
    Path(args.output_dir, "adt_config.json").write_text(json.dumps(facts, indent=2) + "\n")

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
        call={name: repr(value) for name, value in call.items()},
        sampling=run.method.sampling.format(described=described)
        + FUSED * args.fuse_lora
        + KOHYA * args.output_kohya_format
        + family.inference_note(args)
        + describe_sizes(args),
        image_prompts=args.validation_prompts if has_images else [],
        facts=facts,
        options={name: str(value).replace("|", "\\|") for name, value in sorted(facts["training_options"].items())},
    )
    card.save(Path(args.output_dir, "README.md"))

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
"""The disk that a run writes to: what it will take, and what happens where it is full.

- `list_checkpoints`: what is there;
- `writing_error`, `write_together`, `write_or_end`: writing, by which a full disk is one sentence on every process;
- `Space`, `check_disk`, `bytes_to_come`: what checkpoints and the result will take, and whether it is there.

`output_utils.py` does the writing and stands on it; it knows a run, and nothing of what the files mean.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from safetensors import SafetensorError

from memory_utils import optimizer_state_bytes
from training_utils import ADTError, add_adapters, make_generator_optimizer, trainable_parameters


logger = get_logger(__name__)


# What is there


def checkpoint_iteration(path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def list_checkpoints(output_dir) -> list[Path]:
    """The checkpoints in `output_dir`, by their iteration."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=checkpoint_iteration)


# Writing


class WritingError(RuntimeError):
    """What kept the main process from writing a file, raised on every process."""


def writing_error(write) -> str | None:
    """Calls `write`. Returns what kept it from writing a file, as a full disk does; other errors are raised."""
    try:
        write()
    except WritingError as error:
        return str(error)
    except SafetensorError as error:
        return f"{error}."
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        return f"{error}."
    except RuntimeError as error:
        if "inline_container" not in str(error):  # `torch.save`'s; it does not name the cause
            raise
        return f"{str(error).splitlines()[0]}."


def write_together(write, accelerator, everywhere=False):
    """Has the main process write, or every one; what keeps one from that is raised on all of them.

    Else the others would wait for it for ever, where a sharded network is gathered next.
    """
    writes = everywhere or accelerator.is_main_process
    for error in filter(None, gather_object([writing_error(write) if writes else None])):
        raise WritingError(error)


def free_gb(directory) -> float:
    return shutil.disk_usage(directory).free / 1e9


def what_is_left(directory) -> str:
    """What a run that ends in an error says of its checkpoints."""
    left = list_checkpoints(directory)
    return (
        f"{left[-1].name} is whole: --resume_from_checkpoint latest goes on there." if left else "There is no other."
    )


def write_or_end(what, write, run):
    """Has the main process write; on a full disk the run ends, on every process.

    Args:
        what: begins the sentence, as "The validation images".

    Raises:
        ADTError: with the checkpoint that is left.
    """
    try:
        write_together(write, run.accelerator)
    except WritingError as error:
        directory = run.args.output_dir
        raise ADTError(
            f"{what} could not be written, with {free_gb(directory):.1f} GB free: {error} {what_is_left(directory)}"
        ) from error


# What a run will take


@dataclass
class Space:
    """What a run will write, in bytes.

    Attributes:
        checkpoint: each of them.
        num_checkpoints: how many more there will be at once.
        result: the pipeline or the adapters, where none is there to be written over.
    """

    checkpoint: int
    num_checkpoints: int
    result: int

    @property
    def total(self) -> int:
        return self.checkpoint * self.num_checkpoints + self.result


def num_checkpoints(run) -> int:
    """How many more checkpoints there will be at once than there are."""
    args, existing = run.args, len(list_checkpoints(run.args.output_dir))
    planned = args.max_train_steps // args.checkpointing_steps - run.first_iteration // args.checkpointing_steps
    planned = max(1, planned)  # a run that is stopped writes one
    if args.checkpoints_total_limit == 0:
        return planned
    # One more is there while it is written, and the last good one is spared beside the newest.
    limit = args.checkpoints_total_limit + args.stop_on_drift
    return max(0, min(existing + planned, max(limit, existing) + 1) - existing)


def checkpoint_bytes(networks, optimizers, run) -> int:
    """What a checkpoint takes: networks, the average of the first, and the optimizers' states.

    Args:
        networks: those that train, the generator's first.
    """
    total = sum(map(optimizer_state_bytes, optimizers))
    for network in networks:
        adapters = network is networks[0] and run.args.use_lora
        values = trainable_parameters(network) if adapters else network.state_dict().values()
        copies = 2 if network is networks[0] and run.args.use_ema else 1
        total += copies * sum(value.numel() * value.element_size() for value in values)
    return total


def outline(kind, name, run) -> torch.nn.Module:
    """A model of the base pipeline, of the class `kind`, without its weights."""
    args = run.args
    path, place = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    with torch.device("meta"):
        if hasattr(kind, "load_config"):
            return kind.from_config(kind.load_config(path, subfolder=name, **place))
        return kind(kind.config_class.from_pretrained(path, subfolder=name, **place))


def outline_network(run) -> torch.nn.Module:
    """The network as it trains, in float32 and without its weights; as if all of it did."""
    network = outline(run.family.network_class, run.family.network_name, run)
    if run.args.use_lora:
        network.requires_grad_(False)
        add_adapters(network, run.args)
    return network


def result_bytes(run) -> int:
    """What the result takes: adapters, the pipeline in float32 but for what may stay lighter, or both."""
    args, family, total = run.args, run.family, 0
    if args.use_lora:
        adapters = sum(4 * value.numel() for value in trainable_parameters(outline_network(run)))
        total += adapters * (1 + args.output_kohya_format)
    if args.use_lora and not args.fuse_lora:
        return total
    place = {"revision": args.revision, "cache_dir": args.cache_dir}
    index = family.pipeline_class.load_config(args.pretrained_model_name_or_path, **place)
    for name, value in index.items():
        kind = simple_get_class_obj(*value) if isinstance(value, list | tuple) and None not in value else None
        if isinstance(kind, type) and issubclass(kind, torch.nn.Module):
            model = outline(kind, name, run)
            dtype = getattr(model.config, "dtype", None) if name in family.half_precision_components else None
            size = (dtype or torch.float32).itemsize
            total += sum(size * value.numel() for value in model.parameters())
    return total


def find_space(networks, optimizers, run) -> Space:
    """See `checkpoint_bytes`."""
    there = Path(run.args.output_dir, "adt_config.json").is_file()
    return Space(checkpoint_bytes(networks, optimizers, run), num_checkpoints(run), 0 if there else result_bytes(run))


def bytes_to_come(directory, run) -> int:
    """What the run will write on the disk of `directory`, which is for something else: 0 where it writes on another.

    It is known before a weight is loaded, but for the discriminator, which is small, and for a method that trains some
    of the network's layers alone, which takes less. On every process.
    """
    total = 0
    if run.accelerator.is_main_process:
        os.makedirs(directory, exist_ok=True)
        if os.stat(directory).st_dev == os.stat(run.args.output_dir).st_dev:
            network = outline_network(run)
            total = find_space([network], [make_generator_optimizer(network, run.args)], run).total
    return broadcast_object_list([total])[0]


def check_disk(generator, run):
    """Says what checkpoints and the result will take, and refuses a run of which not all that is kept fits.

    Raises:
        ADTError: with what is needed and what is free.
    """
    args, accelerator, sentence = run.args, run.accelerator, None
    limit = args.checkpoints_total_limit
    if accelerator.is_main_process:
        networks = [accelerator.unwrap_model(network) for network in accelerator._models]
        networks.sort(key=lambda network: network is not generator.network)  # the generator's first
        space = find_space(networks, [optimizer.optimizer for optimizer in accelerator._optimizers], run)
        free = free_gb(args.output_dir)
        each, result = space.checkpoint / 1e9, space.result / 1e9
        takes = f"Checkpoints take {each:.3g} GB each, {each * space.num_checkpoints:.3g} GB more at once, the result "
        takes += f"{result:.3g} GB, and {free:.3g} GB are free in {args.output_dir}"
        if space.total / 1e9 > free and (limit > 0 or each + result > free):
            lower = f" or a lower --checkpoints_total_limit than {limit}" if limit > 1 else ""
            sentence = f"{takes}: choose another --output_dir{lower}."
        elif space.total / 1e9 > free:
            logger.warning(f"{takes}: not all of them fit.")
        else:
            logger.info(f"{takes}.")
    sentence = broadcast_object_list([sentence])[0]
    if sentence is not None:
        raise ADTError(sentence)

"""Runs training scripts one after another in the same two processes, since starting them takes long.

    torchrun --nproc_per_node 2 tests/sharded_processes.py RUNS.json

RUNS.json is a list of runs, each with `script`, `options`, and `record`, the folder for what `two_processes.record`
saves. Of runs with `--shard` there is also facts-N.json: for each time that the weights were gathered how many
all-gathers that took and how many happened until they were divided again, and whether everything was divided then.
`copy`, [from, to], is copied before the run, as a checkpoint to resume from. With `killed_at` N the main process is
killed when it has written the network of its N-th checkpoint. With `disk_full` it cannot write a network, and
error-N.txt is what the run ended with.
"""

import contextlib
import errno
import importlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import two_processes  # noqa: E402
from conftest import reset_accelerate  # noqa: E402
from diffusers import ModelMixin  # noqa: E402

import training_utils  # noqa: E402


class CountedGathers(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "allgather" in function.name()
        return function(*args, **(kwargs or {}))


def watch_gathering(facts):
    gathered = training_utils.Trained.gathered

    @contextlib.contextmanager
    def watched(trained):
        counted, fact = CountedGathers(), {}
        with contextlib.ExitStack() as stack:
            with counted:
                stack.enter_context(gathered(trained))
            fact["before"] = counted.count
            with counted:
                yield
            fact["within"] = counted.count - fact["before"]
        parameters = list(trained.network.parameters())
        fact["divided"] = all(isinstance(parameter, DTensor) for parameter in parameters)
        if fact["divided"]:
            own = sum(parameter.to_local().numel() for parameter in parameters)
            fact["share"] = own / sum(parameter.numel() for parameter in parameters)
        facts.append(fact)

    training_utils.Trained.gathered = watched


def kill_when_written(number):
    save_pretrained, written = ModelMixin.save_pretrained, []

    def save(network, *args, **kwargs):
        save_pretrained(network, *args, **kwargs)
        written.append(network)
        if len(written) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    ModelMixin.save_pretrained = save


@contextlib.contextmanager
def full_disk(record):
    save_pretrained = ModelMixin.save_pretrained

    def save(network, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    ModelMixin.save_pretrained = save
    try:
        yield
    except training_utils.ADTError as error:
        Path(record).mkdir(parents=True, exist_ok=True)
        Path(record, f"error-{os.environ['RANK']}.txt").write_text(str(error))
    finally:
        ModelMixin.save_pretrained = save_pretrained


def main(runs):
    facts = []
    watch_gathering(facts)
    end_training = training_utils.Accelerator.end_training
    for run in runs:
        last = run is runs[-1]
        # The process group serves all runs.
        training_utils.Accelerator.end_training = (
            end_training if last else lambda self: [tracker.finish() for tracker in self.trackers]
        )
        if "copy" in run:
            if os.environ["RANK"] == "0":
                shutil.copytree(*run["copy"])
            dist.barrier()
        if "killed_at" in run:
            kill_when_written(run["killed_at"])
        reset_accelerate()
        facts.clear()
        with full_disk(run["record"]) if run.get("disk_full") else contextlib.nullcontext():
            two_processes.record(importlib.import_module(run["script"]), run["record"], run["options"])
        Path(run["record"], f"facts-{os.environ['RANK']}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(Path(sys.argv[1]).read_text()))

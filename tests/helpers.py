"""Starting a run on two processes, reading what a run wrote, and comparing it."""

import contextlib
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from option_utils import Nature
from training_utils import STOPPED, Trained


NO_ACCELERATOR = types.SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")
TIMING = {"seconds_per_iteration", "images_per_second", "peak_memory_gb"}


def plain_options(train):
    """The names of a family script's options that act in plain fine-tuning by data parallelism."""
    args = train.parse_args(
        ["--pretrained_model_name_or_path", "x", "--dataset_name", "y", "--adversarial_loss_weight", "0"]
    )
    drift = {"drift_tolerance", "drift_clip_model_name_or_path", "stop_on_drift"}
    ignored = args.of_nature(Nature.ADVERSARIAL) | {"adversarial_loss_weight", "rollout_time_ids"} | drift
    return set(vars(args)) - ignored - {"shard"}


def read_result(directory, network):
    """The weights of a run's result: its network's, or its adapters."""
    adapters = Path(directory, "pytorch_lora_weights.safetensors")
    return load_file(adapters) if adapters.exists() else read_network(directory, network)


@contextlib.contextmanager
def handled(number, handler=signal.SIG_DFL):
    """A context with another handler of a signal. (One that is ignored stays so, and a shell's `&` ignores SIGINT.)"""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def run_until_signal(run, iteration, *options, number=signal.SIGTERM, **more):
    """A run whose process gets a signal in the 0-based `iteration`; it must stop then, and says so by its status."""
    step, sent = Trained.step, []

    def signalled_step(trained, at):
        if at == iteration and not sent:  # once, though more than one network steps
            sent.append(signal.raise_signal(number))
        return step(trained, at)

    with pytest.MonkeyPatch.context() as patch, handled(number):
        patch.setattr(Trained, "step", signalled_step)
        with pytest.raises(SystemExit) as stop:
            run(*options, **more)
    assert stop.value.code == STOPPED


TORCHRUN = ("torchrun", "--standalone", "--nproc_per_node", "2")


def run_two_processes(script, *arguments, status=0, launcher=TORCHRUN, timeout=300, **environment):
    """Runs `script` under a launcher; one that hangs or fails ends with what it printed, and where it hung.

    Returns what it printed.
    """
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / launcher[0]), *launcher[1:], str(script), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"} | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.send_signal(signal.SIGABRT)  # which has Python print the stack of every thread
        printed, _ = process.communicate()
        raise AssertionError(f"{script} hung:\n{printed}") from None
    assert process.returncode == status, printed
    return printed


def read_scalars(output_dir, logging_dir="logs"):
    """{tag: {step: value}} as TensorBoard recorded them, without timings."""
    (project,) = Path(output_dir, logging_dir).iterdir()
    events = EventAccumulator(str(project))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
        if tag not in TIMING
    }


def read_network(directory, subfolder="unet"):
    return load_file(Path(directory, subfolder, "diffusion_pytorch_model.safetensors"))


def equal(first, second):
    """Bitwise equality of nested containers of tensors."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def relative(first, second):
    return ((first - second).norm() / second.norm()).item()


def checkpoint_state(directory):
    """Everything in a checkpoint that training continues from."""
    state = {str(file.relative_to(directory)): load_file(file) for file in Path(directory).rglob("*.safetensors")}
    for file in [*Path(directory).glob("optimizer*.bin"), *Path(directory).glob("custom_checkpoint_*.pkl")]:
        state[file.name] = torch.load(file, weights_only=False)
    for file in Path(directory).rglob("ema.json"):
        state["ema.json"] = file.read_text()
    return state

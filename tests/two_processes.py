"""Runs a training script with the given options, under torchrun or alone, and saves what each process saw.

    torchrun --nproc_per_node 2 tests/two_processes.py train_adt_sd15 RECORD_DIR OPTIONS...

RECORD_DIR/rank-N.pt holds, for each optimizer step, the synchronised gradient as one vector (before clipping), the
start index of every rollout, the final weights of both networks, and gloo's threads before and after the run's end.
With SIGNALLED_RANK and SIGNALLED_ITERATION in the environment, that process gets SIGTERM in that 0-based iteration.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor


def gloo_threads():
    names = {(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
    return {name for name in names if "gloo" in name}


def whole(tensor):
    """A copy of it, of a sharded one all of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def record(train, directory, options):
    """Runs `train`, a script's module, while what the docstring names is recorded."""
    import training_utils

    models, gradients, start_indices, threads, weights = {}, [], [], [], []
    step, roll_out = training_utils.Trained.step, getattr(train, "roll_out", None)
    end_training = training_utils.Accelerator.end_training

    signalled = tuple(int(os.environ.get(name, -1)) for name in ("SIGNALLED_RANK", "SIGNALLED_ITERATION"))

    def recording_step(trained, iteration):
        if (trained.run.accelerator.process_index, iteration) == signalled and trained.name == "generator":
            signal.raise_signal(signal.SIGTERM)
        parameters = [parameter for parameter in trained.wrapped.parameters() if parameter.grad is not None]
        gradients.append(torch.cat([whole(parameter.grad).flatten() for parameter in parameters]))
        stepped = step(trained, iteration)
        models[trained.name] = [parameter.detach() for parameter in trained.network.parameters()]
        return stepped

    def recording_roll_out(micro_batches, paths, *others):
        start_indices.extend(paths[n][0] for n, batches in micro_batches.items() for _ in batches)
        roll_out(micro_batches, paths, *others)

    def recording_end(accelerator):
        weights.extend([whole(parameter) for parameter in parameters] for parameters in models.values())
        threads.append(gloo_threads())
        end_training(accelerator)
        threads.append(gloo_threads())

    training_utils.Trained.step, train.roll_out = recording_step, recording_roll_out
    training_utils.Accelerator.end_training = recording_end
    try:
        train.main(train.parse_args(options))
    finally:
        training_utils.Trained.step, train.roll_out = step, roll_out
        training_utils.Accelerator.end_training = end_training
    rank = PartialState().process_index
    Path(directory).mkdir(parents=True, exist_ok=True)
    result = {"gradients": gradients, "start_indices": start_indices, "weights": weights}
    result |= {"threads": threads[0], "threads_after": threads[1]}
    torch.save(result, Path(directory, f"rank-{rank}.pt"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    record(importlib.import_module(sys.argv[1]), sys.argv[2], sys.argv[3:])

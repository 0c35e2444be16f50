"""`--shard`: two sharded processes make the run that one makes. And the launch configurations.

All runs of two processes are made at once, by `sharded_processes.py`. What takes long is `make test-long`'s.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sharded_processes
import torch
import two_processes
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from conftest import FAMILIES, reset_accelerate, short_run_options
from filelock import FileLock
from helpers import checkpoint_state, equal, read_network, read_scalars, relative, run_two_processes
from PIL import Image

import train_adt_sd15 as train
import training_utils
from output_utils import list_checkpoints
from related import train_lcm
from training_utils import ADTError, check_launch


sys.path.insert(0, str(Path(train.__file__).parent / "benchmarks"))

from scaling import count_parts  # noqa: E402


CONFIGS = Path(train.__file__).parent / "accelerate_configs"
COMMON = (
    "--seed", 2, "--random_flip", "--noise_offset", 0.1, "--proportion_empty_prompts", 0.3, "--learning_rate", 2e-4,
    "--discriminator_learning_rate", 2e-4, "--checkpoints_total_limit", 0, "--mixed_precision", "no",
)  # fmt: skip
EVERYTHING = (
    "--use_ema", "--gradient_checkpointing", "--validation_prompts", "a red disc", "--num_validation_images", 1,
    "--validation_steps", 2,
)  # fmt: skip
FINETUNE = ("--adversarial_loss_weight", 0, "--max_train_steps", 2)
HALF = ("--mixed_precision", "bf16", "--max_train_steps", 1, "--generator_update_interval", 1)
RESUME = ("--resume_from_checkpoint", "latest")
TWO = ("--max_train_steps", 2, "--generator_update_interval", 1)
EACH, LAST = ("--checkpointing_steps", 1), ("--checkpointing_steps", 4)
# Of one process that is to make the same run: the rest of its options, and of each of two.
SIZES = {
    "sd15": (("--train_batch_size", 4), ("--train_batch_size", 2)),
    "sdxl": (("--train_batch_size", 4), ("--train_batch_size", 1, "--gradient_accumulation_steps", 2)),
    "sd3": (("--train_batch_size", 4), ("--train_batch_size", 2)),
}
OWN = {
    "sd15": ("--adversarial_loss_weight", "auto", "--discriminator_norm_group", 2),
    "sdxl": ("--discriminator_norm_group", 1, "--foreach_ema"),
    "sd3": ("--discriminator_norm_group", 2),
}
# What two processes run: the checkpoint that it begins with, as run and iteration, and options. "one" is the run of
# one process.
RUNS = {
    "simple": (None, ("--shard", *EVERYTHING, *TWO)),  # without a checkpoint, for which each tensor is gathered
    "straight": (None, ("--shard", *EVERYTHING, *EACH)),
    "sparse": (None, ("--shard", *EVERYTHING, *LAST)),
    "resumed": (("straight", 2), ("--shard", *EVERYTHING, *LAST, *RESUME)),
    "from-one": (("one", 1), ("--shard", *EVERYTHING, *EACH, *RESUME, "--max_train_steps", 2)),
    "parallel": (("from-one", 2), (*EVERYTHING, *EACH, *RESUME, "--max_train_steps", 3)),
    "from-parallel": (("parallel", 3), ("--shard", *EVERYTHING, *EACH, *RESUME)),
    "finetune": (None, ("--shard", *FINETUNE)),
}
SHORT = [(name, "simple") for name in ("sd15", "sdxl")] + [("sd3", kind) for kind in RUNS if kind != "simple"]
LONG = [(name, kind) for name in ("sd15", "sdxl") for kind in RUNS if kind != "simple"]
# bfloat16, sharded and not; a disk on which no checkpoint fits; and last, since it ends the processes, a run that is
# killed in its second checkpoint.
SHORT_RUNS = {
    "bf16": (None, ("--shard", *HALF)),
    "bf16-parallel": (None, HALF),
    "full-disk": (None, ("--shard", "--use_ema", *EACH)),
    "killed": (None, ("--shard", *EACH)),
}
# What sharding, or a second process, meets in other modules: images of several sizes, a kernel of attention, a stream,
# compiled blocks.
BUCKETS = (
    "--use_aspect_ratio_buckets", "--aspect_ratio_buckets", "16,16;24,32", "--attention_backend", "math",
    "--discriminator_norm_group", 1, "--max_train_steps", 3, "--generator_update_interval", 1,
    # With so large an epsilon an update is proportional to the gradient, and rounding has no direction of its own.
    "--adam_epsilon", 1e-3,
)  # fmt: skip
STREAM = ("--streaming", "--shuffle_buffer_size", 3, *TWO)
PAIRED_RUNS = {
    "buckets": (None, ("--shard", *EVERYTHING, *BUCKETS, "--train_batch_size", 1)),
    "streamed": (None, ("--shard", *STREAM)),
    "streamed-parallel": (None, STREAM),
    "compiled": (None, ("--compile", *TWO)),
}
STRAIGHT = [("sd15", "simple", 2), ("sdxl", "simple", 2), ("sd3", "straight", 4)]  # and their iterations
EACH_FAMILY = [pytest.param("sd3"), *(pytest.param(name, marks=pytest.mark.long) for name in ("sd15", "sdxl"))]


class Runs:
    """Runs of one process and of two, each with its output and its record under `root/FAMILY/RUN`."""

    def __init__(self, root, paths):
        self.root, self.paths = root, paths

    def output(self, name, kind):
        return self.root / name / kind / "out"

    def record(self, name, kind):
        return [torch.load(file) for file in sorted((self.root / name / kind).glob("rank-*.pt"))]

    def facts(self, name, kind):
        return [json.loads(file.read_text()) for file in sorted((self.root / name / kind).glob("facts-*.json"))]

    def options(self, name, kind, *more):
        base_paths, *others = self.paths
        common = (*COMMON, *OWN[name], *more)
        return short_run_options(FAMILIES[name], base_paths[name], *others, self.output(name, kind), *common)

    def copy(self, name, start, kind):
        run, iteration = start
        checkpoint = f"checkpoint-{iteration}"
        return [str(self.output(name, run) / checkpoint), str(self.output(name, kind) / checkpoint)]

    def run_alone(self, name, kind, *more):
        reset_accelerate()
        options = self.options(name, kind, *SIZES[name][0], *more)
        two_processes.record(FAMILIES[name].train, self.root / name / kind, options)

    def planned(self, name, kind):
        start, options = (RUNS | SHORT_RUNS | PAIRED_RUNS)[kind]
        plan = {
            "script": FAMILIES[name].train.__name__,
            "options": self.options(name, kind, *SIZES[name][1], *options),
            "record": str(self.root / name / kind),
        }
        return plan if start is None else plan | {"copy": self.copy(name, start, kind)}

    def run_pairs(self, plans, status=0, **how):
        file = self.root / "runs.json"
        file.write_text(json.dumps(plans))
        printed = run_two_processes(sharded_processes.__file__, file, status=status, timeout=1200, **how)
        missing = [plan["record"] for plan in plans if "killed_at" not in plan and not Path(plan["record"]).is_dir()]
        assert not missing, f"{missing}\n{printed}"


@pytest.fixture(scope="module")
def paths(base_paths, dinov2_path, dataset_path):
    return base_paths, dinov2_path, dataset_path


def make_once(root, make):
    """Calls `make`, but in one process of pytest-xdist's alone; the others wait for what it puts under `root`."""
    with FileLock(f"{root}.lock"):
        if not (root / "made").exists():
            make()
            (root / "made").touch()


@pytest.fixture(scope="module")
def shared_path(tmp_path_factory):
    """A folder of all of pytest-xdist's processes."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="module")
def short_runs(paths, shared_path):
    runs = Runs(shared_path / "short", paths)
    make_once(runs.root, lambda: make_short_runs(runs))
    return runs


def make_short_runs(runs):
    """As `accelerate_configs/four_cards_sharded.yaml` says, but for the number of processes."""
    for name in FAMILIES:
        runs.run_alone(name, "one", *EVERYTHING, *(EACH if name == "sd3" else TWO))
    runs.run_alone("sd3", "one-finetune", *FINETUNE)
    runs.run_alone("sd3", "one-bf16", *HALF, "--mixed_precision", "no")
    plans = [runs.planned(*run) for run in [*SHORT, *(("sd3", kind) for kind in SHORT_RUNS)]]
    plans[-2]["disk_full"], plans[-1]["killed_at"] = True, 2
    launcher = ("accelerate", "launch", "--config_file", CONFIGS / "four_cards_sharded.yaml", "--num_processes", "2")
    runs.run_pairs(plans, status=1, launcher=launcher)


@pytest.fixture(scope="module")
def long_runs(paths, shared_path):
    runs = Runs(shared_path / "long", paths)
    make_once(runs.root, lambda: make_long_runs(runs))
    return runs


def make_long_runs(runs):
    for name in ("sd15", "sdxl"):
        runs.run_alone(name, "one", *EVERYTHING, *EACH)
        runs.run_alone(name, "one-finetune", *FINETUNE)
    runs.run_pairs([runs.planned(*run) for run in LONG])


@pytest.fixture(scope="module")
def paired_runs(paths, shared_path):
    runs = Runs(shared_path / "paired", paths)
    make_once(runs.root, lambda: make_paired_runs(runs))
    return runs


def make_paired_runs(runs):
    runs.run_alone("sd15", "one-buckets", *EVERYTHING, *BUCKETS, "--train_batch_size", 2)
    runs.run_alone("sd15", "one-eager", *TWO)
    runs.run_pairs([runs.planned("sd15", kind) for kind in PAIRED_RUNS], TORCHINDUCTOR_COMPILE_THREADS="1")


@pytest.fixture
def runs_of(request):
    return lambda name: request.getfixturevalue("short_runs" if name == "sd3" else "long_runs")


def distance(values, expected):
    """Relative, of all the tensors of two lists or two dicts. Adam makes steps of what one alone has of rounding."""
    if isinstance(expected, dict):
        assert values.keys() == expected.keys()
        values, expected = ([part[key] for key in expected] for part in (values, expected))
    assert [value.shape for value in values] == [value.shape for value in expected]
    return relative(*(torch.cat([value.flatten() for value in part]) for part in (values, expected)))


def assert_same_run(runs, name, kind, one):
    """Of two processes and of one: gradients of every update, scalars, and the networks in the end."""
    (first, second), (expected,) = runs.record(name, kind), runs.record(name, one)
    assert equal(first["weights"], second["weights"])
    assert set(first["start_indices"]) == set(expected["start_indices"])  # which each micro-batch has
    assert len(first["gradients"]) == len(expected["gradients"]) > 1
    for gradient, value in zip(first["gradients"], expected["gradients"], strict=True):
        assert relative(gradient, value) < 1e-4
    for network, values in zip(first["weights"], expected["weights"], strict=True):
        assert distance(network, values) < 1e-4
    scalars, expected = (read_scalars(runs.output(name, which)) for which in (kind, one))
    assert scalars.keys() == expected.keys()
    for tag, values in expected.items():
        floor = 1e-5 if "score" in tag or tag == "generator_loss" else 1e-12
        assert scalars[tag] == pytest.approx(values, rel=1e-4, abs=floor), tag


@pytest.mark.parametrize(("name", "kind", "iterations"), STRAIGHT)
def test_two_sharded_processes_make_the_run_of_one(short_runs, paths, name, kind, iterations):
    """With an average and validation; SD1.5's with `auto`, and SDXL's with two micro-batches."""
    family, runs = FAMILIES[name], short_runs
    assert_same_run(runs, name, kind, "one")
    # The result is the averaged weights, whole.
    sharded, expected = (runs.output(name, which) for which in (kind, "one"))
    result = read_network(sharded, family.network)
    assert result.keys() == read_network(paths[0][name], family.network).keys()
    assert distance(result, read_network(expected, family.network)) < 1e-5
    folder = f"{family.network}/config.json"
    configs = [json.loads((path / folder).read_text()) for path in (sharded, expected)]
    assert configs[0] == configs[1]
    images = list((expected / "validation").rglob("*.png"))
    assert len(images) == 1 + iterations / 2  # the base's, and one after every second
    for image in images:
        other = sharded / image.relative_to(expected)
        pixels = [np.array(Image.open(file)).astype(int) for file in (image, other)]
        assert abs(pixels[0] - pixels[1]).max() <= 1


@pytest.mark.parametrize(("name", "kind", "iterations"), STRAIGHT)
def test_gathered_once_for_a_rollout_and_divided_behind_it(short_runs, name, kind, iterations):
    """Also for a validation, of which one process has nothing to draw."""
    network_class = FAMILIES[name].train.FAMILY.network_class
    network = network_class.from_pretrained(short_runs.output(name, kind) / FAMILIES[name].network)
    rollouts = iterations * (2 if name == "sdxl" else 1)  # micro-batches
    for facts in short_runs.facts(name, kind):
        assert len(facts) == rollouts + 1 + iterations / 2
        for fact in facts:
            assert fact["divided"] and fact["share"] == pytest.approx(0.5, abs=0.05)
            assert fact["before"] == count_parts(network) and fact["within"] == 0


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_sharded_run_goes_on_bitwise(runs_of, name):
    """And its checkpoints, one of them before the first update of the network, leave it as it is."""
    runs = runs_of(name)
    straight = checkpoint_state(runs.output(name, "straight") / "checkpoint-4")
    for kind in ("sparse", "resumed"):
        output = runs.output(name, kind)
        assert {path.name for path in list_checkpoints(output)} <= {"checkpoint-2", "checkpoint-4"}
        assert equal(checkpoint_state(output / "checkpoint-4"), straight)
    assert read_scalars(runs.output(name, "sparse")) == read_scalars(runs.output(name, "straight"))


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_checkpoints_of_any_launch_go_on_in_any_other(runs_of, name):
    runs = runs_of(name)
    shutil.copytree(*runs.copy(name, ("straight", 2), "to-one"))
    runs.run_alone(name, "to-one", *EVERYTHING, *EACH, *RESUME)
    expected = checkpoint_state(runs.output(name, "one") / "checkpoint-4")
    for kind in ("straight", "from-parallel", "to-one"):
        state = checkpoint_state(runs.output(name, kind) / "checkpoint-4")
        assert state.keys() == expected.keys()
        for file, values in expected.items():
            if file.endswith(".safetensors"):
                assert distance(state[file], values) < 1e-4, (kind, file)
            elif file.startswith("optimizer"):
                assert state[file]["param_groups"] == values["param_groups"]
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    found, moments = (
                        {index: own[key] for index, own in optimizer["state"].items()}
                        for optimizer in (state[file], values)
                    )
                    assert distance(found, moments) < 1e-4, (kind, file, key)
            else:
                assert state[file] == values


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_sharded_plain_fine_tuning(runs_of, name):
    assert_same_run(runs_of(name), name, "finetune", "one-finetune")


@pytest.mark.long
@pytest.mark.parametrize(("kind", "one"), [("buckets", "one-buckets"), ("compiled", "one-eager")])
def test_two_processes_with_other_options_make_the_run_of_one(paired_runs, kind, one):
    """Buckets and a kernel of attention, sharded; compiled blocks, in data parallelism."""
    assert_same_run(paired_runs, "sd15", kind, one)


@pytest.mark.long
def test_sharded_stream(paired_runs):
    """Which follows from the number of processes, so that data parallelism is what has the same."""
    (first, second), (expected, _) = (paired_runs.record("sd15", kind) for kind in ("streamed", "streamed-parallel"))
    assert equal(first["weights"], second["weights"])
    for gradient, value in zip(first["gradients"], expected["gradients"], strict=True):
        assert relative(gradient, value) < 1e-4
    for network, values in zip(first["weights"], expected["weights"], strict=True):
        assert distance(network, values) < 1e-4


def test_bf16_is_as_near_to_float32_as_data_parallelism(short_runs):
    (expected,) = short_runs.record("sd3", "one-bf16")
    errors = {
        kind: relative(short_runs.record("sd3", kind)[0]["gradients"][-1], expected["gradients"][-1])
        for kind in ("bf16", "bf16-parallel")
    }
    assert 1e-4 < errors["bf16"] < 1.5 * errors["bf16-parallel"], errors


def test_kill_in_a_sharded_checkpoint_leaves_the_one_before(short_runs):
    output = short_runs.output("sd3", "killed")
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-1"]
    assert list(output.glob(".checkpoint-2-partial"))
    short_runs.run_alone("sd3", "killed", *EACH, *RESUME, "--max_train_steps", 2)
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-1", "checkpoint-2"]
    assert not list(output.glob(".checkpoint-*-partial"))


def test_full_disk_ends_both_processes(short_runs):
    """Neither waits for the other where the average and the optimizer would be gathered next."""
    errors = [file.read_text() for file in (short_runs.root / "sd3" / "full-disk").glob("error-*.txt")]
    assert len(errors) == 2 and all("checkpoint-1 could not be written" in error for error in errors)
    assert all("No space left on device" in error for error in errors)
    assert not [path for path in short_runs.output("sd3", "full-disk").iterdir() if "checkpoint" in path.name]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--use_lora",), "--shard does not go with --use_lora: what adapters train is small"),
        (("--optimizer", "adamw8bit"), "--shard divides AdamW's state, not that of --optimizer adamw8bit"),
        (("--compile",), "--shard does not go with --compile: the weights are gathered between"),
    ],
)
def test_options_that_exclude_sharding(paths, capsys, more, sentence):
    base_paths, *others = paths
    with pytest.raises(SystemExit):
        train.parse_args(short_run_options(FAMILIES["sd15"], base_paths["sd15"], *others, "out", "--shard", *more))
    assert sentence in capsys.readouterr().err


def test_one_process_is_refused(paths, tmp_path, no_weights):
    base_paths, *others = paths
    options = short_run_options(FAMILIES["sd15"], base_paths["sd15"], *others, tmp_path / "out", "--shard")
    with pytest.raises(ADTError, match="--shard divides the network among processes, and there is one"):
        train.main(train.parse_args(options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "more", "precision", "sentence"),
    [
        (
            DistributedType.FSDP,
            (),
            "bf16",
            "FSDP is not supported.*, with --shard to divide the network among the cards",
        ),
        (DistributedType.DEEPSPEED, ("--shard",), "bf16", "DEEPSPEED is not supported.*, with --shard to divide"),
        (DistributedType.MULTI_GPU, ("--shard",), "fp16", "--shard does not go with fp16.*: use bf16"),
    ],
)
def test_launches_that_are_refused(kind, more, precision, sentence):
    args = train.parse_args(["--pretrained_model_name_or_path", "x", "--dataset_name", "y", *more])
    accelerator = SimpleNamespace(
        distributed_type=kind, num_processes=2, gradient_accumulation_steps=1, mixed_precision=precision,
        device=torch.device("cuda"),
    )  # fmt: skip
    with pytest.raises(ADTError, match=sentence):
        check_launch(args, accelerator)
    accelerator.distributed_type, accelerator.mixed_precision = DistributedType.MULTI_GPU, "bf16"
    check_launch(args, accelerator)


def test_old_torch_is_refused(paths, tmp_path, no_weights, monkeypatch):
    monkeypatch.setattr(training_utils, "is_torch_version", lambda operation, version: True)
    base_paths, *others = paths
    options = short_run_options(FAMILIES["sd15"], base_paths["sd15"], *others, tmp_path / "out", "--shard")
    with pytest.raises(ADTError, match="--shard needs torch 2.8 or later; this is "):
        train.main(train.parse_args(options))


def test_related_systems_have_no_such_option(capsys):
    with pytest.raises(SystemExit):
        train_lcm.parse_args(
            ["--family", "sd15", "--pretrained_model_name_or_path", "x", "--dataset_name", "y", "--shard"]
        )
    assert "unrecognized arguments: --shard" in capsys.readouterr().err


# The launch configurations


@pytest.mark.parametrize(
    ("name", "processes", "machines"),
    [("one_card", 1, 1), ("four_cards", 4, 1), ("four_cards_sharded", 4, 1), ("two_machines", 8, 2)],
)
def test_launch_configurations(name, processes, machines):
    path = str(CONFIGS / f"{name}.yaml")
    config = load_config_from_file(path)
    assert (config.num_processes, config.num_machines, config.mixed_precision) == (processes, machines, "bf16")
    host = ["--main_process_ip", "localhost", "--machine_rank", "1"] if machines > 1 else []
    args, _, precision_from_file = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", path, *host, train.__file__])
    )
    assert precision_from_file and args.multi_gpu == (processes > 1)
    assert not any((args.use_fsdp, args.use_deepspeed, args.use_cpu))
    assert (args.num_processes, args.num_machines) == (processes, machines)
    # The comment's command names this file and a script that is there.
    comment = " ".join(line[2:].rstrip("\\") for line in Path(path).read_text().splitlines() if line[0] == "#").split()
    assert comment[comment.index("--config_file") + 1] == f"accelerate_configs/{name}.yaml"
    assert sum((CONFIGS.parent / word).is_file() and word.endswith(".py") for word in comment) == 1


def test_all_launch_configurations_are_tested():
    (mark,) = [mark for mark in test_launch_configurations.pytestmark if mark.name == "parametrize"]
    assert {case[0] for case in mark.args[1]} == {path.stem for path in CONFIGS.iterdir()}

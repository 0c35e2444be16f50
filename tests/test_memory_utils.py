"""Optimizers, gradients applied within the last backward, DoRA and a base in four bits, in runs of the scripts."""

import json
import types

import pytest
import tiny
import torch
from accelerate.optimizer import AcceleratedOptimizer
from conftest import FAMILIES
from helpers import checkpoint_state, equal, read_network, read_result, read_scalars

import memory_utils
import train_adt_sd15 as train
from memory_utils import FusedBackward, check_memory_options, optimizer_state_bytes, weights_to_use
from output_utils import load_adapters
from training_utils import ADTError, prepare_network


SHORT = ("--max_train_steps", 2, "--generator_update_interval", 1, "--checkpointing_steps", 1)
RATES = {"prodigy": ("--learning_rate", 1)}
UNCLIPPED = ("--max_grad_norm", 0)
SHORTEST = ("--pretrained_model_name_or_path", "x", "--dataset_name", "y")


@pytest.fixture
def family():
    return FAMILIES["sd15"]


def parse(*more):
    return train.parse_args([*SHORTEST, *map(str, more)])


# Refusals


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--optimizer", "sgd"), "argument --optimizer: invalid choice"),
        (("--optimizer", "prodigy"), "--learning_rate is a factor of it: give 1"),
        (("--optimizer", "prodigy", "--learning_rate", 1, "--scale_lr"), "give 1, without --scale_lr"),
        (("--optimizer", "adamw_schedulefree", "--lr_scheduler", "cosine"), "constant learning rate, not cosine"),
        (("--optimizer", "adamw_schedulefree", "--use_ema"), "leave out --use_ema"),
        (("--fused_backward_pass",), "that they are not clipped, by --max_grad_norm 0"),
        (("--fused_backward_pass", "--optimizer", "adamw_schedulefree", *UNCLIPPED), "one step for all weights"),
        (("--offload_gradients",), "--offload_gradients needs --fused_backward_pass"),
        (("--max_grad_norm", -1), "must not be negative"),
        (("--use_dora",), "--use_dora needs --use_lora"),
        (("--use_dora", "--use_lora", "--output_kohya_format"), "no place for --use_dora's magnitudes"),
        (("--use_lora", "--bnb_quantization_config_path", "nowhere"), "nowhere is no readable JSON file"),
    ],
)
def test_bad_options(capsys, more, sentence):
    with pytest.raises(SystemExit):
        parse(*more)
    assert sentence in capsys.readouterr().err


def test_configuration_in_four_bits(tmp_path, capsys):
    file = tmp_path / "bits.json"
    for config in ({"load_in_8bit": True}, [4]):
        file.write_text(json.dumps(config))
        with pytest.raises(SystemExit):
            parse("--use_lora", "--bnb_quantization_config_path", file)
        assert 'does not say "load_in_4bit": true' in capsys.readouterr().err
    file.write_text('{"load_in_4bit": true}')
    with pytest.raises(SystemExit):
        parse("--bnb_quantization_config_path", file)
    assert "--bnb_quantization_config_path needs --use_lora" in capsys.readouterr().err
    args = parse("--use_lora", "--bnb_quantization_config_path", file)
    assert args.public()["bnb_quantization_config_path"] == {"load_in_4bit": True}  # and no path
    with pytest.raises(ADTError, match="needs a GPU"):
        check_memory_options(args, accelerator("cpu"))


def accelerator(device="cuda", num_processes=1, mixed_precision="bf16"):
    device = torch.device(device)
    return types.SimpleNamespace(device=device, num_processes=num_processes, mixed_precision=mixed_precision)


@pytest.mark.parametrize(
    ("name", "package"),
    [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt"), ("adamw_schedulefree", "schedulefree")],
)
def test_missing_package(run, no_weights, monkeypatch, name, package):
    monkeypatch.setattr(memory_utils, "find_spec", lambda library: None)
    with pytest.raises(ADTError, match=f"--optimizer {name} needs {package}: pip install {package}"):
        run("--optimizer", name, *RATES.get(name, ()))


def test_fused_backward_where_it_cannot_be():
    args = parse("--fused_backward_pass", *UNCLIPPED)
    check_memory_options(args, accelerator())
    with pytest.raises(ADTError, match="is for one process"):
        check_memory_options(args, accelerator(num_processes=2))
    with pytest.raises(ADTError, match="fp16: whether a scaled gradient has overflowed"):
        check_memory_options(args, accelerator(mixed_precision="fp16"))


def test_the_name_that_earlier_scripts_have():
    assert parse("--use_8bit_adam").optimizer == "adamw8bit" and parse().optimizer == "adamw"


# Optimizers


@pytest.fixture(scope="module")
def plain_runs():
    return {}


@pytest.mark.parametrize("name", ["adamw8bit", "adafactor", "prodigy", "adamw_schedulefree"])
def test_optimizer(run, plain_runs, name, sd15_path):
    """It moves the weights, otherwise than AdamW does, and a resumed run is bitwise the uninterrupted one."""
    pytest.importorskip(memory_utils.LIBRARIES.get(name, "torch"))
    options = (*SHORT, "--optimizer", name, *RATES.get(name, ()))
    output = run(*options)
    tuned, base = read_network(output), read_network(sd15_path)
    assert all(torch.isfinite(value).all() for value in tuned.values())
    assert sum(not torch.equal(tuned[key], base[key]) for key in base) > 0.9 * len(base)
    if "adamw" not in plain_runs:
        plain_runs["adamw"] = read_network(run(*SHORT, output_dir="adamw"))
    assert not equal(tuned, plain_runs["adamw"])
    resumed = run(*options, "--resume_from_checkpoint", output / "checkpoint-1", output_dir="resumed")
    assert equal(checkpoint_state(output / "checkpoint-2"), checkpoint_state(resumed / "checkpoint-2"))
    assert equal(tuned, read_network(resumed))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor", "prodigy", "adamw_schedulefree"])
def test_size_of_the_state(name):
    pytest.importorskip(memory_utils.LIBRARIES.get(name, "torch"))
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((96, 64), (7,), (8, 4, 3, 3))]
    args = parse("--optimizer", name, *RATES.get(name, ()))
    make = memory_utils.make_library_optimizer
    optimizer = torch.optim.AdamW(parameters) if name == "adamw" else make(parameters, args)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = sum(
        value.nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and value.ndim > 0 and not key.startswith(("qmap", "absmax"))
    )
    assert optimizer_state_bytes(optimizer) == found


def test_schedule_free_weights(run):
    """The result and the validation have the average of the steps; training goes on from where it was, bitwise."""
    schedulefree = pytest.importorskip("schedulefree")
    drawn, original = [], train.Validation.draw

    def draw(self):
        drawn.append([parameter.detach().clone() for parameter in self.generator.network.parameters()])
        return original(self)

    options = (*SHORT, "--optimizer", "adamw_schedulefree")
    plain = run(*options, output_dir="plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Validation, "draw", draw)
        output = run(*options, "--validation_prompts", "a red disc", "--validation_steps", 1)
    for n in (1, 2):
        trained = checkpoint_state(plain / f"checkpoint-{n}")
        assert equal(trained, checkpoint_state(output / f"checkpoint-{n}"))
        weights = read_network(output / f"checkpoint-{n}")
        group = trained["optimizer.bin"]["param_groups"][0]
        assert group["train_mode"] and group["k"] == n
        names = [
            name
            for name, _ in train.UNet2DConditionModel.from_pretrained(
                output / f"checkpoint-{n}" / "unet"
            ).named_parameters()
        ]
        beta = group["betas"][0]
        for index, name in enumerate(names):
            average = weights[name].lerp(trained["optimizer.bin"]["state"][index]["z"], 1 - 1 / beta)
            assert torch.equal(drawn[n][index], average)
            assert n == 1 or torch.equal(read_network(output)[name], average)
    assert not equal(read_network(output), weights)
    assert schedulefree is not None


# Gradients applied within the last backward


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor"])
def test_fused_backward_pass(run, plain_runs, monkeypatch, optimizer):
    """As an update by all gradients together that are not clipped: with several backwards, and on a resumed run."""
    pytest.importorskip(memory_utils.LIBRARIES.get(optimizer, "torch"))
    options = (*SHORT, *UNCLIPPED, "--gradient_accumulation_steps", 2, "--optimizer", optimizer)
    options += RATES.get(optimizer, ())
    together = run(*options, output_dir="together")
    live, finish = [], FusedBackward.finish

    def count(self):
        live.append(sum(parameter.grad is not None for parameter in self.optimizer.param_groups[0]["params"]))
        return finish(self)

    monkeypatch.setattr(FusedBackward, "finish", count)
    fused = run(*options, "--fused_backward_pass", output_dir="fused")
    assert live == [0, 0]
    for name, value in read_network(together).items():
        assert torch.allclose(read_network(fused)[name], value, rtol=0, atol=1e-6)
    offloaded = run(*options, "--fused_backward_pass", "--offload_gradients", output_dir="offloaded")
    assert equal(checkpoint_state(offloaded / "checkpoint-2"), checkpoint_state(fused / "checkpoint-2"))
    assert read_scalars(offloaded) == read_scalars(fused)

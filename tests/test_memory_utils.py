"""Optimizers, gradients applied within the last backward, DoRA and a base in four bits, in runs of the scripts."""

import contextlib
import json
import types

import pytest
import torch
from conftest import FAMILIES, short_run_options
from helpers import NO_ACCELERATOR, checkpoint_state, equal, read_network, read_result, relative
from tiny_pipelines import save_whole_pipeline

import memory_utils
import train_adt_lora
import train_adt_sd15 as train
from benchmarks import memory
from memory_utils import FusedBackward, check_memory_options, optimizer_state_bytes
from output_utils import load_adapters
from training_utils import ADTError


SHORT = ("--max_train_steps", 2, "--generator_update_interval", 1, "--checkpointing_steps", 1)
RATES = {"prodigy": ("--learning_rate", 1)}
UNCLIPPED = ("--max_grad_norm", 0)
BF16 = ("--mixed_precision", "bf16", "--gradient_checkpointing")
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
    file.write_text('{"load_in_4bit": true, "bnb_4bit_quant_type": 4}')
    with pytest.raises(ADTError, match="is no BitsAndBytesConfig: bnb_4bit_quant_type must be a string"):
        check_memory_options(parse("--use_lora", "--bnb_quantization_config_path", file), accelerator())


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


@pytest.mark.parametrize("rung", [rung for rungs in memory.LADDERS.values() for rung in rungs])
def test_commands_of_the_ladder(tmp_path, monkeypatch, rung):
    """The scripts take them, and they mean what the ladder counts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nf4.json").write_text('{"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}')
    family = FAMILIES.get(rung.model.removesuffix("-lora"))
    script = train_adt_lora if family is None else family.train
    args = script.parse_args([*SHORTEST, *rung.options.split()])
    assert (args.optimizer, args.offload_gradients) == (rung.optimizer, rung.offload_gradients)
    assert (args.use_lora, args.train_batch_size) == (rung.model.endswith("-lora"), rung.images)
    assert (args.bnb_quantization_config_path is not None) == rung.four_bits
    assert (args.pretrained_vae_model_name_or_path is not None) == rung.half_vae
    assert args.train_batch_size * args.gradient_accumulation_steps == 8


# Optimizers


@pytest.fixture(scope="module")
def outputs():
    """{name: the output folder of a short run with this optimizer}, as the tests make them."""
    return {}


def run_with(run, outputs, name):
    if name not in outputs:
        options = ("--optimizer", name, *RATES.get(name, ())) if name != "adamw" else ()
        outputs[name] = run(*SHORT, *options, output_dir=name)
    return outputs[name]


@pytest.mark.parametrize("name", ["adamw8bit", "adafactor", "prodigy", "adamw_schedulefree"])
def test_optimizer(run, outputs, name, sd15_path):
    """It moves the weights, otherwise than AdamW does, and a resumed run is bitwise the uninterrupted one."""
    pytest.importorskip(memory_utils.LIBRARIES.get(name, "torch"))
    output = run_with(run, outputs, name)
    tuned, base = read_network(output), read_network(sd15_path)
    assert all(torch.isfinite(value).all() for value in tuned.values())
    assert sum(not torch.equal(tuned[key], base[key]) for key in base) > 0.9 * len(base)
    assert not equal(tuned, read_network(run_with(run, outputs, "adamw")))
    more = ("--optimizer", name, *RATES.get(name, ()), "--resume_from_checkpoint", output / "checkpoint-1")
    resumed = run(*SHORT, *more, output_dir="resumed")
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


def test_schedule_free_weights(run, outputs, sd15_path):
    """The result and the validation have the average of the steps; training goes on from where it was, bitwise."""
    pytest.importorskip("schedulefree")
    drawn, draw = [], train.Validation.draw

    def record_and_draw(self):
        drawn.append({name: value.clone() for name, value in self.generator.network.state_dict().items()})
        return draw(self)

    plain = run_with(run, outputs, "adamw_schedulefree")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Validation, "draw", record_and_draw)
        more = ("--validation_prompts", "a red disc", "--validation_steps", 1)
        output = run(*SHORT, "--optimizer", "adamw_schedulefree", *more)
    assert equal(drawn[0], read_network(sd15_path)) and equal(drawn[2], read_network(output))
    names = [
        name
        for name, _ in train.load_network(
            train.parse_args(["--pretrained_model_name_or_path", sd15_path, *SHORTEST[2:]]), NO_ACCELERATOR
        ).named_parameters()
    ]
    for done in (1, 2):
        state = checkpoint_state(output / f"checkpoint-{done}")
        assert equal(state, checkpoint_state(plain / f"checkpoint-{done}"))
        trained, [group] = read_network(output / f"checkpoint-{done}"), state["optimizer.bin"]["param_groups"]
        assert group["train_mode"] and group["k"] == done
        for index, name in enumerate(names):
            steps = state["optimizer.bin"]["state"][index]["z"]
            assert torch.equal(drawn[done][name], trained[name].lerp(steps, 1 - 1 / group["betas"][0]))
    assert not equal(read_network(output), trained)


# Gradients applied within the last backward


UPDATES = ["adamw", "adamw8bit", "adafactor"]


def tune_layers(name, offload=None):
    """Two updates of three backwards, the second layer without a part in the last; by `FusedBackward` or together."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(2))
    args = parse("--optimizer", name, "--learning_rate", 1e-2)
    parameters = list(layers.parameters())
    make = memory_utils.make_library_optimizer
    optimizer = torch.optim.AdamW(parameters, lr=1e-2) if name == "adamw" else make(parameters, args)
    fused = None if offload is None else FusedBackward(optimizer, offload)
    norms = []
    for _ in range(2):
        for n, used in enumerate([layers, layers, layers[:1]]):
            with contextlib.nullcontext() if fused is None else fused.applying_if(n == 2):
                sample = torch.randn(4, 64)
                for layer in used:
                    sample = layer(sample).tanh()
                sample.square().sum().backward()
            if fused is not None and (offload or n == 2):
                assert all(parameter.grad is None for parameter in (parameters if offload else parameters[:2]))
        if fused is None:
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, torch.inf))
            optimizer.step()
            optimizer.zero_grad()
        else:
            norms.append(fused.finish())
            assert all(parameter.grad is None for parameter in parameters) and not fused.waiting
    return layers.state_dict(), optimizer.state_dict()["state"], torch.stack(norms)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", UPDATES)
def test_fused_backward(name, offload):
    pytest.importorskip(memory_utils.LIBRARIES.get(name, "torch"))
    (together, state, norms), (applied, state_applied, norms_applied) = tune_layers(name), tune_layers(name, offload)
    assert equal(applied, together) and equal(state_applied, state)
    assert torch.allclose(norms_applied, norms)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_fused_backward_pass(run, family, monkeypatch):
    """A run is as without it: two micro-batches in bf16 in SD1.5, adapters in SDXL, plain fine-tuning in SD3."""
    more = {
        "sd15": ("--gradient_accumulation_steps", 2, *BF16, "--offload_gradients"),
        "sdxl": ("--use_lora", "--gradient_checkpointing", "--offload_gradients"),
        "sd3": ("--adversarial_loss_weight", 0),
    }[family.name]
    options = ("--max_train_steps", 1, "--generator_update_interval", 1, *UNCLIPPED)
    together = run(*options, *(word for word in more if word != "--offload_gradients"), output_dir="together")
    applied, apply = [], FusedBackward.apply
    monkeypatch.setattr(
        FusedBackward, "apply", lambda self, parameter: applied.append(self.last) or apply(self, parameter)
    )
    fused = read_result(run(*options, *more, "--fused_backward_pass"), family.network)
    assert applied and sum(applied) > 0.9 * len(applied)
    expected = read_result(together, family.network)
    assert all(torch.allclose(fused[name], expected[name], rtol=0, atol=1e-6) for name in expected)


def test_infinite_gradient_stops_a_fused_run(run, monkeypatch):
    apply = FusedBackward.apply

    def break_and_apply(self, parameter):
        parameter.grad.mul_(torch.inf)
        apply(self, parameter)

    monkeypatch.setattr(FusedBackward, "apply", break_and_apply)
    with pytest.raises(ADTError, match="gradient norm of the generator became (nan|inf) at iteration 1"):
        run(*SHORT, *UNCLIPPED, "--fused_backward_pass", "--adversarial_loss_weight", 0)


# Adapters over a base in four bits, and with magnitudes


@pytest.fixture
def four_bits(monkeypatch, tmp_path):
    """Options for a base in four bits, on a CPU: bitsandbytes has the arithmetic there, and diffusers does not ask."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer

    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(memory_utils, "has_four_bits", lambda device: True)
    # For an inference it packs weights anew, rounding their scales, and needs whole blocks of 64.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    file = tmp_path / "bits.json"
    file.write_text(json.dumps({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}))
    return "--use_lora", "--bnb_quantization_config_path", file


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_base_in_four_bits(run, family, four_bits, monkeypatch):
    """The base stays as it was loaded, the replay sees what the rollout saw, and a run resumes bitwise."""
    networks, frozen, seen = [], [], []
    load_network, call_network = family.train.load_network, family.train.call_network

    def state(network):
        return {name: value.clone() for name, value in network.state_dict().items() if "lora" not in name}

    def load(*args):
        networks.append(load_network(*args))
        frozen.append(state(networks[-1]))
        return networks[-1]

    def record(network, sample, timestep, condition):
        prediction = call_network(network, sample, timestep, condition)
        if timestep.ndim == 0:  # of the path; the diffusion loss has one for each image
            seen.append((torch.is_grad_enabled(), float(timestep), prediction.detach().float()))
        return prediction

    monkeypatch.setattr(family.train, "load_network", load)
    monkeypatch.setattr(family.train, "call_network", record)
    options = (*SHORT, *four_bits, "--mixed_precision", "bf16", *["--use_dora"] * (family.name == "sdxl"))
    output = run(*options)
    kinds = {name: type(module).__name__ for name, module in networks[0].named_modules()}
    assert {kinds[name] for name in kinds if name.endswith("to_q.base_layer")} == {"Linear4bit"}
    assert {p.dtype for p in networks[0].parameters() if p.requires_grad} == {torch.float32}
    assert torch.bfloat16 in {value.dtype for value in frozen[0].values()} and equal(frozen[0], state(networks[0]))
    moved = [value.norm() > 0 for name, value in read_result(output, family.network).items() if "lora_B" in name]
    assert sum(moved) > 0.7 * len(moved)  # SD3's last block makes nothing of its text tokens
    rollouts = {timestep: prediction for grad, timestep, prediction in seen if not grad}
    replays = [(timestep, prediction) for grad, timestep, prediction in seen if grad]
    assert len(replays) > 1
    for timestep, prediction in replays[-2:]:  # of one guidance branch each
        assert min(relative(prediction, branch) for branch in rollouts[timestep].chunk(2)) < 0.02
    if family.name == "sd15":
        resumed = run(*options, "--resume_from_checkpoint", output / "checkpoint-1", output_dir="resumed")
        assert equal(checkpoint_state(output / "checkpoint-2"), checkpoint_state(resumed / "checkpoint-2"))


def test_base_in_four_bits_of_any_pipeline(four_bits, dinov2_path, dataset_path, tmp_path, monkeypatch):
    """FLUX.1's adapters move over a transformer that stays as it was loaded."""
    networks, prepare = [], train_adt_lora.prepare_network

    def record(*args):
        networks.append(prepare(*args))
        return networks[-1]

    monkeypatch.setattr(train_adt_lora, "prepare_network", record)
    base = save_whole_pipeline("flux", tmp_path / "base")
    nothing_more = types.SimpleNamespace(options=())
    more = (*SHORT, *four_bits[1:], *BF16)
    options = short_run_options(nothing_more, base, dinov2_path, dataset_path, tmp_path / "out", *more)
    train_adt_lora.main(train_adt_lora.parse_args(options))
    kinds = {type(module).__name__ for name, module in networks[0].named_modules() if name.endswith("base_layer")}
    assert kinds == {"Linear4bit"}
    assert {p.dtype for p in networks[0].parameters() if p.requires_grad} == {torch.float32}
    assert all(value.norm() > 0 for value in read_result(tmp_path / "out", "transformer").values())


@pytest.mark.parametrize("family", [FAMILIES["sd15"], FAMILIES["sd3"]], ids=["sd15", "sd3"])
def test_dora(run, family, base_path):
    """Magnitudes train, and what diffusers makes of the result is what was trained."""
    output = run(*SHORT, "--use_lora", "--use_dora", "--fuse_lora")
    saved = read_result(output, family.network)
    assert sum("lora_magnitude_vector" in name for name in saved) == len(saved) // 3 > 0
    base = ("--pretrained_model_name_or_path", base_path, "--dataset_name", "x", "--use_lora", "--use_dora")
    network = family.train.load_network(family.train.parse_args(base), NO_ACCELERATOR)
    before = {name: value.clone() for name, value in network.state_dict().items() if "magnitude" in name}
    load_adapters(network, family.train.FAMILY, output)
    assert all(not torch.equal(network.state_dict()[name], value) for name, value in before.items())
    network.fuse_lora()
    network.unload_lora()
    fused = read_network(output, family.network)
    for name, value in network.state_dict().items():
        assert torch.allclose(fused[name], value, rtol=0, atol=1e-5)
    resumed = run(*SHORT, *base[4:], "--resume_from_checkpoint", output / "checkpoint-1", output_dir="resumed")
    assert equal(checkpoint_state(output / "checkpoint-2"), checkpoint_state(resumed / "checkpoint-2"))

"""Compiled networks, attention kernels, the fused optimizer, branches together, the tiny decoder, the benchmark."""

import copy
import json
import re

import bench_processes
import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from helpers import NO_ACCELERATOR, checkpoint_state, equal, read_result, read_scalars, relative, run_two_processes
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Dinov2Config, Dinov2Model

import speed_utils
from adt_utils import FeatureNetwork, SimulatedInference
from benchmarks import bench_iteration, rollouts
from training_utils import ADTError, Progress


SD15 = pytest.mark.parametrize("family", ["sd15"], indirect=True)
LORA = ("--use_lora", "--rank", 4, "--learning_rate", 1e-2)


@pytest.fixture
def train(family):
    return family.train


@pytest.fixture
def compiler():
    """PyTorch's, as in a new process."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# Compiled networks


@pytest.mark.parametrize(("family", "more"), [("sdxl", LORA), ("sd3", ())], indirect=["family"])
def test_compiled_run_is_the_same_and_compiles_once(run, family, compiler, monkeypatch, more):
    """By the tracer alone, which changes no bit; a generator update is in every second iteration."""
    graphs, log = [], Progress.log
    monkeypatch.setattr(speed_utils, "COMPILE_BACKEND", "eager")
    monkeypatch.setattr(Progress, "log", lambda *args: graphs.append(counters["stats"]["unique_graphs"]) or log(*args))
    more = (*more, "--max_train_steps", 6, "--checkpointing_steps", 6)
    plain = run(*more, output_dir="plain")
    assert graphs == [0] * 6
    compiled = run(*more, "--compile")
    assert graphs[7] > 3 and graphs[7:] == [graphs[7]] * 5
    assert not counters["graph_break"]
    # Names, too: no `_orig_mod` in them.
    assert equal(checkpoint_state(plain / "checkpoint-6"), checkpoint_state(compiled / "checkpoint-6"))
    assert equal(read_result(plain, family.network), read_result(compiled, family.network))


def gradients(output, *inputs):
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(output.square().sum(), inputs)])


def test_compiler_gives_the_gradients_of_eager(compiler, monkeypatch):
    """What the CPU's compiler makes of a denoiser's block, of the decoder and of DINOv2."""
    try:
        speed_utils.check_compiler(torch.device("cpu"))
    except ValueError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(8,), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
    ).eval()  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4).eval().requires_grad_(False)
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=16)
    features = FeatureNetwork(Dinov2Model(config), (-1, 0), 16)
    sample, condition = torch.randn(2, 4, 4, 4), torch.randn(2, 3, 8)
    latents, images = torch.randn(1, 4, 4, 4, requires_grad=True), torch.randn(2, 3, 16, 16, requires_grad=True)

    def compute(unet, vae, features):
        found = [gradients(unet(sample, 7, condition).sample, *unet.parameters())]
        found.append(gradients(vae.decode(latents).sample, latents))
        return [*found, gradients(torch.cat(features(images)), images)]

    eager = compute(*copy.deepcopy((unet, vae, features)))
    speed_utils.compile_blocks(unet)
    speed_utils.compile_whole(vae.decoder)
    speed_utils.compile_hidden_states(features.model)
    for found, expected in zip(compute(unet, vae, features), eager, strict=True):
        assert relative(found, expected) < 1e-5
    assert counters["stats"]["unique_graphs"] > 3  # with what `check_compiler` compiled


@pytest.mark.long
@SD15
def test_run_with_the_cpus_compiler(run, base_path, compiler, monkeypatch):
    """A whole run of compiled kernels: the eager one but for rounding, and nothing is compiled after the warm-up."""
    try:
        speed_utils.check_compiler(torch.device("cpu"))
    except ValueError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    graphs, log = [], Progress.log
    monkeypatch.setattr(Progress, "log", lambda *args: graphs.append(counters["stats"]["unique_graphs"]) or log(*args))
    # With so large an epsilon an update is proportional to the gradient, and rounding has no direction of its own.
    more = ("--max_train_steps", 6, "--adam_epsilon", 1e-3, "--validation_prompts", "a red disc")
    more += ("--num_validation_images", 1, "--validation_steps", 2)
    plain = run(*more, output_dir="plain")
    first = counters["stats"]["unique_graphs"]
    compiled = run(*more, "--compile", output_dir="compiled")
    # Generator updates are in every second iteration, and validations behind them.
    assert graphs[7] > graphs[6] > first and graphs[7:] == [graphs[7]] * 5
    assert counters["stats"]["unique_graphs"] == graphs[7]
    base, eager, found = (
        torch.cat([value.flatten() for _, value in sorted(read_result(path, "unet").items())])
        for path in (base_path, plain, compiled)
    )
    assert relative(found - base, eager - base) < 5e-3
    scalars, expected = read_scalars(compiled), read_scalars(plain)
    for name in ("generator_loss", "diffusion_loss", "discriminator_loss"):
        assert scalars[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    pipeline = DiffusionPipeline.from_pretrained(compiled)
    pipeline.set_progress_bar_config(disable=True)
    assert np.isfinite(pipeline("a red disc", num_inference_steps=2, output_type="np").images).all()


@SD15
def test_no_compiler_is_said_before_a_model_is_loaded(run, no_weights, compiler, monkeypatch):
    def fail(graph, inputs):
        raise FileNotFoundError("there is no C++ compiler here")

    monkeypatch.setattr(speed_utils, "COMPILE_BACKEND", fail)
    with pytest.raises(ADTError, match="--compile cannot compile for cpu: .*there is no C"):
        run("--compile")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    with pytest.raises(ADTError, match="--compile and accelerate's dynamo_backend .* give one of the two"):
        run("--compile")


def test_a_copy_of_a_compiled_network_is_its_own(monkeypatch, compiler):
    """As the base network is that related systems keep beside the tuned one."""
    monkeypatch.setattr(speed_utils, "COMPILE_BACKEND", "eager")
    network = torch.nn.Linear(2, 2)
    speed_utils.compile_whole(network)
    sample = torch.ones(1, 2)
    before = network(sample).detach()
    other = copy.deepcopy(network)
    with torch.no_grad():
        network.weight.add_(1)
    assert torch.equal(other(sample), before) and not torch.equal(network(sample), before)


# Attention


class FlashCalls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return function(*args, **(kwargs or {}))


def test_attention_backend(train, options):
    """The kernel is asked for in the recomputation that gradient checkpointing does, too."""
    predictions, calls = [], []
    for more in ((), ("--attention_backend", "math")):
        args = train.parse_args(options("--gradient_checkpointing", "--use_lora", *more))
        network = train.load_network(args, NO_ACCELERATOR).train()
        encoder = train.PromptEncoder(args, NO_ACCELERATOR)
        examples = {name: torch.tensor([[16, 16]]) for name in ("original_sizes", "crop_top_lefts")}
        examples["pixel_values"] = torch.zeros(1, 3, 16, 16)
        conditions = train.make_conditions(
            examples, encoder(["a red disc"]), encoder.negative, torch.tensor([False]), args
        )
        sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with FlashCalls() as flash:
            prediction = train.call_network(network, sample, torch.tensor([7]), conditions.positive)
            prediction.sum().backward()
        predictions.append(prediction.detach())
        calls.append(flash.count)
    assert calls[0] > 3 and calls[1] == 0
    assert not torch.equal(*predictions) and relative(*predictions) < 1e-5


def test_attention_backend_that_cannot_do_it_is_refused(train, options):
    args = train.parse_args(options("--attention_backend", "cudnn"))
    with pytest.raises(ADTError, match="--attention_backend cudnn cannot .* heads of .* channels in float32 on cpu"):
        train.load_network(args, NO_ACCELERATOR)


@SD15
@pytest.mark.parametrize(("name", "reason"), [("sage", "has no backward"), ("flash_hub", "is not for these networks")])
def test_unknown_attention_backend(train, options, capsys, name, reason):
    with pytest.raises(SystemExit):
        train.parse_args(options("--attention_backend", name))
    assert re.search(f"--attention_backend: {name} {reason}.* choose from flash, eff", capsys.readouterr().err)


# The optimizer


def test_adamw_is_fused():
    weights = [torch.nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    plain, fused = (torch.optim.AdamW([weight], lr=0.1) for weight in weights)
    speed_utils.fuse_optimizer(fused)
    assert not plain.param_groups[0]["fused"] and fused.param_groups[0]["fused"] is True
    for weight, optimizer in zip(weights, (plain, fused)):
        weight.grad = weight.detach().clone()
        optimizer.step()
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-7)
    other = torch.optim.NAdam(weights)
    speed_utils.fuse_optimizer(other)
    assert not other.param_groups[0].get("fused")


# Branches together


@SD15
def test_branches_together(run, monkeypatch):
    passes, replay = [], SimulatedInference.replay

    def counted(*args, **kwargs):
        result = replay(*args, **kwargs)
        passes.append(len(result))
        return result

    monkeypatch.setattr(SimulatedInference, "replay", counted)
    # With so large an epsilon an update is proportional to the gradient, and rounding has no direction of its own.
    short = ("--max_train_steps", 2, "--generator_update_interval", 1, "--adam_epsilon", 1e-3)
    short += ("--checkpointing_steps", 2)
    separate = run(*short, output_dir="separate")
    together = run(*short, "--replay_branches", "together")
    assert [2 * count for count in passes[2:]] == passes[:2]
    first, second = (read_result(output, "unet") for output in (separate, together))
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)
    for name in ("optimizer.bin", "optimizer_1.bin"):
        assert torch.load(together / "checkpoint-2" / name)["param_groups"][0]["fused"] is True


# A tiny decoder


@pytest.mark.parametrize("family", ["sd15", "sd3"], indirect=True)
def test_tiny_decoder_decodes_what_is_scored(run, family, tmp_path):
    short = ("--max_train_steps", 2, "--validation_prompts", "a red disc", "--num_validation_images", 1)
    decoder = tiny.make_tiny_decoder(tmp_path / "decoder")
    plain = run(*short, output_dir="plain")
    other = run(*short, "--decoder_model_name_or_path", decoder)
    before, after = read_scalars(plain), read_scalars(other)
    assert before["real_score"][1] == after["real_score"][1]  # by the same discriminator
    assert before["fake_score"][1] != after["fake_score"][1]
    assert not equal(read_result(plain, family.network), read_result(other, family.network))
    # Validation and the result have the VAE.
    for name in ("validation/base/prompt-0-0.png", "vae/diffusion_pytorch_model.safetensors"):
        assert (plain / name).read_bytes() == (other / name).read_bytes()


@SD15
def test_other_decoders_are_refused(run, train, options, base_path, tmp_path, no_weights):
    larger = tiny.make_tiny_decoder(tmp_path / "larger", levels=3)
    for path, sentence in (
        (tmp_path / "nowhere", "is not readable"),
        (f"{base_path}/vae", "is a AutoencoderKL, not an AutoencoderTiny"),
        (larger, "makes images of 4 times the side from 4 channels, and the VAE 2 from 4"),
    ):
        with pytest.raises(ADTError, match=f"--decoder_model_name_or_path .* {sentence}"):
            run("--decoder_model_name_or_path", path)
    args = train.parse_args(options("--decoder_model_name_or_path", "nowhere", "--adversarial_loss_weight", 0))
    assert train.load_decoder(args, NO_ACCELERATOR) is None


# The benchmark


@pytest.mark.parametrize(
    "family, parameters", [("sd15", 859_520_964), ("sdxl", 2_567_463_684), ("sd3", 2_028_328_000)]
)
def test_full_size_is_the_published_one(family, parameters):
    network, vae, _, resolution, shapes = bench_iteration.architecture(family, full_size=True)
    with torch.device("meta"):
        network = bench_iteration.MODULES[family].FAMILY.network_class(sample_size=resolution // 8, **network)
        vae = AutoencoderKL(**vae)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert vae.config.latent_channels == network.config.in_channels
    width = network.config.get("cross_attention_dim") or network.config.joint_attention_dim
    assert shapes["prompt_embeds"][1] == width


def test_benchmark_of_rollouts(capsys):
    with bench_processes.smallest_models():
        rollouts.main([
            "--family", "sd15", "--num_intervals", "2", "--num_steps", "5", "--num_gradient_steps", "2",
            "--discriminator_layers", "0", "--train_batch_size", "1",
        ])  # fmt: skip
    printed = capsys.readouterr().out
    args = rollouts.MODULES["sd15"].parse_args([
        "--pretrained_model_name_or_path", "none", "--dataset_name", "none", "--num_inference_steps", "5",
    ])  # fmt: skip
    lengths = [5 - rollouts.draw_path(iteration, args)[0] for iteration in range(5, 15)]
    calls = sum(lengths), max(lengths[:5]) + max(lengths[5:])
    assert f"| sd15, 1 a batch | {calls[0]} / {calls[1]} | " in printed
    ratios = [float(ratio) for ratio in re.findall(r"0\.\d+|1\.\d+", printed.splitlines()[-1])]
    assert len(ratios) >= 4 and all(0 < ratio < 2 for ratio in ratios)


def test_benchmark(tmp_path, capsys):
    file = tmp_path / "samples.json"
    bench_processes.run("--rounds", "2", "--json", str(file))
    printed, result = capsys.readouterr().out, json.loads(file.read_text())
    discriminator, generator = result["calls"]
    assert discriminator["network, gradient False"] == generator["network, gradient False"] == 2 * 3
    assert "network, gradient True" not in discriminator
    assert generator["network, gradient True"] == 2 * 2 + 1  # the branches of two steps, and the diffusion loss
    for iteration in ("discriminator iteration", "generator iteration"):
        parts = [values for name, values in result["seconds"].items() if name.startswith(f"{iteration}: ")]
        assert len(parts) == (5 if iteration[0] == "d" else 9) and all(min(values) >= 0 for values in parts)
        assert [sum(values) for values in zip(*parts)] == pytest.approx(result["seconds"][iteration])
    for name in bench_iteration.RATIOS:
        assert len(result["ratios"][name]) == 2 and f"| {name} | " in printed


def test_benchmark_of_compiled_networks(tmp_path, capsys, compiler, monkeypatch):
    """Eager and compiled columns of one run; what is compiled is never called in the eager one."""
    graphs, train = [], bench_iteration.System.train
    monkeypatch.setattr(speed_utils, "COMPILE_BACKEND", "eager")
    counted = lambda system: graphs.append(counters["stats"]["unique_graphs"]) or train(system)  # noqa: E731
    monkeypatch.setattr(bench_iteration.System, "train", counted)
    file = tmp_path / "samples.json"
    bench_processes.run("--rounds", "1", "--json", str(file), "--compile", "--without_plain_autograd")
    eager, compiled = map(json.loads, file.read_text().splitlines())
    assert graphs[1] == graphs[0] < graphs[2] == graphs[3]  # eager, compiled, eager, compiled
    assert eager["compiled_graphs"] == 0 < compiled["compiled_graphs"] and compiled["recompiled"] == 0
    assert eager["calls"] == compiled["calls"] and "--compile" in compiled["options"]
    printed = capsys.readouterr().out
    for name in bench_iteration.COMPILED:
        assert len(compiled["ratios"][f"{name} / eager"]) == 1 and f"| {name} / eager |  | " in printed


@pytest.mark.long
def test_benchmark_of_a_sharded_network(tmp_path):
    file = tmp_path / "samples.json"
    printed = run_two_processes(bench_processes.__file__, "--shard", "--rounds", "1", "--json", file)
    assert "2 processes" in printed and printed.count("| generator iteration: gather |") == 1
    (result,) = map(json.loads, file.read_text().splitlines())
    for iteration in ("discriminator iteration", "generator iteration"):
        assert result["seconds"][f"{iteration}: gather"][0] > 0
    assert "plain autograd, K graphs" not in result["seconds"]

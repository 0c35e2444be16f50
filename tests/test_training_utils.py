"""Options, engines and precision, updates and the adversary in runs of the SD1.5 script; what modules import."""

import ast
import json
import math
import re
import runpy
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from conftest import FAMILIES
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from helpers import checkpoint_state, equal, read_network, read_scalars
from torch.utils._python_dispatch import TorchDispatchMode

import train_adt_sd15 as train
import training_utils
from adt_utils import SiameseDiscriminator, update_spectral_norm
from option_utils import Nature, options_without_effect
from output_utils import list_checkpoints
from training_utils import ADTError, Totals


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def family():
    return FAMILIES["sd15"]


# Options: what they are beside their values


SHORTEST = ("--pretrained_model_name_or_path", "x", "--dataset_name", "y")


@pytest.mark.parametrize("name", FAMILIES)
def test_natures(name):
    args = FAMILIES[name].train.parse_args(SHORTEST)
    assert args.natures.keys() == vars(args).keys()
    assert args.of_nature(Nature.SECRET) == {"hub_token"}
    places = {"output_dir", "logging_dir", "cache_dir", "train_data_dir", "resume_from_checkpoint", "config"}
    assert args.of_nature(Nature.PRIVATE) - {"cache_text_embeddings"} == places
    assert args.of_nature(Nature.ADVERSARIAL) >= {option for option in vars(args) if "discriminator" in option}
    lora = {"rank", "use_dora", "bnb_quantization_config_path"}
    assert args.of_nature(Nature.LORA) == lora | {option for option in vars(args) if option.startswith("lora_")}
    assert args.of_nature(Nature.FINE_TUNING).isdisjoint(args.of_nature(Nature.ADVERSARIAL))
    # What was seen to change a run has an effect on its result.
    effective = {case[0][2:] for case in CHANGES} - args.of_nature(Nature.COUNTED)
    assert effective.isdisjoint(args.of_nature(Nature.NO_EFFECT))


def test_options_without_effect():
    """Those of the largest script, so that the report's tables leave out what the command line says has no effect."""
    args = FAMILIES["sdxl"].train.parse_args(SHORTEST)
    expected = args.of_nature(Nature.NO_EFFECT, Nature.COUNTED)
    assert options_without_effect() == expected >= {"offload_text_encoders", "hub_token"}


def test_replace_leaves_the_options_as_they_are():
    args = train.parse_args(SHORTEST)
    before = dict(vars(args))
    changed = args.replace(seed=7, max_train_steps=3)
    assert type(changed) is type(args)
    assert vars(args) == before and args.seed == 0
    assert vars(changed) == before | {"seed": 7, "max_train_steps": 3}
    assert changed.natures == args.natures and changed.of_nature(Nature.SECRET) == {"hub_token"}
    assert "natures" not in vars(args) and "natures" not in vars(changed)


# Options: each does what its help says


CHANGES = [
    ("--seed", 1), ("--max_train_samples", 3), ("--center_crop",), ("--random_flip",),
    ("--image_interpolation_mode", "nearest"), ("--proportion_empty_prompts", 1), ("--max_train_steps", 2),
    ("--generator_update_interval", 1), ("--generator_start_step", 3), ("--num_gradient_steps", 1),
    ("--gradient_path", "drtune"), ("--learning_rate", 5e-4), ("--scale_lr",), ("--lr_scheduler", "cosine"),
    ("--lr_warmup_steps", 10), ("--adam_beta1", 0.5), ("--adam_beta2", 0.5), ("--adam_weight_decay", 0.5),
    ("--adam_epsilon", 1e-3), ("--max_grad_norm", 1e-4, "--adam_epsilon", 1e-3), ("--use_ema",), ("--snr_gamma", 0.1),
    ("--noise_offset", 0.5), ("--prediction_type", "v_prediction"), ("--sampler", "euler"),
    ("--num_inference_steps", 5), ("--timestep_spacing", "trailing"), ("--guidance_scale", 2),
    ("--guidance_rescale", 0.7), ("--adversarial_loss_weight", 0.5), ("--diffusion_loss_weight", 0.1),
    ("--discriminator_layers", 0, 2), ("--discriminator_resolution", 12), ("--discriminator_norm_group", 1),
    ("--discriminator_type", "projected"), ("--discriminator_similarity", "dot"),
    ("--discriminator_reduction", "pooled"), ("--discriminator_ema_decay", 0.5),
    ("--discriminator_learning_rate", 1e-4), ("--discriminator_lr_warmup_steps", 10), ("--augmentation_policy",),
    ("--augmentation_policy", "color"), ("--mismatched_pair_weight", 1), ("--real_images", "reconstructed"),
    ("--augmentation_pairing", "shared"), ("--augmentation_pairing", "input"),
    ("--train_batch_size", 1), ("--gradient_accumulation_steps", 2), ("--mixed_precision", "bf16"),
    ("--use_lora", "--rank", 2), ("--num_train_epochs", 1, "--max_train_steps", 3),
    ("--resolution", 8, "--discriminator_resolution", 8),
]  # fmt: skip
KEEPS = [
    ("--gradient_checkpointing",), ("--dataloader_num_workers", 2), ("--allow_tf32",),
    ("--use_ema", "--offload_ema"), ("--use_ema", "--foreach_ema"), ("--lr_num_cycles", 2), ("--lr_power", 2),
    ("--ema_decay", 0.5), ("--check_images", "all"), ("--check_images", "none"),
]  # fmt: skip
ELSEWHERE = {
    "help", "pretrained_model_name_or_path", "revision", "variant", "pretrained_vae_model_name_or_path",
    "dataset_name", "dataset_config_name", "train_data_dir", "image_column", "caption_column", "cache_dir",
    "output_dir", "skip_bad_images", "adversarial_gradient_ratio", "discriminator_model_name_or_path",
    "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "validation_prompts",
    "optimizer", "fused_backward_pass", "offload_gradients", "use_dora", "bnb_quantization_config_path",
    "lora_alpha", "lora_dropout", "lora_layers", "fuse_lora", "output_kohya_format", "num_validation_images",
    "validation_steps", "max_train_time", "shard",
    "drift_tolerance", "drift_clip_model_name_or_path", "stop_on_drift",
    "report_to", "logging_dir", "tracker_project_name", "push_to_hub",
    "hub_model_id", "hub_token", "config", "dataset_split", "streaming", "shuffle_buffer_size",
    "use_aspect_ratio_buckets", "aspect_ratio_buckets",
    "compile", "attention_backend", "replay_branches", "decoder_model_name_or_path",  # tests/test_speed_utils.py
    "rollouts_per_batch",  # tests/test_families.py
}  # fmt: skip


def fingerprint(output):
    """What a run computed: its weights and everything that it logged."""
    weights = {} if (output / "pytorch_lora_weights.safetensors").exists() else read_network(output)
    return weights, read_scalars(output)


@pytest.fixture(scope="module")
def plain_runs():
    return {}


def test_every_option_is_in_one_of_the_lists(options):
    args = vars(train.parse_args(options()))
    named = {word[2:] for case in CHANGES + KEEPS for word in map(str, case) if word.startswith("--")}
    assert named | ELSEWHERE == set(args) | {"help"}


@pytest.mark.parametrize("case", CHANGES, ids=lambda case: " ".join(map(str, case)))
def test_option_changes_the_run(run, plain_runs, case):
    if "plain" not in plain_runs:
        plain_runs["plain"] = fingerprint(run(output_dir="plain"))
    assert not equal(plain_runs["plain"], fingerprint(run(*case)))


@pytest.mark.parametrize("case", KEEPS, ids=lambda case: " ".join(map(str, case)))
def test_option_keeps_the_run(run, plain_runs, case):
    name = "--use_ema" if "--use_ema" in case else "plain"
    if name not in plain_runs:
        plain_runs[name] = fingerprint(run(*(("--use_ema",) if name == "--use_ema" else ()), output_dir="plain"))
    weights, scalars = plain_runs[name]
    other_weights, other_scalars = fingerprint(run(*case))
    assert other_scalars == scalars
    for key in weights:
        assert torch.allclose(weights[key], other_weights[key], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "more"), [("cosine_with_restarts", ("--lr_num_cycles", 2)), ("polynomial", ("--lr_power", 3))]
)
def test_scheduler_options(run, kind, more):
    plain = read_scalars(run("--lr_scheduler", kind, output_dir="plain"))["discriminator_lr"]
    assert plain != read_scalars(run("--lr_scheduler", kind, *more))["discriminator_lr"]


def test_ema_decay(run):
    common = ("--use_ema", "--generator_update_interval", 1, "--max_train_steps", 4)
    low = read_network(run(*common, "--ema_decay", 0.1, output_dir="low"))
    assert not equal(low, read_network(run(*common, "--ema_decay", 0.9)))


def test_num_train_epochs(options, tmp_path):
    arguments = options("--num_train_epochs", 2)
    at = arguments.index("--max_train_steps")
    del arguments[at : at + 2]
    args = train.parse_args(arguments)
    assert args.max_train_steps is None
    train.main(args)
    facts = json.loads((tmp_path / "out" / "adt_config.json").read_text())
    assert facts["iterations"] == 8  # 2 epochs of 8 images in batches of 2
    assert args.max_train_steps is None  # the caller's options stay as they were


def test_scale_lr(options, tmp_path):
    args = train.parse_args(options("--scale_lr", "--gradient_accumulation_steps", 2))
    train.main(args)
    trained_with = json.loads((tmp_path / "out" / "adt_config.json").read_text())["training_options"]
    rates = trained_with["learning_rate"], trained_with["discriminator_learning_rate"]
    assert rates == pytest.approx((4e-3, 4e-3)) and trained_with["scale_lr"] is False
    assert (args.learning_rate, args.discriminator_learning_rate, args.scale_lr) == (1e-3, 1e-3, True)


# Bad options, and what a machine cannot do


def fails(options, *more, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(options(*more))
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--dataset_name", "x"), "either --dataset_name or --train_data_dir"),
        (("--train_data_dir", "nowhere"), "argument --train_data_dir: nowhere is not a folder"),
        (("--output_dir", __file__), "argument --output_dir: .* is a file"),
        (("--sampler", "unipc"), "UniPC's corrector reuses stored samples"),
        (("--sampler", "heun"), "second stage"),
        (("--sampler", "ddpn"), r"not known; choose from ddim, dpmsolver\+\+, euler"),
        (("--num_gradient_steps", 0), "argument --num_gradient_steps: must be greater than 0, not 0"),
        (("--train_batch_size", -1), "argument --train_batch_size: must be greater than 0, not -1"),
        (
            ("--adversarial_loss_weight", "much"),
            "argument --adversarial_loss_weight: much is neither a number nor auto",
        ),
        (("--adversarial_loss_weight", -1), "argument --adversarial_loss_weight: must not be negative, not -1"),
        (("--adversarial_loss_weight", "auto", "--diffusion_loss_weight", 0), "needs a diffusion loss"),
        (("--discriminator_norm_group", 3), "does not divide"),
        (("--mismatched_pair_weight", 1, "--discriminator_type", "projected"), "a discriminator that sees the pair"),
        (("--mismatched_pair_weight", -1), "must not be negative"),
        (("--mismatched_pair_weight", 1, "--augmentation_pairing", "shared"), "the augmentation would tell"),
        (("--stop_on_drift", "--validation_prompts", "a"), "needs an adversary and at least two --validation_prompts"),
        (("--stop_on_drift", "--validation_prompts", "a", "b", "--adversarial_loss_weight", 0), "needs an adversary"),
        (("--drift_clip_model_name_or_path", "x", "--validation_prompts", "a"), "at least two --validation_prompts"),
        (("--proportion_empty_prompts", 1.5), r"argument --proportion_empty_prompts: must lie in \[0, 1\], not 1.5"),
        (("--guidance_scale", "nan"), "argument --guidance_scale: must not be negative, not nan"),
        (("--fuse_lora",), "--fuse_lora needs --use_lora"),
        (("--output_kohya_format",), "--output_kohya_format needs --use_lora"),
        (("--hub_token", "hf_x\nhf_y"), "argument --hub_token: must be one word of printable ASCII$"),
        (("--hub_token", "hf_x", "--report_to", "wandb"), "--hub_token would reach wandb"),
        (("--hub_token", "hf_x", "--report_to", "all"), "--hub_token would reach all"),
        (("--rollouts_per_batch", 3), "3 is more than --generator_update_interval 2: after an update the generator"),
        (("--rollouts_per_batch", 2, "--compile"), "does not go with --compile: each number of images"),
        (("--rollouts_per_batch", 2, "--streaming"), "does not go with --streaming: a checkpoint among those"),
        (
            ("--rollouts_per_batch", 2, "--use_aspect_ratio_buckets", "--aspect_ratio_buckets", "16,16"),
            "does not go with --use_aspect_ratio_buckets: the iterations' images differ in size",
        ),
    ],
)
def test_bad_options(options, capsys, more, sentence):
    assert re.search(sentence, fails(options, *more, capsys=capsys))


@pytest.mark.parametrize(
    ("together", "more", "groups"),
    [
        (1, (), [1] * 8),
        (3, (), [3, 2, 3]),  # an interval of 5, and the run's end
        (5, ("--generator_start_step", 7), [5, 3]),
        (5, ("--adversarial_loss_weight", 0), [1] * 8),
    ],
)
def test_rollout_groups(options, together, more, groups):
    sizes = ("--rollouts_per_batch", together, "--generator_update_interval", 5, "--max_train_steps", 8)
    args, first = train.parse_args(options(*sizes, *more)), 0
    for size in groups:
        group = range(first, first + size)
        assert all(training_utils.rollout_group(iteration, args) == group for iteration in group)
        if args.adversarial:
            assert not any(training_utils.is_generator_iteration(iteration, args) for iteration in group[:-1])
        first = group.stop
    assert first == args.max_train_steps


def test_no_dataset(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--pretrained_model_name_or_path", "x"])
    assert "give either --dataset_name or --train_data_dir" in capsys.readouterr().err


# Engines and precision


def test_sharded_engines_are_refused(run, monkeypatch):
    monkeypatch.setattr(training_utils.Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ADTError, match="DEEPSPEED is not supported"):
        run()


def test_another_accumulation_than_the_options_is_refused(run, no_weights, monkeypatch):
    """accelerate divides by its own count, and the variable overrides what it is told."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ADTError, match="accelerate accumulates 4 .* --gradient_accumulation_steps is 1"):
        run()


def test_float16_without_a_gpu_is_refused(run, no_weights):
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ADTError, match="fp16 needs a GPU"):
        run("--mixed_precision", "fp16")


@pytest.mark.parametrize(("precision", "count"), [("no", 1), ("bf16", 0)])
def test_float32_on_a_mac_is_said(caplog, precision, count):
    accelerator = types.SimpleNamespace(
        distributed_type=DistributedType.NO, gradient_accumulation_steps=1, device=torch.device("mps"),
        mixed_precision=precision,
    )  # fmt: skip
    training_utils.Accelerator()  # whose state accelerate's logger asks for
    training_utils.check_launch(types.SimpleNamespace(gradient_accumulation_steps=1, shard=False), accelerator)
    assert [message for message in caplog.messages if "the run is in float32" in message] == caplog.messages
    assert len(caplog.messages) == count


def test_compiled_run_is_the_same(run, monkeypatch):
    """As `accelerate launch --dynamo_backend` wraps networks: twins stay frozen, checkpoints have the usual layout."""
    compiled = []

    def compile_nothing(network, **options):
        compiled.append(torch._dynamo.disable(network))  # wraps it as torch.compile does
        return compiled[-1]

    short = ("--max_train_steps", 2, "--checkpointing_steps", 1)
    plain = run(*short, output_dir="plain")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    monkeypatch.setattr(torch, "compile", compile_nothing)
    run(*short, "--max_train_steps", 1)
    output = run(*short, "--resume_from_checkpoint", "latest")
    assert [type(network).__name__ for network in compiled] == ["OptimizedModule"] * 4
    assert equal(checkpoint_state(plain / "checkpoint-2"), checkpoint_state(output / "checkpoint-2"))
    assert equal(read_network(plain), read_network(output))


@pytest.mark.parametrize(("platform", "gigabytes"), [("linux", 3e3 * 1024), ("darwin", 3e3), ("win32", 5.0)])
def test_peak_memory_by_platform(monkeypatch, platform, gigabytes):
    resource = types.SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: types.SimpleNamespace(ru_maxrss=3e12))
    memory = types.SimpleNamespace(peak_wset=5e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setitem(sys.modules, "resource", None if platform == "win32" else resource)
    monkeypatch.setattr(training_utils.psutil, "Process", lambda: types.SimpleNamespace(memory_info=lambda: memory))
    assert training_utils.peak_memory_gb() == gigabytes


def test_modules_import_where_there_is_no_resource_module(monkeypatch):
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "resource", None)
    for name in UTILS:
        runpy.run_path(str(ROOT / f"{name}.py"))


def test_mixed_precision_keeps_float32_weights(run):
    plain, mixed = run(output_dir="plain"), run("--mixed_precision", "bf16", output_dir="mixed")
    assert {value.dtype for value in read_network(mixed).values()} == {torch.float32}
    first, second = read_scalars(plain), read_scalars(mixed)
    assert second["diffusion_loss"][2] == pytest.approx(first["diffusion_loss"][2], rel=0.05)
    assert second["diffusion_loss"] != first["diffusion_loss"]


class CountCasts(TorchDispatchMode):
    """How often each weight of a network is cast while the mode is on."""

    def __init__(self, network):
        super().__init__()
        self.counts = {parameter.data_ptr(): 0 for parameter in network.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.counts:
            self.counts[args[0].data_ptr()] += 1
        return function(*args, **(kwargs or {}))


def test_rollout_casts_each_weight_once(run, monkeypatch, sd15_path):
    """And the casts end with it: they have no gradient, and a weight that was used without one would not move."""
    networks, counts = [], []
    load_network, roll_out = train.load_network, train.roll_out

    def load(*arguments):
        networks.append(load_network(*arguments))
        return networks[-1]

    def counted(micro_batches, *others):
        with CountCasts(networks[0]) as casts:
            roll_out(micro_batches, *others)
        assert all(batch.rollout.latents.dtype == torch.float32 for (batch,) in micro_batches.values())
        counts.append(casts.counts)

    monkeypatch.setattr(train, "load_network", load)
    monkeypatch.setattr(train, "roll_out", counted)
    bf16 = ("--mixed_precision", "bf16", "--generator_update_interval", 1, "--max_train_steps", 1, "--seed", 2)
    tuned, base = read_network(run(*bf16)), read_network(sd15_path)
    assert {*counts[0].values()} == {0, 1} and sum(counts[0].values()) > 100
    assert all(not torch.equal(tuned[name], base[name]) for name in base)


def test_mixed_precision_of_latents_and_records(run, monkeypatch):
    seen = []
    original = StableDiffusionPipeline.prepare_latents

    def prepare_latents(*args, **kwargs):
        seen.append(original(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(StableDiffusionPipeline, "prepare_latents", prepare_latents)
    bf16 = ("--mixed_precision", "bf16", "--checkpointing_steps", 4)
    output = run("--validation_prompts", "a red disc", *bf16)
    assert seen and {latents.dtype for latents in seen} == {torch.float32}
    facts = json.loads((output / "adt_config.json").read_text())
    assert (facts["mixed_precision"], facts["global_batch_size"], facts["num_processes"]) == ("bf16", 2, 1)
    with pytest.raises(ADTError, match=r"mixed_precision bf16 \(now no\)"):
        run("--resume_from_checkpoint", "latest")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch --mixed_precision bf16` says it
    run("--resume_from_checkpoint", "latest")


# Updates and the adversary


class Processes:
    """Stands for accelerate where all of `num_processes` processes have the same values."""

    def __init__(self, num_processes):
        self.num_processes = num_processes

    def reduce(self, values, reduction):
        assert reduction == "mean"
        return values


# The norm of the global batch's gradient, a mean over all micro-batches: |(3, 4)| / 2 and |(3, 4, 3, 4)| / 4.
@pytest.mark.parametrize(("num_processes", "norm"), [(1, 5 / 2), (2, 50**0.5 / 4)])
def test_totals(num_processes, norm):
    totals = Totals(2)
    for loss, value in ((1.0, 3.0), (2.0, 4.0)):
        totals.add_means(loss=torch.tensor(loss, requires_grad=True))
        totals.add_squared_norms(norm=torch.tensor(value).square())
    assert totals.reduce(Processes(num_processes), iteration=0) == pytest.approx({"loss": 1.5, "norm": norm})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["means", "squared_norms"])
def test_totals_name_a_value_that_is_not_finite(kind, value):
    totals = Totals(1)
    totals.add_means(generator_loss=torch.tensor(1.0))
    getattr(totals, f"add_{kind}")(diffusion_value=torch.tensor(value))
    with pytest.raises(ADTError, match=f"The diffusion value became {value} at iteration 3"):
        totals.reduce(Processes(1), iteration=2)


def test_generator_warm_up_counts_generator_updates(run):
    scalars = read_scalars(run("--lr_warmup_steps", 4, "--discriminator_lr_warmup_steps", 2))
    assert list(scalars["lr"].values()) == pytest.approx([0, 0.25e-3, 0.25e-3, 0.5e-3])
    assert list(scalars["discriminator_lr"].values()) == pytest.approx([0.5e-3, 1e-3, 1e-3, 1e-3])


@pytest.mark.parametrize(("name", "iteration"), [("generator", 2), ("discriminator", 1)])
def test_infinite_gradient_stops_the_run_before_the_step(run, tmp_path, monkeypatch, name, iteration):
    """A finite loss may have a gradient that is not, which would spoil every weight through the clipping."""
    cls = UNet2DConditionModel if name == "generator" else SiameseDiscriminator
    original = cls.train

    def break_and_train(self, mode=True):  # after the weights are loaded and before the first update
        if not hasattr(self, "broken"):
            self.broken = True
            next(p for p in self.parameters() if p.requires_grad).register_hook(lambda gradient: gradient * math.inf)
        return original(self, mode)

    monkeypatch.setattr(cls, "train", break_and_train)
    monkeypatch.setattr(
        train, "update_spectral_norm", lambda discriminator: update_spectral_norm(discriminator.train())
    )
    with pytest.raises(ADTError, match=f"gradient norm of the {name} became (nan|inf) at iteration {iteration}"):
        run("--checkpointing_steps", 1)
    assert len(list_checkpoints(tmp_path / "out")) == iteration - 1


def test_skipped_step_moves_nothing(run, monkeypatch):
    """float16's loss scaling skips a step that overflowed: averages and schedules must not move then."""
    twins = []
    monkeypatch.setattr(AcceleratedOptimizer, "step", lambda self: None)
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", True)
    monkeypatch.setattr(SiameseDiscriminator, "update_twin", lambda self: twins.append(1))
    output = run("--use_ema", "--lr_warmup_steps", 2, "--checkpointing_steps", 4)
    state = json.loads((output / "checkpoint-4" / "unet_ema" / "ema.json").read_text())
    assert state["optimization_step"] == 0 and twins == []
    assert set(read_scalars(output)["lr"].values()) == {0}


# Modules


UTILS = (
    "adt_utils",
    "bucket_utils",
    "config_utils",
    "sharding_utils",
    "speed_utils",
    "option_utils",
    "memory_utils",
    "training_utils",
    "streaming_utils",
    "data_utils",
    "adversary_utils",
    "disk_utils",
    "output_utils",
)  # each may import those before it


def imports_of(module):
    """The modules of this repository that a module of it imports, wherever in its code."""
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module)
    return imported & {path.stem for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("module", UTILS)
def test_utils_import_one_way(module):
    assert imports_of(module) <= set(UTILS[: UTILS.index(module)])


@pytest.mark.parametrize("script", sorted(path.stem for path in ROOT.glob("train_adt_*.py")))
def test_scripts_import_no_script(script):
    assert imports_of(script) <= {*UTILS, "adt_pipeline"}


# The decoder


@pytest.mark.parametrize(("checkpointing", "with_gradient"), [(False, 2), (True, 3)])
def test_forwards_of_the_decoder(monkeypatch, checkpointing, with_gradient):
    """One without a gradient; else one more in the backward, and a third of blocks that are checkpointed, too."""
    vae = tiny.make_vae().requires_grad_(False)
    if checkpointing:
        vae.enable_gradient_checkpointing()
    counts = {"decoder": 0, "block": 0}
    for name, module in (("decoder", vae.decoder.conv_in), ("block", vae.decoder.up_blocks[1].resnets[0].conv1)):
        module.register_forward_hook(lambda *arguments, name=name: counts.update({name: counts[name] + 1}))
    checkpointed, checkpoint = [], training_utils.checkpoint
    monkeypatch.setattr(
        training_utils, "checkpoint", lambda *args, **kwargs: checkpointed.append(args) or checkpoint(*args, **kwargs)
    )
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = training_utils.decode_checkpointed(vae, latents)
    assert counts == {"decoder": 2, "block": 2} and not checkpointed and not plain.requires_grad
    images = training_utils.decode_checkpointed(vae, latents.requires_grad_())
    images.sum().backward()
    assert torch.equal(images, plain) and len(checkpointed) == 2
    assert counts == {"decoder": 2 + 4, "block": 2 + 2 * with_gradient}

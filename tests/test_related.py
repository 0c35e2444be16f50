"""What every script of `related/` must show, on tiny models of the families' real classes."""

import json
import re
import signal
from dataclasses import dataclass
from itertools import product
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import two_processes
from accelerate import Accelerator
from conftest import FAMILIES, reset_accelerate
from diffusers import DiffusionPipeline
from helpers import (
    checkpoint_state,
    equal,
    plain_options,
    read_network,
    read_result,
    read_scalars,
    relative,
    run_two_processes,
    run_until_signal,
)
from huggingface_hub import ModelCard
from PIL import Image

from output_utils import KOHYA_ADAPTERS
from related import train_add, train_hybrid, train_lcm, train_robust
from related.related_utils import Perturbation
from training_utils import ADTError


LORA = ("--use_lora", "--rank", 4, "--learning_rate", 1e-2)


@dataclass
class System:
    """A script, its card's tag, and the options of a short run in which all its networks visibly move."""

    script: ModuleType
    tag: str
    options: str
    families: tuple = tuple(FAMILIES)


SYSTEMS = {
    "add": System(
        train_add,
        "adversarial-diffusion-distillation",
        "--discriminator_layers -1 1 3 --discriminator_resolution 16 --discriminator_learning_rate 1e-3 "
        "--mismatched_pair_weight 0.5 --r1_weight 1",  # the default's 1e-5 would hide in rounding
    ),
    "hybrid": System(
        train_hybrid,
        "diffusion-gan",
        "--discriminator_resolution 12 --discriminator_learning_rate 1e-2 --generator_start_step 1 "
        "--hybrid_loss_weight 1 --hybrid_ramp_steps 2 --num_inference_steps 4 --freeze_blocks mid_block.* "
        "--curriculum_end 0.5",  # else the length of a run counts
        ("sd15", "sdxl"),
    ),
    # The default makes the loss nearly an absolute value, which two processes round to different signs. Without
    # perturbations it is what `test_train_lcm.py` runs.
    "lcm": System(train_lcm, "latent-consistency-model", "--huber_c 0.1 --robust_steps 2 --robust_step_size 0.05"),
    "robust": System(train_robust, "robust-diffusion-training", "--robust_step_size 0.05 --num_inference_steps 4"),
    "input": System(train_robust, "robust-diffusion-training", "--robust_steps 1 --input_perturbation 0.1", ("sd15",)),
}
CASES = [(name, family) for name, system in SYSTEMS.items() for family in system.families]
BASELINE = ("input", "sd15")  # a loop of its own, and nothing else


def cases(*families, without=(BASELINE,)):
    """For a test of what does not differ between the others."""
    chosen = [case for case in CASES if case[1] in families and case not in without]
    return pytest.mark.parametrize("case", chosen, ids="-".join)


@pytest.fixture
def system(case):
    return SYSTEMS[case[0]]


@pytest.fixture
def family(case):
    return FAMILIES[case[1]]


@pytest.fixture
def options(system, family, base_path, dinov2_path, resnet_path, dataset_path, tmp_path):
    def make(*more, output_dir="out"):
        network = {train_add: dinov2_path, train_hybrid: resnet_path}.get(system.script)
        networks = () if network is None else ("--discriminator_model_name_or_path", network)
        words = [
            "--family", family.name, "--pretrained_model_name_or_path", base_path, "--train_data_dir", dataset_path,
            "--resolution", 16, "--train_batch_size", 2, "--max_train_steps", 4, "--learning_rate", 1e-3,
            "--lr_warmup_steps", 0, "--checkpointing_steps", 100, *family.options, *system.options.split(), *networks,
            "--dataloader_num_workers", 0, "--output_dir", tmp_path / output_dir, *more,
        ]  # fmt: skip
        return [str(word) for word in words]

    return make


@pytest.fixture
def run(options, system, tmp_path):
    def run(*more, output_dir="out"):
        reset_accelerate()
        system.script.main(system.script.parse_args(options(*more, output_dir=output_dir)))
        return tmp_path / output_dir

    return run


@pytest.fixture
def network(family):
    """The trained component's name, and so its folder's."""
    return family.network


CALL = ("num_inference_steps", "guidance_scale", "max_sequence_length")


def sample(output):
    """An image (3, H, W) of a run's result, by the call that its `adt_config.json` states; it must be finite."""
    pipeline = DiffusionPipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    facts = json.loads((output / "adt_config.json").read_text())["inference"]
    call = {name: value for name, value in facts.items() if name in CALL}
    if facts.get("stochastic_sampling", False):  # a few-step student's; else they are there for comparison
        call["sigmas"] = facts["sigmas"]
    generator = torch.Generator().manual_seed(0)
    [image] = pipeline("a red disc", generator=generator, output_type="pt", **call).images
    assert image.isfinite().all() and image.std() > 0
    return image


# The main job


@pytest.fixture
def check_card(system, tmp_path, monkeypatch):
    """The card's tags are the script's own, and its snippet draws an image as it stands."""

    def check(output, lora=False):
        card = (output / "README.md").read_text()
        tags = set(ModelCard(card).data.tags)
        assert system.tag in tags and "adversarial-diffusion-tuning" not in tags and ("lora" in tags) == lora
        assert (output / KOHYA_ADAPTERS).exists() == (KOHYA_ADAPTERS in card) == lora
        [code] = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
        monkeypatch.chdir(tmp_path)
        exec(code, {})
        with Image.open(tmp_path / "image.png") as image:
            assert np.asarray(image).std() > 0

    return check


@cases(*FAMILIES)
def test_writes_a_pipeline_that_loads(run, base_path, network, check_card):
    prompts = ("--validation_prompts", "a red disc", "--num_validation_images", 2, "--validation_steps", 2)
    output = run(*prompts)
    assert sample(output).shape == (3, 16, 16)
    check_card(output)
    base, tuned = read_network(base_path, network), read_network(output, network)
    trained = [name for name in base if name.endswith("weight") and "mid_block" not in name]  # the hybrid freezes it
    assert all(not torch.equal(base[name], tuned[name]) for name in trained)
    grids = sorted(path.name for path in (output / "validation").glob("*.png"))
    assert grids == ["iteration-000002-prompt-0.png", "iteration-000004-prompt-0.png"]


@cases(*FAMILIES)
def test_writes_adapters_that_load(run, check_card):
    check_card(run(*LORA, "--output_kohya_format", "--max_train_steps", 2), lora=True)


# Resuming, processes, memory, precision


@cases("sd15", "sd3", without=())
@pytest.mark.parametrize("more", [("--use_ema",), LORA], ids=["full", "lora"])
def test_resumed_run_equals_uninterrupted_run(run, case, network, tmp_path, more):
    """Adapters' is stopped by Ctrl-C, and the other ends in between."""
    if more is LORA and (case[1] == "sd3" or case == BASELINE):
        pytest.skip("adapters are saved and loaded as SD1.5's are")
    prompts = ("--validation_prompts", "a red disc", "--num_validation_images", 1, "--validation_steps", 2)
    more = (*more, *prompts, "--checkpointing_steps", 2)
    full = run(*more, output_dir="full")
    half = tmp_path / "half"
    if "--use_lora" in more:
        run_until_signal(run, 1, *more, "--checkpointing_steps", 3, number=signal.SIGINT, output_dir="half")
    else:
        run(*more, "--max_train_steps", 2, output_dir="half")
    moved = checkpoint_state(half / "checkpoint-2")
    resumed = run(*more, "--resume_from_checkpoint", "latest", output_dir="half")
    assert equal(checkpoint_state(full / "checkpoint-4"), checkpoint_state(resumed / "checkpoint-4"))
    assert not equal(moved, checkpoint_state(resumed / "checkpoint-4"))
    assert read_scalars(full) == read_scalars(resumed)
    assert equal(read_result(full, network), read_result(resumed, network))
    grids = [directory / "validation" / "iteration-000004-prompt-0.png" for directory in (full, resumed)]
    assert grids[0].read_bytes() == grids[1].read_bytes()


@cases("sd15", without=())
def test_processes_and_micro_batches_give_the_same_run(system, options, tmp_path):
    common = ("--seed", 2, "--random_flip", "--max_train_steps", 3, "--learning_rate", 2e-4)
    if system.script is train_add:
        common += ("--discriminator_norm_group", 2)
    if system.script in (train_add, train_hybrid):
        common += ("--discriminator_learning_rate", 2e-4)
    pair = options(*common, "--train_batch_size", 2, output_dir="pair")
    name = system.script.__name__
    run_two_processes(two_processes.__file__, name, tmp_path / "record-pair", *pair)
    ranks = [torch.load(tmp_path / "record-pair" / f"rank-{rank}.pt") for rank in range(2)]
    assert equal(ranks[0]["weights"], ranks[1]["weights"])
    records = {"pair": ranks[0]}
    for name, sizes in {
        "one": ("--train_batch_size", 4),
        "micro": ("--train_batch_size", 2, "--gradient_accumulation_steps", 2),
    }.items():
        reset_accelerate()
        two_processes.record(system.script, tmp_path / f"record-{name}", options(*common, *sizes, output_dir=name))
        records[name] = torch.load(tmp_path / f"record-{name}" / "rank-0.pt")
    for name in ("pair", "micro"):
        for gradient, expected in zip(records[name]["gradients"], records["one"]["gradients"], strict=True):
            assert relative(gradient, expected) < 1e-4, name


@cases(*FAMILIES)
def test_one_network_graph_at_a_time(run, system, family, monkeypatch):
    """Of the network that trains: each forward that keeps a graph is followed by its backward."""
    alive = []
    call_network, backward = family.train.call_network, Accelerator.backward

    def counting_call(*args):
        alive[-1] += torch.is_grad_enabled()
        return call_network(*args)

    def counting_backward(accelerator, loss):
        backward(accelerator, loss)
        alive.append(0)

    alive.append(0)
    monkeypatch.setattr(family.train, "call_network", counting_call)
    monkeypatch.setattr(Accelerator, "backward", counting_backward)
    run("--gradient_accumulation_steps", 2, "--max_train_steps", 2)
    assert max(alive) == 1 and sum(alive) >= 2  # the hybrid begins in its second iteration


PERTURBED = [*product(("robust", "lcm"), ("sd15", "sd3"))]


@cases(*FAMILIES, without=(BASELINE, *PERTURBED))
def test_half_precision(run, network):
    """Adapters over lighter weights, in bfloat16; see below for the others."""
    check_moved(read_result(run(*LORA, "--mixed_precision", "bf16"), network))


def check_moved(adapters):
    assert all(value.isfinite().all() for value in adapters.values())
    assert any(value.abs().max() > 0 for name, value in adapters.items() if "lora_B" in name)


@pytest.mark.parametrize("case", PERTURBED, ids="-".join)
@pytest.mark.parametrize("more", [(), LORA], ids=["full", "lora"])
def test_perturbation_reaches_the_network_in_half_precision(run, system, network, monkeypatch, more):
    """The first layer's output moves by float32's own difference, of which half precision would lose a part."""
    inputs, deltas, moves = [], [], {}
    prepare, ascend = system.script.prepare_generator, Perturbation.ascend

    def watched_generator(trained, run):
        generator = prepare(trained, run)
        layer = trained.conv_in if hasattr(trained, "conv_in") else trained.pos_embed.proj

        def watch(layer, given, output):
            if not trained.training:  # the target's pass, or the teacher's
                return
            inputs.append(given[0].detach())
            if len(inputs) == 2:  # the second pass, whose weights have moved
                clean, perturbed = inputs
                moves["found"] = output - layer.forward(clean)
                half = [torch.nn.Conv2d.forward(layer, sample) for sample in (perturbed, clean)]
                moves["half"] = half[0] - half[1]
                weight = layer.weight.double()
                moves["intended"] = F.conv2d(deltas[0], weight, stride=layer.stride, padding=layer.padding)

        layer.register_forward_hook(watch)
        return generator

    def watched_ascend(perturbation):
        ascend(perturbation)
        deltas.append(perturbation.delta.detach().double())

    monkeypatch.setattr(system.script, "prepare_generator", watched_generator)
    monkeypatch.setattr(Perturbation, "ascend", watched_ascend)
    passes = ("--robust_steps", 2, "--robust_step_size", 0.0018, "--max_train_steps", 1)
    output = run(*more, *passes, "--mixed_precision", "bf16")
    moves = {name: move.detach().double().flatten() for name, move in moves.items()}
    cosines = {name: F.cosine_similarity(move, moves["intended"], dim=0).item() for name, move in moves.items()}
    assert cosines["found"] > 0.99 and cosines["half"] < 0.95, cosines
    if more is LORA:
        check_moved(read_result(output, network))


# Options and bad input


@cases("sd15", "sd3")
def test_validation_draws_alike_each_time(run):
    """By a sampler that adds noise, too."""
    output = run("--validation_prompts", "a red disc", "--num_validation_images", 1, "--learning_rate", 1e-30)
    grid = Image.open(output / "validation" / "iteration-000004-prompt-0.png")
    assert grid.crop((0, 0, 16, 16)).tobytes() == grid.crop((0, 16, 16, 32)).tobytes()


GUIDED_SAMPLING = {"sampler", "timestep_spacing", "guidance_rescale"}
DIFFUSION_LOSS = {
    "snr_gamma", "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "proportion_empty_prompts",
    "noise_offset",
}  # fmt: skip
ROBUST = {"robust_steps", "robust_step_size", "robust_step_unit", "robust_radius"}
OPTIONS = {  # a script's own, and what it has no use for of plain fine-tuning's
    "add": (
        {"adversarial_weight", "distillation_weight", "distillation_target", "distillation_space",
         "teacher_guidance_scale", "discriminator_model_name_or_path", "discriminator_layers",
         "discriminator_resolution", "discriminator_norm_group", "discriminator_condition", "mismatched_pair_weight",
         "r1_weight", "discriminator_learning_rate", "discriminator_lr_warmup_steps"},
        GUIDED_SAMPLING | DIFFUSION_LOSS | {"guidance_scale", "lora_dropout"},
    ),
    "lcm": (ROBUST | {"w_min", "w_max", "huber_c"}, GUIDED_SAMPLING | DIFFUSION_LOSS),
    "robust": (ROBUST | {"input_perturbation"}, set()),
}  # fmt: skip


@pytest.mark.parametrize("case", [*product(OPTIONS, FAMILIES)], ids="-".join)
def test_help_has_what_acts(case, system, family, capsys):
    """Of the family's script what plain fine-tuning uses, and `OPTIONS`; for the hybrid see its own tests."""
    with pytest.raises(SystemExit):
        system.script.parse_args(["--family", family.name, "--help"])
    shown = set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE))
    own, absent = OPTIONS[case[0]]
    assert shown == plain_options(family.train) - absent | own | {"family"}


@cases("sd15")
def test_family_is_asked_for(system, capsys):
    with pytest.raises(SystemExit):
        system.script.parse_args(["--help"])
    assert "With it, --help shows all options." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        system.script.parse_args(["--pretrained_model_name_or_path", "x"])
    assert "error: give --family." in capsys.readouterr().err


@cases("sd15")
def test_family_of_a_file(system, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text("family: sd15\npretrained_model_name_or_path: x\ndataset_name: y\n")
    assert system.script.parse_args(["--config", str(file)]).family == "sd15"
    file.write_text("family: sd16\n")
    with pytest.raises(SystemExit):
        system.script.parse_args(["--config", str(file)])
    assert "family must be one of sd15" in capsys.readouterr().err


@cases("sd15")
def test_bad_input_is_refused_before_weights_are_loaded(run, no_weights, tmp_path):
    for more, sentence in {
        ("--pretrained_model_name_or_path", tmp_path / "none"): "is not a readable pipeline",
        ("--caption_column", "caption"): "--caption_column caption is not a column of the dataset",
        ("--resolution", 17): "--resolution 17 is not divisible by",
        ("--use_lora", "--lora_layers", "to_z"): "--lora_layers to_z is no linear",
    }.items():
        with pytest.raises(ADTError, match=re.escape(sentence)):
            run(*more)

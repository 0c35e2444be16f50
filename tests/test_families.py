"""What every script must show, on tiny models of the family's real classes."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import two_processes
from conftest import reset_accelerate
from diffusers import DiffusionPipeline
from helpers import (
    NO_ACCELERATOR,
    checkpoint_state,
    equal,
    read_network,
    read_scalars,
    relative,
    run_two_processes,
    run_until_signal,
)
from PIL import Image
from safetensors.torch import load_file

import training_utils
from adt_utils import constrained_step, simulate_inference
from adversary_utils import Adversary
from benchmarks import memory
from data_utils import CAPTIONS_PER_FILE, draw_path
from output_utils import list_checkpoints
from training_utils import STOPPED, ADTError, Trained, trainable_parameters


ROOT = Path(__file__).resolve().parent.parent
LORA = ("--use_lora", "--rank", 4, "--lora_alpha", 8, "--learning_rate", 1e-2)
TOGETHER = ("--rollouts_per_batch", "2")
PAIRS = ("--mismatched_pair_weight", "0.5")  # whose partner may be in another process or micro-batch


@pytest.fixture
def train(family):
    return family.train


@pytest.fixture
def network(family):
    """The trained component's name, and so its folder's."""
    return family.network


@pytest.fixture
def loaded(train, monkeypatch):
    """The networks that runs have loaded, in a list."""
    networks = []
    original = train.load_network
    monkeypatch.setattr(train, "load_network", lambda *args: networks.append(original(*args)) or networks[-1])
    return networks


@pytest.fixture
def base_pipeline(base_path):
    return load(base_path)


def unconditional_examples(count=1):
    """What SDXL's conditions are made of, beside the prompts."""
    sizes = {"original_sizes": torch.tensor([[20, 25]] * count), "crop_top_lefts": torch.tensor([[1, 2]] * count)}
    return sizes | {"pixel_values": torch.zeros(count, 3, 16, 16)}


def load(path, **components):
    pipeline = DiffusionPipeline.from_pretrained(path, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, prompt="a red disc"):
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipeline(prompt, num_inference_steps=3, generator=generator, output_type="np").images)


def skip_unless(train, sampler):
    if sampler not in train.SAMPLERS:
        pytest.skip(f"no {sampler} in this family")


# The main job


def test_writes_a_pipeline_that_loads(run, base_path, base_pipeline, network):
    output = run("--validation_prompts", "a red disc", "--num_validation_images", 2, "--validation_steps", 2)
    pipeline = load(output)
    assert type(pipeline) is type(base_pipeline)
    images = sample(pipeline)
    assert images.shape == (1, 16, 16, 3) and images.isfinite().all()

    base, tuned = read_network(base_path, network), read_network(output, network)
    assert all(not torch.equal(base[name], tuned[name]) for name in base if name.endswith("weight"))
    for file in Path(base_path).rglob("*.safetensors"):
        if file.parent.name != network:
            assert equal(load_file(file), load_file(output / file.relative_to(base_path))), file

    grids = sorted(path.name for path in (output / "validation").glob("*.png"))
    assert grids == ["iteration-000002-prompt-0.png", "iteration-000004-prompt-0.png"]
    assert Image.open(output / "validation" / grids[0]).size == (32, 32)


def test_validation_puts_base_above_tuned(run, train, options, base_pipeline):
    prompts = ("--validation_prompts", "a red disc", "a blue square", "--num_validation_images", 2)
    output = run(*prompts, "--learning_rate", "1e-30", output_dir="still")
    for n in range(2):
        grid = Image.open(output / "validation" / f"iteration-000004-prompt-{n}.png")
        top, bottom = grid.crop((0, 0, 32, 16)), grid.crop((0, 16, 32, 32))
        assert top.tobytes() == bottom.tobytes()
    moved = run(*prompts, "--learning_rate", "1e-2", output_dir="moved")
    grid = Image.open(moved / "validation" / "iteration-000004-prompt-0.png")
    assert grid.crop((0, 0, 16, 16)).tobytes() != grid.crop((0, 16, 16, 32)).tobytes()
    # The base row is what the base pipeline gives, by hand.
    args = train.parse_args(options())
    sampler = train.check_models(args)[0]
    base_pipeline.scheduler = type(sampler).from_config(sampler.config)
    generator = train.make_generator(0, "validation", 0, 0)
    image = base_pipeline("a red disc", generator=generator, **train.inference_options(args)).images[0]
    assert grid.crop((0, 0, 16, 16)).tobytes() == image.tobytes()


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++", "euler"])
@pytest.mark.parametrize("bare", [False, True])
def test_rollout_is_what_the_saved_pipeline_does(run, train, options, network, tmp_path, base_path, sampler, bare):
    """Latents of the saved pipeline, by its own defaults, and of training's rollout with training's sampler."""
    skip_unless(train, sampler)
    shutil.copytree(base_path, tmp_path / "base")
    if bare:  # what a pipeline sets itself, or would do wrong, where the configuration says nothing
        file = tmp_path / "base" / "scheduler" / "scheduler_config.json"
        config = {name: value for name, value in json.loads(file.read_text()).items() if name != "steps_offset"}
        file.write_text(json.dumps(config | {"clip_sample": True}))
    more = ("--sampler", sampler, "--pretrained_model_name_or_path", tmp_path / "base", "--max_train_steps", 1)
    pipeline = load(run(*more))
    args = train.parse_args(options(*more))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipeline("a red disc", latents=noise, output_type="latent", **train.inference_options(args)).images

    scheduler, _, _ = train.check_models(args)
    assert type(scheduler) is type(pipeline.scheduler) is train.SAMPLERS[sampler][0]
    encoder = train.PromptEncoder(args, NO_ACCELERATOR)
    conditions = train.make_conditions(
        unconditional_examples(), encoder(["a red disc"]), encoder.negative, torch.tensor([False]), args
    )
    predict = train.make_predict(getattr(pipeline, network), conditions, train.call_network)
    with torch.no_grad():
        start = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        rollout = simulate_inference(predict, scheduler, start, 0, args.guidance_scale)
    assert relative(rollout.latents, expected) < 1e-5


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++", "euler"])
@pytest.mark.parametrize("gradient_path", ["adt", "drtune"])
def test_gradient_is_that_of_plain_autograd(train, options, network, sampler, gradient_path):
    """The constant-memory backward of this family's network against one pass through kept graphs."""
    skip_unless(train, sampler)
    args = train.parse_args(options("--sampler", sampler))
    scheduler, _, _ = train.check_models(args)
    encoder = train.PromptEncoder(args, NO_ACCELERATOR)
    conditions = train.make_conditions(
        unconditional_examples(), encoder(["a red disc"]), encoder.negative, torch.tensor([False]), args
    )
    model = train.load_network(args, NO_ACCELERATOR).eval()
    predict = train.make_predict(model, conditions, train.call_network)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    start = start * getattr(scheduler, "init_noise_sigma", 1.0)

    result = simulate_inference(predict, scheduler, start, 0, 7.0, 0.0, [1, 3], gradient_path)
    for replay in result.replay(predict, result.prediction_gradients(result.latents.square().sum())):
        replay().backward()
    replayed = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()

    latents, path = start, copy.deepcopy(scheduler)
    for index, timestep in enumerate(path.timesteps):
        model_input = latents.detach()
        if hasattr(path, "scale_model_input"):
            model_input = path.scale_model_input(model_input, timestep)
        with torch.set_grad_enabled(index in (1, 3)):
            negative, positive = (predict(model_input, timestep, (branch,)) for branch in (0, 1))
        guided = negative + 7.0 * (positive - negative)
        latents = constrained_step(path, guided, timestep, latents, gradient_path)
    latents.square().sum().backward()
    plain = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert relative(replayed, plain) < 1e-5


# Phases


@pytest.fixture
def watched(train, loaded, monkeypatch):
    """Records, around each update, which network's weights and buffers changed and what gradients it left."""
    seen = []

    def state(module):
        return {name: value.clone() for name, value in module.state_dict().items()}

    def watch(name):
        original = getattr(train, name)

        def wrapper(*args):
            discriminator = next(arg for arg in args if isinstance(arg, Adversary)).discriminator.network
            modules = {"generator": loaded[-1], "discriminator": discriminator}
            before = {key: state(module) for key, module in modules.items()}
            result = original(*args)
            seen.append(
                {
                    "phase": name,
                    "changed": {key for key, module in modules.items() if not equal(before[key], state(module))},
                    "gradients": {
                        key
                        for key, module in modules.items()
                        if any(parameter.grad is not None for parameter in module.parameters())
                    },
                    "trainable": trainable_parameters(discriminator),
                }
            )
            return result

        monkeypatch.setattr(train, name, wrapper)

    watch("update_discriminator")
    watch("update_generator")
    return seen


def test_each_network_changes_in_its_own_phase_only(run, watched):
    run("--discriminator_learning_rate", 1e-2)
    assert [entry["phase"] for entry in watched] == ["update_discriminator"] * 2 + ["update_generator"] + [
        "update_discriminator"
    ] * 2 + ["update_generator"]
    for entry in watched:
        own = entry["phase"].removeprefix("update_")
        assert entry["changed"] == {own}  # spectral-norm vectors and twin heads are in the state, too
        assert entry["gradients"] == set()
        assert entry["trainable"]


def test_first_iterations_do_not_touch_the_generator(run, watched, base_path, network):
    output = run("--generator_start_step", 4, "--max_train_steps", 4)
    assert [entry["phase"] for entry in watched] == ["update_discriminator"] * 4
    assert equal(read_network(base_path, network), read_network(output, network))


def test_gradients_leak_into_no_other_network(run, monkeypatch):
    """The gradients when an optimizer steps are its own network's alone."""
    networks, leaks = [], []
    original = Trained.step

    def check(trained, iteration):
        if not any(trained.wrapped is network for network in networks):
            networks.append(trained.wrapped)
        for network in networks:
            has = [parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad]
            leaks.append(any(has) if network is not trained.wrapped else not all(has))
        return original(trained, iteration)

    monkeypatch.setattr(Trained, "step", check)
    run()
    assert len(networks) == 2 and leaks and not any(leaks)


@pytest.mark.parametrize("checkpointing", [(), ("--gradient_checkpointing",)])
def test_generator_update_saves_no_more_for_more_steps(run, train, monkeypatch, checkpointing):
    """Counted around the script's own update, from the rollout's latents to the last replayed step."""
    monkeypatch.setattr(
        training_utils, "checkpoint", lambda function, *args, **options: memory.counted_checkpoint(function, *args)
    )
    original, peaks = train.update_generator, {}

    def count(batches, start_index, iteration, generator, adversary, models, run):
        networks = generator.network, models.vae, adversary.feature_network, adversary.discriminator.network
        with memory.SavedTensors(*networks) as saved:
            for batch in batches:
                batch.generated = train.decode_latents(models.vae, batch.rollout.latents)
            result = original(batches, start_index, iteration, generator, adversary, models, run)
        peaks.setdefault(peaks["key"], saved.peak)
        return result

    monkeypatch.setattr(train, "update_generator", count)
    for k in (1, 3, 4):
        peaks["key"] = k
        run("--num_gradient_steps", k, "--max_train_steps", 2, "--num_inference_steps", 4, *checkpointing)
    assert peaks[3] == pytest.approx(peaks[1], rel=0.05) and peaks[4] == pytest.approx(peaks[1], rel=0.05)
    assert peaks[1] > 1e5


@pytest.mark.parametrize(
    "more",
    [
        ("--use_ema",),
        ("--adversarial_loss_weight", "auto", "--sampler", "dpmsolver++"),
        (*LORA, "--use_ema", "--lora_dropout", 0.1),
    ],
    ids=["ema", "auto", "lora"],
)
def test_resumed_run_equals_uninterrupted_run(run, network, tmp_path, more):
    """Whether it ended in between or was stopped by SIGTERM."""
    common = (*more, "--generator_update_interval", 1)
    more = (*common, "--checkpointing_steps", 2)
    full, half = run(*more, "--max_train_steps", 4, output_dir="full"), tmp_path / "half"
    if "auto" in more:
        run(*more, "--max_train_steps", 2, output_dir="half")
    else:
        run_until_signal(run, 1, *common, "--max_train_steps", 4, "--checkpointing_steps", 3, output_dir="half")
        assert [path.name for path in list_checkpoints(half)] == ["checkpoint-2"]
        assert not (half / "adt_config.json").exists()  # no result
    moved = checkpoint_state(half / "checkpoint-2")
    resumed = run(*more, "--max_train_steps", 4, "--resume_from_checkpoint", "latest", output_dir="half")
    assert equal(checkpoint_state(full / "checkpoint-4"), checkpoint_state(resumed / "checkpoint-4"))
    assert not equal(moved, checkpoint_state(resumed / "checkpoint-4"))
    assert read_scalars(full) == read_scalars(resumed)
    name = "pytorch_lora_weights.safetensors"
    if "--use_lora" in more:
        assert equal(load_file(full / name), load_file(resumed / name))
    else:
        assert equal(read_network(full, network), read_network(resumed, network))
        name = "diffusion_pytorch_model.safetensors"
    names = {name if "--use_lora" in more else f"{network}/{name}", "discriminator.safetensors"}
    assert names <= set(moved) and (f"{network}_ema/{name}" in moved) == ("--use_ema" in more)
    assert any("twin_heads" in name for name in moved["discriminator.safetensors"])


def test_rollouts_of_several_iterations_run_together(run, train, options, network, tmp_path, monkeypatch):
    """As each by itself, in fewer calls; a run that is stopped among them goes on as if it had not been, bitwise."""
    generated, calls = {}, {}
    update_discriminator, call_network = train.update_discriminator, train.call_network

    def recorded(batches, iteration, adversary, own):
        images = torch.cat([batch.generated.detach() for batch in batches])
        generated.setdefault(Path(own.args.output_dir).name, []).append((iteration, images))
        return update_discriminator(batches, iteration, adversary, own)

    def counted(*arguments):
        if not torch.is_grad_enabled():
            calls[name] = calls.get(name, 0) + 1
        return call_network(*arguments)

    monkeypatch.setattr(train, "update_discriminator", recorded)
    monkeypatch.setattr(train, "call_network", counted)
    # With so large an epsilon an update is proportional to the gradient, and rounding has no direction of its own.
    common = ("--generator_update_interval", 3, "--max_train_steps", 7, "--gradient_accumulation_steps", 2,
              "--train_batch_size", 1, "--adam_epsilon", 1e-3, "--use_ema", "--seed", 1,
              "--learning_rate", 1e-4, "--discriminator_learning_rate", 1e-4)  # fmt: skip
    together = (*common, "--rollouts_per_batch", 3)
    for name, more in (("alone", common), ("together", together)):
        run(*more, "--checkpointing_steps", 7, output_dir=name)
    args = train.parse_args(options(*common))
    lengths = [args.num_inference_steps - draw_path(iteration, args)[0] for iteration in range(7)]
    assert calls["alone"] == 2 * sum(lengths)
    assert calls["together"] == 2 * (max(lengths[:3]) + max(lengths[3:6]) + lengths[6]) < calls["alone"]
    for (iteration, images), (other, expected) in zip(generated["together"], generated["alone"], strict=True):
        assert iteration == other and torch.allclose(images, expected, rtol=0, atol=1e-5)
    first, second = read_scalars(tmp_path / "together"), read_scalars(tmp_path / "alone")
    assert first.keys() == second.keys()
    assert all(first[tag] == pytest.approx(second[tag], rel=1e-3, abs=1e-5) for tag in first)
    weights = [read_network(tmp_path / output, network) for output in ("together", "alone")]
    assert all(torch.allclose(weights[0][key], weights[1][key], rtol=0, atol=1e-5) for key in weights[0])

    name = "stopped"  # within the second group
    run_until_signal(run, 4, *together, "--checkpointing_steps", 7, output_dir=name)
    assert [path.name for path in list_checkpoints(tmp_path / name)] == ["checkpoint-5"]
    run(*together, "--checkpointing_steps", 7, "--resume_from_checkpoint", "latest", output_dir=name)
    states = [checkpoint_state(tmp_path / output / "checkpoint-7") for output in ("together", name)]
    assert equal(*states) and read_scalars(tmp_path / name) == first
    assert [iteration for iteration, _ in generated[name]] == list(range(7))
    assert equal(generated[name], generated["together"])


def test_killed_run_goes_on_from_its_last_checkpoint(run, family, train, network, options, tmp_path):
    """SD1.5's gets SIGTERM, as do the processes that load its images; the others are killed outright."""
    arguments = options("--max_train_steps", 400, "--checkpointing_steps", 2, output_dir="killed")
    process = subprocess.Popen(
        [sys.executable, train.__file__, *arguments, "--dataloader_num_workers", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    killed = tmp_path / "killed"
    deadline = time.time() + 120
    while not (killed / "checkpoint-2").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM if family.name == "sd15" else signal.SIGKILL)
    _, printed = process.communicate()
    (checkpoint,) = list_checkpoints(killed)[-1:]
    last = int(checkpoint.name.split("-")[1])
    if family.name == "sd15":
        assert process.returncode == STOPPED, printed
        assert f"Stopped after {last} of 400 iterations, with {checkpoint}: the same command with" in printed
    steps = ("--max_train_steps", last + 2, "--checkpointing_steps", last + 2)
    run(*steps, "--resume_from_checkpoint", "latest", output_dir="killed")
    straight = run(*steps, output_dir="straight")
    assert equal(read_network(straight, network), read_network(killed, network))
    name = f"checkpoint-{last + 2}"
    assert equal(checkpoint_state(straight / name), checkpoint_state(killed / name))


@pytest.mark.parametrize(
    "more",
    [PAIRS, ("--adversarial_loss_weight", "0"), ("--adversarial_loss_weight", "auto", *TOGETHER), LORA],
    ids=["adt", "finetune", "auto", "lora"],
)
def test_processes_and_micro_batches_give_the_same_run(family, train, network, options, tmp_path, more):
    if family.name != "sd15" and more not in (PAIRS, LORA):
        pytest.skip("these losses are copied blocks, which `make quality` compares, and a torchrun takes long")
    # Other seeds put one of the discriminator's leaky ReLUs at its kink, where rounding decides the slope.
    seed = 5 if "auto" in more else 2
    common = ("--seed", seed, "--discriminator_norm_group", 2, "--max_train_steps", 4, "--random_flip",
              "--noise_offset", 0.1, "--proportion_empty_prompts", 0.3, "--learning_rate", 2e-4,
              "--discriminator_learning_rate", 2e-4, *more)  # fmt: skip
    pair = options(*common, "--train_batch_size", 2, output_dir="pair")
    run_two_processes(two_processes.__file__, train.__name__, tmp_path / "record-pair", *pair)
    ranks = [torch.load(tmp_path / "record-pair" / f"rank-{rank}.pt") for rank in range(2)]
    # A process group that something of the training still held could block the processes when they end.
    assert all("pt_gloo_runloop" in rank["threads"] and not rank["threads_after"] & rank["threads"] for rank in ranks)
    assert equal(ranks[0]["weights"], ranks[1]["weights"])
    assert ranks[0]["start_indices"] == ranks[1]["start_indices"]

    records = {"pair": ranks[0]}
    for name, sizes in {
        "one": ("--train_batch_size", 4),
        "micro": ("--train_batch_size", 2, "--gradient_accumulation_steps", 2),
    }.items():
        reset_accelerate()
        two_processes.record(train, tmp_path / f"record-{name}", options(*common, *sizes, output_dir=name))
        records[name] = torch.load(tmp_path / f"record-{name}" / "rank-0.pt")
    one = read_scalars(tmp_path / "one")
    for name in ("pair", "micro"):
        for gradient, expected in zip(records[name]["gradients"], records["one"]["gradients"], strict=True):
            assert relative(gradient, expected) < 1e-4, name
        other = read_scalars(tmp_path / name)
        assert other.keys() == one.keys()
        for tag, values in one.items():
            # A score can be near zero by chance: what a relative error means there is set by the scores' range.
            floor = 1e-5 if "score" in tag or tag == "generator_loss" else 1e-12
            assert other[tag] == pytest.approx(values, rel=1e-4, abs=floor), (name, tag)
    assert set(records["micro"]["start_indices"]) == set(records["one"]["start_indices"])
    if "--use_lora" in more:
        weights = load_file(tmp_path / "one" / "pytorch_lora_weights.safetensors")
        moved = torch.cat([value.flatten() for name, value in weights.items() if "lora_B" in name])
        assert (moved.abs() > 1e-4).float().mean() > 0.5  # they start at 0
    else:
        base, tuned = (
            torch.cat([value.flatten() for value in read_network(path, network).values()])
            for path in (options()[1], tmp_path / "one")
        )
        assert relative(tuned, base) > 1e-3


def test_two_processes_checkpoint_resume_and_validate(family, train, options, tmp_path):
    """Run 4 equals run 2 and resume for 2 on two processes, with fewer validation prompts than processes.

    What stops it after 2 is, but in one family, a signal to one of the processes.
    Families with a cache of embeddings train adapters from one, of which each process writes a file.
    """
    cached = ()
    if family.name != "sd15":
        data = Path(tiny.make_imagefolder(tmp_path / "data"))
        rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
        for row in rows:
            row["text"] = [f"{row['text']} {n}" for n in range(CAPTIONS_PER_FILE // len(rows) + 1)]
        (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        cached = ("--cache_text_embeddings", tmp_path / "cache", "--train_data_dir", data, *LORA)

    def arguments(output_dir, steps, *more):
        return options(
            "--max_train_steps", steps, "--checkpointing_steps", 2, "--validation_prompts", "a red disc",
            "--num_validation_images", 1, "--gradient_checkpointing", "--use_ema", *cached, *more,
            output_dir=output_dir,
        )  # fmt: skip

    full, half = tmp_path / "full", tmp_path / "half"
    run_two_processes(train.__file__, *arguments("full", 4))
    if family.name == "sd3":
        run_two_processes(train.__file__, *arguments("half", 2))
    else:
        stopped = arguments("half", 4, "--checkpointing_steps", 3)
        printed = run_two_processes(
            two_processes.__file__, train.__name__, tmp_path / "record", *stopped,
            status=1, SIGNALLED_RANK="1", SIGNALLED_ITERATION="1",
        )  # fmt: skip
        assert "Stopped after 2 of 4 iterations" in printed
        assert [path.name for path in list_checkpoints(half)] == ["checkpoint-2"]
    run_two_processes(train.__file__, *arguments("half", 4, "--resume_from_checkpoint", "latest"))
    assert not cached or len(list((tmp_path / "cache").iterdir())) == 2
    assert equal(checkpoint_state(full / "checkpoint-4"), checkpoint_state(half / "checkpoint-4"))
    assert read_scalars(full) == read_scalars(half)
    assert len(list((half / "validation").glob("*.png"))) == (2 if family.name == "sd3" else 1)
    assert json.loads((half / "adt_config.json").read_text())["num_processes"] == 2


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++", "euler"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_v_prediction_and_zero_terminal_snr(run, train, family, options, tmp_path, sampler, zero_snr):
    if family.network != "unet":
        pytest.skip("no such schedule in this family")
    path = family.make(tmp_path / "base", prediction_type="v_prediction", zero_snr=zero_snr)
    more = ("--pretrained_model_name_or_path", path, "--guidance_rescale", 0.7, "--sampler", sampler)
    output = run(*more, "--max_train_steps", 2)
    pipeline = load(output)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    if zero_snr:
        assert pipeline.scheduler.config.timestep_spacing == "trailing"
        assert pipeline.scheduler.config.rescale_betas_zero_snr
    assert "guidance_rescale=0.7" in (output / "README.md").read_text()

    args = train.parse_args(options(*more))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipeline("a red disc", latents=noise, output_type="latent", **train.inference_options(args)).images
    scheduler, _, _ = train.check_models(args)
    encoder = train.PromptEncoder(args, NO_ACCELERATOR)
    conditions = train.make_conditions(
        unconditional_examples(), encoder(["a red disc"]), encoder.negative, torch.tensor([False]), args
    )
    predict = train.make_predict(pipeline.unet, conditions, train.call_network)
    with torch.no_grad():
        rollout = simulate_inference(predict, scheduler, noise * scheduler.init_noise_sigma, 0, 7.0, 0.7)
    assert relative(rollout.latents, expected) < 1e-5


def test_intermediate_checkpoint_loads_in_a_pipeline(run, base_path, base_pipeline, network):
    output = run("--checkpointing_steps", 2, "--use_ema", "--ema_decay", 0.5)
    for subfolder in (network, f"{network}_ema"):
        model = type(getattr(base_pipeline, network)).from_pretrained(output / "checkpoint-2", subfolder=subfolder)
        assert sample(load(base_path, **{network: model})).isfinite().all()
    checkpoint = output / "checkpoint-4"
    assert {path.suffix for path in checkpoint.rglob("*") if network in str(path)} == {"", ".json", ".safetensors"}
    # The averaged weights are what is saved at the end: after the second update, half of each.
    ema, trained = read_network(checkpoint, f"{network}_ema"), read_network(checkpoint, network)
    first = read_network(output / "checkpoint-2", network)
    assert equal(read_network(output, network), ema) and not equal(ema, trained)
    decay = 2 / 11  # diffusers' EMAModel warms up: min(decay, (1 + step) / (10 + step)) at its second step, step 1
    for name in trained:
        assert torch.allclose(ema[name], decay * first[name] + (1 - decay) * trained[name], atol=1e-6)


@pytest.mark.parametrize("more", [(), LORA, (*LORA, "--fuse_lora")], ids=["full", "lora", "fused"])
def test_card_snippet_runs_as_it_stands(run, base_path, tmp_path, monkeypatch, more):
    output = run("--validation_prompts", "a red disc", "--guidance_scale", 3, *more)
    card = (output / "README.md").read_text()
    assert "guidance scale 3.0" in card and "Scheduler, " in card and "images/prompt-0.png" in card
    assert (output / "images" / "prompt-0.png").is_file()
    # The snippet's paths alone.
    assert str(tmp_path.parent) not in card.replace(json.dumps(str(output)), "").replace(json.dumps(base_path), "")
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    image = Image.open(tmp_path / "image.png")
    assert image.size == (16, 16)
    facts = json.loads((output / "adt_config.json").read_text())
    assert facts["inference"]["num_inference_steps"] == 4 and facts["inference"]["guidance_scale"] == 3
    assert facts["generator_updates"] == 2 and facts["training_options"]["seed"] == 0
    assert str(tmp_path) not in json.dumps(facts)


# LoRA


def test_lora_trains_adapters_only(run, loaded, base_path, base_pipeline, network):
    output = run(*LORA, "--checkpointing_steps", 2)
    # The frozen weights are bitwise the base's, inside the trained network.
    state = loaded[0].state_dict()
    for name, value in read_network(base_path, network).items():
        wrapped = name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        assert torch.equal(state[name if name in state else wrapped], value), name
    assert not (output / network).exists() and (output / "scheduler").is_dir()
    files = {path.name for path in (output / "checkpoint-2").iterdir()}
    assert "pytorch_lora_weights.safetensors" in files and network not in files

    before = sample(base_pipeline)
    base_pipeline.load_lora_weights(output / "checkpoint-2")
    halfway = sample(base_pipeline)
    base_pipeline.unload_lora_weights()
    assert torch.equal(sample(base_pipeline), before)
    base_pipeline.load_lora_weights(output)
    after = sample(base_pipeline)
    assert not torch.allclose(before, halfway) and not torch.allclose(halfway, after)


def test_fused_lora_is_what_the_adapters_do(run, base_pipeline, network):
    """Also that their scale, alpha over rank, comes with them."""
    output = run(*LORA, "--fuse_lora", "--use_ema", "--ema_decay", 0.3)
    fused = load(output)
    assert not any("lora" in name for name in getattr(fused, network).state_dict())
    base_pipeline.scheduler = fused.scheduler
    base = sample(base_pipeline)
    base_pipeline.load_lora_weights(output)
    adapted = sample(base_pipeline)
    assert relative(sample(fused), adapted) < 1e-4 and relative(base, adapted) > 1e-2


def test_lora_options_change_the_adapters(run, train, options):
    def adapters(*more):
        return load_file(run(*LORA, "--max_train_steps", 2, *more) / "pytorch_lora_weights.safetensors")

    def layers(names):
        return {name.split(".lora")[0].split(".")[-1] for name in names}

    plain = adapters()
    assert {min(value.shape) for value in adapters("--rank", 2).values()} == {2}
    assert layers(plain) == layers(train.parse_args(options()).lora_layers)
    assert layers(adapters("--lora_layers", "to_k")) == {"to_k"}
    assert not equal(plain, adapters("--lora_alpha", 1))
    assert not equal(plain, adapters("--lora_dropout", 0.5))


def test_lora_over_lighter_weights(run, train, loaded, base_path, network):
    output = run(*LORA, "--mixed_precision", "bf16", "--validation_prompts", "a red disc")
    state, base = loaded[0].state_dict(), read_network(base_path, network)
    frozen = {name: p for name, p in loaded[0].named_parameters() if not p.requires_grad}
    assert {parameter.dtype for parameter in frozen.values()} == {torch.bfloat16}
    for name, value in base.items():
        wrapped = name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        assert torch.equal(state[name if name in state else wrapped], value.bfloat16()), name
    assert {parameter.dtype for parameter in trainable_parameters(loaded[0])} == {torch.float32}
    pipeline = load(base_path)
    before = sample(pipeline)
    pipeline.load_lora_weights(output)
    after = sample(pipeline)
    assert after.isfinite().all() and relative(after, before) > 1e-3


def test_lora_with_gradient_checkpointing_is_the_same(run):
    plain = read_scalars(run(*LORA, output_dir="plain"))
    for tag, values in read_scalars(run(*LORA, "--gradient_checkpointing")).items():
        assert values == pytest.approx(plain[tag], rel=1e-5, abs=1e-7), tag


@pytest.mark.parametrize("fuse", [(), ("--fuse_lora",)], ids=["adapters", "fused"])
@pytest.mark.parametrize("variant", ["fp16", None])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_lora_on_a_half_precision_base_with_another_vae(
    run, base_pipeline, tmp_path, monkeypatch, fuse, variant, precision
):
    """The card's snippet must name precision, variant, and the VAE, which the adapters do not bring along."""
    base_pipeline.vae.save_pretrained(tmp_path / "vae")
    for component in base_pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.half()
    base_pipeline.save_pretrained(tmp_path / "half", variant=variant)
    variant_option = ["--variant", variant] if variant else []
    output = run(
        *LORA, *fuse, "--pretrained_model_name_or_path", tmp_path / "half", *variant_option,
        "--pretrained_vae_model_name_or_path", tmp_path / "vae", "--revision", "main", "--max_train_steps", 2,
        "--mixed_precision", precision,
    )  # fmt: skip
    snippet = re.search(r"```python\n(.*?)```", (output / "README.md").read_text(), re.DOTALL).group(1)
    assert ("AutoencoderKL" in snippet and 'revision="main"' in snippet) == (not fuse)
    dtype = {"no": "float32", "bf16": "bfloat16"}[precision]
    assert (f", dtype=torch.{dtype}" in snippet) == (not fuse) and "torch_dtype" not in snippet
    assert ('variant="fp16"' in snippet) == (bool(variant) and not fuse)
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    assert Image.open(tmp_path / "image.png").size == (16, 16)


# Bad input, and where what is good reaches


@pytest.fixture
def no_weights(train, monkeypatch):
    """Fails a test in which a model's weights are loaded."""

    def load_weights(*args, **kwargs):
        raise AssertionError("loaded a model before the input was checked")

    for name in ("PromptEncoder", "load_vae", "load_network", "make_adversary"):
        monkeypatch.setattr(train, name, load_weights)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--pretrained_model_name_or_path", "nowhere"), "nowhere is not a readable pipeline"),
        (("--resolution", 17), "17 is not divisible by"),
        (("--discriminator_resolution", 18), "18 is not a multiple of the feature network's patch size 4"),
        (("--discriminator_layers", 2, 7), r"\[7\]: the feature network has blocks 0 to 3"),
        (("--discriminator_model_name_or_path", "nowhere"), "--discriminator_model_name_or_path nowhere"),
        (("--num_inference_steps", 1001), "1001 is too many for a schedule of 1000"),
        (("--image_column", "picture"), "picture is not a column of the dataset, which has image, text"),
        (("--caption_column", "words"), "words is not a column"),
        (("--image_column", "text"), "does not hold images"),
        (("--resume_from_checkpoint", "checkpoint-9"), "checkpoint-9 does not exist"),
        (("--pretrained_vae_model_name_or_path", "nowhere"), "nowhere is not a readable VAE"),
    ],
)
def test_bad_input_is_refused_before_weights_are_loaded(run, train, no_weights, more, sentence, tmp_path):
    with pytest.raises(ADTError, match=sentence):
        run(*more)
    assert not (tmp_path / "out").exists()


def test_damaged_base_is_named(run, train, no_weights, base_path, tmp_path):
    shutil.copytree(base_path, tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "vae")
    with pytest.raises(ADTError, match="base has no readable VAE"):
        run("--pretrained_model_name_or_path", tmp_path / "base")


def test_revision_and_cache_dir_reach_every_download(run, train, base_pipeline, network, monkeypatch, tmp_path):
    seen = {}
    classes = {type(component) for name, component in base_pipeline.components.items() if name != "scheduler"}
    for cls in {cls for cls in classes if cls is not type(None)} | {type(base_pipeline)}:
        original = cls.from_pretrained

        def load(path, *args, original=original, cls=cls, **kwargs):
            seen.setdefault(cls.__name__, []).append(kwargs)
            return original(path, *args, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", load)
    run("--revision", "abc", "--cache_dir", tmp_path / "cache")
    assert len(seen) > 4
    for name, calls in seen.items():
        first = calls[0]  # the pipeline's own loading of its parts comes last
        assert first["cache_dir"] == str(tmp_path / "cache") and first["revision"] == "abc", name
    assert (tmp_path / "cache").is_dir()  # the dataset's


def test_variant(run, base_pipeline, network, tmp_path):
    for component in base_pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.half()
    base_pipeline.save_pretrained(tmp_path / "base", variant="fp16")
    prompt = ("--validation_prompts", "a red disc")
    output = run("--pretrained_model_name_or_path", tmp_path / "base", "--variant", "fp16", *prompt)
    for name, value in read_network(run(output_dir="plain"), network).items():
        assert torch.allclose(read_network(output, network)[name], value, atol=0.02), name
    tuned = load(output)
    assert {getattr(tuned, name).dtype for name in (network, "vae", "text_encoder")} == {torch.float32}
    assert sample(tuned).isfinite().all()
    with pytest.raises(OSError):
        run("--pretrained_model_name_or_path", tmp_path / "base")


# Damage


@pytest.mark.parametrize(("half", "verb"), [("decoder", "decodes finite latents"), ("encoder", "encodes images")])
def test_vae_that_overflows_is_named(run, train, monkeypatch, half, verb):
    original = train.load_vae

    def damaged(*args):
        vae = original(*args)
        getattr(vae, half).conv_out.weight.data.fill_(float("inf"))
        return vae

    monkeypatch.setattr(train, "load_vae", damaged)
    with pytest.raises(ADTError, match=f"The VAE, in float32, {verb} to values that are not finite"):
        run()


def test_rollout_that_overflows_is_named(run, train, monkeypatch):
    original = train.load_network

    def damaged(*args):
        model = original(*args)
        next(model.parameters()).data.fill_(float("inf"))
        return model

    monkeypatch.setattr(train, "load_network", damaged)
    with pytest.raises(ADTError, match="The sampler's latents are not finite at iteration 1"):
        run()
    with pytest.raises(ADTError, match="The sampler's latents are not finite in validation"):
        run("--validation_prompts", "a red disc")

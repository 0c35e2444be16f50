"""The SD1.5 script, run in this process by `main(parse_args(...))` on tiny models of the real classes."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import datasets
import pytest
import tiny
import torch
import two_processes
from accelerate.state import AcceleratorState, GradientState
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_adt_sd15 as train


ROOT = Path(__file__).resolve().parent.parent
TIMING = {"seconds_per_iteration", "images_per_second", "peak_memory_gb"}


@pytest.fixture(autouse=True)
def fresh_process():
    """Accelerate keeps its state for the life of a process: start each test as a new one would."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def options(sd15_path, dinov2_path, dataset_path, tmp_path):
    """Options of a short run in which both networks visibly move; later ones override earlier ones."""

    def make(*more, output_dir="out"):
        return [
            "--pretrained_model_name_or_path", sd15_path, "--train_data_dir", dataset_path,
            "--discriminator_model_name_or_path", dinov2_path, "--discriminator_layers", "-1", "1", "3",
            "--discriminator_resolution", "16", "--resolution", "16", "--train_batch_size", "2",
            "--max_train_steps", "4", "--generator_update_interval", "2", "--num_inference_steps", "4",
            "--num_gradient_steps", "2", "--learning_rate", "1e-3", "--discriminator_learning_rate", "1e-3",
            "--lr_warmup_steps", "0", "--discriminator_lr_warmup_steps", "0", "--checkpointing_steps", "100",
            "--output_dir", str(tmp_path / output_dir), *map(str, more),
        ]  # fmt: skip

    return make


@pytest.fixture
def run(options, tmp_path):
    def run(*more, output_dir="out"):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        train.main(train.parse_args(options(*more, output_dir=output_dir)))
        return tmp_path / output_dir

    return run


def read_scalars(output_dir, project="adt-sd15", logging_dir="logs"):
    """{tag: {step: value}} as TensorBoard recorded them, without timings."""
    events = EventAccumulator(str(Path(output_dir, logging_dir, project)))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
        if tag not in TIMING
    }


def read_unet(directory, subfolder="unet"):
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
    for name in ("optimizer.bin", "optimizer_1.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl"):
        state[name] = torch.load(Path(directory, name), weights_only=False)
    return state


# The main job


def test_writes_a_pipeline_that_loads(run, sd15_path):
    output = run("--validation_prompts", "a red disc", "--num_validation_images", 2, "--validation_steps", 2)
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        assert (output / name).is_dir()
    pipeline = DiffusionPipeline.from_pretrained(output, safety_checker=None)
    assert isinstance(pipeline, StableDiffusionPipeline)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert pipeline.scheduler.config.clip_sample is False
    assert pipeline.scheduler.config.timestep_spacing == "leading"
    image = pipeline("a red disc", num_inference_steps=4, output_type="np").images
    assert image.shape == (1, 16, 16, 3) and torch.from_numpy(image).isfinite().all()

    base, tuned = read_unet(sd15_path), read_unet(output)
    assert all(not torch.equal(base[name], tuned[name]) for name in base if name.endswith("weight"))
    for name in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert equal(load_file(Path(sd15_path, name)), load_file(output / name)), name

    grids = sorted(path.name for path in (output / "validation").iterdir())
    assert grids == ["iteration-000002-prompt-0.png", "iteration-000004-prompt-0.png"]
    assert Image.open(output / "validation" / grids[0]).size == (32, 32)


def test_validation_puts_base_above_tuned(run, sd15_path):
    prompts = ("--validation_prompts", "a red disc", "a blue square", "--num_validation_images", 2)
    output = run(*prompts, "--learning_rate", "1e-30", output_dir="still")
    for n in range(2):
        grid = Image.open(output / "validation" / f"iteration-000004-prompt-{n}.png")
        top, bottom = grid.crop((0, 0, 32, 16)), grid.crop((0, 16, 32, 32))
        assert top.tobytes() == bottom.tobytes()
    moved = run(*prompts, "--learning_rate", "1e-2", output_dir="moved")
    grid = Image.open(moved / "validation" / "iteration-000004-prompt-0.png")
    assert grid.crop((0, 0, 32, 16)).tobytes() != grid.crop((0, 16, 32, 32)).tobytes()
    # The base row is what the base pipeline gives, by hand.
    pipeline = StableDiffusionPipeline.from_pretrained(sd15_path, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=False, timestep_spacing="leading"
    )
    generator = train.make_generator(0, "validation", 0, 0)
    image = pipeline("a red disc", num_inference_steps=4, guidance_scale=7.0, generator=generator).images[0]
    assert grid.crop((0, 0, 16, 16)).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("sampler", "scheduler_class", "spacing"),
    [
        ("ddim", DDIMScheduler, "leading"),
        ("dpmsolver++", DPMSolverMultistepScheduler, "linspace"),
        ("euler", EulerDiscreteScheduler, "linspace"),
    ],
)
def test_every_sampler_trains_and_is_saved(run, sampler, scheduler_class, spacing):
    output = run("--sampler", sampler)
    scheduler = DiffusionPipeline.from_pretrained(output, safety_checker=None).scheduler
    assert type(scheduler) is scheduler_class
    assert scheduler.config.timestep_spacing == spacing
    assert scheduler.config.prediction_type == "epsilon"


def test_zero_snr_v_prediction(run, tmp_path):
    path = tiny.make_sd15(tmp_path / "zero", prediction_type="v_prediction", zero_snr=True)
    output = run("--pretrained_model_name_or_path", path, "--guidance_rescale", 0.7)
    scheduler = DiffusionPipeline.from_pretrained(output, safety_checker=None).scheduler
    assert scheduler.config.timestep_spacing == "trailing" and scheduler.config.rescale_betas_zero_snr
    assert scheduler.config.prediction_type == "v_prediction"
    assert "guidance_rescale=0.7" in (output / "README.md").read_text()


def test_logs_what_the_issue_names(run):
    scalars = read_scalars(run())
    every, generator = {1, 2, 3, 4}, {2, 4}
    for tag in ("discriminator_loss", "real_score", "fake_score", "start_index", "discriminator_lr", "lr"):
        assert set(scalars[tag]) == every, tag
    for tag in ("generator_loss", "diffusion_loss", "adversarial_gradient_norm", "diffusion_gradient_norm"):
        assert set(scalars[tag]) == generator, tag
    assert scalars["discriminator_loss"][1] == pytest.approx(
        2 - scalars["real_score"][1] + scalars["fake_score"][1], abs=1e-5
    )


# 5. Phases


@pytest.fixture
def watched(monkeypatch):
    """Records, around each update, which network's weights and buffers changed and what gradients it left."""
    seen = []

    def state(module):
        return {name: value.clone() for name, value in module.state_dict().items()}

    def watch(name):
        original = getattr(train, name)

        def wrapper(batches, *args):
            unet = next(arg for arg in args if isinstance(arg, UNet2DConditionModel)) if "generator" in name else None
            discriminator = next(arg for arg in args if isinstance(arg, train.SiameseDiscriminator))
            modules = {"discriminator": discriminator, "unet": unet or watch.unet}
            watch.unet = modules["unet"]
            before = {key: state(module) for key, module in modules.items()}
            result = original(batches, *args)
            seen.append(
                {
                    "phase": name,
                    "changed": {key for key, module in modules.items() if not equal(before[key], state(module))},
                    "gradients": {
                        key
                        for key, module in modules.items()
                        if any(parameter.grad is not None for parameter in module.parameters())
                    },
                    "trainable": {parameter for parameter in discriminator.parameters() if parameter.requires_grad},
                }
            )
            return result

        monkeypatch.setattr(train, name, wrapper)

    # The generator is not an argument of the discriminator's update: take it from where it is loaded.
    original_load = UNet2DConditionModel.from_pretrained

    def load(*args, **kwargs):
        watch.unet = original_load(*args, **kwargs)
        return watch.unet

    monkeypatch.setattr(train.UNet2DConditionModel, "from_pretrained", load)
    watch("update_discriminator")
    watch("update_generator")
    return seen


def test_each_network_changes_in_its_own_phase_only(run, watched):
    run("--discriminator_learning_rate", 1e-2)
    assert [entry["phase"] for entry in watched] == ["update_discriminator"] * 2 + ["update_generator"] + [
        "update_discriminator"
    ] * 2 + ["update_generator"]
    for entry in watched:
        own = "unet" if entry["phase"] == "update_generator" else "discriminator"
        assert entry["changed"] == {own}  # spectral-norm vectors and twin heads are in the state, too
        assert entry["gradients"] == set()
        assert entry["trainable"]


def test_first_iterations_do_not_touch_the_generator(run, watched, sd15_path):
    output = run("--generator_start_step", 4, "--max_train_steps", 4)
    assert [entry["phase"] for entry in watched] == ["update_discriminator"] * 4
    assert equal(read_unet(sd15_path), read_unet(output))


def test_gradients_leak_into_no_other_network(run, monkeypatch):
    """The gradients when an optimizer steps are its own network's alone."""
    networks, leaks = [], []
    original = train.apply_update

    def check(model, *others):
        if not any(model is network for network in networks):
            networks.append(model)
        for network in networks:
            has = [parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad]
            leaks.append(any(has) if network is not model else not all(has))
        original(model, *others)

    monkeypatch.setattr(train, "apply_update", check)
    run()
    assert len(networks) == 2 and leaks and not any(leaks)


# 6. Resuming


@pytest.mark.parametrize("more", [("--use_ema",), ("--adversarial_loss_weight", "auto", "--sampler", "dpmsolver++")])
def test_resumed_run_equals_uninterrupted_run(run, more):
    full = run(*more, "--max_train_steps", 4, "--checkpointing_steps", 4, output_dir="full")
    half = run(*more, "--max_train_steps", 2, "--checkpointing_steps", 2, output_dir="half")
    moved = checkpoint_state(half / "checkpoint-2")
    resumed = run(
        *more, "--max_train_steps", 4, "--checkpointing_steps", 4, "--resume_from_checkpoint", "latest",
        output_dir="half",
    )  # fmt: skip
    assert equal(checkpoint_state(full / "checkpoint-4"), checkpoint_state(resumed / "checkpoint-4"))
    assert not equal(moved, checkpoint_state(resumed / "checkpoint-4"))
    assert equal(read_unet(full), read_unet(resumed))
    assert read_scalars(full) == read_scalars(resumed)
    names = {"unet/diffusion_pytorch_model.safetensors", "discriminator.safetensors"}
    assert names <= set(moved) and ("unet_ema/diffusion_pytorch_model.safetensors" in moved) == ("--use_ema" in more)
    assert any("twin_heads" in name for name in moved["discriminator.safetensors"])


def test_killed_run_goes_on_from_its_last_checkpoint(run, options, tmp_path):
    arguments = options("--max_train_steps", 40, "--checkpointing_steps", 2, output_dir="killed")
    process = subprocess.Popen(
        [sys.executable, ROOT / "train_adt_sd15.py", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    killed = tmp_path / "killed"
    deadline = time.time() + 120
    while not (killed / "checkpoint-2").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (checkpoint,) = train.list_checkpoints(killed)[-1:]
    last = int(checkpoint.name.split("-")[1])
    steps = ("--max_train_steps", last + 2, "--checkpointing_steps", last + 2)
    run(*steps, "--resume_from_checkpoint", "latest", output_dir="killed")
    straight = run(*steps, output_dir="straight")
    assert equal(read_unet(straight), read_unet(killed))
    name = f"checkpoint-{last + 2}"
    assert equal(checkpoint_state(straight / name), checkpoint_state(killed / name))


def test_resuming_a_finished_run_ends_cleanly(run):
    output = run("--checkpointing_steps", 4, "--validation_prompts", "a red disc")
    before = read_unet(output)
    again = run("--checkpointing_steps", 4, "--validation_prompts", "a red disc", "--resume_from_checkpoint", "latest")
    assert equal(before, read_unet(again))


def test_latest_without_checkpoints_starts_anew(run):
    output = run("--resume_from_checkpoint", "latest")
    assert set(read_scalars(output)["discriminator_loss"]) == {1, 2, 3, 4}


# 7. Several processes and micro-batches


@pytest.mark.parametrize("more", [(), ("--adversarial_loss_weight", "0"), ("--adversarial_loss_weight", "auto")])
def test_processes_and_micro_batches_give_the_same_run(options, tmp_path, more):
    common = ("--discriminator_norm_group", 2, "--max_train_steps", 4, "--random_flip", "--noise_offset", 0.1,
              "--proportion_empty_prompts", 0.3, "--learning_rate", 2e-4, "--discriminator_learning_rate", 2e-4,
              *more)  # fmt: skip
    pair = options(*common, "--train_batch_size", 2, output_dir="pair")
    torchrun = Path(sys.executable).parent / "torchrun"
    subprocess.run(
        [torchrun, "--standalone", "--nproc_per_node", "2", ROOT / "tests" / "two_processes.py",
         tmp_path / "record-pair", *pair],
        check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300,
    )  # fmt: skip
    ranks = [torch.load(tmp_path / "record-pair" / f"rank-{rank}.pt") for rank in range(2)]
    assert equal(ranks[0]["weights"], ranks[1]["weights"])
    assert ranks[0]["start_indices"] == ranks[1]["start_indices"]

    records = {"pair": ranks[0]}
    for name, sizes in {
        "one": ("--train_batch_size", 4),
        "micro": ("--train_batch_size", 2, "--gradient_accumulation_steps", 2),
    }.items():
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        two_processes.record(tmp_path / f"record-{name}", options(*common, *sizes, output_dir=name))
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
    base, tuned = (
        torch.cat([value.flatten() for value in read_unet(path).values()]) for path in (options()[1], tmp_path / "one")
    )
    assert relative(tuned, base) > 1e-3


def test_start_index_is_uniform_and_depends_on_the_iteration_alone(run, monkeypatch):
    monkeypatch.setattr(train, "simulate_inference", None)  # nothing here may run a rollout
    draws = [
        torch.randint(50, (1,), generator=train.make_generator(0, "path", iteration)).item()
        for iteration in range(2000)
    ]
    counts = torch.bincount(torch.tensor(draws), minlength=50)
    assert counts.min() > 15 and counts.max() < 75  # 40 expected


def test_generators_differ_in_every_part_of_their_key():
    keys = [(0, "noise", 0, 0), (1, "noise", 0, 0), (0, "posterior", 0, 0), (0, "noise", 1, 0), (0, "noise", 0, 1)]
    draws = [torch.randn(4, generator=train.make_generator(*key)) for key in keys]
    assert torch.equal(draws[0], torch.randn(4, generator=train.make_generator(*keys[0])))
    assert all(not torch.equal(a, b) for n, a in enumerate(draws) for b in draws[:n])


@pytest.mark.parametrize("shape", [(1, 4, 1), (2, 2, 1), (1, 2, 2), (4, 1, 1)])
def test_global_batches_do_not_depend_on_how_they_are_shared_out(shape):
    processes, batch_size, micro = shape
    args = types.SimpleNamespace(
        train_batch_size=batch_size, gradient_accumulation_steps=micro, max_train_steps=5, seed=3
    )
    seen = {iteration: [] for iteration in range(5)}
    for process in range(processes):
        batches = list(train.GlobalBatchSampler(6, args, processes, process))
        assert len(batches) == len(train.GlobalBatchSampler(6, args, processes, process))
        for batch in batches:
            for index, iteration, position in batch:
                seen[iteration].append((position, index))
    flat = [index for iteration in range(5) for _, index in sorted(seen[iteration])]
    reference = types.SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=1, max_train_steps=5, seed=3)
    assert flat == [index for batch in train.GlobalBatchSampler(6, reference) for index, _, _ in batch]
    assert sorted(flat[:6]) == sorted(flat[6:12]) == list(range(6))  # each epoch sees every image once
    assert flat[:6] != flat[6:12]
    resumed = train.GlobalBatchSampler(6, reference, first_iteration=3)
    assert list(resumed) == list(train.GlobalBatchSampler(6, reference))[3:]


# 8. What the upstream examples' tests assert


def test_checkpoints_total_limit_keeps_the_newest(run):
    output = run("--checkpointing_steps", 1, "--checkpoints_total_limit", 2)
    assert {path.name for path in output.iterdir() if "checkpoint" in path.name} == {"checkpoint-3", "checkpoint-4"}
    output = run(
        "--checkpointing_steps", 1, "--checkpoints_total_limit", 3, "--max_train_steps", 6,
        "--resume_from_checkpoint", "checkpoint-4",
    )  # fmt: skip
    names = {path.name for path in output.iterdir() if "checkpoint" in path.name}
    assert names == {"checkpoint-4", "checkpoint-5", "checkpoint-6"}


def test_intermediate_checkpoint_loads_in_a_pipeline(run, sd15_path):
    output = run("--checkpointing_steps", 2, "--use_ema", "--ema_decay", 0.5)
    for subfolder in ("unet", "unet_ema"):
        unet = UNet2DConditionModel.from_pretrained(output / "checkpoint-2", subfolder=subfolder)
        pipeline = DiffusionPipeline.from_pretrained(sd15_path, unet=unet, safety_checker=None)
        assert pipeline("a red disc", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    checkpoint = output / "checkpoint-4"
    assert {path.suffix for path in checkpoint.rglob("*") if "unet" in str(path)} == {"", ".json", ".safetensors"}
    # The averaged weights are what is saved at the end: after the second update, half of each.
    ema, unet = read_unet(checkpoint, "unet_ema"), read_unet(checkpoint)
    first = read_unet(output / "checkpoint-2")
    assert equal(read_unet(output), ema) and not equal(ema, unet)
    decay = 2 / 11  # diffusers' EMAModel warms up: min(decay, (1 + step) / (10 + step)) at its second step, step 1
    for name in unet:
        assert torch.allclose(ema[name], decay * first[name] + (1 - decay) * unet[name], atol=1e-6)


# 9. Plain fine-tuning


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_weight_zero_is_plain_fine_tuning(run, options, tmp_path, prediction_type, caplog):
    path = tiny.make_sd15(tmp_path / "base", prediction_type=prediction_type)
    more = ("--pretrained_model_name_or_path", path, "--adversarial_loss_weight", 0, "--max_train_steps", 3,
            "--learning_rate", 1e-3, "--discriminator_model_name_or_path", "does/not-exist",
            "--diffusion_loss_weight", 0.1)  # fmt: skip
    with caplog.at_level(logging.INFO, logger="train_adt_sd15"):
        output = run(*more)
    assert any("are ignored" in message for message in caplog.messages)
    scalars = read_scalars(output)
    assert set(scalars) == {"diffusion_loss", "lr"}
    losses = scalars["diffusion_loss"]
    assert not list(output.rglob("discriminator*"))

    # A reference loop: the textbook loss with diffusers' own schedule, on the noise, timesteps and crops of the run.
    args = train.parse_args(options(*more))
    pipeline = StableDiffusionPipeline.from_pretrained(path, safety_checker=None)
    schedule = train.DDPMScheduler.from_config(pipeline.scheduler.config)
    dataset = train.ImageCaptionDataset(train.load_image_caption_dataset(args), args)
    optimizer = torch.optim.AdamW(pipeline.unet.parameters(), lr=1e-3, weight_decay=1e-2)
    for iteration, keys in enumerate(train.GlobalBatchSampler(8, args)):
        items = [dataset[key] for key in keys]

        def draw(function, shape, purpose):
            return torch.stack(
                [function(shape, generator=train.make_generator(0, purpose, iteration, n)) for n in range(2)]
            )

        with torch.no_grad():
            posterior = pipeline.vae.encode(torch.stack([item["pixel_values"] for item in items])).latent_dist
            latents = (posterior.mean + posterior.std * draw(torch.randn, (4, 8, 8), "posterior")) * 0.18215
            embeds = pipeline.encode_prompt([item["caption"] for item in items], "cpu", 1, False)[0]
        noise = draw(torch.randn, (4, 8, 8), "noise")
        timesteps = (draw(torch.rand, (), "timestep") * 1000).long()
        noisy = schedule.add_noise(latents, noise, timesteps)
        target = noise if prediction_type == "epsilon" else schedule.get_velocity(latents, noise, timesteps)
        loss = torch.nn.functional.mse_loss(pipeline.unet.train()(noisy, timesteps, embeds).sample, target)
        assert losses[iteration + 1] == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pipeline.unet.parameters(), 1.0)
        optimizer.step()
    for name, value in pipeline.unet.state_dict().items():
        assert torch.allclose(value, read_unet(output)[name], atol=1e-5)


def test_diffusion_loss_weights():
    """Min-SNR weights by hand: gamma 5 at SNR 9 and 1, for noise and for velocity."""
    latents, noise = torch.full((2, 1, 1, 1), 2.0), torch.full((2, 1, 1, 1), 3.0)
    alpha = torch.tensor([0.9, 0.5]).sqrt().view(2, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    unet = lambda sample, timesteps, encoder_hidden_states: types.SimpleNamespace(sample=torch.zeros(2, 1, 1, 1))  # noqa: E731
    arguments = (unet, latents, noise, None, alpha, sigma, None)
    assert train.diffusion_loss(*arguments, "epsilon")[0].item() == pytest.approx(9.0)
    assert train.diffusion_loss(*arguments, "epsilon", 5.0)[0].item() == pytest.approx((9 * 5 / 9 + 9) / 2)
    velocity = ((alpha * 3 - sigma * 2) ** 2).flatten().tolist()
    assert train.diffusion_loss(*arguments, "v_prediction")[0].item() == pytest.approx(sum(velocity) / 2)
    expected = (velocity[0] * 5 / 10 + velocity[1] * 1 / 2) / 2
    assert train.diffusion_loss(*arguments, "v_prediction", 5.0)[0].item() == pytest.approx(expected)


def test_generator_warm_up_counts_generator_updates(run):
    scalars = read_scalars(run("--lr_warmup_steps", 4, "--discriminator_lr_warmup_steps", 2))
    assert list(scalars["lr"].values()) == pytest.approx([0, 0.25e-3, 0.25e-3, 0.5e-3])
    assert list(scalars["discriminator_lr"].values()) == pytest.approx([0.5e-3, 1e-3, 1e-3, 1e-3])


def test_automatic_weight_keeps_the_ratio(run):
    scalars = read_scalars(run("--adversarial_loss_weight", "auto", "--adversarial_gradient_ratio", 0.5))
    assert set(scalars["adversarial_loss_weight"]) == {2, 4}
    for step, weight in scalars["adversarial_loss_weight"].items():
        ratio = weight * scalars["adversarial_gradient_norm"][step] / scalars["diffusion_gradient_norm"][step]
        assert ratio == pytest.approx(0.5, rel=1e-5)


def test_saturation_is_warned_about_once(run, monkeypatch, caplog):
    monkeypatch.setattr(train, "SATURATION_GAP", -10)
    monkeypatch.setattr(train, "SATURATION_ITERATIONS", 2)
    with caplog.at_level(logging.WARNING, logger="train_adt_sd15"):
        run()
    assert sum("saturated" in message for message in caplog.messages) == 1


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
    ("--augmentation_policy", "color"), ("--augmentation_pairing", "shared"), ("--augmentation_pairing", "input"),
    ("--train_batch_size", 1), ("--gradient_accumulation_steps", 2), ("--mixed_precision", "bf16"),
    ("--num_train_epochs", 1, "--max_train_steps", 3), ("--resolution", 8, "--discriminator_resolution", 8),
]  # fmt: skip
KEEPS = [
    ("--gradient_checkpointing",), ("--dataloader_num_workers", 1), ("--allow_tf32",),
    ("--use_ema", "--offload_ema"), ("--use_ema", "--foreach_ema"), ("--lr_num_cycles", 2), ("--lr_power", 2),
    ("--ema_decay", 0.5),
]  # fmt: skip
ELSEWHERE = {
    "help", "pretrained_model_name_or_path", "revision", "variant", "pretrained_vae_model_name_or_path",
    "dataset_name", "dataset_config_name", "train_data_dir", "image_column", "caption_column", "cache_dir",
    "output_dir", "use_8bit_adam", "adversarial_gradient_ratio", "discriminator_model_name_or_path",
    "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "validation_prompts",
    "num_validation_images", "validation_steps", "report_to", "logging_dir", "tracker_project_name", "push_to_hub",
    "hub_model_id", "hub_token",
}  # fmt: skip


def fingerprint(output):
    """What a run computed: its weights and everything that it logged."""
    return read_unet(output), read_scalars(output)


@pytest.fixture(scope="module")
def plain_runs():
    return {}


def test_every_option_is_in_one_of_the_lists(options):
    args = vars(train.parse_args(options()))
    named = {word[2:] for case in CHANGES + KEEPS for word in map(str, case) if word.startswith("--")}
    assert named | ELSEWHERE == set(args) | {"help"}
    readme = (ROOT / "README.md").read_text()
    assert [name for name in args if f"| `--{name}` |" not in readme] == []


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
    low = read_unet(run(*common, "--ema_decay", 0.1, output_dir="low"))
    assert not equal(low, read_unet(run(*common, "--ema_decay", 0.9)))


def test_num_train_epochs(run, options, monkeypatch):
    arguments = options("--num_train_epochs", 2)
    at = arguments.index("--max_train_steps")
    del arguments[at : at + 2]
    args = train.parse_args(arguments)
    assert args.max_train_steps is None
    train.main(args)
    assert args.max_train_steps == 8  # 2 epochs of 8 images in batches of 2


def test_mixed_precision_keeps_float32_weights(run):
    plain, mixed = run(output_dir="plain"), run("--mixed_precision", "bf16", output_dir="mixed")
    assert {value.dtype for value in read_unet(mixed).values()} == {torch.float32}
    first, second = read_scalars(plain), read_scalars(mixed)
    assert second["diffusion_loss"][2] == pytest.approx(first["diffusion_loss"][2], rel=0.05)
    assert second["diffusion_loss"] != first["diffusion_loss"]


def test_eight_bit_adam(run, monkeypatch):
    if not train.transformers.utils.is_bitsandbytes_available():
        with pytest.raises(train.ADTError, match="pip install bitsandbytes"):
            run("--use_8bit_adam")
    made = []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, *args, **kwargs):
            made.append(kwargs["lr"])
            super().__init__(*args, **kwargs)

    module = types.SimpleNamespace(optim=types.SimpleNamespace(AdamW8bit=AdamW8bit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    monkeypatch.setattr(train.transformers.utils, "is_bitsandbytes_available", lambda: True)
    run("--use_8bit_adam")
    assert made == [1e-3]  # the generator's


def test_other_vae_is_used_and_saved(run, tmp_path, sd15_path):
    vae = tiny.make_vae()
    vae.save_pretrained(tmp_path / "vae")
    output = run("--pretrained_vae_model_name_or_path", tmp_path / "vae")
    file = "diffusion_pytorch_model.safetensors"
    assert equal(load_file(output / "vae" / file), load_file(tmp_path / "vae" / file))
    assert not equal(load_file(output / "vae" / file), load_file(Path(sd15_path, "vae", file)))


def test_variant(run, tmp_path, sd15_path):
    pipeline = StableDiffusionPipeline.from_pretrained(sd15_path, safety_checker=None)
    pipeline.save_pretrained(tmp_path / "base", variant="fp16")
    output = run("--pretrained_model_name_or_path", tmp_path / "base", "--variant", "fp16")
    plain = run(output_dir="plain")
    assert equal(read_unet(output), read_unet(plain))
    with pytest.raises(OSError):
        run("--pretrained_model_name_or_path", tmp_path / "base")


def test_revision_and_cache_dir_reach_every_download(run, monkeypatch, tmp_path, sd15_path):
    seen = {}
    for cls in (train.CLIPTokenizer, train.CLIPTextModel, train.AutoencoderKL, train.UNet2DConditionModel,
                train.StableDiffusionPipeline, train.Dinov2Model):  # fmt: skip
        original = cls.from_pretrained

        def load(path, *args, original=original, cls=cls, **kwargs):
            seen.setdefault(cls.__name__, kwargs)  # the pipeline's own loading of its parts comes last
            return original(path, *args, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", load)
    run("--revision", "abc", "--cache_dir", tmp_path / "cache")
    assert len(seen) == 6
    for name, kwargs in seen.items():
        assert kwargs["cache_dir"] == str(tmp_path / "cache"), name
        assert name == "Dinov2Model" or kwargs["revision"] == "abc", name
    assert (tmp_path / "cache").is_dir()  # the dataset's


def test_dataset_name_and_columns(run, tmp_path, dataset_path):
    folder = datasets.load_dataset("imagefolder", data_dir=dataset_path, split="train")
    renamed = folder.rename_columns({"image": "picture", "text": "words"})
    (tmp_path / "parquet").mkdir()
    renamed.to_parquet(tmp_path / "parquet" / "train.parquet")
    arguments = ["--image_column", "picture", "--caption_column", "words"]
    args = train.parse_args(
        ["--pretrained_model_name_or_path", "x", "--dataset_name", str(tmp_path / "parquet"), *arguments]
    )
    loaded = train.load_image_caption_dataset(args)
    assert len(loaded) == 8 and train.open_image(loaded[0]["picture"]).mode == "RGB"
    assert loaded["words"][:] == renamed["words"][:]


def test_dataset_config_name(monkeypatch, tmp_path):
    def load_dataset(path, name, cache_dir):
        raise LookupError(f"{path} {name} {cache_dir}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    args = train.parse_args(
        ["--pretrained_model_name_or_path", "x", "--dataset_name", "a/b", "--dataset_config_name", "c"]
    )
    with pytest.raises(LookupError, match="a/b c None"):
        train.load_image_caption_dataset(args)


def test_images_are_resized_cropped_and_flipped(dataset_path, options):
    def item(*more, key=(1, 0, 0)):
        args = train.parse_args(options(*more))
        return train.ImageCaptionDataset(train.load_image_caption_dataset(args), args)[key]

    first = item("--center_crop", "--resolution", 20)
    image = Image.open(Path(dataset_path, "001.png")).convert("RGB")  # 25 x 20: 2 columns off, on the left
    expected = torch.tensor(list(image.crop((2, 0, 22, 20)).tobytes())).view(20, 20, 3).permute(2, 0, 1)
    assert torch.allclose(first["pixel_values"], expected / 127.5 - 1, atol=1e-6)
    assert first["caption"] == "a green disc 1"
    flips = [item("--center_crop", "--random_flip", key=(1, n, 0))["pixel_values"] for n in range(40)]
    plain = item("--center_crop")["pixel_values"]
    mirrored = sum(torch.equal(flip, plain.flip(2)) for flip in flips)
    assert sum(torch.equal(flip, plain) for flip in flips) == 40 - mirrored and 10 < mirrored < 30
    crops = {item(key=(1, n, 0))["pixel_values"].sum().item() for n in range(40)}
    assert len(crops) == 5  # 25 x 20 becomes 20 x 16: 5 places for the crop


# Bad input


def fails(options, *more, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(options(*more))
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--dataset_name", "x"), "either --dataset_name or --train_data_dir"),
        (("--train_data_dir", "nowhere"), "nowhere is not a folder"),
        (("--output_dir", __file__), "is a file"),
        (("--sampler", "unipc"), "UniPC's corrector reuses stored samples"),
        (("--sampler", "heun"), "second stage"),
        (("--sampler", "ddpn"), r"not known; choose from ddim, dpmsolver\+\+, euler"),
        (("--num_gradient_steps", 0), "--num_gradient_steps must be greater than 0"),
        (("--train_batch_size", -1), "--train_batch_size must be greater than 0"),
        (("--adversarial_loss_weight", "much"), "neither a number nor auto"),
        (("--adversarial_loss_weight", -1), "must not be negative"),
        (("--adversarial_loss_weight", "auto", "--diffusion_loss_weight", 0), "needs a diffusion loss"),
        (("--discriminator_norm_group", 3), "does not divide"),
        (("--proportion_empty_prompts", 1.5), r"must lie in \[0, 1\]"),
        (("--guidance_scale", "nan"), "must not be negative"),
    ],
)
def test_bad_options(options, capsys, more, sentence):
    assert re.search(sentence, fails(options, *more, capsys=capsys))


def test_no_dataset(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--pretrained_model_name_or_path", "x"])
    assert "give either --dataset_name or --train_data_dir" in capsys.readouterr().err


@pytest.fixture
def no_weights(monkeypatch):
    """Fails a test in which a model's weights are loaded."""

    def load(*args, **kwargs):
        raise AssertionError("loaded a model before the input was checked")

    for cls in (train.CLIPTextModel, train.AutoencoderKL, train.UNet2DConditionModel, train.Dinov2Model):
        monkeypatch.setattr(cls, "from_pretrained", load)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--pretrained_model_name_or_path", "nowhere"), "nowhere is not a readable pipeline"),
        (("--resolution", 17), "17 is not divisible by the VAE's factor 2"),
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
def test_bad_input_is_refused_before_weights_are_loaded(run, no_weights, more, sentence, tmp_path):
    with pytest.raises(train.ADTError, match=sentence):
        run(*more)
    assert not (tmp_path / "out").exists()


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "is a StableDiffusionXLPipeline"),
        ("unet/config.json", {"in_channels": 9}, "is no text-to-image model"),
        ("unet/config.json", {"time_cond_proj_dim": 8}, "guidance distilled"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "predicts 'flow_prediction'"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "needs a v_prediction model"),
    ],
)
def test_unsuitable_models_are_refused(run, no_weights, sd15_path, tmp_path, file, changes, sentence):
    shutil.copytree(sd15_path, tmp_path / "base")
    edit_json(tmp_path / "base" / file, **changes)
    with pytest.raises(train.ADTError, match=sentence):
        run("--pretrained_model_name_or_path", tmp_path / "base")


def test_corrupt_image_is_named(run, no_weights, dataset_path, tmp_path):
    shutil.copytree(dataset_path, tmp_path / "data")
    file = tmp_path / "data" / "003.png"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(train.ADTError, match=r"image 3 of the dataset \(.*003.png\) does not decode"):
        run("--train_data_dir", tmp_path / "data")


def test_empty_captions_are_counted_and_trained_on(run, dataset_path, tmp_path, caplog):
    shutil.copytree(dataset_path, tmp_path / "data")
    metadata = tmp_path / "data" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("a red square 0", "").replace("a green disc 1", "  "))
    with caplog.at_level(logging.WARNING, logger="train_adt_sd15"):
        run("--train_data_dir", tmp_path / "data")
    assert any("2 captions are empty" in message for message in caplog.messages)


def test_several_captions_to_an_image(dataset_path, tmp_path, options):
    rows = datasets.load_dataset("imagefolder", data_dir=dataset_path, split="train")
    rows = rows.remove_columns("text").add_column("text", [["one", "two"]] * 8)
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    args = train.parse_args(
        ["--pretrained_model_name_or_path", "x", "--dataset_name", str(tmp_path / "data"), "--resolution", "16"]
    )
    dataset = train.load_image_caption_dataset(args)
    assert train.check_dataset(dataset, range(8), args) == 0
    items = train.ImageCaptionDataset(dataset, args)
    assert {items[0, iteration, 0]["caption"] for iteration in range(20)} == {"one", "two"}


def test_caption_that_is_no_text(dataset_path, tmp_path):
    rows = datasets.load_dataset("imagefolder", data_dir=dataset_path, split="train")
    rows = rows.remove_columns("text").add_column("text", list(range(8)))
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    args = train.parse_args(["--pretrained_model_name_or_path", "x", "--dataset_name", str(tmp_path / "data")])
    with pytest.raises(train.ADTError, match="neither text nor a list of texts"):
        train.check_dataset(train.load_image_caption_dataset(args), range(8), args)


def test_checkpoint_of_another_configuration(run, no_weights, options, monkeypatch):
    monkeypatch.undo()
    run("--checkpointing_steps", 4)
    with pytest.raises(train.ADTError, match=r"guidance_scale 7.0 \(now 3.0\), sampler ddim \(now euler\)"):
        run("--resume_from_checkpoint", "latest", "--sampler", "euler", "--guidance_scale", 3)
    with pytest.raises(train.ADTError, match=r"global_batch_size 2 \(now 4\)"):
        run("--resume_from_checkpoint", "latest", "--gradient_accumulation_steps", 2)
    with pytest.raises(train.ADTError, match="past --max_train_steps"):
        run("--resume_from_checkpoint", "latest", "--max_train_steps", 3)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "optimizer.bin", "adt_checkpoint.json"])
def test_truncated_checkpoint_is_named_and_the_previous_one_offered(run, name):
    output = run("--checkpointing_steps", 2)
    file = output / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(train.ADTError, match=f"{Path(name).name}.*truncated|truncated: {name}") as error:
        run("--resume_from_checkpoint", "latest", "--max_train_steps", 6)
    assert "Try --resume_from_checkpoint checkpoint-2" in str(error.value)
    run("--resume_from_checkpoint", "checkpoint-2", "--max_train_steps", 6, "--checkpointing_steps", 2)
    assert (output / "checkpoint-6").is_dir()


def test_a_folder_that_is_no_checkpoint(run, tmp_path):
    with pytest.raises(train.ADTError, match="is not a checkpoint of this script"):
        run("--resume_from_checkpoint", tmp_path)


def test_half_written_checkpoint_is_not_seen(run, tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(train.torch, "save", fail)
        with pytest.raises(OSError):
            run("--checkpointing_steps", 2)
    assert train.list_checkpoints(tmp_path / "out") == []
    run("--checkpointing_steps", 2, "--resume_from_checkpoint", "latest")
    assert [path.name for path in train.list_checkpoints(tmp_path / "out")] == ["checkpoint-2", "checkpoint-4"]
    assert not list((tmp_path / "out").glob(".checkpoint*"))


@pytest.mark.parametrize(
    ("function", "name"), [("discriminator_loss", "discriminator loss"), ("generator_loss", "generator loss")]
)
def test_nan_stops_the_run(run, tmp_path, monkeypatch, function, name):
    original, calls = getattr(train, function), []

    def broken(*args, **kwargs):
        calls.append(1)
        loss = original(*args, **kwargs)
        return loss * float("nan") if len(calls) > (4 if function == "discriminator_loss" else 1) else loss

    monkeypatch.setattr(train, function, broken)
    iteration = 3 if function == "discriminator_loss" else 4
    with pytest.raises(train.ADTError, match=f"The {name} became nan at iteration {iteration}"):
        run("--checkpointing_steps", 2)
    assert [path.name for path in train.list_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert all(value.isfinite().all() for value in read_unet(tmp_path / "out" / "checkpoint-2").values())


def test_sharded_engines_are_refused(run, monkeypatch):
    monkeypatch.setattr(train.Accelerator, "distributed_type", train.DistributedType.DEEPSPEED)
    with pytest.raises(train.ADTError, match="DEEPSPEED is not supported"):
        run()


def test_command_line_prints_one_sentence(options):
    result = subprocess.run(
        [sys.executable, ROOT / "train_adt_sd15.py", *options("--resolution", 17)], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: --resolution 17 is not divisible by the VAE's factor 2."
    assert "Traceback" not in result.stderr


# Card, trackers, Hub


def test_card_snippet_runs_as_it_stands(run, tmp_path, monkeypatch):
    output = run("--validation_prompts", "a red disc", "--guidance_scale", 3)
    card = (output / "README.md").read_text()
    assert "scale 3.0" in card and "DDIMScheduler, 4 steps" in card and "images/prompt-0.png" in card
    assert (output / "images" / "prompt-0.png").is_file()
    assert str(tmp_path) not in card.replace(json.dumps(str(output)), "")  # the snippet's path alone
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    image = Image.open(tmp_path / "image.png")
    assert image.size == (16, 16)
    facts = json.loads((output / "adt_config.json").read_text())
    assert facts["inference"]["num_inference_steps"] == 4 and facts["inference"]["guidance_scale"] == 3
    assert facts["generator_updates"] == 2 and facts["training_options"]["seed"] == 0
    assert str(tmp_path) not in json.dumps(facts)


def test_card_names_the_size_where_it_is_not_the_models_own(run):
    assert "height=8, width=8" in (run("--resolution", 8, "--discriminator_resolution", 8) / "README.md").read_text()


def test_push_to_hub(run, monkeypatch, tmp_path):
    calls = {}

    def create_repo(**kwargs):
        calls["create"] = kwargs
        assert not (tmp_path / "out" / "unet").exists()  # before the training, so that a wrong token fails early
        return types.SimpleNamespace(repo_id="me/tuned")

    monkeypatch.setattr(train, "create_repo", create_repo)
    monkeypatch.setattr(train, "upload_folder", lambda **kwargs: calls.update(upload=kwargs))
    output = run("--push_to_hub", "--hub_model_id", "me/tuned", "--hub_token", "hf_secret", "--checkpointing_steps", 2)
    assert calls["create"] == {"repo_id": "me/tuned", "exist_ok": True, "token": "hf_secret"}
    upload = calls["upload"]
    assert upload["repo_id"] == "me/tuned" and upload["token"] == "hf_secret"
    from huggingface_hub.utils import filter_repo_objects

    files = [str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()]
    sent = set(filter_repo_objects(files, ignore_patterns=upload["ignore_patterns"]))
    assert {"model_index.json", "README.md", "adt_config.json", "unet/config.json"} <= sent
    assert not [file for file in sent if "checkpoint" in file or "tfevents" in file or "validation" in file]
    assert 'from_pretrained("me/tuned")' in (output / "README.md").read_text()
    for file in output.rglob("*"):
        if file.is_file():
            assert b"hf_secret" not in file.read_bytes(), file


def test_card_is_written_anew(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("an old card")
    assert "an old card" not in (run() / "README.md").read_text()


def test_trackers(run, monkeypatch):
    output = run("--report_to", "none", output_dir="none")
    assert not (output / "logs").exists()
    output = run("--logging_dir", "events", "--tracker_project_name", "mine")
    assert set(read_scalars(output, "mine", "events")["discriminator_loss"]) == {1, 2, 3, 4}

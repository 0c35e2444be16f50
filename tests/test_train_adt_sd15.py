"""The SD1.5 script, run in this process by `main(parse_args(...))` on tiny models of the real classes.

What is the same in all scripts is tested here; `test_families.py` has what every script must show for itself.
"""

import json
import logging
import math
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from accelerate.optimizer import AcceleratedOptimizer
from conftest import FAMILIES
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from helpers import equal, read_network, read_scalars
from PIL import Image
from safetensors.torch import load_file

import train_adt_sd15 as train
from adt_utils import update_spectral_norm


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def family():
    return FAMILIES["sd15"]


# The main job


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


# 6. Resuming


def test_resuming_a_finished_run_ends_cleanly(run):
    output = run("--checkpointing_steps", 4, "--validation_prompts", "a red disc")
    before = read_network(output)
    again = run("--checkpointing_steps", 4, "--validation_prompts", "a red disc", "--resume_from_checkpoint", "latest")
    assert equal(before, read_network(again))


def test_latest_without_checkpoints_starts_anew(run):
    output = run("--resume_from_checkpoint", "latest")
    assert set(read_scalars(output)["discriminator_loss"]) == {1, 2, 3, 4}


# 7. Several processes and micro-batches


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


def test_checkpoints_total_limit_never_deletes_the_one_just_written(run):
    output = run("--checkpointing_steps", 2)
    (output / "checkpoint-4" / "optimizer.bin").write_bytes(b"")
    run(
        "--checkpointing_steps", 1, "--max_train_steps", 3, "--resume_from_checkpoint", "checkpoint-2",
        "--checkpoints_total_limit", 1,
    )  # fmt: skip
    assert [path.name for path in train.list_checkpoints(output)] == ["checkpoint-3"]


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
    assert set(scalars) == {"diffusion_loss", "diffusion_gradient_norm", "lr"}
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
        norm = 2 / target.numel() * (loss.item() * target.numel()) ** 0.5  # of the loss's gradient at the prediction
        assert scalars["diffusion_gradient_norm"][iteration + 1] == pytest.approx(norm, rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pipeline.unet.parameters(), 1.0)
        optimizer.step()
    for name, value in pipeline.unet.state_dict().items():
        assert torch.allclose(value, read_network(output)[name], atol=1e-5)


def test_diffusion_loss_weights(monkeypatch):
    """Min-SNR weights by hand: gamma 5 at SNR 9 and 1, for noise and for velocity."""
    batch = {"latents": torch.full((2, 1, 1, 1), 2.0), "loss_noise": torch.full((2, 1, 1, 1), 3.0)}
    batch["conditions"] = {"loss": None}
    alpha = torch.tensor([0.9, 0.5]).sqrt().view(2, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    monkeypatch.setattr(train, "call_unet", lambda *arguments: torch.zeros(2, 1, 1, 1))

    def loss(prediction_type, snr_gamma=None):
        scheduler = train.DDPMScheduler(prediction_type=prediction_type)
        args = types.SimpleNamespace(snr_gamma=snr_gamma)
        return train.diffusion_loss(None, batch, None, alpha, sigma, scheduler, args)[0].item()

    assert loss("epsilon") == pytest.approx(9.0)
    assert loss("epsilon", 5.0) == pytest.approx((9 * 5 / 9 + 9) / 2)
    velocity = ((alpha * 3 - sigma * 2) ** 2).flatten().tolist()
    assert loss("v_prediction") == pytest.approx(sum(velocity) / 2)
    assert loss("v_prediction", 5.0) == pytest.approx((velocity[0] * 5 / 10 + velocity[1] * 1 / 2) / 2)


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
    ("--use_lora", "--rank", 2), ("--num_train_epochs", 1, "--max_train_steps", 3),
    ("--resolution", 8, "--discriminator_resolution", 8),
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
    "lora_alpha", "lora_dropout", "lora_target_modules", "fuse_lora", "num_validation_images", "validation_steps",
    "report_to", "logging_dir", "tracker_project_name", "push_to_hub",
    "hub_model_id", "hub_token",
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
    low = read_network(run(*common, "--ema_decay", 0.1, output_dir="low"))
    assert not equal(low, read_network(run(*common, "--ema_decay", 0.9)))


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
    assert {value.dtype for value in read_network(mixed).values()} == {torch.float32}
    first, second = read_scalars(plain), read_scalars(mixed)
    assert second["diffusion_loss"][2] == pytest.approx(first["diffusion_loss"][2], rel=0.05)
    assert second["diffusion_loss"] != first["diffusion_loss"]


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
    with pytest.raises(train.ADTError, match=r"mixed_precision bf16 \(now no\)"):
        run("--resume_from_checkpoint", "latest")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch --mixed_precision bf16` says it
    run("--resume_from_checkpoint", "latest")


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
    with pytest.raises(train.ADTError, match="The dataset a/b cannot be read: a/b c None"):
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
        (("--hub_token", "hf_x", "--report_to", "wandb"), "--hub_token would reach wandb"),
        (("--hub_token", "hf_x", "--report_to", "all"), "--hub_token would reach all"),
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


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "is a StableDiffusionXLPipeline"),
        ("unet/config.json", {"in_channels": 9}, "9 channels and the VAE of .* makes 4"),
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


def test_unreadable_vae_of_the_base_is_named(run, no_weights, sd15_path, tmp_path):
    shutil.copytree(sd15_path, tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "vae")
    with pytest.raises(train.ADTError, match="base has no readable VAE"):
        run("--pretrained_model_name_or_path", tmp_path / "base")


@pytest.mark.parametrize("metadata", [None, "", '{"file_name": "000.png", "text": "cut'])
def test_dataset_that_cannot_be_read(run, no_weights, dataset_path, tmp_path, metadata):
    """An empty folder; an empty and a damaged `metadata.jsonl`."""
    (tmp_path / "data").mkdir()
    if metadata is not None:
        shutil.copy(Path(dataset_path, "000.png"), tmp_path / "data")
        (tmp_path / "data" / "metadata.jsonl").write_text(metadata)
    with pytest.raises(train.ADTError, match="The dataset .*data cannot be read: ."):
        run("--train_data_dir", tmp_path / "data")


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
    rows = rows.remove_columns("text").add_column("text", [["one", "two"]] * 7 + [[]])
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    args = train.parse_args(
        ["--pretrained_model_name_or_path", "x", "--dataset_name", str(tmp_path / "data"), "--resolution", "16"]
    )
    dataset = train.load_image_caption_dataset(args)
    assert train.check_dataset(dataset, range(8), args) == 1
    items = train.ImageCaptionDataset(dataset, args)
    assert {items[0, iteration, 0]["caption"] for iteration in range(20)} == {"one", "two"}
    assert items[7, 0, 0]["caption"] == ""


def test_caption_that_is_no_text(dataset_path, tmp_path):
    rows = datasets.load_dataset("imagefolder", data_dir=dataset_path, split="train")
    rows = rows.remove_columns("text").add_column("text", list(range(8)))
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    args = train.parse_args(["--pretrained_model_name_or_path", "x", "--dataset_name", str(tmp_path / "data")])
    with pytest.raises(train.ADTError, match="neither text nor a list of texts"):
        train.check_dataset(train.load_image_caption_dataset(args), range(8), args)


def test_options_that_are_ignored_do_not_hinder_resuming(run):
    run("--checkpointing_steps", 4)
    run("--resume_from_checkpoint", "latest", "--rank", 2, "--lora_dropout", 0.5)
    plain = ("--adversarial_loss_weight", 0, "--checkpointing_steps", 4)
    run(*plain, output_dir="plain")
    more = ("--discriminator_learning_rate", 1e-2, "--num_gradient_steps", 1, "--augmentation_policy")
    run(*plain, "--resume_from_checkpoint", "latest", *more, output_dir="plain")


def test_checkpoint_of_another_configuration(run, no_weights, options, monkeypatch):
    monkeypatch.undo()
    run("--checkpointing_steps", 4)
    with pytest.raises(train.ADTError, match=r"guidance_scale 7.0 \(now 3.0\), sampler ddim \(now euler\)"):
        run("--resume_from_checkpoint", "latest", "--sampler", "euler", "--guidance_scale", 3)
    with pytest.raises(train.ADTError, match=r"global_batch_size 2 \(now 4\)"):
        run("--resume_from_checkpoint", "latest", "--gradient_accumulation_steps", 2)
    with pytest.raises(train.ADTError, match="past --max_train_steps"):
        run("--resume_from_checkpoint", "latest", "--max_train_steps", 3)


def test_decay_of_the_learning_rate_has_one_length(run):
    run("--checkpointing_steps", 2, "--max_train_steps", 2, "--lr_scheduler", "cosine")
    with pytest.raises(train.ADTError, match=r"max_train_steps 2 \(now 4\)"):
        run("--lr_scheduler", "cosine", "--resume_from_checkpoint", "latest")


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


@pytest.mark.parametrize(("name", "iteration"), [("UNet", 2), ("discriminator", 1)])
def test_infinite_gradient_stops_the_run_before_the_step(run, tmp_path, monkeypatch, name, iteration):
    """A finite loss may have a gradient that is not, which would spoil every weight through the clipping."""
    cls = UNet2DConditionModel if name == "UNet" else train.SiameseDiscriminator
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
    with pytest.raises(train.ADTError, match=f"gradient norm of the {name} became (nan|inf) at iteration {iteration}"):
        run("--checkpointing_steps", 1)
    assert len(train.list_checkpoints(tmp_path / "out")) == iteration - 1


def test_skipped_step_moves_nothing(run, monkeypatch):
    """float16's loss scaling skips a step that overflowed: averages and schedules must not move then."""
    twins = []
    monkeypatch.setattr(AcceleratedOptimizer, "step", lambda self: None)
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", True)
    monkeypatch.setattr(train.SiameseDiscriminator, "update_twin", lambda self: twins.append(1))
    output = run("--use_ema", "--lr_warmup_steps", 2, "--checkpointing_steps", 4)
    state = json.loads((output / "checkpoint-4" / "unet_ema" / "ema.json").read_text())
    assert state["optimization_step"] == 0 and twins == []
    assert set(read_scalars(output)["lr"].values()) == {0}


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


def test_card_names_the_size_where_it_is_not_the_models_own(run):
    assert "height=8, width=8" in (run("--resolution", 8, "--discriminator_resolution", 8) / "README.md").read_text()


@pytest.mark.parametrize("more", [(), ("--use_lora",), ("--use_lora", "--fuse_lora")], ids=["full", "lora", "fused"])
def test_push_to_hub_sends_the_result_and_nothing_else(run, monkeypatch, tmp_path, more):
    calls = {}

    def create_repo(**kwargs):
        calls["create"] = kwargs
        assert not (tmp_path / "out" / "unet").exists()  # before the training, so that a wrong token fails early
        return types.SimpleNamespace(repo_id="me/tuned-as-the-hub-has-it")

    monkeypatch.setattr(train, "create_repo", create_repo)
    monkeypatch.setattr(train, "upload_folder", lambda **kwargs: calls.update(upload=kwargs))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("of mine")
    output = run(
        "--push_to_hub", "--hub_model_id", "me/tuned", "--hub_token", "hf_secret", "--checkpointing_steps", 2,
        "--validation_prompts", "a red disc", *more,
    )  # fmt: skip
    assert calls["create"] == {"repo_id": "me/tuned", "exist_ok": True, "token": "hf_secret"}
    upload = calls["upload"]
    assert upload["repo_id"] == "me/tuned-as-the-hub-has-it" and upload["token"] == "hf_secret"
    from huggingface_hub.utils import filter_repo_objects

    files = [str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()]
    assert any("tfevents" in file for file in files) and any("checkpoint-2" in file for file in files)
    sent = set(filter_repo_objects(files, allow_patterns=upload["allow_patterns"]))
    own = {"README.md", "adt_config.json", "images/prompt-0.png", "scheduler/scheduler_config.json"}
    adapters, pipeline = (
        "pytorch_lora_weights.safetensors",
        {"model_index.json", "unet/config.json", "vae/config.json"},
    )
    assert own <= sent and (adapters in sent) == ("--use_lora" in more)
    assert pipeline <= sent if more != ("--use_lora",) else sent == own | {adapters}
    unwanted = ("checkpoint", "tfevents", "validation", "notes")
    assert not [file for file in sent if any(word in file for word in unwanted)]
    card = (output / "README.md").read_text()
    assert '("me/tuned-as-the-hub-has-it"' in card and str(tmp_path) not in card
    for file in output.rglob("*"):
        if file.is_file():
            assert b"hf_secret" not in file.read_bytes(), file


def test_card_says_what_was_done(run):
    def card(*more):
        return (run(*more) / "README.md").read_text()

    assert "siamese discriminator" in card() and "projected discriminator" in card("--discriminator_type", "projected")
    plain = card("--adversarial_loss_weight", 0)
    assert "by plain fine-tuning" in plain and "training has not sampled" in plain and "DINOv2" not in plain


def test_card_is_written_anew(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("an old card")
    assert "an old card" not in (run() / "README.md").read_text()


def test_trackers(run, monkeypatch):
    output = run("--report_to", "none", output_dir="none")
    assert not (output / "logs").exists()
    output = run("--logging_dir", "events", "--tracker_project_name", "mine")
    assert set(read_scalars(output, "events")["discriminator_loss"]) == {1, 2, 3, 4}

"""What is the SD1.5 script's own, run in this process by `main(parse_args(...))` on a tiny model of the real classes.

`test_families.py` has what every script must show for itself, and `test_*_utils.py` what the scripts share.
"""

import json
import logging
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch
from conftest import FAMILIES
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from helpers import read_network, read_scalars

import train_adt_sd15 as train
from data_utils import (
    GlobalBatchSampler,
    ImageCaptionDataset,
    load_image_caption_dataset,
    make_generator,
    normalize_pixels,
)
from training_utils import ADTError, Batch, Conditions, configure_sampler


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def family():
    return FAMILIES["sd15"]


# The main job


SAMPLERS = {"ddim": DDIMScheduler, "dpmsolver++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_trains_and_is_saved(run, sampler):
    output = run("--sampler", sampler)
    scheduler = DiffusionPipeline.from_pretrained(output, safety_checker=None).scheduler
    assert type(scheduler) is SAMPLERS[sampler]
    assert scheduler.config.timestep_spacing == "leading"  # the base's
    assert scheduler.config.prediction_type == "epsilon"


PUBLISHED = tiny.SD15_SCHEDULER | {"clip_sample": False}  # Stable Diffusion 1.5's file, which states no spacing
XL = tiny.SDXL_SCHEDULER


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("published", "own_class"), [(PUBLISHED, PNDMScheduler), (XL, EulerDiscreteScheduler)])
@pytest.mark.parametrize("filled_in", [False, True])
def test_timesteps_are_those_of_the_pipelines_users(sampler, published, own_class, filled_in):
    """`from_config` with the pipeline's scheduler, whose class fills in what the file does not state."""
    pipelines = own_class.from_config(published)
    expected = SAMPLERS[sampler].from_config(pipelines.config)
    expected.set_timesteps(30)
    scheduler = configure_sampler(sampler, pipelines.config if filled_in else published)
    scheduler.set_timesteps(30)
    assert torch.equal(scheduler.timesteps, expected.timesteps)
    first = {"ddim": [958, 925], "dpmsolver++": [999, 966], "euler": [999, 964]}[sampler]
    if published is XL:
        first = [961, 929] if sampler == "dpmsolver++" else [958, 925]
    assert scheduler.timesteps[:2].int().tolist() == first


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_spacing_of_the_option_and_of_zero_terminal_snr(sampler):
    zero_snr = XL | {"rescale_betas_zero_snr": True}
    assert configure_sampler(sampler, zero_snr).config.timestep_spacing == "trailing"
    for base in (zero_snr, XL, PUBLISHED):
        assert configure_sampler(sampler, base, "linspace").config.timestep_spacing == "linspace"


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


# Plain fine-tuning


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_weight_zero_is_plain_fine_tuning(run, options, tmp_path, prediction_type, caplog):
    path = tiny.make_sd15(tmp_path / "base", prediction_type=prediction_type)
    more = ("--pretrained_model_name_or_path", path, "--adversarial_loss_weight", 0, "--max_train_steps", 3,
            "--learning_rate", 1e-3, "--discriminator_model_name_or_path", "does/not-exist",
            "--diffusion_loss_weight", 0.1)  # fmt: skip
    with caplog.at_level(logging.INFO):
        output = run(*more)
    assert any("are ignored" in message for message in caplog.messages)
    scalars = read_scalars(output)
    assert set(scalars) == {"diffusion_loss", "diffusion_gradient_norm", "lr"}
    losses = scalars["diffusion_loss"]
    assert not list(output.rglob("discriminator*"))

    # A reference loop: the textbook loss with diffusers' own schedule, on the noise, timesteps and crops of the run.
    args = train.parse_args(options(*more))
    pipeline = StableDiffusionPipeline.from_pretrained(path, safety_checker=None)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    dataset = ImageCaptionDataset(load_image_caption_dataset(args), args)
    optimizer = torch.optim.AdamW(pipeline.unet.parameters(), lr=1e-3, weight_decay=1e-2)
    for iteration, keys in enumerate(GlobalBatchSampler(8, args)):
        items = [dataset[key] for key in keys]

        def draw(function, shape, purpose):
            return torch.stack([function(shape, generator=make_generator(0, purpose, iteration, n)) for n in range(2)])

        with torch.no_grad():
            pixel_values = normalize_pixels(torch.stack([item["pixel_values"] for item in items]))
            posterior = pipeline.vae.encode(pixel_values).latent_dist
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
    latents, noise = torch.full((2, 1, 1, 1), 2.0), torch.full((2, 1, 1, 1), 3.0)
    conditions = Conditions(negative=None, positive=None, loss=None)
    unused = dict.fromkeys(("captions", "images", "noise", "density", "augmentation"))
    batch = Batch(latents=latents, loss_noise=noise, conditions=conditions, **unused)
    alpha = torch.tensor([0.9, 0.5]).sqrt().view(2, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    monkeypatch.setattr(train, "call_network", lambda *arguments: torch.zeros(2, 1, 1, 1))

    def loss(prediction_type, snr_gamma=None):
        scheduler = DDPMScheduler(prediction_type=prediction_type)
        args = types.SimpleNamespace(snr_gamma=snr_gamma)
        return train.diffusion_loss(None, batch, None, (alpha, sigma), scheduler, args)[0].item()

    assert loss("epsilon") == pytest.approx(9.0)
    assert loss("epsilon", 5.0) == pytest.approx((9 * 5 / 9 + 9) / 2)
    velocity = ((alpha * 3 - sigma * 2) ** 2).flatten().tolist()
    assert loss("v_prediction") == pytest.approx(sum(velocity) / 2)
    assert loss("v_prediction", 5.0) == pytest.approx((velocity[0] * 5 / 10 + velocity[1] * 1 / 2) / 2)


def test_automatic_weight_keeps_the_ratio(run):
    scalars = read_scalars(run("--adversarial_loss_weight", "auto", "--adversarial_gradient_ratio", 0.5))
    assert set(scalars["adversarial_loss_weight"]) == {2, 4}
    for step, weight in scalars["adversarial_loss_weight"].items():
        ratio = weight * scalars["adversarial_gradient_norm"][step] / scalars["diffusion_gradient_norm"][step]
        assert ratio == pytest.approx(0.5, rel=1e-5)


# Bad input


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
    with pytest.raises(ADTError, match=sentence):
        run("--pretrained_model_name_or_path", tmp_path / "base")


def test_unreadable_vae_of_the_base_is_named(run, no_weights, sd15_path, tmp_path):
    shutil.copytree(sd15_path, tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "vae")
    with pytest.raises(ADTError, match="base has no readable VAE"):
        run("--pretrained_model_name_or_path", tmp_path / "base")


def test_command_line_prints_one_sentence(options):
    result = subprocess.run(
        [sys.executable, ROOT / "train_adt_sd15.py", *options("--resolution", 17)], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: --resolution 17 is not divisible by the VAE's factor 2."
    assert "Traceback" not in result.stderr

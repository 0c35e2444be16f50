"""Robust training: targets, perturbations and passes, against hand computations."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, reset_accelerate
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from helpers import equal, read_network, read_scalars

from related import train_lcm, train_robust
from related.related_utils import Perturbation, perturbation_rms
from related.train_robust import MIN_NOISE_LEVEL, perturbed_loss
from training_utils import Batch, Conditions


@pytest.fixture
def family():
    return FAMILIES["sd15"]


@pytest.fixture
def run(base_path, dataset_path, tmp_path):
    def run(*more, script=train_robust, output_dir="out"):
        reset_accelerate()
        words = [
            "--pretrained_model_name_or_path", base_path, "--train_data_dir", dataset_path, "--resolution", 16,
            "--train_batch_size", 2, "--max_train_steps", 2, "--learning_rate", 1e-3, "--lr_warmup_steps", 0,
            "--dataloader_num_workers", 0, "--output_dir", tmp_path / output_dir, *more,
        ]  # fmt: skip
        words = ["--family", "sd15", *words] if script is train_robust else words
        script.main(script.parse_args([str(word) for word in words]))
        return tmp_path / output_dir

    return run


# The target


def make_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents, noise, delta = torch.randn(3, 2, 4, 8, 8, generator=generator)
    condition = {"prompt_embeds": torch.zeros(2, 3, 5), "pooled_prompt_embeds": torch.zeros(2, 5)}
    conditions = Conditions(condition, condition, condition)
    return Batch([], latents, latents, noise, noise, torch.zeros(2), conditions, {}), 0.05 * delta


class Linear(torch.nn.Module):
    """Predicts `0.3 x`; keeps what it saw."""

    def forward(self, sample=None, *rest, hidden_states=None, **options):
        self.seen = sample if sample is not None else hidden_states
        return SimpleNamespace(sample=0.3 * self.seen)


PREDICTS = {
    "epsilon": ("sd15", lambda a, s, x, noise: noise),
    "v_prediction": ("sdxl", lambda a, s, x, noise: a * noise - s * x),
    "flow": ("sd3", lambda a, s, x, noise: noise - x),
}
DERIVATIVES = {  # of the target by delta
    "epsilon": lambda a, s: 1 / s,
    "v_prediction": lambda a, s: a / s,
    "flow": lambda a, s: 1 / s,
}


@pytest.mark.parametrize("predicts", PREDICTS)
@pytest.mark.parametrize("level", [0.5, 0.01])
def test_target_follows_the_perturbation(predicts, level):
    """The input is `x_t + delta`; the target moves by `delta / s`, `(a / s) delta` or `delta / s`, `s` floored."""
    name, target_of = PREDICTS[predicts]
    module = FAMILIES[name].train
    if predicts == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler()
        a = 1 - level
    else:
        scheduler = DDPMScheduler(prediction_type=predicts)
        a = (1 - level**2) ** 0.5
    args = SimpleNamespace(adversarial=False, weighting_scheme="none", snr_gamma=None)
    levels = [torch.full((2, 1, 1, 1), value) for value in (a, level)]
    batch, delta = make_batch()
    # SDXL's network has more conditions than the loss is about.
    network, delta = Linear(), delta.requires_grad_()
    if name == "sdxl":
        batch.conditions.loss = batch.conditions.loss | {"time_ids": torch.zeros(2, 6)}
    timesteps = torch.tensor([10, 10])
    loss = perturbed_loss(network, batch, delta, timesteps, levels, scheduler, module, args)
    noisy = a * batch.latents + level * batch.noise
    torch.testing.assert_close(network.seen, noisy + delta)
    floored = max(level, MIN_NOISE_LEVEL)
    target = target_of(a, level, batch.latents, batch.noise) + DERIVATIVES[predicts](a, floored) * delta
    torch.testing.assert_close(loss, F.mse_loss(0.3 * (noisy + delta), target))
    # To the perturbation through the input alone.
    [gradient] = torch.autograd.grad(loss, delta)
    expected = 2 * 0.3 * (0.3 * (noisy + delta) - target) / delta.numel()
    torch.testing.assert_close(gradient, expected.detach())


# The perturbation


def test_step_and_projection():
    like = torch.zeros(2, 4, 8, 8)
    gradient = torch.randn(like.shape, generator=torch.Generator().manual_seed(0))
    direction = gradient / gradient.flatten(1).norm(dim=1).view(2, 1, 1, 1)
    perturbation = Perturbation(like, 0.1, "rms", radius=0.25)
    for expected in (0.1, 0.2, 0.25, 0.25):
        perturbation.delta.grad = 1e-12 * gradient
        perturbation.ascend()
        torch.testing.assert_close(perturbation.delta.detach(), expected * 16 * direction)  # 16: sqrt(4 * 8 * 8)
        accelerator = SimpleNamespace(reduce=lambda value, reduction: value)
        assert perturbation_rms([perturbation] * 2, accelerator) == pytest.approx(expected)
    raw = Perturbation(like, 0.1, "norm", radius=0.25)
    raw.delta.grad = gradient
    raw.ascend()
    torch.testing.assert_close(raw.delta.detach(), 0.1 * direction)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_unusable_gradient_leaves_its_image_alone(value):
    perturbation = Perturbation(torch.zeros(2, 1, 2, 2), 0.1, "rms", radius=1)
    perturbation.delta.grad = torch.ones(2, 1, 2, 2)
    perturbation.delta.grad[0] = value
    perturbation.ascend()
    assert perturbation.delta[0].abs().max() == 0 and perturbation.delta[1].norm() > 0


# Passes


def test_one_pass_is_plain_fine_tuning(run, family):
    robust = run("--robust_steps", 1, output_dir="robust")
    plain = run("--adversarial_loss_weight", 0, script=family.train, output_dir="plain")
    assert equal(read_network(robust), read_network(plain))
    assert read_scalars(robust)["diffusion_loss"] == read_scalars(plain)["diffusion_loss"]


def test_each_pass_updates_and_has_the_same_batch(run, family, monkeypatch):
    seen, rates = [], []
    original, step = family.train.diffusion_loss, train_robust.prepare_generator

    def recording_loss(network, batch, timesteps, levels, *others):
        seen.append((batch.latents, timesteps, batch.loss_noise))
        return original(network, batch, timesteps, levels, *others)

    def recording_generator(network, run):
        generator = step(network, run)
        scheduler_step = generator.lr_scheduler.step
        generator.lr_scheduler.step = lambda: rates.append(generator.lr) or scheduler_step()
        return generator

    monkeypatch.setattr(family.train, "diffusion_loss", recording_loss)
    monkeypatch.setattr(train_robust, "prepare_generator", recording_generator)
    output = run("--robust_step_size", 0.05, "--lr_scheduler", "linear")
    # The rate falls to 0 over two iterations of three updates.
    assert rates == pytest.approx([1e-3 * (6 - n) / 6 for n in range(6)])
    for first, second, third in (seen[:3], seen[3:]):
        for other in (second, third):
            assert torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])
        assert not torch.equal(first[2], second[2]) and not torch.equal(second[2], third[2])
    assert not torch.equal(seen[0][0], seen[3][0])
    scalars = read_scalars(output)
    assert scalars["perturbation_rms"].keys() == {1, 2}
    assert all(0.05 <= value <= 0.1 + 1e-6 for value in scalars["perturbation_rms"].values())
    assert scalars["perturbed_diffusion_loss"].keys() == {1, 2}


def test_options_change_the_run(run):
    plain = read_network(run("--robust_step_size", 0.05, output_dir="plain"))
    for n, more in enumerate(
        [
            ("--robust_steps", 2),
            ("--robust_step_unit", "norm"),
            ("--robust_radius", 0.06),
            ("--robust_step_size", 0.04),
        ]
    ):
        assert not equal(plain, read_network(run("--robust_step_size", 0.05, *more, output_dir=f"run-{n}")))


# The baseline


def test_input_perturbation(run, family, monkeypatch):
    """The network sees more noise, by 0.1 of it, than its target has, and another draw of it each time."""
    inputs, batches = [], []
    original = family.train.diffusion_loss

    def recording_loss(network, batch, timesteps, levels, *others):
        batches.append((batch, *levels))
        return original(network, batch, timesteps, levels, *others)

    monkeypatch.setattr(UNet2DConditionModel, "forward", recording(UNet2DConditionModel.forward, inputs))
    monkeypatch.setattr(family.train, "diffusion_loss", recording_loss)
    run("--robust_steps", 1, "--input_perturbation", 0.1)
    extra = []
    for sample, (batch, a, s) in zip(inputs, batches, strict=True):
        assert torch.equal(batch.noise, batch.loss_noise)
        extra.append((sample - a * batch.latents - s * batch.noise) / s)
        assert extra[-1].std().item() == pytest.approx(0.1, rel=0.15)
    assert F.cosine_similarity(extra[0].flatten(), extra[1].flatten(), dim=0).abs() < 0.2


def recording(forward, inputs):
    def wrapped(self, sample, *others, **options):
        inputs.append(sample.detach())
        return forward(self, sample, *others, **options)

    return wrapped


def test_input_perturbation_is_the_baseline_of_one_pass(capsys):
    words = ["--family", "sd15", "--pretrained_model_name_or_path", "x", "--dataset_name", "y"]
    with pytest.raises(SystemExit):
        train_robust.parse_args([*words, "--input_perturbation", "0.1"])
    assert "--input_perturbation is the baseline" in capsys.readouterr().err


@pytest.mark.parametrize("script", [train_robust, train_lcm])
@pytest.mark.parametrize("option", [("step_size", "0.1"), ("step_unit", "norm"), ("radius", "1")], ids=lambda o: o[0])
def test_options_of_perturbations_need_some(script, option, capsys):
    words = ["--family", "sd15", "--pretrained_model_name_or_path", "x", "--dataset_name", "y", "--robust_steps"]
    name, value = option
    script.parse_args([*words, "2", f"--robust_{name}", value])
    with pytest.raises(SystemExit):
        script.parse_args([*words, "1", f"--robust_{name}", value])
    assert f"--robust_{name} is of perturbations, which --robust_steps 1" in capsys.readouterr().err


def test_the_last_pass_follows_no_perturbation(run, monkeypatch):
    followed = []
    original = train_robust.perturbed_loss

    def watched(network, batch, delta, *args):
        followed.append(delta.requires_grad)
        return original(network, batch, delta, *args)

    monkeypatch.setattr(train_robust, "perturbed_loss", watched)
    run("--max_train_steps", 1)
    assert followed == [True, True, False]

"""Adversarial diffusion distillation: losses, targets and steps, against hand computations and autograd."""

import json
import shutil
import types

import pytest
import torch
from conftest import FAMILIES, reset_accelerate
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from helpers import equal, read_network, read_scalars, relative

import data_utils
from related import train_add
from related.related_utils import (
    noise_levels,
    one_step,
    predicted_noise,
    predicted_original,
    prediction_type,
)
from related.train_add import (
    STUDENT_STEPS,
    ConditionedDiscriminator,
    distillation_loss,
    hinge,
    make_condition,
    make_student_sampler,
    noise_free_target,
    r1_penalty,
)
from training_utils import ADTError, make_predict


TINY = ("--discriminator_layers", "-1", "1", "3", "--discriminator_resolution", 16)


@pytest.fixture
def run(family, base_path, dinov2_path, dataset_path, tmp_path):
    def run(*more, output_dir="out"):
        reset_accelerate()
        words = [
            "--family", family.name, "--pretrained_model_name_or_path", base_path, "--train_data_dir", dataset_path,
            "--discriminator_model_name_or_path", dinov2_path, *TINY, "--resolution", 16, "--train_batch_size", 2,
            "--max_train_steps", 2, "--learning_rate", 1e-3, "--discriminator_learning_rate", 1e-3,
            "--lr_warmup_steps", 0, "--dataloader_num_workers", 0, *family.options,
            "--output_dir", tmp_path / output_dir, *more,
        ]  # fmt: skip
        train_add.main(train_add.parse_args([str(word) for word in words]))
        return tmp_path / output_dir

    return run


@pytest.fixture
def systems(monkeypatch):
    """What runs have trained with, in a list."""
    found = []
    original = train_add.train
    monkeypatch.setattr(
        train_add, "train", lambda system, validation: found.append(system) or original(system, validation)
    )
    return found


only_sd15 = pytest.mark.parametrize("family", [FAMILIES["sd15"]], ids=["sd15"])


# Predictions


MODULES = {
    "epsilon": FAMILIES["sd15"].train, "v_prediction": FAMILIES["sdxl"].train, "flow_prediction": FAMILIES["sd3"].train
}  # fmt: skip


def make_scheduler(predicts):
    if predicts == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return DDPMScheduler(prediction_type=predicts, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "flow_prediction"])
def test_predictions_are_made_into_what_they_stand_for(predicts):
    scheduler = make_scheduler(predicts)
    assert prediction_type(scheduler) == predicts
    original, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    timesteps = torch.tensor([999, 499, 19])
    a, s = noise_levels(scheduler, timesteps)
    sample = a * original + s * noise
    prediction = {
        "epsilon": noise, "v_prediction": a * noise - s * original, "flow_prediction": noise - original
    }[predicts]  # fmt: skip
    torch.testing.assert_close(predicted_original(prediction, sample, (a, s), predicts), original, rtol=0, atol=1e-4)
    torch.testing.assert_close(predicted_noise(prediction, sample, (a, s), predicts), noise, rtol=0, atol=1e-4)
    if predicts != "flow_prediction":
        assert a[0].item() == pytest.approx(0.0683, abs=1e-4)  # Stable Diffusion's last level keeps some signal
        expected = scheduler.add_noise(original, noise, timesteps)
    else:
        assert s.flatten().tolist() == pytest.approx([0.999, 0.499, 0.019])
        expected = original + s * (noise - original)
    torch.testing.assert_close(sample, expected)


def test_one_step_has_autograds_gradient(run, systems):
    run("--max_train_steps", 1, "--learning_rate", 1e-30)
    [system] = systems
    network, module, run_ = system.student.network.eval(), system.module, system.run
    examples = next(train_add.load_micro_batches(run_, save_checkpoint=None))
    batch = train_add.prepare_student(examples, 0, system)
    levels = noise_levels(system.models.noise_scheduler, batch.timesteps)
    predict = make_predict(network, batch.batch.conditions, module.call_network)

    def loss_of(original):
        return (module.decode_latents(system.models.vae, original) - batch.batch.images).square().mean()

    path = one_step(predict, batch.sample, batch.timesteps, levels, system.predicts)
    [gradient] = path.prediction_gradients(loss_of(path.latents))
    [replay] = path.replay(predict, [gradient])
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(replay(), parameters, allow_unused=True)

    prediction = predict(batch.sample, batch.timesteps, (1,))
    original = predicted_original(prediction, batch.sample, levels, system.predicts)
    torch.testing.assert_close(original, path.latents)
    expected = torch.autograd.grad(loss_of(original), parameters, allow_unused=True)
    pairs = [(own, other) for own, other in zip(found, expected, strict=True) if other is not None]
    own, other = (torch.cat([gradient.flatten() for gradient in side]) for side in zip(*pairs))
    assert ((own - other).norm() / other.norm()).item() < 1e-5


# The student's steps


# Which of the student's four timesteps so many steps are made at.
GRID_STEPS = {1: [0], 2: [0, 2], 3: [0, 1, 2], 4: [0, 1, 2, 3]}


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "flow_prediction"])
def test_saved_scheduler_samples_on_the_training_grid(predicts):
    scheduler = make_scheduler(predicts)
    grid = make_student_sampler(scheduler, STUDENT_STEPS, MODULES[predicts]).timesteps.tolist()
    if predicts == "flow_prediction":
        assert grid == pytest.approx([1000, 900, 750, 500])  # shares 1, 3/4, 1/2, 1/4 under the shift of 3
    else:
        assert grid == [999, 749, 499, 249]
    for num_steps, indices in GRID_STEPS.items():
        sampler = make_student_sampler(scheduler, num_steps, MODULES[predicts])
        assert sampler.timesteps.tolist() == [grid[n] for n in indices]


def test_saved_pipeline_calls_the_network_on_the_grid(run, systems, family):
    """By the call of the card, for any number of steps; other trailing schedulers leave the grid at three."""
    output = run("--max_train_steps", 1)
    [system] = systems
    pipeline = DiffusionPipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    getattr(pipeline, family.network).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"] if "timestep" in kwargs else args[1]),
        with_kwargs=True,
    )

    def draw(**options):
        seen.clear()
        generator = torch.Generator().manual_seed(0)
        image = pipeline("a red disc", generator=generator, output_type="pt", **options).images
        assert image.isfinite().all() and image.std() > 0
        return [float(timestep.flatten()[0]) for timestep in seen]

    args, grid = system.run.args, system.grid
    for num_steps, indices in GRID_STEPS.items():
        options = train_add.make_family(args).inference_options(args.replace(num_inference_steps=num_steps))
        assert draw(**options) == pytest.approx(grid[indices].tolist())
    if family.name == "sd3":
        return
    config = pipeline.scheduler.config
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(config, timestep_spacing="trailing")
    for num_steps, indices in GRID_STEPS.items():
        pipeline.scheduler.set_timesteps(num_steps)
        assert (pipeline.scheduler.timesteps.tolist() == grid[indices].tolist()) == (num_steps != 3)
    assert draw(num_inference_steps=4, guidance_scale=0.0) == grid.tolist()


@only_sd15
def test_student_starts_from_noise_alone_at_the_first_timestep(run, systems):
    run("--train_batch_size", 8, "--discriminator_norm_group", 2)
    [system] = systems
    examples = next(train_add.load_micro_batches(system.run, save_checkpoint=None))
    batch = train_add.prepare_student(examples, 0, system)
    pure = batch.timesteps == 999
    assert 0 < pure.sum() < 8 and set(batch.timesteps.tolist()) <= {999, 749, 499, 249}
    assert torch.equal(batch.sample[pure], batch.batch.noise[pure])
    a, s = noise_levels(system.models.noise_scheduler, batch.timesteps)
    noisy = a * batch.batch.latents + s * batch.batch.noise
    torch.testing.assert_close(batch.sample[~pure], noisy[~pure])
    # What the discriminator sees beside: nothing of an image of which the student has seen nothing.
    channels = system.feature_network.channels
    text, image = batch.condition[:, :-channels], batch.condition[:, -channels:]
    assert image[pure].abs().max() == 0 and image[~pure].abs().amax(dim=1).min() > 0
    encoder = system.models.prompt_encoder
    tokens = encoder.tokenizer(
        batch.batch.captions[0], padding="max_length", max_length=encoder.tokenizer.model_max_length,
        truncation=True, return_tensors="pt",
    )  # fmt: skip
    torch.testing.assert_close(text[0], encoder.text_encoder(tokens.input_ids).pooler_output[0])


def test_conditions(run, systems):
    """Text alone is the model's pooled embedding, and what the two have is one after the other."""
    run()
    [system] = systems
    batch = train_add.prepare_student(next(train_add.load_micro_batches(system.run, save_checkpoint=None)), 0, system)
    pure, found = torch.tensor([True, False]), {}
    for name in ("none", "text", "image", "both"):
        args = types.SimpleNamespace(discriminator_condition=name, adversarial_weight=1)
        encoder = system.models.prompt_encoder
        found[name] = make_condition(batch.batch, pure, encoder, system.feature_network, args)
        width = train_add.condition_width(encoder, system.feature_network, args)
        assert width == (0 if name == "none" else found[name].shape[1])
    assert found["none"] is None and torch.equal(torch.cat([found["text"], found["image"]], dim=1), found["both"])
    embedding = system.feature_network.embed(batch.batch.images)
    assert found["image"][0].abs().max() == 0 and torch.equal(found["image"][1], embedding[1])
    if "pooled_prompt_embeds" in batch.batch.conditions.positive:
        assert torch.equal(found["text"], batch.batch.conditions.positive["pooled_prompt_embeds"])


# The discriminator


@only_sd15
def test_mismatched_pairs_are_real_images_under_others_conditions(run, monkeypatch):
    """Each an image's own features, under the condition of the next of another caption, and a term of the loss."""
    rows, seen = [], []
    original = train_add.update_discriminator

    def watched(batches, iteration, system):
        [batch] = batches
        rows.append((system.feature_network(batch.batch.images), batch.condition))
        hook = system.discriminator.wrapped.register_forward_hook(
            lambda _, inputs, scores: seen.append((*inputs, scores))
        )
        values = original(batches, iteration, system)
        hook.remove()
        return values

    monkeypatch.setattr(train_add, "update_discriminator", watched)
    weight = 0.5
    scalars = read_scalars(run("--mismatched_pair_weight", weight, "--max_train_steps", 1))
    [(features, conditions)], [(_, _, real), (mismatched, others, scores), (_, _, fake)] = rows, seen
    assert all(map(torch.equal, mismatched, features))
    assert torch.equal(others, conditions.flip(0)) and not torch.equal(others, conditions)  # of two the other
    [loss] = scalars["discriminator_loss"].values()
    assert loss == pytest.approx((hinge(real, 1) + weight * hinge(scores, -1) + hinge(fake, -1)).item(), rel=1e-5)


def test_projection_by_hand():
    torch.manual_seed(0)
    discriminator = ConditionedDiscriminator(8, 2, condition_width=3, norm_group=1).eval()
    features = [torch.randn(2, 8, 5), torch.randn(2, 8, 5)]
    condition = torch.randn(2, 3)
    scores = discriminator(features, condition)
    for head, linear, x, score in zip(discriminator.heads, discriminator.maps, features, scores, strict=True):
        expected = torch.einsum("bwl,bw->bl", head(x), linear(condition)) / 8
        torch.testing.assert_close(score, expected)
    assert not torch.allclose(scores[0], discriminator(features, -condition)[0])
    assert [score.shape for score in ConditionedDiscriminator(8, 2)(features)] == [(2, 5)] * 2


def test_hinge_by_hand():
    scores = [torch.tensor([[0.5, 2.0]]), torch.tensor([[-3.0, 0.0]])]
    assert hinge(scores, 1).item() == pytest.approx((0.5 + 0) / 2 + (4 + 1) / 2)
    assert hinge(scores, -1).item() == pytest.approx((1.5 + 3) / 2 + (0 + 1) / 2)


def test_r1_by_hand_and_its_gradient():
    """Of linear heads `D = w . h` the gradient at each token is `w`: R1 is `L |w|^2`, and its gradient `2 L w`."""
    weights = [torch.randn(4, requires_grad=True) for _ in range(2)]
    features = [torch.randn(3, 4, length, requires_grad=True) for length in (5, 7)]
    scores = [torch.einsum("bcl,c->bl", x, w) for x, w in zip(features, weights, strict=True)]
    penalty = r1_penalty(scores, features)
    expected = 5 * weights[0].square().sum() + 7 * weights[1].square().sum()
    torch.testing.assert_close(penalty, expected)
    gradients = torch.autograd.grad(penalty, weights)
    for gradient, weight, length in zip(gradients, weights, (5, 7), strict=True):
        torch.testing.assert_close(gradient, 2 * length * weight)


def test_r1_is_that_of_a_double_backward_through_the_real_heads():
    torch.manual_seed(0)
    discriminator = ConditionedDiscriminator(8, 1, condition_width=3, norm_group=1).eval()
    x, condition = torch.randn(2, 8, 5, requires_grad=True), torch.randn(2, 3)
    penalty = r1_penalty(discriminator([x], condition), [x])
    # The squared norm is the largest squared slope: along the gradient a small step shows it.
    [gradient] = torch.autograd.grad(discriminator([x], condition)[0].sum(), x)
    norm = gradient.flatten(1).norm(dim=1)
    step = 1e-3 * gradient / norm.view(2, 1, 1)
    with torch.no_grad():
        rise = discriminator([x + step], condition)[0].sum(1) - discriminator([x - step], condition)[0].sum(1)
    torch.testing.assert_close(penalty.detach(), (rise / 2e-3).square().mean(), rtol=1e-2, atol=0)
    penalty.backward()
    assert all(parameter.grad is not None for parameter in discriminator.maps.parameters() if parameter.ndim == 2)


# Distillation


def make_distillation(predicts, target, space="latent", teacher_scale=1.0):
    """A batch and a system whose teacher predicts what depends on the condition alone."""
    generator = torch.Generator().manual_seed(0)
    original, noise, positive, negative, unwanted = torch.randn(5, 2, 4, 8, 8, generator=generator)
    scheduler = make_scheduler(predicts)
    timesteps = torch.tensor([700, 100])
    conditions = types.SimpleNamespace(positive={"embeds": positive}, negative={"embeds": negative})
    batch = types.SimpleNamespace(
        path=types.SimpleNamespace(latents=original.requires_grad_()),
        batch=types.SimpleNamespace(conditions=conditions),
        teacher_timesteps=timesteps,
        teacher_levels=noise_levels(scheduler, timesteps),
        teacher_noise=noise,
    )
    args = types.SimpleNamespace(
        distillation_target=target, distillation_space=space, teacher_guidance_scale=teacher_scale
    )
    system = types.SimpleNamespace(
        run=types.SimpleNamespace(args=args),
        models=types.SimpleNamespace(noise_scheduler=scheduler, vae=None),
        module=None,
        predicts=predicts,
        negative={"embeds": unwanted},
        teacher=lambda sample, timesteps, condition: condition["embeds"],
    )
    return batch, system, (original, noise, positive, negative, unwanted)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_exponential_target_and_weight(predicts, scale):
    batch, system, (original, noise, positive, negative, _) = make_distillation(
        predicts, "exponential", "latent", scale
    )
    a, s = batch.teacher_levels
    guided = negative + scale * (positive - negative) if scale > 1 else positive
    sample = a * original + s * noise
    target = {
        "epsilon": (sample - s * guided) / a, "v_prediction": a * sample - s * guided,
        "flow_prediction": sample - s * guided,
    }[predicts].detach()  # fmt: skip
    loss = distillation_loss(batch, system)
    torch.testing.assert_close(loss, (a * (original - target).square()).mean())
    [gradient] = torch.autograd.grad(loss, original)
    torch.testing.assert_close(gradient, 2 * a * (original - target).detach() / original.numel())


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "flow_prediction"])
def test_sds_gradient(predicts):
    """`w (eps_teacher - eps')` with `w = s^2`, over the number of elements that the mean divides by."""
    batch, system, (original, noise, positive, *_) = make_distillation(predicts, "sds")
    a, s = batch.teacher_levels
    sample = (a * original + s * noise).detach()
    teacher_noise = predicted_noise(positive, sample, (a, s), predicts)
    [gradient] = torch.autograd.grad(distillation_loss(batch, system), original)
    torch.testing.assert_close(gradient, s.square() * (teacher_noise - noise) / original.numel(), rtol=1e-4, atol=1e-7)


def test_noise_free_target():
    batch, system, (original, noise, positive, negative, unwanted) = make_distillation(
        "epsilon", "nfsd", teacher_scale=7.5
    )
    a, s = batch.teacher_levels
    target = noise_free_target((a * original + s * noise).detach(), batch, system)
    condition = positive - negative
    domain = torch.stack([(negative - unwanted)[0], negative[1]])  # at 700 and at 100
    torch.testing.assert_close(target, (original - s / a * (domain + 7.5 * condition)).detach())
    loss = distillation_loss(batch, system)
    torch.testing.assert_close(loss, (a * (original - target).square()).mean())


def test_noise_free_target_where_nothing_is_left_of_the_image():
    batch, system, _ = make_distillation("flow_prediction", "nfsd")
    batch.teacher_timesteps = torch.tensor([1000, 1000])
    batch.teacher_levels = noise_levels(system.models.noise_scheduler, batch.teacher_timesteps)
    assert batch.teacher_levels[0].max() == 0
    assert distillation_loss(batch, system).isfinite()


def test_noise_free_target_of_a_real_pipeline(run, family, systems, monkeypatch):
    """By the base itself, image by image, under the captions, no prompt, and the unwanted one."""
    found, original = [], train_add.noise_free_target

    def watched(sample, batch, system):
        found.append((sample, batch, original(sample, batch, system)))
        return found[-1][-1]

    monkeypatch.setattr(train_add, "noise_free_target", watched)
    run("--distillation_target", "nfsd", "--max_train_steps", 1, "--train_batch_size", 4)
    [system], [(sample, batch, target)] = systems, found
    base = system.module.load_network(system.run.args, system.run.accelerator).eval()
    encoder, timesteps, (a, s) = system.models.prompt_encoder, batch.teacher_timesteps, batch.teacher_levels
    size = {name: value for name, value in batch.batch.conditions.positive.items() if name == "time_ids"}

    def noise(n, condition):
        row = slice(n, n + 1)
        condition = condition | {name: value[row] for name, value in size.items()}
        with torch.no_grad():
            prediction = system.module.call_network(base, sample[row], timesteps[row], condition)
        return predicted_noise(prediction, sample[row], (a[row], s[row]), system.predicts)

    assert (timesteps >= 200).any()  # where the unwanted prompt counts
    for n, caption in enumerate(batch.batch.captions):
        unconditional = noise(n, encoder.negative)
        unwanted = 0 if timesteps[n] < 200 else noise(n, encoder([train_add.NEGATIVE_PROMPT]))
        direction = unconditional - unwanted + 7.5 * (noise(n, encoder([caption])) - unconditional)
        expected = batch.path.latents[n] - s[n] / a[n] * direction[0]
        assert relative(target[n], expected) < 1e-4


@pytest.mark.parametrize("family", [FAMILIES["sdxl"]], ids=["sdxl"])
def test_cached_embeddings_give_the_same_run(run, tmp_path, monkeypatch):
    """The validation's and the unwanted prompt, which a cache of captions lacks, are encoded before it."""
    monkeypatch.setattr(data_utils, "CAPTIONS_PER_BATCH", 1)  # by batches they may differ by rounding
    common = ("--distillation_target", "nfsd", "--validation_prompts", "a blue moon", "--num_validation_images", 1)
    plain = run(*common, output_dir="plain")
    cached = run(*common, "--cache_text_embeddings", tmp_path / "cache", output_dir="cached")
    assert list((tmp_path / "cache").iterdir())
    assert read_scalars(cached) == read_scalars(plain) and equal(read_network(cached), read_network(plain))
    grids = [output / "validation" / "iteration-000002-prompt-0.png" for output in (plain, cached)]
    assert grids[0].read_bytes() == grids[1].read_bytes()


# The teacher


@pytest.mark.parametrize("more", [(), ("--use_lora", "--rank", 4, "--learning_rate", 1e-2)], ids=["full", "lora"])
def test_teacher_is_the_base_bitwise(run, systems, more):
    run(*more, "--max_train_steps", 3)
    [system] = systems
    student = system.student.network.eval()
    base = system.module.load_network(system.run.args, system.run.accelerator).eval()
    batch = train_add.prepare_student(next(train_add.load_micro_batches(system.run, save_checkpoint=None)), 0, system)
    condition, call = batch.batch.conditions.positive, system.module.call_network
    found = system.teacher(batch.sample, batch.timesteps, condition)
    with torch.no_grad():
        expected = call(base, batch.sample, batch.timesteps, condition)  # its new adapters do nothing yet
        tuned = call(student, batch.sample, batch.timesteps, condition)
        # And it leaves the student as it was.
        assert torch.equal(tuned, call(student, batch.sample, batch.timesteps, condition))
    assert torch.equal(found, expected) and not torch.equal(found, tuned)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    assert parameters and (not more or all(parameter.ndim == 2 for parameter in parameters))


# A run


@only_sd15
def test_each_update_changes_its_own_network(run, monkeypatch):
    """All of it, nothing of another, and it leaves no gradient anywhere."""
    changes, originals = [], (train_add.update_discriminator, train_add.update_student)

    def watched(update):
        def watched_update(batches, iteration, system):
            networks = {
                "student": system.student.network,
                "discriminator": system.discriminator.network,
                "teacher": system.teacher.copy,
                "DINOv2": system.feature_network,
                "VAE": system.models.vae,
            }
            before = {name: values_of(network) for name, network in networks.items()}
            values = update(batches, iteration, system)
            for name, network in networks.items():
                assert all(parameter.grad is None for parameter in network.parameters()), name
                after = values_of(network)
                moved = {key for key, value in before[name].items() if not torch.equal(value, after[key])}
                if moved:
                    changes.append(name)
                    assert moved >= {key for key, parameter in network.named_parameters() if parameter.requires_grad}
            return values

        return watched_update

    monkeypatch.setattr(train_add, "update_discriminator", watched(originals[0]))
    monkeypatch.setattr(train_add, "update_student", watched(originals[1]))
    run("--r1_weight", 1, "--mismatched_pair_weight", 0.5)
    assert changes == ["discriminator", "student"] * 2


def values_of(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


# Options


@only_sd15
def test_options_change_the_run(run):
    plain = run(output_dir="plain")
    for n, more in enumerate(
        [
            ("--adversarial_weight", 0.5), ("--adversarial_weight", "auto"), ("--adversarial_weight", 0),
            ("--distillation_weight", 0), ("--distillation_target", "sds"), ("--distillation_target", "nfsd"),
            ("--distillation_space", "latent"), ("--teacher_guidance_scale", 4), ("--r1_weight", 1),
            ("--discriminator_condition", "none"), ("--discriminator_condition", "text"),
            ("--discriminator_condition", "image"), ("--discriminator_layers", 0, 2),
            ("--discriminator_resolution", 12), ("--discriminator_norm_group", 1),
            ("--discriminator_learning_rate", 1e-2), ("--discriminator_lr_warmup_steps", 10),
            ("--mismatched_pair_weight", 1),
        ]
    ):  # fmt: skip
        output = run(*more, output_dir=f"run-{n}")
        assert not equal(read_network(plain), read_network(output)), more
        scalars = read_scalars(output)
        assert ("real_score" in scalars) == (more != ("--adversarial_weight", 0))
        assert ("distillation_loss" in scalars) == (more != ("--distillation_weight", 0))
        assert ("mismatched_score" in scalars) == (more == ("--mismatched_pair_weight", 1))
        if "auto" in more:  # both losses move the predictions alike
            for step, weight in scalars["adversarial_weight"].items():
                ratio = scalars["distillation_gradient_norm"][step] / scalars["adversarial_gradient_norm"][step]
                assert weight == pytest.approx(ratio, rel=1e-5)


@only_sd15
@pytest.mark.parametrize("flag", ["--adversarial_weight", "--distillation_weight"])
def test_a_network_of_no_weight_is_not_made(run, monkeypatch, flag):
    made = []
    for name in ("Teacher", "make_feature_network", "make_discriminator"):
        original = getattr(train_add, name)
        monkeypatch.setattr(
            train_add, name, lambda *args, name=name, original=original: made.append(name) or original(*args)
        )
    run(flag, 0, *(("--discriminator_model_name_or_path", "nowhere") if flag == "--adversarial_weight" else ()))
    others = ["make_feature_network", "make_discriminator"]
    assert made == (["Teacher"] if flag == "--adversarial_weight" else others)


@only_sd15
def test_teacher_guidance(run):
    """Is none, but for the noise-free target's 7.5, and acts on each target."""
    words = ["--family", "sd15", "--pretrained_model_name_or_path", "x", "--dataset_name", "y"]
    assert train_add.parse_args(words).teacher_guidance_scale == 1
    assert train_add.parse_args([*words, "--distillation_target", "nfsd"]).teacher_guidance_scale == 7.5
    nfsd = ("--distillation_target", "nfsd")
    results = [
        run(*nfsd, *more, output_dir=f"run-{n}") for n, more in enumerate([(), ("--teacher_guidance_scale", 2)])
    ]
    assert not equal(*map(read_network, results))


@only_sd15
@pytest.mark.parametrize(
    ("more", "kind"),
    [
        (("--adversarial_weight", 0), "steps: the base said what it would make of them."),
        (("--distillation_weight", 0), "steps: a discriminator on DINOv2 features told its images from real ones."),
    ],
)
def test_card_says_what_it_was_trained_by(run, more, kind):
    assert kind in " ".join((run(*more) / "README.md").read_text().split())


@only_sd15
@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--num_inference_steps", 5), "--num_inference_steps 5: the student has 4 steps."),
        (("--adversarial_weight", 0, "--distillation_weight", 0), "there is nothing to train by"),
        (("--adversarial_weight", "auto", "--distillation_weight", 0), "needs a distillation loss to balance"),
        (("--discriminator_norm_group", 3), "--discriminator_norm_group 3 does not divide"),
        (("--mismatched_pair_weight", 1, "--adversarial_weight", 0), "needs a discriminator that sees a condition"),
        (("--mismatched_pair_weight", 1, "--discriminator_condition", "none"), "that sees a condition"),
    ],
)
def test_bad_options(run, capsys, more, sentence):
    with pytest.raises(SystemExit):
        run(*more)
    assert sentence in capsys.readouterr().err


@only_sd15
def test_unsuitable_feature_network_is_refused_before_weights_are_loaded(run, no_weights):
    with pytest.raises(ADTError, match="discriminator_layers \\[9\\]"):
        run("--discriminator_layers", 9)


@pytest.mark.parametrize("family", [FAMILIES["sd3"]], ids=["sd3"])
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"use_dynamic_shifting": True}, "shifts its schedule with the resolution"),
        ({"shift_terminal": 0.1}, "makes 3 steps at .* which are not some of its 4"),
        ({"use_karras_sigmas": True}, "makes 3 steps at .* which are not some of its 4"),
    ],
)
def test_schedule_without_four_fixed_steps_is_refused(run, base_path, no_weights, tmp_path, changes, sentence):
    shutil.copytree(base_path, tmp_path / "base")
    file = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ADTError, match=sentence):
        run("--pretrained_model_name_or_path", tmp_path / "base")

"""Consistency distillation: its function, its points, the teacher's step, the target, and how its result is called."""

import copy
import json
import math
import types

import pytest
import tiny
import torch
from conftest import FAMILIES, reset_accelerate
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from helpers import equal, read_result, relative
from PIL import Image

from related import train_lcm
from related.related_utils import noise_levels
from training_utils import ADTError, trainable_parameters


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LORA = ("--use_lora", "--rank", 4, "--learning_rate", 1e-2)
# Base pipelines: what the family's maker is given, and what the network then predicts.
BASES = {
    "sd15": ("sd15", {}, "epsilon"),
    "sd15-v": ("sd15", {"prediction_type": "v_prediction"}, "v_prediction"),
    "sdxl": ("sdxl", {}, "epsilon"),
    "sd3": ("sd3", {}, "flow_prediction"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {
        name: FAMILIES[family].make(tmp_path_factory.mktemp(name), **options)
        for name, (family, options, _) in BASES.items()
    }


@pytest.fixture
def options(bases, dataset_path, tmp_path):
    def make(base, *more, output_dir="out"):
        family = FAMILIES[BASES[base][0]]
        words = [
            "--family", family.name, "--pretrained_model_name_or_path", bases[base], "--train_data_dir", dataset_path,
            "--resolution", 16, "--train_batch_size", 2, "--max_train_steps", 3, "--learning_rate", 1e-3,
            "--lr_warmup_steps", 0, "--checkpointing_steps", 100, "--report_to", "none", *family.options,
            "--dataloader_num_workers", 0, "--output_dir", tmp_path / output_dir, *more,
        ]  # fmt: skip
        return [str(word) for word in words]

    return make


@pytest.fixture
def run(options, tmp_path):
    def run(base, *more, output_dir="out"):
        reset_accelerate()
        train_lcm.main(train_lcm.parse_args(options(base, *more, output_dir=output_dir)))
        return tmp_path / output_dir

    return run


def parse(family, *more):
    words = ["--family", family, "--pretrained_model_name_or_path", "x", "--dataset_name", "y", *map(str, more)]
    return train_lcm.parse_args(words)


def test_one_average_of_the_weights():
    assert parse("sd15").use_ema and not parse("sd15", "--use_lora").use_ema
    assert not parse("sd15", "--optimizer", "adamw_schedulefree").use_ema


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noise_scheduler(predicts="epsilon"):
    if predicts == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return DDPMScheduler(**SCHEDULE, prediction_type=predicts)


# The consistency function


def test_boundary_scalings_by_hand():
    c_skip, c_out = train_lcm.boundary_scalings(torch.tensor([0, 19, 999]))
    assert c_skip.shape == c_out.shape == (3, 1, 1, 1)
    assert c_skip.flatten().tolist() == pytest.approx([1, 0.25 / 36100.25, 0.25 / 99800100.25], rel=1e-6)
    assert c_out.flatten().tolist() == pytest.approx([0, 190 / 190.000658, 9990 / 9990.0000125], rel=1e-6)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "flow_prediction"])
def test_boundary_is_exact(predicts):
    """At the point below the last `f` is what it is given, whatever the network says there."""
    sample, prediction = normal(2, 4, 3, 3), 10 * normal(2, 4, 3, 3, seed=1)
    for timesteps, holds in ((torch.zeros(2), True), (torch.full((2,), 19.0), False)):
        levels = noise_levels(noise_scheduler(predicts), timesteps)
        found = train_lcm.consistency_function(prediction, sample, timesteps, levels, predicts)
        assert torch.equal(found, sample) == holds


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_student_is_trained_on_what_its_sampler_computes(predicts):
    sampler = LCMScheduler(**SCHEDULE, prediction_type=predicts)
    sampler.set_timesteps(50)
    for timestep in (999, 499, 19):
        sample, prediction = normal(1, 4, 3, 3), normal(1, 4, 3, 3, seed=1)
        sampler._step_index = None
        expected = sampler.step(prediction, torch.tensor(timestep), sample).denoised
        timesteps = torch.tensor([timestep])
        levels = noise_levels(noise_scheduler(predicts), timesteps)
        found = train_lcm.consistency_function(prediction, sample, timesteps, levels, predicts)
        assert relative(found, expected) < 1e-6


def test_flow_consistency_and_its_sampler():
    sampler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    sampler.set_timesteps(sigmas=[1.0])  # one step: `f` itself
    sample, velocity = normal(1, 4, 3, 3), normal(1, 4, 3, 3, seed=1)
    expected = sampler.step(velocity, sampler.timesteps[0], sample).prev_sample
    levels = noise_levels(noise_scheduler("flow_prediction"), sampler.timesteps)
    found = train_lcm.consistency_function(velocity, sample, sampler.timesteps, levels, "flow_prediction")
    assert relative(found, expected) < 1e-6 and relative(found, sample - velocity) < 1e-6


# The points and the teacher's step


def test_points_of_a_variance_preserving_schedule():
    points = train_lcm.training_points(noise_scheduler(), None, types.SimpleNamespace(family="sd15"))
    assert points.tolist() == [0, *range(19, 1000, 20)] and not points.is_floating_point()
    short = DDPMScheduler(**SCHEDULE, num_train_timesteps=40)
    with pytest.raises(ADTError, match="has 40 timesteps: too few for 50 points"):
        train_lcm.check_schedule(short, types.SimpleNamespace(family="sd15"))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_sampler_stays_on_the_points(family, num_steps):
    args = parse(family, "--num_inference_steps", num_steps)
    scheduler = noise_scheduler("v_prediction")
    sampler = train_lcm.make_sampler(scheduler, FAMILIES[family].train, args)
    points = train_lcm.training_points(scheduler, None, args).tolist()
    assert len(sampler.timesteps) == num_steps and sampler.timesteps[0] == 999
    assert set(sampler.timesteps.tolist()) <= set(points)
    assert torch.equal(sampler.alphas_cumprod, scheduler.alphas_cumprod)
    assert (sampler.config.prediction_type, sampler.config.clip_sample) == ("v_prediction", False)


@pytest.mark.parametrize("shift", ["static", "dynamic"])
def test_points_of_flow_matching_are_the_samplers(shift, options, tmp_path):
    dynamic = {"shift": 1.0, "use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    base = tiny.make_sd3(tmp_path / "base", scheduler_overrides=dynamic if shift == "dynamic" else {})
    args = train_lcm.parse_args(options("sd3", "--pretrained_model_name_or_path", base))
    module = FAMILIES["sd3"].train
    _, scheduler, _ = module.check_models(args)
    points = train_lcm.training_points(scheduler, module, args)
    assert points.shape == (101,) and points[0] == 0 and (points.diff() > 0).all()
    share = torch.linspace(1, scheduler.sigma_min, 100, dtype=torch.float64)  # before the second shift, as in use
    factor = math.exp(0.5 + (16 - 4) * 0.65 / 60) if shift == "dynamic" else 3.0  # for 16 image tokens
    expected = 1000 * factor * share / (1 + (factor - 1) * share)
    assert points[1:].flip(0).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_solver_step_is_ddims(predicts):
    ddim = DDIMScheduler(
        **SCHEDULE, prediction_type=predicts, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False
    )  # whose level below 19 is that of 0
    ddim.set_timesteps(50)
    timesteps, below = torch.tensor([999, 519, 19]), torch.tensor([979, 499, 0])
    sample, prediction = normal(3, 4, 3, 3), normal(3, 4, 3, 3, seed=1)
    scheduler = noise_scheduler(predicts)
    found = train_lcm.solver_step(
        prediction, sample, noise_levels(scheduler, timesteps), noise_levels(scheduler, below), predicts
    )
    for n, timestep in enumerate(timesteps):
        expected = ddim.step(prediction[n : n + 1], timestep, sample[n : n + 1]).prev_sample
        assert relative(found[n : n + 1], expected) < 1e-5


def test_solver_step_of_a_flow_is_eulers():
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(100)
    sample, velocity = normal(1, 4, 3, 3), normal(1, 4, 3, 3, seed=1)
    for index in (0, 40, 99):
        sigma, next_sigma = euler.sigmas[index], euler.sigmas[index + 1]
        levels = [noise_levels(euler, 1000 * value[None]) for value in (sigma, next_sigma)]
        found = train_lcm.solver_step(velocity, sample, *levels, "flow_prediction")
        euler._step_index = None
        assert relative(found, euler.step(velocity, euler.timesteps[index], sample).prev_sample) < 1e-6
        assert relative(found, sample + (next_sigma - sigma) * velocity) < 1e-6


def test_guidance_by_hand():
    conditional, unconditional = torch.tensor([3.0, 5.0]).view(2, 1, 1, 1), torch.tensor([1.0, 7.0]).view(2, 1, 1, 1)
    guided = train_lcm.guide(conditional, unconditional, torch.tensor([2.0, 0.5]))
    assert guided.flatten().tolist() == [3 + 2 * 2, 5 - 0.5 * 2]


def test_huber_by_hand():
    found = train_lcm.huber_loss(torch.tensor([0.0, 3e-3, 1.0]), torch.tensor([0.0, 0.0, 5.0]), 1e-3)
    expected = (0 + (math.sqrt(10) - 1) * 1e-3 + math.sqrt(16 + 1e-6) - 1e-3) / 3
    assert found.item() == pytest.approx(expected, rel=1e-6)


# A micro-batch


@pytest.mark.parametrize("predicts", ["epsilon", "flow_prediction"])
def test_draws(predicts):
    """Points and weights by the image's position, each point reached, and `z` the noised image there."""
    count, scheduler = 600, noise_scheduler(predicts)
    points = torch.linspace(0, 999, 51).long()
    run = types.SimpleNamespace(args=types.SimpleNamespace(seed=0, w_min=3.0, w_max=15.0))
    models = types.SimpleNamespace(noise_scheduler=scheduler)

    def draw(positions, iteration=0):
        latents, noise = normal(count, 4, 2, 2)[positions], normal(count, 4, 2, 2, seed=1)[positions]
        conditions = types.SimpleNamespace(positive={"prompt_embeds": 1}, negative={"prompt_embeds": 0})
        batch = types.SimpleNamespace(latents=latents, noise=noise, conditions=conditions)
        return batch, train_lcm.draw_pair({"positions": positions}, batch, iteration, points, models, run)

    batch, pair = draw(list(range(count)))
    assert set(pair.timesteps.tolist()) == set(points[1:].tolist())
    index = torch.searchsorted(points, pair.timesteps)
    assert torch.equal(points[index - 1], pair.next_timesteps)
    histogram = torch.bincount(index - 1, minlength=50)
    assert (histogram - 12).square().sum() / 12 < 75  # chi squared, 49 degrees of freedom: 1% beyond
    assert 3 <= pair.weights.min() < 3.1 and 14.9 < pair.weights.max() <= 15 and 8.6 < pair.weights.mean() < 9.4
    for n in (0, 7):
        if predicts == "flow_prediction":
            s = pair.timesteps[n] / 1000
            a = 1 - s
        else:
            a, s = (
                scheduler.alphas_cumprod[pair.timesteps[n]].sqrt(),
                (1 - scheduler.alphas_cumprod[pair.timesteps[n]]).sqrt(),
            )
        assert relative(pair.sample[n], a * batch.latents[n] + s * batch.noise[n]) < 1e-6
    _, part = draw([5, 3])
    assert torch.equal(part.timesteps, pair.timesteps[[5, 3]]) and torch.equal(part.weights, pair.weights[[5, 3]])
    _, later = draw(list(range(count)), iteration=1)
    assert not torch.equal(later.timesteps, pair.timesteps) and not torch.equal(later.weights, pair.weights)
    assert pair.conditional == {"prompt_embeds": 1} and pair.unconditional == {"prompt_embeds": 0}


# The target, in runs


def load_base(path, base):
    network_class = SD3Transformer2DModel if base == "sd3" else UNet2DConditionModel
    return network_class.from_pretrained(path, subfolder=FAMILIES[BASES[base][0]].network).eval()


@torch.no_grad()
def target_by_hand(pair, teacher, student, scheduler, module, predicts):
    """With diffusers' solvers, one image at a time, the student's sampler for `f`."""
    targets = []
    for n in range(len(pair.sample)):
        sample, timestep, below = pair.sample[n : n + 1], pair.timesteps[n], pair.next_timesteps[n]
        conditional, unconditional = (
            {name: value[n : n + 1] for name, value in condition.items()}
            for condition in (pair.conditional, pair.unconditional)
        )
        positive, negative = (
            module.call_network(teacher, sample, timestep[None], condition)
            for condition in (conditional, unconditional)
        )
        guided = negative + (1 + pair.weights[n]) * (positive - negative)
        if predicts == "flow_prediction":
            stepped = sample + (below - timestep) / 1000 * guided
            velocity = module.call_network(student, stepped, below[None], conditional)
            targets.append(stepped - below / 1000 * velocity)
            continue
        ddim = DDIMScheduler(
            **SCHEDULE, prediction_type=predicts, timestep_spacing="trailing", clip_sample=False,
            set_alpha_to_one=False,
        )  # fmt: skip
        ddim.set_timesteps(50)
        stepped = ddim.step(guided, timestep, sample).prev_sample
        lcm = LCMScheduler(**SCHEDULE, prediction_type=predicts)
        lcm.set_timesteps(timesteps=[999, 0] if below == 0 else [below.item()])
        prediction = module.call_network(student, stepped, below[None], conditional)
        targets.append(lcm.step(prediction, below, stepped).denoised)
    return torch.cat(targets)


@pytest.mark.parametrize("base, more", [
    *((base, ()) for base in BASES), ("sd15", ("--no-use_ema",)), *((base, LORA) for base in ("sd15", "sdxl", "sd3")),
])  # fmt: skip
def test_target_by_hand(run, bases, base, more, monkeypatch):
    """The teacher is the base and the target the average's, or the online network's, after the weights have moved."""
    found, originals = [], (train_lcm.find_target, train_lcm.update)
    module, predicts, teacher_network = FAMILIES[BASES[base][0]].train, BASES[base][2], load_base(bases[base], base)
    online = []

    def watched_update(pairs, perturbations, iteration, generator, *others):
        now = [parameter.detach().clone() for parameter in trainable_parameters(generator.network)]
        if iteration:  # what the averages left behind
            assert equal(now, online[-1])
        values = originals[1](pairs, perturbations, iteration, generator, *others)
        online.append([parameter.detach().clone() for parameter in trainable_parameters(generator.network)])
        return values

    def watched_target(pair, teacher, generator, models, *others):
        target = originals[0](pair, teacher, generator, models, *others)
        assert not target.requires_grad and target.grad_fn is None and target.dtype == torch.float32
        student = copy.deepcopy(generator.network).eval()
        average = generator.ema.shadow_params if generator.ema is not None else None
        weights = average if average is not None else (online[-1] if online else None)
        if weights is not None:
            for parameter, value in zip(trainable_parameters(student), weights, strict=True):
                parameter.data.copy_(value)
        expected = target_by_hand(pair, teacher_network, student, models.noise_scheduler, module, predicts)
        said = teacher(pair.sample, pair.timesteps, pair.conditional)
        with torch.no_grad():
            base_says = module.call_network(teacher_network, pair.sample, pair.timesteps, pair.conditional)
            network_says = module.call_network(student, pair.sample, pair.timesteps, pair.conditional)
        found.append((relative(target, expected), torch.equal(said, base_says), relative(network_says, base_says)))
        if average is not None and len(online) == 2:  # after the first update the average is what it was given
            for parameter, value in zip(trainable_parameters(student), online[-1], strict=True):
                parameter.data.copy_(value)
            other = target_by_hand(pair, teacher_network, student, models.noise_scheduler, module, predicts)
            found[-1] += (relative(target, other),)
        return target

    monkeypatch.setattr(train_lcm, "find_target", watched_target)
    monkeypatch.setattr(train_lcm, "update", watched_update)
    monkeypatch.setattr(train_lcm, "finish_run", lambda *others: None)
    run(base, *more)
    assert len(found) == 3
    for n, (error, teacher_is_base, moved, *distance) in enumerate(found):
        assert error < 1e-4 and teacher_is_base
        assert moved > 1e-3 or n == 0
        assert distance == [] or distance[0] > max(1e-4, 10 * error)
    assert [len(entry) for entry in found] == [3, 3, 4 if more == () else 3]


def test_result_is_the_average(run, monkeypatch):
    kept = {}
    original = train_lcm.finish_run

    def watched(generator, *others):
        kept["average"] = [value.clone() for value in generator.ema.shadow_params]
        kept["online"] = [parameter.detach().clone() for parameter in trainable_parameters(generator.network)]
        kept["names"] = [name for name, _ in generator.network.named_parameters()]
        original(generator, *others)

    monkeypatch.setattr(train_lcm, "finish_run", watched)
    saved = read_result(run("sd15"), "unet")
    average, online = (dict(zip(kept["names"], kept[name], strict=True)) for name in ("average", "online"))
    assert equal({name: saved[name] for name in average}, average)
    assert not equal(average, online)


def test_sdxls_teacher_knows_images_by_their_own_size(run, monkeypatch):
    pairs, original = [], train_lcm.draw_pair

    def watched(examples, *others):
        pairs.append((examples, original(examples, *others)))
        return pairs[-1][1]

    monkeypatch.setattr(train_lcm, "draw_pair", watched)
    monkeypatch.setattr(train_lcm, "finish_run", lambda *others: None)
    run("sdxl", "--max_train_steps", 1)
    [(examples, pair)] = pairs
    own = torch.cat([examples["original_sizes"], examples["crop_top_lefts"], torch.full((2, 2), 16)], dim=1).float()
    assert torch.equal(pair.conditional["time_ids"], own) and torch.equal(pair.unconditional["time_ids"], own)


# Adversarial perturbations


@pytest.mark.parametrize("base", ["sd15", "sd3"])
def test_perturbation_follows_the_inputs_gradient_and_the_target_stays(run, base, bases, monkeypatch):
    module, predicts = FAMILIES[BASES[base][0]].train, BASES[base][2]
    teacher_network = load_base(bases[base], base)
    passes, teachers, original = [], [], train_lcm.update
    original_target = train_lcm.find_target

    def watched_target(pair, teacher, *others):
        said = teacher(pair.sample, pair.timesteps, pair.conditional)
        with torch.no_grad():
            expected = module.call_network(teacher_network, pair.sample, pair.timesteps, pair.conditional)
        teachers.append(torch.equal(said, expected))
        return original_target(pair, teacher, *others)

    def watched(pairs, perturbations, iteration, generator, models, *others):
        [pair], [perturbation] = pairs, perturbations
        delta = perturbation.delta.detach().clone().requires_grad_()
        sample = pair.sample + delta
        prediction = module.call_network(generator.network.train(), sample, pair.timesteps, pair.conditional)
        a, s = noise_levels(models.noise_scheduler, pair.timesteps)
        if predicts == "flow_prediction":
            student = sample - s * prediction
        else:
            clean = (sample - s * prediction) / a if predicts == "epsilon" else a * sample - s * prediction
            c_skip, c_out = train_lcm.boundary_scalings(pair.timesteps)
            student = c_skip * sample + c_out * clean
        loss = (((student - pair.target) ** 2 + 1e-6).sqrt() - 1e-3).mean()
        [gradient] = torch.autograd.grad(loss, delta)
        values = original(pairs, perturbations, iteration, generator, models, *others)
        passes.append((pair.target.clone(), delta.detach(), gradient, loss.item(), values["consistency_loss"]))
        return values

    monkeypatch.setattr(train_lcm, "find_target", watched_target)
    monkeypatch.setattr(train_lcm, "update", watched)
    more = ("--robust_steps", 2, "--robust_step_size", 0.05, "--max_train_steps", 2, "--learning_rate", 1e-2)
    output = run(base, *more)
    assert len(passes) == 4 and json.loads((output / "adt_config.json").read_text())["generator_updates"] == 4
    assert teachers == [True, True]  # though the first layer is patched and the weights have moved
    for first, second in (passes[:2], passes[2:]):
        assert torch.equal(first[0], second[0]) and first[1].abs().max() == 0
        norm = first[2].flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        assert relative(second[1], 0.05 * first[2][0].numel() ** 0.5 * first[2] / norm) < 1e-3
    assert not torch.equal(passes[0][0], passes[2][0])
    for *_, expected, logged in passes:
        assert logged == pytest.approx(expected, rel=1e-4)


# The result


@pytest.mark.parametrize("base, more", [*((base, ()) for base in BASES), ("sdxl", LORA), ("sd3", LORA)])
def test_result_loads_and_says_its_call(run, bases, base, more):
    """The pipeline by `from_pretrained`, and the call of card and `adt_config.json`, which gives finite images."""
    output = run(base, *more, "--max_train_steps", 1, "--num_inference_steps", 2)
    call, text = {"num_inference_steps": 2, "guidance_scale": 0.0}, "num_inference_steps=2, guidance_scale=0.0"
    sampler_class, config = LCMScheduler, {"original_inference_steps": 50, "prediction_type": BASES[base][2]}
    if base == "sd3":
        call = {"sigmas": [1.0, 0.5], "guidance_scale": 0.0, "max_sequence_length": 16}
        text = "sigmas=[1.0, 0.5], guidance_scale=0.0, max_sequence_length=16"
        sampler_class, config = FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True, "shift": 3.0}
    card = (output / "README.md").read_text()
    assert f'image = pipeline("a lighthouse at dusk", {text}).images[0]' in card
    facts = json.loads((output / "adt_config.json").read_text())
    assert facts["inference"].items() >= (call | config | {"scheduler": sampler_class.__name__}).items()
    assert facts["training_options"]["use_ema"] == (not more)

    pipeline = DiffusionPipeline.from_pretrained(bases[base] if more else output)
    if more:
        pipeline.scheduler = sampler_class.from_pretrained(output, subfolder="scheduler")
        pipeline.load_lora_weights(output)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.scheduler) is sampler_class and pipeline.scheduler.config.items() >= config.items()
    image = pipeline("a red disc", generator=torch.Generator().manual_seed(0), output_type="pt", **call).images
    assert image.shape == (1, 3, 16, 16) and image.isfinite().all() and image.std() > 0


def test_validation_draws_by_the_same_noise(run):
    """SD3's pipeline hands its scheduler no generator; without learning both rows are one."""
    prompts = ("--validation_prompts", "a red disc", "a blue square", "--num_validation_images", 2)
    output = run("sd3", *prompts, "--learning_rate", 1e-30)
    for n in range(2):
        grid = Image.open(output / "validation" / f"iteration-000003-prompt-{n}.png")
        assert grid.crop((0, 0, 32, 16)).tobytes() == grid.crop((0, 16, 32, 32)).tobytes()
        assert grid.crop((0, 0, 16, 16)).tobytes() != grid.crop((16, 0, 32, 16)).tobytes()


# Options


def test_options_change_the_run(run):
    robust = ("--robust_steps", 2, "--robust_step_size", 0.05, "--max_train_steps", 2)
    prompts = ("--validation_prompts", "a red disc", "--num_validation_images", 1)
    plain = run("sd15", *robust, *prompts, output_dir="plain")
    for n, more in enumerate([("--ema_decay", 0.1), ("--robust_step_unit", "norm"), ("--robust_radius", 0.03)]):
        other = run("sd15", *robust, *more, output_dir=f"run-{n}")
        assert not equal(read_result(plain, "unet"), read_result(other, "unet")), more
    guided = run("sd15", *robust, *prompts, "--guidance_scale", 3, output_dir="guided")
    assert equal(read_result(plain, "unet"), read_result(guided, "unet"))  # which is of sampling alone
    grids = [output / "validation" / "iteration-000002-prompt-0.png" for output in (plain, guided)]
    assert grids[0].read_bytes() != grids[1].read_bytes()
    assert json.loads((guided / "adt_config.json").read_text())["inference"]["guidance_scale"] == 3
    assert "guidance_scale=3.0" in (guided / "README.md").read_text()


def test_defaults():
    args = parse("sd15")
    assert (args.learning_rate, args.use_ema, args.ema_decay) == (1e-6, True, 0.95)
    assert (args.num_inference_steps, args.guidance_scale, args.robust_steps, args.huber_c) == (4, 0.0, 1, 1e-3)
    lora = parse("sd15", "--use_lora")
    assert (lora.learning_rate, lora.use_ema, lora.rank, lora.lora_alpha) == (1e-4, False, 64, 64.0)
    assert lora.natures.keys() >= {"learning_rate", "use_ema", "ema_decay", "num_inference_steps", "guidance_scale"}
    named = parse("sd15", "--use_lora", "--use_ema", "--learning_rate", 3e-5)
    assert (named.learning_rate, named.use_ema) == (3e-5, True)
    assert not parse("sd15", "--no-use_ema").use_ema
    weights = {family: (parse(family).w_min, parse(family).w_max) for family in FAMILIES}
    assert weights == {"sd15": (5.0, 15.0), "sdxl": (3.0, 15.0), "sd3": (3.0, 3.0)}


def test_huber_c_acts():
    pair = train_lcm.Pair(normal(1, 4, 3, 3), torch.tensor([519]), torch.tensor([499]), None, {}, {}, torch.zeros(1))
    module = types.SimpleNamespace(call_network=lambda network, sample, timesteps, condition: 0.5 * sample)
    losses = [
        train_lcm.consistency_loss(
            None, pair, torch.zeros(1), noise_scheduler(), module, types.SimpleNamespace(huber_c=c)
        )
        for c in (1e-3, 1.0)
    ]
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize("more, sentence", [
    (("--family", "sd15", "--num_inference_steps", 51), "--num_inference_steps 51 is more than the 50 points"),
    (("--family", "sd3", "--num_inference_steps", 101), "--num_inference_steps 101 is more than the 100 points"),
    (("--family", "sdxl", "--w_min", 16), "--w_min 16 is larger than --w_max 15."),
    (("--family", "sd15", "--optimizer", "prodigy"), "--optimizer prodigy finds the step size itself"),
    (("--family", "sd15", "--huber_c", 0), "argument --huber_c: must be greater than 0, not 0"),
])  # fmt: skip
def test_bad_input_gives_one_sentence(more, sentence, capsys):
    with pytest.raises(SystemExit):
        train_lcm.parse_args(["--pretrained_model_name_or_path", "x", "--dataset_name", "y", *map(str, more)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last and sentence in last

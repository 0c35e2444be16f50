"""The plugin on tiny pipelines of diffusers' real classes."""

import copy
import gc
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import plugin_processes
import pytest
import torch
from accelerate import DistributedType
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from diffusers.schedulers import KarrasDiffusionSchedulers
from helpers import NO_ACCELERATOR, relative, run_two_processes
from peft import LoraConfig
from tiny_pipelines import PIPELINES, ROWS, TOKENS, make_pipeline, save_whole_pipeline
from torch import nn

from adt_pipeline import ConstrainedPipeline, check_pipeline
from adt_utils import constrained_step, simulate_inference
from benchmarks.memory import SavedTensors


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def stock(pipeline, inputs, **options):
    return pipeline(**inputs, generator=generator(), **options).images


def loss_of(images):
    """Neither linear nor the same at each pixel."""
    weight = torch.linspace(-1, 2, images[0].numel()).view_as(images[0])
    return (weight * images.float().square()).mean()


def gradient(network):
    """All of it in one vector; then there is none any more."""
    vector = torch.cat([p.grad.flatten().float() for p in network.parameters() if p.grad is not None])
    network.zero_grad()
    return vector


def kept_graphs(pipeline, inputs, train_steps, gradient_path="adt"):
    """The gradient by plain autograd through the graphs of `train_steps`, from the start on, without the plugin."""
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    own, scheduler, forward, steps = pipeline.scheduler, copy.deepcopy(pipeline.scheduler), denoiser.forward, []

    def detached(value):
        if isinstance(value, (list, tuple)):
            return type(value)(map(detached, value))
        return value.detach() if isinstance(value, torch.Tensor) else value

    def call(*args, **kwargs):
        with torch.set_grad_enabled(len(steps) in train_steps):
            return forward(*map(detached, args), **{name: detached(value) for name, value in kwargs.items()})

    def step(model_output, timestep, sample, return_dict=False):
        steps.append(timestep)
        del scheduler.step
        sample = constrained_step(scheduler, model_output, timestep, sample, gradient_path)
        scheduler.step = step
        return (sample,)

    denoiser.forward, scheduler.step, pipeline.scheduler = call, step, scheduler
    options = {"output_type": "latent", "return_dict": False}
    loss_of(type(pipeline).__call__.__wrapped__(pipeline, **inputs, generator=generator(), **options)[0]).backward()
    del denoiser.forward
    pipeline.scheduler = own
    return gradient(denoiser)


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline(name):
    """The stock pipeline's values bit for bit, plain autograd's gradient, and no more memory for more steps."""
    pipeline, inputs = make_pipeline(name)
    tunable, peaks = ConstrainedPipeline(pipeline), {}
    config = dict(pipeline.config), pipeline.scheduler
    expected = stock(pipeline, inputs, output_type="latent")
    timesteps = pipeline.scheduler.timesteps.clone()
    for steps in ([1], [0, 1, 2, 3]):
        gc.collect()
        with SavedTensors(tunable.denoiser, pipeline.vae) as saved:
            latents = tunable(**inputs, generator=generator(), output_type="latent", train_steps=steps)
            assert torch.equal(latents, expected) and latents.dtype == expected.dtype
            tunable.backward(loss_of(latents))
        peaks[len(steps)] = saved.peak
        replayed = gradient(tunable.denoiser)
        del latents
    assert peaks[4] == pytest.approx(peaks[1], rel=0.05) and peaks[1] > 5e4
    assert relative(replayed, kept_graphs(pipeline, inputs, range(4))) < 1e-5

    images = tunable(**inputs, generator=generator())
    assert images.shape == (2, 3, inputs["height"], inputs["width"]) and images.requires_grad
    assert torch.equal((images / 2 + 0.5).clamp(0, 1), stock(pipeline, inputs, output_type="pt"))
    assert (dict(pipeline.config), pipeline.scheduler) == config
    assert torch.equal(pipeline.scheduler.timesteps, timesteps) and tunable.start is None
    assert all(p.grad is None for p in pipeline.vae.parameters())


# The family's scripts


def test_gradient_is_that_of_the_family_scripts(family, options, base_path):
    """Two guidance branches in one call here, one replay each there."""
    train = family.train
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base_path)
    pipeline.set_progress_bar_config(disable=True)
    args = train.parse_args(options())
    scheduler, _, _ = train.check_models(args)
    encoder = train.PromptEncoder(args, NO_ACCELERATOR)
    examples = {name: torch.tensor([[side, side]]) for name, side in (("original_sizes", 16), ("crop_top_lefts", 0))}
    examples["pixel_values"] = torch.zeros(1, 3, 16, 16)
    positive = encoder(["a red disc"])
    conditions = train.make_conditions(examples, positive, encoder.negative, torch.tensor([False]), args)
    noise, network = torch.randn(1, 4, 8, 8, generator=generator()), getattr(pipeline, family.network)
    predict = train.make_predict(network, conditions, train.call_network)
    start = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    rollout = simulate_inference(predict, scheduler, start, 0, args.guidance_scale, 0.0, [0, 2])
    for replay in rollout.replay(predict, rollout.prediction_gradients(loss_of(rollout.latents))):
        replay().backward()
    expected = gradient(network)

    pipeline.scheduler = scheduler
    tunable = ConstrainedPipeline(pipeline)
    inference = train.inference_options(args) | {"output_type": "latent", "train_steps": [0, 2]}
    latents = tunable("a red disc", latents=noise, **inference)
    tunable.backward(loss_of(latents))
    assert relative(latents, rollout.latents) < 1e-5 and relative(gradient(network), expected) < 1e-4


# Starting from an image

IMAGE_TO_IMAGE = {
    "sd15": diffusers.StableDiffusionImg2ImgPipeline,
    "sdxl": diffusers.StableDiffusionXLImg2ImgPipeline,
    "sd3": diffusers.StableDiffusion3Img2ImgPipeline,
    "flux": diffusers.FluxImg2ImgPipeline,
    "qwen_image": diffusers.QwenImageImg2ImgPipeline,
    "z_image": diffusers.ZImageImg2ImgPipeline,
}


@pytest.mark.parametrize(
    ("name", "scheduler"), [*((name, None) for name in IMAGE_TO_IMAGE), ("sd15", diffusers.EulerDiscreteScheduler)]
)
def test_start_from_an_image(name, scheduler):
    pipeline, inputs = make_pipeline(name)
    pipeline = IMAGE_TO_IMAGE[name](**pipeline.components)
    if scheduler is not None:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    pipeline.set_progress_bar_config(disable=True)
    inputs |= {"image": torch.rand(2, 3, 16, 16, generator=generator()), "strength": 0.5}
    accepted = inspect.signature(pipeline.__call__).parameters
    inputs = {key: value for key, value in inputs.items() if key in accepted}
    tunable = ConstrainedPipeline(pipeline)
    latents = tunable(**inputs, generator=generator(), output_type="latent")
    assert torch.equal(latents, stock(pipeline, inputs, output_type="latent"))

    start, (call,) = tunable.start, tunable.alive
    assert start.index == 2 and {kept.index for kept in call.kept} == {2, 3}
    given = [v for v in torch.utils._pytree.tree_leaves(call.kept[0].arguments) if isinstance(v, torch.Tensor)][0]
    if name == "z_image":  # it takes a list
        given = torch.stack(call.kept[0].arguments[0][0])[:2, :, 0]
    sample = start.levels[0] * start.latents + start.levels[1] * start.noise
    assert sample.shape == start.target.shape and relative(given[:2], sample) < 1e-6  # the packed one, for FLUX
    # The exact prediction leads to the image's latents in one step, by the scheduler's own arithmetic.
    alpha, sigma = start.levels
    expected = {
        "epsilon": lambda: (sample - sigma * start.target) / alpha,
        "v_prediction": lambda: alpha * sample - sigma * start.target,
        "flow_prediction": lambda: sample - sigma * start.target,
    }[pipeline.scheduler.config.get("prediction_type", "flow_prediction")]()
    assert relative(expected, start.latents) < 1e-5
    tunable.backward(loss_of(latents))
    assert relative(gradient(tunable.denoiser), kept_graphs(pipeline, inputs, range(2))) < 1e-5


def from_image(name):
    """A tunable image-to-image pipeline, and what it is called with, guidance on, but for where it starts."""
    pipeline, inputs = make_pipeline(name)
    pipeline = IMAGE_TO_IMAGE[name](**pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    accepted = inspect.signature(pipeline.__call__).parameters
    inputs |= {"image": torch.rand(2, 3, 16, 16, generator=generator())}
    return ConstrainedPipeline(pipeline), {key: value for key, value in inputs.items() if key in accepted}


@pytest.mark.parametrize("name", IMAGE_TO_IMAGE)
def test_start_index_is_exact(name):
    """For each index of several numbers of steps; calls of a few show that the pipeline then starts there."""
    tunable, inputs = from_image(name)
    for steps in (1, 2, 3, 7, 28, 50):
        strengths = [tunable.find_strength(i, {"num_inference_steps": steps}) for i in range(steps)]
        assert strengths == sorted(set(strengths), reverse=True) and 0 < strengths[-1] <= strengths[0] <= 1
    for index in range(3):
        options = inputs | {"num_inference_steps": 3, "start_index": index, "output_type": "latent"}
        latents = tunable(**options, generator=generator())
        (call,) = tunable.alive
        assert tunable.start.index == index and {kept.index for kept in call.kept} == set(range(index, 3))
        tunable.backward(loss_of(latents))
        del latents, call


def by_hand(name, pipeline, inputs, start):
    """What the network predicts at the start for the prompts, in the convention of its scheduler."""
    sample, time = start.levels[0] * start.latents + start.levels[1] * start.noise, start.timestep.expand(ROWS)
    prompts = inputs["prompt_embeds"]
    if name == "sd15":
        return pipeline.unet(sample, time, encoder_hidden_states=prompts).sample
    if name == "flux":  # packed
        return pipeline.transformer(
            hidden_states=sample, timestep=time / 1000, guidance=torch.tensor([3.5]).expand(ROWS),
            pooled_projections=inputs["pooled_prompt_embeds"], encoder_hidden_states=prompts,
            txt_ids=torch.zeros(TOKENS, 3),
            img_ids=pipeline._prepare_latent_image_ids(ROWS, 4, 4, "cpu", torch.float32),
        ).sample  # fmt: skip
    lists = list(sample.unsqueeze(2)), (1000 - time) / 1000, prompts
    return -torch.stack(pipeline.transformer(*lists)[0]).squeeze(2)


@pytest.mark.parametrize(
    ("name", "options"), [("sd15", {"guidance_scale": 0.0}), ("flux", {}), ("z_image", {"guidance_scale": 0.0})]
)
def test_start_prediction(name, options):
    """The conditional one, with the gradient that the network's own call has, in the mode that the network is in."""
    tunable, inputs = from_image(name)
    tunable.denoiser.train()
    prediction, start = tunable.start_prediction(**inputs | options, start_index=1, generator=generator())
    assert start.index == 1 and start is tunable.start and tunable.denoiser.training
    loss_of(prediction - start.target).backward()
    own = gradient(tunable.denoiser)
    expected = by_hand(name, tunable.pipeline, inputs, start)
    assert relative(prediction, expected) < 1e-5 and prediction.shape == start.target.shape
    loss_of(expected - start.target).backward()
    assert relative(own, gradient(tunable.denoiser)) < 1e-4
    with pytest.raises(ValueError, match="did not start from an image"):
        ConstrainedPipeline(make_pipeline("sd3")[0]).start_prediction(**make_pipeline("sd3")[1])
    with torch.no_grad(), pytest.raises(ValueError, match="under torch.no_grad"):
        tunable.start_prediction(**inputs, start_index=1)


def test_gradients_tell_their_norm_at_the_guided_predictions():
    """By hand, what a step's two branches have in common: `(1 - w) g` and `w g`."""
    pipeline, inputs = make_pipeline("sd15")
    tunable = ConstrainedPipeline(pipeline)
    gradients = tunable.gradients(loss_of(tunable(**inputs, generator=generator(), train_steps=[1, 3])))
    guided = [vector.unflatten(0, (2, ROWS)).sum(0) for (vector,) in gradients.values()]
    assert len(guided) == 2
    assert gradients.norm_squared.item() == pytest.approx(sum(own.square().sum().item() for own in guided), rel=1e-4)


def test_starts_that_cannot_be_are_refused(monkeypatch):
    tunable, inputs = from_image("sd3")
    for options, sentence in (
        ({"start_index": 4}, r"start_index must be in \[0, 3\], not 4"),
        ({"start_index": -1}, "not -1"),
        ({"start_index": 1, "strength": 0.5}, "Give either start_index or strength"),
    ):
        with pytest.raises(ValueError, match=sentence):
            tunable(**inputs | options)
    text, own = make_pipeline("sd3")
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline has no image-to-image form"):
        ConstrainedPipeline(text)(**own, start_index=1)
    monkeypatch.setattr(tunable, "find_strength", lambda start_index, options: 0.25)
    with pytest.raises(ValueError, match="starts at step 3 where start_index is 1"):
        tunable(**inputs, start_index=1)


# In one's own loop

LORA = LoraConfig(r=4, target_modules=["to_q", "to_v"], lora_dropout=0.5, init_lora_weights=False)


@pytest.fixture
def flux():
    """A tunable FLUX, and a function that calls it."""
    pipeline, inputs = make_pipeline("flux")
    tunable = ConstrainedPipeline(pipeline, num_gradient_steps=2, generator=generator())

    def call(seed=1, **options):
        options = {"generator": generator(seed), "output_type": "latent", "train_steps": [1, 3]} | options
        return tunable(**inputs | options)

    return SimpleNamespace(tunable=tunable, pipeline=pipeline, denoiser=pipeline.transformer, call=call, inputs=inputs)


def send(flux, **options):
    flux.tunable.backward(loss_of(flux.call(**options)))
    return gradient(flux.denoiser)


def test_two_calls_may_be_alive(flux):
    first, second = send(flux), send(flux, seed=2)
    one, two = flux.call(), flux.call(seed=2)
    flux.tunable.backward(loss_of(two))
    assert torch.equal(gradient(flux.denoiser), second)
    with pytest.raises(ValueError, match="can be sent a gradient once"):
        flux.tunable.backward(two.sum())
    flux.tunable.backward(loss_of(one))
    assert torch.equal(gradient(flux.denoiser), first)
    flux.tunable.backward(loss_of(flux.call()) + loss_of(flux.call(seed=2)))
    assert relative(gradient(flux.denoiser), first + second) < 1e-6


def test_what_is_not_sent_back_is_not_kept(flux):
    images = flux.call()
    loss = loss_of(images)
    del images
    assert len(flux.tunable.alive) == 1  # the loss leads to its leaves
    del loss
    assert len(flux.tunable.alive) == 0
    for without_gradient in (torch.no_grad, torch.inference_mode):
        with without_gradient():
            images = flux.call()
        assert not images.requires_grad and len(flux.tunable.alive) == 0


def test_two_losses_are_balanced(flux):
    images = flux.call()
    first = flux.tunable.gradients(loss_of(images), retain_graph=True)
    second = flux.tunable.gradients(images.abs().mean())
    sums = {kept: [a + 0.5 * b for a, b in zip(first[kept], second[kept])] for kept in first}
    flux.tunable.replay(sums)
    balanced = gradient(flux.denoiser)
    images = flux.call()
    flux.tunable.backward(loss_of(images) + 0.5 * images.abs().mean())
    assert relative(balanced, gradient(flux.denoiser)) < 1e-5


def test_steps_are_chosen_and_paths_differ():
    pipeline, inputs = make_pipeline("sd15")
    gradients = {}
    for path in ("adt", "drtune"):
        tunable = ConstrainedPipeline(pipeline, num_gradient_steps=2, gradient_path=path, generator=generator(3))
        latents = tunable(**inputs, generator=generator(), output_type="latent")
        (call,) = tunable.alive
        steps = [kept.index for kept in call.kept]
        assert steps in ([0, 2], [1, 3])
        tunable.backward(loss_of(latents))
        gradients[path] = gradient(pipeline.unet)
        del latents
        assert relative(gradients[path], kept_graphs(pipeline, inputs, steps, path)) < 1e-5
    assert relative(gradients["drtune"], gradients["adt"]) > 0.1


def test_lora_checkpointing_and_modes(flux):
    """Adapters get the gradient, with dropout off in rollout and replay, the modes of the modules as they were."""
    flux.denoiser.requires_grad_(False)
    flux.denoiser.add_adapter(LORA)
    flux.denoiser.train()
    plain = send(flux)
    assert flux.denoiser.training and all(module.training for module in flux.denoiser.modules())
    flux.denoiser.enable_gradient_checkpointing()
    assert plain.norm() > 0 and relative(send(flux), plain) < 1e-6
    flux.denoiser.requires_grad_(False)
    with pytest.raises(ValueError, match="No parameter of the pipeline's transformer requires a gradient"):
        flux.call()


def test_compiled(flux):
    plain = send(flux)
    flux.pipeline.transformer = torch.compile(flux.denoiser, backend="aot_eager")
    assert relative(send(flux), plain) < 1e-4


def test_float64():
    pipeline, inputs = make_pipeline("sd15")
    pipeline.to(torch.float64)
    inputs = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    latents = ConstrainedPipeline(pipeline)(**inputs, generator=generator(), output_type="latent")
    assert latents.dtype == torch.float64
    assert torch.equal(latents, stock(pipeline, inputs, output_type="latent"))


@pytest.mark.parametrize("name", ["flux", "cogview4", "sdxl"])
def test_bfloat16(name):
    """Weights in bfloat16: values and dtypes stay the stock pipeline's, the leaves are in float32."""
    pipeline, inputs = make_pipeline(name)
    pipeline.to(torch.bfloat16)
    halves = {k: v.bfloat16() for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    inputs |= halves
    tunable = ConstrainedPipeline(pipeline)
    images = tunable(**inputs, generator=generator())
    expected = stock(pipeline, inputs, output_type="pt")
    assert torch.equal((images / 2 + 0.5).clamp(0, 1), expected) and images.dtype == expected.dtype == torch.bfloat16
    (call,) = tunable.alive
    assert call.kept[0].leaves[0].dtype == torch.float32
    tunable.backward(loss_of(images))
    assert gradient(tunable.denoiser).isfinite().all()


def test_autocast_around_the_call_holds_in_the_replay_too(flux):
    with torch.autocast("cpu", torch.bfloat16):
        images = flux.call()
        flux.tunable.backward(loss_of(images))
        inside = gradient(flux.denoiser)
        images = flux.call()
    flux.tunable.backward(loss_of(images))
    outside = gradient(flux.denoiser)
    assert torch.equal(inside, outside) and relative(inside, send(flux)) > 1e-4


def test_an_exception_restores_the_pipeline(flux):
    own, expected = dict(flux.pipeline.__dict__), stock(flux.pipeline, flux.inputs, output_type="latent")

    def stop(*args):
        raise KeyError("stopped")

    with pytest.raises(KeyError, match="stopped"):
        flux.call(callback_on_step_end=stop)
    assert all(flux.pipeline.__dict__[name] is own[name] for name in ("transformer", "scheduler", "image_processor"))
    assert torch.equal(stock(flux.pipeline, flux.inputs, output_type="latent"), expected)
    assert len(flux.tunable.alive) == 0


def test_two_processes(tmp_path):
    """The mean over processes and micro-batches, synchronised in the last replay of the last micro-batch."""
    run_two_processes(Path(__file__).parent / "plugin_processes.py", tmp_path / "result.pt")
    result = torch.load(tmp_path / "result.pt")
    assert result["synchronised"] == sorted(set(result["synchronised"])) != []  # each bucket once
    pipeline, inputs = make_pipeline("sd3")
    tunable = ConstrainedPipeline(pipeline)
    for seed in range(4):
        tunable.backward(plugin_processes.micro_batch(tunable, inputs, seed) / 4)
    assert relative(result["gradient"], gradient(pipeline.transformer)) < 1e-5


# Bad input


def test_calls_that_cannot_work_are_refused(flux):
    forward, called = flux.denoiser.forward, []
    flux.denoiser.forward = lambda *args, **kwargs: called.append(args) or forward(*args, **kwargs)
    for options, sentence in (
        ({"train_steps": [1, 4]}, r"train_steps \[1, 4\] are not all on the path, 0 to 3"),
        ({"output_type": "pil"}, "output_type must be 'pt' or 'latent', not 'pil'"),
        ({"train_steps": []}, r"train_steps must be a list of steps, not \[\]"),
        ({"train_steps": 3}, "train_steps must be a list of steps, not 3"),
        ({"denoising_end": 0.5}, "would end the path before its last steps"),
    ):
        with pytest.raises(ValueError, match=sentence):
            flux.call(**options)
    assert called == []
    with torch.inference_mode():
        embeddings = flux.inputs["prompt_embeds"].clone()
    for options, sentence in (
        ({"joint_attention_kwargs": {"cache": flux}}, "hands its denoiser a SimpleNamespace, whose state a replay"),
        ({"prompt_embeds": embeddings}, "a tensor made under torch.inference_mode"),
    ):
        with pytest.raises(ValueError, match=sentence):
            flux.call(**options)
    with pytest.raises(ValueError, match=r"ended before it had come to all of the steps \[1, 3\]"):
        flux.call(callback_on_step_end=lambda pipeline, *args: setattr(pipeline, "_interrupt", True) or {})
    images = flux.call()
    for loss in (images.detach().sum(), torch.ones(2, requires_grad=True).sum(), 1.0):
        with pytest.raises(ValueError, match="no gradient to images of this pipeline"):
            flux.tunable.backward(loss)
    with pytest.raises(ValueError, match="leads to the transformer's weights by another way than the images"):
        flux.tunable.backward(loss_of(flux.call()) + next(flux.denoiser.parameters()).square().sum())
    sharded = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(ValueError, match="Replays under FSDP have not been tried"):
        flux.tunable.backward(loss_of(flux.call()), sharded)
    flux.inputs["prompt_embeds"].mul_(2)
    with pytest.raises(ValueError, match="has been written into before its replay"):
        flux.tunable.backward(loss_of(images))
    images = flux.call()
    with torch.no_grad():
        next(flux.denoiser.parameters()).add_(1)
    with pytest.raises(ValueError, match="weights have changed since the call"):
        flux.tunable.backward(loss_of(images))


def test_a_loop_of_its_own_without_gradient_is_refused(flux):
    class Own(diffusers.FluxPipeline):
        @torch.no_grad()
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    flux.pipeline.__class__ = Own
    with pytest.raises(ValueError, match="Own runs its own loop without gradient"):
        flux.call()


def test_scaled_adapters_under_checkpointing_are_refused(flux):
    """Whose gradient would be another scale's."""
    flux.denoiser.requires_grad_(False)
    flux.denoiser.add_adapter(LORA)
    scaled = {"joint_attention_kwargs": {"scale": 0.3}}
    assert send(flux, **scaled).norm() > 0
    flux.denoiser.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="set it by set_adapters"):
        flux.call(**scaled)


def test_a_stochastic_step_is_refused():
    pipeline, inputs = make_pipeline("sd15")
    with pytest.raises(ValueError, match="does not hold for DDIMScheduler.step with eta"):
        ConstrainedPipeline(pipeline)(**inputs, eta=0.5)


def test_options_that_cannot_work_are_refused(flux):
    for options, sentence in (
        ({"num_gradient_steps": 0}, "num_gradient_steps must be a whole number of at least 1, not 0"),
        ({"num_gradient_steps": "3"}, "num_gradient_steps must be a whole number of at least 1, not 3"),
        ({"network": "transformer"}, "network is not the pipeline's transformer, nor wrapped around it"),
        ({"gradient_path": "full"}, "Unknown gradient path 'full'"),
        ({"network": nn.Linear(2, 2)}, "network is not the pipeline's transformer, nor wrapped around it"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ConstrainedPipeline(flux.pipeline, **options)
    with pytest.raises(ValueError, match="FluxTransformer2DModel is not a pipeline of diffusers"):
        ConstrainedPipeline(flux.denoiser)


def hooked(pipeline):
    pipeline.transformer._hf_hook = object()


def cached(pipeline):
    pipeline.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))


def half(pipeline):
    pipeline.vae.to(torch.float16).register_to_config(force_upcast=True)


def unwrapped(pipeline):
    pipeline.__class__ = type("Own", (type(pipeline),), {"__call__": lambda self: None})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: setattr(p, "scheduler", diffusers.UniPCMultistepScheduler()), "does not hold for UniPCMultistep"),
        (lambda p: setattr(p, "scheduler", diffusers.DDIMScheduler()), "DDIMScheduler clips its predicted sample"),
        (lambda p: setattr(p, "safety_checker", nn.Identity()), "load it with safety_checker=None"),
        (lambda p: setattr(p, "watermark", object()), "load it with add_watermarker=False"),
        (lambda p: setattr(p, "transformer", None), "has no denoiser"),
        (lambda p: delattr(p, "image_processor"), "has no image_processor"),
        (hooked, "transformer is offloaded, or spread over devices"),
        (cached, "transformer has hooks of diffusers"),
        (half, "cast its VAE back and forth"),
        (unwrapped, "Own.__call__ is not wrapped in torch.no_grad"),
    ],
)
def test_pipelines_that_cannot_work_are_refused(flux, monkeypatch, change, sentence):
    monkeypatch.setattr(type(flux.pipeline), "components", property(components), raising=False)
    flux.pipeline.safety_checker = None
    change(flux.pipeline)
    with pytest.raises(ValueError, match=sentence):
        ConstrainedPipeline(flux.pipeline)


def components(pipeline):
    return {name: getattr(pipeline, name) for name in ("transformer", "vae", "scheduler", "safety_checker")}


# Every text-to-image pipeline of diffusers

TWO = "the path goes through one denoiser alone"
OUTPUT, NOISE = "has no image_processor", "does not hold for"
PAG = "puts other attention processors into its denoiser"
REFUSED = {
    "if": OUTPUT, "hunyuan": NOISE, "kandinsky": TWO, "kandinsky22": TWO, "kandinsky3": OUTPUT, "wuerstchen": TWO,
    "cascade": TWO, "lcm": NOISE, "ideogram4": TWO, "cogview3": NOISE, "helios": OUTPUT, "helios-pyramid": OUTPUT,
}  # fmt: skip


@pytest.mark.parametrize("name", AUTO_TEXT2IMAGE_PIPELINES_MAPPING)
def test_class(name):
    """With the components and the scheduler that the class itself names; where it names many, DDIM."""
    cls = AUTO_TEXT2IMAGE_PIPELINES_MAPPING[name]
    parameters = inspect.signature(cls.__init__).parameters
    annotation = parameters["scheduler"].annotation if "scheduler" in parameters else diffusers.DDPMWuerstchenScheduler
    annotation = getattr(annotation, "__args__", (annotation,))[0]
    scheduler = annotation() if annotation is not KarrasDiffusionSchedulers else diffusers.DDIMScheduler()
    if hasattr(scheduler.config, "clip_sample"):
        scheduler.register_to_config(clip_sample=False)
    parts = {part: object() for part in parameters if part != "self"} | {"vae": None, "safety_checker": None}
    pipeline = cls.__new__(type(cls.__name__, (cls,), {"components": parts}))
    pipeline.__dict__ |= parts | {"scheduler": scheduler}
    if "self.image_processor =" in inspect.getsource(cls.__init__):
        pipeline.__dict__["image_processor"] = object()
    reason = PAG if name.endswith("-pag") else REFUSED.get(name)
    if reason is None:
        check_pipeline(pipeline)
    else:
        with pytest.raises(ValueError, match=reason):
            check_pipeline(pipeline)


def test_lines_of_the_readme(tmp_path):
    page = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    [code] = [block for block in blocks if "ConstrainedPipeline" in block]
    changes = {
        "black-forest-labs/FLUX.1-dev": save_whole_pipeline("flux", tmp_path),
        '"cuda"': '"cpu"',
        "num_inference_steps=28": "num_inference_steps=4, height=16, width=16",
    }
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    names = {}
    exec(code, names)
    assert names["images"].shape == (1, 3, 16, 16)
    gradients = [parameter.grad for parameter in names["pipeline"].transformer.parameters()]
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)

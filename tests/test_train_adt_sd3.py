"""What SD3 adds: flow matching, three text encoders of which T5 may be absent, and a VAE with a shift."""

import json
import math
import re
import shutil
import types
from pathlib import Path

import pytest
import tiny
import torch
from conftest import FAMILIES
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusion3Img2ImgPipeline
from helpers import equal, read_network, read_scalars, relative
from safetensors.torch import load_file

import data_utils
import train_adt_sd3 as train
import train_adt_sd15
from adt_utils import constrained_step, signal_and_noise_levels, simulate_inference, starting_latents
from training_utils import ADTError


ROOT = Path(__file__).resolve().parent.parent
NO_ACCELERATOR = types.SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")
OWN_OPTIONS = {
    "no_t5", "max_sequence_length", "offload_text_encoders", "cache_text_embeddings", "weighting_scheme",
    "logit_mean", "logit_std", "mode_scale",
}  # fmt: skip
SCHEDULE_OPTIONS = {"prediction_type", "timestep_spacing", "guidance_rescale", "snr_gamma"}
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}
DYNAMIC = {"shift": 1.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 4,
           "max_image_seq_len": 64}  # fmt: skip


@pytest.fixture
def family():
    return FAMILIES["sd3"]


@pytest.fixture
def without_t5_path(tmp_path):
    return tiny.make_sd3(tmp_path / "without-t5", t5=False)


def conditions_of(args, prompt="a red disc"):
    encoder = train.PromptEncoder(args, NO_ACCELERATOR)
    return train.make_conditions({}, encoder([prompt]), encoder.negative, torch.tensor([False]), args)


def test_options_are_those_of_sd15_and_its_own(options):
    own = options("--max_sequence_length", 16)
    args = vars(train.parse_args(own))
    at = own.index("--max_sequence_length")
    common = vars(train_adt_sd15.parse_args(own[:at] + own[at + 2 : -2]))
    assert set(args) == set(common) - SCHEDULE_OPTIONS | OWN_OPTIONS


def test_the_papers_defaults():
    args = train.parse_args(["--pretrained_model_name_or_path", "x", "--dataset_name", "y"])
    assert (args.resolution, args.guidance_scale, args.sampler, args.num_inference_steps) == (1024, 7.0, "euler", 28)
    assert (args.learning_rate, args.discriminator_learning_rate) == (1e-6, 1e-6)


# Flow matching


MU = 0.5 + (16 - 4) * 0.65 / 60  # DYNAMIC's for 8x8 latents in patches of 2, which are 16 tokens
SHIFTS = {"static": ({"shift": 3.0}, 3.0), "dynamic": (DYNAMIC, math.exp(MU)),
          "linear": (DYNAMIC | {"time_shift_type": "linear"}, MU)}  # fmt: skip


@pytest.mark.parametrize("sampler", ["euler", "dpmsolver++"])
@pytest.mark.parametrize("shifting", SHIFTS)
@pytest.mark.parametrize("t5", [True, False])
def test_rollout_under_every_shift_is_the_pipelines(options, tmp_path, sampler, shifting, t5):
    """Against a pipeline whose scheduler is made here, not by the script."""
    overrides, shift = SHIFTS[shifting]
    path = tiny.make_sd3(tmp_path / "base", scheduler_overrides=overrides)
    args = train.parse_args(
        options("--pretrained_model_name_or_path", path, "--sampler", sampler, *["--no_t5"] * (not t5))
    )
    pipeline = DiffusionPipeline.from_pretrained(path, **({} if t5 else WITHOUT_T5))
    if sampler == "dpmsolver++":
        pipeline.scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipeline("a red disc", latents=noise, output_type="latent", **train.inference_options(args)).images
    scheduler, _, _ = train.check_models(args)
    assert torch.allclose(scheduler.sigmas, pipeline.scheduler.sigmas, rtol=1e-6)
    if sampler == "dpmsolver++":
        u = torch.linspace(0, 0.999, 5)[1:].flip(0)
        assert torch.allclose(scheduler.sigmas[:4], shift * u / (1 + (shift - 1) * u), atol=1e-5)
    predict = train.make_predict(pipeline.transformer, conditions_of(args), train.call_network)
    with torch.no_grad():
        rollout = simulate_inference(predict, scheduler, noise, 0, args.guidance_scale)
    assert relative(rollout.latents, expected) < 1e-5


@pytest.mark.parametrize("sampler", ["euler", "dpmsolver++"])
@pytest.mark.parametrize("shifting", ["static", "dynamic"])
def test_result_can_be_tuned_again(run, options, tmp_path, sampler, shifting):
    """As the advice is: first plainly, then by ADT from that result, with either sampler."""
    path = tiny.make_sd3(tmp_path / "base", scheduler_overrides=SHIFTS[shifting][0])
    first = run("--pretrained_model_name_or_path", path, "--sampler", sampler, "--adversarial_loss_weight", 0)
    second = run("--pretrained_model_name_or_path", first, "--sampler", sampler, output_dir="second")
    configs = [json.loads((out / "scheduler" / "scheduler_config.json").read_text()) for out in (first, second)]
    assert configs[0] == configs[1]
    facts = json.loads((second / "adt_config.json").read_text())["inference"]
    assert ("flow_shift" in facts) == (sampler == "dpmsolver++") and ("shift" in facts) == (sampler == "euler")
    args = train.parse_args(options("--pretrained_model_name_or_path", first, "--sampler", sampler))
    assert facts["sigmas"] == train.check_models(args)[0].sigmas.tolist() and facts["sigmas"][-1] == 0
    assert "sigmas" not in (second / "README.md").read_text()


def test_sd35_medium(run, tmp_path):
    """Two attentions in the first blocks, and normalised queries and keys."""
    path = tiny.make_sd3(tmp_path / "base", dual_attention_layers=(0,), qk_norm="rms_norm")
    base = ("--pretrained_model_name_or_path", path, "--gradient_checkpointing")
    output = run(*base)
    assert (
        torch.from_numpy(
            DiffusionPipeline.from_pretrained(output)("a red disc", num_inference_steps=2, output_type="np").images
        )
        .isfinite()
        .all()
    )
    adapters = run(*base, "--use_lora", "--lora_layers", "attn2.to_q", "--mixed_precision", "bf16")
    names = set(load_file(adapters / "pytorch_lora_weights.safetensors"))
    assert len(names) == 2 and all("transformer_blocks.0.attn2.to_q" in name for name in names)


@pytest.mark.parametrize("start_index", [1, 2, 3])
@pytest.mark.parametrize("shifting", ["static", "dynamic"])
def test_rollout_from_a_later_index_is_image_to_image(options, tmp_path, start_index, shifting):
    path = tiny.make_sd3(tmp_path / "base", scheduler_overrides=SHIFTS[shifting][0])
    args = train.parse_args(options("--pretrained_model_name_or_path", path))
    pipeline = StableDiffusion3Img2ImgPipeline.from_pretrained(path)
    scheduler, _, _ = train.check_models(args)
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 4, 8, 8, generator=generator)
    start = starting_latents(scheduler, x_0, noise, start_index)
    # 4-channel input is taken as scaled latents, to which the pipeline adds its own noise: give it this one.
    pipeline.prepare_latents = lambda *args, **kwargs: start
    expected = pipeline(
        "a red disc", image=x_0, strength=1 - start_index / 4, output_type="latent", **train.inference_options(args)
    ).images
    predict = train.make_predict(pipeline.transformer, conditions_of(args), train.call_network)
    with torch.no_grad():
        rollout = simulate_inference(predict, scheduler, start, start_index, args.guidance_scale)
    assert relative(rollout.latents, expected) < 1e-5
    sigma = scheduler.sigmas[start_index].item()
    assert signal_and_noise_levels(scheduler, start_index) == pytest.approx((1 - sigma, sigma), rel=1e-6)
    assert torch.allclose(start, (1 - sigma) * x_0 + sigma * noise, atol=1e-6)


def test_both_gradient_paths_are_one_with_euler(options):
    """Equation 13: a flow-matching Euler step is the identity in the latents already."""
    scheduler, _, _ = train.check_models(train.parse_args(options()))
    gradients = {}
    for gradient_path in ("adt", "drtune"):
        predictions = [torch.zeros(1, 4, 8, 8, requires_grad=True) for _ in scheduler.timesteps]
        start = latents = torch.ones(1, 4, 8, 8, requires_grad=True)
        for timestep, prediction in zip(scheduler.timesteps, predictions, strict=True):
            latents = constrained_step(scheduler, prediction, timestep, latents, gradient_path)
        gradients[gradient_path] = torch.autograd.grad(latents.sum(), [start, *predictions])
        scheduler.set_timesteps(4)
    assert equal(gradients["adt"], gradients["drtune"])
    steps = (scheduler.sigmas[1:] - scheduler.sigmas[:-1]).tolist()
    assert [gradient.unique().item() for gradient in gradients["adt"]] == pytest.approx([1.0, *steps])


@pytest.mark.parametrize("scheme", ["logit_normal", "none", "sigma_sqrt", "mode", "cosmap"])
def test_plain_fine_tuning_is_the_official_scripts(run, options, sd3_path, scheme):
    more = ("--adversarial_loss_weight", 0, "--weighting_scheme", scheme, "--max_train_steps", 2)
    losses = read_scalars(run(*more))["diffusion_loss"]
    args = train.parse_args(options(*more))
    pipeline = DiffusionPipeline.from_pretrained(sd3_path)
    schedule = pipeline.scheduler
    dataset = data_utils.ImageCaptionDataset(train.load_image_caption_dataset(args), args)
    optimizer = torch.optim.AdamW(pipeline.transformer.parameters(), lr=1e-3, weight_decay=1e-2)
    for iteration, keys in enumerate(data_utils.GlobalBatchSampler(8, args)):
        items = [dataset[key] for key in keys]

        def draw(purpose, iteration=iteration):
            generators = [train.make_generator(0, purpose, iteration, n) for n in range(2)]
            return torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])

        with torch.no_grad():
            pixel_values = train.normalize_pixels(torch.stack([item["pixel_values"] for item in items]))
            posterior = pipeline.vae.encode(pixel_values).latent_dist
            latents = (posterior.mean + posterior.std * draw("posterior") - 0.0609) * 1.5305
            captions = [item["caption"] for item in items]
            embeds, _, pooled, _ = pipeline.encode_prompt(captions, None, None, max_sequence_length=16)
        noise = draw("noise")
        u = torch.cat(
            [
                train.compute_density_for_timestep_sampling(
                    scheme, 1, 0.0, 1.0, 1.29, generator=train.make_generator(0, "timestep", iteration, n)
                )
                for n in range(2)
            ]
        )
        indices = (u * 1000).long()
        sigma = schedule.sigmas[indices].view(2, 1, 1, 1)
        prediction = pipeline.transformer.train()(
            (1 - sigma) * latents + sigma * noise, embeds, pooled, schedule.timesteps[indices]
        ).sample
        weighting = train.compute_loss_weighting_for_sd3(scheme, sigma)
        loss = (weighting * (prediction - (noise - latents)) ** 2).mean()
        assert losses[iteration + 1] == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pipeline.transformer.parameters(), 1.0)
        optimizer.step()


def test_density_options_change_plain_fine_tuning_alone(run):
    def losses(*more, weight=0):
        return read_scalars(run("--adversarial_loss_weight", weight, "--max_train_steps", 2, *more))["diffusion_loss"]

    plain = losses()
    assert losses("--logit_mean", 1.0) != plain and losses("--logit_std", 0.2) != plain
    assert losses("--weighting_scheme", "mode", "--mode_scale", 0.1) != losses("--weighting_scheme", "mode")
    assert losses("--weighting_scheme", "sigma_sqrt", weight=1) == losses(weight=1)
    run("--checkpointing_steps", 4)
    run("--resume_from_checkpoint", "latest", "--weighting_scheme", "mode")  # nor does it hinder resuming


# Prompts


@pytest.mark.parametrize("t5", [True, False])
def test_prompts_are_encoded_as_the_pipeline_does(options, sd3_path, t5):
    args = train.parse_args(options(*["--no_t5"] * (not t5)))
    encoder = train.PromptEncoder(args, NO_ACCELERATOR)
    pipeline = DiffusionPipeline.from_pretrained(sd3_path, **({} if t5 else WITHOUT_T5))
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for prompt in ("a red disc", "", "a long caption that is cut because it has more tokens than sixteen"):
        with torch.no_grad():
            values = pipeline.encode_prompt(prompt, None, None, max_sequence_length=16)
        expected = dict(zip(names, values, strict=True))
        for name, value in encoder([prompt]).items():
            assert torch.equal(value, expected[name])
            assert torch.equal(encoder.negative[name], expected[f"negative_{name}"])
    assert (encoder(["a red disc"])["prompt_embeds"][:, 12:] == 0).all() == (not t5)


def snippet_of(output):
    return re.search(r"```python\n(.*?)```", (output / "README.md").read_text(), re.DOTALL).group(1)


def test_saved_pipeline_carries_a_t5_that_training_did_without(run, sd3_path, tmp_path, monkeypatch):
    output = run("--no_t5")
    file = Path("text_encoder_3", "model.safetensors")
    assert equal(load_file(output / file), load_file(sd3_path / file))
    assert DiffusionPipeline.from_pretrained(output).text_encoder_3 is not None
    assert "text_encoder_3=None, tokenizer_3=None" in snippet_of(output)
    assert "trained without T5" in (output / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(snippet_of(output), {})
    assert (tmp_path / "image.png").is_file()


@pytest.mark.parametrize("more", [(), ("--use_lora",), ("--use_lora", "--fuse_lora")], ids=["full", "lora", "fused"])
def test_base_without_t5(run, without_t5_path, tmp_path, monkeypatch, more):
    output = run("--pretrained_model_name_or_path", without_t5_path, "--validation_prompts", "a red disc", *more)
    assert "text_encoder_3=None, tokenizer_3=None" in snippet_of(output)
    monkeypatch.chdir(tmp_path)
    exec(snippet_of(output), {})
    assert (tmp_path / "image.png").is_file()


def test_max_sequence_length(run, options):
    encoder = train.PromptEncoder(train.parse_args(options()), NO_ACCELERATOR)
    assert encoder(["a"])["prompt_embeds"].shape == (1, 12 + 16, 64)
    output = run("--max_sequence_length", 8)
    assert "max_sequence_length=8" in snippet_of(output)
    assert "max_sequence_length=" not in snippet_of(run("--max_sequence_length", 256, output_dir="default"))


def test_half_precision_t5_stays_so(run, sd3_path, tmp_path):
    """4.7 billion parameters need not become float32 for the rest to work with them."""
    pipeline = DiffusionPipeline.from_pretrained(sd3_path)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.half()
    pipeline.save_pretrained(tmp_path / "base", variant="fp16")
    output = run("--pretrained_model_name_or_path", tmp_path / "base", "--variant", "fp16")
    dtypes = {value.dtype for value in load_file(output / "text_encoder_3" / "model.safetensors").values()}
    assert torch.float16 in dtypes  # beside a few layers that transformers itself keeps in float32
    tuned = DiffusionPipeline.from_pretrained(output)
    assert {tuned.transformer.dtype, tuned.vae.dtype, tuned.text_encoder.dtype} == {torch.float32}
    image = tuned("a red disc", num_inference_steps=2, max_sequence_length=16, output_type="np").images
    assert torch.from_numpy(image).isfinite().all()


def test_cached_embeddings_give_the_same_run_bitwise(run, tmp_path, monkeypatch):
    monkeypatch.setattr(data_utils, "CAPTIONS_PER_FILE", 4)
    monkeypatch.setattr(data_utils, "CAPTIONS_PER_BATCH", 1)  # by more, they may differ by rounding
    plain = run("--proportion_empty_prompts", 0.3, output_dir="plain")
    cached = run("--proportion_empty_prompts", 0.3, "--cache_text_embeddings", tmp_path / "cache", output_dir="cached")
    assert read_scalars(cached) == read_scalars(plain)
    assert equal(read_network(cached, "transformer"), read_network(plain, "transformer"))
    for count, more in enumerate((("--no_t5",), ("--max_sequence_length", 8)), start=2):
        run("--cache_text_embeddings", tmp_path / "cache", *more)
        assert len(list((tmp_path / "cache").glob("*.arrow"))) == 3 * count  # nine captions, four to a file


def test_offloaded_text_encoders_are_brought_together(options):
    encoder = train.PromptEncoder(train.parse_args(options("--offload_text_encoders")), NO_ACCELERATOR)
    assert encoder.on_device.networks == encoder.text_encoders and len(encoder.text_encoders) == 3


@pytest.mark.parametrize(("precision", "of_wo"), [("fp16", torch.float32), ("bf16", torch.bfloat16)])
def test_float16_alone_leaves_what_overflows_in_float32(options, precision, of_wo):
    accelerator = types.SimpleNamespace(device=torch.device("cpu"), mixed_precision=precision)
    encoder = train.PromptEncoder(train.parse_args(options()), accelerator)
    dtypes = {name: value.dtype for name, value in encoder.text_encoders[2].named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if ".wo." in name} == {of_wo}
    assert {dtype for name, dtype in dtypes.items() if ".wo." not in name} == {encoder.text_encoders[0].dtype}


# Bad input


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--sampler", "ddim"), r"--sampler: ddim is not known; choose from euler, dpmsolver\+\+"),
        (("--sampler", "heun"), "second stage"),
        (("--sampler", "unipc"), "UniPC's corrector"),
        (("--max_sequence_length", 513), r"must lie in \[1, 512\]"),
        (("--logit_std", 0), "--logit_std: must be greater than 0"),
        (("--mode_scale", 1.8), r"--mode_scale: must lie in \[-1, 1.75\]"),
        (("--cache_text_embeddings", __file__), "is a file"),
        (("--cache_text_embeddings", "x", "--offload_text_encoders"), "nothing to offload"),
        (("--snr_gamma", 5), "unrecognized arguments: --snr_gamma"),
    ],
)
def test_bad_options(options, capsys, more, sentence):
    with pytest.raises(SystemExit):
        train.parse_args(options(*more))
    assert re.search(sentence, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--resolution", 18), "18 is not divisible by 4, the VAE's factor times"),
        (("--resolution", 64), "64 pixels a side are too many: .* has positions for 32"),
        (("--num_inference_steps", 1001), "1001 is too many for a schedule of 1000"),
        (("--pretrained_vae_model_name_or_path", "nowhere"), "nowhere is not a readable VAE"),
    ],
)
def test_bad_input_is_refused_before_weights_are_loaded(run, monkeypatch, more, sentence):
    monkeypatch.setattr(train, "load_image_caption_dataset", None)
    with pytest.raises(ADTError, match=sentence):
        run(*more)


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "is a StableDiffusionXLPipeline"),
        ("transformer/config.json", {"in_channels": 9}, "9 channels and the VAE of .* makes 4"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "is no flow-matching model"),
        ("scheduler/scheduler_config.json", {"stochastic_sampling": True}, "adds fresh noise"),
        ("scheduler/scheduler_config.json", {"invert_sigmas": True}, "runs from the data to the noise"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "has no use_karras_sigmas with flow"),
        ("scheduler/scheduler_config.json", {"shift_terminal": 0.1}, "has no shift_terminal with flow"),
        ("vae/config.json", {"shift_factor": None}, "has no shift_factor"),
    ],
)
def test_unsuitable_models_are_refused(run, sd3_path, tmp_path, monkeypatch, file, changes, sentence):
    sampler = "dpmsolver++" if "with flow" in sentence else "euler"
    monkeypatch.setattr(train, "load_image_caption_dataset", None)  # nothing is loaded before
    shutil.copytree(sd3_path, tmp_path / "base")
    config = json.loads((tmp_path / "base" / file).read_text()) | changes
    (tmp_path / "base" / file).write_text(json.dumps(config))
    with pytest.raises(ADTError, match=sentence):
        run("--pretrained_model_name_or_path", tmp_path / "base", "--sampler", sampler)

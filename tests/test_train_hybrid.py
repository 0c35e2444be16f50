"""What is the diffusion-GAN hybrid's own, on tiny models of the real classes; see also `test_related.py`."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, reset_accelerate
from diffusers import DDIMScheduler, DiffusionPipeline
from helpers import checkpoint_state, equal, plain_options, read_network, read_scalars, relative
from PIL import Image
from safetensors.torch import load_file
from transformers import Dinov2Model, ResNetForImageClassification, ResNetModel

from data_utils import load_micro_batches
from related import train_hybrid as train
from related.related_utils import load_prompt_encoder, start_run
from training_utils import ADTError, FrozenModels, Trained, prepare_generator


LORA = ("--use_lora", "--rank", 4, "--learning_rate", 1e-2)
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)


@pytest.fixture
def options(base_paths, resnet_path, dataset_path, tmp_path):
    """Options of a short run in which both networks visibly move; later ones override earlier ones."""

    def make(*more, family="sd15", output_dir="out"):
        words = [
            "--family", family, "--pretrained_model_name_or_path", base_paths[family],
            "--train_data_dir", dataset_path, "--discriminator_model_name_or_path", resnet_path,
            "--discriminator_resolution", 12, "--resolution", 16, "--train_batch_size", 2, "--max_train_steps", 4,
            "--learning_rate", 1e-3, "--discriminator_learning_rate", 1e-2, "--lr_warmup_steps", 0,
            "--generator_start_step", 1, "--hybrid_loss_weight", 1, "--hybrid_ramp_steps", 2,
            "--checkpointing_steps", 100, "--num_inference_steps", 4, "--dataloader_num_workers", 0,
            "--output_dir", tmp_path / output_dir, *more,
        ]  # fmt: skip
        return [str(word) for word in words]

    return make


@pytest.fixture
def run(options, tmp_path):
    def run(*more, family="sd15", output_dir="out"):
        reset_accelerate()
        train.main(train.parse_args(options(*more, family=family, output_dir=output_dir)))
        return tmp_path / output_dir

    return run


@pytest.fixture
def parts(options):
    """A run's parts as `tune` makes them, and its first micro-batch."""

    def make(*more, family="sd15"):
        module, args = train.FAMILIES[family], train.parse_args(options(*more, family=family))
        run, sampler, noise_scheduler = start_run(
            module, lambda args: module.FAMILY, train.make_method, args, train.check_method
        )
        encoder, _ = load_prompt_encoder(module, run, [])
        models = FrozenModels(module.load_frozen_vae(args, run.accelerator), encoder, sampler, noise_scheduler)
        generator = prepare_generator(train.load_partly_frozen(module, args, run.accelerator), run)
        return SimpleNamespace(
            module=module,
            run=run,
            models=models,
            generator=generator,
            adversary=train.HybridAdversary(run),
            batch=train.prepare_batch(next(load_micro_batches(run, save_checkpoint=None)), 0, models, module, run),
        )

    return make


@pytest.fixture
def gradients_stay(monkeypatch):
    """An update ends with its gradients, and no step."""
    monkeypatch.setattr(Trained, "step", lambda trained, iteration: False)


def values_of(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def see(model, images, side=12):
    """The pooled features (B, C), by a path of its own."""
    resized = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    hidden = model(((resized + 1) / 2 - IMAGENET[0]) / IMAGENET[1]).last_hidden_state
    return hidden.mean(dim=(2, 3))


# The discriminator


def test_sees_images_as_the_resnet_was_trained(resnet_path):
    features = train.ResNetFeatures(ResNetModel.from_pretrained(resnet_path), 12)
    images = torch.rand(2, 3, 20, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = {}
    features.model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    before = values_of(features)
    found = features.train()(images)
    expected = []
    for image in images:  # PIL's bilinear is antialiased
        channels = [Image.fromarray(channel.numpy()).resize((12, 12), Image.Resampling.BILINEAR) for channel in image]
        expected.append(torch.stack([torch.frombuffer(bytearray(c.tobytes()), dtype=torch.float32) for c in channels]))
    expected = torch.stack(expected).view(2, 3, 12, 12)
    assert torch.allclose(seen["pixel_values"], ((expected + 1) / 2 - IMAGENET[0]) / IMAGENET[1], atol=1e-5)
    assert torch.allclose(found, see(features.model, images), atol=1e-6)
    assert found.shape == (2, 16) and features.channels == 16
    # The weights are the classifier's, and its running statistics are used and stay.
    assert equal(before, values_of(features))
    saved = ResNetForImageClassification.from_pretrained(resnet_path).eval().resnet
    assert torch.equal(found, saved(seen["pixel_values"]).pooler_output.flatten(1))
    assert not any(parameter.requires_grad for parameter in features.parameters())


def test_head_stays_in_float32_under_autocast():
    head, features = train.BinaryHead(16), torch.randn(3, 16)
    expected = head(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(features), expected)


def test_cross_entropy_by_hand():
    logits = torch.tensor([2.0, -1.0])
    real, fake = train.cross_entropy(logits, True), train.cross_entropy(logits, False)
    assert real.tolist() == pytest.approx([math.log(1 + math.exp(-2)), math.log(1 + math.e)])
    assert fake.tolist() == pytest.approx([math.log(1 + math.exp(2)), math.log(1 + math.exp(-1))])


def test_discriminator_update_by_hand(parts, gradients_stay):
    p = parts()
    p.batch.generated = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    head = p.adversary.discriminator.network
    values = train.update_discriminator([p.batch], 0, p.adversary, p.run)
    with torch.no_grad():
        real, fake = (see(p.adversary.feature_network.model, images) for images in (p.batch.images, p.batch.generated))
        r, f = real @ head.weight[0] + head.bias, fake @ head.weight[0] + head.bias
    assert values["real_score"] == pytest.approx(r.mean().item(), abs=1e-6)
    assert values["fake_score"] == pytest.approx(f.mean().item(), abs=1e-6)
    loss = (torch.log(1 + torch.exp(-r)) + torch.log(1 + torch.exp(f))).mean()
    assert values["discriminator_loss"] == pytest.approx(loss.item(), rel=1e-5)
    # d(-log D)/dlogit = D - 1, d(-log(1 - D))/dlogit = D
    slopes = torch.cat([r.sigmoid() - 1, f.sigmoid()]) / 2
    assert torch.allclose(head.weight.grad[0], slopes @ torch.cat([real, fake]), atol=1e-6)
    assert torch.allclose(head.bias.grad, slopes.sum(), atol=1e-6)


# The generator's gradient


def reference(p, weight, chosen):
    """The loss in one graph: its gradients at the parameters and, of each term, at the prediction."""
    network, vae, batch = p.generator.network.train(), p.models.vae, p.batch
    scheduler = DDIMScheduler.from_config(p.models.noise_scheduler.config, clip_sample=False)
    timesteps = (batch.density * 1000).long()
    sample = scheduler.add_noise(batch.latents, batch.loss_noise, timesteps)
    prediction = p.module.call_network(network, sample, timesteps, batch.conditions.loss)
    epsilon = scheduler.config.prediction_type == "epsilon"
    velocity = scheduler.get_velocity(batch.latents, batch.loss_noise, timesteps)
    diffusion = F.mse_loss(prediction, batch.loss_noise if epsilon else velocity)
    scheduler.set_timesteps(1000)
    verdict = 0.0
    for n in chosen:
        step = scheduler.step(prediction[n : n + 1], timesteps[n], sample[n : n + 1])
        image = vae.decode(step.pred_original_sample / vae.config.scaling_factor).sample
        logit = p.adversary.discriminator.network(see(p.adversary.feature_network.model, image))
        verdict = verdict + F.softplus(-logit).sum() / len(sample)
    at_prediction = [torch.autograd.grad(loss, prediction, retain_graph=True)[0] for loss in (diffusion, verdict)]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(diffusion + weight * verdict, trained)
    return diffusion.item(), verdict.item(), at_prediction, torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("sd15", ()),
        ("sd15", ("--prediction_type", "v_prediction")),
        ("sdxl", ()),
        ("sd15", (*LORA, "--freeze_blocks", "mid_block.*")),
        ("sd15", ("--gradient_checkpointing",)),
    ],
    ids=["epsilon", "velocity", "sdxl", "lora", "checkpointed"],
)
def test_gradient_is_that_of_one_graph(parts, gradients_stay, family, more):
    p = parts("--noise_offset", 0.1, *more, family=family)
    p.batch.density = torch.tensor([0.7, 0.3])
    if "--use_lora" in more:  # else the second matrices are zero, and the first have no gradient
        for name, parameter in p.generator.network.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    _, _, at_prediction, _ = reference(p, 1.0, [1])
    weight = (at_prediction[0].norm() / at_prediction[1].norm()).item()  # so that neither term hides the other
    diffusion, verdict, at_prediction, expected = reference(p, weight, [1])

    values = train.update_generator([p.batch], 0.5, weight, 0, p.generator, p.adversary, p.models, p.module, p.run)
    trained = [parameter for parameter in p.generator.network.parameters() if parameter.requires_grad]
    assert relative(torch.cat([parameter.grad.flatten() for parameter in trained]), expected) < 1e-5
    assert values["diffusion_loss"] == pytest.approx(diffusion, rel=1e-5)
    assert values["generator_loss"] == pytest.approx(2 * verdict, rel=1e-5)  # of the one image that counts
    assert values["adversarial_share"] == 0.5
    assert values["diffusion_gradient_norm"] == pytest.approx(at_prediction[0].norm().item(), rel=1e-5)
    assert values["adversarial_gradient_norm"] == pytest.approx(at_prediction[1].norm().item(), rel=1e-4)


def test_one_forward_of_the_network_serves_both_terms(parts):
    p, calls = parts(), []
    p.generator.network.register_forward_hook(lambda *_: calls.append(None))
    train.update_generator([p.batch], 1.0, 1.0, 0, p.generator, p.adversary, p.models, p.module, p.run)
    assert len(calls) == 1


@pytest.fixture
def decoded(parts, monkeypatch):
    """How many images each call of the decoder gets."""
    counts, decode = [], train.FAMILIES["sd15"].decode_latents

    def count(vae, latents):
        counts.append(len(latents))
        return decode(vae, latents)

    monkeypatch.setattr(train.FAMILIES["sd15"], "decode_latents", count)
    return counts


def test_images_outside_the_range_have_no_verdict(parts, decoded):
    p = parts()
    p.batch.density = torch.tensor([0.5, 0.4999])  # timesteps 500 and 499: the lower half is below 500
    timesteps, levels = p.module.plain_noise_levels(p.batch.density, p.models.noise_scheduler)
    prediction = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for chosen in ([False, True], [False, False]):
        loss, gradient = train.adversarial_gradient(
            prediction, torch.tensor(chosen), p.batch, levels, 0, p.adversary, p.models, p.module
        )
        assert [bool(image.any()) for image in gradient] == chosen
        assert (loss > 0) == any(chosen)
    assert decoded == [1]

    decoded.clear()
    arguments = (p.generator, p.adversary, p.models, p.module, p.run)
    values = train.update_generator([p.batch], 0.5, 1.0, 0, *arguments)
    assert values["adversarial_share"] == 0.5 and "generator_loss" in values
    values = train.update_generator([p.batch], 0.499, 1.0, 0, *arguments)
    assert values["adversarial_share"] == values["adversarial_gradient_norm"] == 0 and "generator_loss" not in values
    assert decoded == [1]


def test_fakes_are_of_the_range(parts, monkeypatch):
    p, seen = parts(), []
    p.batch.density = torch.tensor([0.9999, 0.25])
    call = p.module.call_network
    monkeypatch.setattr(p.module, "call_network", lambda *given: seen.append(given[2]) or call(*given))
    images = train.one_step_images(p.generator.wrapped.eval(), p.batch, 0.6, 0, p.models, p.module, p.run.args)
    assert seen[0].tolist() == [599, 150]
    assert not images.requires_grad
    scheduler = DDIMScheduler.from_config(p.models.noise_scheduler.config, clip_sample=False)
    scheduler.set_timesteps(1000)
    sample = scheduler.add_noise(p.batch.latents, p.batch.loss_noise, seen[0])
    with torch.no_grad():
        prediction = call(p.generator.network, sample, seen[0], p.batch.conditions.loss)
        for n, image in enumerate(images):
            original = scheduler.step(prediction[n], seen[0][n], sample[n]).pred_original_sample
            decoded = p.models.vae.decode(original[None] / p.models.vae.config.scaling_factor).sample[0]
            assert torch.allclose(image, decoded, atol=1e-4)


def test_predictions_that_are_not_finite_end_the_run(parts):
    p = parts()
    torch.nn.init.constant_(p.generator.network.conv_out.bias, math.nan)
    with pytest.raises(ADTError, match="The one-step prediction became nan at iteration 3"):
        train.one_step_images(p.generator.wrapped, p.batch, 0.5, 2, p.models, p.module, p.run.args)


# When


def test_the_weight_rises(options):
    args = train.parse_args(options("--hybrid_loss_weight", 0.002, "--hybrid_ramp_steps", 1000))
    assert [train.hybrid_weight(k, args) for k in (0, 250, 999, 1000, 5000)] == pytest.approx(
        [0, 0.0005, 0.001998, 0.002, 0.002]
    )
    assert train.hybrid_weight(0, args.replace(hybrid_ramp_steps=0)) == 0.002


def test_the_range_grows(options):
    args = train.parse_args(options("--max_train_steps", 600, "--generator_start_step", 499))
    assert train.count_updates(args) == 101
    limits = [train.curriculum_limit(k, args) for k in (-499, 0, 1, 50, 100)]
    assert limits == pytest.approx([0.5, 0.5, 0.505, 0.75, 1.0])
    fixed = args.replace(curriculum_end=0.5)
    assert {train.curriculum_limit(k, fixed) for k in (-1, 0, 37, 100)} == {0.5}
    once = args.replace(max_train_steps=500)
    assert train.count_updates(once) == 1 and train.curriculum_limit(0, once) == 0.5
    assert train.count_updates(args.replace(max_train_steps=10)) == 0


def test_what_a_run_logs(run):
    scalars = read_scalars(run("--learning_rate", 1e-6, "--lr_scheduler", "linear"))
    every, generator = {1, 2, 3, 4}, {2, 3, 4}
    for tag in ("discriminator_loss", "real_score", "fake_score", "discriminator_lr", "curriculum_limit", "lr"):
        assert set(scalars[tag]) == every, tag
    for tag in ("diffusion_loss", "diffusion_gradient_norm", "adversarial_gradient_norm", "adversarial_share"):
        assert set(scalars[tag]) == generator, tag
    assert list(scalars["hybrid_loss_weight"].values()) == pytest.approx([0, 0.5, 1])
    assert list(scalars["curriculum_limit"].values()) == pytest.approx([0.5, 0.5, 0.75, 1])
    assert scalars["adversarial_share"][4] == 1
    # The generator's schedule counts its three updates, the discriminator's all four.
    assert list(scalars["lr"].values()) == pytest.approx([1e-6, 2e-6 / 3, 1e-6 / 3, 0])
    assert list(scalars["discriminator_lr"].values()) == pytest.approx([0.0075, 0.005, 0.0025, 0])


def test_head_start_leaves_the_generator_as_it_is(run, sd15_path, caplog):
    output = run("--generator_start_step", 3, "--max_train_steps", 3, "--checkpointing_steps", 1)
    assert equal(read_network(output), read_network(sd15_path))
    heads = [load_file(output / f"checkpoint-{n}" / "discriminator.safetensors") for n in (1, 3)]
    assert heads[0].keys() == {"weight", "bias"}
    assert all(not torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert any("The generator is never updated" in message for message in caplog.messages)


def test_each_update_changes_its_own_network(parts):
    p = parts("--freeze_blocks")
    resnet, head = p.adversary.feature_network, p.adversary.discriminator.network
    p.batch.generated = torch.zeros_like(p.batch.images)

    def changed(update):
        networks = (p.generator.network, head, resnet, p.models.vae)
        before = [values_of(network) for network in networks]
        update()
        assert all(parameter.grad is None for network in networks for parameter in network.parameters())
        return [
            {name for name, value in values_of(network).items() if not torch.equal(value, old[name])}
            for network, old in zip(networks, before, strict=True)
        ]

    generator = {name for name, _ in p.generator.network.named_parameters()}
    found = changed(lambda: train.update_discriminator([p.batch], 0, p.adversary, p.run))
    assert found == [set(), {"weight", "bias"}, set(), set()]
    arguments = (p.generator, p.adversary, p.models, p.module, p.run)
    found = changed(lambda: train.update_generator([p.batch], 1.0, 1.0, 1, *arguments))
    assert found == [generator, set(), set(), set()]


def test_micro_batches_stand_for_a_batch(run):
    whole = read_scalars(run("--curriculum_start", 1, "--max_train_steps", 3, "--learning_rate", 1e-6))
    parts = read_scalars(
        run("--curriculum_start", 1, "--max_train_steps", 3, "--learning_rate", 1e-6, "--train_batch_size", 1,
            "--gradient_accumulation_steps", 2, output_dir="micro")
    )  # fmt: skip
    assert whole.keys() == parts.keys()
    for tag, values in whole.items():
        assert list(parts[tag].values()) == pytest.approx(list(values.values()), rel=1e-4), tag


# Frozen blocks


@pytest.mark.parametrize(
    ("more", "frozen"),
    [
        ((), ("down_blocks.1.", "mid_block.", "up_blocks.0.")),
        (("--freeze_blocks", "conv_in.*", "mid_block.*"), ("conv_in.", "mid_block.")),
        (("--freeze_blocks",), ()),
    ],
    ids=["default", "patterns", "none"],
)
def test_frozen_blocks_stay_and_others_move(run, sd15_path, more, frozen):
    base, tuned = (
        read_network(sd15_path),
        read_network(run(*more, "--max_train_steps", 2, "--generator_start_step", 0)),
    )
    for name, value in base.items():
        assert torch.equal(value, tuned[name]) == name.startswith(frozen or "no name"), name


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_frozen_blocks_have_no_adapter(run, base_paths, family):
    output = run(*LORA, "--freeze_blocks", "mid_block.*", family=family)
    names = set(load_file(output / "pytorch_lora_weights.safetensors"))
    parts = {name.split(".")[1] for name in names}
    assert parts == {"down_blocks", "up_blocks"}
    pipeline = DiffusionPipeline.from_pretrained(base_paths[family])
    pipeline.load_lora_weights(output)
    adapters = {name: value for name, value in pipeline.unet.state_dict().items() if "lora_B" in name}
    assert len(adapters) == len(names) // 2 and all(value.any() for value in adapters.values())


# Resuming


def test_resuming_is_exact_while_the_curriculum_grows(run):
    more = ("--use_ema", "--ema_decay", 0.5, "--lr_scheduler", "cosine")
    whole = run(*more, "--checkpointing_steps", 2)
    run(*more, "--checkpointing_steps", 2, "--max_train_steps", 4, output_dir="parts")
    (whole.parent / "parts" / "checkpoint-4").rename(whole.parent / "unused")
    parts = run(*more, "--checkpointing_steps", 2, "--resume_from_checkpoint", "checkpoint-2", output_dir="parts")
    first, last = checkpoint_state(whole / "checkpoint-2"), checkpoint_state(whole / "checkpoint-4")
    assert not any(equal(first[name], last[name]) for name in last)
    assert equal(checkpoint_state(parts / "checkpoint-4"), last)


def test_the_curriculum_ties_a_run_to_its_length(run):
    run("--checkpointing_steps", 2, "--max_train_steps", 2)
    with pytest.raises(ADTError, match=r"another configuration: max_train_steps 2 \(now 3\)\.$"):
        run("--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    fixed = ("--curriculum_end", 0.5, "--max_train_steps")
    run(*fixed, 2, "--checkpointing_steps", 2, output_dir="fixed")
    output = run(*fixed, 3, "--checkpointing_steps", 3, "--resume_from_checkpoint", "latest", output_dir="fixed")
    assert (output / "checkpoint-3").is_dir()


# Options


OWN = {
    "hybrid_loss_weight", "hybrid_ramp_steps", "curriculum_start", "curriculum_end", "generator_start_step",
    "freeze_blocks", "discriminator_model_name_or_path", "discriminator_resolution", "discriminator_learning_rate",
    "discriminator_lr_warmup_steps",
}  # fmt: skip
CHANGES = [
    ("--hybrid_loss_weight", 2), ("--hybrid_ramp_steps", 7), ("--curriculum_start", 1), ("--curriculum_end", 0.6),
    ("--generator_start_step", 1), ("--freeze_blocks", "conv_in.*"), ("--discriminator_model_name_or_path", "other"),
    ("--discriminator_resolution", 16), ("--discriminator_learning_rate", 1e-3),
    ("--discriminator_lr_warmup_steps", 2),
]  # fmt: skip


@pytest.mark.parametrize("family", train.HYBRID_FAMILIES)
def test_help_has_what_acts(capsys, family):
    """Beside the options of plain fine-tuning, which others' tests show to act, those of `CHANGES`."""
    assert {flag[2:] for flag, _ in CHANGES} == OWN
    with pytest.raises(SystemExit):
        train.parse_args(["--family", family, "--help"])
    shown = set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE))
    squares = {"use_aspect_ratio_buckets", "aspect_ratio_buckets"}
    assert shown == plain_options(FAMILIES[family].train) - squares | OWN | {"family"}


def test_own_options_act(run, resnet_path, tmp_path, monkeypatch):
    other = ResNetModel.from_pretrained(resnet_path)
    torch.nn.init.normal_(other.embedder.embedder.convolution.weight)
    other.save_pretrained(tmp_path / "other")
    tuned = []
    monkeypatch.setattr(train, "finish_run", lambda generator, *_: tuned.append(values_of(generator.network)))
    for more in ((), *CHANGES):
        words = [tmp_path / word if word == "other" else word for word in more]
        run("--max_train_steps", 2, "--generator_start_step", 0, "--report_to", "none", *words)
    base, *changed = tuned
    for (flag, _), network in zip(CHANGES, changed, strict=True):
        assert not torch.equal(network["conv_out.weight"], base["conv_out.weight"]), flag


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--discriminator_model_name_or_path", "DINOV2"), "must be a ResNet, not 'dinov2'."),
        (("--discriminator_model_name_or_path", "does/not-exist"), "does/not-exist is not readable: "),
        (("--freeze_blocks", "mid_block.*", "middle.*"), "middle.* matches no parameter that would train."),
        (("--use_lora", "--freeze_blocks", "conv_in.*"), "conv_in.* matches no parameter that would train."),
        (("--freeze_blocks", "*"), "--freeze_blocks leaves nothing to train."),
        (("--use_lora", "--family", "sdxl", "--pretrained_model_name_or_path", "SDXL"),
         "--freeze_blocks leaves nothing to train."),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_a_model_is_loaded(
    options, dinov2_path, sdxl_path, no_weights, monkeypatch, more, sentence, tmp_path
):
    monkeypatch.setattr(ResNetModel, "from_pretrained", Dinov2Model.from_pretrained)  # which fails the test
    more = [{"DINOV2": dinov2_path, "SDXL": sdxl_path}.get(word, word) for word in more]
    with pytest.raises(ADTError) as error:
        train.main(train.parse_args(options(*more)))
    assert sentence in str(error.value)
    assert not (tmp_path / "out" / "adt_config.json").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--curriculum_start", 0), "--curriculum_start must be greater than 0"),
        (("--curriculum_start", 0.8, "--curriculum_end", 0.7), "and at most --curriculum_end."),
        (("--curriculum_end", 1.5), "must lie in [0, 1], not 1.5"),
        (("--hybrid_loss_weight", 0), "must be greater than 0"),
        (("--family", "sd3"), "invalid choice: 'sd3'"),
        (("--discriminator_layers", 1), "unrecognized arguments: --discriminator_layers"),
    ],
)
def test_bad_options(options, capsys, more, sentence):
    with pytest.raises(SystemExit):
        train.parse_args(options(*more))
    assert sentence in capsys.readouterr().err

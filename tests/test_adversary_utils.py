"""The adversary of a run: pairs, the balance of the losses, what it says of the data, and drift."""

import json
import logging
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate import PartialState
from conftest import FAMILIES
from helpers import equal, read_network, read_scalars
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPModel, CLIPProcessor, Dinov2Model

import adversary_utils
import train_adt_sd15 as train
from adt_utils import FeatureNetwork
from adversary_utils import Adversary, DriftGuard, adversarial_weight, path_third
from output_utils import Validation, last_good_checkpoint, list_checkpoints
from training_utils import ADTError


@pytest.fixture
def family():
    return FAMILIES["sd15"]


def test_saturation_is_warned_about_once(run, monkeypatch, caplog):
    monkeypatch.setattr(adversary_utils, "SATURATION_GAP", -10)
    monkeypatch.setattr(adversary_utils, "SATURATION_ITERATIONS", 2)
    with caplog.at_level(logging.WARNING):
        run()
    assert sum("saturated" in message for message in caplog.messages) == 1


@pytest.mark.parametrize(
    ("more", "without", "with_generator"),
    [
        ((), 3, 1),  # real, fake and reference; the generated images with gradient
        (("--augmentation_pairing", "input"), 3, 1),
        (("--augmentation_pairing", "shared"), 3, 2),  # the real image is its own reference; the generator has a draw
        (("--augmentation_policy",), 2, 1),
        (("--mismatched_pair_weight", 1), 3, 1),
        (("--discriminator_type", "projected"), 2, 1),  # which looks at no reference
    ],
)
def test_passes_of_the_feature_network(run, monkeypatch, more, without, with_generator):
    """What is drawn alike is computed once an iteration."""
    passes, forward = [], FeatureNetwork.forward

    def counting(self, images):
        passes.append(images)
        return forward(self, images)

    monkeypatch.setattr(FeatureNetwork, "forward", counting)
    run("--max_train_steps", 2, "--real_images", "reconstructed", *more)
    assert len(passes) == 2 * without + with_generator


# Mismatched pairs


def test_partners_are_found_in_the_global_batch():
    """Two processes with two micro-batches of one image each: the references come from wherever the partner is."""
    features = {"a": 1.0, "b": 2.0, "c": 3.0}

    def references(captions):
        return [[torch.full((1, 2, 3), features[caption])] for caption in captions]

    def gather(stacked):  # (N, B, C, L) of each process, one after the other; here the other process has a and c
        return torch.cat([stacked, torch.stack([layers[0] for layers in references(["a", "c"])])])

    accelerator = SimpleNamespace(num_processes=2, process_index=0, device="cpu", gather=gather)
    run = SimpleNamespace(accelerator=accelerator)
    adversary = SimpleNamespace(discriminator=SimpleNamespace(run=run))
    batches = [SimpleNamespace(captions=["a"]), SimpleNamespace(captions=["b"])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adversary_utils, "gather_object", lambda own: [*own, [["a"], ["c"]]])
        found = Adversary.mismatched_references(adversary, batches, references(["a", "b"]))
        # The global batch is a (0, first micro-batch), a (1), b (0, second), c (1).
        assert [[layer.unique().tolist() for layer in layers] for layers in found] == [[[2.0]], [[3.0]]]
        PartialState()  # which accelerate's logger asks for
        patch.setattr(adversary_utils, "gather_object", lambda own: [[["a"], ["a"]], [["a"], ["a"]]])
        assert Adversary.mismatched_references(adversary, batches, references(["a", "a"])) is None


def test_mismatched_scores_are_logged(run):
    scalars = read_scalars(run("--mismatched_pair_weight", 2))
    total = {
        step: 1 - scalars["real_score"][step] + 1 + scalars["fake_score"][step] + 2 * (1 + mismatched)
        for step, mismatched in scalars["mismatched_score"].items()
    }
    assert scalars["discriminator_loss"] == pytest.approx(total, rel=1e-5)  # a cosine's hinge is linear
    assert len(total) == 4


def test_equal_captions_are_no_mismatch(run, tmp_path, caplog):
    data = tiny.make_imagefolder(tmp_path / "data")
    metadata = tmp_path / "data" / "metadata.jsonl"
    rows = [json.loads(line) | {"text": "the same"} for line in metadata.read_text().splitlines()]
    metadata.write_text("\n".join(map(json.dumps, rows)))
    plain = run("--train_data_dir", data, output_dir="plain")
    paired = run("--train_data_dir", data, "--mismatched_pair_weight", 1)
    assert "mismatched_score" not in read_scalars(paired)
    assert sum("no mismatched pair" in message for message in caplog.messages) == 1
    assert equal(read_network(plain), read_network(paired))


# What it says


@pytest.mark.parametrize(("weight", "norm", "expected"), [(0.25, 4.0, 0.25), ("auto", 4.0, 0.75), ("auto", 0.0, 0.0)])
def test_adversarial_weight(weight, norm, expected):
    args = SimpleNamespace(adversarial_loss_weight=weight, adversarial_gradient_ratio=1.5)
    values = {"adversarial_gradient_norm": norm, "diffusion_gradient_norm": 2.0}
    assert adversarial_weight(values, args) == expected


def test_thirds_of_the_path():
    thirds = [path_third(start, 10) for start in range(10)]
    assert thirds == ["early"] * 4 + ["middle"] * 3 + ["late"] * 3
    assert [path_third(start, 2) for start in range(2)] == ["early", "middle"]


def test_score_gap_is_logged_by_third(run):
    scalars = read_scalars(run("--max_train_steps", 8))
    for step, start in scalars["start_index"].items():
        gap = scalars["real_score"][step] - scalars["fake_score"][step]
        assert scalars[f"score_gap_{path_third(int(start), 4)}"][step] == pytest.approx(gap, abs=1e-6)
    assert sum(len(scalars[name]) for name in scalars if name.startswith("score_gap")) == 8


def difference(caplog):
    """The percentage that the run's beginning names."""
    [message] = [message for message in caplog.messages if "reconstructions by the VAE" in message]
    return int(message.split("%")[0].split()[-1])


def test_difference_of_reconstructions_is_said(run, monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        run("--max_train_steps", 1)
        assert difference(caplog) > 20  # a VAE of random weights
        caplog.clear()
        run("--max_train_steps", 1, "--real_images", "reconstructed", output_dir="reconstructed")
        assert not any("reconstructions by the VAE" in message for message in caplog.messages)
        # A VAE that gives back what it got.
        seen = []
        family = train.FAMILY
        monkeypatch.setattr(
            train,
            "FAMILY",
            type(family)(
                **vars(family)
                | {
                    "encode_images": lambda vae, images, noise: seen.append(images),
                    "decode_latents": lambda vae, latents: seen[-1],
                }
            ),
        )
        run("--max_train_steps", 1, output_dir="perfect")
        assert difference(caplog) == 0


def test_reconstructed_images_are_what_is_called_real(run, monkeypatch):
    batches = []
    original = train.update_discriminator
    monkeypatch.setattr(
        train, "update_discriminator", lambda found, *args: batches.extend(found) or original(found, *args)
    )
    run("--max_train_steps", 1, output_dir="dataset")
    run("--max_train_steps", 1, "--real_images", "reconstructed")
    plain, reconstructed = batches
    assert equal(plain.latents, reconstructed.latents)  # the diffusion loss's data stay
    assert not torch.allclose(plain.images, reconstructed.images, atol=0.05)
    assert not reconstructed.images.requires_grad


# Drift


class Colours(nn.Module):
    """Stands for the feature network: an image's mean colour is its embedding."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))

    def embed(self, images):
        return images.mean(dim=(2, 3))


def paint(*colours):
    """A list of two images for each colour."""
    return [[Image.new("RGB", (8, 8), colour)] * 2 for colour in colours]


BASE = paint("red", "lime", "blue")


def make_guard(tolerance=0.5, **options):
    PartialState()  # for accelerate's logs
    args = SimpleNamespace(
        drift_tolerance=tolerance, drift_clip_model_name_or_path=None, cache_dir=None, stop_on_drift=False
    )
    base_images = options.pop("base_images", BASE)
    vars(args).update(options)
    return DriftGuard(Colours(), ["red", "green", "blue"], base_images, args)


def test_drift_is_the_loss_of_what_tells_prompts_apart(caplog):
    guard = make_guard()
    with caplog.at_level(logging.WARNING):
        kept, drifted = guard.check(BASE)
        assert kept == {"base_similarity_kept": pytest.approx(1)} and not drifted
        # Another look, in which the prompts are told apart as well.
        kept, drifted = guard.check(paint("darkred", "darkgreen", "darkblue"))
        assert 0.5 < kept["base_similarity_kept"] < 0.7 and not drifted
        assert not caplog.messages
        # Each shows what another prompt asks for; then all show the same.
        kept, drifted = guard.check(paint("lime", "blue", "red"))
        assert kept["base_similarity_kept"] < 0 and drifted
        kept, drifted = guard.check(paint("gold", "gold", "gold"))
        assert kept["base_similarity_kept"] == pytest.approx(0, abs=1e-5) and drifted
    assert len(caplog.messages) == 2 and "drift: base_similarity_kept is -50%" in caplog.messages[0]
    assert make_guard(tolerance=0.3).check(paint("darkred", "darkgreen", "darkblue"))[1]


def test_base_images_that_do_not_differ_tell_no_drift(caplog):
    alike = paint("red", "red", "red")
    with caplog.at_level(logging.WARNING):
        guard = make_guard(base_images=alike)
    assert "drift from it is not looked for" in caplog.text
    assert guard.check(BASE) == ({}, False)
    with pytest.raises(ADTError, match="--stop_on_drift needs other --validation_prompts"):
        make_guard(base_images=alike, stop_on_drift=True)


def test_embedding_is_dinov2s_own(dinov2_path):
    model = Dinov2Model.from_pretrained(dinov2_path)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    network = FeatureNetwork(model, (0,), 16)
    expected = model(pixel_values=((images + 1) / 2 - network.mean) / network.std).last_hidden_state[:, 0]
    torch.testing.assert_close(network.embed(images), expected)


class Captions(nn.Module):
    """Stands for CLIP: knows three prompts, and an image by its colour."""

    EMBEDDINGS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0)}

    def forward(self, text, images):
        embeddings = torch.tensor([self.EMBEDDINGS[prompt] for prompt in text])
        pixels = torch.stack([torch.tensor(image.getpixel((0, 0))) for image in images])
        return SimpleNamespace(text_embeds=embeddings, image_embeds=pixels / 127.5 - 1)


def test_clip_tells_whether_prompts_are_followed(monkeypatch):
    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda path, **hub: Captions())
    monkeypatch.setattr(
        CLIPProcessor,
        "from_pretrained",
        lambda path, **hub: lambda text, images, **more: {"text": text, "images": images},
    )
    guard = make_guard(drift_clip_model_name_or_path="clip")
    kept, drifted = guard.check(paint("darkred", "darkgreen", "darkblue"))
    assert set(kept) == {"base_similarity_kept", "prompt_similarity_kept"} and not drifted
    kept, drifted = guard.check(paint("lime", "blue", "red"))
    assert kept["prompt_similarity_kept"] < 0 and drifted


@pytest.fixture
def any_margin(monkeypatch):
    """The tiny model's text encoder is of random weights: prompts hardly matter to its images."""
    monkeypatch.setattr(DriftGuard, "LEAST_MARGIN", 0)


PROMPTS = ("--validation_prompts", "a red disc", "a blue disc", "--num_validation_images", 1, "--validation_steps", 1)


def drift_at(monkeypatch, *iterations):
    """Has the guard find drift after those iterations, whatever the images."""
    monkeypatch.setattr(DriftGuard, "LEAST_MARGIN", 0)
    done = []
    log = Validation.log
    monkeypatch.setattr(Validation, "log", lambda self, iteration: done.append(iteration) or log(self, iteration))
    monkeypatch.setattr(
        DriftGuard, "check", lambda self, images: ({"base_similarity_kept": 0.1}, done[-1] in iterations)
    )
    return done


def test_guard_in_a_run(run, any_margin):
    """A model that hardly moves keeps all; one that falls apart does not."""
    still = read_scalars(run(*PROMPTS, "--learning_rate", 1e-9, output_dir="still"))["base_similarity_kept"]
    assert still == pytest.approx(dict.fromkeys(range(1, 5), 1), abs=0.02)
    broken = read_scalars(run(*PROMPTS, "--learning_rate", 1))["base_similarity_kept"]
    assert abs(broken[4] - 1) > 0.2


def test_drift_is_logged_and_does_not_stop(run, monkeypatch):
    drift_at(monkeypatch, 2, 3, 4)
    output = run(*PROMPTS)
    assert read_scalars(output)["base_similarity_kept"] == pytest.approx(dict.fromkeys(range(1, 5), 0.1))
    assert json.loads((output / "adt_config.json").read_text())["iterations"] == 4


def test_run_ends_with_the_last_good_checkpoint(run, monkeypatch, caplog):
    good = run("--max_train_steps", 2, output_dir="good")
    done = drift_at(monkeypatch, 3)
    more = (*PROMPTS, "--stop_on_drift", "--checkpointing_steps", 1, "--checkpoints_total_limit", 1)
    with caplog.at_level(logging.WARNING):
        output = run(*more, "--max_train_steps", 6)
    assert done == [1, 2, 3]
    assert "checkpoint-2, the last before its validation images drifted" in caplog.text
    assert equal(read_network(good), read_network(output))
    assert json.loads((output / "adt_config.json").read_text())["iterations"] == 2
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-2"]  # the limit would have kept the third
    assert (output / "images" / "prompt-1.png").exists()
    # Taken up again it goes on from there, and ends there again.
    output = run(*more, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")
    assert done == [1, 2, 3, 3]
    assert equal(read_network(good), read_network(output))


@pytest.mark.parametrize("more", [("--use_ema",), ("--use_lora", "--use_ema")], ids=["ema", "lora"])
def test_what_a_stopped_run_saves(run, monkeypatch, more):
    good = run("--max_train_steps", 2, *more, output_dir="good")
    drift_at(monkeypatch, 3)
    output = run(*PROMPTS, "--stop_on_drift", *more)
    name = "pytorch_lora_weights.safetensors" if len(more) > 1 else "unet/diffusion_pytorch_model.safetensors"
    assert equal(load_file(good / name), load_file(output / name))


def test_an_earlier_runs_checkpoint_is_not_taken_for_good(run, monkeypatch, tmp_path):
    drift_at(monkeypatch)
    run(*PROMPTS, "--stop_on_drift", "--checkpointing_steps", 1)
    assert last_good_checkpoint(tmp_path / "out").name == "checkpoint-4"
    drift_at(monkeypatch, 2)
    output = run(*PROMPTS, "--stop_on_drift", "--learning_rate", 5e-3)
    facts = json.loads((output / "adt_config.json").read_text())
    assert facts["iterations"] == 1 and facts["training_options"]["learning_rate"] == 5e-3
    assert equal(read_network(output), read_network(run("--max_train_steps", 1, output_dir="other")))  # no update yet


def test_drift_before_any_good_checkpoint(run, monkeypatch, tmp_path):
    drift_at(monkeypatch, 1)
    with pytest.raises(ADTError, match="no earlier validation was good"):
        run(*PROMPTS, "--stop_on_drift")
    assert not (tmp_path / "out" / "model_index.json").exists()


def test_drift_at_the_very_end(run, monkeypatch):
    drift_at(monkeypatch, 4)
    output = run(*PROMPTS, "--stop_on_drift", "--validation_steps", 3)
    assert json.loads((output / "adt_config.json").read_text())["iterations"] == 3


def test_clip_is_checked_before_anything_is_loaded(run, no_weights, dinov2_path):
    more = (*PROMPTS, "--drift_clip_model_name_or_path")
    with pytest.raises(ADTError, match="--drift_clip_model_name_or_path nowhere is not readable"):
        run(*more, "nowhere")
    with pytest.raises(ADTError, match="is not readable"):  # no processor
        run(*more, dinov2_path)

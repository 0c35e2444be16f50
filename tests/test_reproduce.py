"""The demo's worlds, and what `make reproduce` makes of numbers; the runs themselves take hours."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "demo"))

import reproduce  # noqa: E402
from reproduce import EQUAL_COMPUTE, FOLLOWED, METHODS  # noqa: E402
from shapes import ATTRIBUTES  # noqa: E402
from worlds import CORRELATED_SHARE, WORLDS, draw  # noqa: E402


# Worlds


def test_worlds_share_their_captions_and_nothing_else():
    drawn = {world: draw(world, 20, seed=3) for world in WORLDS}
    images, captions, attributes = drawn["flat"]
    assert images.shape == (20, 32, 32, 3) and images.dtype == np.uint8
    words = [ATTRIBUTES[name][attributes[name][0]] for name in ("size", "color", "shape", "background")]
    assert captions[0] == "a {} {} {} on a {} background".format(*words)
    for world, (other_images, other_captions, _) in drawn.items():
        assert np.array_equal(draw(world, 20, seed=3)[0], other_images)
        assert other_captions == captions or world == "correlated"
        assert world == "flat" or np.abs(other_images.astype(int) - images).mean() > 4
    with pytest.raises(ValueError, match="world must be one of flat, shaded, .* not 'round'"):
        draw("round", 1, seed=0)


def test_correlated_attributes():
    _, _, attributes = draw("correlated", 4000, seed=0)
    own = attributes["color"] % len(ATTRIBUTES["background"]) == attributes["background"]
    assert own.mean() == pytest.approx(CORRELATED_SHARE + (1 - CORRELATED_SHARE) / 4, abs=0.02)
    assert np.bincount(attributes["color"]).min() > 550  # each word is as frequent as before


@pytest.fixture(scope="module")
def evaluator():
    path = reproduce.DEMO / "assets" / "worlds" / "evaluator" / "model.safetensors"
    return reproduce.load_evaluator(path, reproduce.LOOKS)


@pytest.mark.parametrize("world", WORLDS)
def test_the_evaluator_knows_every_world(evaluator, world):
    images, _, attributes = draw(world, 200, seed=8)
    assert reproduce.followed(images, attributes, evaluator) > 0.97
    # It is the captions that it looks for.
    assert reproduce.followed(images[::-1].copy(), attributes, evaluator) < 0.1


def test_features_are_the_evaluators_standardised(tmp_path, evaluator):
    images = torch.from_numpy(draw("shaded", 50, seed=5)[0]).permute(0, 3, 1, 2)
    torch.jit.script(reproduce.EvaluatorFeatures(evaluator, images / 255)).save(tmp_path / "evaluator.pt")
    found = torch.jit.load(tmp_path / "evaluator.pt")(images, return_features=True)
    features = evaluator(images / 255)
    assert torch.allclose(found, features / features.std(0), atol=1e-4)
    assert np.allclose(found.std(0), 1, atol=1e-3)


@torch.no_grad()
def test_the_tiny_decoder_draws_as_the_vae_does():
    """Of latents as the denoiser has them, in every world that the VAE knows."""
    assets = reproduce.DEMO / "assets" / "worlds"
    vae = AutoencoderKL.from_pretrained(assets / "vae").eval()
    tiny = AutoencoderTiny.from_pretrained(assets / "tiny_decoder").eval()
    for world in reproduce.LOOKS:
        images = torch.from_numpy(draw(world, 20, seed=4)[0]).permute(0, 3, 1, 2) / 127.5 - 1
        latents = vae.encode(images).latent_dist.mean
        decoded = tiny.decode(latents * vae.config.scaling_factor).sample
        assert (decoded - vae.decode(latents).sample).abs().mean() < 0.08  # of images in [-1, 1]


# Methods


def test_methods_change_what_they_say(tmp_path):
    """As the training script reads them."""
    import train_adt_sd15

    base = ["--pretrained_model_name_or_path", "base", "--train_data_dir", str(tmp_path), "--resolution", "32"]
    options = {name: vars(train_adt_sd15.parse_args([*base, *more])) for name, more in METHODS.items()}

    def changes(name, other="ADT"):
        return {key for key, value in options[name].items() if value != options[other][key]}

    assert changes("projected discriminator") == {"discriminator_type"}
    assert changes("DRTune's path") == {"gradient_path"}
    assert changes("no diffusion loss") == {"diffusion_loss_weight", "adversarial_loss_weight"}
    assert changes("ADT, recipe") == {"mismatched_pair_weight", "use_ema", "ema_decay"}
    assert changes("ADT, pairs") == {"mismatched_pair_weight"}
    assert changes("ADT, recipe, pair weight 3", "ADT, recipe") == {"mismatched_pair_weight"}
    assert changes("ADT, recipe, gradient ratio 0.3", "ADT, recipe") == {"adversarial_gradient_ratio"}
    assert changes("ADT, recipe, reconstructed", "ADT, recipe") == {"real_images"}
    assert changes("ADT, recipe, tiny decoder", "ADT, recipe") == set()  # its path is filled in
    assert changes(EQUAL_COMPUTE, "fine-tuning") == set()
    assert changes("fine-tuning at ADT's rate", "fine-tuning") == {"learning_rate", "lr_warmup_steps"}
    assert not {"learning_rate", "lr_warmup_steps"} & changes("fine-tuning at ADT's rate")
    paper = options["ADT, as the paper"]
    assert (paper["adversarial_loss_weight"], paper["generator_start_step"]) == (1, 0)
    assert (paper["generator_update_interval"], paper["diffusion_loss_weight"], paper["num_gradient_steps"]) == (
        5,
        0.5,
        3,
    )
    assert len(paper["augmentation_policy"]) == 3 and paper["mismatched_pair_weight"] == 0
    assert {given["train_batch_size"] for given in options.values()} == {8}


def test_equal_compute():
    # Four rollouts of 1.5 steps on average and two branches; two updates, whose two replays and diffusion loss cost
    # three forwards each. An iteration of fine-tuning costs three forwards.
    assert reproduce.equal_compute_steps(4, 0, 2, sampler_steps=2, num_gradient_steps=1) == (4 * 3 + 2 * 3 * 3) / 3


# What is said of the numbers


def make_world(own, plain, floor=1.0, own_followed=(0.8, 0.8), plain_followed=(0.8, 0.8)):
    methods = {}
    plain_rows = (plain, plain_followed)
    for method, (fids, shares) in {"ADT": (own, own_followed), EQUAL_COMPUTE: plain_rows, "start": plain_rows}.items():
        rows = [dict.fromkeys(reproduce.METRICS, fid) | {FOLLOWED: followed} for fid, followed in zip(fids, shares)]
        methods[method] = {str(seed): row for seed, row in enumerate(rows)}
    return {"floor": dict.fromkeys(reproduce.METRICS, floor), "methods": methods}


@pytest.mark.parametrize(
    ("own", "floor", "followed", "distance", "prompts"),
    [
        ((5, 7), 1, (0.8, 0.8), True, True),  # 0.6 of 10
        ((5, 7.2), 1, (0.8, 0.8), False, True),
        ((7.4, 7.4), 5, (0.8, 0.8), True, True),  # the floor is high: half of what is between
        ((7.6, 7.6), 5, (0.8, 0.8), False, True),
        ((5, 5), 1, (0.7, 0.88), True, True),  # less, within the spread
        ((5, 5), 1, (0.78, 0.79), True, False),
    ],
)
def test_verdict(own, floor, followed, distance, prompts):
    world = make_world(own, (10, 10), floor, followed)
    found = reproduce.verdict(world, "ADT")
    assert (found["distance"], found["prompts"]) == (distance, prompts)
    assert found["ratio"] == pytest.approx(np.mean(own) / 10)
    # Over the seeds that both have, of which one has no spread.
    del world["methods"][EQUAL_COMPUTE]["1"]
    found = reproduce.verdict(world, "ADT")
    assert (found["seeds"], found["ratio"], found["prompts"]) == (1, own[0] / 10, None)


def test_numbers_add_up_over_calls(tmp_path):
    """Worlds, methods and seeds of one call stand beside those of another; a run's newer numbers replace the older."""
    args = SimpleNamespace(num_images=512, report=tmp_path / "report.md")
    world = make_world((5, 7), (9, 11))
    for rows in ({("ADT", 0): 1.0, (EQUAL_COMPUTE, 0): 2.0}, {("ADT", 1): 3.0, ("ADT", 0): 4.0}):
        numbers = reproduce.read_numbers(args)
        reproduce.add_numbers(numbers, "glow", world["floor"], {key: {"fid": fid} for key, fid in rows.items()}, args)
    reproduce.add_numbers(numbers, "lines", world["floor"], {("start", 0): {"fid": 5.0}}, args)
    found = reproduce.read_numbers(args)["worlds"]
    assert found["glow"]["methods"]["ADT"] == {"0": {"fid": 4.0}, "1": {"fid": 3.0}}
    assert found["glow"]["methods"][EQUAL_COMPUTE] == {"0": {"fid": 2.0}}
    assert found["lines"]["methods"] == {"start": {"0": {"fid": 5.0}}}
    args.num_images = 100
    with pytest.raises(SystemExit, match="is of 512 images a number: --num_images 100 needs another --report"):
        reproduce.read_numbers(args)


def test_report(tmp_path, capsys):
    args = SimpleNamespace(report=tmp_path / "report.md")
    world = make_world((5, 7), (9, 11), own_followed=(0.7, 0.7))
    del world["methods"]["start"]["1"]
    reproduce.write_report({"num_images": 512, "worlds": {"glow": world, "lines": world}}, args)
    text = args.report.read_text()
    assert "| ADT | 0, 1 | 6.00 ± 1.41 | 6.00 ± 1.41 | 6.000 ± 1.414 | 6.000 ± 1.414 | 0.700 ± 0.000 |" in text
    assert "| start | 0 | 9.00 | 9.00 | 9.000 | 9.000 | 0.800 |" in text
    assert "| *the VAE's floor* | | 1.00 | 1.00 | 1.000 | 1.000 | |" in text
    assert "| glow | ADT | 2 | 0.60 | 0.60 | reached | -10.0 points | 0.0 | missed |" in text
    assert text.index("## lines") < text.index("## glow")  # the worlds' own order
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_variants_are_of_the_script_as_it_stands(tmp_path):
    shutil.copy(ROOT / "train_adt_sd15.py", tmp_path)
    outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}  # where git would skip other files
    subprocess.run(
        ["git", "apply", str(ROOT / "benchmarks" / "variants.patch")], cwd=tmp_path, check=True, env=outside
    )
    text = (tmp_path / "train_adt_sd15.py").read_text()
    compile(text, "train_adt_sd15.py", "exec")
    variants = ("reals and fakes", "two negatives", "less late", "floor", "relativistic", "approximated R1 and R2")
    assert all(f'"{name}"' in text for name in variants)
    page = (ROOT / "benchmarks" / "prompts.md").read_text()
    assert 'VARIANT="reals and fakes"' in page and all(f"`{name}`" in page for name in variants[1:])

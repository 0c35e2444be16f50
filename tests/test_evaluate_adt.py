"""The evaluation, on tiny pipelines of the real classes; each metric against an independent computation."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from conftest import reset_accelerate
from PIL import Image, ImageFilter
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

import evaluate_adt as evaluation


@pytest.fixture(scope="session")
def clip_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=12, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    CLIPModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def test_set_path(tmp_path_factory):
    return tiny.make_imagefolder(tmp_path_factory.mktemp("test-set") / "test", count=10)


@pytest.fixture
def options(sd15_path, sdxl_path, dinov2_path, clip_path, test_set_path, tmp_path):
    def make(*more):
        return [
            "--pipelines", f"one={sd15_path}", f"two={sdxl_path}", "--dataset_name", str(Path(test_set_path).parent),
            "--sampler", "ddim:2", "--dinov2_model_name_or_path", dinov2_path, "--dinov2_resolution", "16",
            "--clip_model_name_or_path", clip_path, "--num_bootstrap", "3", "--nearest_k", "2", "--batch_size", "4",
            "--output_dir", str(tmp_path / "report"), *map(str, more),
        ]  # fmt: skip

    return make


@pytest.fixture
def run(options, tmp_path):
    def run(*more):
        reset_accelerate()
        evaluation.main(evaluation.parse_args(options(*more)))
        return json.loads((tmp_path / "report" / "report.json").read_text())

    return run


@pytest.fixture
def pictures(test_set_path):
    return [evaluation.square(Image.open(file), 16) for file in sorted(Path(test_set_path).glob("*.png"))]


def test_report_has_every_pipeline_sampler_and_metric(run, tmp_path):
    report = run("--sampler", "ddim:2", "dpmsolver++:2", "--guidance_scale", 1, 5)
    assert [(r["pipeline"], r["sampler"], r["guidance_scale"]) for r in report["runs"]] == [
        (name, sampler, scale)
        for name in ("one", "two")
        for sampler in ("ddim", "dpmsolver++")
        for scale in (1.0, 5.0)
    ]
    for result in report["runs"]:
        assert set(result["metrics"]) == {"fdd", "precision", "recall", "clip", "sharpness"}
        for name, values in result["metrics"].items():
            assert values["n"] == 10 and np.isfinite(values["value"]), name
        low, high = result["metrics"]["clip"]["interval"]
        assert low <= high
    assert len(report["win_rates"]) == 2 * 4 and all(0 <= win["win_rate"] <= 1 for win in report["win_rates"])
    assert "few for a Fréchet distance" in report["warnings"][0]
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| two | dpmsolver++ | 2 | 5.0 |" in text and "few for a Fréchet" in text


def test_every_pipeline_sees_the_same_noise(run, tmp_path, sd15_path):
    shutil.copytree(sd15_path, tmp_path / "copy")
    run("--pipelines", f"one={sd15_path}", f"copy={tmp_path / 'copy'}", "--metrics", "sharpness", "--batch_size", 3)
    for index in range(10):
        files = [
            tmp_path / "report" / "images" / name / "ddim-2-guidance-7" / f"{index:06d}.png"
            for name in ("one", "copy")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_images_are_what_the_pipeline_makes(run, tmp_path, sd15_path):
    run("--pipelines", f"one={sd15_path}", "--metrics", "sharpness", "--sampler", "own:2", "--batch_size", 1)
    pipeline = evaluation.DiffusionPipeline.from_pretrained(sd15_path)
    image = pipeline(
        "a blue stripes 2", generator=evaluation.image_generator(0, 2), num_inference_steps=2, guidance_scale=7.0
    ).images[0]
    file = tmp_path / "report" / "images" / "one" / "own-2-guidance-7" / "000002.png"
    assert Image.open(file).tobytes() == image.tobytes()


def test_adapters(run, tmp_path, sd15_path, dinov2_path, dataset_path):
    import train_adt_sd15

    reset_accelerate()
    train_adt_sd15.main(
        train_adt_sd15.parse_args(
            ["--pretrained_model_name_or_path", sd15_path, "--train_data_dir", dataset_path, "--resolution", "16",
             "--adversarial_loss_weight", "0", "--use_lora", "--learning_rate", "1e-2", "--lr_warmup_steps", "0",
             "--max_train_steps", "3", "--output_dir", str(tmp_path / "lora")]
        )
    )  # fmt: skip
    report = run(
        "--pipelines", f"base={sd15_path}", f"tuned={sd15_path}", "--lora", f"tuned={tmp_path / 'lora'}",
        "--metrics", "sharpness",
    )  # fmt: skip
    base, tuned = (result["metrics"]["sharpness"]["value"] for result in report["runs"])
    assert base != tuned


def test_stopped_evaluation_makes_each_missing_image_once(run, options, tmp_path, sd15_path, monkeypatch):
    only = ("--pipelines", f"one={sd15_path}", "--metrics", "sharpness", "--batch_size", 2)
    drawn = []
    original = evaluation.image_generator
    monkeypatch.setattr(
        evaluation, "image_generator", lambda seed, index: drawn.append(index) or original(seed, index)
    )
    save = Image.Image.save

    def stop(self, path, *args, **kwargs):
        if len(drawn) >= 6 and "000005" in str(path):
            raise KeyboardInterrupt
        save(self, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run(*only)
    directory = tmp_path / "report" / "images" / "one" / "ddim-2-guidance-7"
    before = {file.name: file.read_bytes() for file in directory.glob("0*.png")}
    assert sorted(before) == [f"{index:06d}.png" for index in range(5)]
    drawn.clear()
    run(*only)
    assert drawn == [5, 6, 7, 8, 9]
    assert all((directory / name).read_bytes() == data for name, data in before.items())
    with pytest.raises(evaluation.EvaluationError, match=r"images of other settings: seed 0 \(now 1\)"):
        run(*only, "--seed", 1)


def test_two_processes_give_the_same_report(run, options, tmp_path):
    one = run("--batch_size", 1)
    shutil.move(tmp_path / "report", tmp_path / "one")
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [*torchrun, evaluation.__file__, *options("--batch_size", 1)],
        check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300,
    )  # fmt: skip
    two = json.loads((tmp_path / "report" / "report.json").read_text())
    for file in (tmp_path / "one" / "images").rglob("0*.png"):
        assert file.read_bytes() == (tmp_path / "report" / file.relative_to(tmp_path / "one")).read_bytes()
    for first, second in zip(one["runs"], two["runs"], strict=True):
        for name, values in first["metrics"].items():
            # Ten images leave the covariances singular: what a distance's rounding then is, the BLAS's threads decide.
            assert second["metrics"][name]["value"] == pytest.approx(values["value"], rel=1e-5, abs=1e-6), name
    assert two["win_rates"] == one["win_rates"]


def test_options_reach_what_they_name(run, options, tmp_path, sd15_path, test_set_path, monkeypatch):
    seen = {}
    load_dataset = evaluation.datasets.load_dataset

    def load(path, name, cache_dir):
        seen.update(name=name, cache_dir=cache_dir)
        rows = load_dataset(path, cache_dir=cache_dir)["test"]
        rows = rows.rename_column("image", "picture").remove_columns("text")
        rows = rows.add_column("words", [["a red disc", "not this"]] * 9 + [[]])
        return {"valid": rows}

    monkeypatch.setattr(evaluation.datasets, "load_dataset", load)
    only = ("--pipelines", f"one={sd15_path}", "--metrics", "sharpness", "--num_images", 10)
    report = run(
        *only, "--split", "valid", "--image_column", "picture", "--caption_column", "words", "--resolution", 8,
        "--dtype", "bfloat16", "--dataset_config_name", "small", "--cache_dir", tmp_path / "cache",
    )  # fmt: skip
    assert seen == {"name": "small", "cache_dir": str(tmp_path / "cache")}
    assert report["runs"][0]["metrics"]["sharpness"]["n"] == 10
    directory = tmp_path / "report" / "images" / "one" / "ddim-2-guidance-7"
    assert Image.open(directory / "000000.png").size == (8, 8)
    settings = json.loads((directory / "settings.json").read_text())
    assert settings["dtype"] == "bfloat16" and settings["resolution"] == 8
    args = evaluation.parse_args(options("--split", "valid", "--image_column", "picture", "--caption_column", "words"))
    assert evaluation.load_reference(args)[1] == ["a red disc"] * 9 + [""]


# The metrics


def test_frechet_distance_against_scipy():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    other = 1.3 * torch.randn(150, 12, generator=generator, dtype=torch.float64) + 0.2
    covariances = [np.cov(values.numpy(), rowvar=False) for values in (real, other)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((real.mean(0) - other.mean(0)) ** 2).sum().item() + np.trace(sum(covariances) - 2 * root)
    assert evaluation.frechet_distance(real, other) == pytest.approx(expected, rel=1e-6)
    assert evaluation.frechet_distance(real, real) == pytest.approx(0, abs=1e-6)
    assert evaluation.frechet_distance(real[torch.randperm(200, generator=generator)], other) == pytest.approx(
        expected, rel=1e-9
    )


def test_precision_and_recall_by_hand():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    generated = torch.tensor([[0.5], [1.5], [5.0], [30.0]])
    # Real radii, k = 1: 1, 1, 1, 8; generated: 1, 1, 3.5, 25. Strictly nearer counts.
    assert evaluation.precision_and_recall(real, generated, 1) == {"precision": 0.75, "recall": 1.0}
    same = evaluation.precision_and_recall(real, real, 1)
    assert same == {"precision": 1.0, "recall": 1.0}


def test_sharpness_is_opencvs(pictures):
    values = evaluation.laplacian_variance(pictures)
    for picture, value in zip(pictures, values, strict=True):
        grey = np.array(picture.convert("L"))
        assert value.item() == pytest.approx(cv2.Laplacian(grey, cv2.CV_64F).var(), rel=1e-12)


def test_blur_is_worse(pictures, options):
    args = evaluation.parse_args(options())
    dinov2 = evaluation.DINOv2Features(args, "cpu")
    blurred = [picture.filter(ImageFilter.GaussianBlur(2)) for picture in pictures]
    reference = {"dinov2": evaluation.in_batches(dinov2, pictures, 4)}
    args.metrics = ["fdd", "sharpness"]
    same, worse = (
        evaluation.measure(images, [], reference, {"dinov2": dinov2}, args) for images in (pictures, blurred)
    )
    assert same["fdd"]["value"] == pytest.approx(0, abs=1e-7) and worse["fdd"]["value"] > 1e-5
    assert worse["sharpness"]["value"] < 0.5 * same["sharpness"]["value"]


def test_clip_score_is_the_models_logits(pictures, options, clip_path):
    scorer = evaluation.CLIPScore(evaluation.parse_args(options()), "cpu")
    captions = [f"a red disc {n}" for n in range(len(pictures))]
    scores = scorer(list(zip(pictures, captions, strict=True)))
    model = CLIPModel.from_pretrained(clip_path).eval()
    tokens = scorer.tokenizer(captions, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    inputs = evaluation.normalise(pictures, evaluation.CLIP)
    logits = model(pixel_values=inputs, **tokens).logits_per_image / model.logit_scale.exp()
    assert torch.allclose(scores, 100 * logits.diagonal(), atol=1e-4)


def test_fid_on_given_weights(run, tmp_path, options, capsys):
    class Inception(torch.nn.Module):
        def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            return images.float().mean(dim=(2, 3)) if return_features else images.float()

    torch.jit.script(Inception()).save(tmp_path / "inception.pt")
    report = run("--metrics", "fid", "--inception_weights", tmp_path / "inception.pt")
    assert report["runs"][0]["metrics"]["fid"]["features"] == "InceptionV3, inception.pt"
    assert report["runs"][0]["metrics"]["fid"]["value"] > 1
    for more, sentence in (
        (("--metrics", "fid"), "needs --inception_weights"),
        (("--inception_weights", "nowhere.pt"), "nowhere.pt does not exist"),
    ):
        with pytest.raises(SystemExit):
            evaluation.parse_args(options(*more))
        assert sentence in capsys.readouterr().err


def test_win_rate_and_bootstrap_by_hand(options):
    assert evaluation.win_rate([1, 2, 3, 4], [0, 2, 5, 1]) == 0.625  # two wins and a tie
    args = evaluation.parse_args(options("--num_bootstrap", 400))
    values = torch.tensor([0.0, 1.0]).repeat(50)
    low, high = evaluation.bootstrap_interval(lambda indices: values[indices].mean().item(), 100, args)
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.03) and high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.03)
    biased = evaluation.bootstrap_interval(lambda indices: len(set(indices.tolist())) / 100, 100, args)
    assert biased[0] < 1.0 < biased[1]  # every resample has about 63 different ones, the set itself 100
    assert evaluation.bootstrap_interval(None, 100, evaluation.parse_args(options("--num_bootstrap", 0))) is None


# Bad input


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--metrics", "beauty"), "beauty not known; choose from fid, fdd"),
        (("--sampler", "heun:20"), "give NAME:STEPS with one of ddim"),
        (("--sampler", "ddim"), "give NAME:STEPS"),
        (("--pipelines", "path"), "takes NAME=PATH"),
        (("--pipelines", "a=x", "a=y"), "has a name twice"),
        (("--pipelines", "../a=x"), "cannot be a folder's name"),
        (("--lora", "three=x"), "there is no pipeline three"),
        (("--num_images", 0), "--num_images must be greater than 0"),
    ],
)
def test_bad_options(options, capsys, more, sentence):
    with pytest.raises(SystemExit):
        evaluation.parse_args(options(*more))
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--pipelines", "a=nowhere"), "nowhere is not a readable pipeline"),
        (("--split", "train"), "no split train, only test"),
        (("--dataset_name", "nowhere"), "--dataset_name nowhere cannot be read"),
        (("--image_column", "picture"), "picture is not a column"),
        (("--dinov2_resolution", 18), "18 is not a multiple of 4"),
        (("--nearest_k", 9), "needs more than 10 images"),
    ],
)
def test_bad_input_is_refused_before_generating(run, monkeypatch, more, sentence):
    monkeypatch.setattr(evaluation, "load_pipeline", None)
    with pytest.raises(evaluation.EvaluationError, match=sentence):
        run(*more)


def test_corrupt_image_is_named(run, test_set_path, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load_pipeline", None)
    shutil.copytree(Path(test_set_path).parent, tmp_path / "data")
    file = tmp_path / "data" / "test" / "003.png"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(evaluation.EvaluationError, match="Image 3 of the dataset .*003.png.* does not decode"):
        run("--dataset_name", tmp_path / "data")


def test_pipelines_that_are_not_text_to_image_are_refused(run, sd15_path, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load_pipeline", None)
    shutil.copytree(sd15_path, tmp_path / "other")
    file = tmp_path / "other" / "model_index.json"
    file.write_text(file.read_text().replace('"StableDiffusionPipeline"', '"StableDiffusionImg2ImgPipeline"'))
    with pytest.raises(
        evaluation.EvaluationError, match="is a StableDiffusionImg2ImgPipeline, which is not text-to-im"
    ):
        run("--pipelines", f"a={tmp_path / 'other'}")


def test_flow_matching_has_its_own_scheduler_only(run, sd3_path, tmp_path):
    report = run("--pipelines", f"sd3={sd3_path}", "--sampler", "own:2", "--metrics", "sharpness", "--num_images", 2)
    assert report["runs"][0]["metrics"]["sharpness"]["n"] == 2
    without = tiny.make_sd3(tmp_path / "without", t5=False)
    run("--pipelines", f"bare={without}", "--sampler", "own:2", "--metrics", "sharpness", "--num_images", 2)
    with pytest.raises(evaluation.EvaluationError, match="ddim does not suit a flow-matching model"):
        run("--pipelines", f"other={sd3_path}", "--sampler", "ddim:2")

"""The evaluation, on tiny pipelines of the real classes; each metric against an independent computation."""

import importlib.machinery
import json
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from conftest import FAMILIES, reset_accelerate
from diffusers import AutoencoderKL, DiffusionPipeline, PNDMScheduler, UNet2DConditionModel
from helpers import run_two_processes
from PIL import Image, ImageFilter
from prdc import compute_prdc
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

import evaluate_adt as evaluation
import evaluate_metrics as metrics
import evaluate_pipelines as pipelines
import evaluate_report
from related import train_add
from related.train_add import student_schedule


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
            "--dataloader_num_workers", "0",
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
    return [metrics.square(Image.open(file), 16) for file in sorted(Path(test_set_path).glob("*.png"))]


ONE_PROCESS = types.SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))


def features_of(images, chosen, networks, args):
    """What the evaluation makes of PIL images for the chosen metrics, with empty prompts."""
    image_set = metrics.ImageSet(images.__getitem__, [""] * len(images), metrics.needed(chosen))
    [features] = metrics.extract([image_set], networks, args, ONE_PROCESS)
    return features


def measured(images, real, chosen, networks, args):
    """The chosen metrics of PIL images against real ones."""
    reference = metrics.Reference(features_of(real, chosen, networks, args), chosen, torch.device("cpu"))
    return metrics.measure(features_of(images, chosen, networks, args), chosen, reference, networks, args)


def frechet_distance(real, generated):
    return metrics.FrechetDistance(real, torch.device("cpu")).to(generated)(torch.arange(len(generated)))


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
            low, high = values["interval"]
            assert low <= high and (name not in ("precision", "recall") or 0 <= low <= high <= 1), name
    assert len(report["win_rates"]) == 4 and all(0 <= win["win_rate"] <= 1 for win in report["win_rates"])
    assert "few for a Fréchet distance" in report["warnings"][0]
    assert "fdd: 10 images are not more than the 32 features" in report["warnings"][1]
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| two | dpmsolver++ | 2 | 5.0 |" in text and "few for a Fréchet" in text


def test_every_pipeline_sees_the_same_noise(run, tmp_path, sd15_path):
    shutil.copytree(sd15_path, tmp_path / "copy")
    run("--pipelines", f"one={sd15_path}", f"copy={tmp_path / 'copy'}", "--metrics", "sharpness", "--batch_size", 3)
    for index in range(10):
        files = [
            tmp_path / "report" / "images" / "test" / name / "ddim-2-guidance-7" / f"{index:06d}.png"
            for name in ("one", "copy")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_images_are_what_the_pipeline_makes(run, tmp_path, sd15_path):
    run("--pipelines", f"one={sd15_path}", "--metrics", "sharpness", "--sampler", "own:2", "--batch_size", 1)
    pipeline = DiffusionPipeline.from_pretrained(sd15_path)
    image = pipeline(
        "a blue stripes 2",
        generator=evaluation.make_generator(0, "evaluation", 2),
        num_inference_steps=2,
        guidance_scale=7.0,
    ).images[0]
    file = tmp_path / "report" / "images" / "test" / "one" / "own-2-guidance-7" / "000002.png"
    assert Image.open(file).tobytes() == image.tobytes()


# How a model was trained to be sampled


@pytest.fixture
def trained(sd15_path, sdxl_path, sd3_path, tmp_path):
    """A copy of a tiny pipeline beside what its training might have written of itself."""

    def trained(family, options, inference=None, name="tuned"):
        path = shutil.copytree({"sd15": sd15_path, "sdxl": sdxl_path, "sd3": sd3_path}[family], tmp_path / name)
        facts = {"method": "adversarial diffusion tuning", "iterations": 1, "global_batch_size": 2}
        facts |= {"inference": inference or {}, "training_options": {"resolution": 16} | options}
        (path / "adt_config.json").write_text(json.dumps(facts))
        return path

    return trained


WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}


@pytest.mark.parametrize(
    ("family", "stated", "loading", "call", "recorded"),
    [
        ("sd15", {"guidance_rescale": 0.7}, {}, {"guidance_rescale": 0.7}, {"guidance_rescale": 0.7}),
        ("sd3", {"no_t5": True, "max_sequence_length": 20}, WITHOUT_T5, {"max_sequence_length": 20},
         {"max_sequence_length": 20, "t5": False}),
        # The second image is 25 wide and 20 high: at its centre the crop begins two pixels from the left.
        ("sdxl", {"rollout_time_ids": "image"}, {}, {"original_size": (20, 25), "crops_coords_top_left": (0, 2)},
         {"guidance_rescale": 0.0, "rollout_time_ids": "image"}),
    ],
    ids=["guidance_rescale", "without T5", "image's sizes"],
)  # fmt: skip
def test_sampled_as_trained(run, trained, tmp_path, family, stated, loading, call, recorded):
    path = trained(family, stated)
    chosen = ("--pipelines", f"one={path}", "--metrics", "sharpness", "--sampler", "own:2", "--num_images", 2)
    report = run(*chosen)
    folder = tmp_path / "report" / report["runs"][0]["images"]["test"]
    prompt = json.loads((folder / "settings.json").read_text())["prompts"][1]

    def drawn(loading, call):
        pipeline = DiffusionPipeline.from_pretrained(path, **loading)
        generator = evaluation.make_generator(0, "evaluation", 1)
        return pipeline(prompt, generator=generator, num_inference_steps=2, guidance_scale=7.0, **call).images[0]

    expected, plain = drawn(loading, call), drawn({}, {})
    saved = np.array(Image.open(folder / "000001.png")).astype(int)
    assert np.abs(saved - np.array(expected)).max() <= 1 < np.abs(saved - np.array(plain)).max()
    assert report["pipelines"][0]["sampling"] == recorded
    assert json.loads((folder / "settings.json").read_text())["sampling"] == recorded
    shown = ", ".join(f"{key} {value}" for key, value in recorded.items())
    assert shown in (tmp_path / "report" / "report.md").read_text()

    # The command line overrides it, and images that were drawn otherwise are not taken for its own.
    usual = {"sd15": ["--guidance_rescale", 0], "sd3": ["--t5", "--max_sequence_length", 256]}
    usual = usual.get(family, ["--rollout_time_ids", "inference"])
    with pytest.raises(evaluation.EvaluationError, match="images of other settings: sampling {"):
        run(*chosen, *usual)
    run(*chosen, *usual, "--output_dir", tmp_path / "usual")
    saved = np.array(Image.open(tmp_path / "usual" / folder.relative_to(tmp_path / "report") / "000001.png"))
    assert np.abs(saved.astype(int) - np.array(plain)).max() <= 1


def test_adapters_and_checkpoints_are_sampled_as_trained(options, tmp_path, sd3_path, sdxl_path):
    """Adapters on a base that says nothing, and a checkpoint by the options that it was made with."""
    (tmp_path / "adapters").mkdir()
    facts = {"inference": {}, "training_options": {"no_t5": True, "resolution": 16}}
    (tmp_path / "adapters" / "adt_config.json").write_text(json.dumps(facts))
    (tmp_path / "run" / "checkpoint-2" / "unet").mkdir(parents=True)
    config = {"pretrained_model_name_or_path": sdxl_path, "guidance_rescale": 0.5, "rollout_time_ids": "image"}
    manifest = {"iteration": 2, "config": config}
    (tmp_path / "run" / "checkpoint-2" / "adt_checkpoint.json").write_text(json.dumps(manifest))
    facts = {"inference": {"sigmas": [1.0, 0.5]}, "training_options": {}}
    (tmp_path / "run" / "adt_config.json").write_text(json.dumps(facts))
    chosen = ("--pipelines", f"base={sd3_path}", f"tuned={sd3_path}", "--lora", f"tuned={tmp_path / 'adapters'}")
    chosen += ("--checkpoints", f"run={tmp_path / 'run'}")

    def sampling(*more):
        args = evaluation.parse_args(options(*chosen, *more))
        assert pipelines.find_candidates(args)[-1].inference == {"sigmas": [1.0, 0.5]}
        return [pipelines.sampling_options(candidate, args) for candidate in pipelines.find_candidates(args)]

    assert sampling() == [
        {"max_sequence_length": 256, "t5": True},
        {"max_sequence_length": 256, "t5": False},
        {"guidance_rescale": 0.5, "rollout_time_ids": "image"},
    ]
    assert sampling("--t5", "--guidance_rescale", 0.1) == [
        {"max_sequence_length": 256, "t5": True},
        {"max_sequence_length": 256, "t5": True},
        {"guidance_rescale": 0.1, "rollout_time_ids": "image"},
    ]


def test_adapters_belong_to_the_vae_that_they_were_trained_with(options, sd15_path, tmp_path):
    other = tiny.make_vae()
    with torch.no_grad():
        other.decoder.conv_out.bias += 1
    other.save_pretrained(tmp_path / "vae")
    candidate = pipelines.Candidate("one", sd15_path, vae=str(tmp_path / "vae"))
    args = evaluation.parse_args(options())
    bias = pipelines.load_pipeline(candidate, args, "cpu").vae.decoder.conv_out.bias
    assert torch.equal(bias, other.decoder.conv_out.bias)
    facts = {"inference": {}, "training_options": {"pretrained_vae_model_name_or_path": "my-vae"}}
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adt_config.json").write_text(json.dumps(facts))
    chosen = options("--pipelines", f"one={sd15_path}", "--lora", f"one={tmp_path / 'adapters'}")
    [candidate] = pipelines.find_candidates(evaluation.parse_args(chosen))
    with pytest.raises(evaluation.EvaluationError, match="one belongs to the VAE my-vae, .* with --vae one=PATH"):
        pipelines.find_vae(candidate, args)
    [candidate] = pipelines.find_candidates(evaluation.parse_args([*chosen, "--vae", f"one={tmp_path / 'vae'}"]))
    assert pipelines.find_vae(candidate, args) == tmp_path / "vae"


@pytest.mark.parametrize(("family", "sampler", "key"), [("sd3", "own", "sigmas"), ("sd15", "ddim", "timesteps")])
def test_other_noise_levels_than_in_training_are_said(trained, options, family, sampler, key):
    args = evaluation.parse_args(options("--sampler", f"{sampler}:4"))
    path = trained(family, {})
    base = DiffusionPipeline.from_pretrained(path).scheduler
    scheduler = pipelines.make_scheduler(sampler, base, None)
    scheduler.set_timesteps(4)
    levels = getattr(scheduler, key).tolist()

    def warnings(name, levels, steps=4):
        inference = {"scheduler": type(scheduler).__name__, "num_inference_steps": steps, key: levels}
        args.resolution, args.pipelines = None, {name: str(trained(family, {}, inference, name))}
        [candidate] = pipelines.find_candidates(args)
        return pipelines.check_candidate(candidate, args)["warnings"]

    assert warnings("same", levels) == [] == warnings("other-steps", [0.5] * 4, steps=5)
    for name, changed in (("moved", [levels[0], levels[1] * 1.01, *levels[2:]]), ("shorter", levels[1:])):
        [sentence] = warnings(name, changed)
        assert sentence.startswith(f"{name} is sampled by other {key} ({levels[0]:.4g}, ") and "4 steps" in sentence

    def warnings_of_checkpoint(name, levels):
        """Of a run that has not ended."""
        network = FAMILIES[family].network
        checkpoint = trained(family, {}, name=name) / "checkpoint-2"
        shutil.copytree(checkpoint.parent / network, checkpoint / network)
        (checkpoint.parent / "adt_config.json").unlink()
        config = {"pretrained_model_name_or_path": str(checkpoint.parent), "num_inference_steps": 4}
        schedule = {"scheduler": type(scheduler).__name__, key: levels}
        (checkpoint / "adt_checkpoint.json").write_text(
            json.dumps({"iteration": 2, "config": config, "schedule": schedule})
        )
        args.resolution, args.pipelines, args.checkpoints = None, {}, {name: str(checkpoint.parent)}
        [candidate] = pipelines.find_candidates(args)
        return pipelines.check_candidate(candidate, args)["warnings"]

    assert warnings_of_checkpoint("as-before", levels) == []
    [sentence] = warnings_of_checkpoint("moved-since", [*levels[:-1], levels[-1] + 1])
    assert sentence.startswith(f"moved-since is sampled by other {key} ({levels[0]:.4g}, ")


def test_other_spacings_are_said():
    def facts(ddim, euler):
        spacings = {"ddim": ddim, "euler": euler}
        own = {"own": {"class": "PNDMScheduler"}}
        return {"samplers": {name: {"timestep_spacing": spacing} for name, spacing in spacings.items()} | own}

    assert pipelines.spacing_warnings({"a": facts("leading", "linspace"), "b": facts("leading", "linspace")}) == []
    [sentence] = pipelines.spacing_warnings({"a": facts("leading", "linspace"), "b": facts("leading", "trailing")})
    assert sentence.startswith("euler spaces") and "(a linspace, b trailing)" in sentence


def test_warnings_reach_the_report(run, trained, caplog, tmp_path):
    path = trained("sdxl", {"rollout_time_ids": "image", "resolution": 24})
    (tmp_path / "prompts.txt").write_text("a red disc")
    run("--pipelines", f"one={path}", "--metrics", "clip", "sharpness", "--resolution", 16, "--num_images", 2,
        "--quality_prompts", tmp_path / "prompts.txt")  # fmt: skip
    for sentence in ("one was trained at 24 pixels a side, and draws 16 here.", "one is sampled under the real"):
        assert sentence in (tmp_path / "report" / "report.md").read_text() and sentence in caplog.text


def test_spacing_is_the_flags_else_the_pipelines(monkeypatch):
    seen = []
    monkeypatch.setattr(pipelines, "configure_sampler", lambda *key: seen.append(key))
    base = PNDMScheduler.from_config({"timestep_spacing": "trailing"})
    for flag in (None, "linspace"):
        pipelines.make_scheduler("ddim", base, flag)
    assert seen == [("ddim", base.config, None), ("ddim", base.config, "linspace")]
    assert pipelines.make_scheduler("own", base, None) is base


def test_spacing_by_flag(run, sd15_path, tmp_path):
    only = ("--pipelines", f"one={sd15_path}", "--metrics", "sharpness", "--num_images", 2)
    report = run(*only, "--timestep_spacing", "trailing")
    settings = tmp_path / "report" / report["runs"][0]["images"]["test"] / "settings.json"
    assert json.loads(settings.read_text())["scheduler"]["timestep_spacing"] == "trailing"
    assert report["settings"]["timestep_spacing"] == "trailing"
    with pytest.raises(evaluation.EvaluationError, match="scheduler {'timestep_spacing': 'trailing'}"):
        run(*only, "--timestep_spacing", "linspace")


# What is loaded and read


def test_each_pipeline_is_loaded_once(run, sd15_path, monkeypatch, tmp_path):
    loaded, original = [], UNet2DConditionModel.from_pretrained.__func__
    monkeypatch.setattr(
        UNet2DConditionModel,
        "from_pretrained",
        classmethod(lambda cls, *a, **k: loaded.append(a) or original(cls, *a, **k)),
    )
    only = (
        "--pipelines",
        f"one={sd15_path}",
        "--metrics",
        "sharpness",
        "--num_images",
        3,
        "--sampler",
        "ddim:1",
        "euler:1",
    )
    run(*only)
    assert len(loaded) == 1
    run(*only, "--guidance_scale", 7)  # all images are there
    assert len(loaded) == 1


def test_each_image_is_read_once_by_workers(pictures, options, clip_path):
    args = evaluation.parse_args(options("--batch_size", 3, "--num_bootstrap", 0))
    networks = {"dinov2": metrics.DINOv2Features(args).eval(), "clip": metrics.CLIPScore(args).eval()}
    chosen, read, prompts = ["fdd", "precision_recall", "clip", "sharpness"], [], ["a", "b"] * 5

    def load(index):
        read.append(index)
        return pictures[index]

    sets = [
        metrics.ImageSet(load, prompts, metrics.needed(chosen)),
        metrics.ImageSet(load, prompts[:4], ["sharpness"]),
    ]
    first = list(metrics.extract(sets, networks, args, ONE_PROCESS))
    assert read == [*range(10), *range(4)]
    assert [len(values) for values in first[0].values()] == [10] * 3 and first[1].keys() == {"sharpness"}
    args.dataloader_num_workers = 2
    second = list(metrics.extract(sets, networks, args, ONE_PROCESS))
    assert len(read) == 14  # these were read in other processes
    for one, two in zip(first, second, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)

    def refuse(index):
        raise evaluation.EvaluationError(f"image {index} is bad")

    with pytest.raises(evaluation.EvaluationError, match="^image 0 is bad$"):
        list(metrics.extract([metrics.ImageSet(refuse, prompts, ["sharpness"])], networks, args, ONE_PROCESS))


def test_few_step_flow_matching(run, sd3_path, tmp_path):
    """At the student's own levels, else evenly spaced; each image's noise is its own, in any batch."""
    shutil.copytree(sd3_path, tmp_path / "student")
    file = tmp_path / "student" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"stochastic_sampling": True}))
    [method] = pipelines.STUDENT_STEPS
    facts = {"method": method, "inference": {"sigmas": [1.0, 0.5]}, "training_options": {}}
    (tmp_path / "student" / "adt_config.json").write_text(json.dumps(facts))
    only = ("--pipelines", f"one={tmp_path / 'student'}", "--metrics", "sharpness", "--sampler", "own:3")
    directory = Path("images", "test", "one", "own-3-guidance-7")
    images = []
    for size in (1, 4):
        [found] = run(*only, "--batch_size", size)["runs"]
        assert found["student_sigmas"] == [1, 0.75, 0.5]
        shutil.move(tmp_path / "report", tmp_path / f"report-{size}")
        files = [tmp_path / f"report-{size}" / directory / f"{n:06d}.png" for n in range(10)]
        images.append(np.stack([np.array(Image.open(file)) for file in files]).astype(int))
    # A batch of another size rounds differently; other noise gives another image.
    assert np.abs(images[0] - images[1]).max() <= 1 and len(np.unique(images[0], axis=0)) == 10
    with pytest.raises(evaluation.EvaluationError, match="own:5: one was distilled into 4 steps"):
        run(*only, "--sampler", "own:5")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student")
    seen = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"][0].item()), with_kwargs=True
    )
    args = types.SimpleNamespace(seed=0, resolution=16)
    evaluation.draw(pipeline, ["a red disc"], {"steps": 2, "guidance_scale": 1}, lambda index: {}, args, [0])
    shift = pipeline.scheduler.config.shift
    assert seen == pytest.approx([1000, 1000 * shift * 0.5 / (1 + (shift - 1) * 0.5)])


def test_few_step_sigmas():
    [(add, most)] = pipelines.STUDENT_STEPS.items()
    args = types.SimpleNamespace(adversarial_weight=1, distillation_weight=1)
    assert (add, most) == (train_add.make_method(args).name, train_add.STUDENT_STEPS)
    assert [evaluation.few_step_sigmas(n, add) for n in range(1, 5)] == [student_schedule(n) for n in range(1, 5)]
    for method in (None, "consistency distillation"):
        assert evaluation.few_step_sigmas(3, method) == pytest.approx([1, 2 / 3, 1 / 3])


def test_adapters_are_sampled_by_what_they_were_trained_for(run, sd15_path, dataset_path, dinov2_path, tmp_path):
    """Of one to four steps, and not of more."""
    words = [
        "--family", "sd15", "--pretrained_model_name_or_path", sd15_path, "--train_data_dir", dataset_path,
        "--discriminator_model_name_or_path", dinov2_path, "--discriminator_layers", 1, "--resolution", 16,
        "--discriminator_resolution", 16, "--max_train_steps", 1, "--checkpointing_steps", 1, "--use_lora",
        "--dataloader_num_workers", 0, "--output_dir", tmp_path / "student",
    ]  # fmt: skip
    reset_accelerate()
    train_add.main(train_add.parse_args([str(word) for word in words]))
    only = ("--pipelines", f"one={sd15_path}", "--lora", f"one={tmp_path / 'student'}", "--metrics", "sharpness")
    report = run(*only, "--sampler", "own:2", "--guidance_scale", 0, "--checkpoints", f"run={tmp_path / 'student'}")
    folders = [tmp_path / "report" / found["images"]["test"] for found in report["runs"]]
    settings = [json.loads((folder / "settings.json").read_text()) for folder in folders]
    assert [found["scheduler"]["class"] for found in settings] == ["LCMScheduler"] * 2
    with pytest.raises(evaluation.EvaluationError, match="own:5: one was distilled into 4 steps"):
        run(*only, "--sampler", "own:5", "--guidance_scale", 0)
    (tmp_path / "student" / "adt_config.json").unlink()
    with pytest.raises(evaluation.EvaluationError, match="student has no result yet, with which the scheduler"):
        run("--checkpoints", f"run={tmp_path / 'student'}", "--sampler", "own:2")


def test_adapters(run, tune, sd15_path):
    output = tune("--use_lora")
    report = run(
        "--pipelines", f"base={sd15_path}", f"tuned={sd15_path}", "--lora", f"tuned={output}",
        "--metrics", "sharpness",
    )  # fmt: skip
    base, tuned = (result["metrics"]["sharpness"]["value"] for result in report["runs"])
    assert base != tuned


def test_stopped_evaluation_makes_each_missing_image_once(run, options, tmp_path, sd15_path, monkeypatch):
    only = ("--pipelines", f"one={sd15_path}", "--metrics", "sharpness", "--batch_size", 2)
    drawn = []
    original = evaluation.make_generator
    monkeypatch.setattr(evaluation, "make_generator", lambda *key: drawn.append(key[-1]) or original(*key))
    save = Image.Image.save

    def stop(self, path, *args, **kwargs):
        if len(drawn) >= 6 and "000005" in str(path):
            raise KeyboardInterrupt
        save(self, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run(*only)
    directory = tmp_path / "report" / "images" / "test" / "one" / "ddim-2-guidance-7"
    before = {file.name: file.read_bytes() for file in directory.glob("0*.png")}
    assert sorted(before) == [f"{index:06d}.png" for index in range(5)]
    drawn.clear()
    run(*only)
    assert drawn == [5, 6, 7, 8, 9]
    assert all((directory / name).read_bytes() == data for name, data in before.items())
    with pytest.raises(evaluation.EvaluationError, match=r"images of other settings: seed 0 \(now 1\)"):
        run(*only, "--seed", 1)


def test_other_weights_at_the_same_path_are_noticed(run, sd15_path, tmp_path):
    shutil.copytree(sd15_path, tmp_path / "model")
    only = ("--pipelines", f"one={tmp_path / 'model'}", "--metrics", "sharpness")
    first = run(*only)
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(file).items()}, file)
    with pytest.raises(evaluation.EvaluationError, match="images of other settings: weights "):
        run(*only)
    second = run(*only, "--output_dir", tmp_path / "other")
    second = json.loads((tmp_path / "other" / "report.json").read_text())
    assert evaluate_report.report_id(first) != evaluate_report.report_id(second)


def test_another_schedule_at_the_same_path_is_noticed(run, sd15_path, tmp_path):
    shutil.copytree(sd15_path, tmp_path / "model")
    only = ("--pipelines", f"one={tmp_path / 'model'}", "--metrics", "sharpness")
    run(*only)
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.02}))
    with pytest.raises(evaluation.EvaluationError, match=r"scheduler {'beta_end': 0.012} \(now {'beta_end': 0.02}\)"):
        run(*only)


def test_more_images_are_added_and_changed_prompts_noticed(run, sd15_path, tmp_path):
    only = ("--pipelines", f"one={sd15_path}", "--metrics", "sharpness")
    run(*only, "--num_images", 4)
    directory = tmp_path / "report" / "images" / "test" / "one" / "ddim-2-guidance-7"
    before = {file.name: file.stat().st_mtime_ns for file in directory.glob("0*.png")}
    assert run(*only)["runs"][0]["metrics"]["sharpness"]["n"] == 10
    assert len(before) == 4 and len(list(directory.glob("0*.png"))) == 10
    assert run(*only, "--num_images", 4)["runs"][0]["metrics"]["sharpness"]["n"] == 4
    assert all((directory / name).stat().st_mtime_ns == time for name, time in before.items())
    settings = json.loads((directory / "settings.json").read_text())
    assert len(settings["prompts"]) == 10
    settings["prompts"][2] = "another"
    (directory / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(evaluation.EvaluationError, match="prompt 2 'another' .now 'a blue stripes 2'"):
        run(*only)


def test_a_truncated_image_is_named(run, sd15_path, tmp_path):
    only = ("--pipelines", f"one={sd15_path}", "--metrics", "sharpness")
    run(*only)
    file = tmp_path / "report" / "images" / "test" / "one" / "ddim-2-guidance-7" / "000003.png"
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(evaluation.EvaluationError, match="000003.png does not decode: .* Delete it"):
        run(*only)
    file.unlink()
    run(*only)
    assert file.read_bytes() == data


def test_killed_evaluation_keeps_its_images(run, options, tmp_path, sd15_path):
    slow = ("--pipelines", f"one={sd15_path}", "--metrics", "sharpness", "--batch_size", 1, "--sampler", "ddim:50")
    process = subprocess.Popen(
        [sys.executable, evaluation.__file__, *options(*slow)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    directory = tmp_path / "report" / "images" / "test" / "one" / "ddim-50-guidance-7"
    while len(list(directory.glob("0*.png"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = {file.name: file.stat().st_mtime_ns for file in directory.glob("0*.png")}
    assert 2 <= len(before) < 10
    run(*slow, "--num_images", 6)
    after = {file.name: file.stat().st_mtime_ns for file in directory.glob("0*.png")}
    assert len(after) == max(6, len(before)) and before.items() <= after.items()


def test_two_processes_give_the_same_report(run, options, tmp_path):
    one = run("--batch_size", 3, "--vae_floor")
    shutil.move(tmp_path / "report", tmp_path / "one")
    printed = run_two_processes(evaluation.__file__, *options("--batch_size", 3, "--vae_floor"))
    assert re.search(r"Measuring: 100%.*\| 2/2 \[", printed)  # one's share of two runs and two floors
    two = json.loads((tmp_path / "report" / "report.json").read_text())
    for file in (tmp_path / "one" / "images").rglob("0*.png"):
        assert file.read_bytes() == (tmp_path / "report" / file.relative_to(tmp_path / "one")).read_bytes()
    assert len(one["floors"]) == 2
    for first, second in zip(one["runs"] + one["floors"], two["runs"] + two["floors"], strict=True):
        for name, values in first["metrics"].items():
            # Ten images leave the covariances singular: what a distance's rounding then is, the BLAS's threads decide.
            assert second["metrics"][name]["value"] == pytest.approx(values["value"], rel=1e-5, abs=1e-6), name
    assert two["win_rates"] == one["win_rates"]


# The floor of a VAE


@pytest.fixture
def reconstructed(monkeypatch):
    """The indices of the real images that went through a VAE, as a list that grows."""
    indices, original = [], evaluation.reconstruct
    monkeypatch.setattr(evaluation, "reconstruct", lambda *key: indices.extend(key[-1]) or original(*key))
    return indices


def by_hand(pipeline_path, pictures):
    """What the saved pipeline's VAE gives back of PIL images, one by one, with the scaling that latents have."""
    vae, images = AutoencoderKL.from_pretrained(pipeline_path, subfolder="vae"), []
    for picture in pictures:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
            decoded = vae.decode(latents / vae.config.scaling_factor).sample[0]
        values = ((decoded + 1) * 127.5).clamp(0, 255).round().permute(1, 2, 0)
        images.append(Image.fromarray(values.byte().numpy()))
    return images


def test_each_vae_has_one_floor(run, options, tmp_path, sd15_path, sdxl_path, pictures, reconstructed):
    shutil.copytree(sd15_path, tmp_path / "copy")
    file = tmp_path / "copy" / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 0.5}))
    pipelines = ("--pipelines", f"one={sd15_path}", f"other={sdxl_path}", f"copy={tmp_path / 'copy'}")
    report = run(*pipelines, "--sampler", "ddim:2", "dpmsolver++:2", "--num_images", 6, "--vae_floor")
    floors = report["floors"]
    assert [(floor["name"], floor["pipelines"]) for floor in floors] == [
        ("one (VAE floor)", ["one", "copy"]), ("other (VAE floor)", ["other"])
    ]  # fmt: skip
    assert reconstructed == [*range(6), *range(6)]  # not for each sampler, nor for the copy
    args = evaluation.parse_args(options())
    networks = {"dinov2": metrics.DINOv2Features(args).eval()}
    for floor, path in zip(floors, (sd15_path, sdxl_path), strict=True):
        expected = by_hand(path, pictures[:6])
        for index, image in enumerate(expected):
            with Image.open(tmp_path / "report" / floor["images"]["test"] / f"{index:06d}.png") as saved:
                difference = np.array(saved).astype(int) - np.array(image)
            assert np.abs(difference).max() <= 1 and np.abs(difference).mean() < 0.01  # but for rounding
        chosen = ["fdd", "precision_recall", "sharpness"]
        for name, result in measured(expected, pictures[:6], chosen, networks, args).items():
            assert floor["metrics"][name]["value"] == pytest.approx(result["value"], rel=1e-3), name
        assert len(floor["metrics"]["clip"]["scores"]) == 6
    values = {entry["metrics"]["fdd"]["value"] for entry in floors}
    assert len(values) == 2 and values.isdisjoint(entry["metrics"]["fdd"]["value"] for entry in report["runs"])
    assert {name for win in report["win_rates"] for name in (win["first"], win["second"])} == {"one", "other", "copy"}
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.count("| one (VAE floor) | – | – | – |") == 1


def test_a_floor_can_be_added_and_grow(run, tmp_path, sd15_path, test_set_path, reconstructed):
    shutil.copytree(Path(test_set_path).parent, tmp_path / "data")
    only = ("--pipelines", f"one={sd15_path}", "--metrics", "sharpness", "--dataset_name", tmp_path / "data")
    without = run(*only)
    assert without["floors"] == [] and not (tmp_path / "report" / "images" / "vae_floor").exists()
    drawn = {file: file.stat().st_mtime_ns for file in (tmp_path / "report" / "images").rglob("0*.png")}
    first = run(*only, "--vae_floor", "--num_images", 6)
    assert reconstructed == list(range(6))
    [floor] = first["floors"]
    directory = tmp_path / "report" / floor["images"]["test"]
    before = {file: file.stat().st_mtime_ns for file in directory.glob("0*.png")}
    (directory / "000003.png").unlink()  # as if the evaluation had been stopped
    report = run(*only, "--vae_floor")
    assert reconstructed == [*range(6), 3, 6, 7, 8, 9] and report["floors"][0]["metrics"]["sharpness"]["n"] == 10
    del before[directory / "000003.png"]
    assert all(file.stat().st_mtime_ns == time for file, time in (drawn | before).items())
    assert evaluate_report.report_id(report) == evaluate_report.report_id(without)
    settings = json.loads((directory / "settings.json").read_text())
    assert (settings["vae"], settings["resolution"], len(settings["originals"])) == (floor["vae"], 16, 10)
    # Another picture with the caption of the one before it.
    shutil.copy(tmp_path / "data" / "test" / "001.png", tmp_path / "data" / "test" / "002.png")
    with pytest.raises(evaluation.EvaluationError, match="images of other settings: original of image 2 '.*' .now '"):
        run(*only, "--vae_floor")


def test_a_floor_needs_real_images_and_an_autoencoder(run, sd15_path, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        evaluation.parse_args(["--pipelines", "a=b", "--quality_prompts", "c", "--metrics", "clip", "--vae_floor"])
    assert "--vae_floor takes real images: name --dataset_name." in capsys.readouterr().err
    for name in ("load_reference", "generate"):
        monkeypatch.setattr(evaluation, name, None)
    shutil.copytree(sd15_path, tmp_path / "other")
    file = tmp_path / "other" / "model_index.json"
    for vae in (["diffusers", "AutoencoderTiny"], [None, None]):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"vae": vae}))
        with pytest.raises(evaluation.EvaluationError, match="--vae_floor: the pipeline bad has no AutoencoderKL"):
            run("--pipelines", f"good={sd15_path}", f"bad={tmp_path / 'other'}", "--vae_floor")


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
    directory = tmp_path / "report" / "images" / "test" / "one" / "ddim-2-guidance-7"
    assert Image.open(directory / "000000.png").size == (8, 8)
    half = [result["metrics"]["sharpness"]["scores"] for result in report["runs"]]
    whole = run(
        *only, "--split", "valid", "--image_column", "picture", "--caption_column", "words", "--resolution", 8,
        "--output_dir", tmp_path / "whole",
    )  # fmt: skip
    whole = json.loads((tmp_path / "whole" / "report.json").read_text())
    whole = [result["metrics"]["sharpness"]["scores"] for result in whole["runs"]]
    assert half != whole and np.allclose(half, whole, rtol=0.2)  # the same images in bfloat16
    args = evaluation.parse_args(options("--split", "valid", "--image_column", "picture", "--caption_column", "words"))
    assert evaluation.load_reference(args)[1] == ["a red disc"] * 9 + [""]


def test_real_images_alone(options, pictures, tmp_path, clip_path, capsys):
    """The paper's Table A1, which needs no pipeline."""
    torch.save(torch.nn.Linear(24, 1).state_dict(), tmp_path / "aesthetic.pth")
    words = options(
        "--metrics", "aesthetic", "clip", "--aesthetic_weights", tmp_path / "aesthetic.pth",
        "--aesthetic_clip_model_name_or_path", clip_path,
    )[3:]  # fmt: skip
    for more, sentence in (
        ((), "--resolution: there is no pipeline to say it"),
        (("--metrics", "fdd"), "must name what"),
    ):
        with pytest.raises(SystemExit):
            evaluation.parse_args([*words, *more])
        assert sentence in capsys.readouterr().err
    args = evaluation.parse_args([*words, "--resolution", "16"])
    evaluation.main(args)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    real, captions = report["real_images"], evaluation.load_reference(args)[1]
    scorer = metrics.CLIPScore(args).eval()
    lengths = [len(scorer.tokenizer(caption).input_ids) - 2 for caption in captions]  # less the begin and the end
    assert (real["n"], real["caption_tokens"]) == (10, np.mean(lengths)) and len(set(lengths)) > 1
    with torch.no_grad():
        expected = scorer(torch.stack([scorer.prepare(picture) for picture in pictures]), captions)
    assert real["metrics"]["clip"]["scores"] == pytest.approx(expected.tolist(), rel=1e-4)
    assert real["metrics"].keys() == {"aesthetic", "clip"} and not (tmp_path / "report" / "images").exists()
    assert f"| test | 10 | {np.mean(lengths):.2f} |" in (tmp_path / "report" / "report.md").read_text()


# The metrics


def test_frechet_distance_against_scipy():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    other = 1.3 * torch.randn(150, 12, generator=generator, dtype=torch.float64) + 0.2
    expected = expected_frechet_distance(real.numpy(), other.numpy())
    assert frechet_distance(real, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(real[torch.randperm(200, generator=generator)], other) == pytest.approx(expected, rel=1e-9)
    # Of images that are drawn several times, more of them than features and fewer.
    distance = metrics.FrechetDistance(real, torch.device("cpu")).to(other)
    for count in (300, 9):
        indices = torch.randint(100, (count,), generator=generator)
        expected = expected_frechet_distance(real.numpy(), other[indices].numpy())
        assert distance(indices) == pytest.approx(expected, rel=1e-6)


def test_frechet_resamples_take_one_root(monkeypatch):
    """The real side's, once; each distance then has the eigenvalues of a symmetric matrix."""
    calls, originals = [], {name: getattr(torch.linalg, name) for name in ("eigh", "eigvalsh", "eigvals")}
    for name, original in originals.items():
        monkeypatch.setattr(
            torch.linalg, name, lambda *args, name=name, original=original: calls.append(name) or original(*args)
        )
    generator = torch.Generator().manual_seed(0)
    features = {"dinov2": torch.randn(40, 6, generator=generator)}
    reference = metrics.Reference({"dinov2": torch.randn(50, 6, generator=generator)}, ["fdd"], torch.device("cpu"))
    networks = {"dinov2": types.SimpleNamespace(record={})}
    args = types.SimpleNamespace(num_bootstrap=7, seed=0)
    metrics.measure(features, ["fdd"], reference, networks, args)
    assert calls == ["eigh"] + ["eigvalsh"] * 8


def test_precision_and_recall_by_hand():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    generated = torch.tensor([[0.5], [1.5], [5.0], [30.0]])
    # Real radii, k = 1: 1, 1, 1, 8; generated: 1, 1, 3.5, 25. Strictly nearer counts.
    found = metrics.precision_and_recall(real, generated, 1)
    assert found["precision"].tolist() == [1, 1, 1, 0] and found["recall"].tolist() == [1, 1, 1, 1]
    same = metrics.precision_and_recall(real, real, 1)
    assert same["precision"].tolist() == same["recall"].tolist() == [1] * 4


def test_precision_and_recall_are_prdcs(capsys):
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(120, 6, generator=generator, dtype=torch.float64)
    generated = 1.2 * torch.randn(90, 6, generator=generator, dtype=torch.float64) + 0.4
    found = metrics.precision_and_recall(real, generated, 3)
    expected = compute_prdc(real.float().numpy(), generated.float().numpy(), 3)
    for name, near in found.items():
        assert near.mean().item() == pytest.approx(expected[name], abs=1e-12)
        assert 0.2 < expected[name] < 0.98
    assert len(found["precision"]) == 90 and len(found["recall"]) == 120


def test_sharpness_is_opencvs(pictures):
    for picture in pictures:
        grey = np.array(picture.convert("L"))
        assert metrics.laplacian_variance(picture).item() == pytest.approx(
            cv2.Laplacian(grey, cv2.CV_64F).var(), rel=1e-12
        )


def test_blur_is_worse(pictures, options):
    args = evaluation.parse_args(options())
    dinov2 = metrics.DINOv2Features(args).eval()
    blurred = [picture.filter(ImageFilter.GaussianBlur(2)) for picture in pictures]
    same, worse = (
        measured(images, pictures, ["fdd", "sharpness"], {"dinov2": dinov2}, args) for images in (pictures, blurred)
    )
    assert same["fdd"]["value"] == pytest.approx(0, abs=1e-7) and worse["fdd"]["value"] > 1e-5
    assert worse["sharpness"]["value"] < 0.5 * same["sharpness"]["value"]


def test_the_order_of_images_does_not_matter(pictures, options):
    args = evaluation.parse_args(options("--num_bootstrap", 0))
    networks = {"dinov2": metrics.DINOv2Features(args).eval()}
    chosen = ["fdd", "precision_recall", "sharpness"]
    others = [picture.filter(ImageFilter.GaussianBlur(1)) for picture in pictures]
    first, second = (measured(images, pictures, chosen, networks, args) for images in (others, others[::-1]))
    assert first.keys() == {"fdd", "precision", "recall", "sharpness"}
    for name, result in first.items():
        assert second[name]["value"] == pytest.approx(result["value"], rel=1e-6, abs=1e-7), name


def normalised(pictures):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in metrics.CLIP)
    return torch.stack([(torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 - mean) / std for p in pictures])


def test_clip_score_is_the_models_logits(pictures, options, clip_path):
    scorer = metrics.CLIPScore(evaluation.parse_args(options())).eval()
    captions = [f"a red disc {n}" for n in range(len(pictures))]
    scores = scorer(torch.stack([scorer.prepare(picture) for picture in pictures]), captions)
    model = CLIPModel.from_pretrained(clip_path).eval()
    tokens = scorer.tokenizer(captions, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    inputs = normalised(pictures)
    logits = model(pixel_values=inputs, **tokens).logits_per_image / model.logit_scale.exp()
    assert torch.allclose(scores.float(), 100 * logits.diagonal(), atol=1e-4)


class Inception(torch.nn.Module):
    """Mean colours, behind the interface of the file that StyleGAN's authors share."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.float().mean(dim=(2, 3)) if return_features else images.float()


def expected_frechet_distance(first, second):
    covariances = [np.cov(values, rowvar=False) for values in (first, second)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)


def mean_colours(images):
    return np.array([np.array(image, dtype=np.float64).mean((0, 1)) for image in images])


def test_fid_on_given_weights(run, tmp_path, pictures, sd15_path):
    torch.jit.script(Inception()).save(tmp_path / "inception.pt")
    only = ("--pipelines", f"one={sd15_path}", "--metrics", "fid")
    report = run(*only, "--inception_weights", tmp_path / "inception.pt")
    result = report["runs"][0]["metrics"]["fid"]
    assert result["features"] == "inception.pt"
    images = [Image.open(tmp_path / "report" / "images" / "test" / "one" / "ddim-2-guidance-7" / f"{index:06d}.png")
              for index in range(10)]  # fmt: skip
    expected = expected_frechet_distance(mean_colours(pictures), mean_colours(images))
    assert result["value"] == pytest.approx(expected, rel=1e-6)


def test_fid_by_torch_fidelity(run, options, sd15_path, monkeypatch):
    """A stand-in for torch-fidelity, which cannot be imported beside a CPU build of PyTorch."""

    class FeatureExtractorInceptionV3(torch.nn.Module):
        def __init__(self, name, features):
            super().__init__()
            assert (name, features) == ("inception-v3-compat", ["2048"])

        def forward(self, images):
            assert images.dtype == torch.uint8
            return (images.float().mean(dim=(2, 3)),)

    package, module = types.ModuleType("torch_fidelity"), types.ModuleType("feature_extractor_inceptionv3")
    package.__spec__ = importlib.machinery.ModuleSpec("torch_fidelity", None)
    module.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
    only = ("--pipelines", f"one={sd15_path}", "--metrics", "fid")
    with pytest.raises(
        evaluation.EvaluationError, match="fid needs InceptionV3: install torch-fidelity, or name incep"
    ):
        run(*only)
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    result = run(*only)["runs"][0]["metrics"]["fid"]
    assert result["features"] == "InceptionV3 of torch-fidelity" and result["value"] > 1


class OpenCLIPTower(torch.nn.Module):
    """A transformer with OpenCLIP's names, layers and order of operations."""

    def __init__(self, width, layers, heads):
        super().__init__()
        self.resblocks = torch.nn.ModuleList()
        for _ in range(layers):
            block = torch.nn.Module()
            block.ln_1, block.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
            block.attn = torch.nn.MultiheadAttention(width, heads, batch_first=True)
            block.mlp = torch.nn.Sequential()
            block.mlp.add_module("c_fc", torch.nn.Linear(width, 2 * width))
            block.mlp.add_module("gelu", torch.nn.GELU())
            block.mlp.add_module("c_proj", torch.nn.Linear(2 * width, width))
            self.resblocks.append(block)

    def forward(self, x, mask=None):
        for block in self.resblocks:
            normed = block.ln_1(x)
            x = x + block.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
            x = x + block.mlp(block.ln_2(x))
        return x


class OpenCLIP(torch.nn.Module):
    """OpenCLIP's CLIP, written from its layout, as an independent computation of the score."""

    def __init__(self, vocabulary, width=32, heads=4, layers=2, size=16, patch=4, length=12, projection=24):
        super().__init__()
        normal = lambda *shape: torch.nn.Parameter(torch.randn(shape) * 0.2)  # noqa: E731
        self.visual = torch.nn.Module()
        self.visual.conv1 = torch.nn.Conv2d(3, width, patch, patch, bias=False)
        self.visual.class_embedding = normal(width)
        self.visual.positional_embedding = normal((size // patch) ** 2 + 1, width)
        self.visual.ln_pre, self.visual.ln_post = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.visual.transformer = OpenCLIPTower(width, layers, heads)
        self.visual.proj = normal(width, projection)
        self.token_embedding = torch.nn.Embedding(vocabulary, width)
        self.positional_embedding = normal(length, width)
        self.transformer = OpenCLIPTower(width, layers, heads)
        self.ln_final = torch.nn.LayerNorm(width)
        self.text_projection = normal(width, projection)
        self.logit_scale = torch.nn.Parameter(torch.tensor(4.0))

    def forward(self, images, tokens, ends):
        patches = self.visual.conv1(images).flatten(2).transpose(1, 2)
        first = self.visual.class_embedding.expand(len(images), 1, -1)
        x = self.visual.ln_pre(torch.cat([first, patches], 1) + self.visual.positional_embedding)
        image = self.visual.ln_post(self.visual.transformer(x)[:, 0]) @ self.visual.proj
        x = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((tokens.shape[1], tokens.shape[1]), -torch.inf).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        text = x[torch.arange(len(x)), ends] @ self.text_projection
        return torch.nn.functional.cosine_similarity(image, text)


def test_hps_is_open_clips_cosine(run, options, pictures, clip_path, sd15_path, tmp_path):
    torch.manual_seed(1)
    config = CLIPConfig.from_pretrained(clip_path)
    config.vision_config.hidden_act = config.text_config.hidden_act = "gelu"
    shutil.copytree(clip_path, tmp_path / "clip")
    config.save_pretrained(tmp_path / "clip")
    network = OpenCLIP(config.text_config.vocab_size).eval()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "HPS.pt")
    chosen = ("--hps_weights", tmp_path / "HPS.pt", "--hps_clip_model_name_or_path", tmp_path / "clip")
    scorer = metrics.HPSv2Score(evaluation.parse_args(options(*chosen))).eval()
    prompts = ["a red disc and more of them"[: 2 + 4 * n] for n in range(len(pictures))]
    tokens = scorer.tokenizer(prompts, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    ends = (tokens.input_ids == scorer.tokenizer.eos_token_id).int().argmax(1)
    assert len(set(ends.tolist())) > 2  # of various lengths, one cut
    with torch.no_grad():
        expected = 100 * network(normalised(pictures), tokens.input_ids, ends)
        scores = scorer(torch.stack([scorer.prepare(picture) for picture in pictures]), prompts)
    assert torch.allclose(scores.float(), expected, atol=1e-4) and expected.std() > 0.1
    result = run("--pipelines", f"one={sd15_path}", "--metrics", "hps", *chosen)["runs"][0]["metrics"]["hps"]
    assert result["features"] == "HPS.pt" and result["n"] == 10 and len(result["scores"]) == 10


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_aesthetic_score_is_linear_on_the_embedding(options, pictures, clip_path, tmp_path, kind):
    torch.manual_seed(2)
    if kind == "mlp":  # the layers of LAION's sac+logos+ava1-l14-linearMSE, with its dropout
        layers = torch.nn.Sequential(
            torch.nn.Linear(24, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 8), torch.nn.Dropout(0.1),
            torch.nn.Linear(8, 4), torch.nn.Linear(4, 1),
        ).eval()  # fmt: skip
        state = {f"layers.{name}": value for name, value in layers.state_dict().items()}
    else:
        layers = torch.nn.Linear(24, 1)
        state = layers.state_dict()
    torch.save(state, tmp_path / "aesthetic.pth")
    chosen = (
        "--aesthetic_weights", tmp_path / "aesthetic.pth", "--aesthetic_clip_model_name_or_path", clip_path
    )  # fmt: skip
    scorer = metrics.AestheticScore(evaluation.parse_args(options(*chosen))).eval()
    model = CLIPModel.from_pretrained(clip_path).eval()
    with torch.no_grad():
        output = model(pixel_values=normalised(pictures), input_ids=torch.ones(1, 12, dtype=torch.long))
        expected = layers(output.image_embeds)[:, 0]  # which are normalised
        scores = scorer(torch.stack([scorer.prepare(picture) for picture in pictures]), [""] * len(pictures))
    assert torch.allclose(scores.float(), expected, atol=1e-5) and expected.std() > 1e-4


def test_win_rate_and_bootstrap_by_hand(options):
    assert evaluate_report.win_rate([1, 2, 3, 4], [0, 2, 5, 1]) == 0.625  # two wins and a tie
    args = evaluation.parse_args(options("--num_bootstrap", 400))
    values = torch.tensor([0.0, 1.0]).repeat(50)
    low, high = metrics.bootstrap_interval(lambda indices: values[indices].mean().item(), 100, args)
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.03) and high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.03)
    assert metrics.bootstrap_interval(lambda indices: 1.0, 100, args) == [1, 1]
    different = lambda indices: len(set(indices.tolist())) / 100  # noqa: E731
    biased = metrics.bootstrap_interval(different, 100, args, value=1.0)
    assert biased[0] < 1.0 < biased[1]  # every resample has about 63 different ones, the set itself 100
    assert metrics.bootstrap_interval(None, 100, evaluation.parse_args(options("--num_bootstrap", 0))) is None


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
        (("--num_images", 0), "--num_images: must be greater than 0"),
        (("--num_gallery", -1), "--num_gallery: must not be negative"),
        (("--seed", -1), "--seed: must not be negative"),
        (("--resolution", 0), "--resolution: must be greater than 0"),
        (("--checkpoints", "run"), "takes NAME=PATH"),
        (("--checkpoints", "a@b=run"), "cannot be a folder's name"),
        (("--vae", "three=x"), "there is no pipeline or run three"),
        (("--sampler", "own:2", "--timestep_spacing", "trailing"), "--timestep_spacing is of the named samplers"),
        (("--guidance_rescale", 2), "--guidance_rescale: must lie in [0, 1]"),
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
        (("--dinov2_model_name_or_path", "nowhere"), "--dinov2_model_name_or_path nowhere is not a readable model"),
        (("--clip_model_name_or_path", "nowhere"), "--clip_model_name_or_path nowhere is not a readable model"),
        (
            ("--metrics", "fid", "--inception_weights", "nowhere.pt"),
            "nowhere.pt does not exist: .* inception-2015-12-05.pt from https://",
        ),
        (
            ("--metrics", "hps", "--hps_weights", "nowhere.pt"),
            "nowhere.pt does not exist: the file is HPS_v2_compressed.pt of https://huggingface.co/xswu/HPSv2",
        ),
        (
            ("--metrics", "aesthetic", "--aesthetic_weights", "nowhere.pth"),
            "nowhere.pth does not exist: the file is aesthetic-model.pth of https://huggingface.co/trl-lib",
        ),
        (("--lora", "two=nowhere"), "with the adapters nowhere cannot be loaded"),
        (("--resolution", 9), "--resolution 9 is not a multiple of"),
        (("--num_images", 1, "--metrics", "fdd"), "A Fréchet distance needs more than one image"),
        (("--metrics", "fid", "--inception_weights", __file__), "is not a readable TorchScript file"),
        (("--quality_prompts", "nowhere.txt"), "--quality_prompts nowhere.txt cannot be read"),
        (("--checkpoints", "a=nowhere"), "nowhere has no checkpoints of a training run"),
        (("--votes", "nowhere.json"), "nowhere.json"),
        (("--max_sequence_length", 16), "--max_sequence_length is given, which none of the pipelines takes"),
        (("--update_model_card", "nowhere"), "There is no model card nowhere"),
    ],
)
def test_bad_input_is_refused_before_generating(run, monkeypatch, more, sentence):
    monkeypatch.setattr(evaluation, "generate", None)
    with pytest.raises((evaluation.EvaluationError, evaluation.ReportError), match=sentence):
        run(*more)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ({"image": [], "text": []}, "The dataset is empty"),
        ({"image": [None], "text": [7]}, "--caption_column text has values that are no texts"),
    ],
)
def test_unusable_datasets_are_refused(run, monkeypatch, rows, sentence):
    monkeypatch.setattr(evaluation, "generate", None)
    dataset = evaluation.datasets.Dataset.from_dict(rows)
    monkeypatch.setattr(evaluation.datasets, "load_dataset", lambda *args, **kwargs: {"test": dataset})
    with pytest.raises(evaluation.EvaluationError, match=sentence):
        run()


def test_pipelines_that_cannot_be_loaded_are_refused_before_generating(run, sd15_path, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "generate", None)
    shutil.copytree(sd15_path, tmp_path / "broken")
    (tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(evaluation.EvaluationError, match="broken cannot be loaded: .*diffusion_pytorch_model"):
        run("--pipelines", f"good={sd15_path}", f"bad={tmp_path / 'broken'}")


def test_damaged_weights_are_found_without_loading_them(options, sd15_path, tmp_path):
    args = evaluation.parse_args(options())
    candidate = pipelines.Candidate("one", str(shutil.copytree(sd15_path, tmp_path / "model")))
    whole = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"

    def refused(match):
        with pytest.raises(evaluation.EvaluationError, match=f"model cannot be loaded: .*{match}"):
            pipelines.load_pipeline(candidate, args, "meta")

    unet = pipelines.load_pipeline(candidate, args, "meta").unet
    assert {value.device.type for value in unet.parameters()} == {"meta"}
    whole.write_bytes(whole.read_bytes()[:-10])
    refused("")
    whole.unlink()
    shutil.copy(Path(sd15_path, "unet", whole.name), tmp_path / whole.name)
    pickled = whole.with_suffix(".bin")
    torch.save(load_file(tmp_path / whole.name), pickled)
    pipelines.load_pipeline(candidate, args, "meta")
    pickled.write_bytes(pickled.read_bytes()[:-1000])
    refused("")
    pickled.unlink()
    UNet2DConditionModel.from_pretrained(sd15_path, subfolder="unet").save_pretrained(
        whole.parent, max_shard_size="500KB"
    )
    first, *others = sorted(whole.parent.glob("*-of-*.safetensors"))
    assert others
    pipelines.load_pipeline(candidate, args, "meta")
    first.unlink()
    refused(first.name)


def test_output_that_cannot_be_written_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "generate", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(evaluation.EvaluationError, match="--output_dir .*file cannot be written"):
        run("--output_dir", tmp_path / "file")


def test_corrupt_image_is_named(run, test_set_path, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "generate", None)
    shutil.copytree(Path(test_set_path).parent, tmp_path / "data")
    file = tmp_path / "data" / "test" / "003.png"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(evaluation.EvaluationError, match="Image 3 of the dataset .*003.png.* does not decode"):
        run("--dataset_name", tmp_path / "data")


def test_pipelines_that_are_not_text_to_image_are_refused(run, sd15_path, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "generate", None)
    shutil.copytree(sd15_path, tmp_path / "other")
    file = tmp_path / "other" / "model_index.json"
    index = file.read_text()
    for name in ("StableDiffusionImg2ImgPipeline", "StableDiffusionControlNetPipeline", "AudioLDMPipeline", "NoSuch"):
        file.write_text(index.replace('"StableDiffusionPipeline"', f'"{name}"'))
        with pytest.raises(evaluation.EvaluationError, match=f"is a {name}, which is not text-to-im"):
            run("--pipelines", f"a={tmp_path / 'other'}")


def test_flow_matching_has_its_own_scheduler_only(run, sd15_path, sd3_path, tmp_path, monkeypatch):
    report = run("--pipelines", f"sd3={sd3_path}", "--sampler", "own:2", "--metrics", "sharpness", "--num_images", 2)
    assert report["runs"][0]["metrics"]["sharpness"]["n"] == 2
    without = tiny.make_sd3(tmp_path / "without", t5=False)
    run("--pipelines", f"bare={without}", "--sampler", "own:2", "--metrics", "sharpness", "--num_images", 2)
    monkeypatch.setattr(evaluation, "generate", None)
    with pytest.raises(evaluation.EvaluationError, match="ddim does not suit a flow-matching model"):
        run("--pipelines", f"first={sd15_path}", f"other={sd3_path}", "--sampler", "ddim:2")


def test_weights_that_cannot_be_downloaded_are_named(run, monkeypatch, clip_path):
    monkeypatch.setattr(evaluation, "generate", None)
    monkeypatch.setattr(metrics, "hf_hub_download", lambda *args, **kwargs: open("/nowhere/at/all"))
    for metric, clip, sentence in (
        ("hps", "hps_clip", "HPS_v2_compressed.pt cannot be downloaded .* name it with --hps_weights"),
        (
            "aesthetic",
            "aesthetic_clip",
            "aesthetic-model.pth cannot be downloaded .* name it with --aesthetic_weights",
        ),
    ):
        with pytest.raises(evaluation.EvaluationError, match=sentence):
            run("--metrics", metric, f"--{clip}_model_name_or_path", clip_path)


def test_weights_that_do_not_fit_are_named(run, monkeypatch, clip_path, tmp_path):
    monkeypatch.setattr(evaluation, "generate", None)
    file = tmp_path / "weights.pt"
    for state, sentence in (
        ({"state_dict": {"visual.something": torch.ones(1)}}, "visual.something, which no OpenCLIP model has"),
        ({"state_dict": {"logit_scale": torch.ones(())}}, "weights.pt does not fit the named CLIP model"),
        (None, "weights.pt is not a readable file of weights"),
    ):
        torch.save(state, file) if state else file.write_bytes(b"no weights")
        with pytest.raises(evaluation.EvaluationError, match=sentence):
            run("--metrics", "hps", "--hps_weights", file, "--hps_clip_model_name_or_path", clip_path)
    torch.save(torch.nn.Linear(7, 1).state_dict(), file)
    with pytest.raises(evaluation.EvaluationError, match="weights.pt does not fit the named CLIP model"):
        run("--metrics", "aesthetic", "--aesthetic_weights", file, "--aesthetic_clip_model_name_or_path", clip_path)


def test_networks_without_weights_are_named(run, monkeypatch, clip_path, tmp_path):
    monkeypatch.setattr(evaluation, "generate", None)
    shutil.copytree(clip_path, tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()
    with pytest.raises(evaluation.EvaluationError, match="clip: its network cannot be loaded: .*safetensors"):
        run("--clip_model_name_or_path", tmp_path / "clip")


# Prompts of their own, checkpoints, votes and cards


def test_quality_prompts(run, options, tmp_path, sd15_path, clip_path, capsys):
    torch.save(torch.nn.Linear(24, 1).state_dict(), tmp_path / "aesthetic.pth")
    (tmp_path / "anime.json").write_text(json.dumps(["a blue disc", "a red disc"]))
    (tmp_path / "all.json").write_text(json.dumps({"photo": ["a green disc"]}))
    (tmp_path / "more.txt").write_text("a small disc\n\n a large disc \n")
    files = [tmp_path / name for name in ("anime.json", "all.json", "more.txt")]
    prompts = ["a blue disc", "a red disc", "a green disc", "a small disc", "a large disc"]
    assert evaluation.load_prompts(files) == prompts
    chosen = (
        "--pipelines", f"one={sd15_path}", "--quality_prompts", *files, "--metrics", "aesthetic", "clip", "sharpness",
        "--aesthetic_weights", tmp_path / "aesthetic.pth", "--aesthetic_clip_model_name_or_path", clip_path,
    )  # fmt: skip
    report = run(*chosen, "--vae_floor")
    found = {name: (values["prompts"], values["n"]) for name, values in report["runs"][0]["metrics"].items()}
    assert found == {"aesthetic": ("quality", 5), "clip": ("test", 10), "sharpness": ("test", 10)}
    assert report["floors"][0]["metrics"].keys() == {"clip", "sharpness"}  # there are no real images of the others
    with pytest.raises(evaluation.EvaluationError, match="--vae_floor: the metrics are all of --quality_prompts"):
        run(*chosen, "--vae_floor", "--metrics", "aesthetic")
    assert "real images" in report["runs"][0]["metrics"]["sharpness"]

    # Without a dataset they serve every metric that needs no real images.
    alone = [str(value) for value in options(*chosen)]
    position = alone.index("--dataset_name")
    del alone[position : position + 2]
    reset_accelerate()
    shutil.rmtree(tmp_path / "report")
    evaluation.main(evaluation.parse_args(alone))
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    found = {name: (values["prompts"], values["n"]) for name, values in report["runs"][0]["metrics"].items()}
    assert found == dict.fromkeys(("aesthetic", "clip", "sharpness"), ("quality", 5))
    assert not (tmp_path / "report" / "images" / "test").exists()
    with pytest.raises(SystemExit):
        evaluation.parse_args([*alone, "--metrics", "fdd"])
    assert "fdd compare with real images: name --dataset_name" in capsys.readouterr().err

    for content, sentence in (("[1]", "is not a list of prompts"), ("[", "cannot be read"), ("[]", "has no prompts")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(evaluation.EvaluationError, match=sentence):
            evaluation.load_prompts([tmp_path / "bad.json"])


@pytest.fixture
def tune(sd15_path, dataset_path, tmp_path):
    def tune(*more):
        import train_adt_sd15

        reset_accelerate()
        train_adt_sd15.main(
            train_adt_sd15.parse_args(
                ["--pretrained_model_name_or_path", sd15_path, "--train_data_dir", dataset_path, "--resolution", "16",
                 "--adversarial_loss_weight", "0", "--learning_rate", "1e-2", "--lr_warmup_steps", "0",
                 "--max_train_steps", "4", "--checkpointing_steps", "2", "--dataloader_num_workers", "0",
                 "--output_dir", str(tmp_path / "tuned"),
                 *more]
            )
        )  # fmt: skip
        return tmp_path / "tuned"

    return tune


def test_a_pipeline_of_the_hub(run, sd15_path, tmp_path):
    """As the Hub's cache keeps it once it is downloaded, which is all that can be had offline."""
    repository = tmp_path / "cache" / "models--somebody--tiny"
    shutil.copytree(sd15_path, repository / "snapshots" / "0123456789abcdef")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123456789abcdef")
    only = ("--metrics", "sharpness", "--num_images", 3)
    hub = run("--pipelines", "one=somebody/tiny", "--cache_dir", tmp_path / "cache", *only)
    shutil.move(tmp_path / "report", tmp_path / "hub")
    local = run("--pipelines", f"one={sd15_path}", *only)
    assert hub["pipelines"][0]["path"] == "somebody/tiny" and hub["pipelines"][0]["training"] is None
    scores = [report["runs"][0]["metrics"]["sharpness"]["scores"] for report in (hub, local)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    "more", [(), ("--use_ema", "--ema_decay", "0.5"), ("--use_lora",)], ids=["full", "ema", "lora"]
)
def test_a_runs_checkpoints(run, tune, tmp_path, sd15_path, more):
    output = tune(*more)
    lora = "--use_lora" in more
    final = f"base={sd15_path}", f"final={sd15_path if lora else output}"
    adapters = ("--lora", f"final={output}") if lora else ()
    only = ("--metrics", "sharpness", "--sampler", "ddim:2", "--num_images", 3)
    report = run("--pipelines", *final, *adapters, "--checkpoints", f"run={output}", *only, "--vae_floor")
    facts = [(entry["name"], entry["run"], entry["iteration"]) for entry in report["pipelines"]]
    assert facts == [("base", None, None), ("final", None, None), ("run@2", "run", 2), ("run@4", "run", 4)]
    assert report["pipelines"][1]["training"]["iterations"] == 4 and report["pipelines"][0]["training"] is None
    [floor] = report["floors"]  # training leaves the VAE as it is
    assert (floor["name"], floor["pipelines"]) == ("VAE floor", ["base", "final", "run@2", "run@4"])
    values = {result["pipeline"]: result["metrics"]["sharpness"]["scores"] for result in report["runs"]}
    assert values["run@4"] == values["final"]  # the averaged weights, where there are any
    assert values["run@2"] != values["final"] and values["run@2"] != values["base"]

    # A run that is not finished has no pipeline yet: its checkpoints go into the base.
    for file in ("model_index.json", "pytorch_lora_weights.safetensors"):
        (output / file).unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "report")
    again = run("--checkpoints", f"run={output}", *only)
    assert [entry["path"] for entry in again["pipelines"] if entry["run"]] == [sd15_path] * 2
    assert again["runs"][-1]["metrics"]["sharpness"]["scores"] == values["run@4"]


def test_card_gets_the_results_of_its_pipeline(run, tune, tmp_path, sd15_path):
    output = tune()
    only = ("--pipelines", f"base={sd15_path}", f"tuned={output}", "--metrics", "sharpness", "clip")
    report = run(*only, "--update_model_card", output)
    results = evaluate_report.ModelCard.load(output / "README.md").data.eval_results
    scores = {result.metric_type: result.metric_value for result in results}
    for name, value in scores.items():
        assert value == pytest.approx(report["runs"][1]["metrics"][name]["value"], rel=1e-3)
    assert "clip" in scores
    shutil.copy(output / "README.md", tmp_path / "card.md")
    with pytest.raises(evaluation.EvaluationError, match="card.md is in the folder of 0 of the pipelines"):
        run(*only, "--update_model_card", tmp_path / "card.md")
    with pytest.raises(evaluation.EvaluationError, match="README.md is in the folder of 2 of the pipelines"):
        run("--pipelines", f"a={output}", f"b={output}", "--update_model_card", output)
    # A checkpoint of the run lies in its folder, too, and is not what the card is of.
    report = run(*only, "--checkpoints", f"run={output}", "--update_model_card", output)
    assert [entry["name"] for entry in report["pipelines"]] == ["base", "tuned", "run@2", "run@4"]
    results = evaluate_report.ModelCard.load(output / "README.md").data.eval_results
    assert {result.metric_type: result.metric_value for result in results} == scores
    (tmp_path / "broken.md").write_text("---\na: [\n---\n")
    with pytest.raises(evaluation.ReportError, match="metadata of the model card .*broken.md cannot be read"):
        run(*only, "--update_model_card", f"base={tmp_path / 'broken.md'}")
    run(*only, "--update_model_card", f"base={tmp_path / 'card.md'}")
    results = evaluate_report.ModelCard.load(tmp_path / "card.md").data.eval_results
    values = {result.metric_type: result.metric_value for result in results}
    assert values["clip"] == pytest.approx(report["runs"][0]["metrics"]["clip"]["value"], rel=1e-3)


def test_votes_are_counted(run, tmp_path, sd15_path, sdxl_path):
    report = run("--metrics", "sharpness")
    votes = [
        {"set": "test", "index": index, "prompt": "", "sampler": "ddim", "steps": 2, "guidance_scale": 7.0,
         "left": "two", "right": "one", "choice": choice}
        for index, choice in enumerate(["right", "right", "left", "tie"])
    ]  # fmt: skip
    data = {"format": "adt-votes/1", "report": evaluate_report.report_id(report), "voter": "a", "votes": votes}
    (tmp_path / "votes.json").write_text(json.dumps(data))
    (row,) = run("--metrics", "sharpness", "--votes", tmp_path / "votes.json")["human_preference"]
    assert (row["first"], row["second"], row["n"], row["share"]) == ("one", "two", 4, 0.625)
    assert "Human preference" in (tmp_path / "report" / "report.md").read_text()


def test_gallery_size(run, tmp_path, sd15_path):
    sizes = []
    for count in (0, 2, 6):
        run("--pipelines", f"one={sd15_path}", "--metrics", "sharpness", "--num_gallery", count)
        sizes.append((tmp_path / "report" / "report.html").read_text().count("data:image/png"))
    assert sizes[1] - sizes[0] == 2 * 2 and sizes[2] - sizes[0] == 2 * 6  # each prompt: the image and the real one

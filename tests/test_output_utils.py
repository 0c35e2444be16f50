"""Checkpoints and resuming, the result and its card, trackers and the Hub, in runs of the SD1.5 script."""

import types
from pathlib import Path

import pytest
import tiny
import torch
from conftest import FAMILIES
from helpers import equal, read_network, read_scalars
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

import output_utils
from output_utils import ADAPTERS, KOHYA_ADAPTERS, list_checkpoints
from training_utils import ADTError


@pytest.fixture
def family():
    return FAMILIES["sd15"]


# Checkpoints and resuming


def test_resuming_a_finished_run_ends_cleanly(run):
    output = run("--checkpointing_steps", 4, "--validation_prompts", "a red disc")
    before = read_network(output)
    again = run("--checkpointing_steps", 4, "--validation_prompts", "a red disc", "--resume_from_checkpoint", "latest")
    assert equal(before, read_network(again))


def test_latest_without_checkpoints_starts_anew(run):
    output = run("--resume_from_checkpoint", "latest")
    assert set(read_scalars(output)["discriminator_loss"]) == {1, 2, 3, 4}


def test_checkpoints_total_limit_keeps_the_newest(run):
    output = run("--checkpointing_steps", 1, "--checkpoints_total_limit", 2)
    assert {path.name for path in output.iterdir() if "checkpoint" in path.name} == {"checkpoint-3", "checkpoint-4"}
    output = run(
        "--checkpointing_steps", 1, "--checkpoints_total_limit", 3, "--max_train_steps", 6,
        "--resume_from_checkpoint", "checkpoint-4",
    )  # fmt: skip
    names = {path.name for path in output.iterdir() if "checkpoint" in path.name}
    assert names == {"checkpoint-4", "checkpoint-5", "checkpoint-6"}


def test_checkpoints_total_limit_never_deletes_the_one_just_written(run):
    output = run("--checkpointing_steps", 2)
    (output / "checkpoint-4" / "optimizer.bin").write_bytes(b"")
    run(
        "--checkpointing_steps", 1, "--max_train_steps", 3, "--resume_from_checkpoint", "checkpoint-2",
        "--checkpoints_total_limit", 1,
    )  # fmt: skip
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-3"]


def test_options_that_are_ignored_do_not_hinder_resuming(run):
    run("--checkpointing_steps", 4)
    run("--resume_from_checkpoint", "latest", "--rank", 2, "--lora_dropout", 0.5)
    plain = ("--adversarial_loss_weight", 0, "--checkpointing_steps", 4)
    run(*plain, output_dir="plain")
    more = ("--discriminator_learning_rate", 1e-2, "--num_gradient_steps", 1, "--augmentation_policy")
    run(*plain, "--resume_from_checkpoint", "latest", *more, output_dir="plain")


def test_checkpoint_of_another_configuration(run, request):
    run("--checkpointing_steps", 4)
    request.getfixturevalue("no_weights")  # from here on
    with pytest.raises(ADTError, match=r"guidance_scale 7.0 \(now 3.0\), sampler ddim \(now euler\)"):
        run("--resume_from_checkpoint", "latest", "--sampler", "euler", "--guidance_scale", 3)
    with pytest.raises(ADTError, match=r"global_batch_size 2 \(now 4\)"):
        run("--resume_from_checkpoint", "latest", "--gradient_accumulation_steps", 2)
    with pytest.raises(ADTError, match="past --max_train_steps"):
        run("--resume_from_checkpoint", "latest", "--max_train_steps", 3)


def test_decay_of_the_learning_rate_has_one_length(run):
    run("--checkpointing_steps", 2, "--max_train_steps", 2, "--lr_scheduler", "cosine")
    with pytest.raises(ADTError, match=r"max_train_steps 2 \(now 4\)"):
        run("--lr_scheduler", "cosine", "--resume_from_checkpoint", "latest")


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "optimizer.bin", "adt_checkpoint.json"])
def test_truncated_checkpoint_is_named_and_the_previous_one_offered(run, name):
    output = run("--checkpointing_steps", 2)
    file = output / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ADTError, match=f"{Path(name).name}.*truncated|truncated: {name}") as error:
        run("--resume_from_checkpoint", "latest", "--max_train_steps", 6)
    assert "Try --resume_from_checkpoint checkpoint-2" in str(error.value)
    run("--resume_from_checkpoint", "checkpoint-2", "--max_train_steps", 6, "--checkpointing_steps", 2)
    assert (output / "checkpoint-6").is_dir()


def test_a_folder_that_is_no_checkpoint(run, tmp_path):
    with pytest.raises(ADTError, match="is not a checkpoint of this script"):
        run("--resume_from_checkpoint", tmp_path)


def test_half_written_checkpoint_is_not_seen(run, tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(OSError):
            run("--checkpointing_steps", 2)
    assert list_checkpoints(tmp_path / "out") == []
    run("--checkpointing_steps", 2, "--resume_from_checkpoint", "latest")
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-2", "checkpoint-4"]
    assert not list((tmp_path / "out").glob(".checkpoint*"))


# The result, its card, trackers and the Hub


def test_other_vae_is_used_and_saved(run, tmp_path, sd15_path):
    vae = tiny.make_vae()
    vae.save_pretrained(tmp_path / "vae")
    output = run("--pretrained_vae_model_name_or_path", tmp_path / "vae")
    file = "diffusion_pytorch_model.safetensors"
    assert equal(load_file(output / "vae" / file), load_file(tmp_path / "vae" / file))
    assert not equal(load_file(output / "vae" / file), load_file(Path(sd15_path, "vae", file)))


def test_card_names_the_size_where_it_is_not_the_models_own(run):
    assert "height=8, width=8" in (run("--resolution", 8, "--discriminator_resolution", 8) / "README.md").read_text()


def test_card_says_what_was_done(run):
    def card(*more):
        return (run(*more) / "README.md").read_text()

    assert "siamese discriminator" in card() and "projected discriminator" in card("--discriminator_type", "projected")
    plain = card("--adversarial_loss_weight", 0)
    assert "by plain fine-tuning" in plain and "training has not sampled" in plain and "DINOv2" not in plain


def test_card_is_written_anew(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("an old card")
    assert "an old card" not in (run() / "README.md").read_text()


@pytest.mark.parametrize(
    "more",
    [(), ("--use_lora", "--output_kohya_format"), ("--use_lora", "--fuse_lora")],
    ids=["full", "lora", "fused"],
)
def test_push_to_hub_sends_the_result_and_nothing_else(run, monkeypatch, tmp_path, more):
    calls = {}

    def create_repo(**kwargs):
        calls["create"] = kwargs
        assert not (tmp_path / "out" / "unet").exists()  # before the training, so that a wrong token fails early
        return types.SimpleNamespace(repo_id="me/tuned-as-the-hub-has-it")

    monkeypatch.setattr(output_utils, "create_repo", create_repo)
    monkeypatch.setattr(output_utils, "upload_folder", lambda **kwargs: calls.update(upload=kwargs))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("of mine")
    output = run(
        "--push_to_hub", "--hub_model_id", "me/tuned", "--hub_token", "hf_secret", "--checkpointing_steps", 2,
        "--validation_prompts", "a red disc", *more,
    )  # fmt: skip
    assert calls["create"] == {"repo_id": "me/tuned", "exist_ok": True, "token": "hf_secret"}
    upload = calls["upload"]
    assert upload["repo_id"] == "me/tuned-as-the-hub-has-it" and upload["token"] == "hf_secret"
    files = [str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()]
    assert any("tfevents" in file for file in files) and any("checkpoint-2" in file for file in files)
    sent = set(filter_repo_objects(files, allow_patterns=upload["allow_patterns"]))
    own = {"README.md", "adt_config.json", "images/prompt-0.png", "scheduler/scheduler_config.json"}
    kohya, pipeline = "--output_kohya_format" in more, {"model_index.json", "unet/config.json", "vae/config.json"}
    assert own <= sent and (ADAPTERS in sent) == ("--use_lora" in more)
    assert sent == own | {ADAPTERS, KOHYA_ADAPTERS} if kohya else pipeline <= sent
    unwanted = ("checkpoint", "tfevents", "validation", "notes")
    assert not [file for file in sent if any(word in file for word in unwanted)]
    card = (output / "README.md").read_text()
    assert '("me/tuned-as-the-hub-has-it"' in card and str(tmp_path) not in card
    for file in output.rglob("*"):
        if file.is_file():
            assert b"hf_secret" not in file.read_bytes(), file


def test_trackers(run):
    output = run("--report_to", "none", output_dir="none")
    assert not (output / "logs").exists()
    output = run("--logging_dir", "events", "--tracker_project_name", "mine")
    assert set(read_scalars(output, "events")["discriminator_loss"]) == {1, 2, 3, 4}

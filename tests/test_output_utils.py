"""Checkpoints and resuming, the result and its card, trackers and the Hub, in runs of the SD1.5 script."""

import json
import os
import resource
import shutil
import signal
import types
from pathlib import Path

import pytest
import tiny
from conftest import FAMILIES
from helpers import equal, handled, read_network, read_scalars
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

import disk_utils
import output_utils
import train_adt_sd15 as train
from config_utils import CONFIG
from output_utils import (
    ADAPTERS,
    KOHYA_ADAPTERS,
    Interruption,
    Validation,
    identify_model,
    list_checkpoints,
)
from training_utils import STOPPED, ADTError


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
    output = run("--checkpointing_steps", 1, output_dir="three")
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    output = run("--checkpointing_steps", 1, "--checkpoints_total_limit", 0, output_dir="all")
    assert len(list_checkpoints(output)) == 4


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


@pytest.fixture
def full_disk(monkeypatch):
    """Has a function of a module write under a limit of so many bytes a file, as on a disk that is full after them."""

    def limit(module, name, size, condition=lambda *args: True):
        original = getattr(module, name)

        def limited(*args):
            if not condition(*args):
                return original(*args)
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            try:
                return original(*args)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

        monkeypatch.setattr(module, name, limited)

    return limit


# The network fits in the second, its optimizer's states do not.
@pytest.mark.parametrize(("size", "what"), [(100_000, "I/O error"), (4_000_000, "inline_container")])
def test_full_disk_during_a_checkpoint(run, tmp_path, full_disk, size, what):
    output, more = tmp_path / "out", ("--checkpointing_steps", 2, "--report_to", "none")
    full_disk(train, "save_checkpoint", size, lambda iteration, run: iteration == 4)
    with pytest.raises(ADTError, match="checkpoint-4 could not be written, with .* GB free") as error:
        run(*more)
    assert what in str(error.value) and "checkpoint-2 is whole: --resume_from_checkpoint latest" in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in output.iterdir() if "checkpoint" in path.name] == ["checkpoint-2"]
    run(*more, "--max_train_steps", 3, "--resume_from_checkpoint", "latest")


def test_full_disk_at_the_end(run, full_disk):
    full_disk(output_utils, "save_result", 100_000)
    with pytest.raises(ADTError, match="is not whole: it could not be written, .* checkpoint-4 is whole"):
        run("--checkpointing_steps", 4, "--report_to", "none")


@pytest.mark.parametrize("name", ["write_images", "log_validation"], ids=["base", "tuned"])
def test_full_disk_during_a_validation(run, full_disk, name):
    """The base's images, and those of a checkpoint that has been written."""
    full_disk(output_utils, name, 50)
    with pytest.raises(
        ADTError, match="validation images could not be written, with .* GB free: .*too large"
    ) as error:
        run("--validation_prompts", "a red disc", "--checkpointing_steps", 2, "--validation_steps", 2,
            "--report_to", "none")  # fmt: skip
    left = "There is no other." if name == "write_images" else "checkpoint-2 is whole: --resume_from_checkpoint latest"
    assert left in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def spaces(monkeypatch):
    """What runs think that they will take, in a list."""
    found, original = [], disk_utils.find_space
    monkeypatch.setattr(disk_utils, "find_space", lambda *args: found.append(original(*args)) or found[-1])
    return found


LORA = ("--use_lora", "--rank", 4)


@pytest.mark.parametrize(
    "more",
    [("--use_ema",), LORA, (*LORA, "--fuse_lora", "--output_kohya_format"), ("--optimizer", "adafactor")],
    ids=["ema", "lora", "fused", "adafactor"],
)
def test_what_a_run_will_take(run, spaces, monkeypatch, tmp_path, more):
    coming, original = [], train.tune

    def tune(sampler, noise_scheduler, run):
        coming.append(disk_utils.bytes_to_come(tmp_path / "cache", run))
        original(sampler, noise_scheduler, run)

    monkeypatch.setattr(train, "tune", tune)
    output = run(*more, "--checkpointing_steps", 4, "--report_to", "none")
    checkpoint = output / "checkpoint-4"
    files = [file for file in output.rglob("*.safetensors") if not file.is_relative_to(checkpoint)]
    written = sum(value.nbytes for file in files for value in load_file(file).values())
    [estimate, space] = spaces
    sizes = {file: file.stat().st_size for file in checkpoint.rglob("*.*") if file.is_file()}
    assert space.num_checkpoints == 1 and space.checkpoint == pytest.approx(sum(sizes.values()), rel=0.1)
    assert space.result == pytest.approx(written, rel=0.01)
    # Before a weight is loaded, all but the discriminator.
    assert estimate.result == space.result and coming == [estimate.total]
    of_discriminator = sizes[checkpoint / "discriminator.safetensors"] + sizes[checkpoint / "optimizer_1.bin"]
    assert space.checkpoint - estimate.checkpoint == pytest.approx(of_discriminator, rel=0.1)


def test_disk_that_is_too_small(run, monkeypatch, tmp_path, caplog):
    """Three are kept and a fourth is written before the first goes."""
    monkeypatch.setattr(disk_utils, "checkpoint_bytes", lambda *args: 30e9)
    monkeypatch.setattr(disk_utils, "result_bytes", lambda *args: 0)
    monkeypatch.setattr(disk_utils, "free_gb", lambda directory: 100.0)
    drawn = []
    monkeypatch.setattr(Validation, "draw", lambda self: drawn.append(1))
    more = ("--checkpointing_steps", 1, "--max_train_steps", 6)
    sentence = "take 30 GB each, 120 GB more at once, the result 0 GB, and 100 GB are free in .*/out: choose another"
    with pytest.raises(ADTError, match=sentence):
        run(*more, "--validation_prompts", "a red disc")
    assert not drawn and list_checkpoints(tmp_path / "out") == []
    run(*more, "--checkpoints_total_limit", 2)
    run("--checkpointing_steps", 2)  # two in all, beside the two that are there
    run(*more, "--checkpoints_total_limit", 0, output_dir="all")
    assert "180 GB more at once, the result 0 GB, and 100 GB are free" in caplog.text
    assert "not all of them fit" in caplog.text
    monkeypatch.setattr(disk_utils, "free_gb", lambda directory: 20.0)
    with pytest.raises(ADTError, match="20 GB are free"):
        run(*more, "--checkpoints_total_limit", 0, output_dir="none")
    # The result counts, unless it is written over one that is there.
    monkeypatch.setattr(disk_utils, "free_gb", lambda directory: 100.0)
    monkeypatch.setattr(disk_utils, "result_bytes", lambda *args: 20e9)
    three = ("--checkpointing_steps", 1, "--checkpoints_total_limit", 2, "--max_train_steps", 6)
    with pytest.raises(ADTError, match="90 GB more at once, the result 20 GB, and 100 GB are free"):
        run(*three, output_dir="full")
    run(*three, output_dir="all")


# What a run is recognised by


def test_data_and_models_may_move(run, request, tmp_path, sd15_path, dataset_path, monkeypatch):
    for path, name in ((sd15_path, "base"), (dataset_path, "data")):
        shutil.copytree(path, tmp_path / name)
    moved = ("--pretrained_model_name_or_path", tmp_path / "base", "--train_data_dir", tmp_path / "data")
    resume = ("--checkpointing_steps", 2, "--resume_from_checkpoint", "latest")
    run(*resume, "--max_train_steps", 2)
    output = run(*resume, *moved)
    assert equal(read_network(output), read_network(run(output_dir="straight")))

    request.getfixturevalue("no_weights")  # from here on
    weights = tmp_path / "base" / "vae" / "diffusion_pytorch_model.safetensors"
    metadata = (tmp_path / "data" / "metadata.jsonl").read_text()
    content = weights.read_bytes()
    weights.write_bytes(content[:-4096] + bytes(4096))  # others of the same size
    with pytest.raises(ADTError, match="another configuration: pretrained_model_name_or_path a folder with the conte"):
        run(*resume, *moved)
    weights.write_bytes(content)
    (tmp_path / "data" / "metadata.jsonl").write_text(metadata.replace("a red", "one red"))
    with pytest.raises(ADTError, match="checkpoint-4 was made with other data: other captions"):
        run(*resume, *moved)
    (tmp_path / "data" / "metadata.jsonl").write_text(metadata)
    for name in ("000.png", "002.png", "003.png"):  # fewer might have been mended
        shutil.copy(tmp_path / "data" / "001.png", tmp_path / "data" / name)
    with pytest.raises(ADTError, match="other data: image files of other names or sizes"):
        run(*resume, *moved)
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(metadata.splitlines()[1:]))
    with pytest.raises(ADTError, match=r"other data: 8 images \(now 7\)"):
        run(*resume, *moved)


def test_what_a_killed_process_left_of_a_checkpoint_is_removed(run, tmp_path):
    left = tmp_path / "out" / ".checkpoint-1-partial"
    left.mkdir(parents=True)
    (run("--checkpointing_steps", 2, "--max_train_steps", 2) / "checkpoint-2" / "adt_checkpoint.json").read_text()
    assert not left.exists()


def test_a_signal_at_the_end_says_so(capfd):
    accelerator = types.SimpleNamespace(is_local_main_process=True)
    interruption = Interruption(types.SimpleNamespace(max_train_time=None), accelerator)
    interruption.at_end = True
    interruption.receive(signal.SIGTERM, None)
    assert "The run is at its end." in capfd.readouterr().err


def test_a_model_is_its_files(tmp_path, sd15_path, dinov2_path):
    assert identify_model("facebook/dinov2-small") == "facebook/dinov2-small"
    for path in (sd15_path, dinov2_path):
        shutil.copytree(path, tmp_path / Path(path).name)
        assert identify_model(path) == identify_model(str(tmp_path / Path(path).name))
    assert identify_model(sd15_path) != identify_model(dinov2_path)
    base = tmp_path / Path(sd15_path).name
    (base / "checkpoint-2").mkdir()  # of a run whose result it is
    (base / "README.md").write_text("a card")
    assert identify_model(sd15_path) == identify_model(str(base))
    config = base / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.013"))
    assert identify_model(sd15_path) != identify_model(str(base))


def test_other_noise_levels_are_refused(run, request):
    """As another version of diffusers may make them of the same options."""
    output = run("--checkpointing_steps", 4)
    request.getfixturevalue("no_weights")  # from here on
    file = output / "checkpoint-4" / "adt_checkpoint.json"
    manifest = json.loads(file.read_text())
    assert manifest["schedule"] == {"scheduler": "DDIMScheduler", "timesteps": [751, 501, 251, 1]}
    file.write_text(json.dumps(manifest | {"schedule": {"timesteps": [999, 501, 251, 1]}}))
    with pytest.raises(ADTError, match=r"timesteps began with 999, 501, 251 \(now 751, 501, 251\)"):
        run("--resume_from_checkpoint", "latest")
    del manifest["data"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(ADTError, match="checkpoint-4 is an older version's"):
        run("--resume_from_checkpoint", "latest")


# Stopping before the end


def options_of_time(hours=None):
    return types.SimpleNamespace(max_train_time=hours)


ALONE = types.SimpleNamespace(num_processes=1, is_local_main_process=True)


@pytest.mark.parametrize("number", Interruption.SIGNALS)
def test_signal_stops_the_run(number, capfd):
    with handled(number):
        interruption = Interruption(options_of_time(), ALONE)
        with interruption:
            assert not interruption.is_due(1) and interruption.stopped_after is None
            signal.raise_signal(number)
            signal.raise_signal(number)  # a launcher's, of the same
            assert interruption.is_due(2) and interruption.stopped_after == 2
        assert signal.getsignal(number) == signal.SIG_DFL
    assert capfd.readouterr().err.count("A second signal stops at once") == 1


@pytest.mark.parametrize("number", Interruption.SIGNALS)
def test_second_signal_stops_at_once(number):
    child = os.fork()
    if child == 0:
        interruption = Interruption(options_of_time(), ALONE)
        with handled(number), interruption:
            signal.raise_signal(number)
            interruption.received -= interruption.ONE_SIGNAL
            signal.raise_signal(number)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == number


def test_an_ignored_signal_stays_so():
    with handled(signal.SIGINT, signal.SIG_IGN), Interruption(options_of_time(), ALONE) as interruption:
        signal.raise_signal(signal.SIGINT)
        assert not interruption.is_due(1)


def test_max_train_time(run, tmp_path):
    interruption = Interruption(options_of_time(0.5), ALONE)
    assert not interruption.is_due(1)
    interruption.started -= 1799
    assert not interruption.is_due(2)
    interruption.started -= 2
    assert interruption.is_due(3)
    with pytest.raises(SystemExit) as stop:
        run("--max_train_time", 1e-9)
    assert stop.value.code == STOPPED
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-1"]
    output = run("--resume_from_checkpoint", "latest")
    assert equal(read_network(output), read_network(run(output_dir="straight")))


def test_stop_in_the_last_iteration(run, tmp_path):
    """There is a checkpoint and no result, which resuming makes."""
    with pytest.raises(SystemExit):
        run("--max_train_time", 1e-9, "--max_train_steps", 1)
    assert not (tmp_path / "out" / "model_index.json").exists()
    assert (run("--max_train_steps", 1, "--resume_from_checkpoint", "latest") / "model_index.json").exists()


# Validation


def test_base_images_are_kept(run, monkeypatch):
    draws = []
    draw = Validation.draw
    monkeypatch.setattr(Validation, "draw", lambda self: draws.append(1) or draw(self))

    def count(*more, **where):
        draws.clear()
        output = run(
            "--num_validation_images", 1, "--validation_steps", 2, "--checkpointing_steps", 2,
            "--validation_prompts", *more, **where,
        )  # fmt: skip
        return output, len(draws)

    prompts, resume = ("a red disc", "a blue square"), ("--resume_from_checkpoint", "latest")
    full, drawn = count(*prompts, output_dir="full")
    assert drawn == 3  # the base's, after 2 and at the end
    count(*prompts, "--max_train_steps", 2)
    output, drawn = count(*prompts, *resume)
    assert drawn == 1
    assert read_scalars(full) == read_scalars(output)  # the share of the likeness that is kept among them
    for n in range(2):
        name = f"iteration-000004-prompt-{n}.png"
        assert (full / "validation" / name).read_bytes() == (output / "validation" / name).read_bytes()
    assert count("a red disc", "a blue disc", *resume)[1] == 2  # of other prompts
    (output / "validation" / "base" / "prompt-1-0.png").unlink()
    assert count("a red disc", "a blue disc", *resume)[1] == 2
    assert count("a red disc", "a blue disc", *resume)[1] == 1


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


def test_facts_have_the_samplers_timesteps(run):
    output = run()
    facts = json.loads((output / "adt_config.json").read_text())["inference"]
    assert facts["timesteps"] == [751, 501, 251, 1] and "sigmas" not in facts
    assert "751" not in (output / "README.md").read_text()


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
    monkeypatch.setattr(output_utils, "auth_check", lambda repo_id, **kwargs: calls.update(check=(repo_id, kwargs)))
    monkeypatch.setattr(output_utils, "upload_folder", lambda **kwargs: calls.update(upload=kwargs))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("of mine")
    output = run(
        "--push_to_hub", "--hub_model_id", "me/tuned", "--hub_token", "hf_secret", "--checkpointing_steps", 2,
        "--validation_prompts", "a red disc", *more,
    )  # fmt: skip
    assert calls["create"] == {"repo_id": "me/tuned", "exist_ok": True, "token": "hf_secret"}
    assert calls["check"] == ("me/tuned-as-the-hub-has-it", {"token": "hf_secret", "write": True})
    upload = calls["upload"]
    assert upload["repo_id"] == "me/tuned-as-the-hub-has-it" and upload["token"] == "hf_secret"
    files = [str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()]
    assert any("tfevents" in file for file in files) and any("checkpoint-2" in file for file in files)
    sent = set(filter_repo_objects(files, allow_patterns=upload["allow_patterns"]))
    own = {"README.md", "adt_config.json", CONFIG, "images/prompt-0.png", "scheduler/scheduler_config.json"}
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

"""Runs that push to a stand-in for the Hub, what comes back from there, and where the token goes."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES
from helpers import read_scalars
from hub_server import HubServer
from huggingface_hub import HfApi, constants

import output_utils
from config_utils import CONFIG
from output_utils import ADAPTERS, KOHYA_ADAPTERS
from training_utils import ADTError


ROOT = Path(__file__).resolve().parent.parent
TOKEN = "hf_ThisIsTheSecret"
PULL = """
import sys
import torch
from diffusers import DiffusionPipeline


def draw(path, adapters=None, weight_name=None):
    pipeline = DiffusionPipeline.from_pretrained(path, safety_checker=None)
    if adapters is not None:
        pipeline.load_lora_weights(adapters, weight_name=weight_name)
    noise = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipeline("a red disc", num_inference_steps=2, generator=noise, output_type="np").images)


base, outputs, kohya, result = sys.argv[1:]
images = {
    "base": draw(base),
    "full": draw("you/full"),
    "full here": draw(f"{outputs}/full"),
    "lora": draw(base, "you/lora"),
    "lora here": draw(base, f"{outputs}/lora"),
    "kohya": draw(base, "you/lora", kohya),
}
torch.save(images, result)
"""


@pytest.fixture
def family():
    return FAMILIES["sd15"]


def environment(hub, home):
    """A process's that has the stand-in for the Hub, and nothing in its cache."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return own | {
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


@pytest.fixture
def pushed(family, options, tmp_path):
    """A full run's and an adapters' at once, each a process, pushed to one stand-in."""
    more = {"full": (), "lora": ("--use_lora", "--rank", 4, "--lora_alpha", 8, "--output_kohya_format")}
    with HubServer(TOKEN) as hub:
        processes = {
            name: subprocess.Popen(
                [sys.executable, ROOT / "train_adt_sd15.py",
                 *options("--max_train_steps", 2, "--checkpointing_steps", 1, "--learning_rate", 1e-2,
                          "--validation_prompts", "a red disc", "--num_validation_images", 1, *own,
                          "--push_to_hub", "--hub_model_id", f"you/{name}", "--hub_token", f" {TOKEN}\r",
                          output_dir=name)],
                env=environment(hub, tmp_path / "home"), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for name, own in more.items()
        }  # fmt: skip
        printed = {name: process.communicate(timeout=600)[0] for name, process in processes.items()}
        for name, process in processes.items():
            assert process.returncode == 0, printed[name]
        yield types.SimpleNamespace(hub=hub, printed=printed, outputs=tmp_path)


def test_pushed_results_come_back_and_the_token_stays(pushed, sd15_path, tmp_path):
    hub = pushed.hub
    # What is there is what the runs wrote, less checkpoints, logs and validations.
    for name, files in hub.files.items():
        assert all(content == (tmp_path / name.split("/")[1] / path).read_bytes() for path, content in files.items())
    card = {"README.md", "adt_config.json", CONFIG, "images/prompt-0.png", "scheduler/scheduler_config.json"}
    assert hub.files["you/lora"].keys() == card | {ADAPTERS, KOHYA_ADAPTERS}
    weights = {f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")}
    assert hub.files["you/full"].keys() > card | weights | {"model_index.json", "text_encoder/model.safetensors"}
    assert not any("checkpoint-" in path or "tfevents" in path for path in hub.files["you/full"])

    # Pulled into a fresh cache, without a token, it draws what it draws here.
    num_pushed = len(hub.requests)
    subprocess.run(
        [sys.executable, "-c", PULL, sd15_path, tmp_path, KOHYA_ADAPTERS, tmp_path / "images.pt"],
        env=environment(hub, tmp_path / "fresh"), check=True,
    )  # fmt: skip
    images = torch.load(tmp_path / "images.pt")
    assert torch.equal(images["full"], images["full here"]) and torch.equal(images["lora"], images["lora here"])
    assert torch.allclose(images["kohya"], images["lora"], atol=1e-5)
    assert all((images[name] - images["base"]).abs().max() > 1e-3 for name in ("full", "lora"))
    assert len(hub.requests) > num_pushed and not any("authorization" in r.headers for r in hub.requests[num_pushed:])

    # The token is in authorization headers and nowhere else.
    assert sum(request.headers.get("authorization") == f"Bearer {TOKEN}" for request in hub.requests) >= 10
    for request in hub.requests:
        others = {name: value for name, value in request.headers.items() if name != "authorization"}
        assert TOKEN not in f"{request.path} {others}" and TOKEN.encode() not in request.body
    assert not any(TOKEN in text for text in pushed.printed.values())
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 50 and not [file for file in written if TOKEN.encode() in file.read_bytes()]


# What the Hub refuses


@pytest.fixture
def ask(monkeypatch):
    """A function that has this process's pushes go to a stand-in."""

    def ask(hub):
        api = HfApi(endpoint=hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(output_utils, "create_repo", api.create_repo)
        monkeypatch.setattr(output_utils, "auth_check", api.auth_check)
        monkeypatch.setattr(output_utils, "upload_folder", api.upload_folder)

    return ask


PUSH = ("--push_to_hub", "--hub_model_id", "you/tuned", "--hub_token", TOKEN)


def test_wrong_token_is_told_before_the_training(run, ask, no_weights, tmp_path):
    with HubServer("hf_another") as hub:
        ask(hub)
        with pytest.raises(ADTError, match="--push_to_hub: you/tuned cannot be made on the Hub: .*401") as error:
            run(*PUSH)
    assert "\n" not in str(error.value) and TOKEN not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_token_that_may_only_read_is_told_before_the_training(run, ask, no_weights, tmp_path, exists):
    """`create_repo` lets it pass where the repository is there."""
    with HubServer("hf_another", reading_token=TOKEN) as hub:
        hub.files |= {"you/tuned": {}} if exists else {}
        ask(hub)
        what = "written with this token" if exists else "made on the Hub"
        with pytest.raises(ADTError, match=f"--push_to_hub: you/tuned cannot be {what}: .*403") as error:
            run(*PUSH)
    assert "\n" not in str(error.value) and TOKEN not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_no_connection_is_told_before_the_training(run, no_weights):
    with pytest.raises(ADTError, match="--push_to_hub: you/tuned cannot be made on the Hub: .*offline"):
        run(*PUSH)


@pytest.mark.parametrize("refused", ["/commit/", "^/objects/"], ids=["commit", "file"])
def test_refused_upload_loses_nothing(run, ask, tmp_path, refused):
    output = tmp_path / "out"
    with HubServer(TOKEN, refused) as hub:
        ask(hub)
        with pytest.raises(ADTError, match=f"saved in {output}, but it could not be uploaded; .*403") as error:
            run(*PUSH, "--use_lora", "--max_train_steps", 2)
    command = f"hf upload you/tuned {output} . --include README.md --include adt_config.json --include {CONFIG}"
    command += f" --include {ADAPTERS}"
    assert command in str(error.value) and "\n" not in str(error.value) and TOKEN not in str(error.value)
    assert (output / ADAPTERS).is_file() and (output / "README.md").is_file()
    assert set(read_scalars(output)["discriminator_loss"]) == {1, 2}
    assert hub.files == {"you/tuned": {}}

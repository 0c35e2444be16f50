import os


os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local; a name that is not fails at once

from dataclasses import dataclass  # noqa: E402
from types import ModuleType  # noqa: E402
from typing import Callable  # noqa: E402

import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from accelerate.logging import MultiProcessAdapter  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: E402
from transformers import CLIPTextModel, Dinov2Model  # noqa: E402

import train_adt_sd3  # noqa: E402
import train_adt_sd15  # noqa: E402
import train_adt_sdxl  # noqa: E402


# The models are so small that threads wait for each other longer than they compute.
torch.set_num_threads(1)


@dataclass
class Family:
    """A model family: its script, and what makes a tiny pipeline of its real classes, whose images are 16x16."""

    name: str
    train: ModuleType
    make: Callable
    network: str  # the trained component
    options: tuple = ()


FAMILIES = {
    "sd15": Family("sd15", train_adt_sd15, tiny.make_sd15, "unet"),
    "sdxl": Family("sdxl", train_adt_sdxl, tiny.make_sdxl, "unet"),
    "sd3": Family("sd3", train_adt_sd3, tiny.make_sd3, "transformer", ("--max_sequence_length", "16")),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="session")
def base_paths(tmp_path_factory):
    return {name: family.make(tmp_path_factory.mktemp(name)) for name, family in FAMILIES.items()}


@pytest.fixture
def base_path(base_paths, family):
    """The family's tiny pipeline, saved."""
    return base_paths[family.name]


@pytest.fixture(scope="session")
def sd15_path(base_paths):
    return base_paths["sd15"]


@pytest.fixture(scope="session")
def sdxl_path(base_paths):
    return base_paths["sdxl"]


@pytest.fixture(scope="session")
def sd3_path(base_paths):
    return base_paths["sd3"]


@pytest.fixture(scope="session")
def dinov2_path(tmp_path_factory):
    """A tiny DINOv2, saved: four blocks, patches of 4."""
    return tiny.make_dinov2(tmp_path_factory.mktemp("dinov2"))


@pytest.fixture(scope="session")
def clip_path(tmp_path_factory):
    """A tiny CLIP with its tokenizer, saved."""
    return tiny.make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def resnet_path(tmp_path_factory):
    """A tiny ResNet with a classifier, saved as the published ones are."""
    return tiny.make_resnet(tmp_path_factory.mktemp("resnet"))


@pytest.fixture(scope="session")
def dataset_path(tmp_path_factory):
    """An imagefolder of 8 captioned images of various sizes."""
    return tiny.make_imagefolder(tmp_path_factory.mktemp("dataset"))


@pytest.fixture
def no_weights(monkeypatch):
    """Fails a test in which a model's weights are loaded."""

    def load(*args, **kwargs):
        raise AssertionError("loaded a model before the input was checked")

    for cls in (CLIPTextModel, AutoencoderKL, UNet2DConditionModel, Dinov2Model):
        monkeypatch.setattr(cls, "from_pretrained", load)


def reset_accelerate():
    """Accelerate keeps its state for the life of a process: start each run as a new process would."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    MultiProcessAdapter.warning_once.cache_clear()


@pytest.fixture(autouse=True)
def fresh_process():
    reset_accelerate()


def short_run_options(family, base_path, dinov2_path, dataset_path, output_dir, *more):
    """Options of a short run in which both networks visibly move; later ones override earlier ones."""
    return [
        "--pretrained_model_name_or_path", base_path, "--train_data_dir", dataset_path,
        "--discriminator_model_name_or_path", dinov2_path, "--discriminator_layers", "-1", "1", "3",
        "--discriminator_resolution", "16", "--resolution", "16", "--train_batch_size", "2",
        "--max_train_steps", "4", "--generator_update_interval", "2", "--num_inference_steps", "4",
        "--num_gradient_steps", "2", "--learning_rate", "1e-3", "--discriminator_learning_rate", "1e-3",
        "--lr_warmup_steps", "0", "--discriminator_lr_warmup_steps", "0", "--checkpointing_steps", "100",
        "--guidance_scale", "7", "--dataloader_num_workers", "0", *family.options,
        "--output_dir", str(output_dir), *map(str, more),
    ]  # fmt: skip


@pytest.fixture
def options(family, base_path, dinov2_path, dataset_path, tmp_path):
    """`short_run_options` of the family; `output_dir` is a name."""

    def make(*more, output_dir="out"):
        return short_run_options(family, base_path, dinov2_path, dataset_path, tmp_path / output_dir, *more)

    return make


@pytest.fixture
def run(options, family, tmp_path):
    def run(*more, output_dir="out"):
        reset_accelerate()
        family.train.main(family.train.parse_args(options(*more, output_dir=output_dir)))
        return tmp_path / output_dir

    return run

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local; a name that is not fails at once

import pytest  # noqa: E402
import tiny  # noqa: E402
import torch


# The models are so small that threads wait for each other longer than they compute.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sd15_path(tmp_path_factory):
    """A tiny SD1.5 pipeline, saved; its images are 16x16."""
    return tiny.make_sd15(tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="session")
def dinov2_path(tmp_path_factory):
    """A tiny DINOv2, saved: four blocks, patches of 4."""
    return tiny.make_dinov2(tmp_path_factory.mktemp("dinov2"))


@pytest.fixture(scope="session")
def dataset_path(tmp_path_factory):
    """An imagefolder of 8 captioned images of various sizes."""
    return tiny.make_imagefolder(tmp_path_factory.mktemp("dataset"))

"""Seeded draws, loading and checking data sets, images and captions and their order; runs are the SD1.5 script's."""

import logging
import os
import shutil
import signal
import types
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator
from conftest import FAMILIES
from PIL import Image

import data_utils
from data_utils import (
    GlobalBatchSampler,
    ImageCaptionDataset,
    check_dataset,
    identify_data,
    leave_signals_alone,
    load_image_caption_dataset,
    make_generator,
    open_image,
)
from train_adt_sd15 import parse_args
from training_utils import ADTError


@pytest.fixture
def family():
    return FAMILIES["sd15"]


# Seeded draws


def test_start_index_is_uniform_and_depends_on_the_iteration_alone():
    draws = [
        torch.randint(50, (1,), generator=make_generator(0, "path", iteration)).item() for iteration in range(2000)
    ]
    counts = torch.bincount(torch.tensor(draws), minlength=50)
    assert counts.min() > 15 and counts.max() < 75  # 40 expected


def test_generators_differ_in_every_part_of_their_key():
    keys = [(0, "noise", 0, 0), (1, "noise", 0, 0), (0, "posterior", 0, 0), (0, "noise", 1, 0), (0, "noise", 0, 1)]
    draws = [torch.randn(4, generator=make_generator(*key)) for key in keys]
    assert torch.equal(draws[0], torch.randn(4, generator=make_generator(*keys[0])))
    assert all(not torch.equal(a, b) for n, a in enumerate(draws) for b in draws[:n])


# The data set


def test_data_are_recognised_by_their_content(tmp_path, dataset_path):
    """In a folder or embedded in a table, and without reading the images."""
    args = types.SimpleNamespace(image_column="image", caption_column="text")
    folder = datasets.load_dataset("imagefolder", data_dir=dataset_path, split="train")
    folder = folder.cast_column("image", datasets.Image(decode=False))
    shutil.copytree(dataset_path, tmp_path / "elsewhere")
    moved = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "elsewhere"), split="train")
    moved = moved.cast_column("image", datasets.Image(decode=False))
    found = identify_data(folder, args)
    assert found["images"] == 8 and identify_data(moved, args) == found
    folder.save_to_disk(tmp_path / "embedded")
    embedded = datasets.load_from_disk(tmp_path / "embedded")
    assert embedded[0]["image"]["bytes"] is not None
    # Such a table keeps the files' names; what it has of them is as long as they are.
    assert identify_data(embedded, args) == found
    assert identify_data(moved.select([1, 0, *range(2, 8)]).flatten_indices(), args)["files"] != found["files"]
    captions = [row["text"] for row in folder]
    other = folder.remove_columns("text").add_column("text", [[caption] for caption in captions])
    assert identify_data(other, args)["captions"] != found["captions"]


def test_workers_live_on_when_all_processes_are_signalled():
    """But for their own process's SIGTERM, without which Python would wait for them when it ends."""
    loader = torch.utils.data.DataLoader(range(9), num_workers=1, worker_init_fn=leave_signals_alone)
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers
    for number in (signal.SIGINT, signal.SIGTERM):
        other = os.fork()  # another process's signal, as a launcher's
        if other == 0:
            os.kill(worker.pid, number)
            os._exit(0)
        os.waitpid(other, 0)
    assert len(list(batches)) == 8
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0


def test_dataset_name_and_columns(run, tmp_path, dataset_path):
    folder = datasets.load_dataset("imagefolder", data_dir=dataset_path, split="train")
    renamed = folder.rename_columns({"image": "picture", "text": "words"})
    (tmp_path / "parquet").mkdir()
    renamed.to_parquet(tmp_path / "parquet" / "train.parquet")
    arguments = ["--image_column", "picture", "--caption_column", "words"]
    args = parse_args(
        ["--pretrained_model_name_or_path", "x", "--dataset_name", str(tmp_path / "parquet"), *arguments]
    )
    loaded = load_image_caption_dataset(args)
    assert len(loaded) == 8 and open_image(loaded[0]["picture"]).mode == "RGB"
    assert loaded["words"][:] == renamed["words"][:]


def test_dataset_config_name(monkeypatch, tmp_path):
    def load_dataset(path, name, cache_dir):
        raise LookupError(f"{path} {name} {cache_dir}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    args = parse_args(["--pretrained_model_name_or_path", "x", "--dataset_name", "a/b", "--dataset_config_name", "c"])
    with pytest.raises(ADTError, match="The dataset a/b cannot be read: a/b c None"):
        load_image_caption_dataset(args)


@pytest.mark.parametrize("metadata", [None, "", '{"file_name": "000.png", "text": "cut'])
def test_dataset_that_cannot_be_read(run, no_weights, dataset_path, tmp_path, metadata):
    """An empty folder; an empty and a damaged `metadata.jsonl`."""
    (tmp_path / "data").mkdir()
    if metadata is not None:
        shutil.copy(Path(dataset_path, "000.png"), tmp_path / "data")
        (tmp_path / "data" / "metadata.jsonl").write_text(metadata)
    with pytest.raises(ADTError, match="The dataset .*data cannot be read: ."):
        run("--train_data_dir", tmp_path / "data")


def test_corrupt_image_is_named(run, no_weights, dataset_path, tmp_path):
    shutil.copytree(dataset_path, tmp_path / "data")
    file = tmp_path / "data" / "003.png"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ADTError, match=r"image 3 of the dataset \(.*003.png\) does not decode"):
        run("--train_data_dir", tmp_path / "data")


@pytest.mark.parametrize("first_iteration", [0, 2, 3, 4])
def test_every_image_that_a_resumed_run_uses_is_checked(options, monkeypatch, first_iteration):
    """A run that is taken up within an epoch, of 8 images in batches of 2, uses its rest and the next ones."""
    args = parse_args(options("--max_train_steps", first_iteration + 6))
    used = {index for batch in GlobalBatchSampler(8, args, first_iteration=first_iteration) for index, _, _ in batch}
    checked = []
    monkeypatch.setattr(data_utils, "check_dataset", lambda dataset, indices, args: checked.extend(indices) or 0)
    data_utils.check_used_images(range(8), first_iteration, args, Accelerator(cpu=True))
    assert set(checked) == used and len(checked) == len(used)


def test_empty_captions_are_counted_and_trained_on(run, dataset_path, tmp_path, caplog):
    shutil.copytree(dataset_path, tmp_path / "data")
    metadata = tmp_path / "data" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("a red square 0", "").replace("a green disc 1", "  "))
    with caplog.at_level(logging.WARNING):
        run("--train_data_dir", tmp_path / "data")
    assert any("2 captions are empty" in message for message in caplog.messages)


def test_several_captions_to_an_image(dataset_path, tmp_path, options):
    rows = datasets.load_dataset("imagefolder", data_dir=dataset_path, split="train")
    rows = rows.remove_columns("text").add_column("text", [["one", "two"]] * 7 + [[]])
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    args = parse_args(
        ["--pretrained_model_name_or_path", "x", "--dataset_name", str(tmp_path / "data"), "--resolution", "16"]
    )
    dataset = load_image_caption_dataset(args)
    assert check_dataset(dataset, range(8), args) == 1
    items = ImageCaptionDataset(dataset, args)
    assert {items[0, iteration, 0]["caption"] for iteration in range(20)} == {"one", "two"}
    assert items[7, 0, 0]["caption"] == ""


def test_caption_that_is_no_text(dataset_path, tmp_path):
    rows = datasets.load_dataset("imagefolder", data_dir=dataset_path, split="train")
    rows = rows.remove_columns("text").add_column("text", list(range(8)))
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    args = parse_args(["--pretrained_model_name_or_path", "x", "--dataset_name", str(tmp_path / "data")])
    with pytest.raises(ADTError, match="neither text nor a list of texts"):
        check_dataset(load_image_caption_dataset(args), range(8), args)


# Images and their order


def test_images_are_resized_cropped_and_flipped(dataset_path, options):
    def item(*more, key=(1, 0, 0)):
        args = parse_args(options(*more))
        return ImageCaptionDataset(load_image_caption_dataset(args), args)[key]

    first = item("--center_crop", "--resolution", 20)
    image = Image.open(Path(dataset_path, "001.png")).convert("RGB")  # 25 x 20: 2 columns off, on the left
    expected = torch.tensor(list(image.crop((2, 0, 22, 20)).tobytes())).view(20, 20, 3).permute(2, 0, 1)
    assert torch.allclose(first["pixel_values"], expected / 127.5 - 1, atol=1e-6)
    assert first["caption"] == "a green disc 1"
    flips = [item("--center_crop", "--random_flip", key=(1, n, 0))["pixel_values"] for n in range(40)]
    plain = item("--center_crop")["pixel_values"]
    mirrored = sum(torch.equal(flip, plain.flip(2)) for flip in flips)
    assert sum(torch.equal(flip, plain) for flip in flips) == 40 - mirrored and 10 < mirrored < 30
    crops = {item(key=(1, n, 0))["pixel_values"].sum().item() for n in range(40)}
    assert len(crops) == 5  # 25 x 20 becomes 20 x 16: 5 places for the crop


@pytest.mark.parametrize("shape", [(1, 4, 1), (2, 2, 1), (1, 2, 2), (4, 1, 1)])
def test_global_batches_do_not_depend_on_how_they_are_shared_out(shape):
    processes, batch_size, micro = shape
    args = types.SimpleNamespace(
        train_batch_size=batch_size, gradient_accumulation_steps=micro, max_train_steps=5, seed=3
    )
    seen = {iteration: [] for iteration in range(5)}
    for process in range(processes):
        batches = list(GlobalBatchSampler(6, args, processes, process))
        assert len(batches) == len(GlobalBatchSampler(6, args, processes, process))
        for batch in batches:
            for index, iteration, position in batch:
                seen[iteration].append((position, index))
    flat = [index for iteration in range(5) for _, index in sorted(seen[iteration])]
    reference = types.SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=1, max_train_steps=5, seed=3)
    assert flat == [index for batch in GlobalBatchSampler(6, reference) for index, _, _ in batch]
    assert sorted(flat[:6]) == sorted(flat[6:12]) == list(range(6))  # each epoch sees every image once
    assert flat[:6] != flat[6:12]
    resumed = GlobalBatchSampler(6, reference, first_iteration=3)
    assert list(resumed) == list(GlobalBatchSampler(6, reference))[3:]

"""Seeded draws, loading and checking data sets, images and captions and their order; runs are the SD1.5 script's."""

import json
import logging
import os
import pickle
import shutil
import subprocess
import types
from pathlib import Path

import datasets
import psutil
import pytest
import torch
from accelerate import Accelerator
from conftest import FAMILIES
from helpers import equal, read_network, read_scalars
from PIL import Image

import data_utils
from data_utils import (
    GlobalBatchSampler,
    ImageCaptionDataset,
    check_used_images,
    count_empty_captions,
    identify_data,
    load_image_caption_dataset,
    make_dataloader,
    make_generator,
    normalize_pixels,
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
    swapped = identify_data(moved.select([1, 0, *range(2, 8)]).flatten_indices(), args)
    assert swapped["names"] != found["names"]
    assert [old != new for old, new in zip(found["sizes"], swapped["sizes"], strict=True)] == [True] * 2 + [False] * 6
    captions = [row["text"] for row in folder]
    other = folder.remove_columns("text").add_column("text", [[caption] for caption in captions])
    assert identify_data(other, args)["captions"] != found["captions"]


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
    def load_dataset(path, name, cache_dir, streaming):
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


def copy_data(dataset_path, directory, damaged=()):
    """A copy of the images; those of the indices `damaged` are cut off."""
    shutil.copytree(dataset_path, directory)
    for index in damaged:
        file = directory / f"{index:03d}.png"
        file.write_bytes(file.read_bytes()[:-200])
    return directory


@pytest.fixture
def decoded(monkeypatch):
    """The indices of the images that are decoded, in a list."""
    indices, original = [], data_utils.read_image

    def read_image(row, index, args):
        indices.append(index)
        return original(row, index, args)

    monkeypatch.setattr(data_utils, "read_image", read_image)
    return indices


@pytest.fixture
def check(options):
    """`check_used_images` for a run with more options."""

    def check(*more, first_iteration=0):
        args = parse_args(options(*more))
        check_used_images(load_image_caption_dataset(args), first_iteration, args, Accelerator(cpu=True))

    return check


def test_corrupt_image_is_named(run, no_weights, dataset_path, tmp_path):
    data = copy_data(dataset_path, tmp_path / "data", [3])
    with pytest.raises(ADTError, match=r"image 3 of the dataset \(.*003.png\) does not decode"):
        run("--train_data_dir", data)


@pytest.mark.parametrize("first_iteration", [0, 2, 3, 4, 10])
def test_every_image_that_a_resumed_run_uses_is_checked(options, check, decoded, tmp_path, first_iteration):
    """A run that is taken up within an epoch, of 8 images in batches of 2, uses its rest and the next ones."""
    more = ("--max_train_steps", 10 if first_iteration == 10 else first_iteration + 6, "--cache_dir", tmp_path)
    args = parse_args(options(*more))
    used = {index for batch in GlobalBatchSampler(8, args, first_iteration=first_iteration) for index, _, _ in batch}
    check("--check_images", "all", *more, first_iteration=first_iteration)
    assert used <= set(decoded)


def test_check_images(check, decoded, dataset_path, tmp_path, monkeypatch, caplog):
    """A sample of another seed or start is another; all are decoded once, and again when a file is another."""
    monkeypatch.setattr(data_utils, "SAMPLE_SIZE", 3)
    more = ("--train_data_dir", copy_data(dataset_path, tmp_path / "data"), "--cache_dir", tmp_path / "cache")

    def decode(*choice, first_iteration=0):
        decoded.clear()
        check(*more, *choice, first_iteration=first_iteration)
        return sorted(decoded)

    samples = [decode(), decode(), decode("--seed", 1), decode(first_iteration=1)]
    assert samples[0] == samples[1] and len({tuple(sample) for sample in samples}) > 1
    assert all(len(sample) == 3 for sample in samples)
    assert decode("--check_images", "none") == []
    assert decode("--check_images", "all") == list(range(8)) and decode("--check_images", "all") == []
    assert decode("--check_images", "all", first_iteration=1) == []  # of a resumed run
    os.utime(tmp_path / "data" / "005.png", (1, 1))
    assert decode("--check_images", "all") == list(range(8))
    copy_data(dataset_path, tmp_path / "other", [2])
    bad = ("--check_images", "all", "--train_data_dir", tmp_path / "other")
    for _ in range(2):  # what is bad is not remembered as checked
        with pytest.raises(ADTError, match="image 2 .* does not decode"):
            decode(*bad)
    for expected in (list(range(8)), []):  # where it is skipped, what is bad is remembered as that
        caplog.clear()
        assert decode(*bad, "--skip_bad_images") == expected
        assert "1 of 8 images are bad, and each time the next one stands in: The image 2 of" in caplog.text
    decoded.clear()
    with pytest.raises(ADTError, match="image 2 .* does not decode"):
        check(*more, *bad)
    assert decoded == []
    shutil.copy(Path(dataset_path, "002.png"), tmp_path / "other")
    assert decode(*bad) == list(range(8)) and decode(*bad) == []


def test_missing_images_are_named_before_any_is_decoded(options, decoded, dataset_path, tmp_path, caplog):
    """The dataset's table is older than its files, and may hold some images itself."""
    data = copy_data(dataset_path, tmp_path / "data")
    args = parse_args(options("--train_data_dir", data, "--check_images", "none", "--max_train_samples", 7))
    dataset = load_image_caption_dataset(args)
    name = dataset[5]["image"]["path"]
    Path(name).write_bytes(b"")
    with pytest.raises(ADTError, match=rf"image 5 of the dataset \({name}\) is missing or empty"):
        check_used_images(dataset, 0, args, Accelerator(cpu=True))
    with caplog.at_level(logging.WARNING):
        check_used_images(dataset, 0, args.replace(skip_bad_images=True), Accelerator(cpu=True))
    assert any("1 of 7 images are bad" in message for message in caplog.messages)
    records = [{"path": name, "bytes": Path(data, "000.png").read_bytes()}, {"path": dataset[0]["image"]["path"]}]
    mixed = datasets.Dataset.from_dict({"image": records, "text": ["a", "b"]})
    check_used_images(mixed.cast_column("image", datasets.Image(decode=False)), 0, args, Accelerator(cpu=True))
    assert decoded == []


def test_too_little_shared_memory(check, monkeypatch):
    """Four workers with two batches each and the iteration's own, of two images of 16 x 16."""
    free = types.SimpleNamespace(free=9 * 2 * 3 * 16 * 16)
    monkeypatch.setattr(data_utils.shutil, "disk_usage", lambda folder: free)
    check("--dataloader_num_workers", 4)
    free.free -= 1
    with pytest.raises(ADTError, match="--dataloader_num_workers 4 needs 0 MB of shared memory"):
        check("--dataloader_num_workers", 4)
    check()


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
    assert count_empty_captions(dataset, torch.arange(8), args) == 1
    items = ImageCaptionDataset(dataset, args)
    assert {items[0, iteration, 0]["caption"] for iteration in range(20)} == {"one", "two"}
    assert items[7, 0, 0]["caption"] == ""


def test_caption_that_is_no_text(dataset_path, tmp_path):
    rows = datasets.load_dataset("imagefolder", data_dir=dataset_path, split="train")
    rows = rows.remove_columns("text").add_column("text", list(range(8)))
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    args = parse_args(["--pretrained_model_name_or_path", "x", "--dataset_name", str(tmp_path / "data")])
    with pytest.raises(ADTError, match="--caption_column text holds int64, which is neither text nor a list of texts"):
        load_image_caption_dataset(args)


# Images and their order


def test_images_are_resized_cropped_and_flipped(dataset_path, options):
    def item(*more, key=(1, 0, 0)):
        args = parse_args(options(*more))
        return ImageCaptionDataset(load_image_caption_dataset(args), args)[key]

    first = item("--center_crop", "--resolution", 20)
    image = Image.open(Path(dataset_path, "001.png")).convert("RGB")  # 25 x 20: 2 columns off, on the left
    expected = torch.tensor(list(image.crop((2, 0, 22, 20)).tobytes())).view(20, 20, 3).permute(2, 0, 1)
    assert torch.equal(first["pixel_values"], expected.byte())
    assert torch.equal(normalize_pixels(first["pixel_values"]), expected.float() / 127.5 - 1)
    assert first["caption"] == "a green disc 1"
    flips = [item("--center_crop", "--random_flip", key=(1, n, 0))["pixel_values"] for n in range(40)]
    plain = item("--center_crop")["pixel_values"]
    mirrored = sum(torch.equal(flip, plain.flip(2)) for flip in flips)
    assert sum(torch.equal(flip, plain) for flip in flips) == 40 - mirrored and 10 < mirrored < 30
    crops = {tuple(item(key=(1, n, 0))["pixel_values"].flatten().tolist()) for n in range(40)}
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


def test_order_is_a_tensor():
    """5 million images take 40 MB an epoch, not 200."""
    sampler = GlobalBatchSampler(1000, types.SimpleNamespace(seed=3))
    order = sampler.permutation(2)
    assert order.dtype == torch.long and order.untyped_storage().nbytes() == 8000
    assert [sampler.dataset_index(n) for n in range(2000, 3000)] == order.tolist()
    assert torch.equal(order, torch.randperm(1000, generator=make_generator(3, "epoch", 2)))


# Loading


@pytest.fixture
def loading(options):
    """What `make_dataloader` and `load_micro_batches` take of a run."""

    def make(*more, accelerator=None):
        args = parse_args(options(*more))
        return types.SimpleNamespace(
            args=args,
            accelerator=accelerator or Accelerator(cpu=True),
            dataset=load_image_caption_dataset(args),
            first_iteration=0,
        )

    return make


def test_images_can_be_loaded_by_processes_that_do_not_fork(loading):
    dataset = make_dataloader(loading("--random_flip")).dataset
    assert equal(pickle.loads(pickle.dumps(dataset))[3, 1, 2], dataset[3, 1, 2])


def test_loading_leaves_the_global_generator_as_it_is(loading):
    """It was seeded for an iteration's dropout when a run's first images are loaded."""
    before = torch.get_rng_state()
    next(data_utils.load_micro_batches(loading(), save_checkpoint=None))
    assert torch.equal(torch.get_rng_state(), before)


def test_loader_pins_memory_for_cuda(loading):
    assert not make_dataloader(loading()).pin_memory
    accelerator = types.SimpleNamespace(device=torch.device("cuda", 0), num_processes=1, process_index=0)
    loader = make_dataloader(loading("--dataloader_num_workers", 2, accelerator=accelerator))
    assert (loader.pin_memory, loader.num_workers) == (True, 2)


def test_images_are_copied_without_waiting(run, monkeypatch):
    copies, original = [], torch.Tensor.to

    def to(self, *args, **kwargs):
        if self.dtype == torch.uint8 and self.ndim == 4:
            copies.append(kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    run("--max_train_steps", 1, "--gradient_accumulation_steps", 2, "--adversarial_loss_weight", 0)
    assert copies == [{"non_blocking": True}] * 2


def test_workers_leave_signals_to_the_process_that_trains(loading):
    """A scheduler and a terminal send them to all processes of a job, of which this one wants to finish its work."""
    loader = iter(make_dataloader(loading("--dataloader_num_workers", 1, "--max_train_steps", 8)))
    loaded = [next(loader)]
    (worker,) = [psutil.Process(process.pid) for process in loader._workers]
    for name in ("INT", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)  # a process of its own, not the parent
    loaded += loader
    assert len(loaded) == 8 and not worker.is_running()
    loader = iter(make_dataloader(loading("--dataloader_num_workers", 1)))
    loaded = next(loader)
    loader._workers[0].terminate()  # as Python does with what is left at its end
    loader._workers[0].join(timeout=30)
    assert loader._workers[0].exitcode == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_image_ends_the_run_with_a_checkpoint(run, options, dataset_path, tmp_path, num_workers):
    order = GlobalBatchSampler(8, parse_args(options()))
    bad = order.dataset_index(5)  # the second image of the third iteration
    data = copy_data(dataset_path, tmp_path / "data", [bad])
    more = ("--train_data_dir", data, "--check_images", "none", "--dataloader_num_workers", num_workers)
    message = rf"The image {bad} of .* does not decode: [^.]*. {{}}Mend the image, or"
    with pytest.raises(ADTError, match=message.format("The run ends with checkpoint-2. ")):
        run(*more)
    with pytest.raises(ADTError, match=message.format("")):
        run(*more, "--resume_from_checkpoint", "latest")
    if num_workers == 0:  # an image that was mended is no other data
        file = data / f"{bad:03d}.png"
        damaged = file.read_bytes()
        shutil.copy(Path(dataset_path) / file.name, file)
        shutil.copytree(tmp_path / "out", tmp_path / "mended")
        mended = run(*more, "--resume_from_checkpoint", "latest", output_dir="mended")
        assert equal(read_network(mended), read_network(run(output_dir="straight")))
        file.write_bytes(damaged)
    resumed = run(*more, "--skip_bad_images", "--resume_from_checkpoint", "latest")
    whole = run(*more, "--skip_bad_images", output_dir="whole")
    assert equal(read_network(resumed), read_network(whole))
    assert read_scalars(whole)["skipped_images"] == {1: 0, 2: 0, 3: 1, 4: 0}
    # The next row stands in, with its own caption.
    lines = (data / "metadata.jsonl").read_text().splitlines()
    lines[bad] = json.dumps(json.loads(lines[(bad + 1) % 8]) | {"file_name": f"{bad:03d}.png"})
    (data / "metadata.jsonl").write_text("\n".join(lines))
    shutil.copy(data / f"{(bad + 1) % 8:03d}.png", data / f"{bad:03d}.png")
    assert equal(read_network(run(*more, output_dir="replaced")), read_network(whole))


def test_bad_images_are_replaced_by_the_next_that_decode(loading, dataset_path, tmp_path):
    run = loading("--train_data_dir", copy_data(dataset_path, tmp_path / "data", [6, 7]), "--skip_bad_images")
    images = ImageCaptionDataset(run.dataset, run.args)
    item = images[6, 3, 1]
    assert [sentence.split(" of")[0] for sentence in item.pop("bad_images")] == ["The image 6", "The image 7"]
    expected = images[0, 3, 1]
    assert expected.pop("bad_images") == [] and equal(item, expected)


@pytest.mark.parametrize("together", [1, 2])
def test_bad_image_of_another_process_ends_the_run(loading, dataset_path, tmp_path, monkeypatch, together):
    """What one process finds, all raise, after the checkpoint that they write together.

    Iterations whose rollouts run together are loaded together: none of them is done.
    """

    class TwoProcesses:
        device, num_processes, process_index = torch.device("cpu"), 2, 0

        def __init__(self):
            self.reduced = []

        def reduce(self, counts, reduction):
            self.reduced.append(reduction)
            return counts + torch.tensor([1, 1]) * (len(self.reduced) == 1 + 2 // together)  # the other has a bad one

    saved = []
    more = ("--gradient_accumulation_steps", 2, "--rollouts_per_batch", together)
    run = loading(*more, accelerator=TwoProcesses())
    monkeypatch.setattr(data_utils, "gather_object", lambda own: [*own, "The other's image."])
    loader = data_utils.load_micro_batches(run, lambda iteration, run: saved.append(iteration))
    loaded = [next(loader)["positions"] for _ in range(4)]
    assert loaded == [[0, 1], [4, 5]] * 2 and run.accelerator.reduced == ["sum"] * (2 // together)
    with pytest.raises(ADTError, match="^The other's image. The run ends with checkpoint-2. Mend"):
        next(loader)
    assert saved == [2]


# Text encoders


def test_networks_are_copied_to_the_device_and_nothing_back(monkeypatch):
    """Here a copy differs from what it was made of, as a device's does not."""
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).requires_grad_(False).eval()
    before = {name: (value.data_ptr(), value.clone()) for name, value in network.state_dict().items()}
    context, copies = data_utils.OnDevice([network], "cuda:0"), []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: copies.append(device) or self + 1)
    for count in (1, 2):
        with context:
            with context:
                pass
            assert all(torch.equal(value, before[name][1] + 1) for name, value in network.state_dict().items())
        assert copies == ["cuda:0"] * count * len(before)
        for name, value in network.state_dict().items():
            assert value.data_ptr() == before[name][0] and torch.equal(value, before[name][1])

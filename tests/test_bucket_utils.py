"""Aspect ratio buckets: each image's, the order of global batches, and runs at the buckets' sizes in each family."""

import json
import logging
import math
import types

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import reset_accelerate
from helpers import checkpoint_state, equal
from PIL import Image
from tiny import make_dinov2, make_imagefolder

import train_adt_sd15
import train_adt_sdxl
from adt_utils import FeatureNetwork
from bucket_utils import BUCKET, default_buckets, drawn_sizes, image_sizes
from data_utils import (
    BucketSampler,
    ImageCaptionDataset,
    first_images,
    images_per_epoch,
    load_image_caption_dataset,
    sort_into_buckets,
)
from related import train_add, train_lcm, train_robust
from training_utils import ADTError


BUCKETS = ("--use_aspect_ratio_buckets", "--aspect_ratio_buckets", "16,16;16,24;32,16")
# Of the library, on sides that tiny models take.
pytestmark = pytest.mark.filterwarnings("ignore:Bucket dimension")
ONE_FAMILY = pytest.mark.parametrize("family", ["sd15"], indirect=True)
SIZES = [(16, 16), (16, 24), (32, 16)]


@pytest.fixture(scope="module")
def wide_path(tmp_path_factory):
    """14 images: 5 square, 6 wide and 3 high; an upright one is stored on its side, and another is cut off."""
    path = tmp_path_factory.mktemp("wide")
    make_imagefolder(path, count=14)
    for n in range(14):
        size = [(40, 40), (48, 32), (24, 48)][0 if n < 5 else 1 if n < 11 else 2]
        file = path / f"{n:03d}.png"
        image = Image.open(file).convert("RGB").resize(size)
        file.unlink()
        exif = Image.Exif()
        if n == 13:
            image, exif[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6
        image.save(path / f"{n:03d}.jpg", exif=exif)
    metadata = path / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace(".png", ".jpg"))
    return path


@pytest.fixture
def bucketed(options, wide_path):
    def make(*more, **other):
        return options("--train_data_dir", wide_path, *BUCKETS, *more, **other)

    return make


# Each image's bucket


def test_default_buckets():
    """Shapes from 1:2 to 2:1 with about the pixels of the resolution, in steps that every network here divides."""
    for resolution, count in ((512, 7), (1024, 9)):
        args = types.SimpleNamespace(use_aspect_ratio_buckets=True, aspect_ratio_buckets=default_buckets(resolution))
        sizes = image_sizes(args)
        assert sizes[0] == (resolution, resolution) and len(set(sizes)) == len(sizes) == count
        assert all(side % 64 == 0 for size in sizes for side in size)
        assert all(0.8 < height * width / resolution**2 < 1.2 for height, width in sizes)


@ONE_FAMILY
@pytest.mark.parametrize("stored", ["files", "parquet"])
def test_images_are_in_the_bucket_of_their_shape(bucketed, wide_path, tmp_path, stored, monkeypatch):
    """Upright, in files and in a table, and without reading more than a header."""
    arguments = bucketed("--max_train_samples", 13)
    if stored == "parquet":
        rows = datasets.load_dataset("imagefolder", data_dir=str(wide_path), split="train")
        (tmp_path / "rows").mkdir()
        rows.to_parquet(tmp_path / "rows" / "train.parquet")
        while "--train_data_dir" in arguments:
            at = arguments.index("--train_data_dir")
            del arguments[at : at + 2]
        arguments += ["--dataset_name", str(tmp_path / "rows")]
    args = train_adt_sd15.parse_args(arguments)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded an image"))
        dataset = load_image_caption_dataset(args)
    assert len(dataset) == 13
    numbers = [int(caption.split()[-1]) for caption in dataset["text"][:]]
    assert dataset[BUCKET][:] == [0 if n < 5 else 1 if n < 11 else 2 for n in numbers]


@ONE_FAMILY
def test_images_cover_their_bucket(bucketed, wide_path):
    args = train_adt_sd15.parse_args(bucketed("--center_crop", "--image_interpolation_mode", "nearest"))
    images = ImageCaptionDataset(load_image_caption_dataset(args), args)
    assert [tuple(images[n, 0, 0]["pixel_values"].shape[1:]) for n in (0, 5, 13)] == SIZES
    item = images[13, 0, 0]  # 24 x 48, of the shape of 16 x 32: all of it
    with Image.open(wide_path / "013.jpg") as image:
        upright = image.transpose(Image.Transpose.ROTATE_270).resize((16, 32), Image.Resampling.NEAREST)
    assert torch.equal(item["pixel_values"], torch.from_numpy(np.array(upright)).permute(2, 0, 1))
    assert item["original_size"] == (48, 24) and item["crop_top_left"] == (0, 0)
    crops = {images[5, 0, n]["crop_top_left"] for n in range(3)}
    assert crops == {(0, 0)}  # 48 x 32 has the shape of 24 x 16
    assert images[0, 0, 0]["crop_top_left"] == (0, 0)


@ONE_FAMILY
def test_bad_images_are_refused_or_left_out(bucketed, wide_path, tmp_path, caplog):
    """By their headers at once; one that is cut off behind it is replaced by the next of its bucket."""
    data = tmp_path / "data"
    data.mkdir()
    for file in wide_path.iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    (data / "002.jpg").write_bytes(b"no image")
    (data / "010.jpg").write_bytes((data / "010.jpg").read_bytes()[:-300])
    arguments = bucketed("--train_data_dir", data, "--check_images", "none")
    with pytest.raises(ADTError, match=r"The image 2 of the dataset \(.*002.jpg\) does not decode"):
        load_image_caption_dataset(train_adt_sd15.parse_args(arguments))
    args = train_adt_sd15.parse_args([*arguments, "--skip_bad_images"])
    with caplog.at_level(logging.WARNING):
        dataset = load_image_caption_dataset(args)
    assert any("1 of 14 images are bad, and left out: The image 2" in message for message in caplog.messages)
    assert dataset[BUCKET][2] == -1
    assert 2 not in {index for batch in BucketSampler(torch.tensor(dataset[BUCKET][:]), args) for index, *_ in batch}
    item = ImageCaptionDataset(dataset, args)[10, 0, 0]
    assert len(item["bad_images"]) == 1 and item["caption"] == dataset[5]["text"]  # the next wide one


@ONE_FAMILY
def test_missing_images_are_refused(bucketed):
    """Rows of a table may have none."""
    image = {"bytes": None, "path": None}
    rows = datasets.Dataset.from_dict({"image": [None, image]}).cast_column("image", datasets.Image(decode=False))
    args = train_adt_sd15.parse_args(bucketed())
    with pytest.raises(ADTError, match="The image 0 of the dataset does not decode: it is missing."):
        sort_into_buckets(rows, torch.arange(2), args)
    assert sort_into_buckets(rows, torch.arange(2), args.replace(skip_bad_images=True)) == [-1, -1]


# The order of global batches


def make_order(shape, max_train_steps=10, first_iteration=0):
    processes, batch_size, micro = shape
    args = types.SimpleNamespace(
        train_batch_size=batch_size, gradient_accumulation_steps=micro, max_train_steps=max_train_steps, seed=3,
        use_aspect_ratio_buckets=True, aspect_ratio_buckets="16,16;16,24;32,16",
    )  # fmt: skip
    buckets = torch.tensor([0] * 5 + [1] * 9 + [-1, 2, 2, 2])
    samplers = [BucketSampler(buckets, args, processes, process, first_iteration) for process in range(processes)]
    seen = {}
    for sampler in samplers:
        for batch in sampler:
            for index, iteration, position in batch:
                seen.setdefault(iteration, []).append((position, index))
    order = {iteration: [index for _, index in sorted(found)] for iteration, found in seen.items()}
    return order, buckets, samplers[0]


@pytest.mark.parametrize("shape", [(1, 4, 1), (2, 2, 1), (1, 2, 2), (4, 1, 1)])
def test_global_batches_have_one_bucket_however_they_are_shared_out(shape):
    """Five, nine and three images make one, two and no batches of four; each epoch leaves out others."""
    order, buckets, sampler = make_order(shape)
    assert order == make_order((1, 4, 1))[0]
    assert all(len(batch) == 4 and len({buckets[index].item() for index in batch}) == 1 for batch in order.values())
    assert sampler.dataset_size == 12
    epochs = [sorted(sum((order[3 * epoch + n] for n in range(3)), [])) for epoch in range(3)]
    assert all(len(set(epoch)) == 12 for epoch in epochs) and epochs[0] != epochs[1]
    assert make_order(shape, first_iteration=4)[0] == {n: order[n] for n in range(4, 10)}
    assert sampler.used_indices().tolist() == list(range(14))
    used = make_order(shape, max_train_steps=2)[2].used_indices().tolist()
    assert used == sorted(order[0] + order[1])


@ONE_FAMILY
def test_epochs_are_counted_and_what_they_leave_out_is_said(bucketed, caplog):
    args = train_adt_sd15.parse_args(bucketed("--train_batch_size", 4))
    dataset = load_image_caption_dataset(args)
    with caplog.at_level(logging.INFO):
        assert images_per_epoch(dataset, args, Accelerator(cpu=True)) == 8
    message = (
        "2 aspect ratio buckets have 11 of 14 images and 2 global batches an epoch, which leaves out 3 others each"
    )
    assert any(message in line and "3 are never used" in line for line in caplog.messages)
    # What no batch has is not drawn either.
    sizes = [drawn_sizes(dataset, global_batch_size, args) for global_batch_size in (3, 4, 6)]
    assert sizes == [[(16, 24), (16, 16), (32, 16)], [(16, 24), (16, 16)], [(16, 24)]]
    args = args.replace(train_batch_size=7)
    with pytest.raises(ADTError, match="No aspect ratio bucket has 7 images, which are a global batch: take fewer"):
        images_per_epoch(dataset, args, Accelerator(cpu=True))


# What a size is passed on to


def test_time_ids_have_the_buckets_size():
    """The target's in the diffusion loss; in the rollout what the pipeline passes for it."""
    args = types.SimpleNamespace(rollout_time_ids="inference")
    examples = {"pixel_values": torch.zeros(1, 3, 12, 20), "original_sizes": torch.tensor([[50, 30]])}
    examples["crop_top_lefts"] = torch.tensor([[1, 2]])
    embeds = {"prompt_embeds": torch.zeros(1, 2, 3)}
    conditions = train_adt_sdxl.make_conditions(examples, embeds, embeds, torch.tensor([False]), args)
    assert conditions.loss["time_ids"].tolist() == [[50, 30, 1, 2, 12, 20]]
    assert conditions.positive["time_ids"].tolist() == conditions.negative["time_ids"].tolist()
    assert conditions.positive["time_ids"].tolist() == [[12, 20, 0, 0, 12, 20]]


@ONE_FAMILY
def test_first_images_are_of_the_first_batches(bucketed):
    """As the discriminator's first look takes them, which compares those of one size."""
    args = train_adt_sd15.parse_args(bucketed())
    run = types.SimpleNamespace(args=args, dataset=load_image_caption_dataset(args), global_batch_size=2)
    sizes = [tuple(image.shape[1:]) for image in first_images(run, 5)]
    assert len(sizes) == 5 and sizes[0] == sizes[1] and sizes[2] == sizes[3]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--aspect_ratio_buckets", "16,16"), "--aspect_ratio_buckets needs --use_aspect_ratio_buckets."),
        ((*BUCKETS, "--compile"), "--compile does not go with --use_aspect_ratio_buckets"),
        ((*BUCKETS[:2], "16x16"), "must be like 512,512;448,576, not 16x16: Invalid bucket format"),
        ((*BUCKETS[:2], "16,16;16,16"), "names a size twice: 16,16;16,16"),
    ],
)
def test_refused_options(capsys, more, message):
    with pytest.raises(SystemExit):
        train_adt_sd15.parse_args(["--pretrained_model_name_or_path", "x", "--dataset_name", "y", *more])
    assert message in capsys.readouterr().err


def test_sizes_that_the_models_do_not_take(bucketed, family, no_weights):
    with pytest.raises(ADTError, match="--aspect_ratio_buckets 17 is not divisible by"):
        family.train.main(family.train.parse_args(bucketed("--aspect_ratio_buckets", "16,16;17,16")))
    if family.name == "sd3":
        with pytest.raises(ADTError, match="36 pixels a side are too many: .* has positions for 32"):
            family.train.main(family.train.parse_args(bucketed("--aspect_ratio_buckets", "16,16;36,16")))


# The discriminator


def test_discriminator_sees_the_shape():
    """About the pixels of the resolution in whole patches, none of them squeezed; squares as ever."""
    network = FeatureNetwork(make_dinov2(), layers=(-1, 3), resolution=16)
    assert network.input_size(512, 512) == (16, 16) and network.input_size(64, 16) == (32, 8)
    assert network.input_size(16, 64) == (8, 32) and network.input_size(1, 100) == (8, 160)
    with torch.no_grad():
        assert [tuple(feature.shape) for feature in network(torch.zeros(2, 3, 64, 16))] == [(2, 32, 16)] * 2
    for height, width in ((1024, 1024), (768, 1344), (1408, 704)):
        sides = FeatureNetwork.input_size(types.SimpleNamespace(model=network.model, resolution=516), height, width)
        assert 0.97 < math.prod(sides) / 516**2 < 1.03 and 0.97 < sides[0] / sides[1] / (height / width) < 1.03


# Runs


def test_runs_at_the_buckets_sizes(bucketed, family, tmp_path, monkeypatch):
    """Rollout, VAE, discriminator, diffusion loss, validation; the card has the sizes; exact resume."""
    shapes, roll_out = [], family.train.roll_out

    def watch(micro_batches, *others):
        shapes.extend(tuple(2 * side for side in batches[0].latents.shape[2:]) for batches in micro_batches.values())
        roll_out(micro_batches, *others)

    monkeypatch.setattr(family.train, "roll_out", watch)
    prompts = ("--validation_prompts", "a red disc", "--num_validation_images", 4)
    more = ("--checkpointing_steps", 2, "--max_train_steps", 4, "--use_lora")
    output = run_with(family, bucketed(*prompts, *more, output_dir="full"), tmp_path / "full")
    assert set(shapes) <= set(SIZES) and len(set(shapes)) > 1
    card = (output / "README.md").read_text()
    assert "(height x width) of the nearest shape: 16x24, 16x16, 32x16." in card
    assert ("the original size of each image's bucket" in card) == (family.name == "sdxl")
    assert ", height=16, width=24)" in card
    # In turn those of 6, 5 and 3 images; a grid's fields have the largest sides, of 24 and 32.
    drawn = [Image.open(output / "validation" / "base" / f"prompt-0-{j}.png") for j in range(4)]
    assert [image.size[::-1] for image in drawn] == [(16, 24), (16, 16), (32, 16), (16, 24)]
    grid = np.array(Image.open(output / "images" / "prompt-0.png"))
    assert grid.shape == (2 * 32, 4 * 24, 3)
    assert np.array_equal(grid[:16, :24], np.array(drawn[0])) and (grid[16:32, :24] == 255).all()
    resumed = bucketed(*more, "--resume_from_checkpoint", output / "checkpoint-2", output_dir="resumed")
    resumed = run_with(family, resumed, tmp_path / "resumed")
    assert equal(checkpoint_state(resumed / "checkpoint-4"), checkpoint_state(output / "checkpoint-4"))


@ONE_FAMILY
def test_base_images_are_kept_for_the_same_sizes_alone(bucketed, family, tmp_path, caplog):
    """Data that were mended may have others; the base's images are then drawn anew, before a checkpoint is loaded."""
    # Two prompts, whose images of several sizes the drift guard compares.
    prompts = ("--validation_prompts", "a red disc", "a blue disc", "--num_validation_images", 2)
    prompts += ("--checkpointing_steps", 1)
    output = run_with(family, bucketed(*prompts, "--max_train_steps", 1), tmp_path / "out")
    kept = {file.name: file.read_bytes() for file in (output / "validation" / "base").iterdir()}
    record = output / "validation" / "base" / "record.json"
    resume = ("--max_train_steps", 2, "--resume_from_checkpoint", "latest")
    with caplog.at_level(logging.INFO):
        run_with(family, bucketed(*prompts, *resume), output)
        assert f"The base's validation images are {record.parent}" in caplog.text
        caplog.clear()
        text = record.read_text()
        sizes = json.loads(text)["sizes"]
        assert sizes == [[16, 24], [16, 16], [32, 16]]
        record.write_text(json.dumps(json.loads(text) | {"sizes": sizes[::-1]}, indent=2))
        run_with(family, bucketed(*prompts, *resume), output)
        assert f"The base's validation images are {record.parent}" not in caplog.text
    assert {file.name: file.read_bytes() for file in (output / "validation" / "base").iterdir()} == kept


@ONE_FAMILY
@pytest.mark.parametrize("script", [train_add, train_lcm, train_robust])
def test_related_systems_train_on_them(script, base_path, wide_path, dinov2_path, tmp_path, monkeypatch):
    shapes, prepare_batch = set(), train_adt_sd15.prepare_batch

    def watched(*args):
        batch = prepare_batch(*args)
        shapes.add(tuple(2 * side for side in batch.latents.shape[2:]))
        return batch

    monkeypatch.setattr(train_adt_sd15, "prepare_batch", watched)
    network = (
        "--discriminator_model_name_or_path", dinov2_path, "--discriminator_layers", 1, "--discriminator_resolution",
        16, "--mismatched_pair_weight", 1,
    )  # fmt: skip
    words = [
        "--family", "sd15", "--pretrained_model_name_or_path", base_path, "--train_data_dir", wide_path, *BUCKETS,
        "--resolution", 16, "--train_batch_size", 2, "--max_train_steps", 4, "--checkpointing_steps", 100,
        "--num_inference_steps", 2, "--validation_prompts", "a red disc", "--num_validation_images", 2,
        *(network if script is train_add else ()), "--dataloader_num_workers", 0, "--output_dir", tmp_path / "out",
    ]  # fmt: skip
    reset_accelerate()
    script.main(script.parse_args([str(word) for word in words]))
    assert shapes <= set(SIZES) and len(shapes) > 1
    assert "of the nearest shape: 16x24, 16x16, 32x16." in (tmp_path / "out" / "README.md").read_text()


def run_with(family, arguments, output):
    reset_accelerate()
    family.train.main(family.train.parse_args(arguments))
    return output

# Copyright 2026 The ADT training example authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Data: seeded draws, loading and checking images with captions, the order of global batches, cached embeddings.

The sections can be read alone:

- seeded draws: `make_generator`, `draw_per_image`;
- the data set: `load_image_caption_dataset`, `identify_data`, `read_image`;
- images and captions: `transform_image`, `choose_caption`, `ImageCaptionDataset`, `StreamedImages`;
- their order and loading: `GlobalBatchSampler`, `BucketSampler`, `make_dataloader`, `load_micro_batches`;
- what is checked of the images at a start: `check_used_images`;
- text encoders that rest in CPU memory, and captions' embeddings on disk: `OnDevice`, `EmbeddingCache`.
"""

import hashlib
import json
import os
import shutil
import signal
import tempfile
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from diffusers.training_utils import find_nearest_bucket
from PIL import ExifTags, Image, ImageOps
from tqdm.auto import tqdm

from adt_utils import select_train_steps
from bucket_utils import BUCKET, image_sizes
from streaming_utils import Stream
from training_utils import ADTError, concatenate, is_generator_iteration, rollout_group


logger = get_logger(__name__)


# Seeded draws


def make_generator(seed: int, purpose: str, *key: int) -> torch.Generator:
    """A CPU generator that depends on its arguments alone, so that an iteration can be drawn again anywhere."""
    entropy = [seed % 2**63, zlib.crc32(purpose.encode()), *key]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1)


def draw_per_image(function, shape, seed, purpose, iteration, positions):
    """(B, *shape): one draw of `torch.rand` or `torch.randn` for each image, by its index in the global batch."""
    return torch.stack(
        [function(shape, generator=make_generator(seed, purpose, iteration, position)) for position in positions]
    )


def draw_path(iteration, args) -> tuple[int, list[int]]:
    """The start index of an iteration's whole global batch, and the steps that send a gradient, if any do."""
    generator, num_steps = make_generator(args.seed, "path", iteration), args.num_inference_steps
    start_index = torch.randint(num_steps, (1,), generator=generator).item()
    if not is_generator_iteration(iteration, args):
        return start_index, []
    return start_index, select_train_steps(start_index, num_steps, args.num_gradient_steps, generator)


# The data set


def load_image_caption_dataset(args) -> datasets.Dataset | Stream:
    """Loads the split and checks its columns; images stay undecoded.

    With `--use_aspect_ratio_buckets` the column `BUCKET` has each image's.

    Raises:
        ADTError: if it cannot be read, is empty or lacks a column, or a column is of another type.
    """
    how = {"cache_dir": args.cache_dir, "streaming": args.streaming}
    try:
        if args.dataset_name is not None:
            loaded = datasets.load_dataset(args.dataset_name, args.dataset_config_name, **how)
        else:
            loaded = datasets.load_dataset("imagefolder", data_dir=args.train_data_dir, **how)
    except Exception as error:  # of a dozen kinds, pyarrow's and the Hub's among them
        name = args.dataset_name or args.train_data_dir
        raise ADTError(f"The dataset {name} cannot be read: {error.__cause__ or error}") from error
    if args.dataset_split not in loaded:
        raise ADTError(f"The dataset has no {args.dataset_split} split, only {', '.join(loaded)}.")
    dataset = loaded[args.dataset_split]
    if dataset.features is None:  # of a stream of files that do not say
        raise ADTError("The dataset does not say its columns' types, which --streaming needs.")
    for option in ("image_column", "caption_column"):
        if getattr(args, option) not in dataset.column_names:
            raise ADTError(
                f"--{option} {getattr(args, option)} is not a column of the dataset, which has "
                f"{', '.join(dataset.column_names)}."
            )
    if not isinstance(dataset.features[args.image_column], datasets.Image):
        raise ADTError(f"--image_column {args.image_column} does not hold images.")
    caption_type = dataset.features.arrow_schema.field(args.caption_column).type
    if not holds_text(caption_type):
        raise ADTError(
            f"--caption_column {args.caption_column} holds {caption_type}, which is neither text nor a list of texts."
        )
    dataset = dataset.cast_column(args.image_column, datasets.Image(decode=False))
    if args.streaming:
        return Stream(dataset, args, PartialState().num_processes, PartialState().process_index)
    if len(dataset) == 0:
        raise ADTError("The dataset is empty.")
    indices = torch.arange(len(dataset))
    if args.max_train_samples is not None and args.max_train_samples < len(dataset):
        order = torch.randperm(len(dataset), generator=make_generator(args.seed, "samples"))
        indices = order[: args.max_train_samples].sort().values
    if args.use_aspect_ratio_buckets:  # before the selection, after which a column would copy the images
        dataset = dataset.add_column(BUCKET, sort_into_buckets(dataset, indices, args))
    return dataset if len(indices) == len(dataset) else dataset.select(indices.tolist())


def holds_text(arrow_type) -> bool:
    """Whether a column of that type holds texts, lists of texts, or nothing at all."""
    if pyarrow.types.is_list(arrow_type) or pyarrow.types.is_large_list(arrow_type):
        arrow_type = arrow_type.value_type
    kinds = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_null)
    return any(is_kind(arrow_type) for is_kind in kinds)


def identify_data(dataset, args) -> dict:
    """What tells the rows from others, wherever they lie: their number, captions, and images by name and size.

    Images are not read: of files the base name and the size count, of embedded ones the number of bytes, too.

    Returns:
        `images`, their number; `captions` and `names`, digests; and `sizes`, digests of up to 64 parts of the rows, so
        that a few images that were mended are told from other ones.
    """
    table = dataset.data  # as it is stored: rows would bring the images along
    image_column = table.column(args.image_column)
    paths = pyarrow.compute.struct_field(image_column, "path").to_pylist()
    sizes = pyarrow.compute.binary_length(pyarrow.compute.struct_field(image_column, "bytes")).to_pylist()

    def measure(first):
        found = []
        for path, size in zip(paths[first : first + part], sizes[first : first + part], strict=True):
            if size is None and path is not None and os.path.exists(path):
                size = os.path.getsize(path)
            found.append(size)
        return digest_of(found)

    part = -(-len(paths) // 64)
    with ThreadPoolExecutor(16) as pool:  # a network's file system answers each after a while
        digests = list(pool.map(measure, range(0, len(paths), part)))
    return {
        "images": len(dataset),
        "captions": digest_of(table.column(args.caption_column).to_pylist()),
        "names": digest_of(os.path.basename(path or "") for path in paths),
        "sizes": digests,
    }


def digest_of(values) -> str:
    """Sixteen hexadecimal digits for an iterable of texts, numbers, and lists of them."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(f"{value!r}\n".encode())
    return digest.hexdigest()[:16]


def open_image(record) -> Image.Image:
    """Decodes `{"bytes": ..., "path": ...}` to RGB, upright."""
    with datasets.Image().decode_example(record) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def read_image(row, index, args) -> Image.Image:
    """`open_image` for the row at `index` of the dataset. Raises `ADTError`, which names the image, if it fails."""
    record = row[args.image_column]
    name = describe_image(index, record and record["path"])
    if record is None:
        raise ADTError(f"{name} is missing.")
    try:
        return open_image(record)
    except Exception as error:  # PIL raises half a dozen kinds, SyntaxError among them
        reason = str(error).rstrip(".")
        raise ADTError(f"{name} does not decode: {reason}.") from error


def describe_image(index, path) -> str:
    return f"The image {index} of the dataset" + (f" ({path})" if path else "")


# Buckets of aspect ratios


def sort_into_buckets(dataset, indices, args) -> list[int]:
    """The column `BUCKET`: the nearest shape to that of each image of `indices`, by their files' headers alone.

    The processes share them out. An image without a readable header is refused, or not used with `--skip_bad_images`.
    """
    images, sizes, state = dataset.data.column(args.image_column), image_sizes(args), PartialState()

    def find(index):
        try:
            return find_nearest_bucket(*read_size(images[index]), sizes), None
        except Exception as error:  # as in `read_image`
            return -1, f"{describe_image(index, images[index]['path'].as_py())} does not decode: {error}".rstrip(".")

    own = indices[state.process_index :: state.num_processes].tolist()
    bar = tqdm(total=len(own), desc="Sizes of images", leave=False, disable=not state.is_local_main_process)
    found = []
    with ThreadPoolExecutor(16) as pool, bar:  # which wait for a file system
        for index, result in zip(own, pool.map(find, own), strict=True):
            found.append((index, *result))
            bar.update()
    buckets, bad_images = np.full(len(dataset), -1), []
    for index, bucket, sentence in sorted(gather_object(found)):
        buckets[index] = bucket
        bad_images += [f"{sentence}."] if sentence else []
    if bad_images and not args.skip_bad_images:
        raise ADTError(bad_images[0])
    if bad_images:
        logger.warning(f"{len(bad_images)} of {len(indices)} images are bad, and left out: {bad_images[0]}")
    return buckets.tolist()


def read_size(record) -> tuple[int, int]:
    """(height, width) of an image that is upright, from `{"bytes": ..., "path": ...}` as Arrow has it."""
    path = record["path"].as_py()
    if not record.is_valid:
        raise FileNotFoundError("it is missing")
    if record["bytes"].is_valid:
        file = pyarrow.BufferReader(record["bytes"].as_buffer())  # no copy of what is behind the header
    elif "://" in (path or ""):
        with open_image(record.as_py()) as image:
            return image.height, image.width
    else:
        file = path
    with Image.open(file) as image:
        # PIL would decode a PNG to look for what is behind its pixels.
        turned = image.format != "PNG" and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


# Images and captions


def transform_image(image, size, generator, args):
    """Resizes, flips and crops as the diffusers examples do, with three draws from `generator`.

    Args:
        size: (height, width) of the result.

    Returns:
        pixel values (3, height, width), uint8 as they take the least of what workers share with the
        process that trains, and the crop's top left corner (y, x) in the resized image as it was cropped, which is
        mirrored if the crop is.
    """
    u_flip, u_top, u_left = torch.rand(3, generator=generator).tolist()
    height, width = size
    if image.width * height >= image.height * width:
        covering = (height * image.width // image.height, height)
    else:
        covering = (width, width * image.height // image.width)
    image = image.resize(covering, Image.Resampling[args.image_interpolation_mode.upper()])
    if args.random_flip and u_flip < 0.5:
        image = ImageOps.mirror(image)
    spare_left, spare_top = covering[0] - width, covering[1] - height
    if args.center_crop:
        left, top = round(spare_left / 2), round(spare_top / 2)
    else:
        left, top = int(u_left * (spare_left + 1)), int(u_top * (spare_top + 1))
    image = image.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), (top, left)


def normalize_pixels(pixel_values):
    """uint8 pixel values of any shape to [-1, 1], float32."""
    return pixel_values.float() / 127.5 - 1


def choose_caption(captions, generator) -> str:
    """One of several captions; the empty prompt where there is none."""
    if isinstance(captions, list):
        captions = captions[int(torch.rand(1, generator=generator).item() * len(captions))] if captions else ""
    return captions or ""


class ImageCaptionDataset(torch.utils.data.Dataset):
    """Images and captions by `(dataset index, iteration, position in the global batch)`.

    An item has `pixel_values` (3, height, width), uint8, `caption`, `position`, the image's `original_size`
    (height, width) and its `crop_top_left` (y, x). Crop, flip and the choice among several captions are drawn from the
    seed, the iteration and the position.

    Its `bad_images` has a sentence on each image that does not decode. The item then has nothing else; with
    `--skip_bad_images` it is the next row's whose image decodes (and is of the same bucket), by which a run stays the
    same however it is shared out or resumed.
    """

    def __init__(self, dataset, args):
        self.dataset = dataset
        self.args = args
        self.buckets = dataset[BUCKET][:] if args.use_aspect_ratio_buckets else None

    def __getitem__(self, key):
        index, iteration, position = key
        bad_images = []
        for offset in range(len(self.dataset) if self.args.skip_bad_images else 1):
            candidate = (index + offset) % len(self.dataset)
            if self.buckets is not None and self.buckets[candidate] != self.buckets[index]:
                continue
            row = self.dataset[candidate]
            try:
                image = read_image(row, candidate, self.args)
            except ADTError as error:
                bad_images.append(str(error))
            else:
                return make_item(row, image, iteration, position, self.args) | {"bad_images": bad_images}
        return {"bad_images": bad_images}


def make_item(row, image, iteration, position, args):
    generator = make_generator(args.seed, "image", iteration, position)
    size = image_sizes(args)[row.get(BUCKET, 0)]
    pixel_values, crop_top_left = transform_image(image, size, generator, args)
    return {
        "pixel_values": pixel_values,
        "caption": choose_caption(row[args.caption_column], generator),
        "position": position,
        "original_size": (image.height, image.width),
        "crop_top_left": crop_top_left,
    }


class StreamedImages(torch.utils.data.IterableDataset):
    """One process's items, as `ImageCaptionDataset`'s, from the row on that its `Stream` is at; in a worker, its own.

    An item also has `reader`, who read it, and `behind`, the `StreamPosition` there. The process's row `n` is reader
    `n % num_readers`'s. A data loader begins with reader 0: what stands for rows before the first one is empty.
    """

    def __init__(self, stream, args, first_iteration):
        self.stream, self.args = stream, args
        self.rows_an_iteration = args.train_batch_size * args.gradient_accumulation_steps
        self.first = first_iteration * self.rows_an_iteration

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        reader, num_readers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        n = self.first - self.first % num_readers + reader
        if n < self.first:
            yield {}
            n += num_readers
        bad_images, bad_since = [], None
        for row, behind in self.stream.read(reader):
            try:
                image = read_image(row, self.name(row), self.args)
            except ADTError as error:
                bad_since = behind.epoch if not bad_images else bad_since
                bad_images.append(str(error))
                if self.args.skip_bad_images and behind.epoch <= bad_since + 1:
                    continue
                item = {}
            else:
                item = make_item(row, image, *self.place(n), self.args)
            yield item | {"bad_images": bad_images, "reader": reader, "behind": behind}
            n, bad_images = n + num_readers, []

    def name(self, row) -> str:
        """By what its user finds a row: nobody has numbered them."""
        return f"with the caption {row[self.args.caption_column]!r}"

    def place(self, n) -> tuple[int, int]:
        """The iteration, and the position in the global batch, of the process's row `n`."""
        iteration, n = divmod(n, self.rows_an_iteration)
        micro, n = divmod(n, self.args.train_batch_size)
        stream = self.stream
        return iteration, (micro * stream.num_processes + stream.process_index) * self.args.train_batch_size + n


def first_images(run, count) -> list[torch.Tensor]:
    """`pixel_values` of the first `count` images, less those that do not decode, which the loader names."""
    args, dataset = run.args, run.dataset
    if args.streaming:
        images = StreamedImages(dataset, args, 0)
        rows, items = dataset.head(count), []
        for position, row in enumerate(rows):
            try:
                items.append(make_item(row, read_image(row, images.name(row), args), 0, position, args))
            except ADTError:
                continue
    else:
        images, order = ImageCaptionDataset(dataset, args), make_batch_sampler(dataset, args)
        count = min(count, len(dataset), args.max_train_steps * run.global_batch_size)
        items = [images[order.dataset_index(position), 0, position] for position in range(count)]
    return [item["pixel_values"] for item in items if "pixel_values" in item]


def collate_fn(examples):
    """A micro-batch; of `bad_images` alone where one of them has no image."""
    bad_images = [sentence for example in examples for sentence in example["bad_images"]]
    if any("pixel_values" not in example for example in examples):
        return {"bad_images": bad_images}
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "captions": [example["caption"] for example in examples],
        "positions": [example["position"] for example in examples],
        "original_sizes": torch.tensor([example["original_size"] for example in examples]),
        "crop_top_lefts": torch.tensor([example["crop_top_left"] for example in examples]),
        "bad_images": bad_images,
        "behind": {example["reader"]: example["behind"] for example in examples if "reader" in example},
    }


# Their order and loading


# How many micro-batches a worker keeps ready.
PREFETCH_FACTOR = 2


class GlobalBatchSampler(torch.utils.data.Sampler):
    """The micro-batches of one process, as lists of keys for `ImageCaptionDataset`, from `first_iteration` on.

    The images are an endless row of permutations of the dataset; iteration `k` takes the `k`-th global batch of it.
    An image's position there is `(micro * processes + process) * batch + j`, so that processes, micro-batches and
    larger batches can stand for each other.
    """

    def __init__(self, dataset_size, args, num_processes=1, process_index=0, first_iteration=0):
        self.dataset_size = dataset_size
        self.args = args
        self.num_processes, self.process_index = num_processes, process_index
        self.first_iteration = first_iteration
        self.permutation = lru_cache(maxsize=2)(self.draw_permutation)  # a batch may lie in two epochs

    @property
    def global_batch_size(self) -> int:
        return self.args.train_batch_size * self.num_processes * self.args.gradient_accumulation_steps

    def draw_permutation(self, epoch):
        # It stays a tensor: a list of Python's integers is four times as large.
        return torch.randperm(self.dataset_size, generator=make_generator(self.args.seed, "epoch", epoch))

    def dataset_index(self, n) -> int:
        epoch, offset = divmod(n, self.dataset_size)
        return self.permutation(epoch)[offset].item()

    def used_indices(self) -> torch.Tensor:
        """(N,): the dataset's indices that all processes together take, each once and sorted."""
        size = self.dataset_size
        first = self.first_iteration * self.global_batch_size
        last = min(self.args.max_train_steps * self.global_batch_size, first + 2 * size)  # an epoch's rest, and one
        parts = [
            self.permutation(epoch)[max(0, first - epoch * size) : last - epoch * size]
            for epoch in range(first // size, -(-last // size))
        ]
        return torch.cat([torch.empty(0, dtype=torch.long), *parts]).unique()

    def __len__(self):
        return (self.args.max_train_steps - self.first_iteration) * self.args.gradient_accumulation_steps

    def __iter__(self):
        batch_size = self.args.train_batch_size
        for iteration in range(self.first_iteration, self.args.max_train_steps):
            for micro in range(self.args.gradient_accumulation_steps):
                first = (micro * self.num_processes + self.process_index) * batch_size
                yield [
                    (self.dataset_index(iteration * self.global_batch_size + position), iteration, position)
                    for position in range(first, first + batch_size)
                ]


class BucketSampler(GlobalBatchSampler):
    """The same where each global batch is of one bucket: an epoch is all such batches that are full, in any order.

    So `dataset_size` counts the images of an epoch, and each epoch leaves out others; those in a bucket with fewer
    images than a global batch never appear.

    Args:
        buckets: (N,), the column `BUCKET`.

    Raises:
        ADTError: where no bucket fills a global batch.
    """

    def __init__(self, buckets, args, num_processes=1, process_index=0, first_iteration=0):
        super().__init__(0, args, num_processes, process_index, first_iteration)
        members = [(buckets == bucket).nonzero().flatten() for bucket in range(len(image_sizes(args)))]
        self.members = [rows for rows in members if len(rows) >= self.global_batch_size]
        self.dataset_size = sum(self.num_in_epoch(rows) for rows in self.members)
        if self.dataset_size == 0:
            raise ADTError(
                f"No aspect ratio bucket has {self.global_batch_size} images, which are a global batch: take fewer "
                "--aspect_ratio_buckets, or a smaller batch."
            )

    def num_in_epoch(self, rows) -> int:
        return len(rows) // self.global_batch_size * self.global_batch_size

    def draw_permutation(self, epoch):
        generator, batches = make_generator(self.args.seed, "epoch", epoch), []
        for rows in self.members:
            rows = rows[torch.randperm(len(rows), generator=generator)]
            batches.append(rows[: self.num_in_epoch(rows)].view(-1, self.global_batch_size))
        batches = torch.cat(batches)
        return batches[torch.randperm(len(batches), generator=generator)].flatten()

    def used_indices(self) -> torch.Tensor:
        if self.args.max_train_steps * self.global_batch_size > self.dataset_size:  # other epochs, other images
            return torch.cat(self.members).sort().values
        return super().used_indices()


def make_batch_sampler(dataset, args, num_processes=1, process_index=0, first_iteration=0) -> GlobalBatchSampler:
    place = (args, num_processes, process_index, first_iteration)
    if args.use_aspect_ratio_buckets:
        return BucketSampler(torch.tensor(dataset[BUCKET][:]), *place)
    return GlobalBatchSampler(len(dataset), *place)


def images_per_epoch(dataset, args, accelerator) -> int:
    """How many of the images an epoch has: all, or those in global batches of one bucket; 0 for a stream."""
    if args.streaming:
        return 0
    sampler = make_batch_sampler(dataset, args, accelerator.num_processes)
    if args.use_aspect_ratio_buckets:
        num_members = sum(len(rows) for rows in sampler.members)
        logger.info(
            f"{len(sampler.members)} aspect ratio buckets have {num_members} of {len(dataset)} images and "
            f"{sampler.dataset_size // sampler.global_batch_size} global batches an epoch, which leaves out "
            f"{num_members - sampler.dataset_size} others each time. {len(dataset) - num_members} are never used, as "
            "their buckets fill no batch."
        )
    return sampler.dataset_size


def leave_signals_alone(worker_id):
    """Has a worker live on where a scheduler or Ctrl-C signals a whole process group, since the run stops by itself.

    SIGTERM of its own process ends it all the same, as it must for Python to end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # as on macOS and Windows
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def make_dataloader(run) -> torch.utils.data.DataLoader:
    """This process's micro-batches, as `load_micro_batches` says; its workers live as long as an iterator."""
    args, accelerator = run.args, run.accelerator
    first_iteration = rollout_group(run.first_iteration, args).start
    return torch.utils.data.DataLoader(
        ImageCaptionDataset(run.dataset, args),
        batch_sampler=make_batch_sampler(
            run.dataset, args, accelerator.num_processes, accelerator.process_index, first_iteration
        ),
        collate_fn=collate_fn,
        num_workers=args.dataloader_num_workers,
        prefetch_factor=PREFETCH_FACTOR if args.dataloader_num_workers else None,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=leave_signals_alone,
        generator=make_generator(args.seed, "workers"),  # else it draws from the global one, which serves dropout
    )


def stream_micro_batches(run):
    """Yields what `make_dataloader`'s would, of a `Stream`, without end."""
    args, stream = run.args, run.dataset
    loader = torch.utils.data.DataLoader(
        StreamedImages(stream, args, run.first_iteration),
        batch_size=None,
        num_workers=stream.num_workers,
        prefetch_factor=PREFETCH_FACTOR * args.train_batch_size if stream.num_workers else None,
        worker_init_fn=leave_signals_alone,
        generator=make_generator(args.seed, "workers"),
    )
    items = (item for item in loader if item)
    while True:
        yield collate_fn(list(islice(items, args.train_batch_size)))


def load_micro_batches(run, save_checkpoint):
    """Yields this process's micro-batches, as `collate_fn` makes them, from the run's first iteration on.

    They are loaded by `rollout_group`, which is one iteration by default; from the first one of it, where the run is
    resumed among them.

    An image that does not decode ends the run, on all processes and with a checkpoint of the iterations before. With
    `--skip_bad_images` it is logged, and counted as `skipped_images` of its iteration, or of its group's first.

    Args:
        save_checkpoint: `output_utils`' function.

    Raises:
        ADTError: naming the image.
    """
    args, accelerator = run.args, run.accelerator
    loader, logged = stream_micro_batches(run) if args.streaming else iter(make_dataloader(run)), set()
    iteration = run.first_iteration
    while iteration < args.max_train_steps:  # which are done before it
        group = rollout_group(iteration, args)
        micro_batches = [next(loader) for _ in range(len(group) * args.gradient_accumulation_steps)]
        bad_images = [sentence for examples in micro_batches for sentence in examples["bad_images"]]
        counts = [len(bad_images), sum("pixel_values" not in examples for examples in micro_batches)]
        if accelerator.num_processes > 1:
            counts = accelerator.reduce(torch.tensor(counts, device=accelerator.device), reduction="sum").tolist()
        num_bad, num_without_image = counts
        if num_without_image:
            sentence = gather_object(bad_images)[0]
            if iteration > run.first_iteration:
                if iteration % args.checkpointing_steps:  # else there is one already
                    try:
                        save_checkpoint(iteration, run)
                    except ADTError as error:
                        raise ADTError(f"{sentence} {error}") from error
                sentence += f" The run ends with checkpoint-{iteration}."
            raise ADTError(f"{sentence} Mend the image, or have such images replaced by --skip_bad_images.")
        if args.skip_bad_images:
            for sentence in set(bad_images) - logged:
                logger.warning(f"{sentence} The next one stands in for it.", main_process_only=False)
            logged.update(bad_images)
            accelerator.log({"skipped_images": num_bad}, step=iteration + 1)
        if args.streaming:  # the iteration's checkpoint goes on behind it
            for examples in micro_batches:
                run.dataset.positions |= examples["behind"]
        while micro_batches:
            yield micro_batches.pop(0)
        iteration = group.stop


# What is checked of the images at a start


# How many images `--check_images sample` decodes.
SAMPLE_SIZE = 64


def check_used_images(dataset, first_iteration, args, accelerator):
    """Checks the images that a run will use as far as `--check_images` says; warns of empty captions.

    Of a stream the first rows alone are looked at. That images exist is looked up in any case, by the main process.
    Decoding is shared out over the processes. What a check of all images found is remembered in the datasets' cache.

    Raises:
        ADTError: on every process, naming an image; with `--skip_bad_images` there is a warning instead.
    """
    check_shared_memory(args)
    if args.streaming:
        check_first_rows(dataset, args, accelerator)
        return
    # From the beginning, where the run is resumed, too, so that a full check is remembered.
    used = make_batch_sampler(dataset, args, accelerator.num_processes).used_indices()
    bad_images, fingerprint = [], None
    if accelerator.is_main_process:
        num_empty = count_empty_captions(dataset, used, args)
        if num_empty:
            logger.warning(f"{num_empty} captions are empty; their images are trained on with the empty prompt.")
        bad_images, fingerprint = find_missing_images(dataset, used, args)
    bad_images, fingerprint = broadcast_object_list([bad_images, fingerprint])
    report_bad_images(bad_images, len(used), args)

    if args.check_images == "all":
        file = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE, "checked_images", fingerprint)
        report_bad_images(check_all_images(file, dataset, used, args, accelerator), len(used), args)
    elif args.check_images == "sample":
        generator = make_generator(args.seed, "check", first_iteration)
        to_decode = used[torch.randperm(len(used), generator=generator)[:SAMPLE_SIZE]]
        report_bad_images(find_bad_images(dataset, to_decode, args, accelerator), len(to_decode), args)


def check_all_images(file, dataset, indices, args, accelerator) -> list[str]:
    """`find_bad_images` of all, or what it found before: `file` has a line for each of them.

    What ended at the first bad image is not remembered.
    """
    bad_images = None
    if accelerator.is_main_process and file.is_file():
        bad_images = [json.loads(line) for line in file.read_text().splitlines()]
    bad_images = broadcast_object_list([bad_images])[0]
    if bad_images is not None:
        return bad_images
    bad_images = find_bad_images(dataset, indices, args, accelerator)
    if accelerator.is_main_process and (args.skip_bad_images or not bad_images):
        partial = file.with_name(f".{file.name}-partial")
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("".join(f"{json.dumps(sentence)}\n" for sentence in bad_images))
        partial.rename(file)
    return bad_images


def check_first_rows(stream, args, accelerator):
    """As `check_used_images`, of those rows of a stream that its main process comes to first."""
    bad_images, num_empty, rows = [], 0, []
    if accelerator.is_main_process:
        rows = stream.head(SAMPLE_SIZE if args.check_images == "sample" else 1)
        num_empty = sum(map(count_empty, (row[args.caption_column] for row in rows)))
        images = StreamedImages(stream, args, 0)
        for row in rows if args.check_images == "sample" else []:
            try:
                read_image(row, images.name(row), args)
            except ADTError as error:
                bad_images.append(str(error))
    if num_empty:
        logger.warning(
            f"Of the first {len(rows)} rows {num_empty} captions are empty, and trained on as empty prompts."
        )
    bad_images, num_rows = broadcast_object_list([bad_images, len(rows)])
    if num_rows == 0:
        raise ADTError("The dataset is empty.")
    report_bad_images(bad_images, num_rows, args)


def check_shared_memory(args):
    """Refuses workers that would die of too little shared memory once they run: a container has 64 MB by default."""
    folder = "/dev/shm"
    if args.dataloader_num_workers == 0 or not os.path.isdir(folder):
        return
    num_batches = args.dataloader_num_workers * PREFETCH_FACTOR + args.gradient_accumulation_steps
    pixels = max(height * width for height, width in image_sizes(args))
    needed = num_batches * args.train_batch_size * 3 * pixels * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ADTError(
            f"--dataloader_num_workers {args.dataloader_num_workers} needs {needed / 1e6:.0f} MB of shared memory, "
            f"and {folder} has {free / 1e6:.0f} MB: give the container more (docker run --shm-size), or take fewer."
        )


def count_empty_captions(dataset, indices, args) -> int:
    captions, count = dataset.select_columns(args.caption_column), 0
    for part in indices.split(10_000):
        count += sum(map(count_empty, captions[part.tolist()][args.caption_column]))
    return count


def count_empty(captions) -> int:
    """Of an image's captions."""
    captions = (captions or [""]) if isinstance(captions, list) else [captions]
    return sum(not (caption or "").strip() for caption in captions)


def find_missing_images(dataset, indices, args) -> tuple[list[str], str]:
    """Looks up the images' files; what is in the table itself is there.

    Returns:
        sentences on those that are missing or empty; a fingerprint of all the images by their files' names, sizes and
        times.
    """
    images = dataset.select_columns(args.image_column).flatten()  # into its bytes and its path
    digest = hashlib.sha256(f"{dataset._fingerprint} {args.image_column}".encode())
    digest.update(indices.numpy().tobytes())
    for file in dataset.cache_files:
        digest.update(repr(file_state(file["filename"])).encode())
    # By Arrow, which knows where bytes are without reading them; `_indices` are those of --max_train_samples.
    rows = indices.numpy() if images._indices is None else images._indices.column(0).to_numpy()[indices.numpy()]
    is_file = images.data.column(f"{args.image_column}.bytes").is_null().to_numpy()[rows]
    parts = [part.tolist() for part in indices[torch.from_numpy(is_file)].split(1000)]
    paths, column = images.select_columns(f"{args.image_column}.path"), f"{args.image_column}.path"

    def look_up(part):
        return [file_state(path) for path in paths[part][column]]

    bad_images = []
    with ThreadPoolExecutor(16) as pool:  # which wait for a file system
        for part, states in zip(parts, pool.map(look_up, parts), strict=True):
            digest.update(repr(states).encode())
            for index, (path, size, _) in zip(part, states, strict=True):
                if size == 0 and "://" not in (path or ""):
                    bad_images.append(f"{describe_image(index, path)} is missing or empty.")
    return bad_images, digest.hexdigest()


def file_state(path) -> tuple:
    """Path, size in bytes and time of change in nanoseconds; zeros where there is no file."""
    try:
        state = os.stat(path or "")
    except OSError:
        return path, 0, 0
    return path, state.st_size, state.st_mtime_ns


def find_bad_images(dataset, indices, args, accelerator) -> list[str]:
    """Decodes the images at `indices`, shared out over the processes.

    Returns:
        on every process, a sentence on each that fails; where none is skipped, of the first part that has such alone.
    """

    def check(index):
        try:
            read_image(dataset[index], index, args)
        except ADTError as error:
            return str(error)

    bad_images = []
    bar = tqdm(total=len(indices), desc="Checking images", leave=False, disable=not accelerator.is_local_main_process)
    with ThreadPoolExecutor(max(4, args.dataloader_num_workers)) as pool, bar:
        # In parts, after each of which the processes agree, since none should wait for long for the others.
        for part in indices.split(100 * accelerator.num_processes):
            own = part[accelerator.process_index :: accelerator.num_processes].tolist()
            bad_images += gather_object(list(filter(None, pool.map(check, own))))
            bar.update(len(part))
            if bad_images and not args.skip_bad_images:
                break
    return bad_images


def report_bad_images(bad_images, num_checked, args):
    if bad_images and not args.skip_bad_images:
        raise ADTError(bad_images[0])
    if bad_images:
        logger.warning(
            f"{len(bad_images)} of {num_checked} images are bad, and each time the next one stands in: {bad_images[0]}"
        )


# Text encoders that rest in CPU memory, and captions' embeddings on disk


class OnDevice:
    """A context in which networks that rest in CPU memory are on the device; it may be opened within itself.

    Their weights are copied there, and at the end the copies are dropped: nothing is copied back.
    """

    def __init__(self, networks, device):
        self.networks, self.device = networks, device
        self.depth, self.resting = 0, []

    def __enter__(self):
        self.depth += 1
        if self.depth == 1:
            tensors = [tensor for network in self.networks for tensor in (*network.parameters(), *network.buffers())]
            self.resting = [(tensor, tensor.data) for tensor in tensors]
            for tensor, data in self.resting:
                tensor.data = data.to(self.device, non_blocking=True)

    def __exit__(self, *error):
        self.depth -= 1
        if self.depth == 0:
            for tensor, data in self.resting:
                tensor.data = data
            self.resting = []


# How many captions a file holds, which is at most what a stopped run encodes again, and how many are encoded together.
CAPTIONS_PER_FILE = 100
CAPTIONS_PER_BATCH = 20


def list_captions(dataset, args) -> list[str]:
    """Every caption that a run may draw, once, and the empty one."""
    found = {""}
    for captions in dataset[args.caption_column]:
        found.update(caption or "" for caption in (captions if isinstance(captions, list) else [captions]))
    return sorted(found)


def fingerprint_text_encoders(tokenizers, text_encoders, *more) -> str:
    """Of all that an embedding depends on beside its prompt: tokenizers, weights, their precision, and `more`.

    By content: `datasets`' hash of the objects changes with the folder that they were loaded from.
    """
    digest = hashlib.sha256(repr(more).encode())
    for tokenizer in tokenizers:
        digest.update(f"{tokenizer.model_max_length} {tokenizer.pad_token}".encode())
        with tempfile.TemporaryDirectory() as directory:
            tokenizer.save_pretrained(directory)
            for file in sorted(Path(directory).iterdir()):
                if file.name != "tokenizer_config.json":  # it may name its folder
                    digest.update(file.read_bytes())
    for text_encoder in text_encoders:
        config = json.loads(text_encoder.config.to_json_string(use_diff=False))
        for name in ("_name_or_path", "dtype", "torch_dtype", "transformers_version"):
            config.pop(name, None)
        digest.update(json.dumps(config, sort_keys=True).encode())
        for name, value in sorted(text_encoder.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


class EmbeddingCache:
    """Captions' embeddings in Arrow files of a folder, made by `datasets.Dataset.map` and read by memory map.

    A file's name has the fingerprint of what its captions were encoded by. What such files have is not made again; the
    processes share out what is missing.

    Args:
        directory: the folder.
        captions: all that will be read.
        encode: (B captions) to a dict of (B, ...) tensors.
        fingerprint: of the encoders, see `fingerprint_text_encoders`.
        like: what `encode` gives for one caption: the shapes and precisions.
        reserved: bytes of the same disk that the run will take for other things.

    Raises:
        ADTError: if a file is damaged, or not seen by all processes, or there is too little space for what is missing.
    """

    def __init__(self, directory, captions, encode, fingerprint, like, accelerator, reserved=0):
        self.directory, self.fingerprint, self.like = Path(directory), fingerprint[:16], like
        self.directory.mkdir(parents=True, exist_ok=True)
        self.open_files()
        missing = [caption for caption in captions if caption not in self.row_of]
        needed = len(missing) * sum(value.nbytes for value in like.values())
        free = shutil.disk_usage(self.directory).free
        # It waits for all, too: else some would see what others have made already.
        if not all(gather_object([not missing or needed + reserved <= free])):
            more = f"checkpoints and the result {reserved / 1e9:.1f} GB of the same disk, " if reserved else ""
            raise ADTError(
                f"--cache_text_embeddings {directory} needs {needed / 1e9:.1f} GB for {len(missing)} captions, {more}"
                f"and {free / 1e9:.1f} GB are free."
            )
        parts = [missing[first : first + CAPTIONS_PER_FILE] for first in range(0, len(missing), CAPTIONS_PER_FILE)]
        own = parts[accelerator.process_index :: accelerator.num_processes]
        datasets.disable_progress_bars()  # one bar, and one process's
        for part in tqdm(own, desc="Encoding captions", disable=not accelerator.is_local_main_process or not own):
            self.make_file(part, encode)
        datasets.enable_progress_bars()
        accelerator.wait_for_everyone()
        self.open_files()
        if not all(gather_object([all(caption in self.row_of for caption in captions)])):
            raise ADTError(f"--cache_text_embeddings {directory} must be on a file system that all processes share.")

    def make_file(self, captions, encode):
        name = hashlib.sha256(json.dumps(captions).encode()).hexdigest()[:16]

        def encode_rows(captions):
            # As bytes, since Arrow has no bfloat16.
            return {
                name: [row.view(torch.uint8).numpy().tobytes() for row in values.cpu()]
                for name, values in encode(captions).items()
            }

        embeddings = {name: datasets.Value("large_binary") for name in self.like}
        datasets.Dataset.from_dict({"caption": captions}).map(
            encode_rows,
            input_columns="caption",
            batched=True,
            batch_size=CAPTIONS_PER_BATCH,
            features=datasets.Features({"caption": datasets.Value("string")} | embeddings),
            cache_file_name=str(self.directory / f"embeddings-{self.fingerprint}-{name}.arrow"),
            new_fingerprint=name,
            writer_batch_size=50,  # rows that are held in memory; one of SD3's has 2.7 MB
        )

    def open_files(self):
        parts = []
        for file in sorted(self.directory.glob(f"embeddings-{self.fingerprint}-*.arrow")):
            try:
                parts.append(datasets.Dataset.from_file(str(file)))
            except (pyarrow.ArrowException, OSError) as error:
                raise ADTError(f"--cache_text_embeddings {file} is damaged: delete it. {error}") from error
        self.rows = datasets.concatenate_datasets(parts) if parts else None
        # By what the files say, not by what they should hold.
        captions = [caption for part in parts for caption in part["caption"][:]]
        self.row_of = {caption: row for row, caption in enumerate(captions)}

    def read(self, captions) -> dict:
        """The captions' embeddings on the CPU, dict of (B, ...)."""
        rows = [self.rows[self.row_of[caption]] for caption in captions]
        return concatenate(
            [
                {
                    name: torch.frombuffer(bytearray(row[name]), dtype=value.dtype).view(value.shape)
                    for name, value in self.like.items()
                }
                for row in rows
            ]
        )

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
- the data set: `load_image_caption_dataset`, `identify_data`, `check_dataset`;
- images and captions: `transform_image`, `choose_caption`, `ImageCaptionDataset`;
- their order: `GlobalBatchSampler`, `make_dataloader`;
- captions' embeddings on disk: `EmbeddingCache`.
"""

import hashlib
import json
import os
import signal
import tempfile
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from training_utils import ADTError, concatenate


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


# The data set


def load_image_caption_dataset(args) -> datasets.Dataset:
    """Loads the train split and checks its columns; images stay undecoded.

    Raises:
        ADTError: if it cannot be read, is empty or lacks a column.
    """
    try:
        if args.dataset_name is not None:
            loaded = datasets.load_dataset(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir)
        else:
            loaded = datasets.load_dataset("imagefolder", data_dir=args.train_data_dir, cache_dir=args.cache_dir)
    except Exception as error:  # of a dozen kinds, pyarrow's and the Hub's among them
        name = args.dataset_name or args.train_data_dir
        raise ADTError(f"The dataset {name} cannot be read: {error.__cause__ or error}") from error
    if "train" not in loaded:
        raise ADTError(f"The dataset has no train split, only {', '.join(loaded)}.")
    dataset = loaded["train"]
    for option in ("image_column", "caption_column"):
        if getattr(args, option) not in dataset.column_names:
            raise ADTError(
                f"--{option} {getattr(args, option)} is not a column of the dataset, which has "
                f"{', '.join(dataset.column_names)}."
            )
    if not isinstance(dataset.features[args.image_column], datasets.Image):
        raise ADTError(f"--image_column {args.image_column} does not hold images.")
    if len(dataset) == 0:
        raise ADTError("The dataset is empty.")
    if args.max_train_samples is not None and args.max_train_samples < len(dataset):
        order = torch.randperm(len(dataset), generator=make_generator(args.seed, "samples"))
        dataset = dataset.select(sorted(order[: args.max_train_samples].tolist()))
    return dataset.cast_column(args.image_column, datasets.Image(decode=False))


def identify_data(dataset, args) -> dict:
    """What tells the rows from others, wherever they lie: their number, captions, and images by name and size.

    Images are not read: of files the base name and the size count, of embedded ones the number of bytes, too.

    Returns:
        `images`, their number, and `captions` and `files`, digests.
    """
    table = dataset.data  # as it is stored: rows would bring the images along
    image_column = table.column(args.image_column)
    paths = pyarrow.compute.struct_field(image_column, "path").to_pylist()
    sizes = pyarrow.compute.binary_length(pyarrow.compute.struct_field(image_column, "bytes")).to_pylist()

    def describe(first):
        found = []
        for path, size in zip(paths[first : first + 1000], sizes[first : first + 1000], strict=True):
            if size is None and path is not None and os.path.exists(path):
                size = os.path.getsize(path)
            found.append((os.path.basename(path or ""), size))
        return found

    with ThreadPoolExecutor(16) as pool:  # a network's file system answers each after a while
        files = list(pool.map(describe, range(0, len(paths), 1000)))
    captions = table.column(args.caption_column).to_pylist()
    return {"images": len(dataset), "captions": digest_of(captions), "files": digest_of(files)}


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


def check_dataset(dataset, indices, args) -> int:
    """Decodes the images at `indices` and looks at their captions. Returns how many captions are empty.

    Raises:
        ADTError: naming the first image that does not decode, or a caption that is no text.
    """

    def check(index):
        row = dataset[index]
        record = row[args.image_column]
        name = f"image {index} of the dataset" + (f" ({record['path']})" if record and record["path"] else "")
        if record is None:
            raise ADTError(f"The {name} is missing.")
        try:
            open_image(record)
        except Exception as error:  # PIL raises half a dozen kinds, SyntaxError among them
            raise ADTError(f"The {name} does not decode: {error}") from error
        captions = row[args.caption_column]
        captions = (captions or [""]) if isinstance(captions, list) else [captions]
        if not all(caption is None or isinstance(caption, str) for caption in captions):
            raise ADTError(
                f"The caption of {name} in column {args.caption_column} is neither text nor a list of texts."
            )
        return sum(not (caption or "").strip() for caption in captions)

    with ThreadPoolExecutor(max(4, args.dataloader_num_workers)) as pool:
        return sum(tqdm(pool.map(check, indices), total=len(indices), desc="Checking images", leave=False))


def check_used_images(dataset, first_iteration, args, accelerator):
    """`check_dataset` for the images that the run will use, shared out over the processes; warns of empty captions."""
    sampler = GlobalBatchSampler(len(dataset), args, accelerator.num_processes, accelerator.process_index)
    batch_size = sampler.global_batch_size
    positions = range(first_iteration * batch_size, args.max_train_steps * batch_size)
    # The rest of an epoch, and a whole one.
    used = sorted({sampler.dataset_index(n) for n in positions[: 2 * len(dataset)]})
    num_empty = check_dataset(dataset, used[accelerator.process_index :: accelerator.num_processes], args)
    num_empty = int(accelerator.reduce(torch.tensor(num_empty, device=accelerator.device), reduction="sum"))
    if num_empty:
        logger.warning(f"{num_empty} captions are empty; their images are trained on with the empty prompt.")


# Images and captions


def transform_image(image, generator, args):
    """Resizes, flips and crops as the diffusers examples do, with three draws from `generator`.

    Returns:
        pixel values (3, resolution, resolution) in [-1, 1], and the crop's top left corner (y, x) in the resized
        image as it was cropped, which is mirrored if the crop is.
    """
    u_flip, u_top, u_left = torch.rand(3, generator=generator).tolist()
    short = min(image.size)
    size = [args.resolution * side // short for side in image.size]
    image = image.resize(size, Image.Resampling[args.image_interpolation_mode.upper()])
    if args.random_flip and u_flip < 0.5:
        image = ImageOps.mirror(image)
    spare_left, spare_top = (side - args.resolution for side in size)
    if args.center_crop:
        left, top = round(spare_left / 2), round(spare_top / 2)
    else:
        left, top = int(u_left * (spare_left + 1)), int(u_top * (spare_top + 1))
    image = image.crop((left, top, left + args.resolution, top + args.resolution))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1, (top, left)


def choose_caption(captions, generator) -> str:
    """One of several captions; the empty prompt where there is none."""
    if isinstance(captions, list):
        captions = captions[int(torch.rand(1, generator=generator).item() * len(captions))] if captions else ""
    return captions or ""


class ImageCaptionDataset(torch.utils.data.Dataset):
    """Images and captions by `(dataset index, iteration, position in the global batch)`.

    An item has `pixel_values` (3, resolution, resolution) in [-1, 1], `caption`, `position`, the image's
    `original_size` (height, width) and its `crop_top_left` (y, x). Crop, flip and the choice among several captions
    are drawn from the seed, the iteration and the position.
    """

    def __init__(self, dataset, args):
        self.dataset = dataset
        self.args = args

    def __getitem__(self, key):
        index, iteration, position = key
        row = self.dataset[index]
        generator = make_generator(self.args.seed, "image", iteration, position)
        image = open_image(row[self.args.image_column])
        pixel_values, crop_top_left = transform_image(image, generator, self.args)
        return {
            "pixel_values": pixel_values,
            "caption": choose_caption(row[self.args.caption_column], generator),
            "position": position,
            "original_size": (image.height, image.width),
            "crop_top_left": crop_top_left,
        }


def collate_fn(examples):
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "captions": [example["caption"] for example in examples],
        "positions": [example["position"] for example in examples],
        "original_sizes": torch.tensor([example["original_size"] for example in examples]),
        "crop_top_lefts": torch.tensor([example["crop_top_left"] for example in examples]),
    }


# Their order


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
        return torch.randperm(self.dataset_size, generator=make_generator(self.args.seed, "epoch", epoch)).tolist()

    def dataset_index(self, n):
        epoch, offset = divmod(n, self.dataset_size)
        return self.permutation(epoch)[offset]

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
    """This process's micro-batches, from the run's first iteration on."""
    args, accelerator = run.args, run.accelerator
    return torch.utils.data.DataLoader(
        ImageCaptionDataset(run.dataset, args),
        batch_sampler=GlobalBatchSampler(
            len(run.dataset), args, accelerator.num_processes, accelerator.process_index, run.first_iteration
        ),
        collate_fn=collate_fn,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=leave_signals_alone,
    )


# Captions' embeddings on disk


# How many captions a file holds: what a process encodes at a time, and at most what a stopped run encodes again.
CAPTIONS_PER_FILE = 100


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
        encode: (caption) to a dict of (1, ...) tensors.
        fingerprint: of the encoders, see `fingerprint_text_encoders`.
        like: what `encode` gives for any caption: the shapes and precisions.

    Raises:
        ADTError: if a file is damaged, or not seen by all processes.
    """

    def __init__(self, directory, captions, encode, fingerprint, like, accelerator):
        self.directory, self.fingerprint, self.like = Path(directory), fingerprint[:16], like
        self.directory.mkdir(parents=True, exist_ok=True)
        self.open_files()
        missing = [caption for caption in captions if caption not in self.row_of]
        accelerator.wait_for_everyone()  # else some would see what others have made already
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

        def encode_row(caption):
            # As bytes, since Arrow has no bfloat16.
            return {name: value.cpu().view(torch.uint8).numpy().tobytes() for name, value in encode(caption).items()}

        embeddings = {name: datasets.Value("large_binary") for name in self.like}
        datasets.Dataset.from_dict({"caption": captions}).map(
            encode_row,
            input_columns="caption",
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

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
"""Aspect ratio buckets: the sizes at which images that are not square are trained on and drawn."""

import argparse
from collections import Counter

from diffusers import training_utils as diffusers_training
from diffusers.training_utils import parse_buckets_string
from diffusers.utils import make_image_grid
from PIL import ImageOps


# A multiple of what any of the networks here divides its images' sides by, down to its smallest feature map.
STEP = 64
BUCKET = "aspect_ratio_bucket"  # a dataset's column: the index in `image_sizes(args)`, -1 for what is not used
HAS_DEFAULT_BUCKETS = hasattr(diffusers_training, "generate_aspect_ratio_buckets")  # diffusers 0.42


def buckets_of(text) -> str:
    """A `type=` function: `height,width;height,width`, of which an image takes the nearest shape."""
    try:
        buckets = parse_buckets_string(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be like 512,512;448,576, not {text}: {error}") from None
    if len(set(buckets)) < len(buckets):
        raise argparse.ArgumentTypeError(f"names a size twice: {text}")
    return write_buckets(buckets)


def write_buckets(buckets) -> str:
    return ";".join(f"{height},{width}" for height, width in buckets)


def default_buckets(resolution) -> str:
    """Shapes from 1:2 to 2:1, each with about `resolution ** 2` pixels and sides that are multiples of `STEP`."""
    return write_buckets(diffusers_training.generate_aspect_ratio_buckets(resolution, divisibility=STEP))


def image_sizes(args) -> list[tuple[int, int]]:
    """(height, width) of each bucket; of the square where there are none."""
    if args.use_aspect_ratio_buckets:
        return parse_buckets_string(args.aspect_ratio_buckets)
    return [(args.resolution, args.resolution)]


def drawn_sizes(dataset, args) -> list[tuple[int, int]]:
    """(height, width) that images are drawn at, in turn: of the buckets that have images, the fullest first.

    Args:
        dataset: with the column `BUCKET`, where there are buckets.
    """
    sizes = image_sizes(args)
    if not args.use_aspect_ratio_buckets:
        return sizes
    counts = Counter(dataset[BUCKET][:])
    return [sizes[bucket] for bucket in sorted(range(len(sizes)), key=lambda n: -counts[n]) if counts[bucket] > 0]


def make_padded_grid(images, rows):
    """A grid of PIL images, row after row; each stands in the corner of a white field of the largest one's sides."""
    width, height = (max(image.size[side] for image in images) for side in (0, 1))
    fields = [ImageOps.expand(image, (0, 0, width - image.width, height - image.height), "white") for image in images]
    return make_image_grid(fields, rows=rows, cols=len(images) // rows)


def describe_sizes(args) -> str:
    """What a model card says of them, behind a sentence; nothing where images are square."""
    if not args.use_aspect_ratio_buckets:
        return ""
    sizes = ", ".join(f"{height}x{width}" for height, width in image_sizes(args))
    return (
        f"\nImages were trained on at the size (height x width) of the nearest shape: {sizes}.\nThe call has "
        "the one that most of them had."
    )

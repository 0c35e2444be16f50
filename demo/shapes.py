"""Two 32x32 image distributions that share their captions.

`flat` draws a flat-colour shape on a flat background. `shaded` draws the same things striped, lit from the upper left,
with a highlight, a soft shadow and a background that falls off to the corners. A model trained on `flat` therefore
knows what a prompt means and has to learn only what `shaded` looks like.

    python demo/shapes.py demo/data/shaded --distribution shaded --count 4000
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image


RESOLUTION = 32
DISTRIBUTIONS = ("flat", "shaded")
SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "large")
COLORS = {
    "red": (0.86, 0.13, 0.13),
    "green": (0.13, 0.66, 0.20),
    "blue": (0.15, 0.35, 0.90),
    "yellow": (0.96, 0.84, 0.10),
    "purple": (0.60, 0.20, 0.75),
    "orange": (0.96, 0.52, 0.08),
}
BACKGROUNDS = {
    "white": (0.94, 0.94, 0.94),
    "gray": (0.52, 0.52, 0.52),
    "navy": (0.07, 0.09, 0.26),
    "pink": (0.96, 0.72, 0.79),
}
# What a caption says, in the order of the columns of `draw`'s attributes.
ATTRIBUTES = {"size": SIZES, "color": tuple(COLORS), "shape": SHAPES, "background": tuple(BACKGROUNDS)}

# Corners, inner radius and circumradius of each shape, relative to a circle of about the same area. Between two
# neighbouring corners the outline is two straight lines that meet at the inner radius.
_CORNERS = np.array([0, 4, 3, 5])
_INNER = np.array([1.0, np.cos(np.pi / 4), np.cos(np.pi / 3), 0.5])
_CIRCUMRADIUS = np.array([1.0, 1.22, 1.42, 1.42])
_FIRST_CORNER = np.array([0.0, np.pi / 4, 0.0, 0.0])  # a square stands on its side, the others on their base
_RADIUS = np.array([5.5, 9.5])  # pixels, by size
_JITTER = np.array([5.0, 2.0])  # pixels, by size: the whole shape stays inside the image


def _signed_distance(x, y, shape, radius):
    """Signed distance in pixels, about, negative inside. `x`, `y`: `(N, 32, 32)`; `shape`, `radius`: `(N, 1, 1)`."""
    corners = np.maximum(_CORNERS[shape], 1)
    outer = radius * _CIRCUMRADIUS[shape]
    inner = outer * _INNER[shape]
    distance = np.hypot(x, y)
    # Fold the plane into half a corner's sector, where the outline is one line from (outer, 0) to the inner point.
    angle = np.arctan2(x, -y) + _FIRST_CORNER[shape]
    sector = 2 * np.pi / corners
    angle = np.abs((angle + sector / 2) % sector - sector / 2)
    folded_x, folded_y = distance * np.cos(angle), distance * np.sin(angle)
    edge_x, edge_y = inner * np.cos(sector / 2) - outer, inner * np.sin(sector / 2)
    line = ((folded_x - outer) * edge_y - folded_y * edge_x) / np.hypot(edge_x, edge_y)
    # Far beyond a sharp corner the line alone is too near.
    return np.where(_CORNERS[shape] == 0, distance - radius, np.maximum(line, distance - outer))


def draw(distribution, count, seed):
    """Draw `count` captioned images.

    Args:
        distribution: `"flat"` or `"shaded"`. The same seed gives both the same captions, shapes and positions.
        count: number of images `N`.
        seed: integer; the result depends on the arguments alone.

    Returns:
        images, uint8 `(N, 32, 32, 3)`; captions, a list of `N` strings such as `"a small red circle on a pink
        background"`; attributes, a dict that maps each key of `ATTRIBUTES` to its class indices, int64 `(N,)`.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, got {distribution!r}")
    rng = np.random.default_rng(seed)
    attributes = {name: rng.integers(len(values), size=count) for name, values in ATTRIBUTES.items()}
    captions = [
        f"a {SIZES[s]} {ATTRIBUTES['color'][c]} {SHAPES[k]} on a {ATTRIBUTES['background'][b]} background"
        for s, c, k, b in zip(*attributes.values())
    ]

    def column(low, high):
        return rng.uniform(low, high, (count, 1, 1))

    size = attributes["size"].reshape(-1, 1, 1)
    shape = attributes["shape"].reshape(-1, 1, 1)
    radius = _RADIUS[size] * column(0.92, 1.08)
    center_x = RESOLUTION / 2 + _JITTER[size] * column(-1, 1)
    center_y = RESOLUTION / 2 + _JITTER[size] * column(-1, 1)
    rotation = column(-np.pi / 12, np.pi / 12)
    color = np.array(list(COLORS.values()))[attributes["color"]] + rng.uniform(-0.04, 0.04, (count, 3))
    background = np.array(list(BACKGROUNDS.values()))[attributes["background"]] + rng.uniform(-0.03, 0.03, (count, 3))
    stripe_phase = column(0, 2 * np.pi)

    pixel_y, pixel_x = np.mgrid[:RESOLUTION, :RESOLUTION] + 0.5
    x, y = pixel_x - center_x, pixel_y - center_y
    cos, sin = np.cos(rotation), np.sin(rotation)
    body = color[:, None, None]
    canvas = background[:, None, None]
    if distribution == "shaded":
        light = -(x + y) / (np.sqrt(2) * radius)  # 1 at the rim that faces the light, -1 at the opposite one
        stripes = np.sin(2 * np.pi * (x * cos + y * sin - 0.6 * (y * cos - x * sin)) / 10 + stripe_phase)
        highlight = np.exp(-((x + 0.4 * radius) ** 2 + (y + 0.4 * radius) ** 2) / (0.3 * radius) ** 2)
        body = body * (0.8 + 0.3 * light + 0.3 * stripes)[..., None]
        body = body + 0.75 * highlight[..., None] * (1 - body)

        corner = np.hypot(pixel_x - RESOLUTION / 2, pixel_y - RESOLUTION / 2) / RESOLUTION
        shadow_x, shadow_y = x - 0.3 * radius, y - 0.3 * radius
        shadow = _signed_distance(shadow_x * cos + shadow_y * sin, shadow_y * cos - shadow_x * sin, shape, radius)
        falloff = (1.08 - 0.75 * corner**2) * (1 - 0.5 / (1 + np.exp(shadow)))
        canvas = canvas * falloff[..., None]
    # One pixel of linear coverage across the outline is the anti-aliasing.
    coverage = np.clip(0.5 - _signed_distance(x * cos + y * sin, y * cos - x * sin, shape, radius), 0, 1)[..., None]
    images = coverage * body + (1 - coverage) * canvas
    return np.round(255 * np.clip(images, 0, 1)).astype(np.uint8), captions, attributes


def write_imagefolder(directory, distribution, count, seed):
    """Write `draw(distribution, count, seed)` as PNGs and a `metadata.jsonl` with `file_name` and `text` columns.

    `datasets.load_dataset("imagefolder", data_dir=directory)` reads the result. `directory` must not be there yet, or
    be empty; it appears whole or not at all.
    """
    directory = Path(directory)
    partial = directory.with_name(f".{directory.name}-partial")
    partial.mkdir(parents=True, exist_ok=True)
    images, captions, _ = draw(distribution, count, seed)
    with open(partial / "metadata.jsonl", "w") as metadata:
        for index, (image, caption) in enumerate(zip(images, captions)):
            file_name = f"{index:06d}.png"
            Image.fromarray(image).save(partial / file_name)
            metadata.write(json.dumps({"file_name": file_name, "text": caption}) + "\n")
    partial.rename(directory)


def parse_args():
    parser = argparse.ArgumentParser(description="Write captioned images of one distribution as an image folder.")
    parser.add_argument("directory")
    parser.add_argument("--distribution", choices=DISTRIBUTIONS, default="shaded")
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    write_imagefolder(args.directory, args.distribution, args.count, args.seed)

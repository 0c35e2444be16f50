"""Seven 32x32 image distributions on the same captions.

A model of `flat`, flat-coloured shapes on flat backgrounds, knows what a prompt means and has to learn what another
world looks like:

    shaded      striped and lit from the upper left, with a highlight, a soft shadow and darker corners
    lines       outlined, hatched shapes on grainy paper
    glow        a bright core, a dark rim, and a halo on the background
    palette     flat, in other colours for the same words
    geometry    flat, but turned, stretched and hollow
    correlated  as `shaded`, but that most shapes of a colour are on the same background

    python demo/worlds.py demo/data/lines --world lines --count 4000
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from shapes import BACKGROUNDS, COLORS, RESOLUTION, sample_scenes, signed_distance


# The same words in muted, warmer tones. No two are alike, and no background is like a colour.
PALETTE_COLORS = {
    "red": (0.55, 0.16, 0.24),
    "green": (0.42, 0.52, 0.22),
    "blue": (0.24, 0.45, 0.58),
    "yellow": (0.82, 0.68, 0.30),
    "purple": (0.42, 0.27, 0.46),
    "orange": (0.76, 0.42, 0.24),
}
PALETTE_BACKGROUNDS = {
    "white": (0.93, 0.89, 0.78),
    "gray": (0.60, 0.57, 0.50),
    "navy": (0.16, 0.15, 0.20),
    "pink": (0.86, 0.66, 0.58),
}
CORRELATED_SHARE = 0.85  # of shapes that are on their colour's background in `correlated`
HOLE = 0.45  # the inner outline's radius over the outer one's, in `geometry`
PIXEL_Y, PIXEL_X = np.mgrid[:RESOLUTION, :RESOLUTION] + 0.5


def colors_of(scenes, colors=COLORS, backgrounds=BACKGROUNDS):
    """The shapes' and the backgrounds' colours, `(N, 1, 1, 3)` each, in [0, 1] but for rounding."""
    color = np.array(list(colors.values()))[scenes.attributes["color"]] + scenes.color_shift
    background = np.array(list(backgrounds.values()))[scenes.attributes["background"]] + scenes.background_shift
    return color[:, None, None], background[:, None, None]


def local_coordinates(scenes, shift=0.0, turn=0.0):
    """`x`, `y` `(N, 32, 32)` of the pixels in the axes of the shape, whose centre is moved by `shift` radii."""
    x = PIXEL_X - scenes.center_x - shift * scenes.radius
    y = PIXEL_Y - scenes.center_y - shift * scenes.radius
    cos, sin = np.cos(scenes.rotation + turn), np.sin(scenes.rotation + turn)
    return x * cos + y * sin, y * cos - x * sin


def outline(scenes, shift=0.0):
    """Signed distance to the outline in pixels `(N, 32, 32)`, negative inside."""
    return signed_distance(*local_coordinates(scenes, shift), scenes.shape, scenes.radius)


def covered(distance):
    """The share of each pixel inside of an outline, `(N, 32, 32, 1)`: linear over one pixel, so anti-aliased."""
    return np.clip(0.5 - distance, 0, 1)[..., None]


def mix(share, inside, outside):
    return share * inside + (1 - share) * outside


def draw_flat(scenes):
    body, ground = colors_of(scenes)
    return mix(covered(outline(scenes)), body, ground)


def draw_shaded(scenes):
    body, ground = colors_of(scenes)
    radius = scenes.radius
    x, y = PIXEL_X - scenes.center_x, PIXEL_Y - scenes.center_y
    light = -(x + y) / (np.sqrt(2) * radius)  # 1 at the rim that faces the light, -1 at the opposite one
    along, across = local_coordinates(scenes)
    stripes = np.sin(2 * np.pi * (along - 0.6 * across) / 10 + scenes.phase)
    highlight = np.exp(-((x + 0.4 * radius) ** 2 + (y + 0.4 * radius) ** 2) / (0.3 * radius) ** 2)
    body = body * (0.8 + 0.3 * light + 0.3 * stripes)[..., None]
    body = body + 0.75 * highlight[..., None] * (1 - body)

    corner = np.hypot(PIXEL_X - RESOLUTION / 2, PIXEL_Y - RESOLUTION / 2) / RESOLUTION
    falloff = (1.08 - 0.75 * corner**2) * (1 - 0.5 / (1 + np.exp(outline(scenes, shift=0.3))))
    return mix(covered(outline(scenes)), body, ground * falloff[..., None])


def draw_lines(scenes):
    color, paper = colors_of(scenes)
    grain = scenes.rng.normal(0, 0.035, (len(color), RESOLUTION, RESOLUTION, 1))
    paper = paper + grain
    along, across = local_coordinates(scenes)
    hatch = 0.5 + 0.5 * np.sin(2 * np.pi * (along + across) / 5 + scenes.phase)
    body = mix(hatch[..., None], color, mix(0.45, color, paper))
    distance = outline(scenes)
    pen = covered(np.abs(distance) - 0.75)
    return mix(pen, 0.25 * color, mix(covered(distance), body, paper))


def draw_glow(scenes):
    color, ground = colors_of(scenes)
    distance = outline(scenes)
    depth = np.clip(-distance / (0.8 * scenes.radius), 0, 1)[..., None]  # 0 at the rim, 1 in the core
    core = np.clip((depth - 0.5) / 0.5, 0, 1) ** 1.5
    body = mix(0.8 * core, 1.0, color * (0.45 + 0.75 * depth))
    halo = 0.6 * np.exp(-np.maximum(distance, 0) / 3)[..., None]
    return mix(covered(distance), body, mix(halo, color, 0.85 * ground))


def draw_palette(scenes):
    body, ground = colors_of(scenes, PALETTE_COLORS, PALETTE_BACKGROUNDS)
    return mix(covered(outline(scenes)), body, ground)


def draw_geometry(scenes):
    body, ground = colors_of(scenes)
    x, y = local_coordinates(scenes, turn=np.pi / 8)
    x, y = x / 1.15, y * 1.15  # of the same area
    outer = signed_distance(x, y, scenes.shape, scenes.radius)
    inner = signed_distance(x, y, scenes.shape, HOLE * scenes.radius)
    return mix(covered(np.maximum(outer, -inner)), body, ground)


def correlate(attributes, rng):
    """Puts most shapes of a colour on one background; the others keep theirs."""
    own = attributes["color"] % len(BACKGROUNDS)
    is_own = rng.random(len(own)) < CORRELATED_SHARE
    return attributes | {"background": np.where(is_own, own, attributes["background"])}


# How each is drawn, and what becomes of independent attributes.
WORLDS = {
    "flat": (draw_flat, None),
    "shaded": (draw_shaded, None),
    "lines": (draw_lines, None),
    "glow": (draw_glow, None),
    "palette": (draw_palette, None),
    "geometry": (draw_geometry, None),
    "correlated": (draw_shaded, correlate),
}


def draw(world, count, seed):
    """Draws `count` captioned images.

    Args:
        world: a key of `WORLDS`. The same seed gives all but `correlated` the same captions, shapes and positions.
        count: number of images `N`.
        seed: integer; the result depends on the arguments alone.

    Returns:
        images, uint8 `(N, 32, 32, 3)`; captions, a list of `N` strings such as `"a small red circle on a pink
        background"`; attributes, a dict that maps each key of `ATTRIBUTES` to its class indices, int64 `(N,)`.

    Raises:
        ValueError: for an unknown world.
    """
    if world not in WORLDS:
        raise ValueError(f"world must be one of {', '.join(WORLDS)}, not {world!r}")
    render, attributes = WORLDS[world]
    scenes = sample_scenes(count, seed, attributes)
    images = render(scenes)
    return np.round(255 * np.clip(images, 0, 1)).astype(np.uint8), scenes.captions, scenes.attributes


def write_imagefolder(directory, world, count, seed):
    """Writes `draw(world, count, seed)` as PNGs and a `metadata.jsonl` with `file_name` and `text` columns.

    `datasets.load_dataset("imagefolder", data_dir=directory)` reads the result. `directory` must not be there yet, or
    be empty; it appears whole or not at all.
    """
    directory = Path(directory)
    partial = directory.with_name(f".{directory.name}-partial")
    partial.mkdir(parents=True, exist_ok=True)
    images, captions, _ = draw(world, count, seed)
    with open(partial / "metadata.jsonl", "w") as metadata:
        for index, (image, caption) in enumerate(zip(images, captions)):
            file_name = f"{index:06d}.png"
            Image.fromarray(image).save(partial / file_name)
            metadata.write(json.dumps({"file_name": file_name, "text": caption}) + "\n")
    partial.rename(directory)


def parse_args():
    parser = argparse.ArgumentParser(description="Write captioned images of one world as an image folder.")
    parser.add_argument("directory")
    parser.add_argument("--world", choices=WORLDS, default="shaded")
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    write_imagefolder(args.directory, args.world, args.count, args.seed)

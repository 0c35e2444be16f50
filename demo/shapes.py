"""What the demo's images show: captioned scenes of one shape, which `worlds.py` draws in one look or another."""

from dataclasses import dataclass

import numpy as np


RESOLUTION = 32
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
# What a caption says, in the order in which its attributes are drawn.
ATTRIBUTES = {"size": SIZES, "color": tuple(COLORS), "shape": SHAPES, "background": tuple(BACKGROUNDS)}

# Corners, inner radius and circumradius of each shape, relative to a circle of about the same area. Between two
# neighbouring corners the outline is two straight lines that meet at the inner radius.
_CORNERS = np.array([0, 4, 3, 5])
_INNER = np.array([1.0, np.cos(np.pi / 4), np.cos(np.pi / 3), 0.5])
_CIRCUMRADIUS = np.array([1.0, 1.22, 1.42, 1.42])
_FIRST_CORNER = np.array([0.0, np.pi / 4, 0.0, 0.0])  # a square stands on its side, the others on their base
_RADIUS = np.array([5.5, 9.5])  # pixels, by size
_JITTER = np.array([5.0, 2.0])  # pixels, by size: the whole shape stays inside the image


def signed_distance(x, y, shape, radius):
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


@dataclass
class Scenes:
    """`N` scenes; positions and lengths are in pixels, and arrays `(N, 1, 1)` where nothing else is said."""

    attributes: dict  # each key of `ATTRIBUTES` to its class indices, int64 (N,)
    radius: np.ndarray
    center_x: np.ndarray
    center_y: np.ndarray
    rotation: np.ndarray  # radians
    color_shift: np.ndarray  # (N, 3), to be added to the colour of the shape, as the next to the background's
    background_shift: np.ndarray  # (N, 3)
    phase: np.ndarray  # of a pattern
    rng: np.random.Generator  # for what a look draws beside all this

    @property
    def captions(self) -> list[str]:
        """Such as "a small red circle on a pink background"."""
        names = [[values[index] for index in self.attributes[key]] for key, values in ATTRIBUTES.items()]
        return [f"a {size} {color} {shape} on a {ground} background" for size, color, shape, ground in zip(*names)]

    @property
    def shape(self) -> np.ndarray:
        """Indices into `SHAPES`."""
        return self.attributes["shape"].reshape(-1, 1, 1)


def sample_scenes(count, seed, attributes=None) -> Scenes:
    """Draws `count` scenes, all attributes independent of each other; the result depends on the arguments alone.

    Args:
        attributes: `(attributes, generator)` to the attributes, to change them.
    """
    rng = np.random.default_rng(seed)
    drawn = {name: rng.integers(len(values), size=count) for name, values in ATTRIBUTES.items()}
    if attributes is not None:
        drawn = attributes(drawn, np.random.default_rng([seed, 1]))

    def column(low, high):
        return rng.uniform(low, high, (count, 1, 1))

    size = drawn["size"].reshape(-1, 1, 1)
    return Scenes(
        drawn,
        radius=_RADIUS[size] * column(0.92, 1.08),
        center_x=RESOLUTION / 2 + _JITTER[size] * column(-1, 1),
        center_y=RESOLUTION / 2 + _JITTER[size] * column(-1, 1),
        rotation=column(-np.pi / 12, np.pi / 12),
        color_shift=rng.uniform(-0.04, 0.04, (count, 3)),
        background_shift=rng.uniform(-0.03, 0.03, (count, 3)),
        phase=column(0, 2 * np.pi),
        rng=rng,
    )

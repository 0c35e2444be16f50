"""A small classifier of the demo's images, independent of the discriminator: it judges what was trained."""

import torch
from safetensors.torch import load_file
from shapes import ATTRIBUTES
from torch import nn
from torch.nn import functional as F


DEMO_WORLDS = ("flat", "shaded")  # that the demo's models know


class Evaluator(nn.Module):
    """A convolutional classifier; `forward` gives its penultimate features, for a Fréchet distance.

    It tells apart what a caption says, the keys of `ATTRIBUTES`, and as "style" which of `worlds` an image is from.
    """

    def __init__(self, worlds=DEMO_WORLDS, num_features=64):
        super().__init__()
        blocks = []
        for in_channels, out_channels in ((3, 32), (32, 64), (64, 96), (96, 96)):
            blocks += [
                nn.Conv2d(in_channels, out_channels, kernel_size=4, stride=2, padding=1),
                nn.GroupNorm(8, out_channels),
                nn.SiLU(),
            ]
        self.backbone = nn.Sequential(*blocks, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, num_features))
        classes = {**ATTRIBUTES, "style": worlds}
        self.heads = nn.ModuleDict({name: nn.Linear(num_features, len(values)) for name, values in classes.items()})

    def forward(self, images):
        """Features `(N, 64)` of `images`, float `(N, 3, 32, 32)` in [0, 1]."""
        return self.backbone(2 * images - 1)

    def logits(self, images):
        """A dict that maps each key of `ATTRIBUTES`, and "style", to logits `(N, number of classes)` of `images`."""
        features = F.silu(self(images))
        return {name: head(features) for name, head in self.heads.items()}


def load_evaluator(path, worlds=DEMO_WORLDS):
    """The `Evaluator` of `worlds` in float32 and `eval()` mode, from the safetensors file at `path`."""
    evaluator = Evaluator(worlds)
    evaluator.load_state_dict({name: tensor.to(torch.float32) for name, tensor in load_file(path).items()})
    return evaluator.requires_grad_(False).eval()

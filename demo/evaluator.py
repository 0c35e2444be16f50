"""A small classifier of the demo's images, independent of the discriminator: it judges what was trained."""

import torch
from safetensors.torch import load_file
from shapes import ATTRIBUTES, DISTRIBUTIONS
from torch import nn
from torch.nn import functional as F


# What the classifier tells apart: what a caption says, and which distribution the image is from.
CLASSES = {**ATTRIBUTES, "style": DISTRIBUTIONS}


class Evaluator(nn.Module):
    """A convolutional classifier; `forward` gives its penultimate features, for a Fréchet distance."""

    def __init__(self, num_features=64):
        super().__init__()
        blocks = []
        for in_channels, out_channels in ((3, 32), (32, 64), (64, 96), (96, 96)):
            blocks += [
                nn.Conv2d(in_channels, out_channels, kernel_size=4, stride=2, padding=1),
                nn.GroupNorm(8, out_channels),
                nn.SiLU(),
            ]
        self.backbone = nn.Sequential(*blocks, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, num_features))
        self.heads = nn.ModuleDict({name: nn.Linear(num_features, len(values)) for name, values in CLASSES.items()})

    def forward(self, images):
        """Features `(N, 64)` of `images`, float `(N, 3, 32, 32)` in [0, 1]."""
        return self.backbone(2 * images - 1)

    def logits(self, images):
        """A dict that maps each key of `CLASSES` to logits `(N, number of classes)`, of the same `images`."""
        features = F.silu(self(images))
        return {name: head(features) for name, head in self.heads.items()}


def load_evaluator(path):
    """The trained `Evaluator` in float32 and `eval()` mode, from the safetensors file at `path`."""
    evaluator = Evaluator()
    evaluator.load_state_dict({name: tensor.to(torch.float32) for name, tensor in load_file(path).items()})
    return evaluator.requires_grad_(False).eval()

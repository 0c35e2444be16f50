"""Runs `benchmarks/bench_iteration.py` with the smallest networks, here or under torchrun.

torchrun --nproc_per_node 2 tests/bench_processes.py --shard OPTIONS...
"""

import contextlib
import sys
from pathlib import Path
from unittest import mock


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import bench_iteration  # noqa: E402


LEAST = {"norm_num_groups": 4, "layers_per_block": 1, "block_out_channels": (8,) * 4}
UNET = LEAST | {
    "cross_attention_dim": 8, "attention_head_dim": 2, "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",),
}  # fmt: skip
DINOV2 = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
OPTIONS = ("--family", "sd15", "--num_steps", "3", "--num_gradient_steps", "2", "--discriminator_layers", "0")


@contextlib.contextmanager
def smallest_models():
    with (
        mock.patch.dict(bench_iteration.SMALL, sd15=(UNET, 64, {"prompt_embeds": (3, 8)})),
        mock.patch.multiple(bench_iteration, SMALL_VAE=LEAST, SMALL_DINOV2=DINOV2),
    ):
        yield


def run(*options):
    with smallest_models():
        bench_iteration.main([*OPTIONS, *options])


if __name__ == "__main__":
    run(*sys.argv[1:])

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
"""Regresses the mean colour of one image: the shortest loop around `ConstrainedPipeline`, a minute on a CPU.

    python examples/one_colour.py --output one_colour.png

The picture shows the image before, the image after, and the colour that its mean was sent to.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import make_image_grid
from diffusers.utils.torch_utils import randn_tensor


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adt_pipeline import ConstrainedPipeline  # noqa: E402


def parse_args(arguments=None):
    parser = argparse.ArgumentParser(description="Sends the mean colour of one image to another one.")
    parser.add_argument("--pretrained_model_name_or_path", default=str(ROOT / "demo" / "assets" / "pipeline"))
    parser.add_argument("--prompt", default="a large red circle on a white background")
    parser.add_argument("--color", type=float, nargs=3, default=[-0.5, 0.3, 0.5], help="red, green, blue in [-1, 1].")
    parser.add_argument("--max_train_steps", type=int, default=30)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--output", default="one_colour.png")
    return parser.parse_args(arguments)


def main(args):
    torch.manual_seed(0)
    pipeline = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    tunable = ConstrainedPipeline(pipeline, num_gradient_steps=3)
    optimizer = torch.optim.AdamW(pipeline.unet.parameters(), lr=args.learning_rate)
    color = torch.tensor(args.color)
    side = pipeline.unet.config.sample_size
    latents = randn_tensor((1, pipeline.unet.config.in_channels, side, side))

    def run(call, **options):
        return call(args.prompt, latents=latents, num_inference_steps=args.num_inference_steps, **options)

    before, losses = run(pipeline).images[0], []
    for step in range(args.max_train_steps):
        images = run(tunable)
        loss = (images.mean(dim=(2, 3)) - color).square().mean()
        tunable.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"{step + 1:3d} of {args.max_train_steps}: loss {losses[-1]:.4f}")
    after = run(pipeline).images[0]
    target = pipeline.image_processor.postprocess(color.view(1, 3, 1, 1).expand(1, 3, *before.size))[0]
    make_image_grid([before, after, target], 1, 3, resize=192).save(args.output)
    return losses


if __name__ == "__main__":
    main(parse_args())

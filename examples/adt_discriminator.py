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
"""ADT's discriminator on a pipeline of one's own: low-rank adapters of SDXL, SD3, FLUX.1, Qwen-Image or Z-Image.

    python examples/adt_discriminator.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \
        --train_data_dir photos --output_dir flux-adt

`photos` has a `metadata.jsonl` whose lines read `{"file_name": "0001.png", "text": "a caption"}`. One process, and the
adversarial part alone: the training scripts add the diffusion loss, its balance, checkpoints and all the rest.
"""

import argparse
import inspect
import json
import random
import sys
from pathlib import Path

import torch
from diffusers import AutoPipelineForImage2Image
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageOps
from transformers import Dinov2Model


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from adt_pipeline import ConstrainedPipeline  # noqa: E402
from adt_utils import (  # noqa: E402
    DiffAugment,
    FeatureNetwork,
    SiameseDiscriminator,
    discriminator_loss,
    generator_loss,
    update_spectral_norm,
)


def parse_args(arguments=None):
    parser = argparse.ArgumentParser(description="Tunes a pipeline against ADT's siamese discriminator.")
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--discriminator_model_name_or_path", default="facebook/dinov2-small")
    parser.add_argument("--discriminator_layers", type=int, nargs="+", default=[-1, 2, 5, 8, 11])
    parser.add_argument("--discriminator_resolution", type=int, default=518)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--train_batch_size", type=int, default=2)
    parser.add_argument("--max_train_steps", type=int, default=1000)
    parser.add_argument("--generator_update_interval", type=int, default=5)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--discriminator_learning_rate", type=float, default=1e-4)
    parser.add_argument("--num_inference_steps", type=int, default=28)
    parser.add_argument("--output_dir", default="adt-discriminator")
    return parser.parse_args(arguments)


def load_batch(rows, args, pipeline):
    """Random images (B, 3, H, W) in [-1, 1], and their captions."""
    batch, size = random.choices(rows, k=args.train_batch_size), (args.resolution,) * 2
    images = [Image.open(Path(args.train_data_dir, row["file_name"])).convert("RGB") for row in batch]
    images = pipeline.image_processor.preprocess([ImageOps.fit(image, size) for image in images], *size)
    return images.to(pipeline.device), [row["text"] for row in batch]


def main(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = torch.bfloat16 if device == "cuda" else torch.float32
    pipeline = AutoPipelineForImage2Image.from_pretrained(args.pretrained_model_name_or_path, dtype=weights).to(device)
    pipeline.set_progress_bar_config(disable=True)
    tunable = ConstrainedPipeline(pipeline, num_gradient_steps=3)
    network = tunable.denoiser.requires_grad_(False)
    network.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    network.enable_gradient_checkpointing()
    adapters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in adapters:  # an update of bfloat16 weights would be rounded away
        parameter.data = parameter.data.float()

    dinov2 = Dinov2Model.from_pretrained(args.discriminator_model_name_or_path)
    feature_network = FeatureNetwork(dinov2, args.discriminator_layers, args.discriminator_resolution).to(device)
    discriminator = SiameseDiscriminator(feature_network.channels, len(args.discriminator_layers)).to(device).eval()
    augment = DiffAugment()
    trained = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=args.learning_rate)
    discriminator_optimizer = torch.optim.AdamW(trained, lr=args.discriminator_learning_rate)

    def features(images):
        return feature_network(augment(images.float(), torch.rand(len(images), DiffAugment.NUM_PARAMETERS)))

    rows = [json.loads(line) for line in Path(args.train_data_dir, "metadata.jsonl").read_text().splitlines()]
    accepted = inspect.signature(pipeline.__call__).parameters
    size = {name: args.resolution for name in ("height", "width") if name in accepted}
    steps, scores = args.num_inference_steps, []
    for iteration in range(1, args.max_train_steps + 1):
        images, prompts = load_batch(rows, args, pipeline)
        updates_generator = iteration % args.generator_update_interval == 0
        with torch.set_grad_enabled(updates_generator):
            generated = tunable(
                prompts, image=images / 2 + 0.5, strength=min(1.0, (random.randint(1, steps) + 0.5) / steps),
                num_inference_steps=steps, **size,
            )  # fmt: skip
        update_spectral_norm(discriminator)
        with torch.no_grad():
            real, reference, fake = features(images), features(images), features(generated)
        loss = discriminator_loss(discriminator(real, reference), discriminator(fake, reference))
        discriminator_optimizer.zero_grad()
        loss.backward()
        discriminator_optimizer.step()
        discriminator.update_twin()
        scores.append({"discriminator_loss": loss.item()})
        if updates_generator:
            loss = generator_loss(discriminator(features(generated), features(images)))
            tunable.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            scores[-1]["generator_loss"] = loss.item()
        print(f"{iteration} of {args.max_train_steps}:", scores[-1])
    layers = {f"{tunable.name}_lora_layers": get_peft_model_state_dict(network)}
    pipeline.save_lora_weights(args.output_dir, **layers)
    return scores


if __name__ == "__main__":
    main(parse_args())

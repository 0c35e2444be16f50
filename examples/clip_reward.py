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
"""An own reward: low-rank adapters of Stable Diffusion that raise the CLIP score of its images.

    python examples/clip_reward.py --prompts "a lighthouse at dusk" "an old sailor" --output_dir sd15-clip

A score alone is soon fooled: look at the images, and keep the run short or the learning rate low.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from adt_pipeline import ConstrainedPipeline  # noqa: E402


def parse_args(arguments=None):
    parser = argparse.ArgumentParser(description="Raises the CLIP score of Stable Diffusion's images.")
    parser.add_argument("--pretrained_model_name_or_path", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
    parser.add_argument("--clip_model_name_or_path", default="openai/clip-vit-large-patch14")
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--train_batch_size", type=int, default=2)
    parser.add_argument("--max_train_steps", type=int, default=200)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--output_dir", default="clip-reward")
    return parser.parse_args(arguments)


def clip_score(model, tokenizer, images, prompts):
    """Cosines (B,) of the embeddings of images, (B, 3, H, W) in about [-1, 1], and of their prompts."""
    size = (model.config.vision_config.image_size,) * 2
    images = F.interpolate(images.float(), size, mode="bicubic", antialias=True) / 2 + 0.5
    mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    tokens = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(images.device)
    outputs = model(**tokens, pixel_values=(images - mean) / std)
    return F.cosine_similarity(outputs.image_embeds, outputs.text_embeds)


def main(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, safety_checker=None).to(device)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)  # PNDM is refused
    pipeline.unet.requires_grad_(False)
    pipeline.unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    pipeline.unet.enable_gradient_checkpointing()
    pipeline.vae.enable_gradient_checkpointing()
    tunable = ConstrainedPipeline(pipeline, num_gradient_steps=3)
    clip = CLIPModel.from_pretrained(args.clip_model_name_or_path).requires_grad_(False).eval().to(device)
    tokenizer = CLIPTokenizer.from_pretrained(args.clip_model_name_or_path)
    optimizer = torch.optim.AdamW([p for p in pipeline.unet.parameters() if p.requires_grad], lr=args.learning_rate)
    scores = []
    for step in range(args.max_train_steps):
        prompts = random.choices(args.prompts, k=args.train_batch_size)
        images = tunable(prompts, num_inference_steps=args.num_inference_steps)
        score = clip_score(clip, tokenizer, images, prompts).mean()
        tunable.backward(-score)
        optimizer.step()
        optimizer.zero_grad()
        scores.append(score.item())
        print(f"{step + 1} of {args.max_train_steps}: CLIP score {scores[-1]:.4f}")
    pipeline.save_lora_weights(args.output_dir, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    return scores


if __name__ == "__main__":
    main(parse_args())

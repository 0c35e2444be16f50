"""Train the demo's models from nothing, on two CPU cores, in about 40 minutes.

    python demo/make_assets.py                     # all that the SD1.5 demo needs, then measure it
    python demo/make_assets.py --only unet         # one of them again
    python demo/make_assets.py --only              # measure what is there
    python demo/make_assets.py --only sd3          # the SD3 demo's pipeline, which is not in the repository
    python demo/make_assets.py --only flux         # the FLUX demo's, neither

It writes, under `--output_dir`:
    pipeline    a tiny `StableDiffusionPipeline` that draws the `flat` distribution of `shapes.py` from a caption;
                its VAE also knows `shaded`, since it stays frozen when the UNet is tuned
    sd3         a tiny `StableDiffusion3Pipeline` that draws the same, with the same VAE and without T5
    flux        a tiny `FluxPipeline` that draws the same, with the same VAE, for guidance by a negative prompt
    dinov2      a tiny `Dinov2Model` for the discriminator
    evaluator   the classifier of `evaluator.py`, for the metrics
    worlds      for `reproduce.py` (`--only worlds`, 20 minutes): a VAE and a classifier that know all worlds
                (`--only tiny_decoder`, a minute: a small decoder of that VAE's latents)
    resnet      for `reproduce_related.py` (`--only resnet`, a minute): a tiny classifier of the class `ResNetModel`
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from evaluator import DEMO_WORLDS, Evaluator, load_evaluator
from safetensors.torch import save_file
from shapes import ATTRIBUTES, RESOLUTION
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    T5Config,
    T5EncoderModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from worlds import WORLDS, draw


STAGES = ("vae", "unet", "evaluator", "dinov2")
NAMED = ("sd3", "worlds", "resnet", "tiny_decoder", "flux")  # only where they are named
LOOKS = tuple(world for world in WORLDS if world != "correlated")  # which looks like `shaded`
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "assets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=[*STAGES, *NAMED], default=STAGES, help="The VAE is first.")
    parser.add_argument("--vae_steps", type=int, default=1600)
    parser.add_argument("--unet_steps", type=int, default=2500)
    parser.add_argument("--evaluator_steps", type=int, default=1500)
    parser.add_argument("--dinov2_steps", type=int, default=1200)
    parser.add_argument("--sd3_steps", type=int, default=2500)
    parser.add_argument("--flux_steps", type=int, default=2000)
    parser.add_argument("--worlds_steps", type=int, default=1500)
    parser.add_argument("--resnet_steps", type=int, default=800)
    parser.add_argument("--tiny_decoder_steps", type=int, default=1000)
    return parser.parse_args()


def load_images(worlds, count, seed):
    """Float images `(N, 3, 32, 32)` in [0, 1], captions, and the class indices that `Evaluator` tells, `(N,)` each."""
    images, captions, labels = [], [], {name: [] for name in (*ATTRIBUTES, "style")}
    for index, world in enumerate(worlds):
        pixels, texts, attributes = draw(world, count, seed + index)
        images.append(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
        captions += texts
        for name in ATTRIBUTES:
            labels[name].append(torch.from_numpy(attributes[name]))
        labels["style"].append(torch.full((count,), index))
    return torch.cat(images), captions, {name: torch.cat(values) for name, values in labels.items()}


def train(name, model, loss_function, num_items, steps, learning_rate, batch_size=64):
    """Minimises `loss_function(indices of a batch)` over `num_items` items; `model` ends with the averaged weights."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(f"{name}: {sum(parameter.numel() for parameter in parameters):,} parameters, {steps} steps", flush=True)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-3)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, min(100, steps // 10), steps)
    ema = EMAModel(parameters, decay=0.995)
    model.train()
    start, losses = time.time(), []
    for step in range(1, steps + 1):
        loss = loss_function(torch.randint(num_items, (batch_size,)))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        ema.step(parameters)
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            print(f"{name}: step {step}, loss {np.mean(losses[-100:]):.4f}, {time.time() - start:.0f} s", flush=True)
    ema.copy_to(parameters)
    model.eval()


def train_vae(output_dir, steps, seed):
    images, _, _ = load_images(DEMO_WORLDS, 10000, seed)
    images = 2 * images - 1
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=8,  # 32x32 images have little redundancy: with 4 their stripes are lost
        norm_num_groups=8,
        sample_size=RESOLUTION,
    )
    with torch.no_grad():
        # Start with a posterior of standard deviation 0.05, rather than 1, under which hardly anything is learnt.
        vae.quant_conv.weight[vae.config.latent_channels :] = 0
        vae.quant_conv.bias[vae.config.latent_channels :] = -6

    def loss_function(indices):
        batch = images[indices]
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        return F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch) + 5e-6 * posterior.kl().mean()

    train("vae", vae, loss_function, len(images), steps, learning_rate=2e-3, batch_size=32)
    with torch.no_grad():
        latents = vae.encode(images[::10]).latent_dist.mean
    print(f"vae: latent mean {latents.mean():.3f}, std {latents.std():.3f}")
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.half().save_pretrained(output_dir / "pipeline" / "vae")


def build_tokenizer():
    """A `CLIPTokenizer` for which each word of a caption is one token; any other word becomes shorter pieces."""
    characters = list(bytes_to_unicode().values())
    merges = []
    for word in ["background", "on", "a", *(value for values in ATTRIBUTES.values() for value in values)]:
        # Earlier words' merges come first in byte-pair encoding, so a word's own merges join what those leave.
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            position = 0
            while position < len(pieces) - 1:
                if (pieces[position], pieces[position + 1]) == pair:
                    pieces[position : position + 2] = ["".join(pair)]
                position += 1
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
    tokens = [*characters, *(character + "</w>" for character in characters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16)


def load_flat(output_dir, seed, **changes):
    """What a text-to-image network trains on: `flat`, by the VAE that is there and a new tokenizer.

    Args:
        changes: of the VAE's configuration.

    Returns:
        the VAE; scaled latents (N, C, h, w); the tokenizer; the token ids of the empty prompt (1, L) and of the
        captions (N, L).
    """
    vae = AutoencoderKL.from_pretrained(output_dir / "pipeline" / "vae", **changes).eval()
    vae.register_to_config(_name_or_path="")  # it is saved again, and where it lay is nobody's business
    images, captions, _ = load_images(["flat"], 20000, seed)
    with torch.no_grad():
        latents = torch.cat([vae.encode(2 * batch - 1).latent_dist.mean for batch in images.split(500)])
    tokenizer = build_tokenizer()
    token_ids = tokenizer(["", *captions], padding="max_length", return_tensors="pt").input_ids
    return vae, latents * vae.config.scaling_factor, tokenizer, token_ids[:1], token_ids[1:]


def clip_config(tokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_unet(output_dir, steps, seed):
    """Trains the UNet and the text encoder on `flat`, with the VAE that is there, and writes the whole pipeline."""
    vae, latents, tokenizer, empty_ids, caption_ids = load_flat(output_dir, seed)
    text_encoder = CLIPTextModel(clip_config(tokenizer))
    unet = UNet2DConditionModel(
        sample_size=latents.shape[-1],
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=(64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    scheduler = PNDMScheduler(  # Stable Diffusion 1.5's
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    )

    def loss_function(indices):
        dropped = torch.rand(len(indices), 1) < 0.1
        prompt_embeds = text_encoder(torch.where(dropped, empty_ids, caption_ids[indices])).last_hidden_state
        noise = torch.randn_like(latents[indices])
        timesteps = torch.randint(1000, (len(indices),))
        noisy_latents = scheduler.add_noise(latents[indices], noise, timesteps)
        return F.mse_loss(unet(noisy_latents, timesteps, prompt_embeds).sample, noise)

    train("unet", nn.ModuleList([unet, text_encoder]), loss_function, len(latents), steps, learning_rate=1e-3)
    # The text encoder stays in float32: transformers, unlike diffusers, would load half precision as such.
    StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(output_dir / "pipeline")


def train_sd3(output_dir, steps, seed):
    """Trains a rectified-flow transformer and its text encoders on `flat`, with the VAE that is there."""
    # The VAE has no `shift_factor`, which SD3's have: 0 says the same.
    vae, latents, tokenizer, empty_ids, caption_ids = load_flat(output_dir, seed, shift_factor=0.0)
    config = clip_config(tokenizer)
    text_encoders = nn.ModuleList(CLIPTextModelWithProjection(config) for _ in range(2))
    transformer = SD3Transformer2DModel(
        sample_size=latents.shape[-1],
        patch_size=2,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=6,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=96,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    def loss_function(indices):
        dropped = torch.rand(len(indices), 1) < 0.1
        tokens = torch.where(dropped, empty_ids, caption_ids[indices])
        outputs = [text_encoder(tokens, output_hidden_states=True) for text_encoder in text_encoders]
        clip_embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        # One zero token stands for T5's, as the pipeline has it with `max_sequence_length=1`.
        prompt_embeds = F.pad(clip_embeds, (0, 0, 0, 1))
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        noise = torch.randn_like(latents[indices])
        positions = (torch.randn(len(indices)).sigmoid() * 1000).long()
        sigma = scheduler.sigmas[positions].view(-1, 1, 1, 1)
        noisy_latents = (1 - sigma) * latents[indices] + sigma * noise
        velocity = transformer(noisy_latents, prompt_embeds, pooled, scheduler.timesteps[positions]).sample
        return F.mse_loss(velocity, noise - latents[indices])

    train("sd3", nn.ModuleList([transformer, text_encoders]), loss_function, len(latents), steps, learning_rate=1e-3)
    StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=text_encoders[0],
        text_encoder_2=text_encoders[1],
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        transformer=transformer,
        scheduler=scheduler,
    ).save_pretrained(output_dir / "sd3")


def train_flux(output_dir, steps, seed):
    """Trains a FLUX transformer and its text encoders on `flat`, with the VAE that is there; no distilled guidance."""
    vae, latents, tokenizer, empty_ids, caption_ids = load_flat(output_dir, seed, shift_factor=0.0)
    count, channels, height, width = latents.shape
    packed = FluxPipeline._pack_latents(latents, count, channels, height, width)
    places = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)
    clip = CLIPTextModel(clip_config(tokenizer))
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4 * channels, num_layers=3, num_single_layers=3, attention_head_dim=24,
        num_attention_heads=4, joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(4, 10, 10),
        guidance_embeds=False,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    def loss_function(indices):
        dropped = torch.rand(len(indices), 1) < 0.1
        tokens = torch.where(dropped, empty_ids, caption_ids[indices])
        noise = torch.randn_like(packed[indices])
        positions = (torch.randn(len(indices)).sigmoid() * 1000).long()
        sigma = scheduler.sigmas[positions].view(-1, 1, 1)
        velocity = transformer(
            hidden_states=(1 - sigma) * packed[indices] + sigma * noise,
            timestep=scheduler.timesteps[positions] / 1000,
            encoder_hidden_states=t5(tokens)[0],
            pooled_projections=clip(tokens).pooler_output,
            txt_ids=torch.zeros(tokens.shape[1], 3),
            img_ids=places,
        ).sample
        return F.mse_loss(velocity, noise - packed[indices])

    networks = nn.ModuleList([transformer, clip, t5])
    train("flux", networks, loss_function, count, steps, learning_rate=1e-3, batch_size=32)
    FluxPipeline(
        vae=vae,
        text_encoder=clip,
        text_encoder_2=t5,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        transformer=transformer,
        scheduler=scheduler,
    ).save_pretrained(output_dir / "flux")


def augment(images):
    """Changes contrast and brightness a little and adds noise, so that a classifier does not rely on exact pixels."""
    contrast = 1 + 0.2 * (torch.rand(len(images), 1, 1, 1) - 0.5)
    brightness = 0.1 * (torch.rand(len(images), 1, 1, 1) - 0.5)
    return images * contrast + brightness + 0.02 * torch.randn_like(images)


def train_classifier(name, model, logits, steps, learning_rate, seed, worlds=DEMO_WORLDS):
    """Trains `model` so that `logits(images)`, a dict, tells what `load_images` labels, and prints how well."""
    images, _, labels = load_images(worlds, 10000, seed)

    def loss_function(indices):
        predictions = logits(augment(images[indices]))
        return sum(F.cross_entropy(predictions[key], labels[key][indices]) for key in predictions)

    train(name, model, loss_function, len(images), steps, learning_rate)
    images, _, labels = load_images(worlds, 1000, seed + 10)
    with torch.no_grad():
        predictions = logits(images)
    accuracies = {key: (predictions[key].argmax(1) == labels[key]).float().mean().item() for key in predictions}
    print(f"{name}: accuracy on new images", {key: round(value, 3) for key, value in accuracies.items()}, flush=True)


def train_evaluator(output_dir, steps, seed, worlds=DEMO_WORLDS):
    evaluator = Evaluator(worlds)
    train_classifier("evaluator", evaluator, evaluator.logits, steps, 2e-3, seed, worlds)
    (output_dir / "evaluator").mkdir(parents=True, exist_ok=True)
    save_file(evaluator.half().state_dict(), output_dir / "evaluator" / "model.safetensors")


def train_worlds(output_dir, steps, seed):
    """What `reproduce.py` needs beside: an evaluator of all looks, and a VAE that can draw them.

    That VAE goes on from the demo's. Its latents of `flat` are held to what they were, so that the UNet, which has
    seen no others, still fits.
    """
    train_evaluator(output_dir / "worlds", steps, seed, LOOKS)
    vae = AutoencoderKL.from_pretrained(output_dir / "pipeline" / "vae")
    original = copy.deepcopy(vae).requires_grad_(False)
    images = 2 * load_images(LOOKS, 6000, seed)[0] - 1

    def loss_function(indices):
        batch = images[torch.cat([indices, torch.randint(6000, (8,))])]  # the first 6000 are `flat`
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        held = F.mse_loss(posterior.mean[-8:], original.encode(batch[-8:]).latent_dist.mean)
        return F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch) + 5e-6 * posterior.kl().mean() + 0.1 * held

    train("vae of all worlds", vae, loss_function, len(images), steps, learning_rate=1e-3, batch_size=32)
    vae.register_to_config(_name_or_path="")
    vae.half().save_pretrained(output_dir / "worlds" / "vae")


def train_dinov2(output_dir, steps, seed):
    backbone = Dinov2Model(
        Dinov2Config(
            image_size=RESOLUTION,
            patch_size=4,
            hidden_size=96,
            num_hidden_layers=6,
            num_attention_heads=3,
            mlp_ratio=2,
        )
    )
    classes = {**ATTRIBUTES, "style": DEMO_WORLDS}
    heads = nn.ModuleDict({key: nn.Linear(2 * 96, len(values)) for key, values in classes.items()})

    def logits(images):
        tokens = backbone((images - IMAGENET_MEAN) / IMAGENET_STD).last_hidden_state
        # The mean over patches is there because the discriminator looks at each patch, not at the CLS token alone.
        features = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
        return {key: head(features) for key, head in heads.items()}

    train_classifier("dinov2", nn.ModuleList([backbone, heads]), logits, steps, 1e-3, seed)
    backbone.save_pretrained(output_dir / "dinov2")


def train_resnet(output_dir, steps, seed):
    """The classifier whose features the diffusion-GAN hybrid's discriminator looks at."""
    backbone = ResNetModel(
        ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic")
    )
    classes = {**ATTRIBUTES, "style": DEMO_WORLDS}
    heads = nn.ModuleDict({key: nn.Linear(64, len(values)) for key, values in classes.items()})

    def logits(images):
        features = backbone((images - IMAGENET_MEAN) / IMAGENET_STD).pooler_output.flatten(1)
        return {key: head(features) for key, head in heads.items()}

    train_classifier("resnet", nn.ModuleList([backbone, heads]), logits, steps, 1e-3, seed)
    backbone.save_pretrained(output_dir / "resnet")


def train_tiny_decoder(output_dir, steps, seed):
    """A tiny autoencoder whose decoder draws what the VAE of all worlds draws of its latents, scaled as TAESD's are.

    Its encoder is as small as the class allows, and not trained: nothing uses it.
    """
    vae = AutoencoderKL.from_pretrained(output_dir / "worlds" / "vae").eval()
    tiny = AutoencoderTiny(
        latent_channels=vae.config.latent_channels,
        encoder_block_out_channels=(1, 1, 1),
        decoder_block_out_channels=(24, 24, 24),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(2, 2, 1),
    )
    tiny.encoder.requires_grad_(False)
    images = 2 * load_images(LOOKS, 600, seed)[0] - 1
    with torch.no_grad():
        latents = torch.cat([vae.encode(batch).latent_dist.sample() for batch in images.split(200)])
        targets = torch.cat([vae.decode(batch).sample for batch in latents.split(200)])
    latents = latents * vae.config.scaling_factor

    def loss_function(indices):
        return F.l1_loss(tiny.decode(latents[indices]).sample, targets[indices])

    train("tiny decoder", tiny, loss_function, len(images), steps, learning_rate=3e-3, batch_size=16)
    tiny.half().save_pretrained(output_dir / "worlds" / "tiny_decoder")


@torch.no_grad()
def measure(output_dir, seed, count=1000):
    """Prints what the saved pipeline reconstructs and draws, as the saved evaluator sees it."""
    pipeline = StableDiffusionPipeline.from_pretrained(output_dir / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    # `clip_sample` would clip the latents' prediction to [-1, 1]; it is on by default and has no meaning here.
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    evaluator = load_evaluator(output_dir / "evaluator" / "model.safetensors")
    real, captions, labels = load_images(DEMO_WORLDS, count, seed)
    flat, shaded = real.split(count)

    def decode(images):
        latents = pipeline.vae.encode(2 * images - 1).latent_dist.mean
        return (pipeline.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)

    def frechet_distance(images, reference):
        a, b = (((evaluator(x) - features.mean(0)) / features.std(0)).double() for x in (images, reference))
        cross = np.linalg.eigvals((a.T.cov() @ b.T.cov()).numpy())
        traces = a.T.cov().trace() + b.T.cov().trace() - 2 * np.sqrt(np.maximum(cross.real, 0)).sum()
        return ((a.mean(0) - b.mean(0)).square().sum() + traces).item()

    features = evaluator(real)
    sampling = {"num_inference_steps": 10, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(seed)}
    batches = [captions[i : i + 100] for i in range(0, count, 100)]
    samples = torch.cat([pipeline(batch, **sampling, output_type="pt").images for batch in batches])
    predictions = {key: logits.argmax(1) for key, logits in evaluator.logits(samples).items()}
    followed = {key: (predictions[key] == labels[key][:count]).float().mean().item() for key in predictions}
    decoded_flat, decoded_shaded = decode(flat), decode(shaded)
    print("VAE, mean absolute error in [0, 1]:")
    print(f"  flat {(decoded_flat - flat).abs().mean():.4f}, shaded {(decoded_shaded - shaded).abs().mean():.4f}")
    print("samples of the base pipeline, DDIM 10, guidance 3, share that follows the prompt:")
    print(" ", {key: round(value, 3) for key, value in followed.items()})
    print("Fréchet distance on standardised features:")
    print(f"  flat, decoded from its latents {frechet_distance(decoded_flat, flat):.3f}")
    print(f"  shaded, decoded from its latents {frechet_distance(decoded_shaded, shaded):.3f}")
    print(f"  samples to flat {frechet_distance(samples, flat):.3f}")
    print(f"  samples to shaded {frechet_distance(samples, shaded):.3f}")
    print(f"  flat to shaded {frechet_distance(flat, shaded):.3f}")


def main():
    args = parse_args()
    trainers = {"vae": train_vae, "unet": train_unet, "evaluator": train_evaluator, "dinov2": train_dinov2}
    trainers |= {"sd3": train_sd3, "worlds": train_worlds, "resnet": train_resnet, "tiny_decoder": train_tiny_decoder}
    trainers |= {"flux": train_flux}
    for index, (stage, trainer) in enumerate(trainers.items()):
        if stage in args.only:
            seed = 1000 * args.seed + 100 * index
            torch.manual_seed(seed)
            trainer(args.output_dir, getattr(args, f"{stage}_steps"), seed)
    needed = ("pipeline/model_index.json", "evaluator/model.safetensors")
    if list(args.only) not in (["sd3"], ["flux"]) and all((args.output_dir / name).exists() for name in needed):
        measure(args.output_dir, 1000 * args.seed + 900)


if __name__ == "__main__":
    main()

"""Tiny random-weight models of the real classes and tiny data sets, for the tests; every build gives the same bits."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)


# SD1.5's, which has no `clip_sample`: DDIM's own default would clip the latents.
SD15_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
SDXL_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
COLORS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "grey": (128, 128, 128)}
SHAPES = ("square", "disc", "stripes")


def make_tokenizer(max_length=12):
    """A `CLIPTokenizer` that knows lower-case ASCII, each character alone and at the end of a word."""
    characters = [chr(code) for code in range(33, 127)]
    tokens = characters + [f"{character}</w>" for character in characters] + ["re", "red</w>"]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[("r", "e"), ("re", "d</w>")],
        model_max_length=max_length,
    )


def make_unet():
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def make_vae(scaling_factor=0.18215, **options):
    """Images of 2n x 2n from latents of n x n."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=16,
        scaling_factor=scaling_factor,
        **options,
    )


def make_tiny_decoder(directory, levels=2):
    """Saves a tiny `AutoencoderTiny` for `make_vae`'s latents; returns the path as a string."""
    shape = {f"{part}_block_out_channels": (8,) * levels for part in ("encoder", "decoder")}
    shape |= {f"num_{part}_blocks": (1,) * levels for part in ("encoder", "decoder")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        AutoencoderTiny(**shape).save_pretrained(directory)
    return str(directory)


def make_text_encoder(tokenizer, model_class=CLIPTextModel, hidden_size=32):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=64,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = model_class(config)
    with torch.no_grad():
        # CLIP's 0.02 is for trained models: at random the embeddings would differ by the position alone.
        for name, parameter in model.named_parameters():
            if "token_embedding" in name:
                parameter.normal_()
    return model


def make_sd15(directory, prediction_type="epsilon", zero_snr=False, scheduler_overrides=None):
    """Saves a tiny `StableDiffusionPipeline`; its images are 16x16. Returns the path as a string.

    `zero_snr` gives it a zero-terminal-SNR schedule (a `DDIMScheduler`'s, as such checkpoints have).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = make_tokenizer()
        text_encoder, unet, vae = make_text_encoder(tokenizer), make_unet(), make_vae()
    config = SD15_SCHEDULER | {"prediction_type": prediction_type} | (scheduler_overrides or {})
    if zero_snr:
        del config["skip_prk_steps"]
        zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
        scheduler = DDIMScheduler(**(zero | config))
    else:
        scheduler = PNDMScheduler(**config)
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory, safe_serialization=True)
    return str(directory)


def make_sdxl(
    directory, prediction_type="epsilon", zero_snr=False, scheduler_overrides=None, force_zeros_for_empty_prompt=True
):
    """Saves a tiny `StableDiffusionXLPipeline`; its images are 16x16. Returns the path as a string."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer, tokenizer_2 = make_tokenizer(), make_tokenizer()
        tokenizer_2.pad_token = "!"  # as OpenCLIP's
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=32 + 16,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
            norm_num_groups=8,
        )
        pipeline = StableDiffusionXLPipeline(
            vae=make_vae(scaling_factor=0.13025).eval(),
            text_encoder=make_text_encoder(tokenizer).eval(),
            text_encoder_2=make_text_encoder(tokenizer_2, CLIPTextModelWithProjection, 16).eval(),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet.eval(),
            scheduler=EulerDiscreteScheduler(
                **SDXL_SCHEDULER
                | {"prediction_type": prediction_type}
                | ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {})
                | (scheduler_overrides or {})
            ),
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=False,
        )
    pipeline.save_pretrained(directory, safe_serialization=True)
    return str(directory)


def make_t5_tokenizer():
    """A `T5TokenizerFast` that knows lower-case ASCII by its characters."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581"] + [chr(code) for code in range(33, 127)] + ["\u2581a", "re"]
    return T5TokenizerFast(vocab=[(piece, -float(rank)) for rank, piece in enumerate(pieces)], extra_ids=0)


def make_sd3(directory, t5=True, scheduler_overrides=None, **transformer_options):
    """Saves a tiny `StableDiffusion3Pipeline`; its images are 16x16. Returns the path as a string."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer, tokenizer_2, tokenizer_3 = make_tokenizer(), make_tokenizer(), make_t5_tokenizer()
        tokenizer_2.pad_token = "!"
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=48,
            pos_embed_max_size=8,
            **transformer_options,
        )
        with torch.no_grad():
            transformer.proj_out.weight.normal_(std=0.1)
        config = T5Config(
            vocab_size=len(tokenizer_3), d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        pipeline = StableDiffusion3Pipeline(
            vae=make_vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=make_text_encoder(tokenizer, CLIPTextModelWithProjection).eval(),
            text_encoder_2=make_text_encoder(tokenizer_2, CLIPTextModelWithProjection, 16).eval(),
            text_encoder_3=T5EncoderModel(config).eval() if t5 else None,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            tokenizer_3=tokenizer_3 if t5 else None,
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | (scheduler_overrides or {})),
        )
    pipeline.vae.eval()
    pipeline.save_pretrained(directory, safe_serialization=True)
    return str(directory)


def make_clip(path):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=12, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    CLIPModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def make_dinov2(directory=None):
    """A tiny `Dinov2Model` (four blocks, patches of 4); saved, and its path returned, if `directory` is given."""
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, patch_size=4, image_size=16
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Dinov2Model(config).eval()
        with torch.no_grad():
            # A trained model's LayerScale and positions are not what `Dinov2Model` starts with.
            model.embeddings.position_embeddings.normal_(std=0.5)
            model.embeddings.cls_token.normal_()
    if directory is None:
        return model
    model.save_pretrained(directory)
    return str(directory)


def draw_image(generator, color, shape, width, height):
    """A noisy coloured shape on a gradient, uint8 (height, width, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([255 * x / width, 255 * y / height, 0 * x + 90], axis=2)
    if shape == "square":
        mask = (abs(x - width / 2) < width / 4) & (abs(y - height / 2) < height / 4)
    elif shape == "disc":
        mask = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(width, height) / 3) ** 2
    else:
        mask = (x // 3) % 2 == 0
    image[mask] = COLORS[color]
    return np.clip(image + generator.normal(0, 8, image.shape), 0, 255).astype(np.uint8)


def make_resnet(path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = ResNetForImageClassification(config)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # a trained model's are no zeros and ones
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    model.save_pretrained(path)
    return str(path)


def make_imagefolder(directory, count=8, size=20, seed=0, caption_column="text"):
    """Saves `count` PNG images and `metadata.jsonl` (`file_name` and a caption); returns the path as a string.

    The images are at least `size` on each side; every second one is wider, every third one is higher.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    lines = []
    for n in range(count):
        color, shape = list(COLORS)[n % len(COLORS)], SHAPES[n % len(SHAPES)]
        width, height = size + 5 * (n % 2), size + 8 * (n % 3 == 2)
        file_name = f"{n:03d}.png"
        Image.fromarray(draw_image(generator, color, shape, width, height)).save(directory / file_name)
        lines.append(json.dumps({"file_name": file_name, caption_column: f"a {color} {shape} {n}"}))
    (directory / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return str(directory)

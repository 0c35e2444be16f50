"""Tiny random-weight pipelines of diffusers' real classes for the plugin's tests, without text encoders.

Each function returns a pipeline and what it is called with: embeddings for two rows, guidance on.
"""

import diffusers
import torch
from tiny import make_t5_tokenizer, make_text_encoder, make_tokenizer, make_unet, make_vae
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)


TOKENS, ROWS = 5, 2
NO_TEXT = dict.fromkeys(("text_encoder", "tokenizer"))


def flow_match(**options):
    return diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | options)


def embeddings(channels, *shape, names=("prompt_embeds", "negative_prompt_embeds")):
    """Random embeddings under `names`, (ROWS, *shape, channels) each."""
    return {name: torch.randn(ROWS, *(shape or (TOKENS,)), channels) for name in names}


def masks(*names, dtype=torch.long):
    """Attention masks whose last token counts in the first row alone."""
    mask = torch.ones(ROWS, TOKENS, dtype=dtype)
    mask[1:, -1] = 0
    return dict.fromkeys(names, mask)


def prompt_masks(**options):
    return masks("prompt_attention_mask", "negative_prompt_attention_mask", **options)


def sd15():
    pipeline = diffusers.StableDiffusionPipeline(
        vae=make_vae(),
        unet=make_unet(),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        **NO_TEXT,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline, embeddings(32) | {"guidance_scale": 5.0}


def sd15_controlnet():
    pipeline, inputs = sd15()
    controlnet = diffusers.ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(16, 32))
    for layer in controlnet.controlnet_down_blocks:  # zero before training
        torch.nn.init.normal_(layer.weight, std=0.1)
    pipeline = diffusers.StableDiffusionControlNetPipeline(
        **pipeline.components, controlnet=controlnet, requires_safety_checker=False
    )
    return pipeline, inputs | {"image": torch.rand(ROWS, 3, 16, 16)}


def sdxl():
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=48, attention_head_dim=(2, 4),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8, norm_num_groups=8,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=make_vae(scaling_factor=0.13025),
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        **NO_TEXT,
        text_encoder_2=None,
        tokenizer_2=None,
        add_watermarker=False,
    )
    pooled = {name: torch.randn(ROWS, 24) for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}
    return pipeline, embeddings(48) | pooled | {"guidance_scale": 5.0}


def sd3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=48,
        pos_embed_max_size=8,
    )  # fmt: skip
    texts = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    pipeline = diffusers.StableDiffusion3Pipeline(
        vae=make_vae(scaling_factor=1.5305, shift_factor=0.0609), transformer=transformer, scheduler=flow_match(),
        **texts,
    )  # fmt: skip
    pooled = {name: torch.randn(ROWS, 48) for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}
    return pipeline, embeddings(64) | pooled | {"guidance_scale": 5.0}


def flux(guidance_embeds=True):
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    pipeline = diffusers.FluxPipeline(
        vae=make_vae(scaling_factor=0.3611, shift_factor=0.1159), transformer=transformer,
        scheduler=flow_match(use_dynamic_shifting=True), **NO_TEXT, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    return pipeline, {
        "prompt_embeds": torch.randn(ROWS, TOKENS, 32),
        "pooled_prompt_embeds": torch.randn(ROWS, 32),
        "guidance_scale": 3.5,
    }


def flux_true_guidance():
    """Two calls of the denoiser a step."""
    pipeline, inputs = flux(guidance_embeds=False)
    negative = {"negative_prompt_embeds": torch.randn(ROWS, TOKENS, 32)}
    negative |= {"negative_pooled_prompt_embeds": torch.randn(ROWS, 32), "true_cfg_scale": 3.0}
    return pipeline, inputs | negative


def flux2():
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, timestep_guidance_channels=32, axes_dims_rope=[4, 4, 4, 4],
    )  # fmt: skip
    parts = flux2_klein()[0].components | {"transformer": transformer}
    return diffusers.Flux2Pipeline(**parts), {
        "prompt_embeds": torch.randn(ROWS, TOKENS, 16),
        "guidance_scale": 4.0,
    }


def flux2_klein():
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, timestep_guidance_channels=32, axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8,
    )  # fmt: skip
    pipeline = diffusers.Flux2KleinPipeline(
        vae=vae, transformer=transformer, scheduler=flow_match(use_dynamic_shifting=True), **NO_TEXT
    )
    return pipeline, embeddings(16) | {"guidance_scale": 4.0}


def qwen_image():
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1] * 4, latents_std=[1.5] * 4,
    )  # fmt: skip
    pipeline = diffusers.QwenImagePipeline(
        vae=vae, transformer=transformer, scheduler=flow_match(use_dynamic_shifting=True), **NO_TEXT
    )
    return pipeline, {
        **embeddings(16),
        **masks("prompt_embeds_mask", "negative_prompt_embeds_mask"),
        "true_cfg_scale": 4.0,
    }


def z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    with torch.no_grad():  # they are made of memory as it is
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    pipeline = diffusers.ZImagePipeline(
        vae=make_vae(scaling_factor=0.3611, shift_factor=0.1159), transformer=transformer, scheduler=flow_match(),
        **NO_TEXT,
    )  # fmt: skip
    rows = {name: list(tensor) for name, tensor in embeddings(16).items()}
    return pipeline, rows | {"guidance_scale": 4.0}


def sana():
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=8,
    )  # fmt: skip
    blocks = ("ResBlock", "EfficientViTBlock")
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1],
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipeline = diffusers.SanaPipeline(vae=vae, transformer=transformer, scheduler=scheduler, **NO_TEXT)
    return pipeline, embeddings(8) | prompt_masks() | {
        "guidance_scale": 4.5,
        "use_resolution_binning": False,
        "negative_prompt": None,
        "height": 32,  # a multiple of 32
        "width": 32,
    }


def pixart_sigma():
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=8, norm_type="ada_norm_single",
    )  # fmt: skip
    pipeline = diffusers.PixArtSigmaPipeline(
        vae=make_vae(scaling_factor=0.13025), transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", beta_end=0.02), **NO_TEXT,
    )  # fmt: skip
    return pipeline, embeddings(32) | prompt_masks() | {
        "guidance_scale": 4.5,
        "use_resolution_binning": False,
        "negative_prompt": None,
    }


def pixart_alpha():
    pipeline, inputs = pixart_sigma()
    return diffusers.PixArtAlphaPipeline(**pipeline.components), inputs


def lumina2():
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=16, axes_dim_rope=[4, 2, 2], axes_lens=[32, 16, 16],
        cap_feat_dim=8,
    )  # fmt: skip
    pipeline = diffusers.Lumina2Pipeline(
        vae=make_vae(scaling_factor=0.3611, shift_factor=0.1159), transformer=transformer, scheduler=flow_match(),
        **NO_TEXT,
    )  # fmt: skip
    pipeline.vae_scale_factor = 2  # its own, 8, does not look at the VAE
    return pipeline, embeddings(8) | prompt_masks() | {"guidance_scale": 4.0}


def cogview4():
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=4, out_channels=4,
        text_embed_dim=32, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    scheduler = flow_match(
        base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear", shift=1.0
    )
    pipeline = diffusers.CogView4Pipeline(vae=make_vae(), transformer=transformer, scheduler=scheduler, **NO_TEXT)
    return pipeline, embeddings(32) | {"guidance_scale": 5.0}


def aura_flow():
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    pipeline = diffusers.AuraFlowPipeline(
        vae=make_vae(scaling_factor=0.13025), transformer=transformer, scheduler=flow_match(shift=1.73), **NO_TEXT
    )
    return pipeline, embeddings(32) | prompt_masks() | {"guidance_scale": 3.5}


def chroma():
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=[4, 4, 8], approximator_hidden_dim=32, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip
    pipeline = diffusers.ChromaPipeline(
        vae=make_vae(scaling_factor=0.3611, shift_factor=0.1159), transformer=transformer,
        scheduler=flow_match(use_dynamic_shifting=True), **NO_TEXT,
    )  # fmt: skip
    return pipeline, embeddings(32) | prompt_masks(dtype=torch.bool) | {"guidance_scale": 5.0}


def ovis():
    transformer = diffusers.OvisImageTransformer2DModel(
        patch_size=1, in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipeline = diffusers.OvisImagePipeline(
        vae=make_vae(scaling_factor=0.3611, shift_factor=0.1159), transformer=transformer,
        scheduler=flow_match(use_dynamic_shifting=True), **NO_TEXT,
    )  # fmt: skip
    return pipeline, embeddings(32) | {"guidance_scale": 5.0, "negative_prompt": None}


PIPELINES = {
    make.__name__: make
    for make in (
        sd15, sd15_controlnet, sdxl, sd3, flux, flux_true_guidance, flux2, flux2_klein, qwen_image, z_image, sana,
        pixart_alpha, pixart_sigma, lumina2, cogview4, aura_flow, chroma, ovis,
    )
}  # fmt: skip


def make_pipeline(name, **options):
    """A pipeline of `PIPELINES`, with its arguments; every build gives the same bits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline, inputs = PIPELINES[name](**options)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, {"num_inference_steps": 4, "height": 16, "width": 16} | inputs


# Whole pipelines, with text encoders


def make_qwen_tokenizer():
    """A `Qwen2Tokenizer` that knows ASCII by its characters, with a chat template."""
    characters = [chr(code) for code in range(33, 127)] + ["\u0120", "\u010a"]  # and the space and the new line
    vocab = {character: index for index, character in enumerate([*characters, "<|endoftext|>"])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], unk_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = "{% for message in messages %}user {{ message['content'] }}{% endfor %}"
    return tokenizer


def text_components(name) -> dict:
    """The text encoders and tokenizers of `flux`, `qwen_image` and `z_image`, by their names in the pipeline."""
    if name.startswith("flux"):
        clip, t5 = make_tokenizer(), make_t5_tokenizer()
        config = T5Config(
            vocab_size=len(t5), d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=1
        )
        encoders = {"text_encoder": make_text_encoder(clip), "text_encoder_2": T5EncoderModel(config)}
        return encoders | {"tokenizer": clip, "tokenizer_2": t5}
    tokenizer = make_qwen_tokenizer()
    sizes = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if name == "z_image":
        return {"text_encoder": Qwen3Model(Qwen3Config(head_dim=8, **sizes)), "tokenizer": tokenizer}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(
        text_config=sizes | {"rope_scaling": rope, "max_position_embeddings": 2048}, vision_config=vision
    )
    return {"text_encoder": Qwen2_5_VLForConditionalGeneration(config), "tokenizer": tokenizer}


def save_whole_pipeline(name, directory, **options) -> str:
    """Saves a pipeline of `PIPELINES` with its text encoders; its images are 16x16. Returns the path as a string."""
    pipeline, _ = make_pipeline(name, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        texts = text_components(name)
    for part, component in texts.items():
        setattr(pipeline, part, component.eval() if isinstance(component, torch.nn.Module) else component)
    pipeline.register_modules(**texts)
    pipeline.save_pretrained(directory)
    return str(directory)

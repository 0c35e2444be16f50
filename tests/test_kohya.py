"""The adapters' file for ComfyUI and kohya's tools: their names, shapes and scale, which are written anew here.

ComfyUI (`comfy/lora.py`) knows `lora_unet_` and a weight's path with `_` for `.`: diffusers' path in a UNet, in SD3
the original model's. It adds `alpha / rank * up @ down` to the weight; without an alpha the factor is 1.
"""

import itertools
import json
import types
from pathlib import Path

import pytest
import tiny
import torch
from conftest import FAMILIES
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from helpers import NO_ACCELERATOR, relative
from safetensors import safe_open
from safetensors.torch import load_file

from output_utils import ADAPTERS, KOHYA_ADAPTERS, save_adapters, save_kohya_adapters
from training_utils import prepare_network


RANK, ALPHA = 4, 6


def load_network(family, path):
    return family.train.FAMILY.network_class.from_pretrained(path, subfolder=family.network)


def is_layer(module):
    return isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, base_paths, tmp_path_factory):
    """A family, its tiny pipeline's path, and a folder with both files of random adapters on all the network's layers.

    `deltas` is what diffusers' own file adds to the layers' weights. SD3's network has the second attention of SD3.5
    medium in its first block.
    """
    family, path = FAMILIES[request.param], base_paths[request.param]
    if family.name == "sd3":
        path = tiny.make_sd3(tmp_path_factory.mktemp("sd3.5"), qk_norm="rms_norm", dual_attention_layers=(0,))
    network = load_network(family, path)
    layers = [name for name, module in network.named_modules() if is_layer(module)]
    args = family.train.parse_args([
        "--pretrained_model_name_or_path", path, "--dataset_name", "x", "--use_lora", "--rank", str(RANK),
        "--lora_alpha", str(ALPHA), "--lora_layers", ",".join(layers),
        "--output_dir", str(tmp_path_factory.mktemp("adapters")),
    ])  # fmt: skip
    prepare_network(network, args, NO_ACCELERATOR)
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapters(network, family.train.FAMILY, args.output_dir)
    save_kohya_adapters(network, family.train.FAMILY, args)
    deltas = fuse(family, path, args.output_dir)
    return types.SimpleNamespace(family=family, path=path, directory=args.output_dir, deltas=deltas)


def fuse(family, path, directory, weight_name=None):
    """{layer: what `load_lora_weights` adds to its weight}."""
    pipeline = DiffusionPipeline.from_pretrained(path, vae=None, **family.train.FAMILY.without_text_encoders)
    network = getattr(pipeline, family.network)
    before = {name: module.weight.clone() for name, module in network.named_modules() if is_layer(module)}
    pipeline.load_lora_weights(directory, weight_name=weight_name)
    pipeline.fuse_lora(components=[family.network])
    pipeline.unload_lora_weights()
    after = dict(network.named_modules())
    return {name: after[name].weight - value for name, value in before.items()}


def unet_layers(unet):
    """The paths that ComfyUI has in its list of diffusers' layers, for a UNet of this configuration."""
    config = unet.config
    num_blocks, per_block = len(config.down_block_types), config.layers_per_block
    depth = config.transformer_layers_per_block
    depth = [depth] * num_blocks if isinstance(depth, int) else list(depth)
    attention = [f"attn{n}.{layer}" for n in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")]

    def block(path, num_resnets, num_attentions, depth):
        for n in range(num_resnets):
            yield from (f"{path}.resnets.{n}.{x}" for x in ("conv1", "conv2", "time_emb_proj", "conv_shortcut"))
        for n in range(num_attentions):
            yield from (f"{path}.attentions.{n}.{x}" for x in ("proj_in", "proj_out"))
            for t, x in itertools.product(range(depth), [*attention, "ff.net.0.proj", "ff.net.2"]):
                yield f"{path}.attentions.{n}.transformer_blocks.{t}.{x}"

    yield from ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    yield from ("add_embedding.linear_1", "add_embedding.linear_2")
    for n, kind in enumerate(config.down_block_types):
        yield from block(f"down_blocks.{n}", per_block, per_block * ("CrossAttn" in kind), depth[n])
        yield f"down_blocks.{n}.downsamplers.0.conv"
    yield from block("mid_block", 2, 1, depth[-1])
    for n, kind in enumerate(config.up_block_types):
        yield from block(f"up_blocks.{n}", per_block + 1, (per_block + 1) * ("CrossAttn" in kind), depth[-1 - n])
        yield f"up_blocks.{n}.upsamplers.0.conv"


def mmdit_layers(config):
    """{path: shape of the weight} of the original SD3 model of this configuration."""
    width, patch = config.num_attention_heads * config.attention_head_dim, config.patch_size
    layers = {
        "x_embedder.proj": (width, config.in_channels, patch, patch),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "y_embedder.mlp.0": (width, config.pooled_projection_dim),
        "y_embedder.mlp.2": (width, width),
        "context_embedder": (width, config.joint_attention_dim),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (patch * patch * config.out_channels, width),
    }
    for n, part in itertools.product(range(config.num_layers), ("x_block", "context_block")):
        last = part == "context_block" and n == config.num_layers - 1  # which only informs the image's attention
        dual = part == "x_block" and n in config.dual_attention_layers
        own = {
            "attn.qkv": (3 * width, width),
            "adaLN_modulation.1": ((2 if last else 9 if dual else 6) * width, width),
        }
        if not last:
            own |= {"attn.proj": (width, width), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        if dual:
            own |= {"attn2.qkv": (3 * width, width), "attn2.proj": (width, width)}
        layers |= {f"joint_blocks.{n}.{part}.{name}": shape for name, shape in own.items()}
    return layers


def known_layers(family, network):
    """{path: shape of the weight} of what ComfyUI knows by the name of `lora_unet_` and the path."""
    if family.name == "sd3":
        return mmdit_layers(network.config)
    weights = network.state_dict()
    return {name: weights[f"{name}.weight"].shape for name in unet_layers(network) if f"{name}.weight" in weights}


def apply_as_comfyui(file, layers):
    """{path: what ComfyUI adds to its weight}. Every name of the file must be a layer's, and every layer be named."""
    lora, known = load_file(file), {f"lora_unet_{name.replace('.', '_')}": name for name in layers}
    assert {key.split(".")[0] for key in lora} == set(known)
    assert {key.split(".", 1)[1] for key in lora} == {"lora_down.weight", "lora_up.weight", "alpha"}
    deltas = {}
    for key, name in known.items():
        up, down = lora[f"{key}.lora_up.weight"], lora[f"{key}.lora_down.weight"]
        scale = lora[f"{key}.alpha"].item() / down.shape[0]
        deltas[name] = scale * (up.flatten(1) @ down.flatten(1)).reshape(layers[name])
    return deltas


def test_comfyui_knows_every_name_and_adds_what_diffusers_does(saved):
    layers = known_layers(saved.family, load_network(saved.family, saved.path))
    deltas = apply_as_comfyui(Path(saved.directory, KOHYA_ADAPTERS), layers)
    if saved.family.name == "sd3":  # diffusers' own conversion of the original model's weights
        original = {f"{name}.{end}": value for name, value in deltas.items() for end in ("weight", "bias")}
        deltas = convert_sd3_transformer_checkpoint_to_diffusers(original | {"pos_embed": torch.zeros(1)})
        deltas = {name.removesuffix(".weight"): value for name, value in deltas.items() if name.endswith(".weight")}
    assert deltas.keys() == saved.deltas.keys()
    for name, value in saved.deltas.items():
        assert relative(deltas[name], value) < 1e-5, name
        assert value.abs().max() > 1e-3


def test_diffusers_reads_it_back(saved):
    if saved.family.name == "sd3":
        pytest.skip("of SD3's adapters diffusers reads its own file alone")
    deltas = fuse(saved.family, saved.path, saved.directory, KOHYA_ADAPTERS)
    for name, value in saved.deltas.items():
        if "add_embedding" not in name:  # which diffusers reads by the original model's name only
            assert relative(deltas[name], value) < 1e-5, name


@pytest.fixture
def family():
    return FAMILIES["sd15"]


def test_a_run_writes_both_files(run):
    output = run(
        "--use_lora", "--rank", 4, "--lora_alpha", 8, "--learning_rate", 1e-2, "--use_ema", "--ema_decay", 0.3,
        "--output_kohya_format",
    )  # fmt: skip
    adapters, kohya = load_file(output / ADAPTERS), load_file(output / KOHYA_ADAPTERS)
    assert len(kohya) == len(adapters) / 2 * 3
    assert {value.item() for name, value in kohya.items() if name.endswith(".alpha")} == {8}
    for name, value in adapters.items():  # the averaged ones, then
        path, end = name.removeprefix("unet.").split(".lora_")
        same = {"A.weight": "lora_down", "B.weight": "lora_up"}[end]
        assert torch.equal(kohya[f"lora_unet_{path.replace('.', '_')}.{same}.weight"], value)
    assert f"`{KOHYA_ADAPTERS}`" in (output / "README.md").read_text()
    with safe_open(output / ADAPTERS, framework="pt") as file:  # which diffusers takes the scale from
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (4, 8)

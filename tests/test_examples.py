"""The plugin's examples, on tiny models, and its packages, loaded from a folder as diffusers loads them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.modular_pipelines import FluxAutoBlocks, ModularPipelineBlocks
from diffusers.utils import dynamic_modules_utils
from helpers import relative
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import make_pipeline
from transformers import CLIPModel, CLIPTokenizer


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import adt_discriminator  # noqa: E402
import clip_reward  # noqa: E402
import one_colour  # noqa: E402

from adt_pipeline import ConstrainedPipeline  # noqa: E402


def test_one_colour(sd15_path, tmp_path):
    """The mean colour comes nearer, and the picture has three parts of which the last has the colour."""
    options = ["--pretrained_model_name_or_path", sd15_path, "--num_inference_steps", "3", "--learning_rate", "1e-3"]
    losses = one_colour.main(
        one_colour.parse_args([*options, "--max_train_steps", "4", "--output", str(tmp_path / "a.png")])
    )
    assert losses[-1] < 0.8 * losses[0]
    picture = Image.open(tmp_path / "a.png")
    assert picture.size == (3 * 192, 192) and picture.getpixel((500, 100)) == (64, 166, 191)


def test_clip_reward(sd15_path, clip_path, tmp_path):
    """The adapters that are written raise the score of images from the same noise."""
    torch.manual_seed(0)
    args = clip_reward.parse_args(
        ["--pretrained_model_name_or_path", sd15_path, "--clip_model_name_or_path", clip_path,
         "--prompts", "a red disc", "--num_inference_steps", "3", "--max_train_steps", "5", "--learning_rate", "1e-2",
         "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    assert len(clip_reward.main(args)) == 5
    clip, tokenizer = CLIPModel.from_pretrained(clip_path).eval(), CLIPTokenizer.from_pretrained(clip_path)
    pipeline = DiffusionPipeline.from_pretrained(sd15_path)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def score():
        prompts, noise = ["a red disc"] * 4, torch.Generator().manual_seed(1)
        images = pipeline(prompts, num_inference_steps=3, generator=noise, output_type="pt").images
        return clip_reward.clip_score(clip, tokenizer, 2 * images - 1, prompts).mean().item()

    before = score()
    pipeline.load_lora_weights(tmp_path / "out")
    assert score() > before + 0.01


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_adt_discriminator(name, base_paths, dinov2_path, dataset_path, tmp_path):
    args = adt_discriminator.parse_args(
        ["--pretrained_model_name_or_path", base_paths[name], "--train_data_dir", dataset_path,
         "--discriminator_model_name_or_path", dinov2_path, "--discriminator_layers", "-1", "1",
         "--discriminator_resolution", "16", "--resolution", "16", "--num_inference_steps", "3",
         "--max_train_steps", "2", "--generator_update_interval", "2", "--output_dir", str(tmp_path)]
    )  # fmt: skip
    scores = adt_discriminator.main(args)
    assert ["generator_loss" in values for values in scores] == [False, True]
    adapters = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    moved = [value.abs().max() > 0 for key, value in adapters.items() if "lora_B" in key or "lora.up" in key]
    assert moved and any(moved)


# As packages


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that makes a folder of an example's file and what it needs; the cache of modules is a folder, too."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    before = set(sys.modules)

    def make(file):
        folder = tmp_path / "package"
        folder.mkdir()
        for source in (ROOT / "examples" / file, ROOT / "adt_pipeline.py", ROOT / "adt_utils.py"):
            shutil.copy(source, folder)
        return folder

    yield make
    for name in set(sys.modules) - before:
        if name.startswith("diffusers_modules"):
            del sys.modules[name]


def loss_of(images):
    return (images * torch.linspace(-1, 2, 16)).square().mean()


@pytest.fixture
def expected():
    """A tiny FLUX's inputs, and the gradient that the plugin sends it."""
    pipeline, inputs = make_pipeline("flux")
    tunable = ConstrainedPipeline(pipeline, num_gradient_steps=4)
    images = tunable(**inputs, generator=torch.Generator().manual_seed(1))
    tunable.backward(loss_of(images))
    return inputs, images.detach(), gradient(pipeline.transformer)


def gradient(network):
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def test_packages_need_nothing_to_install():
    """Of what diffusers finds in the files that it brings, it says how to install what is not there."""
    for file in (
        "adt_pipeline.py",
        "adt_utils.py",
        "examples/custom_pipeline/pipeline.py",
        "examples/modular_block/block.py",
    ):
        text = (ROOT / file).read_text()
        # As `diffusers.utils.dynamic_modules_utils.check_imports` looks for them.
        found = re.findall(r"^\s*import\s+(\S+)\s*$|^\s*from\s+(\S+)\s+import", text, re.MULTILINE)
        names = {name for pair in found for name in pair}
        assert any(name.startswith("diffusers") for name in names)
        assert not [name for name in names if name.startswith("adt_")]


def test_custom_pipeline(package, expected, tmp_path):
    inputs, images, vector = expected
    make_pipeline("flux")[0].save_pretrained(tmp_path / "flux")
    pipeline = DiffusionPipeline.from_pretrained(
        tmp_path / "flux",
        custom_pipeline=str(package("custom_pipeline/pipeline.py")),
        trust_remote_code=True,
        **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    )
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == "AdtFluxPipeline"
    tunable = pipeline.constrained(num_gradient_steps=4)
    assert type(tunable).__module__.startswith("diffusers_modules.local")
    result = tunable(**inputs, generator=torch.Generator().manual_seed(1))
    tunable.backward(loss_of(result))
    assert torch.equal(result, images) and torch.equal(gradient(pipeline.transformer), vector)


def test_modular_block(package, expected):
    """Packaged by diffusers' own command, loaded from its folder, in the place of the denoising step."""
    inputs, images, vector = expected
    folder = package("modular_block/block.py")
    command = Path(sys.executable).parent / "diffusers-cli"
    subprocess.run([command, "custom_blocks"], cwd=folder, check=True, env={"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"})
    assert (folder / "modular_config.json").exists() and (folder / "modular_model_index.json").exists()

    blocks = FluxAutoBlocks()
    blocks.sub_blocks["denoise"] = ModularPipelineBlocks.from_pretrained(str(folder), trust_remote_code=True)
    for name in ("decode", "text_encoder", "vae_encoder"):  # the embeddings are given
        del blocks.sub_blocks[name]
    modular = blocks.init_pipeline()
    own = make_pipeline("flux")[0]
    modular.update_components(transformer=own.transformer, vae=own.vae, scheduler=own.scheduler)
    inputs = inputs | {"guidance_scale": 3.5, "generator": torch.Generator().manual_seed(1)}
    result = modular(**inputs, num_gradient_steps=4, output=["images", "tunable"])
    result["tunable"].backward(loss_of(result["images"]))
    assert relative(result["images"], images) < 1e-5 and relative(gradient(own.transformer), vector) < 1e-4


def test_the_page_works_as_it_stands(sd3_path):
    """The first lines of docs/plugin.md, with a tiny model in the place of the large one."""
    page = (ROOT / "docs" / "plugin.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    assert len(code.splitlines()) <= 11
    code = code.replace("black-forest-labs/FLUX.1-dev", sd3_path).replace("cuda", "cpu")
    names = {}
    exec(code.replace("num_inference_steps=28", "num_inference_steps=3"), names)
    assert names["images"].shape == (1, 3, 16, 16)
    assert gradient(names["pipeline"].transformer).norm() > 0

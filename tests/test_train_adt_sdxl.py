"""What SDXL adds: conditions on sizes, two text encoders, their cache, and its VAE."""

import json
import shutil
import types
import weakref
from pathlib import Path

import datasets
import pyarrow
import pytest
import tiny
import torch
from accelerate import Accelerator
from conftest import FAMILIES
from diffusers import DiffusionPipeline, UNet2DConditionModel
from helpers import equal, read_network, read_scalars
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import data_utils
import train_adt_sd15
import train_adt_sdxl as train
from training_utils import ADTError


ROOT = Path(__file__).resolve().parent.parent
NO_ACCELERATOR = types.SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")
OWN_OPTIONS = {"rollout_time_ids", "offload_text_encoders", "cache_text_embeddings"}


@pytest.fixture
def family():
    return FAMILIES["sdxl"]


def test_options_are_those_of_sd15_and_its_own(options):
    common = vars(train_adt_sd15.parse_args(options()))
    args = vars(train.parse_args(options()))
    assert set(args) == set(common) | OWN_OPTIONS


def test_the_papers_defaults():
    args = train.parse_args(["--pretrained_model_name_or_path", "x", "--dataset_name", "y"])
    assert (args.resolution, args.guidance_scale, args.num_inference_steps) == (1024, 5.0, 50)
    assert (args.learning_rate, args.discriminator_learning_rate) == (1e-6, 1e-6)


# Conditions on sizes


def official_crop_top_left(size, resolution, u_top, u_left, center_crop):
    """What the official script records for an image of `size` (width, height), by torchvision's own formulas."""
    width, height = size
    short, long = min(size), max(size)
    new_long = int(resolution * long / short)
    width, height = (resolution, new_long) if width <= height else (new_long, resolution)
    if center_crop:
        return max(0, int(round((height - resolution) / 2.0))), max(0, int(round((width - resolution) / 2.0)))
    return int(u_top * (height - resolution + 1)), int(u_left * (width - resolution + 1))


SIZES = {"portrait": (20, 33), "landscape": (41, 22), "square": (24, 24)}


@pytest.fixture
def sizes_path(tmp_path):
    """Three images whose pixels say where they are."""
    (tmp_path / "sizes").mkdir()
    lines = []
    for name, (width, height) in SIZES.items():
        image = Image.new("RGB", (width, height))
        image.putdata([(6 * x, 6 * y, 0) for y in range(height) for x in range(width)])
        image.save(tmp_path / "sizes" / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "text": name}))
    (tmp_path / "sizes" / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path / "sizes"


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("center_crop", [False, True])
def test_recorded_sizes_are_the_official_scripts(options, sizes_path, flip, center_crop):
    more = ["--train_data_dir", sizes_path, *["--random_flip"] * flip, *["--center_crop"] * center_crop]
    args = train.parse_args(options(*more))
    dataset = train.load_image_caption_dataset(args)
    names = dataset["text"][:]
    items, mirrored = data_utils.ImageCaptionDataset(dataset, args), set()
    for iteration in range(12):
        for index, name in enumerate(names):
            item = items[index, iteration, 0]
            width, height = SIZES[name]
            assert item["original_size"] == (height, width)
            u_flip, u_top, u_left = torch.rand(3, generator=train.make_generator(0, "image", iteration, 0)).tolist()
            top, left = official_crop_top_left((width, height), 16, u_top, u_left, center_crop)
            assert item["crop_top_left"] == (top, left)
            # The recorded corner is the crop's in the image as it was cropped, mirrored or not.
            short = min(width, height)
            image = Image.open(sizes_path / f"{name}.png").convert("RGB")
            image = image.resize((16 * width // short, 16 * height // short), Image.Resampling.LANCZOS)
            mirrored.add(flip and u_flip < 0.5)
            if flip and u_flip < 0.5:
                image = ImageOps.mirror(image)
            crop = image.crop((left, top, left + 16, top + 16))
            expected = torch.tensor(list(crop.tobytes())).view(16, 16, 3).permute(2, 0, 1)
            assert torch.equal(item["pixel_values"], expected.byte())
    assert mirrored == ({False, True} if flip else {False})


@pytest.mark.parametrize("which", ["inference", "image"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("center_crop", [False, True])
def test_time_ids_that_reach_the_model(run, options, sizes_path, monkeypatch, which, flip, center_crop):
    """Each row of ids, found by the row's caption embedding, against the official script's for that image."""
    seen = []
    original = UNet2DConditionModel.forward

    def forward(self, sample, timestep, encoder_hidden_states, added_cond_kwargs=None, **kwargs):
        seen.append((self.training, encoder_hidden_states, added_cond_kwargs["time_ids"]))
        return original(self, sample, timestep, encoder_hidden_states, added_cond_kwargs=added_cond_kwargs, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    iterations = []
    make_conditions = train.make_conditions
    monkeypatch.setattr(train, "make_conditions", lambda *args: iterations.append(len(seen)) or make_conditions(*args))
    more = ("--train_data_dir", sizes_path, "--train_batch_size", 3, "--rollout_time_ids", which,
            "--discriminator_norm_group", 3, "--guidance_scale", 1,
            *["--random_flip"] * flip, *["--center_crop"] * center_crop)  # fmt: skip
    output = run(*more)
    args = train.parse_args(options(*more))
    encoder = train.PromptEncoder(args, NO_ACCELERATOR)
    names = list(SIZES)
    embeds = torch.stack([encoder([name])["prompt_embeds"][0] for name in names])
    captions = train.load_image_caption_dataset(args)["text"][:]
    keys = list(data_utils.GlobalBatchSampler(3, args))
    assert len(iterations) == 4 and {training for training, _, _ in seen} == {False, True}
    for call, (training, prompt_embeds, time_ids) in enumerate(seen):
        iteration = sum(first <= call for first in iterations) - 1
        positions = {captions[index]: position for index, _, position in keys[iteration]}
        for row, embed in zip(time_ids.int().tolist(), prompt_embeds, strict=True):
            name = names[(embeds - embed).abs().flatten(1).amax(1).argmin()]
            generator = train.make_generator(0, "image", iteration, positions[name])
            _, u_top, u_left = torch.rand(3, generator=generator).tolist()
            width, height = SIZES[name]
            corner = official_crop_top_left((width, height), 16, u_top, u_left, center_crop)
            own = [height, width, *corner, 16, 16]
            assert row == (own if training or which == "image" else [16, 16, 0, 0, 16, 16])
    card = (output / "README.md").read_text()
    assert ("each training image's own size" in card) == (which == "image")
    assert ("original size 16x16 and no crop" in card) == (which == "inference")


# Prompts


@pytest.mark.parametrize("force_zeros", [True, False])
def test_prompts_are_encoded_as_the_pipeline_does(options, tmp_path, force_zeros):
    path = tiny.make_sdxl(tmp_path / "base", force_zeros_for_empty_prompt=force_zeros)
    encoder = train.PromptEncoder(train.parse_args(options("--pretrained_model_name_or_path", path)), NO_ACCELERATOR)
    pipeline = DiffusionPipeline.from_pretrained(path)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for prompt in ("a red disc", "", "a long caption that is cut because it has more tokens than twelve"):
        expected = dict(zip(names, pipeline.encode_prompt(prompt, device="cpu"), strict=True))
        for name, value in encoder([prompt]).items():
            assert torch.equal(value, expected[name])
            assert torch.equal(encoder.negative[name], expected[f"negative_{name}"])
            assert (encoder.negative[name] == 0).all() == force_zeros


def test_dropped_captions_are_the_unconditional_branch_in_the_loss_alone(options):
    args = train.parse_args(options())
    encoder = train.PromptEncoder(args, NO_ACCELERATOR)
    positive = encoder(["a red disc", "a blue square"])
    examples = {"original_sizes": torch.tensor([[20, 25]] * 2), "crop_top_lefts": torch.tensor([[1, 2]] * 2)}
    examples["pixel_values"] = torch.zeros(2, 3, 16, 16)
    conditions = train.make_conditions(examples, positive, encoder.negative, torch.tensor([True, False]), args)
    for name, value in positive.items():
        assert torch.equal(conditions.positive[name], value)
        assert torch.equal(conditions.loss[name][0], encoder.negative[name][0])
        assert torch.equal(conditions.loss[name][1], value[1])
        assert all(torch.equal(row, encoder.negative[name][0]) for row in conditions.negative[name])
    inference, image = [[16, 16, 0, 0, 16, 16]] * 2, [[20, 25, 1, 2, 16, 16]] * 2
    ids = {branch: condition["time_ids"].int().tolist() for branch, condition in vars(conditions).items()}
    assert ids == {"negative": inference, "positive": inference, "loss": image}


def test_offloaded_text_encoders_come_once_an_iteration(run, monkeypatch):
    common = ("--gradient_accumulation_steps", 2, "--train_batch_size", 1, "--discriminator_norm_group", 1)
    plain = read_scalars(run(*common, output_dir="plain"))
    trips, original = [], train.OnDevice.__enter__

    def enter(self):
        trips.extend([len(self.networks)] * (self.depth == 0))
        original(self)

    monkeypatch.setattr(train.OnDevice, "__enter__", enter)
    assert read_scalars(run(*common, "--offload_text_encoders", output_dir="offloaded")) == plain
    # Two encoders, for the empty prompt, the validation's, and four iterations of two micro-batches.
    assert trips == [2] * (1 + 1 + 4)


@pytest.fixture
def cache(tmp_path):
    return ("--cache_text_embeddings", tmp_path / "cache")


@pytest.fixture
def encoded(monkeypatch):
    """The prompts that text encoders encode, in a list."""
    prompts, original = [], train.PromptEncoder.encode
    monkeypatch.setattr(train.PromptEncoder, "encode", lambda self, some: prompts.extend(some) or original(self, some))
    return prompts


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_cached_embeddings_give_the_same_run_bitwise(run, cache, encoded, tmp_path, monkeypatch, precision):
    """Encoded one at a time, as without a cache; by batches they may differ by rounding."""
    monkeypatch.setattr(data_utils, "CAPTIONS_PER_FILE", 3)
    monkeypatch.setattr(data_utils, "CAPTIONS_PER_BATCH", 1)
    common = ("--validation_prompts", "a blue moon", "--proportion_empty_prompts", 0.3, "--mixed_precision", precision)
    plain = run(*common, output_dir="plain")
    first = run(*common, *cache, output_dir="first")
    assert len(list((tmp_path / "cache").glob("embeddings-*.arrow"))) == 3  # eight captions and the empty one
    encoded.clear()
    second = run(*common, *cache, output_dir="second")
    assert encoded == ["", "a blue moon"]  # nothing of the dataset
    for output in (first, second):
        assert read_scalars(output) == read_scalars(plain)
        assert equal(read_network(output), read_network(plain))
        assert (output / "validation" / "iteration-000004-prompt-0.png").read_bytes() == (
            plain / "validation" / "iteration-000004-prompt-0.png"
        ).read_bytes()


def test_cache_frees_the_text_encoders(run, cache, monkeypatch):
    references = []
    original = train.PromptEncoder.use_cache

    def use_cache(self, *args):
        references.extend(weakref.ref(text_encoder) for text_encoder in self.text_encoders)
        original(self, *args)
        assert [reference() for reference in references] == [None, None]

    monkeypatch.setattr(train.PromptEncoder, "use_cache", use_cache)
    run(*cache)
    assert len(references) == 2


def captions_in(dataset_path):
    rows = map(json.loads, Path(dataset_path, "metadata.jsonl").read_text().splitlines())
    return sorted(["", *(row["text"] for row in rows)])


@pytest.mark.parametrize("what", ["weights", "hidden_act", "merges", "precision", "path"])
def test_cache_of_other_text_encoders_is_another(run, cache, encoded, tmp_path, sdxl_path, dataset_path, what):
    """Whatever an embedding depends on makes another file beside the first; the folder of the base does not."""
    run(*cache, "--max_train_steps", 1)
    shutil.copytree(sdxl_path, tmp_path / "other")
    more = ("--pretrained_model_name_or_path", tmp_path / "other")
    if what == "weights":
        file = tmp_path / "other" / "text_encoder_2" / "model.safetensors"
        weights = load_file(file)
        weights["text_projection.weight"][0, 0] += 1
        save_file(weights, file, metadata={"format": "pt"})
    elif what == "hidden_act":
        file = tmp_path / "other" / "text_encoder" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_act": "gelu"}))
    elif what == "merges":
        tokenizer = tiny.CLIPTokenizer.from_pretrained(tmp_path / "other" / "tokenizer")
        tiny.CLIPTokenizer(vocab=tokenizer.get_vocab(), merges=[("r", "e")], model_max_length=12).save_pretrained(
            tmp_path / "other" / "tokenizer"
        )
    elif what == "precision":
        more = ("--mixed_precision", "bf16")
    encoded.clear()
    run(*cache, *more, "--max_train_steps", 1)
    assert encoded == [""] + (captions_in(dataset_path) if what != "path" else [])
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == (1 if what == "path" else 2)


def test_cache_of_another_dataset_encodes_what_it_lacks(run, cache, encoded, tmp_path, dataset_path):
    run(*cache, "--max_train_steps", 1)
    shutil.copytree(dataset_path, tmp_path / "data")
    metadata = tmp_path / "data" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("a red square 0", "something else"))
    encoded.clear()
    run(*cache, "--train_data_dir", tmp_path / "data")
    assert encoded == ["", "something else"]
    encoded.clear()
    run(*cache, "--max_train_samples", 3)
    assert encoded == [""]


def test_cache_needs_its_space_before_anything_is_encoded(run, cache, encoded, monkeypatch):
    """Of nine captions, each with 12 tokens of 48 and 24 pooled values in float32: 21.6 kB."""
    free, original = types.SimpleNamespace(free=9 * 4 * (12 * 48 + 24) - 1), shutil.disk_usage
    # Checkpoints have all the space they need.
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: free if Path(folder).name == "cache" else original(folder)
    )
    for reserved, more in ((0, "and"), (10**8, "checkpoints and the result 0.1 GB of the same disk, and")):
        monkeypatch.setattr(train, "bytes_to_come", lambda *args, reserved=reserved: reserved)
        with pytest.raises(ADTError, match=f"cache needs 0.0 GB for 9 captions, {more} {reserved / 1e9:.1f} GB are f"):
            run(*cache)
        free.free += 10**8
    assert encoded == ["", ""]
    free.free += 1 - 10**8
    run(*cache, "--max_train_steps", 1)
    free.free = 0
    run(*cache, "--max_train_steps", 1)  # all are there


@pytest.mark.parametrize("num_batches", [1, 3])
def test_captions_are_cached_in_batches(options, encoded, tmp_path, monkeypatch, num_batches):
    """By as many calls of the encoders, and what an embedding is does not depend on how many."""
    monkeypatch.setattr(data_utils, "CAPTIONS_PER_BATCH", 9 // num_batches)
    encoder = train.PromptEncoder(train.parse_args(options()), NO_ACCELERATOR)
    captions = [f"a red disc {n}" for n in range(8)] + [""]
    expected, calls = encoder(captions), []
    original = train.PromptEncoder.encode
    monkeypatch.setattr(
        train.PromptEncoder, "encode", lambda self, some: calls.append(len(some)) or original(self, some)
    )
    encoder.use_cache(tmp_path / "cache", captions, Accelerator(cpu=True))
    assert calls == [9 // num_batches] * num_batches
    for name, value in encoder(captions).items():
        assert torch.allclose(value, expected[name], rtol=0, atol=1e-5)


def test_cache_that_some_process_does_not_see_is_refused(run, cache, monkeypatch):
    """Two machines with a folder each: what one writes the other does not see."""
    others = iter([[], [True], [False]])  # the other has no bad image, the space, but not the files
    monkeypatch.setattr(data_utils, "gather_object", lambda values: [*values, *next(others)])
    with pytest.raises(ADTError, match="must be on a file system that all processes share"):
        run(*cache)


def test_stopped_encoding_goes_on_and_a_damaged_file_is_named(run, cache, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(data_utils, "CAPTIONS_PER_FILE", 3)
    original = train.PromptEncoder.encode

    def fail(self, prompts):
        if len(encoded) == 1 + 3:  # the second file's captions
            raise OSError("disk full")
        return original(self, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(train.PromptEncoder, "encode", fail)
        with pytest.raises(OSError):
            run(*cache)
    assert len(list((tmp_path / "cache").glob("embeddings-*.arrow"))) == 1
    encoded.clear()
    run(*cache, "--max_train_steps", 1)
    assert len(encoded) == 1 + 6
    files = sorted((tmp_path / "cache").glob("embeddings-*.arrow"))
    assert len(files) == 3 and sorted((tmp_path / "cache").iterdir()) == files  # nothing half-written

    # A file that ends between two records is a file of fewer captions.
    with pyarrow.memory_map(str(files[0])) as source:
        table = pyarrow.ipc.open_stream(source).read_all()
        with pyarrow.ipc.new_stream(tmp_path / "shorter", table.schema) as shorter:
            shorter.write_table(table.slice(0, 2))
    (tmp_path / "shorter").replace(files[0])
    encoded.clear()
    run(*cache, "--max_train_steps", 1)
    assert len(encoded) == 1 + 1

    files[1].write_bytes(files[1].read_bytes()[: files[1].stat().st_size // 2])
    with pytest.raises(ADTError, match=f"{files[1].name} is damaged: delete it"):
        run(*cache)


def test_every_caption_is_cached(dataset_path, tmp_path):
    rows = datasets.load_dataset("imagefolder", data_dir=dataset_path, split="train")
    rows = rows.remove_columns("text").add_column("text", [["one", "two"]] * 6 + [[], ["three"]])
    assert data_utils.list_captions(rows, types.SimpleNamespace(caption_column="text")) == ["", "one", "three", "two"]


def test_cache_options(options, capsys):
    for more, sentence in (
        (("--cache_text_embeddings", __file__), "is a file"),
        (("--cache_text_embeddings", Path(__file__, "below")), "is a file"),
        (("--output_dir", "o", "--cache_text_embeddings", "o/cache"), "must not lie in --output_dir"),
        (("--cache_text_embeddings", "x", "--offload_text_encoders"), "nothing to offload"),
    ):
        with pytest.raises(SystemExit):
            train.parse_args(options(*more))
        assert sentence in capsys.readouterr().err


# The VAE, and models that this script does not tune


@pytest.mark.parametrize(
    ("force_upcast", "precision", "dtype"),
    [(False, "bf16", torch.bfloat16), (False, "fp16", torch.float32), (True, "bf16", torch.float32)],
)
def test_precision_of_a_named_vae(options, tmp_path, force_upcast, precision, dtype):
    vae = tiny.make_vae(scaling_factor=0.2)
    vae.register_to_config(force_upcast=force_upcast)
    vae.save_pretrained(tmp_path / "vae")
    args = train.parse_args(options("--pretrained_vae_model_name_or_path", tmp_path / "vae"))
    accelerator = types.SimpleNamespace(device=torch.device("cpu"), mixed_precision=precision)
    assert train.load_frozen_vae(args, accelerator).dtype == dtype
    assert train.load_frozen_vae(train.parse_args(options()), accelerator).dtype == torch.float32


def test_half_safe_vae_trains_and_is_saved_in_float32(run, tmp_path):
    vae = tiny.make_vae(scaling_factor=0.2)
    vae.register_to_config(force_upcast=False)
    vae.save_pretrained(tmp_path / "vae")
    output = run(
        "--pretrained_vae_model_name_or_path", tmp_path / "vae", "--mixed_precision", "bf16",
        "--validation_prompts", "a red disc",
    )  # fmt: skip
    saved = load_file(output / "vae" / "diffusion_pytorch_model.safetensors")
    assert equal(saved, load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors"))
    assert json.loads((output / "vae" / "config.json").read_text())["scaling_factor"] == 0.2


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "is a StableDiffusionPipeline"),
        ("model_index.json", {"text_encoder": [None, None]}, "lacks a text encoder"),
        ("unet/config.json", {"addition_embed_type": None}, "is no SDXL base model"),
        ("unet/config.json", {"in_channels": 9}, "9 channels and the VAE of .* makes 4"),
        ("unet/config.json", {"time_cond_proj_dim": 8}, "guidance distilled"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "shifts its latents by a mean"),
        ("scheduler/scheduler_config.json", {"beta_schedule": None}, "has no schedule of betas"),
    ],
)
def test_unsuitable_models_are_refused(run, sdxl_path, tmp_path, monkeypatch, file, changes, sentence):
    monkeypatch.setattr(train, "load_image_caption_dataset", None)  # nothing is loaded before
    shutil.copytree(sdxl_path, tmp_path / "base")
    config = json.loads((tmp_path / "base" / file).read_text()) | changes
    config = {name: value for name, value in config.items() if not (name == "beta_schedule" and value is None)}
    (tmp_path / "base" / file).write_text(json.dumps(config))
    with pytest.raises(ADTError, match=sentence):
        run("--pretrained_model_name_or_path", tmp_path / "base")

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
"""The measures of `evaluate_adt.py`: from images and prompts to numbers."""

import functools
import importlib.util
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from huggingface_hub import hf_hub_download
from PIL import Image, ImageOps
from prdc.prdc import compute_nearest_neighbour_distances, compute_pairwise_distance
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPModel, CLIPTokenizer


# What each number is, and which way is better; None where neither is.
METRICS = {
    "fid": ("Fréchet distance on InceptionV3 features", "lower"),
    "fdd": ("Fréchet distance on DINOv2 features", "lower"),
    "precision": ("share of generated images near real ones", "higher"),
    "recall": ("share of real images near generated ones", "higher"),
    "hps": ("HPSv2, 100 times the cosine between image and prompt as people's preferences shaped it", "higher"),
    "aesthetic": ("LAION's aesthetic score, about 1 to 10", "higher"),
    "clip": ("CLIP score, 100 times the cosine between image and prompt", "higher"),
    "sharpness": ("variance of the Laplacian of the grey image in [0, 255]; real images have their own", None),
}
# What --metrics takes: one name for the pair that is computed together.
CHOICES = ("fid", "fdd", "precision_recall", "hps", "aesthetic", "clip", "sharpness")
NEED_REAL_IMAGES = {"fid", "fdd", "precision_recall"}
QUALITY = {"hps", "aesthetic"}  # these take the quality prompts where there are any
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


class EvaluationError(RuntimeError):
    """An error whose message is all that the user needs."""


# Images


def square(image, size):
    """A PIL image to RGB, its short side to `size` (bicubic with antialiasing), and its centre."""
    return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size), Image.Resampling.BICUBIC)


def pixels(image) -> torch.Tensor:
    """(3, H, W), uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalise(image, size, statistics) -> torch.Tensor:
    """A PIL image to (3, size, size), float32, as a network expects it."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    return (pixels(square(image, size)) / 255 - mean) / std


def laplacian_variance(image) -> torch.Tensor:
    """0-d, float64: of the grey image (0.299 R + 0.587 G + 0.114 B, rounded), borders mirrored as OpenCV does."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=torch.float64).view(1, 1, 3, 3)
    grey = torch.from_numpy(np.array(image.convert("L"))).double()[None, None]
    return F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="reflect"), kernel).var(correction=0)


# Networks. `prepare` makes a tensor of a PIL image, in a process that reads images; a batch of these, and as many
# prompts, become rows, one for each image. `record` says what the network is.


def find_weights(option, given, repository, filename, args) -> str:
    """The file that was given, or the Hub's.

    Raises:
        EvaluationError: where there is neither; it says which file is missing and where to get it.
    """
    if given is not None:
        if not Path(given).is_file():
            raise EvaluationError(
                f"--{option} {given} does not exist: the file is {filename} of https://huggingface.co/{repository}."
            )
        return given
    try:
        return hf_hub_download(repository, filename, cache_dir=args.cache_dir)
    except (OSError, ValueError) as error:  # what huggingface_hub and its HTTP client raise
        raise EvaluationError(
            f"{filename} cannot be downloaded from https://huggingface.co/{repository}: {error} Get it there and name "
            f"it with --{option}."
        ) from error


def check_options(args):
    """What can be said of the networks without loading one.

    Raises:
        EvaluationError: where a file is missing; it says which, and where to get it.
    """
    if needs("inception", args) and args.inception_weights is None and not has_torch_fidelity():
        raise EvaluationError(
            "--metrics fid needs InceptionV3: install torch-fidelity, or name inception-2015-12-05.pt (NVIDIA's, from "
            f"{INCEPTION_URL}) with --inception_weights."
        )
    if args.inception_weights is not None and not Path(args.inception_weights).is_file():
        raise EvaluationError(
            f"--inception_weights {args.inception_weights} does not exist: it is InceptionV3 as TorchScript, "
            f"inception-2015-12-05.pt from {INCEPTION_URL}."
        )
    if needs("hps", args):
        find_hps_weights(args)
    if needs("aesthetic", args):
        find_aesthetic_weights(args)
    if needs("dinov2", args):
        config = read_config("dinov2_model_name_or_path", args)
        if args.dinov2_resolution % config.patch_size:
            raise EvaluationError(
                f"--dinov2_resolution {args.dinov2_resolution} is not a multiple of {config.patch_size}."
            )
    for name in ("clip", "hps", "aesthetic"):
        if needs(name, args):
            option = "clip_model_name_or_path" if name == "clip" else f"{name}_clip_model_name_or_path"
            read_config(option, args)


def read_config(option, args):
    path = getattr(args, option)
    try:
        return AutoConfig.from_pretrained(path, cache_dir=args.cache_dir)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"--{option} {path} is not a readable model: {error}") from error


def find_hps_weights(args) -> str:
    return find_weights("hps_weights", args.hps_weights, "xswu/HPSv2", "HPS_v2_compressed.pt", args)


def find_aesthetic_weights(args) -> str:
    repository, filename = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
    return find_weights("aesthetic_weights", args.aesthetic_weights, repository, filename, args)


def has_torch_fidelity() -> bool:
    return importlib.util.find_spec("torch_fidelity") is not None


def crop(size):
    return f"{size}, bicubic, centre crop"


class DINOv2Features(nn.Module):
    """The CLS token after the last block and the final normalisation."""

    def __init__(self, args):
        super().__init__()
        self.model = AutoModel.from_pretrained(args.dinov2_model_name_or_path, cache_dir=args.cache_dir).float()
        name = Path(args.dinov2_model_name_or_path).name
        self.record = {"features": f"{name}, CLS token", "resize": crop(args.dinov2_resolution)}
        self.prepare = functools.partial(normalise, size=args.dinov2_resolution, statistics=IMAGENET)

    def forward(self, inputs, prompts):
        return self.model(inputs).last_hidden_state[:, 0]


class InceptionFeatures(nn.Module):
    """InceptionV3's pooled features, by a network that takes uint8 images and resizes them itself.

    A TorchScript file, or torch-fidelity's network where it is installed.
    """

    def __init__(self, args):
        super().__init__()
        if args.inception_weights is not None:
            try:
                self.model = torch.jit.load(args.inception_weights, map_location="cpu")
            except RuntimeError as error:
                raise EvaluationError(
                    f"--inception_weights {args.inception_weights} is not a readable TorchScript file: {error}"
                ) from error
            self.options, name = {"return_features": True}, Path(args.inception_weights).name
        else:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

            self.model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
            self.options, name = {}, "InceptionV3 of torch-fidelity"
        self.record = {"features": name, "resize": "by the network"}
        self.prepare = pixels

    def forward(self, inputs, prompts):
        features = self.model(inputs, **self.options)
        return features[0] if isinstance(features, tuple) else features


class CLIPScore(nn.Module):
    """100 times the cosine between the image's and the prompt's embedding."""

    def __init__(self, args):
        super().__init__()
        path = args.clip_model_name_or_path
        self.model = CLIPModel.from_pretrained(path, cache_dir=args.cache_dir).float()
        self.describe(Path(path).name, path, args)

    def describe(self, name, path, args):
        size = self.model.config.vision_config.image_size
        self.tokenizer = CLIPTokenizer.from_pretrained(path, cache_dir=args.cache_dir)
        self.record = {"features": name, "resize": crop(size)}
        self.prepare = functools.partial(normalise, size=size, statistics=CLIP)

    def forward(self, inputs, prompts):
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        output = self.model(pixel_values=inputs, **tokens.to(inputs.device))
        return 100 * (output.image_embeds * output.text_embeds).sum(1)


def from_open_clip(state) -> dict:
    """OpenCLIP's names for a CLIP model's tensors to those of `transformers.CLIPModel`.

    A block's query, key and value are one tensor there, and projections are stored transposed.
    """
    layer = {
        "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    whole = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.proj": "visual_projection.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "text_projection": "text_projection.weight",
        "logit_scale": "logit_scale",
    }
    norms = {
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }
    renamed = {}
    for name, value in state.items():
        if name == "attn_mask":  # a constant
            continue
        if name in whole:
            renamed[whole[name]] = value.T if name in ("visual.proj", "text_projection") else value
            continue
        module, _, kind = name.rpartition(".")
        if module in norms:
            renamed[f"{norms[module]}.{kind}"] = value
            continue
        match = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name)
        if match is None:
            raise EvaluationError(f"The HPSv2 weights have {name}, which no OpenCLIP model has.")
        prefix = f"{'vision' if match[1] else 'text'}_model.encoder.layers.{match[2]}"
        if match[3].startswith("attn.in_proj_"):
            kind = match[3].removeprefix("attn.in_proj_")
            for part, values in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{prefix}.self_attn.{part}_proj.{kind}"] = values
        else:
            module, _, kind = match[3].rpartition(".")
            if module not in layer:
                raise EvaluationError(f"The HPSv2 weights have {name}, which no OpenCLIP model has.")
            renamed[f"{prefix}.{layer[module]}.{kind}"] = value
    return renamed


class HPSv2Score(CLIPScore):
    """Human Preference Score v2: the CLIP score of a ViT-H/14 that was tuned on people's choices.

    Wu et al., Human Preference Score v2, arXiv:2306.09341; the paper's numbers are of version 2.0. The weights are
    OpenCLIP's; the CLIP model that is named gives its configuration and tokenizer alone.
    """

    def __init__(self, args):
        nn.Module.__init__(self)
        path, file = args.hps_clip_model_name_or_path, find_hps_weights(args)
        self.model = CLIPModel(CLIPConfig.from_pretrained(path, cache_dir=args.cache_dir))
        state = read_weights(file)
        load_weights(self.model, from_open_clip(state.get("state_dict", state)), file)
        self.describe(Path(file).name, path, args)


class AestheticScore(CLIPScore):
    """LAION's aesthetic predictor: linear layers, one or several, on CLIP ViT-L/14's normalised image embedding.

    Schuhmann, LAION-Aesthetics, 2022 (https://laion.ai/blog/laion-aesthetics/).
    """

    def __init__(self, args):
        nn.Module.__init__(self)
        path, file = args.aesthetic_clip_model_name_or_path, find_aesthetic_weights(args)
        self.model = CLIPModel.from_pretrained(path, cache_dir=args.cache_dir).float()
        state = read_weights(file)
        # "layers.0.weight", "layers.2.weight", ...: between them is dropout, and no activation; or "weight" alone.
        names = [name.removesuffix("weight") for name in state if name.endswith("weight")]
        names.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
        widths = [self.model.config.projection_dim, *(len(state[f"{name}bias"]) for name in names)]
        self.layers = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(widths)))
        renamed = {
            f"{n}.{kind}": state[f"{name}{kind}"] for n, name in enumerate(names) for kind in ("weight", "bias")
        }
        load_weights(self.layers, renamed, file)
        self.describe(f"{Path(file).name} on {Path(path).name}", path, args)

    def forward(self, inputs, prompts):
        embedding = self.model.visual_projection(self.model.vision_model(pixel_values=inputs).pooler_output)
        return self.layers(F.normalize(embedding, dim=-1))[:, 0]


def read_weights(file) -> dict:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise EvaluationError(f"{file} is not a readable file of weights: {error}") from error


def load_weights(model, state, file):
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise EvaluationError(f"{file} does not fit the named CLIP model: {error}") from error


# The metrics that each network serves.
NETWORKS = {
    "dinov2": (DINOv2Features, {"fdd", "precision_recall"}),
    "inception": (InceptionFeatures, {"fid"}),
    "clip": (CLIPScore, {"clip"}),
    "hps": (HPSv2Score, {"hps"}),
    "aesthetic": (AestheticScore, {"aesthetic"}),
}


def needs(network, args) -> bool:
    return bool(NETWORKS[network][1] & set(args.metrics))


def load_networks(args) -> dict:
    """The networks of `args.metrics`, on the CPU, so that a file that is missing or damaged is found early.

    Raises:
        EvaluationError: at the first that cannot be loaded.
    """
    networks = {}
    for name, (network, metrics) in NETWORKS.items():
        if needs(name, args):
            try:
                networks[name] = network(args).eval()
            except OSError as error:
                metric = " and ".join(sorted(metrics & set(args.metrics)))
                raise EvaluationError(f"--metrics {metric}: its network cannot be loaded: {error}") from error
    return networks


# Images to features


@dataclass
class ImageSet:
    """Images that are measured together.

    Attributes:
        load: an index to a PIL image. Raises `EvaluationError` where there is none.
        prompts: a string for each image.
        needs: what is made of them: keys of `NETWORKS`, and "sharpness".
    """

    load: Callable
    prompts: list
    needs: list


class Reader(torch.utils.data.Dataset):
    """By (number of the set, index): `{need: tensor}`, all made of the image in one reading, or an error's message."""

    def __init__(self, image_sets, prepare):
        self.image_sets, self.prepare = image_sets, prepare

    def __getitem__(self, key):
        number, index = key
        try:
            image = self.image_sets[number].load(index)
        except EvaluationError as error:  # a worker's own would come with its stack
            return str(error)
        return {need: self.prepare[need](image) for need in self.image_sets[number].needs}


def collate(examples):
    """Batched tensors, or the first message."""
    messages = [example for example in examples if isinstance(example, str)]
    return messages[0] if messages else {need: torch.stack([e[need] for e in examples]) for need in examples[0]}


@torch.no_grad()
def extract(image_sets, networks, args, accelerator):
    """What the networks make of every image, which is read once, by worker processes.

    The images are shared out over the processes of the run, and their rows gathered.

    Yields:
        for each set, in turn, in every process, `{need: (N, C) or (N,)}` on the CPU.

    Raises:
        EvaluationError: naming an image that cannot be read.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = []
    for number, image_set in enumerate(image_sets):
        own = [(number, index) for index in range(rank, len(image_set.prompts), world)]
        batches.append([own[n : n + args.batch_size] for n in range(0, len(own), args.batch_size)])
    prepare = {name: network.prepare for name, network in networks.items()} | {"sharpness": laplacian_variance}
    loader = iter(
        torch.utils.data.DataLoader(
            Reader(image_sets, prepare),
            batch_sampler=[batch for part in batches for batch in part],
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
    )
    for image_set, own_batches in zip(image_sets, batches, strict=True):
        parts = {}
        for keys in own_batches:
            inputs = next(loader)
            if isinstance(inputs, str):
                raise EvaluationError(inputs)
            prompts = [image_set.prompts[index] for _, index in keys]
            for need, values in inputs.items():
                if need in networks:
                    values = networks[need](values.to(accelerator.device, non_blocking=True), prompts)
                parts.setdefault(need, []).append(values.cpu())
        found = {}
        for process, own in enumerate(gather_object([{need: torch.cat(rows) for need, rows in parts.items()}])):
            for need, rows in own.items():
                whole = found.setdefault(need, rows.new_empty(len(image_set.prompts), *rows.shape[1:]))
                whole[process::world] = rows
        yield found


# Numbers


class FrechetDistance:
    """To one set of features, whose covariance's square root is computed once.

    `|m1 - m2|^2 + Tr S1 + Tr S2 - 2 Tr (S1 S2)^1/2` (Dowson and Landau, 1982), whose last trace is the sum of the
    roots of the eigenvalues of `S1^1/2 S2 S1^1/2`: these are those of `S1 S2`, of a symmetric matrix.

    Args:
        real: (N, C), of the real images.
        device: where it computes, in float64.
    """

    def __init__(self, real, device):
        real = real.to(device).double()
        self.mean = real.mean(0)
        covariance = (real - self.mean).T @ (real - self.mean) / (len(real) - 1)
        values, vectors = torch.linalg.eigh(covariance)
        self.trace, self.root = covariance.trace(), vectors * values.clamp(min=0).sqrt() @ vectors.T

    def to(self, generated) -> Callable:
        """A function from indices (M,) into `generated`, (N, C), to the distance to the features at these indices."""
        generated = generated.to(self.mean.device).double()
        rooted = generated @ self.root

        def distance(indices) -> float:
            times = torch.bincount(indices.to(generated.device), minlength=len(generated))
            rows, count = times.nonzero()[:, 0], len(indices)  # each once, with its weight
            weight = times[rows, None].double()
            mean = (weight * generated[rows]).sum(0) / count
            trace = (weight * (generated[rows] - mean).square()).sum() / (count - 1)
            centred = weight.sqrt() * (rooted[rows] - mean @ self.root)
            # Of the two Gram matrices, which share their eigenvalues but for zeros, the smaller.
            gram = centred.T @ centred if len(rows) > centred.shape[1] else centred @ centred.T
            roots = torch.linalg.eigvalsh(gram / (count - 1)).clamp(min=0).sqrt()
            return ((self.mean - mean).square().sum() + self.trace + trace - 2 * roots.sum()).item()

        return distance


def precision_and_recall(real, generated, nearest_k) -> dict:
    """Kynkäänniemi et al., arXiv:1904.06991: is an image nearer to one of the others than that one's k-th neighbour?

    Returns "precision", float64 (N,), 1 for each generated image near a real one, else 0, and "recall", (M,), for the
    real images near a generated one. Their means are `compute_prdc`'s.
    """
    real, generated = real.float().numpy(), generated.float().numpy()
    distances = compute_pairwise_distance(real, generated)
    near_real = distances < compute_nearest_neighbour_distances(real, nearest_k)[:, None]
    near_generated = distances < compute_nearest_neighbour_distances(generated, nearest_k)[None]
    return {
        "precision": torch.from_numpy(near_real.any(0)).double(),
        "recall": torch.from_numpy(near_generated.any(1)).double(),
    }


def bootstrap_interval(function, count, args, value=None):
    """The 2.5 % and 97.5 % percentiles of `function(indices)` over resampled indices; None without resamples.

    Those of a biased function are moved so that their mean is its `value` of all: a Fréchet distance grows when images
    are drawn twice.
    """
    if args.num_bootstrap == 0:
        return None
    generator = np.random.default_rng(args.seed)
    values = [function(torch.from_numpy(generator.integers(count, size=count))) for _ in range(args.num_bootstrap)]
    moved = 0.0 if value is None else value - np.mean(values)
    return (np.percentile(values, [2.5, 97.5]) + moved).tolist()


def needed(metrics) -> list:
    """What `extract` must make of images for these metrics."""
    names = [name for name, (_, served) in NETWORKS.items() if served & set(metrics)]
    return names + ["sharpness"] * ("sharpness" in metrics)


class Reference:
    """The real images, as the metrics compare with them.

    Args:
        features: what `extract` gave.
        device: where Fréchet distances are computed.
    """

    def __init__(self, features, metrics, device):
        # Metal has no float64.
        device = torch.device("cpu") if device.type == "mps" else device
        self.features = features
        self.frechet = {
            key: FrechetDistance(features[key], device)
            for metric, key in (("fid", "inception"), ("fdd", "dinov2"))
            if metric in metrics
        }


def caption_tokens(captions, networks) -> float | None:
    """Their mean length in CLIP's tokens, uncut and without the two marks; None without a network that counts so."""
    tokenizers = [networks[name].tokenizer for name in ("hps", "clip", "aesthetic") if name in networks]
    if not tokenizers:
        return None
    tokens = tokenizers[0](captions, add_special_tokens=False, verbose=False).input_ids
    return sum(map(len, tokens)) / len(captions)


def measure(features, metrics, reference, networks, args) -> dict:
    """`metrics` of one set of images.

    Args:
        features: what `extract` gave for them.
        metrics: names of `CHOICES`.
        reference: the real images' `Reference`; None for prompts without real images.
        networks: what `load_networks` gave.

    Returns:
        `{name: {"value", "interval", "n", ...}}`, with "scores" where there is one for each image.
    """
    results = {}
    for metric, key in (("fid", "inception"), ("fdd", "dinov2")):
        if metric in metrics:
            count, distance = len(features[key]), reference.frechet[key].to(features[key])
            value = distance(torch.arange(count))
            interval = bootstrap_interval(distance, count, args, value)
            results[metric] = {"value": value, "interval": interval, "n": count, **networks[key].record}
    if "precision_recall" in metrics:
        record = networks["dinov2"].record | {"k": args.nearest_k}
        found = precision_and_recall(reference.features["dinov2"], features["dinov2"], args.nearest_k)
        for name, near in found.items():
            # Resampled as shares of images; the neighbourhoods stay, since an image drawn twice is its own neighbour.
            interval = bootstrap_interval(lambda indices, near=near: near[indices].mean().item(), len(near), args)
            results[name] = {
                "value": near.mean().item(), "interval": interval, "n": len(features["dinov2"]), **record
            }  # fmt: skip
    for metric in ("hps", "aesthetic", "clip", "sharpness"):
        if metric in metrics:
            scores = features[metric].double()
            mean = bootstrap_interval(lambda indices, scores=scores: scores[indices].mean().item(), len(scores), args)
            record = {"resize": "none"} if metric == "sharpness" else networks[metric].record
            results[metric] = {"value": scores.mean().item(), "interval": mean, "n": len(scores), **record}
            if metric == "sharpness" and reference is not None:
                results[metric]["real images"] = round(reference.features["sharpness"].mean().item(), 2)
            results[metric]["scores"] = scores.tolist()
    return results

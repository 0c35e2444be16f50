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

import importlib.util
import pickle
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image, ImageOps
from prdc.prdc import compute_nearest_neighbour_distances, compute_pairwise_distance
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
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


def normalise(images, statistics):
    """PIL images of one size to a float tensor (B, 3, H, W) as a network expects it."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    return torch.stack([(pixels(image) / 255 - mean) / std for image in images])


class Loaded:
    """A row of things that are loaded when a slice of it is taken: thousands of images do not fit into memory."""

    def __init__(self, load, count):
        self.load, self.count = load, count

    def __len__(self):
        return self.count

    def __getitem__(self, part):
        if isinstance(part, int):
            return self.load(part)
        return [self.load(index) for index in range(*part.indices(self.count))]


def in_batches(function, items, batch_size):
    """`function` over slices of at most `batch_size` of `items`, concatenated, float64 on the CPU."""
    with torch.no_grad():
        parts = [function(items[n : n + batch_size]).cpu().double() for n in range(0, len(items), batch_size)]
    return torch.cat(parts)


# Networks. Each maps a list of PIL images, or of (image, prompt), to rows, and has a `record` of what it is.


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


class Network(nn.Module):
    """Knows its device, which a network without parameters would not."""

    def __init__(self):
        super().__init__()
        self.register_buffer("marker", torch.empty(0), persistent=False)

    @property
    def device(self):
        return self.marker.device


class DINOv2Features(Network):
    """The CLS token after the last block and the final normalisation."""

    def __init__(self, args):
        super().__init__()
        self.resolution = args.dinov2_resolution
        self.model = AutoModel.from_pretrained(args.dinov2_model_name_or_path, cache_dir=args.cache_dir).float()
        name = Path(args.dinov2_model_name_or_path).name
        self.record = {"features": f"{name}, CLS token", "resize": crop(self.resolution)}

    def forward(self, images):
        inputs = normalise([square(image, self.resolution) for image in images], IMAGENET)
        return self.model(inputs.to(self.device)).last_hidden_state[:, 0]


class InceptionFeatures(Network):
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

    def forward(self, images):
        features = self.model(torch.stack([pixels(image) for image in images]).to(self.device), **self.options)
        return features[0] if isinstance(features, tuple) else features


class CLIPScore(Network):
    """100 times the cosine between the image's and the prompt's embedding."""

    def __init__(self, args):
        super().__init__()
        path = args.clip_model_name_or_path
        self.model = CLIPModel.from_pretrained(path, cache_dir=args.cache_dir).float()
        self.tokenizer = CLIPTokenizer.from_pretrained(path, cache_dir=args.cache_dir)
        self.record = {"features": Path(path).name, "resize": crop(self.model.config.vision_config.image_size)}

    def forward(self, pairs):
        images = [square(image, self.model.config.vision_config.image_size) for image, _ in pairs]
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            [prompt for _, prompt in pairs], padding="max_length", max_length=length, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        output = self.model(pixel_values=normalise(images, CLIP).to(self.device), **tokens.to(self.device))
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
        Network.__init__(self)
        path, file = args.hps_clip_model_name_or_path, find_hps_weights(args)
        self.model = CLIPModel(CLIPConfig.from_pretrained(path, cache_dir=args.cache_dir))
        state = read_weights(file)
        load_weights(self.model, from_open_clip(state.get("state_dict", state)), file)
        self.tokenizer = CLIPTokenizer.from_pretrained(path, cache_dir=args.cache_dir)
        self.record = {"features": Path(file).name, "resize": crop(self.model.config.vision_config.image_size)}


class AestheticScore(Network):
    """LAION's aesthetic predictor: linear layers, one or several, on CLIP ViT-L/14's normalised image embedding.

    Schuhmann, LAION-Aesthetics, 2022 (https://laion.ai/blog/laion-aesthetics/).
    """

    def __init__(self, args):
        super().__init__()
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
        size = self.model.config.vision_config.image_size
        self.record = {"features": f"{Path(file).name} on {Path(path).name}", "resize": crop(size)}

    def forward(self, pairs):
        size = self.model.config.vision_config.image_size
        inputs = normalise([square(image, size) for image, _ in pairs], CLIP).to(self.device)
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


# Numbers


def laplacian_variance(images) -> torch.Tensor:
    """(B,): of the grey image (0.299 R + 0.587 G + 0.114 B, rounded), borders mirrored without the edge, as OpenCV."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=torch.float64).view(1, 1, 3, 3)
    values = []
    for image in images:
        grey = torch.from_numpy(np.array(image.convert("L"))).double()[None, None]
        values.append(F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="reflect"), kernel).var(correction=0))
    return torch.stack(values)


class Passthrough(nn.Module):
    """Lets torchmetrics take features where it expects images."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features


def frechet_distance(real, generated) -> float:
    """Of two sets of features, (N, C) and (M, C), float64. By one process, so that no other is waited for."""
    metric = FrechetInceptionDistance(Passthrough(real.shape[1]), sync_on_compute=False)
    metric.set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return metric.compute().item()


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


def bootstrap_interval(function, count, args, biased=False):
    """The 2.5 % and 97.5 % percentiles of `function(indices)` over resampled indices; None without resamples.

    Those of a `biased` one are moved so that their mean is the value itself: a Fréchet distance grows when images are
    drawn twice.
    """
    if args.num_bootstrap == 0:
        return None
    generator = np.random.default_rng(args.seed)
    values = [function(torch.from_numpy(generator.integers(count, size=count))) for _ in range(args.num_bootstrap)]
    moved = function(torch.arange(count)) - np.mean(values) if biased else 0.0
    return (np.percentile(values, [2.5, 97.5]) + moved).tolist()


def reference_features(real, networks, args) -> dict:
    """Of the real images, for the metrics that compare with them, and their sharpness."""
    reference = {
        key: in_batches(networks[key], real, args.batch_size) for key in ("dinov2", "inception") if key in networks
    }
    if "sharpness" in args.metrics:
        reference["sharpness"] = in_batches(laplacian_variance, real, args.batch_size).mean().item()
    return reference


def measure(images, prompts, metrics, reference, networks, args) -> dict:
    """`metrics` of one set of images.

    Args:
        images: a sequence of PIL images that slices, such as `Loaded`.
        prompts: as many strings.
        metrics: names of `CHOICES`.
        reference: what `reference_features` gave; empty for prompts without real images.
        networks: what `load_networks` gave.

    Returns:
        `{name: {"value", "interval", "n", ...}}`, with "scores" where there is one for each image.
    """
    count, results = len(images), {}

    def per_image(name, scores, record):
        mean = bootstrap_interval(lambda indices: scores[indices].mean().item(), count, args)
        results[name] = {"value": scores.mean().item(), "interval": mean, "n": count, **record}
        results[name]["scores"] = scores.tolist()

    features = {
        key: in_batches(networks[key], images, args.batch_size)
        for key in ("inception", "dinov2")
        if NETWORKS[key][1] & set(metrics)
    }
    for metric, key in (("fid", "inception"), ("fdd", "dinov2")):
        if metric in metrics:

            def distance(indices, key=key):
                return frechet_distance(reference[key], features[key][indices])

            value, interval = distance(torch.arange(count)), bootstrap_interval(distance, count, args, biased=True)
            results[metric] = {"value": value, "interval": interval, "n": count, **networks[key].record}
    if "precision_recall" in metrics:
        record = networks["dinov2"].record | {"k": args.nearest_k}
        found = precision_and_recall(reference["dinov2"], features["dinov2"], args.nearest_k)
        for name, near in found.items():
            # Resampled as shares of images; the neighbourhoods stay, since an image drawn twice is its own neighbour.
            interval = bootstrap_interval(lambda indices, near=near: near[indices].mean().item(), len(near), args)
            results[name] = {"value": near.mean().item(), "interval": interval, "n": count, **record}
    pairs = Loaded(lambda index: (images[index], prompts[index]), count)
    for metric in ("hps", "aesthetic", "clip"):
        if metric in metrics:
            per_image(metric, in_batches(networks[metric], pairs, args.batch_size), networks[metric].record)
    if "sharpness" in metrics:
        record = {"resize": "none"}
        if "sharpness" in reference:
            record["real images"] = round(reference["sharpness"], 2)
        per_image("sharpness", in_batches(laplacian_variance, images, args.batch_size), record)
    return results

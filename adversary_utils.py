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
"""The adversary of a run: its discriminator, what it sees images through, and what it says about a run.

- `check_feature_network`, `check_adversary`, `norm_group`: what is known before a model is loaded;
- `make_adversary`, `Adversary`: features, references, the discriminator's update;
- `global_partners`, `of_partners`: other images than a pair's own;
- `adversarial_weight`: the balance of the generator's two losses;
- `score_gap`, `reconstruction_difference`: what shows by what the discriminator tells real from generated;
- `DriftGuard`: whether validation images still show what they should.

It stands on `adt_utils.py`, where the discriminators are, on `training_utils.py` and on `data_utils.py`.
"""

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from transformers import AutoConfig, CLIPModel, CLIPProcessor, Dinov2Model

from adt_utils import (
    DiffAugment,
    FeatureNetwork,
    ProjectedDiscriminator,
    SiameseDiscriminator,
    largest_group,
    mismatched_partners,
)
from data_utils import first_images, normalize_pixels
from speed_utils import compile_hidden_states
from training_utils import ADTError, make_lr_scheduler, make_optimizer, prepare_trained


logger = get_logger(__name__)


# A cosine's range is 2, and so is the hinge's margin; scores this far apart leave the generator little to learn from.
SATURATION_GAP, SATURATION_ITERATIONS = 1.8, 300


def check_feature_network(args):
    """Refuses, by its configuration, a feature network that does not suit its options."""
    path = args.discriminator_model_name_or_path
    try:
        config = AutoConfig.from_pretrained(path, cache_dir=args.cache_dir)
    except (OSError, ValueError) as error:
        raise ADTError(f"--discriminator_model_name_or_path {path} is not readable: {error}") from error
    try:
        FeatureNetwork.check_config(config, args.discriminator_layers, args.discriminator_resolution)
    except ValueError as error:
        raise ADTError(str(error)) from error


def check_adversary(args):
    """Refuses, by their configurations, a feature network and a CLIP model that do not suit their options."""
    if not args.adversarial:
        return
    check_feature_network(args)
    path = args.drift_clip_model_name_or_path
    if path is None:
        return
    try:
        model_type = AutoConfig.from_pretrained(path, cache_dir=args.cache_dir).model_type
        CLIPProcessor.from_pretrained(path, cache_dir=args.cache_dir)
    except (OSError, ValueError) as error:
        raise ADTError(f"--drift_clip_model_name_or_path {path} is not readable: {error}") from error
    if model_type != "clip":
        raise ADTError(f"--drift_clip_model_name_or_path {path} is a '{model_type}', not a CLIP model.")


def norm_group(args) -> int:
    """Images to a group of the discriminator's local batch norm."""
    return args.discriminator_norm_group or largest_group(args.train_batch_size)


def make_feature_network(args) -> FeatureNetwork:
    """In float32: the gradient of a score with respect to a pixel is a small number."""
    model = Dinov2Model.from_pretrained(args.discriminator_model_name_or_path, cache_dir=args.cache_dir)
    if args.compile:
        compile_hidden_states(model)
    return FeatureNetwork(model.float(), args.discriminator_layers, args.discriminator_resolution)


def make_discriminator(channels, args) -> torch.nn.Module:
    torch.manual_seed(args.seed)  # its first weights, the same on every process
    if args.discriminator_type == "projected":
        return ProjectedDiscriminator(channels, len(args.discriminator_layers), norm_group(args))
    return SiameseDiscriminator(
        channels,
        len(args.discriminator_layers),
        similarity=args.discriminator_similarity,
        reduction=args.discriminator_reduction,
        ema_decay=args.discriminator_ema_decay,
        norm_group=norm_group(args),
    )


def make_adversary(models, run):
    """The run's adversary, unless it is plain fine-tuning; says what of its data the generator cannot reach."""
    if not run.args.adversarial:
        return None
    adversary = Adversary(run)
    difference = None
    if run.accelerator.is_main_process and run.args.real_images == "dataset":
        difference = reconstruction_difference(adversary.feature_network, models, run)
    if difference is not None:
        logger.info(
            f"In the discriminator's features your images differ from their reconstructions by the VAE by "
            f"{difference:.0%} of what they differ from each other: the generator can not remove that. See "
            "score_gap_late for whether the discriminator wins by it, and --real_images reconstructed."
        )
    return adversary


class Adversary:
    """The discriminator, and what it sees images through."""

    def __init__(self, run):
        args = run.args
        self.pairing, self.sees_pairs = args.augmentation_pairing, args.discriminator_type == "siamese"
        self.feature_network = make_feature_network(args).to(run.accelerator.device)
        self.augment = DiffAugment(args.augmentation_policy)
        network = make_discriminator(self.feature_network.channels, args)
        optimizer = make_optimizer(torch.optim.AdamW, network, args.discriminator_learning_rate, args)
        lr_scheduler = make_lr_scheduler(optimizer, args.discriminator_lr_warmup_steps, args.max_train_steps, args)
        self.discriminator = prepare_trained("discriminator", network, optimizer, lr_scheduler, run)
        self.saturated_for, self.warned = 0, False

    def features(self, batch, images, purpose):
        """`F(T(images))`, for images that go with those of `batch`, by the augmentation drawn for `purpose`."""
        return self.feature_network(self.augment(images, batch.augmentation[purpose]))

    @torch.no_grad()
    def real_features(self, batch, purpose):
        """`F(T(y))` of the real images by the augmentation drawn for `purpose`; for None without one.

        The micro-batch keeps them: what is asked for again, in this update or the generator's, is not computed again.
        """
        purpose = purpose if self.augment.policy else None
        if purpose not in batch.real_features:
            images = batch.images if purpose is None else self.augment(batch.images, batch.augmentation[purpose])
            batch.real_features[purpose] = self.feature_network(images)
        return batch.real_features[purpose]

    def reference_features(self, batch, scored_as):
        """`F(T'(y))` for an image whose own augmentation is `scored_as`; None where no pairs are looked at."""
        if not self.sees_pairs:
            return None
        return self.real_features(
            batch, {"input": None, "shared": scored_as, "independent": "reference"}[self.pairing]
        )

    def mismatched_references(self, batches, references):
        """For each image the reference features of its `global_partners` one, of another caption.

        Args:
            references: each micro-batch's `reference_features`.

        Returns:
            as `references`; None where all captions of the global batch are equal.
        """
        accelerator = self.discriminator.run.accelerator
        partners = global_partners([batch.captions for batch in batches], accelerator)
        if partners is None:
            return None
        found = [of_partners(layer, partners, accelerator) for layer in zip(*references)]
        return [list(features) for features in zip(*found)]

    def step(self, iteration):
        """The discriminator's update; then its twin heads follow, where it has them."""
        if self.discriminator.step(iteration) and isinstance(self.discriminator.network, SiameseDiscriminator):
            self.discriminator.network.update_twin()

    def warn_if_saturated(self, values):
        """Once, after many iterations of `values` in which the scores of real and generated are far apart."""
        gap = values["real_score"] - values["fake_score"]
        self.saturated_for = self.saturated_for + 1 if gap > SATURATION_GAP else 0
        if self.saturated_for >= SATURATION_ITERATIONS and not self.warned:
            self.warned = True
            logger.warning(
                f"The discriminator is saturated: its scores for real and generated images have been {gap:.2f} "
                f"apart for {SATURATION_ITERATIONS} iterations. Lower --discriminator_learning_rate."
            )


# Mismatched pairs


def global_partners(captions, accelerator) -> torch.Tensor | None:
    """For each image of this process the index in the global batch of another one, as `mismatched_partners` chooses.

    The choice is made in the global batch, since a micro-batch may hold one image only, and so that processes and
    micro-batches can stand for each other.

    Args:
        captions: each micro-batch's, lists of B strings.

    Returns:
        (micro-batches, B); None where all captions of the global batch are equal, of which it warns.
    """
    of_process = gather_object([captions])
    partners = mismatched_partners([text for micro in zip(*of_process) for part in micro for text in part])
    if partners is None:
        logger.warning_once("All captions of a global batch are equal: it has no mismatched pair.")
        return None
    shape = (len(captions), accelerator.num_processes, len(captions[0]))
    return torch.tensor(partners, device=accelerator.device).view(shape)[:, accelerator.process_index]


def of_partners(values, partners, accelerator) -> list[torch.Tensor]:
    """The partners' values, (B, ...), for each micro-batch.

    Args:
        values: each micro-batch's own, (B, ...).
        partners: see `global_partners`.
    """
    everywhere = accelerator.gather(torch.stack(list(values))).unflatten(0, (-1, len(values)))
    everywhere = everywhere.transpose(0, 1).flatten(0, 2)  # by position in the global batch
    return [everywhere[rows] for rows in partners]


# The balance of the losses, and what the discriminator tells apart


def adversarial_weight(values, args) -> float:
    """The adversarial loss's weight: the option's, or what balances the gradients at the predictions.

    Args:
        values: the update's, with the two norms.
    """
    if args.adversarial_loss_weight != "auto":
        return args.adversarial_loss_weight
    norm = values["adversarial_gradient_norm"]
    return args.adversarial_gradient_ratio * values["diffusion_gradient_norm"] / norm if norm > 0 else 0.0


PATH_THIRDS = ("early", "middle", "late")


def path_third(start_index, num_inference_steps) -> str:
    """Where on the sampler's path an inference starts: early, from much noise, to late, from little."""
    return PATH_THIRDS[len(PATH_THIRDS) * start_index // num_inference_steps]


def score_gap(values, start_index, num_inference_steps) -> dict:
    """By how much the scores of real and generated images part, under the name of the third of the path.

    After a late start a generated image is little else than what the VAE makes of the real one, so that a gap there
    is one that no update of the generator closes.
    """
    name = f"score_gap_{path_third(start_index, num_inference_steps)}"
    return {name: values["real_score"] - values["fake_score"]}


@torch.no_grad()
def reconstruction_difference(feature_network, models, run, count=16) -> float | None:
    """By how much images differ from what the VAE makes of them, over how much they differ from each other.

    Args:
        count: images of the run's beginning, at most.

    Returns:
        the ratio of the root mean squares over images and positions of the features' differences, averaged over the
        layers; 0 for a perfect VAE; None where the images do not differ, or there is one alone.
    """
    device, vae = run.accelerator.device, models.vae
    images = first_images(run, count)
    images = [image for image in images if image.shape == images[0].shape]  # of a bucket, else they do not compare
    count, to_itself, to_another, previous = len(images), 0.0, 0.0, None
    for image in images:
        image = normalize_pixels(image[None].to(device))
        reconstruction = run.family.decode_latents(models.decoder, run.family.encode_images(vae, image, 0.0))
        features, reconstructed = feature_network(image), feature_network(reconstruction)
        to_itself += squared_distances(features, reconstructed)
        if previous is not None:
            to_another += squared_distances(features, previous)
        previous = features
    if count < 2 or not to_another.all():
        return None
    return (to_itself / count / (to_another / (count - 1))).sqrt().mean().item()


def squared_distances(first, second) -> torch.Tensor:
    """For each layer the squared distance of two images' features."""
    return torch.stack([(a - b).square().sum() for a, b in zip(first, second, strict=True)])


# Drift


class DriftGuard:
    """Tells tuned validation images that still show what the base's show, in a new look, from ones that do not.

    The discriminator's DINOv2 compares each tuned image with the base's of the same prompt and noise. What counts is
    by how much it is more like that one than like other prompts', over the same for the base's images: a new look
    lowers both similarities, a lost prompt their difference. So 1 is as good as the base, and 0 an image of anything.
    With a CLIP model, which stays on the CPU, the same is asked of the images and their prompts.

    Args:
        feature_network: a `FeatureNetwork`.
        prompts: list of N strings, two at least.
        base_images: N lists of M PIL images.

    Raises:
        ADTError: for `--stop_on_drift`, where the base's own images are no more like their own than like others'.
            Without it this is said, and drift is not looked for.
    """

    LEAST_MARGIN = 0.01  # of cosines; a share of less would be noise

    def __init__(self, feature_network, prompts, base_images, args):
        self.feature_network, self.prompts, self.args = feature_network, prompts, args
        self.clip = None
        if args.drift_clip_model_name_or_path is not None:
            path, hub = args.drift_clip_model_name_or_path, {"cache_dir": args.cache_dir}
            self.clip = CLIPModel.from_pretrained(path, **hub).requires_grad_(False).eval().float()
            self.processor = CLIPProcessor.from_pretrained(path, **hub)
        self.base_embeddings = self.embed(base_images)
        self.base_margins = {}
        for kind, margin in self.margins(base_images).items():
            if margin >= self.LEAST_MARGIN:
                self.base_margins[kind] = margin
                continue
            message = f"The base's validation images are hardly more like their own {kind} than like other prompts'"
            if args.stop_on_drift:
                raise ADTError(f"{message}: --stop_on_drift needs other --validation_prompts, or another model.")
            logger.warning(f"{message}: drift from it is not looked for.")

    @torch.no_grad()
    def embed(self, images) -> torch.Tensor:
        device = self.feature_network.mean.device
        pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for row in images for image in row]
        return torch.cat([self.feature_network.embed(image[None].to(device)) for image in pixels])

    @torch.no_grad()
    def margins(self, images) -> dict:
        """For each kind of target by how much images are more like their own than like others; N lists of images."""
        found = {"base": self.margin(self.embed(images), self.base_embeddings)}
        if self.clip is not None:
            flat = [image for row in images for image in row]
            inputs = self.processor(text=self.prompts, images=flat, padding=True, truncation=True, return_tensors="pt")
            output = self.clip(**inputs)
            found["prompt"] = self.margin(
                output.image_embeds, output.text_embeds.repeat_interleave(len(images[0]), dim=0)
            )
        return found

    def margin(self, embeddings, targets) -> float:
        """The mean cosine of (N M, C) embeddings to their own targets less that to other prompts'."""
        similarity = F.cosine_similarity(embeddings[:, None], targets[None], dim=-1)
        prompt = torch.arange(len(self.prompts), device=similarity.device)
        prompt = prompt.repeat_interleave(len(similarity) // len(prompt))
        return (similarity.diag().mean() - similarity[prompt[:, None] != prompt].mean()).item()

    def check(self, images) -> tuple[dict, bool]:
        """What tuned `images` have kept, {name: share}, and whether it is too little, of which it warns."""
        margins, least = self.margins(images), 1 - self.args.drift_tolerance
        kept = {f"{kind}_similarity_kept": margins[kind] / base for kind, base in self.base_margins.items()}
        lost = {name: value for name, value in kept.items() if value < least}
        for name, value in lost.items():
            logger.warning(
                f"The validation images drift: {name} is {value:.0%}, and --drift_tolerance "
                f"{self.args.drift_tolerance:g} asks for {least:.0%}. A VAE that can draw your images, a lower "
                "adversarial weight or --mismatched_pair_weight may help."
            )
        return kept, bool(lost)

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
"""A diffusion-GAN hybrid: the diffusion loss, and a classifier's verdict on what the network makes of it in one step.

    accelerate launch --mixed_precision bf16 -m related.train_hybrid --family sd15 \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --dataset_name DATASET --caption_column text --train_batch_size 8 --output_dir sd15-hybrid

The method is that of *Improving trained diffusion model with adversarial loss for image generation* (Yuval Gat and
Boaz Shmueli, 2026), here on latents. The discriminator is a frozen ResNet with a new head, which alone trains, by
binary cross-entropy: real images against the decoded `x_0` that one prediction implies. First it trains by itself;
then each iteration updates it, and the generator with the diffusion loss and the discriminator's, at the same
prediction. The second counts for images of little noise alone, by a limit that rises over the run, and its weight
rises, too. The generator's deep blocks do not train.

The paper's result is sharper images of less variety. It says of the curriculum that the complexity of the training
grows, and nothing of what grows: here it is the range of timesteps.
"""

import sys
import time
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from accelerate.logging import get_logger
from torch import nn
from transformers import AutoConfig, ResNetModel

from adt_utils import FeatureNetwork
from data_utils import load_micro_batches, make_generator
from option_utils import Nature, adder, non_negative_int, parse_options, positive_float, positive_int, share
from output_utils import Validation, finish_run, load_checkpoint, register_checkpoint_hooks, save_checkpoint
from related.related_utils import (
    FAMILIES,
    load_prompt_encoder,
    make_parser,
    parse_family,
    predicted_original,
    prediction_type,
    start_run,
    tagged_family,
)
from training_utils import (
    ADTError,
    FrozenModels,
    Method,
    Progress,
    Totals,
    check_finite,
    end_run,
    make_lr_scheduler,
    make_optimizer,
    prepare_generator,
    prepare_trained,
)


logger = get_logger(__name__)
DESCRIPTION = "Diffusion-GAN hybrid: the diffusion loss and a ResNet discriminator on one-step predictions."
HYBRID_FAMILIES = ("sd15", "sdxl")


def parse_args(input_args=None):
    family = parse_family(DESCRIPTION, input_args, HYBRID_FAMILIES)
    parser = make_parser(
        family,
        DESCRIPTION,
        without=("use_aspect_ratio_buckets", "aspect_ratio_buckets"),  # its discriminator sees squares
        families=HYBRID_FAMILIES,
        output_dir=f"{family}-hybrid",
        tracker_project_name=f"hybrid-{family}",
        learning_rate=5e-6,
    )
    add = adder(parser.add_argument_group("diffusion-GAN hybrid"))
    add("--hybrid_loss_weight", type=positive_float, default=0.002, help="Of the discriminator's verdict.")
    add("--hybrid_ramp_steps", type=non_negative_int, default=1000,
        help="Generator updates in which that weight rises from 0.")  # fmt: skip
    add("--curriculum_start", type=share, default=0.5,
        help="The verdict counts at timesteps below this share of the schedule, at first.")  # fmt: skip
    add("--curriculum_end", type=share, default=1.0, help="That share at the run's end.")
    add("--generator_start_step", type=non_negative_int, default=500,
        help="Iterations in which only the discriminator trains.")  # fmt: skip
    add("--freeze_blocks", nargs="*", default=None,
        help="Shell patterns of names of parameters that do not train, such as mid_block.*; those of the deepest "
        "blocks where nothing is said, none with nothing behind the flag.")  # fmt: skip
    add = adder(parser.add_argument_group("discriminator"))
    add("--discriminator_model_name_or_path", Nature.BY_CONTENT, default="microsoft/resnet-18",
        help="A ResNet, which is frozen.")  # fmt: skip
    add("--discriminator_resolution", type=positive_int, default=224, help="Side of the images that it sees.")
    add("--discriminator_learning_rate", type=positive_float, default=4e-5, help="The discriminator's.")
    add("--discriminator_lr_warmup_steps", type=non_negative_int, default=0, help="In discriminator updates.")
    args = parse_options(parser, FAMILIES[family].SAMPLERS, input_args)
    if not 0 < args.curriculum_start <= args.curriculum_end:
        parser.error("--curriculum_start must be greater than 0 and at most --curriculum_end.")
    if args.curriculum_start < args.curriculum_end:
        # The curriculum lasts as long as the run: a resumed one must not be of another length.
        args.natures = args.natures | {"max_train_steps": frozenset()}
    return args


def count_updates(args) -> int:
    return max(0, args.max_train_steps - args.generator_start_step)


def make_family(args):
    return tagged_family(FAMILIES[args.family], "diffusion-gan")


def make_method(args) -> Method:
    return Method(
        name="diffusion-GAN hybrid",
        kind="a diffusion-GAN hybrid: the diffusion loss, and a discriminator on ResNet features that told its "
        "one-step predictions from real images",
        sampling="The saved scheduler and the call above ({described}) are a choice: training has not sampled.",
        count_updates=count_updates,
    )


# The discriminator


class ResNetFeatures(FeatureNetwork):
    """`F`: a frozen `transformers.ResNetModel`, in float32, and the image path that leads into it.

    Args:
        model: the `ResNetModel`; it is frozen and stays in `eval()`.
        resolution: images are resized to this side before they enter.
    """

    def __init__(self, model, resolution):
        super().__init__(model, (), resolution)

    @staticmethod
    def check_config(config, layers, resolution):
        if config.model_type != "resnet":
            raise ValueError(f"The discriminator's feature network must be a ResNet, not '{config.model_type}'.")

    @property
    def channels(self) -> int:
        return self.model.config.hidden_sizes[-1]

    def input_size(self, height, width):
        return self.resolution, self.resolution

    def forward(self, images):
        """images: (B, 3, H, W) in [-1, 1]. Returns the pooled features, (B, C) float32."""
        return self.run_model(images).pooler_output.flatten(1)


class BinaryHead(nn.Linear):
    """Features (B, C) to logits (B,), positive for real; in float32, under autocast too."""

    def __init__(self, channels):
        super().__init__(channels, 1)

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features).squeeze(1)


class HybridAdversary:
    """The discriminator, of which the head alone trains, and what it sees images through."""

    def __init__(self, run):
        args = run.args
        model = ResNetModel.from_pretrained(args.discriminator_model_name_or_path, cache_dir=args.cache_dir)
        self.feature_network = ResNetFeatures(model.float(), args.discriminator_resolution)
        self.feature_network.to(run.accelerator.device)
        torch.manual_seed(args.seed)  # the head's first weights, the same on every process
        head = BinaryHead(self.feature_network.channels)
        optimizer = make_optimizer(torch.optim.AdamW, head, args.discriminator_learning_rate, args)
        lr_scheduler = make_lr_scheduler(optimizer, args.discriminator_lr_warmup_steps, args.max_train_steps, args)
        self.discriminator = prepare_trained("discriminator", head, optimizer, lr_scheduler, run)


def cross_entropy(logits, real: bool):
    """`-log D` for `real`, else `-log(1 - D)`, where `D = sigmoid(logits)`; as `logits`."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)), reduction="none")


def check_discriminator(args):
    """Refuses a model that is no ResNet, by its configuration."""
    path = args.discriminator_model_name_or_path
    try:
        config = AutoConfig.from_pretrained(path, cache_dir=args.cache_dir)
    except (OSError, ValueError) as error:
        raise ADTError(f"--discriminator_model_name_or_path {path} is not readable: {error}") from error
    try:
        ResNetFeatures.check_config(config, (), args.discriminator_resolution)
    except ValueError as error:
        raise ADTError(str(error)) from error


# What trains, and when


def trained_names(module, args) -> list[str]:
    """The names of the parameters that train, or under LoRA of the weights that get an adapter.

    The network is built without weights for it.

    Raises:
        ADTError: for a pattern of `--freeze_blocks` that changes nothing, or where nothing is left.
    """
    family = module.FAMILY
    config = family.network_class.load_config(
        args.pretrained_model_name_or_path,
        subfolder=family.network_name,
        revision=args.revision,
        cache_dir=args.cache_dir,
    )
    with init_empty_weights():
        names = [name for name, _ in family.network_class.from_config(config).named_parameters()]
    if args.use_lora:
        targets = tuple(f".{target}.weight" for target in args.lora_layers)
        names = [name for name in names if f".{name}".endswith(targets)]
    patterns = args.freeze_blocks
    if patterns is None:
        # Fine detail is the other blocks' work. These need not have an adapter's target.
        deepest = len(config["block_out_channels"]) - 1
        patterns = [f"down_blocks.{deepest}.*", "mid_block.*", "up_blocks.0.*"]
    else:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ADTError(f"--freeze_blocks {pattern} matches no parameter that would train.")
    names = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not names:
        raise ADTError("--freeze_blocks leaves nothing to train.")
    return names


def check_method(noise_scheduler, args):
    """Refuses what this method's own options name and the models' configurations tell."""
    check_discriminator(args)
    trained_names(FAMILIES[args.family], args)


def load_partly_frozen(module, args, accelerator):
    """The network, with its own weights or adapters trainable but for those of `--freeze_blocks`.

    A frozen adapter would be zero for ever, so there is none.
    """
    names = trained_names(module, args)
    if args.use_lora:
        layers = [name.removesuffix(".weight") for name in names]
        return module.load_network(args.replace(lora_layers=layers), accelerator)
    network = module.load_network(args, accelerator)
    names = set(names)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in names)
    return network


def hybrid_weight(n_update, args) -> float:
    """`lambda` of the 0-based generator update: from 0 to `--hybrid_loss_weight` over `--hybrid_ramp_steps`."""
    if n_update >= args.hybrid_ramp_steps:
        return args.hybrid_loss_weight
    return args.hybrid_loss_weight * n_update / args.hybrid_ramp_steps


def curriculum_limit(n_update, args) -> float:
    """The share of the schedule below which the verdict counts in the 0-based generator update; at the start before.

    It grows by the same amount with each update, and the last has `--curriculum_end`.
    """
    progress = max(0, n_update) / max(1, count_updates(args) - 1)
    return args.curriculum_start + (args.curriculum_end - args.curriculum_start) * progress


def train(generator, adversary, models, validation, module, run):
    """The training loop, its comments numbered as the algorithm."""
    args = run.args
    progress = Progress(generator, models.sampler, run)
    loader = load_micro_batches(run, save_checkpoint)
    for iteration in range(run.first_iteration, args.max_train_steps):
        started = time.perf_counter()
        # The global generator serves dropout alone, where the model has any.
        dropout = make_generator(args.seed, "dropout", iteration, run.accelerator.process_index)
        torch.manual_seed(dropout.initial_seed())

        # 1. Encode the global batch's micro-batches.
        with models.prompt_encoder.on_device:
            batches = [
                prepare_batch(next(loader), iteration, models, module, run)
                for _ in range(args.gradient_accumulation_steps)
            ]
        # 2. The curriculum's range of timesteps.
        n_update = iteration - args.generator_start_step
        limit = curriculum_limit(n_update, args)
        # 3. What the network makes of the images there in one step, decoded.
        generator.wrapped.eval()
        for batch in batches:
            batch.generated = one_step_images(generator.wrapped, batch, limit, iteration, models, module, args)
        # 4. Update the discriminator.
        values = update_discriminator(batches, iteration, adversary, run)
        # 5. Update the generator, unless the discriminator trains by itself yet.
        if n_update >= 0:
            weight = hybrid_weight(n_update, args)
            values |= update_generator(batches, limit, weight, iteration, generator, adversary, models, module, run)
            values["hybrid_loss_weight"] = weight

        progress.log(values | {"curriculum_limit": limit, "lr": generator.lr}, iteration, started)
        del batches
        done, stopping = iteration + 1, run.interruption.is_due(iteration + 1)
        if stopping or done % args.checkpointing_steps == 0:
            save_checkpoint(done, run)
        if not stopping and validation.is_due(done):
            validation.log(done)
        if stopping:
            break
    progress.close()


def prepare_batch(examples, iteration, models, module, run):
    """Step 1: the family's, with contiguous latents.

    With channels-last ones, which images make of them, PyTorch's group norm crashes on a CPU where its input needs no
    gradient, as behind a frozen first layer.
    """
    batch = module.prepare_batch(examples, iteration, models, run)
    return replace(batch, latents=batch.latents.contiguous())


def decode_prediction(prediction, latents, noise, levels, iteration, models, module):
    """The images (B, 3, H, W), in about [-1, 1], of the `x_0` that a prediction for `a x_0 + s eps` implies.

    Args:
        prediction, latents, noise: (B, C, h, w), the last two `x_0` and `eps`.
        levels: `a` and `s`, (B, 1, 1, 1) each.

    Raises:
        ADTError: where the prediction is not finite.
    """
    a, s = levels
    sample = a * latents + s * noise
    original = predicted_original(prediction, sample, levels, prediction_type(models.noise_scheduler))
    check_finite({"one-step prediction": original.detach().abs().max().item()}, iteration)
    return module.decode_latents(models.vae, original)


@torch.no_grad()
def one_step_images(network, batch, limit, iteration, models, module, args):
    """Steps 2 and 3: (B, 3, H, W), at timesteps drawn for each image, uniform over the schedule's share `limit`."""
    timesteps, levels = module.plain_noise_levels(limit * batch.density, models.noise_scheduler)
    _, prediction = module.diffusion_loss(network, batch, timesteps, levels, models.noise_scheduler, args)
    return decode_prediction(prediction, batch.latents, batch.loss_noise, levels, iteration, models, module)


def update_discriminator(batches, iteration, adversary, run) -> dict:
    """Step 4: `-E[log D(x)] - E[log(1 - D(x_hat_0))]`, for the head alone."""
    discriminator, totals = adversary.discriminator, Totals(len(batches))
    for n, batch in enumerate(batches):
        with torch.no_grad():
            features = adversary.feature_network(torch.cat([batch.images, batch.generated]))
        with discriminator.synchronise_if(n == len(batches) - 1):
            real, fake = discriminator.wrapped(features).chunk(2)
            loss = (cross_entropy(real, True) + cross_entropy(fake, False)).mean()
            run.accelerator.backward(loss)
        totals.add_means(discriminator_loss=loss, real_score=real.mean(), fake_score=fake.mean())
    values = totals.reduce(run.accelerator, iteration)
    discriminator.step(iteration)
    return values | {"discriminator_lr": discriminator.lr}


def adversarial_gradient(prediction, chosen, batch, levels, iteration, adversary, models, module):
    """The loss `E[-log D(x_hat_0)]`, in which images that are not `chosen` count as 0, at a prediction.

    A mean over all images, so that how they are shared out over processes and micro-batches does not matter.

    Args:
        prediction: (B, C, h, w), whose own graph is left alone.
        chosen: (B,). The others do not go through the decoder.

    Returns:
        the 0-d loss, and its gradient with respect to the prediction, as that.
    """
    gradient = torch.zeros_like(prediction)
    if not chosen.any():
        return gradient.sum(), gradient
    part = prediction.detach()[chosen].requires_grad_()
    levels = [level[chosen] for level in levels]
    images = decode_prediction(
        part, batch.latents[chosen], batch.loss_noise[chosen], levels, iteration, models, module
    )
    # Not the wrapped head: data parallelism would wait for gradients of its weights, which get none here.
    logits = adversary.discriminator.network(adversary.feature_network(images))
    loss = cross_entropy(logits, True).sum() / len(prediction)
    gradient[chosen] = torch.autograd.grad(loss, part)[0]
    return loss.detach(), gradient


def update_generator(batches, limit, weight, iteration, generator, adversary, models, module, run) -> dict:
    """Step 5: `L_diff + lambda E[-log D(x_hat_0)]`, both of the same prediction; the second below `limit` alone.

    `generator_loss` is its mean over the images that count, where there are any, and `adversarial_share` is how many.
    """
    totals, scheduler = Totals(len(batches)), models.noise_scheduler
    generator.wrapped.train()
    for n, batch in enumerate(batches):
        timesteps, levels = module.plain_noise_levels(batch.density, scheduler)
        chosen = timesteps < limit * scheduler.config.num_train_timesteps
        with generator.synchronise_if(n == len(batches) - 1):
            loss, prediction = module.diffusion_loss(generator.wrapped, batch, timesteps, levels, scheduler, run.args)
            diffusion_gradient = torch.autograd.grad(loss, prediction, retain_graph=True)[0]
            generator_loss, gradient = adversarial_gradient(
                prediction, chosen, batch, levels, iteration, adversary, models, module
            )
            # The second term has the verdict's gradient at the prediction: one backward for both.
            run.accelerator.backward(loss + weight * (gradient * prediction).sum())
        totals.add_means(diffusion_loss=loss, generator_loss=generator_loss, adversarial_share=chosen.float().mean())
        totals.add_squared_norms(
            diffusion_gradient_norm=diffusion_gradient.square().sum(),
            adversarial_gradient_norm=gradient.square().sum(),
        )
    values = totals.reduce(run.accelerator, iteration)
    generator_loss = values.pop("generator_loss")
    if values["adversarial_share"] > 0:
        values["generator_loss"] = generator_loss / values["adversarial_share"]
    generator.step(iteration)
    return values


def tune(sampler, noise_scheduler, module, run):
    """The run from its models' weights to the saved result.

    A function of its own, so that nothing refers to the trained networks any more when `end_run` closes the run.
    """
    args, accelerator = run.args, run.accelerator
    prompt_encoder, validation_conditions = load_prompt_encoder(module, run, args.validation_prompts or [])
    models = FrozenModels(module.load_frozen_vae(args, accelerator), prompt_encoder, sampler, noise_scheduler)
    generator = prepare_generator(load_partly_frozen(module, args, accelerator), run)
    adversary = HybridAdversary(run)
    register_checkpoint_hooks(generator, run)
    validation = Validation(generator, None, models, validation_conditions, run)
    load_checkpoint(run)
    with run.interruption:
        train(generator, adversary, models, validation, module, run)
        finish_run(generator, models, validation, run)


def main(args):
    module = FAMILIES[args.family]
    run, sampler, noise_scheduler = start_run(module, make_family, make_method, args, check_method)
    if run.num_generator_updates == 0:
        logger.warning("The generator is never updated: --max_train_steps is at most --generator_start_step.")
    tune(sampler, noise_scheduler, module, run)
    end_run(run)


if __name__ == "__main__":
    try:
        main(parse_args())
    except ADTError as error:
        sys.exit(f"error: {error}")

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
"""What any of the training scripts needs, and no model family tells as its own story.

The sections can be read alone:

- a run's schedule: `global_batch_size`, `resolve_schedule`;
- samplers of models with a variance-preserving schedule: `SAMPLERS`, `configure_sampler`;
- the run: `Family`, `Method`, `Run`, `start_accelerator`, `Progress`, `end_run`;
- frozen and trained networks: `load_vae`, `prepare_network`, `sample_posterior`, `decode_checkpointed`;
- a micro-batch: `Batch`, `Conditions`, `make_predict`, `roll_out`;
- updates: `Totals`, `Trained`, `prepare_generator`.

It stands on `option_utils.py`, `memory_utils.py`, `speed_utils.py`, `sharding_utils.py` and `bucket_utils.py`;
`streaming_utils.py`, `data_utils.py`, `adversary_utils.py` and `output_utils.py` stand on it, and the scripts on all.
"""

import contextlib
import gc
import logging
import math
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable

import datasets
import diffusers
import psutil
import torch
import transformers
from accelerate import Accelerator, init_empty_weights
from accelerate.logging import get_logger
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    ProjectConfiguration,
    is_torch_version,
)
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from adt_utils import SimulatedInference, Start, simulate_together, starting_latents
from bucket_utils import image_sizes
from memory_utils import (
    FusedBackward,
    check_memory_options,
    keep_norms_in_float32,
    make_library_optimizer,
    quantization_options,
    weights_to_use,
)
from option_utils import ADTError, Options
from sharding_utils import exchange_values, gathered, is_sharded, keep_optimizer_whole, own_parts, shard_network
from speed_utils import check_compiler, compile_blocks, compile_whole, fuse_optimizer, use_attention_backend


logger = get_logger(__name__)


# The schedule of a run


def global_batch_size(args, accelerator) -> int:
    """Images an iteration, over all processes and micro-batches."""
    return args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps


def resolve_schedule(args, num_images, accelerator) -> Options:
    """The options with the iterations of `--num_train_epochs` and the learning rates of `--scale_lr` filled in."""
    batch_size = global_batch_size(args, accelerator)
    if args.max_train_steps is None:
        args = args.replace(max_train_steps=math.ceil(args.num_train_epochs * num_images / batch_size))
    if args.scale_lr:
        rates = ("learning_rate", "discriminator_learning_rate")
        scaled = {name: getattr(args, name) * batch_size for name in rates if name in args.natures}
        args = args.replace(**scaled, scale_lr=False)  # from here on the rates are what they say
    if count_generator_updates(args) == 0:
        logger.warning("The generator is never updated: --max_train_steps is too small for the first update.")
    return args


# Samplers of models with a variance-preserving schedule


# The class, the paper's number of steps, and what the configuration must say where `from_config` fills in a default
# that is wrong here (DDIM's would clip the latents) or differs between classes. The spacing is the class's usual one,
# for checkpoints that state none.
SAMPLERS = {
    "ddim": (DDIMScheduler, 50, {"timestep_spacing": "leading", "clip_sample": False, "thresholding": False}),
    "dpmsolver++": (
        DPMSolverMultistepScheduler,
        30,
        {
            "timestep_spacing": "linspace",
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "thresholding": False,
            "final_sigmas_type": "zero",
        },
    ),
    "euler": (EulerDiscreteScheduler, 50, {"timestep_spacing": "linspace"}),
}


def configure_sampler(name, base_config, timestep_spacing=None, **options):
    """The sampler `name` of `SAMPLERS` on the schedule of another scheduler's configuration.

    Args:
        base_config: as a file or a scheduler's `config` has it.
        timestep_spacing: where it is None, "trailing" for a schedule with zero terminal SNR, whose last timestep
            sampling must start at; else what `base_config` states, as those who put the sampler into the pipeline by
            `from_config` have it; else the class's usual one.
        options: configuration beside it.
    """
    sampler_class, _, own = SAMPLERS[name]
    config = {name: value for name, value in base_config.items() if name not in ("clip_sample", "thresholding")}
    stated = config.get("timestep_spacing")
    if "timestep_spacing" in config.get("_use_default_values", ()):  # the base's class filled it in, its file did not
        stated = None
    if config.get("rescale_betas_zero_snr", False):
        stated = "trailing"
    spacing = timestep_spacing or stated or own["timestep_spacing"]
    return sampler_class.from_config(config, **own | {"timestep_spacing": spacing} | options)


# The run


@dataclass(frozen=True)
class Family:
    """What the shared code needs to know of a model family; each script makes one of its own functions and constants.

    Attributes:
        pipeline_class, network_class: diffusers' classes; the network is what trains.
        network_name: the network in the pipeline: its attribute and its folder.
        without_text_encoders: what `pipeline_class` must be given to be made for embeddings alone.
        encode_images: (vae, images, posterior_noise) to latents, as `x_0`; without noise of a posterior's mean.
        decode_latents: (vae, latents) to images (B, 3, H, W) in about [-1, 1].
        inference_options: (args) to what the pipeline is called with to sample as in training.
        card_tags: the model card's.
        sampler_facts: what the model card says of the scheduler's configuration.
        kohya_adapters: (adapters as peft names them) to the same as kohya's scripts name them, without alphas.
        half_precision_components: may stay so, where the base pipeline has them so, beside ones in float32.
        absent_components: (args) to components that the base pipeline lacks and `from_pretrained` must be told so.
        unused_components: (args) to those that the pipeline must be loaded without to sample as in training.
        inference_note: (args) to what the model card says about inference beyond the sampler.
        schedule_by_number: whether the pipeline's call sets its noise levels by the number of steps alone.
    """

    pipeline_class: type
    network_class: type
    network_name: str
    without_text_encoders: dict
    encode_images: Callable
    decode_latents: Callable
    inference_options: Callable
    card_tags: tuple
    sampler_facts: tuple
    kohya_adapters: Callable
    half_precision_components: tuple = ()
    absent_components: Callable = lambda args: {}
    unused_components: Callable = lambda args: {}
    inference_note: Callable = lambda args: ""
    schedule_by_number: bool = True


def is_generator_iteration(iteration, args) -> bool:
    """Whether the 0-based `iteration` updates the generator."""
    if not args.adversarial:
        return True
    return iteration >= args.generator_start_step and (iteration + 1) % args.generator_update_interval == 0


def rollout_group(iteration, args) -> range:
    """The iterations, the 0-based `iteration` among them, whose rollouts run in one batch.

    They are at most `--rollouts_per_batch`, with no generator update before the last one's end. They follow from the
    options alone, so that a run that is resumed among them makes all their rollouts again, in the same batch: another
    batch would round differently.
    """
    if not args.adversarial:
        return range(iteration, iteration + 1)
    after_update = iteration % args.generator_update_interval
    first = iteration - after_update % args.rollouts_per_batch
    next_update = iteration - after_update + args.generator_update_interval
    return range(first, min(first + args.rollouts_per_batch, next_update, args.max_train_steps))


def count_generator_updates(args) -> int:
    return sum(is_generator_iteration(k, args) for k in range(args.max_train_steps))


@dataclass(frozen=True)
class Method:
    """What the shared code needs to know of a training method.

    Attributes:
        name: `adt_config.json`'s.
        kind: how the model card's first sentence ends, "Tuned from `base` by ...".
        sampling: what the card says of the call; `{described}` becomes what it samples by.
        count_updates: (args) to the generator's updates in a whole run.
    """

    name: str
    kind: str
    sampling: str
    count_updates: Callable = count_generator_updates


@dataclass(frozen=True)
class Run:
    """What is known of a run once its input is checked, before any model is loaded."""

    family: Family
    method: Method
    args: Options = field(repr=False)  # which may hold a token
    accelerator: Accelerator
    dataset: datasets.Dataset
    identity: dict  # what its checkpoints say of it, see `output_utils.identify_run`
    checkpoint: Path | None  # to resume from
    first_iteration: int  # 0-based
    default_size: int | None  # the side of the images that the pipeline makes by default, where that is known
    repo_id: str | None  # on the Hub
    interruption: Any  # an `output_utils.Interruption`

    @property
    def global_batch_size(self) -> int:
        return global_batch_size(self.args, self.accelerator)

    @property
    def num_generator_updates(self) -> int:
        return self.method.count_updates(self.args)


def start_accelerator(args) -> Accelerator:
    """Starts accelerate and the logs.

    Raises:
        ADTError: for what this machine or launch cannot do.
    """
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else torchrun's processes would not find each other on a CPU
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))
        ),
        # Else data parallelism holds a second copy of the gradients.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%m/%d/%Y %H:%M:%S", level=logging.INFO
    )
    for library in ("httpx", "httpx2"):  # each request to the Hub would be a line, signed addresses among them
        logging.getLogger(library).setLevel(logging.WARNING)
    quiet = not accelerator.is_local_main_process
    for library in (datasets, transformers, diffusers):
        library.utils.logging.set_verbosity_error() if quiet else library.utils.logging.set_verbosity_warning()
    check_launch(args, accelerator)
    check_memory_options(args, accelerator)
    if not args.adversarial and "adversarial_loss_weight" in args.natures:
        logger.info(
            "--adversarial_loss_weight is 0: plain fine-tuning. --diffusion_loss_weight, --generator_update_interval, "
            "--generator_start_step and the discriminator's options are ignored."
        )
    compiles_whole = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
    if compiles_whole and args.adversarial and args.rollouts_per_batch > 1:
        raise ADTError(
            "--rollouts_per_batch does not go with accelerate's dynamo_backend: each number of images on the path "
            "would be compiled anew."
        )
    if args.compile:
        if compiles_whole:
            raise ADTError("--compile and accelerate's dynamo_backend both compile the networks: give one of the two.")
        refuse_by_sentence(check_compiler, accelerator.device)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return accelerator


def refuse_by_sentence(function, *args):
    """Calls a function of a module that knows no user, whose `ValueError` is an `ADTError` here."""
    try:
        return function(*args)
    except ValueError as error:
        raise ADTError(str(error)) from error


def check_launch(args, accelerator):
    """Refuses what accelerate was launched as and this program is not made for; says what a Mac's GPU runs in."""
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ADTError(
            f"{accelerator.distributed_type.value} is not supported: two networks train in turn here, which sharded "
            "engines do not do under one accelerator. Use data parallelism (accelerate launch --multi_gpu), with "
            "--shard to divide the network among the cards."
        )
    if args.shard and is_torch_version("<", "2.8"):  # whose outermost part stays whole behind a pass
        raise ADTError(f"--shard needs torch 2.8 or later; this is {torch.__version__}.")
    if args.shard and accelerator.num_processes == 1:
        raise ADTError(
            "--shard divides the network among processes, and there is one: start several (accelerate launch "
            "--multi_gpu --num_processes N), or leave it out."
        )
    if args.shard and accelerator.mixed_precision == "fp16":
        raise ADTError("--shard does not go with fp16, whose loss scaling sharded gradients lack: use bf16.")
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        # It divides every loss, and this program has as many micro-batches as the option says.
        raise ADTError(
            f"accelerate accumulates {accelerator.gradient_accumulation_steps} micro-batches, by the environment "
            f"variable ACCELERATE_GRADIENT_ACCUMULATION_STEPS, and --gradient_accumulation_steps is "
            f"{args.gradient_accumulation_steps}: give the option alone."
        )
    device, precision = accelerator.device.type, accelerator.mixed_precision
    if precision == "fp16" and device == "cpu":
        raise ADTError("--mixed_precision fp16 needs a GPU; bf16 runs on a CPU, too.")
    if device == "mps" and precision == "no":
        logger.warning(
            "On this Mac's GPU the run is in float32; --mixed_precision bf16 halves what frozen weights take."
        )


class Progress:
    """What a run says while it goes on: a headline, a progress bar, and the trackers' values of each iteration."""

    def __init__(self, generator, sampler, run):
        args, accelerator = run.args, run.accelerator
        self.run = run
        self.shown = {}
        if args.report_to != "none":
            config = {name: str(value) for name, value in args.public().items()}  # trackers refuse lists
            accelerator.init_trackers(args.tracker_project_name, config=config)
        configuration = ", ".join(
            f"{name}={value}" for name, value in sorted(sampler.config.items()) if name[0] != "_"
        )
        num_parameters = sum(parameter.numel() for parameter in trainable_parameters(generator.network))
        logger.info("***** Running training *****")
        num_images = "streamed" if args.streaming else len(run.dataset)
        logger.info(f"  Images = {num_images}, global batch = {run.global_batch_size}")
        logger.info(
            f"  Iterations = {run.first_iteration} to {args.max_train_steps}, generator updates = "
            f"{run.num_generator_updates}"
        )
        logger.info(f"  Trained parameters = {num_parameters:,}")
        logger.info(f"  Device = {accelerator.device}, mixed precision = {accelerator.mixed_precision}")
        logger.info(f"  Sampler = {type(sampler).__name__}, {args.num_inference_steps} steps ({configuration})")
        self.bar = tqdm(
            total=args.max_train_steps,
            initial=run.first_iteration,
            desc="Iterations",
            disable=not accelerator.is_local_main_process,
        )

    def log(self, values, iteration, started):
        """`values`: {name: float} of the 0-based `iteration`, which began when `time.perf_counter()` was `started`."""
        seconds = time.perf_counter() - started
        values = values | {
            "seconds_per_iteration": seconds,
            "images_per_second": self.run.global_batch_size / seconds,
            "peak_memory_gb": peak_memory_gb(),
        }
        self.shown |= values
        self.bar.update(1)
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in self.shown.items()})
        self.run.accelerator.log(values, step=iteration + 1)

    def close(self):
        self.bar.close()


def peak_memory_gb() -> float:
    """The device's peak allocation where there is a GPU, else the process's peak resident set; 10^9 bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 1e9
    import resource  # Unix's alone

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


STOPPED = 75  # the exit status of a run that can go on: EX_TEMPFAIL of sysexits.h, "try again later"


def end_run(run):
    """Closes the trackers and destroys the process group, once nothing of the training refers to either.

    Exits with the status `STOPPED` where the run has been interrupted.

    A data-parallel wrapper that outlived the group's end would be the one to destroy it, holding Python's lock, while
    a thread of gloo's may still want that lock to free a tensor: the process then never ends.
    """
    run.accelerator.free_memory()
    gc.collect()
    run.accelerator.end_training()
    if run.interruption.stopped_after is not None:
        sys.exit(STOPPED)


# Frozen and trained networks


@dataclass(frozen=True)
class FrozenModels:
    """What does not train: the VAE, the text encoders, and the schedules of the rollout and of plain fine-tuning."""

    vae: AutoencoderKL
    prompt_encoder: Any  # the script's
    sampler: Any  # with `set_timesteps` called
    noise_scheduler: Any
    tiny_decoder: AutoencoderTiny | None = None

    @property
    def decoder(self):
        """What decodes images that are scored."""
        return self.vae if self.tiny_decoder is None else self.tiny_decoder


def hub_options(args) -> dict:
    return {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}


def network_options(args, accelerator) -> dict:
    """What the trained network's `from_pretrained` is given beside the place.

    A base under adapters is read in the precision that it stays in, so that the host never holds it in float32.
    """
    dtype = weight_dtype(accelerator)
    own = {"dtype": dtype} if args.use_lora else {}
    return hub_options(args) | own | quantization_options(args, dtype, accelerator.device)


def weight_dtype(accelerator) -> torch.dtype:
    """Of frozen weights. What trains is in float32."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def trainable_parameters(model) -> list:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def load_vae_config(args) -> dict:
    """Of the VAE that `load_vae` loads. Raises `ADTError` where there is none."""
    path, vae_path = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
    try:
        if vae_path is not None:
            return AutoencoderKL.load_config(vae_path, cache_dir=args.cache_dir)
        return AutoencoderKL.load_config(path, subfolder="vae", revision=args.revision, cache_dir=args.cache_dir)
    except OSError as error:
        source = f"{path} has no readable VAE" if vae_path is None else f"{vae_path} is not a readable VAE"
        raise ADTError(f"{source}: {error}") from error


def load_vae(args) -> AutoencoderKL:
    """The base pipeline's VAE, or the one that is named instead."""
    if args.pretrained_vae_model_name_or_path is None:
        return AutoencoderKL.from_pretrained(args.pretrained_model_name_or_path, subfolder="vae", **hub_options(args))
    return AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path, cache_dir=args.cache_dir)


def freeze_vae(vae, dtype, args, accelerator) -> AutoencoderKL:
    vae.requires_grad_(False).eval().type(dtype).to(accelerator.device)
    if args.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    if args.compile:
        compile_whole(vae.decoder)  # always called with one image
    return vae


def load_decoder(args, accelerator) -> AutoencoderTiny | None:
    """The tiny autoencoder of `--decoder_model_name_or_path`, in float32 as the VAE; it takes scaled latents, too."""
    path = args.decoder_model_name_or_path
    if path is None or not args.adversarial:
        return None
    decoder = AutoencoderTiny.from_pretrained(path, cache_dir=args.cache_dir)
    return freeze_vae(decoder, torch.float32, args, accelerator)


def check_decoder(args, vae_config):
    """Refuses, by its configuration, a decoder that is no tiny autoencoder of the VAE's latents."""
    path = args.decoder_model_name_or_path
    if path is None or not args.adversarial:
        return
    try:
        config = AutoencoderTiny.load_config(path, cache_dir=args.cache_dir)
    except OSError as error:
        raise ADTError(f"--decoder_model_name_or_path {path} is not readable: {error}") from error
    if config["_class_name"] != "AutoencoderTiny":
        raise ADTError(f"--decoder_model_name_or_path {path} is a {config['_class_name']}, not an AutoencoderTiny.")
    channels, factor = config["latent_channels"], 2 ** (len(config["decoder_block_out_channels"]) - 1)
    if (channels, factor) != (vae_config["latent_channels"], vae_factor(vae_config)):
        raise ADTError(
            f"--decoder_model_name_or_path {path} makes images of {factor} times the side from {channels} channels, "
            f"and the VAE {vae_factor(vae_config)} from {vae_config['latent_channels']}."
        )


def vae_factor(vae_config) -> int:
    """By how much a VAE's latents are smaller than its images, a side."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def check_image_sizes(args, step, of_what):
    """Raises `ADTError` where a side of the images is not divisible by `step`, which `of_what` explains."""
    sides = [("resolution", args.resolution)]
    if args.use_aspect_ratio_buckets:
        sides += [("aspect_ratio_buckets", side) for size in image_sizes(args) for side in size]
    for option, side in sides:
        if side % step:
            raise ADTError(f"--{option} {side} is not divisible by {of_what}.")


def sample_posterior(vae, pixel_values, posterior_noise):
    """pixel_values: (B, 3, H, W) in [-1, 1]; posterior_noise as the latents. Returns unscaled latents, float32."""
    with torch.no_grad():
        posterior = vae.encode(pixel_values.to(vae.dtype)).latent_dist
        latents = posterior.mean.float() + posterior.std.float() * posterior_noise
    check_vae(latents, "encodes images to", vae)
    return latents


def decode_checkpointed(vae, latents):
    """latents: (B, C, h, w), unscaled. Returns (B, 3, H, W) in about [-1, 1], float32.

    One image at a time and checkpointed: what a backward through the decoder stores is one image's.
    """

    def decode(one):
        return vae.decode(one.to(vae.dtype)).sample.float()

    if latents.requires_grad:
        # The decoder draws nothing. Its own checkpointing, where on, is within this one: without it a backward would
        # hold all of one image's graph, without this one the blocks' inputs of all images.
        decode = partial(checkpoint, decode, use_reentrant=False, preserve_rng_state=False)
    images = torch.cat([decode(one) for one in latents.split(1)])
    check_vae(images, "decodes finite latents to", vae)
    return images


def check_vae(values, what, vae):
    if not values.isfinite().all():
        option = "decoder" if isinstance(vae, AutoencoderTiny) else "pretrained_vae"
        raise ADTError(
            f"The VAE, in {str(vae.dtype).removeprefix('torch.')}, {what} values that are not finite: it is damaged, "
            f"or not made for this precision. Name another one with --{option}_model_name_or_path."
        )


def check_latents(latents, when):
    if not latents.isfinite().all():
        raise ADTError(
            f"The sampler's latents are not finite {when}: the network's predictions overflow, or it has diverged. "
            "The last checkpoint stays as it is."
        )


def check_lora(args, network_class, config):
    """Refuses a target that is no layer of the network, which is built without weights for it."""
    if not args.use_lora:
        return
    with init_empty_weights():
        modules = network_class.from_config(config).named_modules()
    layers = [name for name, module in modules if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
    for target in args.lora_layers:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise ADTError(f"--lora_layers {target} is no linear or convolutional layer of the network.")


def prepare_network(network, args, accelerator):
    """What trains is in float32: the network's own weights, or adapters over frozen, lighter weights."""
    if not args.use_lora:
        network.float()
    else:
        network.requires_grad_(False)
        if args.bnb_quantization_config_path is not None:  # which is loaded as it stays
            keep_norms_in_float32(network)
        else:
            network.type(weight_dtype(accelerator)).to(accelerator.device)
        torch.manual_seed(args.seed)  # the adapters' first weights, the same on every process
        add_adapters(network, args)
        cast_training_params(network)
    if args.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if args.attention_backend is not None:
        dtype = weight_dtype(accelerator)
        refuse_by_sentence(use_attention_backend, network, args.attention_backend, dtype, accelerator.device)
    if args.compile:
        compile_blocks(network)
    return network


def add_adapters(network, args):
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        init_lora_weights="gaussian",
        target_modules=args.lora_layers,
        use_dora=args.use_dora,
    )
    network.add_adapter(config)


# A micro-batch


@dataclass
class Conditions:
    """What the network is conditioned on, each a dict of (B, ...) that the script's `call_network` understands."""

    negative: dict  # the unconditional guidance branch
    positive: dict  # the captions'
    loss: dict  # the diffusion loss's, in which captions may be dropped


@dataclass
class Batch:
    """A micro-batch of one process, after step 1; steps 4 and 5 add the last two."""

    captions: list[str]
    images: torch.Tensor  # (B, 3, H, W) in [-1, 1]
    latents: torch.Tensor  # (B, C, h, w), `x_0`, as all that follows of this shape
    noise: torch.Tensor  # the rollout's `eps`
    loss_noise: torch.Tensor  # the diffusion loss's
    density: torch.Tensor  # (B,), which timesteps plain fine-tuning takes
    conditions: Conditions
    augmentation: dict  # {purpose: (B, DiffAugment.NUM_PARAMETERS)}
    rollout: SimulatedInference | None = None
    generated: torch.Tensor | None = None  # as `images`
    real_features: dict = field(default_factory=dict)  # {purpose: the features of `images`}, see `Adversary`


def concatenate(conditions) -> dict:
    return {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}


def expand(values, like):
    """(B,) to (B, 1, ...), with as many dimensions as `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def make_predict(network, conditions, call_network) -> Callable:
    """The network as `simulate_inference` calls it: branch 0 is the unconditional one, branch 1 the caption's.

    Args:
        call_network: (network, sample, timestep, condition) to the prediction; the script's.
    """
    of_branch = (conditions.negative, conditions.positive)

    def predict(model_input, timestep, branches):
        condition = concatenate([of_branch[branch] for branch in branches])
        return call_network(network, model_input, timestep, condition)

    return predict


def roll_out(micro_batches, paths, generator, sampler, call_network, run):
    """Step 4: simulates inference of the iterations of a `rollout_group`, each micro-batch's with its likes.

    Args:
        micro_batches: {iteration: its `Batch`es}, which get their `rollout`.
        paths: {iteration: (its start index, the steps that send a gradient)}.
        generator: in `eval()`.
        call_network: as `make_predict`'s.
    """
    args = run.args
    guidance_rescale = run.family.inference_options(args).get("guidance_rescale", 0.0)
    for batches in zip(*micro_batches.values(), strict=True):  # one of each iteration
        of_branch = [(batch.conditions.negative, batch.conditions.positive) for batch in batches]

        def predict(model_input, timestep, branches, active, of_branch=of_branch):
            condition = concatenate([of_branch[n][branch] for n in active for branch in branches])
            return call_network(generator.wrapped, model_input, timestep, condition)

        starts = [
            Start(starting_latents(sampler, batch.latents, batch.noise, start_index), start_index, train_steps)
            for batch, (start_index, train_steps) in zip(batches, paths.values(), strict=True)
        ]
        # One autocast casts a weight once for all steps. It is closed before a gradient is wanted: these casts have
        # none.
        with generator.gathered(), run.accelerator.autocast():
            rollouts = simulate_together(
                predict, sampler, starts, args.guidance_scale, guidance_rescale, args.gradient_path
            )
        for batch, rollout in zip(batches, rollouts, strict=True):
            batch.rollout = rollout


# Updates


def check_finite(values, iteration):
    for name, value in values.items():
        if not math.isfinite(value):
            raise ADTError(
                f"The {name.replace('_', ' ')} became {value} at iteration {iteration + 1}: the run stops, and the "
                "last checkpoint stays as it is. A lower learning rate or adversarial weight may help."
            )


class Totals:
    """What an update logs: gathered over its micro-batches, then made the global batch's over all processes."""

    def __init__(self, num_batches):
        self.num_batches = num_batches
        self.means, self.squares = {}, {}

    def add_means(self, **values):
        """Values whose mean over the micro-batches is wanted; 0-d tensors."""
        for name, value in values.items():
            self.means[name] = self.means.get(name, 0.0) + value.detach() / self.num_batches

    def add_squared_norms(self, **squares):
        """Squared norms of a micro-batch's gradient; what is wanted is the norm of the global batch's."""
        for name, square in squares.items():
            self.squares[name] = self.squares.get(name, 0.0) + square

    def reduce(self, accelerator, iteration) -> dict:
        """{name: float}, the same on every process. Raises `ADTError` where one is not finite.

        A norm is `sqrt(sum over P processes and N micro-batches of |g|^2) / (P N)`, since the loss is their mean.
        """
        totals = self.means | self.squares
        reduced = accelerator.reduce(torch.stack([value.float() for value in totals.values()]), reduction="mean")
        values = dict(zip(totals, reduced.tolist(), strict=True))
        check_finite(values, iteration)
        for name in self.squares:
            values[name] = (values[name] / accelerator.num_processes) ** 0.5 / self.num_batches
        return values


@dataclass
class Trained:
    """A network that trains, and what trains it."""

    name: str  # in messages
    network: torch.nn.Module
    wrapped: torch.nn.Module  # the network as accelerate prepared it; call this one where a gradient is wanted
    optimizer: Any
    lr_scheduler: Any
    run: Run
    ema: EMAModel | None = None
    fused_backward: FusedBackward | None = None

    @property
    def lr(self) -> float:
        return self.lr_scheduler.get_last_lr()[0]

    def synchronise_if(self, condition):
        """A context for a forward and its backward: gradients synchronise in the last backward of an update only.

        A sharded network's do in every one, since they would be whole until then.
        """
        if self.fused_backward is not None:
            return self.fused_backward.applying_if(condition)
        return contextlib.nullcontext() if condition else self.run.accelerator.no_sync(self.wrapped)

    def step(self, iteration) -> bool:
        """Clips the gradients and steps; returns whether it did: float16's loss scaling skips what overflowed."""
        accelerator = self.run.accelerator
        if self.fused_backward is None:
            largest = self.run.args.max_grad_norm or math.inf
            norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), largest)
        else:
            norm = self.fused_backward.finish()
        if accelerator.scaler is None:
            check_finite({f"gradient norm of the {self.name}": norm.item()}, iteration)
        if self.fused_backward is None:
            self.optimizer.step()
        stepped = not self.optimizer.step_was_skipped
        if stepped:
            self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if stepped and self.ema is not None:
            self.update_ema()
        return stepped

    def update_ema(self):
        if self.run.args.offload_ema:
            self.ema.to(self.run.accelerator.device, non_blocking=True)
        self.ema.step(own_parts(trainable_parameters(self.network)))
        if self.run.args.offload_ema:
            self.ema.to("cpu", non_blocking=True)

    @contextlib.contextmanager
    def frozen(self):
        """A context with the network to score by: the gradient goes to what it is given, its weights stay.

        It is not the wrapped one, because data parallelism would wait for gradients of its parameters.
        """
        trained = trainable_parameters(self.network)
        self.network.requires_grad_(False)
        try:
            yield self.network
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def gathered(self):
        """A context with a sharded network's weights together, for passes without gradient."""
        return gathered(self.network)

    @contextlib.contextmanager
    def averaged(self):
        """A context with the averaged weights in place of the trained ones, where there is an average."""
        with averaged_weights(self.network, self.ema), weights_to_use(self.optimizer.optimizer):
            yield


@contextlib.contextmanager
def averaged_weights(network, ema):
    if ema is None:
        yield
        return
    parameters = trainable_parameters(network)
    if is_sharded(network):
        exchange_values(own_parts(parameters), ema.shadow_params)
        try:
            yield
        finally:
            exchange_values(own_parts(parameters), ema.shadow_params)
        return
    own = [parameter.data for parameter in parameters]
    # Exchanged, not copied: `EMAModel.store` would move the weights to the CPU and back.
    for parameter, average in zip(parameters, ema.shadow_params, strict=True):
        parameter.data = average.to(parameter.device, parameter.dtype)
    try:
        yield
    finally:
        for parameter, data in zip(parameters, own, strict=True):
            parameter.data = data


def prepare_generator(network, run) -> Trained:
    """The network with its optimizer, schedule and average, prepared by accelerate."""
    args = run.args
    if args.shard:  # first, so that what follows is of the parts
        shard_network(network, weight_dtype(run.accelerator), run.accelerator.device.type)
    ema = None
    if args.use_ema:
        parts = own_parts(trainable_parameters(network))
        ema = EMAModel(parts, decay=args.ema_decay, foreach=args.foreach_ema)
        ema.to("cpu" if args.offload_ema else run.accelerator.device)
    optimizer = make_generator_optimizer(network, args)
    lr_scheduler = make_lr_scheduler(optimizer, args.lr_warmup_steps, run.num_generator_updates, args)
    generator = prepare_trained("generator", network, optimizer, lr_scheduler, run, ema)
    if args.fused_backward_pass:
        generator.fused_backward = FusedBackward(optimizer, args.offload_gradients)
    return generator


def prepare_trained(name, network, optimizer, lr_scheduler, run, ema=None) -> Trained:
    # The learning rate schedule is not prepared: accelerate would step it once for each process. Frozen models are
    # not either.
    fuse_optimizer(optimizer)
    if is_sharded(network):
        wrapped = run.accelerator.prepare_model(network, evaluation_mode=True)  # autocast alone
        optimizer = run.accelerator.prepare_optimizer(optimizer)
        keep_optimizer_whole(optimizer.optimizer)
    else:
        wrapped, optimizer = run.accelerator.prepare(network, optimizer)
    run.accelerator.register_for_checkpointing(lr_scheduler)
    return Trained(name, network, wrapped, optimizer, lr_scheduler, run, ema)


def make_generator_optimizer(network, args):
    if args.optimizer == "adamw":
        return make_optimizer(torch.optim.AdamW, network, args.learning_rate, args)
    return make_library_optimizer(trainable_parameters(network), args)


def make_optimizer(optimizer_class, network, learning_rate, args):
    return optimizer_class(
        trainable_parameters(network),
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def make_lr_scheduler(optimizer, num_warmup_steps, num_updates, args):
    """Both counted in the optimizer's own updates."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=max(1, num_updates),
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )

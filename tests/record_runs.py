"""Records what runs of the training scripts compute, to the bit, and compares it with what another version computed.

    python tests/record_runs.py BEFORE                      # with the old code
    python tests/record_runs.py AFTER --against BEFORE      # with the new code, on the same machine

For each family, full and LoRA: adversarial, `auto`, plain fine-tuning, EMA, two micro-batches, and a handful of other
options together, six iterations each on tiny models. Recorded are the logged values and every file of the last
checkpoint and of the result by its content (versions, times and Python's own random state aside). With `--against`,
each checkpoint of the other version is also resumed by this one. Differences are printed, and are the exit status.
"""

import argparse
import hashlib
import importlib
import json
import os
import shutil
import sys
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import tiny  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from helpers import read_scalars  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402


FAMILIES = {"sd15": tiny.make_sd15, "sdxl": tiny.make_sdxl, "sd3": tiny.make_sd3}
COMMON = [
    "--train_data_dir", "data", "--discriminator_model_name_or_path", "dinov2",
    "--discriminator_layers", "-1", "1", "3",
    "--discriminator_resolution", "16", "--resolution", "16", "--train_batch_size", "2", "--max_train_steps", "6",
    "--generator_update_interval", "2", "--num_inference_steps", "4", "--num_gradient_steps", "2",
    "--learning_rate", "1e-3", "--discriminator_learning_rate", "1e-3", "--lr_warmup_steps", "2",
    "--discriminator_lr_warmup_steps", "2", "--checkpointing_steps", "3", "--proportion_empty_prompts", "0.3",
    "--noise_offset", "0.1", "--random_flip", "--resume_from_checkpoint", "latest",
    "--dataloader_num_workers", "0",
]  # fmt: skip
FAMILY_OPTIONS = {"sd15": [], "sdxl": [], "sd3": ["--max_sequence_length", "16"]}
OTHER_OPTIONS = {"sd15": ["--snr_gamma", "5"], "sdxl": ["--rollout_time_ids", "image"], "sd3": ["--no_t5"]}
TRAINED = {"full": [], "lora": ["--use_lora", "--rank", "4", "--lora_alpha", "8"]}
METHODS = {
    "adversarial": [],
    "auto": ["--adversarial_loss_weight", "auto", "--sampler", "dpmsolver++"],
    "plain": ["--adversarial_loss_weight", "0"],
    "ema": ["--use_ema", "--ema_decay", "0.5", "--validation_prompts", "a red disc", "--num_validation_images", "1",
            "--validation_steps", "3"],
    "other": ["--discriminator_type", "projected", "--augmentation_pairing", "shared", "--lr_scheduler", "cosine",
              "--scale_lr", "--gradient_checkpointing", "--use_ema", "--offload_ema"],
    "micro": ["--gradient_accumulation_steps", "2", "--train_batch_size", "1", "--discriminator_norm_group", "1"],
}  # fmt: skip
VERSIONS = {"versions", "_diffusers_version", "transformers_version"}


def hash_value(digest, value):
    """Feeds nested containers of tensors and numbers into `digest`."""
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            hash_value(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            hash_value(digest, item)
    else:
        digest.update(repr(value).encode())


def content_hash(file) -> str:
    digest = hashlib.sha256()
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            metadata = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        # PEFT writes a set of names here, in an order of its own each time.
        hash_value(digest, {k: sorted(v) if isinstance(v, list) else v for k, v in metadata.items()})
        hash_value(digest, load_file(file))
    elif file.suffix in (".bin", ".pkl"):
        value = torch.load(file, weights_only=False)
        if file.name.startswith("random_states"):
            value = {name: state for name, state in value.items() if name.startswith("torch")}
        hash_value(digest, value)
    elif file.suffix == ".json":
        value = json.loads(file.read_text())
        if file.name == "adt_checkpoint.json":  # the length of Python's own random state, too, is random
            value["files"] = {k: v for k, v in value["files"].items() if "random_states" not in k}
        hash_value(digest, {k: v for k, v in value.items() if k not in VERSIONS} if isinstance(value, dict) else value)
    else:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def record_run(output) -> dict:
    """The logged values and each file's content, but TensorBoard's own files and the checkpoint before the last."""
    skipped = ("logs", "checkpoint-3")
    files = [file for file in sorted(output.rglob("*")) if file.is_file()]
    return {
        "logged": {tag: list(map(list, values.items())) for tag, values in sorted(read_scalars(output).items())},
        "files": {
            str(file.relative_to(output)): content_hash(file)
            for file in files
            if file.relative_to(output).parts[0] not in skipped
        },
    }


def train(family, output, options):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    script = importlib.import_module(f"train_adt_{family}")
    arguments = ["--pretrained_model_name_or_path", family, "--output_dir", output, *COMMON, *FAMILY_OPTIONS[family]]
    script.main(script.parse_args([*arguments, *options]))


def differences(before, after) -> list[str]:
    found = []
    for run in sorted(before.keys() | after.keys()):
        for kind in ("logged", "files"):
            old, new = before.get(run, {}).get(kind, {}), after.get(run, {}).get(kind, {})
            found += [
                f"{run}: {kind} {name}" for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)
            ]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--against", type=Path, default=None, help="The directory of another version's record.")
    parser.add_argument("--only", default="", help="Runs whose name contains this.")
    args = parser.parse_args()
    against = None if args.against is None else args.against.resolve()
    torch.set_num_threads(1)
    args.directory.mkdir(parents=True, exist_ok=True)
    os.chdir(args.directory)  # so that paths in configurations are the same for every version
    tiny.make_imagefolder("data")
    tiny.make_dinov2("dinov2")
    for family, make in FAMILIES.items():
        make(family)

    record, resumed = {}, {}
    for family in FAMILIES:
        for trained, trained_options in TRAINED.items():
            for method, method_options in METHODS.items():
                name = f"{family}-{trained}-{method}"
                if args.only not in name:
                    continue
                options = [*trained_options, *method_options]
                if method == "other":
                    options += OTHER_OPTIONS[family] + ["--fuse_lora"] * (trained == "lora")
                shutil.rmtree(name, ignore_errors=True)
                train(family, name, options)
                record[name] = record_run(Path(name))
                if against is not None:
                    shutil.move(name, f"{name}-whole")
                    Path(name).mkdir()
                    shutil.copytree(against / name / "checkpoint-3", Path(name, "checkpoint-3"))
                    train(family, name, options)
                    resumed[name] = record_run(Path(name))
                print(name, flush=True)
    Path("record.json").write_text(json.dumps(record, indent=1))
    if against is None:
        return
    before = {name: run for name, run in json.loads((against / "record.json").read_text()).items() if name in record}
    counts = sum(len(run["files"]) for run in before.values()), sum(len(run["logged"]) for run in before.values())
    print(f"{len(before)} runs, {counts[0]} files, {counts[1]} logged series.")
    found = differences(before, record)
    print("\n".join(found) or "Nothing differs.")
    # A resumed run logs its own iterations only, and draws its first validation not again.
    for run in resumed.values():
        run["logged"] = {}
        run["files"] = {name: value for name, value in run["files"].items() if "iteration-000003" not in name}
    for run in before.values():
        run["logged"] = {}
        run["files"] = {name: value for name, value in run["files"].items() if "iteration-000003" not in name}
    more = differences(before, resumed)
    print(
        "\n".join(more) or f"Nothing differs in the {len(resumed)} runs resumed from the other version's checkpoints."
    )
    sys.exit(bool(found or more))


if __name__ == "__main__":
    main()

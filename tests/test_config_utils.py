"""Options in a file."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import FAMILIES
from helpers import equal, read_network

import train_adt_sd3
from config_utils import CONFIG, write_config
from train_adt_sd15 import parse_args


@pytest.fixture
def family():
    return FAMILIES["sd15"]


BASE = {"pretrained_model_name_or_path": "x", "dataset_name": "y"}


@pytest.fixture
def parse(tmp_path):
    """The options by a file's text, or by what becomes one, and by what is typed."""

    def parse(content, *typed, parse_args=parse_args, name="options.yaml"):
        file = tmp_path / name
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(BASE | content))
        return parse_args(["--config", str(file), *typed])

    return parse


def typed(*words, parse_args=parse_args):
    return parse_args(["--pretrained_model_name_or_path", "x", "--dataset_name", "y", *words])


def values(args):
    return {name: value for name, value in vars(args).items() if name != "config"}


def test_options_of_a_file_are_as_typed_ones(parse):
    options = {
        "learning_rate": 1e-4, "discriminator_layers": [-1, 2], "use_ema": True, "augmentation_policy": [],
        "validation_prompts": ["a red disc", "a, b: c"], "adversarial_loss_weight": "auto",
        "mixed_precision": "no", "snr_gamma": None, "hub_model_id": "-odd",
    }  # fmt: skip
    expected = typed(
        "--learning_rate", "1e-4", "--discriminator_layers", "-1", "2", "--use_ema", "--augmentation_policy",
        "--validation_prompts", "a red disc", "a, b: c", "--adversarial_loss_weight", "auto",
        "--mixed_precision", "no", "--hub_model_id=-odd",
    )  # fmt: skip
    assert values(parse(options)) == values(expected)
    assert values(parse(json.dumps(BASE | options), name="options.json")) == values(expected)
    assert parse("pretrained_model_name_or_path: x\ndataset_name: y\nlearning_rate: 1e-4").learning_rate == 1e-4
    no_t5 = parse({"no_t5": True}, parse_args=train_adt_sd3.parse_args)
    assert no_t5.no_t5 and not parse({"no_t5": False}, parse_args=train_adt_sd3.parse_args).no_t5


def test_what_is_typed_wins(parse):
    args = parse(
        {"seed": 3, "use_ema": True, "validation_prompts": ["a"]}, "--no-use_ema", "--validation_prompts", "b"
    )
    assert (args.seed, args.use_ema, args.validation_prompts) == (3, False, ["b"])
    assert parse({"seed": 3}, "--seed", "4").seed == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"learing_rate": 1}, "there is no option learing_rate; the nearest name is learning_rate."),
        ({"config": "x"}, "there is no option config; the nearest name is"),
        (
            {"mixed_precision": False},
            "mixed_precision: YAML reads yes, no, on and off as true and false; put the value",
        ),
        ({"use_ema": "yes"}, "use_ema must be true or false, not yes."),
        ({"seed": [1, 2]}, "seed takes one value."),
        ({"seed": {"a": 1}}, "seed takes one value."),
        ({"seed": 1.5}, "argument --seed: invalid int value: '1.5'"),
        ({"rank": 0}, "argument --rank: must be greater than 0, not 0"),
        ("- seed\n", "must have options by name, such as `learning_rate: 1e-5`."),
        ("seed: [1", "cannot be read: while parsing a flow sequence"),
    ],
)
def test_refused_files(parse, capsys, content, message):
    with pytest.raises(SystemExit) as end:
        parse(content)
    assert end.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_missing_file(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--config", "nowhere.yaml"])
    assert "--config nowhere.yaml cannot be read: [Errno 2]" in capsys.readouterr().err


def test_written_options_of_other_forms(tmp_path):
    """An alias's, a list's in one word, and what stood in another file."""
    (tmp_path / "nf4.json").write_text('{"load_in_4bit": true}')
    words = ("--use_8bit_adam", "--use_lora", "--lora_target_modules", "to_q", "to_k")
    args = typed(*words, "--bnb_quantization_config_path", str(tmp_path / "nf4.json"))
    write_config(args, 1, set(), tmp_path / "options.yaml")
    assert values(parse_args(["--config", str(tmp_path / "options.yaml")])) == values(args)
    assert args.lora_layers == typed("--use_lora", "--lora_layers", "to_q,to_k").lora_layers == ["to_q", "to_k"]


def test_a_results_options_make_it_again(run, base_path, dataset_path, dinov2_path, tmp_path, monkeypatch):
    """They have no place of this machine and no token, and say what is missing."""
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    more = ("--max_train_steps", 2, "--generator_update_interval", 1, "--random_flip", "--hub_token", "hf_secret")
    output = run(*more)
    text = (output / CONFIG).read_text()
    assert "hf_" not in text and str(tmp_path) not in text and "/" not in text
    missing = text.splitlines()[0]
    assert "by 1 process." in missing and yaml.safe_load(text)["mixed_precision"] == "no"  # which nothing has typed
    places = ("pretrained_model_name_or_path", "train_data_dir", "discriminator_model_name_or_path")
    for name in (*places, "output_dir", "hub_token"):
        assert f"--{name}" in missing and name not in yaml.safe_load(text)
    paths = (base_path, dataset_path, dinov2_path)
    words = [word for name, path in zip(places, paths, strict=True) for word in (f"--{name}", path)]
    args = parse_args(["--config", str(output / CONFIG), *words, "--output_dir", str(tmp_path / "again")])
    FAMILIES["sd15"].train.main(args)
    assert equal(read_network(tmp_path / "again"), read_network(output))
    first, second = (
        Path(path, CONFIG).read_text().replace("--hub_token", "") for path in (output, tmp_path / "again")
    )
    assert yaml.safe_load(first) == yaml.safe_load(second)

"""Writes `docs/options.md`, the options of the training scripts and of `evaluate_adt.py`, from their parsers.

python docs/write_options.py            # writes it
python docs/write_options.py --check    # ends with an error where it is not what would be written
"""

import sys
from argparse import SUPPRESS
from pathlib import Path
from types import SimpleNamespace


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate_adt  # noqa: E402
import train_adt_lora  # noqa: E402
import train_adt_sd3  # noqa: E402
import train_adt_sd15  # noqa: E402
import train_adt_sdxl  # noqa: E402
from option_utils import Nature, option_natures  # noqa: E402
from output_utils import checkpoint_config  # noqa: E402


FILE = ROOT / "docs" / "options.md"
SCRIPTS = {"SD1.5": train_adt_sd15, "SDXL": train_adt_sdxl, "SD3": train_adt_sd3, "any": train_adt_lora}
# Options under which another option acts, and others under which it is ignored.
WHERE = {
    "ADT": (["--use_lora"], ["--use_lora", "--adversarial_loss_weight", "0"]),
    "fine-tuning": (["--use_lora", "--adversarial_loss_weight", "0"], ["--use_lora"]),
    "LoRA": (["--use_lora"], []),
    "streaming": (["--streaming"], []),
    "buckets": (["--use_aspect_ratio_buckets"], []),
}
INTRODUCTION = """\
# Options

Written by `python docs/write_options.py` from what the parsers say; `--help` prints the options, too.

- Defaults are the paper's. Where one is blank, the option is not set, or filled in as its text says. A dash says that
  the script has no such option. *any* is `train_adt_lora.py`.
- An option with `…` takes several values. One that is off is switched on by its name alone.
- The last column says whether an option may change when a run is resumed; what counts is the value as filled in. A
  *no* with a word in brackets holds there alone: elsewhere the option is ignored, and may change. *yes ¹* is bound by
  what it makes: the global batch (processes × `--train_batch_size` × `--gradient_accumulation_steps`) must stay, and
  so must the number of iterations where the learning rate decays over them. What is *yes ²*
  may lie elsewhere, but its content must stay: captions and images, a model folder's files, a model's name on the Hub.

[Training](#training) · [Evaluation](#evaluation)

## Training
"""
EVALUATION = """\
## Evaluation

Of `evaluate_adt.py`. [What it measures and writes](evaluation.md).
"""


def cell(value) -> str:
    """A default as it would be typed."""
    if value is None or value == []:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def default(action) -> str:
    if isinstance(action.default, list) and action.nargs is None:
        return ",".join(action.default)
    return "required" if action.required else cell(action.default)


def name(action) -> str:
    values = [action.metavar] * (action.metavar is not None) + ["…"] * (action.nargs in ("+", "*"))
    return f"`{' '.join([action.option_strings[0], *values])}`"


def explanation(action) -> str:
    text = action.help.replace("%%", "%")
    return text + (f" ({', '.join(map(str, action.choices))})" if action.choices else "")


def table(header, rows) -> str:
    lines = [header, ["---"] * len(header), *([text.replace("|", "\\|") for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def options(parser):
    """(title of its group, action) of each option but --help and those that stand for another."""
    return [
        (group.title, action)
        for group in parser._action_groups
        for action in group._group_actions
        if action.dest != "help" and action.help != SUPPRESS
    ]


def compared(script, more) -> set[str]:
    """The names of the options that a checkpoint of a run with the options `more` must agree with."""
    args = script.parse_args(["--pretrained_model_name_or_path", "base", "--dataset_name", "data", *more])
    return set(checkpoint_config(args, SimpleNamespace(num_processes=1, mixed_precision="no")))


def on_resume(script) -> dict:
    """{name: whether it may change when a run is resumed}, by the options' natures."""
    natures, found = option_natures(script.make_parser()), {}
    acting = {
        where: compared(script, on) - compared(script, off)
        for where, (on, off) in WHERE.items()
        if {word[2:] for word in on + off if word.startswith("--")} <= natures.keys()
    }
    always = compared(script, [])
    for option, own in natures.items():
        conditions = [where for where, names in acting.items() if option in names]
        if Nature.BY_CONTENT in own:
            found[option] = "yes ²"
        elif conditions:
            found[option] = f"no ({', '.join(conditions)})"
        elif option in always:
            found[option] = "no"
        else:
            found[option] = "yes ¹" if Nature.COUNTED in own else "yes"
    return found


def training_tables() -> str:
    """A table for each group of options; the same option in groups of different scripts has a table of both."""
    found, resume = {}, {}
    for family, script in SCRIPTS.items():
        resume = on_resume(script) | resume
        for title, action in options(script.make_parser()):
            found.setdefault(action.dest, {})[family] = (title, action)
    tables = {}
    for option, by_family in found.items():
        actions = {family: action for family, (_, action) in by_family.items()}
        texts = {}
        for family, action in actions.items():
            texts.setdefault(explanation(action), family)
        first, *others = texts
        text = " ".join([first, *(f"{texts[other]}: {other}" for other in others)])
        defaults = [default(actions[family]) if family in actions else "—" for family in SCRIPTS]
        title = " and ".join(dict.fromkeys(title for title, _ in by_family.values()))
        row = [name(next(iter(actions.values()))), *defaults, text, resume[option]]
        tables.setdefault(title, []).append(row)
    header = ["option", *SCRIPTS, "what it is for", "may change on resuming"]
    return "\n".join(f"### {title[0].upper()}{title[1:]}\n\n{table(header, rows)}" for title, rows in tables.items())


def evaluation_table() -> str:
    rows = [[name(action), default(action), explanation(action)] for _, action in options(evaluate_adt.make_parser())]
    return table(["option", "default", "what it is for"], rows)


def write() -> str:
    return "\n".join([INTRODUCTION, training_tables(), EVALUATION, evaluation_table()])


if __name__ == "__main__":
    if "--check" not in sys.argv:
        FILE.write_text(write(), encoding="utf-8")
    elif not FILE.is_file() or FILE.read_text(encoding="utf-8") != write():
        sys.exit("docs/options.md is not what the parsers say: run `python docs/write_options.py`.")

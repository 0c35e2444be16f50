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
"""Options in a file: `--config` is read by `with_config`, and `write_config` writes one beside a result."""

import difflib
import json
import os
import sys
from argparse import ArgumentParser
from pathlib import Path

import yaml


CONFIG = "training_config.yaml"  # beside a result


def with_config(parser, input_args=None) -> list[str]:
    """The command line with the options of its `--config` in front, where what is typed comes later and wins.

    Each becomes words of a command line, so that a file's values are checked as typed ones are. Ends with the parser's
    error where the file cannot be read, or names an option that there is not.
    """
    words = sys.argv[1:] if input_args is None else list(input_args)
    first = ArgumentParser(add_help=False)
    first.add_argument("--config")
    file = first.parse_known_args(words)[0].config
    return words if file is None else [*config_words(parser, file), *words]


def read_config(parser, file) -> dict:
    """A file's options by name; ends with the parser's error where there are none."""
    try:
        options = yaml.safe_load(Path(file).read_text(encoding="utf-8"))  # JSON is YAML, too
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {file} cannot be read: {' '.join(str(error).split())}")
    if not isinstance(options, dict):
        parser.error(f"--config {file} must have options by name, such as `learning_rate: 1e-5`.")
    return options


def config_words(parser, file) -> list[str]:
    options = read_config(parser, file)
    # By their own names alone: an alias of one has its `dest`.
    actions = {action.dest: action for action in parser._actions if f"--{action.dest}" in action.option_strings}
    del actions["help"], actions["config"]
    words = []
    for name, value in options.items():
        if name not in actions:
            near = difflib.get_close_matches(str(name), actions, n=1, cutoff=0)
            parser.error(f"--config {file}: there is no option {name}; the nearest name is {near[0]}.")
        words += option_words(parser, f"--config {file}: {name}", actions[name], value)
    return words


def option_words(parser, where, action, value) -> list[str]:
    """What would be typed for an option. `null` is an option that is not given."""
    flag, values = action.option_strings[0], value if isinstance(value, list) else [value]
    if value is None:
        return []
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            parser.error(f"{where} must be true or false, not {value}.")
        return [flag] if value else action.option_strings[1:]
    if any(isinstance(one, bool) for one in values):
        parser.error(f"{where}: YAML reads yes, no, on and off as true and false; put the value in quotes.")
    if isinstance(value, dict) and action.dest.endswith("_config_path"):  # what stood in that file
        return [f"{flag}={json.dumps(value)}"]
    if isinstance(value, list) and isinstance(action.default, list) and action.nargs is None:
        return [f"{flag}={','.join(map(str, value))}"]
    if isinstance(value, dict) or (isinstance(value, list) and action.nargs not in ("+", "*")):
        parser.error(f"{where} takes one value.")
    if isinstance(value, list):
        return [flag, *map(str, values)]
    return [f"{flag}={value}"]


def write_config(args, num_processes, hidden, file):
    """Writes the options as filled in, so that the file is a `--config`.

    Without those of the names `hidden`, and without models and data in this machine's folders: a published file has no
    business with either. What is missing is said in the file.
    """
    places = {name for name in args.natures if name.endswith("path") or name == "dataset_name"}
    local = {name for name in places if isinstance(getattr(args, name), str) and os.path.exists(getattr(args, name))}
    given = {name for name in args.natures if getattr(args, name) is not None}
    options = {name: getattr(args, name) for name in args.natures if name in given - hidden - local}
    missing = ", ".join(f"--{name}" for name in args.natures if name in given & (hidden | local))
    processes = f"{num_processes} process{'es' * (num_processes > 1)}"
    Path(file).write_text(
        f"# This run's options, for --config; by {processes}. Left out, as this machine's: {missing or 'nothing'}.\n"
        + yaml.safe_dump(options, sort_keys=False, allow_unicode=True, width=119),
        encoding="utf-8",
    )

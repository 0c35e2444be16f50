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
"""What `evaluate_adt.py` writes of its numbers: `report.json`, `report.md`, `report.html` and the plots.

The tables and plots are those of *ADT: Tuning Diffusion Models with Adversarial Supervision*: metrics by pipeline
(Table 1), by sampler (Table 2) and by training option (Table 3), the dataset's own (Table A1), win rates (Figure 3),
and metrics against guidance scale and steps (Figure 5), training iteration (A2) and a training option such as lambda
(A3).

`report.html` is one file that needs no network. Beside tables and plots it has a gallery, and a blind comparison of
two images or three, whose votes it saves as `votes.json`; `count_votes` and `count_rankings` read such files back.

A report is a dict that JSON can hold:

- "settings": "dataset_name", "dataset_config_name", "split", "num_images", "quality_prompts", "num_quality_prompts",
  "resolution", "seed", "dtype", "timestep_spacing", "num_bootstrap";
- "pipelines": a list of {"name", "path", "lora", "vae", "weights", "sampling", "run", "iteration", "training"}.
  "weights" stands for its files of weights; "vae" is one in place of its own, or None; "sampling" is how it was called
  beside sampler, steps, guidance and size, {option: value}; "run" and "iteration" are set where it is a checkpoint of
  a training run; "training" is the content of its `adt_config.json`, or None;
- "runs": a list of {"pipeline", "sampler", "steps", "guidance_scale", "images", "metrics"}: "images" has the folders
  of the sets of prompts "test" and "quality", relative to the report's own, with image n as `NNNNNN.png`; "metrics"
  has {name: {"value", "interval", "n", "prompts", ...}}, with "scores" where there is one for each image;
- "floors": a list of {"name", "pipelines", "vae", "images", "metrics"}, with images and metrics as a run's: the real
  images through the VAE of these pipelines and back. They are compared with nothing, and drawn by no setting;
- "real_images": {"n", "caption_tokens", "metrics"} of the dataset, whose metrics are of each image alone, or None;
- "warnings": sentences.

`metrics`, everywhere below, is {name: (description, direction)}; the direction is "lower" or "higher", whichever is
better, or None.
"""

import base64
import hashlib
import html
import io
import json
import math
import os
import re
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import yaml
from huggingface_hub import EvalResult, ModelCard
from matplotlib.figure import Figure
from PIL import Image

from training_utils import options_without_effect


FLOOR_NOTE = (
    " VAE floor: the real images, encoded and decoded by a pipeline's VAE and measured as if it had drawn them, about "
    "the best distance, precision and recall that tuning its denoiser can reach. Its other numbers are no limit."
)
TITLE = "Comparison of text-to-image pipelines"
VOTES_FORMAT = "adt-votes/1"
ARROWS = {"lower": " ↓", "higher": " ↑", None: ""}
# The gallery's images, in pixels: shrunk to the one, and exact (PNG) up to the other.
MAX_SIDE, MAX_EXACT_SIDE = 512, 128
# Training options that leave the result as it is, or that "iterations" and "global_batch_size" stand for.
NO_EFFECT = options_without_effect()
SETTING = ("sampler", "steps", "guidance_scale")
# How `update_model_card` knows its own results.
TOOL = "evaluate_adt.py"


class ReportError(RuntimeError):
    """An error whose message is all that the user needs."""


@dataclass
class Table:
    """`header` and `rows` have a string for each column, `align` an l (left) or an r (right)."""

    title: str
    header: list
    align: str
    rows: list
    note: str = ""


class Best(str):
    """A cell that is the best of those it compares with."""


def setting(run) -> tuple:
    """(sampler, steps, guidance scale): runs that agree in it can be compared."""
    return tuple(run[key] for key in SETTING)


def setting_label(run) -> str:
    return f"{run['sampler']}, {run['steps']} steps, guidance {run['guidance_scale']:g}"


def grouped(items, *keys) -> dict:
    """{(value of each key): [item, ...]}, in the order of the items."""
    groups = {}
    for item in items:
        groups.setdefault(tuple(item[key] for key in keys), []).append(item)
    return groups


def metric_names(runs, metrics) -> list:
    """Those that the runs have, in the order of `metrics`. A name that `metrics` lacks is a KeyError."""
    order = list(metrics)
    names = {name: metrics[name] for run in runs for name in run["metrics"]}
    return sorted(names, key=order.index)


def is_checkpoint(pipeline) -> bool:
    return pipeline["iteration"] is not None


# Preferences


def win_rate(first, second) -> float:
    """The share of images in which the first one's score is higher, in [0, 1]; a tie is half a win.

    `first` and `second` are scores of the same images, in the same order.
    """
    first, second = np.asarray(first), np.asarray(second)
    return float((first > second).mean() + 0.5 * (first == second).mean())


def win_rates(report, metrics) -> list:
    """How often one pipeline's image scores better than another's of the same prompt and setting (Figure 3).

    A list of {"metric", "sampler", "steps", "guidance_scale", "first", "second", "win_rate", "n"}: for each pair of
    pipelines and each metric that has scores and a direction, the share in [0, 1] of the `n` images in which "first"
    is better. Ties count half.
    """
    wins = []
    for runs in grouped(report["runs"], *SETTING).values():
        for first, second in combinations(runs, 2):
            for name in metric_names([first, second], metrics):
                results = [run["metrics"].get(name, {}) for run in (first, second)]
                _, direction = metrics[name]
                if direction is None or not all("scores" in result for result in results):
                    continue
                scores = [result["scores"] for result in results]
                if direction == "lower":
                    scores.reverse()
                wins.append(
                    {"metric": name, **{key: first[key] for key in SETTING}}
                    | {"first": first["pipeline"], "second": second["pipeline"]}
                    | {"win_rate": win_rate(*scores), "n": len(scores[0])}
                )
    return wins


def wilson_interval(share, count) -> list:
    """The 95 % score interval [low, high] of a share of `count` trials (Wilson, 1927)."""
    z = 1.959964
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def report_id(report) -> str:
    """Sixteen hexadecimal digits for the images that were compared: pipelines with their weights, settings and runs.

    What was made of the images, such as metrics and intervals, does not count.
    """
    identity = {
        "settings": {key: value for key, value in report["settings"].items() if key != "num_bootstrap"},
        "pipelines": [[entry[key] for key in ("name", "weights", "sampling")] for entry in report["pipelines"]],
        "runs": [[run["pipeline"], *setting(run), run["images"]] for run in report["runs"]],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def read_votes(file, report) -> list:
    """The votes of one `votes.json`; ReportError where they are not votes on `report`."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"The votes {file} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != VOTES_FORMAT:
        raise ReportError(f"{file} is not a file of votes: it does not say that its format is {VOTES_FORMAT}.")
    if content.get("report") != report_id(report):
        raise ReportError(f"{file} has votes on another report.")
    if not isinstance(content.get("votes"), list) or not all(isinstance(vote, dict) for vote in content["votes"]):
        raise ReportError(f"{file} has no list of votes.")
    if not isinstance(content.get("voter"), str):
        raise ReportError(f"{file} does not say whose votes it has.")
    counts = {"test": report["settings"]["num_images"], "quality": report["settings"]["num_quality_prompts"]}
    names = [pipeline["name"] for pipeline in report["pipelines"]]
    runs = [(run["pipeline"], *setting(run)) for run in report["runs"]]
    for number, vote in enumerate(content["votes"], start=1):
        compared = compared_names(vote)
        for name in compared:
            if name not in names:
                raise ReportError(f"{file}: vote {number} is on the pipeline {name!r}, which the report lacks.")
            if (name, *(vote.get(key) for key in SETTING)) not in runs:
                raise ReportError(f"{file}: vote {number} is on a sampler, steps and guidance that {name} lacks.")
        index = vote.get("index")
        if not isinstance(index, int) or not 0 <= index < (counts.get(vote.get("set")) or 0):
            raise ReportError(f"{file}: vote {number} is on a prompt that the report lacks.")
        if len(set(compared)) < len(compared):
            raise ReportError(f"{file}: vote {number} is on {compared[0]} and itself.")
        if "ranking" in vote and len(compared) != 3:
            raise ReportError(f"{file}: vote {number} ranks {len(compared)} pipelines, not three.")
        if "ranking" not in vote and vote.get("choice") not in ("left", "right", "tie"):
            raise ReportError(f"{file}: vote {number} chooses {vote.get('choice')!r}; it may be left, right or tie.")
    return [vote | {"voter": content["voter"]} for vote in content["votes"]]


def compared_names(vote) -> list:
    """The pipelines that a vote is on: two, or those of a ranking, the best first."""
    ranking = vote.get("ranking")
    return ranking if isinstance(ranking, list) else [vote.get("left"), vote.get("right")]


def last_votes(votes) -> list:
    """The last vote of each voter on the same images."""
    latest = {}
    for vote in votes:
        latest[vote["voter"], vote["set"], vote["index"], setting(vote), frozenset(compared_names(vote))] = vote
    return list(latest.values())


def count_rankings(files, report) -> list:
    """How often people ranked which pipeline first, second and third, from `votes.json` files, see `count_votes`.

    A list of {"pipeline", "among", "ranks", "mean_rank", "n"}, for each three that were ranked (the paper's human
    study, Figure 3) and each of these: "among" are the three names, and "ranks" has three counts.
    """
    votes = last_votes([vote for file in files for vote in read_votes(file, report) if "ranking" in vote])
    rows = []
    for among in combinations([pipeline["name"] for pipeline in report["pipelines"]], 3):
        rankings = [vote["ranking"] for vote in votes if set(vote["ranking"]) == set(among)]
        for name in among if rankings else ():
            ranks = [sum(ranking[rank] == name for ranking in rankings) for rank in range(3)]
            mean_rank = sum(rank * count for rank, count in enumerate(ranks, start=1)) / len(rankings)
            rows.append(
                {"pipeline": name, "among": list(among), "ranks": ranks, "mean_rank": mean_rank, "n": len(rankings)}
            )
    return rows


def count_votes(files, report) -> list:
    """Human preference from `votes.json` files, as `report.html` saves them; a ranking is a vote on each of its pairs.

    A voter's vote on one pair of images counts once, the last one given, in whatever files it is.

    A list of {"first", "second", "wins", "ties", "losses", "n", "share", "interval"}, one for each pair of pipelines
    with votes, over all samplers and guidance scales: "share" in [0, 1] is how often "first" was preferred, ties
    counted half, and "interval" is its 95 % Wilson interval. ReportError names the file that cannot be read, has
    another format, belongs to another report or names a pipeline that `report` lacks.
    """
    pairs = []
    for vote in [vote for file in files for vote in read_votes(file, report)]:
        about = {name: value for name, value in vote.items() if name != "ranking"}
        ranked = combinations(vote["ranking"], 2) if "ranking" in vote else ()
        pairs += [about | {"left": better, "right": other, "choice": "left"} for better, other in ranked] or [vote]
    votes, rows = last_votes(pairs), []
    for first, second in combinations([pipeline["name"] for pipeline in report["pipelines"]], 2):
        chosen = [
            vote.get(vote["choice"])  # the name on that side; None for a tie
            for vote in votes
            if {vote["left"], vote["right"]} == {first, second}
        ]
        if chosen:
            wins, ties, count = chosen.count(first), chosen.count(None), len(chosen)
            share = (wins + ties / 2) / count
            rows.append(
                {"first": first, "second": second, "wins": wins, "ties": ties, "losses": count - wins - ties}
                | {"n": count, "share": share, "interval": wilson_interval(share, count)}
            )
    return rows


# Tables


def text(value) -> str:
    """A value of the report, for a cell."""
    if value is None:
        return "–"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value)


def value_cell(run, name) -> str:
    """Value and interval of a run or a floor."""
    if name not in run["metrics"]:
        return "–"
    value, interval = run["metrics"][name]["value"], run["metrics"][name]["interval"]
    return f"{value:.4g}" + (f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else "")


def metric_cell(run, name, runs, metrics) -> str:
    """Value and interval; `Best` where none of `runs` in the same setting has a better value."""
    cell = value_cell(run, name)
    if name not in run["metrics"]:
        return cell
    value = run["metrics"][name]["value"]
    rivals = [
        other["metrics"][name]["value"]
        for other in runs
        if name in other["metrics"] and setting(other) == setting(run)
    ]
    _, direction = metrics[name]
    if direction is None or len(rivals) == 1:
        return cell
    return Best(cell) if value == (min if direction == "lower" else max)(rivals) else cell


def floors_of(report, names) -> list:
    """The floors of the VAEs of the pipelines with these names."""
    return [floor for floor in report["floors"] if not set(names).isdisjoint(floor["pipelines"])]


def metric_headers(names, metrics) -> list:
    return [name + ARROWS[metrics[name][1]] for name in names]


def main_table(report, metrics) -> Table:
    runs, count = report["runs"], report["settings"]["num_bootstrap"]
    names = metric_names(runs, metrics)
    return Table(
        "Results",
        ["pipeline", "sampler", "steps", "guidance", *metric_headers(names, metrics)],
        "llrr" + "r" * len(names),
        [
            [run["pipeline"], *map(str, setting(run)), *(metric_cell(run, name, runs, metrics) for name in names)]
            for run in runs
        ]
        + [[floor["name"], "–", "–", "–", *(value_cell(floor, name) for name in names)] for floor in report["floors"]],
        "↓ lower is better, ↑ higher is better; the best with the same sampler, steps and guidance is in bold. "
        + (
            f"In brackets: 95 % intervals, bootstrap over images, {count} resamples. They say how far another draw of "
            "as many images could move the number, and nothing of another seed or another training run."
            if count
            else "There are no intervals, since num_bootstrap is 0."
        )
        + FLOOR_NOTE * bool(report["floors"]),
    )


def real_images_tables(report, metrics) -> list:
    """What a dataset is like (Table A1)."""
    real, settings = report["real_images"], report["settings"]
    if real is None or not real["metrics"]:
        return []
    names = metric_names([real], metrics)
    tokens = real["caption_tokens"]
    row = [
        text(settings["dataset_name"]),
        settings["split"],
        str(real["n"]),
        "–" if tokens is None else f"{tokens:.2f}",
    ]
    return [
        Table(
            "Real images",
            ["dataset", "split", "images", "tokens", *names],
            "llrr" + "r" * len(names),
            [row + [value_cell(real, name) for name in names]],
            "The dataset's own images, with their own captions, whose mean length is in CLIP's tokens.",
        )
    ]


def transfer_tables(report, metrics) -> list:
    """Does it hold under samplers that training has not seen (Table 2)? For each metric, samplers in columns."""
    tables, by_guidance = [], grouped(report["runs"], "guidance_scale")
    names = [name for name in metric_names(report["runs"], metrics) if metrics[name][1] is not None]
    for name in names:
        for (guidance_scale,), group in by_guidance.items():
            samplers = list(grouped(group, "sampler", "steps"))
            if len({sampler for sampler, _ in samplers}) == 1:
                continue
            rows = []
            for pipeline in report["pipelines"]:
                cells = {
                    (run["sampler"], run["steps"]): metric_cell(run, name, group, metrics)
                    for run in group
                    if run["pipeline"] == pipeline["name"]
                }
                inference = pipeline["training"] and pipeline["training"]["inference"]
                trained = f"{inference['scheduler']}, {inference['num_inference_steps']} steps" if inference else "–"
                rows.append([pipeline["name"], trained, *(cells.get(sampler, "–") for sampler in samplers)])
            rows += [
                [floor["name"], "–", *[value_cell(floor, name)] * len(samplers)]
                for floor in report["floors"]
                if name in floor["metrics"]
            ]
            [header] = metric_headers([name], metrics)
            tables.append(
                Table(
                    f"Sampler transfer: {header}" + f", guidance {guidance_scale:g}" * (len(by_guidance) > 1),
                    ["pipeline", "trained with", *(f"{sampler}, {steps} steps" for sampler, steps in samplers)],
                    "ll" + "r" * len(samplers),
                    rows,
                )
            )
    return tables


def training_settings(pipeline) -> dict:
    """What its training can owe its result to: method, iterations, global batch and the options with an effect."""
    training = pipeline["training"]
    facts = {name: training.get(name) for name in ("method", "iterations", "global_batch_size")}
    return facts | {name: value for name, value in training["training_options"].items() if name not in NO_EFFECT}


def tuned_pipelines(report) -> dict:
    """{name: `training_settings`} of the pipelines that say how they were trained, checkpoints left out."""
    return {
        pipeline["name"]: training_settings(pipeline)
        for pipeline in report["pipelines"]
        if pipeline["training"] is not None and not is_checkpoint(pipeline)
    }


def training_tables(report, metrics) -> list:
    """What difference in training made which difference in the metrics (Table 3)?"""
    tuned = tuned_pipelines(report)
    if len(tuned) < 2:
        return []
    columns = ["method", "iterations"]
    for column in dict.fromkeys(name for settings in tuned.values() for name in settings):
        values = {json.dumps(settings.get(column)) for settings in tuned.values()}
        if column not in columns and len(values) > 1:
            columns.append(column)
    runs = [run for run in report["runs"] if run["pipeline"] in tuned]
    names = metric_names(runs, metrics)
    several = len(grouped(runs, *SETTING)) > 1
    rows = [
        [run["pipeline"], *[setting_label(run)] * several]
        + [text(tuned[run["pipeline"]].get(column)) for column in columns]
        + [metric_cell(run, name, runs, metrics) for name in names]
        for run in runs
    ]
    rows += [
        [floor["name"], *["–"] * (several + len(columns)), *(value_cell(floor, name) for name in names)]
        for floor in floors_of(report, tuned)
    ]
    header = ["pipeline", *["sampled with"] * several, *columns, *metric_headers(names, metrics)]
    note = "Options that are the same for all of them, or that do not change the result, are left out."
    align = "l" * (len(header) - len(names)) + "r" * len(names)
    return [Table("Training settings", header, align, rows, note)]


def win_rate_tables(report) -> list:
    checkpoints = {pipeline["name"] for pipeline in report["pipelines"] if is_checkpoint(pipeline)}
    rows = [
        [win["metric"], *map(str, setting(win)), win["first"], win["second"], f"{win['win_rate']:.1%}", str(win["n"])]
        for win in report["win_rates"]
        if not {win["first"], win["second"]} <= checkpoints
    ]
    header = ["metric", "sampler", "steps", "guidance", "wins", "over", "share", "images"]
    note = "How often the first one's image scores better on the same prompt; ties count half." + (
        " Checkpoints among themselves are in report.json." if len(rows) < len(report["win_rates"]) else ""
    )
    return [Table("Win rates", header, "llrrllrr", rows, note)] if rows else []


def preference_tables(report) -> list:
    rows = [
        [row["first"], row["second"], *(str(row[key]) for key in ("wins", "ties", "losses", "n"))]
        + [f"{row['share']:.1%} ({row['interval'][0]:.1%} to {row['interval'][1]:.1%})"]
        for row in report["human_preference"]
    ]
    header = ["preferred", "over", "wins", "ties", "losses", "votes", "share"]
    note = "Blind votes. Ties count half; in brackets the 95 % Wilson interval, which takes votes as independent."
    tables = [Table("Human preference", header, "llrrrrr", rows, note)] if rows else []
    ranks = [
        [row["pipeline"], ", ".join(row["among"]), *map(str, row["ranks"]), f"{row['mean_rank']:.2f}", str(row["n"])]
        for row in report["human_ranking"]
    ]
    header = ["pipeline", "among", "first", "second", "third", "mean rank ↓", "rankings"]
    note = "Blind rankings of three images, which count above as votes on their pairs, too."
    return tables + ([Table("Human ranking", header, "llrrrrr", ranks, note)] if ranks else [])


def about_tables(report, metrics) -> list:
    """How each number was made, and of what."""
    records = []
    # With one VAE in all there is nothing to look up.
    floors = report["floors"] if len(report["floors"]) > 1 else []
    for run in report["runs"]:
        for name, result in run["metrics"].items():
            made = {key: value for key, value in result.items() if key not in ("value", "interval", "scores")}
            if (name, made) not in records:
                records.append((name, made))
    records.sort(key=lambda record: list(metrics).index(record[0]))
    keys = list(dict.fromkeys(key for _, made in records for key in made))
    return [
        Table(
            "How each number was made",
            ["metric", "what it is", *keys],
            "ll" + "l" * len(keys),
            [[name, metrics[name][0], *(text(made.get(key)) for key in keys)] for name, made in records],
        ),
        Table(
            "Pipelines",
            ["name", "path", "adapters", "VAE", "called with", "method", "iterations", "checkpoint of", "iteration"]
            + ["floor"] * bool(floors),
            "llllllrlr" + "l" * bool(floors),
            [
                [pipeline["name"], pipeline["path"], text(pipeline["lora"]), text(pipeline["vae"])]
                + [", ".join(f"{key} {value}" for key, value in pipeline["sampling"].items()) or "–"]
                + [text((pipeline["training"] or {}).get(key)) for key in ("method", "iterations")]
                + [text(pipeline["run"]), text(pipeline["iteration"])]
                + [floor["name"] for floor in floors if pipeline["name"] in floor["pipelines"]]
                for pipeline in report["pipelines"]
            ],
        ),
        Table(
            "Settings",
            ["setting", "value"],
            "ll",
            [[key.replace("_", " "), text(value)] for key, value in report["settings"].items() if value is not None],
        ),
    ]


def markdown_table(table) -> str:
    def row(cells):
        escaped = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]
        bold = [f"**{text}**" if isinstance(cell, Best) else text for cell, text in zip(cells, escaped, strict=True)]
        return "| " + " | ".join(bold) + " |"

    rule = "|" + "".join({"l": "---|", "r": "---:|"}[align] for align in table.align)
    lines = [f"## {table.title}", "", row(table.header), rule, *map(row, table.rows)]
    return "\n".join(lines + ["", table.note] * bool(table.note))


def html_table(table) -> str:
    def row(cells, tag):
        parts = []
        for cell, align in zip(cells, table.align, strict=True):
            content = html.escape(cell)
            content = f"<strong>{content}</strong>" if isinstance(cell, Best) else content
            kind = f"{align} long" if len(cell) > 40 else align
            parts.append(f'<{tag} class="{kind}">{content}</{tag}>')
        return f"<tr>{''.join(parts)}</tr>"

    head, body = row(table.header, "th"), "\n".join(row(cells, "td") for cells in table.rows)
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return (
        f'<section><h2>{html.escape(table.title)}</h2><div class="wide"><table><thead>{head}</thead>'
        f"<tbody>{body}</tbody></table></div>{note}</section>"
    )


# Plots


@dataclass
class Sweep:
    """`lines` has {label: [(x, run), ...]}, sorted by x, and `levels` {label: run or floor} for what has no x."""

    name: str
    title: str
    x_label: str
    lines: dict
    levels: dict


def find_sweeps(report) -> list:
    """Every variable that takes at least two values while the rest stays.

    Against guidance scale and steps (Figure 5), without the checkpoints; against training iteration (A2), the other
    pipelines as levels; and against each numeric training option in which alone pipelines differ (A3), but the seed.
    The floors of the pipelines' VAEs are levels of all.
    """
    pipelines = {pipeline["name"]: pipeline for pipeline in report["pipelines"]}
    finished = [run for run in report["runs"] if not is_checkpoint(pipelines[run["pipeline"]])]
    sweeps = []

    def add(name, title, x_label, points, levels=None):
        lines = {label: sorted(line, key=lambda point: point[0]) for label, line in points.items()}
        if any(len({x for x, _ in line}) > 1 for line in lines.values()):
            levels = levels or {}
            shown = [run["pipeline"] for line in lines.values() for _, run in line] + list(levels)
            levels |= {floor["name"]: floor for floor in floors_of(report, shown)}
            sweeps.append(Sweep(name, title, x_label, lines, levels))

    for (sampler, steps), runs in grouped(finished, "sampler", "steps").items():
        points = {
            name: [(run["guidance_scale"], run) for run in line] for (name,), line in grouped(runs, "pipeline").items()
        }
        add(f"guidance-{sampler}-{steps}", f"Guidance scale, {sampler}, {steps} steps", "guidance scale", points)
    for (sampler, guidance_scale), runs in grouped(finished, "sampler", "guidance_scale").items():
        points = {name: [(run["steps"], run) for run in line] for (name,), line in grouped(runs, "pipeline").items()}
        name = f"steps-{sampler}-guidance-{guidance_scale:g}"
        add(name, f"Steps, {sampler}, guidance {guidance_scale:g}", "steps", points)

    tuned = tuned_pipelines(report)
    options = dict.fromkeys(name for settings in tuned.values() for name in settings if name != "seed")
    for (sampler, steps, guidance_scale), runs in grouped(report["runs"], *SETTING).items():
        name = f"{sampler}-{steps}-guidance-{guidance_scale:g}"
        label = setting_label(runs[0])
        by_pipeline = {run["pipeline"]: run for run in runs}
        for option in options:
            same = {}
            for pipeline in filter(by_pipeline.get, tuned):
                value = tuned[pipeline].get(option)
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    rest = {key: other for key, other in tuned[pipeline].items() if key != option}
                    same.setdefault(json.dumps(rest, sort_keys=True), []).append((value, by_pipeline[pipeline]))
            points = {}
            for line in same.values():
                # Where nothing differs there is no line to draw.
                if len({value for value, _ in line}) > 1:
                    line.sort(key=lambda point: point[0])
                    points[", ".join(run["pipeline"] for _, run in line)] = line
            add(f"{option}-{name}", f"{option}, {label}", option, points)
        points, levels = {}, {}
        for pipeline, run in by_pipeline.items():
            if is_checkpoint(pipelines[pipeline]):
                points.setdefault(pipelines[pipeline]["run"], []).append((pipelines[pipeline]["iteration"], run))
            else:
                levels[pipeline] = run
        add(f"iteration-{name}", f"Training iteration, {label}", "training iteration", points, levels)
    return sorted(sweeps, key=lambda sweep: sweep.x_label)  # plots of one kind together


def draw_sweep(sweep, metrics) -> Figure:
    """A subplot for each metric; bands are the intervals, and dashed lines the levels."""
    runs = [run for line in sweep.lines.values() for _, run in line]
    names = metric_names(runs, metrics)
    columns = 2 if len(names) == 4 else min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(max(4, 3.4 * columns), 2.8 * rows + 0.6), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(names) :]:
        axis.remove()
    # A run and the pipeline that it ended with may have one name: then they share the colour too.
    colours = {label: index for index, label in enumerate(dict.fromkeys([*sweep.lines, *sweep.levels]))}
    handles = {}
    for axis, name in zip(axes, names, strict=False):
        for label, line in sweep.lines.items():
            style = {"color": f"C{colours[label] % 10}", "marker": "os^Dvp*"[colours[label] % 7]}
            line = [(x, run["metrics"][name]) for x, run in line if name in run["metrics"]]
            x, y = [x for x, _ in line], [result["value"] for _, result in line]
            [handles["line", label]] = axis.plot(x, y, **style, markersize=4, linewidth=1.5)
            limits = np.array([result["interval"] or [np.nan, np.nan] for _, result in line]).reshape(-1, 2)
            axis.fill_between(x, *limits.T, color=style["color"], alpha=0.12, linewidth=0)
        for label, run in sweep.levels.items():
            if name in run["metrics"]:
                style = {"color": f"C{colours[label] % 10}", "linestyle": "--", "linewidth": 1.2}
                handles["level", label] = axis.axhline(run["metrics"][name]["value"], **style)
        axis.set_title(name + ARROWS[metrics[name][1]], fontsize=10)
        axis.set_xlabel(sweep.x_label, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    legend = figure.legend(
        handles.values(), [label for _, label in handles], loc="outside lower center",
        ncols=min(4, len(handles)), fontsize=9, frameon=False,
    )  # fmt: skip
    # A pipeline's name may have dollars, between which Matplotlib would look for a formula.
    for entry in legend.get_texts():
        entry.set_parse_math(False)
    return figure


# The page


def data_uri(image) -> str:
    """A PIL image for the page: at most 512 pixels a side, as PNG up to 128 and else as JPEG of quality 90."""
    image = image.convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    kind = "png" if max(image.size) <= MAX_EXACT_SIDE else "jpeg"
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 90} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def read_images(folder, count) -> list:
    """The first `count` images of a folder, for the page."""
    uris = []
    for index in range(count):
        with Image.open(folder / f"{index:06d}.png") as image:
            uris.append(data_uri(image))
    return uris


def gallery_data(report, prompts, real_image, output_dir, num_gallery) -> dict:
    """What the page's script reads: the first prompts of each set, and every image of theirs once."""
    settings = [dict(zip(SETTING, values, strict=True)) for values in grouped(report["runs"], *SETTING)]
    sets = {}
    for name, lines in prompts.items():
        if lines[:num_gallery]:
            sets[name] = {"prompts": lines[:num_gallery]}
            if name == "test" and real_image is not None:
                count = len(sets[name]["prompts"])
                sets[name]["real"] = [data_uri(real_image(index)) for index in range(count)]
                sets[name]["floors"] = [
                    {"name": floor["name"], "images": read_images(Path(output_dir, floor["images"][name]), count)}
                    for floor in report["floors"]
                ]
    images = []
    for run in report["runs"]:
        for name, folder in run["images"].items():
            uris = read_images(Path(output_dir, folder), len(sets[name]["prompts"]) if name in sets else 0)
            if uris:
                number = settings.index({key: run[key] for key in SETTING})
                images.append({"pipeline": run["pipeline"], "setting": number, "set": name, "images": uris})
    pipelines = [{"name": entry["name"], "checkpoint": is_checkpoint(entry)} for entry in report["pipelines"]]
    return {
        "report": report_id(report),
        "format": VOTES_FORMAT,
        "pipelines": pipelines,
        "settings": settings,
        "sets": sets,
        "images": images,
    }


def write_report(report, metrics, prompts, real_image, output_dir, num_gallery, votes):
    """Writes `report.json`, `report.md`, `report.html` and `plots/` into `output_dir`.

    report: see above; "win_rates", "human_preference" and "human_ranking" are added to it.
    prompts: {"test": [...], "quality": [...]}, either or both; image n of a set belongs to its prompt n.
    real_image: a function from an index of the set "test" to its PIL image, or None.
    num_gallery: how many prompts of each set the page shows; their images must be in `output_dir`.
    votes: paths of `votes.json` files, see `count_votes` for the errors.
    """
    output_dir = Path(output_dir)
    report["human_preference"] = count_votes(votes, report)
    report["human_ranking"] = count_rankings(votes, report)
    report["win_rates"] = win_rates(report, metrics)
    tables = [main_table(report, metrics)] if report["runs"] else []
    tables += [*real_images_tables(report, metrics), *transfer_tables(report, metrics)]
    tables += [*training_tables(report, metrics)]
    tables += [*win_rate_tables(report), *preference_tables(report), *about_tables(report, metrics)]

    plots = []
    for sweep in find_sweeps(report):
        file = output_dir / "plots" / f"{sweep.name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        draw_sweep(sweep, metrics).savefig(file, dpi=150)
        plots.append((sweep.title, file))

    (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    parts = [f"# {TITLE}", *(f"> {warning}" for warning in report["warnings"]), *map(markdown_table, tables)]
    if plots:
        parts.append("## Plots")
        parts += [f"{title}:\n\n![{title}](plots/{file.name})" for title, file in plots]
    (output_dir / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")

    figures = [
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<img class="plot" alt="{html.escape(title)}" '
        f'src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"></figure>'
        for title, file in plots
    ]
    data = gallery_data(report, prompts, real_image, output_dir, num_gallery)
    values = {
        "title": TITLE,
        "warnings": "".join(f'<p class="warning">{html.escape(warning)}</p>' for warning in report["warnings"]),
        "tables": "\n".join(map(html_table, tables)),
        "plots": f'<section id="plots"><h2>Plots</h2>{"".join(figures)}</section>' if figures else "",
        # A script element ends at the first "</script", wherever it is.
        "data": json.dumps(data).replace("<", "\\u003c"),
    }
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{ (\w+) \}\}", lambda match: values[match[1]], template)
    (output_dir / "report.html").write_text(page, encoding="utf-8")


# The model card


def card_dataset(prompts, settings) -> dict:
    """What `EvalResult` says of a set of prompts. A folder gives its name alone: cards are published."""
    if prompts == "quality":
        name = settings["quality_prompts"]
        return {"dataset_type": name, "dataset_name": f"{name} (prompts)"}
    name = settings["dataset_name"]
    name = Path(name).resolve().name if os.path.isdir(name) else name
    config = settings["dataset_config_name"]
    return {
        "dataset_type": name,
        "dataset_name": name,
        "dataset_config": config,
        "dataset_split": settings["split"],
    }


def load_card(file) -> ModelCard:
    """Raises `ReportError` where there is no such file, or where its metadata cannot be read."""
    if not Path(file).is_file():
        raise ReportError(f"There is no model card {file}.")
    try:
        return ModelCard.load(file)
    except (ValueError, yaml.YAMLError) as error:
        raise ReportError(f"The metadata of the model card {file} cannot be read: {error}") from error


def update_model_card(report, metrics, name, path):
    """Writes the results of the pipeline `name` into a model card's metadata, as the Hub's model-index.

    path: a `README.md`, or a folder with one. Each metric is there once for each sampler and guidance scale. Results
    that were written so before, on the same data, are replaced; other results, other metadata and the text stay.
    ReportError where there is no such pipeline or card, or where the card's metadata cannot be read.
    """
    runs = [run for run in report["runs"] if run["pipeline"] == name]
    if not runs:
        raise ReportError(f"The report has no pipeline {name}.")
    file = Path(path, "README.md") if os.path.isdir(path) else Path(path)
    card = load_card(file)
    results = []
    for run in runs:
        for metric in metric_names([run], metrics):
            record = {key: value for key, value in run["metrics"][metric].items() if key not in ("value", "scores")}
            results.append(
                EvalResult(
                    task_type="text-to-image",
                    **card_dataset(record["prompts"], report["settings"]),
                    metric_type=metric,
                    metric_name=f"{metric} ({setting_label(run)})",
                    metric_value=run["metrics"][metric]["value"],
                    metric_args={"tool": TOOL, **{key: run[key] for key in SETTING}, **record},
                )
            )
    data = {result.unique_identifier for result in results}
    kept = [
        result
        for result in card.data.eval_results or []
        if (result.metric_args or {}).get("tool") != TOOL or result.unique_identifier not in data
    ]
    card.data.model_name = card.data.model_name or file.resolve().parent.name
    card.data.eval_results = kept + results
    card.save(file)

"""The report: tables, plots, votes and model card on reports made by hand, and the page in a real browser."""

import base64
import copy
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.ui import WebDriverWait

import evaluate_report as reporting


METRICS = {
    "fdd": ("Fréchet distance on DINOv2 features", "lower"),
    "recall": ("share of real images near generated ones", "higher"),
    "clip": ("CLIP score", "higher"),
    "sharpness": ("variance of the Laplacian", None),
}
CONFIG = {
    "method": "adversarial diffusion tuning",
    "iterations": 400,
    "global_batch_size": 8,
    "inference": {"scheduler": "DDIMScheduler", "num_inference_steps": 50},
    "training_options": {
        "pretrained_model_name_or_path": "base", "seed": 0, "diffusion_loss_weight": 0.5, "gradient_path": "adt",
        "use_ema": True, "output_dir": "a", "tracker_project_name": "a", "checkpointing_steps": 1,
        "max_train_steps": 4, "train_batch_size": 8, "learning_rate": 5e-6,
    },
}  # fmt: skip
PROMPTS = {
    "test": ["a red disc", "</script><b>two", "", "four discs", "five | six"],
    "quality": ["a lighthouse", "an old sailor", "rain"],
}


def pipeline(name, training=None, run=None, iteration=None):
    return {
        "name": name, "path": f"models/{name}", "lora": None, "vae": None, "weights": f"of {name}",
        "sampling": {"guidance_rescale": 0.0}, "run": run, "iteration": iteration, "training": training,
    }  # fmt: skip


def trained(**options):
    config = copy.deepcopy(CONFIG)
    config["method"] = options.pop("method", config["method"])
    config["training_options"] |= options
    return config


def make_report(pipelines, settings=(("ddim", 50, 7.0),), sets=("test", "quality")):
    """Metrics rise with the pipeline's and the setting's number, so that it is clear whose they are."""
    runs = []
    for number, entry in enumerate(pipelines):
        for part, (sampler, steps, guidance_scale) in enumerate(settings):
            value = 10 + number + part / 10
            made = {"n": 4, "prompts": "test"}
            metrics = {
                "fdd": {"value": value, "interval": [value - 1, value + 2], **made, "features": "DINOv2", "k": 5},
                "recall": {"value": value / 100, "interval": None, **made},
                "clip": {"value": value, "interval": [value, value], **made, "prompts": sets[-1]}
                | {"scores": [value - 1, value, value + 1, 7.0]},
                "sharpness": {"value": 900.0 - value, "interval": None, **made, "scores": [1.0, 2.0, 3.0, 4.0]},
            }
            folder = f"images/{entry['name']}/{sampler}-{steps}-guidance-{guidance_scale:g}"
            runs.append(
                {"pipeline": entry["name"], "sampler": sampler, "steps": steps, "guidance_scale": guidance_scale}
                | {"images": {name: folder + "-quality" * (name == "quality") for name in sets}, "metrics": metrics}
            )
    settings = {
        "dataset_name": "user/captions", "dataset_config_name": None, "split": "test", "num_images": 5,
        "quality_prompts": "hps", "num_quality_prompts": 3, "resolution": 16, "seed": 0, "dtype": "float32",
        "timestep_spacing": None, "num_bootstrap": 100,
    }  # fmt: skip
    return {
        "settings": settings,
        "pipelines": pipelines,
        "runs": runs,
        "floors": [],
        "real_images": None,
        "warnings": [],
    }


def make_floor(name, pipelines, value):
    """Of the metrics, `sharpness` is missing, as if it were of other prompts."""
    result = {"value": value, "interval": [value - 1, value + 1], "n": 5, "prompts": "test"}
    metrics = {"fdd": result, "recall": result | {"interval": None}, "clip": result | {"scores": [90.0] * 4}}
    images = {"test": f"images/vae_floor/{value}"}
    return {"name": name, "pipelines": pipelines, "vae": f"{value}", "images": images, "metrics": metrics}


def make_images(report, folder, size=16):
    """Noise, other in each file."""
    generator = np.random.default_rng(0)
    for run in report["runs"] + report["floors"]:
        for name, images in run["images"].items():
            (folder / images).mkdir(parents=True)
            for index in range(len(PROMPTS[name])):
                values = generator.integers(256, size=(size, size, 3), dtype=np.uint8)
                Image.fromarray(values).save(folder / images / f"{index:06d}.png")


def real_image(index):
    return Image.new("RGB", (16, 16), (index, 200, 0))


@pytest.fixture
def write(tmp_path):
    """Writes a report without a gallery; gives (report.md, report.html, report.json)."""

    def write(report, votes=()):
        reporting.write_report(report, METRICS, {}, None, tmp_path, 0, votes)
        texts = [(tmp_path / f"report.{suffix}").read_text() for suffix in ("md", "html", "json")]
        return texts[0], texts[1], json.loads(texts[2])

    return write


# Win rates and votes


def test_win_rates_by_hand():
    assert reporting.win_rate([1, 2, 3, 4], [0, 2, 5, 1]) == 0.625  # two wins and a tie
    report = make_report([pipeline("a"), pipeline("b")], [("ddim", 50, 7.0), ("ddim", 50, 1.0)])
    wins = reporting.win_rates(report, METRICS)
    # The last of four scores is the same for both; sharpness has scores and no direction.
    assert wins[1] == {
        "metric": "clip", "sampler": "ddim", "steps": 50, "guidance_scale": 1.0, "first": "a", "second": "b",
        "win_rate": 0.125, "n": 4,
    }  # fmt: skip
    assert [win["guidance_scale"] for win in wins] == [7.0, 1.0]
    [win, _] = reporting.win_rates(report, METRICS | {"clip": ("", "lower")})
    assert win["win_rate"] == 0.875


def vote(left, right, choice, **changes):
    entry = {"set": "test", "index": 0, "prompt": "", "sampler": "ddim", "steps": 50, "guidance_scale": 7.0}
    return entry | {"left": left, "right": right, "choice": choice} | changes


def ranked(*names, **changes):
    """A vote that ranks the pipelines, the best first."""
    about = {key: value for key, value in vote(None, None, None).items() if key not in ("left", "right", "choice")}
    return about | {"ranking": list(names)} | changes


@pytest.fixture
def votes_file(tmp_path):
    def votes_file(report, votes, name="votes.json", changes=None):
        content = {"format": "adt-votes/1", "report": reporting.report_id(report), "voter": name, "votes": votes}
        content |= changes or {}
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    return votes_file


def test_votes_of_several_people_are_counted(votes_file, write):
    report = make_report([pipeline("a"), pipeline("b"), pipeline("c")])
    first = [vote("a", "b", "left"), vote("b", "a", "left", index=1), vote("b", "a", "right", index=2)]
    second = [vote("b", "a", "tie"), vote("b", "a", "right", index=1), vote("c", "b", "left", index=1)]
    files = [votes_file(report, first), votes_file(report, second, "2.json")]
    row, other = reporting.count_votes(files, report)
    assert {key: row[key] for key in ("first", "second", "wins", "ties", "losses", "n", "share")} == {
        "first": "a", "second": "b", "wins": 3, "ties": 1, "losses": 1, "n": 5, "share": 0.7
    }  # fmt: skip
    assert (other["first"], other["second"], other["wins"], other["losses"]) == ("b", "c", 0, 1)
    markdown, page, content = write(report, files)
    assert f"| a | b | 3 | 1 | 1 | 5 | 70.0% ({row['interval'][0]:.1%} to {row['interval'][1]:.1%}) |" in markdown
    assert "<h2>Human preference</h2>" in page and content["human_preference"] == [row, other]
    assert "Human preference" not in write(report)[0]


def test_rankings_are_counted_and_are_votes_on_their_pairs(votes_file, write):
    report = make_report([pipeline("a"), pipeline("b"), pipeline("c"), pipeline("d")])
    mine = [
        ranked("a", "b", "c"),
        ranked("b", "a", "c", index=1),
        vote("c", "a", "left", index=2),
        vote("a", "b", "tie"),
    ]
    # Given again the other way round, with the pairs: the last one counts.
    theirs = [ranked("c", "b", "a"), ranked("b", "c", "a"), ranked("d", "b", "a", index=3)]
    files = [votes_file(report, mine), votes_file(report, theirs, "2.json")]
    first, second = reporting.count_rankings(files, report)[:3], reporting.count_rankings(files, report)[3:]
    assert [(row["pipeline"], row["ranks"], row["n"]) for row in first] == [
        ("a", [1, 1, 1], 3), ("b", [2, 1, 0], 3), ("c", [0, 1, 2], 3)
    ]  # fmt: skip
    assert [row["mean_rank"] for row in first] == pytest.approx([2, 4 / 3, 8 / 3])
    assert {tuple(row["among"]) for row in first} == {("a", "b", "c")}
    assert [(row["pipeline"], row["ranks"]) for row in second] == [
        ("a", [0, 0, 1]), ("b", [0, 1, 0]), ("d", [1, 0, 0])
    ]  # fmt: skip
    rows = {(row["first"], row["second"]): row for row in reporting.count_votes(files, report)}
    # a over b: mine a tie, given after the ranking, and a loss; theirs two losses. a over c: two wins; two losses.
    assert [rows["a", "b"][key] for key in ("wins", "ties", "losses")] == [0, 1, 3]
    assert [rows["a", "c"][key] for key in ("wins", "ties", "losses")] == [2, 0, 2]
    assert [rows["b", "c"][key] for key in ("wins", "ties", "losses")] == [3, 0, 0]
    markdown, page, content = write(report, files)
    assert "| b | a, b, c | 2 | 1 | 0 | 1.33 | 3 |" in markdown and "<h2>Human ranking</h2>" in page
    assert content["human_ranking"] == first + second
    assert "Human ranking" not in write(report)[0]


def test_wilson_interval_by_hand():
    # 8 of 10, as in Wilson's formula by hand; and it stays in [0, 1].
    assert reporting.wilson_interval(0.8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert reporting.wilson_interval(0, 4) == pytest.approx([0, 0.4899], abs=1e-4)
    assert reporting.wilson_interval(1.0, 4) == pytest.approx([0.5101, 1], abs=1e-4)


@pytest.mark.parametrize(
    ("votes", "changes", "sentence"),
    [
        ([], {"format": "adt-votes/2"}, "votes.json is not a file of votes"),
        ([], {"report": "0123456789abcdef"}, "votes.json has votes on another report"),
        ([], {"votes": None}, "votes.json has no list of votes"),
        ([vote("a", "c", "left")], {}, "votes.json: vote 1 is on the pipeline 'c', which"),
        ([vote("a", "b", "left"), vote("a", "a", "left")], {}, "votes.json: vote 2 is on a and itself"),
        ([], {"voter": None}, "votes.json does not say whose votes it has"),
        ([vote("a", "b", "left", index=5)], {}, "vote 1 is on a prompt that the report lacks"),
        ([vote("a", "b", "left", set="quality", index=3)], {}, "vote 1 is on a prompt that the report lacks"),
        ([vote("a", "b", "left", set="other")], {}, "vote 1 is on a prompt that the report lacks"),
        ([vote("a", "b", "both")], {}, "votes.json: vote 1 chooses 'both'"),
        ([vote("a", "b", "left", steps=20)], {}, "votes.json: vote 1 is on a sampler, .* guidance that a lacks"),
        ([ranked("a", "b", "c")], {}, "vote 1 is on the pipeline 'c', which"),
        ([ranked("a", "b", "a")], {}, "vote 1 is on a and itself"),
        ([ranked("a", "b")], {}, "vote 1 ranks 2 pipelines, not three"),
        ([ranked("a", "b") | {"ranking": "ab"}], {}, "vote 1 is on the pipeline None, which"),
    ],
)
def test_bad_votes_are_refused(votes_file, votes, changes, sentence):
    report = make_report([pipeline("a"), pipeline("b")])
    with pytest.raises(reporting.ReportError, match=sentence):
        reporting.count_votes([votes_file(report, votes, changes=changes)], report)


def test_unreadable_votes_are_refused(tmp_path, votes_file):
    report = make_report([pipeline("a"), pipeline("b")])
    (tmp_path / "votes.json").write_text("{")
    for name in ("votes.json", "nowhere.json"):
        with pytest.raises(reporting.ReportError, match=f"{name} cannot be read"):
            reporting.count_votes([tmp_path / name], report)


def test_a_vote_counts_once(votes_file):
    """Saved half-way and at the end, and voted on again: the last one counts, of each voter and prompt."""
    report = make_report([pipeline("a"), pipeline("b")])
    early = [vote("a", "b", "left")]
    later = [*early, vote("b", "a", "tie", index=1), vote("b", "a", "left")]
    mine = {"voter": "me"}
    files = [votes_file(report, early, changes=mine), votes_file(report, later, "2.json", mine)]
    [row] = reporting.count_votes([*files, files[1]], report)
    assert (row["wins"], row["ties"], row["losses"], row["n"]) == (0, 1, 1, 2)
    [row] = reporting.count_votes([*files, votes_file(report, early, "3.json")], report)
    assert (row["wins"], row["ties"], row["losses"], row["n"]) == (1, 1, 1, 3)


def test_report_id_is_of_what_was_compared():
    report = make_report([pipeline("a"), pipeline("b")])
    same, other = copy.deepcopy(report), copy.deepcopy(report)
    same["runs"][0]["metrics"]["clip"]["value"] = 0
    same["settings"]["num_bootstrap"] = 7
    retrained = copy.deepcopy(report)
    retrained["pipelines"][0]["weights"] = "others"
    assert reporting.report_id(report) != reporting.report_id(retrained)
    other["settings"]["seed"] = 1
    assert reporting.report_id(report) == reporting.report_id(same) != reporting.report_id(other)
    assert reporting.report_id(make_report([pipeline("a"), pipeline("b")], [("ddim", 49, 7.0)])) not in (
        reporting.report_id(report), reporting.report_id(make_report([pipeline("a"), pipeline("c")]))
    )  # fmt: skip


# Tables


def test_main_table(write):
    report = make_report([pipeline("a"), pipeline("b|<i>")], [("ddim", 50, 7.0), ("ddim", 50, 1.0)])
    report["warnings"] = ["Few <images>."]
    markdown, page, content = write(report)
    assert "| pipeline | sampler | steps | guidance | fdd ↓ | recall ↑ | clip ↑ | sharpness |" in markdown
    # The best with the same guidance: the lowest fdd, the highest clip, and no best sharpness.
    assert "| a | ddim | 50 | 7.0 | **10 (9 to 12)** | 0.1 | 10 (10 to 10) | 890 |" in markdown
    cells = "11.1 (10.1 to 13.1) | **0.111** | **11.1 (11.1 to 11.1)** | 888.9 |"
    assert f"| b\\|<i> | ddim | 50 | 1.0 | {cells}" in markdown
    assert '<td class="r"><strong>10 (9 to 12)</strong></td>' in page and "b|&lt;i&gt;" in page and "<i>" not in page
    assert "> Few <images>." in markdown and "Few &lt;images&gt;." in page
    assert "100 resamples" in markdown and "100 resamples" in page
    assert "| clip | ddim | 50 | 7.0 | a | b\\|<i> | 12.5% | 4 |" in markdown
    assert content["win_rates"] == report["win_rates"] and content["runs"] == report["runs"]
    assert "| fdd | Fréchet distance on DINOv2 features | 4 | test | DINOv2 | 5 |" in markdown
    assert "| clip | CLIP score | 4 | quality | – | – |" in markdown
    # Nothing that was not measured.
    assert "Sampler transfer" not in markdown and "Training settings" not in markdown
    report["settings"]["num_bootstrap"] = 0
    assert "no intervals" in write(report)[0]


def test_real_images_table(write):
    """The paper's Table A1; without pipelines it is the only one of numbers."""
    metrics = {"clip": {"value": 28.92, "interval": [28.9, 28.95], "n": 5, "prompts": "test"}}
    report = make_report([pipeline("a")])
    report["real_images"] = {"n": 5, "caption_tokens": 49.304, "metrics": metrics}
    row = "| user/captions | test | 5 | 49.30 | 28.92 (28.9 to 28.95) |"
    assert row in write(report)[0]
    report["pipelines"], report["runs"] = [], []
    markdown, page, _ = write(report)
    assert "| dataset | split | images | tokens | clip |" in markdown and row in markdown
    assert "## Results" not in markdown and "<h2>Real images</h2>" in page
    report["real_images"]["caption_tokens"] = None
    assert "| 5 | – | 28.92" in write(report)[0]


def test_one_pipeline_has_no_best_and_a_missing_metric_a_dash(write):
    report = make_report([pipeline("a"), pipeline("b")])
    del report["runs"][1]["metrics"]["recall"]
    markdown, *_ = write(report)
    assert "| b | ddim | 50 | 7.0 | 11 (10 to 13) | – | **11 (11 to 11)** | 889 |" in markdown
    assert "| a | ddim | 50 | 7.0 | **10 (9 to 12)** | 0.1 |" in markdown
    assert "**" not in write(make_report([pipeline("a")]))[0]


def test_win_rates_of_checkpoints_are_in_the_table_against_others_only(write):
    pipelines = [pipeline("a"), *(pipeline(f"b@{n}", run="b", iteration=n) for n in (1, 2))]
    markdown, _, content = write(make_report(pipelines))
    assert [(win["first"], win["second"]) for win in content["win_rates"]] == [
        ("a", "b@1"), ("a", "b@2"), ("b@1", "b@2")
    ]  # fmt: skip
    assert "| a | b@2 |" in markdown and "| b@1 | b@2 |" not in markdown
    assert "Checkpoints among themselves are in report.json." in markdown
    assert "Checkpoints among" not in write(make_report(pipelines[:2]))[0]


def test_sampler_transfer(write):
    settings = [("ddim", 50, 7.0), ("euler", 30, 7.0), ("euler", 30, 1.0)]
    markdown, *_ = write(make_report([pipeline("base"), pipeline("adt", CONFIG)], settings))
    block = markdown.split("## Sampler transfer: fdd ↓, guidance 7\n")[1].split("##")[0]
    assert block.strip().splitlines() == [
        "| pipeline | trained with | ddim, 50 steps | euler, 30 steps |",
        "|---|---|---:|---:|",
        "| base | – | **10 (9 to 12)** | **10.1 (9.1 to 12.1)** |",
        "| adt | DDIMScheduler, 50 steps | 11 (10 to 13) | 11.1 (10.1 to 13.1) |",
    ]
    assert "Sampler transfer: clip ↑, guidance 7\n" in markdown
    # Guidance 1 has one sampler, and sharpness no direction.
    assert "guidance 1\n" not in markdown and "Sampler transfer: sharpness" not in markdown
    assert "## Sampler transfer: recall ↑\n" in write(make_report([pipeline("a")], settings[:2]))[0]


def test_training_settings(write):
    pipelines = [
        pipeline("base"),
        pipeline("low", trained(diffusion_loss_weight=0.1, output_dir="b", validation_prompts=["x"])),
        pipeline("high", trained(gradient_path="drtune", checkpointing_steps=2, train_batch_size=4)),
        pipeline("high@9", CONFIG, run="high", iteration=9),
    ]
    markdown, *_ = write(make_report(pipelines))
    block = markdown.split("## Training settings\n")[1].split("##")[0].strip().splitlines()
    assert block[0].startswith("| pipeline | method | iterations | diffusion_loss_weight | gradient_path | fdd ↓ |")
    # The best of those that are compared, without base.
    assert block[2].startswith("| low | adversarial diffusion tuning | 400 | 0.1 | adt | **11 (10 to 13)** |")
    assert block[3].startswith("| high | adversarial diffusion tuning | 400 | 0.5 | drtune | 12 (11 to 14) |")
    assert len(block) == 6 and "are left out" in block[5]
    assert "Training settings" not in write(make_report(pipelines[:2]))[0]
    markdown, *_ = write(make_report(pipelines[:3], [("ddim", 50, 7.0), ("ddim", 50, 1.0)]))
    assert "| low | ddim, 50 steps, guidance 1 | adversarial" in markdown


def test_floors_are_in_the_tables_and_compared_with_nothing(tmp_path):
    settings = [("ddim", 50, 7.0), ("ddim", 50, 1.0), ("euler", 30, 7.0)]
    pipelines = [
        pipeline("base"),
        pipeline("low", trained(diffusion_loss_weight=0.1)),
        pipeline("high", trained(diffusion_loss_weight=2.0)),
    ]
    without, report = make_report(pipelines, settings), make_report(pipelines, settings)
    report["floors"] = [make_floor("base (VAE floor)", ["base"], 3.5), make_floor("VAE floor", ["low", "high"], 99)]

    def tables(report):
        made = [reporting.main_table(report, METRICS), *reporting.transfer_tables(report, METRICS)]
        made += [*reporting.training_tables(report, METRICS), *reporting.about_tables(report, METRICS)]
        return {table.title: reporting.markdown_table(table).splitlines() for table in made}

    found, plain = tables(report), tables(without)
    # A row each, the last ones: their fdd and clip are the best and the worst of all, and get and take no mark.
    *rows, first, second, _, note = found["Results"]
    assert first == "| base (VAE floor) | – | – | – | 3.5 (2.5 to 4.5) | 3.5 | 3.5 (2.5 to 4.5) | – |"
    assert second == "| VAE floor | – | – | – | 99 (98 to 100) | 99 | 99 (98 to 100) | – |"
    assert rows == plain["Results"][:-2] and "encoded and decoded" in note and "VAE" not in plain["Results"][-1]
    title = "Sampler transfer: fdd ↓, guidance 7"
    assert found[title][:-2] == plain[title]
    assert found[title][-1] == "| VAE floor | – | 99 (98 to 100) | 99 (98 to 100) |"
    # Base is not trained, so that its VAE is of no interest there.
    *rows, row, _, _ = found["Training settings"]
    assert row == "| VAE floor | – | – | – | – | 99 (98 to 100) | 99 | 99 (98 to 100) | – |"
    assert rows == plain["Training settings"][:-2]
    assert found["Pipelines"][4].endswith("| – | base (VAE floor) |") and found["Pipelines"][5].endswith(
        "| VAE floor |"
    )

    assert reporting.win_rates(report, METRICS) == reporting.win_rates(without, METRICS)
    assert reporting.report_id(report) == reporting.report_id(without)  # votes on the images stay valid
    (tmp_path / "README.md").write_text(CARD)
    reporting.update_model_card(report, METRICS, "high", tmp_path)
    card = (tmp_path / "README.md").read_bytes()
    reporting.update_model_card(without, METRICS, "high", tmp_path)
    assert card == (tmp_path / "README.md").read_bytes() and b"VAE" not in card
    # One floor in all needs no column that says whose it is.
    report["floors"] = [make_floor("VAE floor", ["base", "low", "high"], 3.5)]
    assert tables(report)["Pipelines"] == plain["Pipelines"]


# Plots


def lines_of(figure):
    """{title of the subplot: [(x, y) of each line]}."""
    return {
        axis.get_title(): [tuple(map(tuple, line.get_data())) for line in axis.get_lines()] for axis in figure.axes
    }


def test_guidance_and_steps_plots(tmp_path, write):
    settings = [("ddim", 50, 7.0), ("ddim", 50, 1.0), ("ddim", 20, 7.0), ("euler", 30, 7.0)]
    report = make_report([pipeline("a$\\x{$"), pipeline("b"), pipeline("c@2", run="c", iteration=2)], settings)
    sweeps = {sweep.name: sweep for sweep in reporting.find_sweeps(report)}
    assert list(sweeps) == ["guidance-ddim-50", "steps-ddim-guidance-7"]
    figure = reporting.draw_sweep(sweeps["guidance-ddim-50"], METRICS)
    lines = lines_of(figure)
    assert list(lines) == ["fdd ↓", "recall ↑", "clip ↑", "sharpness"]
    assert lines["fdd ↓"] == [((1.0, 7.0), (10.1, 10.0)), ((1.0, 7.0), (11.1, 11.0))]  # sorted, no checkpoint
    assert [entry.get_text() for entry in figure.legends[0].get_texts()] == ["a$\\x{$", "b"]
    [band, _] = figure.axes[0].collections
    assert {tuple(point) for point in band.get_paths()[0].vertices} == {(1, 9.1), (1, 12.1), (7, 9), (7, 12)}
    assert lines_of(reporting.draw_sweep(sweeps["steps-ddim-guidance-7"], METRICS))["fdd ↓"][0][0] == (20, 50)

    markdown, page, _ = write(report)
    for name in sweeps:
        with Image.open(tmp_path / "plots" / f"{name}.png") as image:
            assert image.width > 1000
        assert f"](plots/{name}.png)" in markdown
    assert page.count('<img class="plot"') == 2
    assert base64.b64encode((tmp_path / "plots" / "guidance-ddim-50.png").read_bytes()).decode() in page


def test_training_option_plot():
    pipelines = [
        pipeline("base"),
        pipeline("high", trained(diffusion_loss_weight=2.0)),
        pipeline("low", trained(diffusion_loss_weight=0.1, output_dir="else")),
        pipeline("drtune", trained(diffusion_loss_weight=1.0, gradient_path="drtune")),
        pipeline("again", trained(diffusion_loss_weight=0.1, seed=1)),
    ]
    [sweep] = reporting.find_sweeps(make_report(pipelines))
    assert sweep.name == "diffusion_loss_weight-ddim-50-guidance-7"
    # Not drtune, which differs in two options, nor the other seed.
    assert list(sweep.lines) == ["low, high"]
    assert lines_of(reporting.draw_sweep(sweep, METRICS))["fdd ↓"] == [((0.1, 2.0), (12, 11))]


def test_iteration_plot():
    pipelines = [
        pipeline("base"),
        pipeline("adt", CONFIG),
        pipeline("adt@500", CONFIG, run="adt", iteration=500),
        pipeline("adt@0", CONFIG, run="adt", iteration=0),
    ]
    report = make_report(pipelines)
    del report["runs"][0]["metrics"]["recall"]
    [sweep] = reporting.find_sweeps(report)
    assert sweep.name == "iteration-ddim-50-guidance-7"
    figure = reporting.draw_sweep(sweep, METRICS)
    line, base, adt = figure.axes[0].get_lines()
    assert tuple(map(tuple, line.get_data())) == ((0, 500), (13, 12))
    assert [(level.get_ydata()[0], level.get_linestyle()) for level in (base, adt)] == [(10, "--"), (11, "--")]
    assert line.get_color() == adt.get_color() != base.get_color()  # the run, and what it ended with
    assert len(figure.axes[1].get_lines()) == 2
    assert [entry.get_text() for entry in figure.legends[0].get_texts()] == ["adt", "base", "adt"]


def test_floors_are_levels_of_the_plots():
    pipelines = [
        pipeline("base"),
        pipeline("low", trained(diffusion_loss_weight=0.1)),
        pipeline("high", trained(diffusion_loss_weight=2.0)),
        pipeline("high@2", run="high", iteration=2),
        pipeline("high@4", run="high", iteration=4),
    ]
    report = make_report(pipelines, [("ddim", 50, 7.0), ("ddim", 50, 1.0), ("ddim", 20, 7.0)])
    report["floors"] = [
        make_floor("base (VAE floor)", ["base"], 3.5),
        make_floor("low (VAE floor)", ["low", "high", "high@2", "high@4"], 99),
    ]
    sweeps = {sweep.name: sweep for sweep in reporting.find_sweeps(report)}
    expected = {
        "guidance-ddim-50": [3.5, 99], "steps-ddim-guidance-7": [3.5, 99], "iteration-ddim-50-guidance-7": [3.5, 99],
        "diffusion_loss_weight-ddim-50-guidance-7": [99],  # the plot does not have base
    }  # fmt: skip
    for name, values in expected.items():
        figure = reporting.draw_sweep(sweeps[name], METRICS)
        lines = figure.axes[0].get_lines()[-len(values) :]
        assert [(set(line.get_ydata()), line.get_linestyle()) for line in lines] == [({y}, "--") for y in values]
        levels = [line for line in figure.axes[0].get_lines() if line.get_linestyle() == "--"]
        assert len(levels) == len(values) + 3 * name.startswith("iteration")
        assert not any(line.get_ydata()[0] in values for line in figure.axes[3].get_lines())  # no sharpness
        names = [entry.get_text() for entry in figure.legends[0].get_texts()]
        assert names[-len(values) :] == ["base (VAE floor)", "low (VAE floor)"][-len(values) :]


def test_no_plots_without_a_sweep(write, tmp_path):
    markdown, page, _ = write(make_report([pipeline("a"), pipeline("b")], [("ddim", 50, 7.0), ("euler", 30, 1.0)]))
    assert "Plots" not in markdown and "<h2>Plots" not in page and not (tmp_path / "plots").exists()


# The model card

CARD = """---
library_name: diffusers
tags:
- text-to-image
license: mit
model-index:
- name: my-model
  results:
  - task:
      type: text-to-image
    dataset:
      name: Other
      type: other/set
    metrics:
    - type: fid
      value: 12.5
---

# my-model

Text — with `---` and
---
a rule.
"""


@pytest.mark.parametrize("folder", [True, False])
def test_model_card(tmp_path, folder):
    (tmp_path / "README.md").write_text(CARD)
    path = tmp_path if folder else tmp_path / "README.md"
    report = make_report([pipeline("a"), pipeline("b")], [("ddim", 50, 7.0), ("ddim", 50, 1.5)])
    reporting.update_model_card(report, METRICS, "b", path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text == CARD.split("\n---", 1)[1].removeprefix("\n")
    assert card.data.to_dict().keys() == {"library_name", "tags", "license", "model-index"}
    assert (card.data.license, card.data.tags, card.data.model_name) == ("mit", ["text-to-image"], "my-model")
    other, *results = card.data.eval_results
    assert (other.dataset_type, other.metric_type, other.metric_value) == ("other/set", "fid", 12.5)
    assert len(results) == 8
    by_name = {result.metric_name: result for result in results}
    fdd = by_name["fdd (ddim, 50 steps, guidance 1.5)"]
    assert (fdd.task_type, fdd.metric_type, fdd.metric_value) == ("text-to-image", "fdd", 11.1)
    assert (fdd.dataset_type, fdd.dataset_split) == ("user/captions", "test")
    assert fdd.metric_args["guidance_scale"] == 1.5 and fdd.metric_args["interval"] == [10.1, 13.1]
    clip = by_name["clip (ddim, 50 steps, guidance 7)"]
    assert (clip.dataset_type, clip.dataset_name, clip.metric_value) == ("hps", "hps (prompts)", 11)
    assert "scores" not in clip.metric_args

    first = (tmp_path / "README.md").read_bytes()
    reporting.update_model_card(report, METRICS, "b", path)
    assert (tmp_path / "README.md").read_bytes() == first
    # Another evaluation on the same data takes the place of this one; one on other data does not.
    reporting.update_model_card(make_report([pipeline("b")]), METRICS, "b", path)
    assert len(ModelCard.load(tmp_path / "README.md").data.eval_results) == 1 + 4
    report["settings"]["dataset_name"] = str(tmp_path)
    reporting.update_model_card(report, METRICS, "b", path)
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert len(results) == 1 + 3 + 8 and {result.dataset_type for result in results} == {
        "other/set", "user/captions", "hps", tmp_path.name
    }  # fmt: skip


def test_model_card_without_metadata_gets_some(tmp_path):
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_text("# Model\n")
    reporting.update_model_card(make_report([pipeline("a")]), METRICS, "a", tmp_path / "card")
    card = ModelCard.load(tmp_path / "card" / "README.md")
    assert card.text == "# Model\n" and card.data.model_name == "card" and len(card.data.eval_results) == 4


def test_model_card_errors(tmp_path):
    report = make_report([pipeline("a")])
    for path in (tmp_path, tmp_path / "README.md"):
        with pytest.raises(reporting.ReportError, match="There is no model card .*README.md"):
            reporting.update_model_card(report, METRICS, "a", path)
    for metadata in ("- a list", "a: [", "model-index:\n- name: a"):
        (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n# Model\n")
        with pytest.raises(reporting.ReportError, match="The metadata of the model card .*README.md cannot be read"):
            reporting.update_model_card(report, METRICS, "a", tmp_path)
    with pytest.raises(reporting.ReportError, match="no pipeline b"):
        reporting.update_model_card(report, METRICS, "b", tmp_path)


# The page


def decode(uri):
    kind, content = re.fullmatch(r"data:image/(\w+);base64,(.*)", uri).groups()
    return kind, Image.open(io.BytesIO(base64.b64decode(content)))


def test_large_images_are_shrunk_and_small_ones_exact():
    noise = Image.fromarray(np.random.default_rng(0).integers(256, size=(128, 100, 3), dtype=np.uint8))
    kind, image = decode(reporting.data_uri(noise))
    assert kind == "png" and image.tobytes() == noise.tobytes()
    kind, image = decode(reporting.data_uri(Image.new("RGB", (1024, 768), "red")))
    assert kind == "jpeg" and image.size == (512, 384) and image.getpixel((9, 9))[0] > 250
    assert decode(reporting.data_uri(Image.new("RGB", (129, 129))))[0] == "jpeg"


PIPELINES = [pipeline("base"), pipeline("tuned", CONFIG), pipeline("tuned@2", run="tuned", iteration=2)]
SETTINGS = [("ddim", 50, 7.0), ("euler", 30, 1.5)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(folder, report) with a gallery of four prompts of each set."""
    folder = tmp_path_factory.mktemp("page")
    report = make_report(PIPELINES, SETTINGS)
    report["floors"] = [make_floor("VAE floor", [entry["name"] for entry in PIPELINES], 3.5)]
    make_images(report, folder)
    reporting.write_report(report, METRICS, PROMPTS, real_image, folder, 4, [])
    return folder, report


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing:
        reason = f"{' and '.join(missing)} not on PATH: the page is not tested in a browser"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    profile = tmp_path_factory.mktemp("profile")
    for option in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--window-size=1200,900", f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver, page):
    """The page opened without votes; at the end there must be neither an error nor a request to any network."""
    folder, _ = page
    for kind in ("browser", "performance"):
        driver.get_log(kind)
    driver.get((folder / "report.html").as_uri())
    driver.execute_script("localStorage.clear()")
    driver.refresh()
    yield driver
    assert driver.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    requests = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    # The browser's own first page is not of interest.
    urls = [request["request"]["url"] for request in requests if request["documentURL"].startswith("file:")]
    assert urls and {url.partition(":")[0] for url in urls} <= {"file", "data", "blob"}


def click(browser, selector):
    browser.find_element(By.CSS_SELECTOR, selector).click()


def press(browser, *keys):
    for key in keys:
        browser.find_element(By.TAG_NAME, "body").send_keys(key)


def choose(browser, name, label):
    Select(browser.find_element(By.ID, name)).select_by_visible_text(label)


def shown(browser, name):
    return browser.find_element(By.ID, name).is_displayed()


def gallery(browser):
    """[(prompt, [(caption, pixels), ...]), ...] as shown."""
    rows = browser.execute_script(
        "return [...document.querySelectorAll('.row')].map(row => [row.querySelector('h3').textContent, "
        "[...row.querySelectorAll('figure')].map(f => [f.textContent, f.querySelector('img').src])])"
    )
    return [(title, [(name, decode(uri)[1].tobytes()) for name, uri in images]) for title, images in rows]


def saved_pixels(folder, name, index, images="ddim-50-guidance-7"):
    with Image.open(folder / "images" / name / images / f"{index:06d}.png") as image:
        return image.tobytes()


def test_gallery_shows_each_prompts_images(browser, page):
    folder, _ = page
    rows = gallery(browser)
    assert [title for title, _ in rows] == [
        "0: a red disc", "1: </script><b>two", "2: (empty prompt)", "3: four discs"
    ]  # fmt: skip
    for index, (_, images) in enumerate(rows):
        assert [name for name, _ in images] == ["real image", "VAE floor", "base", "tuned", "tuned@2"]
        expected = [saved_pixels(folder, "vae_floor", index, "3.5")]
        expected += [saved_pixels(folder, name, index) for name in ("base", "tuned", "tuned@2")]
        assert [pixels for _, pixels in images] == [real_image(index).tobytes(), *expected]
    image = browser.find_element(By.CSS_SELECTOR, ".row img")
    WebDriverWait(browser, 5).until(lambda _: image.get_dom_attribute("class") == "pixelated")
    assert image.size["width"] > 100

    choose(browser, "setting", "euler, 30 steps, guidance 1.5")
    assert gallery(browser)[3][1][3] == ("tuned", saved_pixels(folder, "tuned", 3, "euler-30-guidance-1.5"))
    choose(browser, "set", "quality prompts")
    rows = gallery(browser)
    assert [title for title, _ in rows] == ["0: a lighthouse", "1: an old sailor", "2: rain"]
    expected = saved_pixels(folder, "base", 2, "euler-30-guidance-1.5-quality")
    assert rows[2][1][0] == ("base", expected)  # no real image, and no floor
    # Each image is in the file once: 2 settings, 3 pipelines, 4 + 3 prompts, and 4 real ones with the VAE's.
    text = (folder / "report.html").read_text()
    uris = re.findall(r'"(data:image/png;base64,[^"]+)"', text.split('id="data">')[1])
    assert len(uris) == len(set(uris)) == 2 * 3 * (4 + 3) + 4 + 4


def current_pair(browser, page, images="ddim-50-guidance-7"):
    """(set, index, left, right): what the voter sees, found by its pixels."""
    folder, report = page
    sides = [decode(browser.find_element(By.ID, side).get_property("src"))[1].tobytes() for side in ("left", "right")]
    found = {}
    for file in (folder / "images").rglob("*.png"):
        with Image.open(file) as image:
            if image.tobytes() in sides:
                found[sides.index(image.tobytes())] = file
    left, right = found[0], found[1]
    assert left.name == right.name and left.parent.name == right.parent.name
    kind = "quality" if left.parent.name.endswith("-quality") else "test"
    assert left.parent.name.removesuffix("-quality") == images
    assert browser.find_element(By.ID, "prompt").text == (PROMPTS[kind][int(left.stem)] or "(empty prompt)")
    return kind, int(left.stem), left.parts[-3], right.parts[-3]


def download(browser, folder):
    """The content of `votes.json` as the button saves it."""
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    click(browser, "#save")
    WebDriverWait(browser, 10).until(lambda _: (folder / "votes.json").is_file())
    return folder / "votes.json"


def test_blind_votes_are_saved_and_counted(browser, page, tmp_path):
    _, report = page
    # The first and the last that are not checkpoints.
    chosen = [Select(browser.find_element(By.ID, name)).first_selected_option.text for name in ("first", "second")]
    assert chosen == ["base", "tuned"]
    click(browser, "#start")
    expected, seen = [], []
    choices = ["tie", "left", "skip", "right", "left", "tie", "right"]  # by key and by click in turn
    keys = {"left": Keys.ARROW_LEFT, "right": Keys.ARROW_RIGHT, "tie": Keys.ARROW_DOWN, "skip": "s"}
    for number, choice in enumerate(choices, start=1):
        assert browser.find_element(By.ID, "progress").text == f"{number} of 7"
        kind, index, left, right = current_pair(browser, page)
        seen.append((kind, index))
        if choice != "skip":
            expected.append((kind, index, left, right, choice))
        # No name where the voter could read it: neither in the text nor in what a pointer or a screen reader tells.
        visible = browser.find_element(By.TAG_NAME, "body").text + browser.title
        attributes = browser.execute_script(
            "return [...document.querySelectorAll('#vote *')].flatMap(node => "
            "[...node.attributes].filter(a => a.name !== 'src').map(a => a.value)).join(' ')"
        )
        assert not re.search("base|tuned", visible + attributes), visible
        if number % 2:
            press(browser, keys[choice])
        else:
            click(browser, f"[data-choice={choice}]")
    assert sorted(seen) == sorted([("test", n) for n in range(4)] + [("quality", n) for n in range(3)])
    assert not shown(browser, "vote") and shown(browser, "tally")

    file = download(browser, tmp_path)
    content = json.loads(file.read_text())
    assert content["format"] == "adt-votes/1" and content["report"] == reporting.report_id(report)
    saved = content["votes"]
    assert [tuple(v[key] for key in ("set", "index", "left", "right", "choice")) for v in saved] == expected
    assert all((v["sampler"], v["steps"], v["guidance_scale"]) == SETTINGS[0] for v in saved)
    assert all(v["prompt"] == PROMPTS[v["set"]][v["index"]] for v in saved)

    winners = [{"left": left, "right": right}.get(choice) for *_, left, right, choice in expected]
    wins = winners.count("base")
    [row] = reporting.count_votes([file], report)
    assert (row["first"], row["wins"], row["ties"], row["losses"]) == ("base", wins, 2, 4 - wins)
    cells = [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "#tally td")]
    assert cells == ["base", "tuned", str(wins), "2", str(4 - wins), f"{100 * row['share']:.1f}%"]
    # The skipped pair alone is left.
    click(browser, "#start")
    assert browser.find_element(By.ID, "progress").text == "1 of 1"
    assert current_pair(browser, page)[:2] == seen[2]
    click(browser, "[data-choice=skip]")
    assert browser.find_element(By.ID, "message").text == "6 votes."
    # In another setting these are other images.
    choose(browser, "blind-setting", "euler, 30 steps, guidance 1.5")
    click(browser, "#start")
    assert browser.find_element(By.ID, "progress").text == "1 of 7"


def test_three_are_ranked(browser, page, tmp_path):
    """By key and by click; the file's rankings are what was chosen, the best first."""
    folder, report = page
    choose(browser, "third", "tuned@2")
    click(browser, "#start")
    of = {saved_pixels(folder, name, n, f"ddim-50-guidance-7{kind}"): name for name in ("base", "tuned", "tuned@2")
          for kind, count in (("", 4), ("-quality", 3)) for n in range(count)}  # fmt: skip
    keys, expected = {"left": Keys.ARROW_LEFT, "middle": Keys.ARROW_DOWN, "right": Keys.ARROW_RIGHT}, []
    for number, order in enumerate((("left", "right"), ("middle", "left"), ("right", "middle"))):
        sides = {side: decode(browser.find_element(By.ID, side).get_property("src"))[1].tobytes() for side in keys}
        names = {side: of[pixels] for side, pixels in sides.items()}
        assert set(names.values()) == {"base", "tuned", "tuned@2"} and not shown_tie(browser)
        for question, side in zip(("Which is the best?", "Which is the second best?"), order, strict=True):
            assert browser.find_element(By.ID, "question").text == question
            press(browser, keys[side]) if number % 2 else click(browser, f"[data-choice={side}]")
            press(browser, keys[side]) if side == order[0] else None  # once more, which is not taken for the second
        [last] = keys.keys() - set(order)
        expected.append([names[order[0]], names[order[1]], names[last]])
    press(browser, Keys.ESCAPE)
    file = download(browser, tmp_path)
    assert [vote["ranking"] for vote in json.loads(file.read_text())["votes"]] == expected
    rows = reporting.count_rankings([file], report)
    assert [row["ranks"][0] for row in rows] == [
        sum(ranking[0] == name for ranking in expected) for name in ("base", "tuned", "tuned@2")
    ]
    choose(browser, "third", "nothing")
    click(browser, "#start")
    assert not shown(browser, "middle") and shown_tie(browser) and browser.find_element(By.ID, "question").text == ""


def shown_tie(browser):
    return browser.find_element(By.CSS_SELECTOR, "[data-choice=tie]").is_displayed()


def test_order_and_sides_are_random(browser, page):
    # A generator with a seed in place of the browser's, so that this test gives one result only.
    browser.execute_script("let state = 1; Math.random = () => (state = state * 16807 % 2147483647) / 2147483647")
    firsts, lefts = set(), set()
    for _ in range(6):
        click(browser, "#start")
        kind, index, left, _ = current_pair(browser, page)
        firsts.add((kind, index))
        lefts.add(left)
        press(browser, Keys.ESCAPE)
    assert len(firsts) > 1 and lefts == {"base", "tuned"}


def test_votes_survive_a_reload_and_the_setting_counts(browser, page):
    choose(browser, "first", "tuned@2")
    choose(browser, "second", "base")
    choose(browser, "blind-setting", "euler, 30 steps, guidance 1.5")
    click(browser, "#start")
    press(browser, Keys.ARROW_LEFT, Keys.ARROW_RIGHT)
    before = current_pair(browser, page, "euler-30-guidance-1.5")
    assert set(before[2:]) == {"tuned@2", "base"}
    browser.refresh()
    assert shown(browser, "continue") and not shown(browser, "vote") and not shown(browser, "tally")
    assert browser.find_element(By.ID, "message").text.startswith("2 votes, 5 of 7 prompts to go")
    click(browser, "#continue")
    assert browser.find_element(By.ID, "progress").text == "3 of 7"
    assert current_pair(browser, page, "euler-30-guidance-1.5") == before
    # A key that is held down votes once, and one with Ctrl not at all.
    browser.execute_script(
        "for (const more of [{repeat: true}, {ctrlKey: true}]) "
        "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft', ...more}))"
    )
    assert browser.find_element(By.ID, "progress").text == "3 of 7"
    press(browser, Keys.ESCAPE)
    click(browser, "#forget")
    browser.switch_to.alert.accept()
    assert browser.find_element(By.ID, "message").text == "0 votes."
    browser.refresh()
    assert browser.find_element(By.ID, "message").text == "0 votes." and not shown(browser, "save")


def test_pairs_that_a_smaller_gallery_lacks_are_not_shown(browser, page, tmp_path):
    folder, report = page
    click(browser, "#start")
    press(browser, Keys.ESCAPE)
    shutil.copytree(folder / "images", tmp_path / "images")
    reporting.write_report(copy.deepcopy(report), METRICS, PROMPTS, real_image, tmp_path, 1, [])
    browser.get((tmp_path / "report.html").as_uri())
    assert browser.find_element(By.ID, "message").text.startswith("0 votes, 2 of 7 prompts to go")
    click(browser, "#continue")
    assert current_pair(browser, page)[1] == 0


def test_a_pair_of_one_is_refused(browser):
    choose(browser, "second", "base")
    click(browser, "#start")
    assert browser.find_element(By.ID, "message").text == "Choose different pipelines."
    assert not shown(browser, "vote")


def test_storage_that_is_refused_is_said(browser, page):
    script = browser.execute_cdp_cmd(
        "Page.addScriptToEvaluateOnNewDocument",
        {"source": "Object.defineProperty(window, 'localStorage', {get() { throw new Error('denied here') }})"},
    )
    browser.refresh()
    notes = browser.find_elements(By.CLASS_NAME, "refused")
    assert "lost when it is reloaded" in notes[0].text and "denied here" in notes[0].text
    click(browser, "#start")
    press(browser, Keys.ARROW_LEFT)
    assert "lost when it is reloaded" in notes[1].text
    assert browser.find_element(By.ID, "progress").text == "2 of 7"
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_page_fits_a_phone(browser):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    )
    width = "return document.documentElement.scrollWidth"
    assert browser.execute_script(width) == 390
    click(browser, "#start")
    assert browser.execute_script(width) == 390
    bottom = browser.execute_script("return document.querySelector('#pause').getBoundingClientRect().bottom")
    assert bottom < 800
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_report_without_images_has_neither_gallery_nor_votes(driver, tmp_path):
    reporting.write_report(make_report([pipeline("a"), pipeline("b")]), METRICS, {}, None, tmp_path, 0, [])
    driver.get((tmp_path / "report.html").as_uri())
    assert not shown(driver, "gallery") and not shown(driver, "blind")
    assert [link.text for link in driver.find_elements(By.CSS_SELECTOR, "nav a") if link.is_displayed()] == ["Tables"]

"""What `make related` compares; the runs themselves take hours."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from diffusers import DDPMScheduler


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

import reproduce_related
from reproduce_related import ADDS, CONSISTENT, FEW, RUNS, SAMPLING, START, TEACHER

import train_adt_sd15
from evaluate_pipelines import make_scheduler
from related import train_add, train_hybrid, train_lcm, train_robust


ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {script.__name__: script for script in (train_add, train_hybrid, train_lcm, train_robust)}
BASE = ["--pretrained_model_name_or_path", "base", "--dataset_name", "data", "--resolution", "32"]


@pytest.mark.parametrize("comparison", RUNS)
def test_scripts_understand_what_the_runs_say(comparison):
    parsed = {}
    for name, (module, _, settings) in RUNS[comparison].items():
        words = BASE if module is None else ["--family", "sd15", *BASE]
        parsed[name] = vars((SCRIPTS[module] if module else train_adt_sd15).parse_args([*words, *map(str, settings)]))
    if comparison == FEW:  # an ablation changes what it says and nothing else
        for name, own in {
            "ADD, no condition": {"discriminator_condition"}, "ADD, text condition": {"discriminator_condition"},
            "ADD, image condition": {"discriminator_condition"}, "ADD, distillation only": {"adversarial_weight"},
            "ADD, no guidance of the teacher": {"teacher_guidance_scale"}, "ADD, SDS": {"distillation_target"},
            "ADD, NFSD": {"distillation_target"},
        }.items():  # fmt: skip
            assert {key for key, value in parsed[name].items() if value != parsed["ADD"][key]} == own
    assert {args["train_batch_size"] for args in parsed.values()} == {8}


def test_runs_of_one_name_are_one_run():
    runs = {}
    for comparison in RUNS.values():
        for name, run in comparison.items():
            assert runs.setdefault(name, run) == run


def test_every_run_is_sampled_in_steps_that_it_has():
    for comparison, samplings in SAMPLING.items():
        sampled = [name for names, _ in samplings for name in names]
        assert sorted(sampled) == sorted([TEACHER if comparison == FEW else START, *RUNS[comparison]])
    noise_scheduler = DDPMScheduler()
    for names, sampling in SAMPLING[FEW]:
        for word in sampling:
            if str(word).startswith("own:"):
                points = train_add.STUDENT_STEPS if names == ADDS else train_lcm.NUM_POINTS["sd15"]
                sampler = train_add.make_lcm_scheduler(noise_scheduler, points, train_adt_sd15)
                sampler.set_timesteps(int(word.split(":")[1]))
    assert names == CONSISTENT


@pytest.mark.parametrize("num_steps", (1, 2, 4, 8))
def test_teacher_begins_where_its_students_do(num_steps):
    names, sampling = SAMPLING[FEW][0]
    assert names == [TEACHER] and f"ddim:{num_steps}" in sampling
    base = SimpleNamespace(config=DDPMScheduler(timestep_spacing="leading", steps_offset=1).config)
    sampler = make_scheduler("ddim", base, sampling[sampling.index("--timestep_spacing") + 1])
    sampler.set_timesteps(num_steps)
    assert sampler.timesteps[0] == 999


def test_the_changed_line_is_still_there(tmp_path):
    """Of `related/README.md`'s comparison."""
    (tmp_path / "related").mkdir()
    shutil.copy(ROOT / "related" / "train_add.py", tmp_path / "related")
    outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}  # where git would skip other files
    patch = ROOT / "benchmarks" / "image_condition.patch"
    subprocess.run(["git", "apply", str(patch)], cwd=tmp_path, check=True, env=outside)
    assert "~expand(pure_noise" not in (tmp_path / "related" / "train_add.py").read_text()


def test_numbers_and_tables(tmp_path, capsys):
    args = reproduce_related.argparse.Namespace(report=tmp_path / "related.md", num_images=512)
    metrics = dict.fromkeys((*reproduce_related.METRICS, reproduce_related.FOLLOWED), 2.0)
    for seed, value in (("0", 1.0), ("1", 3.0)):
        numbers = reproduce_related.read_numbers(args)
        found = {"ADD": {"4": {seed: metrics | {"fid": value}}}}
        reproduce_related.add_numbers(numbers, "glow", FEW, found, args)
    reproduce_related.write_report(reproduce_related.read_numbers(args), args)
    assert "| ADD | 4 | 0, 1 | 2.00 ± 1.41 | 2.00 ± 0.00 |" in args.report.read_text()
    args.num_images = 100
    with pytest.raises(SystemExit, match="is of 512 images a number"):
        reproduce_related.read_numbers(args)

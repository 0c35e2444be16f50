"""The estimate of `benchmarks/scaling.md`: its arithmetic, and that the page is what the script prints."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402
from scaling import INFINIBAND, NVLINK, Work, collective_seconds, communication_seconds, estimate  # noqa: E402


WORK = Work(
    num_steps=50, network=6e12, encoder=5e12, decoder=1e13, features=1e11, discriminator=2e10,
    parameters=2_500_000_000, discriminator_parameters=7_000_000, num_parts=90,
)  # fmt: skip


def test_collectives(monkeypatch):
    monkeypatch.setattr(scaling, "BUS_UTILISATION", 1.0)
    monkeypatch.setattr(scaling, "HOP_WITHIN", 1.0)
    monkeypatch.setattr(scaling, "HOP_BETWEEN", 10.0)
    assert collective_seconds(1e9, 1) == (0, 0)
    assert collective_seconds(NVLINK, 8, count=2) == (pytest.approx(7 / 8), 14)
    # Four machines' links side by side; a ring of 32 crosses between machines four times, a tree's way twice.
    assert collective_seconds(8 * INFINIBAND, 32) == (pytest.approx(31 / 32), 27 + 4 * 10)
    assert collective_seconds(8 * INFINIBAND, 32, tree=True)[1] == 3 + 2 * 10


def test_estimate_follows_what_it_counts():
    alone = estimate(WORK, 1, 8, False)
    assert alone["best"] == alone["worst"] == pytest.approx(8 * sum(scaling.compute_seconds(WORK).values()))
    assert alone["efficiency"] == (1, 1) and alone["gigabytes"] == pytest.approx(16 * 2.5)
    found = [estimate(WORK, cards, 1, True) for cards in (8, 64, 512)]
    assert found[0]["gigabytes"] == pytest.approx((12 / 8 + 2) * 2.5)
    for fewer, more in zip(found, found[1:]):
        assert fewer["efficiency"] > more["efficiency"] and fewer["gigabytes"] > more["gigabytes"]
    # Seven passes gather twice and reduce once in every fifth iteration, data parallelism reduces and gathers once.
    sharded, parallel = (scaling.exchanges(WORK, sharded)["generator"] for sharded in (True, False))
    assert sharded == (7 * 2 * 2 * 2.5e9 / 5, 7 * 4 * 2.5e9 / 5) and parallel == (4 * 2.5e9 / 5, 4 * 2.5e9 / 5)
    coarse = communication_seconds(replace(WORK, num_parts=9), 512, True)["rollout"]
    fine = communication_seconds(WORK, 512, True)["rollout"]
    assert coarse[0] == fine[0] and 10 * coarse[1] == pytest.approx(fine[1])


@pytest.mark.long
def test_page_is_what_the_script_prints():
    printed = subprocess.run([sys.executable, scaling.__file__], capture_output=True, text=True, check=True).stdout
    assert printed == (ROOT / "benchmarks" / "scaling.md").read_text()

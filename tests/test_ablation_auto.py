"""benchmarks/ablation_auto.py on a tiny pipeline: variants, their costs, and that it resumes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from test_pareto import FIELDS
from test_tail import make_search
from tiny import tiny_folder

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "samples")]

import ablation_auto  # noqa: E402

from dit_sparse import AdaSpa, Auto, VideoGrid  # noqa: E402

TESTED = ("auto", "without residual", "2 searches")


def arguments(out, *variants):
    small = "--prompts 1 --seeds 1 --tuning-prompts 1 --steps 8 --height 256 --width 256"
    small += " --frames 5 --target balanced"
    chosen = [part for name in variants for part in ("--variant", name)]
    return ["--pipeline", str(tiny_folder()), "--out", str(out), *small.split(), *chosen]


def test_variants_cost_what_auto_costs_and_a_second_run_adds_one(tmp_path):
    out = tmp_path / "ablation.json"
    ablation_auto.main(arguments(out, *TESTED[:2]))
    first = json.loads(out.read_text())
    assert [r["method"] for r in first["records"]] == list(TESTED[:2])
    auto, without = first["records"]
    assert FIELDS <= set(auto) and auto["budgets"] == ["balanced"]
    assert without["effective_cost"] == pytest.approx(auto["effective_cost"], abs=0.05)
    assert without["density"] > auto["density"]
    assert [p["minus"] for p in first["paired"]] == ["auto"]
    ablation_auto.main(arguments(out, *TESTED))
    second = json.loads(out.read_text())
    assert second["records"][:2] == first["records"]
    assert {r["method"] for r in second["records"]} <= set(TESTED)


def test_variants_are_what_they_are_called():
    found = dict(ablation_auto.variants(Auto(density=0.3)))
    assert {config.density for config in found.values()} == {0.3}
    assert len(set(found.values())) == len(found)
    assert not found["without tail"].tail and found["without both"].residual is None
    assert found["even searches"].search_at == pytest.approx((0.12, 0.34, 0.56, 0.78))
    assert found["2 searches"].search_at == pytest.approx((0.12, 0.431), abs=1e-3)
    search = make_search(VideoGrid(5, 8, 16))
    exact = found["masks of AdaSpa"].find(search)
    assert exact.mask.equal(AdaSpa(density=0.3).find(search).mask) and exact.cost == 0.5
    shares = torch.einsum("bihd,bjhd->bhij", search.query, search.key).mul(16**-0.5).softmax(-1)
    mass = shares.unflatten(2, (-1, 64)).sum(3).unflatten(3, (-1, 64)).sum(-1)
    torch.testing.assert_close(found["exact masks"].score(search)[0], mass, rtol=1e-4, atol=1e-4)


def test_a_variant_without_tail_adds_all_that_is_missing():
    config = ablation_auto.WithoutTail()
    dense, sparse = torch.randn(2, 1, 40, 2, 16)
    lse = torch.rand(2, 1, 2, 40)
    correction = config.correction(dense, lse[0] + 1, sparse, lse[1])
    found = config.corrected(sparse, correction, 0)
    assert (found - dense).norm() < 0.03 * dense.norm()


class Made:
    """A runner whose costs are known."""

    call = {"num_inference_steps": 25}

    def tune(self, config):
        return {"effective_cost": config.planned_cost(25, config.density, 1.0)}


def test_a_density_is_found_for_a_cost_or_none():
    config = ablation_auto.at_cost(Made(), Auto(density=0.1), 0.6)
    assert config.planned_cost(25, config.density, 1.0) == pytest.approx(0.6, abs=0.01)
    assert ablation_auto.at_cost(Made(), Auto(density=0.1), 0.2) is None

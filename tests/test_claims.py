"""benchmarks/claims.py: every claim runs, and its rows are what they are called."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_folder

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "samples")]

import claims  # noqa: E402

from dit_sparse.grid import VideoGrid  # noqa: E402
from dit_sparse.patterns.search import Search  # noqa: E402


def test_the_best_of_the_map_are_as_many_and_heavier():
    mass = torch.rand(1, 2, 20, 20) ** 4
    forced = torch.zeros(20, 20, dtype=torch.bool)
    density = torch.full((1, 2), 0.2)
    config = claims.OfTheMap(head_adaptive=False)
    of_map = claims.OfTheMap._select(config, mass, density, forced)
    of_rows = claims.AdaSpa._select(config, mass, density, forced)
    assert of_map.sum() == of_rows.sum() == 2 * 80
    assert mass[of_map].sum() > mass[of_rows].sum() and of_map.any(-1).all()


def test_the_map_is_not_searched_by_the_kernel_that_packs_rows(monkeypatch):
    monkeypatch.setattr("dit_sparse.patterns.adaspa.packs", lambda mass: True)
    monkeypatch.setattr(claims.AdaSpa, "find_packed", lambda *given: pytest.fail("rows"))
    grid = VideoGrid(4, 8, 8)
    query, key = torch.randn(2, 1, grid.tokens, 2, 8)
    search = Search(query, key, torch.zeros(1, 2, grid.tokens), grid, 0)
    config = claims.OfTheMap(density=0.5, block_size=32, head_adaptive=False)
    assert config.find(search).mask.sum() == 2 * 32


def test_what_is_corrected_by_what():
    dense, sparse = torch.randn(2, 1, 40, 2, 8)
    dense_lse = torch.randn(1, 2, 40) + 3
    given = dense, dense_lse, sparse, dense_lse - 0.5
    found = {}
    for cls in (claims.Nothing, claims.RhoAlone, claims.ResidualAlone, claims.Rettention):
        config = cls(clamp=False)
        found[cls] = config.corrected(sparse, config.correction(*given), 0)
    assert found[claims.Nothing].equal(sparse)
    torch.testing.assert_close(found[claims.RhoAlone], sparse * torch.tensor(-0.5).exp())
    for cls in (claims.ResidualAlone, claims.Rettention):  # at the step of the refresh
        torch.testing.assert_close(found[cls], dense)


@pytest.mark.parametrize(
    ("claim", "names"),
    [
        ("reuse", ["1 searches", "2 searches", "4 searches", "every step"]),
        ("rows", ["of every row", "of the map"]),
        ("residual", ["nothing", "rho", "residual"]),
        ("table", ["other prompts", "the same prompts"]),
    ],
)
def test_rows_of_a_claim_and_their_differences(tmp_path, claim, names):
    out = tmp_path / "new" / "claims.json"
    small = "--prompts 1 --seeds 1 --steps 6 --dtype float32".split()
    claims.main(["--pipeline", str(tiny_folder()), "--out", str(out), "--claim", claim, *small])
    stored = json.loads(out.read_text())
    found = stored["claims"][claim]
    assert [row["name"] for row in found["rows"]][: len(names)] == names
    first, second = found["rows"][:2]
    apart = found["paired"][f"{names[1]} minus {names[0]}"]["psnr"]
    assert apart == pytest.approx(second["psnr"] - first["psnr"], abs=1e-6)
    assert all(0 < row["effective_cost"] < 2 for row in found["rows"])

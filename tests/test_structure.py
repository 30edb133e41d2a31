"""benchmarks/structure.py on random queries: no choice keeps more than the exact one."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dit_sparse.dense import dense_attention_with_lse
from dit_sparse.grid import VideoGrid

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "samples")]

import structure  # noqa: E402


@pytest.fixture
def rows():
    call = SimpleNamespace(grid=VideoGrid(4, 8, 16), step=0, branch="cond")
    found = structure.Found(prompts=1)

    def dense(query, key, value, kv_len):
        return dense_attention_with_lse(query, key, value)[0]

    probe = structure.Probe(SimpleNamespace(call=call), 0, dense, 10, found)
    generator = torch.Generator().manual_seed(0)
    for call.step in range(2, 8):
        q, k, v = torch.randn(3, 1, 512, 2, 32, generator=generator).mul(2).unbind(0)
        probe(q, k, v, None)
    return found.rows


def test_no_choice_beats_the_exact_one(rows):
    assert [row["step"] for row in rows] == [2, 7]
    layer = structure.summary(rows)["layers"][0]
    for name in ("pooled", "pooled_raster", "sampled", "window"):
        assert min(layer[f"{name}_misses"]) >= 0, name
    for name, of in layer["misses_by_density"].items():
        of_all = layer["early_misses_at_the_end" if name == "early" else f"{name}_misses"]
        assert of[structure.DENSITY] == of_all and min(map(min, of.values())) >= 0, name
    assert layer["early_misses_by_step"][2] == [0, 0]
    assert min(layer["early_misses_by_step"][7]) > 0
    exact = structure.mean(layer["exact"][density] for density in structure.DENSITIES)
    assert 0.2 < min(exact) < 1


def test_the_mask_holds_the_best_blocks_of_each_row():
    mask = structure.best_blocks(torch.tensor([[[[5.0, 1, 2, 3, 4]] * 5]]), 0.4)
    assert mask[0, 0, 0].tolist() == [True, False, False, False, True]

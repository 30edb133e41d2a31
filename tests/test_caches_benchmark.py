"""benchmarks/caches.py on a tiny pipeline."""

import json
import sys
from pathlib import Path

import pytest
from composed import not_in_0_36
from tiny import tiny_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import caches  # noqa: E402


@not_in_0_36
def test_what_a_cache_and_a_method_have_alone_is_beside_what_both_have(tmp_path):
    out = tmp_path / "caches.json"
    small = "--prompts 1 --seeds 1 --tuning-prompts 1 --steps 5 --thresholds 1e9"
    given = ["--pipeline", str(tiny_folder()), "--out", str(out), *small.split()]
    caches.main([*given, "--method", "adaspa:density=0.4,block_size=32"])
    records = json.loads(out.read_text())["records"]
    found = {(r["method"][:6], r["cache"]): r for r in records}
    assert len(found) == len(records) == 6
    dense, first = found["dense", None], found["dense", "FirstBlockCache"]
    assert dense["effective_cost"] == dense["speedup"] == 1
    assert first["effective_cost"] == pytest.approx((5 + 1) / (5 * 2))  # the second layer at step 0
    ratios = found["adaspa", "MagCache"]["cache_options"]["mag_ratios"]
    assert len(ratios) == 5
    alone = found["adaspa", None]["effective_cost"]
    both = found["adaspa", "FirstBlockCache"]
    assert both["effective_cost"] < first["effective_cost"]
    assert both["product"]["effective_cost"] == pytest.approx(alone * first["effective_cost"])
    assert dense["psnr"] == 100 > both["psnr"]
    caches.main([*given, "--method", "adaspa:density=0.4,block_size=32", "--height", "96"])
    again = json.loads(out.read_text())["records"]
    assert again[:6] == records and {r["size"] for r in again[6:]} == {"64x96x9"}

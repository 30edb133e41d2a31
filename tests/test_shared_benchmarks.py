"""benchmarks/pareto.py and quality.py, shared by two processes."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from test_pareto import arguments
from tiny import CALL, save_tiny_wan, tiny_folder
from two_processes import as_launched, on_two

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "samples")]

import pareto  # noqa: E402
import quality  # noqa: E402

METHODS = "adaspa", "window", "random", "dfsattn"


def found_by(rank, out, dies=False):
    """The methods that this process ran; the second is killed at its second."""
    as_launched(rank)
    real, ran = pareto.run_method, []

    def run_method(runner, method, *args):
        if dies and rank == 1 and ran:
            os.kill(os.getpid(), signal.SIGKILL)
        ran.append(method)
        return real(runner, method, *args)

    pareto.run_method = run_method
    pareto.main(arguments(out, *METHODS))
    return ran


@pytest.mark.slow
def test_two_processes_share_the_methods_and_keep_what_a_killed_one_found(tmp_path):
    out = tmp_path / "pareto.json"
    tiny_folder()  # made before the processes are, for both to have the same
    with pytest.raises(Exception, match="SIGKILL"):
        on_two(tmp_path, found_by, out, True)
    left = [json.loads(path.read_text()) for path in tmp_path.glob("pareto-process-*.json")]
    before = [record for part in left for record in part["records"]]
    assert "random" in {record["method"] for record in before}
    first, second = on_two(tmp_path, found_by, out)
    result = json.loads(out.read_text())
    assert all(record in result["records"] for record in before)
    done = {record["method"] for record in before}
    assert sorted([*first, *second, *done]) == sorted(METHODS)
    assert {record["method"] for record in result["records"]} == set(METHODS)
    assert "chance" in next(iter(result["lines"].values())) and result["environment"]
    assert {path.name for path in tmp_path.glob("*.json")} == {"pareto.json"}


def scored(rank, *options):
    as_launched(rank)
    quality.main(list(options))


@pytest.mark.slow
def test_two_processes_share_the_prompts_and_give_the_rows_of_one(tmp_path):
    larger = {"call": CALL | {"height": 128, "width": 128}}  # three blocks of 64 tokens
    folder = save_tiny_wan(tmp_path / "tiny")
    (folder / "dit_sparse.json").write_text(json.dumps(larger))
    small = f"--pipeline {folder} --prompts 2 --seeds 1 --steps 5 --measure".split()
    quality.main([*small, "--out", str(tmp_path / "one.json")])
    on_two(tmp_path, scored, *small, "--out", str(tmp_path / "two.json"))
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["prompts"] == two["prompts"] and len(two["prompts"]) == 2
    for alone, shared in zip(one["rows"], two["rows"], strict=True):
        assert alone["name"] == shared["name"] and alone.get("config") == shared.get("config")
        if alone["name"] == "random":  # a mask is that of the place in a batch
            continue
        for figure in set(alone) & {"ssim", "effective_cost", "density", "kept_mass"}:
            assert shared[figure] == pytest.approx(alone[figure], rel=1e-3)
        psnr = [[min(value, 80) for value in row["psnr_per_clip"]] for row in (shared, alone)]
        assert psnr[0] == pytest.approx(psnr[1], abs=0.05)  # above is rounding

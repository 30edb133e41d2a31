"""benchmarks/kernels.py without a GPU: nothing that fails, hangs or is killed loses the rest."""

import json
import runpy
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks")]

from kernel_cases import CASES  # noqa: E402

# Not as "kernels": transformers looks for a package of that name.
spec = spec_from_file_location("kernels_benchmark", ROOT / "benchmarks" / "kernels.py")
kernels = module_from_spec(spec)
spec.loader.exec_module(kernels)

FACTS = {"commit": "abc"}


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(kernels, "measure", lambda call: {"ms": 2.0} if call() is None else {})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def bench(path, seconds=60.0, engines=(), **options):
    return kernels.Bench(path / "out.json", seconds, list(engines), FACTS, **options)


def written(path):
    return json.loads((path / "out.json").read_text())


def fails():
    raise RuntimeError("no such\nkernel image")


def test_every_record_is_in_the_file_at_once_and_an_error_is_one(tmp_path):
    first = bench(tmp_path)
    first.add("wan", "fa4", fails, density=0.2)
    first.add("wan", "triton", lambda: None, flops=4e9, density=0.2)
    error, timed = written(tmp_path)["records"]
    assert error["error"] == "RuntimeError: no such kernel image"
    assert timed["ms"] == 2.0 and timed["tflops"] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert "running" not in written(tmp_path)


def test_what_is_done_is_not_measured_again_unless_it_failed_and_is_retried(tmp_path):
    first = bench(tmp_path)
    first.add("wan", "fa4", fails)
    first.add("wan", "triton", lambda: None)
    first.finish(["task"])
    bench(tmp_path).add("wan", "fa4", lambda: None)
    assert "error" in written(tmp_path)["records"][0]
    again = bench(tmp_path, retry=True)
    assert again.finished == [] and [r["engine"] for r in again.records] == ["triton"]
    again.add("wan", "fa4", lambda: None)
    again.add("wan", "triton", fails)
    assert ["error" in record for record in written(tmp_path)["records"]] == [False, False]


def test_a_killed_process_leaves_a_whole_file_and_the_next_goes_past_what_hung(tmp_path):
    code = f"""
import os, sys
sys.path[:0] = [{str(ROOT / "benchmarks")!r}]
import kernels
from pathlib import Path
bench = kernels.Bench(Path({str(tmp_path / "out.json")!r}), 60, [], {FACTS!r})
bench.keep({{"shape": "wan", "engine": "triton"}}, ms=1.0)
kernels.measure = lambda call: os._exit(9)
with bench.attempt({{"shape": "wan", "engine": "mask"}}):
    bench.add("wan", "gluon", None, density=0.2)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    second = bench(tmp_path)
    assert [record["engine"] for record in second.records] == ["triton", "gluon"]
    assert second.records[1]["error"] == "the process ended in it"
    second.add("wan", "gluon", fails, density=0.2)
    assert len(second.records) == 2  # not tried again


def test_a_lost_gpu_ends_the_process_and_blames_one_variant(tmp_path, monkeypatch):
    first = bench(tmp_path)
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    with pytest.raises(SystemExit, match="the GPU is lost"):
        with first.attempt({"shape": "wan", "engine": "mask"}):
            first.add("wan", "triton", fails)
            first.finish(["task"])
    assert [record["engine"] for record in written(tmp_path)["records"]] == ["triton"]
    assert written(tmp_path)["finished"] == [] and "running" not in written(tmp_path)


def test_no_measurement_begins_late(tmp_path):
    late = bench(tmp_path, seconds=-1.0)
    late.add("wan", "triton", fails)
    late.add("wan", "sdpa", fails, again=True, density=1.0)
    late.finish(["task"])
    assert late.records == late.finished == [] and not late.complete


def test_a_wrong_case_costs_ours_its_time_and_no_other_case(tmp_path, monkeypatch):
    import kernel_cases

    def check(case, device, tile=None):
        assert case is not CASES[1], "far off"
        return {"out": 0.0}

    for name in ("check_attention", "check_mass", "check_sampled", "check_pool", "check_8_bits"):
        monkeypatch.setattr(kernel_cases, name, check)
    for name in ("check_top_k", "check_selection"):
        monkeypatch.setattr(kernel_cases, name, lambda *_, **__: {"wrong": 0})
    one = bench(tmp_path)
    kernels.check_cases(one)
    assert kernels.wrong_cases(one, "case") == [CASES[1].name]
    assert len([r for r in one.records if r["shape"] == "case"]) == len(CASES)
    options = type("Options", (), {"skip_search": False, "shape": ["none"]})
    kernels.time_all(one, options)
    assert one.engines == ["fa4", "flex"]


def test_variants_of_a_mask_on_the_interpreter(tmp_path, monkeypatch):
    shape = kernels.Shape("tiny", 1, 130, 64)
    monkeypatch.setattr(kernels, "make_mask", lambda *_: torch.ones(1, 1, 3, 3, dtype=torch.bool))
    monkeypatch.setattr(kernels, "measure", lambda call: {"ms": 1.0, "tensors": len(call())})
    q, k, v = torch.randn(3, 1, 130, 1, 64, dtype=torch.float16)
    one = bench(tmp_path)
    kernels.mask_rows(one, shape, q, k, v, (64, 64), "real", 0.5, sweep=True)
    found = {record["engine"]: record for record in one.records}
    assert list(found)[:8] == [
        "lists", "order", "triton", "triton int8", "triton fp8", "quantize int8", "quantize fp8",
        "triton unordered",
    ]  # fmt: skip
    for engine, limit in (("triton int8", 0.02), ("triton fp8", 0.07)):
        assert 0 < found[engine]["relative_error"] < limit
        assert found[engine]["lse_error"] < 2 * limit
    assert "ms" in found["triton"] and found["triton"]["tile"][4] is False
    assert "ms" in found["triton (64, 32, 4, 4)"]
    *_, gluon, fp8 = found
    assert gluon == "triton (64, 64, 4, 2, gluon)" and "error" in found[gluon]
    assert fp8.endswith(" fp8") and found[fp8]["relative_error"] < 0.07


def test_help_names_the_options():
    command = [sys.executable, "benchmarks/kernels.py", "--help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = "out seconds shape mask density sweep skip-cases skip-search gluon-cases fa4 retry"
    assert all(f"--{name} " in text for name in wanted.split())


def test_tiles_of_a_search_are_swept_on_the_interpreter(tmp_path, monkeypatch):
    from dit_sparse.kernels import block_mass
    from dit_sparse.kernels.tiles import Tile

    ran = []
    monkeypatch.setattr(kernels, "measure", lambda call: {"ms": 1.0, "sum": float(call().sum())})
    monkeypatch.setattr(
        block_mass, "launch", lambda key, tile, run, instead: (ran.append(tile), run(tile))
    )
    q, lse = torch.randn(1, 130, 1, 64, dtype=torch.float16), torch.zeros(1, 1, 130)
    one, shape = bench(tmp_path), kernels.Shape("tiny", 1, 130, 64)
    call = kernels.partial(block_mass.block_mass, q, q, lse, block_size=(64, 64))
    tile = Tile(64, 32, 4, 3)
    kernels.with_tiles(one, shape, "block_mass", block_mass, [tile], call, 1.0, block=[64, 64])
    default, swept = one.records
    assert swept["engine"] == "block_mass (64, 32, 4, 3)" and ran[1] == tile != ran[0]
    assert swept["sum"] == pytest.approx(default["sum"], rel=1e-5)


def test_help_of_the_masks_records_none(monkeypatch):
    """They are a file of the repository."""
    monkeypatch.setattr("dit_sparse.loading.load_pipeline", None)
    monkeypatch.setattr(sys, "argv", ["masks.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "benchmarks" / "masks.py"), run_name="__main__")

"""benchmarks/ulysses.py at tiny shapes on two processes, and its model of more GPUs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_processes import on_two

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import ulysses as benchmark  # noqa: E402

KINDS = {"dense", "warm-up", "search", "first reuse", "reuse", "search again"}


def run(rank, out):
    benchmark.main(["--smoke", "--repeats", "1", "--density", "0.4", "--out", str(out)])


def check(result):
    assert set(result["kinds"]) == KINDS and result["gpus"] == 2
    assert set(result["difference_to_one_gpu"]) == {"dense", "search", "reuse", "search again"}
    rounding = 2e-2 if result["environment"]["gpu"] else 1e-5  # bfloat16, float32
    assert max(result["difference_to_one_gpu"].values()) < rounding
    for gpus in (1, 2):
        rows = result[f"on_{gpus}"]["rows"]
        assert {row["kind"] for row in rows} == KINDS
        for row in rows:
            assert (row["exchange_s"] > 0) == (gpus == 2) and row["attention_s"] > 0
            assert (row["search_s"] > 0) == row["kind"].startswith("search")
    first = result["schedules"][0]
    assert set(first["seconds_50"]) == {"1", "2"}
    table = {row["what"]: row["seconds"] for row in result["expected"]}
    assert table.pop("dense")["1"] == pytest.approx(first["dense_seconds_50"]["1"])
    for schedule, seconds in zip(result["schedules"], table.values(), strict=True):
        assert list(seconds) == ["1", "2", "4", "8"] and min(seconds.values()) > 0
        for gpus in ("1", "2"):
            assert seconds[gpus] == pytest.approx(schedule["seconds_50"][gpus])
    ratio = first["seconds_50"]["1"] / first["seconds_50"]["2"]
    assert first["speedup_by_gpus"] == pytest.approx(ratio)
    assert result["environment"]["commit"]


def test_two_processes_equal_one_and_every_row_is_there(tmp_path, capsys):
    on_two(tmp_path, run, tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    check(result)
    benchmark.main(["--expect", str(tmp_path / "out.json")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + len(result["schedules"]) and lines[2].startswith("| dense | 1.00 |")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one GPU for two processes")
def test_by_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    options = ["--smoke", "--density", "0.4", "--repeats", "1", "--out", str(tmp_path / "x.json")]
    script = str(BENCHMARKS / "ulysses.py")
    subprocess.run([*command, script, *options], check=True, timeout=300)
    check(json.loads((tmp_path / "x.json").read_text()))


def test_the_model_of_more_gpus_gives_back_what_it_was_fitted_to():
    one = {"kind": "dense", "attention_s": 8.0, "rest_s": 3.0, "unpack_s": 0.0, "exchange_s": 0.0}
    two = one | {"attention_s": 4.0, "rest_s": 2.0, "exchange_s": 0.5}
    assert benchmark.predicted_row(one, two, 2) == {
        "attention_s": 4.0,
        "rest_s": 2.0,
        "exchange_s": 0.5,
    }
    four = benchmark.predicted_row(one, two, 4)
    assert four == {"attention_s": 2.0, "rest_s": 1.5, "exchange_s": 0.5 * 3 / 4}
    rows = {"on_1": {"rows": [one | {"seconds": 11.0}]}, "on_2": {"rows": [two | {"seconds": 6.5}]}}
    (dense,) = benchmark.expected(rows | {"schedules": []})
    assert dense["seconds"][2] == 50 * 6.5 and dense["seconds"][4] == pytest.approx(50 * 3.875)
    slower = two | {"rest_s": 3.5}  # nothing of it is shared
    assert benchmark.predicted_row(one, slower, 8)["rest_s"] == 3.0

"""benchmarks/trials.py on a tiny pipeline."""

import json
import sys
from pathlib import Path

import pytest
from tiny import tiny_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import trials  # noqa: E402

SPARSE, AUTO = "adaspa:density=0.4,block_size=32", "auto:density=0.4,block_size=32"


def test_trials_of_tuning_prompts_go_on_where_they_stopped(tmp_path):
    out, listed = tmp_path / "trials.json", tmp_path / "methods.txt"
    given = f"--pipeline {tiny_folder()} --out {out} --prompts 1 --steps 3".split()
    trials.main([*given, "--method", SPARSE])
    before = json.loads(out.read_text())
    listed.write_text(f"{SPARSE}\n{AUTO}\n")
    trials.main([*given, "--methods", str(listed)])
    found = json.loads(out.read_text())
    assert found["records"][0] == before["records"][0]
    assert [record["method"] for record in found["records"]] == [SPARSE, AUTO]
    assert all(0 < r["effective_cost"] < 1.5 and r["psnr"] > 0 for r in found["records"])
    assert found["settings"]["prompt_seed"] == trials.TUNING_SEED
    trials.main([*given, "--method", SPARSE, "--height", "96"])
    sizes = [record["size"] for record in json.loads(out.read_text())["records"]]
    assert sizes == ["64x64x9", "64x64x9", "64x96x9"]


def test_trials_need_a_method(tmp_path):
    with pytest.raises(SystemExit):
        trials.parse(["--out", str(tmp_path / "trials.json")])

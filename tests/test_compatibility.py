"""The tables of docs/compatibility.md, the tests that they speak of, and the log of a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import compatibility
import gpu_log
import pytest
from compatibility import PAGE, Cells, documented_cells, run_pytest
from gpu_log import read_log, run_on_gpu


def test_every_cell_of_the_page_has_a_test_and_what_ran_on_a_gpu_is_what_its_log_says(capsys):
    cells = run_pytest("--collect-only", "-q")
    capsys.readouterr()
    page = PAGE.read_text()
    documented = documented_cells(page)
    assert documented and not documented - set(cells.outcomes)
    assert page.endswith(cells.gpu_part(read_log(compatibility.LOG)))


def test_a_row_without_a_test_is_found():
    page = "| feature | Wan | CogVideoX |\n|---|---|---|\n| magic | passing | not tested |\n"
    assert documented_cells(page) == {("magic", "Wan")}


def test_a_cell_says_the_worst_of_its_tests():
    cells = Cells()
    cells.outcomes = {
        ("a", "Wan"): ["passed", "passed"],
        ("a", "CogVideoX"): ["passed", "failed"],
        ("b", "Wan"): ["passed"],
        ("c", "Wan"): ["skipped"],
    }
    cells.refusals = {"b": "RuntimeError: no"}
    told = [cells.cell(*cell) for cell in cells.outcomes]
    assert told == ["passing", "failing", "refused", "not tested"]
    assert cells.cell("b", "CogVideoX") == "not tested"


def log_of(**outcomes):
    tests = {name: {"outcome": outcome, "reason": "why"} for name, outcome in outcomes.items()}
    return {"runs": [], "tests": tests}


def test_a_cell_of_the_second_table_says_the_worst_of_the_log():
    cells = Cells()
    cells.on_gpu = {"a1": ("a", "Wan"), "a2": ("a", "Wan")}
    told = [
        cells.gpu_cell(log_of(**given), "a", "Wan")
        for given in (
            {"a1": "passed", "a2": "passed"},
            {"a1": "passed", "a2": "failed"},
            {"a1": "passed", "a2": "skipped"},
            {"a1": "passed"},
        )
    ]
    assert told == ["passing", "failing", "not tested: why", "not run"]
    assert cells.gpu_cell(log_of(), "a", "CogVideoX") == "-"


TESTS = """
import pytest

def test_good(): pass

def test_bad(): assert 1 == 2

@pytest.mark.skip(reason="no such GPU")
def test_skipped(): pass

def test_last(): pass
"""


def run_tests(folder, text, *limits):
    """The outcomes by test, and the log."""
    (folder / "test_of_log.py").write_text(text)
    log = run_on_gpu(folder / "log.json", "abc", *limits)
    assert log == json.loads((folder / "log.json").read_text())
    return {name.partition("::")[2]: entry for name, entry in log["tests"].items()}, log


@pytest.fixture(autouse=True)
def tests_of_log(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_log, "FILES", [tmp_path / "test_of_log.py"])
    yield
    sys.modules.pop("test_of_log", None)


def test_the_log_has_each_outcome_and_leaves_out_what_has_passed(tmp_path):
    found, _ = run_tests(tmp_path, TESTS, -1.0, "not last")
    assert {name: entry["outcome"] for name, entry in found.items()} == {
        f"test_{name}": "not run" for name in ("good", "bad", "skipped")
    }
    found, log = run_tests(tmp_path, TESTS, None, None)
    told = {name: (entry["outcome"], entry.get("reason")) for name, entry in found.items()}
    assert told == {
        "test_good": ("passed", None),
        "test_bad": ("failed", "assert 1 == 2"),
        "test_skipped": ("skipped", "no such GPU"),
        "test_last": ("passed", None),
    }
    assert [run["commit"] for run in log["runs"]] == ["abc", "abc"]
    found, _ = run_tests(tmp_path, TESTS, None, None)
    assert [found[f"test_{name}"]["run"] for name in ("good", "bad", "last")] == [1, 2, 1]


def test_a_file_that_cannot_be_imported_is_in_the_log(tmp_path):
    found, _ = run_tests(tmp_path, "import no_such_module", None, None)
    [entry] = found.values()
    assert entry["outcome"] == "failed" and "no_such_module" in entry["reason"]
    found, _ = run_tests(tmp_path, TESTS, None, "good")
    assert [entry["outcome"] for entry in found.values()] == ["passed"]


TOOL = """#!/bin/sh
while [ "$1" != "$PYTHON" ]; do shift; done
echo "========= COMPUTE-SANITIZER"
"$@"
echo "========= ERROR SUMMARY: %s errors"
exit $FAILED
"""


@pytest.mark.parametrize(
    ("errors", "failed", "told"),
    [
        (0, 0, "ERROR SUMMARY: 0 errors"),
        pytest.param(2, 0, "ERROR SUMMARY: 2 errors", marks=pytest.mark.slow),
        pytest.param(0, 3, "ERROR SUMMARY: 0 errors, exit status 3", marks=pytest.mark.slow),
    ],
)
def test_the_last_line_of_the_sanitizer_is_in_the_log(tmp_path, errors, failed, told):
    tool, log = tmp_path / "compute-sanitizer", tmp_path / "log.json"
    tool.write_text(TOOL % errors)
    tool.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("sanitizer.py"), log],
        env=os.environ | {"PATH": path, "PYTHON": sys.executable, "FAILED": str(failed)},
    )
    found = json.loads(log.read_text())["sanitizer"]
    assert (done.returncode, found["last_line"]) == (errors + failed > 0, told)
    assert {"forward 64", "tail", "block lists"} <= set(found["ran"])

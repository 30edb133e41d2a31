"""The table of docs/compatibility.md and the tests that it speaks of."""

import compatibility
from compatibility import Cells, documented_cells, run_pytest


def test_every_tested_cell_of_the_page_has_a_test(capsys):
    cells = run_pytest("--collect-only", "-q")
    capsys.readouterr()
    documented = documented_cells()
    assert documented and not documented - set(cells.outcomes)


def test_a_row_without_a_test_is_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "| feature | Wan | CogVideoX |\n|---|---|---|\n| magic | passing | not tested |\n"
    )
    monkeypatch.setattr(compatibility, "PAGE", page)
    assert documented_cells() == {("magic", "Wan")}


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

"""docs/compatibility.md: what diffusers users do beside sparse attention, by family, from tests.

python tests/compatibility.py    # runs the tests marked `feature`, slow ones too, and writes it
"""

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
FAMILIES = "Wan", "HunyuanVideo", "CogVideoX"
NOT_TESTED = "not tested"
HEAD = """# What it composes with

Features of diffusers beside sparse attention, on tiny random pipelines on a CPU, and what tests
found: `passing`, `refused` with an error that says what to do, or `not tested`.
`python tests/compatibility.py` runs the tests and writes this page. What a feature saves or costs
beside sparse attention is not in it.

"""


class Cells:
    """A pytest plugin: the cells that tests name, and what became of the tests of each."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], list[str]] = {}
        self.refusals: dict[str, str] = {}
        self.of: dict[str, tuple[str, str]] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in items:
            marker = item.get_closest_marker("feature")
            if marker is not None:
                self.of[item.nodeid] = cell = marker.args
                self.outcomes.setdefault(cell, [])
                if "refused" in marker.kwargs:
                    self.refusals[cell[0]] = marker.kwargs["refused"]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.nodeid in self.of and (report.when == "call" or report.outcome != "passed"):
            self.outcomes[self.of[report.nodeid]].append(report.outcome)

    def cell(self, feature: str, family: str) -> str:
        outcomes = self.outcomes.get((feature, family), [])
        if not outcomes or "skipped" in outcomes:
            return NOT_TESTED
        if set(outcomes) != {"passed"}:
            return "failing"
        return "refused" if feature in self.refusals else "passing"

    def page(self) -> str:
        lines = [f"| feature | {' | '.join(FAMILIES)} |", "|---" * (len(FAMILIES) + 1) + "|"]
        for feature in dict.fromkeys(feature for feature, _ in self.outcomes):
            cells = (self.cell(feature, family) for family in FAMILIES)
            lines.append(f"| {feature} | {' | '.join(cells)} |")
        refused = [f"- **{feature}**: `{text}`" for feature, text in self.refusals.items()]
        return HEAD + "\n".join([*lines, "", "Refused:", "", *refused, "", NOTES])


NOTES = """One call a step is a run without guidance, with embedded guidance (HunyuanVideo), or
with both prompts in one batch (CogVideoX). diffusers names no repeated blocks for CogVideoX; each
of its blocks was compiled. FasterCache fails on Wan and HunyuanVideo without sparse attention,
too. CPU offload moves weights to an accelerator: what is tested is that its hooks, with the CPU in
the place of one, change nothing.

What is kept between steps stays on the device of the model; with `cache_device="cpu"` residuals of
`auto` and `rettention` are [in host memory](choosing.md#residuals-in-host-memory). It is
freed at the end of a run and after an error inside the transformer; after an error elsewhere in the
loop, such as in a callback, when the next run begins or at `disable()`. `max_cache_bytes` refuses
more at the first step, and a report gives `peak_cache_bytes`.

With `DIT_SPARSE=0` in the environment `enable_sparse_attention` changes nothing and says so. Two
threads that call one transformer at the same time are both refused.
"""


def documented_cells() -> set[tuple[str, str]]:
    """The cells of the committed page that say that something was tested."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if "|" in line]
    families = rows[0][1:]
    return {
        (row[0], family)
        for row in rows[2:]
        for family, cell in zip(families, row[1:])
        if cell != NOT_TESTED
    }


def run_pytest(*arguments: str) -> Cells:
    cells = Cells()
    files = sorted(str(path) for path in (ROOT / "tests").glob("test_composition*.py"))
    pytest.main([*files, "-q", "-m", "feature", "-p", "no:cacheprovider", *arguments], [cells])
    return cells


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(run_pytest("--timeout=600").page())

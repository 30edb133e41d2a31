"""docs/compatibility.md: what diffusers users do beside sparse attention, by family, from tests.

python tests/compatibility.py    # runs the tests marked `feature`, slow ones too, and writes it
python tests/compatibility.py --gpu benchmarks/results/gpu_tests_h200.json    # on a GPU: the log
python tests/compatibility.py --from-log    # writes the part on a GPU anew from the committed log
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from composed import FAMILIES, MORE_FAMILIES
from gpu_log import NOT_RUN, read_log, run_on_gpu

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
LOG = ROOT / "benchmarks" / "results" / "gpu_tests_h200.json"
NOT_TESTED = "not tested"
HEAD = """# What it composes with

Features of diffusers beside sparse attention, on tiny random pipelines on a CPU, and what tests
found: `passing`, `refused` with an error that says what to do, or `does not occur`.
`python tests/compatibility.py` runs the tests and writes this page. What a feature saves or costs
beside sparse attention is not in it.

"""
GPU_HEAD = """## On a GPU

The same pipelines with heads of 64 in bfloat16, through the Triton kernels; frames are the bits of
those without the feature, or as near as rounding lets them be (`tests/test_composition_gpu.py`)."""


class Cells:
    """A pytest plugin: the cells that tests name, and what became of the tests of each."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], list[str]] = {}
        self.refusals: dict[str, str] = {}
        self.absent: set[tuple[str, str]] = set()
        self.of: dict[str, tuple[str, str]] = {}
        self.on_gpu: dict[str, tuple[str, str]] = {}  # those marked `gpu`, for the second table

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in items:
            marker = item.get_closest_marker("feature")
            if marker is None:
                continue
            if item.get_closest_marker("gpu") is not None:
                self.on_gpu[item.nodeid] = marker.args
                continue
            self.of[item.nodeid] = cell = marker.args
            self.outcomes.setdefault(cell, [])
            if "refused" in marker.kwargs:
                self.refusals[cell[0]] = marker.kwargs["refused"]
            if "absent" in marker.kwargs:
                self.absent.add(cell)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.nodeid in self.of and (report.when == "call" or report.outcome != "passed"):
            self.outcomes[self.of[report.nodeid]].append(report.outcome)

    def cell(self, feature: str, family: str) -> str:
        outcomes = self.outcomes.get((feature, family), [])
        if not outcomes or "skipped" in outcomes:
            return NOT_TESTED
        if set(outcomes) != {"passed"}:
            return "failing"
        if (feature, family) in self.absent:
            return "does not occur"
        return "refused" if feature in self.refusals else "passing"

    def page(self, log: dict[str, Any]) -> str:
        features = dict.fromkeys(feature for feature, _ in self.outcomes)
        refused = [f"- **{feature}**: `{text}`" for feature, text in self.refusals.items()]
        cells = table(features, self.cell, FAMILIES + MORE_FAMILIES)
        parts = [cells, "Refused:", "\n".join(refused), NOTES]
        return HEAD + "\n\n".join([*parts, self.gpu_part(log)])

    def gpu_cell(self, log: dict[str, Any], feature: str, family: str) -> str:
        """The worst that became of the tests of a cell; why, where one was skipped."""
        tests = [test for test, cell in self.on_gpu.items() if cell == (feature, family)]
        told = [log["tests"].get(test, {"outcome": NOT_RUN}) for test in tests]
        for outcome in ("failed", NOT_RUN):
            if any(entry["outcome"] == outcome for entry in told):
                return {"failed": "failing"}.get(outcome, outcome)
        skipped = [entry["reason"] for entry in told if entry["outcome"] == "skipped"]
        if skipped:
            return f"{NOT_TESTED}: {skipped[0]}"
        return "passing" if told else "-"

    def gpu_part(self, log: dict[str, Any]) -> str:
        features = dict.fromkeys(feature for feature, _ in self.on_gpu.values())
        cells = table(features, lambda *cell: self.gpu_cell(log, *cell))
        return "\n\n".join([GPU_HEAD, cells, told_of_runs(log)]) + "\n"


def table(
    features: Iterable[str], cell: Callable[[str, str], str], families: tuple[str, ...] = FAMILIES
) -> str:
    lines = [f"| feature | {' | '.join(families)} |", "|---" * (len(families) + 1) + "|"]
    for feature in features:
        cells = (cell(feature, family) for family in families)
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    return "\n".join(lines)


def told_of_runs(log: dict[str, Any]) -> str:
    """Where the tests of the log ran, how all of them ended, and what the sanitizer found."""
    if not log["runs"]:
        return f"`{LOG.relative_to(ROOT)}` does not exist: none of it ran."
    counts = Counter(entry["outcome"] for entry in log["tests"].values())
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    lines = [f"With the tests of kernels and engines: {told} (`{LOG.relative_to(ROOT)}`)."]
    for run in log["runs"]:
        versions = ", ".join(f"{name} {run[name]}" for name in ("torch", "triton", "diffusers"))
        lines.append(
            f"- {run['date']}, {run['gpus']} x {run['gpu']}, {versions}, commit"
            f" {run['commit'][:7]}: {run['seconds']:.0f} s"
        )
    if "sanitizer" in log:
        lines.append(f"- compute-sanitizer: `{log['sanitizer']['last_line']}`")
    return "\n".join([lines[0], "", *lines[1:]])


NOTES = """One call a step is a run without guidance, with embedded guidance (HunyuanVideo), or
with both prompts in one batch: CogVideoX, LTX-Video and Mochi have no other, so that two calls do
not occur. diffusers names no repeated blocks for CogVideoX and Mochi; each of their blocks was
compiled. FirstBlockCache and MagCache do not know the blocks of HunyuanVideo-1.5 and SkyReels-V2.
FasterCache fails on Wan and HunyuanVideo without sparse attention, too. CPU offload moves weights
to an accelerator: what is tested here is that its hooks, with the CPU in the place of one, change
nothing.

What is kept between steps stays on the device of the model; with `cache_device="cpu"` residuals of
`auto` and `rettention` are [in host memory](choosing.md#residuals-in-host-memory). It is
freed at the end of a run and after an error inside the transformer; after an error elsewhere in the
loop, such as in a callback, when the next run begins or at `disable()`. `max_cache_bytes` refuses
more at the first step, and a report gives `peak_cache_bytes`.

With `DIT_SPARSE=0` in the environment `enable_sparse_attention` changes nothing and says so. It is
read there alone: set later, it does nothing; `disable()` turns sparse attention off then. Two
threads that call one transformer at the same time are both refused."""


def documented_cells(page: str) -> set[tuple[str, str]]:
    """The cells of the first table of a page that say that something was tested."""
    page = page.partition(GPU_HEAD)[0]
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if "|" in line]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from-log", action="store_true", help="only the part on a GPU")
    parser.add_argument("--gpu", type=Path, metavar="LOG", help="run the tests on a GPU instead")
    parser.add_argument("--commit", help="where there is no git")
    parser.add_argument("--seconds", type=float, help="begin no test later than this")
    parser.add_argument("-k", dest="selected", help="as pytest takes it")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if given.gpu:
        log = run_on_gpu(given.gpu, given.commit, given.seconds, given.selected)
        raise SystemExit(any(entry["outcome"] == "failed" for entry in log["tests"].values()))
    if given.from_log:
        part = run_pytest("--collect-only").gpu_part(read_log(LOG))
        PAGE.write_text(PAGE.read_text().partition(GPU_HEAD)[0] + part)
    else:
        PAGE.write_text(run_pytest("--timeout=600").page(read_log(LOG)))


if __name__ == "__main__":
    main()

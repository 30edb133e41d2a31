"""The log of a run on a GPU: what became of each test, written after each, as JSON.

    python tests/compatibility.py --gpu benchmarks/results/gpu_tests_h200.json

Started again it leaves out what has passed, so that runs on several machines share one log.
"""

import json
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from environment import environment, version_of  # noqa: E402
from result_file import write_result  # noqa: E402

FILES = "test_composition_gpu.py", "test_engines.py", "test_kernels.py", "test_host_cache.py"
NOT_RUN = "not run"
PACKAGES = "accelerate", "peft", "transformers", "bitsandbytes", "gguf", "torchao"


def read_log(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {"runs": [], "tests": {}}


def begin_run(log: dict[str, Any], commit: str | None) -> dict[str, Any]:
    """Where the tests that now follow run; its number is the "run" of their outcomes."""
    run = {
        "date": date.today().isoformat(),
        **environment(commit),
        "command": " ".join(Path(argument).name for argument in sys.argv),
        "gpus": torch.cuda.device_count(),
        **{name: version_of(name) for name in PACKAGES},
        "seconds": 0.0,
    }
    log["runs"].append(run)
    return run


class GpuLog:
    """A pytest plugin: runs what has not passed yet, until its time is over.

    Args:
        seconds: no test begins later than this; those left are "not run".
    """

    def __init__(self, file: Path, commit: str | None, seconds: float | None = None):
        self.file, self.log = file, read_log(file)
        self.run = begin_run(self.log, commit)
        self.number = len(self.log["runs"]) - 1
        self.start, self.seconds = time.monotonic(), seconds

    def tell(self, test: str, outcome: str, seconds: float = 0.0, reason: str | None = None):
        entry = {"outcome": outcome, "seconds": round(seconds, 2), "run": self.number}
        self.log["tests"][test] = entry | ({"reason": reason} if reason else {})

    def write(self) -> None:
        self.run["seconds"] = round(time.monotonic() - self.start, 1)
        write_result(self.file, self.log)

    @pytest.hookimpl(trylast=True)  # behind -k and -m
    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        before = {item.nodeid: self.log["tests"].get(item.nodeid) for item in items}
        passed = [i for i in items if (before[i.nodeid] or {}).get("outcome") == "passed"]
        items[:] = [item for item in items if item not in passed]
        config.hook.pytest_deselected(items=passed)
        for item in items:
            if before[item.nodeid] is None:
                self.tell(item.nodeid, NOT_RUN)
        self.write()

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.tell(report.nodeid, "failed", reason=last_line(report))
        else:
            self.log["tests"].pop(report.nodeid, None)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: Any) -> bool | None:
        over = self.seconds is not None and time.monotonic() - self.start > self.seconds
        return True if over else None

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            reason = None if report.passed else last_line(report)
            self.tell(report.nodeid, report.outcome, report.duration, reason)
            self.write()


def last_line(report: Any) -> str:
    """Why a test was skipped, or the first line of the error that it failed with."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    lines = text.strip().splitlines() or ["no reason was given"]
    return lines[0 if crash else -1][:300]


def run_on_gpu(
    file: Path, commit: str | None, seconds: float | None, selected: str | None
) -> dict[str, Any]:
    """Run what of FILES has not passed yet; returns the log."""
    plugin = GpuLog(file, commit, seconds)
    files = [str(ROOT / "tests" / name) for name in FILES]
    options = ["-q", "-rs", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    options += ["-k", selected] if selected else []
    pytest.main([*files, *options], [plugin])
    plugin.write()
    return plugin.log

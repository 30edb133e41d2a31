"""Run the tests with the lowest and with the newest versions that pyproject.toml admits.

    python tests/matrix.py             # or one of them: python tests/matrix.py lowest

Each gets an environment of its own in .venv-matrix/. "lowest" holds every dependency at its lower
bound, torch and Triton apart: their old builds without CUDA are not on the package index, so both
take the torch of constraints-cpu.txt. What ran goes into benchmarks/results/test_matrix.json.
"""

import json
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as xml
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "test_matrix.json"
NOT_LOWERED = ("torch", "triton")
LOG_VERSIONS = """
import json, platform
from importlib.metadata import version
names = "diffusers transformers accelerate torch triton torchmetrics numpy typer".split()
print(json.dumps({"python": platform.python_version()} | {name: version(name) for name in names}))
"""


def lower_bounds() -> list[str]:
    """The dependencies, each pinned to its lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = [re.match(r"([\w-]+)>=([\w.]+)", text) for text in project["dependencies"]]
    return [f"{b[1]}=={b[2]}" for b in bounds if b is not None and b[1] not in NOT_LOWERED]


def make_environment(folder: Path, pins: list[str]) -> Path:
    """A new environment with the tests' packages; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, "-r", "constraints-cpu.txt"], check=True, cwd=ROOT)
    subprocess.run([*pip, "--editable", ".[test]", *pins], check=True, cwd=ROOT)
    return python


def run_tests(python: Path, log: Path) -> dict:
    """Versions and counts of one run."""
    versions = subprocess.run(
        [python, "-c", LOG_VERSIONS], check=True, capture_output=True, text=True
    )
    subprocess.run([python, "-m", "pytest", "-q", "-n", "2", f"--junitxml={log}"], cwd=ROOT)
    suite = xml.parse(log).getroot()[0].attrib
    tests, failures, errors, skipped = (
        int(suite[name]) for name in ("tests", "failures", "errors", "skipped")
    )
    commit = ["git", "describe", "--always", "--dirty"]
    return {
        "date": date.today().isoformat(),
        "commit": subprocess.check_output(commit, text=True, cwd=ROOT).strip(),
        "versions": json.loads(versions.stdout),
        "passed": tests - failures - errors - skipped,
        "failed": failures + errors,
        "skipped": skipped,
        "seconds": round(float(suite["time"])),
    }


def main() -> None:
    sets = {"lowest": lower_bounds(), "newest": []}
    ran = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in sys.argv[1:] or sets:
        folder = ROOT / ".venv-matrix" / name
        python = make_environment(folder, sets[name])
        ran[name] = run_tests(python, folder / "tests.xml")
        print(f"{name}: {json.dumps(ran[name])}")
    # Not earlier: the tests compare README.md with it, and the second run would see a dirty tree.
    RESULTS.write_text(json.dumps(ran, indent=1) + "\n")
    if any(run["failed"] or not run["passed"] for run in ran.values()):
        raise SystemExit("some tests failed")


if __name__ == "__main__":
    main()

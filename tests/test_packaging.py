"""Source archive and wheel: complete, and at work elsewhere, in a clean environment too."""

import json
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from dit_sparse.loading import BOXES

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    # From a copy: setuptools leaves build/ and an egg-info where it works.
    source = tmp_path_factory.mktemp("source") / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "*.egg-info", "demo", "site")
    shutil.copytree(ROOT, source, ignore=ignored)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    return out


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return next(built.glob("*.whl"))  # build makes it from the source archive


def run(*command, timeout=250, **options):
    command = [str(part) for part in command]
    return subprocess.run(command, check=True, timeout=timeout, **options)


def pip(*arguments):
    run(sys.executable, "-m", "pip", "--quiet", *arguments)


def test_source_archive_has_what_tests_and_documentation_need(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = [file for part in ("docs", "tests", "benchmarks") for file in (ROOT / part).glob("*.*")]
    for file in [*files, *(ROOT / name for name in ("CHANGELOG.md", "mkdocs.yml", "Makefile"))]:
        assert file.relative_to(ROOT).as_posix() in names


def test_wheel_carries_modules_and_data_and_no_top_level_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for folder, package in (("kernels", "kernels"), ("pipelines", "pipelines")):
        for module in (ROOT / folder).glob("*.py"):
            assert f"dit_sparse/{package}/{module.name}" in names
    assert "dit_sparse/py.typed" in names
    for part in (ROOT / "dit_sparse" / "page").iterdir():
        assert f"dit_sparse/page/{part.name}" in names
    assert not [name for name in names if name.startswith(("kernels/", "pipelines/"))]
    for box in BOXES:
        for file in (ROOT / "samples" / box).rglob("*"):
            if file.is_file():
                assert f"dit_sparse/{file.relative_to(ROOT).as_posix()}" in names


@pytest.mark.parametrize("place", ["elsewhere", "checkout"])
def test_installed_package_imports(wheel, tmp_path, place):
    target = tmp_path / "site"
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    program = (
        "import importlib, sys; sys.path.insert(0, sys.argv[1]); import dit_sparse; "
        "assert dit_sparse.__file__.startswith(sys.argv[1]), dit_sparse.__file__; "
        "from pathlib import Path; root = Path(sys.argv[2]); "
        "[importlib.import_module(f'dit_sparse.{folder}.{file.stem}') "
        "for folder in ('kernels', 'pipelines') for file in (root / folder).glob('*.py')]; "
        "import dit_sparse.cli; dit_sparse.available_methods()"
    )
    cwd = ROOT if place == "checkout" else tmp_path
    run(sys.executable, "-c", program, target, ROOT, cwd=cwd)


@pytest.mark.timeout(1500)
def test_a_clean_environment_makes_a_first_comparison(wheel, tmp_path):
    """As docs/index.md says, with the torch of constraints-cpu.txt."""
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / "bin"
    torch = ROOT / "constraints-cpu.txt"
    run(binaries / "pip", "install", "--quiet", "-r", torch, wheel, timeout=900)
    told = run(binaries / "dit-sparse", "doctor", "--json", cwd=tmp_path, capture_output=True)
    box = Path(json.loads(told.stdout)["boxed_pipeline"])
    assert box.is_relative_to(tmp_path) and box.is_dir()
    small = "compare --steps 2 --frames 5 --method window --out first --quiet".split()
    run(binaries / "dit-sparse", *small, cwd=tmp_path)
    assert json.loads((tmp_path / "first" / "report.json").read_text())["complete"]
    assert (tmp_path / "first" / "report.html").is_file()

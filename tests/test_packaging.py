"""The wheel: it builds, carries every module and the boxed pipeline, and imports from elsewhere."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dit_sparse.loading import BOXES

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # Built from a copy: setuptools leaves build/ and an egg-info where it works.
    source = tmp_path_factory.mktemp("source") / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "*.egg-info", "demo", "benchmarks")
    shutil.copytree(ROOT, source, ignore=ignored)
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    return next(out.glob("*.whl"))


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--quiet", *map(str, arguments)]
    subprocess.run(command, check=True, timeout=250)


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
    command = [sys.executable, "-c", program, str(target), str(ROOT)]
    subprocess.run(command, check=True, cwd=cwd, timeout=250)

"""Files that are read are data: tables, gates, profiles and reports of a stranger run no code."""

import ast
import json
import pickle
from pathlib import Path

import pytest

from dit_sparse.fingerprint import load_profile
from dit_sparse.page_data import BadReportError, page_data
from dit_sparse.patterns import SeerAttention, SparseVDiT

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path
    for folder in ("dit_sparse", "kernels", "pipelines")
    for path in (ROOT / folder).rglob("*.py")
)


class Trap:
    """What a pickle does when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def read_report(path):
    (path.parent / "report.json").write_bytes(path.read_bytes())
    page_data([path.parent])


@pytest.mark.parametrize(
    "read",
    [
        lambda path: SparseVDiT(table=str(path)),
        lambda path: SeerAttention(gate=str(path)),
        load_profile,
        read_report,
    ],
    ids=["mode table", "gates", "profile", "report"],
)
@pytest.mark.parametrize("kind", ["pickle", "python", "a list", "deep"])
def test_a_trap_does_not_go_off(tmp_path, read, kind):
    sprung = tmp_path / "sprung"
    contents = {
        "pickle": pickle.dumps(Trap(sprung)),
        "python": f"open({str(sprung)!r}, 'w')".encode(),
        "a list": json.dumps([f"__import__('os').mknod({str(sprung)!r})"]).encode(),
        "deep": b"{" + b'"a":{' * 50 + b"}" * 51,
    }
    (tmp_path / "file").write_bytes(contents[kind])
    with pytest.raises((ValueError, BadReportError)):
        read(tmp_path / "file")
    assert not sprung.exists()


def names(path):
    """Modules that a file imports, and functions that it calls by name."""
    imported, called = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call):
            called.add(ast.unparse(node.func))
    return imported, called


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_the_library_unpickles_evaluates_and_fetches_nothing(path):
    imported, called = names(path)
    assert not imported & {"pickle", "dill", "marshal", "shelve", "requests", "httpx", "socket"}
    assert not imported & {"urllib", "http", "ftplib", "wandb"}
    assert not called & {"eval", "exec", "torch.load", "yaml.load", "numpy.load", "np.load"}


def test_the_library_logs_by_the_standard_module_alone():
    for path in MODULES:
        imported, called = names(path)
        assert not imported & {"loguru", "structlog"}
        assert "logging.basicConfig" not in called, path

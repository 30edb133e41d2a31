"""A selection rule of the user's own, named by its file: `--method my_rule.py:density=0.3`."""

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import NoReturn

from ..config import SparseConfig

SUFFIX = ".py"


class Uncached(SourceFileLoader):
    """Without bytecode, whose cache takes two edits within a second for one."""

    def path_stats(self, path: str) -> NoReturn:
        raise OSError


def method_in_file(path: str) -> type[SparseConfig]:
    """The one class derived from `SparseConfig` that a Python file defines. Runs the file.

    Raises:
        ValueError: there is no such file, or it does not define exactly one.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"no file {path}: a method is a known name or a Python file with a rule")
    name = f"dit_sparse_rule_{file.stem}"
    loader = Uncached(name, str(file))
    spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    found = [value for value in vars(module).values() if is_rule(value, name)]
    if len(found) != 1:
        names = ", ".join(rule.__name__ for rule in found) or "none"
        raise ValueError(f"{path} must define one class derived from SparseConfig, found {names}")
    return found[0]


def is_rule(value: object, module: str) -> bool:
    return (
        isinstance(value, type) and issubclass(value, SparseConfig) and value.__module__ == module
    )

"""A selection rule of the user's own, named by its file: `--method my_rule.py:density=0.3`."""

import importlib.util
import sys
from pathlib import Path

from ..config import SparseConfig

SUFFIX = ".py"


def method_in_file(path: str) -> type[SparseConfig]:
    """The one class derived from `SparseConfig` that a Python file defines. Runs the file.

    Raises:
        ValueError: there is no such file, or it does not define exactly one.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"no file {path}: a method is a known name or a Python file with a rule")
    name = f"dit_sparse_rule_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    # not by the loader, whose bytecode cache takes two edits within a second for one
    exec(compile(file.read_bytes(), str(file), "exec"), vars(module))
    found = [value for value in vars(module).values() if is_rule(value, name)]
    if len(found) != 1:
        names = ", ".join(rule.__name__ for rule in found) or "none"
        raise ValueError(f"{path} must define one class derived from SparseConfig, found {names}")
    return found[0]


def is_rule(value: object, module: str) -> bool:
    return (
        isinstance(value, type) and issubclass(value, SparseConfig) and value.__module__ == module
    )

"""Options of a command from a TOML file: `--config run.toml`. A flag given beside it wins.

Keys are the options without their dashes: `steps = 10`, `method = ["adaspa", "window"]`.
"""

import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

from .failure import USAGE, told


def use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make a file's values the defaults of the command's options."""
    if path is not None:
        with told(USAGE, debug=False):
            context.default_map = read_config(context, path)
    return path


def read_config(context: typer.Context, path: Path) -> dict[str, Any]:
    """The values of a file by the names of parameters.

    Raises:
        ValueError: it cannot be read, or has a key that is no option of the command.
    """
    try:
        values = tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read the options in {path}: {reason}") from error
    options = {
        flag.removeprefix("--"): option
        for option in context.command.params
        for flag in option.opts
        if flag.startswith("--") and option.name != "config"
    }
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in options:
            close = get_close_matches(key, options, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(options)}"
            raise ValueError(f"{path}: {context.info_name} has no option {key!r}; {hint}")
        repeatable = getattr(options[key], "multiple", False) and not isinstance(value, list)
        found[str(options[key].name)] = [value] if repeatable else value
    return found

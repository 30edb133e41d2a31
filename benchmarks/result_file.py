"""How result files are written."""

import json
import re
from pathlib import Path
from typing import Any


def write_result(path: Path, result: dict[str, Any]) -> None:
    """As JSON, a record a line: beside the file, then in its place, so that a kill leaves a whole
    one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    text = json.dumps(result, indent=1)
    part.write_text(re.sub(r"\n {3,}|\n  (?=[\]}])", " ", text) + "\n")
    part.replace(path)

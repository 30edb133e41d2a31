"""`report.html`: finished comparisons as one page that needs no network and no other file.

Data stands in the page as JSON and reaches it as text alone; its policy lets no script run but its
own, and nothing load.
"""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from .generation import prepare_file
from .page_data import page_data
from .video import whole_file

TEMPLATES = Path(__file__).parent / "page"
STYLES = ("page.css",)
SCRIPTS = (
    "base.js",
    "player.js",
    "curve.js",
    "table.js",
    "tradeoff.js",
    "maps.js",
    "blocks.js",
    "origin.js",
    "page.js",
)


def write_page(folders: list[Path], out: Path) -> Path:
    """Write the page of one or more folders of `compare`; returns its path.

    Raises:
        BadReportError: a folder without a report that can be understood.
        IsADirectoryError, PermissionError: `out` cannot be written.
    """
    text, out = page_text(folders), prepare_file(out)
    save_page(text, out)
    return out


def page_text(folders: list[Path]) -> str:
    return render(page_data([Path(folder) for folder in folders]))


def save_page(text: str, out: Path) -> None:
    with whole_file(out) as part:
        part.write_text(text, encoding="utf-8")


def render(data: dict[str, Any]) -> str:
    """The whole page as text."""
    style, script = joined(STYLES), joined(SCRIPTS)
    parts = {
        "POLICY": f"style-src {source_hash(style)}; script-src {source_hash(script)}",
        "STYLE": style,
        "DATA": json_for_html(data),
        "SCRIPT": script,
    }
    template = (TEMPLATES / "report.html").read_text(encoding="utf-8")
    return re.sub(r"%([A-Z]+)%", lambda found: parts[found[1]], template)


def joined(names: tuple[str, ...]) -> str:
    return "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names)


def json_for_html(data: Any) -> str:
    """JSON without a character that could end the element it stands in, or begin another."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def source_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

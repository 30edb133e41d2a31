"""What texts say, and what results hold."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NUMBER = r"[0-9.]+"
BOXES = "wan_tiny", "hunyuan_video_tiny", "cogvideox_tiny"
SHAPES = {"Wan 1.3B 480p": "wan-1.3b", "HunyuanVideo 720p": "hunyuanvideo-720p"}
SHAPES |= {"CogVideoX-5B": "cogvideox-5b"}


def result(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def text(page):
    return " ".join((ROOT / page).read_text().split())


def tables(page):
    """Rows of cells, without bold and code marks, of each table of a page."""
    blocks = re.findall(r"(?:^\|.*\n)+", (ROOT / page).read_text(), re.MULTILINE)
    lines = [re.sub(r"[*`]", "", block).splitlines() for block in blocks]
    return [[[c.strip() for c in row.strip("|").split("|")] for row in block] for block in lines]


def table(page, *heads):
    """The rows, by their first cell, of the one table whose head begins with these cells."""
    (found,) = (t for t in tables(page) if t[0][: len(heads)] == list(heads))
    return {row[0]: row[1:] for row in found[2:]}


def are(told, *values):
    """Whether numbers as they stand in a text are these, rounded."""
    digits = [len(number.partition(".")[2]) for number in told]
    return told == [f"{value:.{count}f}" for value, count in zip(values, digits, strict=True)]


def best_of_budgets(name):
    """{(pipeline, method): {budget: record}}"""
    found = {}
    for record in result(name)["records"]:
        for budget in record.get("budgets", ()):
            found.setdefault((record["pipeline"], record["method"]), {})[budget] = record
    return found

"""The part of README.md on supported pipelines, made from the families and the last test matrix.

python tests/support_table.py    # writes it
"""

import json
from pathlib import Path

from dit_sparse.pipelines.family import families

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MATRIX = ROOT / "benchmarks" / "results" / "test_matrix.json"
START = "<!-- supported pipelines, written by tests/support_table.py -->\n"
END = "<!-- end of supported pipelines -->"


def support_table() -> str:
    lines = [
        "| family | pipelines | text tokens | guidance | tested on weights |",
        "|---|---|---|---|---|",
    ]
    for family in families():
        pipelines = ", ".join(f"`{name}`" for name in family.pipelines)
        cells = family.name, pipelines, family.text, family.guidance, family.tested
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", tested_versions()])


def tested_versions() -> str:
    """The sets of versions with which no test failed."""
    runs = [run for run in json.loads(MATRIX.read_text()).values() if not run["failed"]]
    names = "diffusers", "transformers", "torch"
    sets = [", ".join(f"{name} {run['versions'][name]}" for name in names) for run in runs]
    return (
        "Tested on the CPU, on weights as named and on no downloaded model, with "
        + " and with ".join(sets)
        + " (`make test-matrix`).\n"
    )


def updated_readme() -> str:
    head, rest = README.read_text().split(START)
    return head + START + support_table() + rest[rest.index(END) :]


if __name__ == "__main__":
    README.write_text(updated_readme())

"""What the documentation takes from code and results when it is built, so that it cannot age.

A name in double braces in a page becomes what a function of `PARTS` makes; links to files of the
repository outside of docs/ lead to copies of them.
"""

import html
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support_table import support_table  # noqa: E402

from dit_sparse import AdaSpa, AdaSpaSampled, available_methods  # noqa: E402
from dit_sparse.config import SparseConfig  # noqa: E402

OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)\)")  # a link out of docs/


def on_files(files: Any, config: Any) -> Any:
    """Add what pages link to."""
    pages = [file for file in files if file.src_uri.endswith(".md")]
    linked = {link for page in pages for link in OUTSIDE.findall(page.content_string)}
    for link in sorted(linked):
        files.append(File.generated(config, f"repository/{link}", abs_src_path=str(ROOT / link)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    markdown = OUTSIDE.sub(r"](repository/\1)", markdown)
    for name, part in PARTS.items():
        if f"{{{{ {name} }}}}" in markdown:
            markdown = markdown.replace(f"{{{{ {name} }}}}", part())
    return markdown


def methods_page() -> str:
    """What all methods share, then what each has of its own or sets otherwise."""
    shared = {field.name: field.default for field in fields(SparseConfig)}
    parts = ["### All methods\n", *options_table(list(shared), SparseConfig)]
    for name, config in available_methods().items():
        parts += [f"\n### `{name}`\n", (config.__doc__ or "").split("\n")[0], ""]
        parts += [f"- {fact}: {getattr(config, fact)}" for fact in ("paper", "cost", "memory")]
        own = [f.name for f in fields(config) if f.default != shared.get(f.name, f)]
        parts += ["", *options_table(own, config)] if own else []
        for model, options in config.published.items():
            settings = ", ".join(f"`{option}={value!r}`" for option, value in options.items())
            parts.append(f"\n`as_published({model!r})`: {settings}")
    return "\n".join(parts)


def options_table(names: list[str], config: type[SparseConfig]) -> list[str]:
    told = descriptions(config)
    defaults = {field.name: field.default for field in fields(config)}
    rows = [f"| `{name}` | `{defaults[name]!r}` | {told[name]} |" for name in names]
    return ["| option | default | what it is |", "|---|---|---|", *rows]


def descriptions(config: type[SparseConfig]) -> dict[str, str]:
    """The Args of a class and of what it is derived from."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        for part in griffe.Docstring(cls.__doc__ or "").parse("google", warn_missing_types=False):
            if part.kind is griffe.DocstringSectionKind.parameters:
                found |= {entry.name: " ".join(entry.description.split()) for entry in part.value}
    return found


def commands_page() -> str:
    """The help of every command."""
    command = [sys.executable, "-m", "typer", "dit_sparse.cli", "utils", "docs"]
    done = subprocess.run(
        [*command, "--name", "dit-sparse"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    text = html.unescape(done.stdout)
    return "#" + text[text.index("## `dit-sparse compare`") :].replace("\n## ", "\n### ")


def costs_table() -> str:
    """Effective cost of a run of 50 steps, by method, density and schedule."""
    schedules = (0.2, 0.6), (0.1, 0.5), (0.0, 0.5)
    heads = (f"searches at {first:g} and {second:g}" for first, second in schedules)
    lines = [f"| method | density | {' | '.join(heads)} |"]
    lines.append("|---" * (2 + len(schedules)) + "|")
    for name, config in (("adaspa", AdaSpa), ("adaspa-sampled", AdaSpaSampled)):
        for density in (0.1, 0.2, 0.3):
            costs = [config(density=density, search_at=at).planned_cost(50, density)
                     for at in schedules]  # fmt: skip
            cells = " | ".join(f"{cost:.2f}" for cost in costs)
            lines.append(f"| `{name}` | {density} | {cells} |")
    return "\n".join(lines)


def tuned_table() -> str:
    """The best setting of each budget, from the results of benchmarks/pareto.py."""
    result = json.loads((ROOT / "benchmarks/results/pareto.json").read_text())
    heads = "pipeline", "method", "effective cost at most", "density", "searches at", "PSNR, dB"
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for record in result["records"]:
        config, method = record["config"], record["method"]
        searches = ", ".join(f"{fraction:.2f}" for fraction in config["search_at"])
        for budget in record.get("budgets", ()):
            told = f"{budget} | {config['density']} | {searches} | {record['psnr']:.1f}"
            lines.append(f"| `{record['pipeline']}` | `{method}` | {told} |")
    return "\n".join(lines)


PARTS = {
    "methods": methods_page,
    "commands": commands_page,
    "costs": costs_table,
    "tuned": tuned_table,
    "pipelines": support_table,
}

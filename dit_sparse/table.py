"""The figures of a comparison: one row per method, means over prompts and seeds; and as a table."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

QUALITY = ("\nmethod", "PSNR\ndB", "\nSSIM", "\nLPIPS")
COST = ("\ndensity", "\ncost", "kept\nmass", "dense\ns", "sparse\ns", "speed\n-up")
MEANS = (
    "psnr",
    "ssim",
    "lpips",
    "density",
    "effective_cost",
    "kept_mass",
    "seconds",
    "peak_bytes",
    "peak_cache_bytes",
)


def figures(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per method of a report of `compare`; None for what is unknown."""
    rows = []
    for label in dict.fromkeys(run["label"] for run in report["runs"]):
        runs = [run for run in report["runs"] if run["label"] == label]
        row = {"label": label, "clips": len(runs), **{key: mean(runs, key) for key in MEANS}}
        dense_seconds = dense_mean(report, runs)
        speed_up = dense_seconds / row["seconds"] if dense_seconds and row["seconds"] else None
        identical = all(run.get("identical") for run in runs)
        rows.append(
            {**row, "identical": identical, "dense_seconds": dense_seconds, "speed_up": speed_up}
        )
    return rows


def print_table(report: dict[str, Any], console: Console) -> None:
    """Print a report of `compare`: rows, what bounds them, and an honest word on speed."""
    generated = report["pipeline"] is not None  # else videos that were there before
    table = Table(*QUALITY, *(COST if generated else ()), box=None, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    table.columns[0].min_width = 16
    for row in figures(report):
        label = row["label"].replace(":", ": ").replace(",", ", ")  # places to break the line
        table.add_row(label, *quality(row), *(cost(row) if generated else ()))
    for name, key in (("noise floor", "noise_floor"), ("another seed", "chance")):
        if report.get(key):
            table.add_row(f"dense, {name}", *quality(report[key]), style="dim")
    console.print(table)
    for line in explanations(report) + remarks(report):
        console.print(line, markup=False, highlight=False)


def explanations(report: dict[str, Any]) -> list[str]:
    """What the columns mean."""
    if report["pipeline"] is None:
        return [f"PSNR, SSIM, LPIPS: against {report['dense'][0]['label']}."]
    return [
        "PSNR, SSIM, LPIPS: against dense, same seed.",
        "cost: attention operations of all steps, warm-up and search included, over dense.",
    ]


def remarks(report: dict[str, Any]) -> list[str]:
    """What must be said of these figures."""
    lines = []
    slow = [
        f"{row['label']} ({row['speed_up']:.2f}x)"
        for row in figures(report)
        if row["speed_up"] is not None and round(row["speed_up"], 2) < 1  # as it is shown
    ]
    if slow:
        lines.append(
            f"Slower than dense here: {', '.join(slow)}. At this size on this machine, finding and "
            "gathering blocks takes longer than the attention it saves."
        )
    if report["metrics"]["lpips_missing"]:
        lines.append(f"No LPIPS: {report['metrics']['lpips_missing']}.")
    return lines + notes(report)


def notes(report: dict[str, Any]) -> list[str]:
    """Each note once, with the methods that it is of where it is not of all."""
    labels = dict.fromkeys(run["label"] for run in report["runs"])
    told = dict.fromkeys(note for run in report["runs"] for note in run["notes"])
    lines = []
    for note in told:
        of = dict.fromkeys(run["label"] for run in report["runs"] if note in run["notes"])
        whose = "" if len(of) == len(labels) else f" on {', '.join(of)}"
        lines.append(f"note{whose}: {note}")
    return lines


def quality(row: dict[str, Any]) -> list[str]:
    psnr = "same" if row.get("identical") else show(row["psnr"], 2)
    return [psnr, show(row["ssim"], 3), show(row["lpips"], 3)]


def cost(row: dict[str, Any]) -> list[str]:
    speed_up = "-" if row["speed_up"] is None else f"{row['speed_up']:.2f}x"
    parts = [show(row[key], 2) for key in ("density", "effective_cost", "kept_mass")]
    seconds = [show(row[key], 1) for key in ("dense_seconds", "seconds")]
    return [*parts, *seconds, speed_up]


def dense_mean(report: dict[str, Any], runs: list[dict[str, Any]]) -> float | None:
    seconds = {run["id"]: run["seconds"] for run in report["dense"]}
    return average(seconds[run["dense_id"]] for run in runs)


def mean(runs: list[dict[str, Any]], key: str) -> Any:
    return average(run.get(key) for run in runs)


def average(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def show(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"

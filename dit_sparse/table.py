"""The table at the end of a comparison: one row per method, means over prompts and seeds."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = (
    "\nmethod",
    "PSNR\ndB",
    "\nSSIM",
    "\nLPIPS",
    "\ndensity",
    "\ncost",
    "kept\nmass",
    "dense\ns",
    "sparse\ns",
    "speed\n-up",
)


def print_table(report: dict[str, Any], console: Console) -> None:
    """Print a report of `compare`: rows, what bounds them, and an honest word on speed."""
    table = Table(*COLUMNS, box=None, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    table.columns[0].min_width = 16
    slow = []
    for label in dict.fromkeys(run["label"] for run in report["runs"]):
        runs = [run for run in report["runs"] if run["label"] == label]
        seconds, dense_seconds = mean(runs, "seconds"), dense_mean(report, runs)
        speed_up = dense_seconds / seconds
        if speed_up < 1:
            slow.append(f"{label} ({speed_up:.2f}x)")
        table.add_row(
            label.replace(":", ": ").replace(",", ", "),  # places to break the line
            *quality(runs),
            show(mean(runs, "density"), 2),
            show(mean(runs, "effective_cost"), 2),
            show(mean(runs, "kept_mass"), 2),
            show(dense_seconds, 1),
            show(seconds, 1),
            f"{speed_up:.2f}x",
        )
    for name, key in (("noise floor", "noise_floor"), ("another seed", "chance")):
        if report.get(key):
            table.add_row(f"dense, {name}", *quality([report[key]]), style="dim")
    console.print(table)
    for line in remarks(report, slow):
        console.print(line, markup=False, highlight=False)


def remarks(report: dict[str, Any], slow: list[str]) -> list[str]:
    """Lines below the table."""
    lines = [
        "PSNR, SSIM, LPIPS: against dense, same seed.",
        "cost: attention operations of all steps, warm-up and search included, over dense.",
    ]
    if slow:
        lines.append(
            f"Slower than dense here: {', '.join(slow)}. At this size on this machine, finding and "
            "gathering blocks takes longer than the attention it saves."
        )
    if report["metrics"]["lpips_missing"]:
        lines.append(f"No LPIPS: {report['metrics']['lpips_missing']}.")
    notes = [note for run in report["runs"] for note in run["notes"]]
    return lines + [f"note: {note}" for note in dict.fromkeys(notes)]


def quality(runs: list[dict[str, Any]]) -> list[str]:
    psnr = "same" if all(run.get("identical") for run in runs) else show(mean(runs, "psnr"), 2)
    return [psnr, show(mean(runs, "ssim"), 3), show(mean(runs, "lpips"), 3)]


def dense_mean(report: dict[str, Any], runs: list[dict[str, Any]]) -> float:
    seconds = {run["id"]: run["seconds"] for run in report["dense"]}
    return average(seconds[run["dense_id"]] for run in runs) or 0.0


def mean(runs: list[dict[str, Any]], key: str) -> Any:
    return average(run.get(key) for run in runs)


def average(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def show(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"

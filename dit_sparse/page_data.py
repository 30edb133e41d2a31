"""Finished comparisons as the data of a page: settings, rows, clips, traces.

A page shows `cells`: one prompt and seed, called in one way, with every run that belongs to it,
from whichever folder. Clips with the same frames are stored once.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from .page_frames import FRAMES_BYTES, ClipFile, embed
from .page_traces import TraceBook
from .table import average, figures, remarks

SCHEMA = 1
OF_RUN = (
    "label config seed steps size density effective_cost kept_mass seconds peak_bytes "
    "peak_cache_bytes psnr ssim lpips identical notes"
).split()
OF_REPORT = "command complete pipeline environment metrics noise_floor chance".split()


class BadReportError(ValueError):
    """A folder does not hold a report that a page can be made of."""


def load_report(folder: Path) -> dict[str, Any]:
    """The report in a folder.

    Raises:
        BadReportError: there is none, or it is not a report of this schema.
    """
    path = folder / "report.json"
    try:
        # NaN and infinity are no JSON, and the page could not read them.
        report = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: None)
    except FileNotFoundError as error:
        raise BadReportError(
            f"{folder} has no report.json: name a folder that `dit-sparse compare` wrote"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadReportError(f"{path} cannot be read as JSON ({error})") from error
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA:
        raise BadReportError(f"{path} has schema {schema!r}, and this version reads {SCHEMA}")
    return report


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, refused where that leads out of the folder.

    Raises:
        BadReportError: it does, directly or by a link.
    """
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise BadReportError(f"{folder / 'report.json'} names {name!r}, outside of its folder")
    return path


def page_data(folders: list[Path], budget: int = FRAMES_BYTES) -> dict[str, Any]:
    """Everything that the page of these folders shows, ready for JSON.

    Raises:
        BadReportError: a folder without a report, or a report that cannot be understood.
    """
    book = PageBook()
    for folder in folders:
        try:
            book.add(folder)
        except BadReportError:
            raise
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise BadReportError(
                f"{folder / 'report.json'} is not what `dit-sparse compare` writes"
                f" ({type(error).__name__}: {error})"
            ) from error
    return book.data(budget)


class PageBook:
    """Collects reports, and orders their runs by cell."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []
        self.cells: dict[str, dict[str, Any]] = {}
        self.clips: dict[str, tuple[int, ClipFile]] = {}  # by what is in them
        self.traces = TraceBook()

    def add(self, folder: Path) -> None:
        report = load_report(folder)
        dense = {entry["id"]: entry for entry in report["dense"]}
        number = len(self.reports)
        self.reports.append(
            {
                "name": str(folder),
                **{key: report.get(key) for key in OF_REPORT},
                "rows": figures(report),
                "dense": {
                    key: average(entry.get(key) for entry in dense.values())
                    for key in ("seconds", "peak_bytes")
                },
                "remarks": remarks(report),
            }
        )
        for run in report["runs"]:
            self.add_run(folder, number, run, dense[run["dense_id"]])

    def add_run(self, folder: Path, number: int, run: dict, dense: dict) -> None:
        report = self.reports[number]
        pipeline = report["pipeline"] or {}
        setting = [pipeline.get("source"), pipeline.get("call"), run["prompt"], run["seed"]]
        cell = self.cells.setdefault(
            json.dumps([*setting, run["size"]]),
            {
                "prompt": run["prompt"],
                "seed": run["seed"],
                "size": run["size"],
                "fps": pipeline.get("fps") or run.get("fps"),
                "report": number,
                "runs": [],
            },
        )
        cell["runs"].append(
            {
                **{key: run.get(key) for key in OF_RUN},
                "psnr_per_frame": list(run["psnr_per_frame"]),
                "report": number,
                "dense_label": dense.get("label") or "dense",
                "dense_seconds": dense["seconds"],
                "dense_clip": self.clip(folder, dense, run["size"]),
                "clip": self.clip(folder, run, run["size"]),
                "trace": self.trace(folder, run["trace"]),
            }
        )

    def trace(self, folder: Path, name: str | None) -> dict[str, Any] | None:
        path = inside(folder, name) if name else None
        if path is None or not path.is_file():
            return None
        return self.traces.pack(json.loads(path.read_text(encoding="utf-8")))

    def clip(self, folder: Path, entry: dict, size: list[int]) -> int | None:
        """Number of the clip of a run; None where its files are gone."""
        for name in (entry.get("frames"), entry.get("video")):
            path = inside(folder, name) if name else None
            files = files_of(folder, path) if path else []
            if path and files:
                frames, height, width = size
                clip = ClipFile(path, (frames, height, width))
                return self.clips.setdefault(content_hash(files), (len(self.clips), clip))[0]
        return None

    def data(self, budget: int) -> dict[str, Any]:
        clips, frames_note = embed([clip for _, clip in self.clips.values()], budget)
        cells = list(self.cells.values())
        return {
            "schema": SCHEMA,
            "reports": self.reports,
            "cells": cells,
            "clips": clips,
            "frames_note": frames_note,
        }


def files_of(folder: Path, path: Path) -> list[Path]:
    """The files of a clip, none if it is gone; a link that leads elsewhere is refused."""
    if not path.is_dir():
        return [path] if path.is_file() else []
    root = folder.resolve()
    return [inside(folder, str(file.relative_to(root))) for file in sorted(path.iterdir())]


def content_hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()

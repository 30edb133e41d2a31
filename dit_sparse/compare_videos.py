"""Finished videos against a reference: the report of `compare` without what only a run knows."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .compare import SCHEMA, metrics_in_words, software
from .generation import tell_replaced, write_json
from .metrics import Lpips, compare_clips
from .page import write_page
from .progress import Steps
from .read_video import Video, read_video
from .video import write_frames

DEFAULT_FPS = 16
OF_A_RUN = "density effective_cost kept_mass seconds peak_bytes guidance steps trace seed video"


def check_videos(reference: Path, videos: Sequence[Path], out: Path) -> None:
    """Read all videos (files or folders of images), before a file of an earlier run is replaced.

    Raises:
        FileNotFoundError: a video is not there.
        ValueError: a video cannot be read, differs from the reference in frames or size, or lies
            where frames are written.
    """
    refuse_own_output([reference, *videos], out)
    first = read_video(reference)
    for path in videos:
        refuse_other_shape(path, read_video(path), reference, first)


def compare_videos(
    reference: Path,
    videos: Sequence[Path],
    out: Path,
    lpips: Lpips | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Compare videos that `check_videos` let pass with a reference; writes report and page."""
    names, steps = short_names([reference, *videos]), Steps(len(videos), quiet)
    first, dense = read_video(reference), entry(0, names[0])
    tell_replaced([out / "report.json"])
    write_frames(out / dense["frames"], first.frames)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "command": shlex.join(["dit-sparse", *sys.argv[1:]]),
        "complete": True,
        "pipeline": None,
        "environment": software(),
        "metrics": metrics_in_words(lpips),
        "noise_floor": None,
        "chance": None,
        "dense": [{**dense, "seconds": None}],
        "runs": [],
    }
    for number, path in enumerate(videos, start=1):
        video, described = read_video(path), entry(number, names[number])
        write_frames(out / described["frames"], video.frames)
        with steps.clip(described["label"], len(video.frames)) as tick:
            metrics = compare_clips(first.frames, video.frames, lpips, tick).as_dict()
        run = {
            **dict.fromkeys(OF_A_RUN.split()),
            **described,
            "dense_id": dense["id"],
            "method": "video",
            "config": {},
            "size": list(video.frames.shape[:3]),
            "fps": first.fps or video.fps or DEFAULT_FPS,
            "notes": [],
            **metrics,
        }
        report["runs"].append(run)
    write_json(out / "report.json", report)
    write_page([out], out / "report.html")
    return report


def entry(number: int, name: str) -> dict[str, Any]:
    found = f"{number:02d}"
    return {"id": found, "label": name, "prompt": None, "frames": f"frames/{found}"}


def short_names(paths: Sequence[Path]) -> list[str]:
    """File names, or whole paths where two names are the same."""
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def refuse_own_output(paths: Sequence[Path], out: Path) -> None:
    written = {(out / entry(number, "")["frames"]).resolve() for number in range(len(paths))}
    for path in paths:
        place = path.expanduser().resolve()
        if written & {place, *place.parents}:
            raise ValueError(f"{path} lies where frames are written: name another --out")


def refuse_other_shape(path: Path, video: Video, reference: Path, first: Video) -> None:
    ours, theirs = video.frames.shape[:3], first.frames.shape[:3]
    if ours != theirs:
        told = [f"{count} frames of {width}x{height}" for count, height, width in (ours, theirs)]
        raise ValueError(f"{path} has {told[0]} and {reference} has {told[1]}: they must be equal")

"""Frames to files: mp4, gif, lossless WebP frames, and a sheet of dense, sparse and difference.

Every file is written beside its place and renamed, so that a file with the final name is whole.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

DIFFERENCE_GAIN = 4
SHEET_FRAMES = 6
SHEET_FRAME_WIDTH = 192  # pixels; smaller frames are enlarged to it
LABEL_HEIGHT = 22


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` if the block succeeds."""
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) float in [0, 1] or uint8 -> uint8."""
    if frames.dtype == np.uint8:
        return frames
    return (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)


def write_mp4(path: str | Path, frames: np.ndarray, fps: float) -> None:
    """Write frames (T, H, W, 3) as mp4: H.264, or MPEG-4 where this PyAV has no H.264 encoder.

    Raises:
        RuntimeError: no encoder at all.
    """
    import av

    codecs = [name for name in ("libx264", "h264", "mpeg4") if has_encoder(name)]
    if not codecs:
        raise RuntimeError("this PyAV has neither an H.264 nor an MPEG-4 encoder: pip install av")
    frames, path = even_sides(to_uint8(frames)), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part, av.open(str(part), "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1000)
        stream: Any = container.add_stream(codecs[0], rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if codecs[0] == "mpeg4":
            stream.bit_rate = 8_000_000
        else:
            stream.options = {"crf": "14"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def has_encoder(name: str) -> bool:
    import av

    try:
        return av.Codec(name, "w").is_encoder
    except Exception:  # PyAV's UnknownCodecError moved between modules
        return False


def even_sides(frames: np.ndarray) -> np.ndarray:
    """4:2:0 video needs even sides: repeat the last row or column where one is odd."""
    height, width = frames.shape[1:3]
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def write_gif(path: str | Path, frames: np.ndarray, fps: float) -> None:
    """Write frames (T, H, W, 3) as a looping gif; it knows hundredths of a second only."""
    images = [Image.fromarray(frame) for frame in to_uint8(frames)]
    duration = max(20, round(100 / fps) * 10)
    with whole_file(Path(path)) as part:
        images[0].save(
            part,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=duration,
            loop=0,
        )


def write_frames(folder: str | Path, frames: np.ndarray) -> None:
    """Write frames (T, H, W, 3) as lossless WebP files, one a frame, in place of earlier ones."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("[0-9][0-9][0-9][0-9].webp"):
        stale.unlink()
    for number, frame in enumerate(to_uint8(frames)):
        with whole_file(folder / f"{number:04d}.webp") as part:
            Image.fromarray(frame).save(part, format="WEBP", lossless=True)


def write_sheet(
    path: str | Path, dense: np.ndarray, sparse: Sequence[tuple[str, np.ndarray]]
) -> None:
    """Write a PNG of frames in rows: dense, then each sparse clip and its amplified difference.

    Args:
        dense: frames (T, H, W, 3).
        sparse: label and frames of each clip to set against it.
    """
    dense = to_uint8(dense)
    rows = [("dense", dense)]
    for label, frames in sparse:
        frames = to_uint8(frames)
        difference = np.abs(frames.astype(np.int16) - dense) * DIFFERENCE_GAIN
        rows.append((label, frames))
        rows.append((f"|{label} - dense| x {DIFFERENCE_GAIN}", np.clip(difference, 0, 255)))
    chosen = np.unique(np.linspace(0, len(dense) - 1, SHEET_FRAMES).round().astype(int))
    height, width = dense.shape[1:3]
    scale = max(1, SHEET_FRAME_WIDTH // width)
    row_height = height * scale + LABEL_HEIGHT
    sheet = Image.new("RGB", (len(chosen) * width * scale, len(rows) * row_height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, (label, frames) in enumerate(rows):
        top = row * row_height
        draw.text((4, top + 2), label, fill="black", font=font)
        for column, index in enumerate(chosen):
            image = Image.fromarray(frames[index].astype(np.uint8))
            image = image.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(image, (column * width * scale, top + LABEL_HEIGHT))
            number = f"frame {index}"
            if row == 0 and column > 0:
                draw.text((column * width * scale + 4, top + 2), number, fill="gray", font=font)
    with whole_file(Path(path)) as part:
        sheet.save(part, format="PNG", optimize=True)

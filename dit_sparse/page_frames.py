"""Frames for the page: lossless where they fit, else compressed, smaller, and of fewer clips."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .read_video import frame_files, read_image, read_video

FRAMES_BYTES = 5_200_000  # before base64, which makes four bytes of three
# Quality of WebP (None: lossless) and scale, tried in this order until all clips fit.
LADDER = ((None, 1.0), (92, 1.0), (80, 1.0), (85, 0.5), (70, 0.5))
SAMPLED_CLIPS, SAMPLED_FRAMES = 4, 3


@dataclass(frozen=True)
class ClipFile:
    """A clip on the disk: a folder of images or a video, and its size (frames, height, width)."""

    path: Path
    size: tuple[int, int, int]

    @property
    def lossless_files(self) -> list[Path]:
        """Frames that can be put into the page as they are."""
        files = frame_files(self.path) if self.path.is_dir() else []
        return files[: self.size[0]] if all(file.suffix == ".webp" for file in files) else []

    def frames(self) -> np.ndarray:
        # A video of an odd size carries a repeated row or column.
        return read_video(self.path).frames[: self.size[0], : self.size[1], : self.size[2]]

    def sample(self) -> list[np.ndarray]:
        frames = frame_files(self.path) if self.path.is_dir() else list(self.frames())
        chosen = np.linspace(0, len(frames) - 1, SAMPLED_FRAMES).round().astype(int)
        return [f if isinstance(f := frames[i], np.ndarray) else read_image(f) for i in chosen]

    @property
    def exact(self) -> bool:
        """Whether these are the frames that the figures were taken from."""
        return self.path.is_dir()


def embed(clips: list[ClipFile], budget: int = FRAMES_BYTES) -> tuple[list[dict | None], str]:
    """The frames of each clip as base64 WebP, None for clips that do not fit, and how in words."""
    quality, scale = choose(clips, budget)
    found: list[dict | None] = []
    left = budget
    for clip in clips:
        encoded = encode(clip, quality, scale) if left > 0 else []
        left -= sum(map(len, encoded))
        fits = encoded and left >= 0
        texts = [base64.b64encode(frame).decode() for frame in encoded]
        found.append({"size": list(clip.size), "frames": texts} if fits else None)
    return found, describe(quality, scale, clips, found)


def choose(clips: list[ClipFile], budget: int) -> tuple[int | None, float]:
    """The first rung of the ladder on which all clips fit, by a sample of them; else the last."""
    frames = sum(clip.size[0] for clip in clips)
    every = max(1, len(clips) // SAMPLED_CLIPS)
    sampled = [frame for clip in clips[::every] for frame in clip.sample()]
    for quality, scale in LADDER:
        sizes = [len(webp(frame, quality, scale)) for frame in sampled]
        if np.mean(sizes or [0]) * frames < budget * 0.97:
            break
    return quality, scale


def encode(clip: ClipFile, quality: int | None, scale: float) -> list[bytes]:
    if quality is None and clip.lossless_files:
        return [file.read_bytes() for file in clip.lossless_files]
    return [webp(frame, quality, scale) for frame in clip.frames()]


def webp(frame: np.ndarray, quality: int | None, scale: float) -> bytes:
    image, buffer = Image.fromarray(frame), io.BytesIO()
    if scale != 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    if quality is None:
        image.save(buffer, "WEBP", lossless=True)
    else:
        image.save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()


def describe(
    quality: int | None, scale: float, clips: list[ClipFile], found: list[dict | None]
) -> str:
    kind = "lossless WebP" if quality is None else f"WebP of quality {quality}"
    size = "" if scale == 1 else f" at {scale:g} of their width and height"
    lines = [f"Frames shown here are {kind}{size}; every figure is of the original frames."]
    if not all(clip.exact for clip in clips):
        lines.append("Some were read from compressed video, whose traces the difference shows too.")
    elif quality is not None:
        lines.append("The difference shows traces of their compression too.")
    if missing := found.count(None):
        lines.append(f"{missing} of {len(clips)} clips are left out to keep this file small.")
    return " ".join(lines)

"""Files to frames: mp4 and whatever else PyAV opens, gif and animated WebP, a folder of images."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

IMAGES = (".png", ".webp", ".jpg", ".jpeg", ".bmp")


@dataclass(frozen=True)
class Video:
    """Frames (T, H, W, 3) uint8, and frames per second where the file knows them."""

    frames: np.ndarray
    fps: float | None = None


def read_video(path: str | Path) -> Video:
    """Read a video file or a folder of images, which are taken in the order of their numbers.

    Raises:
        FileNotFoundError: there is no such file, or a folder without images.
        ValueError: not a video, or frames of different sizes.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if path.is_dir():
        return read_folder(path)
    try:
        return read_images(path) if path.suffix.lower() in (".gif", ".webp") else read_av(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a video ({error})") from error


def frame_files(folder: Path) -> list[Path]:
    found = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGES and not path.name.startswith(".")  # what a kill leaves
    ]
    return sorted(found, key=lambda path: ([int(n) for n in re.findall(r"\d+", path.stem)], path))


def read_folder(folder: Path) -> Video:
    paths = frame_files(folder)
    if not paths:
        raise FileNotFoundError(f"the folder {folder} has no images ({', '.join(IMAGES)})")
    images = [read_image(path) for path in paths]
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"the images in {folder} have different sizes")
    return Video(np.stack(images))


def read_image(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def read_images(path: Path) -> Video:
    """A gif or WebP; what it shows longer than others are equal frames that were joined."""
    frames, durations = [], []
    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            frames.append(np.asarray(frame.convert("RGB")))
            durations.append(frame.info.get("duration") or 0)  # milliseconds
    shortest = min(durations)
    if not shortest:
        return Video(np.stack(frames))
    counts = [round(duration / shortest) for duration in durations]
    return Video(np.repeat(np.stack(frames), counts, axis=0), 1000 / shortest)


def read_av(path: Path) -> Video:
    import av

    frames, rate = [], None
    try:
        with av.open(str(path)) as container:
            for stream in container.streams.video[:1]:
                rate = stream.average_rate
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video ({error})") from error
    if not frames:
        raise ValueError(f"{path} has no video in it")
    return Video(np.stack(frames), float(rate) if rate else None)

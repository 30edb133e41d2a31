"""Call a pipeline once: frames, seconds, bytes, and a tick for each denoising step."""

import inspect
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch

from .method_spec import DENSE, MethodSpec
from .video import whole_file


@dataclass(frozen=True)
class Clip:
    """Lossless frames (T, H, W, 3) float32 in [0, 1], seconds of the call, its peak GPU bytes.

    `sparse` is the report of the sparse method that ran, None for dense attention.
    """

    frames: np.ndarray
    seconds: float
    peak_bytes: int | None
    sparse: Any = None


def generate_clip(
    pipe: Any,
    prompt: str,
    seed: int,
    call: dict[str, Any],
    method: MethodSpec | None = None,
    measure: bool = True,
    on_step: Callable[[], None] | None = None,
    maps: bool = False,
) -> Clip:
    """Generate one clip, dense or with a sparse method; the pipeline is afterwards as it was.

    Args:
        seed: of a CPU generator, so that every device starts from the same noise.
        call: keyword arguments of the pipeline.
        measure: let the method measure its kept mass, which takes a little time.
        on_step: called after each denoising step.
        maps: let the report show the last mask of every layer.

    Raises:
        RuntimeError: the frames hold NaN or infinity.
        Whatever enabling the method or the pipeline itself raises.
    """
    if method is None or method.name == DENSE:
        return timed_call(pipe, prompt, seed, call, on_step)
    handle = enable(pipe, method, measure)
    for installed in handle._installed if maps else ():
        installed.state.masks = {}
    try:
        clip = timed_call(pipe, prompt, seed, call, on_step)
        return Clip(clip.frames, clip.seconds, clip.peak_bytes, handle.report())
    finally:
        handle.disable()


def enable(pipe: Any, method: MethodSpec, measure: bool = True) -> Any:
    from . import enable_sparse_attention

    return enable_sparse_attention(pipe, method=method.name, measure=measure, **method.options)


def timed_call(
    pipe: Any, prompt: str, seed: int, call: dict[str, Any], on_step: Callable[[], None] | None
) -> Clip:
    cuda = torch.device(pipe.device).type == "cuda"
    generator = torch.Generator("cpu").manual_seed(seed)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    # Frames come back as numpy, so the GPU has finished when the call returns.
    given = {**call, **ticking(pipe, on_step)}
    video = pipe(prompt=prompt, generator=generator, output_type="np", **given)
    seconds = time.perf_counter() - start
    frames = np.asarray(video.frames[0], dtype=np.float32)
    if not np.isfinite(frames).all():
        raise RuntimeError("the pipeline returned NaN: try --dtype float32 or bfloat16")
    return Clip(frames, seconds, torch.cuda.max_memory_allocated() if cuda else None)


def ticking(pipe: Any, on_step: Callable[[], None] | None) -> dict[str, Any]:
    """Arguments that make a pipeline call `on_step` after each denoising step, where it can."""
    if on_step is None or "callback_on_step_end" not in inspect.signature(pipe.__call__).parameters:
        return {}
    return {"callback_on_step_end": lambda pipe, step, timestep, kwargs: on_step() or kwargs}


def check_call(pipe: Any, call: dict[str, Any]) -> None:
    """Refuse arguments that this pipeline does not take, before anything runs.

    Raises:
        ValueError: an argument it does not know, or a size that is not positive or not possible.
    """
    known = inspect.signature(pipe.__call__).parameters
    for name, value in call.items():
        if name not in known:
            raise ValueError(f"{type(pipe).__name__} takes no {name}; leave that option out")
        zero = value == 0 and name == "guidance_scale"
        if value is not None and not (0 < value < math.inf or zero):  # nan is neither
            raise ValueError(f"{name} must be positive, got {value}")
    check = getattr(pipe, "check_inputs", lambda: None)
    checked = inspect.signature(check).parameters
    if {"height", "width"} <= call.keys() & checked.keys():
        missing = {p.name: None for p in checked.values() if p.default is p.empty}
        given = missing | {"prompt": "a prompt"} | call
        check(**{name: value for name, value in given.items() if name in checked})


def prepare_folder(folder: str | Path) -> Path:
    """Create `folder` and make sure that files can be written there.

    Raises:
        PermissionError: they cannot.
    """
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path).close()
    except OSError as error:
        raise PermissionError(
            f"cannot write to {path} ({error.strerror or error}); name another folder with --out"
        ) from error
    return path


def prepare_file(path: Path) -> Path:
    """Make sure that a file can be written at `path`; returns it with its ~ replaced.

    Raises:
        IsADirectoryError: it is a folder.
        PermissionError: its folder cannot be written.
    """
    if path.expanduser().is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file with --out")
    return prepare_folder(path.parent) / path.name


def tell_replaced(paths: Iterable[Path]) -> None:
    """Say on stderr that files of an earlier run will be written over, before they are."""
    there = [path for path in paths if path.exists()]
    if there:
        more = f" and {len(there) - 1} more files" if len(there) > 1 else ""
        print(f"Replaces {there[0]}{more} of an earlier run.", file=sys.stderr)


def write_json(path: Path, value: Any) -> None:
    with whole_file(path) as part:
        # allow_nan=False: JSON has no infinity, and a report with one would not load elsewhere.
        part.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")

"""`dit-sparse bench --tune`: the fastest tiles of the forward kernel on this GPU, kept for later.

Inputs and masks are random. Medians of CUDA events, after a call that compiles.
"""

from collections.abc import Callable
from typing import Any

import torch

from .bench import Shape, random_mask

REPEATS = 9
Timer = Callable[[Callable[[], Any]], float]


def refuse_without_gpu() -> None:
    if not torch.cuda.is_available() or torch.version.hip:
        raise ValueError(
            "--tune times kernels on an NVIDIA GPU and torch sees none here: run it where the"
            " videos are made; `dit-sparse doctor` tells what is here"
        )


def milliseconds(call: Callable[[], Any]) -> float:
    """Median of `REPEATS` calls."""
    call()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[REPEATS // 2]


@torch.no_grad()
def tune(
    shape: Shape,
    density: float,
    block_size: int,
    device: str = "cuda",
    timer: Timer = milliseconds,
) -> dict[str, Any]:
    """Time every candidate tile of the forward kernel and keep the fastest for the next runs."""
    from .kernels import tiles, tuned
    from .kernels.block_sparse_fwd import block_sparse_fwd, default_tile
    from .kernels.dot import load_path

    generator = torch.Generator(device).manual_seed(0)
    like = 3, 1, shape.tokens, shape.heads, shape.dim
    query, key, value = torch.randn(like, device=device, generator=generator).bfloat16()
    _, mask = random_mask(shape, density, block_size, generator)
    size, lists, order = mask.block_size, mask.indices(), mask.work_order
    given = default_tile(query, key, value, size)
    gluon = tiles.gluon_runs(query.device)
    others = tiles.CANDIDATES.get((shape.dim, block_size), [])
    times, refused = {}, {}
    for tile in dict.fromkeys([given, *others]):
        if tile.gluon and not gluon:
            continue
        try:
            times[tile] = timer(
                lambda tile=tile: block_sparse_fwd(  # type: ignore[misc]
                    query, key, value, *lists, block_size=size, order=order, tile=tile
                )
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # needs more than this GPU has, or does not compile
            refused[tile] = f"{type(error).__name__}: {str(error)[:100]}"
    if not times:
        raise RuntimeError(f"no tile of the forward kernel runs here: {refused}")
    best = min(times, key=times.__getitem__)
    path = load_path(query, key, value)
    file = tuned.keep(query.device, tuned.problem(path, shape.dim, size), best)
    return {
        "tile": list(best),
        "ms": times[best],
        "before": list(given),
        "before_ms": times.get(given),
        "tried": len(times),
        "refused": len(refused),
        "file": str(file),
    }

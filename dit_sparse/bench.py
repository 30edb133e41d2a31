"""`dit-sparse bench`: dense attention against sparse on this GPU, and its fastest tiles.

Inputs and masks are random: times, not quality. Medians of CUDA events, after a call that compiles.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention import choose_engine, sparse_attention
from .block_mask import BlockMask

REPEATS = 9
DENSE = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Timer = Callable[[Callable[[], Any]], float]


class Shape(NamedTuple):
    heads: int
    tokens: int
    head_dim: int


SHAPES = {
    "wan-1.3b": Shape(12, 32760, 128),
    "cogvideox-5b": Shape(48, 17776, 64),
    "hunyuanvideo-720p": Shape(24, 118860, 128),
}


def refuse_without_gpu() -> None:
    if not torch.cuda.is_available() or torch.version.hip:
        raise ValueError(
            "bench times kernels on an NVIDIA GPU and torch sees none here: run it where the"
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


def problem_of(
    shape: Shape, density: float, block_size: int, device: str
) -> tuple[list[Tensor], BlockMask]:
    """Random query, key and value in bfloat16, and a mask of about this density."""
    like = 1, shape.tokens, shape.heads, shape.head_dim
    tensors = [torch.randn(like, device=device, dtype=torch.bfloat16) for _ in range(3)]
    blocks = -(-shape.tokens // block_size)
    mask = torch.rand(1, shape.heads, blocks, blocks, device=device) < density
    mask |= torch.eye(blocks, dtype=torch.bool, device=device)
    size = block_size, block_size
    return tensors, BlockMask.from_dense(mask, shape.tokens, shape.tokens, size)


@torch.no_grad()
def compare(
    shape: Shape,
    density: float,
    block_size: int,
    precision: str = "full",
    device: str = "cuda",
    timer: Timer = milliseconds,
) -> dict[str, Any]:
    """The fastest dense attention of torch beside ours, in ms of one call."""
    (query, key, value), mask = problem_of(shape, density, block_size, device)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    dense = {}
    for name, backend in DENSE.items():
        try:
            with sdpa_kernel(backend):
                dense[name] = timer(lambda: F.scaled_dot_product_attention(q, k, v))
        except RuntimeError:  # this backend does not run here
            continue
    engine = choose_engine("auto", query, mask, precision=precision)
    sparse = timer(
        lambda: sparse_attention(query, key, value, mask, engine=engine, precision=precision)
    )
    best = min(dense, key=dense.__getitem__) if dense else None
    return {
        "dense": best,
        "dense_ms": dense[best] if best else None,
        "sparse": engine if precision == "full" else f"{engine} {precision}",
        "sparse_ms": sparse,
        "density": mask.density.mean().item(),
        "speedup": dense[best] / sparse if best else None,
    }


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

    (query, key, value), mask = problem_of(shape, density, block_size, device)
    size, lists, order = mask.block_size, mask.indices(), mask.work_order
    given = default_tile(query, key, value, size)
    gluon = tiles.gluon_runs(query.device)
    others = tiles.CANDIDATES.get((shape.head_dim, block_size), [])
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
    file = tuned.keep(query.device, tuned.problem(path, shape.head_dim, size), best)
    return {
        "tile": list(best),
        "ms": times[best],
        "before": list(given),
        "before_ms": times.get(given),
        "tried": len(times),
        "refused": len(refused),
        "file": str(file),
    }

"""`dit-sparse bench`: how long attention calls take on this machine, dense and sparse.

Random tensors and a random mask, the worst for the cache; masks of real attention are read faster.
Each engine is compared with plain torch at its first use, as everywhere.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention import sparse_attention
from .block_mask import BlockMask
from .engines import ENGINES
from .grid import VideoGrid
from .patterns.score import sampled_rows
from .patterns.search import Search
from .patterns.select import top_k_rows

REPEATS, SECONDS = 10, 2.0  # of a call: as many as fit
SDPA = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention-2": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class Shape(NamedTuple):
    """Of one attention call of one video."""

    tokens: int
    heads: int
    dim: int


SHAPES = {
    "small": Shape(4_352, 12, 64),
    "wan-1.3b-480p": Shape(32_760, 12, 128),
    "wan-14b-720p": Shape(75_600, 40, 128),
    "hunyuanvideo-720p": Shape(118_860, 24, 128),
    "cogvideox-5b": Shape(17_776, 48, 64),
}


def bench(
    shape: Shape,
    density: float,
    block_size: int,
    precision: str,
    device: str,
    dtype: torch.dtype,
) -> Iterator[dict[str, Any]]:
    """Rows `name`, `part` (dense, sparse or search), `seconds`; `error` in place of what failed."""
    generator = torch.Generator(device).manual_seed(0)
    size = 1, shape.tokens, shape.heads, shape.dim
    query, key, value = torch.randn(3, *size, device=device, generator=generator).to(dtype)
    for name, call in dense_calls(query, key, value).items():
        yield timed(name, "dense", call, device)
    scores, mask = random_mask(shape, density, block_size, generator)
    for engine in ENGINES if device != "cpu" else ["torch"]:
        name = engine if precision == "full" else f"{engine}, {precision}"
        options = {"engine": engine, "precision": precision}
        call = partial(sparse_attention, query, key, value, mask, **options)
        yield timed(name, "sparse", call, device)
    search = Search(query, key, None, VideoGrid(1, 1, shape.tokens), layer=0)
    yield timed("sampled rows", "search", lambda: sampled_rows(search, block_size), device)
    yield timed("selection", "search", selection(shape, density, block_size, scores), device)


def dense_calls(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], Any]]:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))

    def by(backend: SDPBackend) -> Callable[[], Any]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return call

    if query.device.type == "cpu":
        return {"torch": lambda: F.scaled_dot_product_attention(q, k, v)}
    calls = {name: by(backend) for name, backend in SDPA.items()}
    if ENGINES["fa4"].missing(query.device) is None:
        from flash_attn.cute.interface import flash_attn_func

        calls["flash-attn-4"] = lambda: flash_attn_func(query, key, value)
    return calls


def random_mask(
    shape: Shape, density: float, block_size: int, generator: torch.Generator
) -> tuple[Tensor, BlockMask]:
    """Scores (1, H, N, N), and the mask of each row's best."""
    blocks = -(-shape.tokens // block_size)
    size = 1, shape.heads, blocks, blocks
    scores = torch.rand(*size, device=generator.device, generator=generator)
    return scores, selection(shape, density, block_size, scores)()


def selection(
    shape: Shape, density: float, block_size: int, scores: Tensor
) -> Callable[[], BlockMask]:
    blocks, device = scores.shape[-1], scores.device
    kept = torch.full((1, shape.heads), max(round(density * blocks), 1), device=device)
    forced = torch.eye(blocks, dtype=torch.bool, device=device)

    def call() -> BlockMask:
        chosen = top_k_rows(scores, kept, forced)
        return BlockMask.from_dense(chosen, shape.tokens, shape.tokens, (block_size,) * 2)

    return call


def timed(name: str, part: str, call: Callable[[], Any], device: str) -> dict[str, Any]:
    """Median seconds of a call, after one that is not counted."""
    row: dict[str, Any] = {"name": name, "part": part, "seconds": None}
    try:
        call()
        wait(device)
        seconds: list[float] = []
        end = time.perf_counter() + SECONDS
        while len(seconds) < REPEATS and (not seconds or time.perf_counter() < end):
            begun = time.perf_counter()
            call()
            wait(device)
            seconds.append(time.perf_counter() - begun)
        return row | {"seconds": statistics.median(seconds)}
    except (RuntimeError, ValueError) as error:  # torch.OutOfMemoryError is a RuntimeError
        return row | {"error": " ".join(str(error).split())[:200]}


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def summary(rows: list[dict[str, Any]], shape: Shape, density: float) -> list[dict[str, Any]]:
    """The rows with TFLOP/s of what was computed, and how often they fit into the fastest dense."""
    best = min(row["seconds"] for row in rows if row["part"] == "dense" and row["seconds"])
    work = 4.0 * shape.heads * shape.dim * shape.tokens**2
    found = []
    for row in rows:
        more: dict[str, Any] = {}
        if row["seconds"]:
            more["times_dense"] = best / row["seconds"]
        if row["seconds"] and row["part"] != "search":
            share = density if row["part"] == "sparse" else 1.0
            more["tflops"] = work * share / row["seconds"] / 1e12
        found.append(row | more)
    return found

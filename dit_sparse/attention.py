"""`sparse_attention`: checks its arguments, chooses an engine, makes one call."""

import logging
from functools import lru_cache
from typing import Literal, overload

import torch
from torch import Tensor

from . import reference
from .block_mask import BlockMask
from .config import PRECISIONS
from .engines import ENGINES, Problem, preferred, why_not

logger = logging.getLogger(__name__)

MAX_HEAD_DIM = 256


@overload
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    kv_len: Tensor | None = ...,
    scale: float | None = ...,
    engine: str = ...,
    precision: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    kv_len: Tensor | None = ...,
    scale: float | None = ...,
    engine: str = ...,
    precision: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    kv_len: Tensor | None = None,
    scale: float | None = None,
    engine: str = "auto",
    precision: str = "full",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each query block over the key blocks that `block_mask` lists.

    Args:
        query, key, value: (B, S, H, D), the same dtype and device, head dim up to 256, any strides.
            Query and key lengths may differ and need not divide the block.
        block_mask: mask for B (or 1) samples and H (or 1) heads.
        kv_len: (B,) valid keys of each sample; None where all are.
        scale: factor of the logits, 1 / sqrt(D) by default.
        engine: "triton" (our kernels), "fa4" (flash-attn-4, Hopper), "flex" (FlexAttention),
            "torch" (everywhere) or "auto". Each is compared with "torch" at its first use.
        precision: "full" or, for "triton" and "torch", "int8" (products of queries and keys in
            INT8) or "fp8" (all products in FP8, e4m3): one scale a block, keys less their mean; the
            log-sum-exp is that of the keys.
        return_lse: also return the log-sum-exp (B, H, Sq) float32, natural log.

    Returns:
        (B, Sq, H, D), and the log-sum-exp if asked for. A query block that keeps nothing gives
        0 and -inf.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an engine that cannot run here.
    """
    _check(query, key, value, block_mask, kv_len)
    engine = choose_engine(engine, query, block_mask, kv_len, precision)
    attend = ENGINES[engine].attend
    options = {"kv_len": kv_len, "scale": scale, "precision": precision}
    output, lse = attend(query, key, value, block_mask, **options)
    return (output, lse) if return_lse else output


def block_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    block_size: tuple[int, int],
    *,
    scale: float | None = None,
    engine: str = "auto",
) -> Tensor:
    """Softmax mass of each block, (B, H, Nq, Nk) float32; see `reference.block_mass`.

    Only our own kernels and torch compute it: other engines leave it to "auto".
    """
    if own_engine(engine, query, block_size) == "torch":
        return reference.block_mass(query, key, lse, block_size, scale)
    refuse_missing("triton", query.device)
    from .kernels.block_mass import block_mass as kernel

    return kernel(query, key, lse, block_size=block_size, scale=scale)


def own_engine(engine: str, query: Tensor, block_size: tuple[int, int]) -> str:
    """Whether "triton" or "torch" does what no other engine can; those leave it to "auto"."""
    if engine in ("torch", "triton"):
        return engine
    problem = Problem(query.device, query.dtype, query.shape[-1], block_size)
    usable = why_not("triton", problem) is None and disagreement("triton", problem) is None
    return "triton" if usable else "torch"


def choose_engine(
    engine: str,
    query: Tensor,
    block_mask: BlockMask,
    kv_len: Tensor | None = None,
    precision: str = "full",
) -> str:
    """The engine that will run: a forced one that cannot run raises, "auto" takes the best."""
    if engine != "auto" and engine not in ENGINES:
        raise ValueError(f"engine must be one of auto, {', '.join(ENGINES)}, got {engine!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    facts = query.device, query.dtype, query.shape[-1], block_mask.block_size
    problem = Problem(*facts, kv_len is not None, precision)
    if engine != "auto":
        reason = why_not(engine, problem) or disagreement(engine, problem)
        if reason is not None:
            raise ValueError(f"engine={engine!r} cannot run here: {reason}; use engine='auto'")
        return engine
    return _best_engine(problem)


@lru_cache(maxsize=64)
def _best_engine(problem: Problem) -> str:
    for name in preferred(problem):
        reason = why_not(name, problem)
        if reason is None and problem.device.type != "cuda":
            return "torch"  # the others serve a CPU in tests only
        reason = reason or disagreement(name, problem)
        if reason is None:
            if name == "torch" and problem.device.type == "cuda":
                logger.warning("torch computes sparse attention, which is slow on a GPU")
            return name
        if problem.device.type == "cuda":
            logger.warning("engine %s is not used: %s", name, reason)
    return "torch"


def refuse_missing(engine: str, device: torch.device | str) -> None:
    """Raise unless `engine` is installed and runs on `device`."""
    reason = ENGINES[engine].missing(device)
    if reason is not None:
        raise ValueError(f"engine={engine!r} cannot run here: {reason}; use engine='auto'")


@lru_cache(maxsize=64)
def disagreement(engine: str, problem: Problem) -> str | None:
    """First use on a GPU, dtype, head dim and block: None where a small mask comes out right."""
    if engine == "torch":
        return None
    arguments = _small_problem(problem)
    try:
        got, got_lse = ENGINES[engine].attend(
            *arguments[:4], kv_len=arguments[4], scale=None, precision=problem.precision
        )
    except torch.OutOfMemoryError:
        raise  # says nothing about the engine, and must not be remembered
    except Exception as failure:  # whatever fails in a compiler or a driver: do not use it
        text = " ".join(str(failure).split())[:300]
        return f"it failed on {problem.device}: {type(failure).__name__}: {text}"
    query, key, value, block_mask, kv_len = arguments
    exact, exact_lse = reference.sparse_attention(
        query.float(),
        key.float(),
        value.float(),
        block_mask,
        kv_len=kv_len,
        precision=problem.precision,
    )
    tolerance = 1e-4 if problem.dtype == torch.float32 else 3e-2
    error = (got.float() - exact).abs().max()
    lse_error = (got_lse - exact_lse).abs().max()
    if error < tolerance and lse_error < tolerance:
        return None
    return f"its output is wrong by {error:.2g} and its log-sum-exp by {lse_error:.2g}"


def _small_problem(problem: Problem):
    """Query, key, value, a mask whose last blocks are short, and lengths; every row keeps some."""
    device, dtype, head_dim, block_size, lengths, _ = problem
    generator = torch.Generator(device).manual_seed(0)
    length = 3 * max(block_size) + 5
    query, key, value = torch.randn(
        3, 1, length, 2, head_dim, device=device, generator=generator
    ).to(dtype)
    blocks = -(-length // block_size[0]), -(-length // block_size[1])
    mask = torch.rand(1, 2, *blocks, device=device, generator=generator) < 0.5
    mask[..., 0] = True
    block_mask = BlockMask.from_dense(mask, length, length, block_size)
    kv_len = torch.tensor([length - 2], device=device) if lengths else None
    return query, key, value, block_mask, kv_len


def _check(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, kv_len) -> None:
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            "query, key and value must be (B, S, H, D), key and value alike, got"
            f" {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    batch, q_len, heads, dim = query.shape
    if (batch, heads, dim) != (key.shape[0], key.shape[2], key.shape[3]) or dim > MAX_HEAD_DIM:
        raise ValueError(
            f"query and key must agree in batch, heads and head dim (at most {MAX_HEAD_DIM}), got"
            f" {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if (q_len, key.shape[1]) != (block_mask.q_len, block_mask.kv_len):
        raise ValueError(
            f"the mask is for {block_mask.q_len} queries and {block_mask.kv_len} keys,"
            f" got {q_len} and {key.shape[1]}"
        )
    mask_batch, mask_heads = block_mask.bits.shape[:2]
    if mask_batch not in (1, batch) or mask_heads not in (1, heads):
        raise ValueError(
            f"the mask is for {mask_batch} samples and {mask_heads} heads, got {batch} and {heads}"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"dtypes differ: {query.dtype}, {key.dtype}, {value.dtype}")
    if not query.device == key.device == value.device == block_mask.bits.device:
        raise ValueError(
            f"devices differ: query {query.device}, key {key.device}, value {value.device},"
            f" mask {block_mask.bits.device}"
        )
    if kv_len is not None and kv_len.shape != (batch,):
        raise ValueError(f"kv_len must be ({batch},), got {tuple(kv_len.shape)}")

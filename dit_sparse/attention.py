"""`sparse_attention`: checks its arguments, chooses an engine, makes one call."""

import logging
from functools import lru_cache
from typing import Literal, overload

import torch
from torch import Tensor

from . import reference
from .block_mask import BlockMask

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
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each query block over the key blocks that `block_mask` lists.

    Args:
        query, key, value: (B, S, H, D), the same dtype and device, head dim up to 256, any strides.
            Query and key lengths may differ and need not divide the block.
        block_mask: mask for B (or 1) samples and H (or 1) heads.
        kv_len: (B,) valid keys of each sample; None where all are.
        scale: factor of the logits, 1 / sqrt(D) by default.
        engine: "triton" (CUDA), "torch" (everywhere) or "auto".
        return_lse: also return the log-sum-exp (B, H, Sq) float32, natural log.

    Returns:
        (B, Sq, H, D), and the log-sum-exp if asked for. A query block that keeps nothing gives
        0 and -inf.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an engine that cannot run here.
    """
    _check(query, key, value, block_mask, kv_len)
    engine = choose_engine(engine, query, block_mask)
    attend = _triton if engine == "triton" else reference.sparse_attention
    output, lse = attend(query, key, value, block_mask, kv_len=kv_len, scale=scale)
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
    """Softmax mass of each block, (B, H, Nq, Nk) float32; see `reference.block_mass`."""
    if choose_engine(engine, query) == "triton":
        from .kernels.block_mass import block_mass as kernel

        return kernel(query, key, lse, block_size=block_size, scale=scale)
    return reference.block_mass(query, key, lse, block_size, scale)


def choose_engine(engine: str, query: Tensor, block_mask: BlockMask | None = None) -> str:
    """The engine that will run: a forced one that cannot run raises, "auto" takes the best."""
    if engine == "torch":
        return "torch"
    if engine not in ("auto", "triton"):
        raise ValueError(f"engine must be auto, triton or torch, got {engine!r}")
    if engine == "triton":
        refuse_missing_triton(query.device)
        return "triton"
    reason = why_not_triton(query.device)
    if reason is not None:
        if query.device.type == "cuda":
            _warn_once(f"{reason}: torch is used instead, which is slow on a GPU")
        return "torch"
    block_size = (64, 64) if block_mask is None else block_mask.block_size
    if _agrees_with_reference(query.device, query.dtype, query.shape[-1], block_size):
        return "triton"
    return "torch"


def refuse_missing_triton(device: torch.device | str) -> None:
    reason = why_not_triton(device)
    if reason is not None:
        raise ValueError(f"engine='triton' cannot run here: {reason}; use engine='auto'")


@lru_cache(maxsize=64)
def _warn_once(text: str) -> None:
    logger.warning(text)


def why_not_triton(device: torch.device | str) -> str | None:
    """None where our Triton kernels run on `device`, else the reason in a few words."""
    if torch.device(device).type != "cuda":
        return f"its kernels need a GPU and the tensors are on {torch.device(device).type}"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return None


def _triton(
    query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, *, kv_len, scale
) -> tuple[Tensor, Tensor]:
    from .kernels.block_sparse_fwd import block_sparse_fwd

    counts, indices = block_mask.indices()
    return block_sparse_fwd(
        query,
        key,
        value,
        counts,
        indices,
        block_size=block_mask.block_size,
        scale=scale,
        kv_len=None if kv_len is None else kv_len.to(query.device, torch.int32),
    )


@lru_cache(maxsize=64)
def _agrees_with_reference(
    device: torch.device, dtype: torch.dtype, head_dim: int, block_size: tuple[int, int]
) -> bool:
    """First use on a GPU, dtype, head dim and block: compare with the reference on a small mask."""
    generator = torch.Generator(device).manual_seed(0)
    length = 3 * max(block_size) + 5
    query, key, value = torch.randn(
        3, 1, length, 2, head_dim, device=device, generator=generator
    ).to(dtype)
    blocks = -(-length // block_size[0]), -(-length // block_size[1])
    mask = torch.rand(1, 2, *blocks, device=device, generator=generator) < 0.5
    mask[..., 0] = True
    block_mask = BlockMask.from_dense(mask, length, length, block_size)
    try:
        output, _ = _triton(query, key, value, block_mask, kv_len=None, scale=None)
    except Exception as error:  # whatever fails in a compiler or a driver: do not use it
        logger.warning("Triton kernels failed on %s (%s); torch is used instead", device, error)
        return False
    exact, _ = reference.sparse_attention(query.float(), key.float(), value.float(), block_mask)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    if (output.float() - exact).abs().max() < tolerance:
        return True
    logger.warning("Triton kernels are wrong on %s, %s; torch is used instead", device, dtype)
    return False


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

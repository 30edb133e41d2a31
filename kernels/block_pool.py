"""Mean of every block of tokens, one Triton kernel: `(B, S, H, D)` to `(B, H, N, D)`.

    pooled[n] = mean of x[n * block_size : (n + 1) * block_size], over the tokens that exist

Launch grid: (tiles of blocks, heads, batch). Bound by reading `x` once, of which a program takes
`TILE` tokens or one longer block. Keys and values are pooled by one launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dot import BLOCK_SIZES, check_index, check_tensors, load_tile, padded_head_dim

POOLED_SIZES = (16, *BLOCK_SIZES)
TILE = 64


@triton.jit
def pool_blocks(
    x,
    pooled_ptr,
    strides,
    seqlen,
    num_blocks,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    first, head, batch = tl.program_id(0) * AT_ONCE, tl.program_id(1), tl.program_id(2)
    ROWS: tl.constexpr = AT_ONCE * BLOCK
    tile = load_tile(
        x, strides, batch, head, first * BLOCK, seqlen, HEAD_DIM, BLOCK_D, ROWS, False, MASKED=True
    )
    blocks = first + tl.arange(0, AT_ONCE)
    count = tl.maximum(tl.minimum(seqlen - blocks * BLOCK, BLOCK), 1)  # nothing valid: the sum is 0
    sums = tl.sum(tile.to(tl.float32).reshape(AT_ONCE, BLOCK, BLOCK_D), 1)  # (AT_ONCE, BLOCK_D)
    means = sums / count.to(tl.float32)[:, None]

    rows = (batch.to(tl.int64) * tl.num_programs(1) + head) * num_blocks + blocks
    dims = tl.arange(0, BLOCK_D)
    tl.store(
        pooled_ptr + rows[:, None] * HEAD_DIM + dims[None, :],
        means.to(pooled_ptr.dtype.element_ty),
        mask=(blocks < num_blocks)[:, None] & (dims < HEAD_DIM)[None, :],
    )


@triton.jit(do_not_specialize=["seqlen"])
def block_pool_kernel(
    x,
    other,
    pooled_ptr,
    other_pooled_ptr,
    kv_len_ptr,
    strides,
    other_strides,
    seqlen,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    blocks = tl.cdiv(seqlen, BLOCK)
    if kv_len_ptr is not None:
        seqlen = tl.minimum(tl.load(kv_len_ptr + tl.program_id(2)), seqlen)
    pool_blocks(x, pooled_ptr, strides, seqlen, blocks, HEAD_DIM, BLOCK_D, BLOCK, AT_ONCE)
    if other is not None:
        pool_blocks(
            other,
            other_pooled_ptr,
            other_strides,
            seqlen,
            blocks,
            HEAD_DIM,
            BLOCK_D,
            BLOCK,
            AT_ONCE,
        )


def block_pool(x: Tensor, block_size: int, kv_len: Tensor | None = None) -> Tensor:
    """Mean over the valid tokens of each block.

    Args:
        x: `(B, S, H, D)`, bfloat16, float16 or float32, any strides.
        block_size: tokens a block: 16, 32, 64 or 128. The last block may be short.
        kv_len: `(B,)` int32, valid tokens per sample; all by default. A block without any is 0.

    Returns:
        `(B, H, N, D)` in float32, N = ceil(S / block_size).
    """
    return _pool([x], block_size, kv_len, torch.float32)[0]


def pool_keys_values(
    key: Tensor, value: Tensor, block_size: int, kv_len: Tensor | None = None
) -> list[Tensor]:
    """The same of keys and of values, which have one shape and dtype, in their dtype."""
    return _pool([key, value], block_size, kv_len, key.dtype)


def _pool(
    tensors: list[Tensor], block_size: int, kv_len: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    """One or two tensors of one shape."""
    x = tensors[0]
    check_tensors(**dict(zip(("x", "other"), tensors)))
    if block_size not in POOLED_SIZES:
        raise ValueError(
            f"block_size must be one of {POOLED_SIZES}, got {block_size}. Choose one of these."
        )
    batch, seqlen, heads, head_dim = x.shape
    if kv_len is not None:
        check_index("kv_len", kv_len, (batch,), (torch.int32,), x.device)
        kv_len = kv_len.contiguous()
    tensors = [t if t.stride(3) == 1 else t.contiguous() for t in tensors]
    blocks, at_once = -(-seqlen // block_size), max(TILE // block_size, 1)
    shape = batch, heads, blocks, head_dim
    pooled = [torch.empty(shape, dtype=dtype, device=x.device) for _ in tensors]
    with torch.cuda.device_of(x):
        block_pool_kernel[(-(-blocks // at_once), heads, batch)](
            x=tensors[0],
            other=tensors[1] if tensors[1:] else None,
            pooled_ptr=pooled[0],
            other_pooled_ptr=pooled[1] if tensors[1:] else None,
            kv_len_ptr=kv_len,
            strides=tensors[0].stride(),
            other_strides=tensors[-1].stride(),
            seqlen=seqlen,
            HEAD_DIM=head_dim,
            BLOCK_D=padded_head_dim(head_dim),
            BLOCK=block_size,
            AT_ONCE=at_once,
            num_warps=4,
        )
    return pooled

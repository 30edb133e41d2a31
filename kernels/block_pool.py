"""Mean of every block of tokens, one Triton kernel: `(B, S, H, D)` to `(B, H, N, D)`.

    pooled[n] = mean of x[n * block_size : (n + 1) * block_size], over the tokens that exist

Launch grid: (blocks, heads, batch). Bound by reading `x` once. Keys and values are pooled by one
launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dot import BLOCK_SIZES, check_index, check_tensors, load_tile, padded_head_dim


@triton.jit
def pool_block(
    x,
    pooled_ptr,
    strides,
    seqlen,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = block * BLOCK
    tile = load_tile(
        x, strides, batch, head, start, seqlen, HEAD_DIM, BLOCK_D, BLOCK, False, MASKED=True
    )
    count = tl.maximum(tl.minimum(seqlen - start, BLOCK), 1)  # nothing valid: the sum is 0
    mean = tl.sum(tile.to(tl.float32), 0) / count.to(tl.float32)  # (BLOCK_D,)

    row = (batch.to(tl.int64) * tl.num_programs(1) + head) * tl.num_programs(0) + block
    dims = tl.arange(0, BLOCK_D)
    mean = mean.to(pooled_ptr.dtype.element_ty)
    tl.store(pooled_ptr + row * HEAD_DIM + dims, mean, mask=dims < HEAD_DIM)


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
):
    if kv_len_ptr is not None:
        seqlen = tl.minimum(tl.load(kv_len_ptr + tl.program_id(2)), seqlen)
    pool_block(x, pooled_ptr, strides, seqlen, HEAD_DIM, BLOCK_D, BLOCK)
    if other is not None:
        pool_block(other, other_pooled_ptr, other_strides, seqlen, HEAD_DIM, BLOCK_D, BLOCK)


def block_pool(x: Tensor, block_size: int, kv_len: Tensor | None = None) -> Tensor:
    """Mean over the valid tokens of each block.

    Args:
        x: `(B, S, H, D)`, bfloat16, float16 or float32, any strides.
        block_size: tokens a block: 32, 64 or 128. The last block may be short.
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
    if block_size not in BLOCK_SIZES:
        raise ValueError(
            f"block_size must be one of {BLOCK_SIZES}, got {block_size}. Choose one of these."
        )
    batch, seqlen, heads, head_dim = x.shape
    if kv_len is not None:
        check_index("kv_len", kv_len, (batch,), (torch.int32,), x.device)
        kv_len = kv_len.contiguous()
    tensors = [t if t.stride(3) == 1 else t.contiguous() for t in tensors]
    blocks = -(-seqlen // block_size)
    shape = batch, heads, blocks, head_dim
    pooled = [torch.empty(shape, dtype=dtype, device=x.device) for _ in tensors]
    with torch.cuda.device_of(x):
        block_pool_kernel[(blocks, heads, batch)](
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
            num_warps=4,
        )
    return pooled

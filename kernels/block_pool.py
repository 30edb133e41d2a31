"""Mean of every block of tokens, one Triton kernel: `(B, S, H, D)` to `(B, H, N, D)` in float32.

    pooled[n] = mean of x[n * block_size : (n + 1) * block_size], over the tokens that exist

Launch grid: (blocks, heads, batch). Bound by reading `x` once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dot import BLOCK_SIZES, check_tensors, load_tile, padded_head_dim


@triton.jit(do_not_specialize=["seqlen"])
def block_pool_kernel(
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
    count = tl.minimum(seqlen - start, BLOCK)
    mean = tl.sum(tile.to(tl.float32), 0) / count.to(tl.float32)  # (BLOCK_D,)

    row = (batch.to(tl.int64) * tl.num_programs(1) + head) * tl.num_programs(0) + block
    dims = tl.arange(0, BLOCK_D)
    tl.store(pooled_ptr + row * HEAD_DIM + dims, mean, mask=dims < HEAD_DIM)


def block_pool(x: Tensor, block_size: int) -> Tensor:
    """Mean over the valid tokens of each block.

    Args:
        x: `(B, S, H, D)`, bfloat16, float16 or float32, any strides.
        block_size: tokens a block: 32, 64 or 128. The last block may be short.

    Returns:
        `(B, H, N, D)` in float32, N = ceil(S / block_size).
    """
    check_tensors(x=x)
    if block_size not in BLOCK_SIZES:
        raise ValueError(
            f"block_size must be one of {BLOCK_SIZES}, got {block_size}. Choose one of these."
        )
    batch, seqlen, heads, head_dim = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    blocks = triton.cdiv(seqlen, block_size)
    pooled = torch.empty((batch, heads, blocks, head_dim), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        block_pool_kernel[(blocks, heads, batch)](
            x=x,
            pooled_ptr=pooled,
            strides=x.stride(),
            seqlen=seqlen,
            HEAD_DIM=head_dim,
            BLOCK_D=padded_head_dim(head_dim),
            BLOCK=block_size,
            num_warps=4,
        )
    return pooled

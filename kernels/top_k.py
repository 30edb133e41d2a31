"""The best blocks of every row of a score map as a bool mask, one Triton kernel.

One program a row, which stays in registers: the k-th largest score is found bit by bit (32 counts,
no sort), ties go to the lower index. Beside a sort this is nothing, and nothing waits for the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dot

MAX_BLOCKS = 16384  # of a row


@triton.jit
def best_blocks(score, forced, exists, kept):
    # The `kept` largest of one row, forced ones first, as a mask.
    # Bits of a float as an unsigned number of the same order: the sign is flipped, and below zero
    # all bits. Forced blocks come first, those that do not exist last.
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    rank = bits.to(tl.uint32, bitcast=True) ^ 0x80000000
    rank = tl.where(forced, 0xFFFFFFFF, rank).to(tl.uint32)
    rank = tl.where(exists, rank, 0).to(tl.uint32)

    least = tl.full((), 0, tl.uint32)  # the kept-th largest rank
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in tl.range(0, 32):
        candidate = least | bit
        count = tl.sum((rank >= candidate).to(tl.int32), 0)
        least = tl.where(count >= kept, candidate, least)
        bit = bit >> 1
    above = rank > least
    tied = ((rank == least) & exists).to(tl.int32)
    room = kept - tl.sum(above.to(tl.int32), 0)
    return above | ((tied != 0) & (tl.cumsum(tied, 0) <= room)) | forced


def warps_of_row(width: int) -> int:
    """One where it holds the row: each of 32 counts of several would wait at a barrier."""
    return max(1, min(8, width // 512))


@triton.jit(do_not_specialize=["rows", "blocks"])
def top_k_kernel(
    scores_ptr,
    kept_ptr,
    forced_ptr,
    mask_ptr,
    scores_strides,
    rows,
    blocks,
    heads,
    BLOCKS: tl.constexpr,
):
    row, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    block = tl.arange(0, BLOCKS)
    exists = block < blocks
    scores_row = (
        scores_ptr
        + batch.to(tl.int64) * scores_strides[0]
        + head.to(tl.int64) * scores_strides[1]
        + row.to(tl.int64) * scores_strides[2]
    )
    score = tl.load(scores_row + block * scores_strides[3], mask=exists, other=float("-inf"))
    forced = tl.load(forced_ptr + row.to(tl.int64) * blocks + block, mask=exists, other=0) != 0
    kept = tl.load(kept_ptr + batch * heads + head).to(tl.int32)
    chosen = best_blocks(score, forced, exists, kept)
    mask_row = mask_ptr + ((batch.to(tl.int64) * heads + head) * rows + row) * blocks
    tl.store(mask_row + block, chosen.to(tl.int8), mask=exists)


def top_k(scores: Tensor, kept: Tensor, forced: Tensor) -> Tensor:
    """The `kept` best blocks of every row, forced ones first.

    Args:
        scores: `(B, H, Nq, Nkv)` float32, higher is better, no NaN.
        kept: `(B, H)` blocks kept in each row of a head, at least 1.
        forced: `(Nq, Nkv)` bool, kept whatever their score; they count towards `kept`.

    Returns:
        `(B, H, Nq, Nkv)` bool.
    """
    dot.check_device("scores", scores)
    batch, heads, rows, blocks = scores.shape
    if scores.dtype != torch.float32 or blocks > MAX_BLOCKS:
        raise ValueError(
            f"scores must be float32 with rows of up to {MAX_BLOCKS} blocks, got {scores.dtype}"
            f" {tuple(scores.shape)}. Use torch.topk."
        )
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    width = triton.next_power_of_2(blocks)
    with torch.cuda.device_of(scores):
        top_k_kernel[(rows, heads, batch)](
            scores_ptr=scores,
            kept_ptr=kept.contiguous(),
            forced_ptr=forced.contiguous().view(torch.int8),
            mask_ptr=mask.view(torch.int8),
            scores_strides=scores.stride(),
            rows=rows,
            blocks=blocks,
            heads=heads,
            BLOCKS=width,
            num_warps=warps_of_row(width),
        )
    return mask

"""AdaSpa's selection from block mass to packed masks in four small launches, nothing read back.

    select_rows    each row's best blocks as bits, its kept tokens and its kept share of the mass
    head_budgets   which heads give half of their budget to which others, from those shares
    select_rows    again, with the budgets of the heads
    head_sums      density and kept mass of each head, mean over samples

The rule is that of `patterns/adaspa.py`, whose plain torch it equals mask by mask. `work_order` is
`BlockMask.work_order`: places are counted instead of sorted.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dot
from .top_k import MAX_BLOCKS, best_blocks, warps_of_row

CHUNK = 128  # rows at once where they are summed or ranked


@triton.jit(do_not_specialize=["rows", "blocks", "last_tokens"])
def select_rows_kernel(
    scores_ptr,
    kept_ptr,
    forced_ptr,
    bits_ptr,
    tokens_ptr,
    share_ptr,
    rows,
    blocks,
    last_tokens,
    block_tokens,
    BLOCKS: tl.constexpr,
):
    row, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    of_head = batch.to(tl.int64) * tl.num_programs(1) + head
    of_row = of_head * rows + row
    block = tl.arange(0, BLOCKS)
    exists = block < blocks
    score = tl.load(scores_ptr + of_row * blocks + block, mask=exists, other=float("-inf"))
    forced = tl.load(forced_ptr + row.to(tl.int64) * blocks + block, mask=exists, other=0) != 0
    chosen = best_blocks(score, forced, exists, tl.load(kept_ptr + of_head))
    mass = tl.where(exists, score, 0.0)
    share = tl.sum(tl.where(chosen, mass, 0.0), 0) / tl.maximum(tl.sum(mass, 0), 1e-20)
    tl.store(share_ptr + of_row, share)
    length = tl.where(block == blocks - 1, last_tokens, block_tokens)
    tl.store(tokens_ptr + of_row, tl.sum(tl.where(chosen, length, 0), 0))
    bit = chosen.to(tl.int32) << (block % 8)
    byte = tl.arange(0, BLOCKS // 8)
    packed = tl.sum(bit.reshape(BLOCKS // 8, 8), 1)
    row_bytes = tl.cdiv(blocks, 8)
    tl.store(bits_ptr + of_row * row_bytes + byte, packed.to(tl.uint8), mask=byte < row_bytes)


@triton.jit(do_not_specialize=["heads", "rows", "low", "usual", "high"])
def head_budgets_kernel(
    share_ptr,
    kept_ptr,
    heads,
    rows,
    low,
    usual,
    high,
    threshold,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) * heads
    head, place = tl.arange(0, HEADS), tl.arange(0, CHUNK)
    total = tl.zeros((HEADS, CHUNK), tl.float32)
    for first in tl.range(0, rows, CHUNK):
        row = first + place
        there = (head < heads)[:, None] & (row < rows)[None, :]
        total += tl.load(
            share_ptr + (sample + head)[:, None] * rows + row[None, :], mask=there, other=0.0
        )
    recall = tl.where(head < heads, tl.sum(total, 1) / rows, -1.0)  # others rank last
    before = recall[None, :] > recall[:, None]
    before |= (recall[None, :] == recall[:, None]) & (head[None, :] < head[:, None])
    rank = tl.sum(before.to(tl.int32), 1)  # 0 keeps most
    levels = tl.minimum(tl.sum((recall > threshold).to(tl.int32), 0), heads // 2)
    kept = tl.where(rank < levels, low, tl.where(rank >= heads - levels, high, usual))
    tl.store(kept_ptr + sample + head, kept, mask=head < heads)


@triton.jit(do_not_specialize=["batch", "heads", "rows", "last_rows"])
def head_sums_kernel(
    tokens_ptr,
    share_ptr,
    density_ptr,
    mass_ptr,
    batch,
    heads,
    rows,
    last_rows,
    block_rows,
    kv_len,
    CHUNK: tl.constexpr,
):
    head = tl.program_id(0)
    place = tl.arange(0, CHUNK)
    pairs = tl.zeros((CHUNK,), tl.float32)
    mass = tl.zeros((CHUNK,), tl.float32)
    for sample in tl.range(0, batch):
        of_head = (sample * heads + head) * rows
        for first in tl.range(0, rows, CHUNK):
            row = first + place
            kept = tl.load(tokens_ptr + of_head + row, mask=row < rows, other=0).to(tl.float32)
            queries = tl.where(row == rows - 1, last_rows, block_rows)
            pairs += kept / kv_len * queries
            mass += tl.load(share_ptr + of_head + row, mask=row < rows, other=0.0)
    q_len = (rows - 1) * block_rows + last_rows
    tl.store(density_ptr + head, tl.sum(pairs, 0) / (q_len * batch))
    tl.store(mass_ptr + head, tl.sum(mass, 0) / (rows * batch))


def select_rows(
    scores: Tensor,
    kept: Tensor,
    forced: Tensor,
    lengths: tuple[int, int],
    block_size: int,
    budgets: tuple[int, int, int, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best blocks of every row, packed.

    Args:
        scores: `(B, H, Nq, Nkv)` float32, not negative, no NaN.
        kept: `(B, H)` int32, blocks kept in each row of a head, at least 1.
        forced: `(Nq, Nkv)` bool, kept whatever their score; they count towards `kept`.
        lengths: queries and keys in tokens, in blocks of `block_size`.
        budgets: select twice, the second time so many blocks in heads that give, in others and in
            heads that take; heads give whose kept share is above the last entry.

    Returns:
        Bits `(B, H, Nq, ceil(Nkv / 8))` uint8, density `(H,)` and kept mass `(H,)` float32.
    """
    dot.check_device("scores", scores)
    batch, heads, rows, blocks = scores.shape
    if scores.dtype != torch.float32 or blocks > MAX_BLOCKS:
        raise ValueError(
            f"scores must be float32 with rows of up to {MAX_BLOCKS} blocks, got {scores.dtype}"
            f" {tuple(scores.shape)}. Select with patterns.select.top_k_rows."
        )
    device, scores, forced = scores.device, scores.contiguous(), forced.contiguous()
    width = max(8, triton.next_power_of_2(blocks))
    bits = torch.empty((batch, heads, rows, -(-blocks // 8)), dtype=torch.uint8, device=device)
    tokens = torch.empty((batch, heads, rows), dtype=torch.int32, device=device)
    share = torch.empty((batch, heads, rows), dtype=torch.float32, device=device)
    density, mass = torch.empty((2, heads), dtype=torch.float32, device=device)
    last_rows, last_tokens = (
        length - (count - 1) * block_size for length, count in zip(lengths, (rows, blocks))
    )

    def select() -> None:
        select_rows_kernel[(rows, heads, batch)](
            scores_ptr=scores,
            kept_ptr=kept,
            forced_ptr=forced.view(torch.int8),
            bits_ptr=bits,
            tokens_ptr=tokens,
            share_ptr=share,
            rows=rows,
            blocks=blocks,
            last_tokens=last_tokens,
            block_tokens=block_size,
            BLOCKS=width,
            num_warps=warps_of_row(width),
        )

    with torch.cuda.device_of(scores):
        select()
        if budgets is not None:
            low, usual, high, threshold = budgets
            kept = torch.empty_like(kept)
            head_budgets_kernel[(batch,)](
                share_ptr=share,
                kept_ptr=kept,
                heads=heads,
                rows=rows,
                low=low,
                usual=usual,
                high=high,
                threshold=threshold,
                HEADS=triton.next_power_of_2(heads),
                CHUNK=CHUNK,
                num_warps=8,
            )
            select()
        head_sums_kernel[(heads,)](
            tokens_ptr=tokens,
            share_ptr=share,
            density_ptr=density,
            mass_ptr=mass,
            batch=batch,
            heads=heads,
            rows=rows,
            last_rows=last_rows,
            block_rows=block_size,
            kv_len=float(lengths[1]),
            CHUNK=CHUNK,
            num_warps=4,
        )
    return bits, density, mass


@triton.jit(do_not_specialize=["heads", "rows"])
def work_order_kernel(
    counts_ptr, totals_ptr, order_ptr, heads, rows, HEADS: tl.constexpr, CHUNK: tl.constexpr
):
    head = tl.program_id(1)
    other = tl.arange(0, HEADS)
    totals = tl.load(totals_ptr + other, mask=other < heads, other=-1)
    mine = tl.load(totals_ptr + head)
    first = (totals > mine) | ((totals == mine) & (other < head))
    head_place = tl.sum(first.to(tl.int32), 0)
    row = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    counts_head = counts_ptr + head.to(tl.int64) * rows
    count = tl.load(counts_head + row, mask=row < rows, other=-1)
    place = tl.zeros((CHUNK,), tl.int32)
    for start in tl.range(0, rows, CHUNK):
        other_row = start + tl.arange(0, CHUNK)
        others = tl.load(counts_head + other_row, mask=other_row < rows, other=-1)
        before = others[None, :] > count[:, None]
        before |= (others[None, :] == count[:, None]) & (other_row[None, :] < row[:, None])
        place += tl.sum(before.to(tl.int32), 1)
    tl.store(order_ptr + head_place * rows + place, head * rows + row, mask=row < rows)


def work_order(counts: Tensor) -> Tensor:
    """Rows `(B * H * Nq,)` int32 of `counts (B, H, Nq)` int32 by the rule of `BlockMask`."""
    dot.check_device("counts", counts)
    counts = counts.flatten(0, 1)
    heads, rows = counts.shape
    order = torch.empty(heads * rows, dtype=torch.int32, device=counts.device)
    with torch.cuda.device_of(counts):
        work_order_kernel[(triton.cdiv(rows, CHUNK), heads)](
            counts_ptr=counts,
            totals_ptr=counts.sum(-1),
            order_ptr=order,
            heads=heads,
            rows=rows,
            HEADS=triton.next_power_of_2(heads),
            CHUNK=CHUNK,
            num_warps=4,
        )
    return order

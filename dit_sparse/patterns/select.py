"""Selectors: from scores of blocks to the blocks that are kept."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..block_mask import BlockMask, triton_is_installed
from ..grid import VideoGrid

MAX_FUSED_BLOCKS = 16384  # of a row, in one program of our kernels


def top_k_rows(scores: Tensor, kept: Tensor, forced: Tensor, most: int | None = None) -> Tensor:
    """The best blocks of every row.

    Args:
        scores: (B, H, N, N), higher is better.
        kept: (B, H) int64, blocks kept in each row of a head.
        forced: (N, N) bool, blocks kept whatever their score. They count towards `kept`; a row
            that is forced to keep more, keeps more.
        most: no entry of `kept` is larger. None asks `kept`, which waits for a GPU.

    Returns:
        (B, H, N, N) bool.
    """
    if scores.is_cuda and scores.dtype == torch.float32 and triton_is_installed():
        from ..kernels.top_k import MAX_BLOCKS, top_k

        if scores.shape[-1] <= MAX_BLOCKS:
            return top_k(scores, kept, forced)
    largest = int(kept.max()) if most is None else most
    best = scores.masked_fill(forced, torch.inf).topk(largest, dim=-1).indices
    within = torch.arange(largest, device=scores.device) < kept[..., None, None]
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask.scatter_(-1, best, within.expand_as(best))
    return mask | forced


def packs(scores: Tensor) -> bool:
    """Whether `pack_rows` serves scores like these."""
    fits = scores.dtype == torch.float32 and scores.shape[-1] <= MAX_FUSED_BLOCKS
    return scores.is_cuda and triton_is_installed() and fits


def pack_rows(
    mass: Tensor,
    kept: Tensor,
    forced: Tensor,
    tokens: int,
    block_size: int,
    budgets: tuple[int, int, int, float] | None = None,
) -> tuple[BlockMask, Tensor]:
    """`top_k_rows`, packing and `kept_share` in a few launches, without a bool mask.

    Args:
        mass: (B, H, N, N), not negative.
        kept: (B, H) blocks in each row of a head, at least 1.
        budgets: of AdaSpa's levels; see `kernels/select_rows.py`.

    Returns:
        The mask, and the share of the mass inside it, mean over samples, (H,).
    """
    from ..kernels.select_rows import select_rows

    size, lengths = (block_size, block_size), (tokens, tokens)
    bits, density, share = select_rows(mass, kept.int(), forced, lengths, block_size, budgets)
    return BlockMask(bits, *lengths, size, mass.shape[-1], density), share


def top_density_rows(scores: Tensor, density: float, forced: Tensor) -> Tensor:
    """The best blocks of every row, as many in each head; forced ones count."""
    blocks = scores.shape[-1]
    kept = blocks_of(torch.full(scores.shape[:2], density, device=scores.device), blocks)
    return top_k_rows(scores, kept, forced, most_blocks(density, blocks))


def quota_rows(scores: Tensor, kept: Tensor, segments: Tensor, forced: Tensor) -> Tensor:
    """The best blocks of every row, chosen in each segment of the keys for itself.

    Args:
        scores: (B, H, N, N), higher is better.
        kept: (B, H, number of segments) int64, blocks kept in each row; a segment that has fewer
            keeps them all.
        segments: (N,) int64, the segment of each key block, such as `segments_of` gives.
        forced: (N, N) bool, blocks kept whatever their score; they count in their segment.

    Returns:
        (B, H, N, N) bool.
    """
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for segment in range(kept.shape[-1]):
        blocks = (segments == segment).nonzero().flatten()
        if len(blocks) == 0:  # a video without text has no such segment, and a kernel no such row
            continue
        quota = kept[..., segment].clamp(max=len(blocks))
        mask[..., blocks] = top_k_rows(scores[..., blocks], quota, forced[:, blocks])
    return mask


def top_k_map(
    scores: Tensor, kept: Tensor, forced: Tensor, row_floor: int = 0, most: int | None = None
) -> Tensor:
    """The best blocks of a head's whole map, whatever their row (DraftAttention's rule).

    Args:
        scores: (B, H, N, N), higher is better.
        kept: (B, H) int64, blocks kept in the map of a head.
        forced: (N, N) bool, blocks kept whatever their score; they count towards `kept`.
        row_floor: the best so many blocks of each row (forced ones first) are kept too, and count.
        most: no entry of `kept` is larger. None asks `kept`, which waits for a GPU.

    Returns:
        (B, H, N, N) bool.
    """
    floor = min(row_floor, scores.shape[-1])
    first = top_k_rows(scores, torch.full_like(kept, floor), forced, floor)
    ranked = scores.masked_fill(first, torch.inf).flatten(2)
    largest = int(kept.max()) if most is None else most
    best = ranked.topk(largest, dim=-1).indices
    within = torch.arange(largest, device=scores.device) < kept[..., None]
    mask = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, best, within)
    return mask.view_as(scores) | first


def top_p_rows(
    scores: Tensor, share: float, forced: Tensor, floor: int = 1, cap: int | None = None
) -> Tensor:
    """The fewest blocks of each row that hold `share` of its scores (FlexPrefill, XAttention).

    Args:
        scores: (B, H, N, N), not negative.
        forced: (N, N) bool, blocks that are taken first and always kept.
        floor, cap: fewest and most blocks in a row; forced blocks may exceed the cap.

    Returns:
        (B, H, N, N) bool.
    """
    ranked = scores.masked_fill(forced, torch.inf).argsort(dim=-1, descending=True, stable=True)
    sums = scores.gather(-1, ranked).cumsum(-1)
    before = sums.roll(1, -1)  # what the better blocks hold
    before[..., 0] = 0
    within = before < share * sums[..., -1:]
    place = torch.arange(scores.shape[-1], device=scores.device)
    within = (within | (place < floor)) & (place < (cap or scores.shape[-1]))
    return torch.zeros_like(within).scatter_(-1, ranked, within) | forced


def above(scores: Tensor, threshold: float | Tensor, forced: Tensor, row_floor: int = 1) -> Tensor:
    """Blocks that score at least `threshold`, and the best `row_floor` of each row; a bool mask."""
    kept = torch.full(scores.shape[:2], row_floor, device=scores.device)
    return (scores >= threshold) | top_k_rows(scores, kept, forced)


def best(scores: Tensor, count: int) -> Tensor:
    """The `count` largest along the last axis, bool."""
    index = scores.topk(min(count, scores.shape[-1]), -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True)


def segments_of(grid: VideoGrid, block_size: int, device: torch.device) -> Tensor:
    """Segment of each block, (N,) int64: 0 text, 1 conditioning frames, 2 generated frames.

    A block that lies in two segments counts to the first of them.
    """
    segments = torch.full((grid.num_blocks(block_size),), 2, device=device)
    conditioning, text = grid.conditioning_blocks(block_size), grid.text_blocks(block_size)
    segments[conditioning.start : conditioning.stop] = 1
    segments[text.start : text.stop] = 0
    return segments


@lru_cache(maxsize=16)  # every layer asks for the same
def forced_blocks(
    grid: VideoGrid,
    block_size: int,
    device: torch.device,
    own: bool = True,
    text_queries: bool = True,
) -> Tensor:
    """Blocks that are always kept, (N, N) bool; kept for the next call, so not to be changed.

    A row's own block unless `own` is False, and all that touch text or a conditioning frame; with
    `text_queries` False rows of text read text and conditioning frames alone.
    """
    blocks_in_all = grid.num_blocks(block_size)
    forced = torch.zeros(blocks_in_all, blocks_in_all, dtype=torch.bool, device=device)
    forced.fill_diagonal_(own)
    text, conditioning = grid.text_blocks(block_size), grid.conditioning_blocks(block_size)
    for blocks, rows in ((text, text_queries), (conditioning, True)):
        forced[:, blocks.start : blocks.stop] = True
        if rows:
            forced[blocks.start : blocks.stop, :] = True
    return forced


def blocks_of(density: Tensor, num_blocks: int) -> Tensor:
    """Blocks kept in each row of `num_blocks`, int64, at least one; `density` of any shape."""
    return (density * num_blocks).round().long().clamp(1, num_blocks)


def most_blocks(density: float, num_blocks: int) -> int:
    """No density up to this one keeps more blocks of a row, however it is rounded."""
    return min(num_blocks, max(1, math.ceil(density * num_blocks) + 1))


def most_kept(density: float, scores: Tensor) -> int:
    """Blocks that a row of `scores` may keep, at least one: for `top_p_rows`."""
    return int(blocks_of(torch.tensor(density), scores.shape[-1]))


def kept_share(mass: Tensor, mask: Tensor) -> Tensor:
    """Share of each head's mass inside the mask, mean over query blocks, (B, H).

    Normalised by the mass of each row and not by its number of queries: with a log-sum-exp from
    an earlier step a row no longer sums to that number.
    """
    return ((mass * mask).sum(-1) / mass.sum(-1).clamp_min(1e-20)).mean(-1)

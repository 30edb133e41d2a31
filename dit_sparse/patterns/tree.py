"""Blocks found from coarse to fine: chunks of blocks are ranked, then what is in the best.

Only blocks of video take part; those that touch text are always kept anyway.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grid import VideoGrid
from ..reference import block_pool
from .score import Scores
from .search import Search
from .select import best


def video_blocks(grid: VideoGrid, block_size: int) -> slice:
    """Blocks that hold no text, all next to each other."""
    text = grid.text_blocks(block_size)
    if grid.text_first and text:
        return slice(text.stop, grid.num_blocks(block_size))
    return slice(0, text.start if text else grid.num_blocks(block_size))


def chunk_means(x: Tensor, size: int) -> Tensor:
    """Means of `size` consecutive rows of (B, H, N, D); the last may be of fewer."""
    return block_pool(x.transpose(1, 2), size)


def chunk_middles(x: Tensor, size: int) -> Tensor:
    """The middle one of `size` consecutive rows, the last of what is there."""
    middle = torch.arange(0, x.shape[2], size, device=x.device) + size // 2
    return x[:, :, middle.clamp(max=x.shape[2] - 1)]


def tree_logits(
    search: Search, block_size: int, kept: int, fan_out: int, middles: bool = False
) -> Scores:
    """Logits of the blocks that a search from coarse to fine arrives at, -inf for all others.

    From the coarsest level that has more than `kept` chunks on, each row keeps its best `kept`, and
    only their parts are ranked at the next, down to single blocks. Cost: the product of block mean
    queries with the keys of all levels.

    Args:
        kept: chunks that a row keeps at each level.
        fan_out: parts of a chunk.
        middles: a chunk is judged by the key of its middle token, not by the mean of its keys.
    """
    grid = search.grid
    blocks, video = grid.num_blocks(block_size), video_blocks(grid, block_size)
    scores = search.query.new_full(
        (search.query.shape[0], search.query.shape[2], blocks, blocks),
        -torch.inf,
        dtype=torch.float32,
    )
    count = video.stop - video.start
    if count == 0:
        return scores, 0.0
    query = block_pool(search.query, block_size)
    keys = middle_keys(search, block_size) if middles else block_pool(search.key, block_size)
    keys = keys[:, :, video]
    level = 0
    while -(-count // fan_out ** (level + 1)) > kept:
        level += 1
    allowed, products = None, 0
    for depth in range(level, -1, -1):
        size = fan_out**depth
        chunks = (chunk_middles if middles else chunk_means)(keys, size)
        logits = query @ chunks.mT * query.shape[-1] ** -0.5
        products += logits.shape[-1] * blocks
        if allowed is not None:  # parts of what was kept one level above
            parts = allowed.repeat_interleave(fan_out, -1)[..., : logits.shape[-1]]
            logits = logits.masked_fill(~parts, -torch.inf)
        allowed = best(logits, kept)
    scores[..., video] = logits
    return scores, products / (2 * grid.tokens**2)


def middle_keys(search: Search, block_size: int) -> Tensor:
    """The key of each block's middle token, (B, H, N, D) float32."""
    start = torch.arange(0, search.grid.tokens, block_size, device=search.key.device)
    end = (start + block_size).clamp(max=search.grid.tokens)
    return search.key[:, (start + end) // 2].transpose(1, 2).float()


def best_regions(search: Search, block_size: int, region: int, density: float) -> Scores:
    """Regions of `region` blocks, ranked by the products of their means (BiFormer).

    Returns:
        (B, H, N, N) bool, whole regions; the same for all rows of a region. Cost: that product.
    """
    grid = search.grid
    blocks, video = grid.num_blocks(block_size), video_blocks(grid, block_size)
    query, key = (
        chunk_means(block_pool(x, block_size)[:, :, video], region)
        for x in (search.query, search.key)
    )
    regions = query.shape[2]
    mask = torch.zeros(*query.shape[:2], blocks, blocks, dtype=torch.bool, device=query.device)
    if regions == 0:
        return mask, 0.0
    kept = max(1, round(density * regions))
    chosen = best(query @ key.mT, kept)
    whole = chosen.repeat_interleave(region, -1).repeat_interleave(region, -2)
    count = video.stop - video.start
    mask[..., video, video] = whole[..., :count, :count]
    return mask, regions**2 / (2 * grid.tokens**2)


def mass_inside(search: Search, block_size: int, mask: Tensor, region: int, every: int) -> Scores:
    """Softmax mass of one query row in `every`, looking only at the key blocks of `mask`.

    Args:
        mask: (B, H, N, N) bool, equal for all rows of a region, as `best_regions` gives.

    Returns:
        (B, H, N, N), 0 outside of the mask. Cost: rows / (2 S) of the share of keys looked at.
    """
    tokens, scores, pairs = search.grid.tokens, torch.zeros_like(mask, dtype=torch.float32), 0
    video = video_blocks(search.grid, block_size)
    padded = F.pad(search.key, (0, 0, 0, 0, 0, -tokens % block_size)).unflatten(1, (-1, block_size))
    keys = padded.permute(0, 3, 1, 2, 4).float()  # (B, H, N, block, D)
    valid = torch.arange(padded.shape[1] * block_size, device=mask.device) < tokens
    valid = valid.view(-1, block_size)
    count = int(mask.sum(-1).max())  # a region may be short: some rows look at fewer
    for start in range(video.start, video.stop, region):
        stop = min(start + region, video.stop)
        rows = torch.arange(start * block_size, min(stop * block_size, tokens), every)
        rows = (rows + every // 2).clamp(max=tokens - 1).to(mask.device)
        looked_at = mask[:, :, start]  # (B, H, N)
        index = looked_at.float().topk(count, -1).indices
        some = keys.gather(2, index[..., None, None].expand(-1, -1, -1, *keys.shape[3:]))
        logits = search.query[:, rows].transpose(1, 2).float() @ some.flatten(2, 3).mT
        logits = logits * search.query.shape[-1] ** -0.5
        there = valid[index] & looked_at.gather(-1, index).unsqueeze(-1)
        logits = logits.masked_fill(~there.flatten(2).unsqueeze(-2), -torch.inf)
        mass = logits.softmax(-1).unflatten(-1, (count, block_size)).sum(-1)  # (B, H, rows, count)
        per_row = torch.zeros(*mass.shape[:3], mask.shape[-1], device=mask.device)
        per_row.scatter_(-1, index.unsqueeze(2).expand_as(mass), mass)
        scores.index_add_(2, rows // block_size, per_row)
        pairs += len(rows) * count * block_size
    return scores, pairs / (2 * tokens**2)

"""Scorers: how much each key block matters to each query block, and what finding it out cost.

Each returns scores (B, H, N, N) float32, higher is better, and the cost of the search as a share of
one dense attention call (2 S^2 D multiply-adds, so that one pass over all q.k costs 0.5).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import block_mass, own_engine, refuse_missing
from ..grid import VideoGrid, token_order
from ..reference import block_pool
from .search import Search

Scores = tuple[Tensor, float]

CHUNK_ELEMENTS = 1 << 26  # scores held at once by the scorers in plain torch: 256 MiB


def exact_mass(search: Search, block_size: int, engine: str = "auto") -> Scores:
    """Softmax mass of every block, from the log-sum-exp of dense attention (AdaSpa, Eq. 12 to 14).

    Rows sum to the queries of a block where the log-sum-exp is of this step. Cost 0.5.
    """
    assert search.lse is not None, "a method that asks for the mass sets uses_lse"
    size = block_size, block_size
    if search.lengths is None:
        return block_mass(search.query, search.key, search.lse, size, engine=engine), 0.5
    samples = zip(
        search.query.split(1), search.key.split(1), search.lse.split(1), search.lengths, strict=True
    )
    masses = [block_mass(q, k[:, :n], lse, size, engine=engine) for q, k, lse, n in samples]
    blocks = search.grid.num_blocks(block_size)
    return torch.cat([F.pad(mass, (0, blocks - mass.shape[-1])) for mass in masses]), 0.5


def pooled_logits(search: Search, block_size: int) -> Scores:
    """Products of block means, scaled like logits.

    Blocks that touch text score -inf; methods keep them anyway. Cost N^2 / (2 S^2).
    """
    query, key = (block_pool(x, block_size) for x in (search.query, search.key))  # (B, H, N, D)
    logits = query @ key.mT * query.shape[-1] ** -0.5
    text = search.grid.text_blocks(block_size)
    logits[..., text.start : text.stop] = -torch.inf
    return logits, logits.shape[-1] ** 2 / (2 * search.grid.tokens**2)


def pooled_map(search: Search, block_size: int) -> Scores:
    """Softmax over key blocks of the products of block means (DraftAttention's draft map).

    Blocks that touch text are left out of the softmax and score 0. Cost N^2 / (2 S^2).
    """
    logits, cost = pooled_logits(search, block_size)
    # where every block touches text there is nothing to rank, and the softmax is NaN
    return logits.softmax(-1).nan_to_num(0.0), cost


def pooled_sums(search: Search, block_size: int, pool: int) -> Scores:
    """The same from finer means: of `pool` tokens each, their softmax summed into blocks (DFSAttn).

    A row of blocks sums to its number of means. Cost 1 / (2 pool^2).
    """
    scores, cost = pooled_map(search, pool)
    return _sum_groups(scores, block_size // pool, block_size // pool), cost


def sampled_rows(search: Search, block_size: int, every: int = 8, engine: str = "auto") -> Scores:
    """Exact mass of one query row in `every`, the middle one; 8 of each 64 by default.

    The rows find their log-sum-exp themselves, so that no dense call is needed. Cost rows / S, as
    of two passes over q.k; the kernel makes one.
    """
    tokens = search.query.shape[1]
    rows = torch.arange(0, tokens, every, device=search.query.device) + every // 2
    rows = rows.clamp(max=tokens - 1)  # the last few tokens are a group, too
    query = search.query[:, rows]
    mass = mass_of_rows(search, query, search.key, block_size // every, block_size, engine)
    return mass, len(rows) / tokens


def channel_mass(search: Search, block_size: int, channels: int = 16) -> Scores:
    """Mass from the few channels of a head that carry most of q.k (after Double Sparsity).

    A channel is ranked by mean |q| times mean |k| of this very call, so nothing is calibrated; the
    log-sum-exp is that of the reduced logits. Two passes over `channels` of D. Cost channels / D.
    """
    dim = search.query.shape[-1]
    channels = min(channels, dim)
    weight = search.query.abs().float().mean(1) * search.key.abs().float().mean(1)  # (B, H, D)
    best = weight.topk(channels, -1).indices.unsqueeze(1)  # (B, 1, H, channels)
    query, key = (
        x.gather(-1, best.expand(-1, x.shape[1], -1, -1)) for x in (search.query, search.key)
    )
    return mass_of_rows(search, query, key, block_size, block_size), channels / dim


def antidiagonal(search: Search, block_size: int, stride: int = 8) -> Scores:
    """Sums of q.k along the antidiagonals of stride x stride squares, softmaxed, summed into blocks
    (XAttention).

    Logits are the mean over a square's antidiagonal: query i meets key stride - 1 - i. Tokens that
    are missing at the end count as zero products. Cost 1 / (2 stride).
    """
    query, key = (
        F.pad(x.float(), (0, 0, 0, 0, 0, -x.shape[1] % stride)).unflatten(1, (-1, stride))
        for x in (search.query, search.key)
    )  # (B, S / stride, stride, H, D)
    flipped, scale = key.flip(2), search.query.shape[-1] ** -0.5 / stride
    padded = None
    if (kv_len := search.kv_len) is not None:
        groups = kv_len.add(stride - 1) // stride
        padded = (torch.arange(key.shape[1], device=key.device) >= groups[:, None])[:, None, None]
    per_block, parts = block_size // stride, []
    per_row = key.shape[0] * key.shape[1] * key.shape[3]
    blocks_at_once = max(1, CHUNK_ELEMENTS // (per_row * per_block))
    for rows in query.split(blocks_at_once * per_block, dim=1):
        logits = torch.einsum("bishd,bjshd->bhij", rows, flipped) * scale
        if padded is not None:
            logits = logits.masked_fill(padded, -torch.inf)
        parts.append(_sum_groups(logits.softmax(-1), per_block, per_block))
    return torch.cat(parts, dim=2), 1 / (2 * stride)


def nearness(grid: VideoGrid, order: str, block_size: int, time_scale: float = 1.0) -> Tensor:
    """Minus the distance of block centres in tokens, (1, 1, N, N): a static score, free of cost.

    Args:
        time_scale: length of one frame in tokens; above 1 a window is shorter in time.
    """
    centres = block_centres(grid, order, block_size)
    centres[:, 0] *= time_scale
    exact = "donot_use_mm_for_euclid_dist"  # products round by more than SPACE_FIRST
    return -torch.cdist(centres, centres, compute_mode=exact)[None, None]


def block_centres(grid: VideoGrid, order: str, block_size: int) -> Tensor:
    """Mean (t, y, x) of each block's video tokens, (N, 3); the origin for a block of text alone."""
    permutation, _ = token_order(grid, order, block_size)
    area = grid.height * grid.width
    place = torch.stack(
        [permutation // area, permutation % area // grid.width, permutation % grid.width], dim=1
    )
    first = grid.text_tokens if grid.text_first else 0
    block = (torch.arange(grid.video_tokens) + first) // block_size
    sums = torch.zeros(grid.num_blocks(block_size), 3).index_add_(0, block, place.float())
    counts = torch.bincount(block, minlength=len(sums)).clamp_min(1)
    return sums / counts.unsqueeze(1)


def block_middles(grid: VideoGrid, order: str, block_size: int) -> Tensor:
    """Raster place of the middle video token of each block, (N,) int64; any for text alone."""
    permutation, _ = token_order(grid, order, block_size)
    first, _ = grid.video_span
    start = torch.arange(0, grid.tokens, block_size) - first
    end = (start + block_size).clamp(max=grid.video_tokens)
    middle = (start.clamp_min(0) + end) // 2
    return permutation[middle.clamp(0, grid.video_tokens - 1)]


def mass_of_rows(
    search: Search,
    query: Tensor,
    key: Tensor,
    rows_per_block: int,
    block_size: int,
    engine: str = "auto",
) -> Tensor:
    """Softmax mass of query rows in each key block, summed over the rows of each query block.

    Args:
        query: (B, R, H, d) rows, `rows_per_block` of them for each query block but the last.
        key: (B, S, H, d). The scale of the logits is that of the whole head dim.
    """
    scale = search.query.shape[-1] ** -0.5
    how = rows_per_block, block_size, scale
    if own_engine(engine, query, (block_size, block_size)) == "torch":
        return _mass_in_torch(query, key, search.kv_len, *how)
    refuse_missing("triton", query.device)
    from ..kernels.sampled_mass import sampled_mass

    return sampled_mass(query, key, *how, kv_len=search.kv_len)


def _mass_in_torch(
    query: Tensor,
    key: Tensor,
    kv_len: Tensor | None,
    rows_per_block: int,
    block_size: int,
    scale: float,
) -> Tensor:
    keys = key.permute(0, 2, 3, 1).float()  # (B, H, d, S)
    padded = None
    if kv_len is not None:
        places = torch.arange(key.shape[1], device=key.device)
        padded = (places >= kv_len[:, None])[:, None, None]
    per_row = key.shape[0] * key.shape[2] * key.shape[1]
    blocks_at_once = max(1, CHUNK_ELEMENTS // (per_row * rows_per_block))
    parts = []
    for rows in query.split(blocks_at_once * rows_per_block, dim=1):
        scores = rows.transpose(1, 2).float() @ keys * scale  # (B, H, rows, S)
        if padded is not None:
            scores = scores.masked_fill(padded, -torch.inf)
        parts.append(_sum_groups(scores.softmax(-1), rows_per_block, block_size))
    return torch.cat(parts, dim=2)


def _sum_groups(x: Tensor, rows: int, columns: int) -> Tensor:
    """Sums of rectangles of a map (B, H, R, C); the last of each side may be short."""
    padded = F.pad(x, (0, -x.shape[-1] % columns, 0, -x.shape[-2] % rows))
    return padded.unflatten(-1, (-1, columns)).sum(-1).unflatten(-2, (-1, rows)).sum(-2)

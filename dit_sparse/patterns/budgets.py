"""One budget of key blocks, spent over heads, and over layers, where the next block brings most.

Heads differ in how fast what they keep grows with their blocks. Greedy on that curve is the best
allocation, since each row takes its best blocks first and the next never brings more: MoA's mixed
integers (2406.14909) without a program. All on the device, nothing read back.
"""

import torch
from torch import Tensor

from ..grid import VideoGrid
from ..reference import block_pool
from .search import Search

LEAST, MOST = 0.5, 2.0  # of the even budget, in one head


def always_kept(grid: VideoGrid, block_size: int, own_block: bool) -> int:
    """Blocks that each row of generated video keeps whatever they score."""
    shared = {*grid.text_blocks(block_size), *grid.conditioning_blocks(block_size)}
    return len(shared) + own_block


def gains_of(scores: Tensor, forced: Tensor, kept: int, always: int) -> Tensor:
    """What the next block of a row adds to what its head keeps, mean over rows.

    Args:
        scores: (B, H, N, N), not negative.
        forced: (N, N) bool, blocks that are kept whatever they score, `always` of each row.
        kept: blocks a row where all heads keep as many.

    Returns:
        (B, H, N) float32, falling; inf up to `LEAST` of `kept`, -inf from `MOST` of it.
    """
    gains = scores.masked_fill(forced, 0).sort(dim=-1, descending=True).values.mean(-2)
    place = always + torch.arange(gains.shape[-1], device=gains.device)
    gains = gains.masked_fill(place < int(LEAST * kept), torch.inf)
    return gains.masked_fill(place >= min(int(MOST * kept), scores.shape[-1]), -torch.inf)


def spend(gains: Tensor, total: Tensor) -> Tensor:
    """So many blocks each head takes beside those it always keeps, (B, H) int64.

    Args:
        gains: (B, H, N), as `gains_of` gives; heads may be those of several layers.
        total: (B,) blocks in all; they sum to it, or to less where nothing is left to take.
    """
    flat = gains.flatten(1)
    order = flat.argsort(dim=-1, descending=True, stable=True)
    taken = torch.arange(flat.shape[1], device=flat.device) < total[:, None]
    taken = torch.zeros_like(taken).scatter_(1, order, taken) & ~flat.isneginf()
    return taken.view_as(gains).sum(-1)


def share_of(layer: int, former: tuple[Tensor, ...], extra: int) -> Tensor:
    """Blocks for all heads of a layer, (B,): `spend` over the layers, by what they gained before.

    Args:
        former: (B, H, N) of each layer. extra: blocks of a head on average.
    """
    batch, heads, _ = former[0].shape
    total = torch.full((batch,), extra * heads * len(former), device=former[0].device)
    taken = spend(torch.cat(former, 1), total)
    return taken.unflatten(1, (len(former), heads))[:, layer].sum(-1)


def tail_loss(search: Search, block_size: int) -> Tensor:
    """What block means cannot tell, for a unit of mass: (B, H, 1, N) float32.

    A block whose keys are alike for a query, or whose values are, is told by its means without
    loss; to first order the loss is the covariance of logits and values in it. Losses of blocks
    are about independent: it is their squares that add up.
    """
    assert search.value is not None, "the loss cannot be told without values"
    size = search.query.float().square().mean((1, 3)).sqrt()[..., None]  # of a head, (B, H, 1)
    loss = size * spread(search.key, block_size) * spread(search.value, block_size)
    return loss.unsqueeze(2)


def spread(x: Tensor, block_size: int) -> Tensor:
    """Root mean square distance of (B, S, H, D) tokens from the mean of their block, (B, H, N)."""
    squares = block_pool(x.float().square(), block_size).sum(-1)
    return (squares - block_pool(x, block_size).square().sum(-1)).clamp_min(0).sqrt()

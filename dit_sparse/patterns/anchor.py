"""AnchorAttention: keys that come near the best of those that always matter (arXiv 2505.23520).

From summaries of the paper and its code: an anchor, the largest logit of each row among the first
keys and its window, is averaged over a block of queries; a key is kept for a group of `step` query
blocks if the product of one of their means with it comes within theta of that block's anchor;
single keys are gathered.
Departures, and where the paper is silent:

- Single keys are rounded up to blocks, and counted as such: a block is kept if one of its keys is.
- The anchor is over the first block of the sequence and the row's own block; theirs are 128 tokens
  each. Nothing is causal.
- theta is 12 nats there; `density` is the most that a row keeps, those nearest to their anchor.
- Text, own and conditioning blocks are kept and count towards the density.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import CAPS, SparseConfig, positive, whole
from ..reference import block_pool
from .score import CHUNK_ELEMENTS, Scores
from .search import Found, Search
from .select import best, top_density_rows


@dataclass(frozen=True)
class AnchorAttention(SparseConfig):
    """Blocks with a key whose logit comes near the row's anchor, the same for a group of rows.

    Args:
        density: the most that a row keeps, as a share of its blocks.
        theta: how far below the anchor a logit may lie, in nats.
        step: query blocks that share their keys.
    """

    density: float = 0.5
    search_at: tuple[float, ...] = (0.0,)
    every_step: bool = True
    block_size: int = 128
    theta: float = 12.0
    step: int = 16

    paper: ClassVar[str] = "AnchorAttention, arXiv 2505.23520"
    cost: ClassVar[str] = "density at most; a search + 1 / (2 block size) + block size / S"
    swept: ClassVar[tuple[dict, ...]] = tuple({"density": cap, "step": 2} for cap in CAPS)

    def __post_init__(self):
        super().__post_init__()
        positive("theta", self.theta)
        whole("step", self.step, 1)

    def find(self, search: Search) -> Found:
        margins, cost = anchor_margins(search, self.block_size, self.step)
        forced = self.forced(search)
        near = (margins >= -self.theta) | best(margins, 1)  # no row without keys
        return Found(top_density_rows(margins, self.density, forced) & near | forced, None, cost)


def anchor_margins(search: Search, block_size: int, step: int) -> Scores:
    """How far the best key of a block lies above a row's anchor, the best of `step` rows of blocks.

    Cost: mean queries with all keys, and all queries with two blocks of keys.
    """
    query, key = search.query.transpose(1, 2).float(), search.key.transpose(1, 2).float()
    tokens, scale = query.shape[2], query.shape[3] ** -0.5
    means = block_pool(search.query, block_size)  # (B, H, N, D)
    at_once = max(1, CHUNK_ELEMENTS // key[..., 0].numel())
    products = [largest_of_blocks(rows @ key.mT, block_size) for rows in means.split(at_once, 2)]
    margins = torch.cat(products, 2) - anchors(query, key, block_size).unsqueeze(-1)
    margins = margins * scale
    groups = F.pad(margins, (0, 0, 0, -margins.shape[2] % step), value=-torch.inf)
    shared = groups.unflatten(2, (-1, step)).amax(3).repeat_interleave(step, 2)
    cost = means.shape[2] / (2 * tokens) + block_size / tokens
    return shared[:, :, : margins.shape[2]], cost


def largest_of_blocks(products: Tensor, block_size: int) -> Tensor:
    """The largest of each block of keys, (B, H, N, S) -> (B, H, N, N)."""
    padding = 0, -products.shape[-1] % block_size
    padded = F.pad(products, padding, value=-torch.inf)
    return padded.unflatten(-1, (-1, block_size)).amax(-1)


def anchors(query: Tensor, key: Tensor, block_size: int) -> Tensor:
    """Largest product of each row with the first and its own block, mean over blocks, (B, H, N)."""
    padding = -query.shape[2] % block_size
    q, k = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, block_size)) for x in (query, key))
    own = q @ k.mT  # (B, H, N, block, block)
    if padding:
        own[:, :, -1, :, block_size - padding :] = -torch.inf
    first = query @ key[:, :, :block_size].mT
    largest = torch.maximum(own.amax(-1).flatten(2)[..., : query.shape[2]], first.amax(-1))
    return block_pool(largest.transpose(1, 2).unsqueeze(-1), block_size).squeeze(-1)

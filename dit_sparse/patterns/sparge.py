"""SpargeAttn's selection: block means decide where a block is alike in itself (2502.18137).

From a summary of the paper and the authors' code: a block of queries or keys is self-similar if the
mean cosine of its pairs exceeds a threshold; the softmax of the products of block means runs over
self-similar keys, and each row keeps the fewest blocks that hold `share` of it; a block that is not
self-similar is always computed, as key and as query. As in the authors' code the mean of all (here:
video) keys is taken off before. Their defaults are 0.6 and 0.98; their scripts for CogVideoX and
LTX-Video tune the share and set the similarity to -0.1, which no block fails.
A re-implementation of the selection on our kernels. Departures, and where the paper is silent:

- `density` is the most that the rule picks in a row; blocks that are not self-similar come on top.
- No second test while attention runs, which leaves out products with values, and no 8-bit products.
- Blocks of 64 queries; the paper's have 128. The thresholds are the same for all heads and layers.
- Text, own and conditioning blocks are kept and count towards the share.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import CAPS, SparseConfig, is_number, part
from ..reference import block_pool
from .score import pooled_logits
from .search import Found, Search
from .select import most_kept, top_p_rows


@dataclass(frozen=True)
class SpargeAttn(SparseConfig):
    """Softmax of block means over self-similar blocks, a share of each row, at every step.

    Args:
        density: the most that the rule picks in a row, as a share of its blocks.
        share: of a row's softmax, that its blocks hold.
        similarity: mean cosine inside a block, above which its mean may speak for it.
    """

    density: float = 0.5
    search_at: tuple[float, ...] = (0.0,)
    every_step: bool = True
    order: str = "curve"
    share: float = 0.98
    similarity: float = 0.6

    paper: ClassVar[str] = "SpargeAttn, arXiv 2502.18137 (re-implemented)"
    cost: ClassVar[str] = "density, and blocks that are not alike; a search + N^2 / (2 S^2)"
    published: ClassVar[dict[str, dict]] = {"any model": {"density": 0.99, "own_block": False}}
    swept: ClassVar[tuple[dict, ...]] = tuple({"density": cap, "similarity": -0.1} for cap in CAPS)

    def __post_init__(self):
        super().__post_init__()
        part("share", self.share)
        if not is_number(self.similarity) or not -1 <= self.similarity <= 1:
            raise ValueError(f"similarity is a cosine, -1 to 1, got {self.similarity!r}")

    def find(self, search: Search) -> Found:
        logits, cost = pooled_logits(search, self.block_size)
        centred = search.key - search.key[:, slice(*search.grid.video_span)].mean(1, keepdim=True)
        query_alike, key_alike = (
            self_similarity(x, self.block_size) > self.similarity for x in (search.query, centred)
        )  # (B, H, N)
        scores = logits.masked_fill(~key_alike.unsqueeze(-2), -torch.inf)
        scores = scores.softmax(-1).nan_to_num(0.0)  # no key block is alike
        forced = self.forced(search)
        mask = top_p_rows(scores, self.share, forced, cap=most_kept(self.density, scores))
        return Found(mask | ~key_alike.unsqueeze(-2) | ~query_alike.unsqueeze(-1), None, cost)


def self_similarity(x: Tensor, block_size: int) -> Tensor:
    """Mean cosine over all pairs of a block, a token with itself too: (B, S, H, D) -> (B, H, N)."""
    return block_pool(F.normalize(x.float(), dim=-1), block_size).square().sum(-1)

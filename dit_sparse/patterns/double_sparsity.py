"""Double Sparsity: a few channels of a head rank the keys (arXiv 2408.07092).

From a summary of the paper's code: channels are ranked offline, for each head, by the mean of |q k|
after RoPE; a sixteenth to a quarter of them score all keys, and exact attention runs over the best
tokens.
Departures, and where the paper is silent:

- It is for decoding, where memory bounds the time; here it is a cheap search for blocks.
- Channels are ranked by mean |q| times mean |k| of the call itself: nothing is calibrated.
- The scores are softmaxed and summed into blocks; the best of each row are kept. No 4-bit labels.
- Text, own and conditioning blocks are kept and count towards the density.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..config import SparseConfig, whole
from .score import channel_mass
from .search import Found, Search
from .select import top_density_rows


@dataclass(frozen=True)
class DoubleSparsity(SparseConfig):
    """Block mass from the few channels that carry most of q.k, per-row top-k.

    Args:
        channels: of a head that score.
    """

    channels: int = 16

    paper: ClassVar[str] = "Double Sparsity, arXiv 2408.07092"
    cost: ClassVar[str] = "density; a search + channels / D"

    def __post_init__(self):
        super().__post_init__()
        whole("channels", self.channels, 1)

    def find(self, search: Search) -> Found:
        scores, cost = channel_mass(search, self.block_size, self.channels)
        return Found(top_density_rows(scores, self.density, self.forced(search)), None, cost)

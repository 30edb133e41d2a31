"""What a pattern is given at a search step, and what it returns."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import block_mass
from ..grid import VideoGrid


@dataclass(frozen=True)
class Search:
    """One layer at one search step.

    Attributes:
        query, key: (B, S, H, D), after norm and RoPE, in block order.
        lse: (B, H, S) float32 of dense attention, maybe of an earlier step; None unless the method
            asks for it (`uses_lse`).
        grid: the video and its text.
        layer: index of the layer among those that run sparse.
        lengths: valid tokens of each sample where they differ.
    """

    query: Tensor
    key: Tensor
    lse: Tensor | None
    grid: VideoGrid
    layer: int
    lengths: tuple[int, ...] | None = None

    def mass(self, block_size: int, engine: str) -> Tensor:
        """Exact softmax mass of each block, (B, H, N, N) float32."""
        assert self.lse is not None, "a method that asks for the mass sets uses_lse"
        size = block_size, block_size
        if self.lengths is None:
            return block_mass(self.query, self.key, self.lse, size, engine=engine)
        samples = zip(
            self.query.split(1), self.key.split(1), self.lse.split(1), self.lengths, strict=True
        )
        masses = [block_mass(q, k[:, :n], lse, size, engine=engine) for q, k, lse, n in samples]
        blocks = self.grid.num_blocks(block_size)
        return torch.cat([F.pad(mass, (0, blocks - mass.shape[-1])) for mass in masses])


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        mask: (B or 1, H or 1, N, N) bool.
        kept_mass: (H,) float32 share of the softmax mass inside the mask, None if not known.
    """

    mask: Tensor
    kept_mass: Tensor | None = None

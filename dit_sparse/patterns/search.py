"""What a pattern is given at a search step, and what it returns."""

from dataclasses import dataclass

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
    """

    query: Tensor
    key: Tensor
    lse: Tensor | None
    grid: VideoGrid
    layer: int

    def mass(self, block_size: int, engine: str) -> Tensor:
        """Exact softmax mass of each block, (B, H, N, N) float32."""
        assert self.lse is not None, "a method that asks for the mass sets uses_lse"
        return block_mass(self.query, self.key, self.lse, (block_size, block_size), engine=engine)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        mask: (B or 1, H or 1, N, N) bool.
        kept_mass: (H,) float32 share of the softmax mass inside the mask, None if not known.
    """

    mask: Tensor
    kept_mass: Tensor | None = None

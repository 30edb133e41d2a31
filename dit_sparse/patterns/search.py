"""What a pattern is given at a search step, and what it returns."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..grid import VideoGrid
from ..ulysses import Ulysses


@dataclass(frozen=True)
class Search:
    """One layer at one search step.

    Attributes:
        query, key: (B, S, H, D), after norm and RoPE, in block order.
        lse: (B, H, S) float32 of dense attention, maybe of an earlier step; None unless the method
            asks for it (`uses_lse`).
        grid: the video and its text.
        layer: index of the layer among the `layers` that run sparse.
        lengths: valid tokens of each sample where they differ.
        step: absolute denoising step, 0-based, of `num_steps`.
        branch: CFG branch, diffusers' context name.
        value: (B, S, H, D), for methods that compare outputs.
        shared: the processes that share the heads of this layer, each with its own part of them in
            `query`, `key`, `lse` and `value`; None where all heads are here.
    """

    query: Tensor
    key: Tensor
    lse: Tensor | None
    grid: VideoGrid
    layer: int
    lengths: tuple[int, ...] | None = None
    step: int = 0
    num_steps: int = 1
    branch: str = "cond"
    layers: int = 1
    value: Tensor | None = None
    shared: Ulysses | None = None

    @property
    def kv_len(self) -> Tensor | None:
        """`lengths` as (B,) int32 where the keys are."""
        return None if self.lengths is None else lengths_on(self.lengths, self.key.device)

    @property
    def heads(self) -> int:
        """Of the layer, wherever they are."""
        return self.query.shape[2] * (1 if self.shared is None else self.shared.degree)

    @property
    def own_heads(self) -> slice:
        """Those that are here."""
        return slice(None) if self.shared is None else self.shared.own_heads(self.heads)

    def of_all_heads(self, x: Tensor, dim: int = 1) -> Tensor:
        """What stands along `dim` for the heads that are here, for all heads."""
        return x if self.shared is None else self.shared.all_heads(x, dim)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        mask: (B or 1, H or 1, N, N) bool, or packed already.
        kept_mass: (H,) float32 share of the softmax mass inside the mask, None if not known.
        cost: multiply-adds of the search over those of one dense attention call.
    """

    mask: Tensor | BlockMask
    kept_mass: Tensor | None = None
    cost: float = 0.0


@lru_cache(maxsize=16)  # of each layer the same: a copy to a GPU makes the host wait
@torch.inference_mode(False)
def lengths_on(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int32, device=device)

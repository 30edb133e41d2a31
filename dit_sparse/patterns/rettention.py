"""Re-ttention: a fixed window, its output corrected by what a dense step told (arXiv 2505.22918).

From the paper: at a refresh step dense and windowed attention both run; rho is the share of each
row's mass inside the window, R = O - rho O_window the rest (Eq. 10), and the dense output is used.
Until the next refresh the output is rho_t O_window + R, rho_t growing by 0.04 with each step after
the first. CogVideoX at 50 steps: 15 dense steps, a refresh every 5. Text is dense.
Departures, and where the paper is silent:

- rho = exp(LSE_window - LSE_dense): the same number without an attention matrix.
- The window is 3-D: in time it is as long as the paper's, which repeats at the same place in every
  frame (`time_scale` near 0), in space it is the nearest blocks instead of 43 tokens of raster
  order. Masks are rounded up to blocks, so the paper's 3% cannot be had at small sizes.
- `density` counts text blocks; the paper's 96.9% sparsity is of the video alone.
- R is kept of the attention and not of its projection: as many bytes, the same sum.
- The age of R counts denoising steps, also those that a cache skipped, not calls.
- `clamp` (default) keeps rho at most 1 and shrinks R so that weights sum to 1; the paper's ramp
  adds 4% of mass with every step. `clamp=False` is as published.
- `pool` above 1 keeps the mean of R over so many tokens: 1 / pool of the memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..config import CACHE_DEVICES, SparseConfig, flag, is_number, one_of, positive, whole
from .correct import Correction, apply_correction, measure_correction
from .search import Found, Search
from .window import nearest_blocks

REFRESHES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # steps 15, 20, ... 45 of 50


@dataclass(frozen=True)
class Rettention(SparseConfig):
    """A fixed window in space through all frames; outputs scaled by rho, and a residual added.

    Args:
        ramp: what rho grows by with each step after a refresh and the first step after it.
        clamp: keep rho at most 1, and weights that sum to 1.
        pool: tokens whose residual is kept as one mean; 1 keeps all.
        time_scale: length of one frame in tokens, as in `window`.
        cache_device: where rho and residuals are kept: on the "model"'s device, or on the "cpu" in
            pinned memory, and each is copied to the GPU while the layer before computes.
    """

    density: float = 0.1
    search_at: tuple[float, ...] = REFRESHES
    ramp: float = 0.04
    clamp: bool = True
    pool: int = 1
    time_scale: float = 0.01
    cache_device: str = "model"

    paper: ClassVar[str] = "Re-ttention, arXiv 2505.22918"
    cost: ClassVar[str] = "a refresh 1 + density; reuse: density"
    memory: ClassVar[str] = (
        "rho 4 B H S and residual 2 B S H D / pool bytes (bf16) a layer and branch: 44 GB for"
        " HunyuanVideo 720p"
    )
    published: ClassVar[dict[str, dict]] = {
        "CogVideoX": {"density": 0.056, "order": "raster", "clamp": False, "own_block": False}
    }
    corrects: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        whole("pool", self.pool, 1)
        flag("clamp", self.clamp)
        if not is_number(self.ramp) or not 0 <= self.ramp < math.inf:
            raise ValueError(f"ramp is what rho grows by, at least 0, got {self.ramp!r}")
        positive("time_scale", self.time_scale)
        one_of("cache_device", self.cache_device, CACHE_DEVICES)

    def find(self, search: Search) -> Found:
        return Found(nearest_blocks(self, search, self.time_scale))

    def correction(
        self, dense: Tensor, dense_lse: Tensor, sparse: Tensor, sparse_lse: Tensor
    ) -> Correction:
        return measure_correction(dense, dense_lse, sparse, sparse_lse, self.pool)

    def corrected(self, sparse: Tensor, correction: Correction, age: int) -> Tensor:
        return apply_correction(sparse, correction, self.ramp * max(age - 1, 0), self.clamp)

    def cache_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        batch, tokens, heads, dim = shape
        blocks = -(-tokens // self.block_size)
        residual = batch * heads * dim * -(-tokens // self.pool) * itemsize
        return blocks * -(-blocks // 8) + 4 * batch * heads * tokens + residual

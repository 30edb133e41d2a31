"""Exact masks in compact blocks, the rest told by block means, and what is still missing added.

No paper of its own; its parts: the exact block mass of AdaSpa (arXiv 2502.21079), the same number
of the heaviest blocks in every row, a tail of block means over the blocks left out (the enrichment
of LLSA, restricted to those; `dit_sparse/tail.py`), and a residual as in Re-ttention (2505.22918),
here R = O_dense - O_(sparse with tail).

- A search of a layer that keeps a residual is a refresh: dense attention runs too, its output is
  used, and R is kept in fp8 with a scale per row, a quarter of float32's bytes and half of bf16's.
- A search of a layer without one costs what AdaSpa's does: fused with a dense call the first time,
  half a dense call later, from the log-sum-exp that is kept.
- Residuals are as large as the outputs. As many of the leading layers keep one as `max_cache_bytes`
  allows, the same on all branches, judged from sizes alone: equal runs are equal on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config import SparseConfig
from .correct import Correction, measure_residual
from .score import exact_mass
from .search import Found, Search
from .select import blocks_of, kept_share, top_k_rows

RESIDUALS = ("fp8", "model", None)


@dataclass(frozen=True)
class Auto(SparseConfig):
    """Exact block mass, per-row top-k, a tail of block means, and a residual where memory allows.

    Args:
        residual: how what the sparse output lacks is kept between searches: "fp8", "model" (the
            model's dtype), or None for the tail alone.
        max_cache_bytes: of all that is kept between steps; residuals take what is left of it.
    """

    density: float = 0.1
    residual: str | None = "fp8"
    max_cache_bytes: int | None = 4 * 2**30

    paper: ClassVar[str] = "none of its own; parts of AdaSpa, LLSA and Re-ttention"
    cost: ClassVar[str] = (
        "reuse: density + 1 / block size (the tail); a refresh 1.5 + that, without a residual as"
        " AdaSpa's search"
    )
    memory: ClassVar[str] = (
        "mask bits B H N^2 / 8; with a residual in fp8 B S H (D + 4) bytes, else log-sum-exp"
        " 4 B H S, a layer and branch: 23 GB for HunyuanVideo 720p, cut to max_cache_bytes"
    )
    uses_lse: ClassVar[bool] = True
    search_cost: ClassVar[float] = 0.5
    tail: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.residual not in RESIDUALS:
            raise ValueError(f'residual must be "fp8", "model" or None, got {self.residual!r}')

    def find(self, search: Search) -> Found:
        mass, cost = exact_mass(search, self.block_size, self.engine)
        kept = blocks_of(torch.full_like(mass[..., 0, 0], self.density), mass.shape[-1])
        mask = top_k_rows(mass, kept, self.forced(search))
        return Found(mask, kept_share(mass, mask).mean(0), cost)

    def correction(
        self, dense: Tensor, dense_lse: Tensor, sparse: Tensor, sparse_lse: Tensor
    ) -> Correction:
        return measure_residual(dense, sparse, fp8=self.residual == "fp8")

    def corrected_layers(
        self, shape: Sequence[int], itemsize: int, layers: int, branches: int
    ) -> int:
        if self.residual is None:
            return 0
        if self.max_cache_bytes is None:
            return layers
        left = self.max_cache_bytes - branches * layers * self.cache_bytes(shape, itemsize)
        return min(layers, max(left, 0) // (branches * self.correction_bytes(shape, itemsize)))

    def correction_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        batch, tokens, heads, dim = shape
        row = dim + 4 if self.residual == "fp8" else dim * itemsize
        return batch * tokens * heads * (row - 4)  # a log-sum-exp is not kept beside it

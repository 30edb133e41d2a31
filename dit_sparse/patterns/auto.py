"""Masks from sampled rows, the rest told by block means, and what is still missing added.

No paper of its own; its parts: block mass from 8 query rows of each 64 (`score.sampled_rows`, 0.125
of dense attention), the same number of the heaviest blocks in every row, a tail of block means over
the blocks left out (the enrichment of LLSA, restricted to those; `dit_sparse/tail.py`), and a
residual as in Re-ttention (2505.22918), here R = O_dense - O_(sparse with tail).

- A search of a layer that keeps a residual is a refresh: dense attention runs too, its output is
  used, and R is kept in fp8 with a scale per row, a quarter of float32's bytes and half of bf16's.
- A search of a layer without one runs sparse at once.
- Residuals are as large as the outputs. As many of the leading layers keep one as `max_cache_bytes`
  allows, the same on all branches, judged from sizes alone: equal runs are equal on every machine.
- Runs of few steps leave out searches that come less than three steps after another: they would
  cost more than dense attention.
- Where `cost_model.json` knows the GPU and expects sparse to be slower, every step runs dense.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul
from typing import ClassVar

import torch
from torch import Tensor

from ..config import SparseConfig, flag, part
from ..schedule import search_steps
from .budgets import MOST, always_kept, gains_of, share_of, spend, tail_loss
from .correct import Correction, measure_residual
from .score import Scores, sampled_rows
from .search import Found, Search
from .select import kept_share, most_kept, pack_rows, packs, top_k_rows, top_p_rows

RESIDUALS = ("fp8", "model", None)
RANKS = ("mass", "loss")
BUDGETS = ("even", "heads", "layers")
# What benchmarks/pareto.py found best at costs of 0.66, 0.47 and 0.31 on the small Wan.
TARGETS: dict[str, dict] = {
    "fidelity": {"density": 0.35, "search_at": (0.24, 0.49, 0.75)},
    "balanced": {"density": 0.1, "search_at": (0.24, 0.49, 0.75)},
    "speed": {"density": 0.05, "search_at": (0.12, 0.41, 0.71)},
}


@dataclass(frozen=True)
class Auto(SparseConfig):
    """Mass of sampled rows, per-row top-k, a tail of block means, a residual where memory allows.

    `target="fidelity"`, `"balanced"` (the defaults) or `"speed"` sets density and search_at.

    Args:
        min_kept_mass: rows of blocks keep as many more than `density` as hold this share of their
            softmax mass at the search, 0.9 say; what that costs, the report tells.
        rank: blocks are ranked by their "mass" or by the "loss" that their means have: mass times
            how unequal the keys and the values of a block are.
        budget: rows of blocks keep as many in all heads ("even"), or heads share what those of a
            layer have ("heads"), or of all layers ("layers"), where the next block brings most.
        falling: later searches keep fewer blocks than the first, the mean being `density`.
        drift: search and refresh when the error of the outputs, on sampled rows, is this share of
            them or more, in place of the later times of `search_at`, and no more often than those;
            None keeps to them.
        residual: how what the sparse output lacks is kept between searches: "fp8", "model" (the
            model's dtype), or None for the tail alone.
        max_cache_bytes: of all that is kept between steps; residuals take what is left of it.
        dense_if_faster: run every step dense where the cost model expects that to be faster.
    """

    density: float = 0.1
    search_at: tuple[float, ...] = (0.24, 0.49, 0.75)
    min_kept_mass: float | None = None
    rank: str = "mass"
    budget: str = "even"
    falling: bool = False
    drift: float | None = None
    residual: str | None = "fp8"
    max_cache_bytes: int | None = 4 * 2**30
    dense_if_faster: bool = True

    paper: ClassVar[str] = "ours; parts of AdaSpa, LLSA and Re-ttention"
    cost: ClassVar[str] = (
        "reuse: density + 1 / block size (the tail); a search 0.125 more, and 1 more in layers"
        " that keep a residual"
    )
    memory: ClassVar[str] = (
        "mask bits B H N^2 / 8, with a residual in fp8 B S H (D + 4) bytes more, a layer and"
        " branch: 23 GB for HunyuanVideo 720p, cut to max_cache_bytes"
    )
    targets: ClassVar[dict[str, dict]] = TARGETS
    apart: ClassVar[int] = 3
    search_cost: ClassVar[float] = 0.125
    tail: ClassVar[bool] = True

    @property
    def refuses(self) -> bool:
        return self.dense_if_faster

    def __post_init__(self):
        super().__post_init__()
        flag("dense_if_faster", self.dense_if_faster)
        if self.residual not in RESIDUALS:
            raise ValueError(f'residual must be "fp8", "model" or None, got {self.residual!r}')
        if self.rank not in RANKS or self.budget not in BUDGETS:
            raise ValueError(
                f"rank is one of {', '.join(RANKS)} and budget one of {', '.join(BUDGETS)}, got"
                f" {self.rank!r} and {self.budget!r}"
            )
        flag("falling", self.falling)
        for name in ("min_kept_mass", "drift"):
            if getattr(self, name) is not None:
                part(name, getattr(self, name))

    def find(self, search: Search) -> Found:
        mass, cost = self.score(search)
        forced = self.forced(search)
        kept = most_kept(self.density_at(search.step, search.num_steps), mass)
        if self.min_kept_mass is not None:
            mask = top_p_rows(mass, self.min_kept_mass, forced, floor=kept)
            return Found(mask, kept_share(mass, mask).mean(0), cost)
        scores = mass
        if self.rank == "loss":
            scores = (self._shares(mass) * tail_loss(search, self.block_size)).square()
        if self.budget == "even":
            of_heads = torch.full(mass.shape[:2], kept, dtype=torch.int32, device=mass.device)
            gains = None
        else:
            of_heads, gains = self._budgets(search, scores, forced, kept)
        if self.rank == "mass" and packs(mass):
            packed = pack_rows(mass, of_heads, forced, search.grid.tokens, self.block_size)
            return Found(*packed, cost, gains)
        most = kept if self.budget == "even" else min(int(MOST * kept), mass.shape[-1])
        mask = top_k_rows(scores, of_heads, forced, most)
        return Found(mask, kept_share(mass, mask).mean(0), cost, gains)

    def _budgets(
        self, search: Search, scores: Tensor, forced: Tensor, kept: int
    ) -> tuple[Tensor, Tensor | None]:
        """Blocks in each row of the heads that are here, and what layers tell each other."""
        always = always_kept(search.grid, self.block_size, self.own_block)
        scores = self._shares(scores) if self.rank == "mass" else scores
        gains = search.of_all_heads(gains_of(scores, forced, kept, always))
        extra = max(kept - always, 0)
        if self.budget == "layers" and len(search.former) == search.layers - self.dense_layers:
            total = share_of(search.layer - self.dense_layers, search.former, extra)
        else:
            total = torch.full(gains.shape[:1], extra * search.heads, device=scores.device)
        of_heads = always + spend(gains, total)[:, search.own_heads]
        return of_heads, gains if self.budget == "layers" else None

    def _shares(self, mass: Tensor) -> Tensor:
        return mass / mass.sum(-1, keepdim=True).clamp_min(1e-20)

    def score(self, search: Search) -> Scores:
        return sampled_rows(search, self.block_size, engine=self.engine)

    def density_at(self, step: int, num_steps: int) -> float:
        """Of the search at a step."""
        if not self.falling:
            return self.density
        at = search_steps(self.search_at, num_steps, self.apart)
        lengths = [end - start for start, end in zip(at, [*at[1:], num_steps])]
        weights = range(len(at), 0, -1)
        mean = sum(map(mul, weights, lengths)) / sum(lengths)
        left = sum(other > step for other in at) + 1
        return min(self.density * left / mean, 1.0)

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
        return batch * tokens * heads * row

"""Masks from sampled rows, the rest told by means, and what is still missing added.

No paper of its own; its parts: block mass from 8 query rows of each 64 (`score.sampled_rows`, 0.125
of dense attention), the same number of the heaviest blocks in every row, a tail of means over the
blocks left out (the enrichment of LLSA, restricted to those; `dit_sparse/tail.py`), and a
residual as in Re-ttention (2505.22918), here R = O_dense - g O with O the sparse output with its
tail. Later outputs are g O + R: g = (share of a row's softmax mass that O stands for)^damping lets
less of what changes in O through where O stands for less of the row.

- A search of a layer that keeps a residual is a refresh: dense attention runs too, its output is
  used, and R is kept in fp8 with a scale per row, a quarter of float32's bytes and half of bf16's;
  g is a float32 a row.
- A search of a layer without one runs sparse at once.
- Text keys are in every row; rows of text choose as the others do: a tail tells them the rest.
- A block left out is told by a mean of each `tail_tokens` of its tokens, by default of all 64.
- Residuals are as large as the outputs. As many of the leading layers keep one as `max_cache_bytes`
  allows, the same on all branches, judged from sizes alone: equal runs are equal on every machine.
- Searches that come right after another are left out: two refreshes cost more than two dense calls.
- Where `cost_model.json` knows the GPU and expects sparse to be slower, every step runs dense.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config import CACHE_DEVICES, SHARES, SparseConfig, flag, is_number, one_of, part
from .correct import Correction, measure_residual
from .score import Scores, sampled_rows
from .search import Found, Search
from .select import kept_share, most_kept, pack_rows, packs, top_k_rows, top_p_rows

TAIL_TOKENS = (16, 32, 64, 128)
RESIDUALS = ("fp8", "model", None)
# At costs of about 0.6, 0.4 and 0.2; times near the best on tuning prompts of the small pipelines
# (benchmarks/results/schedules_h200.json), density and means by ablation_auto_h200.json.
TARGETS: dict[str, dict] = {
    "fidelity": {"density": 0.115, "search_at": (0.24, 0.31, 0.43, 0.59, 0.78)},
    "balanced": {"density": 0.115, "search_at": (0.12, 0.23, 0.43, 0.69)},
    "speed": {"density": 0.115, "search_at": (0.0, 0.12, 0.35, 0.65), "share_guidance": "all"},
}


@dataclass(frozen=True)
class Auto(SparseConfig):
    """Mass of sampled rows, per-row top-k, a tail of means, a residual where memory allows.

    `target="fidelity"`, `"balanced"` (the defaults) or `"speed"` sets density and search_at.

    Args:
        min_kept_mass: rows of blocks keep as many more than `density` as hold this share of their
            softmax mass at the search, 0.9 say; what that costs, the report tells.
        tail_tokens: tokens whose mean speaks for them where their block is left out, 16, 32, 64 or
            128; those of a whole block where it has fewer. Fewer cost more.
        residual: how what the sparse output lacks is kept between searches: "fp8", "model" (the
            model's dtype), or None for the tail alone.
        damping: exponent of the share of mass that scales sparse outputs where a residual is kept;
            0 lets all changes through, 1 is Re-ttention's.
        share_guidance: where guidance runs two branches of equal shape, the negative prompt uses
            the other's "mask", so that their errors are alike and guidance cancels them; or "all",
            its residual too: a refresh then runs dense for one of them alone. None shares nothing.
        cache_device: where residuals are kept: on the "model"'s device, or on the "cpu" in pinned
            memory, and each is copied to the GPU while the layer before computes.
        max_cache_bytes: of all that is kept between steps, on either device; residuals take what
            is left of it.
        dense_if_faster: run every step dense where the cost model expects that to be faster.
    """

    density: float = 0.115
    search_at: tuple[float, ...] = (0.12, 0.23, 0.43, 0.69)
    min_kept_mass: float | None = None
    tail_tokens: int = 64
    residual: str | None = "fp8"
    damping: float = 0.25
    share_guidance: str | None = "mask"
    cache_device: str = "model"
    max_cache_bytes: int | None = 4 * 2**30
    dense_if_faster: bool = True

    paper: ClassVar[str] = "ours; parts of AdaSpa, LLSA and Re-ttention"
    cost: ClassVar[str] = (
        "reuse: density + 1 / tail_tokens (the tail); a search 0.125 more, and 1 more in layers"
        " that keep a residual"
    )
    memory: ClassVar[str] = (
        "mask bits B H N^2 / 8, with a residual in fp8 B S H (D + 8) bytes more, a layer and"
        " branch: 23 GB for HunyuanVideo 720p, cut to max_cache_bytes"
    )
    targets: ClassVar[dict[str, dict]] = TARGETS
    swept: ClassVar[tuple[dict, ...]] = (
        {"density": 0.06, "tail_tokens": 64, "share_guidance": "all"},
        {"density": 0.075, "tail_tokens": 32, "share_guidance": "all"},
        {"density": 0.14, "tail_tokens": 32, "share_guidance": "all"},
        {"density": 0.09, "tail_tokens": 32, "share_guidance": "mask"},
    )
    apart: ClassVar[int] = 2
    search_cost: ClassVar[float] = 0.125
    tail: ClassVar[bool] = True
    text_queries: ClassVar[bool] = False

    @property
    def refuses(self) -> bool:
        return self.dense_if_faster

    def __post_init__(self):
        super().__post_init__()
        flag("dense_if_faster", self.dense_if_faster)
        if self.share_guidance not in SHARES:
            raise ValueError(
                f'share_guidance must be "mask", "all" or None, got {self.share_guidance!r}'
            )
        one_of("cache_device", self.cache_device, CACHE_DEVICES)
        one_of("tail_tokens", self.tail_tokens, TAIL_TOKENS)
        if self.tail_tokens > self.block_size:
            object.__setattr__(self, "tail_tokens", self.block_size)
        if self.residual not in RESIDUALS:
            raise ValueError(f'residual must be "fp8", "model" or None, got {self.residual!r}')
        if self.min_kept_mass is not None:
            part("min_kept_mass", self.min_kept_mass)
        if not is_number(self.damping) or not 0 <= self.damping <= 1:
            raise ValueError(f"damping is an exponent, in [0, 1], got {self.damping!r}")

    def find(self, search: Search) -> Found:
        mass, cost = self.score(search)
        forced = self.forced(search)
        kept = most_kept(self.density, mass)
        if self.min_kept_mass is not None:
            mask = top_p_rows(mass, self.min_kept_mass, forced, floor=kept)
            return Found(mask, kept_share(mass, mask).mean(0), cost)
        of_heads = torch.full(mass.shape[:2], kept, dtype=torch.int32, device=mass.device)
        if packs(mass):
            packed = pack_rows(mass, of_heads, forced, search.grid.tokens, self.block_size)
            return Found(*packed, cost)
        mask = top_k_rows(mass, of_heads, forced, kept)
        return Found(mask, kept_share(mass, mask).mean(0), cost)

    def score(self, search: Search) -> Scores:
        return sampled_rows(search, self.block_size, engine=self.engine)

    def correction(
        self, dense: Tensor, dense_lse: Tensor, sparse: Tensor, sparse_lse: Tensor
    ) -> Correction:
        rho = None
        if self.damping > 0:  # the tail never stands for more mass than there is
            rho = ((sparse_lse - dense_lse).clamp(max=0) * self.damping).exp()
        return measure_residual(dense, sparse, self.residual == "fp8", rho)

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
        return batch * tokens * heads * (row + (4 if self.damping > 0 else 0))

"""SeerAttention: a small gate for each layer and head picks the blocks (arXiv 2410.13276).

From a summary of the paper: queries are mean-pooled over blocks, keys pooled by mean, maximum and
minimum; a linear map of each, and the softmax of their product, estimates the mass of blocks; only
these maps are trained, by the divergence from the true block mass of the frozen model; each row
keeps its best blocks.
Departures, and where the paper is silent:

- The gate is distilled by `dit-sparse calibrate --method seerattention` while a pipeline generates
  a few prompts (`dit_sparse/distil.py`); no gates of the authors are for video models.
- It starts as the product of block means. It sees queries and keys after RoPE, and has no RoPE.
- It ranks video blocks. Text, own and conditioning blocks are kept and count towards the density.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from ..config import SparseConfig
from .gates import Gates, gate_logits, load_gates, pooled_features
from .model_marks import refuse_other_model
from .search import Found, Search
from .select import top_density_rows


@dataclass(frozen=True)
class SeerAttention(SparseConfig):
    """Blocks ranked by a small distilled gate of each head, at every step.

    Args:
        gate: safetensors file that `dit-sparse calibrate --method seerattention` wrote.
    """

    search_at: tuple[float, ...] = (0.2,)
    every_step: bool = True
    gate: str = ""

    paper: ClassVar[str] = "SeerAttention, arXiv 2410.13276"
    cost: ClassVar[str] = "density; a search + (N^2 + 4 N D) / (2 S^2)"

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.gate, Path):
            object.__setattr__(self, "gate", str(self.gate))
        if not self.gate or not isinstance(self.gate, str):
            raise ValueError(
                f"seerattention needs gate=FILE, got {self.gate!r}: distil one for your model with"
                " `dit-sparse calibrate --method seerattention`"
            )
        gates = self.load()
        for name in ("order", "block_size"):
            if getattr(self, name) != getattr(gates, name) and self.density != 1:
                raise ValueError(
                    f"the gates were distilled with {name}={getattr(gates, name)!r}, got"
                    f" {getattr(self, name)!r}: give that, or calibrate with yours"
                )

    def load(self) -> Gates:
        return load_gates(self.gate)

    def for_model(self, transformers: Sequence[Any]) -> Self:
        refuse_other_model("the gates are", self.load().models, transformers)
        return self

    def find(self, search: Search) -> Found:
        gates, grid = self.load(), search.grid
        dim, here = search.query.shape[3], search.own_heads
        gates.refuse_other_size(search.layers, search.heads, dim)
        maps = (x[search.layer][here].to(search.query.device) for x in (gates.query, gates.key))
        scores = gate_logits(pooled_features(search.query, search.key, self.block_size), *maps)
        text = grid.text_blocks(self.block_size)
        scores[..., text.start : text.stop] = -torch.inf
        blocks, width = scores.shape[-1], gates.query.shape[-1]
        pairs = blocks * blocks * width + 4 * blocks * dim * width
        mask = top_density_rows(scores, self.density, self.forced(search))
        return Found(mask, None, pairs / (2 * grid.tokens**2 * dim))

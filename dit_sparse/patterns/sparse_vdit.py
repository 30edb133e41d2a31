"""Sparse-vDiT: a fixed mode for each step, layer and head, searched offline (arXiv 2506.03065).

From the paper: modes full, skipped head (output 0), diagonal (a window around the main diagonal),
multi-diagonal (a window around the same place in all frames) and vertical stripes (the same keys
for all queries); modes are chosen by error + lambda (1 - sparsity), full where all of them exceed
epsilon (section 4.2), and inference reads a table. The search is `dit_sparse/calibrate.py`.
Departures, and where the paper is silent:

- Widths and stripes are not published: each sparse mode keeps `density` of the blocks in every row.
  Stripes are evenly spaced, the first block among them.
- Multi-diagonal needs tokens in another order; here it is rounded up to blocks of the one order:
  those nearest in space, through all frames.
- The error is ||O_i - O||^2 over the mean ||O||^2 of the layer's heads, summed over the samples;
  the paper's is a plain MSE, whose scale is that of the model, so its epsilon of 1 means nothing
  here. A head that says little beside the others can be skipped.
- Alg. 1 rewards dense modes; Eq. 2 is followed.
- Text, own and conditioning blocks are kept in every mode but a skipped head.
- One table for each CFG branch; a run with another number of steps takes the row at the same share
  of its steps. No dense steps by default, as the paper has none on CogVideoX1.5.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..config import SparseConfig
from ..grid import VideoGrid
from .mode_table import FILE, ModeTable, load_mode_table, table_beside
from .score import nearness
from .search import Found, Search
from .select import blocks_of, forced_blocks, top_k_rows

MODES = ("full", "skip", "diagonal", "multi-diagonal", "stripes")
SPACE_FIRST = 1e-3  # length of a frame in tokens: time only breaks ties


@dataclass(frozen=True)
class SparseVDiT(SparseConfig):
    """One of five fixed modes for each head, layer and step, from an offline search.

    Args:
        table: JSON file that `dit-sparse calibrate` wrote, for this model and size; without it
            sparse_vdit.json in the model's folder.
    """

    search_at: tuple[float, ...] = (0.0,)
    every_step: bool = True
    order: str = "raster"
    table: str = ""

    paper: ClassVar[str] = "Sparse-vDiT, arXiv 2506.03065"
    cost: ClassVar[str] = "mean over heads: full 1, skipped 0, else density; no search online"
    memory: ClassVar[str] = "mask bits H N^2 / 8 bytes a layer and branch, one for all samples"

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.table, Path):
            object.__setattr__(self, "table", str(self.table))
        if not isinstance(self.table, str):
            raise ValueError(f"table is the name of a file, got {self.table!r}")
        if not self.table:
            return  # until the model is known
        table = self.load()
        for name in ("density", "order", "block_size"):
            if getattr(self, name) != getattr(table, name) and self.density != 1:
                raise ValueError(
                    f"the table was searched with {name}={getattr(table, name)!r}, got"
                    f" {getattr(self, name)!r}: give that, or calibrate with yours"
                )
        if not self.own_block and self.density != 1:
            raise ValueError("the table was searched with own_block=True, got False: leave it out")

    def load(self) -> ModeTable:
        return load_mode_table(self.table, len(MODES))

    def for_model(self, transformers: Sequence[Any]) -> Self:
        table = self.table or table_beside(transformers[0])
        if table is None:
            raise ValueError(
                f"sparse-vdit needs table=FILE, the modes of each head: no {FILE} lies beside this"
                " model; make one with `dit-sparse calibrate`"
            )
        config = replace(self, table=str(table))
        config.load().refuse_other_model(transformers)
        return config

    def cache_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        return super().cache_bytes((1, *shape[1:]), itemsize)

    def find(self, search: Search) -> Found:
        table, grid = self.load(), search.grid
        table.refuse_other_size(search.layers, search.heads, (grid.frames, grid.height, grid.width))
        modes = table.at(search.branch, search.step, search.num_steps, search.layer)
        place = self.order, self.block_size, self.density, self.own_block, search.query.device
        return Found(mode_masks(grid, *place)[modes[search.own_heads]].unsqueeze(0))


@lru_cache(maxsize=8)
def mode_masks(
    grid: VideoGrid,
    order: str,
    block_size: int,
    density: float,
    own_block: bool,
    device: torch.device,
) -> Tensor:
    """The block mask of each of `MODES`, (5, N, N) bool."""
    blocks = grid.num_blocks(block_size)
    forced = forced_blocks(grid, block_size, device, own_block)
    place = torch.arange(blocks, device=device)
    kept = blocks_of(torch.full((1, 1), density, device=device), blocks)
    diagonal = -(place[:, None] - place).abs().float()
    in_space = nearness(grid, order, block_size, SPACE_FIRST)[0, 0].to(device)
    windows = [top_k_rows(x[None, None], kept, forced)[0, 0] for x in (diagonal, in_space)]
    columns = torch.zeros_like(forced)  # the same for all rows: forced blocks come on top
    columns[:, torch.linspace(0, blocks, int(kept) + 1, device=device).long()[:-1]] = True
    nothing = torch.zeros_like(forced)
    return torch.stack([~nothing, nothing, *windows, columns | forced])

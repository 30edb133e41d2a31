"""MoA: spans of different length for the heads of a layer, from a budget problem (2406.14909).

From a summary of the paper: each head gets a span that grows with the length of the sequence; what
a shorter span loses is profiled offline by gradients, and an integer program picks one span for
each head, of least loss, for a mean density.
Departures, and where that is silent:

- The span is a 3-D window: the nearest blocks in space and time.
- The loss is measured at the search itself, as the squared error of the outputs of sampled rows:
  nothing is profiled offline and there are no gradients.
- The spans are an eighth to twice the density. The heads of one layer share its budget, and the
  problem is solved exactly. Spans do not depend on the length, but on the density alone.
- Text, own and conditioning blocks are kept and count towards a span.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..config import SparseConfig, whole
from .sampled import choose_masks, output_errors, sampled_places
from .search import Found, Search
from .window import nearest_blocks

SPANS = (1, 4, 8, 16)  # eighths of the density


@dataclass(frozen=True)
class MoA(SparseConfig):
    """Windows of four sizes; the heads of a layer share a budget where it lowers the error most.

    Args:
        rows: query rows that are sampled to measure errors.
    """

    rows: int = 64

    paper: ClassVar[str] = "MoA, arXiv 2406.14909 (from a summary)"
    cost: ClassVar[str] = "density; a search + 3 rows / S"

    def __post_init__(self):
        super().__post_init__()
        whole("rows", self.rows, 1)

    def find(self, search: Search) -> Found:
        windows = [
            nearest_blocks(replace(self, density=min(self.density * span / 8, 1.0)), search, 1.0)
            for span in SPANS
        ]
        places = sampled_places(search.grid, self.rows, search.query.device)
        errors, cost = output_errors(search, self.block_size, windows, places)
        of_all = search.of_all_heads(errors, 2).cpu()
        spans = cheapest_spans(of_all, SPANS, 8 * search.heads)[:, search.own_heads]
        losses = torch.ones(errors.shape).scatter_(0, spans.unsqueeze(0), 0.0)
        return Found(choose_masks(windows, losses.to(errors.device)), None, cost)


def cheapest_spans(errors: Tensor, sizes: tuple[int, ...], budget: int) -> Tensor:
    """A size for each head, of the least sum of errors within a budget.

    Args:
        errors: (number of sizes, B, H). sizes: whole numbers; the budget allows the first for all.

    Returns:
        (B, H) int64, indices of sizes.
    """
    _, batch, heads = errors.shape
    least = errors.new_zeros(batch, budget + 1)  # error of the heads so far, by what is spent
    taken = []
    for head in range(heads):
        options = least.new_full((len(sizes), batch, budget + 1), torch.inf)
        for i, size in enumerate(sizes):
            rest = max(budget + 1 - size, 0)
            options[i, :, size:] = least[:, :rest] + errors[i, :, head, None]
        least, best = options.min(0)
        taken.append(best)
    spent = torch.full((batch, 1), budget)
    chosen = []
    for best in reversed(taken):
        index = best.gather(1, spent)
        spent = spent - torch.tensor(sizes)[index]
        chosen.append(index)
    return torch.cat(chosen[::-1], dim=1)

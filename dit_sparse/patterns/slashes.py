"""Columns and diagonals of a block map: what MInference calls verticals and slashes."""

import torch
from torch import Tensor


def column_means(mass: Tensor) -> Tensor:
    """Mean mass of each key block over some rows: (B, H, rows, N) -> (B, H, N)."""
    return mass.mean(-2)


def diagonal_means(mass: Tensor, row_blocks: Tensor) -> Tensor:
    """Mean mass on each diagonal, over the rows that were seen of it.

    Args:
        mass: (B, H, rows, N). row_blocks: (rows,) the query block of each row.

    Returns:
        (B, H, 2 N - 1); entry N - 1 + o is of key blocks o after the query block.
    """
    blocks = mass.shape[-1]
    offset = torch.arange(blocks, device=mass.device) - row_blocks[:, None] + blocks - 1
    sums = mass.new_zeros(*mass.shape[:2], 2 * blocks - 1)
    sums.scatter_add_(-1, offset.flatten().expand(*mass.shape[:2], -1), mass.flatten(2))
    seen = torch.bincount(offset.flatten(), minlength=2 * blocks - 1)
    return sums / seen.clamp_min(1)


def columns_and_diagonals(columns: Tensor, diagonals: Tensor) -> Tensor:
    """The map (B, H, N, N) of kept columns (B, H, N) and diagonals (B, H, 2 N - 1), all bool."""
    blocks = columns.shape[-1]
    place = torch.arange(blocks, device=columns.device)
    offset = place - place[:, None] + blocks - 1
    return columns.unsqueeze(-2) | diagonals[..., offset]

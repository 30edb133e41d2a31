"""Block masks as small pictures: at most 64 x 64 cells a head, 16 levels, as text for JSON."""

import base64
from typing import Any

import torch
from torch import Tensor

from .block_mask import BlockMask

SIDE = 64  # cells
LEVELS = 15  # of four bits: 0 nothing kept, 15 every block of the cell


def pack_maps(mask: BlockMask) -> dict[str, Any]:
    """Shares of kept blocks, one text a head; a mask that all heads share gives one text."""
    side = tuple(min(count, SIDE) for count in mask.num_blocks)
    # Head by head: the whole mask as floats may take gigabytes.
    heads = [pack(shares(mask, head, side)) for head in range(mask.bits.shape[1])]
    return {"blocks": list(mask.num_blocks), "side": list(side), "heads": heads}


def shares(mask: BlockMask, head: int, side: tuple[int, ...]) -> Tensor:
    """(rows, columns) float32, share of the blocks that a head keeps in each cell of the map."""
    one = BlockMask(mask.bits[:, [head]], mask.q_len, mask.kv_len, mask.block_size, 1, mask.density)
    return torch.nn.functional.adaptive_avg_pool2d(one.to_dense().float(), side).mean((0, 1))


def pack(cells: Tensor) -> str:
    """Four bits a cell, the first of two in the low bits, base64. What is kept never reads as 0."""
    levels = (cells * LEVELS).sub(1e-4).ceil().clamp(0, LEVELS).to(torch.uint8).flatten().cpu()
    pairs = torch.nn.functional.pad(levels, (0, len(levels) % 2)).unflatten(0, (-1, 2))
    return base64.b64encode((pairs[:, 0] + pairs[:, 1] * 16).numpy().tobytes()).decode()

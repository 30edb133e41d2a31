"""How much of the softmax mass a mask keeps, from a sample of query rows."""

import torch
from torch import Tensor

from .block_mask import BlockMask

SAMPLED_ROWS = 64  # error below 0.01
ROWS_AT_ONCE = 16  # bounds the scores in memory


def sampled_kept_mass(
    query: Tensor, key: Tensor, block_mask: BlockMask, kv_len: Tensor | None = None
) -> Tensor:
    """Share of softmax mass inside the mask, from evenly spaced query rows against all keys.

    Args:
        query, key: (B, S, H, D) in block order.
        kv_len: (B,) valid keys of each sample; None where all are.

    Returns:
        (H,) float32, mean over samples and rows.
    """
    length = query.shape[1]
    count = min(SAMPLED_ROWS, length)
    rows = (torch.arange(count, device=query.device) + 0.5).mul(length / count).long()
    dense = block_mask.to_dense()
    keys = key.permute(0, 2, 3, 1).float()  # (B, H, D, S)
    total = torch.zeros(query.shape[2], device=query.device)
    for chunk in rows.split(ROWS_AT_ONCE):
        scores = query[:, chunk].transpose(1, 2).float() @ keys * query.shape[-1] ** -0.5
        if kv_len is not None:
            padded = torch.arange(key.shape[1], device=key.device) >= kv_len[:, None]
            scores = scores.masked_fill(padded[:, None, None], -torch.inf)
        mass = scores.softmax(-1)  # (B, H, rows, S)
        inside = dense[:, :, chunk // block_mask.block_size[0]]  # (B, H, rows, Nk)
        inside = inside.repeat_interleave(block_mask.block_size[1], -1)[..., : key.shape[1]]
        total += (mass * inside).sum((0, 2, 3))
    return total / (count * query.shape[0])

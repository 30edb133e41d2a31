"""A few query rows against all keys: what they attend to, and what each mask costs them."""

import torch
from torch import Tensor

from ..grid import VideoGrid
from .search import Search

GOLDEN_RATIO = 0.6180339887498949


def sampled_places(grid: VideoGrid, rows: int, device: torch.device) -> Tensor:
    """Video tokens spread by the golden ratio, (rows,) int64: even, and in step with no axis."""
    share = torch.arange(min(rows, grid.video_tokens), dtype=torch.float64) * GOLDEN_RATIO % 1
    first, _ = grid.video_span
    return (first + (share * grid.video_tokens).long()).to(device)


def attention_of_rows(search: Search, places: Tensor) -> Tensor:
    """Softmax of the rows at `places` over all keys, (B, H, rows, S) float32."""
    query = search.query[:, places].transpose(1, 2).float()
    scores = query @ search.key.permute(0, 2, 3, 1).float() * query.shape[-1] ** -0.5
    if (kv_len := search.kv_len) is not None:
        padded = torch.arange(scores.shape[-1], device=scores.device) >= kv_len[:, None]
        scores = scores.masked_fill(padded[:, None, None], -torch.inf)
    return scores.softmax(-1)


def mass_of_places(search: Search, block_size: int, places: Tensor) -> tuple[Tensor, float]:
    """Softmax mass of single rows in each key block, (B, H, rows, N). Cost rows / (2 S)."""
    weights = attention_of_rows(search, places)
    padded = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % block_size))
    cost = len(places) / (2 * weights.shape[-1])
    return padded.unflatten(-1, (-1, block_size)).sum(-1), cost


def output_errors(
    search: Search, block_size: int, masks: list[Tensor], places: Tensor
) -> tuple[Tensor, float]:
    """How far the outputs of some rows under each mask are from dense (Sparse VideoGen, Alg. 1).

    Args:
        masks: each (B or 1, H or 1, N, N) bool.

    Returns:
        Mean squared errors (number of masks, B, H), and their cost: one product with the keys and,
        for dense and for each mask, one with the values.
    """
    assert search.value is not None, "outputs cannot be compared without values"
    weights = attention_of_rows(search, places)
    value = search.value.transpose(1, 2).float()  # (B, H, S, D)
    dense = weights @ value
    errors = []
    for mask in masks:
        inside = mask[:, :, places // block_size].repeat_interleave(block_size, -1)
        kept = weights * inside[..., : weights.shape[-1]]
        output = kept @ value / kept.sum(-1, keepdim=True).clamp_min(1e-20)
        errors.append((output - dense).square().mean((-1, -2)))
    return torch.stack(errors), (2 + len(masks)) * len(places) / (2 * weights.shape[-1])


def choose_masks(masks: list[Tensor], losses: Tensor) -> Tensor:
    """For each sample and head the mask of least loss; losses (number of masks, B, H)."""
    best = losses.argmin(0)[..., None, None]
    chosen = masks[0]
    for index, mask in enumerate(masks[1:], start=1):
        chosen = torch.where(best == index, mask, chosen)
    return chosen.expand(*losses.shape[1:], -1, -1)

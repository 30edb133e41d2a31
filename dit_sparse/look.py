"""Look at a pipeline's attention while it generates: the measuring part of `dit-sparse profile`.

At a few steps of a dense generation, in every layer, a few whole blocks of query rows of each head
attend to all keys. Whole blocks, since the rows of a block share its mask: a row alone would choose
better for itself than any block mask can. Each block of rows keeps its best blocks of the video's
keys along the curve, exactly chosen; text is attended on top. One head at a time and from sampled
rows, so that it fits beside the largest models.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fingerprint import BLOCK, DENSITIES, DENSITY, ORDER, QUERY_BLOCKS, Profile
from .grid import VideoGrid, token_order
from .probe import run_with_probes
from .step import DenseAttention

LOOKS = 5  # steps at which rows are looked at


def look_steps(num_steps: int) -> list[int]:
    """Steps to look at: evenly spaced, the last among them, the first after a tenth."""
    first = num_steps // 10
    count = min(LOOKS, num_steps - first)
    return sorted(
        {first + round(i * (num_steps - 1 - first) / max(count - 1, 1)) for i in range(count)}
    )


@dataclass
class Probe:
    """Stands in for the dense attention of one layer and looks at some of its rows."""

    entries: list[dict]
    state: Any
    layer: int
    dense: DenseAttention
    first: dict[str, Tensor] = field(default_factory=dict)  # blocks of the first look, by branch

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, kv_len: Tensor | None) -> Tensor:
        call = self.state.call
        if call.step in look_steps(call.num_steps):
            kept, text, error, chosen = look(query, key, value, call.grid, kv_len)
            if not error.isfinite().all():
                raise RuntimeError(
                    f"the attention of layer {self.layer} is not finite at step {call.step}: try"
                    " --dtype float32 or bfloat16"
                )
            first = self.first.setdefault(call.branch, chosen)
            both, either = (chosen & first).sum((0, 2, 3)), (chosen | first).sum((0, 2, 3))
            self.entries.append({
                "branch": call.branch,
                "step": call.step,
                "layer": self.layer,
                "kept_mass": [rounded(heads) for heads in kept.T],
                "text_mass": rounded(text),
                "overlap": rounded(both / either),
                "error": rounded(error),
            })  # fmt: skip
        return self.dense(query, key, value, kv_len)


def look(
    query: Tensor, key: Tensor, value: Tensor, grid: VideoGrid, kv_len: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sampled blocks of rows of (B, S, H, D) in raster order, a head at a time.

    Returns:
        kept mass (H, densities), text mass (H,), error (H,), and the chosen blocks
        (B, H, query blocks, N) bool on the CPU.
    """
    video, size = grid.video_tokens, min(BLOCK, grid.video_tokens)
    index = tokens_in_order(grid).to(query.device)
    whole = video // size  # a short last block is not looked at
    count = min(QUERY_BLOCKS, whole)
    blocks = (torch.arange(count) + 0.5).mul(whole / count).long()
    rows = index[(blocks[:, None] * size + torch.arange(size)).to(query.device)]  # (count, size)
    missing = None if kv_len is None else index >= kv_len[:, None]  # (B, S)
    seen = [
        look_at_head(
            query[:, rows, head], key[:, index, head], value[:, index, head], video, missing
        )
        for head in range(query.shape[2])
    ]
    kept, text, error, chosen = zip(*seen)
    return torch.stack(kept), torch.stack(text), torch.stack(error), torch.stack(chosen, 1)


def tokens_in_order(grid: VideoGrid) -> Tensor:
    """Places of the video's tokens along the curve, then those of the text, (S,)."""
    start, stop = grid.text_span
    first = grid.text_tokens if grid.text_first else 0
    return torch.cat([token_order(grid, ORDER, BLOCK)[0] + first, torch.arange(start, stop)])


def look_at_head(
    query: Tensor, key: Tensor, value: Tensor, video: int, missing: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One head: query (B, blocks, rows, D); key and value (B, S, D), the video's tokens first.

    Returns:
        kept mass (densities,), text mass (), error (), chosen blocks (B, blocks, N).
    """
    batch, blocks, size, dim = query.shape
    key, value = key.float(), value.float()
    scores = query.flatten(1, 2).float() @ key.mT * dim**-0.5  # (B, blocks * rows, S)
    if missing is not None:
        scores = scores.masked_fill(missing[:, None], -torch.inf)
    weights = scores.softmax(-1)
    rows = weights[..., :video].unflatten(1, (blocks, size)).mean(2)  # (B, blocks, video)
    mass = F.pad(rows, (0, -video % BLOCK)).unflatten(-1, (-1, BLOCK)).sum(-1)  # (B, blocks, N)
    text = 1 - mass.sum(-1).mean()
    best, order = (mass / mass.sum(-1, keepdim=True)).sort(-1, descending=True)
    few = [max(round(density * mass.shape[-1]), 1) for density in (*DENSITIES, DENSITY)]
    kept = best.cumsum(-1).mean((0, 1))[[count - 1 for count in few[:-1]]]
    chosen = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, order[..., : few[-1]], True)
    dense = weights @ value
    inside = chosen.repeat_interleave(BLOCK, -1)[..., :video].repeat_interleave(size, 1)
    weights[..., :video] *= inside  # in place: it may be the largest tensor of the run
    sparse = weights @ value / weights.sum(-1, keepdim=True)
    return kept, text, (sparse - dense).norm() / dense.norm().clamp_min(1e-20), chosen.cpu()


def rounded(values: Tensor) -> list[float]:
    """To three digits: the sample is no more exact, and files of large models stay small."""
    return [round(x, 3) for x in values.clamp_min(0).tolist()]


def profile(pipe: Any, run: Callable[[], Any], **facts: Any) -> Profile:
    """Look at the attention of a pipeline while `run` generates with it, densely.

    Args:
        pipe: a supported pipeline; afterwards it is as it was.
        facts: pipeline, call and environment, for the record.

    Raises:
        RuntimeError: the attention gives NaN or infinity.
    """
    entries: list[dict] = []
    call, _ = run_with_probes(pipe, run, partial(Probe, entries))
    grid = call.grid
    return Profile(
        **facts,
        grid=(grid.frames, grid.height, grid.width),
        text_tokens=grid.text_tokens,
        num_steps=call.num_steps,
        entries=entries,
    )

"""The offline search of Sparse-vDiT: run a pipeline once and choose a mode for each head.

At every step, in every layer and CFG branch, all modes run; each head takes the one of least
error + weight * density, and dense attention where all of these exceed epsilon. What was chosen
goes on through the model, so that later choices see the error of earlier ones (arXiv 2506.03065,
section 4.2; departures stand in `patterns/sparse_vdit.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .api import supported_transformers
from .attention import sparse_attention
from .block_mask import BlockMask
from .config import SparseConfig, is_number
from .grid import token_order
from .patterns.mode_table import ModeTable
from .patterns.model_marks import marks_of
from .patterns.sparse_vdit import mode_masks
from .probe import run_with_probes
from .step import DenseAttention, permute_video

DEFAULT_WEIGHT, DEFAULT_EPSILON = 0.5, 0.25


@dataclass
class ModeSearch:
    """What the search was asked for, and what it found: `chosen[branch, step, layer]`."""

    density: float = 0.2
    order: str = "raster"
    block_size: int = 64
    weight: float = DEFAULT_WEIGHT
    epsilon: float = DEFAULT_EPSILON
    chosen: dict[tuple[str, int, int], str] = field(default_factory=dict)

    def __post_init__(self):
        SparseConfig(density=self.density, order=self.order, block_size=self.block_size)  # checks
        for name in ("weight", "epsilon"):
            value = getattr(self, name)
            if not is_number(value) or not value >= 0:
                raise ValueError(f"{name} is a number of at least 0, got {value!r}")

    def choose(self, losses: Tensor) -> Tensor:
        """(modes but full, H) -> the mode of each head, (H,), counted with full as 0."""
        return torch.where(losses.amin(0) > self.epsilon, 0, losses.argmin(0) + 1)


class Probe:
    """Stands in for the dense attention of one layer: tries all modes and passes on the chosen."""

    def __init__(self, search: ModeSearch, state: Any, layer: int, dense: DenseAttention):
        self.search, self.state, self.layer, self.dense = search, state, layer, dense

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, kv_len: Tensor | None) -> Tensor:
        search, call = self.search, self.state.call
        index, inverse = token_order(call.grid, search.order, search.block_size)
        index, inverse = index.to(query.device), inverse.to(query.device)
        dense = permute_video(self.dense(query, key, value, kv_len), index, call.grid)
        query, key, value = (permute_video(x, index, call.grid) for x in (query, key, value))
        outputs, densities = [], []
        size = (search.block_size, search.block_size)
        place = search.order, search.block_size, search.density, True, query.device
        for mask in mode_masks(call.grid, *place)[1:]:
            packed = BlockMask.from_dense(mask[None, None], query.shape[1], query.shape[1], size)
            outputs.append(sparse_attention(query, key, value, packed, kv_len=kv_len))
            densities.append(packed.density)
        losses = relative_errors(outputs, dense) + search.weight * torch.stack(densities)
        modes = search.choose(losses)
        search.chosen[call.branch, call.step, self.layer] = "".join(map(str, modes.tolist()))
        output = dense
        for mode, candidate in enumerate(outputs, start=1):
            output = torch.where((modes == mode)[:, None], candidate, output)
        return permute_video(output, inverse, call.grid)


def relative_errors(outputs: list[Tensor], dense: Tensor) -> Tensor:
    """||O_i - O||^2 of each head over the mean ||O||^2 of all, (modes, H); inputs (B, S, H, D)."""
    energy = dense.float().square().sum((0, 1, 3)).mean().clamp_min(1e-20)
    errors = [(output.float() - dense.float()).square().sum((0, 1, 3)) for output in outputs]
    return torch.stack(errors) / energy


def calibrate(pipe: Any, run: Callable[[], Any], search: ModeSearch, prompts: int = 1) -> ModeTable:
    """Search the modes of a pipeline's heads.

    Args:
        pipe: a supported pipeline; afterwards it is as it was.
        run: generates with it, all prompts in one batch.
        search: settings, filled with what is found.
        prompts: how many `run` uses, for the record.

    Raises:
        RuntimeError: the run skipped a step, a layer or a branch (a step cache is on).
    """
    call, layers = run_with_probes(pipe, run, partial(Probe, search))
    grid, num_steps = call.grid, call.num_steps
    branches = dict.fromkeys(branch for branch, _, _ in search.chosen)
    try:
        modes = {
            branch: [
                [search.chosen[branch, step, layer] for layer in range(layers)]
                for step in range(num_steps)
            ]
            for branch in branches
        }
    except KeyError as missing:
        raise RuntimeError(
            f"calibration saw no attention at (branch, step, layer) {missing}: turn off step caches"
            " and generate all steps"
        ) from missing
    return ModeTable(
        transformer=type(getattr(pipe, "transformer", pipe)).__name__,
        layers=layers,
        heads=len(next(iter(search.chosen.values()))),
        grid=(grid.frames, grid.height, grid.width),
        num_steps=num_steps,
        density=search.density,
        order=search.order,
        block_size=search.block_size,
        weight=search.weight,
        epsilon=search.epsilon,
        prompts=prompts,
        modes=modes,
        models=marks_of(transformer for transformer, _ in supported_transformers(pipe)),
    )

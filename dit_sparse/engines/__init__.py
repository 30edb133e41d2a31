"""What computes block-sparse attention: one file an engine, by the name a user types.

Every engine has three functions:

    missing(device)  None where it is installed and runs on the device, else why not
    unfit(problem)   None where it serves tensors and blocks like these, else why not
    attend(query, key, value, block_mask, *, kv_len, scale, precision)  output and log-sum-exp
"""

from typing import NamedTuple

import torch

from . import fa4, flex, torch_engine, triton_engine

ENGINES = {"triton": triton_engine, "fa4": fa4, "flex": flex, "torch": torch_engine}


class Problem(NamedTuple):
    """What decides whether an engine can run."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_size: tuple[int, int]
    lengths: bool = False  # samples of different valid length
    precision: str = "full"


def why_not(engine: str, problem: Problem) -> str | None:
    module = ENGINES[engine]
    return module.missing(problem.device) or module.unfit(problem)


def preferred(problem: Problem) -> tuple[str, ...]:
    """Engines in the order in which "auto" tries them, from what was measured (docs/log.md)."""
    if fa4.is_faster(problem):
        return "fa4", "triton", "flex", "torch"
    return "triton", "flex", "torch"

"""How long attention calls take by their shape: whether sparse would be slower than dense.

`cost_model.json` holds, by GPU architecture, constants that `benchmarks/crossover.py --fit` found
from whole calls of one layer: seconds = sum of constant x feature, all constants positive.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from .schedule import step_kind

# Of a call with n = batch x heads, S tokens, D channels, at a density that holds the tail's share.
FEATURES = {
    "launches": lambda n, s, d, density: 1.0,
    "bytes": lambda n, s, d, density: n * s * d,
    "blocks": lambda n, s, d, density: n * s * s,
    "all pairs": lambda n, s, d, density: n * s * s * d,
    "kept pairs": lambda n, s, d, density: n * s * s * d * density,
}
KINDS = {
    "dense": ("launches", "bytes", "all pairs"),
    "search": ("launches", "bytes", "blocks", "all pairs"),
    "reuse": ("launches", "bytes", "kept pairs"),
}


def features_of(kind: str, shape: Sequence[int], density: float) -> list[float]:
    """Of a call on (B, S, H, D), in the order of its kind's constants."""
    batch, tokens, heads, dim = shape
    return [FEATURES[name](batch * heads, tokens, dim, density) for name in KINDS[kind]]


def predicted_speedup(
    shape: Sequence[int],
    density: float,
    search_at: tuple[float, ...],
    num_steps: int,
    apart: int,
    device: torch.device,
) -> float | None:
    """Attention seconds of a dense run over those of a sparse one; None where nothing is known."""
    constants = constants_of(device)
    if constants is None:
        return None
    seconds = {
        kind: sum(c * x for c, x in zip(constants[kind], features_of(kind, shape, density)))
        for kind in KINDS
    }
    found, total = None, 0.0
    for step in range(num_steps):
        kind = step_kind(step, num_steps, search_at, found, apart=apart)
        found = step if kind == "search" else found
        total += seconds[kind]
    return num_steps * seconds["dense"] / total


@cache
def constants_of(device: torch.device) -> dict[str, list[float]] | None:
    if device.type != "cuda" or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return known_constants().get(f"sm_{major}{minor}")


@cache
def known_constants() -> dict[str, dict[str, list[float]]]:
    return json.loads(Path(__file__).with_name("cost_model.json").read_text(encoding="utf-8"))

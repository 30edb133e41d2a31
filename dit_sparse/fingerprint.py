"""The fingerprint of a pipeline's attention: `dit-sparse profile`.

At a few steps 64 query rows of each head, evenly spaced, attend to all keys. Each row keeps its
best blocks of 64 keys along the curve: how much softmax mass they hold at several densities, how
much of an early choice is still right later, and what the output loses. From rows alone, so that it
fits beside the largest models. A small stand-in resembles a real model where these figures do.

A row alone chooses better than the rows of a block together: a block mask keeps less than this.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .grid import token_order
from .probe import run_with_probes
from .step import DenseAttention, permute_video

KIND, SCHEMA = "dit-sparse attention profile", 1
ROWS, BLOCK, DENSITY = 64, 64, 0.2
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
LOOKS = 5  # steps at which rows are sampled


@dataclass(frozen=True)
class Profile:
    """What was seen.

    Attributes:
        pipeline, call, environment: of the run, for the record.
        grid: frames, height and width of the video in tokens.
        entries: one for each look at a layer: branch, step, layer, and for each head `kept_mass`
            (a list over `densities`), `overlap` (Jaccard index of the blocks chosen now and at the
            first look, at `density`) and `error` (relative, of the rows' outputs at `density`).
    """

    pipeline: str
    call: dict
    environment: dict
    grid: tuple[int, int, int]
    text_tokens: int
    num_steps: int
    entries: list[dict]
    rows: int = ROWS
    block_size: int = BLOCK
    density: float = DENSITY
    densities: tuple[float, ...] = DENSITIES

    def save(self, path: Path) -> None:
        text = json.dumps({"kind": KIND, "schema": SCHEMA, **asdict(self)}, separators=(",", ":"))
        path.write_text(text + "\n")

    def means(self) -> dict[str, float]:
        """Over layers, heads, branches and steps; ageing is of the last step."""
        kept = torch.tensor([head for e in self.entries for head in e["kept_mass"]]).mean(0)
        last = max(e["step"] for e in self.entries)
        end = [x for e in self.entries if e["step"] == last for x in e["overlap"]]
        errors = [x for e in self.entries for x in e["error"]]
        found = {f"kept mass at {d}": m for d, m in zip(self.densities, kept.tolist())}
        found[f"overlap at step {last}"] = sum(end) / len(end)
        return found | {f"output error at {self.density}": sum(errors) / len(errors)}


def load_profile(path: Path) -> Profile:
    """Read a profile; it is data alone.

    Raises:
        ValueError: the file is not one.
    """
    try:
        values = json.loads(Path(path).read_text())
        kind, schema = values.pop("kind"), values.pop("schema")
        profile = Profile(**values)
        heads = {
            len(e[name]) for e in profile.entries for name in ("kept_mass", "overlap", "error")
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a profile of dit-sparse: {error}") from error
    if (kind, schema) != (KIND, SCHEMA) or len(heads) != 1:
        raise ValueError(f"{path} is not a profile of dit-sparse, schema {SCHEMA}: make it again")
    return profile


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
            index = token_order(call.grid, "curve", BLOCK)[0].to(query.device)
            keys, values = (permute_video(x, index, call.grid) for x in (key, value))
            kept, chosen, error = look(query, keys, values, kv_len)
            first = self.first.setdefault(call.branch, chosen)
            both, either = (chosen & first).sum((0, 2, 3)), (chosen | first).sum((0, 2, 3))
            self.entries.append({
                "branch": call.branch,
                "step": call.step,
                "layer": self.layer,
                "kept_mass": [rounded(head) for head in kept],
                "overlap": rounded(both / either),
                "error": rounded(error),
            })  # fmt: skip
        return self.dense(query, key, value, kv_len)


def look(
    query: Tensor, key: Tensor, value: Tensor, kv_len: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sampled rows of (B, S, H, D), a head at a time to bound the memory.

    Returns:
        kept mass (H, densities), chosen blocks (B, H, rows, N) bool on the CPU, error (H,).
    """
    length = query.shape[1]
    count = min(ROWS, length)
    rows = (torch.arange(count, device=query.device) + 0.5).mul(length / count).long()
    seen = [
        look_at_head(query[:, rows, head], key[:, :, head], value[:, :, head], kv_len)
        for head in range(query.shape[2])
    ]
    kept, chosen, error = zip(*seen)
    return torch.stack(kept), torch.stack(chosen, 1), torch.stack(error)


def look_at_head(
    query: Tensor, key: Tensor, value: Tensor, kv_len: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of (B, rows, D) and (B, S, D): (densities,), (B, rows, N) on the CPU, ()."""
    scores = query.float() @ key.float().mT * query.shape[-1] ** -0.5  # (B, rows, S)
    if kv_len is not None:
        padded = torch.arange(key.shape[1], device=key.device) >= kv_len[:, None]
        scores = scores.masked_fill(padded[:, None], -torch.inf)
    weights = scores.softmax(-1)
    mass = F.pad(weights, (0, -weights.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK)).sum(-1)
    best, order = mass.sort(-1, descending=True)
    blocks = mass.shape[-1]
    kept = best.cumsum(-1).mean((0, 1))[[max(round(d * blocks), 1) - 1 for d in DENSITIES]]
    few = order[..., : max(round(DENSITY * blocks), 1)]
    chosen = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, few, True)
    inside = weights * chosen.repeat_interleave(BLOCK, -1)[..., : weights.shape[-1]]
    inside = inside / inside.sum(-1, keepdim=True)
    exact, sparse = weights @ value.float(), inside @ value.float()
    return kept, chosen.cpu(), (sparse - exact).norm() / exact.norm().clamp_min(1e-20)


def rounded(values: Tensor) -> list[float]:
    return [round(x, 4) for x in values.tolist()]


def profile(pipe: Any, run: Callable[[], Any], **facts: Any) -> Profile:
    """Look at the attention of a pipeline while `run` generates with it, densely.

    Args:
        pipe: a supported pipeline; afterwards it is as it was.
        facts: pipeline, call and environment, for the record.
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

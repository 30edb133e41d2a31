"""Distil SeerAttention's gates from the block mass of a pipeline while it generates.

At every step, in every layer and CFG branch, the gate of the layer takes some steps of Adam towards
the exact block mass of that call; the pipeline itself stays dense, and is not trained.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .api import supported_transformers
from .config import SparseConfig, positive, whole
from .dense import dense_attention_with_lse
from .grid import token_order
from .patterns.gates import Gates, first_gates, gate_logits, pooled_features
from .patterns.model_marks import marks_of
from .patterns.score import exact_mass
from .patterns.search import Search
from .probe import run_with_probes
from .step import DenseAttention, permute_video


@dataclass
class Distillation:
    """How gates are distilled, and how far they were from the mass at each call, before it."""

    order: str = "curve"
    block_size: int = 64
    updates: int = 10  # of a gate at each call
    learning_rate: float = 1e-3
    divergences: list[float] = field(default_factory=list)

    def __post_init__(self):
        SparseConfig(order=self.order, block_size=self.block_size)  # checks
        whole("updates", self.updates, 1)
        positive("learning_rate", self.learning_rate)

    def progress(self) -> str:
        """Mean divergence of the first and of the last tenth of calls."""
        tenth = max(1, len(self.divergences) // 10)
        ends = self.divergences[:tenth], self.divergences[-tenth:]
        first, last = (sum(x) / len(x) for x in ends)
        return f"divergence from the block mass {first:.3f} at first, {last:.3f} in the end"


class LayerGate:
    """The gate of one layer, and its optimizer. Maps as in `patterns.gates.Gates`."""

    def __init__(self, heads: int, dim: int, settings: Distillation, device: torch.device):
        first = first_gates(1, heads, dim, settings.order, settings.block_size)
        self.maps = [x[0].to(device) for x in (first.query, first.key)]
        self.optimizer = torch.optim.Adam(self.maps, settings.learning_rate)

    def learn(self, features: tuple[Tensor, Tensor], mass: Tensor, updates: int) -> float:
        """Some updates towards `mass` (B, H, N, N), of the same blocks as the features.

        Returns:
            The divergence before them.
        """
        target = mass / mass.sum(-1, keepdim=True).clamp_min(1e-20)
        divergences = []
        for _ in range(updates):
            divergence, gradients = divergence_from(target, features, self.maps)
            for weights, gradient in zip(self.maps, gradients):
                weights.grad = gradient
            self.optimizer.step()
            divergences.append(divergence)
        return float(divergences[0])


def divergence_from(
    target: Tensor, features: tuple[Tensor, Tensor], maps: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Mean Kullback-Leibler divergence of a gate's rows from `target`, and its gradients.

    By hand, since attention is called from an operator, below torch's own differentiation.
    """
    (query, key), (query_map, key_map) = features, maps
    log_estimate = gate_logits(features, query_map, key_map).log_softmax(-1)
    rows = (torch.xlogy(target, target) - target * log_estimate).sum(-1)
    of_logits = (log_estimate.exp() - target) * query_map.shape[-2] ** -0.5 / rows.numel()
    of_query = query.mT @ of_logits @ (key @ key_map)
    of_key = key.mT @ of_logits.mT @ (query @ query_map)
    return rows.mean(), [of_query.sum(0), of_key.sum(0)]


class Probe:
    """Stands in for the dense attention of one layer: lets its gate learn, and passes on dense."""

    def __init__(
        self,
        settings: Distillation,
        gates: dict[int, LayerGate],
        state: Any,
        layer: int,
        dense: DenseAttention,
    ):
        self.settings, self.gates, self.state = settings, gates, state
        self.layer, self.dense = layer, dense

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, kv_len: Tensor | None) -> Tensor:
        grid, size = self.state.call.grid, self.settings.block_size
        index, _ = token_order(grid, self.settings.order, size)
        q, k, v = (permute_video(x, index.to(x.device), grid) for x in (query, key, value))
        _, lse = dense_attention_with_lse(q, k, v, kv_len)
        search = Search(q, k, lse, grid, self.layer, self.state.call.lengths)
        mass, _ = exact_mass(search, size)
        text, video = grid.text_blocks(size), torch.ones(mass.shape[-1], dtype=torch.bool)
        video[text.start : text.stop] = False
        if video.any():
            features = tuple(x[:, :, video].float() for x in pooled_features(q, k, size))
            gate = self.gates.get(self.layer)
            if gate is None:
                heads, dim = query.shape[2:]
                gate = LayerGate(heads, dim, self.settings, query.device)
                self.gates[self.layer] = gate
            seen = mass[:, :, video][..., video]
            before = gate.learn((features[0], features[1]), seen, self.settings.updates)
            self.settings.divergences.append(before)
        return self.dense(query, key, value, kv_len)


def distil(pipe: Any, run: Callable[[], Any], settings: Distillation) -> Gates:
    """Distil the gates of a pipeline.

    Args:
        pipe: a supported pipeline; afterwards it is as it was.
        run: generates with it, all prompts in one batch.
        settings: filled with the divergences that were seen.

    Raises:
        RuntimeError: a layer was never called (a step cache is on), or all blocks hold text.
    """
    gates: dict[int, LayerGate] = {}
    _, layers = run_with_probes(pipe, run, partial(Probe, settings, gates))
    if len(gates) < layers:
        raise RuntimeError(
            f"only {len(gates)} of {layers} layers were seen: turn off step caches, and make videos"
            f" of more than {settings.block_size} tokens"
        )
    maps = ([gates[layer].maps[i].detach().cpu() for layer in range(layers)] for i in (0, 1))
    query, key = (torch.stack(x) for x in maps)
    models = marks_of(transformer for transformer, _ in supported_transformers(pipe))
    return Gates(query, key, settings.order, settings.block_size, models)

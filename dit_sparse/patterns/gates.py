"""Gates of each layer and head: linear maps of pooled queries and keys whose product ranks blocks.

A safetensors file; what it was distilled for stands in its metadata and is checked.
"""

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import block_pool
from .model_marks import Marks, check_marks

KIND, SCHEMA = "seerattention gates", 1


@dataclass(frozen=True)
class Gates:
    """The maps of all layers that run sparse.

    Attributes:
        query: (layers, heads, D, g). key: (layers, heads, 3 D, g), of largest, least and mean.
        order, block_size: that they were distilled in.
        models: what tells the model from others, none in older files.
    """

    query: Tensor
    key: Tensor
    order: str
    block_size: int
    models: list[Marks] = field(default_factory=list)

    def refuse_other_size(self, layers: int, heads: int, dim: int) -> None:
        for name, mine, given in zip(
            ("layers", "heads", "channels a head"), self.query.shape, (layers, heads, dim)
        ):
            if mine != given:
                raise ValueError(
                    f"the gates are of another model: they have {mine} {name}, this run has"
                    f" {given}; make some with `dit-sparse calibrate --method seerattention`"
                )

    def save(self, path: str | Path) -> None:
        from safetensors.torch import save_file

        facts = {"kind": KIND, "schema": SCHEMA, "order": self.order, "block_size": self.block_size}
        facts["models"] = self.models
        tensors = {"query": self.query.contiguous(), "key": self.key.contiguous()}
        save_file(tensors, path, {"dit_sparse": json.dumps(facts)})


def first_gates(layers: int, heads: int, dim: int, order: str, block_size: int) -> Gates:
    """Gates that rank like the products of block means, which distillation starts from."""
    one = torch.eye(dim).expand(layers, heads, dim, dim)
    return Gates(one.clone(), torch.cat([one * 0, one * 0, one], dim=2), order, block_size)


def load_gates(path: str) -> Gates:
    """Read gates.

    Raises:
        ValueError: not there, or not gates.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(
            f"no gates at {file}: make some with `dit-sparse calibrate --method seerattention`"
        )
    return _load(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _load(file: Path, changed: int) -> Gates:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            facts = json.loads((opened.metadata() or {})["dit_sparse"])
            if (facts["kind"], facts["schema"]) != (KIND, SCHEMA):
                raise ValueError(f"it does not say {KIND!r}, schema {SCHEMA}")
            models = facts.get("models", [])
            check_marks(models)
            query, key = opened.get_tensor("query"), opened.get_tensor("key")
            return Gates(query, key, facts["order"], facts["block_size"], models)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{file} holds no gates ({error}): make some with `dit-sparse calibrate --method"
            " seerattention`"
        ) from error


def pooled_features(query: Tensor, key: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Mean queries (B, H, N, D), and largest, least and mean keys (B, H, N, 3 D), of each block."""
    blocks = F.pad(key.float(), (0, 0, 0, 0, 0, -key.shape[1] % block_size), value=torch.nan)
    blocks = blocks.unflatten(1, (-1, block_size)).permute(0, 3, 1, 2, 4)  # (B, H, N, block, D)
    largest = blocks.nan_to_num(-torch.inf).amax(3)
    least = blocks.nan_to_num(torch.inf).amin(3)
    parts = largest, least, block_pool(key, block_size)
    return block_pool(query, block_size), torch.cat(parts, dim=-1)


def gate_logits(features: tuple[Tensor, Tensor], query: Tensor, key: Tensor) -> Tensor:
    """(B, H, N, N), from `pooled_features` and one layer's maps (H, D, g) and (H, 3 D, g)."""
    return (features[0] @ query) @ (features[1] @ key).mT * query.shape[-2] ** -0.5

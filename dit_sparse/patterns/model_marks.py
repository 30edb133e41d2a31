"""What tells a model from others of as many layers and heads: its settings and a few weights.

Files that were searched or distilled on one model keep its marks and refuse another.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

SAMPLES = 16
MOST_APART = 0.2  # relative error; weights cast to 8 bits are nearer
Marks = dict[str, Any]


def marks_of(transformers: Iterable[nn.Module]) -> list[Marks]:
    """Of each transformer of a pipeline, as JSON keeps them."""
    return [
        {"settings": settings_of(transformer)} | sample_of(transformer)
        for transformer in transformers
    ]


def settings_of(transformer: Any) -> dict[str, Any]:
    """Its configuration, without where it came from and how its weights are kept."""
    kept = {
        name: value
        for name, value in dict(getattr(transformer, "config", {})).items()
        if not name.startswith("_") and name != "quantization_config"
    }
    return json.loads(json.dumps(kept, default=str))


def sample_of(transformer: nn.Module) -> Marks:
    """Some numbers of the first weight that can be read, and its name."""
    for name, weight in transformer.named_parameters():
        if weight.ndim >= 2 and is_readable(weight):
            return {"name": name, "weight": [float(f"{x:.4g}") for x in numbers_of(weight)]}
    return {}


def is_readable(weight: torch.Tensor) -> bool:
    """Whether it is here (not on "meta"), and not packed by a quantiser."""
    plain = type(weight) in (nn.Parameter, torch.Tensor)
    return plain and weight.is_floating_point() and weight.device.type != "meta"


def numbers_of(weight: torch.Tensor) -> list[float]:
    flat = weight.detach().flatten()
    places = torch.linspace(0, len(flat) - 1, SAMPLES, device=flat.device).long()
    return flat[places].float().tolist()


def refuse_other_model(what: str, marks: Sequence[Marks], transformers: Sequence[Any]) -> None:
    """Compare with what a file keeps; files of before it kept marks have none.

    Raises:
        ValueError: another number of transformers, other settings or other weights.
    """
    if not marks:
        return
    if len(marks) != len(transformers):
        raise ValueError(
            f"{what} of another model: expected {len(marks)} transformers in the pipeline, got"
            f" {len(transformers)}; calibrate on yours"
        )
    for mark, transformer in zip(marks, transformers, strict=True):
        given = settings_of(transformer)  # other versions of diffusers know other settings
        for name in sorted(mark["settings"].keys() & given.keys()):
            if mark["settings"][name] != given[name]:
                raise ValueError(
                    f"{what} of another model: of one with {name} {mark['settings'][name]}, this"
                    f" one has {given[name]}; calibrate on yours"
                )
        weight = dict(transformer.named_parameters()).get(mark.get("name"))
        if weight is not None and is_readable(weight):
            mine, theirs = torch.tensor(mark["weight"]), torch.tensor(numbers_of(weight))
            if not (theirs - mine).norm() <= MOST_APART * mine.norm():
                raise ValueError(
                    f"{what} of another model: of one with the same settings and other weights;"
                    " calibrate on yours"
                )

"""What tells a model from others of as many layers and heads: its settings and a few numbers of one
weight.

Files that were searched or distilled on one model keep its marks and refuse another. Fine-tunes,
LoRA and quantised weights of the same model pass.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 16
MOST_APART = 0.2  # relative error; 8 bits and fine-tuning change less
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
    for name, weight in readable_weights(transformer).items():
        numbers = [float(f"{x:.4g}") for x in numbers_of(weight)]
        if any(numbers):
            return {"name": name, "weight": numbers}
    return {}


def readable_weights(transformer: nn.Module) -> dict[str, Tensor]:
    """Matrices that are here, neither on "meta" nor on disk, and that no quantiser packed."""
    hooks = (getattr(module, "_diffusers_hook", None) for module in transformer.modules())
    groups = [hook.get_hook("group_offloading") for hook in hooks if hook is not None]
    if any(getattr(hook.group, "offload_to_disk_path", None) for hook in groups if hook):
        return {}  # what stands in for them is not initialised
    return {
        name.replace(".base_layer", ""): weight  # what LoRA is added to
        for name, weight in transformer.named_parameters()
        if type(weight) is nn.Parameter
        and weight.ndim >= 2
        and weight.is_floating_point()
        and weight.device.type != "meta"
    }


def numbers_of(weight: Tensor) -> list[float]:
    flat = weight.detach().flatten()
    places = torch.arange(SAMPLES, device=flat.device) * (len(flat) - 1) // (SAMPLES - 1)
    return flat[places].float().tolist()


def check_marks(marks: Any) -> None:
    """Raise `ValueError` unless a file's marks are such as `marks_of` makes, or none."""
    if not isinstance(marks, list):
        raise ValueError("its models are no list")
    for mark in marks:
        if not isinstance(mark, dict) or not isinstance(mark.get("settings"), dict):
            raise ValueError("its models have no settings")
        if mark.keys() == {"settings"}:
            continue
        name, weight = mark.get("name"), mark.get("weight")
        whole = isinstance(weight, list) and len(weight) == SAMPLES
        if not isinstance(name, str) or not whole or not all(type(x) is float for x in weight):
            raise ValueError(f"a model's weight is not {SAMPLES} numbers and its name")
        if not torch.tensor(weight).isfinite().all():
            raise ValueError("a model's weight is not finite")


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
                    f"{what} of another model: of one with {name} {mark['settings'][name]!s:.40},"
                    f" this one has {given[name]!s:.40}; calibrate on yours"
                )
        weight = readable_weights(transformer).get(mark.get("name", ""))
        if weight is not None:
            mine, theirs = torch.tensor(mark["weight"]), torch.tensor(numbers_of(weight))
            if not (theirs - mine).norm() <= MOST_APART * mine.norm():
                raise ValueError(
                    f"{what} of another model: of one with the same settings and other weights;"
                    " calibrate on yours"
                )

"""A method as typed on the command line: `adaspa`, or `adaspa:density=0.1,order=tile`."""

import ast
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DENSE = "dense"
LONGEST_SLUG = 150
FILES = ".py", ".json"  # a rule of one's own, a preset


@dataclass(frozen=True)
class MethodSpec:
    """A method's name, its options, and the text that both came from."""

    text: str
    name: str
    options: dict[str, Any]

    @property
    def slug(self) -> str:
        """The text as part of a file name, which systems allow 255 bytes."""
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", self.text).strip("-")
        if len(slug) <= LONGEST_SLUG:
            return slug
        return f"{slug[:LONGEST_SLUG]}-{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"


def parse_method(text: str, allow_dense: bool = False) -> MethodSpec:
    """Read `name` or `name:option=value,option=value` and check it against the known methods.

    Raises:
        ValueError: a name or a value that is not allowed.
        TypeError: an option that the method does not have.
    """
    name, _, rest = text.partition(":")
    name = name.strip()
    spec = MethodSpec(text, name if name.endswith(FILES) else name.lower(), parse_options(rest))
    if allow_dense and spec.name == DENSE:
        if spec.options:
            raise ValueError(f"dense attention has no options, got {rest!r}")
    else:
        from .api import make_config

        make_config(spec.name, spec.options)  # now, not after minutes of loading
    return spec


def refuse_repeats(methods: Sequence[MethodSpec], seeds: Sequence[int]) -> None:
    """Raise ValueError for a method or a seed given twice: files are named by them."""
    if len({method.slug for method in methods}) < len(methods):
        raise ValueError("the same method with the same options was given twice")
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise ValueError(
                f"a seed given twice makes the same video again: {seed} is given more than once"
            )


def parse_options(text: str) -> dict[str, Any]:
    options = {}
    # A comma inside brackets belongs to a value: search_at=(0.2,0.6).
    for item in filter(None, re.split(r",(?![^(\[]*[)\]])", text)):
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"method options look like density=0.2,order=tile, got {item!r}")
        if key.strip() in options:
            raise ValueError(f"{key.strip()} is given twice in {text!r}")
        options[key.strip()] = parse_value(value.strip())
    return options


def parse_value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)

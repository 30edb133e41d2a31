"""The fingerprint of a pipeline's attention, as a file: what `dit-sparse profile` writes.

A small stand-in resembles a real model where their figures do. How they are measured stands in
`look.py`.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .config import is_number
from .video import whole_file

KIND, SCHEMA = "dit-sparse attention profile", 2
ORDER, BLOCK, DENSITY = "curve", 64, 0.2
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
QUERY_BLOCKS = 8  # looked at in each head
FIGURES = ("text_mass", "overlap", "error")  # one number for each head


@dataclass(frozen=True)
class Profile:
    """What was seen; the file is this as one JSON object, with its kind and schema.

    Attributes:
        pipeline, call, environment: of the run, for the record.
        grid: frames, height and width of the video in tokens.
        entries: one for each look at a layer, by `branch`, `step` and `layer`; a second transformer
            counts its layers anew and has steps of its own. In each, a number for every head:
            `kept_mass`: for each of `densities` a list, the share of the softmax mass on the video
                that the best such share of its key blocks holds;
            `text_mass`: share of all softmax mass that lies on text;
            `overlap`: Jaccard index of the blocks chosen now and at the layer's first look, at
                `density`;
            `error`: ||sparse - dense|| / ||dense|| of the rows' outputs at `density`.
        query_blocks: blocks of `block_size` query rows that were looked at in each head, at most.
    """

    pipeline: str
    call: dict
    environment: dict
    grid: tuple[int, int, int]
    text_tokens: int
    num_steps: int
    entries: list[dict]
    query_blocks: int = QUERY_BLOCKS
    order: str = ORDER
    block_size: int = BLOCK
    density: float = DENSITY
    densities: tuple[float, ...] = DENSITIES

    def save(self, path: Path) -> None:
        values = {"kind": KIND, "schema": SCHEMA, **asdict(self)}
        with whole_file(path) as part:
            text = json.dumps(values, separators=(",", ":"), allow_nan=False)
            part.write_text(text + "\n", encoding="utf-8")

    def figures(self) -> dict[str, float]:
        """Means over branches, steps, layers and heads, and the heads that stand at the edges."""
        kept = torch.tensor([e["kept_mass"] for e in self.entries])  # (entries, densities, H)
        found = {
            f"kept mass at {density}": mass
            for density, mass in zip(self.densities, kept.mean((0, 2)).tolist())
        }
        heads = kept[:, self.densities.index(self.density)].flatten()
        for share in (0.1, 0.9):
            name = f"kept mass at {self.density}, head at {share:.0%}"
            found[name] = heads.quantile(share).item()
        last = max(e["step"] for e in self.entries)
        late = [e["overlap"] for e in self.entries if e["step"] == last]
        found["overlap of last look with first"] = torch.tensor(late).mean().item()
        for name in ("text_mass", "error"):
            values = torch.tensor([e[name] for e in self.entries])
            found[name.replace("_", " ")] = values.mean().item()
        return found


def load_profile(path: Path) -> Profile:
    """Read a profile; it is data alone.

    Raises:
        ValueError: the file is not one, or not of this schema.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if (values.pop("kind"), values.pop("schema")) != (KIND, SCHEMA):
            raise ValueError(f"it does not say {KIND!r}, schema {SCHEMA}")
        for name in ("grid", "densities"):
            values[name] = tuple(values[name])
        profile = Profile(**values)
        _check(profile)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is no attention profile ({error}): make one with `dit-sparse profile`"
        ) from error
    return profile


def _check(profile: Profile) -> None:
    numbers = profile.num_steps, profile.text_tokens, *profile.grid
    if len(profile.grid) != 3 or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("grid, text_tokens and num_steps are whole numbers")
    if profile.density not in profile.densities or not all(0 < d <= 1 for d in profile.densities):
        raise ValueError("densities lie in (0, 1], density is one of them")
    if not profile.entries:
        raise ValueError("it has no entries")
    heads = len(profile.entries[0]["error"])
    for entry in profile.entries:
        if set(entry) != {"branch", "step", "layer", "kept_mass", *FIGURES}:
            raise ValueError(f"an entry has {', '.join(entry)}")
        place = f"branch {entry['branch']}, step {entry['step']}, layer {entry['layer']}"
        if entry["step"] not in range(profile.num_steps) or type(entry["layer"]) is not int:
            raise ValueError(f"there is no {place}")
        rows = [*entry["kept_mass"], *(entry[name] for name in FIGURES)]
        if len(rows) != len(profile.densities) + len(FIGURES) or not all(
            len(row) == heads and all(is_number(x) and x >= 0 for x in row) for row in rows
        ):
            raise ValueError(f"{place} does not have {heads} figures of each kind")


def compare_profiles(one: Path, other: Path) -> dict[str, list[float]]:
    """The figures of two profiles side by side.

    Raises:
        ValueError: a file is no profile, or they were not measured alike.
    """
    a, b = load_profile(one), load_profile(other)
    for name in ("order", "block_size", "density", "densities"):
        if getattr(a, name) != getattr(b, name):
            raise ValueError(f"{one} and {other} were measured with another {name}")
    theirs = b.figures()
    return {name: [value, theirs[name]] for name, value in a.figures().items()}

"""Presets: the cheapest setting that keeps a pipeline's videos as near to dense as asked.

A preset is a JSON file: `method`, `options`, and as evidence what was tried on which pipeline and
call, with PSNR and cost. `enable_sparse_attention(pipe, "preset.json")` reads it; the evidence is
for people.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .generation import Clip, generate_clip, write_json
from .method_spec import MethodSpec
from .metrics import as_clip, psnr
from .patterns import METHODS
from .patterns.auto import Auto

SUFFIX = ".json"
SCHEMA = 2
# What `auto` did before it had these options: older presets were calibrated with it.
BEFORE_SCHEMA_2: dict[str, Any] = {"tail_tokens": 64, "damping": 0.0, "share_guidance": None}
IDENTICAL_DB = 100.0  # stands for an infinite PSNR
# Of `auto`, from cheap to dear, as the small pipelines had it best on tuning prompts.
LADDER: tuple[dict[str, Any], ...] = (
    {"density": 0.05, "tail_tokens": 32, "search_at": (0.0, 0.2, 0.54), "share_guidance": "all"},
    {
        "density": 0.1,
        "tail_tokens": 32,
        "search_at": (0.0, 0.12, 0.35, 0.65),
        "share_guidance": "all",
    },
    {"density": 0.1, "tail_tokens": 32, "search_at": (0.08, 0.26, 0.58)},
    {"density": 0.1, "tail_tokens": 32, "search_at": (0.12, 0.23, 0.43, 0.69)},
    {"density": 0.1, "tail_tokens": 32, "search_at": (0.24, 0.31, 0.43, 0.59, 0.78)},
    {"density": 0.2, "tail_tokens": 32, "search_at": (0.24, 0.31, 0.43, 0.59, 0.78)},
    {"density": 0.35, "tail_tokens": 32, "search_at": (0.24, 0.31, 0.43, 0.59, 0.78)},
)


@dataclass
class Trial:
    """One setting, and what came of it on all prompts."""

    options: dict[str, Any]
    psnr: float  # mean over prompts, dB against dense
    psnr_per_clip: list[float]
    effective_cost: float


@dataclass
class Preset:
    """A method, its options, and why."""

    method: str
    options: dict[str, Any]
    evidence: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        write_json(path, {"schema": SCHEMA, **asdict(self)})


def read_preset(path: str | Path) -> Preset:
    """The preset in a file.

    Raises:
        ValueError: no such file, not a preset, or options that its method does not take.
    """
    file = Path(path).expanduser()
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        preset = Preset(stored["method"], dict(stored["options"]))
        known = stored["schema"] in (1, SCHEMA) and preset.method in METHODS
    except OSError as error:
        raise ValueError(f"cannot read the preset {file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no preset of dit-sparse calibrate --psnr: {error!r}"
        ) from error
    if not known:
        raise ValueError(f"{file} is a preset of another version of dit_sparse: calibrate again")
    if stored["schema"] == 1 and preset.method == "auto":
        preset.options = BEFORE_SCHEMA_2 | preset.options
    try:
        METHODS[preset.method](**preset.options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file} has options that {preset.method} does not take ({error}): correct it, or"
            " calibrate again with this version of dit_sparse"
        ) from error
    return preset


def find_preset(
    pipe: Any,
    call: dict[str, Any],
    clips: list[tuple[str, int]],
    wanted: float,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Preset | None, list[Trial]]:
    """The cheapest rung of `LADDER` whose mean PSNR is at least `wanted`, by bisection.

    Args:
        call: keyword arguments of the pipeline. clips: prompts and their seeds.
        say: told of each trial.

    Returns:
        The preset, None where no rung that is cheaper than dense reaches it, and all trials.
    """
    dense = [generate_clip(pipe, prompt, seed, call).frames for prompt, seed in clips]
    trials: dict[int, Trial] = {}
    low, high = 0, len(LADDER)  # the answer is in low..high, and high means none
    while low < high:
        rung = (low + high) // 2
        trials[rung] = try_setting(pipe, call, clips, dense, LADDER[rung])
        say(described(trials[rung]))
        if trials[rung].psnr >= wanted:
            high = rung
        else:
            low = rung + 1
    tried = [trials[rung] for rung in sorted(trials)]
    if low == len(LADDER) or trials[low].effective_cost >= 1:
        return None, tried
    evidence = {
        "call": call,
        "clips": clips,
        "wanted_psnr": wanted,
        "trials": [*map(asdict, tried)],
    }
    # with every option, since another version may have other defaults
    return Preset("auto", Auto(**LADDER[low]).to_dict(), evidence), tried


def try_setting(
    pipe: Any,
    call: dict[str, Any],
    clips: list[tuple[str, int]],
    dense: list[np.ndarray],
    options: dict[str, Any],
) -> Trial:
    spec = MethodSpec("auto", "auto", options)
    found: list[Clip] = [
        generate_clip(pipe, prompt, seed, call, spec, measure=False) for prompt, seed in clips
    ]
    pairs = [(as_clip(a), as_clip(b.frames)) for a, b in zip(dense, found)]
    each = [psnr(a, b) or IDENTICAL_DB for a, b in pairs]
    cost = [clip.sparse.effective_cost for clip in found]
    return Trial(options, sum(each) / len(each), each, sum(cost) / len(cost))


def described(trial: Trial) -> str:
    options = ", ".join(f"{name} {value}" for name, value in trial.options.items())
    return f"{options}: {trial.psnr:.1f} dB at cost {trial.effective_cost:.2f}"

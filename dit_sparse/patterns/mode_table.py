"""A table of attention modes per CFG branch, step, layer and head: what `calibrate` writes.

JSON with a digit for each head, so that 50 steps of 60 layers of 24 heads are 72 kB a branch. It is
read as data and checked; nothing in it is executed.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from .model_marks import Marks, check_marks, refuse_other_model

SCHEMA = 2
KIND = "sparse-vdit mode table"
FILE = "sparse_vdit.json"  # beside a model's model_index.json it needs no naming


@dataclass(frozen=True)
class ModeTable:
    """Modes and what they were searched on.

    Attributes:
        transformer: class of those that run sparse. layers, heads: of each.
        grid: frames, height and width of the video in tokens.
        density, order, block_size: of the sparse modes.
        weight, epsilon: of the search (lambda and epsilon in the paper).
        prompts: how many were searched on.
        modes: for each branch and step, a string of digits for each layer.
        models: what tells the model from others, none in older files.
    """

    transformer: str
    layers: int
    heads: int
    grid: tuple[int, int, int]
    num_steps: int
    density: float
    order: str
    block_size: int
    weight: float
    epsilon: float
    prompts: int
    modes: dict[str, list[list[str]]]
    models: list[Marks] = field(default_factory=list)

    def at(self, branch: str, step: int, num_steps: int, layer: int) -> list[int]:
        """Modes of a layer's heads; a run of other length takes the row at its share of steps."""
        if branch not in self.modes:
            raise ValueError(
                f"the mode table knows the guidance branches {', '.join(self.modes)}, not"
                f" {branch!r}: calibrate with the pipeline and the guidance that you generate with"
            )
        return [int(mode) for mode in self.modes[branch][step * self.num_steps // num_steps][layer]]

    def refuse_other_model(self, transformers: Sequence[Any]) -> None:
        if (given := type(transformers[0]).__name__) != self.transformer:
            raise ValueError(
                f"the mode table is of a {self.transformer}, this model is a {given}; make one with"
                " `dit-sparse calibrate`"
            )
        refuse_other_model("the mode table is", self.models, transformers)

    def refuse_other_size(self, layers: int, heads: int, grid: tuple[int, int, int]) -> None:
        for name, mine, given in (
            ("layers", self.layers, layers),
            ("heads", self.heads, heads),
            ("tokens (frames, height, width)", self.grid, grid),
        ):
            if mine != given:
                raise ValueError(
                    f"the mode table is of another model or size: it has {mine} {name}, this run"
                    f" has {given}; make one with `dit-sparse calibrate`"
                )

    def save(self, path: str | Path) -> None:
        text = json.dumps({"kind": KIND, "schema": SCHEMA, **asdict(self)}, indent=0)
        Path(path).write_text(text + "\n", encoding="utf-8")


def table_beside(transformer: Any) -> Path | None:
    """The table in the pipeline's folder that a transformer was loaded from, if there is one."""
    loaded_from = transformer.config.get("_name_or_path")
    if not loaded_from:
        return None
    folder = Path(loaded_from)  # of the pipeline, or of the transformer in it
    folder = folder if (folder / "model_index.json").is_file() else folder.parent
    found = (folder / "model_index.json").is_file() and (folder / FILE).is_file()
    return folder / FILE if found else None


def load_mode_table(path: str | Path, modes: int) -> ModeTable:
    """Read a table whose modes are 0 to `modes` - 1.

    Raises:
        ValueError: not there, not such a table, or one that does not fit itself.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"no mode table at {file}: make one with `dit-sparse calibrate`")
    return _load(file, file.stat().st_mtime_ns, modes)


@lru_cache(maxsize=8)
def _load(file: Path, changed: int, modes: int) -> ModeTable:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if (stored.pop("kind"), stored.pop("schema")) != (KIND, SCHEMA):
            raise ValueError(f"it does not say {KIND!r}, schema {SCHEMA}")
        table = ModeTable(**stored | {"grid": tuple(stored["grid"])})
        _check(table, modes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is no mode table ({error}): make one with `dit-sparse calibrate`"
        ) from error
    return table


def _check(table: ModeTable, modes: int) -> None:
    if not table.modes:
        raise ValueError("it has no branch")
    check_marks(table.models)
    known = set("0123456789"[:modes])
    for branch, steps in table.modes.items():
        if len(steps) != table.num_steps or any(len(rows) != table.layers for rows in steps):
            raise ValueError(f"branch {branch} is not {table.num_steps} x {table.layers} rows")
        for row in (row for rows in steps for row in rows):
            if not isinstance(row, str) or len(row) != table.heads or set(row) - known:
                raise ValueError(f"{row!r} is not {table.heads} modes of {len(known)}")

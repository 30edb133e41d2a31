"""What every method shares: how dense, in which blocks, and at which steps it looks again."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from .grid import TOKEN_ORDERS
from .schedule import step_kind

if TYPE_CHECKING:
    from torch import Tensor

    from .patterns.correct import Correction
    from .patterns.search import Found, Search

ENGINES = ("auto", "triton", "fa4", "flex", "torch")
BLOCK_SIZES = (32, 64, 128)
PRECISIONS = ("full", "int8", "fp8")
CACHE_DEVICES = ("model", "cpu")
SHARES = ("mask", "all", None)
DEFAULT_ORDER = "curve"
DENSITIES = (0.05, 0.1, 0.2, 0.35)  # that benchmarks try
CAPS = (0.1, 0.2, 0.35, 0.5)  # the same where a row may keep less


@dataclass(frozen=True)
class SparseConfig:
    """Base of all methods.

    Args:
        density: kept blocks over all blocks at sparse steps, in (0, 1]. 1 runs the dense attention.
        search_at: when to look for the mask, as fractions of the denoising steps; steps before the
            first are dense (warm-up), and each mask is kept until the next search.
        every_step: search at every step from the first search on, instead of keeping masks.
        dense_layers: so many leading layers stay dense at every step.
        own_block: every row of blocks keeps its own block, whatever its score.
        order: token order, "curve", "tile", "patch" or "raster".
        block_size: tokens in a query block and in a key block.
        engine: "auto", "triton", "fa4" (flash-attn-4), "flex" (FlexAttention) or "torch".
        precision: of the products in sparse calls: "full" is the model's dtype, "int8" rounds
            queries and keys, "fp8" values too: less exact, faster on Hopper (docs/choosing.md).
        max_cache_bytes: refuse to run, at the first step, where more would be kept between steps.
    """

    density: float = 0.2
    search_at: tuple[float, ...] = (0.2, 0.6)
    every_step: bool = False
    dense_layers: int = 0
    own_block: bool = True
    order: str = DEFAULT_ORDER
    block_size: int = 64
    engine: str = "auto"
    precision: str = "full"
    max_cache_bytes: int | None = None

    paper: ClassVar[str] = ""
    cost: ClassVar[str] = ""  # formula of one sparse call, in words
    memory: ClassVar[str] = "mask bits B H N^2 / 8 bytes a layer and branch"
    published: ClassVar[dict[str, dict]] = {}  # options of the paper, by the model they are for
    swept: ClassVar[tuple[dict, ...]] = ()  # what benchmarks try in place of densities
    apart: ClassVar[int] = 1  # steps from one search to the next, at least
    targets: ClassVar[dict[str, dict]] = {}  # options that `target=NAME` stands for
    uses_lse: ClassVar[bool] = False  # True where a search needs the log-sum-exp of dense attention
    corrects: ClassVar[bool] = False  # True where a search runs dense too, to measure a correction
    # True where sparse outputs are completed by means of the rest; a correction is a residual then.
    tail: ClassVar[bool] = False
    text_queries: ClassVar[bool] = True  # whether text rows read everything, as text keys are read
    compares_heads: ClassVar[bool] = False  # True where a search needs all heads in one place
    uneven_heads: ClassVar[bool] = False  # True where heads keep more or less of their blocks
    search_cost: ClassVar[float] = 0.0  # of finding a mask alone, where it is worth counting

    @property
    def refuses(self) -> bool:
        """Whether every step runs dense where the cost model says that sparse is slower."""
        return False

    @property
    def tail_tokens(self) -> int:
        """Tokens of each mean of a tail: whole blocks, unless a method has an option for it."""
        return self.block_size

    @property
    def tail_share(self) -> float:
        """Multiply-adds of the tail over those of a dense call, 0 without one."""
        return 1 / self.tail_tokens if self.tail else 0.0

    @property
    def share_guidance(self) -> str | None:
        """What guidance branches of equal shape use of the first of them: "mask", "all" or None."""
        return None

    @property
    def cache_device(self) -> str:
        """Where corrections are kept, "model" or "cpu"; as above."""
        return "model"

    def __post_init__(self):
        object.__setattr__(self, "search_at", _fractions(self.search_at))
        if not is_number(self.density) or not 0 < self.density <= 1:
            raise ValueError(
                f"density is the share of blocks that is kept, in (0, 1], got {self.density!r};"
                " for 80% sparsity give density=0.2"
            )
        one_of("order", self.order, TOKEN_ORDERS)
        one_of("block_size", self.block_size, BLOCK_SIZES)
        one_of("engine", self.engine, ENGINES)
        one_of("precision", self.precision, PRECISIONS)
        flag("every_step", self.every_step)
        flag("own_block", self.own_block)
        whole("dense_layers", self.dense_layers, 0)
        if self.max_cache_bytes is not None:
            whole("max_cache_bytes", self.max_cache_bytes, 0)

    @classmethod
    def as_published(cls, model: str) -> Self:
        """The settings of the paper for a model, such as "HunyuanVideo"; see `published`."""
        if model not in cls.published:
            known = ", ".join(cls.published) or "no model"
            raise ValueError(
                f"{cls.__name__} has published settings for {known}, not for {model!r}"
            )
        return cls(**cls.published[model])

    def for_model(self, transformers: "Sequence[Any]") -> Self:
        """This config with what lies beside a model's files, refused where that does not fit it."""
        return self

    def find(self, search: "Search") -> "Found":
        """The block mask of one layer at one search step."""
        raise NotImplementedError(
            f"{type(self).__name__} has no find(search), which gives a layer's mask as a Found"
            " (docs/adding_a_pattern.md)"
        )

    def correction(
        self, dense: "Tensor", dense_lse: "Tensor", sparse: "Tensor", sparse_lse: "Tensor"
    ) -> "Correction":
        """Where a layer is corrected: what a search step's sparse output lacks of its dense one."""
        raise NotImplementedError

    def corrected(self, sparse: "Tensor", correction: "Correction", age: int) -> "Tensor":
        """Where a layer is corrected: a sparse output `age` steps after that was measured."""
        raise NotImplementedError

    def corrected_layers(
        self, shape: Sequence[int], itemsize: int, layers: int, branches: int
    ) -> int:
        """How many of the sparse `layers`, the leading ones, keep a correction on each branch."""
        return layers if self.corrects else 0

    def forced(self, search: "Search") -> "Tensor":
        """Blocks that are always kept, (N, N) bool: own, text and conditioning frames."""
        from .patterns.select import forced_blocks

        device = search.query.device
        rule = self.own_block, self.text_queries
        return forced_blocks(search.grid, self.block_size, device, *rule)

    def cache_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Bytes kept between steps for one layer and branch; `shape` (B, S, H, D) of the query.

        Where `corrected_layers` says that only some layers are corrected, of one that is not.
        """
        batch, tokens, heads, _ = shape
        blocks = -(-tokens // self.block_size)
        lse = 4 * batch * heads * tokens if self.uses_lse else 0
        return batch * heads * blocks * -(-blocks // 8) + lse

    def correction_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """What a corrected layer keeps beside `cache_bytes`, where that leaves it out."""
        return 0

    def planned_cost(
        self, num_steps: int, density: float, corrected: float = 0.0, follows: bool = False
    ) -> float:
        """Attention cost of a run over that of dense, by its schedule; 1 is as dense.

        Args:
            density: of sparse calls; above our own where more is always attended. A tail's share
                is added.
            corrected: share of the layers that keep a correction.
            follows: of a guidance branch that uses all that another one finds.
        """
        density += self.tail_share
        found, cost = None, 0.0
        for step in range(num_steps):
            schedule = self.search_at, found, self.every_step, self.apart
            kind = step_kind(step, num_steps, *schedule)
            if kind == "search" and not follows:
                fused = self.uses_lse and found is None  # with the dense call that gives the LSE
                plain = 1.0 if fused else density
                cost += self.search_cost + corrected * (1 + density) + (1 - corrected) * plain
                found = step
            else:
                cost += 1.0 if kind == "dense" else density
        return cost / num_steps

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def options(cls) -> list[str]:
        return [field.name for field in fields(cls)]


def _fractions(search_at) -> tuple[float, ...]:
    values = tuple(search_at) if isinstance(search_at, (tuple, list)) else (search_at,)
    increasing = all(a < b for a, b in zip(values, values[1:]))
    if not values or not all(is_number(v) and 0 <= v < 1 for v in values) or not increasing:
        raise ValueError(
            "search_at lists increasing fractions of the denoising steps, each in [0, 1), such as"
            f" (0.2, 0.6), got {search_at!r}"
        )
    return values


def one_of(name: str, value, choices: tuple) -> None:
    if type(value) is not type(choices[0]) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def whole(name: str, value, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is a whole number of at least {least}, got {value!r}")


def positive(name: str, value) -> None:
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")


def part(name: str, value) -> None:
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"{name} is a share, in (0, 1], got {value!r}")


def flag(name: str, value) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is True or False, got {value!r}")


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

"""What every method shares: how dense, in which blocks, and at which steps it looks again."""

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from .grid import TOKEN_ORDERS

if TYPE_CHECKING:
    from .patterns.search import Found, Search

ENGINES = ("auto", "triton", "fa4", "flex", "torch")
BLOCK_SIZES = (32, 64, 128)
DEFAULT_ORDER = "curve"


@dataclass(frozen=True)
class SparseConfig:
    """Base of all methods.

    Args:
        density: kept blocks over all blocks at sparse steps, in (0, 1]. 1 runs the dense attention.
        search_at: when to look for the mask, as fractions of the denoising steps; steps before the
            first are dense (warm-up), and each mask is kept until the next search.
        order: token order, "curve", "tile" or "raster".
        block_size: tokens in a query block and in a key block.
        engine: "auto", "triton", "fa4" (flash-attn-4), "flex" (FlexAttention) or "torch".
    """

    density: float = 0.2
    search_at: tuple[float, ...] = (0.2, 0.6)
    order: str = DEFAULT_ORDER
    block_size: int = 64
    engine: str = "auto"

    paper: ClassVar[str] = ""
    uses_lse: ClassVar[bool] = False  # True where a search needs the log-sum-exp of dense attention

    def __post_init__(self):
        object.__setattr__(self, "search_at", _fractions(self.search_at))
        if not _is_number(self.density) or not 0 < self.density <= 1:
            raise ValueError(
                f"density is the share of blocks that is kept, in (0, 1], got {self.density!r};"
                " for 80% sparsity give density=0.2"
            )
        _one_of("order", self.order, TOKEN_ORDERS)
        _one_of("block_size", self.block_size, BLOCK_SIZES)
        _one_of("engine", self.engine, ENGINES)

    def find(self, search: "Search") -> "Found":
        """The block mask of one layer at one search step."""
        raise NotImplementedError

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def options(cls) -> list[str]:
        return [field.name for field in fields(cls)]


def _fractions(search_at) -> tuple[float, ...]:
    values = tuple(search_at) if isinstance(search_at, (tuple, list)) else (search_at,)
    increasing = all(a < b for a, b in zip(values, values[1:]))
    if not values or not all(_is_number(v) and 0 <= v < 1 for v in values) or not increasing:
        raise ValueError(
            "search_at lists increasing fractions of the denoising steps, each in [0, 1), such as"
            f" (0.2, 0.6), got {search_at!r}"
        )
    return values


def _one_of(name: str, value, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

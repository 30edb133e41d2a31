"""One attention call of one layer: dense, search or reuse."""

from collections.abc import Callable
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .attention import choose_engine, sparse_attention
from .block_mask import BlockMask
from .config import SparseConfig
from .dense import dense_attention_with_lse
from .grid import VideoGrid
from .measure import SAMPLED_ROWS, sampled_kept_mass
from .patterns.search import Search
from .schedule import Kind, step_kind
from .state import Kept, Record, State

DenseAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Order = Callable[[Tensor], tuple[Tensor, Tensor] | None]


class LayerAttention:
    """Sparse attention of one layer, called with (B, S, H, D) tensors.

    Args:
        state: of the transformer, shared by its layers.
        measure: also measure the kept mass at every reuse.

    Attributes:
        dense: the user's own dense attention (query, key, value, kv_len).
        order: block order and its inverse for a tensor's device, where tokens arrive in raster
            order; None where the whole transformer already runs in block order.
    """

    dense: DenseAttention
    order: Order | None = None

    def __init__(self, state: State, config: SparseConfig, layer: int, measure: bool):
        self.state, self.config, self.layer, self.measure = state, config, layer, measure

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        call = self.state.call
        if call is None or query.shape[1] != call.grid.tokens:
            expected = "no call" if call is None else f"{call.grid.tokens} tokens"
            raise RuntimeError(
                f"sparse attention was told of {expected} and got {query.shape[1]} tokens: call the"
                " transformer itself, not one of its blocks, or disable sparse attention first"
            )
        kept = self._kept(query)
        kind = "dense"
        if self.config.density < 1:
            found_at = None if kept is None else kept.found_at
            kind = step_kind(call.step, call.num_steps, self.config.search_at, found_at)
        if kind == "dense":
            self._log("dense")
            return self.dense(query, key, value, call.kv_len)
        order = None if self.order is None else self.order(query)
        if order is not None:
            query, key, value = (_permute(x, order[0], call.grid) for x in (query, key, value))
        if kind == "search" or kept is None:
            output = self._search(query, key, value, kept)
        else:
            output = self._sparse("reuse", query, key, value, kept)
        return output if order is None else _permute(output, order[1], call.grid)

    def _kept(self, query: Tensor) -> Kept | None:
        """What this branch keeps, unless the batch has changed since."""
        kept = self.state.kept.get((self.state.call.branch, self.layer))
        if kept is None:
            return None
        batch = query.shape[0]
        if kept.lse is not None:
            return kept if kept.lse.shape[0] == batch else None
        return kept if kept.mask.bits.shape[0] in (1, batch) else None

    def _search(self, query: Tensor, key: Tensor, value: Tensor, kept: Kept | None) -> Tensor:
        """Find a mask. With an LSE from an earlier step the output is sparse, else dense."""
        output = None
        lse = None if kept is None else kept.lse
        if self.config.uses_lse and lse is None:
            output, lse = dense_attention_with_lse(query, key, value, self.state.call.kv_len)
        grid, lengths = self.state.call.grid, self.state.call.lengths
        found = self.config.find(Search(query, key, lse, grid, self.layer, lengths))
        size = (self.config.block_size, self.config.block_size)
        mask = BlockMask.from_dense(found.mask, grid.tokens, grid.tokens, size)
        kept = Kept(mask, lse, found.kept_mass, self.state.call.step)
        self.state.keep(self.layer, kept)
        score_cost = 0.5 if self.config.uses_lse else 0.0
        if output is None:
            return self._sparse("search", query, key, value, kept, score_cost)
        self._log("search", None, found.kept_mass, score_cost)
        return output

    def _sparse(
        self,
        kind: Kind,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kept: Kept,
        extra_cost: float = 0.0,
    ) -> Tensor:
        mass = kept.kept_mass if kind == "search" else None
        if self.measure and mass is None:
            mass = sampled_kept_mass(query, key, kept.mask, self.state.call.kv_len)
            extra_cost += min(SAMPLED_ROWS / query.shape[1], 1.0) * 0.5
        self._log(kind, kept.mask.density, mass, extra_cost)
        kv_len = self.state.call.kv_len
        engine = choose_engine(self.config.engine, query, kept.mask, kv_len)
        self.state.engines.add(engine)
        return sparse_attention(query, key, value, kept.mask, kv_len=kv_len, engine=engine)

    def _log(
        self,
        kind: Kind,
        density: Tensor | None = None,
        kept_mass: Tensor | None = None,
        extra_cost: float = 0.0,
    ) -> None:
        call = self.state.call
        self.state.trace.append(
            Record(call.branch, call.step, self.layer, kind, density, kept_mass, extra_cost)
        )


def _permute(x: Tensor, index: Tensor, grid: VideoGrid) -> Tensor:
    """Reorder the video tokens of (B, S, H, D); text stays where it is."""
    if not grid.text_tokens:
        return x[:, index]
    video = slice(grid.text_tokens, None) if grid.text_first else slice(grid.video_tokens)
    ordered = x.clone()
    ordered[:, video] = x[:, video][:, index]
    return ordered


# An operator is opaque to torch.compile, so that one graph serves all layers, steps and masks; the
# layer is named by a 0-d CPU tensor, since an int would be a constant of the graph.
_LAYERS: WeakValueDictionary[int, LayerAttention] = WeakValueDictionary()
_next_slot = iter(range(1 << 62))


def register_layer(layer: LayerAttention) -> Tensor:
    """A slot, 0-d int64 on the CPU, by which `attend` finds the layer as long as it lives."""
    slot = next(_next_slot)
    _LAYERS[slot] = layer
    return torch.tensor(slot)


@torch.library.custom_op(
    "dit_sparse::attend",
    mutates_args=(),
    tags=(torch.Tag.cudagraph_unsafe,),  # a replay would freeze the choice of dense or sparse
)
def attend(query: Tensor, key: Tensor, value: Tensor, slot: Tensor) -> Tensor:
    """(B, S, H, D) attention of the layer registered under `slot`."""
    return _LAYERS[int(slot)](query, key, value).contiguous()


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, slot: Tensor) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)

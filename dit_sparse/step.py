"""One attention call of one layer: dense, search or reuse."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .attention import choose_engine, sparse_attention
from .block_mask import BlockMask
from .config import SparseConfig
from .cost_model import predicted_speedup
from .defaults import torch_defaults
from .dense import dense_attention_with_lse
from .grid import VideoGrid
from .measure import SAMPLED_ROWS, sampled_kept_mass
from .patterns.correct import Correction
from .patterns.search import Found, Search
from .report import COSTLY
from .schedule import Kind, step_kind
from .state import Kept, Record, State
from .tail import add_tail, tail_cost
from .ulysses import Ulysses, balanced

logger = logging.getLogger(__name__)

DenseAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Orders = Callable[[Tensor], tuple[Tensor, Tensor] | None]


class LayerAttention:
    """Sparse attention of one layer, called with (B, S, H, D) tensors.

    Args:
        state: of the transformer, shared by its layers.
        measure: also measure the kept mass at every reuse.

    Attributes:
        dense: the user's own dense attention (query, key, value, kv_len).
        orders: block order and its inverse for a tensor's device, where tokens arrive in raster
            order; None where the whole transformer already runs in block order.
    """

    dense: DenseAttention
    orders: Orders | None = None

    def __init__(self, state: State, config: SparseConfig, layer: int, measure: bool):
        self.state, self.config, self.layer, self.measure = state, config, layer, measure

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        call, ulysses = self.state.call, self.state.ulysses
        tokens = None if call is None else call.grid.tokens
        if call is not None and ulysses is not None:
            tokens = ulysses.tokens_here(call.grid)
        if call is None or query.shape[1] != tokens:
            expected = "no call" if call is None else f"{tokens} tokens"
            raise RuntimeError(
                f"sparse attention was told of {expected} and got {query.shape[1]} tokens: call the"
                " transformer itself, not one of its blocks, or disable sparse attention first"
            )
        if ulysses is None:
            return self._all_parts(query, key, value)
        order = self.state.heads.get(self.state.place(self.layer))
        if order is not None:
            query, key, value = (x[:, :, order] for x in (query, key, value))
        whole = (ulysses.to_heads(x, call.grid) for x in (query, key, value))
        output = ulysses.to_tokens(self._all_parts(*whole), call.grid)
        if self.config.uneven_heads:
            self._balance(ulysses, query.shape[2], order)
        return output if order is None else output[:, :, inverse(order)]

    def _balance(self, ulysses: Ulysses, heads: int, order: list[int] | None) -> None:
        """After a search: share out the heads anew, and what is kept of them."""
        call, state, place = self.state.call, self.state, self.state.place(self.layer)
        kept = state.kept.get(place)
        if kept is None or kept.found_at != call.step or kept.mask.bits.shape[1] == 1:
            return
        if state.masks is not None and order is not None:
            state.masks[place] = call.step, move_mask(ulysses, kept.mask, inverse(order))
        moved = balanced(ulysses.all_heads(kept.mask.density).tolist(), ulysses.degree)
        if moved == list(range(heads)):
            return
        lse, mass = kept.lse, kept.kept_mass
        state.kept[place] = replace(
            kept,
            mask=move_mask(ulysses, kept.mask, moved),
            lse=None if lse is None else ulysses.move(lse, moved, 1),
            kept_mass=None if mass is None else ulysses.move(mass, moved, 0),
        )
        state.heads[place] = moved if order is None else [order[head] for head in moved]

    def _all_parts(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """On all tokens, and the heads that are here; a guided batch as if it were two calls."""
        whole = self.state.call
        if whole is None or self.state.parts == 1:
            return self._attention(query, key, value)
        half, outputs = query.shape[0] // 2, []
        for branch, part in (("cond", slice(half, None)), ("uncond", slice(half))):
            self.state.call = replace(whole, branch=branch)
            outputs.append(self._attention(query[part], key[part], value[part]))
        self.state.call = whole
        return torch.cat(outputs[::-1])

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        call = self.state.call
        self._plan(query)
        kept = self._kept(query)
        kind = self._kind(None if kept is None else kept.found_at)
        if kind == "dense":
            self._log("dense")
            return self.dense(query, key, value, call.kv_len(query.device))
        orders = None if self.orders is None else self.orders(query)
        if orders is not None:
            query, key, value = (
                permute_video(x, orders[0], call.grid) for x in (query, key, value)
            )
        if kind == "search" or kept is None:
            output = self._search(query, key, value, kept)
        else:
            output = self._sparse("reuse", query, key, value, kept)
        return output if orders is None else permute_video(output, orders[1], call.grid)

    def _kind(self, found_at: int | None) -> Kind:
        call, config = self.state.call, self.config
        if config.density == 1 or self.layer < config.dense_layers or self.state.dense_because:
            return "dense"
        schedule = config.search_at, found_at, config.every_step, config.apart
        return step_kind(call.step, call.num_steps, *schedule)

    def _plan(self, query: Tensor) -> None:
        """At the first call of each branch: how much will be kept, and refuse too much."""
        if self.config.density == 1 or self.layer > 0:
            return
        if self.config.refuses and self.state.calls == 1:
            self.state.dense_because = self._why_dense(query)
        if self.state.dense_because:
            return
        of = self._shape(query), query.element_size()
        per_branch = self.config.cache_bytes(*of) * self._sparse_layers()
        per_branch += self.config.correction_bytes(*of) * self._corrected_layers(query)
        planned, limit = per_branch * self.state.owners(), self.config.max_cache_bytes
        self.state.planned_bytes = max(self.state.planned_bytes, planned)
        if limit is not None and planned > limit:
            raise MemoryError(
                f"this run would keep {planned / 2**20:.2f} MiB between steps and max_cache_bytes"
                f" allows {limit / 2**20:.2f} MiB: raise it, or make the batch or video smaller"
                f" ({self.config.memory})"
            )
        self._tell_of_cost(query)

    def _why_dense(self, query: Tensor) -> str | None:
        """Where the cost model expects sparse attention to be slower, a sentence that says so."""
        call, config = self.state.call, self.config
        density = max(config.density, call.grid.forced_share(config.block_size))
        density += config.tail_share
        schedule = config.search_at, call.num_steps, config.apart
        speedup = predicted_speedup(self._shape(query), density, *schedule, query.device)
        if speedup is None or speedup >= 1:
            return None
        return (
            f"every step runs dense: at {call.grid.tokens} tokens sparse attention would take"
            f" {1 / speedup:.1f} times as long (a method such as adaspa runs in any case)"
        )

    def _tell_of_cost(self, query: Tensor) -> None:
        """Log once, early, that a run will gain nothing; its report says it of the whole.

        At the first call, or at the second where that may be a guidance branch that follows.
        """
        call, config, state = self.state.call, self.config, self.state
        layers = self._sparse_layers()
        waits = state.shares == "all" and state.parts == 1
        if waits:
            early = state.calls == 2 and call.step < 2
        else:
            early = call.step == 0 and not state.trace
        if not early or not layers:
            return
        density = max(config.density, call.grid.forced_share(config.block_size))
        corrected = self._corrected_layers(query) / layers
        plan = call.num_steps, density, corrected
        count = max(state.parts, len(state.last))
        parts = [config.planned_cost(*plan, follows=i >= state.owners()) for i in range(count)]
        cost = sum(parts) / len(parts)
        if cost >= 1:
            logger.warning(COSTLY.format(cost))

    def _shape(self, query: Tensor) -> tuple[int, ...]:
        """With the heads of all GPUs, so that several of them decide as one would."""
        batch, tokens, heads, dim = query.shape
        ulysses = self.state.ulysses
        return batch, tokens, heads if ulysses is None else heads * ulysses.degree, dim

    def _sparse_layers(self) -> int:
        return max(self.state.layers - self.config.dense_layers, 0)

    def _corrected_layers(self, query: Tensor) -> int:
        """How many leading sparse layers keep a correction on each branch."""
        branches, state = self.state.owners(), self.state
        if state.calls == len(state.last) and state.parts == 1:
            branches = max(branches, 2)  # first step: the share of a branch to come is kept free
        of = self._shape(query), query.element_size()
        return self.config.corrected_layers(*of, self._sparse_layers(), branches)

    def _kept(self, query: Tensor) -> Kept | None:
        """What this branch keeps, unless the batch has changed since."""
        kept = self.state.kept.get(self.state.place(self.layer))
        if kept is None:
            return None
        batch = query.shape[0]
        if kept.correction is not None:
            return kept if kept.correction.batch == batch else None
        if kept.lse is not None:
            return kept if kept.lse.shape[0] == batch else None
        return kept if kept.mask.bits.shape[0] in (1, batch) else None

    def _search(self, query: Tensor, key: Tensor, value: Tensor, kept: Kept | None) -> Tensor:
        """Find a mask. The output is dense where dense attention had to run for it, else sparse."""
        call, config = self.state.call, self.config
        output, lse = None, None if kept is None else kept.lse
        corrects = self.layer - config.dense_layers < self._corrected_layers(query)
        if corrects or (config.uses_lse and lse is None):
            output, lse = dense_attention_with_lse(query, key, value, call.kv_len(key.device))
        found, mask = self._find(query, key, value, lse)
        # With the log-sum-exp of an earlier step the mass is no longer what the mask keeps now.
        mass = None if output is None and config.uses_lse else found.kept_mass
        keeps_lse = config.uses_lse and not corrects  # else the next search runs dense anyway
        kept = Kept(mask, lse if keeps_lse else None, mass, call.step)
        if output is None or lse is None:
            self.state.keep(self.layer, kept)
            return self._sparse("search", query, key, value, kept, found.cost)
        cost: float | Tensor = found.cost
        if corrects:
            sparse, sparse_lse = self._attend(query, key, value, mask)
            correction = config.correction(output, lse, sparse, sparse_lse)
            kept = replace(kept, correction=correction)
            inside = None if config.tail else correction.rho  # a tail's is not the mask's mass
            if kept.kept_mass is None and inside is not None:  # of all rows, exactly
                kept = replace(kept, kept_mass=inside.mean((0, 2)))
            # a tensor: the report asks the device for it, when nothing waits
            ran = self._of_all_heads(mask.density, query).mean()
            cost = ran + (cost + self._tail_cost(mask))
        self.state.keep(self.layer, kept)
        self._log("search", None, self._of_all_heads(kept.kept_mass, query), cost)
        return output

    def _find(
        self, query: Tensor, key: Tensor, value: Tensor, lse: Tensor | None
    ) -> tuple[Found, BlockMask]:
        """A mask for these, found for them or, where guidance branches share it, for the first."""
        call, config, batch = self.state.call, self.config, query.shape[0]
        shared_mask = self.state.mask_of_other_branch(self.layer, batch)
        if shared_mask is not None:
            return Found(shared_mask), shared_mask
        both = call.guided and self.state.shares == "mask"
        if both:  # the negative prompts come first
            query, key, value = (x[batch // 2 :] for x in (query, key, value))
            lse = None if lse is None else lse[batch // 2 :]
        seen = call.lengths, call.step, call.num_steps, call.branch, self.state.layers, value
        shared = self.state.ulysses
        found = config.find(Search(query, key, lse, call.grid, self.layer, *seen, shared))
        if not isinstance(found, Found):
            raise TypeError(
                f"{type(config).__name__}.find gave a {type(found).__name__}: return Found(mask),"
                " with a bool mask (B, H, blocks of queries, blocks of keys)"
            )
        mask = found.mask
        if not isinstance(mask, BlockMask):
            size = (config.block_size, config.block_size)
            mask = BlockMask.from_dense(mask, call.grid.tokens, call.grid.tokens, size)
        if both:
            found, mask = replace(found, cost=found.cost / 2), mask.twice()
        return found, mask

    def _sparse(
        self,
        kind: Kind,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kept: Kept,
        extra_cost: float = 0.0,
    ) -> Tensor:
        call = self.state.call
        extra_cost += self._tail_cost(kept.mask)
        mass = kept.kept_mass if kind == "search" else None
        if self.measure and mass is None:
            mass = sampled_kept_mass(query, key, kept.mask, call.kv_len(key.device))
            extra_cost += min(SAMPLED_ROWS / query.shape[1], 1.0) * 0.5
        density, mass = (self._of_all_heads(x, query) for x in (kept.mask.density, mass))
        self._log(kind, density, mass, extra_cost)
        correction = self.state.correction(self.layer, query.device)
        residual = correction if self.config.tail else None  # one kernel adds both
        output, _ = self._attend(query, key, value, kept.mask, residual)
        if correction is None or residual is not None:
            return output
        return self.config.corrected(output, correction, call.step - kept.found_at)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: BlockMask,
        residual: Correction | None = None,
    ) -> tuple[Tensor, Tensor]:
        kv_len = self.state.call.kv_len(query.device)
        precision = self.config.precision
        engine = choose_engine(self.config.engine, query, mask, kv_len, precision)
        self.state.engines.add(engine if precision == "full" else f"{engine} {precision}")
        output, lse = sparse_attention(
            query,
            key,
            value,
            mask,
            kv_len=kv_len,
            engine=engine,
            precision=precision,
            return_lse=True,
        )
        if not self.config.tail:
            return output, lse
        return add_tail(
            output,
            lse,
            query,
            key,
            value,
            mask,
            tail_tokens=self.config.tail_tokens,
            kv_len=kv_len,
            engine=engine,
            residual=residual,
        )

    def _tail_cost(self, mask: BlockMask) -> float:
        return tail_cost(mask, self.config.tail_tokens) if self.config.tail else 0.0

    def _of_all_heads(self, figures: Tensor | None, query: Tensor) -> Tensor | None:
        """(H here,) -> (H,); (1,) where all heads share a mask."""
        ulysses = self.state.ulysses
        if ulysses is None or figures is None or len(figures) != query.shape[2]:
            return figures
        figures = ulysses.all_heads(figures)
        order = self.state.heads.get(self.state.place(self.layer))
        return figures if order is None else figures[inverse(order)]

    def _log(
        self,
        kind: Kind,
        density: Tensor | None = None,
        kept_mass: Tensor | None = None,
        extra_cost: float | Tensor = 0.0,
    ) -> None:
        call = self.state.call
        self.state.trace.append(
            Record(call.branch, call.step, self.layer, kind, density, kept_mass, extra_cost)
        )


def inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def move_mask(ulysses: Ulysses, mask: BlockMask, order: list[int]) -> BlockMask:
    """A process's heads of a mask in another order; any may be the one with the longest rows."""
    return replace(
        mask,
        bits=ulysses.move(mask.bits, order, 1),
        density=ulysses.move(mask.density, order, 0),
        max_blocks=mask.num_blocks[1],
    )


def permute_video(x: Tensor, index: Tensor, grid: VideoGrid) -> Tensor:
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
    return torch.tensor(slot, device="cpu")


def attend(query: Tensor, key: Tensor, value: Tensor, slot: Tensor) -> Tensor:
    """(B, S, H, D) attention of the layer registered under `slot`.

    Under autocast it runs in, and gives, autocast's dtype, as torch's own attention does; float64
    stays.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    return _attend(query, key, value, slot)


@torch.library.custom_op(
    "dit_sparse::attend",
    mutates_args=(),
    tags=(torch.Tag.cudagraph_unsafe,),  # a replay would freeze the choice of dense or sparse
)
def _attend(query: Tensor, key: Tensor, value: Tensor, slot: Tensor) -> Tensor:
    in_float32 = torch.autocast(query.device.type, enabled=False)  # scores and means
    with in_float32, torch_defaults():
        return _LAYERS[int(slot)](query, key, value).contiguous()


def _refuse_backward(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "sparse attention has no gradients: call the transformer under torch.no_grad(), and disable"
        " sparse attention before you train"
    )


_attend.register_autograd(_refuse_backward)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, slot: Tensor) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)

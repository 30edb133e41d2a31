"""What is kept of one transformer between denoising steps, and the log of what ran."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .block_mask import BlockMask
from .grid import VideoGrid
from .host_cache import HostCache, is_apart
from .patterns.correct import Correction
from .patterns.search import lengths_on
from .schedule import Kind
from .ulysses import Ulysses


@dataclass(frozen=True)
class Call:
    """One call of the transformer, as its pre-hook found it.

    Attributes:
        step: absolute denoising step, 0-based. num_steps: steps of the run.
        branch: CFG branch, diffusers' context name (cond, uncond, cond_uncond).
        lengths: valid tokens of each sample where they differ; the rest is padded text at the end.
        guided: whether the batch holds both guidance branches, the negative prompts first.
        batch: samples.
    """

    grid: VideoGrid
    step: int
    num_steps: int
    branch: str
    device: torch.device
    dtype: torch.dtype
    lengths: tuple[int, ...] | None = None
    guided: bool = False
    batch: int = 1

    def kv_len(self, device: torch.device) -> Tensor | None:
        """`lengths` as (B,) int32 on a layer's device: layers may be spread over several."""
        return None if self.lengths is None else lengths_on(self.lengths, device)

    @property
    def signature(self) -> tuple:
        return self.grid, self.num_steps, self.device, self.dtype


@dataclass(frozen=True)
class Kept:
    """A layer's mask on one branch, the LSE it was searched with, what is added to its outputs, and
    the step it was found at. A correction of meta tensors is in host memory."""

    mask: BlockMask
    lse: Tensor | None  # (B, H, S) float32
    kept_mass: Tensor | None  # (H,)
    found_at: int
    correction: Correction | None = None

    def nbytes(self) -> int:
        lse = 0 if self.lse is None else self.lse.numel() * 4
        return self.mask.nbytes() + lse + (self.correction.nbytes() if self.correction else 0)


@dataclass(frozen=True)
class Record:
    """One attention call of one layer."""

    branch: str
    step: int
    layer: int
    kind: Kind
    density: Tensor | None  # (H,), None where the output is dense
    kept_mass: Tensor | None  # (H,), None where not measured
    extra_cost: float | Tensor = 0.0  # search, tail and measurement, as a share of dense attention


@dataclass
class State:
    """State of one transformer in one run, keyed by branch and layer.

    `layers` is the number of layers that run sparse; `planned_bytes` what will be kept at most;
    `masks` holds the last mask of each branch and layer, and its step, where it is not None;
    `dense_because` says why a run stays dense; `ulysses` who else computes the same call; `hosts`
    holds the corrections of each device in host memory, where it is not None; `heads` tells, of
    each branch and layer, the order in which processes share its heads, where it is not their own;
    `shares` says what guidance branches of equal shape use of the first of them: where it is "all"
    they keep one entry, where it is "mask" each its own; `notes` say what ran not as asked.
    """

    call: Call | None = None
    kept: dict[tuple[str, int], Kept] = field(default_factory=dict)
    trace: list[Record] = field(default_factory=list)
    layers: int = 1
    calls: int = 0
    parts_in_all: int = 0  # of these calls
    parts_outside: int = 0  # of layers whose processor is not ours any more
    peak_bytes: int = 0
    planned_bytes: int = 0
    engines: set[str] = field(default_factory=set)
    dense_because: str | None = None
    ulysses: Ulysses | None = None
    last: dict[str, Call] = field(default_factory=dict)  # of each branch, in this run
    masks: dict[tuple[str, int], tuple[int, BlockMask]] | None = None
    hosts: dict[torch.device, HostCache] | None = None
    heads: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    shares: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def parts(self) -> int:
        """In how many parts the layers take a call."""
        return 2 if self.shares == "all" and self.call is not None and self.call.guided else 1

    def begin(self, call: Call) -> bool:
        """Publish a call; a new run or another shape, dtype or device drops everything kept.

        Returns:
            Whether a run begins.
        """
        before = self.last.get(call.branch)  # branches may differ in their text, so in their grid
        other = before and (before.step == call.step or before.signature != call.signature)
        if other or call.step < max((done.step for done in self.last.values()), default=-1):
            self.drop()
        begins = not self.last
        if begins:
            self.forget()
        self.call = call
        self.calls += 1
        self.parts_in_all += self.parts
        self.last[call.branch] = call
        return begins

    def forget(self) -> None:
        """Empty the log of the last run."""
        self.trace, self.calls, self.peak_bytes, self.engines = [], 0, 0, set()
        self.parts_outside, self.notes = 0, []
        self.planned_bytes, self.parts_in_all, self.dense_because = 0, 0, None
        self.masks = None if self.masks is None else {}

    def drop(self) -> None:
        """Free what is kept; the trace stays for the report until the next run begins."""
        self.kept.clear()
        self.heads.clear()
        self.last.clear()
        for host in (self.hosts or {}).values():
            host.drop()

    def owner(self, call: Call) -> str:
        """The branch whose entries serve a call: its own, or the first one like it."""
        return next(self._alike(call), call.branch) if self.shares == "all" else call.branch

    def _alike(self, call: Call) -> Iterator[str]:
        same = call.signature, call.lengths
        return (b for b, of in self.last.items() if (of.signature, of.lengths) == same)

    def mask_of_other_branch(self, layer: int, batch: int) -> BlockMask | None:
        """What another guidance branch of equal shape found at this step, where masks are shared.

        In a guided batch there is none: both branches are in it.
        """
        assert self.call is not None
        if self.shares != "mask":
            return None
        for branch in self._alike(self.call):
            kept = self.kept.get((branch, layer))
            if kept is None or branch == self.call.branch or kept.found_at != self.call.step:
                continue
            if kept.mask.bits.shape[0] in (1, batch):
                return kept.mask
        return None

    def owners(self) -> int:
        """How many branches keep entries of their own."""
        return len({self.owner(call) for call in self.last.values()})

    def place(self, layer: int) -> tuple[str, int]:
        assert self.call is not None
        return self.owner(self.call), layer

    def keep(self, layer: int, kept: Kept) -> None:
        key, correction = self.place(layer), kept.correction
        if self.hosts is not None and correction is not None:
            kept = replace(kept, correction=self._to_host(key, correction))
        self.kept[key] = kept
        if self.masks is not None:
            self.masks[key] = kept.found_at, kept.mask
        processes = 1 if self.ulysses is None else self.ulysses.degree
        kept_bytes = processes * sum(entry.nbytes() for entry in self.kept.values())
        self.peak_bytes = max(self.peak_bytes, kept_bytes)

    def _to_host(self, key: tuple[str, int], correction: Correction) -> Correction:
        assert self.hosts is not None
        device = correction.residual.device
        if not is_apart(device):
            return correction
        if device not in self.hosts:
            self.hosts[device] = HostCache(device)
        return self.hosts[device].store(key, correction)

    def correction(self, layer: int, device: torch.device) -> Correction | None:
        """What this branch keeps, on the layer's device, to be used before the next layer's."""
        place = self.place(layer)
        correction = self.kept[place].correction
        if self.hosts is None or correction is None or not correction.residual.is_meta:
            return correction
        return self.hosts[device].fetch(place)

"""Where the time of one call goes: a clock of named regions, by CUDA events.

Every entry into a region and every exit records one event, so that the stretches between events add
up to the whole call: a region's time is its own, without the regions inside it, and what is in no
region is "rest". Host time counts where the GPU waits for it. A profiler would tell kernels apart,
but not which of our functions launched them, and needs CUPTI, which containers often lack.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

Times = dict[tuple[str | None, str], float]  # (list of blocks or None, region) -> seconds


class Clock:
    """Times calls on a device; regions entered outside of `measure` cost nothing."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[Any, str | None, str]] | None = None
        self.regions, self.blocks = ["rest"], None

    def measure(self, call: Callable[[], Any]) -> Times:
        self.marks, self.regions, self.blocks = [], ["rest"], None
        try:
            self._mark()
            call()
            self._mark()
            return self._times(self.marks)
        finally:
            self.marks = None

    def _mark(self) -> None:
        if self.marks is None:
            return
        stamp: Any = time.perf_counter()
        if self.cuda:
            stamp = torch.cuda.Event(enable_timing=True)
            stamp.record()
        self.marks.append((stamp, self.blocks, self.regions[-1]))

    def _times(self, marks: list) -> Times:
        if self.cuda:
            torch.cuda.synchronize()
        times: Times = defaultdict(float)
        for (start, blocks, region), (end, _, _) in zip(marks, marks[1:]):
            seconds = start.elapsed_time(end) / 1000 if self.cuda else end - start
            times[blocks, region] += seconds
        return dict(times)

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        self.regions.append(name)
        self._mark()
        try:
            yield
        finally:
            self.regions.pop()
            self._mark()

    def wrap(self, function: Callable, name: str) -> Callable:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.region(name):
                return function(*args, **kwargs)

        return timed

    def enter_blocks(self, name: str | None) -> None:
        self.blocks = name
        self._mark()


class TimedBlocks(nn.ModuleList):
    """A list of blocks that tells the clock when a forward begins to iterate over it, and when it
    has done so. Compiled blocks need no hook for this."""

    clock: Clock
    name: str

    def __iter__(self) -> Iterator[nn.Module]:
        self.clock.enter_blocks(self.name)
        yield from super().__iter__()
        self.clock.enter_blocks(None)


def time_blocks(transformer: nn.Module, names: tuple[str, ...], clock: Clock) -> None:
    for name in names:
        blocks = getattr(transformer, name)
        blocks.__class__ = TimedBlocks
        blocks.clock, blocks.name = clock, name


@contextmanager
def time_functions(clock: Clock, functions: list[tuple[Any, str, str]]) -> Iterator[None]:
    """Put functions of modules or classes into regions.

    Args:
        functions: (owner, name, region); one that is not there is an error: its time would be
            counted elsewhere.
    """
    with ExitStack() as undo:
        for owner, name, region in functions:
            original = getattr(owner, name)
            setattr(owner, name, clock.wrap(original, region))
            undo.callback(setattr, owner, name, original)
        yield


def hook_tables(transformer: nn.Module) -> Iterator[dict]:
    """Of all modules but those that diffusers compiles, whose graph would hold the clock."""
    for module in transformer.modules():
        if type(module).__name__ not in (getattr(transformer, "_repeated_blocks", None) or ()):
            yield module._forward_pre_hooks
            yield module._forward_hooks


@contextmanager
def time_hooks_added(transformer: nn.Module, clock: Clock, region: str) -> Iterator[None]:
    """Put the forward hooks that are registered inside this context into a region."""
    before = {key for table in hook_tables(transformer) for key in table}
    yield
    for table in hook_tables(transformer):
        for key in table.keys() - before:
            table[key] = clock.wrap(table[key], region)

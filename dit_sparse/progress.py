"""What the command line shows while it works: bars with the time left, a line per finished clip."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Tick = Callable[[], None]


class Steps:
    """A bar per clip, on stderr so that stdout stays for results."""

    def __init__(self, clips: int, quiet: bool = False):
        self.console = Console(stderr=True, quiet=quiet)
        self.clips, self.finished = clips, 0

    @contextmanager
    def clip(self, label: str, steps: int | None) -> Iterator[Tick]:
        """Show a bar of `steps`; the block calls what it is given after each step."""
        with self.bar(f"[{self.finished + 1}/{self.clips}] {label}", steps) as tick:
            yield tick
        self.finished += 1

    @contextmanager
    def bar(self, label: str, total: int | None) -> Iterator[Tick]:
        """Show a bar that is gone when the block ends; without `total` it shows no time left."""
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            speed_estimate_period=3600,  # steps of a large model take longer than rich's 30 s
            disable=not self.console.is_terminal,
        ) as progress:
            task = progress.add_task(escape(label), total=total)
            yield lambda: progress.advance(task)

    def say(self, text: str) -> None:
        self.console.print(escape(text), highlight=False, soft_wrap=True)  # a line stays one

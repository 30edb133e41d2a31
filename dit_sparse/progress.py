"""What the command line shows while it works: a bar of steps, a line per finished clip."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Steps:
    """A bar per clip, on stderr so that stdout stays for results."""

    def __init__(self, clips: int, quiet: bool = False):
        self.console = Console(stderr=True, quiet=quiet)
        self.clips, self.finished = clips, 0

    @contextmanager
    def clip(self, label: str, steps: int | None) -> Iterator[Callable[[], None]]:
        """Show a bar of `steps`; the block calls what it is given after each step."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        label = f"[{self.finished + 1}/{self.clips}] {label}"
        with Progress(
            *columns,
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        ) as progress:
            task = progress.add_task(escape(label), total=steps)
            yield lambda: progress.advance(task)
        self.finished += 1

    def say(self, text: str) -> None:
        self.console.print(escape(text), highlight=False)

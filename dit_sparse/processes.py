"""Videos shared by the processes that `accelerate launch` started, and taken up where they ended.

Each process makes its part, and writes a record of each video when its files are whole. The same
command, started again, leaves out what has a record.
"""

import json
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from .generation import prepare_folder, write_json


@dataclass
class Processes:
    """Those that share the work, by accelerate's `PartialState`; without it this one alone."""

    state: Any = None

    @classmethod
    def joined(cls, device: str) -> tuple["Processes", str]:
        """Those that `accelerate launch` or torchrun started, and the device of this one.

        Args:
            device: "cpu", "cuda" or a numbered GPU.

        Raises:
            ValueError: a numbered GPU for several processes, or fewer GPUs than processes.
        """
        count = int(os.environ.get("WORLD_SIZE", 1))
        if count == 1:
            return cls(), device
        if torch.device(device).index is not None:
            raise ValueError(
                f"--device {device} is one GPU, and each of the {count} processes takes one of its"
                " own: leave --device out"
            )
        here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
        if device != "cpu" and here > torch.cuda.device_count():
            raise ValueError(
                f"{here} processes were started, and there are {torch.cuda.device_count()} GPUs:"
                " start one for each"
            )
        from accelerate import PartialState

        # The last process may be done hours after the first one.
        state = PartialState(cpu=device == "cpu", timeout=timedelta(weeks=1))
        return cls(state), device if device == "cpu" else str(state.device)

    @property
    def count(self) -> int:
        return 1 if self.state is None else self.state.num_processes

    @property
    def several(self) -> bool:
        return self.state is not None

    @property
    def first(self) -> bool:
        return self.number == 0

    @property
    def number(self) -> int:
        return 0 if self.state is None else self.state.process_index

    def part(self, left: list[Any]) -> list[Any]:
        """This process' own of what is left, when all have seen what that is: the same for all."""
        self.wait()
        # accelerate 1.0 gives the last item to all whom nothing is left for
        start, end = (-(-len(left) * n // self.count) for n in (self.number, self.number + 1))
        return left[start:end]

    def wait(self) -> None:
        """For all others to come here, too."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def of_all(self, items: list[Any]) -> list[Any]:
        """The items of all processes, those of the first one first."""
        if self.state is None:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)

    def end(self) -> None:
        """Wait for the last time."""
        self.wait()
        if self.state is not None:
            self.state.destroy_process_group()


class Records:
    """What is finished. With several processes a file for each video, and what an earlier run
    finished, too; else in memory.

    Args:
        settings: that all videos share, as JSON has them. A record with others does not count.
    """

    def __init__(self, out: Path, processes: Processes, settings: dict[str, Any]):
        self.settings, self.here = settings, dict[str, dict[str, Any]]()
        self.place = out / "records"
        self.folder = prepare_folder(self.place) if processes.several else None
        if self.folder and processes.first:
            for part in out.rglob(".part-*"):  # a killed process leaves them
                part.unlink()

    def find(self, name: str, prompt: str) -> dict[str, Any] | None:
        """The record called `name`, if its video was made with this prompt."""
        file = self.folder and self.folder / f"{name}.json"
        if file and name not in self.here and file.is_file():
            read = json.loads(file.read_text(encoding="utf-8"))
            if read["settings"] == self.settings:
                self.here[name] = read["record"]
        found = self.here.get(name)
        return found if found and found["prompt"] == prompt else None

    def forget(self, name: str) -> None:
        """To be called before files of a video are replaced: an older record is of those."""
        (self.place / f"{name}.json").unlink(missing_ok=True)

    def add(self, name: str, record: dict[str, Any]) -> None:
        """To be called when all files of the video are whole."""
        self.here[name] = record
        if self.folder:
            content = {"settings": self.settings, "record": record}
            write_json(self.folder / f"{name}.json", content)

"""torch's own defaults, whatever a user has set for the whole process."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Lock

import torch

_lock = Lock()
_found: list[torch.dtype] = []  # by each that is inside; the first found the user's


@contextmanager
def torch_defaults() -> Iterator[None]:
    """New tensors are on the CPU and, where they are no integers, float32, unless told otherwise.

    Counts, places and scores are made like that: bfloat16 counts to 256 alone. The dtype is that of
    all threads: where it is float32 it is left alone, else the last to leave puts the user's back.
    """
    on_cpu = torch.get_default_device().type == "cpu"  # a context costs a little in every call
    with nullcontext() if on_cpu else torch.device("cpu"):
        with _lock:
            changes = bool(_found) or torch.get_default_dtype() != torch.float32
            if changes:
                _found.append(torch.get_default_dtype())
                torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            if changes:
                _leave()


def _leave() -> None:
    with _lock:
        users = _found[0]
        _found.pop()
        if not _found:
            torch.set_default_dtype(users)

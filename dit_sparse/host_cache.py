"""Corrections in host memory, each copied to the GPU while the layer before it computes.

Host memory is pinned, so that copies run beside kernels, on a stream of their own and in order:

- A copy begins behind all that the model's stream was given before. The last reader of the buffer
  that it writes is among that.
- The model's stream waits for a copy before it reads what was copied, and before memory that a
  copy reads or writes is given back. (`record_stream` would not wait, but where the host runs ahead
  of the GPU it would hold what every layer sends to the host.)

On a device without streams a copy has ended when the call returns.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .patterns.correct import Correction

Key = tuple[str, int]  # branch and layer
PIECE = 1 << 24  # bytes; torch rounds pinned memory up to a power of two: ask for many of that size


@dataclass(eq=False)
class Buffer:
    """A correction on the GPU, and the CUDA event of its last copy to or fro (None: it is over)."""

    key: Key | None = None
    content: Correction | None = None
    copied: Any = None


class HostCache:
    """Corrections of one device, stored in the order in which they will be fetched.

    Fetched in another order they are the same and come later: the one that was stored next is
    copied ahead.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._shapes: dict[Key, Correction] = {}  # meta tensors
        self._host: dict[Key, list[Tensor]] = {}
        self._buffers = [Buffer(), Buffer()]  # that of the last fetch comes last
        self._leaving = Buffer()  # on its way to the host

    def store(self, key: Key, correction: Correction) -> Correction:
        """Copy a correction to the host.

        Returns:
            The same of meta tensors: it tells shapes and bytes.

        Raises:
            MemoryError: the host has no memory to pin.
        """
        self._free_left()
        correction = correction.map(Tensor.contiguous)
        if key not in self._shapes or _layout(self._shapes[key]) != _layout(correction):
            self._host[key] = self._pinned(correction)
        self._shapes[key] = correction.map(lambda x: torch.empty_like(x, device="meta"))
        for buffer in self._buffers:
            if buffer.key == key:
                buffer.key = None  # it holds what was stored before
        copied = self._copy(_pieces(correction), self._host[key])
        self._leaving = Buffer(key, correction, copied)
        return self._shapes[key]

    def fetch(self, key: Key) -> Correction:
        """A correction on the device, to be used before the next fetch."""
        self._free_left()
        buffer = self._load(key)
        self._wait(buffer)
        self._buffers.remove(buffer)
        self._buffers.append(buffer)
        keys = list(self._shapes)
        self._load(keys[(keys.index(key) + 1) % len(keys)])
        assert buffer.content is not None
        return buffer.content

    def nbytes(self) -> int:
        return sum(shapes.nbytes() for shapes in self._shapes.values())

    def drop(self) -> None:
        """Free everything. Pinned memory goes back to torch, which keeps it for the next run."""
        for buffer in (*self._buffers, self._leaving):
            self._wait(buffer)
        self._shapes, self._host = {}, {}
        self._buffers, self._leaving = [Buffer(), Buffer()], Buffer()

    def _load(self, key: Key) -> Buffer:
        """The buffer that holds a correction, or will when it is `copied`."""
        for buffer in self._buffers:
            if buffer.key == key:
                return buffer
        buffer, shapes = self._buffers[0], self._shapes[key]
        if buffer.content is None or _layout(buffer.content) != _layout(shapes):
            self._wait(buffer)
            buffer.content = shapes.map(lambda x: torch.empty_like(x, device=self.device))
        buffer.copied = self._copy(self._host[key], _pieces(buffer.content))
        buffer.key = key
        return buffer

    def _copy(self, sources: list[Tensor], targets: list[Tensor]) -> Any:
        """Begin to copy; returns the event of its end."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):  # no other one where it is None
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=self.stream is not None)
        return None if self.stream is None else self.stream.record_event()

    def _wait(self, buffer: Buffer) -> None:
        """Let the model's stream wait for the last copy of a buffer."""
        if buffer.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(buffer.copied)

    def _free_left(self) -> None:
        self._wait(self._leaving)
        self._leaving = Buffer()

    def _pinned(self, correction: Correction) -> list[Tensor]:
        sizes = [len(piece) for piece in _pieces(correction)]
        try:
            return [
                torch.empty(size, dtype=torch.uint8, pin_memory=self.stream is not None)
                for size in sizes
            ]
        except RuntimeError as failure:
            raise MemoryError(
                f"the host could not pin {correction.nbytes() / 2**20:.1f} MiB more than the"
                f" {self.nbytes() / 2**20:.1f} MiB that it keeps: lower max_cache_bytes, or keep"
                " them on the GPU (cache_device='model')"
            ) from failure


def is_apart(device: torch.device) -> bool:
    """Whether its memory is another than the host's."""
    return device.type != "cpu"


def _layout(correction: Correction) -> list[tuple]:
    return [(x.shape, x.dtype) for x in correction.tensors()]


def _pieces(correction: Correction) -> list[Tensor]:
    """Its bytes, (PIECE,) uint8 each but for the last of a tensor."""
    flat = (x.view(-1).view(torch.uint8) for x in correction.tensors())
    return [piece for x in flat for piece in x.split(PIECE)]

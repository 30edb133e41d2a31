"""Ulysses: a part of the tokens outside of attention, all tokens of a part of the heads inside.

DeepSpeed-Ulysses, arXiv 2309.14509: each of N processes holds 1/N of the tokens; before attention
an all-to-all gives it all tokens of 1/N of the heads, and one after it gives its tokens back. Text
that shares the attention is the same on all processes, which take their heads of it.

A mask belongs to one head, so it is found, kept and used where that head is. Only what compares
heads, or tells of all, is gathered. Where heads keep more or less of their blocks, they are shared
out anew after a search, so that no process waits for another, and what is kept moves with them.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .grid import VideoGrid


@dataclass(frozen=True)
class Ulysses:
    """This process, `rank`, among `degree` that share one transformer call."""

    group: Any
    rank: int
    degree: int

    @classmethod
    def of(cls, group: Any) -> "Ulysses":
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def sizes(self, tokens: int) -> list[int]:
        """How many of the tokens each process holds; the first ones have one more."""
        return [tokens // self.degree + (i < tokens % self.degree) for i in range(self.degree)]

    def part(self, tokens: int) -> slice:
        """Those that this process holds."""
        ends = list(accumulate(self.sizes(tokens), initial=0))
        return slice(ends[self.rank], ends[self.rank + 1])

    def tokens_here(self, grid: VideoGrid) -> int:
        return self.sizes(grid.video_tokens)[self.rank] + grid.text_tokens

    def own_heads(self, heads: int) -> slice:
        """Of `heads` in all."""
        here = heads // self.degree
        return slice(self.rank * here, (self.rank + 1) * here)

    def to_heads(self, x: Tensor, grid: VideoGrid) -> Tensor:
        """(B, tokens here, H, D) -> (B, S, H / N, D)."""
        heads = self.own_heads(x.shape[2])
        here, sizes = self.tokens_here(grid) - grid.text_tokens, self.sizes(grid.video_tokens)
        whole = x.new_empty(x.shape[0], grid.tokens, heads.stop - heads.start, x.shape[3])
        video, text = _spans(grid, here)
        all_video, all_text = _spans(grid, grid.video_tokens)
        for sample, sent in zip(whole, x[:, video].unflatten(2, (self.degree, -1))):
            sent = sent.transpose(0, 1).reshape(-1, *whole.shape[2:])
            self._exchange(sample[all_video], sent, sizes, [here] * self.degree)
        whole[:, all_text] = x[:, text, heads]
        return whole

    def to_tokens(self, x: Tensor, grid: VideoGrid) -> Tensor:
        """(B, S, H / N, D) -> (B, tokens here, H, D)."""
        here, sizes = self.tokens_here(grid) - grid.text_tokens, self.sizes(grid.video_tokens)
        part = x.new_empty(x.shape[0], self.tokens_here(grid), self.degree, *x.shape[2:])
        video, text = _spans(grid, here)
        all_video, all_text = _spans(grid, grid.video_tokens)
        for sample, sent in zip(part, x[:, all_video]):
            received = x.new_empty(self.degree * here, *x.shape[2:])
            self._exchange(received, sent.contiguous(), [here] * self.degree, sizes)
            sample[video] = received.unflatten(0, (self.degree, here)).transpose(0, 1)
        if grid.text_tokens:
            part[:, text] = self._gather(x[:, all_text]).permute(1, 2, 0, 3, 4)
        return part.flatten(2, 3)

    def all_tokens(self, x: Tensor, tokens: int) -> Tensor:
        """Video tokens (B, tokens here, C) of all processes, (B, tokens, C)."""
        sizes = self.sizes(tokens)
        missing = sizes[0] - x.shape[1]
        parts = self._gather(torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x)
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes)], dim=1)

    def all_heads(self, x: Tensor, dim: int = 0) -> Tensor:
        """What each process has of its heads, one after the other along `dim`."""
        return torch.cat(list(self._gather(x)), dim)

    def move(self, x: Tensor, order: list[int], dim: int) -> Tensor:
        """Of what all have along `dim` for their heads, this process's part in another order."""
        here = torch.tensor(order[self.own_heads(len(order))], device=x.device)
        return self.all_heads(x, dim).index_select(dim, here)

    def _exchange(
        self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]
    ) -> None:
        dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=self.group)

    def _gather(self, x: Tensor) -> Tensor:
        """(N, ...) of equal shapes."""
        gathered = x.new_empty(self.degree * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=self.group)
        return gathered.unflatten(0, (self.degree, -1))


def balanced(costs: list[float], degree: int) -> list[int]:
    """An order of heads in which equally many for each of `degree` processes cost about as much.

    The dearest first, each to the process that has least and is not full. As they are, where that
    gains less than 1%.
    """
    full = len(costs) // degree
    parts: list[list[int]] = [[] for _ in range(degree)]

    def total(part: list[int]) -> float:
        return sum(costs[head] for head in part)

    for head in sorted(range(len(costs)), key=lambda head: -costs[head]):
        min((part for part in parts if len(part) < full), key=total).append(head)
    as_they_are = [list(range(i * full, (i + 1) * full)) for i in range(degree)]
    if max(map(total, parts)) > 0.99 * max(map(total, as_they_are)):
        parts = as_they_are
    return [head for part in parts for head in sorted(part)]


def _spans(grid: VideoGrid, video: int) -> tuple[slice, slice]:
    """Where the video and the text are, with so many tokens of the video."""
    if grid.text_first:
        return slice(grid.text_tokens, None), slice(grid.text_tokens)
    return slice(video), slice(video, None)

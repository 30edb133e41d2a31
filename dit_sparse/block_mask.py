"""Which key blocks each query block reads."""

from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockMask:
    """A block-sparse attention pattern, kept as bits.

    Shapes: B batch, H heads, Nq query blocks, Nk key blocks. Blocks are cut from the ordered
    sequence, so only the last block of each side can be short.

    Attributes:
        bits: (B, H, Nq, ceil(Nk / 8)) uint8, lowest bit first.
        q_len, kv_len: tokens of each side.
        block_size: tokens in a query block and in a key block.
        max_blocks: no query block reads more key blocks than this.
        density: (H,) float32, kept query-key pairs over all pairs, mean over the batch.
    """

    bits: Tensor
    q_len: int
    kv_len: int
    block_size: tuple[int, int]
    max_blocks: int
    density: Tensor

    @classmethod
    def from_dense(
        cls,
        mask: Tensor,
        q_len: int,
        kv_len: int,
        block_size: tuple[int, int] = (64, 64),
    ) -> "BlockMask":
        """Pack a bool mask (B, H, Nq, Nk). Does not wait for a GPU."""
        expected = (-(-q_len // block_size[0]), -(-kv_len // block_size[1]))
        if mask.dtype != torch.bool or mask.ndim != 4 or tuple(mask.shape[2:]) != expected:
            raise ValueError(
                f"expected a bool mask (B, H, {expected[0]}, {expected[1]}) for {q_len} queries and"
                f" {kv_len} keys in blocks of {block_size}, got {mask.dtype} {tuple(mask.shape)}"
            )
        q_tokens = _valid_tokens(q_len, block_size[0], mask.device)
        missing = expected[1] * block_size[1] - kv_len  # of the last block
        kv_tokens = mask.sum(-1) * block_size[1] - mask[..., -1] * missing  # (B, H, Nq)
        pairs = kv_tokens.float() @ q_tokens  # (B, H)
        # Counting on a GPU would wait for it, and lists live for one call only.
        on_cpu = mask.device.type == "cpu"
        return cls(
            bits=_pack(mask),
            q_len=q_len,
            kv_len=kv_len,
            block_size=block_size,
            max_blocks=max(int(mask.sum(-1).max()), 1) if on_cpu else expected[1],
            density=(pairs / (q_len * kv_len)).mean(0),
        )

    @classmethod
    def full(
        cls, q_len: int, kv_len: int, block_size: tuple[int, int] = (64, 64), device="cpu"
    ) -> "BlockMask":
        """Every block kept, one mask for all samples and heads."""
        blocks = (-(-q_len // block_size[0]), -(-kv_len // block_size[1]))
        mask = torch.ones(1, 1, *blocks, dtype=torch.bool, device=device)
        return cls.from_dense(mask, q_len, kv_len, block_size)

    def twice(self) -> "BlockMask":
        """For a batch that holds the samples of this one two times, one after the other."""
        return self if len(self.bits) == 1 else replace(self, bits=torch.cat([self.bits] * 2))

    @property
    def num_blocks(self) -> tuple[int, int]:
        return -(-self.q_len // self.block_size[0]), -(-self.kv_len // self.block_size[1])

    def to_dense(self) -> Tensor:
        """Bool mask (B, H, Nq, Nk)."""
        shifts = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        unpacked = (self.bits.unsqueeze(-1) >> shifts) & 1
        return unpacked.flatten(-2)[..., : self.num_blocks[1]].bool()

    def indices(self, dtype: torch.dtype = torch.int16) -> tuple[Tensor, Tensor]:
        """`kv_num_blocks` (B, H, Nq) int32 and `kv_indices` (B, H, Nq, max_blocks).

        The first `kv_num_blocks` entries of a row are the kept key blocks in ascending order;
        the rest are 0. Does not wait for a GPU.
        """
        if self.bits.device.type == "cuda" and triton_is_installed():
            from .kernels.block_lists import block_lists

            return block_lists(self.bits, self.num_blocks[1], self.max_blocks, dtype)
        dense = self.to_dense()
        counts = dense.sum(-1, dtype=torch.int32)
        slot = dense.cumsum(-1, dtype=torch.int32) - 1
        slot = torch.where(dense, slot, self.max_blocks).long()  # dropped blocks share one slot
        kept = slot.new_zeros(*dense.shape[:3], self.max_blocks + 1, dtype=dtype)
        block = torch.arange(dense.shape[-1], dtype=dtype, device=dense.device)
        kept.scatter_(-1, slot, block.expand_as(dense))
        return counts, kept[..., : self.max_blocks].contiguous()

    @cached_property
    def work_order(self) -> Tensor:
        """Rows (B * H * Nq,) int32 in the order in which they should start, the longest first.

        Heads stay together, so that their keys stay in the L2 cache, and begin with the one that
        has most to do; the short rows of the lightest head then fill the end.
        """
        if self.bits.device.type == "cuda" and triton_is_installed():
            from .kernels.select_rows import work_order

            return work_order(self.indices()[0])
        counts = self.to_dense().sum(-1, dtype=torch.int32).flatten(0, 1)  # (B * H, Nq)
        heads = counts.sum(-1).argsort(descending=True, stable=True)
        rows = counts.argsort(dim=-1, descending=True, stable=True)
        return (rows[heads] + heads[:, None] * counts.shape[1]).flatten().int()

    def to_flex(self, kv_len: Tensor | None = None):
        """The same mask for torch's FlexAttention (full-width int32 indices).

        Args:
            kv_len: (B,) valid keys of each sample, which it then checks in every block.
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        dense = self.to_dense()
        counts = dense.sum(-1, dtype=torch.int32)
        order = dense.int().argsort(dim=-1, descending=True, stable=True).int()
        batch, heads = dense.shape[:2]

        def attends(b, h, q, k):  # read by uncompiled runs, and where kv_len cuts blocks
            block = dense[
                b if batch > 1 else 0,
                h if heads > 1 else 0,
                q // self.block_size[0],
                k // self.block_size[1],
            ]
            return block if kv_len is None else block & (k < kv_len[b])

        kept, none = (counts, order), (torch.zeros_like(counts), torch.zeros_like(order))
        return FlexBlockMask.from_kv_blocks(
            *(none if kv_len is None else kept),
            *(kept if kv_len is None else none),
            BLOCK_SIZE=self.block_size,
            mask_mod=attends,
            seq_lengths=(self.q_len, self.kv_len),
            compute_q_blocks=False,
        )

    def to_fa4(self) -> dict[str, Any]:
        """Fields of flash-attn-4's `BlockSparseTensorsTorch`: every kept block is a full one."""
        counts, indices = self.indices(torch.int32)
        return {
            "mask_block_cnt": torch.zeros_like(counts),
            "mask_block_idx": indices,
            "full_block_cnt": counts,
            "full_block_idx": indices,
            "block_size": self.block_size,
        }

    def nbytes(self) -> int:
        return self.bits.numel() + (
            4 * self.work_order.numel() if "work_order" in vars(self) else 0
        )


@cache
def triton_is_installed() -> bool:
    return find_spec("triton") is not None


def _valid_tokens(length: int, block_size: int, device: torch.device) -> Tensor:
    """Tokens in each block, (N,) float32."""
    count = -(-length // block_size)
    tokens = torch.full((count,), float(block_size), dtype=torch.float32, device=device)
    tokens[-1] -= len(tokens) * block_size - length
    return tokens


def _pack(mask: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)

"""From packed bits to lists of kv blocks, one Triton kernel, without waiting for the GPU.

    counts[row] = kept blocks of the row; indices[row, :counts[row]] = which, ascending; then zeros

One program a row. It reads the bits and writes the lists once: small beside any attention call.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dot

CHUNK = 1024  # blocks at once


@triton.jit(do_not_specialize=["blocks", "width"])
def block_lists_kernel(
    bits_ptr, counts_ptr, indices_ptr, row_bytes, blocks, width, CHUNK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    bits_row, indices_row = bits_ptr + row * row_bytes, indices_ptr + row * width
    count = tl.full((), 0, tl.int32)
    for first in tl.range(0, blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        byte = tl.load(bits_row + block // 8, mask=block < blocks, other=0).to(tl.int32)
        kept = (byte >> (block % 8)) & 1
        slot = count + tl.cumsum(kept, 0) - kept
        value = block.to(indices_ptr.dtype.element_ty)
        tl.store(indices_row + slot, value, mask=(kept != 0) & (slot < width))
        count += tl.sum(kept, 0)
    count = tl.minimum(count, width)
    tl.store(counts_ptr + row, count)
    for first in tl.range(0, width, CHUNK):
        slot = first + tl.arange(0, CHUNK)
        zero = tl.zeros((CHUNK,), indices_ptr.dtype.element_ty)
        tl.store(indices_row + slot, zero, mask=(slot >= count) & (slot < width))


def block_lists(
    bits: Tensor, blocks: int, width: int, dtype: torch.dtype = torch.int16
) -> tuple[Tensor, Tensor]:
    """Lists of the kept blocks.

    Args:
        bits: `(B, H, Nq, ceil(blocks / 8))` uint8, lowest bit first.
        blocks: kv blocks a row.
        width: length of the lists; no row may keep more.
        dtype: of the indices, int16 or int32.

    Returns:
        Counts `(B, H, Nq)` int32 and indices `(B, H, Nq, width)`.
    """
    dot.check_device("bits", bits)
    bits = bits.contiguous()
    counts = torch.empty(bits.shape[:3], dtype=torch.int32, device=bits.device)
    indices = torch.empty((*bits.shape[:3], width), dtype=dtype, device=bits.device)
    with torch.cuda.device_of(bits):
        block_lists_kernel[(counts.numel(),)](
            bits_ptr=bits,
            counts_ptr=counts,
            indices_ptr=indices,
            row_bytes=bits.shape[3],
            blocks=blocks,
            width=width,
            CHUNK=CHUNK,
            num_warps=4,
        )
    return counts, indices

"""How fast can all multiprocessors read the same 16 MB, which lie in the L2 cache?"""

import torch
import triton
import triton.language as tl

WORDS, CHUNK = 2**22, 4096  # int32


@triton.jit
def read(source, out, chunks, CHUNK: tl.constexpr):
    program = tl.program_id(0)
    total = tl.zeros((CHUNK,), tl.int32)
    for i in tl.range(0, chunks):
        chunk = (i + program * 37) % chunks  # not all at the same place
        total += tl.load(source + chunk * CHUNK + tl.arange(0, CHUNK))
    tl.store(out + program, tl.sum(total, 0))


def programs() -> int:
    return 8 * torch.cuda.get_device_properties(0).multi_processor_count


def read_bytes() -> int:
    """Bytes that one run reads."""
    return programs() * WORDS * 4


def run() -> torch.Tensor:
    source = torch.zeros(WORDS, dtype=torch.int32, device="cuda")
    out = torch.empty(programs(), dtype=torch.int32, device="cuda")
    read[(programs(),)](source, out, WORDS // CHUNK, CHUNK=CHUNK, num_warps=8)
    return out

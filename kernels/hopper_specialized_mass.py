"""block_mass for Hopper in Gluon with a task for each warp group, as in hopper_specialized_fwd.

A program is a tile of 128 queries and walks all keys; it holds a multiprocessor alone with tiles of
128x128, two share one with 128x64. Its warps are
- a producer, one warp: loads keys into STAGES buffers;
- two consumers, four warps with 64 queries each: the product of the next tile runs beside the
  exponentials of this one and beside the other consumer's.

A sum is over at most the 64 rows of a consumer.

Limits: Hopper; bfloat16 and float16; head dim 64 or 128. Gluon does not run in Triton's
interpreter; tests/gluon_on_cpu.py runs it without a GPU.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .dot import LOG2_E
from .hopper_fwd import describe, load
from .tiles import Tile

ROWS = 64  # of a consumer
# By columns of a tile: registers of a launch, and of the second consumer; the first has the rest.
# 65,536 are there for 12 warps (the producer's warp group is filled up), or for twice as many.
REGISTERS = {128: (168, 240), 64: (80, 104)}


@gluon.jit
def produce(q, k, buffers, barriers, batch, head, q_start, tiles):
    q_shared, k_shared = buffers
    q_full, k_full, k_free = barriers
    STAGES: gl.constexpr = k_shared.shape[0]
    COLUMNS: gl.constexpr = k_shared.shape[3]
    load(q, batch, head, q_start, q_shared, q_full, 0, True)
    load(q, batch, head, q_start + 64, q_shared, q_full, 1, True)
    for tile in range(0, tiles):
        slot = tile % STAGES
        mbarrier.wait(k_free.index(slot), (tile // STAGES + 1) & 1)  # fresh ones let phase 1 pass
        load(k, batch, head, tile * COLUMNS, k_shared, k_full, slot, True)


@gluon.jit
def start_product(q_tile, tile, no_scores, k_shared, k_full):
    STAGES: gl.constexpr = k_shared.shape[0]
    mbarrier.wait(k_full.index(tile % STAGES), tile // STAGES & 1)
    k_tile = k_shared.index(tile % STAGES).reshape([k_shared.shape[3], k_shared.shape[4]])
    return warpgroup_mma(q_tile, k_tile.permute([1, 0]), no_scores, use_acc=False, is_async=True)


@gluon.jit
def end_product(token, tile, k_full, k_free, STAGES: gl.constexpr):
    # The same wait again: without it ptxas moves the next one up, before all exponentials.
    mbarrier.wait(k_full.index(tile % STAGES), tile // STAGES & 1)
    scores = warpgroup_mma_wait(0, deps=(token,))
    mbarrier.arrive(k_free.index(tile % STAGES), count=1)
    return scores


@gluon.jit
def thread_sums(probs, SPAN: gl.constexpr):
    # Of 16 rows and SPAN columns a thread holds rows 8 apart and pairs of columns 8 apart. The sum
    # over the four threads of a row is here so that ptxas leaves the exponentials before the wait.
    PARTS: gl.constexpr = probs.shape[1] // SPAN
    probs = probs.reshape([probs.shape[0] // 16, 2, 8, PARTS, SPAN // 8, 4, 2])
    return gl.sum(gl.sum(gl.sum(gl.sum(probs, 6), 4), 1), 3)


@gluon.jit
def store_sums(sums, mass_base, group_stride, first, tile, groups, spans, GROUP: gl.constexpr):
    # The rest: over the rows of a warp, and over the warps of a group
    sums = gl.sum(sums, 1)
    sums = gl.sum(sums.reshape([sums.shape[0] * 16 // GROUP, GROUP // 16, sums.shape[1]]), 1)
    layout: gl.constexpr = sums.type.layout
    group = first + gl.arange(0, sums.shape[0], gl.SliceLayout(1, layout))
    span = tile * sums.shape[1] + gl.arange(0, sums.shape[1], gl.SliceLayout(0, layout))
    gl.store(
        mass_base + group.to(gl.int64)[:, None] * group_stride + span[None, :],
        sums,
        mask=(group < groups)[:, None] & ((span >= 0) & (span < spans))[None, :],
    )


@gluon.jit
def consume(
    HALF: gl.constexpr,
    pointers,
    buffers,
    barriers,
    q_start,
    tiles,
    numbers,
    GROUP: gl.constexpr,
    SPAN: gl.constexpr,
):
    ROWS: gl.constexpr = 64
    lse_row, mass_base = pointers
    q_shared, k_shared = buffers
    q_full, k_full, k_free = barriers
    STAGES: gl.constexpr = k_shared.shape[0]
    COLUMNS: gl.constexpr = k_shared.shape[3]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16]
    )
    q_len, kv_len, groups, spans, lse_stride, group_stride, scale_log2, log2_e = numbers
    rows = q_start + HALF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    lse = gl.load(lse_row + rows * lse_stride, mask=rows < q_len, other=float("inf"))
    # A row that attended to nothing, or does not exist, has no mass: exp2(x - inf) = 0.
    lse_log2 = gl.where(lse == float("-inf"), float("inf"), lse) * log2_e
    first = (q_start + HALF * ROWS) // GROUP

    q_tile = q_shared.index(HALF).reshape([ROWS, q_shared.shape[4]])
    no_scores = gl.full([ROWS, COLUMNS], 0.0, gl.float32, layout)
    mbarrier.wait(q_full.index(HALF), 0)
    token = start_product(q_tile, 0, no_scores, k_shared, k_full)
    scores = end_product(token, 0, k_full, k_free, STAGES)
    # Sums of a tile are finished beside the exponentials of the next one; these are not stored.
    sums = thread_sums(scores, SPAN)
    # Two tiles a turn, so that scores need not move from one set of registers to another.
    for pair in range(0, tiles - 2, 2):
        for half in gl.static_range(2):
            tile = pair + half
            token = start_product(q_tile, tile + 1, no_scores, k_shared, k_full)
            store_sums(sums, mass_base, group_stride, first, tile - 1, groups, spans, GROUP)
            sums = thread_sums(gl.exp2(gl.fma(scores, scale_log2, -lse_log2[:, None])), SPAN)
            scores = end_product(token, tile + 1, k_full, k_free, STAGES)
    # The last two, which the end of the keys may cut. In the loop, even a branch would cost every
    # tile a selection of each score.
    for half in gl.static_range(2):
        tile = tiles - 2 + half
        if half == 0:
            token = start_product(q_tile, tile + 1, no_scores, k_shared, k_full)
        store_sums(sums, mass_base, group_stride, first, tile - 1, groups, spans, GROUP)
        seen = tile * COLUMNS + columns < kv_len
        scores = gl.where(seen[None, :], scores, float("-inf"))
        sums = thread_sums(gl.exp2(gl.fma(scores, scale_log2, -lse_log2[:, None])), SPAN)
        if half == 0:
            scores = end_product(token, tile + 1, k_full, k_free, STAGES)
    store_sums(sums, mass_base, group_stride, first, tiles - 1, groups, spans, GROUP)


@gluon.jit(do_not_specialize=["q_len", "kv_len", "groups", "spans"])
def hopper_specialized_mass_kernel(
    q,
    k,
    lse_ptr,
    mass_ptr,
    lse_strides,
    mass_strides,
    q_len,
    kv_len,
    groups,
    spans,
    scale_log2,
    log2_e,
    HEAD_DIM: gl.constexpr,
    COLUMNS: gl.constexpr,
    GROUP: gl.constexpr,
    SPAN: gl.constexpr,
    STAGES: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    q_tile, head, batch = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    tiles = (kv_len + 2 * COLUMNS - 1) // (2 * COLUMNS) * 2

    q_shared = gl.allocate_shared_memory(q.dtype, [2, 1, 1, 64, HEAD_DIM], q.layout)
    k_shared = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, COLUMNS, HEAD_DIM], k.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(q_full.index(half), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
    fence_async_shared()

    lse_row = lse_ptr + batch.to(gl.int64) * lse_strides[0] + head.to(gl.int64) * lse_strides[1]
    mass_base = (
        mass_ptr + batch.to(gl.int64) * mass_strides[0] + head.to(gl.int64) * mass_strides[1]
    )
    buffers, barriers = (q_shared, k_shared), (q_full, k_full, k_free)
    q_start = q_tile * 128
    pointers = (lse_row, mass_base)
    numbers = (
        q_len, kv_len, groups, spans, lse_strides[2], mass_strides[2], scale_log2, log2_e
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consume, (0, pointers, buffers, barriers, q_start, tiles, numbers, GROUP, SPAN)),
            (consume, (1, pointers, buffers, barriers, q_start, tiles, numbers, GROUP, SPAN)),
            (produce, (q, k, buffers, barriers, batch, head, q_start, tiles)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def hopper_specialized_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    mass: Tensor,
    *,
    group: int,
    span: int,
    scale: float,
    tile: Tile,
) -> None:
    """Fill `mass (B, H, Sq / group, Skv / span)`; `group` is at most 64.

    Arguments as checked and prepared by `block_mass`.
    """
    batch, q_len, heads, head_dim = query.shape
    registers, second = REGISTERS[tile.columns]
    hopper_specialized_mass_kernel[(-(-q_len // (2 * ROWS)), heads, batch)](
        q=describe(query, ROWS),
        k=describe(key, tile.columns),
        lse_ptr=lse,
        mass_ptr=mass,
        lse_strides=lse.stride(),
        mass_strides=mass.stride(),
        q_len=q_len,
        kv_len=key.shape[1],
        groups=mass.shape[2],
        spans=mass.shape[3],
        scale_log2=scale * LOG2_E,
        log2_e=LOG2_E,
        HEAD_DIM=head_dim,
        COLUMNS=tile.columns,
        GROUP=group,
        SPAN=span,
        STAGES=tile.num_stages,
        PRODUCER_REGISTERS=24,
        CONSUMER_REGISTERS=second,
        num_warps=4,
        maxnreg=registers,
    )

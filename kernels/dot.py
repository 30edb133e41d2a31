"""What the kernels share: the matrix product, tile loads, the online softmax, launcher checks.

Tensors are `(B, S, H, D)` with any strides. A kernel reads a tile of one head either through
pointers or through a host tensor descriptor (TMA), seen as `(B, H, S, D)`. Head dims that are no
power of two are padded with zeros inside the kernel.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = 1.4426950408889634
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)

BLOCK_SIZES = (32, 64, 128)
MAX_HEAD_DIM = 256


@triton.jit
def dot(a, b, acc=None):
    # (M, K) @ (K, N) -> (M, N) in float32, on top of acc if given
    # Triton's interpreter multiplies bf16 as raw bits; float32 holds every bf16 exactly.
    if INTERPRETING and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


# What `triton.jit` returned decides, not the environment variable as it stands now.
INTERPRETING: tl.constexpr = tl.constexpr(not isinstance(dot, triton.JITFunction))


@triton.jit
def to_fp8(x):
    # float32 to e4m3, to nearest. Triton's interpreter halves what rounds up to a power of two: it
    # gets numbers of three bits already.
    if INTERPRETING:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(tl.float8e4nv)


@triton.jit
def load_tile(
    x,
    strides,
    batch,
    head,
    start,
    seqlen,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    MASKED: tl.constexpr,
):
    # Rows start .. start + ROWS of one head: (ROWS, BLOCK_D), zeros beyond the tensor.
    if DESCRIPTORS:
        return x.load([batch, head, start, 0]).reshape(ROWS, BLOCK_D)
    else:
        rows = tl.arange(0, ROWS)
        dims = tl.arange(0, BLOCK_D)
        base = x + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[2]
        base += tl.cast(start, tl.int64) * strides[1]
        pointers = base + (rows.to(tl.int64)[:, None] * strides[1] + dims[None, :])
        if MASKED:
            valid = (start + rows < seqlen)[:, None] & (dims < HEAD_DIM)[None, :]
            return tl.load(pointers, mask=valid, other=0.0)
        elif HEAD_DIM != BLOCK_D:
            return tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def tile_scores(
    q,
    k,
    k_strides,
    batch,
    head,
    start,
    kv_len,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    MASKED: tl.constexpr,
):
    # Of a q tile and one tile of keys; -inf for keys that do not exist
    k_tile = load_tile(
        k, k_strides, batch, head, start, kv_len, HEAD_DIM, BLOCK_D, COLUMNS, DESCRIPTORS, MASKED
    )
    scores = dot(q, k_tile.trans())  # (ROWS, BLOCK_D) @ (BLOCK_D, COLUMNS) -> (ROWS, COLUMNS)
    if MASKED:
        kv_valid = start + tl.arange(0, COLUMNS) < kv_len
        scores = tl.where(kv_valid[None, :], scores, float("-inf"))
    return scores


@triton.jit
def online_softmax(scores, scale_log2, running_max, running_sum):
    # One step of softmax in base 2 over unscaled scores (ROWS, COLUMNS).
    # Scaling inside the exponent lets one fused multiply-add serve scale and maximum.
    new_max = tl.maximum(running_max, tl.max(scores, 1) * scale_log2)  # (ROWS,)
    rescale = tl.exp2(running_max - new_max)  # (ROWS,)
    probs = tl.exp2(tl.fma(scores, scale_log2, -new_max[:, None]))  # (ROWS, COLUMNS)
    return probs, rescale, new_max, running_sum * rescale + tl.sum(probs, 1)


@functools.cache
def padded_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, that holds `head_dim`."""
    return max(16, triton.next_power_of_2(head_dim))


@functools.cache
def has_fast_descriptors(device: torch.device) -> bool:
    """Whether tile loads through TMA pay: Hopper and data-centre Blackwell."""
    if INTERPRETING or torch.version.hip or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def fits_descriptor(x: Tensor) -> bool:
    """Whether TMA can address `x (B, S, H, D)`: base and strides in multiples of 16 bytes."""
    width = 16 // x.element_size()
    for size, stride in zip(x.shape[:3], x.stride()[:3]):
        if size > 1 and (stride <= 0 or stride % width):
            return False
    return x.data_ptr() % 16 == 0


def load_path(*tensors: Tensor) -> str:
    """`"float32"`, `"descriptor"` or `"pointer"`: how kernels should read these tensors."""
    if tensors[0].dtype == torch.float32:
        return "float32"
    if has_fast_descriptors(tensors[0].device) and all(fits_descriptor(x) for x in tensors):
        return "descriptor"
    return "pointer"


def describe(x: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of `x (B, S, H, D)` as `(B, H, S, D)` that loads `rows` tokens of one head."""
    batch, seqlen, heads, head_dim = x.shape
    aligned = padded_head_dim(head_dim)  # any legal stride serves an axis of length 1
    strides = [
        stride if size > 1 else aligned
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    ]
    return TensorDescriptor(
        x,
        shape=[batch, heads, seqlen, head_dim],
        strides=[strides[0], strides[2], strides[1], 1],
        block_shape=[1, 1, rows, padded_head_dim(head_dim)],
    )


def check_tensors(**tensors: Tensor) -> None:
    """Raise `ValueError` unless all are `(B, S, H, D)` of one dtype and device we can run."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(
                f"{name} must be a non-empty (B, S, H, D), got shape {tuple(x.shape)}. "
                "Give the sequence axis before the head axis."
            )
        if x.shape[3] > MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must have a head dim up to {MAX_HEAD_DIM}, got {x.shape[3]}. "
                "Use dense attention for wider heads."
            )
        if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(
                f"{name} must be bfloat16, float16 or float32, got {x.dtype}. Convert it first."
            )
        if x.dtype != first.dtype or x.device != first.device:
            raise ValueError(
                f"{name} must match {first_name} ({first.dtype} on {first.device}), "
                f"got {x.dtype} on {x.device}. Convert or move it first."
            )
        if x.shape[0] != first.shape[0] or x.shape[2:] != first.shape[2:]:
            raise ValueError(
                f"{name} must have the B, H and D of {first_name} {tuple(first.shape)}, "
                f"got {tuple(x.shape)}. Repeat shared heads first."
            )
    check_device(first_name, first)


def check_device(name: str, x: Tensor) -> None:
    """Raise `ValueError` unless kernels can run where `x` is."""
    if x.device.type != "cuda" and not INTERPRETING:
        raise ValueError(
            f"{name} must be on a cuda device, got {x.device}. Move it to the GPU, or set "
            "TRITON_INTERPRET=1 before the first import of triton (slow, for tests only)."
        )


def check_block_size(block_size: tuple[int, int]) -> None:
    """Raise `ValueError` unless both logical block sizes are ones the kernels serve."""
    if len(block_size) != 2 or any(size not in BLOCK_SIZES for size in block_size):
        raise ValueError(
            f"block_size must be (block_q, block_kv), each one of {BLOCK_SIZES}, "
            f"got {block_size}. Regroup the block mask to one of these."
        )


def check_scale(scale: float) -> None:
    """Raise `ValueError` unless the softmax scale is positive."""
    if not scale > 0:
        raise ValueError(
            f"scale must be positive, got {scale}. Negate the query for a negative scale."
        )


def check_index(name: str, x: Tensor, shape: tuple, dtypes: tuple, device: torch.device) -> None:
    """Raise `ValueError` unless `x` has the dtype and device, and expands to `shape` (None: any).

    Only the first two axes, batch and heads, may be of length 1 to be shared.
    """
    if x.dtype not in dtypes or x.device != device:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(
            f"{name} must be {wanted} on {device}, got {x.dtype} on {x.device}. "
            "Convert or move it first."
        )
    fits = x.ndim == len(shape) and all(
        want is None or size == want or (size == 1 and axis < 2 and len(shape) > 2)
        for axis, (size, want) in enumerate(zip(x.shape, shape, strict=True))
    )
    if not fits:
        wanted = "(" + ", ".join("any" if want is None else str(want) for want in shape) + ")"
        shared = ", batch and heads possibly 1" if len(shape) > 2 else ""
        raise ValueError(
            f"{name} must have shape {wanted}{shared}, got {tuple(x.shape)}. "
            "Check the block size and the lengths it was built for."
        )

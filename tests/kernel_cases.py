"""What the kernels must compute: inputs, a slow float64 oracle, and the tolerance rule.

Used by the tests and by `benchmarks/kernels.py`, so it needs torch and triton only. The
oracle expands the block lists to a mask over tokens and knows nothing of the kernels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_sparse.block_mask import BlockMask
from dit_sparse.grid import VideoGrid
from dit_sparse.kernels.block_mass import block_mass
from dit_sparse.kernels.block_pool import block_pool, pool_keys_values
from dit_sparse.kernels.block_sparse_fwd import block_sparse_fwd
from dit_sparse.kernels.sampled_mass import sampled_mass
from dit_sparse.kernels.select_rows import work_order
from dit_sparse.kernels.tail_fwd import tail_fwd
from dit_sparse.kernels.tiles import Tile
from dit_sparse.kernels.top_k import top_k
from dit_sparse.patterns.adaspa import AdaSpa
from dit_sparse.patterns.select import forced_blocks
from dit_sparse.reference import rounded_to_8_bits

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One problem. `kept` is "all", "one", "some", "none" (some rows empty) or "last"."""

    name: str
    head_dim: int = 64
    dtype: torch.dtype = BF16
    q_len: int = 140
    kv_len: int = 140
    block_size: tuple[int, int] = (64, 64)
    kept: str = "some"
    batch: int = 1
    heads: int = 2
    sample_lens: tuple[int, ...] | None = None
    shared: bool = False
    layout: str = "plain"
    index_dtype: torch.dtype = torch.int16
    scale: float | None = None
    tail_tokens: int | None = None  # of a mean in the tail; whole blocks where None


CASES = [
    Case("d32-bf16", head_dim=32),
    Case("d64-bf16"),
    Case("d128-bf16", head_dim=128),
    Case("d32-fp16", head_dim=32, dtype=FP16),
    Case("d64-fp16", dtype=FP16, block_size=(128, 64)),
    Case("d128-fp16", head_dim=128, dtype=FP16, block_size=(128, 64)),
    Case("d32-fp32", head_dim=32, dtype=FP32),
    Case("d64-fp32", dtype=FP32),
    Case("d128-fp32", head_dim=128, dtype=FP32, q_len=100, kv_len=130, block_size=(128, 128)),
    Case("d40-bf16", head_dim=40),
    Case("d96-bf16", head_dim=96),
    Case("d256-bf16", head_dim=256, q_len=130, kv_len=130),
    Case("d8-fp16", head_dim=8, dtype=FP16),
    Case("d33-bf16-unaligned", head_dim=33),
    Case("d80-fp32", head_dim=80, dtype=FP32, q_len=70, kv_len=70),
    Case("block-128-128", block_size=(128, 128), q_len=300, kv_len=300, head_dim=128),
    Case("block-32-32", block_size=(32, 32), q_len=131, kv_len=131),
    Case("block-64-128", block_size=(64, 128), q_len=300, kv_len=300),
    Case("no-partial-block", q_len=256, kv_len=256, block_size=(128, 128)),
    Case("shorter-than-a-block", q_len=5, kv_len=7, block_size=(128, 128)),
    Case("one-token-over", q_len=129, kv_len=257, block_size=(128, 128), kept="all"),
    Case("cross", q_len=100, kv_len=333, index_dtype=torch.int32),
    Case("one-block-kept", kept="one"),
    Case("all-kept", kept="all", block_size=(128, 64)),
    Case("only-the-last-block", kept="last", block_size=(128, 128)),
    Case("some-rows-empty", kept="none", batch=2),
    Case("kv-len-per-sample", batch=4, sample_lens=(140, 128, 1, 0), kept="all"),
    Case(
        "kv-len-inside-big-blocks",
        batch=2,
        sample_lens=(64, 290),
        kv_len=300,
        block_size=(128, 128),
        head_dim=128,
    ),
    Case("kv-len-shared-lists", batch=3, sample_lens=(130, 64, 65), shared=True),
    Case("shared-lists", batch=2, shared=True),
    Case("transposed", layout="transposed", batch=2),
    Case("sliced", layout="sliced", batch=2),
    Case("last-axis-strided", layout="last-axis"),
    Case("sharp-scale", scale=1.0, dtype=FP16),
]
TAIL_CASES = [
    Case("means-of-16", tail_tokens=16),
    Case("means-of-16-d128", tail_tokens=16, head_dim=128, kv_len=333),
    Case("means-of-16-fp32", tail_tokens=16, dtype=FP32, kv_len=300, block_size=(64, 128)),
    Case("means-of-16-d33-empty-rows", tail_tokens=16, head_dim=33, kept="none", batch=2),
    Case("means-of-16-kv-len", tail_tokens=16, batch=4, sample_lens=(140, 128, 1, 0)),
    Case("means-of-16-shorter-than-one", tail_tokens=16, q_len=5, kv_len=7, kept="none", batch=2),
    Case(
        "means-of-32-kv-len-shared",
        tail_tokens=32,
        batch=3,
        sample_lens=(290, 64, 65),
        kv_len=300,
        block_size=(128, 128),
        shared=True,
    ),
    Case("means-of-32-sliced", tail_tokens=32, layout="sliced", batch=2, dtype=FP16),
]


def draw(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Query, key, value in the case's layout, the kept blocks (bool), and `kv_len`."""
    generator = torch.Generator().manual_seed(1)

    def tensor(seqlen: int) -> Tensor:
        b, h, d = case.batch, case.heads, case.head_dim
        x = torch.randn(b, seqlen, h, d, generator=generator).to(device, case.dtype)
        if case.layout == "transposed":  # stored as (B, H, S, D)
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if case.layout == "sliced":  # one of three in a fused projection, from token 3 on
            fused = torch.full((b, seqlen + 3, 3, h, d), float("nan"), device=device).to(x)
            fused[:, 3:, 1] = x
            return fused[:, 3:, 1]
        if case.layout == "last-axis":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        return x

    query, key, value = tensor(case.q_len), tensor(case.kv_len), tensor(case.kv_len)
    block_q, block_kv = case.block_size
    leading = (1, 1) if case.shared else (case.batch, case.heads)
    shape = (*leading, -(-case.q_len // block_q), -(-case.kv_len // block_kv))
    chance = torch.rand(shape, generator=generator)
    if case.kept == "all":
        blocks = torch.ones(shape, dtype=torch.bool)
    elif case.kept == "one":
        blocks = chance == chance.amax(-1, keepdim=True)
    elif case.kept == "last":
        blocks = torch.arange(shape[-1]).expand(shape) == shape[-1] - 1
    else:
        blocks = (chance < 0.5) | (chance == chance.amax(-1, keepdim=True))
        if case.kept == "none":
            blocks[:, 0, 0] = blocks[0, -1] = False
    kv_len = None
    if case.sample_lens is not None:
        kv_len = torch.tensor(case.sample_lens, dtype=torch.int32, device=device)
    return query, key, value, blocks.to(device), kv_len


def to_lists(blocks: Tensor, index_dtype: torch.dtype = torch.int16) -> tuple[Tensor, Tensor]:
    """`kv_num_blocks (B, H, Nq)` and ascending `kv_indices (B, H, Nq, K)` of a bool block mask."""
    counts = blocks.sum(-1, dtype=torch.int32)
    order = torch.argsort((~blocks).to(torch.uint8), dim=-1, stable=True)
    return counts, order[..., : int(counts.max())].to(index_dtype)


def token_mask(case: Case, blocks: Tensor, kv_len: Tensor | None) -> Tensor:
    """The mask over tokens `(B, H, S, S_kv)` that the block lists and `kv_len` stand for."""
    block_q, block_kv = case.block_size
    mask = blocks.repeat_interleave(block_q, 2).repeat_interleave(block_kv, 3)
    mask = mask[:, :, : case.q_len, : case.kv_len]
    mask = mask.expand(case.batch, case.heads, -1, -1).clone()
    if kv_len is not None:
        for sample, length in enumerate(kv_len.tolist()):
            mask[sample, :, :, length:] = False
    return mask


def oracle(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Masked attention and LSE in float64, one head at a time."""
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    lse = torch.full(mask.shape[:3], float("-inf"), dtype=torch.float64, device=query.device)
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            scores = query[b, :, h].double() @ key[b, :, h].double().T * scale
            scores = scores.masked_fill(~mask[b, h], float("-inf"))
            lse[b, h] = scores.logsumexp(-1)
            weights = torch.nan_to_num((scores - lse[b, h][:, None]).exp(), nan=0.0)
            out[b, :, h] = weights @ value[b, :, h].double()
    return out, lse


def ulp(x: Tensor, dtype: torch.dtype) -> float:
    """The spacing of `dtype` at the largest magnitude in `x`."""
    largest = x.abs().max().clamp(min=torch.finfo(dtype).tiny)
    return torch.finfo(dtype).eps * 2.0 ** float(largest.log2().floor())


def max_error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference; equal infinities differ by nothing."""
    return torch.where(got.double() == want, 0.0, (got.double() - want).abs()).max().item()


def gluon_tile(case: Case) -> Tile | None:
    """The tile with which the Gluon kernel serves `case`, None where it does not."""
    if case.head_dim not in (64, 128) or case.dtype == FP32 or case.sample_lens is not None:
        return None
    rows, columns = case.block_size
    return None if min(rows, columns) < 64 else Tile(rows, columns, rows // 16, 2, gluon=True)


def gluon_fp8_tile(case: Case) -> Tile | None:
    """The same in FP8, whose programs have 64 rows."""
    tile = gluon_tile(case)
    return tile and Tile(64, tile.columns, 4, 2, gluon=True)


def check_attention(case: Case, device: str, tile: Tile | None = None) -> dict[str, float]:
    """Run the kernel on `case`; raise AssertionError unless it is within the rule.

    Output: error <= 2x that of torch's math attention in the same dtype + 2 ulp.
    LSE: error <= 2x that of logsumexp of the low-precision product + 1e-5.
    """
    query, key, value, blocks, kv_len = draw(case, device)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    mask = token_mask(case, blocks, kv_len)
    want, want_lse = oracle(query, key, value, mask, scale)

    q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    with sdpa_kernel(SDPBackend.MATH):
        math = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    math = math.nan_to_num(nan=0.0).transpose(1, 2)  # rows without a key
    product = (q @ k.transpose(2, 3)).float() * scale
    product_lse = product.masked_fill(~mask, float("-inf")).logsumexp(-1)

    if kv_len is not None:  # what lies behind a sample's end must not matter
        for sample, length in enumerate(kv_len.tolist()):
            key[sample, length:] = value[sample, length:] = float("nan")
    counts, indices = to_lists(blocks, case.index_dtype)
    out, lse = block_sparse_fwd(
        query,
        key,
        value,
        counts,
        indices,
        block_size=case.block_size,
        scale=case.scale,
        kv_len=kv_len,
        tile=tile,
    )
    assert out.shape == query.shape and out.dtype == query.dtype
    assert lse.shape == mask.shape[:3] and lse.dtype == torch.float32
    errors = {
        "out": max_error(out, want),
        "out_limit": 2 * max_error(math, want) + 2 * ulp(want, case.dtype),
        "lse": max_error(lse, want_lse),
        "lse_limit": 2 * max_error(product_lse, want_lse) + 1e-5,
    }
    # A NaN fails both comparisons.
    assert errors["out"] <= errors["out_limit"], f"{case.name}: output {errors}"
    assert errors["lse"] <= errors["lse_limit"], f"{case.name}: LSE {errors}"
    assert (out[~mask.any(-1).transpose(1, 2)] == 0).all(), f"{case.name}: empty rows are not 0"
    return errors


EIGHT_BIT_CASES = [
    case
    for case in CASES
    if case.dtype != FP32 and case.head_dim > 16 and case.name != "sharp-scale"
]


# Error against exact inputs, root mean square and of the LSE; and what the other oracle allows
# beyond rounding: elements that round the other way, and in FP8 rounded probabilities.
EIGHT_BITS = {"int8": (0.02, 0.05, 2e-3, 5e-3), "fp8": (0.07, 0.15, 0.06, 0.03)}


def check_8_bits(
    case: Case, device: str, precision: str, tile: Tile | None = None
) -> dict[str, float]:
    """Run the kernel in 8 bits on `case`, its keys far from 0, against two float64 oracles.

    Of the rounded inputs it must be what `check_attention` asks, but for elements that may round
    the other way and, in FP8, for what rounding the probabilities does; of the exact ones, within
    the limits of EIGHT_BITS.
    """
    query, key, value, blocks, kv_len = draw(case, device)
    key += torch.linspace(-4, 4, case.head_dim, device=device).to(case.dtype)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    mask = token_mask(case, blocks, kv_len)
    exact, exact_lse = oracle(query, key, value, mask, scale)
    inputs = query, key, value, case.block_size, kv_len, precision
    *rounded, shift = rounded_to_8_bits(*inputs)
    want, want_lse = oracle(*rounded, mask, scale)
    want_lse = want_lse + shift.double() * scale
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    with sdpa_kernel(SDPBackend.MATH):
        math = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    math = math.nan_to_num(nan=0.0).transpose(1, 2)
    if kv_len is not None:
        for sample, length in enumerate(kv_len.tolist()):
            key[sample, length:] = value[sample, length:] = float("nan")
    counts, indices = to_lists(blocks, case.index_dtype)
    options = {"block_size": case.block_size, "scale": case.scale, "kv_len": kv_len, "tile": tile}
    out, lse = block_sparse_fwd(query, key, value, counts, indices, precision=precision, **options)
    assert out.shape == query.shape and out.dtype == query.dtype
    rms_limit, lse_limit, room, lse_room = EIGHT_BITS[precision]
    errors = {
        "out": max_error(out, want),
        "out_limit": 2 * max_error(math, exact) + 2 * ulp(want, case.dtype) + room,
        "lse": max_error(lse, want_lse),
        "lse_limit": lse_room,
        "from_exact": ((out.double() - exact).square().mean() / exact.square().mean())
        .sqrt()
        .item(),
        "lse_from_exact": max_error(lse, exact_lse),
    }
    name = f"{case.name}, {precision}"
    assert errors["out"] <= errors["out_limit"], f"{name}: output {errors}"
    assert errors["lse"] <= errors["lse_limit"], f"{name}: LSE {errors}"
    assert errors["from_exact"] <= rms_limit, f"{name}: output {errors}"
    assert errors["lse_from_exact"] <= lse_limit, f"{name}: LSE {errors}"
    assert (out[~mask.any(-1).transpose(1, 2)] == 0).all(), f"{name}: empty rows are not 0"
    return errors


def gluon_mass_tiles(case: Case) -> list[Tile]:
    """The tiles with which Gluon serves exact mass of `case`, none where it does not."""
    if case.head_dim not in (64, 128) or case.dtype == FP32:
        return []
    return [Tile(128, 128, 8, 4, True), Tile(128, 64, 8, 4, True)]


def check_mass(case: Case, device: str, tile: Tile | None = None) -> dict[str, float]:
    """Run `block_mass` on `case` with the exact and with a stale LSE.

    The limit is that of the float64 mass from the low-precision product, twice, + 1e-5 of a block.
    """
    query, key, _, _, _ = draw(case, device)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    block_q, block_kv = case.block_size
    q, k = query.transpose(1, 2), key.transpose(1, 2)
    exact = q.double() @ k.double().transpose(2, 3) * scale
    product = (q @ k.transpose(2, 3)).double() * scale
    lse = exact.logsumexp(-1)

    def fold(scores: Tensor, lse: Tensor) -> Tensor:
        weights = (scores - lse[..., None]).exp()
        rows = [part.sum(2) for part in weights.split(block_q, 2)]
        return torch.stack(
            [torch.stack([part.sum(-1) for part in r.split(block_kv, -1)], -1) for r in rows], 2
        )

    errors = {}
    for name, given in (("exact", lse), ("stale", lse + torch.randn_like(lse))):
        given = given.float()
        given[:, 0, 0] = float("-inf") if name == "stale" else given[:, 0, 0]
        used = given.double().masked_fill(given == float("-inf"), float("inf"))
        want = fold(exact, used)
        mass = block_mass(
            query, key, given, block_size=case.block_size, scale=case.scale, tile=tile
        )
        assert mass.shape == want.shape and mass.dtype == torch.float32
        errors[name] = max_error(mass, want)
        limit = 2 * max_error(fold(product, used), want) + 1e-5 * block_q
        assert errors[name] <= limit, f"{case.name}: {name} mass {errors[name]} > {limit}"
        if name == "exact":
            valid = [min(block_q, case.q_len - start) for start in range(0, case.q_len, block_q)]
            rows = torch.tensor(valid, dtype=torch.float32, device=device).expand(mass.shape[:3])
            torch.testing.assert_close(mass.sum(-1), rows, rtol=1e-4, atol=1e-4)
    return errors


def check_sampled(case: Case, device: str) -> dict[str, float]:
    """Run `sampled_mass` on one row in four of `case`; the limit is that of `check_mass`."""
    query, key, _, blocks, kv_len = draw(case, device)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    block_q, block_kv = case.block_size
    query = query[:, ::4]
    q, k = query.transpose(1, 2), key.transpose(1, 2)
    exact = q.double() @ k.double().transpose(2, 3) * scale
    product = (q @ k.transpose(2, 3)).double() * scale
    valid = token_mask(case, torch.ones_like(blocks), kv_len)[:, :, :1]
    if kv_len is not None:  # what lies behind a sample's end must not matter
        for sample, length in enumerate(kv_len.tolist()):
            key[sample, length:] = float("nan")

    def fold(scores: Tensor) -> Tensor:
        weights = scores.masked_fill(~valid, float("-inf")).softmax(-1)
        rows = [part.sum(2) for part in weights.nan_to_num(0.0).split(block_q // 4, 2)]
        return torch.stack(
            [torch.stack([part.sum(-1) for part in r.split(block_kv, -1)], -1) for r in rows], 2
        )

    want = fold(exact)
    mass = sampled_mass(query, key, block_q // 4, block_kv, case.scale, kv_len)
    assert mass.shape == want.shape and mass.dtype == torch.float32
    error = max_error(mass, want)
    limit = 2 * max_error(fold(product), want) + 1e-5 * block_q
    assert error <= limit, f"{case.name}: sampled mass {error} > {limit}"
    return {"sampled": error}


def check_top_k(device: str, blocks: int = 77, rows: int = 19) -> dict[str, float]:
    """Run `top_k` on scores with ties, both zeros and infinities against a stable sort."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(2, 3, rows, blocks, generator=generator).to(device)
    scores[0] = scores[0].mul(2).round()
    scores[1, 0, :, ::3], scores[1, 0, :, 1::5] = float("-inf"), 0.0
    scores[1, 1] = scores[1, 1].abs() * 1e-30
    kept = torch.randint(1, blocks + 1, (2, 3), generator=generator).to(device)
    kept[0, 0], kept[0, 1] = 1, blocks
    forced = torch.rand(rows, blocks, generator=generator).to(device) < 0.1
    forced[0], forced[1] = True, False
    best = (scores + 0.0).masked_fill(forced, torch.inf)
    best = best.sort(dim=-1, descending=True, stable=True).indices
    within = torch.arange(blocks, device=device) < kept[..., None, None]
    want = torch.zeros(scores.shape, dtype=torch.bool, device=device)
    want = want.scatter_(-1, best, within.expand_as(best)) | forced
    got = top_k(scores, kept, forced)
    wrong = int((got != want).sum())
    assert wrong == 0, f"top_k: {wrong} blocks are wrong"
    return {"wrong": wrong}


def check_selection(device: str, tokens: int = 200, heads: int = 3, **options) -> dict[str, float]:
    """AdaSpa's rule by `select_rows` against its plain torch, and the work order of its mask."""
    generator = torch.Generator().manual_seed(3)
    config = AdaSpa(block_size=32, **{"density": 0.5, **options})
    grid = VideoGrid(1, 1, tokens - 20, text_tokens=20)
    blocks = grid.num_blocks(32)
    sharpness = torch.linspace(0.3, 4, heads)[:, None, None]  # heads of unlike recall
    scores = torch.randn(2, heads, blocks, blocks, generator=generator) * sharpness
    mass = (scores.softmax(-1) * 32).to(device)
    forced = forced_blocks(grid, 32, mass.device)
    want = config.find_in_torch(mass, forced, 0.5)
    got = config.find_packed(mass, forced, tokens, 0.5)
    packed = BlockMask.from_dense(want.mask, tokens, tokens, (32, 32))
    wrong = int((got.mask.to_dense() != want.mask).sum())
    assert wrong == 0 and got.mask.bits.equal(packed.bits), f"{wrong} blocks are wrong"
    torch.testing.assert_close(got.mask.density, packed.density)
    torch.testing.assert_close(got.kept_mass, want.kept_mass)
    counts = want.mask.sum(-1, dtype=torch.int32)
    alike = (counts[:, :, 0] == counts[:, :1, 0]).all()
    assert not (alike and config.head_adaptive and config.density < 2 / 3), "nothing was adapted"
    got_order = work_order(counts).cpu()
    on_cpu = BlockMask.from_dense(want.mask.cpu(), tokens, tokens, (32, 32))
    assert got_order.equal(on_cpu.work_order), "the work order is wrong"
    return {"wrong": wrong}


def check_pool(case: Case, device: str) -> dict[str, float]:
    """Run `block_pool` on the query of `case` against float64 means; keys and values likewise.

    In its blocks, and in blocks of 16 tokens, of which a program pools several.
    """
    query, key, value = draw(case, device)[:3]
    last_place = torch.finfo(query.dtype).eps  # the interpreter cuts bf16 off
    errors = {}
    for size in (case.block_size[0], 16):
        want = torch.stack([part.double().mean(1) for part in query.split(size, 1)], 2)
        pooled = block_pool(query, size)
        assert pooled.shape == want.shape and pooled.dtype == torch.float32
        errors[f"pool {size}"] = error = max_error(pooled, want)
        assert error <= 1e-6, f"{case.name}: pooled by {size} {error}"
        for x, means in zip((key, value), pool_keys_values(key, value, size)):
            assert means.dtype == x.dtype
            want = block_pool(x, size)
            torch.testing.assert_close(means.float(), want, rtol=last_place, atol=1e-6)
    return errors


def pooled(x: Tensor, block_size: int, kv_len: Tensor | None) -> Tensor:
    """Means of each block's valid tokens, `(B, N, H, D)` in the dtype of `x`, block by block."""
    means = torch.zeros(x.shape[0], -(-x.shape[1] // block_size), *x.shape[2:], device=x.device)
    for sample in range(x.shape[0]):
        length = x.shape[1] if kv_len is None else int(kv_len[sample])
        for start in range(0, length, block_size):
            block = x[sample, start : min(start + block_size, length)]
            means[sample, start // block_size] = block.double().mean(0)
    return means.to(x.dtype)


def tail_bias(case: Case, blocks: Tensor, kv_len: Tensor | None, size: int) -> Tensor:
    """Log of the valid tokens of each mean of `size` whose block is left out, else -inf.

    `(B, H, S, means)`; which tokens are left out is counted one by one.
    """
    valid = token_mask(case, torch.ones_like(blocks), kv_len)
    left_out = (valid & ~token_mask(case, blocks, None)).double()
    return torch.stack([part.sum(-1) for part in left_out.split(size, -1)], -1).log()


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention `(B, H, S, D)` with a bias on its logits, and the LSE; products in q's dtype."""
    scores = (q @ k.transpose(2, 3)).to(bias.dtype) * scale + bias
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)  # rows without a key
    return (weights.to(v.dtype) @ v).transpose(1, 2), lse


def check_tail(case: Case, device: str) -> dict[str, float]:
    """Run `tail_fwd` on `case`, alone and after a sparse part; the limits of `check_attention`.

    Both see the same means, rounded to the dtype: how well means speak for keys is not tested here.
    """
    query, key, value, blocks, kv_len = draw(case, device)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    size = case.tail_tokens or case.block_size[1]
    keys, values = (pooled(x, size, kv_len) for x in (key, value))
    bias = tail_bias(case, blocks, kv_len, size)
    mask = token_mask(case, blocks, kv_len)
    sparse, sparse_lse = oracle(query, key, value, mask, scale)
    sparse = sparse.to(case.dtype), sparse_lse.float()
    none = torch.zeros_like(mask, dtype=bias.dtype).masked_fill(~mask, float("-inf"))
    problems = {
        "tail": (None, keys, values, bias),
        "both": (
            sparse,
            torch.cat([key, keys], 1),
            torch.cat([value, values], 1),
            torch.cat([none, bias], -1),
        ),
    }
    bits = BlockMask.from_dense(blocks, case.q_len, case.kv_len, case.block_size).bits
    errors = {}
    for name, (start, k, v, added) in problems.items():
        q, k, v = (x.transpose(1, 2).contiguous() for x in (query, k, v))
        want, want_lse = biased(*(x.double() for x in (q, k, v)), added, scale)
        math, math_lse = biased(q, k, v, added.float(), scale)
        out, lse = tail_fwd(
            query,
            keys,
            values,
            bits,
            block_size=case.block_size,
            max_kv_len=case.kv_len,
            tail_tokens=case.tail_tokens,
            kv_len=kv_len,
            scale=case.scale,
            sparse=start,
        )
        assert out.shape == query.shape and out.dtype == query.dtype
        assert lse.shape == mask.shape[:3] and lse.dtype == torch.float32
        errors[name] = max_error(out, want)
        errors[f"{name}_lse"] = max_error(lse, want_lse)
        limit = 2 * max_error(math, want) + 2 * ulp(want, case.dtype)
        assert errors[name] <= limit, f"{case.name}: {name} {errors[name]} > {limit}"
        limit = 2 * max_error(math_lse, want_lse) + 1e-5
        assert errors[f"{name}_lse"] <= limit, f"{case.name}: {name} LSE > {limit} {errors}"
        empty = want_lse.isneginf().transpose(1, 2)
        assert (out[empty] == 0).all(), f"{case.name}: {name} of empty rows is not 0"
    return errors

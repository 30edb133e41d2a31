"""The tail, its kernel, and the method that uses it, against slow loops and exact oracles."""

import math
from dataclasses import replace

import pytest
import torch
from test_wan import generate
from tiny import tiny_wan
from tiny_joint import PIPELINES

from dit_sparse import (
    AdaSpa,
    Auto,
    BlockMask,
    SolAttn,
    VideoGrid,
    enable_sparse_attention,
    sparse_attention,
    step,
)
from dit_sparse import tail as tail_module
from dit_sparse.api import make_config
from dit_sparse.dense import dense_attention_with_lse
from dit_sparse.patterns import correct
from dit_sparse.patterns.correct import add_residual, measure_residual
from dit_sparse.patterns.search import Search
from dit_sparse.reference import block_pool
from dit_sparse.tail import add_tail, merge, tail_attention, tail_cost

MEANS = [((64, 64), None), ((64, 64), 16), ((32, 128), None), ((32, 128), 32)]


def inputs(q_len=150, kv_len=150, heads=2, dim=16, batch=2):
    query = torch.randn(batch, q_len, heads, dim)
    key, value = torch.randn(2, batch, kv_len, heads, dim)
    return query, key, value


def some_blocks(query, key, block_size, batch=2):
    """A mask with a row that keeps one block, one that keeps none and one that keeps all."""
    blocks = -(-query.shape[1] // block_size[0]), -(-key.shape[1] // block_size[1])
    mask = torch.rand(batch, query.shape[2], *blocks) < 0.5
    mask[:, 0, 0], mask[:, 1, 0], mask[:, 1, -1] = False, False, True
    mask[:, 0, 0, 0] = True
    return mask, BlockMask.from_dense(mask, query.shape[1], key.shape[1], block_size)


def by_loops(query, key, value, mask, block_size, kv_len=None, kept=True, tail_tokens=None):
    """One query and one block at a time, float64: kept tokens, and means of dropped blocks."""
    tail_tokens = tail_tokens or block_size[1]
    output = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.full((query.shape[0], query.shape[2], query.shape[1]), -torch.inf).double()
    for b in range(query.shape[0]):
        valid = key.shape[1] if kv_len is None else int(kv_len[b])
        for h in range(query.shape[2]):
            for i in range(query.shape[1]):
                logits, values = [], []
                for j in range(mask.shape[3]):
                    span = slice(j * block_size[1], min((j + 1) * block_size[1], valid))
                    keys, vals = key[b, span, h].double(), value[b, span, h].double()
                    if len(keys) == 0:
                        continue
                    if not mask[b, h, i // block_size[0], j]:
                        for k, v in zip(keys.split(tail_tokens), vals.split(tail_tokens)):
                            logit = k.mean(0) @ query[b, i, h].double() * 16**-0.5
                            logits.append((logit + math.log(len(k))).reshape(1))
                            values.append(v.mean(0, keepdim=True))
                    elif kept:
                        logits.append(keys @ query[b, i, h].double() * 16**-0.5)
                        values.append(vals)
                if logits:
                    logits = torch.cat(logits)
                    output[b, i, h] = logits.softmax(0) @ torch.cat(values)
                    lse[b, h, i] = logits.logsumexp(0)
    return output, lse


def close(found, expected):
    torch.testing.assert_close(found.double(), expected.double(), atol=5e-6, rtol=1e-5)


# --------------------------------------------------------------------------------------- the tail


@pytest.mark.parametrize("kv_len", [None, (150, 65)])
@pytest.mark.parametrize(("block_size", "tail_tokens"), MEANS)
def test_tail_equals_loops_over_dropped_blocks(block_size, tail_tokens, kv_len, monkeypatch):
    query, key, value = inputs()
    mask, packed = some_blocks(query, key, block_size)
    kv_len = None if kv_len is None else torch.tensor(kv_len)
    options = {"kv_len": kv_len, "tail_tokens": tail_tokens}
    whole = tail_attention(query, key, value, packed, **options)
    for found, expected in zip(
        whole, by_loops(query, key, value, mask, block_size, kept=False, **options)
    ):
        close(found, expected)
    monkeypatch.setattr(tail_module, "CHUNK_ELEMENTS", 1)  # one block of rows at a time
    for part, found in zip(tail_attention(query, key, value, packed, **options), whole):
        close(part, found)


@pytest.mark.parametrize("kv_len", [None, (150, 65)])
@pytest.mark.parametrize(("block_size", "tail_tokens"), MEANS)
def test_sparse_part_and_tail_share_one_softmax(block_size, tail_tokens, kv_len):
    query, key, value = inputs()
    mask, packed = some_blocks(query, key, block_size)
    kv_len = None if kv_len is None else torch.tensor(kv_len)
    part = sparse_attention(query, key, value, packed, kv_len=kv_len, return_lse=True)
    options = {"kv_len": kv_len, "tail_tokens": tail_tokens}
    both = add_tail(*part, query, key, value, packed, **options)
    for found, expected in zip(both, by_loops(query, key, value, mask, block_size, **options)):
        close(found, expected)


def test_means_of_whole_blocks_are_the_default_and_of_one_token_are_dense():
    query, key, value = inputs()
    _, packed = some_blocks(query, key, (64, 64))
    for found, expected in zip(
        tail_attention(query, key, value, packed, tail_tokens=64),
        tail_attention(query, key, value, packed),
    ):
        assert found.equal(expected)
    part = sparse_attention(query, key, value, packed, return_lse=True)
    every = add_tail(*part, query, key, value, packed, tail_tokens=1, engine="torch")
    for found, expected in zip(every, dense_attention_with_lse(query, key, value)):
        close(found, expected)


def test_shorter_means_hold_more_of_the_mass_and_never_too_much():
    query, key, value = inputs(kv_len=256)
    mask, packed = some_blocks(query, key, (64, 128))
    of_size = [
        tail_attention(query, key, value, packed, tail_tokens=size)[1] for size in (128, 64, 32, 16)
    ]
    rest = BlockMask.from_dense(~mask, 150, 256, (64, 128))
    of_size.append(sparse_attention(query, key, value, rest, return_lse=True)[1])
    dropping = of_size[-1].isfinite()
    for fewer, more in zip(of_size, of_size[1:]):
        gained = (more - fewer)[dropping]
        assert (gained > -1e-6).all() and gained.mean() > 1e-3


@pytest.mark.parametrize("tail_tokens", [0, 48, 128])
def test_a_mean_lies_within_one_block(tail_tokens):
    query, key, value = inputs()
    packed = BlockMask.full(150, 150)
    with pytest.raises(ValueError, match=f"must divide the 64 .*, got {tail_tokens}"):
        tail_attention(query, key, value, packed, tail_tokens=tail_tokens)


def test_tail_of_a_mask_that_keeps_everything_is_empty():
    query, key, value = inputs()
    packed = BlockMask.full(150, 150)
    output, lse = tail_attention(query, key, value, packed)
    assert (output == 0).all() and lse.isneginf().all()
    dense = dense_attention_with_lse(query, key, value)
    completed = add_tail(*dense, query, key, value, packed)
    assert completed[0].equal(dense[0]) and completed[1].equal(dense[1])


def test_blocks_of_equal_tokens_lose_nothing():
    query, key, value = inputs()
    key, value = (x[:, ::50].repeat_interleave(64, 1)[:, :150] for x in (key, value))
    _, packed = some_blocks(query, key, (64, 64))
    part = sparse_attention(query, key, value, packed, return_lse=True)
    for found, expected in zip(
        add_tail(*part, query, key, value, packed), dense_attention_with_lse(query, key, value)
    ):
        close(found, expected)


def test_order_of_tokens_inside_a_block_and_of_whole_blocks_does_not_matter():
    query, key, value = inputs(kv_len=192)
    mask, packed = some_blocks(query, key, (64, 64))
    inside = torch.cat([torch.randperm(64) + 64 * i for i in range(3)])
    expected = tail_attention(query, key, value, packed)
    for found in tail_attention(query, key[:, inside], value[:, inside], packed)[:1]:
        close(found, expected[0])
    blocks = torch.tensor([2, 0, 1])
    tokens = (blocks[:, None] * 64 + torch.arange(64)).flatten()
    moved = BlockMask.from_dense(mask[..., blocks], 150, 192)
    for found, want in zip(
        tail_attention(query, key[:, tokens], value[:, tokens], moved), expected
    ):
        close(found, want)


def test_padding_never_counts_even_if_it_is_nan():
    query, key, value = inputs()
    _, packed = some_blocks(query, key, (64, 64))
    kv_len = torch.tensor([100, 0])
    clean = tail_attention(query, key, value, packed, kv_len=kv_len)
    for b, length in enumerate(kv_len.tolist()):
        key[b, length:] = value[b, length:] = float("nan")
    for found, expected in zip(tail_attention(query, key, value, packed, kv_len=kv_len), clean):
        assert found.equal(expected)
    assert (clean[0][1] == 0).all() and clean[1][1].isneginf().all()


def test_merging_disjoint_masks_is_dense_in_either_order():
    query, key, value = inputs()
    mask, packed = some_blocks(query, key, (64, 64))
    rest = BlockMask.from_dense(~mask, 150, 150)
    parts = [sparse_attention(query, key, value, m, return_lse=True) for m in (packed, rest)]
    dense = dense_attention_with_lse(query, key, value)
    for first, second in (parts, parts[::-1]):
        for found, expected in zip(merge(first, second), dense):
            close(found, expected)
    nothing = torch.zeros_like(query), torch.full((2, 2, 150), -torch.inf)
    assert merge(nothing, nothing)[0].equal(nothing[0])
    assert merge(nothing, nothing)[1].equal(nothing[1])


def test_tail_brings_the_output_nearer_to_dense_where_blocks_are_compact():
    query, key, value = inputs(320, 320)
    key, value = (x[:, :5].repeat_interleave(64, 1) + 0.3 * x for x in (key, value))
    mask = torch.eye(5, dtype=torch.bool).expand(2, 2, 5, 5)
    packed = BlockMask.from_dense(mask, 320, 320)
    part = sparse_attention(query, key, value, packed, return_lse=True)
    completed = add_tail(*part, query, key, value, packed)
    dense = dense_attention_with_lse(query, key, value)
    for ours, without, want in zip(completed, part, dense):
        assert (ours - want).norm() < 0.2 * (without - want).norm()


def test_cost_is_that_of_all_means():
    _, packed = some_blocks(*inputs()[:2], (64, 64))
    assert tail_cost(packed, 64) == 3 / 150 and tail_cost(packed, 16) == 10 / 150


# ------------------------------------------------------------------------------------- the kernel


@pytest.mark.parametrize("tail_tokens", [None, 16])
@pytest.mark.parametrize("residual", [None, "model", "fp8", "fp8 and rho"])
def test_kernel_path_equals_torch_with_padding_of_nan(monkeypatch, residual, tail_tokens):
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        pytest.importorskip("dit_sparse.kernels.dot")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query, key, value = (x.to(device) for x in inputs())
    packed = some_blocks(query.cpu(), key.cpu(), (64, 32))[1]
    packed = BlockMask.from_dense(packed.to_dense().to(device), 150, 150, (64, 32))
    kv_len = torch.tensor([150, 70], device=device)
    part = sparse_attention(query, key, value, packed, kv_len=kv_len, return_lse=True)
    if residual is not None:
        rho = torch.rand_like(part[1]) if residual == "fp8 and rho" else None
        fp8 = residual.startswith("fp8")
        residual = measure_residual(torch.randn_like(query), query * 0, fp8, rho)
    options = {"kv_len": kv_len, "tail_tokens": tail_tokens}
    more = options | {"residual": residual}
    expected = add_tail(*part, query, key, value, packed, engine="torch", **more)
    alone = tail_attention(query, key, value, packed, engine="torch", **options)
    key[1, 70:] = value[1, 70:] = float("nan")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(tail_module, "own_engine", lambda *a: "triton")
    for found, want in zip(add_tail(*part, query, key, value, packed, **more), expected):
        close(found, want)
    for found, want in zip(tail_attention(query, key, value, packed, **options), alone):
        close(found, want)


# ------------------------------------------------------------------------------------ corrections


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fp8", [False, True])
def test_a_scaled_output_and_its_residual_give_dense_back(fp8, dtype):
    dense, sparse = torch.randn(2, 2, 50, 3, 64, dtype=dtype)
    rho = torch.rand(2, 3, 50)
    kept = measure_residual(dense, sparse, fp8, rho)
    error = (add_residual(sparse, kept) - dense).norm() / dense.norm()
    assert error < (0.03 if fp8 else 1e-6)
    change = add_residual(sparse + 1, kept) - add_residual(sparse, kept)
    close(change.float(), rho.transpose(1, 2)[..., None].expand_as(change))


def test_damping_scales_by_a_power_of_the_mass_that_sparse_stands_for():
    dense, sparse = torch.randn(2, 1, 50, 3, 64)
    share = torch.rand(1, 3, 50)
    for damping in (0.5, 1):
        found = Auto(damping=damping).correction(dense, share * 0, sparse, share.log())
        close(found.rho, share**damping)
    assert Auto(damping=0).correction(dense, share * 0, sparse, share.log()).rho is None
    with pytest.raises(ValueError, match="damping is an exponent"):
        Auto(damping=2)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_residual_gives_dense_back_at_its_own_step(fp8):
    dense, sparse = torch.randn(2, 2, 50, 3, 64)
    sparse[0, 0, 0] = dense[0, 0, 0]  # a row that lacks nothing
    kept = measure_residual(dense, sparse, fp8)
    found = add_residual(sparse, kept)
    error = (found - dense).norm() / (dense - sparse).norm()
    assert error < (0.03 if fp8 else 1e-6) and found[0, 0, 0].equal(dense[0, 0, 0])
    assert kept.nbytes() == 2 * 50 * 3 * ((64 + 4) if fp8 else 64 * 4) and kept.batch == 2


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_residual_is_measured_in_pieces_that_change_no_bit(fp8, dtype, monkeypatch):
    dense, sparse = torch.randn(2, 2, 50, 3, 64).to(dtype)
    rho = torch.rand(2, 3, 50)
    given = [(dense, sparse, fp8, rho), (dense, sparse, fp8)]
    whole = [measure_residual(*of) for of in given]
    monkeypatch.setattr(correct, "CHUNK_ELEMENTS", 2 * 7 * 3 * 64)
    for before, of in zip(whole, given):
        assert all(a.equal(b) for a, b in zip(before.tensors(), measure_residual(*of).tensors()))


def test_fp8_keeps_rows_of_very_different_size():
    dense = torch.randn(1, 4, 1, 32) * torch.tensor([1e-6, 1.0, 1e4, 0.0])[:, None, None]
    found = add_residual(torch.zeros_like(dense), measure_residual(dense, dense * 0, fp8=True))
    row = lambda x: x.norm(dim=-1).flatten()  # noqa: E731
    assert (row(found - dense) <= 0.04 * row(dense)).all()


# ------------------------------------------------------------------------------------- the method


def make_search(grid, batch=2, lengths=None):
    query, key = torch.randn(2, batch, grid.tokens, 2, 16) * 2
    _, lse = dense_attention_with_lse(query, key, key)
    return Search(query, key, lse, grid, layer=0, lengths=lengths)


def test_auto_keeps_the_heaviest_blocks_of_every_row():
    grid = VideoGrid(5, 8, 16)
    search = make_search(grid)
    found = Auto(density=0.2, block_size=32, own_block=False).find(search)
    shares = torch.einsum("bihd,bjhd->bhij", search.query, search.key).mul(16**-0.5).softmax(-1)
    sampled = shares.unflatten(2, (-1, 8))[:, :, :, 4]  # one query of each 8
    for b in range(2):
        for h in range(2):
            mass = sampled[b, h].unflatten(0, (-1, 4)).sum(1).unflatten(1, (-1, 32)).sum(-1)
            for row, kept in zip(mass, found.mask[b, h]):
                assert set(row.topk(4).indices.tolist()) == set(kept.nonzero().flatten().tolist())
    assert found.cost == 0.125 and found.kept_mass.shape == (2,)


def test_auto_keeps_as_many_blocks_as_hold_the_mass_that_is_asked_for():
    grid = VideoGrid(5, 8, 16)
    search = make_search(grid)
    rest = {"block_size": 32, "own_block": False}
    few, more = (Auto(density=0.1, min_kept_mass=p, **rest).find(search) for p in (None, 0.7))
    assert (few.mask.sum(-1) == 2).all()
    assert (more.mask | few.mask).equal(more.mask) and (more.kept_mass >= 0.7).all()
    least = Auto(density=0.1, min_kept_mass=0.01, **rest).find(search)
    assert least.mask.equal(few.mask)
    with pytest.raises(ValueError, match="min_kept_mass is a share"):
        Auto(min_kept_mass=95)


def test_targets_stand_for_options_which_others_replace():
    config, name = make_config("auto", {"target": "speed"})
    assert name == "auto" and config.search_at == (0.0, 0.12, 0.35, 0.65)
    assert config.share_guidance == "all"
    assert make_config("auto", {"target": "balanced"})[0] == Auto() == make_config(Auto(), {})[0]
    config, _ = make_config(Auto(residual=None), {"target": "fidelity", "density": 0.5})
    assert config == Auto(residual=None, density=0.5, search_at=(0.24, 0.31, 0.43, 0.59, 0.78))
    with pytest.raises(ValueError, match="target must be one of fidelity, balanced, speed"):
        make_config("auto", {"target": "quality"})
    with pytest.raises(TypeError, match="adaspa has no option 'target'"):
        make_config("adaspa", {"target": "speed"})


@pytest.mark.parametrize("density", [0.2, 0.9])
def test_sol_attn_keeps_what_is_near_the_best_mean(density):
    grid = VideoGrid(5, 8, 16)
    search = make_search(grid)
    config = SolAttn(density=density, threshold=0.5, block_size=32, own_block=False)
    found = config.find(search)
    query, key = (x.unflatten(1, (20, 32)).mean(2) for x in (search.query, search.key))
    for b in range(2):
        for h in range(2):
            for i in range(20):
                logits = key[b, :, h] @ query[b, i, h] / 4
                ranked = logits.argsort(descending=True)[: round(density * 20)].tolist()
                near = {j for j in ranked if logits[j] >= logits.max() - 0.5}
                assert set(found.mask[b, h, i].nonzero().flatten().tolist()) == near
    assert found.cost == 20**2 / (2 * 640**2)


def test_the_density_of_sol_attn_bounds_rows_whose_best_means_are_four_nats_apart():
    search = make_search(VideoGrid(5, 8, 16))
    steps = torch.linspace(0, 12.5, 20).repeat_interleave(32)  # of the logits of blocks
    search.query.zero_()[..., 0] = 4.0
    search.key.zero_()[..., 0] = steps[:, None]
    config = SolAttn(density=0.35, block_size=32, own_block=False)
    assert config.find(search).mask.sum(-1).eq(7).all()


def test_means_are_of_whole_blocks_or_of_64_tokens():
    assert SolAttn(block_size=32).tail_tokens == 32 and SolAttn().tail_share == 1 / 64
    assert Auto().tail_tokens == Auto(block_size=128).tail_tokens == 64
    assert Auto(block_size=32).tail_tokens == Auto(block_size=32, tail_tokens=64).tail_tokens == 32
    assert Auto(tail_tokens=16).tail_share == 1 / 16 and AdaSpa().tail_share == 0
    with pytest.raises(ValueError, match="tail_tokens must be one of 16, 32, 64, 128, got 48"):
        Auto(tail_tokens=48)


def test_auto_hands_its_means_to_the_tail(monkeypatch):
    asked, pipe = set(), tiny_wan()

    def recorded(*arguments, tail_tokens, **options):
        asked.add(tail_tokens)
        return add_tail(*arguments, tail_tokens=tail_tokens, **options)

    monkeypatch.setattr(step, "add_tail", recorded)
    for method in (Auto(block_size=32, tail_tokens=16), SolAttn(block_size=32)):
        with enable_sparse_attention(pipe, method):
            generate(pipe)
    assert asked == {16, 32}


def test_the_mass_that_a_tail_stands_for_is_not_told_as_the_mask_s():
    class Unmeasured(Auto):
        def find(self, search):
            return replace(super().find(search), kept_mass=None)

    options = {"density": 0.4, "block_size": 32}
    for measure in (False, True):
        with enable_sparse_attention(
            pipe := tiny_wan(), Unmeasured(**options), measure=measure
        ) as on:
            generate(pipe)
        assert (on.report().kept_mass is None) != measure


def test_both_keep_text_keys_and_own_blocks():
    grid = VideoGrid(5, 8, 16, text_tokens=30, text_first=True)
    for method in (Auto, SolAttn):
        mask = method(density=0.1, block_size=32).find(make_search(grid)).mask
        assert mask[..., 0].all() and mask[..., 0, :].all() == method.text_queries
        assert mask.diagonal(dim1=-2, dim2=-1).all()


def test_residuals_fill_the_memory_that_is_allowed():
    shape, layers, branches = (1, 640, 4, 64), 6, 2
    plain = Auto().cache_bytes(shape, 2)
    more = 640 * 4 * (64 + 8)  # fp8: D bytes, a scale and the damping for each row
    for allowed in (None, 10**9, branches * layers * (plain + more)):
        assert Auto(max_cache_bytes=allowed).corrected_layers(shape, 2, layers, branches) == 6
    least = branches * layers * plain
    rooms = (0, 0), (branches * more - 1, 0), (branches * more, 1), (7 * more, 3), (-1, 0)
    for room, expected in rooms:
        config = Auto(max_cache_bytes=least + room)
        assert config.corrected_layers(shape, 2, layers, branches) == expected
    assert Auto(residual=None).corrected_layers(shape, 2, layers, branches) == 0
    assert Auto(residual="model").correction_bytes(shape, 2) == 640 * 4 * (128 + 4)
    assert Auto(residual="model", damping=0).correction_bytes(shape, 2) == 640 * 4 * 128
    with pytest.raises(ValueError, match='"fp8", "model" or None'):
        Auto(residual="int8")


@pytest.mark.parametrize("method", [Auto(), Auto(residual=None), SolAttn()])
@pytest.mark.parametrize("name", ["HunyuanVideo", "CogVideoX", "Mochi"])
@torch.no_grad()
def test_methods_with_a_tail_run_on_joint_families(name, method):
    make, call = PIPELINES[name]
    pipe, arguments = make(), call(1, False)
    handle = enable_sparse_attention(pipe, method, density=0.4, block_size=32)
    fixed = {"num_inference_steps": 5, "output_type": "latent"}
    first, second = (
        pipe(**arguments, **fixed, generator=torch.Generator().manual_seed(0)).frames
        for _ in range(2)
    )
    assert first.equal(second) and first.isfinite().all()
    report = handle.report()
    assert report.reuse_calls + report.search_calls > 0
    assert 0 < report.peak_cache_bytes <= report.planned_cache_bytes
    assert not handle._installed[0].state.kept


@pytest.mark.parametrize(
    "method", [Auto(), Auto(residual="model"), Auto(residual=None), SolAttn(threshold=100)]
)
def test_all_kept_is_dense_on_wan(method):
    pipe = tiny_wan()
    stock = generate(pipe)
    enable_sparse_attention(pipe, method, density=0.99, block_size=32)
    assert (generate(pipe) - stock).abs().max() < 1e-5


def test_a_residual_brings_the_video_nearer_to_dense():
    pipe = tiny_wan()
    stock = generate(pipe)
    options = {"density": 0.3, "block_size": 32, "search_at": (0.2, 0.6)}
    apart = []
    for residual in (None, "fp8"):
        with enable_sparse_attention(pipe, "auto", residual=residual, **options):
            apart.append((generate(pipe) - stock).square().mean())
    assert apart[0] > 2 * apart[1]


def test_cost_and_bytes_with_and_without_a_residual():
    options = {"density": 0.5, "block_size": 32, "search_at": (0.3, 0.8)}  # of 6 steps: 2, 5
    tail, blocks, tokens, heads = 4 / 108, 4, 108, 2  # means of 32 tokens
    bits = heads * blocks
    expected = {  # bytes of a layer and branch
        "fp8": bits + tokens * heads * (16 + 8),
        "model": bits + tokens * heads * (16 * 4 + 4),
        None: bits,
    }
    for residual, kept in expected.items():
        pipe = tiny_wan()
        handle = enable_sparse_attention(pipe, "auto", residual=residual, **options)
        generate(pipe)
        report, state = handle.report(), handle._installed[0].state
        density = float(torch.stack([r.density for r in state.trace if r.kind == "reuse"]).mean())
        reuse = density + tail
        refresh = 2 * ((1 if residual else 0) + 0.125 / 2 + reuse)  # one branch looks for both
        assert report.effective_cost == pytest.approx((2 + refresh + 2 * reuse) / 6, abs=0.01)
        assert report.peak_cache_bytes == report.planned_cache_bytes == 2 * 2 * kept


def test_only_leading_layers_keep_a_residual_where_memory_is_short():
    pipe = tiny_wan()
    plain = 8
    allowed = 2 * 2 * plain + 2 * 108 * 2 * 24  # two layers, two branches: one layer's residuals
    options = {"density": 0.5, "block_size": 32, "search_at": (0.2, 0.6)}
    options |= {"max_cache_bytes": allowed}
    handle = enable_sparse_attention(pipe, "auto", **options)
    generate(pipe)
    report = handle.report()
    assert report.peak_cache_bytes == report.planned_cache_bytes == allowed
    searched = [e for e in report.trace if e["kind"] == "search" and e["step"] > 2]
    assert [e["layer"] for e in searched if e["density"] is None] == [0, 0]  # dense output
    assert [e["layer"] for e in searched if e["density"]] == [1, 1]
    with pytest.raises(MemoryError, match="max_cache_bytes"):
        enable_sparse_attention(pipe, "auto", max_cache_bytes=10)
        generate(pipe)


def test_auto_gives_a_batch_of_another_size_residuals_of_its_own():
    pipe = tiny_wan()
    enable_sparse_attention(pipe, "auto", density=0.4, block_size=32)
    alone = generate(pipe)
    generate(pipe, prompt=["a", "b"])
    assert generate(pipe).equal(alone)


def test_pool_counts_valid_tokens_alone():
    x = torch.randn(2, 100, 3, 8)
    found = block_pool(x, 64, torch.tensor([70, 64]))
    close(found[0, :, 1], x[0, 64:70].mean(0))
    assert (found[1, :, 1] == 0).all()

"""Scorers, selectors, corrections and the seed methods against slow loops and exact oracles."""

from dataclasses import replace

import pytest
import torch
from test_wan import generate
from tiny import tiny_wan
from tiny_joint import PIPELINES

from dit_sparse import (
    AdaSpa,
    AdaSpaSampled,
    BlockMask,
    DFSAttn,
    DraftAttention,
    Rettention,
    VideoGrid,
    enable_sparse_attention,
    sparse_attention,
)
from dit_sparse.dense import dense_attention_with_lse
from dit_sparse.grid import token_order
from dit_sparse.patterns import rettention, score, select
from dit_sparse.patterns.correct import apply_correction, measure_correction
from dit_sparse.patterns.search import Search

GRID = VideoGrid(3, 7, 9, text_tokens=11)  # 189 + 11 tokens: blocks of 32 are ragged
BLOCK = 32
CPU = torch.device("cpu")
ADASPA_GRIDS = [
    VideoGrid(5, 8, 8),
    VideoGrid(3, 7, 13, text_tokens=40),
    VideoGrid(3, 7, 13, text_tokens=40, text_first=True),
    VideoGrid(6, 7, 9, text_tokens=5, conditioning_frames=1),
]


def make_search(grid=GRID, batch=2, heads=2, dim=16, lengths=None, **more):
    query, key = torch.randn(2, batch, grid.tokens, heads, dim) * 2
    _, lse = dense_attention_with_lse(query, key, key)
    return Search(query, key, lse, grid, layer=0, lengths=lengths, **more)


def softmax_rows(query, key, scale, valid=None):
    """(Sq, D), (Sk, D) in float64, row by row."""
    rows = []
    for q in query.double():
        logits = torch.stack([q @ k for k in key.double()]) * scale
        if valid is not None:
            logits[valid:] = -torch.inf
        rows.append(logits.exp() / logits.exp().sum())
    return torch.stack(rows)


def block_sums(mass, rows_per_block, block):
    """Sums of rectangles by a double loop."""
    tall, wide = (-(-n // size) for n, size in zip(mass.shape, (rows_per_block, block)))
    out = torch.zeros(tall, wide, dtype=mass.dtype)
    for i in range(mass.shape[0]):
        for j in range(mass.shape[1]):
            out[i // rows_per_block, j // block] += mass[i, j]
    return out


def close(found, expected):
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------- scorers


def test_exact_mass_sums_to_the_rows_of_a_block_and_costs_one_pass():
    mass, cost = score.exact_mass(make_search(), BLOCK)
    close(mass.sum(-1)[0, 0], GRID.block_lengths(BLOCK))
    assert cost == 0.5


def test_pooled_map_equals_a_loop_over_block_means():
    search = make_search()
    found, cost = score.pooled_map(search, BLOCK)
    query, key = (
        torch.stack([part.mean(0) for part in x[1, :, 1].split(BLOCK)])
        for x in (search.query, search.key)
    )
    video = GRID.text_blocks(BLOCK).start
    expected = softmax_rows(query, key[:video], 16**-0.5)
    close(found[1, 1, :, :video], expected)
    assert (found[..., video:] == 0).all() and cost == 7**2 / (2 * 200**2)
    blank, _ = score.pooled_map(make_search(VideoGrid(1, 2, 2, text_tokens=3)), BLOCK)
    assert (blank == 0).all()


def test_pooled_sums_add_finer_means():
    search = make_search()
    fine, _ = score.pooled_map(search, 16)
    found, cost = score.pooled_sums(search, BLOCK, 16)
    close(found[0, 1], block_sums(fine[0, 1], 2, 2))
    assert cost == 13**2 / (2 * 200**2)


@pytest.mark.parametrize("lengths", [None, (195, 200)])
def test_sampled_rows_are_exact_for_the_rows_they_see(lengths):
    search = make_search(lengths=lengths)
    found, cost = score.sampled_rows(search, BLOCK)
    rows = [min(i + 4, 199) for i in range(0, 200, 8)]
    valid = lengths[0] if lengths else None
    mass = softmax_rows(search.query[0, rows, 1], search.key[0, :, 1], 16**-0.5, valid)
    close(found[0, 1], block_sums(mass, 4, BLOCK))
    assert cost == len(rows) / 200  # two passes of 0.5


def test_channels_equal_a_loop_and_all_of_them_are_exact(monkeypatch):
    monkeypatch.setattr(score, "CHUNK_ELEMENTS", 1)  # one block of rows at a time
    search = make_search()
    found, cost = score.channel_mass(search, BLOCK, channels=4)
    q, k = search.query[1, :, 0], search.key[1, :, 0]
    best = sorted(range(16), key=lambda c: -(q[:, c].abs().mean() * k[:, c].abs().mean()))[:4]
    close(found[1, 0], block_sums(softmax_rows(q[:, best], k[:, best], 16**-0.5), BLOCK, BLOCK))
    assert cost == 4 / 16
    close(score.channel_mass(search, BLOCK, 99)[0], score.exact_mass(search, BLOCK)[0])


def test_antidiagonal_equals_a_quadruple_loop():
    search = make_search(VideoGrid(1, 7, 9), batch=1, heads=1)
    found, cost = score.antidiagonal(search, BLOCK, stride=8)
    q, k = (torch.cat([x[0, :, 0], torch.zeros(1, 16)]) for x in (search.query, search.key))
    logits = torch.zeros(8, 8)
    for i in range(8):
        for j in range(8):
            for s in range(8):
                logits[i, j] += q[8 * i + s] @ k[8 * j + 7 - s] / 8 * 16**-0.5
    close(found[0, 0], block_sums(logits.softmax(-1), 4, 4))
    assert cost == 1 / 16


# -------------------------------------------------------------------------------------- selectors


def test_top_k_map_equals_a_loop():
    scores, forced = torch.rand(2, 2, 6, 6), torch.eye(6, dtype=torch.bool)
    kept = torch.tensor([[3, 10], [14, 36]])
    mask = select.top_k_map(scores, kept, forced, row_floor=2)
    for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
        expected = set()
        for i in range(6):
            others = sorted(set(range(6)) - {i}, key=lambda j: -scores[b, h, i, j])
            expected |= {(i, i), (i, others[0])}
        pairs = [(i, j) for i in range(6) for j in range(6)]
        rest = sorted(set(pairs) - expected, key=lambda p: -scores[b, h, p[0], p[1]])
        expected |= set(rest[: max(kept[b, h] - 12, 0)])
        assert {tuple(p) for p in mask[b, h].nonzero().tolist()} == expected
    assert select.top_k_map(scores, kept, forced, 2, most=36).equal(mask)
    plain = select.top_k_map(scores, kept, torch.zeros_like(forced))
    assert plain.sum((-1, -2)).equal(kept)
    assert select.top_k_map(scores, kept, forced, row_floor=7).all()  # of 6 blocks


def test_top_p_rows_equals_a_loop():
    scores, forced = torch.rand(2, 2, 6, 6), torch.eye(6, dtype=torch.bool)
    mask = select.top_p_rows(scores, 0.7, forced, floor=2, cap=4)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(6)).tolist():
        row = scores[b, h, i]
        ranked = [i, *sorted(set(range(6)) - {i}, key=lambda j: -row[j])]
        count = next(n for n in range(1, 7) if row[ranked[:n]].sum() >= 0.7 * row.sum() - 1e-6)
        expected = set(ranked[: min(max(count, 2), 4)])
        assert set(mask[b, h, i].nonzero().flatten().tolist()) == expected


def test_above_keeps_the_floor_of_every_row():
    scores, forced = torch.rand(1, 2, 6, 6), torch.eye(6, dtype=torch.bool)
    mask = select.above(scores, 2.0, torch.zeros_like(forced), row_floor=1)
    assert mask.sum(-1).eq(1).all() and mask.gather(-1, scores.argmax(-1, keepdim=True)).all()
    assert select.above(scores, 0.5, forced).equal((scores >= 0.5) | forced)


# ------------------------------------------------------------------------------------ corrections


def dense_and_sparse(dtype=torch.float32):
    query, key, value = torch.randn(3, 2, 200, 2, 16).to(dtype)
    mask = torch.rand(1, 2, 7, 7) < 0.4
    mask |= torch.eye(7, dtype=torch.bool)
    packed = BlockMask.from_dense(mask, 200, 200, (BLOCK, BLOCK))
    dense = dense_attention_with_lse(query, key, value)
    sparse = sparse_attention(query, key, value, packed, return_lse=True)
    rest = BlockMask.from_dense(~mask, 200, 200, (BLOCK, BLOCK))
    return dense, sparse, sparse_attention(query, key, value, rest, return_lse=True)


@pytest.mark.parametrize("clamp", [False, True])
def test_the_correction_gives_the_dense_output_at_its_own_step(clamp):
    dense, sparse, rest = dense_and_sparse()
    correction = measure_correction(*dense, *sparse)
    close(apply_correction(sparse[0], correction, clamp=clamp), dense[0])
    outside = (1 - correction.rho).transpose(1, 2).unsqueeze(-1) * rest[0]
    close(correction.residual, outside)  # R = (1 - rho) O of the other keys
    assert correction.nbytes() == 2 * 2 * 200 * 4 * (1 + 16)


def test_a_window_never_holds_more_than_all_of_the_mass():
    output, lse = torch.randn(1, 64, 2, 16), torch.zeros(1, 2, 64)
    correction = measure_correction(output, lse, output, lse + 1e-3)  # as far as rounding may go
    assert correction.rho.eq(1).all() and not correction.residual.any()


def test_a_pooled_residual_is_the_mean_of_its_tokens():
    dense, sparse, _ = dense_and_sparse()
    whole, pooled = (measure_correction(*dense, *sparse, pool=pool) for pool in (1, 64))
    assert pooled.residual.shape == (2, 4, 2, 16)
    close(pooled.residual[:, 3], whole.residual[:, 192:].mean(1))
    expected = sparse[0] * whole.rho.transpose(1, 2).unsqueeze(-1)
    expected[:, 192:] += pooled.residual[:, 3:]
    close(apply_correction(sparse[0], pooled)[:, 192:], expected[:, 192:])


def test_a_clamped_ramp_leaves_weights_that_sum_to_one():
    dense, sparse, _ = dense_and_sparse()
    correction = measure_correction(*dense, *sparse)
    ones = torch.ones_like(sparse[0])
    weights = replace(
        correction, residual=(1 - correction.rho).transpose(1, 2).unsqueeze(-1) * ones
    )
    for ramp in (0.04, 0.5, 5.0):
        close(apply_correction(ones, weights, ramp, clamp=True), ones)
    close(apply_correction(ones, weights, 0.04, clamp=False), ones * 1.04)


def test_rettention_adds_nothing_at_the_first_step_after_a_search_and_the_ramp_at_each_later():
    dense, sparse, _ = dense_and_sparse()
    correction = measure_correction(*dense, *sparse)
    config = Rettention(clamp=False)
    for age, added in ((0, 0.0), (1, 0.0), (2, 0.04), (3, 0.08), (4, 0.12)):
        rho = (correction.rho + added).transpose(1, 2).unsqueeze(-1)
        close(config.corrected(sparse[0], correction, age), rho * sparse[0] + correction.residual)


def test_the_ramp_of_rettention_starts_anew_at_each_search(monkeypatch):
    added = []

    def apply(sparse, correction, ramp, clamp):
        added.append(ramp)
        return apply_correction(sparse, correction, ramp, clamp)

    monkeypatch.setattr(rettention, "apply_correction", apply)
    pipe = tiny_wan()
    enable_sparse_attention(pipe, "rettention", block_size=BLOCK, search_at=(0.2, 0.7))
    generate(pipe, steps=10, guidance=1.0)  # searches at steps 2 and 7
    assert added[::2] == added[1::2] == pytest.approx([0, 0.04, 0.08, 0.12, 0, 0.04])  # two layers


# ---------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("grid", [VideoGrid(3, 8, 16), VideoGrid(2, 9, 20), VideoGrid(4, 16, 16)])
def test_patch_order_is_frame_major_patches(grid):
    order, _ = token_order(grid, "patch", 128)
    expected = [
        (t * grid.height + y) * grid.width + x
        for t in range(grid.frames)
        for top in range(0, grid.height, 8)
        for left in range(0, grid.width, 16)
        for y in range(top, min(top + 8, grid.height))
        for x in range(left, min(left + 16, grid.width))
    ]
    assert order.tolist() == expected


def test_draftattention_keeps_the_largest_entries_of_the_map():
    search = make_search(VideoGrid(5, 16, 16))
    config = DraftAttention(density=0.25, row_floor=0, own_block=False)
    found = config.find(search)
    scores, cost = score.pooled_map(search, 128)
    assert found.cost == cost and found.mask.sum((-1, -2)).eq(25).all()
    assert (
        scores[found.mask]
        .view(4, 25)
        .amin(1)
        .ge(scores.masked_fill(found.mask, 0).flatten(2).amax(-1).flatten())
        .all()
    )


def test_draftattention_keeps_the_best_blocks_of_a_row_that_its_map_would_starve():
    search = make_search(VideoGrid(5, 8, 16))  # 5 blocks
    search.query[:, 128:256] *= 0.01  # every entry of this row is near 1/5
    options = {"density": 0.12, "own_block": False}  # 3 entries of 25
    starved = DraftAttention(row_floor=0, **options).find(search).mask
    assert not starved[..., 1, :].any() and starved.sum((-1, -2)).eq(3).all()
    scores, _ = score.pooled_map(search, 128)
    for floor in (1, 2):
        mask = DraftAttention(row_floor=floor, **options).find(search).mask
        assert mask.sum(-1).eq(floor).all()
        assert mask.gather(-1, scores.topk(floor, -1).indices).all()


def test_the_window_of_rettention_is_as_wide_as_time_scale_says():
    search = make_search(VideoGrid(6, 4, 32))  # a block of 32 is one of four rows of a frame
    frame, row = torch.arange(24) // 4, torch.arange(24) % 4
    options = {"block_size": BLOCK, "order": "raster"}
    mask = Rettention(density=6 / 24, **options).find(search).mask
    assert mask[0, 0].equal(row[:, None] == row)  # at the same place in every frame
    mask = Rettention(density=4 / 24, time_scale=100.0, **options).find(search).mask
    assert mask[0, 0].equal(frame[:, None] == frame)


@pytest.mark.parametrize("config", [DraftAttention(), DFSAttn(), Rettention()])
def test_text_and_own_blocks_are_kept(config):
    config = replace(config, block_size=BLOCK)
    mask = config.find(make_search(VideoGrid(5, 8, 16, text_tokens=30, text_first=True))).mask
    assert mask[..., 0].all() and mask[..., 0, :].all()
    assert mask.diagonal(dim1=-2, dim2=-1).all()


def mass_by_loops(search, sample, head, every=1):
    """Sums of exp(q.k / sqrt(D) - LSE) over the pairs of a block, (N, N) float64.

    With `every` above 1 the middle row of so many stands for them, with a LSE of its own.
    """
    query, key = search.query[sample, :, head].double(), search.key[sample, :, head].double()
    blocks = search.grid.num_blocks(BLOCK)
    mass = torch.zeros(blocks, blocks, dtype=torch.double)
    for first in range(0, len(query), every):
        row = min(first + every // 2, len(query) - 1)
        logits = key @ query[row] / query.shape[-1] ** 0.5
        lse = logits.exp().sum().log() if every > 1 else search.lse[sample, head, row]
        for j, part in enumerate((logits - lse).exp().split(BLOCK)):
            mass[first // BLOCK, j] += part.sum()
    return mass


def adaspa_by_loops(masses, grid, config):
    """The masks of one sample's heads and the shares of mass inside them."""
    blocks, heads = len(masses[0]), len(masses)
    given = (*range(*grid.text_span), *range(*grid.conditioning_span))
    sinks = {token // BLOCK for token in given}

    def mask_of(mass, density):
        mask = torch.zeros(blocks, blocks, dtype=torch.bool)
        for i in range(blocks):
            always = set(range(blocks)) if i in sinks else sinks | {i}
            rest = sorted(set(range(blocks)) - always, key=lambda j: -mass[i, j])
            more = max(round(density * blocks) - len(always), 0)
            for j in (*always, *rest[:more]):
                mask[i, j] = True
        return mask

    def recall(mass, mask):
        return sum(row[kept].sum() / row.sum() for row, kept in zip(mass, mask)) / blocks

    density = dict.fromkeys(range(heads), config.density)
    if config.head_adaptive and config.density <= 2 / 3:
        found = [recall(mass, mask_of(mass, config.density)) for mass in masses]
        ranked = sorted(range(heads), key=lambda h: -found[h])
        count = min(sum(r > config.recall_threshold for r in found), heads // 2)
        for h in range(count):
            density[ranked[h]] *= 1 / 2
            density[ranked[-1 - h]] *= 3 / 2
    masks = [mask_of(mass, density[h]) for h, mass in enumerate(masses)]
    return torch.stack(masks), torch.stack([recall(*x) for x in zip(masses, masks)])


def search_of_uneven_heads(grid):
    """Five heads, some spread and some with few heavy blocks; the log-sum-exp is out of date."""
    search = make_search(grid, heads=5)
    of_blocks = torch.randn(2, 2, grid.num_blocks(BLOCK), 5, 16).repeat_interleave(BLOCK, 2)
    for x, more in zip((search.query, search.key), of_blocks):
        x.add_(more[:, : grid.tokens] * 2)
    search.query.mul_(torch.tensor([0.2, 0.6, 0.02, 0.3, 0.1]).view(5, 1))
    _, lse = dense_attention_with_lse(search.query, search.key, search.key)
    return replace(search, lse=lse + torch.randn_like(lse) / 2)


@pytest.mark.parametrize("grid", ADASPA_GRIDS)
@pytest.mark.parametrize(
    "method, every, cost", [(AdaSpa, 1, 0.5), (AdaSpaSampled, 8, 0.125)], ids=["exact", "sampled"]
)
def test_adaspa_equals_loops_over_its_equations(method, every, cost, grid):
    search = search_of_uneven_heads(grid)
    masses = [[mass_by_loops(search, i, head, every) for head in range(5)] for i in range(2)]
    for options in (
        {"density": 0.4, "recall_threshold": 0.0},  # all heads are above it
        {"density": 0.4, "recall_threshold": 0.7},
        {"density": 0.4, "recall_threshold": 1.0},  # none is
        {"density": 0.4, "recall_threshold": 0.0, "head_adaptive": False},
        {"density": 0.7, "recall_threshold": 0.0},  # no room for a denser level
    ):
        config = method(block_size=BLOCK, **options)
        found = config.find(search if config.uses_lse else replace(search, lse=None))
        expected = [adaspa_by_loops(of_heads, grid, config) for of_heads in masses]
        assert found.mask.equal(torch.stack([masks for masks, _ in expected]))
        close(found.kept_mass, sum(shares for _, shares in expected) / 2)
        assert found.cost == pytest.approx(cost, rel=0.03)


def test_adaspa_sampled_needs_no_dense_step_and_keeps_no_log_sum_exp():
    pipe = tiny_wan()
    with enable_sparse_attention(pipe, AdaSpaSampled(search_at=(0.0, 0.5))) as handle:
        generate(pipe)
        report = handle.report()
    assert {entry["kind"] for entry in report.trace} == {"search", "reuse"}
    assert all(entry["density"] is not None for entry in report.trace)
    masks = AdaSpaSampled().cache_bytes((1, 640, 2, 16), 4)
    assert masks == 2 * 10 * 2 == AdaSpa().cache_bytes((1, 640, 2, 16), 4) - 4 * 640 * 2


@pytest.mark.parametrize("method", [DraftAttention, DFSAttn])
def test_blocks_are_as_published_and_smaller_where_small_videos_are_tuned(method):
    assert method().block_size == 128
    assert [options["block_size"] for options in method.swept] == [64] * 4
    masks = [
        method(**options).find(make_search(VideoGrid(5, 16, 16), step=40, num_steps=50)).mask
        for options in method.swept
    ]
    kept = [mask.float().mean() for mask in masks]
    assert masks[0].shape[-1] == 20 and kept == sorted(set(kept))


def test_dfsattn_counts_down():
    at = [DFSAttn().density_at(step, 50) for step in (12, 24, 36)]
    assert at == pytest.approx([0.3, 0.2, 0.1])
    search = make_search(VideoGrid(10, 16, 16), step=12, num_steps=50)
    assert DFSAttn().find(search).mask.float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_published_settings_build_and_others_are_refused():
    for method in (AdaSpa, DraftAttention, Rettention):
        for model in method.published:
            assert not method.as_published(model).own_block
    with pytest.raises(ValueError, match="HunyuanVideo, Wan"):
        DraftAttention.as_published("LTX")


# ------------------------------------------------------------------------------------- whole runs


METHODS = ("draftattention", "rettention", "dfsattn")


@pytest.mark.parametrize("name", ["HunyuanVideo", "CogVideoX", "Mochi"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_methods_run_on_joint_families(name, method):
    make, call = PIPELINES[name]
    pipe, arguments = make(), call(1, False)
    handle = enable_sparse_attention(pipe, method, density=0.4, block_size=BLOCK)
    fixed = {"num_inference_steps": 5, "output_type": "latent"}
    first = [pipe(**arguments, **fixed, generator=torch.Generator().manual_seed(0)).frames]
    first.append(pipe(**arguments, **fixed, generator=torch.Generator().manual_seed(0)).frames)
    assert first[0].equal(first[1]) and first[0].isfinite().all()
    assert handle.report().reuse_calls + handle.report().search_calls > 0
    assert not handle._installed[0].state.kept


@pytest.mark.parametrize("method", METHODS)
def test_all_kept_is_dense_on_wan(method):
    pipe = tiny_wan()
    stock = generate(pipe)
    options = {"ramp": 0.0} if method == "rettention" else {}
    handle = enable_sparse_attention(pipe, method, density=0.99, block_size=BLOCK, **options)
    assert (generate(pipe) - stock).abs().max() < 1e-5
    assert handle.report().dense_calls > 0


def test_searching_at_every_step_and_dense_layers_on_wan():
    pipe = tiny_wan()
    options = {"density": 0.5, "block_size": BLOCK, "search_at": (0.3,), "dense_layers": 1}
    handle = enable_sparse_attention(pipe, "draftattention", **options)
    generate(pipe)
    report = handle.report()
    assert {e["kind"] for e in report.trace if e["layer"] == 0} == {"dense"}
    kinds = [e["kind"] for e in report.trace if e["layer"] == 1 and e["branch"] == "cond"]
    assert kinds == ["dense"] * 2 + ["search"] * 4
    blocks, tokens = 4, 108
    pooled = blocks**2 / (2 * tokens**2)
    by_hand = [
        1.0 if e["density"] is None else sum(e["density"]) / 2 + pooled for e in report.trace
    ]
    assert report.effective_cost == pytest.approx(sum(by_hand) / len(by_hand))


def test_rettention_costs_dense_and_window_at_a_refresh_and_frees_its_cache():
    pipe = tiny_wan()
    options = {"density": 0.5, "block_size": BLOCK, "search_at": (0.3, 0.7)}
    handle = enable_sparse_attention(pipe, "rettention", **options)
    generate(pipe)
    report, state = handle.report(), handle._installed[0].state
    kinds = [e["kind"] for e in report.trace if e["layer"] == 0 and e["branch"] == "cond"]
    assert kinds == ["dense", "dense", "search", "reuse", "search", "reuse"]
    reused = next(r.density for r in state.trace if r.kind == "reuse")
    density = float(reused.mean())
    assert report.effective_cost == pytest.approx((2 + 2 * (1 + density) + 2 * density) / 6)
    per_layer = Rettention(**options).cache_bytes((1, 108, 2, 16), 4)
    assert report.peak_cache_bytes == report.planned_cache_bytes == per_layer * 2 * 2
    assert not state.kept


def test_rettention_follows_dense_better_than_its_window():
    pipe = tiny_wan()
    stock = generate(pipe)
    apart = {}
    for method in ("window", "rettention"):
        options = {"density": 0.3, "block_size": BLOCK, "search_at": (0.2, 0.6)}
        with enable_sparse_attention(pipe, method, time_scale=0.01, order="raster", **options):
            apart[method] = (generate(pipe) - stock).square().mean()
    assert apart["rettention"] < apart["window"]


def test_more_cache_than_allowed_is_refused_at_the_first_step():
    pipe = tiny_wan()
    handle = enable_sparse_attention(pipe, "rettention", max_cache_bytes=20_000)
    with pytest.raises(MemoryError, match="max_cache_bytes"):
        generate(pipe)
    assert handle.report().dense_calls == 0
    enable_sparse_attention(pipe, "rettention", max_cache_bytes=20_000, pool=64, block_size=BLOCK)
    generate(pipe)


def test_a_batch_of_another_size_gets_a_correction_of_its_own():
    pipe = tiny_wan()
    enable_sparse_attention(pipe, "rettention", density=0.4, block_size=BLOCK)
    alone = generate(pipe)
    generate(pipe, prompt=["a", "b"])
    assert generate(pipe).equal(alone)

"""The methods of the field against slow loops and exact oracles."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from test_seeds import BLOCK, block_sums, close, softmax_rows

from dit_sparse import (
    LLSA,
    MISA,
    AnchorAttention,
    BiFormer,
    BlockMask,
    DoubleSparsity,
    FlexPrefill,
    HiP,
    LycheeDecode,
    MInference,
    MMInference,
    MoA,
    Radial,
    RTPurbo,
    S2Attention,
    Scatterbrain,
    SlidingTile,
    SpargeAttn,
    SparseD,
    SparseVideoGen,
    SparseVideoGen2,
    VideoGrid,
    XAttention,
    available_methods,
    sparse_attention,
)
from dit_sparse.config import CAPS
from dit_sparse.dense import dense_attention_with_lse
from dit_sparse.patterns import (
    anchor,
    flexprefill,
    lychee,
    moa,
    s2,
    sampled,
    score,
    select,
    slashes,
)
from dit_sparse.patterns.radial import radial_mask
from dit_sparse.patterns.rtpurbo import principal_mass, projections
from dit_sparse.patterns.scatterbrain import buckets, collisions
from dit_sparse.patterns.search import Search
from dit_sparse.patterns.sparge import self_similarity
from dit_sparse.patterns.sta import TIME_SCALES, tile_windows
from dit_sparse.patterns.svg import spatial_and_temporal
from dit_sparse.patterns.svg2 import cluster_mass, k_means
from dit_sparse.patterns.tree import best_regions, mass_inside, tree_logits
from dit_sparse.reference import block_pool

ELSEWHERE = {"adaspa", "adaspa-sampled", "draftattention", "rettention", "sparse-vdit", "dfsattn"}
ELSEWHERE |= {"sol-attn", "auto", "random", "window", "seerattention"}
FIELD = {name: cls for name, cls in available_methods().items() if name not in ELSEWHERE}
SMALL = VideoGrid(1, 7, 9)  # 63 tokens: two blocks
GRID = VideoGrid(3, 7, 9)  # 189 tokens: six blocks of 32, the last of 29
GRIDS = [
    VideoGrid(5, 8, 16),
    VideoGrid(3, 7, 9, text_tokens=11),
    VideoGrid(3, 7, 9, text_tokens=40, text_first=True),
    VideoGrid(4, 7, 9, conditioning_frames=1),
    VideoGrid(1, 2, 2, text_tokens=3),
]
CPU = torch.device("cpu")


def make_search(grid=GRID, batch=2, heads=2, dim=16, scale=2.0, **more):
    query, key, value = torch.randn(3, batch, grid.tokens, heads, dim)
    query, key = query * scale, key * scale
    _, lse = dense_attention_with_lse(query, key, value)
    return Search(query, key, lse, grid, layer=0, value=value, **more)


def means(x, block=BLOCK):
    """(S, D) -> (N, D), block by block."""
    return torch.stack([part.mean(0) for part in x.split(block)])


def indices(row):
    return set(row.nonzero().flatten().tolist())


# ------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", FIELD)
def test_rows_keep_own_and_text_blocks_and_samples_of_a_batch_are_independent(method, grid):
    search = make_search(grid, heads=3)
    text, blocks = grid.text_blocks(BLOCK), grid.num_blocks(BLOCK)
    for density in (1e-6, 0.3):
        config = FIELD[method](density=density, block_size=BLOCK)
        found = config.find(search)
        mask = found.mask.expand(2, 3, blocks, blocks)
        assert mask.diagonal(dim1=-2, dim2=-1).all() and found.cost >= 0
        of_text = slice(text.start, text.stop)
        assert mask[..., of_text].all()
        if config.text_queries:
            assert mask[..., of_text, :].all()
        assert replace(config, own_block=False).find(search).mask.any(-1).all()
        for i in range(2):
            parts = (x[i : i + 1] for x in (search.query, search.key, search.lse, search.value))
            alone = replace(search, **dict(zip(("query", "key", "lse", "value"), parts)))
            assert config.find(alone).mask.expand(1, 3, -1, -1).equal(mask[i : i + 1])


@pytest.mark.parametrize("method", FIELD)
def test_every_row_keeps_a_block_as_published(method):
    grid = VideoGrid(5, 8, 16)
    for options in FIELD[method].published.values():
        found = FIELD[method](**options).find(make_search(grid))
        assert found.mask.any(-1).all()


@pytest.mark.parametrize("method", [name for name in FIELD if name not in ("sparge", "radial")])
def test_no_more_is_kept_than_asked(method):
    """SpargeAttn adds blocks that are not alike, Radial the next frames, as their files say."""
    grid = VideoGrid(8, 16, 16)
    config = FIELD[method](density=0.25, block_size=BLOCK)
    density = config.find(make_search(grid, batch=1)).mask.float().mean()
    assert density < 0.27 + 1 / grid.num_blocks(BLOCK)


@pytest.mark.parametrize("method", ["llsa", "scatterbrain"])
def test_rows_of_text_choose_as_others_where_means_tell_them_the_rest(method):
    grid = VideoGrid(5, 8, 16, text_tokens=64)  # 22 blocks, two of them text
    mask = FIELD[method](density=6 / 22, block_size=BLOCK).find(make_search(grid)).mask
    assert mask.sum(-1).eq(6).all() and mask[..., 20:].all()


@pytest.mark.parametrize(
    "method", ["anchorattention", "flexprefill", "rtpurbo", "sparge", "svg2", "xattention"]
)
def test_rules_without_a_bound_are_tuned_by_the_most_that_rows_keep(method):
    tried = FIELD[method].swept
    assert [options["density"] for options in tried] == list(CAPS)
    assert all(options.keys() <= {"density", "step", "similarity", "least"} for options in tried)
    grid = VideoGrid(8, 16, 16)
    search = make_search(grid, batch=1, scale=0.1)  # spread: shares of it are large
    kept = [FIELD[method](**options).find(search).mask.float().mean() for options in tried]
    assert kept == sorted(kept) and kept[0] < 0.16 and kept[-1] > 2.5 * kept[0]


@pytest.mark.parametrize("options", [{"share": 0}, {"share": 1.5}, {"share": "x"}])
def test_shares_lie_between_0_and_1(options):
    for method in (XAttention, SpargeAttn, SparseVideoGen2, FlexPrefill, RTPurbo):
        with pytest.raises(ValueError, match=r"share is a share, in \(0, 1\], got"):
            method(**options)


@pytest.mark.parametrize(
    "method, options, message",
    [
        (SparseVideoGen, {"rows": 0}, "rows is a whole number of at least 1"),
        (SparseVideoGen, {"first_frame": 1}, "first_frame is True or False"),
        (SlidingTile, {"rows": 1.0}, "rows is a whole number"),
        (Radial, {"first_frame": "no"}, "first_frame is True or False"),
        (XAttention, {"stride": 7}, "stride must be 4, 8, 16 or 32, got 7"),
        (SpargeAttn, {"similarity": 2}, "similarity is a cosine, -1 to 1, got 2"),
        (SparseVideoGen2, {"iterations": 0}, "iterations is a whole number"),
        (AnchorAttention, {"theta": 0}, "theta must be a number above 0"),
        (LLSA, {"fan_out": 1}, "fan_out is a whole number of at least 2"),
        (BiFormer, {"region": 0}, "region is a whole number"),
        (MISA, {"looked_at": 0}, "looked_at is a share"),
        (DoubleSparsity, {"channels": 0}, "channels is a whole number"),
        (LycheeDecode, {"searching": 2}, "searching is a share"),
        (FlexPrefill, {"tau": 0}, "tau is a share"),
        (Scatterbrain, {"bits": 0}, "bits is a whole number"),
        (Scatterbrain, {"bits": 40}, "bits is at most 12, got 40: take more rounds"),
        (RTPurbo, {"dimensions": 0}, "dimensions is a whole number"),
    ],
)
def test_bad_options_say_what_is_allowed(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


# ----------------------------------------------------------------------------------- sampled rows


@pytest.mark.parametrize("lengths", [None, (195, 200)])
def test_rows_attend_as_in_a_loop(lengths):
    grid = VideoGrid(3, 7, 9, text_tokens=11)
    search = make_search(grid, lengths=lengths)
    places = sampled.sampled_places(grid, 20, CPU)
    assert len(set(places.tolist())) == 20 and places.max() < 189
    valid = lengths[0] if lengths else None
    rows = softmax_rows(search.query[0, places, 1], search.key[0, :, 1], 16**-0.5, valid)
    close(sampled.attention_of_rows(search, places)[0, 1], rows)
    mass, cost = sampled.mass_of_places(search, BLOCK, places)
    close(mass[0, 1], block_sums(rows, 1, BLOCK))
    assert cost == 20 / 400


def test_errors_of_outputs_are_those_of_sparse_attention():
    search = make_search()
    masks = [torch.rand(1, 2, 6, 6) < 0.5, torch.rand(2, 1, 6, 6) < 0.5]
    masks = [mask | torch.eye(6, dtype=torch.bool) for mask in masks]
    places = sampled.sampled_places(GRID, 16, CPU)
    errors, cost = sampled.output_errors(search, BLOCK, masks, places)
    dense, _ = dense_attention_with_lse(search.query, search.key, search.value)
    for mask, found in zip(masks, errors):
        packed = BlockMask.from_dense(mask, GRID.tokens, GRID.tokens, (BLOCK, BLOCK))
        output = sparse_attention(search.query, search.key, search.value, packed)
        close(found, (output - dense)[:, places].square().mean((1, 3)))
    assert cost == 4 * 16 / (2 * GRID.tokens)
    chosen = sampled.choose_masks(masks, errors)
    for b, h in product(range(2), range(2)):
        better = min((0, 1), key=lambda i: errors[i, b, h])
        assert chosen[b, h].equal(masks[better].expand(2, 2, 6, 6)[b, h])


# ------------------------------------------------------------------ what users would pick instead


def test_svg_tells_heads_of_space_from_heads_of_time():
    grid = VideoGrid(8, 8, 8)  # two blocks a frame
    frame, place = torch.arange(512) // 64, torch.arange(512) % 64
    spatial, temporal = F.one_hot(frame, 64) * 9.0, F.one_hot(place, 64) * 9.0
    query = torch.stack([spatial, temporal], 1)[None]
    search = Search(query, query, None, grid, 0, value=torch.randn(1, 512, 2, 64))
    config = SparseVideoGen(density=0.25, block_size=BLOCK, first_frame=False)
    mask = config.find(search).mask[0]
    halves = torch.arange(16) % 2
    for i in range(16):
        near = sorted(range(16), key=lambda j: abs(i - j))[:4]
        assert max(abs(i - j) for j in indices(mask[0, i])) <= abs(i - near[-1])
        assert all(halves[j] == halves[i] for j in indices(mask[1, i]))
        assert mask[:, i].sum(-1).eq(4).all()
    published = SparseVideoGen.as_published("Wan"), SparseVideoGen.as_published("HunyuanVideo")
    assert [config.first_frame for config in (SparseVideoGen(), *published)] == [False, True, False]
    first = spatial_and_temporal(grid, "raster", BLOCK, 0.25, True, True, CPU)
    assert all(mask[..., :2].all() for mask in first)


def test_windows_of_sliding_tile_are_boxes_by_a_double_loop():
    grid = VideoGrid(5, 8, 8)
    centres = score.block_centres(grid, "tile", BLOCK)
    windows = tile_windows(grid, "tile", BLOCK, 0.4, True, CPU)
    for scale, window in zip(TIME_SCALES, windows):
        assert window.sum(-1).eq(4).all()
        for i in range(10):
            apart = (centres - centres[i]).abs() / torch.tensor([5 / scale, 8, 8])
            farthest = apart.amax(-1)
            kept = window[0, 0, i]
            assert farthest[kept].max() <= farthest[~kept].min()


def radial_by_loops(grid, order_places, decay, first_frame):
    area, count = grid.height * grid.width, len(order_places)
    kept = torch.zeros(count, count, dtype=torch.bool)
    for i, j in product(range(count), range(count)):
        frames = [int(order_places[n]) // area for n in (i, j)]
        apart = abs(int(order_places[i]) % area - int(order_places[j]) % area)
        distance = abs(frames[0] - frames[1])
        width = decay * 2 ** area.bit_length() / 2 ** distance.bit_length()
        if distance <= 1 or (first_frame and frames[1] == 0):
            kept[i, j] = True
        elif width >= BLOCK:
            kept[i, j] = apart <= width
        else:
            kept[i, j] = apart <= BLOCK and distance % int(BLOCK / width) == 0
    return kept


@pytest.mark.parametrize(
    "decay, first_frame", [(4.0, False), (1.0, True), (0.3, False), (0.1, True)]
)
def test_radial_equals_a_double_loop(decay, first_frame):
    grid = VideoGrid(12, 7, 9)
    middles = [min(BLOCK * i + min(BLOCK, grid.tokens - BLOCK * i) // 2, 755) for i in range(24)]
    expected = radial_by_loops(grid, middles, decay, first_frame)
    assert radial_mask(grid, "raster", BLOCK, decay, first_frame).equal(expected)


def test_radial_is_the_densest_mask_within_the_density():
    grid = VideoGrid(16, 16, 16)
    search, last = make_search(grid, batch=1, heads=1), 0.0
    for density in (0.3, 0.4, 0.6):
        kept = Radial(density=density).find(search).mask.float().mean().item()
        assert last < kept <= density
        last = kept
    assert Radial(density=0.01).find(search).mask.float().mean() > 0.01  # next frames are whole


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_xattention_keeps_the_fewest_blocks_that_hold_the_share(share):
    search = make_search(VideoGrid(5, 8, 16), scale=1.0)
    config = XAttention(density=0.9, share=share, block_size=BLOCK, own_block=False)
    found = config.find(search)
    scores, cost = score.antidiagonal(search, BLOCK, 8)
    for row, kept in zip(scores.flatten(0, 2), found.mask.flatten(0, 2)):
        ranked = sorted(range(20), key=lambda j: -row[j])
        count = next(n for n in range(1, 21) if row[ranked[:n]].sum() >= share * row.sum() - 1e-6)
        assert indices(kept) == set(ranked[: min(count, 18)])
    assert found.cost == cost == 1 / 16


def test_antidiagonals_in_chunks_are_the_same(monkeypatch):
    search = make_search(lengths=(180, 189))
    expected, _ = score.antidiagonal(search, BLOCK)
    monkeypatch.setattr(score, "CHUNK_ELEMENTS", 1)
    close(score.antidiagonal(search, BLOCK)[0], expected)


def test_sparge_computes_what_is_not_alike_and_ranks_the_rest():
    search = make_search(scale=1.0)
    search.query.add_(3.0)  # alike
    search.key.add_(torch.arange(16) * 2.0)
    search.key[:, 40:60] = torch.randn(2, 20, 2, 16) * 60  # in the second block: not alike
    for b, h, block in product(range(2), range(2), (0, 1, 5)):
        part = search.key[b, block * BLOCK : (block + 1) * BLOCK, h]
        cosines = [F.cosine_similarity(x, y, dim=0) for x, y in product(part, part)]
        found = self_similarity(search.key, BLOCK)[b, h, block]
        assert found.item() == pytest.approx(sum(cosines).item() / len(part) ** 2, abs=1e-4)
    config = SpargeAttn(density=0.99, share=0.5, similarity=0.1, block_size=BLOCK, own_block=False)
    mask = config.find(search).mask
    centred = search.key - search.key.mean(1, keepdim=True)
    alike = self_similarity(centred, BLOCK) > 0.1
    assert (
        not alike[:, :, 1].any() and alike.any() and (self_similarity(search.query, 32) > 0.1).all()
    )
    assert mask[..., 1].all()
    for b, h, i in product(range(2), range(2), range(6)):
        keys = [j for j in range(6) if alike[b, h, j]]
        q, k = means(search.query[b, :, h])[i], means(search.key[b, :, h])[keys]
        weights = (k @ q / 4).softmax(-1)
        ranked = sorted(range(len(keys)), key=lambda j: -weights[j])
        count = next(n for n in range(1, 7) if weights[ranked[:n]].sum() >= 0.5 - 1e-6)
        expected = {keys[j] for j in ranked[:count]} | {j for j in range(6) if not alike[b, h, j]}
        assert indices(mask[b, h, i]) == expected
    everything = SpargeAttn(similarity=1.0, block_size=BLOCK).find(search).mask
    assert everything.all()


def test_clusters_of_one_token_give_the_exact_mass():
    search = make_search()
    mass, _ = cluster_mass(search, BLOCK, (GRID.tokens, GRID.tokens), 1)
    close(mass, score.exact_mass(search, BLOCK)[0])


def test_k_means_equals_lloyds_loop_and_mass_of_clusters_a_loop_over_tokens():
    search = make_search(SMALL, batch=1, heads=1)
    x = search.query.transpose(1, 2)
    centroids, label = k_means(x, 5, iterations=4)
    points = x[0, 0]
    expected = points[[int((i + 0.5) * 63 / 5) for i in range(5)]].clone()
    for step in range(4):
        nearest = [min(range(5), key=lambda c: (p - expected[c]).norm()) for p in points]
        if step < 3:
            for c in set(nearest):
                expected[c] = points[[i for i in range(63) if nearest[i] == c]].mean(0)
    close(centroids[0, 0], expected)
    assert label[0, 0].tolist() == nearest
    keys, key_label = k_means(search.key.transpose(1, 2), 7, iterations=4)
    sizes = torch.bincount(key_label[0, 0], minlength=7)
    weights = ((expected @ keys[0, 0].T / 4).exp() * sizes).double()
    weights = weights / weights.sum(-1, keepdim=True)
    pairs = torch.zeros(63, 63, dtype=torch.float64)
    for i, j in product(range(63), range(63)):
        a, b = label[0, 0, i], key_label[0, 0, j]
        pairs[i, j] = weights[a, b] / sizes[b]
    mass, cost = cluster_mass(search, BLOCK, (5, 7), 4)
    close(mass[0, 0], block_sums(pairs, BLOCK, BLOCK))
    assert SparseVideoGen2().iterations == 2  # what the paper's later steps take
    by_hand = 4 * (5 + 7) * 63 * 16 + 5 * 7 * 16 + 2 * 5 * 7 + 2 * 2 * 7
    assert cost == by_hand / (2 * 63**2 * 16)


# ------------------------------------------------------------------------------- coarse to fine


def tree_by_loops(query, keys, kept, fan_out, chunk_key):
    """Blocks that one row of one head arrives at; chunks are spans of blocks."""
    count = len(keys)
    level = 0
    while math.ceil(count / fan_out ** (level + 1)) > kept:
        level += 1
    size = fan_out**level
    chunks = list(range(0, count, size))
    while True:
        ranked = sorted(chunks, key=lambda start: -float(query @ chunk_key(keys, start, size)))
        if size == 1:
            return set(chunks), ranked[:kept]
        size //= fan_out
        chunks = [
            start
            for parent in ranked[:kept]
            for start in range(parent, min(parent + size * fan_out, count), size)
        ]


@pytest.mark.parametrize("middles", [False, True])
@pytest.mark.parametrize("fan_out", [2, 4])
def test_tree_equals_a_search_of_each_row_by_itself(fan_out, middles):
    grid = VideoGrid(7, 8, 9)  # 504 tokens, 16 blocks
    search = make_search(grid)
    scores, cost = tree_logits(search, BLOCK, 3, fan_out, middles)
    levels = {2: (4, 8, 16), 4: (4, 16)}[fan_out]
    assert cost == 16 * sum(levels) / (2 * 504**2)

    def chunk_key(keys, start, size):
        if middles:
            return keys[min(start + size // 2, len(keys) - 1)]
        return keys[start : start + size].mean(0)

    for b, h in product(range(2), range(2)):
        keys = means(search.key[b, :, h])
        if middles:
            keys = torch.stack([part[len(part) // 2] for part in search.key[b, :, h].split(BLOCK)])
        for i, query in enumerate(means(search.query[b, :, h])):
            reached, ranked = tree_by_loops(query, keys, 3, fan_out, chunk_key)
            assert indices(scores[b, h, i] > -torch.inf) == reached
            assert scores[b, h, i].topk(3).indices.tolist() == ranked
    method = {(True, 2): HiP, (False, 4): LLSA}.get((middles, fan_out))
    if method is not None:
        mask = method(density=3 / 16, block_size=BLOCK, own_block=False).find(search).mask
        assert mask.sum(-1).eq(3).all()
        assert scores.topk(3, -1).indices.sort(-1).values.flatten().tolist() == [
            j for row in mask.flatten(0, 2) for j in sorted(indices(row))
        ]


def test_regions_of_biformer_equal_a_loop():
    grid = VideoGrid(3, 7, 9, text_tokens=11)
    search = make_search(grid)
    mask, cost = best_regions(search, BLOCK, 2, 0.5)  # 5 blocks of video: 3 regions, 2 are kept
    assert cost == 9 / (2 * 200**2)
    for b, h in product(range(2), range(2)):
        q, k = (means(x[b, :160, h]) for x in (search.query, search.key))
        q, k = ([x[:2].mean(0), x[2:4].mean(0), x[4]] for x in (q, k))
        for i in range(5):
            best = sorted(range(3), key=lambda r: -float(q[i // 2] @ k[r]))[:2]
            assert indices(mask[b, h, i]) == {j for j in range(5) if j // 2 in best}
    assert not mask[..., 5:].any() and not mask[..., 5:, :].any()


def test_mass_inside_of_regions_equals_a_loop_and_of_all_regions_the_sampled_rows():
    search = make_search(VideoGrid(5, 7, 9))  # 315 tokens: 10 blocks, regions of 3, 3, 3 and 1
    everything, _ = best_regions(search, BLOCK, 3, 1.0)
    found, cost = mass_inside(search, BLOCK, everything, 3, every=8)
    sampled_mass, _ = score.sampled_rows(search, BLOCK)
    close(found, sampled_mass)
    assert cost == 40 * 320 / (2 * 315**2)
    some, _ = best_regions(search, BLOCK, 3, 0.5)
    found, _ = mass_inside(search, BLOCK, some, 3, every=8)
    for b, h, i in product(range(2), range(2), range(10)):
        keys = torch.cat(
            [torch.arange(32 * j, min(32 * j + 32, 315)) for j in indices(some[b, h, i])]
        )
        rows = [min(r, 314) for r in range(32 * i + 4, min(32 * i + 36, 319), 8)]
        weights = softmax_rows(search.query[b, rows, h], search.key[b, keys, h], 16**-0.5)
        for j in range(10):
            close(found[b, h, i, j], weights[:, keys // BLOCK == j].sum())
    mask = MISA(density=0.2, region=3, block_size=BLOCK, own_block=False).find(search).mask
    assert (mask & ~some).sum() == 0 and mask.sum(-1).eq(2).all()
    assert found.topk(2, -1).indices.sort(-1).values.flatten().tolist() == [
        j for row in mask.flatten(0, 2) for j in sorted(indices(row))
    ]


# --------------------------------------------------------------------------------- heads and spans


def test_heads_that_are_alike_follow_one_of_them():
    search = make_search(heads=2)
    twice = {x: getattr(search, x).repeat(1, 1, 2, 1) for x in ("query", "key", "value")}
    search = replace(search, **twice)  # heads 0 and 2, 1 and 3 are the same
    config = LycheeDecode(density=0.4, searching=0.5, block_size=BLOCK, own_block=False)
    found = config.find(search)
    mass, cost = score.sampled_rows(search, BLOCK)
    best = mass.topk(2, -1).indices
    assert found.mask.equal(torch.zeros_like(found.mask).scatter_(-1, best, True))
    assert found.cost == pytest.approx(cost / 2 + 36 / (2 * 189**2))


def test_searching_heads_equal_a_greedy_loop():
    overlap = torch.rand(2, 6, 6)
    overlap = (overlap + overlap.mT) / 2
    overlap.diagonal(dim1=1, dim2=2).fill_(1.0)
    heads, followed = lychee.leading_heads(overlap, 3)
    for b in range(2):
        chosen = []
        for _ in range(3):
            rest = [h for h in range(6) if h not in chosen]
            gains = {h: sum(overlap[b, [*chosen, h], i].max() for i in range(6)) for h in rest}
            chosen.append(max(gains, key=gains.get))
        assert heads[b].tolist() == chosen
        assert followed[b].tolist() == [int(overlap[b, chosen, i].argmax()) for i in range(6)]
    masks = torch.rand(1, 2, 5, 5) < 0.5
    both, either = (masks[0, 0] & masks[0, 1]).sum(), (masks[0, 0] | masks[0, 1]).sum()
    close(lychee.overlap_of_heads(masks)[0, 0, 1], both / either)


def test_spans_are_the_best_of_all_combinations():
    errors = torch.rand(4, 3, 4, dtype=torch.float64)
    spans = moa.cheapest_spans(errors, moa.SPANS, 8 * 4)
    for b in range(3):
        allowed = [c for c in product(range(4), repeat=4) if sum(moa.SPANS[i] for i in c) <= 32]
        best = min(allowed, key=lambda c: sum(errors[i, b, h] for h, i in enumerate(c)))
        assert spans[b].tolist() == list(best)


def test_a_single_head_takes_no_span_above_its_budget():
    errors = torch.tensor([0.3, 0.2, 0.1, 0.0]).view(4, 1, 1)
    assert moa.cheapest_spans(errors, moa.SPANS, 8).tolist() == [[2]]
    search = make_search(heads=1, batch=3)
    assert MoA(density=0.5, block_size=BLOCK).find(search).mask.shape == (3, 1, 6, 6)


def test_moa_keeps_its_budget_and_gives_more_to_heads_that_look_far():
    grid = VideoGrid(8, 8, 8)
    search = make_search(grid, batch=1, scale=0.0)  # both heads look everywhere
    place = torch.arange(512)
    near = torch.exp(-((place[:, None] - torch.linspace(0, 511, 16)) ** 2) / 2000) * 30
    search.query[0, :, 0], search.key[0, :, 0] = near, near
    mask = MoA(density=0.25, order="raster", block_size=BLOCK).find(search).mask[0]
    near_head, far_head = mask.float().mean((-1, -2)).tolist()
    assert near_head < far_head and near_head + far_head <= 0.5


@pytest.mark.parametrize("heads, blocks", [(4, 20), (12, 68), (3, 7)])
def test_shards_of_s2_are_evenly_spaced_and_all_heads_together_see_all(heads, blocks):
    density = math.ceil(blocks / heads) / blocks
    shards = s2.strided_shards(heads, blocks, density, 0, CPU)[0]
    for shard in shards:
        gaps = torch.diff(shard.nonzero().flatten())
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
    assert shards.any(0).all()
    search = make_search(VideoGrid(5, 8, 16), heads=4)
    mask = S2Attention(density=0.4, block_size=BLOCK).find(search).mask
    other = S2Attention(density=0.4, block_size=BLOCK).find(replace(search, layer=1)).mask
    assert mask.sum(-1).eq(8).all() and mask[0, 1].equal(other[0, 0])
    grid = VideoGrid(5, 8, 16, text_tokens=64)  # 22 blocks, two of them text
    mask = S2Attention(density=4 / 22, block_size=BLOCK).find(make_search(grid)).mask
    assert mask[..., :20, :].sum(-1).eq(4).all()  # text comes before the shard


# ---------------------------------------------------------------------------------------- scorers


def test_collisions_equal_a_double_loop():
    search = make_search(SMALL, batch=1)
    found, cost = collisions(search, BLOCK, bits=3, rounds=2)
    generator = torch.Generator().manual_seed(0)
    pairs = torch.zeros(2, 63, 63)
    for _ in range(2):
        planes = torch.randn(16, 3, generator=generator)
        for h in range(2):
            hashes = []
            for x in (search.query[0, :, h], search.key[0, :, h]):
                hashes.append([tuple((row @ planes > 0).tolist()) for row in x - x.mean(0)])
            for i, j in product(range(63), range(63)):
                pairs[h, i, j] += hashes[0][i] == hashes[1][j]
    close(found[0], torch.stack([block_sums(x, BLOCK, BLOCK) for x in pairs]))
    assert cost == 2 * (2 * 63 * 3 * 16 + 4 * 8) / (2 * 63**2 * 16)
    assert buckets(search.query, planes).max() < 8
    assert Scatterbrain.tail


def test_all_principal_dimensions_are_exact_and_few_are_nearly_the_best_of_their_rank():
    search = make_search(SMALL)
    exact, _ = score.exact_mass(search, BLOCK)
    close(principal_mass(search, BLOCK, 99)[0], exact)
    found, cost = principal_mass(search, BLOCK, 4)
    query, key = (x.transpose(1, 2) for x in (search.query, search.key))
    few_q, few_k = (x @ p for x, p in zip((query, key), projections(query, key, 4), strict=True))
    logits, wanted = few_q @ few_k.mT, query @ key.mT
    for b, h in product(range(2), range(2)):
        best = torch.linalg.svdvals(wanted[b, h])[4:].norm()
        assert best < (logits - wanted)[b, h].norm() < 1.03 * best
        close(found[b, h], block_sums((logits[b, h] / 4).softmax(-1), BLOCK, BLOCK))
    assert cost == pytest.approx(4 / 16 + 4 / 63 + 16 / 63)


def test_principal_dimensions_beside_one_that_outweighs_them():
    search = make_search(SMALL)
    query, key = (x.transpose(1, 2) + 10 for x in (search.query, search.key))
    few_q, few_k = (x @ p for x, p in zip((query, key), projections(query, key, 4), strict=True))
    wanted = query @ key.mT
    best = torch.linalg.svdvals(wanted)[..., 4:].norm(dim=-1)
    assert ((few_q @ few_k.mT - wanted).norm(dim=(-2, -1)) < 1.03 * best).all()


def test_principal_dimensions_of_keys_that_have_fewer():
    search = make_search(SMALL)
    few = search.key * (torch.arange(16) < 2)
    for key in (few, torch.zeros_like(few)):
        of_heads = search.query.transpose(1, 2), key.transpose(1, 2)
        few_q, few_k = (x @ p for x, p in zip(of_heads, projections(*of_heads, 4), strict=True))
        torch.testing.assert_close(few_q @ few_k.mT, of_heads[0] @ of_heads[1].mT)


@pytest.mark.parametrize("what", [torch.nan, torch.inf])
def test_principal_dimensions_of_keys_that_are_no_numbers_end_no_run(what):
    search = make_search(SMALL)
    search.key[0, 3, 0, 2] = what
    mass, _ = principal_mass(search, BLOCK, 4)
    assert mass[1].isfinite().all() and mass[0, 1].isfinite().all()


def test_principal_dimensions_of_long_keys_fit_into_float16():
    search = make_search(VideoGrid(16, 16, 16))
    query, key = (x + 16 * (torch.arange(16) < 4) for x in (search.query, search.key))
    exact = principal_mass(replace(search, query=query, key=key), 64, 4)[0]
    half = replace(search, query=query.half(), key=key.half())
    assert (principal_mass(half, 64, 4)[0] - exact).abs().max() < 0.1 * exact.max()


def test_rtpurbo_and_double_sparsity_keep_the_best_of_their_scores():
    search = make_search(own := VideoGrid(5, 8, 16))
    config = RTPurbo(density=0.99, share=0.6, dimensions=4, block_size=BLOCK, own_block=False)
    scores, _ = principal_mass(search, BLOCK, 4)
    for row, kept in zip(scores.flatten(0, 2), config.find(search).mask.flatten(0, 2)):
        ranked = sorted(range(own.num_blocks(BLOCK)), key=lambda j: -row[j])
        count = next(n for n in range(1, 21) if row[ranked[:n]].sum() >= 0.6 * row.sum() - 1e-5)
        assert indices(kept) == set(ranked[:count])
    config = DoubleSparsity(density=0.25, channels=4, block_size=BLOCK, own_block=False)
    scores, cost = score.channel_mass(search, BLOCK, 4)
    found = config.find(search)
    expected = torch.zeros_like(found.mask).scatter_(-1, scores.topk(5, -1).indices, True)
    assert found.mask.equal(expected) and found.cost == cost == 0.25


def test_sparsed_ranks_each_part_by_itself():
    grid = VideoGrid(5, 8, 16, text_tokens=64)  # 20 blocks of video, 2 of text
    search = make_search(grid)
    found = SparseD(density=0.3, block_size=BLOCK, own_block=False).find(search)
    mass, _ = score.exact_mass(search, BLOCK)
    for b, h, i in product(range(2), range(2), range(20)):
        best = sorted(range(20), key=lambda j: -mass[b, h, i, j])[:6]
        assert indices(found.mask[b, h, i]) == {*best, 20, 21}
    assert found.cost == 0.5
    assert SparseD().block_size == 64 and SparseD.as_published("LLaDA").block_size == 128


def test_sparsed_asks_for_no_rows_of_parts_that_a_video_has_not(monkeypatch):
    def top_k_rows(scores, *how):
        assert scores.shape[-1] > 0, "a kernel cannot launch for rows without blocks"
        return whole(scores, *how)

    whole = select.top_k_rows
    monkeypatch.setattr(select, "top_k_rows", top_k_rows)
    mask = SparseD(density=0.3, block_size=BLOCK, own_block=False).find(make_search()).mask
    assert mask.sum(-1).eq(2).all()  # of 6 blocks, all of them generated


# --------------------------------------------------------------------------- columns and diagonals


def test_columns_and_diagonals_equal_loops():
    mass, rows = torch.rand(1, 2, 5, 6), torch.tensor([0, 2, 2, 4, 5])
    sums, seen = torch.zeros(2, 11), torch.zeros(11)
    for r, j in product(range(5), range(6)):
        offset = 5 + j - int(rows[r])
        sums[:, offset] += mass[0, :, r, j]
        seen[offset] += 1
    close(slashes.diagonal_means(mass, rows)[0], sums / seen.clamp_min(1))
    close(
        slashes.column_means(mass)[0, 0], torch.stack([mass[0, 0, :, j].mean() for j in range(6)])
    )
    columns, diagonals = torch.rand(1, 2, 6) < 0.3, torch.rand(1, 2, 11) < 0.3
    found = slashes.columns_and_diagonals(columns, diagonals)
    for h, i, j in product(range(2), range(6), range(6)):
        assert found[0, h, i, j] == (columns[0, h, j] | diagonals[0, h, 5 + j - i])


def test_minference_tells_three_kinds_of_heads_apart():
    grid = VideoGrid(8, 8, 8)  # 512 tokens, 16 blocks
    block, generator = torch.arange(512) // BLOCK, torch.Generator().manual_seed(3)
    codes = F.normalize(torch.randn(16, 16, generator=generator), dim=-1) * 6
    one = torch.ones(512, 1) * codes[0]
    query = torch.stack([one, codes[block], codes[block]], 1)[None]  # (1, 512, 3, 16)
    key = query.clone()
    key[0, :, 0] = torch.where((block == 9)[:, None], codes[0], -codes[0])  # one column
    key[0, :, 1] = codes[(block + 5) % 16]  # one diagonal
    shuffled = torch.randperm(16, generator=generator)
    key[0, :, 2] = codes[shuffled[block]]  # one block a row, anywhere
    search = Search(query, key, None, grid, 0, value=key)
    config = MInference(density=0.25, block_size=BLOCK)
    mask = config.find(search).mask[0]
    assert mask[0, :, 9].all()
    assert all(mask[1, i, i - 5] for i in range(5, 16))
    pooled, _ = score.pooled_logits(search, BLOCK)
    assert all(mask[2, i, pooled[0, 2, i].argmax()] for i in range(16))


def test_the_first_keys_of_an_a_shape_count_beside_text():
    grid = VideoGrid(5, 8, 16, text_tokens=64)
    config = MInference(density=3 / 22, block_size=BLOCK)
    (mask,) = config.static(make_search(grid), config.forced(make_search(grid)))
    assert mask[0, 0, :20].sum(-1).eq(3).all()


def test_mminference_finds_the_same_place_in_all_frames():
    grid = VideoGrid(8, 8, 8)
    place = torch.arange(512) % 64
    query = (F.one_hot(place, 64) * 9.0)[None, :, None]
    search = Search(query, query, None, grid, 0, value=query)
    kept = {}
    weights = sampled.attention_of_rows(search, torch.arange(512))
    for method in (MInference, MMInference):
        mask = method(density=0.5, block_size=BLOCK).find(search).mask
        whole = mask.repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2)
        kept[method] = float((weights * whole).sum() / 512)
    halves = torch.arange(16) % 2
    assert mask[0, 0].equal(halves[:, None] == halves)
    assert kept[MMInference] > 0.99 and kept[MInference] <= kept[MMInference]


def test_divergence_equals_its_definition():
    first, second = torch.rand(3, 8).softmax(-1), torch.rand(3, 8).softmax(-1)
    second[:, 6:] = 0  # text
    for p, q, found in zip(first, second, flexprefill.divergence(first, second)):
        p, q = p[:6] / p[:6].sum(), q[:6] / q[:6].sum()
        mean = (p + q) / 2
        both = sum(float((x * (x / mean).log()).sum()) for x in (p, q))
        assert found.item() == pytest.approx(both / 2, abs=1e-6)


def test_divergence_of_what_is_alike_has_a_root():
    first = torch.rand(1000, 60)
    assert (flexprefill.divergence(first, first * 3).sqrt() < 0.01).all()


def test_flexprefill_takes_the_map_where_it_is_right_and_slashes_elsewhere():
    grid = VideoGrid(8, 8, 8)
    search = make_search(grid, batch=1, scale=1.0)
    flat = means(search.query[0, :, 0]), means(search.key[0, :, 0])
    search.query[0, :, 0] = flat[0].repeat_interleave(BLOCK, 0) * 6  # block means are exact
    search.key[0, :, 0] = flat[1].repeat_interleave(BLOCK, 0) * 6
    search.query[0, :, 1] *= 5.0  # and here they say little
    options = {"density": 0.9, "share": 0.7, "representatives": 2}
    config = FlexPrefill(**options, block_size=BLOCK, own_block=False)
    found = config.find(search)
    pooled, _ = score.pooled_map(search, BLOCK)
    ranked = pooled[0, 0].flatten().argsort(descending=True).tolist()
    values = pooled[0, 0].flatten()
    count = next(n for n in range(1, 257) if values[ranked[:n]].sum() >= 0.7 * 16 - 1e-4)
    assert indices(found.mask[0, 0].flatten()) >= set(ranked[: count - 1])
    assert indices(found.mask[0, 0].flatten()) <= set(ranked[: count + 1])
    places = sampled.sampled_places(grid, 2, CPU)
    blocks = (places // BLOCK).unique()
    rows = torch.cat([torch.arange(32 * i, 32 * i + 32) for i in blocks])
    weights = softmax_rows(search.query[0, rows, 1], search.key[0, :, 1], 16**-0.5)
    exact = block_sums(weights, BLOCK, BLOCK) / BLOCK
    close(flexprefill.mass_of_blocks(search, BLOCK, blocks)[0][0, 1], exact)
    columns = exact.mean(0)
    ranked = sorted(range(16), key=lambda j: -columns[j])
    count = next(n for n in range(1, 17) if columns[ranked[:n]].sum() >= 0.7 - 1e-6)
    for j in ranked[: min(count, 7)]:  # half of 14 blocks a row
        assert found.mask[0, 1, :, j].all()
    assert found.cost == pytest.approx(len(rows) / 1024 + 256 / (2 * 512**2))


def test_margins_over_anchors_equal_a_loop():
    search = make_search()
    found, cost = anchor.anchor_margins(search, BLOCK, step=2)
    for b, h in product(range(2), range(2)):
        q, k = search.query[b, :, h], search.key[b, :, h]
        margins = torch.zeros(6, 6)
        for i in range(6):
            rows = range(32 * i, min(32 * i + 32, 189))
            anchor_keys = [*range(32), *rows]
            largest = [max(float(q[r] @ k[n]) for n in anchor_keys) for r in rows]
            mean = q[rows.start : rows.stop].mean(0)
            for j in range(6):
                best = max(float(mean @ k[n]) for n in range(32 * j, min(32 * j + 32, 189)))
                margins[i, j] = (best - sum(largest) / len(largest)) / 4
        shared = torch.stack([margins[i // 2 * 2 : i // 2 * 2 + 2].amax(0) for i in range(6)])
        close(found[b, h], shared)
    assert cost == 6 / (2 * 189) + 32 / 189
    config = AnchorAttention(density=0.99, theta=2.0, step=2, block_size=BLOCK, own_block=False)
    mask = config.find(search).mask
    largest = found == found.amax(-1, keepdim=True)
    assert mask.equal((found >= -2.0) | largest)


def test_block_middles_are_raster_places():
    grid = VideoGrid(3, 7, 9, text_tokens=40, text_first=True)
    order = score.token_order(grid, "curve", BLOCK)[0]
    found = score.block_middles(grid, "curve", BLOCK)
    for block in range(1, 8):
        tokens = [t - 40 for t in range(32 * block, min(32 * block + 32, 229)) if t >= 40]
        assert found[block] == order[tokens[len(tokens) // 2]]
    assert block_pool(torch.ones(1, 229, 1, 1), BLOCK).shape[2] == len(found)

"""Selectors and methods against slow loops."""

import math
from dataclasses import replace

import pytest
import torch

from dit_sparse import (
    AdaSpa,
    Auto,
    DraftAttention,
    RandomBlocks,
    Rettention,
    SparseVDiT,
    VideoGrid,
    Window,
)
from dit_sparse.calibrate import ModeSearch
from dit_sparse.dense import dense_attention_with_lse
from dit_sparse.patterns import METHODS
from dit_sparse.patterns.score import exact_mass
from dit_sparse.patterns.search import Search
from dit_sparse.patterns.select import (
    blocks_of,
    forced_blocks,
    kept_share,
    most_blocks,
    quota_rows,
    segments_of,
    top_k_rows,
)


def make_search(grid, heads=4, batch=2):
    query, key = torch.randn(2, batch, grid.tokens, heads, 16) * 2
    _, lse = dense_attention_with_lse(query, key, key)
    return Search(query, key, lse, grid, layer=0)


def test_top_k_rows_equals_a_double_loop():
    scores = torch.rand(2, 3, 6, 6)
    kept = torch.tensor([[1, 2, 3], [4, 5, 6]])
    forced = torch.eye(6, dtype=torch.bool)
    mask = top_k_rows(scores, kept, forced)
    for b in range(2):
        for h in range(3):
            for row in range(6):
                others = sorted(set(range(6)) - {row}, key=lambda j: -scores[b, h, row, j])
                expected = {row, *others[: kept[b, h] - 1]}
                assert set(mask[b, h, row].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("text_first", [False, True])
def test_quota_rows_equals_a_double_loop(text_first):
    grid = VideoGrid(5, 8, 8, text_tokens=70, text_first=text_first, conditioning_frames=1)
    segments = segments_of(grid, 64, torch.device("cpu"))
    assert segments.tolist() == ([0, 0, 1, 2, 2, 2, 2] if text_first else [1, 2, 2, 2, 2, 0, 0])
    scores, forced = torch.rand(2, 3, 7, 7), torch.eye(7, dtype=torch.bool)
    kept = torch.randint(0, 4, (2, 3, 3))
    mask = quota_rows(scores, kept, segments, forced)
    for b, h, row in torch.cartesian_prod(*map(torch.arange, scores.shape[:3])).tolist():
        expected = {row}
        for segment in range(3):
            blocks = [j for j in range(7) if segments[j] == segment]
            blocks.sort(key=lambda j: (j != row, -scores[b, h, row, j]))
            expected.update(blocks[: kept[b, h, segment]])
        assert set(mask[b, h, row].nonzero().flatten().tolist()) == expected


def test_blocks_in_two_segments_count_to_the_first():
    """The kernel has no block that ends inside the sequence: one may hold video and text."""
    after = VideoGrid(3, 5, 7, text_tokens=10, conditioning_frames=1)  # 35, 70 and 10 tokens
    assert segments_of(after, 32, torch.device("cpu")).tolist() == [1, 1, 2, 0]
    before = VideoGrid(3, 5, 7, text_tokens=10, text_first=True, conditioning_frames=1)
    assert segments_of(before, 32, torch.device("cpu")).tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("method", [AdaSpa, Window])
def test_a_batch_of_both_branches_gives_the_masks_of_two_calls(method):
    search = make_search(VideoGrid(5, 8, 16, text_tokens=20), batch=2)
    config = method(density=0.3)
    both = config.find(search).mask
    for i in range(2):
        query, key, lse = (x[i : i + 1] for x in (search.query, search.key, search.lse))
        alone = config.find(replace(search, query=query, key=key, lse=lse)).mask
        assert alone[0].equal(both[i if len(both) > 1 else 0])


def test_forced_blocks_are_own_and_text():
    forced = forced_blocks(VideoGrid(2, 8, 8, text_tokens=10), 64, torch.device("cpu"))
    assert forced.tolist() == [[True, False, True], [False, True, True], [True, True, True]]
    grid, device = VideoGrid(2, 8, 8, text_tokens=10, conditioning_frames=1), torch.device("cpu")
    rows = forced_blocks(grid, 64, device, text_queries=False)
    assert rows.tolist() == [[True, True, True], [True, True, True], [True, False, True]]


@pytest.mark.parametrize("method", [AdaSpa, RandomBlocks, Window])
def test_every_row_keeps_its_own_block_and_the_density_is_near_what_was_asked(method):
    grid = VideoGrid(5, 16, 16)
    mask = method(density=0.3).find(make_search(grid)).mask
    assert mask.diagonal(dim1=-2, dim2=-1).all()
    assert mask.float().mean().item() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("method", [AdaSpa, RandomBlocks, Window])
def test_text_attends_and_is_attended(method):
    grid = VideoGrid(5, 16, 16, text_tokens=30, text_first=True)
    mask = method(density=0.2).find(make_search(grid)).mask
    assert mask[..., 0].all() and mask[..., 0, :].all()


def test_text_chooses_like_the_rest_where_a_tail_tells_it_what_it_skips():
    grid = VideoGrid(5, 16, 16, text_tokens=30, text_first=True)
    mask = Auto(density=0.2).find(make_search(grid)).mask
    assert mask[..., 0].all() and mask.diagonal(dim1=-2, dim2=-1).all()
    assert mask[..., 0, :].float().mean() == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize("method", [AdaSpa, RandomBlocks, Window])
def test_conditioning_frames_attend_and_are_attended_within_the_budget(method):
    options = {"density": 0.5} | ({"head_adaptive": False} if method is AdaSpa else {})
    search = make_search(VideoGrid(8, 8, 16, conditioning_frames=2))
    mask = method(**options).find(search).mask
    assert mask[..., :4].all() and mask[..., :4, :].all()
    assert (mask[..., 4:, :].sum(-1) == 8).all()  # half of 16 blocks, 4 of them forced


def test_adaspa_uniform_keeps_the_heaviest_blocks_of_every_row():
    search = make_search(VideoGrid(5, 8, 16))
    config = AdaSpa(density=0.3, head_adaptive=False)
    found = config.find(search)
    mass, _ = exact_mass(search, 64)
    rows = [sum(sorted(row)[-3:]) for row in mass.flatten(0, 2).tolist()]  # 3 of 10 blocks
    heaviest = torch.tensor(rows).view(mass.shape[:3])
    own = mass.diagonal(dim1=-2, dim2=-1)
    kept = (mass * found.mask).sum(-1)
    is_top = mass.topk(3, -1).indices.eq(torch.arange(10).view(10, 1)).any(-1)
    torch.testing.assert_close(kept[is_top], heaviest[is_top])
    assert (kept >= own).all()
    torch.testing.assert_close(found.kept_mass, kept_share(mass, found.mask).mean(0))


def test_adaspa_levels():
    config = AdaSpa(density=0.2)
    recall = torch.tensor([[0.9, 0.5, 0.6, 0.7]])
    torch.testing.assert_close(config.head_densities(recall), torch.tensor([[0.1, 0.3, 0.2, 0.2]]))
    crowded = config.head_densities(torch.tensor([[0.9, 0.95, 0.85, 0.99]]))
    assert sorted(crowded[0].tolist()) == pytest.approx([0.1, 0.1, 0.3, 0.3])


def test_adaspa_keeps_the_mean_density():
    config = AdaSpa(density=0.2)
    assert config.head_densities(torch.rand(3, 24)).mean(1).tolist() == pytest.approx([0.2] * 3)


def test_adaspa_keeps_more_mass_than_a_random_mask():
    search = make_search(VideoGrid(5, 16, 16))
    mass, _ = exact_mass(search, 64)
    exact, random = (
        kept_share(mass, method(density=0.2).find(search).mask).mean()
        for method in (AdaSpa, RandomBlocks)
    )
    assert exact > random + 0.02


def test_window_keeps_the_nearest_blocks():
    mask = Window(density=0.25, order="raster").find(make_search(VideoGrid(8, 8, 8))).mask[0, 0]
    assert mask[0].tolist() == [True, True] + [False] * 6
    assert mask[4].sum() == 2


@pytest.mark.parametrize("density", [0.01, 0.1, 0.2, 1 / 3, 0.5, 2 / 3, 0.99, 1.0])
@pytest.mark.parametrize("blocks", [1, 7, 68, 929, 1858])
def test_a_bound_known_without_the_gpu_changes_no_mask(density, blocks):
    kept = blocks_of(torch.tensor([[density * 0.5, density]]), blocks)
    most = most_blocks(density, blocks)
    assert kept.max() <= most <= blocks
    if blocks <= 68:
        scores = torch.rand(1, 2, blocks, blocks)
        forced = torch.eye(blocks, dtype=torch.bool)
        asked = top_k_rows(scores, kept, forced)
        assert top_k_rows(scores, kept, forced, most).equal(asked)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"density": 0}, "density=0.2"),
        ({"density": 2}, "in \\(0, 1\\], got 2"),
        ({"density": "0.2"}, "got '0.2'"),
        ({"order": "hilbert"}, "raster, tile, curve, patch"),
        ({"block_size": 48}, "32, 64, 128"),
        ({"engine": "cuda"}, "auto, triton, fa4, flex, torch"),
        ({"search_at": (0.6, 0.2)}, "increasing"),
        ({"search_at": ()}, "increasing"),
        ({"search_at": (1.0,)}, "in \\[0, 1\\)"),
        ({"density": math.nan}, "got nan"),
        ({"block_size": 64.0}, "32, 64, 128, got 64.0"),
        ({"every_step": "no"}, "every_step is True or False, got 'no'"),
        ({"own_block": 1}, "own_block is True or False"),
        ({"recall_threshold": "abc"}, "0 to 1, got 'abc'"),
        ({"recall_threshold": 80}, "0 to 1, got 80"),
        ({"head_adaptive": "no"}, "head_adaptive is True or False"),
    ],
)
def test_bad_options_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        AdaSpa(**options)


@pytest.mark.parametrize(
    "method, options, message",
    [
        (RandomBlocks, {"seed": "x"}, "seed is a whole number"),
        (RandomBlocks, {"seed": -1}, "of at least 0, got -1"),
        (Window, {"time_scale": math.nan}, "time_scale must be a number above 0, got nan"),
        (Window, {"time_scale": math.inf}, "above 0, got inf"),
        (Rettention, {"ramp": math.nan}, "at least 0, got nan"),
        (Rettention, {"ramp": math.inf}, "at least 0, got inf"),
        (Rettention, {"time_scale": 0}, "time_scale must be a number above 0, got 0"),
        (Rettention, {"cache_device": "gpu"}, "cache_device must be one of model, cpu, got 'gpu'"),
        (Rettention, {"clamp": "no"}, "clamp is True or False"),
        (Rettention, {"pool": 0}, "pool is a whole number"),
        (DraftAttention, {"row_floor": 1.5}, "row_floor is a whole number"),
        (SparseVDiT, {"table": 5}, "table is the name of a file, got 5"),
        (ModeSearch, {"weight": math.nan}, "weight is a number of at least 0, got nan"),
        (ModeSearch, {"epsilon": "x"}, "epsilon is a number of at least 0, got 'x'"),
        (ModeSearch, {"order": "hilbert"}, "raster, tile, curve, patch"),
    ],
)
def test_bad_options_of_other_methods(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


@pytest.mark.parametrize("name", METHODS)
def test_no_method_takes_a_density_above_1(name):
    with pytest.raises(ValueError, match="in \\(0, 1\\], got 2"):
        METHODS[name](density=2)


def test_random_blocks_differ_between_layers_and_searches():
    config = RandomBlocks(density=0.3)
    search = make_search(VideoGrid(4, 8, 16))
    first, layer, step, again = (
        config.find(replace(search, layer=layer, step=step)).mask
        for layer, step in ((0, 2), (1, 2), (0, 7), (0, 2))
    )
    assert again.equal(first) and not layer.equal(first) and not step.equal(first)
    assert not RandomBlocks(density=0.3, seed=2**64).find(search).mask.equal(first)


def test_a_window_plans_one_mask_for_all_heads():
    shape = (2, 640, 8, 64)
    found = Window(density=0.3).find(make_search(VideoGrid(4, 8, 16))).mask
    assert found.shape[:2] == (1, 1)
    assert Window().cache_bytes(shape, 2) == 10 * 2
    assert RandomBlocks().cache_bytes(shape, 2) == 2 * 8 * 10 * 2


def test_rettention_plans_a_mask_rho_and_the_means_of_the_residual():
    config, dense, sparse = (
        Rettention(pool=7),
        torch.randn(2, 640, 4, 16),
        torch.zeros(2, 640, 4, 16),
    )
    kept = config.correction(dense, torch.zeros(2, 4, 640), sparse, torch.zeros(2, 4, 640))
    assert config.cache_bytes(dense.shape, 4) == 10 * 2 + kept.nbytes()

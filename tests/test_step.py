"""One layer without a model: what it runs, keeps and tells."""

import pytest
import torch

from dit_sparse import AdaSpa, Auto, Rettention, Window
from dit_sparse.dense import dense_attention_with_lse
from dit_sparse.grid import VideoGrid
from dit_sparse.state import Call, State
from dit_sparse.step import LayerAttention, permute_video

GRID, CPU = VideoGrid(2, 8, 8), torch.device("cpu")
OPTIONS = {"density": 0.5, "block_size": 32, "search_at": 0.0}


def layer_of(config, layer=0, layers=1, measure=False):
    state = State(layers=layers, shares=config.share_guidance)
    found = LayerAttention(state, config, layer, measure)
    found.dense = lambda query, key, value, kv_len: dense_attention_with_lse(query, key, value)[0]
    return found


def run(layer, step, batch=1, branch="cond", tokens=128, steps=4):
    layer.state.begin(Call(GRID, step, steps, branch, CPU, torch.float32, batch=batch))
    query, key, value = torch.randn(3, batch, tokens, 2, 16).unbind(0)
    output = layer(query, key, value)
    assert output.shape == query.shape and output.isfinite().all()
    return output, (query, key, value)


def kinds(layer):
    return [record.kind for record in layer.state.trace]


def trace_of(config):
    layer = layer_of(config)
    for step in (0, 1):
        run(layer, step)
    return layer.state.trace


@pytest.mark.parametrize("config", [AdaSpa, Rettention, Auto])
def test_a_batch_that_grows_or_shrinks_inside_a_run_searches_again(config):
    layer = layer_of(config(**OPTIONS))
    for step, batch in enumerate((2, 2, 1, 1)):
        run(layer, step, batch)
    assert kinds(layer) == ["search", "reuse", "search", "reuse"]


def test_a_mask_for_all_samples_serves_any_batch():
    layer = layer_of(Window(**OPTIONS))
    for step, batch in enumerate((2, 1, 3)):
        run(layer, step, batch)
    assert kinds(layer) == ["search", "reuse", "reuse"]


def test_leading_layers_stay_dense_and_say_so():
    config = Window(**OPTIONS, dense_layers=1)
    first, second = layer_of(config, 0), layer_of(config, 1)
    output, given = run(first, 0)
    assert output.equal(first.dense(*given, None)) and kinds(first) == ["dense"]
    run(second, 0)
    assert kinds(second) == ["search"]


def test_as_many_bytes_as_are_kept_are_allowed_and_one_less_is_refused():
    plain = layer_of(AdaSpa(**OPTIONS), layers=3)
    run(plain, 0)
    planned = plain.state.planned_bytes
    assert planned == 3 * plain.state.peak_bytes > 0
    enough = layer_of(AdaSpa(**OPTIONS, max_cache_bytes=2 * planned), layers=3)
    short = layer_of(AdaSpa(**OPTIONS, max_cache_bytes=2 * planned - 1), layers=3)
    for layer in (enough, short):
        run(layer, 0)
    run(enough, 0, branch="uncond")
    assert enough.state.planned_bytes == 2 * planned
    with pytest.raises(MemoryError, match="raise it, or make the batch or video smaller"):
        run(short, 0, branch="uncond")


def test_another_number_of_tokens_than_was_told_is_refused():
    layer = layer_of(Window(**OPTIONS))
    with pytest.raises(RuntimeError, match="told of 128 tokens and got 96"):
        run(layer, 0, tokens=96)
    layer.state.call = None
    with pytest.raises(RuntimeError, match="told of no call and got 128"):
        layer(*torch.randn(3, 1, 128, 2, 16).unbind(0))


def test_the_mass_of_a_search_is_measured_where_it_is_not_known():
    """A window searches without a dense call; rows that are measured cost half of their share."""
    layer = layer_of(Window(**OPTIONS), measure=True)
    for step in (0, 1):
        run(layer, step)
    for record in layer.state.trace:
        assert 0 < float(record.kept_mass.min()) < float(record.kept_mass.max()) < 1
        assert record.extra_cost == pytest.approx(64 / 128 * 0.5)
    assert all(record.kept_mass is None for record in trace_of(Window(**OPTIONS)))


def test_a_refresh_costs_dense_and_sparse_attention_and_knows_the_mass_of_its_mask():
    search, reuse = trace_of(Rettention(**OPTIONS))
    kept = reuse.density.mean()
    assert search.density is None and float(search.extra_cost) == pytest.approx(float(kept))
    assert search.kept_mass.shape == (2,) and 0.3 < float(search.kept_mass.mean()) < 0.9
    assert reuse.kept_mass is None and reuse.extra_cost == 0


def test_a_tail_is_counted_at_every_sparse_call():
    search, reuse = trace_of(Auto(**OPTIONS, residual=None, tail_tokens=16))
    assert float(search.extra_cost) == pytest.approx(0.125 + 1 / 16)
    assert float(reuse.extra_cost) == pytest.approx(1 / 16)


@pytest.mark.parametrize("text_first", [False, True])
def test_only_video_tokens_change_places(text_first):
    grid = VideoGrid(1, 1, 4, text_tokens=2, text_first=text_first)
    x, index = torch.arange(6).view(1, 6, 1, 1), torch.tensor([3, 2, 1, 0])
    found = permute_video(x, index, grid).flatten().tolist()
    assert found == ([0, 1, 5, 4, 3, 2] if text_first else [3, 2, 1, 0, 4, 5])
    assert x.flatten().tolist() == list(range(6))

"""One layer without a model: what it runs, keeps and tells."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from dit_sparse import AdaSpa, Auto, Rettention, Window, sparse_attention
from dit_sparse.dense import dense_attention_with_lse
from dit_sparse.grid import VideoGrid
from dit_sparse.state import Call, State
from dit_sparse.step import LayerAttention, inverse, permute_video
from dit_sparse.tail import add_tail

GRID, CPU = VideoGrid(2, 8, 8), torch.device("cpu")
OPTIONS = {"density": 0.5, "block_size": 32, "search_at": 0.0}


def layer_of(config, layer=0, layers=1, measure=False):
    state = State(layers=layers, shares=config.share_guidance)
    found = LayerAttention(state, config, layer, measure)
    found.dense = lambda query, key, value, kv_len: dense_attention_with_lse(query, key, value)[0]
    return found


def run(layer, step, batch=1, branch="cond", tokens=128, guided=False):
    call = Call(GRID, step, 4, branch, CPU, torch.float32, batch=batch, guided=guided)
    layer.state.begin(call)
    query, key, value = torch.randn(3, batch, tokens, 2, 16).unbind(0)
    output = layer(query, key, value)
    assert output.shape == query.shape and output.isfinite().all()
    return output, (query, key, value)


def kinds(layer):
    return [record.kind for record in layer.state.trace]


def trace_of(config, steps=2):
    layer = layer_of(config)
    for step in range(steps):
        run(layer, step)
    return layer.state.trace


@pytest.mark.parametrize(
    "config",
    [AdaSpa(**OPTIONS), Rettention(**OPTIONS), Auto(**OPTIONS), Auto(**OPTIONS, residual=None)],
)
def test_a_batch_that_shrinks_inside_a_run_searches_again(config):
    layer = layer_of(config)
    for step, batch in enumerate((2, 2, 1, 1)):
        run(layer, step, batch)
    assert kinds(layer) == ["search", "reuse", "search", "reuse"]


def test_a_mask_for_all_samples_serves_any_batch():
    layer = layer_of(Window(**OPTIONS))
    for step, batch in enumerate((2, 1, 3)):
        run(layer, step, batch)
    assert kinds(layer) == ["search", "reuse", "reuse"]


def test_a_reuse_attends_to_the_blocks_of_its_mask_and_a_tail_is_added_where_the_method_has_one():
    for config in (Window(**OPTIONS), Auto(**OPTIONS, residual=None, tail_tokens=16)):
        layer = layer_of(config)
        run(layer, 0)
        output, given = run(layer, 1)
        mask = layer.state.kept["cond", 0].mask
        expected, lse = sparse_attention(*given, mask, return_lse=True)
        if config.tail:
            expected, _ = add_tail(expected, lse, *given, mask, tail_tokens=16)
        assert output.equal(expected)


@pytest.mark.parametrize("config", [Rettention, partial(Auto, residual="model")])
def test_a_correction_makes_up_for_all_that_is_lacking_at_the_next_step(config):
    layer = layer_of(config(**OPTIONS | {"search_at": 0.25}))
    for step in range(3):
        torch.manual_seed(0)
        output, given = run(layer, step)
    assert kinds(layer) == ["dense", "search", "reuse"]
    torch.testing.assert_close(output, layer.dense(*given, None), atol=1e-5, rtol=0)


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


def test_a_later_search_takes_the_log_sum_exp_of_the_first_and_tells_no_mass():
    first, _, later = trace_of(AdaSpa(**OPTIONS | {"search_at": (0.0, 0.5)}), steps=3)
    assert first.density is None and first.kept_mass is not None
    assert later.kind == "search" and later.density is not None and later.kept_mass is None
    assert first.extra_cost == later.extra_cost == 0.5


def test_one_search_for_both_prompts_of_a_guided_batch_costs_half():
    layer = layer_of(Auto(**OPTIONS, residual=None))
    run(layer, 0, batch=2, guided=True)
    (record,) = layer.state.trace
    assert float(record.extra_cost) == pytest.approx(0.125 / 2 + 1 / 32)


def test_a_tail_is_counted_at_every_sparse_call():
    search, reuse = trace_of(Auto(**OPTIONS, residual=None, tail_tokens=16))
    assert float(search.extra_cost) == pytest.approx(0.125 + 1 / 16)
    assert float(reuse.extra_cost) == pytest.approx(1 / 16)


def test_at_the_first_step_room_is_left_for_the_residuals_of_a_second_branch():
    config, shape = Auto(**OPTIONS | {"search_at": (0.0, 0.5)}), (1, 128, 2, 16)
    one = config.cache_bytes(shape, 4) + config.correction_bytes(shape, 4)
    layer = layer_of(replace(config, max_cache_bytes=2 * one - 1))
    for step in range(3):
        run(layer, step)
    sparse, _, dense = layer.state.trace
    assert sparse.kind == dense.kind == "search"
    assert sparse.density is not None and dense.density is None  # nobody came for the room


def test_only_a_run_that_will_gain_nothing_is_warned_of(caplog):
    """Of 4 steps 2 are dense, a refresh is 0.125 + 1 + 17 / 32, a reuse 17 / 32: the tail, too."""
    options = OPTIONS | {"search_at": 0.5}
    run(layer_of(Auto(**options), layers=2), 0)
    assert "1.05 times that of dense" in caplog.text
    caplog.clear()
    run(layer_of(Auto(**options | {"density": 0.1}), layers=2), 0)
    run(layer_of(Auto(**options), layers=2), 1)  # nor later than at the first step
    assert not caplog.text


@pytest.mark.parametrize("text_first", [False, True])
def test_only_video_tokens_change_places(text_first):
    grid = VideoGrid(1, 1, 4, text_tokens=2, text_first=text_first)
    x, index = torch.arange(6).view(1, 6, 1, 1), torch.tensor([3, 2, 1, 0])
    found = permute_video(x, index, grid).flatten().tolist()
    assert found == ([0, 1, 5, 4, 3, 2] if text_first else [3, 2, 1, 0, 4, 5])
    assert x.flatten().tolist() == list(range(6))


def test_the_inverse_of_an_order_undoes_it():
    order = [2, 0, 3, 1]
    assert [order[i] for i in inverse(order)] == [0, 1, 2, 3]

"""Budgets shared by heads and layers against greedy loops; when to refresh; what it costs."""

from dataclasses import replace

import pytest
import torch
from test_tail import make_search
from test_wan import generate
from tiny import tiny_wan

from dit_sparse import Auto, BlockMask, VideoGrid, enable_sparse_attention, sparse_attention
from dit_sparse.dense import dense_attention_with_lse
from dit_sparse.drift import Drift
from dit_sparse.measure import sampled_error
from dit_sparse.patterns import budgets
from dit_sparse.patterns.budgets import always_kept, gains_of, share_of, spend, tail_loss
from dit_sparse.patterns.search import Search
from dit_sparse.tail import add_tail

GRID = VideoGrid(5, 8, 16)  # 640 tokens, 20 blocks of 32
REST = {"density": 0.2, "block_size": 32}


def greedy(curves, total, least, most):
    """One block at a time to the head whose next one brings most; `curves` (heads, N) falling."""
    taken = [least] * len(curves)
    for _ in range(total - sum(taken)):
        open_heads = [h for h in range(len(curves)) if taken[h] < most]
        best = max(open_heads, key=lambda h: float(curves[h, taken[h]]))
        taken[best] += 1
    return taken


def test_spending_is_greedy_within_floor_and_cap():
    scores = torch.rand(2, 3, 20, 20) ** torch.tensor([1.0, 4.0, 9.0])[:, None, None]
    forced = torch.eye(20, dtype=torch.bool)
    gains = gains_of(scores, forced, kept=6, always=1)
    curves = scores.masked_fill(forced, 0).sort(-1, descending=True).values.mean(-2)
    taken = spend(gains, torch.tensor([15, 15]))
    for sample in range(2):
        assert taken[sample].tolist() == greedy(curves[sample], 15, least=2, most=11)
    assert (taken.sum(1) == 15).all() and taken.unique().numel() > 1


def test_a_budget_that_no_head_may_take_is_left():
    gains = gains_of(torch.rand(1, 2, 8, 8), torch.eye(8, dtype=torch.bool), kept=2, always=1)
    assert spend(gains, torch.tensor([100])).tolist() == [[3, 3]]


def test_layers_share_what_all_of_them_have():
    former = tuple(torch.rand(2, 3, 20).sort(-1, descending=True).values * s for s in (1, 0.1))
    found = torch.stack([share_of(layer, former, 4) for layer in range(2)], 1)
    assert (found.sum(1) == 2 * 3 * 4).all() and (found[:, 0] > found[:, 1]).all()


@pytest.mark.parametrize("rank", ["mass", "loss"])
@pytest.mark.parametrize("text", [0, 40])
def test_uneven_heads_cost_what_even_ones_cost(rank, text):
    grid = replace(GRID, text_tokens=text)
    search = make_search(grid)
    flat = torch.tensor([0.2, 1.0])[:, None]  # the first head attends to everything alike
    search = replace(search, query=search.query * flat, value=search.key)
    even, uneven = (
        Auto(**REST, rank=rank, budget=budget).find(search).mask for budget in ("even", "heads")
    )
    assert uneven.sum() <= even.sum() and uneven.sum() > 0.97 * even.sum()
    rows = uneven.sum(-1)
    assert (rows[:, 0] != rows[:, 1]).any() and rows.min() >= always_kept(grid, 32, True)


def test_budgets_by_loss_bring_outputs_nearer_to_dense():
    """Heads of very different sharpness."""
    query, key, value = torch.randn(3, 1, 640, 4, 16)
    key, value = (x + torch.randn(1, 20, 4, 16).repeat_interleave(32, 1) for x in (key, value))
    query = query * torch.tensor([0.1, 0.5, 1.0, 2.0])[:, None]
    search = Search(query, key, None, GRID, layer=0, value=value)
    dense, _ = dense_attention_with_lse(query, key, value)
    errors = {}
    for budget in ("even", "heads"):
        found = Auto(**REST, rank="loss", budget=budget).find(search)
        mask = BlockMask.from_dense(found.mask, 640, 640, (32, 32))
        part = sparse_attention(query, key, value, mask, return_lse=True)
        errors[budget] = (add_tail(*part, query, key, value, mask)[0] - dense).norm()
    assert errors["heads"] < 0.97 * errors["even"]


def test_the_tail_loses_nothing_where_keys_or_values_of_a_block_are_alike():
    search = make_search(GRID)
    values = torch.randn(2, 640, 2, 16)
    loss = tail_loss(replace(search, value=values), 32)
    alike = values.clone()
    alike[:, 32:64] = 1.5
    found = tail_loss(replace(search, value=alike), 32)
    assert loss.shape == (2, 2, 1, 20) and (found[..., 1] < 1e-2 * loss[..., 1]).all()
    torch.testing.assert_close(found[..., 2:], loss[..., 2:])
    blocks = values.unflatten(1, (20, 32))
    apart = (blocks - blocks.mean(2, keepdim=True)).square().sum((2, 4)).div(32).sqrt()
    torch.testing.assert_close(budgets.spread(values, 32), apart.transpose(1, 2))


def test_falling_densities_have_the_mean_that_was_asked_for():
    config = Auto(density=0.2, search_at=(0.2, 0.4, 0.6), falling=True)
    of_steps = [config.density_at(step, 20) for step in range(4, 20)]
    assert sum(of_steps) / 16 == pytest.approx(0.2)
    assert of_steps[0] == pytest.approx(3 * of_steps[-1])
    assert {Auto(density=0.2).density_at(step, 20) for step in range(4, 20)} == {0.2}


# ---------------------------------------------------------------------------------------- refreshes


def test_the_error_of_sampled_rows_is_that_of_all_where_there_are_few():
    query, key, value, output = torch.randn(4, 2, 60, 3, 16)
    valid = torch.tensor([60, 40])
    dense, _ = dense_attention_with_lse(query, key, value, valid)
    found = sampled_error(query, key, value, output, valid)
    expected = [(output - dense).square().sum((0, 1, 3)), dense.square().sum((0, 1, 3))]
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-4, atol=1e-4)


def test_layers_refresh_together_and_no_more_often_than_is_allowed():
    drift = Drift(errors=[torch.tensor(0.1), torch.tensor(0.3)])
    drift.judge(4, limit=0.25, most=1)
    assert not drift.due and not drift.errors  # the mean is 0.2
    drift.errors += [torch.tensor(0.1), torch.tensor(0.5)]
    drift.judge(5, limit=0.25, most=1)
    drift.judge(5, limit=0.25, most=1)  # another layer of the same step
    assert drift.due and drift.spent == 1
    drift.errors += [torch.tensor(5.0)]
    drift.judge(6, limit=0.25, most=1)
    assert not drift.due and drift.spent == 1


@pytest.mark.parametrize(("drift", "refreshes"), [(1e-6, 2), (1.0, 0)])
def test_layers_refresh_when_they_drift_and_the_cost_is_counted(drift, refreshes):
    pipe = tiny_wan()
    options = {"density": 0.3, "block_size": 32, "search_at": (0.2, 0.5, 0.8), "drift": drift}
    handle = enable_sparse_attention(pipe, "auto", **options)
    call = {"steps": 12}
    first = generate(pipe, **call)
    trace = handle.report().trace
    searches = [e["step"] for e in trace if e["kind"] == "search" and e["branch"] == "cond"]
    assert len(searches) == 2 * (1 + refreshes)  # two layers
    cost = handle.report().effective_cost
    assert generate(pipe, **call).equal(first)
    with enable_sparse_attention(pipe, "auto", **options | {"drift": None}) as fixed:
        generate(pipe, **call)
        reuses = handle.report().reuse_calls / (12 * 2 * 2)
        assert cost <= fixed.report().effective_cost + reuses * 64 / 108 + 1e-6


@pytest.mark.parametrize("budget", ["heads", "layers"])
def test_shared_budgets_run_and_cost_no_more(budget):
    pipe, found = tiny_wan(), {}
    options = {"density": 0.5, "block_size": 32, "search_at": (0.2, 0.6), "residual": None}
    for how in ("even", budget):
        with enable_sparse_attention(pipe, "auto", budget=how, rank="loss", **options) as handle:
            assert generate(pipe).isfinite().all()
            found[how] = handle.report()
    assert found[budget].effective_cost <= found["even"].effective_cost + 1e-6
    assert not handle._installed[0].state.gains and not handle._installed[0].state.former


def test_what_auto_refuses():
    with pytest.raises(ValueError, match="rank is one of mass, loss and budget one of even"):
        Auto(rank="size")
    with pytest.raises(ValueError, match="drift is a share"):
        Auto(drift=2)

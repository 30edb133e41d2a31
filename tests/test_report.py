"""The report's figures against sums by hand."""

import pytest
import torch

from dit_sparse.report import COSTLY, NOTHING_RAN, make_report
from dit_sparse.state import Record, State

LOW, HIGH = torch.tensor([0.25, 0.5]), torch.tensor([0.5, 0.75])


def report(*states, layers=1, notes=(), **config):
    return make_report("adaspa", config, list(states), [layers] * len(states), list(notes))


def state(*records, **fields):
    """One layer's calls: kind, density, kept mass and further cost of each step."""
    trace = [Record("cond", step, 0, *record) for step, record in enumerate(records)]
    return State(trace=trace, parts_in_all=len(records), **fields)


def test_cost_is_that_of_all_calls_over_as_many_dense_ones():
    records = (
        ("dense", None, None),
        ("search", None, HIGH, torch.tensor(0.5)),  # its output is dense
        ("reuse", LOW, None, 0.125),
        ("reuse", HIGH, None),
    )
    found = report(state(*records))
    assert found.effective_cost == pytest.approx((1 + 1.5 + 0.375 + 0.125 + 0.625) / 4)
    assert found.density == pytest.approx((0.375 + 0.625) / 2)
    assert (found.dense_calls, found.search_calls, found.reuse_calls) == (1, 1, 2)
    assert found.steps == 4 and len(found.trace) == 4 and not found.notes
    assert found.trace[2]["density"] == [0.25, 0.5] and found.trace[2]["kept_mass"] is None
    outside = report(state(*records, parts_outside=2), layers=2)  # one more layer, not ours
    assert outside.effective_cost == pytest.approx((3.625 + 2) / 8)


def test_kept_mass_is_that_of_sparse_calls_where_it_was_measured_in_them():
    searched, reused = ("search", None, HIGH), ("reuse", LOW, None)
    assert report(state(searched, reused)).kept_mass == pytest.approx(0.625)
    measured = ("reuse", LOW, LOW)
    assert report(state(searched, measured)).kept_mass == pytest.approx(0.375)
    assert report(state(("dense", None, None), reused)).kept_mass is None


def test_transformers_are_summed_up():
    first = state(("dense", None, None), engines={"triton"}, peak_bytes=3, planned_bytes=5)
    second = state(("reuse", LOW, None), engines={"fa4"}, peak_bytes=4, planned_bytes=6)
    both = report(first, second)
    assert both.effective_cost == pytest.approx(1.375 / 2) and both.steps == 1
    assert both.engines == ["fa4", "triton"]
    assert (both.peak_cache_bytes, both.planned_cache_bytes) == (7, 11)


def test_each_note_is_told_once_and_costly_runs_and_idle_transformers_are():
    dear = report(state(("search", None, None, 0.5), notes=["a", "b"]), state(notes=["b"]))
    assert dear.notes == ["a", "b", COSTLY.format(1.5)]
    assert report(state(("dense", None, None), dense_because="why")).notes == ["why"]
    idle = report(state(), notes=["first"])
    assert idle.notes == ["first", NOTHING_RAN] and idle.effective_cost == 0
    assert "effective cost  - of" in str(idle) and "density         - of" in str(idle)
    nowhere = report(notes=["first"])  # as with DIT_SPARSE=0
    assert nowhere.notes == ["first"] and nowhere.effective_cost == 1


def test_printed_it_says_what_is_on_the_cpu():
    one = state(("reuse", LOW, LOW), peak_bytes=3 * 2**19)
    assert "cache           1.50 MiB at most, corrections on the CPU" in str(
        report(one, cache_device="cpu")
    )
    printed = str(report(one, notes=["a note"], cache_device="model"))
    assert "at most\nnote            a note" in printed and "kept mass       37.5%" in printed
    assert "0 dense, 0 searches, 1 reuses in 1 steps" in printed and "engine          -" in printed

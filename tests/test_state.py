"""What is kept between steps lasts as long as its run, and the log until the next begins."""

from types import SimpleNamespace

import pytest
import torch

from dit_sparse.block_mask import BlockMask
from dit_sparse.grid import VideoGrid
from dit_sparse.patterns.correct import Correction
from dit_sparse.state import Call, Kept, Record, State

CPU = torch.device("cpu")


def call(step, branch="cond", frames=2, steps=10, dtype=torch.float32, guided=False):
    return Call(VideoGrid(frames, 8, 8), step, steps, branch, CPU, dtype, guided=guided)


def kept(lse=None, correction=None):
    return Kept(BlockMask.full(128, 128), lse, None, 5, correction)


def state_at(*calls, **fields):
    state = State(**fields)
    for done in calls:
        state.begin(done)
        state.keep(0, kept())
    return state


@pytest.mark.parametrize(
    ("second", "lasts"),
    [
        (call(6), True),
        (call(9), True),  # a cache left out what lies between
        (call(5, "uncond"), True),
        (call(5, "uncond", frames=3), True),  # their texts may differ in length
        (call(5), False),
        (call(4), False),
        (call(4, "uncond"), False),
        (call(6, frames=3), False),
        (call(6, steps=11), False),
        (call(6, dtype=torch.bfloat16), False),
    ],
)
def test_another_run_or_shape_drops_what_is_kept(second, lasts):
    state = state_at(call(5))
    state.heads["cond", 0] = [1, 0]
    assert state.begin(second) == (not lasts)
    assert state.call is second and state.last[second.branch] is second
    assert bool(state.kept) == bool(state.heads) == lasts
    assert state.calls == (2 if lasts else 1)


def test_the_log_is_emptied_when_the_next_run_begins_and_no_sooner():
    state = state_at(call(5), masks={}, layers=3)
    state.trace.append(Record("cond", 5, 0, "dense", None, None))
    state.engines.add("torch")
    state.notes.append("a note")
    state.planned_bytes, state.parts_outside, state.dense_because = 7, 1, "it is faster"
    assert state.masks and state.peak_bytes
    state.drop()
    assert state.trace and state.peak_bytes and state.notes and state.masks and state.calls == 1
    first = call(0)
    state.begin(first)
    begun = {"call": first, "last": {"cond": first}, "calls": 1, "parts_in_all": 1}
    assert state == State(masks={}, layers=3, **begun)
    assert state_at(first).masks is None  # nobody asked for them


def test_a_guided_batch_that_shares_all_counts_as_two_calls():
    state = state_at(call(0, guided=True), call(1), shares="all")
    assert state.calls == 2 and state.parts_in_all == 3
    assert state_at(call(0, guided=True), shares="mask").parts_in_all == 1


def test_the_largest_size_is_that_of_everything_that_was_kept_at_once():
    lse = torch.zeros(1, 2, 128)
    correction = Correction(torch.zeros(1, 128, 2, 4), rho=lse)
    mask = kept().nbytes()
    one = kept(lse, correction)
    assert one.nbytes() == mask + 4 * 2 * 128 + 4 * 128 * 2 * 4 + 4 * 2 * 128
    state = state_at(call(0))
    state.keep(1, one)
    state.keep(1, kept())
    assert state.peak_bytes == mask + one.nbytes()
    state.ulysses = SimpleNamespace(degree=2)  # each process keeps as much
    state.keep(1, one)
    assert state.peak_bytes == 2 * (mask + one.nbytes())

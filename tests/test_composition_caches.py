"""Step caches of diffusers beside sparse attention: steps are counted right, masks found where a
cache let the layer run, and what cannot be right is refused."""

import diffusers
import pytest
import torch
from composed import (
    DIFFUSERS_0_36,
    FAMILIES,
    MORE_FAMILIES,
    SPARSE,
    first_block,
    generate,
    make,
    not_in_0_36,
    over_families,
    self_attentions,
    sparse,
)

from dit_sparse import enable_sparse_attention

ORDERS = pytest.mark.parametrize("order", ["before", "after"])
EVERYWHERE = (-1, 1001)
ALL = FAMILIES + MORE_FAMILIES
ONE_BATCH = "CogVideoX", "LTX-Video", "Mochi"  # of both prompts
UNKNOWN_BLOCKS = "HunyuanVideo-1.5", "SkyReels-V2"  # to caches of diffusers that hook blocks
KNOWN_BLOCKS = tuple(family for family in ALL if family not in UNKNOWN_BLOCKS)


def mag_cache(pipe):
    pipe.transformer.enable_cache(
        diffusers.hooks.MagCacheConfig(
            num_inference_steps=5,
            mag_ratios=torch.ones(5),
            threshold=0.5,
            max_skip_steps=2,
            retention_ratio=0.2,
        )
    )


def taylor_seer(pipe):
    pipe.transformer.enable_cache(
        diffusers.hooks.TaylorSeerCacheConfig(
            cache_interval=2,
            max_order=1,
            disable_cache_before_step=2,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[r"^[a-z_]*blocks\.\d+\.attn1?$"],  # the default knows no attn1
        )
    )


def broadcast(pipe):
    pipe.transformer.enable_cache(
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=EVERYWHERE,
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    )


def faster_cache(pipe):
    pipe.transformer.enable_cache(
        diffusers.FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=EVERYWHERE,
            current_timestep_callback=lambda: pipe.current_timestep,
            attention_weight_callback=lambda _: 0.3,
        )
    )


def check_kinds(family, change, order, guided=True):
    """The report against a count of our own: calls of each layer, and the steps of the loop."""
    pipe = make(family)
    if order == "before":
        change(pipe)
    handle = enable_sparse_attention(pipe, **SPARSE)
    if order == "after":
        change(pipe)
    ran, now = [], [0]
    for layer, module in enumerate(self_attentions(handle)):
        swap = handle._installed[0].swaps[layer].ours
        # The processor runs exactly where no cache stood in front of it.
        module.to_q.register_forward_pre_hook(lambda *a, layer=layer: ran.append((now[0], layer)))
        assert module.processor is swap

    def count(scheduler_step):
        def step(*args, **kwargs):
            now[0] += 1
            return scheduler_step(*args, **kwargs)

        return step

    pipe.scheduler.step = count(pipe.scheduler.step)
    frames = generate(pipe, family, guided)
    trace = handle.report().trace
    assert [(entry["step"], entry["layer"]) for entry in trace] == ran
    found = {}
    for entry in trace:
        place = entry["branch"], entry["layer"]
        due = [step for step in (1, 3) if step <= entry["step"]]  # fractions 0.2 and 0.6 of 5
        kind = "dense"
        if due:
            kind = "search" if found.get(place, -1) < due[-1] else "reuse"
        if kind == "search":
            found[place] = entry["step"]
        assert entry["kind"] == kind, entry
    return frames, trace


@ORDERS
@over_families("FirstBlockCache", *KNOWN_BLOCKS)
def test_first_block_cache_that_skips_nothing_changes_nothing(family, order):
    frames, _ = sparse(family, first_block(0.0), order)
    assert frames.equal(sparse(family)[0])


@ORDERS
@over_families("FirstBlockCache", *KNOWN_BLOCKS)
def test_first_block_cache_that_skips_all_it_can(family, order):
    _, trace = check_kinds(family, first_block(1e9), order)
    assert {entry["step"] for entry in trace if entry["layer"] > 0} == {0}
    assert {entry["step"] for entry in trace if entry["layer"] == 0} == set(range(5))


@not_in_0_36
@ORDERS
@over_families("MagCache", *KNOWN_BLOCKS)
def test_mag_cache(family, order):
    _, trace = check_kinds(family, mag_cache, order)
    assert {entry["step"] for entry in trace} < set(range(5))


@not_in_0_36
@over_families("FirstBlockCache", *UNKNOWN_BLOCKS, absent=True)
def test_first_block_cache_does_not_know_the_blocks(family):
    with pytest.raises(ValueError, match="TransformerBlock'> not registered"):
        first_block(0.0)(make(family))


@not_in_0_36
@over_families("MagCache", *UNKNOWN_BLOCKS, absent=True)
def test_mag_cache_does_not_know_the_blocks(family):
    with pytest.raises(ValueError, match="TransformerBlock'> not registered"):
        mag_cache(make(family))


@ORDERS
@over_families("TaylorSeer")
def test_taylor_seer(family, order):
    if DIFFUSERS_0_36 and family == "SkyReels-V2":
        pytest.skip("diffusers 0.36 tells its caches nothing of SkyReels-V2's calls")
    _, trace = check_kinds(family, taylor_seer, order)
    assert {entry["step"] for entry in trace} < set(range(5))


@ORDERS
@over_families("PyramidAttentionBroadcast, one call a step")
def test_broadcast(family, order):
    """Each layer at every other step, as its definition says."""
    _, trace = check_kinds(family, broadcast, order, guided=family in ONE_BATCH)
    assert {entry["step"] for entry in trace} == {0, 2, 4}


@ORDERS
@over_families(
    "PyramidAttentionBroadcast, two calls a step",
    *(family for family in ALL if family not in ONE_BATCH),
    refused="RuntimeError: PyramidAttentionBroadcast of diffusers keeps one output for both calls",
)
def test_broadcast_over_two_guidance_calls_is_refused(family, order):
    with pytest.raises(RuntimeError, match="one output for both calls of guidance.*FirstBlockC"):
        sparse(family, broadcast, order)


@over_families("PyramidAttentionBroadcast, two calls a step", *ONE_BATCH, absent=True)
def test_guidance_is_one_call_a_step(family):
    _, handle = sparse(family)
    calls = [(entry["step"], entry["layer"]) for entry in handle.report().trace]
    layers = len(self_attentions(handle))
    assert calls == [(step, layer) for step in range(5) for layer in range(layers)]


@pytest.mark.parametrize("order", ["before", "after"])
@over_families(
    "FasterCache",
    refused="RuntimeError: FasterCache of diffusers leaves out half of the batch at some steps",
)
def test_faster_cache_is_refused_and_disabling_it_helps(family, order):
    pipe = make(family)
    if order == "before":
        faster_cache(pipe)
        with pytest.raises(RuntimeError, match="FasterCache.*half of the batch.*disable_cache"):
            enable_sparse_attention(pipe, **SPARSE)
        pipe.transformer.disable_cache()
        enable_sparse_attention(pipe, **SPARSE)
    else:
        enable_sparse_attention(pipe, **SPARSE)
        faster_cache(pipe)
        with pytest.raises(RuntimeError, match="FasterCache.*half of the batch.*disable_cache"):
            generate(pipe, family)
        pipe.transformer.disable_cache()
    assert generate(pipe, family).equal(sparse(family)[0])

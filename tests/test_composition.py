"""Sparse attention beside what diffusers users do already: compile, offload, tiling, casting."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import accelerate
import pytest
import torch
from composed import (
    FAMILIES,
    SPARSE,
    compile_blocks,
    generate,
    make,
    not_in_0_36,
    over_families,
    sparse,
    tile_vae,
)
from torch._dynamo.testing import CompileCounterWithBackend

from dit_sparse import enable_sparse_attention, reference

ORDERS = pytest.mark.parametrize("order", ["before", "after"])
CPU = torch.device("cpu")
FEWEST_STEPS = {"Mochi": 2}  # its schedule divides by half of them


@cache
def plain_sparse(family):
    return sparse(family)[0]


def offload(kind):
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    return lambda pipe: pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type=kind, **groups
    )


@not_in_0_36
@ORDERS
@over_families("group offload, blocks")
def test_group_offload_of_blocks(family, order):
    plain = plain_sparse(family)
    assert sparse(family, offload("block_level"), order)[0].equal(plain)


@not_in_0_36
@ORDERS
@over_families("group offload, leaves")
def test_group_offload_of_leaves(family, order):
    plain = plain_sparse(family)
    assert sparse(family, offload("leaf_level"), order)[0].equal(plain)


def sequential_offload(pipe):
    for part in pipe.components.values():  # where one were left out, pipelines run on "meta"
        if isinstance(part, torch.nn.Module):
            accelerate.cpu_offload(part, execution_device=CPU)


def model_offload(pipe):
    accelerate.cpu_offload_with_hook(pipe.transformer, execution_device=CPU)


@ORDERS
@over_families("sequential CPU offload (hooks alone)")
def test_sequential_cpu_offload(family, order):
    plain = plain_sparse(family)
    assert sparse(family, sequential_offload, order)[0].equal(plain)


@ORDERS
@over_families("model CPU offload (hooks alone)")
def test_model_cpu_offload(family, order):
    plain = plain_sparse(family)
    assert sparse(family, model_offload, order)[0].equal(plain)


@over_families("VAE tiling")
def test_vae_tiling(family):
    def run(enabled):
        pipe = make(family)
        tile_vae(pipe, family)
        if enabled:
            enable_sparse_attention(pipe, density=1.0, keep_padding=True)
        return generate(pipe, family, output_type="pt")

    assert run(True).equal(run(False))


@ORDERS
@over_families("layerwise casting to fp8")
def test_weights_in_fp8(family, order):
    """As far from its own dense output in fp8 as sparse attention is without fp8, or so."""

    def cast(pipe):
        pipe.transformer.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
        )

    reference = make(family)
    cast(reference)
    dense = generate(reference, family)
    pipe = make(family)
    if order == "before":
        cast(pipe)
    enable_sparse_attention(pipe, density=1.0, keep_padding=True)
    if order == "after":
        cast(pipe)
    assert generate(pipe, family).equal(dense)
    frames, handle = sparse(family, cast, order)
    assert not frames.equal(dense) and handle.report().reuse_calls > 0


def under_autocast(pipe, family):
    with torch.autocast("cpu", torch.bfloat16):
        return generate(pipe, family)


@over_families("autocast")
def test_autocast(family):
    """Norms of queries and keys may leave them in another dtype than values."""
    pipe = make(family)
    dense = under_autocast(pipe, family)
    with enable_sparse_attention(pipe, density=1.0, keep_padding=True):
        assert under_autocast(pipe, family).equal(dense)
    with enable_sparse_attention(pipe, **SPARSE | {"density": 0.99}):
        all_kept = under_autocast(pipe, family)
    assert (all_kept - dense).abs().max() < 0.02 * dense.abs().max()


@pytest.mark.parametrize("family", ["Wan", "HunyuanVideo"])
def test_autocast_reaches_no_search(family, monkeypatch):
    """Scores of blocks are made in float32, as without autocast."""
    seen = set()
    score = reference.block_mass

    def looked_at(*given):
        seen.add(torch.is_autocast_enabled("cpu"))
        return score(*given)

    monkeypatch.setattr(reference, "block_mass", looked_at)
    pipe = make(family)
    enable_sparse_attention(pipe, **SPARSE)
    under_autocast(pipe, family)
    assert seen == {False}


@pytest.mark.slow
@over_families("compile_repeated_blocks")
def test_blocks_compile_to_as_many_graphs_as_without_us(family):
    """And to no more at later steps, in other layers or with other masks."""
    eager, _ = sparse(family, guided=False)
    graphs = []
    for enabled in (False, True):
        torch._dynamo.reset()
        counter, pipe = CompileCounterWithBackend("eager"), make(family)
        handle = enable_sparse_attention(pipe, **SPARSE) if enabled else None
        compile_blocks(pipe, counter)
        generate(pipe, family, guided=False, num_inference_steps=FEWEST_STEPS.get(family, 1))
        graphs.append(counter.frame_count)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert (generate(pipe, family, guided=False) - eager).abs().max() < 1e-5
    assert {entry["kind"] for entry in handle.report().trace} == {"dense", "search", "reuse"}
    cut = family == "HunyuanVideo"  # of the text, a hook behind the token refiner
    assert graphs[0] + cut == graphs[1] == counter.frame_count


@pytest.mark.slow
@over_families("torch.compile")
def test_the_whole_transformer_compiles_once(family):
    eager, _ = sparse(family, guided=False)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    pipe = make(family)
    enable_sparse_attention(pipe, **SPARSE)
    pipe.transformer = torch.compile(pipe.transformer, backend=counter)
    generate(pipe, family, guided=False, num_inference_steps=FEWEST_STEPS.get(family, 1))
    graphs = counter.frame_count
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert (generate(pipe, family, guided=False) - eager).abs().max() < 1e-5
    assert graphs == counter.frame_count > 0


def test_the_environment_turns_it_off(monkeypatch, caplog):
    monkeypatch.setenv("DIT_SPARSE", "0")
    stock = generate(make("Wan"), "Wan")
    pipe = make("Wan")
    before = pipe.transformer.attn_processors
    with caplog.at_level(logging.WARNING, logger="dit_sparse"):
        handle = enable_sparse_attention(pipe, **SPARSE)
    assert [m for m in caplog.messages if "DIT_SPARSE=0" in m] == caplog.messages
    assert pipe.transformer.attn_processors == before and not handle.enabled
    assert generate(pipe, "Wan").equal(stock)
    report = handle.report()
    assert report.trace == [] and report.effective_cost == 1
    assert "DIT_SPARSE=0" in report.notes[0]
    handle.disable()


def test_the_environment_is_read_when_it_is_enabled_and_not_later(monkeypatch):
    pipe = make("Wan")
    handle = enable_sparse_attention(pipe, **SPARSE)
    monkeypatch.setenv("DIT_SPARSE", "0")
    generate(pipe, "Wan")
    assert handle.enabled and handle.report().reuse_calls


def in_thread(work):
    """Run in another thread; the error it ended with."""
    errors = []

    def run():
        try:
            work()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return errors


@pytest.mark.parametrize("family", FAMILIES)
def test_two_threads_at_once_are_both_refused(family):
    pipe = make(family)
    enable_sparse_attention(pipe, **SPARSE)
    expected = generate(pipe, family)
    seen = []

    def second_run(pipe, step, timestep, kwargs):
        if step == 2:
            seen.extend(in_thread(lambda: generate(pipe, family)))
        return kwargs

    with pytest.raises(RuntimeError, match="two threads"):
        generate(pipe, family, callback_on_step_end=second_run)
    assert ["two threads" in str(error) for error in seen] == [True]
    assert generate(pipe, family).equal(expected)


def test_threads_that_take_turns_are_served_also_after_a_run_that_was_given_up():
    pipe = make("Wan")
    enable_sparse_attention(pipe, **SPARSE)
    expected = generate(pipe, "Wan")

    def give_up(*args):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        generate(pipe, "Wan", callback_on_step_end=give_up)
    frames = []
    assert in_thread(lambda: frames.append(generate(pipe, "Wan"))) == []
    assert frames[0].equal(expected) and generate(pipe, "Wan").equal(expected)


@torch.no_grad()
def loop(transformer):
    """A loop of one's own around a bare transformer, 3 steps of two guidance calls each."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 3, 8, 8, generator=generator)
    texts = torch.randn(2, 1, 16, 32, generator=generator)
    for time in (900.0, 600.0, 300.0):
        for text in texts:
            latents = latents - 0.1 * transformer(latents, torch.tensor([time]), text).sample
    return latents


def test_threads_of_a_pool_take_turns_on_a_bare_transformer():
    transformer = make("Wan").transformer
    enable_sparse_attention(transformer, num_steps=3, **SPARSE)
    expected = loop(transformer)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for pool in (one, other, one):
            assert pool.submit(loop, transformer).result().equal(expected)


def test_two_threads_at_once_on_a_bare_transformer_are_both_refused():
    transformer = make("Wan").transformer
    enable_sparse_attention(transformer, num_steps=3, **SPARSE)
    done, seen = iter(range(100)), []

    def second_run(*_):
        if next(done) == 2:
            seen.extend(in_thread(lambda: loop(transformer)))

    hook = transformer.register_forward_pre_hook(second_run, prepend=True)
    with pytest.raises(RuntimeError, match="two threads"):
        loop(transformer)
    hook.remove()
    assert len(seen) == 1

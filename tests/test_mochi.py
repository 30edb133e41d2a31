"""Mochi on random weights: masks of the text, `auto`, undo, what its attention class lacks."""

import pytest
import torch
from diffusers.models.attention_processor import MochiAttnProcessor2_0
from test_field import FIELD
from test_joint_pipelines import SPARSE, STEPS, apart, latents
from tiny_joint import mochi, mochi_call, mochi_pipeline

from dit_sparse import enable_sparse_attention


def processors(transformer):
    return [block.attn1.processor for block in transformer.transformer_blocks]


def test_disabling_puts_the_same_processors_back():
    """Its attention has no `set_processor`."""
    transformer = mochi()
    before = processors(transformer)
    handle = enable_sparse_attention(transformer, "adaspa", num_steps=1)
    assert not set(before) & set(processors(transformer))
    handle.disable()
    assert processors(transformer) == before


def test_a_processor_with_weights_is_put_aside_and_back():
    """A module in the place of a processor is a child of the attention."""

    class Weighted(MochiAttnProcessor2_0, torch.nn.Module):
        def __init__(self):
            torch.nn.Module.__init__(self)

    transformer, theirs = mochi(), Weighted()
    transformer.transformer_blocks[0].attn1.processor = theirs
    handle = enable_sparse_attention(transformer, "adaspa", num_steps=1)
    assert theirs not in processors(transformer)
    handle.disable()
    assert processors(transformer)[0] is theirs and theirs in list(transformer.modules())


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_prompts_of_different_length_equal_stock_bit_for_bit(guided):
    pipe, call = mochi_pipeline(), mochi_call(3, guided)
    stock = latents(pipe, call)
    handle = enable_sparse_attention(pipe, "adaspa", density=1.0, keep_padding=True)
    assert latents(pipe, call).equal(stock)
    assert handle.report().dense_calls == 3 * STEPS  # layers


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16])
def test_a_mask_with_holes_is_refused(dtype):
    """The stock processor would give the tokens behind a hole to the wrong places."""
    pipe, call = mochi_pipeline(), mochi_call(2, False)
    call["prompt_attention_mask"] = call["prompt_attention_mask"].to(dtype)
    enable_sparse_attention(pipe, "adaspa", **SPARSE)
    latents(pipe, call)
    call["prompt_attention_mask"][1, 3] = 0
    with pytest.raises(ValueError, match=r"has \[9, 13\] of them that end at \[9, 14\]: move"):
        latents(pipe, call)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_auto_runs_sparse(guided):
    pipe, call = mochi_pipeline(), mochi_call(2, guided)
    stock = latents(pipe, call)
    options = SPARSE | {"density": 0.3, "dense_if_faster": False}
    handle = enable_sparse_attention(pipe, "auto", **options)
    sparse = latents(pipe, call)
    assert sparse.isfinite().all() and apart(sparse, stock) > 1e-4
    report = handle.report()
    assert report.reuse_calls > 0 and report.density < 0.9


@pytest.mark.parametrize("share", ["mask", "all"])
def test_guidance_is_shared_where_both_prompts_are_of_one_length(share):
    pipe, call = mochi_pipeline(), mochi_call(1, True)
    one_length = {name: torch.arange(20)[None] < 9 for name in call if name.endswith("mask")}
    costs = []
    for given in (call, call | one_length):
        handle = enable_sparse_attention(
            pipe, "auto", **SPARSE, share_guidance=share, dense_if_faster=False
        )
        assert latents(pipe, given).isfinite().all()
        costs.append(handle.report().effective_cost)
    assert costs[1] < costs[0]


@torch.no_grad()
def test_bfloat16_equals_stock_bit_for_bit():
    pipe, call = mochi_pipeline(), mochi_call(2, True)
    pipe.transformer.to(torch.bfloat16)
    call |= {name: x.bfloat16() for name, x in call.items() if name.endswith("embeds")}
    stock = latents(pipe, call)
    enable_sparse_attention(pipe, "adaspa", density=1.0, keep_padding=True)
    assert latents(pipe, call).equal(stock)


def test_blocks_compile_without_a_graph_break():
    """diffusers names no repeated blocks; each was compiled."""
    pipe, call = mochi_pipeline(), mochi_call(1, True)
    enable_sparse_attention(pipe, "adaspa", **SPARSE)
    eager = latents(pipe, call)
    torch._dynamo.reset()
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager", fullgraph=True)
    assert apart(latents(pipe, call), eager) < 1e-5


@pytest.mark.parametrize("method", ["svg", "llsa", "rtpurbo"])
def test_methods_of_the_field_run_on_prompts_of_different_length(method):
    pipe, call = mochi_pipeline(), mochi_call(2, True)
    with enable_sparse_attention(pipe, FIELD[method](density=0.4, block_size=32)) as handle:
        assert latents(pipe, call).isfinite().all()
        assert handle.report().search_calls > 0

"""LTX-Video on random weights: exactness, token order, given frames, undo."""

from functools import partial

import pytest
import torch
from test_joint_pipelines import ALL_KEPT, SPARSE, STEPS, apart, latents
from test_wan import leftovers
from tiny_ltx_video import ltx_call, ltx_pipeline, ltx_video

from dit_sparse import enable_sparse_attention, supported_pipelines

PIPELINES = {
    "LTXPipeline": ltx_call,
    "LTXImageToVideoPipeline": partial(ltx_call, image=True),
}


def test_the_cases_are_all_that_we_claim():
    assert set(PIPELINES) == set(supported_pipelines()["LTX-Video"])


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("name", PIPELINES)
def test_exact_then_sparse_then_undone(name, guided):
    pipe, call = ltx_pipeline(name), PIPELINES[name](1, guided)
    stock = latents(pipe, call)
    handle = enable_sparse_attention(pipe, "adaspa", density=1.0)
    assert latents(pipe, call).equal(stock)
    report = handle.report()
    assert report.dense_calls == 2 * STEPS and report.effective_cost == 1

    for order in ("tile", "curve"):  # nothing left out
        handle = enable_sparse_attention(pipe, "adaspa", order=order, **ALL_KEPT)
        assert apart(latents(pipe, call), stock) < 1e-5
    assert handle.report().reuse_calls == 2

    handle = enable_sparse_attention(pipe, "adaspa", **SPARSE)
    sparse = latents(pipe, call)
    assert latents(pipe, call).equal(sparse) and sparse.isfinite().all()
    assert apart(sparse, stock) > 1e-4
    report = handle.report()
    assert report.steps == STEPS and report.density < 0.95
    assert {entry["branch"] for entry in report.trace} == {"cond_uncond"}
    grid = handle._installed[0].state.call.grid
    assert (grid.frames, grid.height, grid.width) == (5, 5, 7)
    assert grid.conditioning_frames == ("Image" in name) and grid.text_tokens == 0

    handle.disable()
    assert leftovers(pipe.transformer) == ([], set())
    assert latents(pipe, call).equal(stock)


@pytest.mark.parametrize("name", PIPELINES)
def test_two_prompts(name):
    pipe, call = ltx_pipeline(name), PIPELINES[name](2, True)
    stock = latents(pipe, call)
    enable_sparse_attention(pipe, "adaspa", **ALL_KEPT)
    assert apart(latents(pipe, call), stock) < 1e-5
    enable_sparse_attention(pipe, "adaspa", **SPARSE)
    assert latents(pipe, call).isfinite().all()


def test_cross_attention_and_its_mask_are_left_alone():
    transformer = ltx_video()
    before = [block.attn2.processor for block in transformer.transformer_blocks]
    enable_sparse_attention(transformer, num_steps=1)
    assert [block.attn2.processor for block in transformer.transformer_blocks] == before


@torch.no_grad()
def test_fused_projections_give_what_the_stock_processor_gives():
    pipe, call = ltx_pipeline("LTXPipeline"), ltx_call(1, True)
    stock = latents(pipe, call)
    pipe.transformer.fuse_qkv_projections()
    enable_sparse_attention(pipe, "adaspa", density=1.0)
    assert latents(pipe, call).equal(stock)


@pytest.mark.parametrize("order", ["tile", "curve"])
@torch.no_grad()
def test_timesteps_given_per_token_follow_the_order(order):
    """Any of them, not only those of the first frame, which every order leaves in front."""
    transformer = ltx_video()
    given = {
        "hidden_states": torch.randn(2, 3 * 5 * 7, 8),
        "encoder_hidden_states": torch.randn(2, 12, 16),
        "timestep": torch.rand(2, 3 * 5 * 7).mul(1000),
        "encoder_attention_mask": torch.ones(2, 12),
        "num_frames": 3,
        "height": 5,
        "width": 7,
    }
    stock = transformer(**given).sample
    options = ALL_KEPT | {"order": order, "search_at": 0, "num_steps": 2}
    with enable_sparse_attention(transformer, **options):
        assert apart(transformer(**given).sample, stock) < 1e-5


def test_compiles_without_a_graph_break():
    pipe, call = ltx_pipeline("LTXImageToVideoPipeline"), ltx_call(1, True, image=True)
    enable_sparse_attention(pipe, "adaspa", **SPARSE)
    eager = latents(pipe, call)
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert apart(latents(pipe, call), eager) < 1e-5


@torch.no_grad()
def test_tokens_placed_by_coordinates_are_refused():
    """As LTXConditionPipeline does, with conditions among the tokens of the video."""
    transformer = ltx_video()
    enable_sparse_attention(transformer, num_steps=1)
    with pytest.raises(ValueError, match="needs one grid of tokens.*LTXImageToVideoPipeline"):
        transformer(
            torch.randn(1, 40, 8),
            torch.randn(1, 12, 16),
            torch.full((1, 40), 500),
            torch.ones(1, 12),
            video_coords=torch.rand(1, 3, 40),
        )

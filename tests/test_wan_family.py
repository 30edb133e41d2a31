"""Every pipeline of the Wan family on random weights: exactness, order, given frames, undo."""

import inspect
from functools import cache

import diffusers
import pytest
import torch
from test_wan import leftovers
from tiny_wan_family import FRAMES, PIPELINES, animate, generate, text, vace

from dit_sparse import enable_sparse_attention, supported_pipelines
from dit_sparse.api import UnsupportedPipelineError
from dit_sparse.pipelines.wan import _given_frames

SPARSE = {"density": 0.5, "block_size": 32}
ALL_KEPT = {"density": 0.99, "block_size": 32}  # sparse code path, nothing left out
STEPS = 4
# VACE and Lucy make one video at a time in diffusers itself; num_videos_per_prompt fails with CLIP
# embeddings there, and makes one video in V2V.
BATCHED = ("T2V", "T2V 2.2", "T2V 5B", "I2V 2.1", "I2V 2.2", "TI2V 5B", "FLF2V", "V2V", "Animate")
NO_SECOND_VIDEO = ("I2V 2.1", "FLF2V", "V2V")


@cache
def made(name):
    """Pipeline, call and stock latents; every test leaves the pipeline as it was."""
    pipe, call = PIPELINES[name][0]()
    return pipe, call, generate(pipe, call)


@pytest.fixture(params=PIPELINES)
def name(request):
    return request.param


def transformers(pipe):
    parts = [pipe.transformer, getattr(pipe, "transformer_2", None)]
    return [part for part in parts if part is not None]


def layers(pipe):
    one = pipe.transformer
    return len(one.blocks) + len(getattr(one, "vace_blocks", ()))


def test_density_one_equals_stock_bit_for_bit_and_so_does_disabled(name):
    pipe, call, stock = made(name)
    with enable_sparse_attention(pipe, "adaspa", density=1.0) as handle:
        assert generate(pipe, call).equal(stock)
    report = handle.report()
    assert report.steps == STEPS and report.effective_cost == 1
    assert report.dense_calls == layers(pipe) * 2 * STEPS
    assert all(leftovers(transformer) == ([], set()) for transformer in transformers(pipe))
    assert generate(pipe, call).equal(stock)


@pytest.mark.parametrize("order", ["tile", "curve"])
def test_all_blocks_kept_equals_stock_within_rounding(name, order):
    """Finds whatever per-token input does not follow the order: nothing is lost but by that."""
    pipe, call, stock = made(name)
    with enable_sparse_attention(pipe, "adaspa", order=order, **ALL_KEPT) as handle:
        assert (generate(pipe, call) - stock).abs().max() < 1e-5
    report = handle.report()
    assert report.reuse_calls == layers(pipe) * 2 and report.density == 1


def test_sparse_runs_keep_a_state_for_each_branch_and_all_of_the_given_frames(name):
    pipe, call, stock = made(name)
    forced = []  # of each kept mask: whether the given frames attend, and are attended
    kept = set()

    def look(pipe, step, timestep, kwargs):
        for state in (installed.state for installed in handle._installed):
            for key, entry in state.kept.items():
                grid, mask = state.call.grid, entry.mask.to_dense()
                given = slice(len(grid.conditioning_blocks(32)))
                forced.append(bool(mask[..., given, :].all() and mask[..., given].all()))
                kept.add(key)
        return kwargs

    with enable_sparse_attention(pipe, "adaspa", **SPARSE) as handle:
        frames = generate(pipe, call, output_type="pt", callback_on_step_end=look)
        call_grids = {i.state.call.grid.conditioning_frames for i in handle._installed}
        plain = generate(pipe, call, guidance=1.0)
        assert {entry["branch"] for entry in handle.report().trace} == {branches(name)[0]}
    assert frames.isfinite().all() and plain.isfinite().all()
    assert call_grids == {PIPELINES[name][1]} and forced and all(forced)
    assert kept == {(b, layer) for b in branches(name) for layer in range(layers(pipe))}


def branches(name):
    """As diffusers names them, where it does: that depends on its version."""
    named = "cache_context" in inspect.getsource(type(made(name)[0]).__call__)
    return ["cond", "uncond"] if named else ["call_0", "call_1"]


def test_sparse_differs_from_dense_and_repeats_itself():
    for name in ("I2V 2.2", "VACE, references", "Animate"):
        pipe, call, stock = made(name)
        with enable_sparse_attention(pipe, "adaspa", **SPARSE) as handle:
            sparse = generate(pipe, call)
            assert (sparse - stock).abs().max() > 1e-4 and handle.report().density < 0.8
            assert generate(pipe, call).equal(sparse)


@pytest.mark.parametrize("name", BATCHED)
def test_batches(name):
    pipe, call, _ = made(name)
    length = call.get("prompt_embeds", torch.empty(1, 16)).shape[1]
    cases = [text(2, length)] + [{"num_videos_per_prompt": 2}] * (name not in NO_SECOND_VIDEO)
    for changes in cases:
        stock = generate(pipe, call, steps=2, **changes)
        assert stock.shape[0] == 2
        with enable_sparse_attention(pipe, "adaspa", search_at=0.0, **ALL_KEPT):
            assert (generate(pipe, call, steps=2, **changes) - stock).abs().max() < 1e-5
        with enable_sparse_attention(pipe, "adaspa", search_at=0.0, **SPARSE):
            assert generate(pipe, call, steps=2, **changes).isfinite().all()


@torch.no_grad()
def once(transformer, inputs):
    with transformer.cache_context("cond"):
        output = transformer(**inputs, return_dict=False)[0]
    transformer._reset_stateful_cache()
    return output


def vace_inputs(control_frames):
    return {
        "hidden_states": torch.randn(2, 4, 4, 10, 14),
        "timestep": torch.full((2,), 500),
        "encoder_hidden_states": torch.randn(2, 16, 32),
        "control_hidden_states": torch.randn(2, 24, control_frames, 10, 14),
    }


def animate_inputs():
    return {
        "hidden_states": torch.randn(2, 12, 5, 10, 14),
        "timestep": torch.full((2,), 500),
        "encoder_hidden_states": torch.randn(2, 512, 32),
        "encoder_hidden_states_image": torch.randn(2, 5, 8),
        "pose_hidden_states": torch.randn(2, 4, 4, 10, 14),
        "face_pixel_values": torch.randn(2, 3, 13, 16, 16),
    }


ODD = {  # 5 x 7 tokens a frame, two samples
    "VACE": (vace, lambda: vace_inputs(4)),
    "VACE, control stream shorter than the video": (vace, lambda: vace_inputs(3)),
    "Animate": (animate, animate_inputs),
}


@pytest.mark.parametrize("order", ["tile", "curve"])
@pytest.mark.parametrize("case", ODD)
def test_odd_grids_and_two_samples(case, order):
    make, inputs = ODD[case]
    transformer, inputs = make()[0].transformer, inputs()
    stock = once(transformer, inputs)
    options = dict(ALL_KEPT, num_steps=1, search_at=0.0, order=order)
    enable_sparse_attention(transformer, "window", **options)
    assert (once(transformer, inputs) - stock).abs().max() < 1e-5


def test_frames_given_to_vace_are_those_with_nothing_to_repaint():
    control = torch.zeros(1, 24, 3, 2, 2)  # 4 channels of what is kept, 4 repainted, 16 of the mask
    control[:, :4], control[:, 4:, 2] = 1, 1
    given = {"hidden_states": torch.randn(1, 4, 3, 2, 2), "timestep": torch.tensor([500])}
    found = _given_frames(None, given | {"control_hidden_states": control})
    assert found.tolist() == [True, True, False]


def test_given_frames_that_exceed_the_density_are_told(caplog):
    pipe, call, _ = made("I2V 2.2")
    with enable_sparse_attention(pipe, "adaspa", density=0.1, block_size=32) as handle:
        generate(pipe, call)
        assert any("25%" in note and "density=0.1" in note for note in handle.report().notes)
        generate(pipe, call, num_frames=4 * FRAMES - 3)
    assert not any("always attended" in note for note in handle.report().notes)
    assert any("always attended" in message for message in caplog.messages)


# VACE has three kinds: the first block of its control stream has a projection more
@pytest.mark.parametrize(("name", "kinds"), [("VACE", 3), ("Animate", 1), ("TI2V 5B", 1)])
def test_compiles_to_one_graph_per_block_kind(name, kinds):
    from torch._dynamo.testing import CompileCounterWithBackend

    pipe, call = PIPELINES[name][0]()
    if not pipe.transformer._repeated_blocks:
        pytest.skip("diffusers 0.36 does not know the repeated blocks of VACE")
    enable_sparse_attention(pipe, "adaspa", **SPARSE)
    eager = generate(pipe, call)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    assert (generate(pipe, call) - eager).abs().max() < 1e-5
    assert counter.frame_count == kinds


def test_fused_projections_of_animate():
    pipe, call = animate()
    enable_sparse_attention(pipe, "adaspa", **SPARSE)
    plain = generate(pipe, call)
    for block in pipe.transformer.blocks:  # fuse_qkv_projections fails on face blocks in 0.36
        block.attn1.fuse_projections()
    assert (generate(pipe, call) - plain).abs().max() < 1e-5


def test_animate_2_is_refused_with_its_reason():
    refused = type("WanAnimate2Transformer3DModel", (torch.nn.Module,), {})()
    with pytest.raises(UnsupportedPipelineError, match="not over one grid"):
        enable_sparse_attention(refused)


@torch.no_grad()
def test_diffusion_forcing_is_refused_with_its_reason():
    pipe, _ = PIPELINES["SkyReels-V2"][0]()
    given = torch.randn(1, 4, 3, 10, 14), torch.full((1, 3), 500), text()["prompt_embeds"]
    enable_sparse_attention(pipe.transformer, "adaspa", num_steps=2)
    with pytest.raises(ValueError, match="one noise level for all frames.*SkyReelsV2Pipeline"):
        pipe.transformer(*given, enable_diffusion_forcing=True)


def test_every_pipeline_named_is_in_diffusers_and_tested_here():
    families = ("Wan", "Wan Animate", "SkyReels-V2")
    named = {pipeline for family in families for pipeline in supported_pipelines()[family]}
    assert all(hasattr(diffusers, pipeline) for pipeline in named)
    assert {type(made(name)[0]).__name__ for name in PIPELINES} == named


@pytest.mark.parametrize("order", ["tile", "curve"])
def test_timesteps_given_per_token_follow_the_order(order):
    """Any of them, not only those of the first frame, which every order leaves in front."""
    pipe, _ = PIPELINES["T2V 5B"][0]()
    latents = torch.randn(1, 4, 3, 10, 14)
    timestep = torch.rand(1, 3 * 5 * 7).mul(1000)
    given = {
        "hidden_states": latents,
        "timestep": timestep,
        "encoder_hidden_states": text()["prompt_embeds"],
    }
    with torch.no_grad():
        stock = pipe.transformer(**given).sample
        with enable_sparse_attention(
            pipe.transformer, order=order, search_at=0, num_steps=2, **ALL_KEPT
        ):
            ours = pipe.transformer(**given).sample
    assert (ours - stock).abs().max() < 1e-5

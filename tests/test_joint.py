"""HunyuanVideo and CogVideoX transformers on random weights: exactness, text, undo."""

import pytest
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
)

from dit_sparse import enable_sparse_attention

ALL_KEPT = {"density": 0.99, "block_size": 32, "num_steps": 1}  # sparse path, nothing left out
SPARSE = {"density": 0.4, "block_size": 32, "num_steps": 1}


def hunyuan():
    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )


def hunyuan_call(valid=(12, 12)):
    batch = len(valid)
    mask = (torch.arange(20) < torch.tensor(valid)[:, None]).long()
    return {
        "hidden_states": torch.randn(batch, 4, 4, 6, 7),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 20, 16),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
    }


def hunyuan_15():
    return HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=12,
        rope_axes_dim=(4, 6, 6),
        target_size=16,
        task_type="t2v",
    )


def hunyuan_15_call(valid=(12, 12), valid_2=(3, 3), image=False):
    batch = len(valid)
    return {
        "hidden_states": torch.randn(batch, 9, 4, 6, 7),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, 20, 16),
        "encoder_attention_mask": torch.arange(20) < torch.tensor(valid)[:, None],
        "encoder_hidden_states_2": torch.randn(batch, 6, 8),
        "encoder_attention_mask_2": torch.arange(6) < torch.tensor(valid_2)[:, None],
        "image_embeds": torch.randn(batch, 5, 12) * image,
    }


def cogvideox(**options):
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=14,
        sample_height=12,
        sample_frames=13,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
        **options,
    )


def cogvideox_call(frames=4, grid_frames=4):
    tokens = grid_frames * 6 * 7
    angle = torch.rand(tokens, 8).repeat_interleave(2, 1)
    return {
        "hidden_states": torch.randn(2, frames, 4, 12, 14),
        "encoder_hidden_states": torch.randn(2, 16, 32),
        "timestep": torch.full((2,), 500),
        "image_rotary_emb": (angle.cos(), angle.sin()),
    }


def cogvideox_15():
    return cogvideox(patch_size_t=2, patch_bias=False)


CASES = {
    "hunyuan": (hunyuan, hunyuan_call),
    "hunyuan, unequal texts": (hunyuan, lambda: hunyuan_call((12, 5))),
    "hunyuan, full text": (hunyuan, lambda: hunyuan_call((20, 20))),
    "hunyuan 1.5": (hunyuan_15, hunyuan_15_call),
    "hunyuan 1.5, unequal": (hunyuan_15, lambda: hunyuan_15_call((12, 7), (0, 3))),
    "hunyuan 1.5, image": (hunyuan_15, lambda: hunyuan_15_call(image=True)),
    "cogvideox": (cogvideox, cogvideox_call),
    "cogvideox 1.5": (cogvideox_15, lambda: cogvideox_call(frames=8)),
}


@pytest.fixture(params=CASES, ids=str)
def case(request):
    make, call = CASES[request.param]
    torch.manual_seed(0)
    return make().eval(), call()


@torch.no_grad()
def run(transformer, call):
    with transformer.cache_context("cond"):
        output = transformer(**call, return_dict=False)[0]
    transformer._reset_stateful_cache()
    return output


def test_density_one_with_padding_kept_equals_stock_bit_for_bit(case):
    transformer, call = case
    stock = run(transformer, call)
    handle = enable_sparse_attention(transformer, density=1.0, num_steps=1, keep_padding=True)
    assert run(transformer, call).equal(stock)
    layers = len(handle._installed[0].layers)
    assert handle.report().dense_calls == layers > 1


def test_dropped_padding_equals_stock_within_rounding(case):
    transformer, call = case
    stock = run(transformer, call)
    enable_sparse_attention(transformer, density=1.0, num_steps=1)
    assert (run(transformer, call) - stock).abs().max() < 1e-5


@pytest.mark.parametrize("order", ["raster", "tile", "curve"])
@pytest.mark.parametrize("method", ["adaspa", "window"])
@pytest.mark.parametrize("keep_padding", [False, True])
def test_all_blocks_kept_equals_stock_within_rounding(case, order, method, keep_padding):
    transformer, call = case
    stock = run(transformer, call)
    options = dict(ALL_KEPT, order=order, search_at=0.0, keep_padding=keep_padding)
    enable_sparse_attention(transformer, method, **options)
    assert (run(transformer, call) - stock).abs().max() < 2e-5


def test_sparse_differs_and_disable_restores(case):
    transformer, call = case
    stock = run(transformer, call)
    handle = enable_sparse_attention(transformer, "random", search_at=0.0, measure=True, **SPARSE)
    assert (run(transformer, call) - stock).abs().max() > 1e-4
    report = handle.report()
    assert 0.3 < report.density < 0.95 and 0 < report.kept_mass < 1
    handle.disable()
    assert run(transformer, call).equal(stock)


def test_token_refiner_is_left_alone():
    transformer = hunyuan()
    refiner = transformer.context_embedder.token_refiner.refiner_blocks[0].attn
    before = refiner.processor
    enable_sparse_attention(transformer, **SPARSE)
    assert refiner.processor is before


def test_padding_does_not_reach_the_video():
    """With unequal texts, what stands in the padded slots of the shorter one must not matter."""
    torch.manual_seed(0)
    transformer, call = hunyuan().eval(), hunyuan_call((12, 5))
    enable_sparse_attention(transformer, search_at=0.0, **SPARSE)
    first = run(transformer, call)
    call["encoder_hidden_states"][1, 5:] = 100.0
    assert (run(transformer, call) - first).abs().max() < 1e-5


def test_cogvideox_fused_projections_keep_their_sparsity_or_say_so(caplog):
    torch.manual_seed(0)
    transformer, call = cogvideox().eval(), cogvideox_call()
    transformer.fuse_qkv_projections()
    stock = run(transformer, call)
    handle = enable_sparse_attention(transformer, density=1.0, num_steps=1)
    assert run(transformer, call).equal(stock)
    handle.disable()
    assert run(transformer, call).equal(stock)

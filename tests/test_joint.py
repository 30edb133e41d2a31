"""HunyuanVideo, CogVideoX and Mochi transformers on random weights: exactness, text, undo."""

import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from diffusers.models.embeddings import apply_rotary_emb
from tiny_joint import CONCATENATED, REPLACED, cogvideox, cogvideox_15, hunyuan, hunyuan_15, mochi

from dit_sparse import (
    AdaSpa,
    UnsupportedPipelineError,
    VideoGrid,
    disable_sparse_attention,
    enable_sparse_attention,
)
from dit_sparse.pipelines.rotary import rotate_
from dit_sparse.state import Call, State
from dit_sparse.step import LayerAttention

ALL_KEPT = {"density": 0.99, "block_size": 32, "num_steps": 1}  # sparse path, nothing left out
SPARSE = {"density": 0.4, "block_size": 32, "num_steps": 1}


def hunyuan_call(valid=(12, 12), channels=4):
    batch = len(valid)
    mask = (torch.arange(20) < torch.tensor(valid)[:, None]).long()
    return {
        "hidden_states": torch.randn(batch, channels, 4, 6, 7),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 20, 16),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
    }


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


def cogvideox_call(frames=4, grid_frames=4, channels=4):
    tokens = grid_frames * 6 * 7
    angle = torch.rand(tokens, 32).repeat_interleave(2, 1)
    return {
        "hidden_states": torch.randn(2, frames, channels, 12, 14),
        "encoder_hidden_states": torch.randn(2, 16, 32),
        "timestep": torch.full((2,), 500),
        "image_rotary_emb": (angle.cos(), angle.sin()),
    }


@pytest.mark.parametrize("tables", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [1, 2])
def test_rotated_in_place_as_by_diffusers(dim, dtype, tables):
    x = torch.randn(2, *((40, 3) if dim == 1 else (3, 40)), 16).to(dtype)
    rotary_emb = tuple(torch.randn(2, 30, 16).to(tables))
    part = (slice(None),) * dim + (slice(10, None),)
    expected = x.clone()
    expected[part] = apply_rotary_emb(x[part], rotary_emb, sequence_dim=dim)
    rotate_(x[part], rotary_emb, dim)
    assert x.equal(expected)


def mochi_call(valid=(12, 12)):
    batch = len(valid)
    return {
        "hidden_states": torch.randn(batch, 12, 4, 12, 14),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 20, 16),
        "encoder_attention_mask": torch.arange(20) < torch.tensor(valid)[:, None],
    }


CASES = {
    "hunyuan": (hunyuan, hunyuan_call),
    "hunyuan, unequal texts": (hunyuan, lambda: hunyuan_call((12, 5))),
    "hunyuan, full text": (hunyuan, lambda: hunyuan_call((20, 20))),
    "hunyuan, image concatenated": (
        lambda: hunyuan(**CONCATENATED),
        lambda: hunyuan_call((12, 5), channels=9),
    ),
    "hunyuan, first frame replaced": (lambda: hunyuan(**REPLACED), hunyuan_call),
    "hunyuan 1.5": (hunyuan_15, hunyuan_15_call),
    "hunyuan 1.5, unequal": (hunyuan_15, lambda: hunyuan_15_call((12, 7), (0, 3))),
    "hunyuan 1.5, image": (hunyuan_15, lambda: hunyuan_15_call(image=True)),
    "cogvideox": (cogvideox, cogvideox_call),
    "cogvideox 1.5": (cogvideox_15, lambda: cogvideox_call(frames=8)),
    "mochi": (mochi, mochi_call),
    "mochi, unequal texts": (mochi, lambda: mochi_call((12, 5, 0))),
    "mochi, full text": (mochi, lambda: mochi_call((20, 20))),
}


@pytest.fixture(params=CASES, ids=str)
def case(request):
    make, call = CASES[request.param]
    torch.manual_seed(0)
    return make().eval(), call()


@torch.no_grad()
def run(transformer, call, steps=1):
    for step in range(steps):
        with transformer.cache_context("cond"):
            call = call | {"timestep": call["timestep"] - step}
            output = transformer(**call, return_dict=False)[0]
    transformer._reset_stateful_cache()
    return output


def test_density_one_with_padding_kept_equals_stock_bit_for_bit(case):
    transformer, call = case
    stock = run(transformer, call)
    handle = enable_sparse_attention(
        transformer, "adaspa", density=1.0, num_steps=1, keep_padding=True
    )
    assert run(transformer, call).equal(stock)
    layers = len(handle._installed[0].layers)
    assert handle.report().dense_calls == layers > 1


def test_dropped_padding_equals_stock_within_rounding(case):
    transformer, call = case
    stock = run(transformer, call)
    enable_sparse_attention(transformer, "adaspa", density=1.0, num_steps=1)
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
    enable_sparse_attention(transformer, "adaspa", **SPARSE)
    assert refiner.processor is before


def test_padding_does_not_reach_the_video():
    """With unequal texts, what stands in the padded slots of the shorter one must not matter."""
    torch.manual_seed(0)
    transformer, call = hunyuan().eval(), hunyuan_call((12, 5))
    enable_sparse_attention(transformer, "adaspa", search_at=0.0, **SPARSE)
    first = run(transformer, call)
    call["encoder_hidden_states"][1, 5:] = 100.0
    assert (run(transformer, call) - first).abs().max() < 1e-5


UNEQUAL = {
    "hunyuan": (hunyuan, lambda: hunyuan_call((12, 5))),
    "hunyuan 1.5": (hunyuan_15, lambda: hunyuan_15_call((9, 4), (3, 1))),
    "mochi": (mochi, lambda: mochi_call((12, 5))),
}


@pytest.mark.parametrize("name", UNEQUAL)
def test_unequal_texts_get_what_each_gets_alone(name):
    """Sparse, with a mask of its own for each sample."""
    make, call = UNEQUAL[name]
    transformer, call = make(), call()
    single = {name: [value[i : i + 1] for i in range(2)] for name, value in call.items()}
    handle = enable_sparse_attention(
        transformer, "adaspa", search_at=(0.0, 0.5), **SPARSE | {"num_steps": 2}
    )
    both = run(transformer, call, steps=2)
    assert handle.report().density < 0.9
    for i in range(2):
        alone = run(transformer, {name: parts[i] for name, parts in single.items()}, steps=2)
        assert (both[i] - alone[0]).abs().max() < 1e-5


def test_valid_tokens_are_told_on_the_device_of_the_layer():
    """A transformer may be spread over several GPUs."""
    state = State()
    cpu, grid = torch.device("cpu"), VideoGrid(2, 4, 4, text_tokens=8)
    state.begin(Call(grid, 0, 1, "cond", cpu, torch.float32, lengths=(36, 40)))
    layer = LayerAttention(state, AdaSpa(density=1.0), 0, False)
    layer.dense = lambda query, key, value, kv_len: kv_len
    for device in (cpu, torch.device("meta")):
        query = torch.empty(2, 40, 1, 16, device=device)
        assert layer(query, query, query).device == device


def test_text_of_a_bfloat16_mask_is_counted_exactly():
    """Image-to-video gives over 256 tokens and a mask in the dtype of the model."""
    transformer, call = hunyuan(), hunyuan_call((12,))
    call["encoder_hidden_states"] = torch.randn(1, 300, 16)
    call["encoder_attention_mask"] = (torch.arange(300) < 259).to(torch.bfloat16)[None]
    handle = enable_sparse_attention(transformer, "adaspa", density=1.0, num_steps=1)
    run(transformer, call)
    assert handle._installed[0].state.call.grid.text_tokens == 259


@pytest.mark.parametrize("valid_2", [(3, 3), (0, 0)])
def test_no_prompt_at_all_in_hunyuan_15(valid_2):
    transformer, call = hunyuan_15(), hunyuan_15_call((0, 0), valid_2)
    stock = run(transformer, call)
    enable_sparse_attention(transformer, "adaspa", density=1.0, num_steps=1)
    assert (run(transformer, call) - stock).abs().max() < 1e-5


class TestFusedProjections:
    """CogVideoX sets other processors when it fuses; a twin without us shows what must come out."""

    @pytest.fixture
    def twins(self):
        ours, stock = cogvideox(), cogvideox()
        stock.load_state_dict(ours.state_dict())
        return ours, stock, cogvideox_call()

    def check_same(self, twins):
        """Bit-equal at density 1, through our processors."""
        ours, stock, call = twins
        expected = run(stock, call)
        handle = enable_sparse_attention(ours, "adaspa", density=1.0, num_steps=1)
        assert run(ours, call).equal(expected) and handle.report().dense_calls == 2
        assert all("CogVideoX" not in note for note in handle.report().notes)

    def check_undone(self, twins):
        ours, stock, call = twins
        processors = [[type(p) for p in t.attn_processors.values()] for t in (ours, stock)]
        assert processors[0] == processors[1]
        assert run(ours, call).equal(run(stock, call))

    def test_fused_before_enabling_and_unfused_after(self, twins):
        ours, stock, call = twins
        for transformer in (ours, stock):
            transformer.fuse_qkv_projections()
        self.check_same(twins)
        disable_sparse_attention(ours)
        self.check_undone(twins)
        enable_sparse_attention(ours, "adaspa", **SPARSE)
        for transformer in (ours, stock):
            transformer.unfuse_qkv_projections()
        self.check_same(twins)

    @pytest.mark.parametrize("then_unfuse", [False, True])
    def test_fused_after_enabling(self, twins, then_unfuse):
        ours, stock, call = twins
        handle = enable_sparse_attention(ours, "random", search_at=0.0, **SPARSE)
        sparse = run(ours, call)
        for transformer in (ours, stock):
            transformer.fuse_qkv_projections()
            if then_unfuse:
                transformer.unfuse_qkv_projections()
                for block in transformer.transformer_blocks:  # as loading a LoRA would
                    torch.nn.init.eye_(block.attn1.to_v.weight)
        again = run(ours, call)
        assert handle.report().density < 0.95
        assert then_unfuse or (again - sparse).abs().max() < 1e-5
        self.check_same(twins)

    @pytest.mark.parametrize("then_unfuse", [False, True])
    def test_disabled_after_fusing_it_is_as_if_never_enabled(self, twins, then_unfuse):
        ours, stock, call = twins
        handle = enable_sparse_attention(ours, "adaspa", **SPARSE)
        for transformer in (ours, stock):
            transformer.fuse_qkv_projections()
        handle.disable()
        for transformer in (ours, stock) if then_unfuse else ():
            transformer.unfuse_qkv_projections()
        self.check_undone(twins)

    def test_a_failing_fuse_leaves_ours_on(self, twins, monkeypatch):
        ours, _, call = twins
        monkeypatch.setattr(type(ours), "set_attn_processor", lambda *args: 1 / 0)
        handle = enable_sparse_attention(ours, "adaspa", density=1.0, num_steps=1)
        with pytest.raises(ZeroDivisionError):
            ours.fuse_qkv_projections()
        run(ours, call)
        assert handle.report().dense_calls == 2


@pytest.mark.parametrize("name", ["hunyuan", "hunyuan 1.5"])
def test_compiles_without_a_graph_break(name):
    """diffusers compiles the patch embedding and the token refiner, too."""
    torch.manual_seed(0)
    make, call = CASES[name]
    transformer, call = make(), call()
    enable_sparse_attention(transformer, "adaspa", **SPARSE | {"num_steps": 3})
    eager = run(transformer, call, steps=3)
    torch._dynamo.reset()
    transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert (run(transformer, call, steps=3) - eager).abs().max() < 1e-5


def framepack():
    return HunyuanVideoFramepackTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4),
    )


def test_framepack_is_refused_with_the_reason():
    class Derived(HunyuanVideoFramepackTransformer3DModel):
        pass

    transformer = framepack()
    with pytest.raises(UnsupportedPipelineError, match="earlier frames, shrunk to three sizes"):
        enable_sparse_attention(transformer)
    transformer.__class__ = Derived
    with pytest.raises(UnsupportedPipelineError, match="Derived .* does not attend over one grid"):
        enable_sparse_attention(transformer)


def test_a_class_derived_from_a_family_belongs_to_it():
    transformer, call = hunyuan(), hunyuan_call()
    stock = run(transformer, call)
    transformer.__class__ = type("Finetuned", (type(transformer),), {})
    enable_sparse_attention(transformer, "adaspa", density=1.0, num_steps=1, keep_padding=True)
    assert run(transformer, call).equal(stock)

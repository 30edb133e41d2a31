"""LoRA and quantised weights beside sparse attention."""

import pytest
import torch
from composed import SPARSE, generate, make, over_families

from dit_sparse import enable_sparse_attention


def add_lora(transformer, name, seed):
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False), name
    )
    generator = torch.Generator().manual_seed(seed)
    for key, weight in transformer.named_parameters():
        if f"lora_A.{name}" in key or f"lora_B.{name}" in key:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.3


@over_families("LoRA")
def test_lora_loaded_swapped_fused_and_unfused_while_enabled(family):
    """Each state equals a pipeline that was put into it before sparse attention was enabled."""
    pytest.importorskip("peft")

    def fresh(*names, active=None):
        pipe = make(family)
        for name in names:
            add_lora(pipe.transformer, name, seed=len(name))
        if active is not None:
            pipe.transformer.set_adapter(active)
        enable_sparse_attention(pipe, **SPARSE)
        return generate(pipe, family)

    pipe = make(family)
    enable_sparse_attention(pipe, **SPARSE)
    plain = generate(pipe, family)
    add_lora(pipe.transformer, "a", 1)
    loaded = generate(pipe, family)
    assert loaded.equal(fresh("a")) and not loaded.equal(plain)
    add_lora(pipe.transformer, "bb", 2)
    pipe.transformer.set_adapter("bb")
    swapped = generate(pipe, family)
    assert swapped.equal(fresh("a", "bb", active="bb")) and not swapped.equal(loaded)
    pipe.transformer.fuse_lora()
    assert (generate(pipe, family) - swapped).abs().max() < 1e-3
    pipe.transformer.unfuse_lora()
    assert (generate(pipe, family) - swapped).abs().max() < 1e-3
    pipe.transformer.unload_lora()
    assert (generate(pipe, family) - plain).abs().max() < 1e-3  # fusing leaves its rounding


def dense_and_sparse(family, quantise):
    """At density 1 the quantised model's own output; sparse steps run."""
    stock = make(family)
    quantise(stock)
    pipe = make(family)
    quantise(pipe)
    dense = generate(stock, family)
    enable_sparse_attention(pipe, density=1.0, keep_padding=True)
    assert generate(pipe, family).equal(dense)
    handle = enable_sparse_attention(pipe, **SPARSE)
    assert generate(pipe, family).isfinite().all() and handle.report().reuse_calls > 0
    assert not dense.equal(generate(make(family), family))


@over_families("torchao, int8 weights")
def test_int8_weights_by_torchao(family):
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.Int8WeightOnlyConfig()
    dense_and_sparse(family, lambda pipe: quantization.quantize_(pipe.transformer, config))


@over_families("GGUF, Q8_0 weights")
def test_q8_0_weights_by_gguf(family):
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFParameter, _replace_with_gguf_linear

    def quantise(pipe):
        kind, transformer = gguf.GGMLQuantizationType.Q8_0, pipe.transformer
        state, biases = {}, {}
        for name, module in transformer.named_modules():
            if ".attn" in name and type(module) is torch.nn.Linear:
                packed = torch.from_numpy(gguf.quantize(module.weight.detach().numpy(), kind))
                state[f"{name}.weight"] = GGUFParameter(packed, quant_type=kind)
                biases[f"{name}.bias"] = module.bias
        _replace_with_gguf_linear(transformer, torch.float32, state)
        for name, weight in (state | biases).items():
            owner, _, leaf = name.rpartition(".")
            setattr(transformer.get_submodule(owner), leaf, weight)
        assert state

    dense_and_sparse(family, quantise)


@over_families("bitsandbytes, int8 weights")
def test_int8_weights_by_bitsandbytes(family):
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def quantise(pipe):
        for name, module in list(pipe.transformer.named_modules()):
            if ".attn" in name and type(module) is torch.nn.Linear:
                new = bitsandbytes.nn.Linear8bitLt(
                    module.in_features,
                    module.out_features,
                    module.bias is not None,
                    has_fp16_weights=False,
                )
                new.load_state_dict(module.state_dict())
                pipe.transformer.set_submodule(name, new.to("cpu"))

    dense_and_sparse(family, quantise)

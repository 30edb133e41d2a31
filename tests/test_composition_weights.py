"""LoRA and quantised weights beside sparse attention."""

import pytest
from changed_weights import (
    add_lora,
    int8_by_bitsandbytes,
    int8_by_torchao,
    nf4_by_bitsandbytes,
    q8_0_by_gguf,
)
from composed import SPARSE, generate, make, over_families

from dit_sparse import enable_sparse_attention


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
    dense_and_sparse(family, int8_by_torchao)


@over_families("GGUF, Q8_0 weights")
def test_q8_0_weights_by_gguf(family):
    dense_and_sparse(family, q8_0_by_gguf)


@over_families("bitsandbytes, int8 weights")
def test_int8_weights_by_bitsandbytes(family):
    dense_and_sparse(family, int8_by_bitsandbytes)


@over_families("bitsandbytes, nf4 weights")
def test_nf4_weights_by_bitsandbytes(family):
    dense_and_sparse(family, nf4_by_bitsandbytes)

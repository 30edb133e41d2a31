"""LoRA and quantised weights for tiny pipelines, on whatever device and in whatever dtype they are.

Each skips the test where its package is not installed.
"""

import pytest
import torch


def add_lora(transformer, name, seed):
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False), name
    )
    generator = torch.Generator().manual_seed(seed)
    for key, weight in transformer.named_parameters():
        if f"lora_A.{name}" in key or f"lora_B.{name}" in key:
            weight.data = (torch.randn(weight.shape, generator=generator) * 0.3).to(weight)


def attention_linears(transformer):
    return [
        (name, module)
        for name, module in transformer.named_modules()
        if ".attn" in name and type(module) is torch.nn.Linear
    ]


def int8_by_torchao(pipe):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())


def q8_0_by_gguf(pipe):
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFParameter, _replace_with_gguf_linear

    kind, transformer = gguf.GGMLQuantizationType.Q8_0, pipe.transformer
    state, biases = {}, {}
    for name, module in attention_linears(transformer):
        if module.in_features % 32:  # no whole group of this type
            continue
        packed = torch.from_numpy(gguf.quantize(module.weight.detach().float().cpu().numpy(), kind))
        state[f"{name}.weight"] = GGUFParameter(packed.to(module.weight.device), quant_type=kind)
        biases[f"{name}.bias"] = module.bias
    assert state
    _replace_with_gguf_linear(transformer, transformer.dtype, state)
    for name, weight in (state | biases).items():
        owner, _, leaf = name.rpartition(".")
        setattr(transformer.get_submodule(owner), leaf, weight)


def by_bitsandbytes(pipe, make):
    """Weights become 8 or 4 bits when the new module, by `make(in, out, bias)`, moves to a device,
    the CPU too."""
    for name, module in attention_linears(pipe.transformer):
        new = make(module.in_features, module.out_features, module.bias is not None)
        new.load_state_dict(module.state_dict())
        pipe.transformer.set_submodule(name, new.to(module.weight.device))


def int8_by_bitsandbytes(pipe):
    nn = pytest.importorskip("bitsandbytes").nn
    by_bitsandbytes(pipe, lambda *sizes: nn.Linear8bitLt(*sizes, has_fp16_weights=False))


def nf4_by_bitsandbytes(pipe):
    nn = pytest.importorskip("bitsandbytes").nn
    options = {"compute_dtype": pipe.transformer.dtype, "quant_type": "nf4"}
    by_bitsandbytes(pipe, lambda *sizes: nn.Linear4bit(*sizes, **options))

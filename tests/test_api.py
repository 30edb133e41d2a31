"""What a user can get wrong."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from tiny import CALL, tiny_wan
from tiny_joint import cogvideox
from tiny_ltx_video import ltx_video

import dit_sparse
from dit_sparse import (
    AdaSpa,
    UnsupportedPipelineError,
    available_methods,
    enable_sparse_attention,
    supported_pipelines,
)
from dit_sparse.api import supported_transformers
from dit_sparse.attention import refuse_missing
from dit_sparse.config import SparseConfig
from dit_sparse.engines import triton_engine


@pytest.mark.parametrize("thing", [object(), torch.nn.Linear(2, 2), None, "wan"])
def test_unsupported_things_name_what_is_supported(thing):
    with pytest.raises(UnsupportedPipelineError, match="WanPipeline"):
        enable_sparse_attention(thing)


@pytest.mark.parametrize("transformer", [None, torch.nn.Sequential()])
def test_a_supported_pipeline_without_its_transformer_is_told_what_it_has(transformer):
    pipe = tiny_wan()
    pipe.transformer = transformer
    found = "UMT5EncoderModel" if transformer is None else "UMT5EncoderModel, .*Sequential"
    with pytest.raises(UnsupportedPipelineError, match=f"among .*{found}"):
        enable_sparse_attention(pipe)


def test_misspelt_method_and_option():
    pipe = tiny_wan()
    with pytest.raises(ValueError, match="did you mean 'adaspa'"):
        enable_sparse_attention(pipe, "adaspar")
    with pytest.raises(TypeError, match="did you mean 'density'"):
        enable_sparse_attention(pipe, "adaspa", densty=0.3)
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        enable_sparse_attention(pipe, density=2)


def test_a_config_is_a_method():
    handle = enable_sparse_attention(tiny_wan(), AdaSpa(density=0.3), order="tile")
    assert handle.config == AdaSpa(density=0.3, order="tile") and handle.method == "adaspa"


def test_listings():
    assert "WanPipeline" in supported_pipelines()["Wan"]
    for name, config in available_methods().items():
        assert config.__doc__ and config.paper, name


def test_methods_of_the_user_work_like_ours():
    @dataclass(frozen=True)
    class FirstBlocks(SparseConfig):
        """Every row keeps the first blocks."""

    handle = enable_sparse_attention(tiny_wan(), FirstBlocks(), density=0.4)
    assert handle.method == "FirstBlocks" and handle.config == FirstBlocks(density=0.4)


@pytest.mark.parametrize(
    ("find", "told"),
    [(None, r"Rule has no find\(search\)"), (lambda self, search: search.key, "gave a Tensor")],
)
def test_a_rule_that_finds_no_mask_is_told_what_to_give(find, told):
    rule = type("Rule", (SparseConfig,), {"find": find} if find else {})
    pipe = tiny_wan()
    enable_sparse_attention(pipe, rule(search_at=0.0))
    with pytest.raises((NotImplementedError, TypeError), match=told):
        pipe("a", **CALL, max_sequence_length=16)


@pytest.mark.parametrize("make", [lambda: tiny_wan().transformer, ltx_video, cogvideox])
def test_a_mask_for_self_attention_is_refused(make):
    transformer = make()
    enable_sparse_attention(transformer, num_steps=1)
    *_, attention = supported_transformers(transformer)[0][1].self_attentions(transformer)
    x, mask = torch.randn(1, 16, 32), torch.ones(1, 16)
    with pytest.raises(ValueError, match="without a mask"):
        attention.processor(attention, x, encoder_hidden_states=x, attention_mask=mask)
    if make is not cogvideox:  # whose processor is given the text
        for given in ({"encoder_hidden_states": x}, {"attention_mask": mask}):
            with pytest.raises(ValueError, match="for self-attention without a mask"):
                attention.processor(attention, x, **given)


def test_training_is_refused_with_what_to_do():
    transformer = tiny_wan().transformer
    enable_sparse_attention(transformer, num_steps=1)
    inputs = torch.randn(1, 16, 3, 8, 8), torch.tensor([500.0]), torch.randn(1, 16, 32)
    with pytest.raises(RuntimeError, match="no_grad.*disable sparse attention before"):
        transformer(*inputs).sample.sum().backward()


def test_a_run_in_inference_mode_does_not_bar_one_without():
    transformer = tiny_wan().transformer
    enable_sparse_attention(transformer, num_steps=1, order="tile")
    inputs = torch.randn(1, 16, 5, 10, 6), torch.tensor([500.0]), torch.randn(1, 16, 32)
    with torch.inference_mode():
        expected = transformer(*inputs).sample
    assert transformer(*inputs).sample.equal(expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("engine", ["triton", "fa4"])
def test_an_engine_without_its_gpu_is_refused_when_enabling(engine):
    pipe = tiny_wan()
    with pytest.raises(ValueError, match=f"engine='{engine}'.* GPU .*use engine='auto'"):
        enable_sparse_attention(pipe, engine=engine)
    assert type(pipe.transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert triton_engine.missing("cuda") == "triton is not installed"
    with pytest.raises(ValueError, match="triton is not installed; use engine='auto'"):
        refuse_missing("triton", "cuda")


def python(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_core_imports_without_diffusers_and_triton():
    python(
        "import sys; sys.modules['diffusers'] = sys.modules['triton'] = None\n"
        "import torch, dit_sparse\n"
        "x = torch.randn(1, 100, 2, 16)\n"
        "dit_sparse.sparse_attention(x, x, x, dit_sparse.BlockMask.full(100, 100))"
    )


def test_command_line_imports_without_torch():
    python("import sys; sys.modules['torch'] = None; import dit_sparse.cli")


def test_every_public_name_is_there():
    assert all(getattr(dit_sparse, name) for name in dit_sparse.__all__)
    assert set(dit_sparse.__all__) <= set(dir(dit_sparse))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dit_sparse.nothing  # noqa: B018


def test_switches_are_true_or_false():
    for name in ("measure", "keep_padding"):
        with pytest.raises(ValueError, match=f"{name} is True or False, got 'no'"):
            enable_sparse_attention(tiny_wan(), **{name: "no"})


def test_too_few_steps_are_refused_when_enabling():
    for steps in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="num_steps is a whole number of at least 1"):
            enable_sparse_attention(tiny_wan().transformer, num_steps=steps)


def test_a_note_is_warned_of_once_and_stands_in_the_reports_that_it_is_for(caplog):
    handle = enable_sparse_attention(tiny_wan().transformer, num_steps=1)
    state = handle._installed[0].state
    for _ in range(2):
        handle.note("of every run")
        handle.note("of this run", state)
    assert caplog.messages == ["of every run", "of this run"]
    assert handle.report().notes[:2] == ["of every run", "of this run"]
    state.forget()
    handle.note("of this run", state)
    assert "of this run" in handle.report().notes and len(caplog.messages) == 2
    state.forget()
    assert "of every run" in handle.report().notes and "of this run" not in handle.report().notes

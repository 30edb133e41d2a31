"""What a user can get wrong."""

import subprocess
import sys

import pytest
import torch
from tiny import tiny_wan

from dit_sparse import (
    AdaSpa,
    UnsupportedPipelineError,
    available_methods,
    enable_sparse_attention,
    supported_pipelines,
)


@pytest.mark.parametrize("thing", [object(), torch.nn.Linear(2, 2), None, "wan"])
def test_unsupported_things_name_what_is_supported(thing):
    with pytest.raises(UnsupportedPipelineError, match="WanPipeline"):
        enable_sparse_attention(thing)


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


def test_core_imports_without_diffusers_and_triton():
    code = (
        "import sys; sys.modules['diffusers'] = sys.modules['triton'] = None; import torch, dit_sparse;"
        "x = torch.randn(1, 100, 2, 16);"
        "print(dit_sparse.sparse_attention(x, x, x, dit_sparse.BlockMask.full(100, 100)).shape)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

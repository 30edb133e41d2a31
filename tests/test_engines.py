"""Every engine against the reference; those that need a GPU are told apart readably without one."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dit_sparse import BlockMask, attention, dense, reference, sparse_attention
from dit_sparse.dense import dense_attention_with_lse
from dit_sparse.engines import ENGINES, Problem, fa4, preferred, triton_engine, why_not
from dit_sparse.patterns.adaspa import AdaSpa

CPU = torch.device("cpu")
GPU_ENGINES = [name for name in ENGINES if name != "torch"]


def problem(device=CPU, dtype=torch.bfloat16, head_dim=64, block_size=(64, 64), lengths=False):
    return Problem(device, dtype, head_dim, block_size, lengths)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("block_size", [(64, 64), (32, 128)])
@pytest.mark.parametrize("lengths", [None, [70, 150]])
def test_flex_agrees_with_the_reference(block_size, lengths):
    query, key, value = torch.randn(3, 2, 150, 3, 32)
    mask = torch.rand(1, 3, -(-150 // block_size[0]), -(-150 // block_size[1])) < 0.5
    mask[..., 0] = True
    mask[0, 1, 1] = False  # a row without blocks
    packed = BlockMask.from_dense(mask, 150, 150, block_size)
    kv_len = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    arguments = {"kv_len": kv_len, "return_lse": True}
    output, lse = sparse_attention(query, key, value, packed, engine="flex", **arguments)
    expected, expected_lse = sparse_attention(
        query, key, value, packed, engine="torch", **arguments
    )
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=5e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_ENGINES)
@pytest.mark.parametrize("block_size", [(128, 128), (64, 64)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_engines_agree_with_the_reference_on_a_gpu(name, block_size, head_dim):
    device = torch.device("cuda", torch.cuda.current_device())
    given = problem(device, block_size=block_size, head_dim=head_dim)
    if why_not(name, given):
        pytest.skip(why_not(name, given))
    assert attention.disagreement(name, given) is None


def test_an_engine_that_is_wrong_is_dropped_and_refused_when_forced(monkeypatch):
    monkeypatch.setattr(ENGINES["flex"], "attend", lambda q, k, v, *_, **__: (q, q[..., 0].mT))
    attention.disagreement.cache_clear()
    query = torch.randn(1, 100, 2, 32)
    with pytest.raises(ValueError, match="output is wrong by .*use engine='auto'"):
        sparse_attention(query, query, query, BlockMask.full(100, 100), engine="flex")
    attention.disagreement.cache_clear()


def test_an_engine_that_fails_says_how(monkeypatch):
    def attend(*arguments, **options):
        raise RuntimeError("no kernel\nimage")

    monkeypatch.setattr(ENGINES["flex"], "attend", attend)
    attention.disagreement.cache_clear()
    reason = attention.disagreement("flex", problem(dtype=torch.float32))
    attention.disagreement.cache_clear()
    assert "RuntimeError: no kernel image" in reason


def test_running_out_of_memory_is_not_remembered_of_an_engine(monkeypatch):
    works = ENGINES["flex"].attend

    def attend(*arguments, **options):
        raise torch.OutOfMemoryError("full")

    attention.disagreement.cache_clear()
    monkeypatch.setattr(ENGINES["flex"], "attend", attend)
    with pytest.raises(torch.OutOfMemoryError):
        attention.disagreement("flex", problem(dtype=torch.float32))
    monkeypatch.setattr(ENGINES["flex"], "attend", works)
    assert attention.disagreement("flex", problem(dtype=torch.float32)) is None


def test_auto_takes_torch_on_a_cpu():
    query = torch.zeros(1, 100, 2, 32)
    assert attention.choose_engine("auto", query, BlockMask.full(100, 100)) == "torch"
    assert preferred(problem())[-1] == "torch"


@pytest.mark.parametrize(
    "given, words",
    [
        ({"lengths": True}, "valid length per sample"),
        ({"dtype": torch.float32}, "float32"),
        ({"head_dim": 256}, "up to 128, not 256"),
        ({"head_dim": 33}, "multiples of 8"),
        ({"block_size": (32, 64)}, "not 32"),
    ],
)
def test_fa4_says_what_it_cannot_serve(given, words):
    assert words in fa4.unfit(problem(**given))
    assert fa4.unfit(problem(head_dim=128, block_size=(128, 128))) is None


def installed(monkeypatch, **functions):
    """A flash-attn-4 with these functions in its interface."""
    interface, sparsity = ModuleType("interface"), ModuleType("block_sparsity")
    vars(interface).update(functions)
    sparsity.BlockSparseTensorsTorch = SimpleNamespace(
        _fields=("full_block_cnt", "full_block_idx", "block_size")
    )
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", ModuleType("cute"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.block_sparsity", sparsity)


def test_fa4_of_another_version_is_told(monkeypatch):
    installed(monkeypatch, flash_attn_func=lambda q, k, v, softmax_scale, return_lse: None)
    assert "lacks block_sparse_tensors; 4.0.0b36 is known" in fa4.mismatch.__wrapped__()


def test_fa4_that_fits_is_taken(monkeypatch):
    installed(
        monkeypatch,
        flash_attn_func=lambda q, k, v, softmax_scale, block_sparse_tensors, return_lse: None,
    )
    assert fa4.mismatch.__wrapped__() is None


def test_dense_attention_with_its_lse_is_of_fa4_where_that_serves(monkeypatch):
    given = []

    def flash_attn_func(q, k, v, **options):
        given.append(options)
        return q, q[..., 0], None

    installed(monkeypatch, flash_attn_func=flash_attn_func)
    monkeypatch.setattr(fa4, "missing", lambda device: None)
    query = torch.zeros(1, 100, 2, 64, dtype=torch.bfloat16)
    assert dense_attention_with_lse(query, query, query)[0] is query
    assert given == [{"return_lse": True}]
    dense_attention_with_lse(*[query.float()] * 3)
    dense_attention_with_lse(*[query] * 3, kv_len=torch.tensor([70], dtype=torch.int32))
    assert len(given) == 1


def test_where_fa4_fails_dense_attention_is_torch_s_and_it_is_told_once(monkeypatch, caplog):
    def flash_attn_func(q, k, v, **options):
        raise RuntimeError("no compiler")

    installed(monkeypatch, flash_attn_func=flash_attn_func)
    monkeypatch.setattr(fa4, "missing", lambda device: None)
    monkeypatch.setattr(dense, "_refused", set())
    query = torch.randn(1, 100, 2, 64).bfloat16()
    expected = torch.nn.functional.scaled_dot_product_attention(
        *[query.transpose(1, 2)] * 3
    ).transpose(1, 2)
    for _ in range(2):
        torch.testing.assert_close(dense_attention_with_lse(query, query, query)[0], expected)
    assert [record.message for record in caplog.records] == [
        "flash-attn-4 fails with no compiler; torch's kernel runs instead"
    ]


def test_missing_fa4_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "pip install --pre 'dit-sparse[fa4]'" in fa4.mismatch.__wrapped__()


@pytest.mark.parametrize("lengths", [None, [70, 150]])
@pytest.mark.parametrize("precision, limit, lse_limit", [("int8", 0.02, 0.03), ("fp8", 0.06, 0.15)])
def test_8_bits_in_torch_are_near_full_precision_however_far_the_keys_lie(
    lengths, precision, limit, lse_limit
):
    query, key, value = torch.randn(3, 2, 150, 3, 32)
    mask = torch.rand(1, 3, 3, 3) < 0.5
    mask[..., 0], mask[0, 1, 1] = True, False
    packed = BlockMask.from_dense(mask, 150, 150)
    kv_len = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    given = query, key + 20 * torch.randn(32), value, packed
    options = {"kv_len": kv_len, "return_lse": True}
    full, full_lse = sparse_attention(*given, **options)
    output, lse = sparse_attention(*given, precision=precision, **options)
    assert 0 < (output - full).square().mean() < limit**2 * full.square().mean()
    torch.testing.assert_close(lse, full_lse, atol=lse_limit, rtol=0)


def test_precision_is_refused_where_there_is_none():
    query, mask = torch.zeros(1, 100, 2, 32), BlockMask.full(100, 100)
    with pytest.raises(ValueError, match="precision must be one of full, int8, fp8, got 'fp4'"):
        sparse_attention(query, query, query, mask, precision="fp4")
    with pytest.raises(ValueError, match="FlexAttention takes precision='full', not 'int8'"):
        sparse_attention(query, query, query, mask, precision="int8", engine="flex")
    with pytest.raises(ValueError, match="precision must be one of full, int8, fp8, got 8"):
        AdaSpa(precision=8)
    assert "precision='full'" in fa4.unfit(
        problem(block_size=(128, 128))._replace(precision="int8")
    )
    int8 = {"precision": "int8", "device": torch.device("cuda", 0)}
    assert "float32" in triton_engine.unfit(problem(dtype=torch.float32)._replace(**int8))


@pytest.mark.parametrize("precision, first", [("int8", (8, 0)), ("fp8", (8, 9))])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0)])
def test_8_bits_need_a_gpu_that_multiplies_them(monkeypatch, precision, first, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    asked = problem(device=torch.device("cuda", 0))._replace(precision=precision)
    reason = triton_engine.unfit(asked)
    if capability >= first:
        assert reason is None
    else:
        assert f"compute capability {first[0]}.{first[1]}, and this GPU has" in reason


def test_the_reference_is_the_torch_engine():
    assert ENGINES["torch"].attend is reference.sparse_attention

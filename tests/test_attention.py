"""`sparse_attention` on the CPU, against a dense masked softmax in float64."""

import pytest
import torch

from dit_sparse import BlockMask, dense, sparse_attention
from dit_sparse.attention import block_mass
from dit_sparse.dense import dense_attention_with_lse
from dit_sparse.measure import sampled_kept_mass
from dit_sparse.reference import block_pool


def oracle(query, key, value, mask, block_size, kv_len=None):
    """Slow: every logit, float64. mask (B, H, Nq, Nk)."""
    tokens = mask.repeat_interleave(block_size[0], 2).repeat_interleave(block_size[1], 3)
    tokens = tokens[:, :, : query.shape[1], : key.shape[1]].clone()
    for b, valid in enumerate([] if kv_len is None else kv_len.tolist()):
        tokens[b, :, :, valid:] = False
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~tokens, -torch.inf)
    output = scores.softmax(-1).nan_to_num(0) @ v
    return output.transpose(1, 2), scores.logsumexp(-1)


def inputs(q_len, kv_len, heads=3, dim=32):
    query = torch.randn(2, q_len, heads, dim)
    key, value = torch.randn(2, 2, kv_len, heads, dim)
    return query, key, value


@pytest.mark.parametrize("q_len,kv_len", [(300, 300), (64, 200), (1, 65), (130, 1)])
@pytest.mark.parametrize("block_size", [(64, 64), (32, 128)])
def test_agrees_with_a_dense_masked_softmax(q_len, kv_len, block_size):
    query, key, value = inputs(q_len, kv_len)
    blocks = -(-q_len // block_size[0]), -(-kv_len // block_size[1])
    mask = torch.rand(2, 3, *blocks) < 0.5
    mask[..., 0] = True
    packed = BlockMask.from_dense(mask, q_len, kv_len, block_size)
    output, lse = sparse_attention(query, key, value, packed, return_lse=True)
    expected, expected_lse = oracle(query, key, value, mask, block_size)
    torch.testing.assert_close(output.double(), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_torch_changes_nothing(dtype):
    query, key, value = inputs(200, 200)
    mask = torch.rand(2, 3, 4, 4) < 0.5
    found = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            packed = BlockMask.from_dense(mask, 200, 200)
            outputs = sparse_attention(query, key, value, packed, return_lse=True)
        finally:
            torch.set_default_dtype(torch.float32)
        found.append((*outputs, packed.density))
    assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(*found))


def test_a_row_without_blocks_is_zero_with_lse_minus_infinity():
    query, key, value = inputs(200, 200)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[:, :, 1] = False
    packed = BlockMask.from_dense(mask, 200, 200)
    output, lse = sparse_attention(query, key, value, packed, return_lse=True)
    assert (output[:, 64:128] == 0).all() and lse[:, :, 64:128].isneginf().all()
    assert output[:, :64].abs().min() > 0 and lse[:, :, :64].isfinite().all()


def test_samples_of_different_valid_length():
    query, key, value = inputs(150, 150)
    kv_len = torch.tensor([150, 70])
    mask = torch.ones(2, 3, 3, 3, dtype=torch.bool)
    packed = BlockMask.from_dense(mask, 150, 150)
    output = sparse_attention(query, key, value, packed, kv_len=kv_len)
    expected, _ = oracle(query, key, value, mask, (64, 64), kv_len)
    torch.testing.assert_close(output.double(), expected, atol=2e-6, rtol=1e-5)


def test_more_valid_keys_than_there_are_is_all_of_them():
    query, key, value = inputs(100, 100)
    packed = BlockMask.full(100, 100)
    output = sparse_attention(query, key, value, packed, kv_len=torch.tensor([128, 101]))
    assert output.equal(sparse_attention(query, key, value, packed))


def test_samples_without_a_valid_key_are_zero_with_lse_minus_infinity():
    query, key, value = inputs(150, 150)
    packed = BlockMask.full(150, 150)
    kv_len = torch.tensor([0, 70])
    output, lse = sparse_attention(query, key, value, packed, kv_len=kv_len, return_lse=True)
    assert (output[0] == 0).all() and lse[0].isneginf().all() and lse[1].isfinite().all()


def test_any_strides():
    base = torch.randn(3, 2, 4, 140, 64)  # (qkv, B, H, S, 2D)
    query, key, value = base.transpose(2, 3)[..., ::2]
    packed = BlockMask.full(140, 140)
    output = sparse_attention(query, key, value, packed)
    expected = sparse_attention(*(x.contiguous() for x in (query, key, value)), packed)
    torch.testing.assert_close(output, expected)


def test_dense_lse_and_block_mass_sum_to_the_queries_of_a_block():
    query, key, value = inputs(150, 150)
    output, lse = dense_attention_with_lse(query, key, value)
    full = torch.ones(2, 3, 3, 3, dtype=torch.bool)
    expected, expected_lse = oracle(query, key, value, full, (64, 64))
    torch.testing.assert_close(output.double(), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=5e-6, rtol=1e-5)
    mass = block_mass(query, key, lse, (64, 64))
    torch.testing.assert_close(mass.sum(-1), torch.tensor([64.0, 64, 22]).expand(2, 3, 3))
    shares = (query[0, :64, 1].double() @ key[0, :, 1].double().T * 32**-0.5).softmax(-1)
    assert mass[0, 1, 0, 1].item() == pytest.approx(shares[:, 64:128].sum().item(), rel=1e-5)


def test_sampled_kept_mass_is_near_the_mass_of_all_rows():
    query, key, _ = inputs(640, 640)
    mask = torch.rand(2, 3, 10, 10) < 0.5
    mask[..., 0] = True
    packed = BlockMask.from_dense(mask, 640, 640)
    _, lse = dense_attention_with_lse(query, key, key)
    exact = (block_mass(query, key, lse, (64, 64)) * mask).sum((0, 2, 3)) / (2 * 640)
    assert (sampled_kept_mass(query, key, packed) - exact).abs().max() < 0.03


@pytest.mark.parametrize(("length", "rows"), [(50, range(50)), (640, range(5, 640, 10))])
@pytest.mark.parametrize("lengths", [None, (50, 41)])
def test_sampled_kept_mass_is_that_of_evenly_spaced_rows(length, rows, lengths):
    query, key, _ = inputs(length, 50)
    blocks = torch.rand(2, 3, -(-length // 64), 2) < 0.5
    packed = BlockMask.from_dense(blocks, length, 50, (64, 32))
    kv_len = None if lengths is None else torch.tensor(lengths)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    if lengths is not None:
        scores[1, ..., 41:] = -torch.inf
    kept = blocks.repeat_interleave(64, 2)[:, :, :length].repeat_interleave(32, 3)[..., :50]
    exact = (scores.softmax(-1) * kept)[:, :, list(rows)].sum(-1).mean((0, 2))
    torch.testing.assert_close(sampled_kept_mass(query, key, packed, kv_len), exact)


def test_block_pool_is_a_mean_over_valid_tokens():
    x = torch.randn(2, 100, 3, 8)
    pooled = block_pool(x, 64)
    torch.testing.assert_close(pooled[:, :, 1], x[:, 64:].mean(1))


def test_bad_arguments_say_what_was_expected():
    query, key, value = inputs(100, 100)
    packed = BlockMask.full(100, 100)
    with pytest.raises(ValueError, match="for 100 queries and 100 keys, got 90"):
        sparse_attention(query[:, :90], key, value, packed)
    with pytest.raises(ValueError, match="dtypes differ"):
        sparse_attention(query.half(), key, value, packed)
    with pytest.raises(ValueError, match="need a GPU"):
        sparse_attention(query, key, value, packed, engine="triton")
    with pytest.raises(ValueError, match="auto, triton, fa4, flex, torch"):
        sparse_attention(query, key, value, packed, engine="cuda")
    with pytest.raises(ValueError, match=r"\(B, S, H, D\)"):
        sparse_attention(query[0], key, value, packed)


@pytest.mark.parametrize("failure", [AttributeError, NotImplementedError, RuntimeError])
def test_dense_attention_without_torchs_operators_is_the_same(monkeypatch, failure):
    def fail(*tensors):
        raise failure

    given = inputs(100, 150)
    expected = dense_attention_with_lse(*given)
    monkeypatch.setattr(dense, "_fused", fail)
    torch.testing.assert_close(dense_attention_with_lse(*given), expected)


def test_dense_attention_to_the_valid_keys_of_each_sample():
    query, key, value = inputs(100, 150)
    found = dense_attention_with_lse(query, key, value, torch.tensor([150, 70]))
    for sample, valid in enumerate((150, 70)):
        one = slice(sample, sample + 1)
        alone = dense_attention_with_lse(query[one], key[one, :valid], value[one, :valid])
        torch.testing.assert_close([x[one] for x in found], [*alone])


def test_dense_attention_that_runs_out_of_memory_says_so(monkeypatch):
    def fail(*tensors):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(dense, "_fused", fail)
    with pytest.raises(torch.OutOfMemoryError):
        dense_attention_with_lse(*torch.randn(3, 1, 8, 1, 16))

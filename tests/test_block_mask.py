"""BlockMask: packing, indices, density, and what other libraries make of it."""

import pytest
import torch

from dit_sparse import BlockMask


def random_mask(q_blocks, kv_blocks, density=0.4):
    mask = torch.rand(2, 3, q_blocks, kv_blocks) < density
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("q_len,kv_len", [(300, 300), (64, 1), (65, 513), (640, 640)])
def test_packing_keeps_the_mask(q_len, kv_len):
    mask = random_mask(-(-q_len // 64), -(-kv_len // 64))
    packed = BlockMask.from_dense(mask, q_len, kv_len)
    assert packed.to_dense().equal(mask)
    assert packed.bits.dtype == torch.uint8
    assert packed.nbytes() == mask[..., 0].numel() * -(-mask.shape[-1] // 8)


def test_indices_list_the_kept_blocks_in_order():
    mask = random_mask(5, 9)
    mask[0, 0, 1] = False
    packed = BlockMask.from_dense(mask, 300, 520)
    counts, indices = packed.indices()
    assert indices.dtype == torch.int16 and indices.shape[-1] == mask.sum(-1).max()
    assert indices.is_contiguous()  # as kernels read them
    for row in torch.cartesian_prod(*map(torch.arange, mask.shape[:3])).tolist():
        kept = mask[tuple(row)].nonzero().flatten()
        assert indices[tuple(row)][: counts[tuple(row)]].tolist() == kept.tolist()


def test_the_longest_rows_of_the_fullest_head_start_first():
    mask = torch.zeros(1, 2, 3, 4, dtype=torch.bool)
    mask[0, 0, :, 0] = True
    mask[0, 1, 0, :2] = mask[0, 1, 1, :4] = mask[0, 1, 2, :3] = True
    packed = BlockMask.from_dense(mask, 192, 256)
    before = packed.nbytes()
    assert packed.work_order.tolist() == [4, 5, 3, 0, 1, 2]
    assert packed.nbytes() == before + 4 * 6


def test_density_counts_valid_tokens_only():
    mask = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    mask[0, 0, 0, 0] = mask[0, 0, 1, 1] = True
    packed = BlockMask.from_dense(mask, 80, 80)  # blocks of 64 and 16
    assert packed.density.item() == pytest.approx((64 * 64 + 16 * 16) / 80**2)


def test_density_is_that_of_each_head_over_all_samples():
    mask = torch.zeros(2, 3, 2, 4, dtype=torch.bool)
    mask[0, 1], mask[1, 2, 0] = True, True
    assert BlockMask.from_dense(mask, 128, 256).density.tolist() == [0, 0.5, 0.25]


def test_twice_is_for_the_same_samples_one_after_the_other():
    mask = random_mask(3, 4)
    assert BlockMask.from_dense(mask, 192, 256).twice().to_dense().equal(torch.cat([mask, mask]))
    one = BlockMask.from_dense(mask[:1], 192, 256)
    assert one.twice() is one  # it serves any batch


def test_full_keeps_everything():
    full = BlockMask.full(100, 200)
    assert full.density.item() == 1 and full.to_dense().all()
    assert BlockMask.full(100, 200, (32, 64)).bits.shape == (1, 1, 4, 1)


def test_flex_mask_lists_the_same_blocks():
    mask = random_mask(5, 5)
    flex = BlockMask.from_dense(mask, 320, 320).to_flex()
    assert flex.to_dense().bool().equal(mask) and flex.BLOCK_SIZE == (64, 64)


@pytest.mark.parametrize("q_len,kv_len", [(300, 520), (320, 320), (65, 1)])
def test_fa4_fields_list_the_same_blocks_as_full_ones(q_len, kv_len):
    mask = random_mask(-(-q_len // 64), -(-kv_len // 64))
    mask[0, 0, 0] = False  # a row without blocks
    fields = BlockMask.from_dense(mask, q_len, kv_len).to_fa4()
    counts, indices = fields["full_block_cnt"], fields["full_block_idx"]
    assert counts.dtype == indices.dtype == torch.int32 and fields["block_size"] == (64, 64)
    assert not fields["mask_block_cnt"].any() and fields["mask_block_cnt"].shape == counts.shape
    again = torch.zeros_like(mask)
    for row in torch.cartesian_prod(*map(torch.arange, mask.shape[:3])).tolist():
        kept = indices[tuple(row)][: counts[tuple(row)]].tolist()
        assert kept == sorted(kept)  # only the last one is masked at the end of the keys
        again[tuple(row)][kept] = True
    assert again.equal(mask)


def test_wrong_shape_says_what_was_expected():
    with pytest.raises(ValueError, match=r"\(B, H, 5, 5\)"):
        BlockMask.from_dense(torch.ones(1, 1, 4, 5, dtype=torch.bool), 300, 300)

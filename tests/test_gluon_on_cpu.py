"""The Gluon kernels by tests/gluon_on_cpu.py, which would see what goes wrong in them."""

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import kernel_cases
import pytest
import torch
import triton
from kernel_cases import (
    CASES,
    EIGHT_BIT_CASES,
    Case,
    check_8_bits,
    check_attention,
    check_mass,
    gluon_fp8_tile,
    gluon_mass_tiles,
    gluon_tile,
    to_lists,
)

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
    pytest.skip("Gluon is of Triton 3.6", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("on a GPU the kernels run themselves", allow_module_level=True)

from gluon_on_cpu import Emulated  # noqa: E402

from dit_sparse.kernels import (  # noqa: E402
    hopper_fp8,
    hopper_fwd,
    hopper_specialized_fwd,
    hopper_specialized_mass,
    tiles,
)

SERVED = [case for case in CASES if gluon_tile(case)]


MANY = Case("", q_len=200, kv_len=1200, block_size=(128, 128), kept="all", heads=1)


def run(monkeypatch, case, module=hopper_fwd):
    kernel = Emulated(module, "hopper_fwd_kernel")
    monkeypatch.setattr(hopper_fwd, "hopper_fwd_kernel", kernel)
    return check_attention(case, "cpu", gluon_tile(case))


@pytest.fixture(autouse=True)
def no_other_kernel(monkeypatch):
    """Where Gluon fails, Triton's kernel would run instead, and be right."""
    monkeypatch.setattr(tiles, "_refused", {})
    yield
    assert not tiles._refused


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_hopper_fwd_is_as_exact_as_math_attention(monkeypatch, case):
    monkeypatch.setattr(hopper_specialized_fwd, "hopper_specialized_fwd", in_blocks_of_128)
    run(monkeypatch, case)


def in_blocks_of_128(*tensors, **options):
    hopper_fwd.hopper_fwd(*tensors, block_size=(128, 128), **options)


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_warp_groups_of_their_own_are_as_exact(monkeypatch, case, stages):
    kernel = Emulated(hopper_specialized_fwd, "hopper_specialized_fwd_kernel")
    monkeypatch.setattr(hopper_specialized_fwd, "hopper_specialized_fwd_kernel", kernel)
    case = replace(case, block_size=(128, 128))
    check_attention(case, "cpu", gluon_tile(case)._replace(num_stages=stages))


@pytest.mark.parametrize("stages", [2, 3])
def test_warp_groups_of_their_own_take_turns_over_many_blocks(monkeypatch, stages):
    kernel = Emulated(hopper_specialized_fwd, "hopper_specialized_fwd_kernel")
    monkeypatch.setattr(hopper_specialized_fwd, "hopper_specialized_fwd_kernel", kernel)
    for case in (MANY, replace(MANY, kept="some", batch=2, heads=3)):
        check_attention(case, "cpu", gluon_tile(case)._replace(num_stages=stages))


@pytest.mark.parametrize("module", [hopper_fwd, hopper_specialized_fwd])
def test_indices_of_a_list_may_lie_apart(monkeypatch, module):
    name = module.__name__.rpartition(".")[2] + "_kernel"
    monkeypatch.setattr(module, name, Emulated(module, name))

    def spread(blocks, dtype):
        counts, indices = to_lists(blocks, dtype)
        return counts, indices.repeat_interleave(2, -1)[..., ::2]

    monkeypatch.setattr(kernel_cases, "to_lists", spread)
    case = MANY if module is hopper_specialized_fwd else replace(MANY, block_size=(64, 64))
    check_attention(case, "cpu", gluon_tile(case))


@pytest.mark.parametrize("module", [hopper_fwd, hopper_specialized_fwd])
def test_an_empty_row_is_0_also_where_the_first_block_is_not_finite(monkeypatch, module):
    name = module.__name__.rpartition(".")[2] + "_kernel"
    monkeypatch.setattr(module, name, Emulated(module, name))
    block = 128 if module is hopper_specialized_fwd else 64
    case = Case("", q_len=2 * block, kv_len=2 * block, block_size=(block, block), kept="last")
    query, key, value, blocks, _ = kernel_cases.draw(case, "cpu")
    key[:, 0], value[:, 1], value[:, 2] = torch.nan, torch.nan, torch.inf
    blocks[:, :, 0] = False
    out, lse = kernel_cases.block_sparse_fwd(
        query, key, value, *to_lists(blocks), block_size=case.block_size, tile=gluon_tile(case)
    )
    assert (out[:, :block] == 0).all() and lse[:, :, :block].isneginf().all()
    assert out[:, block:].isfinite().all() and lse[:, :, block:].isfinite().all()


@pytest.mark.parametrize("case", filter(gluon_mass_tiles, CASES), ids=lambda case: case.name)
def test_mass_by_warp_groups_matches_the_dense_softmax(monkeypatch, case):
    kernel = Emulated(hopper_specialized_mass, "hopper_specialized_mass_kernel")
    monkeypatch.setattr(hopper_specialized_mass, "hopper_specialized_mass_kernel", kernel)
    for tile in gluon_mass_tiles(case):
        check_mass(case, "cpu", tile)


def in_fp8(monkeypatch, *cases):
    kernel = Emulated(hopper_fp8, "hopper_fp8_kernel")
    monkeypatch.setattr(hopper_fp8, "hopper_fp8_kernel", kernel)
    return [check_8_bits(case, "cpu", "fp8", gluon_fp8_tile(case)) for case in cases]


@pytest.mark.parametrize(
    "case", filter(gluon_fp8_tile, EIGHT_BIT_CASES), ids=lambda case: case.name
)
def test_fp8_is_attention_of_rounded_inputs(monkeypatch, case):
    in_fp8(monkeypatch, case)


def test_fp8_over_many_blocks(monkeypatch):
    small = replace(MANY, block_size=(64, 64), kept="some", batch=2, heads=3)
    in_fp8(monkeypatch, MANY, small)


@pytest.mark.parametrize("factor", [1e-30, 1e-4, 1e3, 1e6, 1e30])
def test_values_of_one_block_do_not_spoil_rows_that_do_not_read_it(fp8, factor):
    out, exact, blocks = fp8_beside_exact(lambda value: value.mul_(factor))
    for row in range(blocks.shape[2]):
        rows = slice(64 * row, 64 * row + 64)
        error = (out[:, rows].double() - exact[:, rows]).square().mean()
        assert error.sqrt() < 0.07 * exact[:, rows].square().mean().sqrt(), row


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_fp8_of_rows_that_read_no_value_that_is_not_finite(fp8, bad):
    out, exact, _ = fp8_beside_exact(lambda value: value.fill_(bad))
    spared = slice(64 * 3)
    torch.testing.assert_close(out[:, spared].double(), exact[:, spared], atol=0.1, rtol=0.1)


@pytest.fixture
def fp8(monkeypatch):
    kernel = Emulated(hopper_fp8, "hopper_fp8_kernel")
    monkeypatch.setattr(hopper_fp8, "hopper_fp8_kernel", kernel)


FOUR_BLOCKS = Case("", q_len=256, kv_len=256, kept="all", heads=1)
IN_FP8 = {"block_size": (64, 64), "precision": "fp8", "tile": gluon_fp8_tile(FOUR_BLOCKS)}


def fp8_beside_exact(change):
    """The output, the exact one and the kept blocks; the last row alone reads the last block."""
    query, key, value, blocks, _ = kernel_cases.draw(FOUR_BLOCKS, "cpu")
    change(value[:, 192:])
    blocks[:, :, :3, 3] = False
    counts, indices = to_lists(blocks)
    indices[:, :, :3, 3] = 30000  # behind the end of their lists
    out, _ = kernel_cases.block_sparse_fwd(query, key, value, counts, indices, **IN_FP8)
    mask = kernel_cases.token_mask(FOUR_BLOCKS, blocks, None)
    read = value.nan_to_num(0.0, 0.0)  # 0 times what is not finite is not 0
    return out, kernel_cases.oracle(query, key, read, mask, 64**-0.5)[0], blocks


def test_fp8_of_an_empty_row_does_not_look_at_its_list(fp8):
    query, key, value, blocks, _ = kernel_cases.draw(FOUR_BLOCKS, "cpu")
    counts, indices = to_lists(blocks)
    counts[:, :, 0], indices[:, :, 0] = 0, 30000
    out, lse = kernel_cases.block_sparse_fwd(query, key, value, counts, indices, **IN_FP8)
    assert (out[:, :64] == 0).all() and lse[:, :, :64].isneginf().all()
    assert out[:, 64:].isfinite().all() and lse[:, :, 64:].isfinite().all()


def test_fp8_takes_its_own_tiles_alone():
    query, key, value, blocks, _ = kernel_cases.draw(FOUR_BLOCKS, "cpu")
    options = IN_FP8 | {"tile": IN_FP8["tile"]._replace(num_warps=8)}
    with pytest.raises(ValueError, match="FP8 in Gluon has"):
        kernel_cases.block_sparse_fwd(query, key, value, *to_lists(blocks), **options)


LOAD_K = "    load(k, batch, head, next_start, k_shared, k_ready, other, tile + 3 <= last)\n"
LOAD_V = "    load(v, batch, head, start_2, v_shared, v_ready, slot, tile + 2 <= last)\n"
WAIT_SCORES = "    scores = warpgroup_mma_wait(1, deps=(scores_token,))\n"
WAIT_ACC = "    acc = warpgroup_mma_wait(0, deps=(acc_token,))\n"
WAIT_K = "    mbarrier.wait(k_ready.index(other), (tile + 1) // STAGES & 1)\n"
WAIT_V = "    mbarrier.wait(v_ready.index(slot), tile // STAGES & 1)\n"


@pytest.mark.parametrize(
    "before, after, told",
    [
        (WAIT_K, "", "second copy"),
        (WAIT_V, "", "second copy"),
        (WAIT_V, WAIT_V.replace("tile //", "1 + tile //"), "second copy"),
        (LOAD_K, LOAD_K.replace("tile + 3 <= last", "tile < 0"), "waits for ever"),
        (WAIT_SCORES, WAIT_SCORES.replace("(1,", "(2,"), "not waited for"),
        (WAIT_ACC + LOAD_V, LOAD_V + WAIT_ACC, "overwritten"),
        ("tile + 3 <= last", "tile + 2 <= last", "ends before"),
        ("last_start + columns < kv_len", "last_start + columns < kv_len + 64", "LSE"),
        ("gl.minimum(tile + 3, last)", "gl.minimum(tile + 2, last)", "output"),
    ],
)
def test_it_sees_what_goes_wrong(monkeypatch, tmp_path, before, after, told):
    source = Path(hopper_fwd.__file__).read_text()
    assert source.count(before) == 1
    path = tmp_path / "changed.py"
    path.write_text(source.replace(before, after).replace("from .", "from dit_sparse.kernels."))
    spec = importlib.util.spec_from_file_location("changed", path)
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    case = Case("", q_len=70, kv_len=500, kept="all", heads=1, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match=told):
        run(monkeypatch, case, changed)

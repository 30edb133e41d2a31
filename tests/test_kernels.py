"""The Triton kernels against a float64 oracle: natively on a GPU, else in the interpreter."""

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from kernel_cases import (  # noqa: E402
    CASES,
    EIGHT_BIT_CASES,
    FP32,
    TAIL_CASES,
    Case,
    check_8_bits,
    check_attention,
    check_mass,
    check_pool,
    check_sampled,
    check_selection,
    check_tail,
    check_top_k,
    draw,
    gluon_fp8_tile,
    gluon_mass_tiles,
    gluon_tile,
    to_lists,
)
from triton.runtime.errors import OutOfResources  # noqa: E402

from dit_sparse import BlockMask, reference  # noqa: E402
from dit_sparse.engines import triton_engine  # noqa: E402
from dit_sparse.kernels import block_mass as block_mass_module  # noqa: E402
from dit_sparse.kernels import block_sparse_fwd as fwd  # noqa: E402
from dit_sparse.kernels import dot, tiles  # noqa: E402
from dit_sparse.kernels.block_lists import block_lists  # noqa: E402
from dit_sparse.kernels.block_mass import block_mass  # noqa: E402
from dit_sparse.kernels.block_pool import block_pool  # noqa: E402
from dit_sparse.kernels.block_sparse_fwd import block_sparse_fwd  # noqa: E402
from dit_sparse.kernels.quantize import quantize_values  # noqa: E402
from dit_sparse.kernels.tail_fwd import tail_fwd  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMED = {case.name: case for case in CASES}
SHARED_MEMORY = {  # bytes that one program may have
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}


NOT_HOPPER = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9


def by_name(*names):
    return pytest.mark.parametrize("case", [NAMED[n] for n in names], ids=names)


@pytest.fixture(autouse=True)
def nan_outputs(monkeypatch):
    """An element that no kernel wrote reads NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(params=["pointer", "descriptor"])
def path(request, monkeypatch):
    """Both ways to load tiles, where the machine has both; the interpreter has."""
    if request.param == "descriptor" and not dot.INTERPRETING:
        if not dot.has_fast_descriptors(torch.device(DEVICE, torch.cuda.current_device())):
            pytest.skip("this GPU loads through pointers")
    wanted = request.param == "descriptor"
    monkeypatch.setattr(dot, "has_fast_descriptors", lambda device: wanted)
    return request.param


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention_is_as_exact_as_math_attention(case, path):
    if path == "descriptor" and case.dtype == FP32:
        pytest.skip("float32 has one path")
    check_attention(case, DEVICE)


def test_sparse_attention_gives_the_kernel_what_it_wants(path):
    query, key, value = torch.randn(3, 3, 100, 2, 32, device=DEVICE)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool, device=DEVICE)
    mask[..., 3] = mask[..., 0, 0] = True
    packed = BlockMask.from_dense(mask, 100, 100, (32, 32))
    arguments = {"kv_len": torch.tensor([40, 0, 98]), "scale": None}
    output, lse = triton_engine.attend(query, key, value, packed, **arguments)
    expected, expected_lse = reference.sparse_attention(query, key, value, packed, **arguments)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


@by_name(
    "d64-bf16", "d128-fp16", "d33-bf16-unaligned", "block-64-128", "one-token-over",
    "some-rows-empty", "kv-len-inside-big-blocks", "kv-len-shared-lists", "sliced",
)  # fmt: skip
def test_8_bits_are_attention_of_rounded_inputs(case, path):
    for precision in ("int8", "fp8"):
        check_8_bits(case, DEVICE, precision)


@pytest.mark.slow
@pytest.mark.parametrize("case", EIGHT_BIT_CASES, ids=lambda case: case.name)
def test_8_bits_in_every_case(case, path):
    for precision in ("int8", "fp8"):
        check_8_bits(case, DEVICE, precision)


@pytest.mark.parametrize("by_block", [False, True])
def test_values_in_fp8_stand_where_they_are_told_to(by_block):
    value = torch.randn(2, 150, 3, 40, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    rounded, scale = quantize_values(value, 64, by_block=by_block)
    if by_block:
        assert rounded.shape == (2, 3, 3, 40, 64)
        places = torch.tensor([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15])
        back = torch.empty_like(rounded.float()).unflatten(-1, (4, 16))
        back[..., places.to(DEVICE)] = rounded.float().unflatten(-1, (4, 16))
        rounded = back.flatten(-2).transpose(2, 3).flatten(3)
        torch.testing.assert_close(scale[..., 0].exp2() * scale[..., 1], scale[..., 0] * 0 + 1)
        scale = scale[..., 0].exp2()
    exact = rounded.float().unflatten(-1, (3, 64)) * scale[:, :, None, :, None]
    exact = exact.flatten(3).permute(0, 3, 1, 2)
    assert (exact[:, 150:] == 0).all()
    torch.testing.assert_close(exact[:, :150], value, rtol=0.07, atol=0.01)


def test_a_head_dim_that_tma_cannot_address_goes_through_pointers(path):
    aligned, odd = (torch.zeros(1, 8, 2, d, dtype=torch.bfloat16) for d in (40, 33))
    assert dot.load_path(aligned, aligned) == path
    assert dot.load_path(aligned, odd) == "pointer"
    assert dot.load_path(aligned[:1].expand(2, -1, -1, -1)) == "pointer"
    assert dot.load_path(aligned.float()) == "float32"


@by_name("d64-bf16", "d128-fp16", "d40-bf16", "d64-fp32", "block-128-128", "cross", "sliced")
def test_block_mass_matches_the_dense_softmax(case, path):
    if path == "descriptor" and case.dtype == FP32:
        pytest.skip("float32 has one path")
    check_mass(case, DEVICE)


def test_block_mass_sums_the_tiles_of_a_block():
    # A float32 tile has 32 rows: 4 x 4 tiles a block, those past the end never run.
    check_mass(Case("", dtype=FP32, q_len=150, kv_len=170, block_size=(128, 128)), DEVICE)


def test_block_mass_of_a_skipped_row_is_zero():
    x = torch.randn(1, 70, 1, 64, device=DEVICE)
    lse = torch.full((1, 1, 70), float("-inf"), device=DEVICE)
    assert (block_mass(x, x, lse, block_size=(64, 64)) == 0).all()


@by_name("d64-bf16", "d128-fp16", "d96-bf16", "d32-fp32", "block-32-32", "transposed", "sliced")
def test_block_pool_averages_valid_tokens(case):
    check_pool(case, DEVICE)


@by_name(
    "d64-bf16", "d128-fp16", "d40-bf16", "d64-fp32", "block-64-128", "block-32-32",
    "shorter-than-a-block", "transposed", "kv-len-per-sample", "kv-len-inside-big-blocks",
)  # fmt: skip
def test_sampled_mass(case, path):
    if path == "descriptor" and case.dtype == FP32:
        pytest.skip("float32 has one path")
    check_sampled(case, DEVICE)


def test_sampled_mass_of_more_rows_a_block_than_a_tile_has():
    check_sampled(Case("", dtype=FP32, head_dim=256, q_len=530, block_size=(128, 64)), DEVICE)


def test_sampled_mass_of_more_blocks_than_are_summed_at_once():
    check_sampled(Case("", q_len=64, kv_len=1100, block_size=(64, 32)), DEVICE)


@pytest.mark.parametrize("blocks", [1, 19, 77])
def test_top_k(blocks):
    check_top_k(DEVICE, blocks, rows=5)


@pytest.mark.parametrize("options", [{}, {"density": 0.6, "heads": 2}, {"density": 0.9}])
def test_selection_in_four_launches_is_that_of_plain_torch(options):
    check_selection(DEVICE, **options)


def test_selection_of_less_than_a_byte_of_blocks():
    check_selection(DEVICE, tokens=90, heads=1, head_adaptive=False)


@by_name(
    "d64-bf16", "d128-fp16", "d33-bf16-unaligned", "d64-fp32", "block-64-128", "one-token-over",
    "some-rows-empty", "kv-len-inside-big-blocks", "kv-len-shared-lists", "sliced",
)  # fmt: skip
def test_tail_is_as_exact_as_math_attention(case, path):
    if path == "descriptor" and case.dtype == FP32:
        pytest.skip("float32 has one path")
    check_tail(case, DEVICE)


@pytest.mark.parametrize("case", TAIL_CASES, ids=lambda case: case.name)
def test_tail_of_means_of_parts_of_blocks(case, path):
    test_tail_is_as_exact_as_math_attention(case, path)


@pytest.mark.parametrize("tail_tokens", [1, 4])
def test_a_tile_of_means_may_be_less_than_a_block(tail_tokens):
    case = Case("", q_len=70, kv_len=530, block_size=(128, 128), heads=1)
    check_tail(replace(case, tail_tokens=tail_tokens), DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tail_in_every_case(case, path):
    test_tail_is_as_exact_as_math_attention(case, path)


def test_tail_reads_every_byte_of_the_mask():
    # 70 kv blocks: two tiles of pooled keys, the last byte of a row cut.
    case = Case("", q_len=70, kv_len=2230, block_size=(32, 32), heads=1)
    for tail_tokens in (None, 16):
        check_tail(replace(case, tail_tokens=tail_tokens), DEVICE)


def test_no_tail_tile_when_lists_keep_only_full_blocks():
    # Row 0 keeps block 0 alone: its tokens must not see the short last block.
    case = replace(NAMED["only-the-last-block"], kept="one", q_len=100, kv_len=130)
    check_attention(case, DEVICE)


def test_equal_calls_are_bit_equal():
    x = torch.randn(1, 130, 2, 64, device=DEVICE, dtype=torch.bfloat16)
    counts = torch.full((1, 1, 3), 3, dtype=torch.int32, device=DEVICE)
    indices = torch.arange(3, dtype=torch.int16, device=DEVICE).expand(1, 1, 3, 3)
    first, second = (
        block_sparse_fwd(x, x, x, counts, indices, block_size=(64, 64)) for _ in range(2)
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("blocks", [1, 8, 1023, 1024, 2060])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_block_lists_are_those_of_plain_torch(blocks, dtype):
    mask = torch.rand(2, 2, 3, blocks) < 0.3
    mask[0, 0, 0], mask[1, 1, 2] = False, True
    packed = BlockMask.from_dense(mask, 3 * 64, blocks * 64)
    counts, indices = packed.indices(dtype)  # plain torch
    got = block_lists(packed.bits.to(DEVICE), blocks, packed.max_blocks, dtype)
    assert got[0].cpu().equal(counts) and got[1].cpu().equal(indices)


def test_the_order_of_rows_changes_nothing(path):
    case = replace(NAMED["some-rows-empty"], q_len=200, heads=3)
    query, key, value, blocks, _ = draw(case, DEVICE)
    packed = BlockMask.from_dense(blocks, case.q_len, case.kv_len)
    lists = (*to_lists(blocks),)
    plain = block_sparse_fwd(query, key, value, *lists, block_size=(64, 64))
    ordered = block_sparse_fwd(
        query, key, value, *lists, block_size=(64, 64), order=packed.work_order
    )
    assert torch.equal(plain[0], ordered[0]) and torch.equal(plain[1], ordered[1])


@pytest.mark.parametrize("tile", [(64, 64, 4, 2), (64, 32, 4, 3), (32, 128, 8, 1)])
def test_every_tile_gives_the_same_attention(tile, path):
    x = torch.randn(1, 300, 2, 64, device=DEVICE, dtype=torch.float16)
    mask = torch.rand(1, 2, 3, 3, device=DEVICE) < 0.6
    mask[..., -1] = True
    lists = to_lists(mask)
    usual = block_sparse_fwd(x, x, x, *lists, block_size=(128, 128))
    other = block_sparse_fwd(x, x, x, *lists, block_size=(128, 128), tile=tiles.Tile(*tile))
    torch.testing.assert_close(usual[0], other[0], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(usual[1], other[1], atol=1e-5, rtol=1e-5)


def test_a_gpu_that_is_too_small_gets_a_smaller_tile_and_one_warning(caplog):
    ran = []

    def run(tile):
        ran.append(tile)
        if tile.num_stages > 1 or tile.columns > 32:
            raise OutOfResources(200_000, 100_000, "shared memory")

    for _ in range(2):
        tiles.launch(("test",), tiles.Tile(128, 64, 4, 3), run)
    assert ran[-2:] == [tiles.Tile(128, 32, 4, 1)] * 2 and len(ran) == 5
    assert caplog.text.count("does not run here") == 1


@pytest.mark.parametrize("precision", ["full", "int8", "fp8"])
def test_attention_that_does_not_fit_runs_with_a_smaller_tile(monkeypatch, caplog, precision):
    kernel = fwd.block_sparse_fwd_kernel

    class TooLarge:
        def __getitem__(self, grid):
            def run(**options):
                if options["num_stages"] > 1:
                    raise OutOfResources(200_000, 100_000, "shared memory")
                return kernel[grid](**options)

            return run

    monkeypatch.setattr(tiles, "_refused", {})
    x = torch.randn(1, 64, 1, 32, device=DEVICE, dtype=torch.float16)
    given = arguments(query=x, key=x, value=x, precision=precision)
    given["kv_num_blocks"] = torch.ones(1, 1, 1, dtype=torch.int32, device=DEVICE)
    given["kv_indices"] = torch.zeros(1, 1, 1, 1, dtype=torch.int16, device=DEVICE)
    want = block_sparse_fwd(**given)
    monkeypatch.setattr(fwd, "block_sparse_fwd_kernel", TooLarge())
    for _ in range(2):
        torch.testing.assert_close(block_sparse_fwd(**given), want)
    assert caplog.text.count("does not run here") == 1


def test_triton_runs_where_gluon_fails_in_whatever_way(caplog):
    ran = []

    def run(tile):
        ran.append(tile)
        if tile.gluon:
            raise AttributeError("this Triton has no such name")

    for _ in range(2):
        tiles.launch(("gluon",), tiles.Tile(64, 64, 4, 2, True), run)
    assert ran[1:] == [tiles.Tile(64, 64, 4, 2)] * 2
    assert caplog.text.count("does not run here") == 1
    tiles.launch(("mass",), tiles.Tile(128, 64, 8, 4, True), run, tiles.Tile(128, 64, 4, 3))
    assert ran[-1] == tiles.Tile(128, 64, 4, 3)


def test_an_error_of_triton_is_not_hidden():
    def run(tile):
        raise AttributeError("a mistake of ours")

    with pytest.raises(AttributeError):
        tiles.launch(("broken",), tiles.Tile(64, 64, 4, 2), run)


@pytest.mark.parametrize(
    "head_dim, block, gluon, other",
    [
        (128, 128, (128, 128, 8, 2, True), (128, 64, 4, 2, False)),
        (128, 64, (64, 64, 4, 2, True), (64, 64, 4, 3, False)),
        (64, 128, (64, 128, 4, 2, True), (128, 64, 4, 3, False)),
        (64, 64, (64, 64, 4, 2, True), (64, 64, 4, 3, False)),
    ],
)
def test_the_tile_that_won_on_hopper_is_taken(monkeypatch, head_dim, block, gluon, other):
    monkeypatch.setattr(tiles, "family", lambda device: "hopper")
    asked = tiles.FORWARD, torch.device("cpu"), "descriptor", head_dim, (block, block)
    assert tiles.tile_for(*asked, gluon=True) == gluon
    assert tiles.tile_for(*asked) == other


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block", [64, 128])
def test_fp8_runs_in_gluon_on_hopper(monkeypatch, head_dim, block):
    monkeypatch.setattr(tiles, "family", lambda device: "hopper")
    asked = tiles.FORWARD_FP8, torch.device("cpu"), "descriptor", head_dim, (block, block)
    assert tiles.tile_for(*asked, gluon=True) == (64, block, 4, 2, True)
    assert tiles.tile_for(*asked).gluon is False


@pytest.mark.parametrize(
    "head_dim, dtype, tile",
    [
        (128, torch.bfloat16, (128, 128, 8, 4, True)),
        (64, torch.bfloat16, (128, 64, 8, 4, True)),
        (96, torch.bfloat16, (64, 64, 4, 1, False)),
        (64, FP32, (32, 32, 8, 2, False)),
    ],
)
def test_exact_mass_runs_in_gluon_on_hopper(monkeypatch, head_dim, dtype, tile):
    taken = []
    monkeypatch.setattr(tiles, "family", lambda device: "hopper")
    path = "float32" if dtype == FP32 else "descriptor"
    monkeypatch.setattr(block_mass_module, "load_path", lambda *tensors: path)
    monkeypatch.setattr(block_mass_module, "gluon_runs", lambda device: True)
    monkeypatch.setattr(
        block_mass_module, "launch", lambda key, tile, run, instead: taken.append((tile, instead))
    )
    x = torch.zeros(1, 64, 1, head_dim, dtype=dtype, device=DEVICE)
    with contextlib.suppress(IndexError):  # nothing ran, so there is no mass to fold
        block_mass(x, x, torch.zeros(1, 1, 64, device=DEVICE), block_size=(64, 64))
    assert [first for first, _ in taken] == [tile] and not taken[0][1].gluon


def test_gluon_is_for_hopper_alone(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(tiles.dot, "INTERPRETING", False)
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, runs in (((9, 0), True), ((10, 0), False), ((8, 9), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        tiles.gluon_runs.cache_clear()
        assert tiles.gluon_runs(device) is runs
    tiles.gluon_runs.cache_clear()


def test_gluon_of_an_older_triton_is_not_tried(monkeypatch):
    monkeypatch.setattr(tiles.dot, "INTERPRETING", False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for version, runs in (("3.5.1", False), ("3.6.0", True), ("4.0.0", True)):
        monkeypatch.setattr(tiles.triton, "__version__", version)
        tiles.gluon_runs.cache_clear()
        assert tiles.gluon_runs(torch.device("cuda", 0)) is runs
    tiles.gluon_runs.cache_clear()


def test_a_gpu_gets_the_tiles_of_its_own_family_or_the_nearest(monkeypatch):
    monkeypatch.setattr(tiles.dot, "INTERPRETING", False)
    monkeypatch.setattr(torch.version, "hip", None)
    device, common, own = torch.device("cuda", 0), [tiles.Tile(64, 64, 4, 2)], object()
    table = {("other", "pointer"): common, ("hopper", "descriptor"): own}
    known = {(8, 0): "ampere", (8, 9): "ada", (9, 0): "hopper", (10, 0): "blackwell"}
    for capability, name in (known | {(12, 0): "other"}).items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        tiles.family.cache_clear()
        assert tiles.family(device) == name
        assert tiles.rows_of(table, device, "descriptor") is own
        assert tiles.rows_of(table, device, "pointer") is common
        assert tiles.rows_of(table | {(name, "pointer"): own}, device, "pointer") is own
    tiles.family.cache_clear()


def test_the_first_tile_whose_rows_fit_the_block_is_taken_else_the_last_is_cut():
    of = [tiles.Tile(128, 64, 8, 3), tiles.Tile(64, 128, 4, 2)]
    table = {("other", "pointer"): {64: of}, ("hopper", "pointer"): {64: of}}
    for block, expected in (
        ((128, 128), (128, 64, 8, 3)),
        ((128, 32), (128, 32, 8, 3)),
        ((64, 64), (64, 64, 4, 2)),
        ((32, 64), (32, 64, 4, 2)),
    ):
        found = tiles.tile_for(table, torch.device("cpu"), "pointer", 64, block)
        assert found == (*expected, False)


def test_a_gpu_that_takes_no_tile_says_so():
    def run(tile):
        raise OutOfResources(200_000, 100, "shared memory")

    with pytest.raises(OutOfResources):
        tiles.launch(("none",), tiles.Tile(128, 64, 4, 3), run)


def arguments(**changes):
    x = torch.zeros(1, 100, 2, 64, device=DEVICE)
    given = {
        "query": x,
        "key": x,
        "value": x,
        "kv_num_blocks": torch.ones(1, 2, 2, dtype=torch.int32, device=DEVICE),
        "kv_indices": torch.zeros(1, 2, 2, 1, dtype=torch.int16, device=DEVICE),
        "block_size": (64, 64),
    }
    return {**given, **changes}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"query": torch.zeros(100, 2, 64)}, "query must be a non-empty"),
        ({"query": torch.zeros(1, 100, 2, 264)}, "head dim up to 256, got 264"),
        ({"query": torch.zeros(1, 100, 2, 64).double()}, "query must be bfloat16"),
        ({"key": torch.zeros(1, 100, 2, 64).half()}, "key must match query"),
        ({"key": torch.zeros(1, 100, 1, 64)}, "key must have the B, H and D of query"),
        ({"value": torch.zeros(1, 99, 2, 64)}, "value must have the shape of key"),
        ({"block_size": (48, 64)}, "block_size must be"),
        ({"scale": -1.0}, "scale must be positive, got -1.0"),
        (
            {"precision": "int8"},
            "takes bfloat16 and float16 and head dims from 17, got torch.float",
        ),
        ({"precision": "fp4"}, "precision must be one of full, int8, fp8, got 'fp4'"),
        ({"kv_num_blocks": torch.ones(1, 2, 3, dtype=torch.int32)}, r"shape \(1, 2, 2\)"),
        ({"kv_num_blocks": torch.ones(1, 2, 2, dtype=torch.int64)}, "must be torch.int32"),
        ({"kv_indices": torch.zeros(1, 2, 2, 1)}, "torch.int16 or torch.int32"),
        ({"kv_len": torch.ones(2, dtype=torch.int32)}, r"kv_len must have shape \(1\)"),
    ],
)
def test_wrong_arguments_say_what_was_expected(changes, message):
    moved = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        block_sparse_fwd(**arguments(**moved))


def test_pool_and_mass_check_their_arguments():
    x = torch.zeros(1, 100, 2, 64, device=DEVICE)
    with pytest.raises(ValueError, match="block_size must be one of"):
        block_pool(x, 48)
    with pytest.raises(ValueError, match="lse must have shape"):
        block_mass(x, x, torch.zeros(1, 2, 99, device=DEVICE), block_size=(64, 64))


def test_tail_checks_its_arguments():
    x, means = torch.zeros(1, 100, 2, 64, device=DEVICE), torch.zeros(1, 2, 2, 64, device=DEVICE)
    bits = torch.zeros(1, 2, 2, 1, dtype=torch.uint8, device=DEVICE)
    options = {"block_size": (64, 64), "max_kv_len": 100}
    with pytest.raises(ValueError, match="must hold 3 means, each of 64 of 130 tokens"):
        tail_fwd(x, means, means, bits, block_size=(64, 64), max_kv_len=130)
    for tail_tokens in (0, 48, 128):
        with pytest.raises(ValueError, match=f"must divide the 64 .*, got {tail_tokens}"):
            tail_fwd(x, means, means, bits, tail_tokens=tail_tokens, **options)
    with pytest.raises(ValueError, match=r"bits must have shape \(1, 2, 2, 1\)"):
        tail_fwd(x, means, means, bits[:, :, :1], **options)
    with pytest.raises(ValueError, match="sparse lse must have shape"):
        tail_fwd(x, means, means, bits, sparse=(x, x[..., 0]), **options)


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(dot, "INTERPRETING", False)
    with pytest.raises(ValueError, match="must be on a cuda device, got cpu"):
        block_pool(torch.zeros(1, 10, 1, 64), 64)


def compile_for(target, *options):
    script = Path(__file__).parent / "compile_kernels.py"
    done = subprocess.run(
        [sys.executable, str(script), target, *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_compile_for_hopper_with_wgmma_and_tma():
    for kernel in compile_for("sm_90"):
        assert kernel["shared"] <= SHARED_MEMORY["sm_90"], kernel
        if kernel["kernel"].startswith(("fwd", "mass")):
            assert kernel["wgmma"] > 0 and kernel["tma"] > 0, kernel


def test_the_gluon_kernel_compiles_for_hopper_and_its_products_overlap():
    for kernel in compile_for("sm_90", "--gluon"):
        assert kernel["shared"] <= SHARED_MEMORY["sm_90"], kernel
        if not kernel["kernel"].startswith("before"):
            assert kernel["wgmma"] > 0 and kernel["tma"] > 0 and not kernel["serialized"], kernel


@pytest.mark.gpu
@pytest.mark.parametrize("case", filter(gluon_tile, CASES), ids=lambda case: case.name)
def test_the_gluon_kernel_is_as_exact_as_math_attention(case):
    if NOT_HOPPER:
        pytest.skip("needs Hopper")
    check_attention(case, DEVICE, gluon_tile(case))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", filter(gluon_fp8_tile, EIGHT_BIT_CASES), ids=lambda case: case.name
)
def test_the_gluon_kernel_of_fp8_is_attention_of_rounded_inputs(case):
    if NOT_HOPPER:
        pytest.skip("needs Hopper")
    check_8_bits(case, DEVICE, "fp8", gluon_fp8_tile(case))


@pytest.mark.gpu
@pytest.mark.parametrize("case", filter(gluon_mass_tiles, CASES), ids=lambda case: case.name)
def test_the_gluon_kernel_of_exact_mass_is_right(case):
    if NOT_HOPPER:
        pytest.skip("needs Hopper")
    for tile in gluon_mass_tiles(case):
        check_mass(case, DEVICE, tile)


@pytest.mark.parametrize("target", ["sm_86", "gfx942"])
def test_what_users_meet_first_fits_the_smallest_shared_memory(target):
    for kernel in compile_for(target):
        assert kernel["shared"] <= SHARED_MEMORY[target], kernel


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_tail_of_means_of_16_compiles(target):
    names = [f"tail of 16 d{head_dim} torch.bfloat16 (64, 64)" for head_dim in (64, 128)]
    only = [part for name in names for part in ("--only", name)]
    found = compile_for(target, "--all", *only)
    assert [kernel["kernel"] for kernel in found] == names
    for kernel in found:
        assert kernel["shared"] <= SHARED_MEMORY[target], kernel
        assert (kernel["wgmma"] > 0) == (kernel["tma"] > 0) == (target == "sm_90"), kernel


@pytest.mark.slow
@pytest.mark.timeout(1200)  # seven targets, some sixty kernels each
@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_every_configuration_fits_shared_memory(target):
    for kernel in compile_for(target, "--all"):
        assert kernel["shared"] <= SHARED_MEMORY[target], kernel

"""Sparse-vDiT: its modes, its offline search, and the table that comes out."""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from composed import not_in_0_36
from diffusers import WanPipeline, WanTransformer3DModel
from test_wan import generate, leftovers
from tiny import save_tiny_wan, tiny_folder, tiny_wan
from tiny_joint import PIPELINES
from tiny_wan_family import PIPELINES as WAN_PIPELINES
from tiny_wan_family import generate as generate_wan
from tiny_wan_family import text_to_video
from typer.testing import CliRunner

from dit_sparse import SparseVDiT, VideoGrid, enable_sparse_attention
from dit_sparse.calibrate import ModeSearch, calibrate, relative_errors
from dit_sparse.cli import app
from dit_sparse.distil import Distillation, distil
from dit_sparse.patterns.mode_table import load_mode_table
from dit_sparse.patterns.model_marks import marks_of, readable_weights
from dit_sparse.patterns.sparse_vdit import MODES, mode_masks

CPU = torch.device("cpu")


def made(pipe, tmp_path, run=None, **options):
    """Path of a table searched on a pipeline."""
    search = ModeSearch(**{"density": 0.5, "block_size": 32} | options)
    calibrate(pipe, run or (lambda: generate(pipe)), search).save(tmp_path / "table.json")
    return str(tmp_path / "table.json")


def enable(pipe, table, **options):
    return enable_sparse_attention(
        pipe, "sparse-vdit", table=table, **{"density": 0.5, "block_size": 32} | options
    )


def test_masks_of_the_modes():
    grid = VideoGrid(4, 8, 16)  # two blocks of 64 a frame: its upper and its lower half
    full, skip, diagonal, places, stripes = mode_masks(grid, "raster", 64, 0.5, True, CPU)
    assert full.all() and not skip.any()
    halves = torch.arange(8) % 2
    assert places.equal(halves[:, None] == halves)  # the same half of every frame
    for i in range(8):
        distances = [abs(i - j) for j in diagonal[i].nonzero().flatten().tolist()]
        assert len(distances) == 4 and sorted(distances) == sorted(abs(i - j) for j in range(8))[:4]
    assert stripes.equal((halves == 0).expand(8, -1) | torch.eye(8, dtype=torch.bool))


@pytest.mark.parametrize("density", [0.25, 0.5])
def test_the_multi_diagonal_mode_goes_by_space_and_then_by_time(density):
    grid = VideoGrid(6, 4, 32)  # a block of 32 is one of four rows of a frame
    mask = mode_masks(grid, "raster", 32, density, True, CPU)[MODES.index("multi-diagonal")]
    for i in range(24):
        apart = [(abs(j % 4 - i % 4), abs(j // 4 - i // 4)) for j in range(24)]
        kept = [apart[j] for j in mask[i].nonzero().flatten().tolist()]
        assert sorted(kept) == sorted(apart)[: round(24 * density)]


def test_relative_errors_and_the_choice_equal_a_loop():
    dense, *outputs = torch.randn(4, 2, 10, 3, 4)
    found = relative_errors(outputs, dense)
    energies = [dense[:, :, h].square().sum() for h in range(3)]
    for i, output in enumerate(outputs):
        for h in range(3):
            error = (output[:, :, h] - dense[:, :, h]).square().sum()
            assert found[i, h].item() == pytest.approx((error / (sum(energies) / 3)).item())
    losses = torch.tensor([[0.3, 0.1, 0.9], [0.4, 0.2, 0.5]])
    assert ModeSearch(epsilon=0.35).choose(losses).tolist() == [1, 1, 0]


def test_all_dense_where_epsilon_is_0_and_all_skipped_where_it_is_large(tmp_path):
    pipe = tiny_wan()
    stock = generate(pipe)
    handle = enable(pipe, made(pipe, tmp_path, epsilon=0.0))
    assert (generate(pipe) - stock).abs().max() < 1e-5
    assert handle.report().effective_cost == pytest.approx(1)
    handle.disable()
    handle = enable(pipe, made(pipe, tmp_path, epsilon=1e9, weight=1e6))
    assert generate(pipe).isfinite().all()
    assert handle.report().effective_cost == 0 and handle.report().density == 0
    handle.disable()
    assert leftovers(pipe.transformer) == ([], set()) and generate(pipe).equal(stock)


def test_a_search_in_another_order_compares_the_same_tokens(tmp_path):
    pipe = tiny_wan()
    table = made(pipe, tmp_path, lambda: generate(pipe, steps=1), density=1, weight=0, order="tile")
    found = load_mode_table(table, 5).modes
    chosen = "".join(modes for branch in found.values() for row in branch for modes in row)
    assert chosen and not set(chosen) & {"0", "1"}  # modes that leave nothing out are exact


def test_inference_repeats_what_the_search_passed_on(tmp_path):
    """The search goes on with its own choice, so the same prompt and seed give the same video."""
    pipe = tiny_wan()
    searched = []
    table = made(pipe, tmp_path, lambda: searched.append(generate(pipe)), epsilon=0.7)
    modes = {
        m for b in load_mode_table(table, 5).modes.values() for s in b for row in s for m in row
    }
    assert len(modes) > 1
    handle = enable(pipe, table)
    assert (generate(pipe) - searched[0]).abs().max() < 1e-4
    report = handle.report()
    by_hand = [sum(entry["density"]) / 2 for entry in report.trace]
    assert report.effective_cost == pytest.approx(sum(by_hand) / len(by_hand))
    generate(pipe, steps=4)  # takes the rows at its share of the steps


@pytest.mark.parametrize("name", ["HunyuanVideo", "CogVideoX", "Mochi"])
@torch.no_grad()
def test_joint_families(name, tmp_path):
    make, call = PIPELINES[name]
    pipe, arguments = make(), call(1, True)
    fixed = {"num_inference_steps": 3, "output_type": "latent"}
    run = partial(pipe, **arguments, **fixed)
    again = partial(run, generator=torch.Generator().manual_seed(0))
    searched = []
    table = made(pipe, tmp_path, lambda: searched.append(again().frames), epsilon=0.7)
    enable(pipe, table)
    found = run(generator=torch.Generator().manual_seed(0)).frames
    assert (found - searched[0]).abs().max() < 1e-4 * searched[0].abs().max()


def test_another_model_size_or_branch_is_refused(tmp_path):
    pipe = tiny_wan()
    table = made(pipe, tmp_path, lambda: generate(pipe, guidance=1.0))
    enable(pipe, table)
    with pytest.raises(ValueError, match="tokens.*calibrate"):
        generate(pipe, size=64, guidance=1.0)
    with pytest.raises(ValueError, match="guidance"):
        generate(pipe)
    for other in (PIPELINES["HunyuanVideo"][0](), PIPELINES["CogVideoX"][0]()):
        with pytest.raises(ValueError, match="of a WanTransformer3DModel, this model is a"):
            enable(other, table)
    changed = json.loads((tmp_path / "table.json").read_text())
    for field, rows in (("layers", lambda s: s * 2), ("heads", lambda s: [r * 2 for r in s])):
        other = changed | {field: changed[field] * 2}
        other["modes"] = {"cond": [rows(step) for step in changed["modes"]["cond"]]}
        (tmp_path / "other.json").write_text(json.dumps(other))
        enable(pipe, str(tmp_path / "other.json"))
        with pytest.raises(ValueError, match=f"another model.*{field}"):
            generate(pipe, guidance=1.0)


def changed_model(change):
    if change in WAN_PIPELINES:
        return WAN_PIPELINES[change][0]()[0]
    pipe = text_to_video()[0]
    with torch.no_grad():
        for weight in pipe.transformer.parameters():
            weight.mul_(1.05) if change == "fine-tuned" else weight.normal_(0, 0.05)
    return pipe


@pytest.mark.parametrize(
    "change, told",
    [
        ("I2V 2.1", "of one with added_kv_proj_dim None, this one has 32"),
        ("T2V 2.2", "expected 1 transformers in the pipeline, got 2"),
        ("other weights", "the same settings and other weights"),
        ("fine-tuned", None),
    ],
)
def test_a_model_of_the_same_size_is_refused_unless_it_is_a_variant(tmp_path, change, told):
    pipe, call = text_to_video()
    run = partial(generate_wan, pipe, call, steps=2)
    with torch.no_grad():
        table = made(pipe, tmp_path, run)
        distil(pipe, run, Distillation(block_size=32)).save(tmp_path / "gates")
    other = changed_model(change)
    gates = {"gate": tmp_path / "gates", "density": 0.5, "block_size": 32}
    for switch_on in (
        partial(enable, other, table),
        partial(enable_sparse_attention, other, "seerattention", **gates),
    ):
        with pytest.raises(ValueError, match=told) if told else nullcontext():
            switch_on()


@not_in_0_36
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_weights_on_disk_are_not_compared(tmp_path, kind):
    """What stands in for them in memory is not initialised."""
    pipe, call = text_to_video()
    run = partial(generate_wan, pipe, call, steps=2)
    with torch.no_grad():
        table = made(pipe, tmp_path, run)
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type=kind,
        offload_to_disk_path=str(tmp_path / "weights"), **groups,
    )  # fmt: skip
    enable(pipe, table)
    assert readable_weights(pipe.transformer) == {}
    assert "name" not in marks_of([pipe.transformer])[0]


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 1},
        {"models": [{}]},
        {"models": 3},
        {"models": [{"settings": {}, "name": "a"}]},
        {"models": [{"settings": {}, "name": "a", "weight": [1.0]}]},
        {"models": [{"settings": {}, "name": "a", "weight": [1e300] * 16}]},
        {"kind": "pickle"},
        {"modes": {}},
        {"modes": {"cond": [["01"]]}},
        {"heads": 3},
        {"unknown": 1},
        None,
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, change):
    pipe = tiny_wan()
    table = made(pipe, tmp_path, lambda: generate(pipe, steps=2))
    stored = json.loads(open(table).read())
    text = "import os" if change is None else json.dumps(stored | change)
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match="bad.json is no mode table"):
        SparseVDiT(table=str(tmp_path / "bad.json"))


def test_settings_that_the_table_was_not_searched_with_are_refused(tmp_path):
    table = made(tiny := tiny_wan(), tmp_path, lambda: generate(tiny, steps=2))
    with pytest.raises(ValueError, match="density=0.5, got 0.2"):
        SparseVDiT(table=table, block_size=32)
    assert SparseVDiT(table=Path(table), density=0.5, block_size=32).table == table
    for given in ({}, {"table": ""}):
        with pytest.raises(ValueError, match="needs table=.*no sparse_vdit.json lies beside"):
            enable_sparse_attention(tiny, "sparse-vdit", **given)
    with pytest.raises(ValueError, match="own_block=True, got False"):
        SparseVDiT(table=table, density=0.5, block_size=32, own_block=False)
    SparseVDiT(table=table, density=1, block_size=64, own_block=False)  # runs dense, without it
    with pytest.raises(ValueError, match="name of a file"):
        SparseVDiT(table=3)
    with pytest.raises(ValueError, match="no mode table at"):
        SparseVDiT(table=str(tmp_path / "missing.json"))


@pytest.mark.parametrize("whole", [True, False], ids=["pipeline", "transformer"])
def test_a_table_in_the_models_folder_needs_no_naming(tmp_path, monkeypatch, whole):
    """In the folder alone: not in the current one, nor beside a folder of weights."""
    folder = save_tiny_wan(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    pipe = WanPipeline.from_pretrained(folder)
    bare = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    model = pipe if whole else bare
    table = Path(made(pipe, tmp_path, lambda: generate(pipe, steps=2)))
    table.rename(tmp_path / "sparse_vdit.json")
    with pytest.raises(ValueError, match="no sparse_vdit.json lies beside this model"):
        enable(model, "")
    (tmp_path / "sparse_vdit.json").rename(folder / "sparse_vdit.json")
    with enable(model, "") as handle:
        assert handle.config.table == str(folder / "sparse_vdit.json")
    with pytest.raises(ValueError, match="searched with density=0.5, got 0.2"):
        enable(model, "", density=0.2)


def test_what_is_planned_for_a_batch_is_what_is_kept(tmp_path):
    pipe = tiny_wan()
    handle = enable(pipe, made(pipe, tmp_path))
    generate(pipe, prompt=["a red ball", "a dog"])
    report = handle.report()
    assert report.planned_cache_bytes == report.peak_cache_bytes > 0


def test_the_command_writes_a_table_that_generate_takes(tmp_path):
    out = tmp_path / "table.json"
    base = ["--pipeline", str(tiny_folder()), "--steps", "2"]
    result = CliRunner().invoke(
        app, ["calibrate", *base, "-o", str(out), "--block-size", "32", "--prompt", "a red circle"]
    )
    assert result.exit_code == 0, result.output
    assert all(mode in result.stdout for mode in MODES)
    method = f"sparse-vdit:table={out},block_size=32"
    result = CliRunner().invoke(
        app,
        ["generate", *base, "-m", method, "-o", str(tmp_path), "--prompt", "a red circle", "-q"],
    )
    assert result.exit_code == 0, result.output

"""SeerAttention: its gates, their distillation, and the method that reads them."""

from dataclasses import replace

import pytest
import torch
from test_field import make_search
from test_field_runs import CALL, pipeline
from test_seeds import BLOCK, close
from test_wan import generate, leftovers
from tiny import tiny_folder, tiny_wan
from typer.testing import CliRunner

from dit_sparse import SeerAttention, VideoGrid, enable_sparse_attention
from dit_sparse.cli import app
from dit_sparse.distil import Distillation, LayerGate, distil, divergence_from
from dit_sparse.patterns.gates import first_gates, gate_logits, load_gates, pooled_features
from dit_sparse.patterns.score import exact_mass, pooled_logits

GRID = VideoGrid(3, 7, 9, text_tokens=11)  # 200 tokens, seven blocks of 32, two with text


def saved(tmp_path, layers=1, heads=2, dim=16, **options):
    path = tmp_path / "gates.safetensors"
    first_gates(layers, heads, dim, **{"order": "curve", "block_size": BLOCK} | options).save(path)
    return str(path)


def test_features_equal_a_loop():
    search = make_search(GRID)
    query, key = pooled_features(search.query, search.key, BLOCK)
    for i, (q, k) in enumerate(zip(search.query[1, :, 0].split(32), search.key[1, :, 0].split(32))):
        close(query[1, 0, i], q.mean(0))
        close(key[1, 0, i], torch.cat([k.amax(0), k.amin(0), k.mean(0)]))


def test_a_gate_before_distillation_ranks_like_block_means(tmp_path):
    search = replace(make_search(GRID), layers=1)
    config = SeerAttention(density=0.5, block_size=BLOCK, gate=saved(tmp_path), own_block=False)
    found = config.find(search)
    logits, _ = pooled_logits(search, BLOCK)
    best = logits.topk(2, -1).indices  # of 3.5 rounded to 4 blocks, two hold text
    expected = torch.zeros_like(found.mask).scatter_(-1, best, True)
    expected[..., 5:] = expected[..., 5:, :] = True
    assert found.mask.equal(expected)
    assert found.cost == (7 * 7 * 16 + 4 * 7 * 16 * 16) / (2 * 200**2 * 16)


def test_a_gate_learns_the_block_mass():
    search = make_search(VideoGrid(8, 8, 8), batch=1)
    features = pooled_features(search.query, search.key, BLOCK)
    mass, _ = exact_mass(search, BLOCK)
    gate = LayerGate(2, 16, Distillation(learning_rate=0.01), torch.device("cpu"))
    before = gate.learn(features, mass, updates=60)
    target = mass / mass.sum(-1, keepdim=True)
    for weights in gate.maps:
        weights.requires_grad_()
    after, gradients = divergence_from(target, features, gate.maps)
    logits = gate_logits(features, *gate.maps)
    rows = torch.nn.functional.kl_div(logits.log_softmax(-1), target, reduction="none").sum(-1)
    close(after.detach(), rows.mean().detach())
    for found, expected in zip(gradients, torch.autograd.grad(rows.mean(), gate.maps)):
        torch.testing.assert_close(found.detach(), expected, atol=1e-6, rtol=1e-3)
    assert after < 0.5 * before


@pytest.mark.parametrize("family", ["Wan", "HunyuanVideo", "CogVideoX", "Mochi"])
@torch.no_grad()
def test_gates_are_distilled_and_used_on_all_families(family, tmp_path):
    pipe, call = pipeline(family)
    stock = pipe(**call, **CALL, generator=torch.Generator().manual_seed(0)).frames
    settings = Distillation(block_size=BLOCK, updates=2)
    gates = distil(pipe, lambda: pipe(**call, **CALL), settings)
    assert leftovers(pipe.transformer) == ([], set())
    assert pipe(**call, **CALL, generator=torch.Generator().manual_seed(0)).frames.equal(stock)
    gates.save(tmp_path / "gates.safetensors")
    options = {"density": 0.4, "block_size": BLOCK, "gate": tmp_path / "gates.safetensors"}
    with enable_sparse_attention(pipe, "seerattention", **options) as handle:
        assert pipe(**call, **CALL).frames.isfinite().all()
        assert 0 < handle.report().density < 1
    heads = pipe.transformer.config.num_attention_heads
    assert gates.query.shape[1] == heads and len(gates.query) * 3 <= len(settings.divergences)
    assert "at first" in settings.progress()


def test_other_models_and_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="seerattention needs gate=FILE, got ''"):
        SeerAttention()
    with pytest.raises(ValueError, match="no gates at .*missing: make some with"):
        SeerAttention(gate=str(tmp_path / "missing"))
    (tmp_path / "text").write_text("no gates")
    with pytest.raises(ValueError, match="holds no gates"):
        SeerAttention(gate=str(tmp_path / "text"))
    path = saved(tmp_path, layers=2, heads=3)
    with pytest.raises(ValueError, match="distilled with block_size=32, got 64"):
        SeerAttention(gate=path)
    with pytest.raises(ValueError, match="they have 3 heads, this run has 2"):
        SeerAttention(gate=path, block_size=BLOCK).find(replace(make_search(GRID), layers=2))
    pipe = tiny_wan()
    enable_sparse_attention(pipe, "seerattention", gate=saved(tmp_path, layers=5), block_size=BLOCK)
    with pytest.raises(ValueError, match="they have 5 layers, this run has 2"):
        generate(pipe, steps=2)
    with pytest.raises(ValueError, match="updates is a whole number"):
        Distillation(updates=0)


def test_the_command_line_distils(tmp_path):
    out = tmp_path / "gates.safetensors"
    base = ["--pipeline", str(tiny_folder()), "--method", "seerattention", "--block-size", "32"]
    result = CliRunner().invoke(app, ["calibrate", *base, "-o", str(out), "--updates", "1"])
    assert result.exit_code == 0 and "divergence from the block mass" in result.stdout
    assert load_gates(str(out)).order == "curve"
    for wrong in ("--method adaspa", "--method seerattention --epsilon 0.3", "--updates 3"):
        assert CliRunner().invoke(app, ["calibrate", *wrong.split()]).exit_code != 0

"""`dit-sparse profile`: its figures against plain loops, and what bad files get."""

import json

import pytest
import torch
from tiny import tiny_folder, tiny_wan
from tiny_joint import PIPELINES
from typer.testing import CliRunner

from dit_sparse.cli import app
from dit_sparse.fingerprint import load_profile, look, look_steps, profile

FACTS = {"pipeline": "tiny", "call": {}, "environment": {}}


@pytest.mark.parametrize("lengths", [None, [150, 90]])
def test_a_look_equals_a_loop(lengths):
    query, key, value = torch.randn(3, 2, 150, 2, 16) * 2
    kv_len = None if lengths is None else torch.tensor(lengths)
    kept, chosen, error = look(query, key, value, kv_len)
    rows = [int((i + 0.5) * 150 / 64) for i in range(64)]
    masses, lost, full = torch.zeros(2, 2, 64, 3), torch.zeros(2), torch.zeros(2)
    for b in range(2):
        valid = 150 if lengths is None else lengths[b]
        for h in range(2):
            for i, row in enumerate(rows):
                weights = (key[b, :valid, h] @ query[b, row, h] / 4).softmax(0)
                parts = weights.split(64)
                masses[b, h, i, : len(parts)] = torch.stack([part.sum() for part in parts])
                best = int(masses[b, h, i].argmax())
                assert chosen[b, h, i].tolist() == [j == best for j in range(3)]
                block = slice(best * 64, min(best * 64 + 64, valid))
                sparse = weights[block] / weights[block].sum() @ value[b, block, h]
                exact = weights @ value[b, :valid, h]
                lost[h] += (sparse - exact).square().sum()
                full[h] += exact.square().sum()
    torch.testing.assert_close(error, (lost / full).sqrt(), atol=1e-5, rtol=1e-4)
    best = masses.sort(-1, descending=True).values.cumsum(-1)
    torch.testing.assert_close(kept[:, 2], best[..., 0].mean((0, 2)))  # 1 of 3 blocks
    torch.testing.assert_close(kept[:, 4], best[..., 1].mean((0, 2)))  # 2 of 3 at density 0.5


def test_steps_that_are_looked_at():
    assert look_steps(50) == [5, 16, 27, 38, 49]
    assert look_steps(3) == [0, 1, 2] and look_steps(1) == [0]


def check(found, layers, heads, branches):
    assert len(found.entries) == layers * branches * len(look_steps(found.num_steps))
    for entry in found.entries:
        assert len(entry["kept_mass"]) == len(entry["overlap"]) == len(entry["error"]) == heads
        for head in entry["kept_mass"]:
            assert head == sorted(head) and 0 < head[0] <= 1.0001
    first = [e for e in found.entries if e["step"] == look_steps(found.num_steps)[0]]
    assert all(x == 1 for e in first for x in e["overlap"])


def test_profile_of_wan_is_saved_read_and_leaves_the_pipeline(tmp_path):
    pipe = tiny_wan()
    call = {"height": 96, "width": 96, "num_frames": 9, "num_inference_steps": 3}
    run = lambda: pipe("a", output_type="latent", **call)  # noqa: E731
    found = profile(pipe, run, **FACTS)
    check(found, layers=2, heads=2, branches=2)
    found.save(tmp_path / "p.json")
    again = load_profile(tmp_path / "p.json")
    assert again.entries == found.entries and set(again.means()) == set(found.means())
    assert type(pipe.transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


@pytest.mark.parametrize("name", ["HunyuanVideo", "CogVideoX"])
def test_profile_of_joint_families(name):
    make, arguments = PIPELINES[name]
    pipe, call = make(), arguments(1, False)
    run = lambda: pipe(**call, num_inference_steps=2, output_type="latent")  # noqa: E731
    found = profile(pipe, run, **FACTS)
    assert found.text_tokens > 0
    layers = len({entry["layer"] for entry in found.entries})
    heads = len(found.entries[0]["error"])
    check(found, layers, heads, branches=1)


def test_a_run_that_fails_leaves_the_pipeline_as_it_was():
    pipe = tiny_wan()

    def run():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(pipe, run, **FACTS)
    assert type(pipe.transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"kind": "x", "schema": 1}', json.dumps({"kind": 1, "rows": 3})]
)
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a profile of dit-sparse"):
        load_profile(path)


def test_the_command(tmp_path):
    out = tmp_path / "p.json"
    given = ["profile", "-p", str(tiny_folder()), "--prompt", "a", "-o", str(out), "--steps", "3"]
    result = CliRunner().invoke(app, [*given, "--height", "32", "--width", "32", "--frames", "5"])
    assert result.exit_code == 0, result.output
    assert "kept mass at 0.2" in result.output and load_profile(out).num_steps == 3
    bad = CliRunner().invoke(app, [*given[:-2], "--steps", "0"])
    assert bad.exit_code == 2

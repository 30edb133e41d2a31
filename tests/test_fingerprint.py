"""`dit-sparse profile`: its figures against plain loops, and what bad files get."""

import json
from dataclasses import replace

import pytest
import torch
from test_wan import generate, leftovers
from tiny import tiny_folder, tiny_wan
from tiny_joint import PIPELINES
from typer.testing import CliRunner

from dit_sparse import VideoGrid
from dit_sparse.cli import app
from dit_sparse.fingerprint import Profile, load_profile
from dit_sparse.grid import token_order
from dit_sparse.look import look, look_steps, profile

FACTS = {"pipeline": "tiny", "call": {}, "environment": {}}
SMALL = ["--steps", "3", "--height", "32", "--width", "32", "--frames", "5"]


def run(*arguments):
    return CliRunner().invoke(app, ["profile", *map(str, arguments)])


def by_loops(q, k, v, order, text, block, density):
    """One head (S, D): kept and text mass, blocks and outputs of one block of rows, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    keys = [order[i : i + 64] for i in range(0, len(order), 64)]
    weights = torch.stack([(k @ q[row] * q.shape[1] ** -0.5).softmax(0) for row in keys[block]])
    mass = [sum(weights[:, j].mean() for j in tokens) for tokens in keys]
    best = sorted(range(len(keys)), key=lambda j: -mass[j])[: max(round(density * len(keys)), 1)]
    seen = [j for block in best for j in keys[block]] + text
    sparse = (weights[:, seen] / weights[:, seen].sum(1, keepdim=True)) @ v[seen]
    kept, text_mass = sum(mass[j] for j in best) / sum(mass), weights[:, text].sum(1).mean()
    return kept, text_mass, best, weights @ v, sparse


@pytest.mark.parametrize(
    "grid",
    [
        VideoGrid(5, 9, 10),  # 7 whole blocks and a short one, that is a key alone
        VideoGrid(5, 9, 10, text_tokens=20),
        VideoGrid(5, 9, 10, text_tokens=20, text_first=True),
    ],
)
def test_a_look_equals_loops(grid):
    query, key, value = torch.randn(3, 2, grid.tokens, 2, 16) * 2
    lengths = None if grid.text_first or not grid.text_tokens else torch.tensor([470, 455])
    kept, text_mass, error, chosen = look(query, key, value, grid, lengths)
    first = grid.text_tokens if grid.text_first else 0
    order = (token_order(grid, "curve", 64)[0] + first).tolist()
    assert chosen.shape == (2, 2, 7, 8)
    for h in range(2):
        found = []
        for b in range(2):
            stop = grid.text_span[1] if lengths is None else int(lengths[b])
            valid = slice(0, grid.tokens if lengths is None else stop)
            text = list(range(grid.text_span[0], stop)) if grid.text_tokens else []
            q, k, v = (x[b, valid, h] for x in (query, key, value))
            for block in range(7):
                found.append(by_loops(q, k, v, order, text, block, 0.2))
                picked = chosen[b, h, block].nonzero().flatten().tolist()
                assert picked == sorted(found[-1][2])
        kept_here, text_here, _, dense, sparse = zip(*found)
        dense, sparse = torch.stack(dense), torch.stack(sparse)
        assert kept[h, 2].item() == pytest.approx(float(sum(kept_here) / 14), abs=1e-5)
        assert text_mass[h].item() == pytest.approx(float(sum(text_here) / 14), abs=1e-5)
        expected = (sparse - dense).norm() / dense.norm()
        assert error[h].item() == pytest.approx(expected.item(), abs=1e-5)


def test_few_blocks_of_a_long_video_are_looked_at_and_a_video_below_a_block_whole():
    for grid, blocks in (VideoGrid(20, 10, 10), 8), (VideoGrid(1, 5, 5, text_tokens=3), 1):
        query, key, value = torch.randn(3, 1, grid.tokens, 2, 16)
        kept, _, _, chosen = look(query, key, value, grid, None)
        assert chosen.shape == (1, 2, blocks, -(-grid.video_tokens // 64))
        assert (kept.diff(dim=1) >= 0).all() and (kept <= 1.0001).all()


def test_steps_that_are_looked_at():
    assert look_steps(50) == [5, 16, 27, 38, 49]
    assert look_steps(3) == [0, 1, 2] and look_steps(1) == [0]


def check(found, layers, heads, branches):
    assert len(found.entries) == layers * branches * len(look_steps(found.num_steps))
    for entry in found.entries:
        assert len(entry["text_mass"]) == len(entry["overlap"]) == len(entry["error"]) == heads
        assert (torch.tensor(entry["text_mass"]) > 0).all() == (found.text_tokens > 0)
        for head in zip(*entry["kept_mass"]):
            assert list(head) == sorted(head) and 0 < head[0] <= 1
    first = [e for e in found.entries if e["step"] == look_steps(found.num_steps)[0]]
    assert all(x == 1 for e in first for x in e["overlap"])


def test_profile_of_wan_is_saved_read_and_leaves_the_pipeline(tmp_path):
    pipe = tiny_wan()
    before = generate(pipe)
    found = profile(pipe, lambda: generate(pipe), **FACTS)
    check(found, layers=2, heads=2, branches=2)
    found.save(tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == found
    assert leftovers(pipe.transformer) == ([], set()) and generate(pipe).equal(before)


@pytest.mark.parametrize("name", ["HunyuanVideo", "CogVideoX", "Mochi"])
def test_profile_of_joint_families(name):
    make, arguments = PIPELINES[name]
    pipe, call = make(), arguments(1, False)
    found = profile(
        pipe, lambda: pipe(**call, num_inference_steps=2, output_type="latent"), **FACTS
    )
    layers = len({entry["layer"] for entry in found.entries})
    check(found, layers, len(found.entries[0]["error"]), branches=1)
    assert found.text_tokens > 0


def test_ctrl_c_and_nan_leave_the_pipeline_as_it_was():
    pipe = tiny_wan()
    before = generate(pipe)

    def interrupted(pipe, step, timestep, kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(pipe, lambda: generate(pipe, callback_on_step_end=interrupted), **FACTS)
    assert leftovers(pipe.transformer) == ([], set()) and generate(pipe).equal(before)
    bias = pipe.transformer.blocks[1].attn1.to_v.bias
    with torch.no_grad():
        kept = bias.clone()
        bias.fill_(torch.nan)
        with pytest.raises(RuntimeError, match="layer 1 is not finite at step 0"):
            profile(pipe, lambda: generate(pipe), **FACTS)
        bias.copy_(kept)
    assert leftovers(pipe.transformer) == ([], set()) and generate(pipe).equal(before)


def test_a_profile_of_the_largest_model_is_below_a_megabyte(tmp_path):
    """Wan VACE 14B: 48 layers of 40 heads, two branches."""
    head = [0.123] * 40
    entry = {"kept_mass": [head] * 5, "text_mass": [0.0] * 40, "overlap": head, "error": head}
    entries = [
        {"branch": branch, "step": step, "layer": layer, **entry}
        for branch in ("cond", "uncond")
        for step in look_steps(50)
        for layer in range(48)
    ]
    Profile(**FACTS, grid=(21, 45, 80), text_tokens=0, num_steps=50, entries=entries).save(
        tmp_path / "p.json"
    )
    assert (tmp_path / "p.json").stat().st_size < 1_000_000


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A profile that the command wrote."""
    out = tmp_path_factory.mktemp("profile") / "p.json"
    result = run("-p", tiny_folder(), "-o", out, *SMALL)
    assert result.exit_code == 0, result.output
    assert "kept mass at 0.2" in result.stdout
    return out


ENTRY = {"branch": "cond", "step": 0, "layer": 0, "kept_mass": [[0.5]] * 5}
ENTRY |= {"text_mass": [0.0], "overlap": [1.0], "error": [0.1]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 1}, "schema 2"),
        ({"kind": "x"}, "attention profile"),
        ({"more": 1}, "more"),
        ({"grid": [1, 2]}, "whole numbers"),
        ({"num_steps": "3"}, "whole numbers"),
        ({"densities": [0.2, 1.5]}, "densities"),
        ({"entries": []}, "no entries"),
        ({"entries": [{}]}, "error"),
        ({"entries": [ENTRY | {"step": 99}]}, "step 99"),
        ({"entries": [ENTRY | {"layer": "0"}]}, "there is no"),
        ({"entries": [ENTRY | {"kept_mass": [[0.5]]}]}, "1 figures"),
        ({"entries": [ENTRY | {"overlap": [1.0, 1.0]}]}, "1 figures"),
        ({"entries": [ENTRY | {"error": [None]}]}, "1 figures"),
        ({"entries": [ENTRY | {"error": [float("nan")]}]}, "1 figures"),
        (None, "Expecting value"),
    ],
)
def test_another_file_is_refused(tmp_path, saved, change, words):
    text = "import os" if change is None else json.dumps(json.loads(saved.read_text()) | change)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="x.json is no attention profile") as error:
        load_profile(tmp_path / "x.json")
    assert words in str(error.value)


def test_two_profiles_side_by_side(tmp_path, saved):
    profile = load_profile(saved)
    other = [e | {"error": [x + 1 for x in e["error"]]} for e in profile.entries]
    replace(profile, entries=other).save(tmp_path / "b.json")
    result = run("--compare", saved, tmp_path / "b.json")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and lines[0].split() == ["p", "b", "difference"]
    assert lines[-1].split()[0] == "error" and lines[-1].split()[-1] == "+1.000"
    figures = json.loads(run("--compare", saved, tmp_path / "b.json", "--json").stdout)
    assert figures["text mass"] == [0, 0]
    replace(profile, block_size=32).save(tmp_path / "b.json")
    result = run("--compare", saved, tmp_path / "b.json")
    assert result.exit_code == 2 and "another block_size" in result.stderr
    result = run("--compare", saved, tmp_path / "missing.json")
    assert result.exit_code == 2 and "missing.json is no attention profile" in result.stderr


def test_what_cannot_be_profiled_is_refused_first(tmp_path):
    base = "-p", tiny_folder(), "-o"
    for arguments, words in (
        ((*base, tmp_path, *SMALL), "is a folder"),
        ((*base, tmp_path / "p.json", "--steps", "0"), "num_inference_steps"),
        ((*base, tmp_path / "p.json", "--prompt", " "), "empty"),
        (("-p", tmp_path / "nowhere"), "no such folder"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())

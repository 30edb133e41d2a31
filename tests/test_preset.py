"""Presets: bisection finds the cheapest rung, files are checked, methods read them."""

import json

import numpy as np
import pytest
from tiny import tiny_folder, tiny_wan
from typer.testing import CliRunner

from dit_sparse import AdaSpa, Auto, enable_sparse_attention, preset
from dit_sparse.api import make_config
from dit_sparse.cli import app
from dit_sparse.preset import LADDER, Trial, find_preset, read_preset

SMALL = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 6}


@pytest.fixture
def no_video(monkeypatch):
    monkeypatch.setattr(preset, "generate_clip", lambda *a, **k: type("Clip", (), {"frames": 0}))


@pytest.mark.parametrize("wanted", [10, 19, 24.5, 30, 41, 60])
def test_the_cheapest_rung_that_reaches_it_is_found(monkeypatch, no_video, wanted):
    psnr = [12.0, 18, 20, 25, 30, 40, 42]
    asked = []

    def trial(pipe, call, clips, dense, options):
        rung = LADDER.index(options)
        asked.append(rung)
        return Trial(options, psnr[rung], [psnr[rung]], rung / 10)

    monkeypatch.setattr(preset, "try_setting", trial)
    found, trials = find_preset(None, {}, [("a", 0)], wanted)
    reached = [rung for rung in range(7) if psnr[rung] >= wanted]
    assert len(asked) == len(set(asked)) <= 3 and len(trials) == len(asked)
    assert found is None if not reached else found.options == Auto(**LADDER[reached[0]]).to_dict()


def test_what_costs_more_than_dense_is_no_preset(monkeypatch, no_video):
    monkeypatch.setattr(preset, "try_setting", lambda *a: Trial(a[-1], 50.0, [50.0], 1.1))
    assert find_preset(None, {}, [("a", 0)], 20)[0] is None


def test_the_ladder_rises_in_cost():
    costs = [Auto(**rung).planned_cost(50, rung["density"], 1.0) for rung in LADDER]
    assert costs == sorted(costs) and len(set(costs)) == len(costs)


def test_a_trial_is_measured_against_dense():
    pipe, clips = tiny_wan(), [("a cat", 0), ("a dog", 1)]
    dense = [preset.generate_clip(pipe, *clip, SMALL).frames for clip in clips]
    options = {"density": 0.3, "block_size": 32, "search_at": (0.2, 0.6)}
    trial = preset.try_setting(pipe, SMALL, clips, dense, options)
    with enable_sparse_attention(pipe, "auto", **options):
        again = preset.generate_clip(pipe, *clips[1], SMALL).frames
    error = np.mean((again.astype(np.float64) - dense[1]) ** 2)
    assert trial.psnr_per_clip[1] == pytest.approx(-10 * np.log10(error), abs=0.01)
    assert trial.psnr == pytest.approx(sum(trial.psnr_per_clip) / 2)
    assert 0 < trial.effective_cost


def test_a_file_is_a_method(tmp_path):
    path = tmp_path / "p.json"
    preset.Preset("auto", {"density": 0.35, "search_at": (0.1, 0.5)}).save(path)
    config, name = make_config(str(path), {"residual": None})
    assert name == "auto" and config == Auto(density=0.35, search_at=(0.1, 0.5), residual=None)
    with enable_sparse_attention(tiny_wan(), str(path)) as handle:
        assert handle.method == "auto" and handle.config.density == 0.35


def test_a_preset_of_an_earlier_version_keeps_its_meaning(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"schema": 1, "method": "auto", "options": {"density": 0.2}}))
    assert make_config(str(path), {})[0] == Auto(
        density=0.2, tail_tokens=64, damping=0, share_guidance=None
    )
    assert make_config(str(path), {"damping": 0.5})[0].damping == 0.5
    path.write_text(json.dumps({"schema": 1, "method": "adaspa", "options": {"density": 0.2}}))
    assert make_config(str(path), {})[0] == AdaSpa(density=0.2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is no preset"),
        ("[]", "is no preset"),
        ('{"method": "auto"}', "is no preset"),
        ('{"schema": 9, "method": "auto", "options": {}}', "another version"),
        ('{"schema": 1, "method": "os.system", "options": {}}', "another version"),
        ('{"schema": 2, "method": "auto", "options": {"old": 1}}', "does not take .*'old'"),
        ('{"schema": 2, "method": "auto", "options": {"density": 9}}', "does not take .*got 9"),
    ],
)
def test_other_files_are_refused(tmp_path, text, expected):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=expected):
        read_preset(path)
    with pytest.raises(ValueError, match="cannot read the preset"):
        make_config(str(tmp_path / "none.json"), {})


def test_options_of_a_preset_are_checked(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"schema": 1, "method": "auto", "options": {"density": 7}}))
    with pytest.raises(ValueError, match="density"):
        make_config(str(path), {})


def test_the_command_saves_a_preset_or_says_why_not(tmp_path):
    def invoke(*arguments):
        size = "--steps 6 --height 96 --width 96 --frames 17 --device cpu --prompt cat".split()
        words = ["calibrate", "--pipeline", tiny_folder(), *size, *arguments]
        return CliRunner().invoke(app, [str(word) for word in words])

    path = tmp_path / "out" / "preset.json"
    result = invoke("--psnr", 1, "--out", path)
    assert result.exit_code == 0, result.output
    assert "dB at" in result.stderr and result.stdout == f"{path}: use it as --method {path}\n"
    stored = json.loads(path.read_text())
    assert stored["evidence"]["wanted_psnr"] == 1 and stored["evidence"]["environment"]["dtype"]
    assert set(stored["options"]) == set(Auto.options())  # whatever becomes of the defaults
    assert make_config(str(path), {})[0] == Auto(**LADDER[0])
    result = invoke("--psnr", 500, "--out", path, "--quiet")
    assert result.exit_code == 1 and "generate densely" in result.output
    assert "dB at" not in result.output
    for option, value in (("--density", 0.1), ("--block-size", 32)):
        result = invoke("--psnr", 20, option, value)
        assert result.exit_code == 2 and "leave the options of methods out" in result.output
    result = invoke("--psnr", 20, "--out", tmp_path)
    assert result.exit_code == 2 and "is a folder" in result.output

"""benchmarks/pareto.py on a tiny pipeline: its records, that it resumes, and its arithmetic."""

import json
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import tiny_folder

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "samples")]

import pareto  # noqa: E402

from dit_sparse import VideoGrid  # noqa: E402
from dit_sparse.patterns import method_class  # noqa: E402

FIELDS = {"pipeline", "size", "method", "effective_cost", "effective_time", "density", "psnr"}
FIELDS |= {"ssim", "kept_mass", "prompts", "seeds"}


def arguments(out, *methods):
    small = "--prompts 1 --seeds 1 --tuning-prompts 1 --steps 3 --warm-ups 0.34 --densities 0.5"
    small += " --searches 1 --epsilons 0.6 --budgets 0.9 1.5"
    chosen = [part for method in methods for part in ("--method", method)]
    return ["--pipeline", str(tiny_folder()), "--out", str(out), *small.split(), *chosen]


def test_records_of_methods_and_a_second_run_that_adds_one(tmp_path, monkeypatch):
    out = tmp_path / "pareto.json"
    pareto.main(arguments(out, "adaspa", "window"))
    first = json.loads(out.read_text())
    for record in first["records"]:
        assert FIELDS <= set(record) and 0 < record["effective_cost"] <= 1.5
        assert set(record["prompt_following"]) - {"speed"} == {"colour", "shape", "direction"}
    assert {r["method"] for r in first["records"]} == {"adaspa", "window"}
    assert [r["method"] for r in first["records"] if r.get("published")] == ["adaspa"]
    assert any("chance" in lines for lines in first["lines"].values())
    pareto.main(arguments(out, "adaspa", "sparse-vdit", "rettention"))
    second = json.loads(out.read_text())
    assert second["records"][: len(first["records"])] == first["records"]
    assert {"sparse-vdit", "rettention"} <= {r["method"] for r in second["records"]}
    for name in ("--seeds", "--prompt-seed"):
        with pytest.raises(SystemExit, match="other settings"):
            pareto.main([*arguments(out, "adaspa"), name, "2"])
    if find_spec("matplotlib"):
        pareto.main([*arguments(out), "--only-figure", "--figure", str(tmp_path / "figure.png")])
        assert (tmp_path / "figure.png").is_file()
    assert all(r["grid"]["densities"] == [0.5] for r in second["records"])
    joined = tmp_path / "joined.json"
    pareto.main([*arguments(joined), "--only-figure", "--also", str(out), "--also", str(out)])
    joined = json.loads(joined.read_text())
    assert [r["psnr"] for r in joined["records"]] == [r["psnr"] for r in second["records"]]
    assert joined["lines"] == second["lines"]


def test_an_unknown_method_is_refused_before_anything_runs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        pareto.parse(arguments(tmp_path / "pareto.json", "adaspa", "adspa"))
    assert "no method 'adspa'" in capsys.readouterr().err


def test_no_figure_of_no_records(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match="nothing to draw"):
        pareto.draw({"records": []}, tmp_path / "figure.png")


def test_a_method_of_another_grid_is_replaced_also_by_what_processes_left(tmp_path):
    out, wider = tmp_path / "pareto.json", ["--spacings", "1", "1.5"]
    pareto.main(arguments(out, "window", "random"))
    before = json.loads(out.read_text())
    pareto.main([*arguments(out, "window"), *wider])
    after = json.loads(out.read_text())
    spaced = [(r["method"], *r["grid"]["spacings"]) for r in after["records"]]
    assert set(spaced) == {("random", 1.5), ("window", 1.0, 1.5)}
    assert len(spaced) == len(before["records"])
    left = after | {"records": [r for r in after["records"] if r["method"] == "window"]}
    out.write_text(json.dumps(before))
    (tmp_path / "pareto-process-1.json").write_text(json.dumps(left))
    pareto.main([*arguments(out, "window"), *wider])
    found = json.loads(out.read_text())["records"]
    assert [r for r in found if r["method"] == "window"] == left["records"]
    assert len(found) == len(before["records"])


def test_settings_of_another_file_are_scored_on_other_prompts(tmp_path):
    chosen, out = tmp_path / "chosen.json", tmp_path / "confirmed.json"
    pareto.main(arguments(chosen, "window"))
    given = ["--settings-of", str(chosen), "--prompt-seed", "5", "--height", "80"]
    pareto.main([*arguments(out, "window"), *given])
    before, after = (json.loads(path.read_text())["records"] for path in (chosen, out))
    assert [r["config"] for r in after] == [r["config"] for r in before if "budgets" in r]
    assert {r["size"] for r in after}.isdisjoint(r["size"] for r in before)


def test_gates_that_another_file_names_are_made_anew_once(tmp_path, monkeypatch):
    chosen, out = tmp_path / "chosen.json", tmp_path / "elsewhere/confirmed.json"
    pareto.main(arguments(chosen, "seerattention"))
    found = json.loads(chosen.read_text())
    (one,) = (record for record in found["records"] if "budgets" in record)
    other = one | {"budgets": [2], "config": one["config"] | {"density": 0.4}}
    chosen.write_text(json.dumps(found | {"records": [one, other]}))
    calls, distil = [], pareto.distil
    monkeypatch.setattr(pareto, "distil", lambda *given: calls.append(0) or distil(*given))
    pareto.main([*arguments(out, "seerattention"), "--settings-of", str(chosen)])
    records = json.loads(out.read_text())["records"]
    assert len(records) == 2 and len(calls) == 1
    assert all(Path(r["config"]["gate"]).parent == out.parent for r in records)


def test_what_cannot_be_scored_is_said_at_once(tmp_path, monkeypatch, capsys):
    chosen, out = tmp_path / "chosen.json", tmp_path / "confirmed.json"
    pareto.main(arguments(chosen, "window"))
    monkeypatch.setattr(pareto.Runner, "prepare", lambda runner: pytest.fail("dense videos"))
    with pytest.raises(SystemExit, match="failed: no settings of random on tiny-wan"):
        pareto.main([*arguments(out, "random"), "--settings-of", str(chosen)])
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "none of them.json").write_text('{"records": [{}]}')
    for given, told in (
        (["--settings-of", str(tmp_path / "none.json")], "No such file"),
        (["--settings-of", str(tmp_path / "list.json")], "it has no records"),
        (["--settings-of", str(tmp_path / "none of them.json")], "it has no records"),
        (["--also", str(tmp_path / "none.json")], "No such file"),
        (["--pipeline", str(tmp_path / "none")], "there is no "),
        (["--steps", "0"], "expected a whole number from 1 on, got '0'"),
        (["--prompts", "0"], "expected a whole number from 1 on, got '0'"),
        (["--seeds", "-1"], "expected a whole number from 1 on, got '-1'"),
    ):
        with pytest.raises(SystemExit):
            pareto.parse([*arguments(out, "random"), *given])
        assert told in capsys.readouterr().err


def test_a_table_that_another_file_names_is_made_anew(tmp_path):
    chosen, out = tmp_path / "chosen.json", tmp_path / "elsewhere/confirmed.json"
    pareto.main(arguments(chosen, "sparse-vdit"))
    (table,) = tmp_path.glob("modes-*.json")
    made = table.read_text()
    table.unlink()
    pareto.main([*arguments(out, "sparse-vdit"), "--settings-of", str(chosen)])
    again = out.parent / table.name
    before, after = (json.loads(path.read_text())["records"] for path in (chosen, out))
    assert [r["config"] for r in after] == [
        r["config"] | {"table": str(again)} for r in before if "budgets" in r
    ]
    assert json.loads(again.read_text())["modes"] == json.loads(made)["modes"]


def test_videos_in_parts_are_the_same(tmp_path, monkeypatch):
    args = pareto.parse([*arguments(tmp_path / "out.json", "adaspa"), "--prompts", "3"])
    runner = pareto.Runner(args, "tiny", args.pipeline[0])
    config = method_class("adaspa")(density=0.5)

    def made():
        with runner.enabled(config) as handle:
            frames = runner.frames(runner.test)
            return frames, handle.report()

    (whole, one), _ = made(), monkeypatch.setattr(pareto, "AT_ONCE", 2)
    parts, two = made()
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-2)
    assert len(parts) == 3
    assert two.effective_cost == pytest.approx(one.effective_cost, abs=1e-3)


def test_the_peak_of_the_cache_is_that_of_the_largest_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(pareto, "AT_ONCE", 2)
    peaks = {}
    for prompts in "1", "2", "3":
        out = tmp_path / f"{prompts}.json"
        pareto.main([*arguments(out, "adaspa"), "--prompts", prompts])
        peaks[prompts] = [r["peak_cache_bytes"] for r in json.loads(out.read_text())["records"]]
    assert peaks["3"] == peaks["2"] != peaks["1"]


def test_processes_on_one_gpu_are_timed_one_at_a_time(tmp_path):
    lock = tmp_path / "gpu.lock"
    with pareto.gpu_of(lock), pareto.gpu_of(lock):
        pass  # two generate side by side
    entered = threading.Event()

    def other():
        with pareto.gpu_of(lock):
            entered.set()

    waiting = threading.Thread(target=other)
    with pareto.gpu_of(lock, alone=True):
        waiting.start()
        assert not entered.wait(0.3)
    assert entered.wait(60)
    waiting.join()


def test_the_best_setting_within_each_budget_is_chosen_once():
    tuned = [
        {"config": {"i": i}, "effective_cost": cost, "error": error}
        for i, (cost, error) in enumerate([(0.2, 0.5), (0.3, 0.1), (0.6, 0.2)])
    ]
    found = pareto.chosen(tuned, (0.1, 0.25, 0.5, 0.7))
    assert [(budgets, s["config"]["i"]) for budgets, s in found] == [([0.25], 0), ([0.5, 0.7], 1)]


def test_paired_differences_are_over_prompts():
    def record(method, values):
        place = {"pipeline": "a", "size": "b", "budgets": [0.5], "seeds": 2}
        return place | {"method": method, "psnr_per_clip": values}

    records = [record("auto", [20.0, 22.0, 30.0, 30.0]), record("window", [19.0, 21.0, 28.0, 28])]
    (found,) = pareto.paired(records)
    assert pareto.paired([records[0] | {"method": "adaspa"}, records[1]])[0]["minus"] == "adaspa"
    assert found["psnr"] == -1.5 and found["interval"] == [-2.0, -1.0]


def test_seams_and_flicker():
    """Tokens of 4 x 4 pixels in 3 frames of 4 x 8 tokens, 2 frames of pixels for each but one."""
    grid = VideoGrid(3, 4, 8)
    video = 1 + torch.rand(2, 5, 16, 32, 3) * 0.01
    for order in ("raster", "curve"):
        blocks = pareto.block_of_tokens(grid, order, 16)
        assert blocks.flatten().bincount().tolist() == [16] * 6
        shown = blocks.repeat_interleave(4, 1).repeat_interleave(4, 2)[[0, 1, 1, 2, 2]]
        assert pareto.seams(video, blocks, 2) == pytest.approx(1, abs=0.2)
        assert pareto.seams(video + shown[None, ..., None] % 2, blocks, 2) > 50
    assert pareto.seams(video, torch.zeros_like(blocks), 2) is None
    assert (
        pareto.seams(video[:, :4], blocks, 2) is pareto.seams(video[..., 1:, :], blocks, 2) is None
    )
    assert pareto.flicker(torch.arange(4.0).view(1, 4, 1, 1, 1)) == 0


def test_processes_with_files_of_their_own_share_methods_by_claims(tmp_path, capsys):
    claims = "--claims", str(tmp_path / "claims")
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    pareto.main([*arguments(first, "window"), *claims])
    with pareto.claim(tmp_path / "claims", "tiny", "random") as ours:
        assert ours
        with pareto.claim(tmp_path / "claims", "tiny", "random") as theirs:
            assert not theirs
    with pytest.raises(KeyboardInterrupt):
        with pareto.claim(tmp_path / "claims", "tiny", "adaspa"):
            raise KeyboardInterrupt
    with pareto.claim(tmp_path / "claims", "tiny", "adaspa") as ours:
        assert ours  # it was not finished
    pareto.main([*arguments(second, "window", "random"), *claims])
    found = [json.loads(path.read_text())["records"] for path in (first, second)]
    assert [{r["method"] for r in records} for records in found] == [{"window"}, {"random"}]
    (left_out,) = (line for line in capsys.readouterr().out.splitlines() if "claimed" in line)
    assert left_out.startswith("window on") and str(tmp_path / "claims") in left_out


def test_a_method_that_is_tuned_over_other_settings_now_runs_again(tmp_path, monkeypatch):
    out = tmp_path / "pareto.json"
    pareto.main(arguments(out, "window", "random"))
    monkeypatch.setattr(method_class("window"), "swept", ({"density": 0.3},))
    ran = []
    real = pareto.run_method
    monkeypatch.setattr(pareto, "run_method", lambda *a: (ran.append(a[1]), real(*a))[1])
    for _ in range(2):
        pareto.main(arguments(out, "window", "random"))
    assert ran == ["window"]
    found = json.loads(out.read_text())["records"]
    assert {r["config"]["density"] for r in found if r["method"] == "window"} == {0.3}


class Tunes:
    """Stands in for `Runner.tune`; the setting at `kill_at` is killed.

    Attributes:
        seen: the density of each setting, and how many of its method lay on the disk by then.
    """

    def __init__(self, monkeypatch, kill_at):
        self.seen, self.kill_at, real = [], kill_at, pareto.Runner.tune

        def tune(runner, config):
            folder = runner.args.out.parent
            lines = sum(path.read_text().count("\n") for path in folder.glob("tuned-*"))
            self.seen.append((config.density, lines))
            if len(self.seen) == self.kill_at:
                self.kill_at = None
                raise KeyboardInterrupt
            return real(runner, config)

        monkeypatch.setattr(pareto.Runner, "tune", tune)

    def killed(self, arguments):
        with pytest.raises(KeyboardInterrupt):
            pareto.main(arguments)


@pytest.mark.parametrize("method", ["window", str(ROOT / "samples" / "own_rule.py")])
def test_the_tuning_of_a_killed_run_goes_on(tmp_path, monkeypatch, method):
    out = tmp_path / "new" / "pareto.json"
    wider = [*arguments(out, method), "--densities", "0.2", "0.5"]
    tunes = Tunes(monkeypatch, kill_at=2)
    tunes.killed(wider)
    (left,) = out.parent.glob("tuned-*.jsonl")
    left.write_text(left.read_text() + '{"config": {"dens')  # what a kill in the middle leaves
    pareto.main(wider)
    assert tunes.seen == [(0.2, 0), (0.5, 1), (0.5, 1)]  # a second kill would have lost nothing
    assert not left.exists() and json.loads(out.read_text())["records"]


def test_runs_with_other_settings_beside_it_leave_the_tuning_of_a_killed_run(tmp_path, monkeypatch):
    chosen, out = tmp_path / "chosen.json", tmp_path / "pareto.json"
    pareto.main(arguments(chosen, "window"))
    wider = [*arguments(out, "window"), "--densities", "0.2", "0.5"]
    tunes = Tunes(monkeypatch, kill_at=2)
    tunes.killed(wider)
    pareto.main([*arguments(tmp_path / "bf16.json", "window"), "--dtype", "bfloat16"])
    given = ["--settings-of", str(chosen), "--prompt-seed", "5"]
    pareto.main([*arguments(tmp_path / "confirmed.json", "window"), *given])
    tunes.seen.clear()
    pareto.main(wider)
    assert [density for density, _ in tunes.seen] == [0.5]


class Scores:
    """Stands in for `Runner.score`; the setting at `kill_at` is killed, all others are `seen`."""

    def __init__(self, monkeypatch, kill_at):
        self.seen, self.kill_at, real = [], kill_at, pareto.Runner.score

        def score(runner, method, config, **more):
            if len(self.seen) + 1 == self.kill_at:
                self.kill_at = None
                raise KeyboardInterrupt
            self.seen.append((method, config, *more))
            return real(runner, method, config, **more)

        monkeypatch.setattr(pareto.Runner, "score", score)


def test_what_a_killed_run_has_scored_of_a_method_is_kept(tmp_path, monkeypatch):
    out, scores = tmp_path / "pareto.json", Scores(monkeypatch, kill_at=2)
    claimed = [*arguments(out, "adaspa", "window"), "--claims", str(tmp_path / "claims")]
    with pytest.raises(KeyboardInterrupt):
        pareto.main(claimed)
    (kept,) = json.loads(out.read_text())["records"]
    assert kept.pop("unfinished") and len(scores.seen) == 1
    for _ in range(2):
        pareto.main(claimed)
    records = json.loads(out.read_text())["records"]
    assert records[0] == kept and not any("unfinished" in record for record in records)
    assert len(records) == len(scores.seen) == len(set(scores.seen))
    assert [r["method"] for r in records if r.get("published")] == ["adaspa"]
    assert not [*tmp_path.glob("tuned-*")]


def test_what_a_killed_run_has_scored_of_another_file_is_kept(tmp_path, monkeypatch):
    chosen, out = tmp_path / "chosen.json", tmp_path / "confirmed.json"
    place = {"pipeline": tiny_folder().name, "method": "window"}
    settings = [
        place | {"config": method_class("window")(density=density).to_dict(), "budgets": [density]}
        for density in (0.2, 0.3, 0.5)
    ]
    begun = {"method": "random", "unfinished": True}
    chosen.write_text(json.dumps({"records": [*settings, settings[0] | begun]}))
    scores = Scores(monkeypatch, kill_at=2)
    given = [*arguments(out, "window", "random"), "--settings-of", str(chosen)]
    with pytest.raises(KeyboardInterrupt):
        pareto.main(given)
    for _ in range(2):
        with pytest.raises(SystemExit, match="no settings of random"):  # it was begun there
            pareto.main(given)
    assert [config.density for _, config, *_ in scores.seen] == [0.2, 0.3, 0.5]
    records = json.loads(out.read_text())["records"]
    assert [r["budgets"] for r in records] == [[0.2], [0.3], [0.5]]
    assert not any("unfinished" in record for record in records)


def test_a_method_that_another_file_has_finished_is_joined(tmp_path):
    place = {"pipeline": "a", "size": "b"}
    window, random = place | {"method": "window"}, place | {"method": "random"}
    begun = {"unfinished": True}
    made = {"environment": {"commit": "c", "gpu": None}, "settings": {}, "lines": {}}
    path = tmp_path / "other.json"
    path.write_text(json.dumps(made | {"records": [window, window, random | begun]}))
    result = made | {"records": [random, window | begun]}
    pareto.join(result, path)
    assert [r["method"] for r in result["records"]] == ["random", "window", "window"]
    assert not pareto.unfinished(result)


def test_a_method_whose_records_could_not_be_written_is_not_done(tmp_path, monkeypatch):
    """Its tuning is there still, and its claim is free."""
    out, tunes = tmp_path / "pareto.json", Tunes(monkeypatch, kill_at=None)
    claimed = [*arguments(out, "window"), "--claims", str(tmp_path / "claims")]

    def full(path, result):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(pareto, "save", full)
        pareto.main(claimed)
    pareto.main(claimed)
    assert json.loads(out.read_text())["records"] and len(tunes.seen) == 1

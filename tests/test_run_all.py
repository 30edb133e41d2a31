"""benchmarks/run_all.py without a GPU: what it would run, and that it stops in time."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks")]

import run_all  # noqa: E402


@pytest.mark.parametrize("gpus", [1, 2])
def test_every_script_is_there_and_every_task_is_run_on_one_or_two_gpus(gpus):
    lanes = [lane for stage in run_all.stages(gpus, "h200", "") for lane in stage]
    assert {on for on, _ in lanes} == ({"0"} if gpus == 1 else {"0", "1", "0,1"})
    tasks = [task for _, tasks in lanes for task in tasks]
    for task in tasks:
        script = next(word for word in task.command.split() if word.endswith(".py"))
        assert (ROOT / script).is_file()
    names = {task.name for task in tasks}
    assert {"kernels", "crossover", "sanitizer", "field wan_tiny 1"} <= names
    assert ("field wan_tiny 0" in names) == (gpus == 2)


def run_of(path, seconds, *extra):
    return run_all.parse(["--out", str(path), "--seconds", str(seconds), *extra])


def test_what_has_its_result_is_left_out_and_failures_stop_nothing(tmp_path, capfd):
    write = "-c \"open('{out}/NAME', 'w')\""
    tmp_path /= "with a space"
    tmp_path.mkdir()
    (tmp_path / "old").touch()
    tasks = [
        run_all.Task("fails", "-c 1/0", "never"),
        run_all.Task("old", write.replace("NAME", "again"), "old"),
        run_all.Task("new", write.replace("NAME", "new"), "new"),
    ]
    run_all.Run(run_of(tmp_path, 60)).lanes([("0", tasks)])
    told = capfd.readouterr().out
    assert "fails: 1 after" in told and "new: 0 after" in told and "old" not in told
    assert not list(tmp_path.glob("unfinished*"))
    assert (tmp_path / "new").is_file() and not (tmp_path / "again").exists()
    assert "ZeroDivisionError" in next((tmp_path / "logs").glob("fails*")).read_text()


def test_at_the_end_of_its_time_it_stops_what_runs_and_begins_nothing(tmp_path, capfd):
    sleep = run_all.Task("sleep", "-c 'import time; time.sleep(60)'")
    started = time.monotonic()
    run_all.Run(run_of(tmp_path, 1.5)).lanes([("0", [sleep, sleep]), ("1", [sleep])])
    assert time.monotonic() - started < 20
    assert capfd.readouterr().out.count("sleep: -15 after") == 2


def test_interrupted_it_stops_what_runs_even_what_has_just_ended(tmp_path, monkeypatch, capfd):
    tasks = [run_all.Task("sleep", "-c 'import time; time.sleep(60)'")] * 2
    run, sleep, started = run_all.Run(run_of(tmp_path, 60)), time.sleep, time.monotonic()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run.running.add(gone)

    def interrupted(seconds):
        sleep(0.5)
        if run.end:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_all.time, "sleep", interrupted)
    run.lanes([("0", tasks)])
    assert time.monotonic() - started < 20
    assert capfd.readouterr().out.count("sleep: -15 after") == 1


def test_only_some(tmp_path, capsys):
    run_all.main(["--out", str(tmp_path), "--list", "--only", "counters"])
    assert capsys.readouterr().out.startswith("GPU 0: counters: benchmarks/counters.py --out")

"""Videos shared by two processes: each is made once, even where a process is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from test_cli import invoke
from test_compare import SMALL, comparison
from tiny import tiny_folder
from two_processes import as_launched, on_two

from dit_sparse import compare as compare_module
from dit_sparse.loading import load_pipeline
from dit_sparse.processes import Processes, Records

PROMPTS = ["a red circle", "a blue square", "a green line"]


def compared(rank, pipe, out, dies=False):
    """What this process generated, and the report; the second dies in its second clip."""
    as_launched(rank)
    processes, _ = Processes.joined("cpu")
    real, made = compare_module.generate_clip, []

    def generate_clip(pipe, prompt, seed, call, method=None, *args, **more):
        if dies and rank == 1 and len(made) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        made.append((prompt, seed, method and method.name))
        return real(pipe, prompt, seed, call, method, *args, **more)

    compare_module.generate_clip = generate_clip
    job = comparison(pipe, out, prompts=PROMPTS, processes=processes, measure_floor=True)
    return made, job.run()


def told(report):
    """All of it but times, and the versions and the command of who ran it."""
    report = json.loads(json.dumps(report))
    runs = [{k: v for k, v in run.items() if k != "seconds"} for run in report["runs"]]
    dense = [{k: v for k, v in clip.items() if k != "seconds"} for clip in report["dense"]]
    return runs, dense, report["noise_floor"], report["chance"], report["complete"]


def finished(folder):
    """When each video was written that has a record."""
    names = [path.stem for path in (folder / "records").glob("p*.json")]
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("p*.mp4")}
    return {path: time for path, time in times.items() if path.stem in names}


@pytest.mark.slow
def test_two_processes_share_a_comparison_and_go_on_where_one_was_killed(tmp_path):
    pipe = load_pipeline(tiny_folder(), "cpu", torch.float32)
    alone = comparison(pipe, tmp_path / "one", prompts=PROMPTS, measure_floor=True).run()

    out = tmp_path / "two"
    with pytest.raises(Exception, match="SIGKILL"):
        on_two(tmp_path, compared, pipe, out, True)
    before = finished(out)
    assert out / "videos/p02-s0-dense.mp4" in before and len(before) < 6
    missing = [
        (prompt, 0, method)
        for number, prompt in enumerate(PROMPTS)
        for method in (None, "adaspa")
        if not any(f.stem.startswith(f"p0{number}-s0-{method or 'dense'}") for f in before)
    ]
    if not (out / "records/floor.json").is_file():  # in bfloat16, and with another seed
        missing += [(PROMPTS[0], 0, None), (PROMPTS[0], 1, None)]
    (out / "videos" / ".part-1-a.mp4").write_text("half a video")

    (first, report), (second, _) = on_two(tmp_path, compared, pipe, out)
    after = finished(out)
    assert before.items() <= after.items() and len(after) == 6
    assert Counter([*first, *second]) == Counter(missing)
    assert told(report) == told(alone) == told(json.loads((out / "report.json").read_text()))
    same = [(tmp_path / n / "sheets/p02-s0.png").read_bytes() for n in ("one", "two")]
    assert same[0] == same[1]
    assert not [*out.rglob(".part-*"), *out.rglob("*.safetensors")]
    assert [made for made, _ in on_two(tmp_path, compared, pipe, out)] == [[], []]


def generated(rank, out, *options):
    as_launched(rank)
    result = invoke("generate", "-p", tiny_folder(), "-m", SMALL, "-o", out, "--json", *options)
    return result.exit_code, result.stdout, result.stderr


def test_two_processes_share_what_is_generated_and_the_first_tells_of_all(tmp_path):
    seeds = [f"--seed={seed}" for seed in range(3)]
    tiny_folder()  # made before the processes are, for both to have the same
    (code, told, errors), (other_code, nothing, quiet) = on_two(
        tmp_path, generated, tmp_path / "out", *seeds
    )
    assert (code, other_code, nothing) == (0, 0, "")
    assert "/p00-s0" in errors and "/p00-s2" not in errors + quiet
    saved = json.loads(told)
    assert [entry["seed"] for entry in saved] == [0, 1, 2]
    assert all(Path(entry["video"]).is_file() for entry in saved)
    before = finished(tmp_path / "out")
    on_two(tmp_path, generated, tmp_path / "out", *seeds, "--seed=3")
    after = finished(tmp_path / "out")
    assert before.items() <= after.items() and len(after) == 4


@pytest.mark.parametrize("count", range(1, 5))
@pytest.mark.parametrize("items", range(7))
def test_the_parts_are_complete_and_disjoint_and_the_first_has_something(items, count):
    states = [
        SimpleNamespace(process_index=n, num_processes=count, wait_for_everyone=lambda: None)
        for n in range(count)
    ]
    parts = [Processes(state).part(list(range(items))) for state in states]
    assert sum(parts, []) == list(range(items)) == Processes().part(list(range(items)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1 and (parts[0] or not items)


def test_a_record_counts_for_the_same_prompt_and_settings_only(tmp_path):
    several = Processes(SimpleNamespace(process_index=0))
    records = Records(tmp_path, several, {"steps": 3})
    records.add("p00-s0", {"prompt": "a", "seconds": 1.0})
    again = partial(Records, tmp_path)
    assert again(several, {"steps": 3}).find("p00-s0", "a") == {"prompt": "a", "seconds": 1.0}
    assert again(several, {"steps": 3}).find("p00-s0", "b") is None
    assert again(several, {"steps": 4}).find("p00-s0", "a") is None
    assert again(Processes(), {"steps": 3}).find("p00-s0", "a") is None


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_a_record_does_not_count_once_its_video_is_replaced(tmp_path, command):
    records = Records(tmp_path, Processes(SimpleNamespace(process_index=0)), {})
    for method in ("dense", "window"):
        records.add(f"p00-s0-{method}", {"prompt": "a", "seconds": 1.0})
    invoke(command, "-p", tiny_folder(), "-m", "window", "--prompt", "b", "-o", tmp_path, "-q")
    left = {"p00-s0-dense.json"} if command == "generate" else set()
    assert {path.name for path in (tmp_path / "records").iterdir()} == left


def test_one_gpu_for_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="leave --device out"):
        Processes.joined("cuda:1")
    with pytest.raises(ValueError, match="2 processes were started, and there are 1 GPUs"):
        Processes.joined("cuda")


def launch(command, *options, pipeline=None, method=SMALL):
    """`accelerate launch` of two processes; where there is no GPU they run on the CPU."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launcher += ["--num_processes", "2", "--main_process_port", "0", "-m", "dit_sparse", command]
    given = ["-p", pipeline or tiny_folder(), "-m", method, "--json", *options]
    root = Path(__file__).parents[1]
    return subprocess.Popen(
        [*launcher, *map(str, given)], cwd=root, stdout=subprocess.PIPE, text=True
    )


def kill_a_worker(process, folder):
    """Kill the second of two once a video is finished; what is finished then."""
    deadline = time.monotonic() + 120
    while not finished(folder) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    [second] = [worker for worker in workers if worker.environ().get("RANK") == "1"]
    second.kill()
    process.communicate(timeout=120)
    assert process.returncode != 0
    return finished(folder)


TWO_DEVICES = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one GPU for two processes")


@pytest.mark.slow
@TWO_DEVICES
def test_by_accelerate_launch_and_a_worker_killed(tmp_path):
    options = ["-o", tmp_path, *(f"--seed={seed}" for seed in range(16))]
    before = kill_a_worker(launch("generate", *options), tmp_path)
    assert 0 < len(before) < 16

    process = launch("generate", *options)
    told, _ = process.communicate(timeout=280)
    assert process.returncode == 0
    assert [entry["seed"] for entry in json.loads(told)] == list(range(16))
    assert before.items() <= finished(tmp_path).items() and len(finished(tmp_path)) == 16


@pytest.mark.slow
@TWO_DEVICES
def test_compare_by_accelerate_launch(tmp_path):
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    process = launch("compare", "-o", tmp_path, *prompts)
    told, _ = process.communicate(timeout=280)
    assert process.returncode == 0
    report = json.loads(told)
    assert report["complete"] and report == json.loads((tmp_path / "report.json").read_text())
    assert [run["prompt"] for run in report["runs"]] == PROMPTS
    assert (tmp_path / "report.html").is_file()

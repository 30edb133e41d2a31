"""The command line: what works, and one clear sentence with an exit code for what cannot."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import tiny_folder
from typer.testing import CliRunner

from dit_sparse import available_methods, failure, generation, step
from dit_sparse.cli import app, read_prompts
from dit_sparse.loading import load_pipeline
from dit_sparse.method_spec import parse_method

SMALL = "adaspa:density=0.5,block_size=32"
NEEDS_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def invoke(*arguments: str):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(code: int, *arguments: str) -> str:
    """Run, expect `code` and one line on stderr; return it."""
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_compare_prints_a_table_and_writes_its_folder(tmp_path):
    arguments = ["-p", tiny_folder(), "-m", SMALL, "-m", "random:block_size=32", "-o", tmp_path]
    result = invoke("compare", *arguments, "--steps", 4, "--seed", 1, "--quiet")
    assert result.exit_code == 0, result.output
    for word in ("PSNR", "LPIPS", "density", "adaspa", "random", "report.json"):
        assert word in result.stdout
    assert "No LPIPS" not in result.stdout or result.stdout.count("No LPIPS") == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [run["steps"] for run in report["runs"]] == [4, 4]
    assert report["runs"][0]["prompt"] == "a red circle" and report["runs"][0]["seed"] == 1


def test_compare_json_is_the_report(tmp_path):
    result = invoke("compare", "-p", tiny_folder(), "-m", SMALL, "-o", tmp_path, "--json", "-q")
    assert json.loads(result.stdout) == json.loads((tmp_path / "report.json").read_text())


def test_generate_writes_a_video_for_each_prompt_seed_and_method(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# two\na red circle\n\na blue square\n")
    arguments = ["-p", tiny_folder(), "--prompt-file", prompts, "--seed", 0, "--seed", 1]
    result = invoke("generate", *arguments, "-m", "dense", "-m", SMALL, "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    saved = json.loads(result.stdout)
    assert len(saved) == 8 and all(Path(entry["video"]).is_file() for entry in saved)


def test_prompts_of_a_file_from_windows(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf# two\r\na red circle\r\n\r\na cat\r\n")
    assert read_prompts(None, tmp_path / "prompts.txt") == ["a red circle", "a cat"]


def test_generate_names_its_video_on_stdout_and_is_else_quiet(tmp_path):
    result = invoke("generate", "-p", tiny_folder(), "-m", "dense", "-o", tmp_path, "--quiet")
    assert result.stdout.startswith(str(tmp_path / "p00-s0-dense.mp4")) and not result.stderr


def test_methods_tell_paper_cost_and_memory():
    text, rows = invoke("methods").stdout, json.loads(invoke("methods", "--json").stdout)
    assert [row["method"] for row in rows] == list(available_methods())
    for row in rows:
        for fact in ("paper", "cost", "memory"):
            assert row[fact] and f"    {fact}: {row[fact]}\n" in text
        assert f"{row['method']}: {row['summary']}\n" in text and "density" in row["options"]


def test_doctor_answers_in_text_and_json():
    state = json.loads(invoke("doctor", "--json").stdout)
    assert state["used"]["engine"] in ("torch", "triton")
    assert "engines" in invoke("doctor").stdout


def test_method_options_are_read_as_python_values():
    spec = parse_method("adaspa:density=0.1,order=tile,search_at=(0.2, 0.5),head_adaptive=false")
    assert spec.options == {
        "density": 0.1,
        "order": "tile",
        "search_at": (0.2, 0.5),
        "head_adaptive": False,
    }
    assert "/" not in spec.slug and " " not in spec.slug


def test_a_method_with_many_options_gives_a_name_that_files_may_have():
    slugs = {parse_method("auto:density=0.10" + n * "0").slug for n in (200, 201)}
    assert len(slugs) == 2 and all(len(slug) < 160 for slug in slugs)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("adspa", "did you mean 'adaspa'"),
        ("adaspa:density=1.5", "(0, 1]"),
        ("adaspa:density=0", "(0, 1]"),
        ("adaspa:densty=0.5", "did you mean 'density'"),
        ("adaspa:density", "density=0.2"),
        ("adaspa:density=abc", "'abc'"),
        ("adaspa:density=0.2,density=0.5", "density is given twice"),
        pytest.param("adaspa:engine=triton", "use engine='auto'", marks=NEEDS_NO_GPU),
    ],
)
@pytest.mark.parametrize("command", ["compare", "generate"])
def test_a_bad_method_is_refused(command, method, words):
    assert words in refused(2, command, "-p", tiny_folder(), "-m", method)


def test_options_of_dense_attention_are_refused():
    with pytest.raises(ValueError, match="dense attention has no options"):
        parse_method("dense:density=0.5", allow_dense=True)


def test_bad_prompts_are_refused(tmp_path):
    base = ("generate", "-p", tiny_folder(), "-o", tmp_path)
    assert "No such file" in refused(2, *base, "--prompt-file", tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    assert "no prompts" in refused(2, *base, "--prompt-file", tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refused(2, *base, "--prompt-file", tmp_path / "binary.txt")
    assert "empty" in refused(2, *base, "--prompt", " ")


def test_bad_places_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "--out" in refused(2, "generate", "-p", tiny_folder(), "-o", tmp_path / "file" / "x")
    assert "model_index.json" in refused(2, "compare", "-p", tmp_path)
    assert "no such folder" in refused(2, "compare", "-p", tmp_path / "missing")
    assert "no such folder" in refused(2, "compare", "-p", "nobody/no-such-pipeline")


def test_a_path_may_be_a_name_of_the_hub():
    with pytest.raises(FileNotFoundError, match="the hub did not give it"):
        load_pipeline(Path("no-such-pipeline"), "cpu", torch.float32)


def test_bad_numbers_are_refused(tmp_path):
    base = ("generate", "-p", tiny_folder(), "-o", tmp_path)
    assert "num_inference_steps" in refused(2, *base, "--steps", 0)
    assert "height" in refused(2, *base, "--height", -64)
    for guidance in ("nan", "inf"):
        assert f"positive, got {guidance}" in refused(2, *base, "--guidance", guidance)
    assert "divisible by 16 but are 33" in refused(2, *base, "--height", 33)
    assert "--psnr must be a number above 0" in refused(2, "calibrate", "--psnr", "nan")
    assert "2 is given more than once" in refused(2, *base, "--seed", 2, "--seed", 2)
    assert "given twice" in refused(2, *base, "-m", SMALL, "-m", SMALL)
    assert "--dtype" in refused(2, *base, "--dtype", "int8")
    assert "--device" in refused(2, *base, "--device", "gpu")


@pytest.mark.parametrize("command", ["compare", "generate", "calibrate", "profile"])
def test_a_seed_that_is_too_large_is_refused(command):
    result = invoke(command, "-p", tiny_folder(), "--seed", 2**64)
    assert result.exit_code == 2 and "at most 64 bits" in result.stderr


@NEEDS_NO_GPU
def test_a_gpu_that_is_not_there_is_refused():
    assert "--device cpu" in refused(2, "compare", "-p", tiny_folder(), "--device", "cuda")


def test_an_unsupported_pipeline_is_refused(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    assert "DDPMPipeline" in refused(2, "compare", "-p", tmp_path, "--prompt", "x", "-o", tmp_path)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), 1, "fewer --frames"),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (MemoryError("max_cache_bytes allows 1 MiB: raise it"), 1, "allows 1 MiB: raise it"),
        (MemoryError(), 1, "fewer --frames"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.mp4"), 1, "name another --out"),
        (RuntimeError("the kernel\nbroke"), 1, "the kernel broke"),
        (KeyError("x"), 1, "--debug"),
    ],
)
def test_a_failure_in_the_run_tells_what_was_kept(tmp_path, monkeypatch, error, code, words):
    real, calls = generation.timed_call, []

    def fails_at_second(*args):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return real(*args)

    monkeypatch.setattr(generation, "timed_call", fails_at_second)
    arguments = ("generate", "-p", tiny_folder(), "--seed", 0, "--seed", 1, "-o", tmp_path, "-q")
    line = refused(code, *arguments)
    assert words in line and "1 finished video" in line
    assert len(list(tmp_path.glob("*.mp4"))) == 1


@pytest.mark.parametrize("arguments", ["methods", "methods --json", "doctor --json", "--help"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_output_that_is_full_is_told(arguments):
    command = [sys.executable, "-m", "dit_sparse", *arguments.split()]
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            command, cwd=Path(__file__).parents[1], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert run.returncode == 1
    (line,) = (line for line in run.stderr.splitlines() if "torch" not in line)
    assert line.startswith("Error: the output is cut off: [Errno 28]")


def test_out_of_memory_in_the_attention_keeps_what_was_compared(tmp_path, monkeypatch):
    real, calls = step.sparse_attention, iter(range(1000))

    def fails_late(*args, **kwargs):
        if next(calls) == 2:  # in the first sparse clip
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return real(*args, **kwargs)

    monkeypatch.setattr(step, "sparse_attention", fails_late)
    line = refused(1, "compare", "-p", tiny_folder(), "-m", SMALL, "-o", tmp_path, "-q")
    assert "fewer --frames" in line and "finished videos and report.json" in line
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 1


def test_bench_out_of_memory_names_its_own_options():
    assert "fewer --tokens" in refused(1, "bench", "--tokens", 10**13, "--device", "cpu")


def test_debug_shows_the_error_itself():
    result = invoke("compare", "-m", "adspa", "--debug")
    assert isinstance(result.exception, ValueError)


def test_out_of_memory_is_known_on_cpu_too():
    assert failure.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))


@pytest.mark.slow  # test_a_failure_in_the_run_tells_what_was_kept raises the same without a process
def test_ctrl_c_ends_with_130_and_keeps_finished_videos(tmp_path):
    """A real signal to a real process, after its first video."""
    command = [sys.executable, "-m", "dit_sparse", "generate", "-p", str(tiny_folder())]
    command += ["-o", str(tmp_path), *(f"--seed={seed}" for seed in range(500))]
    root = Path(__file__).parents[1]
    # A suite that was started in the background ignores Ctrl-C, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        command, cwd=root, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    signal.signal(signal.SIGINT, before)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("[!.]*.gif")) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Interrupted" in errors and "Traceback" not in errors
    assert list(tmp_path.glob("*.mp4"))
    assert not list(tmp_path.glob(".part*"))


@pytest.mark.parametrize(
    ("command", "name", "file"),
    [
        (["generate", "-m", "dense", "--seed", 0, "--seed", 1], "", "p00-s0-dense.mp4 and 1 more"),
        (["compare", "-m", SMALL], "", "report.json of"),
        (["calibrate"], "modes.json", "modes.json of"),
        (["profile"], "profile.json", "profile.json of"),
    ],
)
def test_what_is_replaced_is_told(tmp_path, command, name, file):
    arguments = [*command, "-p", tiny_folder(), "-o", tmp_path / name, "-q"]
    assert "Replaces" not in invoke(*arguments).stderr
    assert f"Replaces {tmp_path / file}" in invoke(*arguments).stderr


@pytest.mark.parametrize("command", ["calibrate", "profile"])
def test_a_file_may_lie_under_the_home_folder(tmp_path, monkeypatch, command):
    """As in --out=~/x.json, which no shell expands, and in a file of options."""
    monkeypatch.setenv("HOME", str(tmp_path))
    result = invoke(command, "-p", tiny_folder(), "-o", "~/new/x.json", "-q")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "new" / "x.json").is_file()


def test_an_output_folder_keeps_the_files_of_the_user(tmp_path):
    from dit_sparse.generation import prepare_folder

    (tmp_path / "probe").write_text("mine")
    prepare_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["probe"]

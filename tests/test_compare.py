"""The comparison on a tiny random pipeline: its report, its files, and what survives a failure."""

import json
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_folder

from dit_sparse import compare as compare_module
from dit_sparse import video
from dit_sparse.compare import Comparison
from dit_sparse.generation import generate_clip
from dit_sparse.loading import call_arguments, load_pipeline
from dit_sparse.method_spec import parse_method
from dit_sparse.table import average, notes, remarks
from dit_sparse.video import write_gif, write_mp4, write_sheet

RUN_FIELDS = (
    "id dense_id method config prompt seed steps guidance size density effective_cost kept_mass "
    "seconds peak_bytes psnr ssim lpips psnr_per_frame identical video trace"
).split()
SMALL = "adaspa:density=0.5,block_size=32,search_at=(0.4,)"


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(tiny_folder(), "cpu", torch.float32)


def comparison(pipe, out, methods=(SMALL,), **changes):
    settings = {
        "pipe": pipe,
        "source": "tiny",
        "arguments": call_arguments(pipe, tiny_folder()),
        "prompts": ["a red circle"],
        "seeds": [0],
        "methods": [parse_method(text) for text in methods],
        "out": out,
        "quiet": True,
    }
    job = Comparison(**{**settings, **changes})
    job.prepare()
    return job


@pytest.fixture(scope="module")
def finished(pipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    methods = (SMALL, "adaspa:density=1.0")
    job = comparison(pipe, out, methods, seeds=[0, 1], measure_floor=True)
    return out, job.run()


def test_report_has_every_field_of_its_schema(finished):
    out, report = finished
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["schema"] == 1 and report["complete"]
    for key in "command pipeline environment noise_floor chance dense runs".split():
        assert key in report
    assert len(report["dense"]) == 2 and len(report["runs"]) == 4
    for run in report["runs"]:
        assert set(RUN_FIELDS) <= set(run)


def test_files_of_the_report_exist_and_nothing_is_half_written(finished):
    out, report = finished
    for entry in [*report["dense"], *report["runs"]]:
        assert (out / entry["video"]).is_file()
        assert (out / entry["video"]).with_suffix(".gif").is_file()
    for run in report["runs"]:
        trace = json.loads((out / run["trace"]).read_text())["trace"]
        assert {entry["kind"] for entry in trace} <= {"dense", "search", "reuse"}
        assert (out / run["sheet"]).is_file()
        assert len(list((out / run["frames"]).iterdir())) == run["size"][0]
    assert (out / "report.html").is_file()
    assert not list(out.rglob(".part*"))


def test_the_last_masks_of_the_first_clip_are_kept_as_maps(finished):
    out, report = finished
    traces = [json.loads((out / run["trace"]).read_text()) for run in report["runs"]]
    sparse, full, *of_second_seed = traces
    places = [(entry["branch"], entry["layer"]) for entry in sparse["maps"]]
    assert places == [(branch, layer) for branch in ("cond", "uncond") for layer in range(2)]
    searches = [entry["step"] for entry in sparse["trace"] if entry["kind"] == "search"]
    assert {entry["step"] for entry in sparse["maps"]} == {max(searches)}
    assert full["maps"] == [] and [trace["maps"] for trace in of_second_seed] == [[], []]


def test_density_one_is_identical_to_dense_and_sparse_is_not(finished):
    _, report = finished
    sparse, full = report["runs"][:2]
    assert full["identical"] and full["psnr"] is None and full["effective_cost"] == 1
    assert not sparse["identical"] and sparse["psnr"] > 10 and 0 < sparse["density"] < 1


def test_floor_is_nearer_than_chance(finished):
    _, report = finished
    assert report["noise_floor"]["kernels"] == ["float32", "bfloat16"]
    assert report["noise_floor"]["psnr"] > report["chance"]["psnr"]


def test_pipeline_is_as_it_was_after_a_comparison(finished, pipe):
    call = call_arguments(pipe, tiny_folder()).call
    used = generate_clip(pipe, "x", 3, call).frames
    fresh = generate_clip(load_pipeline(tiny_folder(), "cpu", torch.float32), "x", 3, call).frames
    assert np.array_equal(used, fresh)


@pytest.mark.parametrize("failure", [RuntimeError("broke"), KeyboardInterrupt()])
def test_finished_clips_survive_a_failure(pipe, tmp_path, monkeypatch, failure):
    job = comparison(pipe, tmp_path, prompts=["a red circle", "x"])
    real, calls = compare_module.generate_clip, []

    def fails_at_last(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # two of the first prompt, dense of the second
            raise failure
        return real(*args, **kwargs)

    monkeypatch.setattr(compare_module, "generate_clip", fails_at_last)
    with pytest.raises(type(failure)):
        job.run()
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["dense"]) == 2 and len(report["runs"]) == 1 and not report["complete"]
    assert all((tmp_path / entry["video"]).is_file() for entry in report["dense"])
    processors = {type(block.attn1.processor).__name__ for block in pipe.transformer.blocks}
    assert processors == {"WanAttnProcessor"}


def test_committed_figures_hold_only_for_their_own_settings(pipe):
    arguments = call_arguments(pipe, tiny_folder())
    small = {**arguments.call, "height": 32}
    figures = [{"call": small, "noise_floor": {"psnr": 50}, "chance": {"psnr": 10}}]
    arguments = replace(arguments, measured=figures)
    assert arguments.noise_floor is None
    assert arguments.override(height=32, num_frames=None).noise_floor == {"psnr": 50}
    assert arguments.override(height=32).chance == {"psnr": 10}


def test_the_boxed_pipeline_is_called_as_its_own_file_says(pipe):
    arguments = call_arguments(pipe, None)
    assert arguments.call["num_inference_steps"] == 25 and arguments.call["height"] == 128
    assert arguments.prompts and arguments.noise_floor and arguments.chance


@pytest.mark.parametrize("text", ['{"call": {"hei', "[]", '{"fps": 8}', '{"call": 3}'])
def test_a_call_file_that_cannot_be_understood_is_named(pipe, tmp_path, text):
    (tmp_path / "dit_sparse.json").write_text(text)
    with pytest.raises(ValueError, match="dit_sparse.json does not say how to call"):
        call_arguments(pipe, tmp_path)


def test_a_pipeline_without_call_file_uses_its_own_defaults(pipe, tmp_path):
    arguments = call_arguments(pipe, tmp_path)
    assert arguments.call["num_inference_steps"] == 50 and arguments.fps == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "--prompt"),
        ({"methods": (SMALL, SMALL)}, "given twice"),
        ({"seeds": [0, 1, 0]}, "given twice"),
    ],
)
def test_what_cannot_be_compared_is_refused_first(pipe, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        comparison(pipe, tmp_path, **changes)


@pytest.mark.parametrize("size", [(32, 48), (17, 21)])
def test_mp4_and_gif_keep_frame_count_and_size(tmp_path, size):
    frames = np.random.default_rng(0).random((5, *size, 3), dtype=np.float32)
    write_mp4(tmp_path / "a.mp4", frames, 8)
    write_gif(tmp_path / "a.gif", frames, 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert float(container.streams.video[0].average_rate) == 8
    even = tuple(side + side % 2 for side in size)
    assert len(decoded) == 5 and decoded[0].shape == (*even, 3)
    gif = Image.open(tmp_path / "a.gif")
    assert gif.n_frames == 5 and gif.size == size[::-1]


def test_mp4_makes_its_folder(tmp_path):
    """`samples/wan.py --out new/wan.mp4` must not fail when the video is made."""
    write_mp4(tmp_path / "new" / "a.mp4", np.zeros((2, 8, 8, 3), np.uint8), 8)
    assert (tmp_path / "new" / "a.mp4").is_file()


def test_mp4_shows_the_frames_it_was_given(tmp_path):
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    frames[:, :, 16:, 0] = 200
    write_mp4(tmp_path / "a.mp4", frames, 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert decoded[3][16, 28, 0] > 170 and decoded[3][16, 4].max() < 30


def test_mpeg4_serves_where_there_is_no_h264(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "has_encoder", lambda name: name == "mpeg4")
    frames = np.full((3, 32, 32, 3), 150, np.uint8)
    write_mp4(tmp_path / "a.mp4", frames, 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == 3 and abs(int(decoded[0][9, 9, 0]) - 150) < 10


def test_a_failed_write_leaves_no_file(tmp_path):
    with pytest.raises(ValueError):
        write_mp4(tmp_path / "a.mp4", np.zeros((2, 32, 32, 7), np.uint8), 8)
    assert not list(tmp_path.iterdir())


def test_sheet_has_a_row_for_dense_and_two_for_each_method(tmp_path):
    frames = np.zeros((17, 32, 32, 3), np.float32)
    write_sheet(tmp_path / "one.png", frames, [("a", frames)])
    write_sheet(tmp_path / "two.png", frames, [("a", frames), ("b", frames)])
    one, two = Image.open(tmp_path / "one.png"), Image.open(tmp_path / "two.png")
    assert one.width == two.width and one.height * 5 == two.height * 3


def test_a_note_names_its_methods_where_it_is_not_of_all():
    labels = {"adaspa": ["same", "costly"], "auto": ["same"], "window": ["same", "costly"]}
    runs = [{"label": label, "notes": of} for label, of in labels.items()]
    assert notes({"runs": runs + runs}) == ["note: same", "note on adaspa, window: costly"]


def test_what_takes_as_long_as_dense_is_not_called_slower():
    report = {"dense": [{"id": "d", "seconds": 2.0}], "metrics": {"lpips_missing": None}}
    seconds = {"alike": 2.004, "slow": 2.2}
    report["runs"] = [
        {"label": label, "seconds": of, "dense_id": "d", "notes": []}
        for label, of in seconds.items()
    ]
    assert [line[:39] for line in remarks(report)] == ["Slower than dense here: slow (0.91x). A"]


def test_average_leaves_out_what_is_unknown():
    assert average([1.0, None, 3.0]) == 2 and average([None]) is None

"""What a page holds: exact frames, figures, traces; words that stay words, paths that stay in."""

import base64
import errno
import io
import json
import os
import re
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import invoke, refused
from tiny_report import FRAMES, HEADS, HOSTILE, LABELS, LAYERS, STEPS, save_tiny_report, tiny_frames

from dit_sparse.block_map import pack, pack_maps, shares
from dit_sparse.block_mask import BlockMask
from dit_sparse.page import json_for_html, write_page
from dit_sparse.page_data import BadReportError, page_data
from dit_sparse.page_frames import ClipFile, embed
from dit_sparse.read_video import read_video
from dit_sparse.video import write_frames, write_gif, write_mp4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_report(tmp_path_factory.mktemp("run") / "tiny")


@pytest.fixture(scope="module")
def data(folder):
    return page_data([folder])


@pytest.fixture
def copy(folder, tmp_path):
    """A report to spoil: `change(report)`, then a folder without clips and traces."""

    def change(edit):
        report = json.loads((folder / "report.json").read_text())
        edit(report)
        (tmp_path / "report.json").write_text(json.dumps(report))
        return tmp_path

    return change


def embedded(page: str) -> dict:
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    )


def decoded(frames: list[str]) -> np.ndarray:
    images = [Image.open(io.BytesIO(base64.b64decode(frame))) for frame in frames]
    return np.stack([np.asarray(image.convert("RGB")) for image in images])


def test_frames_in_the_page_are_the_frames_that_were_generated(data):
    for number, cell in enumerate(data["cells"]):
        for run in cell["runs"]:
            frames = decoded(data["clips"][run["dense_clip"]]["frames"])
            assert np.array_equal(frames, tiny_frames(number))
    assert "lossless" in data["frames_note"]


def test_the_same_clip_is_stored_once(data):
    identical = data["cells"][0]["runs"][2]
    assert identical["identical"] and identical["clip"] == identical["dense_clip"]
    assert len(data["clips"]) == 6  # two dense, two of each method that changes something


def test_rows_are_means_over_clips(data):
    rows = data["reports"][0]["rows"]
    assert [row["label"] for row in rows] == list(LABELS) and rows[0]["clips"] == 2
    runs = [cell["runs"][0] for cell in data["cells"]]
    assert rows[0]["psnr"] == pytest.approx(sum(run["psnr"] for run in runs) / 2)
    assert rows[0]["speed_up"] == pytest.approx(2 / 1.5) and rows[2]["identical"]


def test_traces_survive_packing(data):
    trace = data["cells"][0]["runs"][0]["trace"]
    shape = (2, STEPS, LAYERS, HEADS)
    density = np.frombuffer(zlib.decompress(base64.b64decode(trace["density"])), "<u2")
    density = density.reshape(shape)
    assert (density[:, :2] == 65535).all()
    assert density[0, 2, 0].tolist() == [2000, 3000, 4000, 5000]
    assert trace["kinds"] == ("d" * LAYERS + "s" * LAYERS + "r" * 3 * LAYERS) * 2


def test_a_trace_of_dense_steps_alone_has_no_value(data):
    trace = data["cells"][0]["runs"][2]["trace"]
    assert set(trace["kinds"]) == {"d"} and trace["heads"] == 1 and trace["maps"] is None


def test_words_of_the_data_cannot_leave_their_element(folder, tmp_path):
    page = write_page([folder], tmp_path / "a.html").read_text()
    assert page.count("</script>") == 2 and "onerror=alert(1)>" not in page
    assert embedded(page)["cells"][0]["prompt"] == HOSTILE
    assert json.loads(json_for_html({"a": "<&>\u2028"})) == {"a": "<&>\u2028"}


def test_the_page_names_no_address_but_that_of_svg(folder, tmp_path):
    page = write_page([folder], tmp_path / "a.html").read_text()
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s\"']*", page.replace(HOSTILE, "")))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "frames/../../secret"])
@pytest.mark.parametrize("key", ["frames", "video", "trace"])
def test_a_path_that_leads_out_of_the_folder_is_refused(copy, key, name):
    spoiled = copy(lambda report: report["runs"][0].update({key: name}))
    with pytest.raises(BadReportError, match="outside"):
        page_data([spoiled])


def test_a_link_that_leads_out_of_the_folder_is_refused(copy, tmp_path_factory):
    spoiled = copy(lambda report: report["runs"][0].update(frames="frames/x"))
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.webp"
    secret.write_bytes(b"x")
    (spoiled / "frames" / "x").mkdir(parents=True)
    (spoiled / "frames" / "x" / "0000.webp").symlink_to(secret)
    with pytest.raises(BadReportError, match="outside"):
        page_data([spoiled])


def test_a_run_without_its_files_keeps_its_figures(copy):
    data = page_data([copy(lambda report: None)])
    run = data["cells"][0]["runs"][0]
    assert run["clip"] is None and run["trace"] is None and run["psnr"] > 20


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "has no report.json"), ("{", "JSON"), ('{"schema": 2}', "schema"), ("[]", "schema")],
)
def test_what_is_no_report_is_refused_in_one_sentence(tmp_path, text, words):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    assert words in refused(2, "report", tmp_path)


def test_a_report_without_its_fields_is_refused(copy):
    for edit in (lambda r: r.pop("runs"), lambda r: r["runs"][0].update(dense_id="x")):
        assert "not what" in refused(2, "report", copy(edit))


def test_report_makes_no_folder_of_a_name_that_is_none(tmp_path):
    assert "no report.json" in refused(2, "report", tmp_path / "typo")
    assert not list(tmp_path.iterdir())


def test_a_page_cannot_take_the_place_of_a_folder(folder, tmp_path):
    assert "name a file" in refused(2, "report", folder, "-o", tmp_path)


def test_report_rebuilds_a_page_and_merges_several(folder, tmp_path):
    assert invoke("report", folder).exit_code == 0
    assert embedded((folder / "report.html").read_text())["reports"][0]["name"] == str(folder)
    other = save_tiny_report(tmp_path / "other")
    result = invoke("report", folder, other, "-o", tmp_path / "both.html")
    assert result.exit_code == 0 and "both.html" in result.stdout
    merged = embedded((tmp_path / "both.html").read_text())
    assert [report["name"] for report in merged["reports"]] == [str(folder), str(other)]
    assert [len(cell["runs"]) for cell in merged["cells"]] == [6, 6]
    assert len(merged["clips"]) == 6


def test_clips_of_another_call_are_shown_apart(folder, copy):
    other = copy(lambda report: report["pipeline"]["call"].update(num_inference_steps=9))
    assert len(page_data([folder, other])["cells"]) == 4


@pytest.fixture
def clips(tmp_path):
    rng = np.random.default_rng(0)
    found = []
    for number in range(3):
        frames = rng.integers(0, 255, (FRAMES, 64, 64, 3), dtype=np.uint8)
        write_frames(tmp_path / str(number), frames)
        found.append(ClipFile(tmp_path / str(number), frames.shape[:3]))
    return found


def total(found) -> int:
    return sum(len(base64.b64decode(f)) for clip in found if clip for f in clip["frames"])


def test_a_large_comparison_is_compressed_into_its_budget_and_says_so(clips):
    lossless = total(embed(clips)[0])
    found, note = embed(clips, lossless // 3)
    assert all(found) and total(found) <= lossless // 3
    assert "quality" in note and "difference" in note


def test_clips_that_still_do_not_fit_are_left_out(clips):
    smallest, _ = embed(clips, 1)
    assert smallest == [None] * 3
    found, note = embed(clips, 9_000)
    assert total(found) <= 9_000 and found[-1] is None and "left out" in note


def test_frames_of_an_earlier_run_do_not_stay(tmp_path):
    write_frames(tmp_path, tiny_frames(0))
    (tmp_path / "mine.webp").write_bytes(b"")
    write_frames(tmp_path, tiny_frames(0)[:3])
    assert sorted(file.name for file in tmp_path.iterdir())[3:] == ["mine.webp"]


def unpacked(text: str, side: int) -> np.ndarray:
    packed = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.stack([packed & 15, packed >> 4], -1).flatten()[: side * side].reshape(side, side)


def test_a_small_block_map_is_the_mask_itself():
    mask = torch.rand(1, 2, 9, 9) < 0.4
    mask[..., 0] = True
    packed = pack_maps(BlockMask.from_dense(mask, 9 * 64 - 3, 9 * 64 - 3))
    assert packed["side"] == [9, 9]
    for head in range(2):
        assert np.array_equal(unpacked(packed["heads"][head], 9) == 15, mask[0, head])


def test_a_large_block_map_gives_shares_and_loses_no_block():
    mask = torch.eye(200, dtype=torch.bool)[None, None]
    packed = BlockMask.from_dense(mask, 200 * 64, 200 * 64)
    cells = shares(packed, 0, (64, 64))
    assert cells.shape == (64, 64) and 0 < cells.max() < 1
    assert np.array_equal(unpacked(pack(cells), 64) > 0, cells > 0)


@pytest.mark.parametrize("kind", ["mp4", "gif", "webp", "folder"])
def test_videos_are_read_from_files_and_folders(tmp_path, kind):
    frames = tiny_frames(0)
    path = tmp_path / f"a.{kind}"
    if kind == "mp4":
        write_mp4(path, frames, 8)
    elif kind == "gif":
        write_gif(path, frames, 8)
    elif kind == "webp":
        images = [Image.fromarray(frame) for frame in frames]
        rest = {"append_images": images[1:], "duration": 125, "lossless": True}
        images[0].save(path, save_all=True, **rest)
    else:
        path.mkdir()
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(path / f"f{number + 5}.png")  # f10 comes after f9
    video = read_video(path)
    assert video.frames.shape == frames.shape
    assert np.abs(video.frames.astype(int) - frames).mean() < 30
    if kind in ("webp", "folder"):
        assert np.array_equal(video.frames, frames)
    if kind in ("mp4", "gif"):
        assert video.fps == pytest.approx(8, rel=0.05)


def test_a_hidden_file_is_no_frame(tmp_path):
    write_frames(tmp_path, tiny_frames(0))
    (tmp_path / ".part-7-0003.webp").write_bytes(b"half a frame")
    assert np.array_equal(read_video(tmp_path).frames, tiny_frames(0))


def test_equal_frames_of_a_gif_are_all_read(tmp_path):
    """As HunyuanVideo shows them; a gif joins them to one that is shown longer."""
    frames = np.repeat(tiny_frames(0), 4, axis=0)[3:]
    write_gif(tmp_path / "a.gif", frames, 8)
    video = read_video(tmp_path / "a.gif")
    assert len(video.frames) == len(frames) and video.fps == pytest.approx(8, rel=0.05)


def test_compare_videos_measures_and_shows_them(tmp_path):
    frames = tiny_frames(0)
    write_frames(tmp_path / "a", frames)
    write_frames(tmp_path / "b", frames)
    write_mp4(tmp_path / "c [old].mp4", frames, 8)
    names = [tmp_path / name for name in ("a", "b", "c [old].mp4")]
    result = invoke("compare-videos", *names, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    same, other = json.loads(result.stdout)["runs"]
    assert same["identical"] and same["label"] == "b" and 10 < other["psnr"] < 60
    data = embedded((tmp_path / "out" / "report.html").read_text())
    assert data["cells"][0]["runs"][1]["dense_label"] == "a" and all(data["clips"])
    result = invoke("compare-videos", *names, "-o", tmp_path / "out")
    assert "PSNR" in result.stdout and "density" not in result.stdout
    assert "c [old].mp4" in result.stdout and "report.json of an earlier run" in result.stderr


def test_videos_that_cannot_be_compared_are_refused(tmp_path):
    write_frames(tmp_path / "a", tiny_frames(0))
    write_frames(tmp_path / "short", tiny_frames(0)[:5])
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty").mkdir()
    out = ("-o", tmp_path / "out")
    expected = {"short": "5 frames", "text.mp4": "read as", "empty": "no images", "none": "no "}
    for name, words in expected.items():
        names = "a", "a", name
        assert words in refused(2, "compare-videos", *(tmp_path / n for n in names), *out)
    assert not list((tmp_path / "out").iterdir())  # nor what an earlier run left there


@pytest.mark.parametrize("command", ["compare-videos", "report"])
def test_a_full_disk_is_a_failure_of_the_run(tmp_path, monkeypatch, folder, command):
    write_frames(tmp_path / "a", tiny_frames(0))
    names = [folder] if command == "report" else [tmp_path / "a", tmp_path / "a"]

    def full(*paths):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    line = refused(1, command, *names, "-o", tmp_path / "out" / "x.html")
    assert "the disk is full" in line and "name another --out" in line


def test_frames_that_would_be_written_over_are_refused(tmp_path):
    frames = [tmp_path / "frames" / name for name in ("00", "01")]
    for seed, folder in enumerate(frames):
        write_frames(folder, tiny_frames(seed))
    line = refused(2, "compare-videos", *reversed(frames), "-o", tmp_path)
    assert "name another --out" in line and not (tmp_path / "report.json").exists()
    assert np.array_equal(read_video(frames[0]).frames, tiny_frames(0))

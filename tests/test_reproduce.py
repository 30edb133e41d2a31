"""samples/reproduce: every row is a valid call of an existing pipeline, and each runs in little."""

import json
import runpy
import sys
from dataclasses import replace
from inspect import signature
from pathlib import Path

import diffusers
import pytest
import test_samples

from dit_sparse import AdaSpa, DraftAttention, Rettention, supported_pipelines
from dit_sparse.api import make_config
from dit_sparse.method_spec import parse_method

FOLDER = Path(__file__).parents[1] / "samples" / "reproduce"
sys.path.insert(0, str(FOLDER))

from rows import ROWS, table  # noqa: E402

LITTLE = ["--height", "64", "--width", "64", "--frames", "9", "--steps", "3", "--prompt", "a"]
TINY = {
    "WanPipeline": test_samples.wan,
    "HunyuanVideoPipeline": test_samples.hunyuan_video,
    "CogVideoXPipeline": test_samples.cogvideox,
}
PUBLISHED = {
    "adaspa-hunyuanvideo": AdaSpa.as_published("HunyuanVideo"),
    "adaspa-cogvideox1.5-uniform": replace(
        AdaSpa.as_published("CogVideoX 1.5"), head_adaptive=False
    ),
    "draftattention-wan-768p-75": DraftAttention.as_published("Wan"),
    "draftattention-hunyuanvideo-90": DraftAttention.as_published("HunyuanVideo"),
    "rettention-cogvideox-2b": Rettention.as_published("CogVideoX"),
}


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
    runpy.run_path(str(FOLDER / "run.py"), run_name="__main__")
    return capsys.readouterr().out


def config_of(row):
    spec = parse_method(row.method)
    return make_config(spec.name, spec.options)[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved tiny pipeline of each class, by its name."""
    root = tmp_path_factory.mktemp("models")
    for name, make in TINY.items():
        make().save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_a_config_and_a_call_of_a_pipeline_that_we_support(name):
    row = ROWS[name]
    assert row.pipeline in {one for names in supported_pipelines().values() for one in names}
    cls = getattr(diffusers, row.pipeline)
    assert set(row.call) <= set(signature(cls.__call__).parameters)
    assert row.published["psnr"] > 20 and row.prompts and row.gpu
    if "{table}" not in row.method:
        assert config_of(row).own_block is False


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_of_a_row_are_those_of_as_published(name):
    assert config_of(ROWS[name]) == PUBLISHED[name]


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_printed_without_its_model(monkeypatch, capsys, name):
    text = run(monkeypatch, capsys, name, "--print", "--steps", "7")
    row = ROWS[name]
    for words in ("not run here", row.model, row.pipeline, row.method, row.paper, row.prompts):
        assert words in text
    assert "'num_inference_steps': 7" in text


# One row of each method on each pipeline.
KINDS = {(row.pipeline, row.method.partition(":")[0]): name for name, row in ROWS.items()}


@pytest.mark.parametrize("name", KINDS.values())
def test_a_row_runs_in_little(monkeypatch, capsys, tmp_path, folders, name):
    row = ROWS[name]
    model = folders / row.pipeline
    text = run(monkeypatch, capsys, name, "--model", model, *LITTLE, "--out", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["pipeline"]["class"] == row.pipeline
    assert report["pipeline"]["call"]["guidance_scale"] == row.call["guidance_scale"]
    assert (tmp_path / "modes.json").is_file() == ("{table}" in row.method)
    assert len(report["runs"]) == 1 and str(row.published["psnr"]) in text and "speedup" in text


def test_what_does_not_fit_is_refused(monkeypatch, capsys, folders):
    with pytest.raises(SystemExit, match="VBench"):
        run(monkeypatch, capsys, "rettention-cogvideox-2b")
    with pytest.raises(SystemExit, match="is a WanPipeline.*HunyuanVideoPipeline"):
        model = folders / "WanPipeline"
        run(monkeypatch, capsys, "adaspa-hunyuanvideo", "--model", model, "--prompt", "a")
    for given, told in (
        (["--prompt-file", "none.txt"], "cannot read the prompt file none.txt"),
        (["--prompt", "a", "--table", "none.json"], "no table at none.json"),
        (["--prompt", "a", "--model", "none"], "no pipeline 'none'"),
    ):
        with pytest.raises(SystemExit, match=told):
            run(monkeypatch, capsys, "adaspa-hunyuanvideo", *given)


def test_the_readme_has_the_table_that_is_printed(monkeypatch, capsys):
    assert run(monkeypatch, capsys).strip() == table()
    assert table() in (FOLDER / "README.md").read_text(), "stale: python samples/reproduce/run.py"
    assert table().count("*not run here*") == len(ROWS)


def test_the_scheduler_is_set_as_in_the_paper(folders):
    load = runpy.run_path(str(FOLDER / "run.py"))["load"]
    for name, field in (
        ("draftattention-wan-768p-75", "flow_shift"),
        (
            "draftattention-hunyuanvideo-90",
            "shift",
        ),
    ):
        row = ROWS[name]
        pipe = load(row, str(folders / row.pipeline))
        assert pipe.scheduler.config[field] == row.scheduler[field]

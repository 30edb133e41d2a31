"""A researcher's rule in a file of its own, against the methods that are here."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
from test_cli import SMALL, invoke, refused
from tiny import tiny_folder

from dit_sparse import VideoGrid, enable_sparse_attention
from dit_sparse.api import make_config
from dit_sparse.grid import token_order
from dit_sparse.loading import BOXES, load_pipeline
from dit_sparse.patterns.search import Search

RULE = Path(__file__).parents[1] / "samples" / "own_rule.py"


def test_the_sample_keeps_the_best_blocks_of_every_row():
    """Against a slow loop over rows."""
    torch.manual_seed(0)
    grid = VideoGrid(4, 8, 8)
    query, key = torch.randn(2, 1, 256, 2, 16)
    rule, _ = make_config(str(RULE), {"density": 0.5, "block_size": 32, "reach": 3.0})
    mask = rule.find(Search(query, key, None, grid, 0)).mask[0]
    means = [x[0].unflatten(0, (8, 32)).mean(1).transpose(0, 1) for x in (query, key)]
    place = torch.cartesian_prod(torch.arange(4), torch.arange(8), torch.arange(8)).float()
    centres = place[token_order(grid, "curve", 32)[0]].unflatten(0, (8, 32)).mean(1)
    for head in range(2):
        chances = (means[0][head] @ means[1][head].T / 4).softmax(-1)
        for row in range(8):
            far = (centres - centres[row]).norm(dim=1)
            scores = chances[row] * torch.exp(-far / 3.0)
            scores[row] = torch.inf  # its own block always stays
            kept = scores.argsort(descending=True)[:4]
            assert mask[head, row].nonzero()[:, 0].tolist() == sorted(kept.tolist())


def test_the_sample_is_compared_with_a_known_method(tmp_path):
    methods = ["-m", f"{RULE}:density=0.5,block_size=32", "-m", SMALL]
    result = invoke("compare", "-p", tiny_folder(), *methods, "--steps", 3, "-o", tmp_path, "-q")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert [run["label"].split(":")[0] for run in report["runs"]] == [str(RULE), "adaspa"]
    assert report["runs"][0]["config"]["reach"] == 16.0
    assert 0 < report["runs"][0]["density"] < 1
    assert "What quality costs" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "found none"),
        ("from dit_sparse import AdaSpa, Window", "found none"),
        ("from dit_sparse import AdaSpa\nclass A(AdaSpa): ...\nclass B(A): ...", "found A, B"),
    ],
)
def test_a_file_without_one_rule_is_refused(tmp_path, text, words):
    path = tmp_path / "rule.py"
    path.write_text(text)
    assert words in refused(2, "compare", "-m", path)


def test_a_rule_that_is_not_there_or_has_no_such_option_is_refused(tmp_path):
    assert "no file" in refused(2, "compare", "-m", "nowhere.py")
    assert "no option 'tau'" in refused(2, "compare", "-m", f"{RULE}:tau=3")


def test_an_edited_rule_is_read_again(tmp_path):
    path = tmp_path / "rule.py"
    for default in (0.1, 0.4):
        path.write_text(RULE.read_text().replace("16.0", str(default)))
        assert make_config(str(path), {})[0].reach == default


def test_python_takes_the_file_too(tmp_path):
    pipe = load_pipeline(tiny_folder(), "cpu", torch.float32)
    with enable_sparse_attention(pipe, str(RULE), density=0.5) as handle:
        assert handle.config.density == 0.5 and handle.method == str(RULE)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_minutes_of_a_researcher(tmp_path, monkeypatch):
    """docs/adding_a_pattern.md on the boxed pipelines, two steps of small clips."""
    monkeypatch.chdir(RULE.parent)
    names = [f"race-{box}" for box in BOXES]
    for box, name in zip(BOXES, names):
        small = f"--pipeline {box} --steps 2 --frames 17 --height 64 --width 64 --quiet".split()
        result = invoke("compare", "--config", "race.toml", *small, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert "own_rule.py" in result.stdout and "window" in result.stdout
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert len(report["runs"]) == len(tomllib.loads(Path("race.toml").read_text())["method"])
        assert all(run["psnr"] is not None or run["identical"] for run in report["runs"])
    folders = [tmp_path / name for name in names]
    result = invoke("report", *folders, "--out", tmp_path / "race.html", "--json")
    assert Path(json.loads(result.stdout)["page"]).is_file()


@pytest.mark.slow
def test_the_rule_is_tuned_like_the_others_and_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'dit-sparse[docs]'")
    from test_pareto import arguments, pareto

    figure = ["--figure", str(tmp_path / "pareto.png")]
    pareto.main(arguments(tmp_path / "pareto.json", str(RULE), "window") + figure)
    records = json.loads((tmp_path / "pareto.json").read_text())["records"]
    assert {record["method"] for record in records} == {str(RULE), "window"}
    assert (tmp_path / "pareto.png").is_file()

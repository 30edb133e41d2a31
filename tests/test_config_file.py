"""Options from a file: its values hold, flags win, and what is no option is refused."""

import json

import pytest
from test_cli import SMALL, invoke, refused
from tiny import tiny_folder


def config(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_values_of_the_file_hold_and_flags_win(tmp_path):
    lines = [
        f'pipeline = "{tiny_folder()}"',
        f'method = ["{SMALL}", "window:block_size=32"]',
        'prompt = "a red circle"',
        "seed = [3]",
        "steps = 5",
        f'out = "{tmp_path / "run"}"',
        "quiet = true",
        "json = true",
    ]
    path = config(tmp_path, "\n".join(lines))
    result = invoke("compare", "--config", path, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert result.stderr == "" or "divisible" in result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "run" / "report.json").read_text())
    assert [run["label"] for run in report["runs"]] == [SMALL, "window:block_size=32"]
    assert {(run["seed"], run["steps"], run["prompt"]) for run in report["runs"]} == {
        (3, 2, "a red circle")
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("step = 3", "no option 'step'; did you mean steps?"),
        ("config = 'other.toml'", "no option 'config'"),
        ("steps = ", "cannot read the options in"),
        ("zebra = 1", "there are pipeline, method"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, words):
    assert words in refused(2, "compare", "--config", config(tmp_path, text))


def test_a_missing_file_and_a_bad_value_are_refused(tmp_path):
    assert "No such file" in refused(2, "generate", "--config", tmp_path / "none.toml")
    result = invoke("generate", "--config", config(tmp_path, 'steps = "many"'))
    assert result.exit_code == 2 and "--steps" in result.stderr

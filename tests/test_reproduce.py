"""samples/reproduce: every row is a valid command, and one runs in little."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_folder
from typer.testing import CliRunner

from dit_sparse.cli import app
from dit_sparse.method_spec import parse_method

FOLDER = Path(__file__).parents[1] / "samples" / "reproduce"
sys.path.insert(0, str(FOLDER))

from rows import ROWS  # noqa: E402
from run import command  # noqa: E402

OPTIONS = {"height", "width", "frames", "steps", "guidance"}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_a_method_and_a_call(name):
    row = ROWS[name]
    assert set(row.call) == OPTIONS and row.published["psnr"] > 20
    if "{table}" in row.method:
        with pytest.raises(SystemExit, match="--table FILE"):
            command(row)
    else:
        assert parse_method(row.method).options["own_block"] is False
    parts = command(row, "modes.json", ["--steps", "2"])
    assert parts.count("--steps") == 1 and parts[-1] == "2" and row.model in parts


def test_a_row_runs_in_little(tmp_path):
    little = ["--height", "32", "--width", "32", "--frames", "5", "--steps", "3", "--quiet"]
    given = ["--pipeline", str(tiny_folder()), "--prompt", "a", "--out", str(tmp_path), *little]
    result = CliRunner().invoke(app, command(ROWS["adaspa-hunyuanvideo"], None, given))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "report.json").is_file()


def test_rows_are_listed_as_not_run_and_prompts_are_asked_for():
    run = [sys.executable, str(FOLDER / "run.py")]
    text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert text.count("not run here") == len(ROWS)
    refused = subprocess.run(
        [*run, "rettention-cogvideox-2b"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2 and "VBench" in refused.stderr

"""`dit-sparse bench`: what it times is what is meant, and what fails is told."""

import json

import pytest
import torch
from typer.testing import CliRunner

from dit_sparse import bench as module
from dit_sparse.bench import SHAPES, Shape, bench, random_mask, summary, timed
from dit_sparse.cli import app

LITTLE = Shape(300, 2, 16)


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_rows_are_dense_sparse_and_search(monkeypatch):
    monkeypatch.setattr(module, "REPEATS", 1)
    rows = summary(list(bench(LITTLE, 0.3, 32, "full", "cpu", torch.float32)), LITTLE, 0.3)
    assert [row["part"] for row in rows] == ["dense", "sparse", "search", "search"]
    dense, sparse = rows[:2]
    assert dense["times_dense"] == 1
    assert sparse["times_dense"] == pytest.approx(dense["seconds"] / sparse["seconds"])
    work = 4 * 2 * 16 * 300**2
    assert dense["tflops"] == pytest.approx(work / dense["seconds"] / 1e12)
    assert sparse["tflops"] == pytest.approx(0.3 * work / sparse["seconds"] / 1e12)


def test_the_mask_has_the_density():
    _, mask = random_mask(Shape(640, 2, 16), 0.25, 32, torch.Generator().manual_seed(0))
    assert (mask.to_dense().sum(-1) == 5).all()


def test_what_fails_is_a_row_too():
    def fail():
        raise RuntimeError("no  such\nkernel")

    assert timed("x", "dense", fail, "cpu")["error"] == "no such kernel"
    rows = [timed("x", "sparse", fail, "cpu"), timed("y", "dense", lambda: None, "cpu")]
    assert "times_dense" not in summary(rows, LITTLE, 0.3)[0]


def test_the_command_prints_a_table_and_json(monkeypatch):
    monkeypatch.setattr(module, "REPEATS", 1)
    size = "--tokens", 200, "--heads", 1, "--dim", 16, "--device", "cpu"
    shown = invoke(*size)
    assert shown.exit_code == 0 and "200 tokens, 1 heads of 16" in shown.stdout
    assert "No GPU here" in shown.stdout and "selection" in shown.stdout
    told = json.loads(invoke(*size, "--json").stdout)
    assert told["shape"] == {"tokens": 200, "heads": 1, "dim": 16}
    assert all(row["seconds"] > 0 for row in told["rows"])


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--shape", "wan", "--shape must be one of small, wan-1.3b-480p"),
        ("--tokens", 0, "--tokens must be at least 1"),
        ("--density", 2, "density"),
        ("--precision", "fp4", "precision must be one of full, int8, fp8"),
        ("--block-size", 48, "block_size must be one of"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(option, value, expected):
    result = invoke(option, value)
    assert result.exit_code == 2 and expected in result.output


def test_shapes_of_the_help_are_those_known():
    assert ", ".join(SHAPES) in " ".join(app_help().split())


def app_help():
    from typer.main import get_command

    return next(p.help for p in get_command(app).commands["bench"].params if p.name == "shape")

"""`dit-sparse bench --tune` without a GPU: a clock that is told, and the file of tuned tiles."""

import json

import pytest
import torch
from platformdirs import user_cache_path
from typer.testing import CliRunner

pytest.importorskip("triton")

from dit_sparse import tune  # noqa: E402
from dit_sparse.bench import Shape  # noqa: E402
from dit_sparse.cli import app  # noqa: E402
from dit_sparse.kernels import tiles, tuned  # noqa: E402
from dit_sparse.kernels.block_sparse_fwd import default_tile  # noqa: E402

CPU = torch.device("cpu")
TINY = Shape(70, 1, 64)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIT_SPARSE_CACHE", str(tmp_path))
    tuned.tuned_tile.cache_clear()
    yield tmp_path
    tuned.tuned_tile.cache_clear()


def clock(times):
    """A timer that makes no call and reads the next of `times`; an error is raised."""
    left = iter(times)

    def timer(call):
        time = next(left)
        if isinstance(time, Exception):
            raise time
        return time

    return timer


def test_the_fastest_tile_is_kept_and_used_by_the_next_call(cache):
    x = torch.zeros(1, 70, 1, 64, dtype=torch.bfloat16)
    before = default_tile(x, x, x, (64, 64))
    tried = [t for t in tiles.CANDIDATES[64, 64] if not t.gluon and t != before]
    times = [5.0, RuntimeError("too large"), 1.0, *[3.0] * len(tried)]
    found = tune.tune(TINY, 0.5, 64, "cpu", clock(times))
    assert found["tile"] == list(tried[1]) and found["refused"] == 1 and found["before_ms"] == 5.0
    assert default_tile(x, x, x, (64, 64)) == tried[1] != before
    assert default_tile(x, x, x, (128, 128)) != tried[1]
    (machine,) = json.loads((cache / "tiles.json").read_text())
    assert machine == tuned.machine(CPU) and "triton" in machine


def test_another_gpu_or_triton_and_a_damaged_file_change_nothing(cache, caplog):
    x = torch.zeros(1, 70, 1, 64, dtype=torch.bfloat16)
    before, name = default_tile(x, x, x, (64, 64)), tuned.problem("pointer", 64, (64, 64))
    other = {"another GPU, triton 1.0": {name: [16, 16, 1, 1, False]}}
    for text in (json.dumps(other), "{", json.dumps({tuned.machine(CPU): {name: [1, 2]}})):
        (cache / "tiles.json").write_text(text)
        tuned.tuned_tile.cache_clear()
        assert default_tile(x, x, x, (64, 64)) == before
    assert caplog.text.count("is not used") == 2


def test_a_tile_is_written_beside_the_others_into_a_folder_that_is_made(cache, monkeypatch):
    monkeypatch.setenv("DIT_SPARSE_CACHE", str(cache / "a" / "b"))
    tile = tiles.Tile(16, 16, 4, 1)
    assert tuned.tuned_tile(CPU, "one") is None
    files = {tuned.keep(CPU, name, tile) for name in ("one", "two")}
    assert files == {cache / "a" / "b" / "tiles.json"} == set((cache / "a" / "b").iterdir())
    assert tuned.tuned_tile(CPU, "one") == tuned.tuned_tile(CPU, "two") == tile


def test_without_the_variable_it_is_the_folder_of_the_platform(monkeypatch):
    monkeypatch.delenv("DIT_SPARSE_CACHE")
    assert tuned.tiles_file() == user_cache_path("dit-sparse") / "tiles.json"


def test_no_tile_at_all_is_an_error_and_writes_nothing(cache):
    with pytest.raises(RuntimeError, match="no tile of the forward kernel runs here"):
        tune.tune(TINY, 0.5, 64, "cpu", clock([RuntimeError("no")] * 9))
    assert not (cache / "tiles.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    result = CliRunner().invoke(app, ["bench", "--tune"])
    assert result.exit_code == 2 and "torch sees none here" in result.output

"""benchmarks/times.py: times are put where the same settings stand, and none is taken twice."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks")]

import times  # noqa: E402


def record(method, density, **more):
    place = {"pipeline": "wan_tiny", "size": "128x128x16", "method": method}
    return place | {"config": {"density": density}} | more


def test_times_are_put_where_the_same_settings_stand():
    results = {"records": [record("adaspa", d, effective_time=9.0) for d in (0.1, 0.2)]}
    found = {"records": [record("adaspa", 0.2, effective_time=0.3)]}
    found["records"].append(record("rettention", 0.1, effective_time=0.4))
    assert times.put_in(results, found) == 1
    assert [r["effective_time"] for r in results["records"]] == [9.0, 0.3]


def test_the_least_of_several_counts_and_what_is_there_is_left_out(tmp_path, monkeypatch):
    timed = []

    def seconds_of(runner, config):
        timed.append(config)
        return [2.0, 1.0, 3.0] if config is times.DENSE else [0.9, 0.5, 0.7]

    monkeypatch.setattr(times, "seconds_of", seconds_of)
    runner = SimpleNamespace(tuning=SimpleNamespace(), latents=lambda clips: None)
    args, result = SimpleNamespace(out=tmp_path / "times.json"), {"records": []}
    records = [record("adaspa", 0.1)]
    times.measure(runner, records, result, args)
    assert result["records"][0]["effective_time"] == 0.5
    assert json.loads(args.out.read_text()) == result and len(timed) == 2
    times.measure(runner, records, result, args)
    assert len(timed) == 2
    times.measure(runner, [*records, record("adaspa", 0.2)], result, args)
    assert [config.density for config in timed if config is not times.DENSE] == [0.1, 0.2]

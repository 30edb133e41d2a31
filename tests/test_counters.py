"""benchmarks/counters.py without a GPU: what it reads from the table that ncu prints."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "benchmarks")]

import counters  # noqa: E402

STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"


def printed(*rows):
    names = [counters.METRICS["us"], counters.METRICS["l2"], STALL.format("wait")]
    head = ["ID", "Kernel Name", *names]
    table = [head, ["", "", "ns", "%", "inst"], *rows]
    lines = [",".join(f'"{cell}"' for cell in row) for row in table]
    return "\n".join(["==PROF== Connected", "case wan", *lines])


def test_a_record_for_each_launch():
    rows = ["0", "fwd(int)", "2,358,720", "83.9", "1.3"], ["1", "b", *"123"]
    found = counters.read(printed(*rows))
    assert [record["kernel"] for record in found] == ["fwd", "b"]
    assert found[0]["us"] == 2358.72 and found[0]["l2"] == 83.9 and found[0]["tensor"] is None
    assert next(iter(found[0]["stalls"].items())) == ("wait", 1.3)


def test_no_counters():
    assert counters.read("==ERROR== the user does not have permission") == []

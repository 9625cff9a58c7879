"""Both sides give the same frames, and the reader decodes as little late as early."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("av")


def test_one_row_per_side_and_second(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "bench_seek", raising=False)
    import bench_seek

    bench_seek.main("--minutes 1 --fps 5 --side 64 --repeats 1".split())
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["side"], row["start_s"]) for row in rows] == [
        (side, start) for start in (10.0, 50.0) for side in ("from the start", "seeking")
    ]
    assert all(row["max_difference"] == 0 for row in rows)
    assert rows[3]["decoded_frames"] <= 2 * rows[1]["decoded_frames"] < rows[2]["decoded_frames"]

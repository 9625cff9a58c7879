"""Both sides of the benchmark of `rice index` read all photographs. Nothing here is timed."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
def test_every_side_prints_a_row(monkeypatch, capsys):
    for package in ("onnx", "onnxruntime", "onnxscript", "lancedb"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(FOLDER))
    import bench_index

    bench_index.main("--photographs 5 --pixels 40 --size tiny --batch_size 3 --num_workers 0 --threads 1".split())
    rows = {row["side"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(rows) == list(bench_index.SIDES)
    assert all(row["photographs"] == 5 and row["ms_per_photograph"] > 0 for row in rows.values())

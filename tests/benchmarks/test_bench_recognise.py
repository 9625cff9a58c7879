"""The benchmark of `rice recognise` follows a video to its end. Nothing here is timed."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_every_precision_prints_a_row(monkeypatch, capsys):
    for package in ("av", "lancedb"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(FOLDER))
    import bench_recognise

    bench_recognise.main("--sizes tiny --precisions fp32 bf16 --seconds 6 --shop 3 --pixels 32 32 --threads 1".split())
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["precision"] for row in rows] == ["fp32", "bf16"]
    assert all(row["segments"] >= 1 and row["times_real_time"] > 0 for row in rows)

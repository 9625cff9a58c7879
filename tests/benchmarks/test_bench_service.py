"""The service's benchmark measures both sides without errors. Nothing here is timed."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
def test_both_sides_print_a_row(monkeypatch, capsys):
    for package in ("fastapi", "uvicorn", "prometheus_client", "lancedb"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(FOLDER))
    import bench_service

    small = "--size tiny --frames 2 --pixels 32 --shop 5 --seconds 0.5 --clients 1 3 --threads 1 --precision fp32"
    bench_service.main(small.split())
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["side"], row["clients"]) for row in rows] == [("loop", 1), ("service", 1), ("service", 3)]
    for row in rows:
        assert row["errors"] == row["told_to_come_again"] == 0
        assert row["answers_per_second"] > 0 and 0 < row["p50_ms"] <= row["p99_ms"] and row["peak_rss_mb"] > 0

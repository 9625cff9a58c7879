"""The streaming benchmark's list is one that the builder reads, and each of its steps sees the rows it should."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
ROWS = 900


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import bench_streaming

    yield bench_streaming
    sys.modules.pop("bench_streaming")


def test_steps(benchmark, tmp_path):
    path = benchmark.write_list(tmp_path, ROWS)
    assert path.stat().st_size / ROWS == pytest.approx(340, abs=40)
    whole_batches = ROWS // benchmark.BATCH * benchmark.BATCH
    expected = {
        "index": ROWS,
        "reopen": 1,
        "stream": whole_batches,
        "seek": 1,
        "order_same_live": ROWS // (8 * benchmark.BATCH) * 8 * benchmark.BATCH,
        "table": ROWS,
        "table_read": ROWS,
        "pandas": ROWS,
    }
    assert set(expected) == set(benchmark.STEPS)
    for step, rows in expected.items():
        row = benchmark.run_step(step, tmp_path)
        assert row["rows"] == rows, step
        assert row["peak_rss_mb"] >= row["import_rss_mb"] > 0

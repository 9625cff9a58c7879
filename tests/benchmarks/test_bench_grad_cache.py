"""The benchmark of steps in chunks prints its rows, and both sides compute the same. Nothing here is timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    """The script, whose steps are done in this process: each in its own costs seconds to start."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import bench_grad_cache

    start = subprocess.run

    def run(command, **options):
        if command[0] != sys.executable:
            return start(command, **options)
        row = bench_grad_cache.measure_step(bench_grad_cache.parse_arguments(command[2:]))
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(row), stderr="")

    monkeypatch.setattr(bench_grad_cache.subprocess, "run", run)
    return bench_grad_cache


def test_one_row_per_step(bench, capsys):
    bench.main("--plain 6 --chunk 4 --batch_size 10 --frames 1 --device cpu --losses icl icl_pmd_pfr".split())
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = [("plain", 4), ("plain", 6), ("grad_cache", 6), ("grad_cache", 10)]
    assert [(row["side"], row["batch_size"]) for row in rows] == 2 * expected
    for row in rows:
        if row["side"] == "grad_cache":
            assert row["bound_mb"] >= row["kept_mb"] >= 0 and row["peak_memory_mb"] >= 0
            assert (row["batch_size"] == 6) == ("loss_difference" in row)
            assert row.get("loss_difference", 0) < 1e-4


def test_a_step_that_fails_is_a_row(bench, capsys, monkeypatch):
    def fail(command, **_):
        return subprocess.CompletedProcess(command, -9, stdout="", stderr="")

    monkeypatch.setattr(bench.subprocess, "run", fail)
    bench.main("--plain 6 --chunk 4 --batch_size 10 --losses icl".split())
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["error"] for row in rows] == ["killed"] * 4


def test_too_small_batches_are_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.parse_arguments(["--chunk", "3"])
    assert "at least 4" in capsys.readouterr().err

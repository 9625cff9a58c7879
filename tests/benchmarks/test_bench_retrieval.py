"""The script prints one row per step, at a size that takes no time. Nothing here is timed."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    """The script, whose steps run in this process."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import bench_retrieval

    class Result:
        stdout = ""

    def run(command, **_):
        assert command[0] == sys.executable
        Result.stdout = json.dumps(bench_retrieval.run_step(bench_retrieval.parse_arguments(command[2:])))
        return Result

    # Not the module's own `run`, which others use too.
    monkeypatch.setattr(bench_retrieval, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))
    return bench_retrieval


def rows_of(bench, capsys, *steps):
    arguments = "--size tiny --queries 6 --shop 40 --centres 20 --repeats 1 --frames 2 --seconds 0.2 --clients 2"
    bench.main([*arguments.split(), "--rows", "500", "--steps", *steps])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_rows_of_search_and_matching(bench, capsys):
    plain, exact, streamed, top, shop = rows_of(bench, capsys, "torch", "exact", "streamed", "match_top", "match_shop")
    assert plain["ms"] > 0 and exact["ms"] > 0 and streamed["ms"] > 0
    assert exact["recall@10"] == 1 and streamed["recall@10"] == 1 and exact["rows"] == 500
    assert exact["bytes_per_image"] == 2 * (32 + 32)
    assert top["match_ms"] > 0 and shop["match_ms"] > 0


def test_one_livestream(bench, capsys):
    (row,) = rows_of(bench, capsys, "room")
    assert row["cold_ms"] > 0 and row["ms"] > 0


def test_approximate_search(bench, capsys):
    (row,) = rows_of(bench, capsys, "hnsw")
    assert row["recall@10"] > 0.9 and row["recall@10_of_images"] > 0.9
    assert row["index_mb"] > 0 and row["build_seconds"] >= 0


def test_rows_from_frames_to_answer(bench, capsys):
    (row,) = rows_of(bench, capsys, "end_to_end")
    assert row["ms_batch_1"] > 0 and row["ms_batch_32"] > 0


def test_rows_of_writing_and_load(bench, capsys):
    write, load = rows_of(bench, capsys, "write", "load")
    assert write["found_by_another_reader_ms"] >= write["put_ms"] > 0
    assert load["failures"] == [] and load["searches_per_second"] > 0

"""The alignment benchmark's two sides agree, and its rows say what was measured."""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_rows_of_both_precisions(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    import bench_alignment

    bench_alignment.main("--images 5 --frames 2 3 --patches 9 --rank 8 --repeats 1 --device cpu --threads 1".split())
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [(row["frames"], row["dtype"]) for row in rows]
    assert kinds == [(2, "float32"), (2, "bfloat16"), (3, "float32"), (3, "bfloat16")]
    for row in rows:
        assert row["bytes_per_image"] == 9 * 8 * 2
        assert row["max_difference"] < (1e-5 if row["dtype"] == "float32" else 0.02)

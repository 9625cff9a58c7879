"""The benchmark of cached features prints its rows, and both ways make the same losses. Nothing here is timed."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize("losses", ["icl", "icl_pmd_pfr"])
def test_one_row_per_variant(monkeypatch, capsys, losses):
    pytest.importorskip("timm")
    monkeypatch.syspath_prepend(str(FOLDER))
    import bench_feature_cache

    sizes = "--clips 8 --batch_size 4 --frames 2 --side 64 --plain_steps 1 --cached_steps 3 --device cpu"
    bench_feature_cache.main([*sizes.split(), "--losses", losses, "--architecture", "mobilenetv3_small_050"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"losses')]
    assert [row["way"] for row in rows] == ["pictures", "filling the cache", "cached features"]
    assert rows[1]["cache_bytes"] > 0
    assert rows[2]["loss_difference"] < 1e-5

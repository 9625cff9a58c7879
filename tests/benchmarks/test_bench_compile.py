"""The sides of the compile benchmark have one loss, and its rows say what was compiled."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_rows_of_all_sides(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "restored afterwards")
    import bench_compile

    words = "--size tiny --backend eager --precisions fp32 --frames 3 --repeats 1 --device cpu"
    bench_compile.main([*words.split(), "--sides", "plain", "encoder"])
    plain, encoder = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (plain["side"], plain["graphs"], plain["breaks"]) == ("plain", 0, 0)
    # With gradients and without.
    assert (encoder["side"], encoder["graphs"], encoder["breaks"]) == ("encoder", 2, 0)
    assert encoder["loss_difference"] == pytest.approx(0, abs=1e-6)
    assert encoder["step_speedup"] > 0 and encoder["inference_speedup"] > 0

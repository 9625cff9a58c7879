"""All variants of the inference benchmark compute the same thing. Nothing here is timed."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = "--size tiny --batch_size 3 --clips 2 --frames 2 --pairs 5 --repeats 1 --device cpu".split()


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    """As when a script of the folder is started."""
    monkeypatch.syspath_prepend(str(FOLDER))


def rows(capsys, *arguments):
    import bench_inference

    bench_inference.main([*SMALL, *arguments])
    return {row["variant"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}


def test_every_variant_prints_a_row_near_torch(capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    import torch

    compile_for_real = torch.compile
    # Inductor needs minutes for what the eager back end captures just the same, without graph breaks.
    monkeypatch.setattr(torch, "compile", lambda tower, **kwargs: compile_for_real(tower, backend="eager", **kwargs))
    found = rows(capsys)
    assert list(found) == ["torch fp32", "torch bf16", "torch compiled", "onnx fp32", "onnx int8"]
    for name, limit in (("torch fp32", 0), ("torch compiled", 1e-5), ("onnx fp32", 1e-4), ("onnx int8", 0.2)):
        assert found[name]["embedding_difference"] <= limit and found[name]["score_difference"] <= 2 * limit
    assert 1e-4 < found["torch bf16"]["embedding_difference"] < 0.05
    assert found["torch bf16"]["megabytes"] == pytest.approx(found["torch fp32"]["megabytes"] / 2, abs=0.1)
    assert found["onnx int8"]["megabytes"] < found["onnx fp32"]["megabytes"]
    for row in found.values():
        assert row["ms_per_image"] > 0 and row["ms_per_clip"] > 0 and row["ms_per_pair"] > 0


def test_chosen_variants_only(capsys):
    assert list(rows(capsys, "--variants", "torch bf16")) == ["torch bf16"]


def test_onnx_on_another_device_is_refused(capsys):
    import bench_inference

    with pytest.raises(SystemExit):
        bench_inference.parse_arguments(["--device", "cuda", "--variants", "onnx fp32"])
    assert "--device cpu only" in capsys.readouterr().err

"""The effect of a precision is measured against fp32. Nothing here is timed."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_single_precision_agrees_exactly_and_half_precision_nearly(monkeypatch, capsys, tiny_model_and_mini):
    monkeypatch.syspath_prepend(str(FOLDER))
    import bench_precision

    model, data = tiny_model_and_mini
    where = ["--model", str(model), "--dataset", "mini_lpr4m", "--data_dir", str(data), "--device", "cpu"]
    bench_precision.main([*where, "--precisions", "bf16", "fp16"])
    rows = {row["precision"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(rows) == ["fp32", "bf16", "fp16"]
    assert rows["fp32"]["same_first_image"] == rows["fp32"]["same_first_ten"] == 1.0
    for name in ("bf16", "fp16"):
        assert rows[name]["clips"] == rows["fp32"]["clips"] > 0
        assert 0.5 < rows[name]["same_first_ten"] <= 1.0 and 0 <= rows[name]["R@1"] <= 1.0
    bench_precision.main([*where, "--precisions", "fp32", "--decode", "fast"])
    rows = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert [(row["precision"], row["decode"]) for row in rows] == [("fp32", "exact"), ("fp32", "fast")]
    with pytest.raises(SystemExit):
        bench_precision.main([*where, "--precisions", "int8"])
    assert "need --towers" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny_model_and_mini(tmp_path_factory):
    """A checkpoint and a rendered data set of ten clips."""
    import torch

    from data_rice.mini_lpr4m import render_mini_lpr4m
    from modeling_rice import RiceConfig, RiceModel
    from processing_rice import build_processor, train_tokenizer

    folder = tmp_path_factory.mktemp("precision")
    sizes = {"num_train_lives": 2, "num_test_lives": 1, "products_per_live": 5, "clips_per_product": 2}
    render_mini_lpr4m(folder / "mini", **sizes, num_frames=3, image_size=32, num_workers=1, progress=False)
    torch.manual_seed(0)
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    RiceModel(RiceConfig(vision_config=vision, projection_dim=16, decoder_num_heads=2)).save_pretrained(folder / "m")
    build_processor(train_tokenizer(["a red mug", "blue shoe"] * 20), 32, 16, 3).save_pretrained(folder / "m")
    return folder / "m", folder / "mini"

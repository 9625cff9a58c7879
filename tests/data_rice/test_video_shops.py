"""Folders of mp4 clips through training and evaluation as a user starts them, with a tiny model."""

import json

import numpy as np
import pytest
from PIL import Image

import eval_rice
import train_rice

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
RECIPE = f"""
image_size: 32
num_frames: 3
train_num_frames: 2
frame_sampling: random
vocab_size: 400
model:
  vision_config: {json.dumps(VISION | {"image_size": 32, "patch_size": 8})}
  projection_dim: 16
  decoder_num_heads: 4
per_device_train_batch_size: 4
max_steps: 2
eval_strategy: steps
eval_steps: 2
report_to: none
disable_tqdm: true
use_cpu: true
"""


@pytest.fixture
def run(tmp_path):
    """A function that trains two steps on a data set, evaluates on its test split, and returns results.json."""

    def run(*data: str, options: tuple[str, ...] = ()) -> dict:
        recipe, model, scores = tmp_path / "recipe.yaml", tmp_path / "model", tmp_path / "scores"
        recipe.write_text(RECIPE)
        words = [*data, "--cache_dir", str(tmp_path / "cache")]
        train_rice.main([str(recipe), *words, *options, "--output_dir", str(model)])
        words += ["--model", str(model), "--output_dir", str(scores), "--num_workers", "0", "--device", "cpu"]
        eval_rice.main(words)
        return json.loads((scores / "results.json").read_text())

    return run


def save_picture(path, level: int) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (32, 32), (level, 0, 0)).save(path)


def test_shop_clips_of_time_ranges(run, tmp_path, write_video):
    shop = tmp_path / "shop"
    write_video(shop / "live.mp4", num_frames=120, fps=5)
    rows = {"gallery": [], "clips_train": [], "clips_val": [], "clips_test": []}
    for i in range(4):
        save_picture(shop / f"gallery/g{i}.png", 50 * i)
        rows["gallery"].append({"gallery_id": f"g{i}", "image": f"gallery/g{i}.png"})
    for i in range(12):
        clip = {"query_id": f"c{i}", "video": "live.mp4", "start": 2 * i, "end": 2 * i + 1.9}
        split = ("clips_train", "clips_val", "clips_test")[i // 4]
        rows[split].append({**clip, "gt_gallery_ids": [f"g{i % 4}"]})
    rows["clips_test"].append({**clip, "query_id": "late", "start": 100, "end": 101, "gt_gallery_ids": ["g0"]})
    for name, lines in rows.items():
        (shop / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = run("--dataset", "shop_clips", "--data_dir", str(shop))
    assert results["num_queries"] == 5 and results["gallery_size"]["max"] == 4
    (failure,) = [failure for failure in results["failures"] if failure["method"] == "model"]
    assert failure["id"] == "late" and "holds no frame" in failure["reason"]


@pytest.mark.parametrize("extracted", [False, True])
def test_moving_fashion(run, tmp_path, write_video, extracted):
    from data_rice.moving_fashion.prepare import main

    root = tmp_path / "mf"
    files = {"train": {}, "test": {}}
    for i in range(12):
        split = "train" if i < 9 else "test"
        name = f"{split}{i}"
        write_video(root / f"videos/{name}.mp4", num_frames=10, fps=2, first_level=20 * i)
        save_picture(root / f"imgs/{name}.png", 20 * i)
        entry = {"video_paths": [f"videos/{name}.mp4"], "img_path": f"imgs/{name}.png", "source": i % 2}
        files[split][name] = entry
    (root / "videos/test10.mp4").write_bytes(b"torn")
    for split, entries in files.items():
        (root / f"{split}.json").write_text(json.dumps(entries))
    if extracted:
        assert main(["prepare", str(root), "--short_side", "32"]) == 1
    data = ("--dataset", "moving_fashion", "--data_dir", str(root))
    results = run(*data, options=("--validation_fraction", "0.3"))
    assert results["protocol"]["gallery_scope"] == "all" and results["gallery_size"]["max"] == 3
    assert results["by"]["source"]["regular"]["num_queries"] == 2
    assert results["by"]["source"]["hard"]["num_queries"] == 1
    assert results["by"]["source"]["hard"]["fused"]["R@10"] == 0.0
    assert np.isclose(results["scores"]["fused"]["R@10"], 2 / 3)
    assert {failure["id"] for failure in results["failures"]} == {"test10#0"}

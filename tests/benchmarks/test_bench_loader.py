"""Both sides of the loader's benchmark give the same pictures, and it prints its rows. Nothing here is timed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    """As when a script of the folder is started."""
    monkeypatch.syspath_prepend(str(FOLDER))


def test_one_row_per_content_and_side(capsys, tmp_path):
    import bench_loader

    rng = np.random.default_rng(0)
    bench_loader.draw_leaves(rng, 90, 120).save(tmp_path / "photo.png")
    sizes = "--width 90 --height 160 --image_size 28 --frames 3 --clips 2 --repeats 1"
    bench_loader.main([*sizes.split(), "--frames_dir", str(tmp_path)])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    sides = ["plain", "exact", "fast", "fast_with_normalize"]
    assert [(row["content"], row["side"]) for row in rows] == [
        (content, side) for content in ("photo", "leaves", "noise") for side in sides
    ]
    for row in rows:
        assert row["clips_per_core_second"] > 0 and row["speedup"] > 0
        if row["side"] == "exact":
            assert row["max_difference"] <= 2
        elif row["side"] != "plain":
            assert row["mean_difference"] < (4 if row["content"] != "noise" else 30)
    assert all(row["max_difference"] > 1 for row in rows if row["side"] == "fast"), "nothing was reduced"


def test_the_plain_side_is_the_processor(tmp_path):
    import bench_loader

    from processing_rice import build_processor, train_tokenizer

    options = bench_loader.parse_arguments("--width 90 --height 160 --frames 3 --clips 1".split())
    frames = bench_loader.make_frames("leaves", options)
    assert len(frames) == len(set(frames)) == 3
    processor = build_processor(train_tokenizer(["a red mug"] * 9, vocab_size=400), 28, 4, 3)
    mean, std = (np.array(getattr(processor.video_processor, f"image_{name}")) for name in ("mean", "std"))
    for i, data in enumerate(frames):
        (tmp_path / f"{i}.jpg").write_bytes(data)
    expected = processor(videos=[[str(tmp_path / f"{i}.jpg") for i in range(3)]])["pixel_values_videos"][0]
    # One grey level of 255 is 0.015 in normalised values.
    torch.testing.assert_close(bench_loader.plain_clip(frames, 28, mean, std).float(), expected, rtol=0, atol=0.016)


def test_a_folder_without_pictures_is_refused(tmp_path):
    import bench_loader

    with pytest.raises(SystemExit, match="holds no picture"):
        bench_loader.main(["--frames_dir", str(tmp_path)])

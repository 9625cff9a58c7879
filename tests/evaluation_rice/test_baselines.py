import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation_rice.baselines import (
    BASELINES,
    HISTOGRAM_BINS,
    BaselineRetriever,
    ColorHistogram,
    ColorHistogramInBox,
    Pixels8x8,
    crop_to_box,
    run_baselines,
)
from evaluation_rice.frames import clip_frames
from evaluation_rice.protocol import RetrievalTask, chance_recall
from evaluation_rice.retrieval import Loading, retrieve
from evaluation_rice.speed import TimedRetriever

QUIET = Loading(2, quiet=True)


def test_histogram_of_one_colour_has_one_full_bin():
    features = ColorHistogram().describe(Image.new("RGB", (40, 30), (255, 0, 0)))
    assert features.shape == (np.prod(HISTOGRAM_BINS),) and features.max() == 1 and features.sum() == 1


def test_intersection_is_one_for_itself_and_zero_for_others():
    histogram = ColorHistogram()
    colours = [histogram.describe(Image.new("RGB", (8, 8), colour)) for colour in ((255, 0, 0), (0, 0, 255))]
    assert np.array_equal(histogram.similarity(np.stack(colours), np.stack(colours)), np.eye(2, dtype=np.float32))


def test_small_pixels_have_length_one():
    rng = np.random.default_rng(0)
    features = Pixels8x8().describe(Image.fromarray(rng.integers(0, 255, (30, 20, 3), dtype=np.uint8)))
    assert features.shape == (192,) and np.linalg.norm(features) == pytest.approx(1)
    assert np.isfinite(Pixels8x8().describe(Image.new("RGB", (9, 9), (7, 7, 7)))).all()


def test_box_crop_keeps_at_least_one_pixel():
    image = Image.new("RGB", (20, 10))
    assert crop_to_box(image, [0.25, 0.0, 0.75, 0.5]).size == (10, 5)
    assert crop_to_box(image, [1.0, 1.0, 1.0, 1.0]).size == (1, 1)


def test_box_baseline_looks_at_boxed_frames_only(tmp_path):
    picture = Image.new("RGB", (20, 10), (0, 0, 255))
    picture.paste((255, 0, 0), (0, 0, 10, 10))
    picture.save(tmp_path / "half.png")
    Image.new("RGB", (20, 10), (0, 255, 0)).save(tmp_path / "green.png")
    frames = [{"path": str(tmp_path / name), "bytes": None} for name in ("half.png", "green.png")]
    row = {"clip_id": "q", "frames": frames, "boxes": [[0.0, 0.0, 0.5, 1.0], None]}
    red = ColorHistogram().describe(Image.new("RGB", (4, 4), (255, 0, 0)))
    assert np.array_equal(ColorHistogramInBox().describe_clip(row), red)
    without = ColorHistogramInBox().describe_clip({**row, "boxes": [None, None]})
    assert np.array_equal(without, ColorHistogram().describe_clip(row))


def test_a_clip_without_frames_is_refused():
    with pytest.raises(ValueError, match="no frames"):
        clip_frames({"frames": []}, 5)


def test_clips_of_video_files_are_read(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(40):
            colour = (250, 0, 0) if i < 20 else (0, 0, 250)
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), colour))
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    frames = [image for image, _ in clip_frames({"video": str(path), "start": 2.0, "end": 4.0, "frames": []}, 4)]
    assert len(frames) == 4 and all(np.asarray(image).mean((0, 1)).argmax() == 2 for image in frames)
    with pytest.raises(FileNotFoundError, match="gone.mp4"):
        clip_frames({"video": str(tmp_path / "gone.mp4"), "frames": []}, 4)
    row = {"video": str(path), "start": 2.0, "end": 4.0, "frames": [], "box_frames": [0], "boxes": [[0, 0, 0.5, 1]]}
    boxes = [box for _, box in clip_frames(row, 4)]
    assert boxes[0] == [0, 0, 0.5, 1] and boxes[1:] == [None] * (len(boxes) - 1)


def test_every_baseline_runs_under_the_protocol(shop):
    task = RetrievalTask.from_datasets(shop.queries, shop.gallery, "live")
    scores, failures = run_baselines([*BASELINES, "chance"], task, shop.queries, shop.gallery, loading=QUIET)
    assert failures == []
    assert scores["color_histogram"]["R@1"] >= 0.8 and len(scores["color_histogram"]["R@1_ci95"]) == 2
    assert scores["chance"] == chance_recall(task)


def test_unreadable_files_are_named_misses(shop):
    """One of a clip's frames makes no miss, all of them do."""
    task = RetrievalTask.from_datasets(shop.queries, shop.gallery, "live")
    frames = [entry["path"] for entry in shop.queries[0]["frames"]]
    for i, path in enumerate(frames):
        Path(path).write_bytes(b"no image")
        scores, failures = run_baselines(["color_histogram"], task, shop.queries, shop.gallery, loading=QUIET)
        lost = i + 1 == len(frames)
        assert scores["color_histogram"]["R@10"] == pytest.approx(0.8 if lost else 1.0)
        assert {(f["method"], f["id"]) for f in failures} == {("color_histogram", "a")}
        assert failures[0]["file"] == frames[0] and ("outcome" in failures[0]) != lost


def test_unknown_baseline_is_refused(shop):
    task = RetrievalTask.from_datasets(shop.queries, shop.gallery, "live")
    with pytest.raises(ValueError, match="unknown baseline 'magic'"):
        run_baselines(["magic"], task, shop.queries, shop.gallery)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_time_of_descriptors_counts_without_decoding(shop, num_workers):
    """The loader computes them, in another process where it has one; reading takes no share."""

    class Slow(ColorHistogram):
        def describe(self, image):
            time.sleep(0.02)
            return super().describe(image)

    task = RetrievalTask.from_datasets(shop.queries, shop.gallery, "live")
    retriever = TimedRetriever(BaselineRetriever(Slow()))
    retrieve(retriever, task, shop.queries, shop.gallery, loading=Loading(2, num_workers, quiet=True))
    speed = retriever.summary()
    assert speed["image_ms"] >= 20 and speed["clip_ms"] >= 40
    assert retriever.num_parameters() == 0

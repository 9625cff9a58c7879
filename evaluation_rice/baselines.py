"""Methods without training, run through the same protocol as the model.

    python -m evaluation_rice.baselines --dataset mini_lpr4m --data_dir data/mini_lpr4m

prints R@k of each. `color_histogram` is part of every result. `pixels_8x8` and `color_histogram_in_box` (which uses
the ground-truth boxes) show how hard a data set is.
"""

import argparse
import time

import numpy as np
import torch
from PIL import Image

from data_rice.commands import mistakes_end
from hub_rice.tables import format_table
from processing_rice import open_image

from .frames import clip_frames
from .protocol import RetrievalTask, chance_recall
from .recall import DEFAULT_KS
from .retrieval import Loading, retrieve

HISTOGRAM_BINS = (16, 4, 4)
"""Bins of hue, saturation and value."""
MAX_SIDE = 256
"""Maximum longer side in pixels; larger pictures are reduced first, because a histogram does not need more."""


def crop_to_box(image: Image.Image, box: list[float]) -> Image.Image:
    """The part of `image` inside `box` (ltrb, 0 to 1), at least one pixel."""
    width, height = image.size
    left, top = min(int(box[0] * width), width - 1), min(int(box[1] * height), height - 1)
    right, bottom = max(round(box[2] * width), left + 1), max(round(box[3] * height), top + 1)
    return image.crop((left, top, min(right, width), min(bottom, height)))


class Baseline:
    """A descriptor of one image, averaged over the frames of a clip, compared by `similarity`.

    Args:
        num_frames: maximum number of frames per clip, evenly spaced.
        use_boxes: describe only the part of each frame inside its box. Frames without a box are left out of the mean,
            unless no frame of the clip has a box.
    """

    name = ""

    def __init__(self, num_frames: int = 10, use_boxes: bool = False):
        self.num_frames = num_frames
        self.use_boxes = use_boxes
        self.seconds = 0.0
        """Seconds spent on descriptors so far, without reading and decoding."""

    def describe(self, image: Image.Image) -> np.ndarray:
        """Float32 descriptor `(D,)` of an RGB image."""
        raise TypeError(f"{type(self).__name__} does not describe images: use a subclass.")

    def similarity(self, clips: np.ndarray, gallery: np.ndarray) -> np.ndarray:
        """Scores `(num_clips, num_images)`, higher is better, from descriptors `(num_clips, D)`, `(num_images, D)`."""
        return clips @ gallery.T

    def describe_clip(self, row: dict, failures: list[dict] | None = None) -> np.ndarray:
        """Mean descriptor `(D,)` over the frames of a query row; raises `ValueError` if it has no frames."""
        frames = clip_frames(row, self.num_frames, failures)
        boxed = [crop_to_box(image, box) for image, box in frames if box is not None] if self.use_boxes else []
        return np.mean([self._timed(image) for image in boxed or [image for image, _ in frames]], axis=0)

    def _timed(self, image: Image.Image) -> np.ndarray:
        started = time.perf_counter()
        features = self.describe(image)
        self.seconds += time.perf_counter() - started
        return features

    def encode_gallery(self, rows: list[dict]) -> tuple[np.ndarray, list[int], list[dict]]:
        """Descriptors of gallery rows, positions of the readable rows, and a failure for each unreadable row."""
        features, loaded, failures = encode_rows(
            rows, "image_id", lambda row, _: self._timed(open_image(row["image"]))
        )
        return _stack(features), loaded, failures

    def encode_clips(self, rows: list[dict]) -> tuple[np.ndarray, list[int], list[dict]]:
        """The same for query rows."""
        features, loaded, failures = encode_rows(rows, "clip_id", self.describe_clip)
        return _stack(features), loaded, failures


def _stack(features: list[np.ndarray]) -> np.ndarray:
    return np.stack(features).astype(np.float32) if features else np.zeros((0, 0), np.float32)


def encode_rows(rows: list[dict], key: str, encode) -> tuple[list, list[int], list[dict]]:
    """
    Results of `encode(row, failures)` for the readable rows, the positions of these rows, and the failures.

    Args:
        rows: query or gallery rows.
        key: column with the row's id.
        encode: reads a row; a row for which it raises `ValueError` or `OSError` is a failure.
    """
    encoded, loaded, failures = [], [], []
    for i, row in enumerate(rows):
        try:
            encoded.append(encode(row, failures))
            loaded.append(i)
        except (ValueError, OSError) as error:
            failures.append({"id": row[key], "file": _file_of(row), "reason": str(error)})
    return encoded, loaded, failures


def _file_of(row: dict) -> str:
    """The first file of a row that cannot be opened, "" if all can."""
    if row.get("video"):
        return row["video"]
    for entry in row["frames"] if "frames" in row else [row["image"]]:
        try:
            open_image(entry)
        except ValueError:
            return entry.get("path") or ""
    return ""


class ColorHistogram(Baseline):
    """HSV histogram with 16 hues, 4 saturations and 4 values over the whole frame, compared by intersection.

    Intersection sums the smaller of the two shares of each bin: 1 for equal histograms, 0 for disjoint ones.
    """

    name = "color_histogram"

    def describe(self, image):
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        hsv = np.asarray(image.convert("HSV")).reshape(-1, 3).astype(np.int64)
        bins = hsv * np.array(HISTOGRAM_BINS) // 256
        index = np.ravel_multi_index(bins.T, HISTOGRAM_BINS)
        counts = np.bincount(index, minlength=int(np.prod(HISTOGRAM_BINS)))
        return (counts / counts.sum()).astype(np.float32)

    def similarity(self, clips, gallery):
        return np.stack([np.minimum(clip, gallery).sum(-1) for clip in clips])


class ColorHistogramInBox(ColorHistogram):
    """The colour histogram inside the ground-truth boxes of the frames, which shows the value of the box alone."""

    name = "color_histogram_in_box"

    def __init__(self, num_frames: int = 10, use_boxes: bool = True):
        super().__init__(num_frames, use_boxes)


class Pixels8x8(Baseline):
    """Image reduced to 8 x 8 RGB, mean subtracted, normalised to length 1; compared by dot product."""

    name = "pixels_8x8"

    def describe(self, image):
        pixels = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=np.float32).reshape(-1)
        pixels -= pixels.mean()
        return pixels / max(float(np.linalg.norm(pixels)), 1e-6)


class BaselineRetriever:
    """
    A baseline as a `Retriever`: descriptors are computed in the loader's workers.

    Attributes:
        loader_seconds: seconds that the workers spent on descriptors of images and clips, for the batches so far.
    """

    def __init__(self, baseline: Baseline):
        self.baseline = baseline
        self.loader_seconds = {"image": 0.0, "clip": 0.0}

    @property
    def num_frames(self) -> int:
        return self.baseline.num_frames

    def num_parameters(self) -> int:
        return 0

    def _load(self, rows, encode):
        before = self.baseline.seconds
        features, loaded, failures = encode(rows)
        return (features, self.baseline.seconds - before), loaded, failures

    def load_gallery(self, rows):
        return self._load(rows, self.baseline.encode_gallery)

    def load_clips(self, rows):
        return self._load(rows, self.baseline.encode_clips)

    def encode_gallery(self, inputs):
        self.loader_seconds["image"] += inputs[1]
        return inputs[0]

    def encode_clips(self, inputs):
        self.loader_seconds["clip"] += inputs[1]
        return inputs[0]

    def cat(self, parts):
        return np.concatenate(parts)

    def scores(self, clips, gallery):
        return {"embedding": torch.from_numpy(self.baseline.similarity(clips, gallery))}


BASELINES = {cls.name: cls for cls in (ColorHistogram, Pixels8x8, ColorHistogramInBox)}
BASELINE_NAMES = ("color_histogram", "chance", "pixels_8x8", "color_histogram_in_box")


def run_baselines(
    names, task: RetrievalTask, queries, gallery, *, loading: Loading = Loading(), num_frames: int = 10, ks=DEFAULT_KS
) -> tuple[dict[str, dict], list[dict]]:
    """R@k of each named baseline under the protocol of `task`.

    Returns:
        `{name: {"R@1": ..., "R@1_ci95": [low, high]}}` (chance is an exact expectation without an interval), and the
        failures, each with the name of its baseline under `method`.

    Raises:
        ValueError: a name is unknown, or no gallery image could be read.
    """
    scores, failures = {}, []
    for name in names:
        if name not in BASELINE_NAMES:
            raise ValueError(f"unknown baseline {name!r}: choose from {', '.join(BASELINE_NAMES)}.")
        if name == "chance":
            scores[name] = chance_recall(task, ks)
            continue
        retriever = BaselineRetriever(BASELINES[name](num_frames))
        rankings, failed = retrieve(retriever, task, queries, gallery, loading=loading, ks=ks)
        scores[name] = rankings["embedding"].summary()
        failures += [{"method": name, **failure} for failure in failed]
    return scores, failures


def main(arguments: list[str] | None = None) -> None:
    from data_rice import gallery_scope, load_dataset_view

    parser = argparse.ArgumentParser(description="R@k of methods without training, under the evaluation's protocol.")
    parser.add_argument("--dataset", required=True, help="name of a data set, or a folder in a known layout")
    parser.add_argument("--data_dir", help="folder of the data set's files")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--baselines", nargs="+", default=list(BASELINE_NAMES), choices=BASELINE_NAMES)
    parser.add_argument("--batch_size", type=int, default=64, help="rows per batch")
    parser.add_argument("--num_workers", type=int, default=0, help="loader processes")
    options = parser.parse_args(arguments)
    with mistakes_end(parser):
        queries = load_dataset_view(options.dataset, "query", options.split, data_dir=options.data_dir)
        gallery = load_dataset_view(options.dataset, "gallery", options.split, data_dir=options.data_dir)
        task = RetrievalTask.from_datasets(queries, gallery, gallery_scope(options.dataset, options.data_dir))
        loading = Loading(options.batch_size, options.num_workers)
        scores, failures = run_baselines(options.baselines, task, queries, gallery, loading=loading)
    print(format_table(scores))
    for failure in failures:
        print(f"{failure['method']}: {failure['kind']} {failure['id']} {failure['file']}: {failure['reason']}")


if __name__ == "__main__":
    main()

"""Evaluation of a detector: COCO's average precision, and the hit rate of its single answer per frame."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import torch
from torch.utils.data import DataLoader
from torchvision.ops import box_iou
from tqdm.auto import tqdm

from processing_rice import MediaError, open_image

from .frames import coco_annotations
from .product_detector import Detections, ProductDetector

HIT_IOU = 0.5


@dataclass(frozen=True)
class _Answer:
    """The best detection of a frame: its score, and its largest IoU with a product box (0 without a product box)."""

    has_product: bool
    score: float
    iou: float


def evaluate(
    detector: ProductDetector,
    rows: datasets.Dataset,
    *,
    fit_threshold: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict:
    """
    Measures a detector on detection rows.

    A frame with the product is a hit if its best box reaches the threshold and has an IoU of at least 0.5 with one of
    its product boxes. A frame without the product is a false alarm if its best box reaches the threshold.

    Args:
        detector: The detector, with its threshold; `fit_threshold` changes the threshold.
        rows: See `frames.load_frames`. An unreadable frame counts as a frame without detections.
        fit_threshold: First choose the threshold with the best F1 of hits on these frames.
        batch_size: Frames per batch.
        num_workers: Number of processes that decode.

    Returns:
        `AP` (COCO's mean over IoU 0.50 to 0.95) and `AP50`; `hit_rate` and `hit_rate_without_threshold` over frames
        with the product; `mean_box_hit_rate`, the baseline that answers with the mean box of these frames;
        `false_alarm_rate` over frames without the product (None if there are none), `threshold`, `num_frames`,
        `num_frames_without_product`, `unreadable` (ids).

    Raises:
        ValueError: there are no frames with the product, or pycocotools is missing.
    """
    # Imported before detection, which takes minutes.
    import_pycocotools()
    with_product = sum(bool(boxes) for boxes in rows["boxes"])
    if with_product == 0:
        raise ValueError("None of the frames shows the product; name a split with product boxes.")
    found, answers, unreadable = [], [], []
    for row_boxes, frame_id, detections in _detect_all(detector, rows, batch_size, num_workers):
        if detections is None:
            unreadable.append(frame_id)
            detections = Detections(torch.zeros(0, 4), torch.zeros(0))
        found.append(detections)
        answers.append(_judge(row_boxes, detections))
    if fit_threshold:
        detector.threshold = best_threshold(answers)
    shown = [answer for answer in answers if answer.has_product]
    others = [answer for answer in answers if not answer.has_product]
    average, average50 = average_precision(rows["boxes"], found)
    return {
        "AP": average,
        "AP50": average50,
        "hit_rate": sum(a.score >= detector.threshold and a.iou >= HIT_IOU for a in shown) / len(shown),
        "hit_rate_without_threshold": sum(a.iou >= HIT_IOU for a in shown) / len(shown),
        "mean_box_hit_rate": mean_box_hit_rate(rows["boxes"]),
        "mean_iou": sum(a.iou for a in shown) / len(shown),
        "false_alarm_rate": sum(a.score >= detector.threshold for a in others) / len(others) if others else None,
        "threshold": detector.threshold,
        "num_frames": len(answers),
        "num_frames_without_product": len(others),
        "unreadable": unreadable,
    }


def _detect_all(detector, rows, batch_size, num_workers) -> Iterator[tuple[list, str, Detections | None]]:
    loader = DataLoader(rows, batch_size, num_workers=num_workers, collate_fn=_decode)
    with tqdm(total=len(rows), desc="Frames", unit="frame") as progress:
        for batch in loader:
            readable = [picture for _, _, picture in batch if picture is not None]
            detections = iter(detector.predict(readable))
            for boxes, frame_id, picture in batch:
                yield boxes, frame_id, None if picture is None else next(detections)
            progress.update(len(batch))


def _decode(rows: list[dict]) -> list[tuple]:
    decoded = []
    for row in rows:
        try:
            picture = open_image(row["image"])
        except MediaError:
            picture = None
        decoded.append((row["boxes"], row["frame_id"], picture))
    return decoded


def _judge(boxes: list[list[float]], detections: Detections) -> _Answer:
    if len(detections.scores) == 0:
        return _Answer(bool(boxes), -1.0, 0.0)
    iou = box_iou(detections.boxes[:1], torch.tensor(boxes)).max().item() if boxes else 0.0
    return _Answer(bool(boxes), detections.scores[0].item(), iou)


def mean_box_hit_rate(boxes: list[list[list[float]]]) -> float:
    """Hit rate of one constant box, the mean of all boxes (ltrb), over the frames with boxes."""
    shown = [torch.tensor(own) for own in boxes if own]
    mean = torch.cat(shown).mean(dim=0, keepdim=True)
    return sum(box_iou(mean, own).max().item() >= HIT_IOU for own in shown) / len(shown)


def best_threshold(answers: list[_Answer]) -> float:
    """The score with the best F1: precision is hits among answers, recall is hits among frames with the product."""
    with_product = sum(answer.has_product for answer in answers)
    best, hits = (0.0, 1.0), 0
    for given, answer in enumerate(sorted(answers, key=lambda answer: -answer.score), start=1):
        hits += answer.has_product and answer.iou >= HIT_IOU
        best = max(best, (2 * hits / (given + with_product), answer.score))
    return best[1]


def import_pycocotools() -> tuple[type, type]:
    """The classes `COCO` and `COCOeval`; raises `ValueError` if pycocotools is not installed."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise ValueError(
            "Average precision needs pycocotools; install it: pip install pycocotools, or -e '.[detector]'."
        ) from None
    return COCO, COCOeval


def average_precision(boxes: list[list[list[float]]], detections: list[Detections]) -> tuple[float, float]:
    """
    COCO's AP over IoU 0.50 to 0.95, and at 0.50, of one category, by pycocotools.

    Args:
        boxes: Per frame, its true boxes, ltrb as fractions of the frame.
        detections: Per frame, its detections.

    Raises:
        ValueError: pycocotools is not installed.
    """
    COCO, COCOeval = import_pycocotools()
    # COCO defines small objects by their area in pixels; with fractions all are small, which does not change AP.
    truth = [
        {**annotation, "image_id": frame}
        for frame, entries in enumerate(boxes)
        for annotation in coco_annotations(torch.tensor(entries).reshape(-1, 4))
    ]
    results = [
        {"image_id": frame, "category_id": 0, "score": score, "bbox": annotation["bbox"]}
        for frame, entry in enumerate(detections)
        for annotation, score in zip(coco_annotations(entry.boxes), entry.scores.tolist())
    ]
    # Ids start at 1, because 0 means "no match" there.
    truth = [{**annotation, "id": number} for number, annotation in enumerate(truth, start=1)]
    if not results:
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": frame} for frame in range(len(boxes))],
            "categories": [{"id": 0, "name": "product"}],
            "annotations": truth,
        }
        coco.createIndex()
        scoring = COCOeval(coco, coco.loadRes(results), "bbox")
        scoring.evaluate()
        scoring.accumulate()
        scoring.summarize()
    return float(scoring.stats[0]), float(scoring.stats[1])

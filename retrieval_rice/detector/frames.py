"""Single frames for training and evaluating a detector, with all product boxes or without the product."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from data_rice import Lpr4m, load_dataset_view
from data_rice.detection import detection_row
from data_rice.features import detection_features
from data_rice.views import builder_of
from processing_rice import MediaError, open_image

logger = logging.getLogger(__name__)


def load_frames(dataset: str, split: str, **options) -> datasets.Dataset:
    """
    Detection rows of a split: frames with boxes, and frames without a box in clips that have boxes.

    The latter are frames without the product. Clips without any box may be unannotated, so they are left out.

    Args:
        dataset, split: As `data_rice.load_dataset_view`.
        options: Its other arguments.

    Raises:
        FileNotFoundError, ValueError: as `data_rice.load_dataset_view`.
    """
    is_lpr4m = builder_of(dataset, options.get("data_dir")) is Lpr4m
    if is_lpr4m and split != "test":
        return load_dataset_view(dataset, "detection", split, **options, empty_frames=True)
    # LPR4M's test list names only the frames with boxes.
    view = "query" if is_lpr4m else "pairs"
    frames = load_dataset_view(dataset, "detection", split, **options)
    empty = frames_without_product(load_dataset_view(dataset, view, split, **options), split)
    # Some splits already list their frames without a box.
    listed = set(frames["frame_id"]) if len(empty) else set()
    return datasets.concatenate_datasets(
        [frames, empty.filter(lambda frame_id: frame_id not in listed, input_columns="frame_id")]
    )


def frames_without_product(clips: datasets.Dataset, split: str) -> datasets.Dataset:
    """Detection rows without boxes: the frames without a box in clips that have boxes."""

    def explode(batch: Mapping[str, list]) -> dict[str, list]:
        rows = [
            detection_row(
                frame_id=f"{clip_id}-{number:04d}",
                clip_id=clip_id,
                live_id=live_id,
                image=frame,
                boxes=[],
                category=category,
                split=split,
            )
            for clip_id, live_id, category, frames, boxes in zip(
                *(batch[name] for name in ("clip_id", "live_id", "category", "frames", "boxes")), strict=True
            )
            if any(box is not None for box in boxes)
            for number, (frame, box) in enumerate(zip(frames, boxes))
            if box is None
        ]
        return {name: [row[name] for row in rows] for name in detection_features()}

    return clips.map(
        explode, batched=True, batch_size=100, remove_columns=clips.column_names, features=detection_features()
    )


def _augmentation() -> v2.Transform:
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.RandomAffine(degrees=0, translate=(0.15, 0.15), scale=(0.75, 1.25))], p=0.5),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(min_size=2, min_area=4),
        ]
    )


@dataclass
class DetectionCollator:
    """
    Turns detection rows into a detector's training batch.

    Args:
        processor: The detector's image processor.
        failure_log: File to which one JSON line per unreadable frame is appended; such frames are left out.
        augment: Mirror, shift, scale and recolour frames at random.
    """

    processor: Any
    failure_log: str | None = None
    augment: bool = True

    def __post_init__(self):
        self.augmentation = _augmentation() if self.augment else None

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        """
        Returns the processor's outputs: `pixel_values` `(B, 3, H, W)`, possibly `pixel_mask`, and `labels`.

        Raises:
            MediaError: no frame of the batch can be read.
        """
        pictures, annotations = [], []
        for row in rows:
            try:
                picture = open_image(row["image"])
            except MediaError as error:
                self._report(row["frame_id"], error)
                continue
            size = torch.tensor([picture.width, picture.height] * 2)
            boxes = torch.tensor(row["boxes"]).reshape(-1, 4) * size
            if self.augmentation is not None:
                boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(picture.height, picture.width))
                target = {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64)}
                picture, target = self.augmentation(picture, target)
                boxes = target["boxes"]
            annotations.append({"image_id": len(pictures), "annotations": coco_annotations(boxes)})
            pictures.append(picture)
        if not pictures:
            raise MediaError(
                f"None of the {len(rows)} frames of a batch could be read (first: {rows[0]['frame_id']}); "
                f"check the data folder."
            )
        return dict(self.processor(images=pictures, annotations=annotations, return_tensors="pt"))

    def _report(self, frame_id: str, error: MediaError) -> None:
        logger.warning("The frame %s is left out: %s", frame_id, error)
        if self.failure_log is not None:
            os.makedirs(os.path.dirname(os.path.abspath(self.failure_log)), exist_ok=True)
            with open(self.failure_log, "a", encoding="utf-8") as file:
                file.write(json.dumps({"id": frame_id, "reason": str(error)}, ensure_ascii=False) + "\n")


def coco_annotations(boxes: torch.Tensor) -> list[dict]:
    """Boxes `(n, 4)` ltrb in pixels as objects in COCO's format, all of category 0."""
    return [
        {
            "bbox": [left, top, right - left, bottom - top],
            "area": (right - left) * (bottom - top),
            "category_id": 0,
            "iscrowd": 0,
        }
        for left, top, right, bottom in boxes.tolist()
    ]

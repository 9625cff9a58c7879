"""A detector of the intended product, and a small one to train from scratch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
)

from data_rice.parsing import clip_box
from evaluation_rice.checkpoint import check_checkpoint
from evaluation_rice.hub import hub_errors

DEFAULT_THRESHOLD = 0.5
LABELS = {0: "product"}


@dataclass(frozen=True)
class Detections:
    """What was found in one frame, best first: boxes `(n, 4)` ltrb as fractions of the frame, scores `(n,)` 0..1."""

    boxes: Tensor
    scores: Tensor

    def best(self, threshold: float) -> tuple[list[float], float] | None:
        """The best box and its score, `None` when it scores below the threshold or has no area in the frame."""
        if len(self.scores) == 0 or self.scores[0] < threshold:
            return None
        box = clip_box(self.boxes[0].tolist())
        return None if box is None else (box, self.scores[0].item())


class ProductDetector:
    """
    Any object detection model of transformers, with one answer per frame: the best box, or none.

    Args:
        model: In eval mode.
        processor: Its image processor.
        threshold: Score below which a frame counts as one without the product, 0..1. By default what training found on
            validation frames (`config.score_threshold`), else 0.5.
    """

    def __init__(self, model, processor, threshold: float | None = None):
        self.model = model
        self.processor = processor
        self.threshold = getattr(model.config, "score_threshold", None) if threshold is None else threshold
        if self.threshold is None:
            self.threshold = DEFAULT_THRESHOLD

    @classmethod
    def from_pretrained(
        cls, path: str, device: str | torch.device | None = None, threshold: float | None = None
    ) -> "ProductDetector":
        """
        Loads a folder, such as `train` writes, or the id of a published detector.

        Args:
            path: Folder or id.
            device: By default CUDA where there is one.
            threshold: See the class.

        Raises:
            FileNotFoundError, ValueError: there is no detector, or it is damaged or of another kind.
        """
        model, processor = load_detector(path)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device).eval(), processor, threshold)

    @torch.no_grad()
    def predict(self, frames: Sequence[Image.Image], batch_size: int = 64) -> list[Detections]:
        """
        Everything that the model finds in each frame, however low its score.

        Args:
            frames: Pictures of any size.
            batch_size: Frames looked at together.
        """
        found: list[Detections | None] = [None] * len(frames)
        # Pictures of one size each, since some processors pad others, and pad their coordinates too.
        sizes: dict[tuple[int, int], list[int]] = {}
        for number, frame in enumerate(frames):
            sizes.setdefault(frame.size, []).append(number)
        for numbers in sizes.values():
            for start in range(0, len(numbers), batch_size):
                chosen = numbers[start : start + batch_size]
                pictures = [frames[number].convert("RGB") for number in chosen]
                inputs = self.processor(images=pictures, return_tensors="pt").to(self.model.device)
                outputs = self.model(**inputs)
                for number, result in zip(
                    chosen, self.processor.post_process_object_detection(outputs, threshold=0.0)
                ):
                    order = result["scores"].argsort(descending=True)
                    found[number] = Detections(result["boxes"][order].float().cpu(), result["scores"][order].cpu())
        return found

    def detect(self, frames: Sequence[Image.Image]) -> list[list[float] | None]:
        """The intended product's box `[left, top, right, bottom]` in each frame, 0..1 of the frame, or `None`."""
        best = (found.best(self.threshold) for found in self.predict(frames))
        return [None if answer is None else answer[0] for answer in best]


def load_detector(path: str, **settings):
    """
    Model and image processor of a folder or id.

    Args:
        path: Folder or id.
        settings: Of `from_pretrained`, to train it for another task.

    Raises:
        FileNotFoundError, ValueError: there is none, or it cannot be loaded.
    """
    check_checkpoint(path)
    with hub_errors(path):
        try:
            model = AutoModelForObjectDetection.from_pretrained(path, **settings)
            return model, AutoImageProcessor.from_pretrained(path)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"{path} cannot be loaded as a detector: {' '.join(str(error).split())}") from error


def build_detector(image_size: int = 64) -> tuple[RTDetrForObjectDetection, RTDetrImageProcessor]:
    """
    A small RT-DETR (1M parameters) with random weights, for one kind of object.

    Its residual network learns from scratch in minutes; an RF-DETR with patches of 8 pixels did not (docs/LOG.md).

    Args:
        image_size: Side of the square that frames are stretched to, in pixels, a multiple of 32.

    Raises:
        ValueError: for another size.
    """
    backbone = RTDetrResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 96, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    strides = [8, 16, 32]
    if image_size < 1 or image_size % strides[-1]:
        raise ValueError(f"image_size must be a multiple of {strides[-1]}, got {image_size}.")
    width = 64
    config = RTDetrConfig(
        backbone_config=backbone,
        # They hold nothing yet that would be worth keeping.
        freeze_backbone_batch_norms=False,
        encoder_in_channels=backbone.hidden_sizes[1:],
        feat_strides=strides,
        encoder_hidden_dim=width,
        encoder_ffn_dim=2 * width,
        encoder_attention_heads=4,
        hidden_expansion=0.5,
        d_model=width,
        decoder_in_channels=[width] * len(strides),
        decoder_layers=2,
        decoder_ffn_dim=2 * width,
        decoder_attention_heads=4,
        # A frame shows a handful of products at most.
        num_queries=10,
        num_denoising=20,
        id2label=LABELS,
        label2id={name: number for number, name in LABELS.items()},
    )
    processor = RTDetrImageProcessor(size={"height": image_size, "width": image_size}, do_pad=False)
    return RTDetrForObjectDetection(config), processor

"""A detector of the intended product, and a small one to train from scratch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    PreTrainedConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from data_rice.parsing import clip_box
from hub_rice.checkpoint import check_checkpoint
from hub_rice.loading import to_device
from hub_rice.repository import hub_errors

DEFAULT_THRESHOLD = 0.5
LABELS = {0: "product"}
TRAIN_COMMAND = "python -m retrieval_rice.detector train"


@dataclass(frozen=True)
class Detections:
    """Detections of one frame, best first: boxes `(n, 4)` ltrb as fractions of the frame, scores `(n,)` 0..1."""

    boxes: Tensor
    scores: Tensor

    def best(self, threshold: float) -> tuple[list[float], float] | None:
        """The best box and its score, `None` if its score is below the threshold or it has no area in the frame."""
        if len(self.scores) == 0 or self.scores[0] < threshold:
            return None
        box = clip_box(self.boxes[0].tolist())
        return None if box is None else (box, self.scores[0].item())


class ProductDetector:
    """
    Any object detection model of transformers, with one answer per frame: the best box, or none.

    Args:
        model: The model in eval mode.
        processor: Its image processor.
        threshold: Below this score (0..1) a frame counts as one without the product. By default the threshold that
            training fitted on validation frames (`config.score_threshold`), else 0.5.
        labels: Names of the classes that are products; boxes of other classes are ignored. By default all classes.

    Raises:
        ValueError: the threshold is out of its range, or the model has no class with a name in `labels`.
    """

    def __init__(self, model, processor, threshold: float | None = None, labels: Sequence[str] | None = None):
        self.model = model
        self.processor = processor
        self.threshold = getattr(model.config, "score_threshold", None) if threshold is None else threshold
        if self.threshold is None:
            self.threshold = DEFAULT_THRESHOLD
        # This form also refuses NaN.
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"the threshold must be between 0 and 1, got {self.threshold}.")
        self.labels = None if labels is None else sorted(set(labels))
        self._classes = None if labels is None else _class_numbers(model.config.id2label, self.labels)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        device: str | torch.device | None = None,
        threshold: float | None = None,
        labels: Sequence[str] | None = None,
    ) -> "ProductDetector":
        """
        Loads a detector from a folder, such as `train` writes, or by the id of a published detector.

        Args:
            path: Folder or id.
            device: By default CUDA if available.
            threshold: See the class.
            labels: See the class; required for a model with several classes.

        Raises:
            FileNotFoundError, ValueError: the detector does not exist, is damaged, is another kind of model or has
                several classes without `labels`; or the device cannot be used.
        """
        model, processor = load_detector(path)
        names = model.config.id2label
        if labels is None and len(names) > 1:
            raise ValueError(
                f"{path} has {_listed(names)}, so its best box may not show the product: fine-tune it "
                f"({TRAIN_COMMAND} --model {path}), or write a box file of some classes only (python -m "
                f"retrieval_rice.detector run --labels NAME ...)."
            )
        return cls(to_device(model, device).eval(), processor, threshold, labels)

    @torch.no_grad()
    def predict(self, frames: Sequence[Image.Image], batch_size: int = 64) -> list[Detections]:
        """
        All detections of the model in each frame, whatever their score.

        Args:
            frames: Pictures of any size.
            batch_size: Frames per batch.
        """
        found: list[Detections | None] = [None] * len(frames)
        # Pictures of one size per batch, because some processors pad others, which changes their coordinates.
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
                    if self._classes is not None:
                        classes = torch.tensor(self._classes, device=order.device)
                        order = order[torch.isin(result["labels"][order], classes)]
                    found[number] = Detections(result["boxes"][order].float().cpu(), result["scores"][order].cpu())
        return found

    def detect(self, frames: Sequence[Image.Image]) -> list[list[float] | None]:
        """The intended product's box `[left, top, right, bottom]` in each frame, 0..1 of the frame, or `None`."""
        best = (found.best(self.threshold) for found in self.predict(frames))
        return [None if answer is None else answer[0] for answer in best]


def _class_numbers(names: Mapping[int, str], labels: Sequence[str]) -> list[int]:
    unknown = [label for label in labels if label not in names.values()]
    if unknown:
        raise ValueError(f"the detector has no class {unknown[0]!r} (--labels): it has {_listed(names)}.")
    return [number for number, name in names.items() if name in labels]


def _listed(names: Mapping[int, str]) -> str:
    listed = shorten(", ".join(names.values()), 120, placeholder=" ...")
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'} ({listed})"


def load_detector(path: str, **settings):
    """
    Model and image processor of a folder or id.

    Args:
        path: Folder or id.
        settings: Arguments of `from_pretrained`, to train it for another task.

    Raises:
        FileNotFoundError, ValueError: the detector does not exist, or cannot be loaded.
    """
    check_checkpoint(path, made_by=TRAIN_COMMAND)
    with hub_errors(path):
        try:
            kind = PreTrainedConfig.get_config_dict(path)[0].get("model_type")
            if kind in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
                model = AutoModelForObjectDetection.from_pretrained(path, trust_remote_code=False, **settings)
                return model, AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"{path} cannot be loaded as a detector: {' '.join(str(error).split())}") from error
    held = f"a {kind} model" if kind else "a model of an unknown kind"
    raise ValueError(
        f"{path} holds {held}, not a detector: name a folder that {TRAIN_COMMAND} wrote, or an object detection model "
        f"of transformers."
    )


def build_detector(image_size: int = 64) -> tuple[RTDetrForObjectDetection, RTDetrImageProcessor]:
    """
    A small RT-DETR (1M parameters) with random weights, for one kind of object.

    Its residual network trains from scratch in minutes; an RF-DETR with patches of 8 pixels did not (docs/LOG.md).

    Args:
        image_size: Side of the square to which frames are stretched, in pixels, a multiple of 32.

    Raises:
        ValueError: the size is not a multiple of 32.
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
        # They are not trained, so nothing is lost.
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
        # A frame shows at most a few products.
        num_queries=10,
        num_denoising=20,
        id2label=LABELS,
        label2id={name: number for number, name in LABELS.items()},
    )
    processor = RTDetrImageProcessor(size={"height": image_size, "width": image_size}, do_pad=False)
    return RTDetrForObjectDetection(config), processor

"""
Any vision model of transformers as a baseline without training; clips and images are compared by cosine.

An image model encodes each frame separately; a clip is the mean of its frames' normalised features. A clip encoder
(TimeSformer, VideoMAE) takes its own number of frames at once; a shop image becomes a clip of equal frames.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from hub_rice.checkpoint import check_checkpoint
from hub_rice.repository import hub_errors
from processing_rice import open_image

from .baselines import BASELINES, BaselineRetriever, crop_to_box, encode_rows
from .frames import clip_frames


@dataclass(frozen=True)
class Family:
    """Related model types and their default checkpoint."""

    model_types: tuple[str, ...]
    default: str


FAMILIES = {
    "clip": Family(("clip", "clip_vision_model"), "openai/clip-vit-base-patch32"),
    # The SigLIP 2 checkpoints with fixed size have the model type of SigLIP.
    "siglip2": Family(
        ("siglip2", "siglip2_vision_model", "siglip", "siglip_vision_model"), "google/siglip2-base-patch16-224"
    ),
    "dinov3": Family(("dinov3_vit", "dinov3_convnext"), "facebook/dinov3-vits16-pretrain-lvd1689m"),
    "swin": Family(("swin", "swinv2"), "microsoft/swin-tiny-patch4-window7-224"),
    "timesformer": Family(("timesformer",), "facebook/timesformer-base-finetuned-k400"),
    "videomae": Family(("videomae",), "MCG-NJU/videomae-base"),
}
"""Names of `--baseline`; each means its default checkpoint, unless `--baseline_model` names another."""

# VideoMAE has no class token.
_CLIP_POOLING = {"timesformer": "cls", "videomae": "mean"}
_CLIP_SIGNS = ("num_frames", "tubelet_size", "frames_per_clip")
_TEXT_PARTS = ("text_model.", "text_projection.", "logit_scale", "logit_bias")


def choose_model(baseline: str, baseline_model: str | None) -> tuple[str | None, str]:
    """
    Family (`None` for an id or folder) and checkpoint of `--baseline` and `--baseline_model`.

    Raises:
        ValueError: the name is neither a family, an id (`owner/name`) nor a folder.
    """
    if baseline in FAMILIES:
        return baseline, baseline_model or FAMILIES[baseline].default
    if baseline_model is not None:
        raise ValueError(
            f"--baseline_model goes with a family ({', '.join(FAMILIES)}), not with --baseline {baseline}: give one."
        )
    if not os.path.isdir(baseline) and baseline.count("/") != 1:
        raise ValueError(
            f"there is no baseline {baseline!r}: name {', '.join(BASELINES)}, one of {', '.join(FAMILIES)}, or the id "
            f"or folder of a transformers model."
        )
    return None, baseline


def load_pretrained(
    path: str, family: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, BaseImageProcessor, bool]:
    """
    Model in eval mode and single precision, its image processor, and whether its pooler is untrained.

    Args:
        path: folder or Hub id of any model that `AutoModel` knows.
        family: name in `FAMILIES` that the model must belong to.
        trust_remote_code: run Python files that come with the model.

    Raises:
        OSError: the model does not exist or cannot be reached.
        ValueError: the model lacks weights, is of another family or kind, or has no image processor.
    """
    check_checkpoint(path)
    with hub_errors(path):
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            _check_kind(path, config, family)
            settings = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
            model, loading = AutoModel.from_pretrained(path, output_loading_info=True, **settings)
        except (OSError, ValueError) as error:
            raise ValueError(f"the baseline model {path} cannot be loaded: {' '.join(str(error).split())}") from error
        try:
            processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path} has no image processor that can be loaded: save one beside the model."
            ) from error
    missing = sorted(loading["missing_keys"])
    lost = [name for name in missing if not _is_pooler(name)]
    if lost:
        raise ValueError(f"{path} lacks {len(lost)} weights of its model, such as {lost[0]}: save it again.")
    return model.eval(), processor, bool(missing)


def _is_pooler(name: str) -> bool:
    """Whether these are pooler weights, which many published encoders lack because classifiers do not use them."""
    return name.startswith("pooler.")


def _check_kind(path: str, config, family: str | None) -> None:
    kind = config.model_type
    if kind == "rice":
        raise ValueError("it is a RICE checkpoint; evaluate it with --model.")
    if family is not None and kind not in FAMILIES[family].model_types:
        raise ValueError(
            f"its model type {kind!r} does not belong to --baseline {family}; give it as --baseline itself."
        )
    if kind not in _CLIP_POOLING and any(hasattr(config, name) for name in _CLIP_SIGNS):
        raise ValueError(f"{kind!r} is a clip encoder, but of these only {' and '.join(_CLIP_POOLING)} are supported.")


def load_baseline(
    baseline: str,
    baseline_model: str | None = None,
    *,
    num_frames: int | None = None,
    use_boxes: bool = False,
    batch_size: int = 32,
    to_device: Callable = lambda model: model,
    trust_remote_code: bool = False,
):
    """
    The method of `--baseline` as a `Retriever`, and its entry in results.json: `name`, and `model` if it has one.

    Args:
        baseline: a descriptor of `baselines.BASELINES`, a name in `FAMILIES`, or an id or folder.
        baseline_model: the family's model, by default its published one.
        num_frames: maximum number of frames per clip; by default 10, or the number of a clip encoder.
        use_boxes: use only the part of each frame inside its box.
        batch_size: number of pictures encoded at once.
        to_device: moves a model to its device.
        trust_remote_code: as `load_pretrained`.

    Raises:
        OSError, ValueError: as `choose_model` and `load_pretrained`.
    """
    if baseline == "chance":
        raise ValueError("chance is computed and part of every result: name another baseline.")
    if baseline in BASELINES and baseline_model is None:
        descriptor = BASELINES[baseline]
        if descriptor().use_boxes and not use_boxes:
            raise ValueError(
                f"--baseline {baseline} uses the boxes of clips: add --boxes ground_truth or --boxes detector."
            )
        return BaselineRetriever(descriptor(num_frames or 10, use_boxes)), {"name": baseline, "model": None}
    family, path = choose_model(baseline, baseline_model)
    model, processor, untrained_pooler = load_pretrained(path, family, trust_remote_code)
    retriever = FrozenEncoder(to_device(model), processor, num_frames, use_boxes, batch_size, untrained_pooler)
    # For timm networks this is the model type of the wrapper.
    kind = getattr(model.config, "architecture", model.config.model_type)
    return retriever, {"name": family or kind, "model": path}


def spread(num_frames: int, wanted: int) -> list[int]:
    """`wanted` evenly spaced positions in a clip of `num_frames` frames; frames repeat if the clip has fewer."""
    return [i * num_frames // wanted for i in range(wanted)]


class FrozenEncoder:
    """
    A vision model as a `Retriever`; pictures are decoded and resized in the loader's workers.

    Args:
        model: image model or clip encoder of transformers.
        processor: its image processor.
        num_frames: maximum number of frames per clip, evenly spaced; by default 10, or the number of a clip encoder.
        use_boxes: encode only the part of each frame inside its box. Frames without a box are left out, unless no
            frame of the clip has a box.
        batch_size: number of pictures (or clips, for a clip encoder) encoded at once.
        untrained_pooler: use the class token instead of the model's pooler, whose weights are untrained.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        num_frames: int | None = None,
        use_boxes: bool = False,
        batch_size: int = 32,
        untrained_pooler: bool = False,
    ):
        self.model = model
        self.processor = processor
        self.pooling = _CLIP_POOLING.get(model.config.model_type)
        self.clip_length = model.config.num_frames if self.pooling else None
        self.num_frames = num_frames or self.clip_length or 10
        self.use_boxes = use_boxes
        self.batch_size = batch_size
        self.untrained_pooler = untrained_pooler
        self.has_text = hasattr(model, "get_image_features")

    def num_parameters(self) -> int:
        """Number of parameters in use; a text tower is not counted."""
        parameters = self.model.named_parameters()
        return sum(p.numel() for name, p in parameters if not (self.has_text and name.startswith(_TEXT_PARTS)))

    def __getstate__(self):
        # The loader's workers only read pictures and need no weights.
        return {**self.__dict__, "model": None}

    @property
    def device(self) -> torch.device:
        return self.model.device

    def load_gallery(self, rows):
        pictures, loaded, failures = encode_rows(rows, "image_id", lambda row, _: [open_image(row["image"])])
        return self._prepare(pictures), loaded, failures

    def load_clips(self, rows):
        clips, loaded, failures = encode_rows(rows, "clip_id", self._frames)
        return self._prepare(clips), loaded, failures

    def _frames(self, row: dict, failures: list[dict]) -> list[Image.Image]:
        frames = clip_frames(row, self.num_frames, failures)
        boxed = [crop_to_box(image, box) for image, box in frames if box is not None] if self.use_boxes else []
        return [image.convert("RGB") for image in boxed or [image for image, _ in frames]]

    def _prepare(self, clips: Sequence[list[Image.Image]]) -> dict:
        """The model's inputs, `(pictures, ...)` or `(clips, frames, ...)`, and the number of frames of each clip."""
        if not clips:
            return {"inputs": {}, "lengths": []}
        if self.clip_length is None:
            pictures = [picture for clip in clips for picture in clip]
            inputs = _tensors(self.processor(pictures, return_tensors="pt"))
            return {"inputs": inputs, "lengths": [len(clip) for clip in clips]}
        filled = [[clip[i] for i in spread(len(clip), self.clip_length)] for clip in clips]
        # Clip by clip, because processors stack their inputs, and frames of two clips may differ in size.
        parts = [_tensors(self.processor([clip], return_tensors="pt")) for clip in filled]
        inputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {"inputs": inputs, "lengths": [1] * len(clips)}

    def encode_gallery(self, inputs):
        return self._encode(inputs)

    def encode_clips(self, inputs):
        return self._encode(inputs)

    @torch.no_grad()
    def _encode(self, prepared: dict) -> np.ndarray:
        """Float32 features `(B, D)` of length 1."""
        inputs = prepared["inputs"]
        total = len(next(iter(inputs.values())))
        parts = []
        for start in range(0, total, self.batch_size):
            batch = {name: value[start : start + self.batch_size].to(self.device) for name, value in inputs.items()}
            parts.append(torch.nn.functional.normalize(self._features(batch).float(), dim=-1))
        clips = torch.stack([frames.mean(0) for frames in torch.cat(parts).split(prepared["lengths"])])
        return torch.nn.functional.normalize(clips, dim=-1).cpu().numpy()

    def _features(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """One vector per picture or clip `(N, D)`."""
        if self.has_text:
            output = self.model.get_image_features(**batch)
            return output if isinstance(output, torch.Tensor) else output.pooler_output
        output = self.model(**batch)
        hidden = output.last_hidden_state
        pooled = getattr(output, "pooler_output", None)
        if self.pooling is None and pooled is not None and not self.untrained_pooler:
            return pooled.flatten(1)
        if self.pooling == "mean":
            return hidden.mean(1)
        if self.pooling == "cls" or self.untrained_pooler:
            return hidden[:, 0]
        return hidden.flatten(2).mean(-1) if hidden.dim() == 4 else hidden.mean(1)

    def cat(self, parts):
        return np.concatenate(parts)

    def scores(self, clips, gallery):
        return {"embedding": torch.from_numpy(clips @ gallery.T)}


def _tensors(inputs) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}

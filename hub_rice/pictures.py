"""Preprocessing of images and frames as an encoder was trained: copies its image processor to RICE's processors."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modeling_rice import RiceConfig
    from processing_rice import RiceProcessor

# LeViT's image processor resizes the short side to its `size` times this.
_LEVIT_RATIO = 256 / 224
# From this size on, ConvNeXT's image processor does not crop.
_CONVNEXT_WHOLE = 384
# Largest mean difference of normalised pixels at which two processors count as equal.
_SAME_PIXELS = 0.05
# Files that may hold an image processor.
_FILES = ("preprocessor_config.json", "processor_config.json")


def follow_encoder(
    processor: "RiceProcessor", path: str, config: "RiceConfig", image_size: int | None = None
) -> str | None:
    """
    Sets a RICE processor to resize, crop and normalise images and frames as an encoder's image processor does, and
    adapts patch masks. For a timm encoder without image processor the settings come from its config.

    Args:
        processor: Changed in place.
        path: Folder or Hub id of the encoder.
        config: Config of the model that uses the encoder.
        image_size: Side in pixels of the model's input, instead of the encoder's own.

    Returns:
        One sentence about what had to be assumed, or `None`.

    Raises:
        ValueError: if the encoder's image processor is damaged.
    """
    from data_rice.parsing import read_json_object

    from .settings import usable

    for file in (Path(path, name) for name in _FILES):
        if file.is_file():
            # transformers does not distinguish a damaged file from a missing one.
            read_json_object(file)
    with usable(path, " or ".join(_FILES)):
        return _follow(processor, path, config, image_size)


def _follow(processor: "RiceProcessor", path: str, config: "RiceConfig", image_size: int | None) -> str | None:
    from transformers.image_utils import SizeDict

    theirs = _image_processor(path)
    rule = {} if theirs is None else _rule(theirs)
    layout = config.layout
    if theirs is None and layout.takes_one_size:
        rule["size"] = SizeDict(height=layout.image_size[0], width=layout.image_size[1])
    if theirs is None and layout.image_mean is not None:
        rule |= {"image_mean": layout.image_mean, "image_std": layout.image_std}
    for part in (processor.image_processor, processor.video_processor):
        for name, value in rule.items():
            setattr(part, name, value)
    side = image_size or (layout.image_size[0] if layout.takes_one_size else None)
    resize_to(processor, config, side)
    if theirs is None:
        size = processor.image_processor.size
        normalised = "" if "image_mean" in rule else ", and normalised as for CLIP"
        return (
            f"{path} has no image processor: images are stretched to {size['height']} x {size['width']} "
            f"pixels{normalised}."
        )
    if image_size is None and not _is_same(theirs, processor.image_processor):
        return (
            f"{path}: its {type(theirs).__name__} has a step that RICE's processor does not reproduce; size, mean and "
            f"standard deviation are the same."
        )
    return None


def output_side(processor: "RiceProcessor") -> int:
    """Side in pixels of the images that a processor returns."""
    part = processor.image_processor
    size = part.crop_size if part.do_center_crop else part.size
    return size.get("height") or size["shortest_edge"]


def resize_to(processor: "RiceProcessor", config: "RiceConfig", side: int | None) -> None:
    """Sets a processor to return squares of another side, with the same ratio of resize and crop."""
    from transformers.image_utils import SizeDict

    former = output_side(processor)
    side = side or former
    for part in (processor.image_processor, processor.video_processor):
        for name in ("size", "crop_size"):
            size = getattr(part, name, None)
            if size:
                sides = {edge: round(pixels * side / former) for edge, pixels in dict(size).items() if pixels}
                setattr(part, name, SizeDict(**sides))
    processor.video_processor.patch_size = config.mask_patch_size_at(side)


def _image_processor(path: str) -> Any:
    """The image processor saved with an encoder, else the one that transformers makes for a timm encoder."""
    import transformers
    from transformers import AutoImageProcessor
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(path)
    except OSError:
        # The encoder has no such file.
        settings = {}
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
    kind = getattr(transformers, name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast"), None)
    if kind is not None:
        return kind.from_dict(settings)
    try:
        return AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None


def _rule(theirs: Any) -> dict[str, Any]:
    """The settings of RICE's two processors that reproduce an image processor."""
    from transformers.image_utils import SizeDict

    if (data := getattr(theirs, "data_config", None)) is not None:
        return _rule_of_timm(data)
    names = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    rule = {name: getattr(theirs, name) for name in names if getattr(theirs, name, None) is not None}
    size = dict(getattr(theirs, "size", None) or {})
    crop = dict(getattr(theirs, "crop_size", None) or {}) if getattr(theirs, "do_center_crop", False) else {}
    short, kept, kind = size.get("shortest_edge"), getattr(theirs, "crop_pct", None), type(theirs).__name__
    if short and kept and kind.startswith("ConvNext") and short >= _CONVNEXT_WHOLE:
        size, short = {"height": short, "width": short}, None
    elif short and kept:
        crop, short = crop or {"height": short, "width": short}, int(short / kept)
    elif short and kind.startswith("Levit"):
        short = int(short * _LEVIT_RATIO)
    if short:
        # Without a crop images would keep their aspect ratio, but the images of a batch need one shape.
        crop, size = crop or {"height": short, "width": short}, {"shortest_edge": short}
    if not getattr(theirs, "do_resize", True) or not (short or {"height", "width"} <= size.keys()):
        return rule
    rule |= {"size": SizeDict(**size), "do_center_crop": bool(crop), "default_to_square": not short}
    return rule | ({"crop_size": SizeDict(**crop)} if crop else {})


def _rule_of_timm(data: dict[str, Any]) -> dict[str, Any]:
    """The same settings as `timm.data.create_transform` for evaluation."""
    from transformers.image_utils import PILImageResampling, SizeDict

    height, width = data["input_size"][-2:]
    sides = (math.floor(side / data["crop_pct"]) for side in (height, width))
    size = dict(zip(("height", "width"), sides, strict=True))
    if data["crop_mode"] != "squash":
        size = {"shortest_edge": min(size.values())}
    return {
        "size": SizeDict(**size),
        "do_center_crop": True,
        "crop_size": SizeDict(height=height, width=width),
        "default_to_square": data["crop_mode"] == "squash",
        "resample": PILImageResampling[data["interpolation"].upper()],
        "image_mean": data["mean"],
        "image_std": data["std"],
    }


def _is_same(theirs: Any, ours: Any) -> bool:
    """Whether two processors give the same pixels; `False` for encoders whose input is cut into patches."""
    import torch
    from torchvision.transforms.v2.functional import to_pil_image

    noise = torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(0))
    picture = to_pil_image(torch.nn.functional.interpolate(noise[None], (480, 640), mode="bicubic")[0].clamp(0, 1))
    expected = torch.as_tensor(theirs(picture, return_tensors="pt")["pixel_values"])
    actual = ours(picture, return_tensors="pt")["pixel_values"]
    if expected.dim() != 4:
        return False
    return expected.shape == actual.shape and float((expected - actual).abs().mean()) < _SAME_PIXELS

"""Convert a checkpoint of the official RICE code into a folder that AutoModel and AutoProcessor load.

Both official layouts are recognised. The model keeps the behaviour of its code base. The official code has no
tokenizer, since it read precomputed text vectors or no text. The tokenizer written here is trained on a few generic
phrases and encodes everything else as bytes.
"""

import argparse
from pathlib import Path

NUM_FRAMES = 10

# Enough for a vocabulary of characters and common words; the rest is encoded as bytes.
GENERIC_TEXTS = (
    "product title brand new size colour red blue black white",
    "dress shirt shoes bag cup bottle cream phone watch toy 100ml 2 pieces",
    "welcome to the live room, look at this one, it comes in three colours",
    "商品 标题 直播间 这款 新款 颜色 红色 蓝色 黑色 白色 连衣裙 上衣 鞋 包 杯 面霜 手机 手表",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, help="checkpoint of an official code base (.pth, .bin, .pt or .safetensors)"
    )
    parser.add_argument("output_dir", type=Path, help="new or empty folder for the model and its processor")


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        FileNotFoundError: if there is no checkpoint.
        FileExistsError: if the output folder is not empty.
        ValueError: if the checkpoint has no official layout; the message lists the keys.
    """
    from modeling_rice.convert_rice_original_to_hf import convert_original_checkpoint, load_original_state_dict

    from .files import new_folder

    with new_folder(options.output_dir) as folder:
        state_dict = load_original_state_dict(options.checkpoint)
        model = convert_original_checkpoint(state_dict)
        processor = build_original_processor(model.config, is_newer=has_newer_layout(state_dict))
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    parts = ["encoder"] + ["decoder"] * (model.decoder is not None)
    parts += ["reconstruction head"] * (model.reconstruction_head is not None)
    print(
        f"Wrote {options.output_dir}: {', '.join(parts)}; {sum(p.numel() for p in model.parameters()):,} parameters."
    )


def has_newer_layout(state_dict: dict) -> bool:
    """Whether a state dict comes from the newer, mmf-based code."""
    return any(key.removeprefix("module.").startswith("image_encoder.") for key in state_dict)


def build_original_processor(config, is_newer: bool):
    """
    The processor for a converted model.

    Args:
        config (`RiceConfig`): Config of the converted model, for image and patch size.
        is_newer: Whether to process images as the newer code: bilinear resize to a square larger by 8/7, then a
            center crop. The older code resizes to the encoder's square with bicubic interpolation.

    Returns:
        `RiceProcessor` for ten frames per clip.
    """
    from transformers.image_utils import PILImageResampling

    from processing_rice import build_processor, train_tokenizer

    vision = config.vision_config
    processor = build_processor(
        train_tokenizer(GENERIC_TEXTS), vision.image_size, vision.patch_size, NUM_FRAMES, resize_backend="pillow"
    )
    if is_newer:
        resized = vision.image_size * 8 // 7
        for part in (processor.image_processor, processor.video_processor):
            part.resample = PILImageResampling.BILINEAR
            part.do_center_crop = True
            part.size = {"height": resized, "width": resized}
            part.crop_size = {"height": vision.image_size, "width": vision.image_size}
    return processor

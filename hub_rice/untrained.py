"""Make a RICE checkpoint without training, from a pretrained encoder and unlabelled pictures.

ENCODER is a folder written by `rice encoder`, the folder or Hub id of another vision model of transformers or timm, or
a RICE checkpoint, whose statistics are then fitted again. The shop's pictures, and frames of clips if given, yield the
mean of each view, by which embeddings are centred, and the whitening of the patches, by which images and clips are
aligned. --shop is a folder with gallery.jsonl (no other file is read), or a folder of pictures. --clips is a folder
with clips_train.jsonl (labels are not read), or a folder of pictures and videos. A recording of the livestream is
enough for --clips, and helps more than anything else. The result ranks by embedding and alignment, fused one to one.
"""

import argparse
import logging
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from data_rice.unlabelled import Unlabelled
    from modeling_rice import RiceModel
    from processing_rice import RiceProcessor

logger = logging.getLogger(__name__)

MOST_PICTURES = 10_000
"""Default maximum number of shop pictures, and of frames, for the statistics; more hardly change them."""

# Settings of the statistics, with their names in the config and in the command.
_SETTINGS = ("alignment_rank", "alignment_strength", "alignment_shrinkage")
_SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("encoder", metavar="ENCODER", help="folder or Hub id of a vision encoder, or of a RICE checkpoint")
    add("--shop", required=True, help="folder of the shop's pictures, or folder with gallery.jsonl")
    add("--clips", help="folder of frames or videos, or folder with clips_train.jsonl; labels are not read")
    add("--clips_split", choices=_SPLITS, help="which clips_*.jsonl of --clips to read (default: train)")
    add("--output", required=True, type=Path, help="new or empty folder for the checkpoint")
    add("--keep_decoder", action="store_true", help="keep the matching decoder of a RICE checkpoint as one more score")
    add("--max_pictures", type=int, default=MOST_PICTURES, help="maximum number of shop pictures, and of frames, that "
        "are read (default: %(default)s)")  # fmt: skip
    add("--vision_feature_layer", type=int, help="hidden state of the encoder whose patches are aligned; default: the "
        "deepest with patches of at most 16 pixels")  # fmt: skip
    add("--alignment_rank", type=int, help="width of the compared patch vectors (default: 64)")
    add("--alignment_strength", type=float, help="strength of the whitening, 0 (none) to 1 (default: 1)")
    add("--alignment_shrinkage", type=float, help="shrinkage of the whitening's variances towards their mean, 0 to 1 "
        "(default: 0.1)")  # fmt: skip
    add("--batch_size", type=int, default=16, help="pictures encoded at a time (default: %(default)s)")
    add("--num_workers", type=int, default=min(2, os.cpu_count() or 1), help="processes that decode pictures "
        "(default: %(default)s)")  # fmt: skip
    add("--device", help="such as cpu or cuda; default: cuda if there is one")


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        FileNotFoundError: if encoder, shop or clips are missing.
        FileExistsError: if the output folder is not empty.
        ValueError: for an encoder that RICE cannot use, malformed or unreadable files, or an argument out of range.
    """
    from data_rice.unlabelled import clip_frames, shop_pictures

    from .files import new_folder
    from .loading import to_device

    _check(options)
    with new_folder(options.output) as folder:
        shop, clips = shop_pictures(options.shop, options.max_pictures), None
        if options.clips is not None:
            clips = clip_frames(
                options.clips, _SPLITS[options.clips_split or "train"], options.max_pictures, options.shop
            )
        model, processor = untrained_model(options.encoder, keep_decoder=options.keep_decoder, **_settings(options))
        frames = f" and {clips.words} of {options.clips}" if clips else ""
        print(f"Taking statistics from {shop.words} of {options.shop}{frames}.", flush=True)
        to_device(model, options.device)
        notes = fit(model, processor, shop, clips, options.batch_size, options.num_workers)
        model.to("cpu").save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "README.md").write_text(_card(options, shop, clips), encoding="utf-8")
    for note in notes:
        print(note)
    patches, rank = model.config.patch_layout.num_patches, model.alignment.patch_projection.shape[1]
    print(
        f"Wrote {options.output}: ranks by embedding ({model.config.projection_dim} numbers per image) and by the "
        f"alignment of {patches} patches ({2 * patches * rank:,} bytes per image).\n"
        f"Next: rice index {options.shop} --model {options.output} --output INDEX"
    )


def _check(options: argparse.Namespace) -> None:
    for name in ("max_pictures", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}.")
    if options.num_workers < 0:
        raise ValueError(f"--num_workers must be 0 or more, got {options.num_workers}.")
    if options.clips is None and options.clips_split is not None:
        raise ValueError("--clips_split needs --clips, the folder of the clips; give both, or leave it out.")
    if options.alignment_rank is not None and options.alignment_rank < 1:
        raise ValueError(f"--alignment_rank must be at least 1, got {options.alignment_rank}.")
    for name in ("alignment_strength", "alignment_shrinkage"):
        value = getattr(options, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"--{name} must be in 0..1, got {value}.")


def _settings(options: argparse.Namespace) -> dict:
    given = {name: getattr(options, name) for name in (*_SETTINGS, "vision_feature_layer")}
    return {name: value for name, value in given.items() if value is not None}


def untrained_model(
    encoder: str, keep_decoder: bool = False, **settings: int | float
) -> tuple["RiceModel", "RiceProcessor"]:
    """
    A RICE model in eval mode and its processor. The model uses a pretrained encoder, or the encoder and the projection
    of a RICE checkpoint. It ranks by embedding and alignment after a call of `RiceModel.fit_alignment`.

    Args:
        encoder: Folder or Hub id.
        keep_decoder: Keep the matching decoder of a RICE checkpoint.
        settings: `vision_feature_layer`, and the alignment fields of `RiceConfig`.

    Raises:
        FileNotFoundError: if there is no such encoder.
        ValueError: if RICE cannot use it, or for `keep_decoder` without a matching decoder.
    """
    from huggingface_hub import hf_hub_download

    from data_rice.parsing import read_json_object

    from .checkpoint import may_be_hub_id
    from .loading import load_model
    from .repository import hub_errors

    config = Path(encoder, "config.json")
    with hub_errors(encoder):
        if not os.path.exists(encoder) and may_be_hub_id(encoder):
            config = Path(hf_hub_download(encoder, "config.json"))
        if config.is_file() and read_json_object(config).get("model_type") == "rice":
            return _on_checkpoint(*load_model(encoder, "cpu"), keep_decoder, settings)
        if keep_decoder:
            raise ValueError(f"--keep_decoder: {encoder} is an encoder and has no matching decoder; leave it out.")
        return _on_encoder(encoder, settings)


def _on_checkpoint(model, processor, keep_decoder: bool, settings: dict) -> tuple["RiceModel", "RiceProcessor"]:
    from modeling_rice import RiceConfig, RiceModel

    from .pictures import output_side

    if keep_decoder and model.decoder is None:
        raise ValueError("--keep_decoder: the checkpoint has no matching decoder; leave it out.")
    former = {name: value for name, value in model.config.to_dict().items() if name not in ("auto_map", "ranking")}
    # After centring, the length of a feature carries no information.
    chosen = {"ranking": "fused", "alignment_weight": 1.0, "normalize_frames": True, **settings}
    if not keep_decoder:
        # Without a decoder, only the alignment uses the patches.
        chosen = {"use_decoder": False, "vision_feature_layer": _fine_layer(model.config.layout), **chosen}
    elif "vision_feature_layer" in settings:
        raise ValueError(
            "--vision_feature_layer cannot be combined with --keep_decoder, since the decoder was trained on its own "
            "layer; leave one out."
        )
    result = RiceModel(RiceConfig.from_dict(former | chosen))
    # The alignment's statistics are fitted again, and may have other shapes.
    own = {name for name in result.state_dict() if not name.startswith("alignment.")}
    result.load_state_dict({name: value for name, value in model.state_dict().items() if name in own}, strict=False)
    # Patch masks use the grid of the chosen patches.
    processor.video_processor.patch_size = result.config.mask_patch_size_at(output_side(processor))
    return result.eval(), processor


def _on_encoder(path: str, settings: dict) -> tuple["RiceModel", "RiceProcessor"]:
    import torch

    from modeling_rice import RiceConfig, RiceModel
    from modeling_rice.encoders_rice import find_layout

    from .loading import load_encoder

    source = load_encoder(path)
    vision = getattr(source, "vision_model", source).eval()
    layout = find_layout(vision.config)
    pooling = _pooling(vision, layout)
    width = layout.pooler_width if pooling == "pooler" else layout.patches.width
    config = RiceConfig(
        **{
            "vision_config": vision.config,
            "vision_pooling": pooling,
            "patch_mask_pooling": pooling == "mean",
            "vision_feature_layer": _fine_layer(layout),
            "projection_dim": width,
            "use_decoder": False,
            "use_reconstruction": False,
            "alignment_weight": 1.0,
            "ranking": "fused",
            **settings,
        }
    )
    model = RiceModel(config)
    model.vision_model.load_state_dict(vision.state_dict())
    with torch.no_grad():
        model.visual_projection.weight.copy_(torch.eye(width))
    return model.eval(), _processor(path, config)


def _fine_layer(layout) -> int | None:
    """Index of the hidden state to take patches from; `None` (the output) if no hidden state is a grid."""
    layer = layout.fine_layer
    return layer if layout.hidden and layout.hidden[layer] is not None else None


def _pooling(vision, layout) -> str:
    """
    The class token, else the encoder's own pooler. If the pooler equals the mean over patches, the mean, since boxes
    can then select its patches.
    """
    import torch

    from modeling_rice.encoders_rice import encoder_inputs, last_states

    if layout.has_class_token:
        return "cls"
    if layout.pooler_width is None:
        return "mean"
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(1, 3, *layout.image_size, generator=generator)
    with torch.no_grad():
        output = vision(**encoder_inputs(picture, layout.cut_to))
    patches = layout.patches.tokens(last_states(output))[:, layout.patches.num_prefix_tokens :].mean(dim=1)
    pooled = output.pooler_output.flatten(1)
    same = patches.shape == pooled.shape and torch.allclose(patches, pooled, atol=1e-4 * float(pooled.abs().max()))
    return "mean" if same else "pooler"


def _processor(path: str, config) -> "RiceProcessor":
    """A processor with the encoder's own preprocessing; assumptions are logged."""
    from processing_rice import build_processor, train_tokenizer

    from .convert import GENERIC_TEXTS
    from .pictures import follow_encoder

    side = config.layout.image_size[0]
    processor = build_processor(train_tokenizer(GENERIC_TEXTS), side, config.mask_patch_size)
    assumed = follow_encoder(processor, path, config)
    if assumed:
        logger.warning("%s", assumed)
    return processor


def fit(
    model: "RiceModel",
    processor: "RiceProcessor",
    shop: "Unlabelled",
    clips: "Unlabelled | None",
    batch_size: int = 16,
    num_workers: int = 0,
    quiet: bool = False,
) -> list[str]:
    """
    Reads pictures in worker processes and fits a model's statistics, batch by batch.

    Args:
        model: A model with an alignment, in eval mode.
        processor: The processor of the model.
        shop, clips: From `data_rice.unlabelled`.
        batch_size: Pictures encoded at a time.
        num_workers: Processes that decode pictures.
        quiet: Whether to hide progress bars.

    Returns:
        Sentences for the user: which statistics are missing, which files could not be read, what was left out.

    Raises:
        ValueError: if no picture of the shop, or no frame, can be read.
    """
    from data_rice.collator import RiceCollator
    from data_rice.unlabelled import FRAMES_OF_VIDEO

    collator = RiceCollator(processor, num_frames=FRAMES_OF_VIDEO)
    failures: list[list[dict]] = [[], []]
    loading = (num_workers, quiet)
    images = _batches(shop.rows, batch_size, collator.collate_gallery, "pictures", failures[0], *loading)
    # One row has up to 32 frames.
    rows = None if clips is None else clips.rows
    frames = _batches(rows, 1, collator.collate_queries, "frames", failures[1], *loading)
    # Closed, so that an error message does not share a line with a progress bar.
    with closing(images), closing(frames):
        parts = (part for batch in frames for part in batch.split(batch_size))
        notes = [model.fit_alignment(images, parts)]
    for source, failed, what in ((shop, failures[0], "the shop's pictures"), (clips, failures[1], "the frames")):
        if source is not None:
            notes += [_not_read(failed, what), source.note]
    return [note for note in notes if note]


def _batches(
    rows: Sequence[dict] | None,
    batch_size: int,
    collate: Callable,
    title: str,
    failures: list[dict],
    num_workers: int,
    quiet: bool,
) -> Generator["Tensor"]:
    """Pixels `(n, 3, H, W)` of rows, batch by batch. Raises `ValueError` if no row can be read."""
    from torch.utils.data import DataLoader
    from tqdm.auto import tqdm

    from data_rice.collator import failure_words

    if rows is None:
        return
    loader = DataLoader(list(rows), batch_size, shuffle=False, num_workers=num_workers, collate_fn=collate)
    some = False
    for inputs, _, failed in tqdm(loader, desc=title, unit="batch", disable=quiet):
        failures += failed
        if not inputs:
            continue
        some = True
        if "pixel_values" in inputs:
            yield inputs["pixel_values"]
        else:
            yield inputs["pixel_values_videos"][inputs["frame_mask"]]
    if not some:
        raise ValueError(
            f"none of the {len(failures)} {title} can be read; replace them (the first: {failure_words(failures[0])})."
        )


def _not_read(failures: list[dict], what: str) -> str:
    from data_rice.collator import failure_words

    shown = "; ".join(failure_words(failure) for failure in failures[:3])
    more = f"; and {len(failures) - 3} more" if len(failures) > 3 else ""
    return f"Left out {len(failures)} of {what} that cannot be read ({shown}{more})." if failures else ""


_CARD = """, **without training**.
The encoder is {encoder}, unchanged. Statistics of {shop}{frames} centre its embeddings and whiten the
patches by which images and clips are aligned. No labels were used.

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
clip = ["frame_0.jpg", "frame_1.jpg"]
print(model.rank(clip, ["red_mug.jpg", "blue_mug.jpg"], processor=processor))
```

Not evaluated yet, so this card gives no figures. The encoder's licence applies.
"""


def _card(options: argparse.Namespace, shop: "Unlabelled", clips: "Unlabelled | None") -> str:
    from modeling_rice.layout_rice import card_head

    from .privacy import last_part

    name, frames = options.output.resolve().name, f" and {clips.words}" if clips else ""
    encoder = last_part(options.encoder)
    return card_head(name) + _CARD.format(name=name, encoder=encoder, shop=shop.words, frames=frames)

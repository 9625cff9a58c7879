"""Make a RICE checkpoint without training, from a pretrained encoder and unlabelled pictures.

ENCODER is what `rice encoder` wrote, or another vision model of transformers or timm, by folder or id of the Hub; or a
RICE checkpoint, whose statistics are taken anew. The shop's pictures, and frames of clips where there are any, give the
mean that embeddings are centred by, per view, and the whitening of the patches that images and clips are aligned by.
--shop is a folder with gallery.jsonl, of which nothing else is read, or of pictures. --clips is a folder with
clips_train.jsonl, whose labels are not read, or of pictures and videos; a recording of the livestream will do, and it
helps more than anything else. The result ranks by embedding and alignment, fused one to one.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_rice.unlabelled import Unlabelled
    from modeling_rice import RiceModel
    from processing_rice import RiceProcessor

MOST_PICTURES = 10_000
"""Pictures of a shop, and frames, that statistics are taken from by default; more hardly change them."""

# Of the statistics, by their names in the config and in the command.
_SETTINGS = ("alignment_rank", "alignment_strength", "alignment_shrinkage")
_SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("encoder", metavar="ENCODER", help="folder or id of a vision encoder, or of a RICE checkpoint")
    add("--shop", required=True, help="folder of the shop's pictures, or with gallery.jsonl")
    add("--clips", help="folder of frames or videos, or with clips_train.jsonl; labels are not read")
    add("--clips_split", choices=_SPLITS, help="which clips_*.jsonl of --clips to read (default: train)")
    add("--output", required=True, type=Path, help="new or empty folder of the checkpoint")
    add(
        "--keep_decoder", action="store_true", help="of a RICE checkpoint: keep its matching decoder as one more score"
    )
    add("--max_pictures", type=int, default=MOST_PICTURES, help="pictures, and frames, that are read at most "
        "(default: %(default)s)")  # fmt: skip
    add("--vision_feature_layer", type=int, help="hidden state of the encoder whose patches are aligned; default: the "
        "deepest with a patch per 16 pixels or finer")  # fmt: skip
    add("--alignment_rank", type=int, help="numbers per patch (default: 64)")
    add("--alignment_strength", type=float, help="of the whitening, 0 (none) to 1 (default: 1)")
    add("--alignment_shrinkage", type=float, help="of the whitening's variances towards their mean, 0 to 1 "
        "(default: 0.1)")  # fmt: skip
    add("--batch_size", type=int, default=16, help="pictures that are encoded at a time (default: %(default)s)")
    add("--num_workers", type=int, default=min(2, os.cpu_count() or 1), help="processes that decode pictures")
    add("--device", help="such as cpu or cuda; default: cuda where there is one")


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        FileNotFoundError: no such encoder, shop or clips.
        FileExistsError: the output folder is in use.
        ValueError: an encoder that cannot be RICE's, malformed or unreadable files, or an argument out of range.
    """
    from data_rice.unlabelled import clip_frames, shop_pictures

    from .files import new_folder
    from .loading import to_device

    _check(options)
    with new_folder(options.output) as folder:
        shop = shop_pictures(options.shop, options.max_pictures)
        clips = None
        if options.clips is not None:
            clips = clip_frames(options.clips, _SPLITS[options.clips_split or "train"], options.max_pictures)
        model, processor = untrained_model(options)
        print(f"Statistics of {shop.words} of {options.shop}", end="")
        print(f", and of {clips.words} of {options.clips}." if clips else ".", flush=True)
        to_device(model, options.device)
        notes = fit(model, processor, shop, clips, options.batch_size, options.num_workers)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        card = _card(options, model, shop, clips)
        (folder / "README.md").write_text(card, encoding="utf-8")
    for note in filter(None, [*notes, shop.note, clips and clips.note]):
        print(note)
    alignment = model.alignment
    print(
        f"Wrote {options.output}: ranks by embedding and alignment of patches, {alignment.num_patches} x "
        f"{alignment.rank} numbers an image ({2 * alignment.num_patches * alignment.rank:,} bytes)."
    )


def _check(options: argparse.Namespace) -> None:
    for name in ("max_pictures", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}.")
    if options.num_workers < 0:
        raise ValueError(f"--num_workers must be 0 or more, got {options.num_workers}.")
    if options.clips is None and options.clips_split is not None:
        raise ValueError("--clips_split belongs to --clips, the folder of the clips; give both, or leave it out.")

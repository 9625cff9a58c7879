"""Writes the shop_clips folder of the novel-product protocol: training on some products, test on other products.

    python -m data_rice.shop_clips novel SHOP OUTPUT [--field product_fold --value novel | --fraction 0.25 --seed 0]

The builder refuses paths that lead out of its folder, also through a symbolic link. So the media of the written folder
are hard links to SHOP's files, which take no space.
"""

import argparse
import os
import random
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from os import path as osp
from pathlib import Path

from tqdm.auto import tqdm

from .. import parsing
from . import shop_clips as format_

FRACTION, SEED = 0.25, 0


@dataclass(frozen=True)
class _Clip:
    file: str
    line: int
    text: str
    row: dict
    relevant: list[str]
    media: list[str]


@dataclass(frozen=True)
class NovelSplit:
    """The part of a shop that the protocol keeps.

    Attributes:
        products: all products that clips show, named by the smallest of their gallery ids; sorted.
        novel: the products that only test clips may show.
        kept: per split, the unchanged lines of the clips that stay.
        left_out: per split, the number of other clips.
        without_product: per split, the number of left-out clips with an empty gt_gallery_ids.
        media: paths, relative to the shop, in the gallery and the kept clips; sorted.
        missing: the media that do not exist, and are therefore not in the written folder.
    """

    products: list[str]
    novel: set[str]
    kept: dict[str, list[str]]
    left_out: dict[str, int]
    without_product: dict[str, int]
    media: list[str]
    missing: list[str]


def select_novel(
    shop: str | os.PathLike,
    field: str | None = None,
    value: str | None = None,
    fraction: float = FRACTION,
    seed: int = SEED,
) -> NovelSplit:
    """Choose the novel products, the test clips that show them, and the training and validation clips that do not.

    Images in the ``gt_gallery_ids`` of one clip show one product, so all of them are novel or none is. This function
    writes nothing.

    Args:
        shop: a shop_clips folder; clips_val.jsonl may be missing.
        field: key of the clip rows that marks novel products; None draws them at random.
        value: the value of ``field`` for novel products, as text.
        fraction: share of the products to draw, between 0 and 1; the count is rounded and at least 1.
        seed: seed of the draw, which depends only on ``seed``, ``fraction`` and the ids.

    Raises:
        FileNotFoundError: the gallery, the training clips or the test clips are missing.
        ValueError: ``fraction`` is out of range, a row is malformed or lacks ``field``, ``value`` never occurs, clips
            of one product disagree, or a split has no clip left.
    """
    if field is None and not 0 < fraction < 1:
        raise ValueError(
            f"fraction must lie between 0 and 1, both excluded, not {fraction:g}; pass a value such as 0.25."
        )
    shop = osp.abspath(shop)
    gallery = format_.read_gallery(shop)
    clips = {
        split: _read_clips(shop, file, gallery)
        for split, file in format_.CLIP_FILES.items()
        if split != "validation" or osp.isfile(osp.join(shop, file))
    }
    shown = {split: [clip for clip in rows if clip.relevant] for split, rows in clips.items()}
    product_of = _group_images(clip.relevant for rows in shown.values() for clip in rows)
    products = sorted(set(product_of.values()))
    if field is None:
        novel = set(random.Random(seed).sample(products, max(1, round(fraction * len(products))) if products else 0))
    else:
        novel = _products_with([clip for rows in shown.values() for clip in rows], product_of, field, value, shop)
    kept = {
        split: [clip for clip in rows if (product_of[clip.relevant[0]] in novel) == (split == "test")]
        for split, rows in shown.items()
    }
    for split, rows in kept.items():
        if not rows:
            kind = "a novel" if split == "test" else "a base"
            raise ValueError(
                f"{osp.join(shop, format_.CLIP_FILES[split])} has no clip of {kind} product, with {len(novel)} of "
                f"{len(products)} products novel; choose the novel products otherwise."
            )
    media = {osp.relpath(image["image"], shop) for image in gallery.values()}
    media.update(path for rows in kept.values() for clip in rows for path in clip.media)
    return NovelSplit(
        products=products,
        novel=novel,
        kept={split: [clip.text for clip in rows] for split, rows in kept.items()},
        left_out={split: len(rows) - len(kept[split]) for split, rows in clips.items()},
        without_product={split: len(rows) - len(shown[split]) for split, rows in clips.items()},
        media=sorted(media),
        missing=sorted(path for path in media if not osp.isfile(osp.join(shop, path))),
    )


def write_novel_shop(
    shop: str | os.PathLike,
    output: str | os.PathLike,
    field: str | None = None,
    value: str | None = None,
    fraction: float = FRACTION,
    seed: int = SEED,
) -> NovelSplit:
    """Write the shop_clips folder of the novel-product protocol; ``output`` appears only when it is complete.

    The gallery stays whole, so that the base products are distractors. The media are hard links: an edit in place also
    changes the shop's file.

    Args:
        shop: a shop_clips folder; it is not changed.
        output: folder to write, on the filesystem of ``shop``; it must not exist.
        field, value, fraction, seed: as in `select_novel`.

    Raises:
        FileExistsError: ``output`` exists.
        OSError: a file cannot be linked.
        FileNotFoundError, ValueError: as `select_novel`.
    """
    shop, output = Path(shop), Path(output).absolute()
    if os.path.lexists(output):
        raise FileExistsError(f"{output} already exists; remove it or choose another folder.")
    selected = select_novel(shop, field, value, fraction, seed)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        # Before the links, so that no file opened for writing is a hard link to one of the shop's files.
        shutil.copyfile(shop / format_.GALLERY_FILE, partial / format_.GALLERY_FILE)
        for split, lines in selected.kept.items():
            with open(partial / format_.CLIP_FILES[split], "w", encoding="utf-8", newline="\n") as file:
                file.writelines(f"{line}\n" for line in lines)
        _link(shop, partial, sorted(set(selected.media).difference(selected.missing)))
        os.rename(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return selected


def _read_clips(shop: str, file: str, gallery: dict[str, dict]) -> list[_Clip]:
    path = osp.join(shop, file)
    checked = format_._read_clips(shop, path, gallery)
    return [
        _Clip(
            file,
            line,
            text,
            parsing.parse_json_line(path, line, text),
            relevant,
            [osp.relpath(media, shop) for media in (*clip["frames"], clip["video"]) if media],
        )
        for (line, text), (_, clip, relevant) in zip(parsing.read_lines(path), checked, strict=True)
    ]


def _group_images(together: Iterable[list[str]]) -> dict[str, str]:
    """Return image id -> the smallest id of its group; images named together, also indirectly, form a group."""
    groups: dict[str, set[str]] = {}
    for ids in together:
        group = set(ids).union(*(groups.get(image_id, ()) for image_id in ids))
        if group != groups.get(ids[0]):
            groups.update(dict.fromkeys(group, group))
    return {image_id: min(group) for image_id, group in groups.items()}


def _products_with(clips: list[_Clip], product_of: dict[str, str], field: str, value: str, shop: str) -> set[str]:
    """Return the products whose clips have ``value`` in ``field``."""
    first: dict[str, tuple[bool, _Clip]] = {}
    values: set[str] = set()
    for clip in clips:
        path = osp.join(shop, clip.file)
        if clip.row.get(field) is None:
            raise parsing.row_error(
                path, clip.line, f"the field {field!r} is absent; write it in every clip, or draw with --fraction."
            )
        try:
            text = format_.text_value(clip.row, field)
        except ValueError as error:
            raise parsing.row_error(path, clip.line, f"{error}; repair the row.") from None
        values.add(text)
        product = product_of[clip.relevant[0]]
        is_novel, other = first.setdefault(product, (text == value, clip))
        if is_novel != (text == value):
            raise parsing.row_error(
                path,
                clip.line,
                f"{field} {text!r} contradicts {other.file}, line {other.line}, which shows the same product "
                f"({product}); all clips of a product need the same value, so repair one of them.",
            )
    if value not in values:
        found = ", ".join(map(repr, sorted(values)[:5])) + (", ..." if len(values) > 5 else "")
        raise ValueError(f"no clip of {shop} has {field} {value!r}; its values are {found or 'none'}.")
    return {product for product, (is_novel, _) in first.items() if is_novel}


def _link(shop: Path, output: Path, paths: list[str]) -> None:
    for path in tqdm(paths, desc="Links", unit="file", delay=3):
        target = output / path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(osp.realpath(shop / path), target)
        except OSError as error:
            raise OSError(
                f"{shop / path} cannot be hard-linked ({error.strerror}); write to the filesystem of {shop}, or copy "
                "the shop to your own folder first."
            ) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of ``novel``."""
    parser.add_argument("shop", help="shop_clips folder; it is not changed")
    parser.add_argument("output", help="folder to write, on the same filesystem; must not exist yet")
    parser.add_argument("--field", help="key of the clip rows that marks novel products")
    parser.add_argument("--value", help="value of that key for novel products")
    parser.add_argument("--fraction", type=float, help=f"share of the products drawn as novel (default: {FRACTION})")
    parser.add_argument("--seed", type=int, help=f"seed of that draw (default: {SEED})")


def run(options: argparse.Namespace) -> int:
    """Write the folder and print the counts or the error; returns the exit status, 0 or 2."""
    try:
        selected = _write(options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"products: {len(selected.products)}, {len(selected.novel)} of them novel")
    for split, lines in selected.kept.items():
        without = selected.without_product[split]
        note = f" ({without} of them name no product)" if without else ""
        print(f"{format_.CLIP_FILES[split]}: {len(lines)} clips kept, {selected.left_out[split]} left out{note}")
    print(f"media: {len(selected.media) - len(selected.missing)} linked, {len(selected.missing)} missing")
    for path in selected.missing[:5]:
        print(f"missing: {path}")
    return 0


def _write(options: argparse.Namespace) -> NovelSplit:
    if (options.field is None) != (options.value is None):
        raise ValueError("--field and --value belong together; give both, or draw with --fraction and --seed.")
    if options.field is not None and (options.fraction is not None or options.seed is not None):
        raise ValueError("--fraction and --seed draw products, but --field selects them; give one or the other.")
    return write_novel_shop(
        options.shop,
        options.output,
        options.field,
        options.value,
        FRACTION if options.fraction is None else options.fraction,
        SEED if options.seed is None else options.seed,
    )

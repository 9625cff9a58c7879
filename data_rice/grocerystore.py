"""Build a shop_clips folder from a clone of the public GroceryStoreDataset.

    git clone <the GroceryStoreDataset repository of marcusklasson> CLONE_DIR
    python -m data_rice.grocerystore CLONE_DIR OUT_DIR [--short_side 160]

Source: M. Klasson, C. Zhang, H. Kjellstrom, "A Hierarchical Grocery Store Image Dataset with Visual and Semantic
Labels", WACV 2019. It holds single photographs, so a "clip" is a pseudo-clip: 3 to 10 photographs of one product that
are neighbours in the file numbering. The split into clips depends only on the lists of the clone, so the same clone
always gives the same clips. Other folders built from the same source may have other clips.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from processing_rice import MediaError, open_image

from . import parsing
from .commands import print_anywhere
from .shop_clips import CLIP_FILES, GALLERY_FILE

SOURCE_LISTS = {"train": "train.txt", "validation": "val.txt", "test": "test.txt"}
MIN_CLIP, MAX_CLIP = 3, 10
_CLIP_LENGTHS = (3, 4, 5, 6, 8, 10)

_SOURCE_TEXT = """# Grocery store shop_clips folder

Built by `python -m data_rice.grocerystore` (short side at most {short_side} pixels, JPEG quality 90, metadata dropped)
from a clone of GroceryStoreDataset. Paper: M. Klasson, C. Zhang, H. Kjellstrom, "A Hierarchical Grocery Store Image
Dataset with Visual and Semantic Labels", WACV 2019. The licence of the source is its own (see LICENSE, where the clone
has one); its shop images and descriptions were collected from retailers' pages.

* A clip is a pseudo-clip: {low} to {high} photographs of one product, neighbours in the source's numbering. There is
  no motion, frame rate or speech, and neighbours may come from different shops.
* The source's train, val and test lists are kept apart. All three show the same products.
* The cut into clips is deterministic, and this program's own: results on it compare only roughly with those on other
  cuts of the same photographs.
* File names are hashes of the source's file names, so that a path does not name the product.
* Photographs in no clip, because their product has fewer than {low} in that list: {left_out}.

| split | clips | photographs | products |
|---|---|---|---|
{table}
"""


@dataclass(frozen=True)
class Product:
    """One row of ``classes.csv``; paths are relative to the clone's ``dataset`` folder."""

    class_id: int
    name: str
    coarse_name: str
    coarse_id: int
    image: str
    description: str

    @property
    def gallery_id(self) -> str:
        """The id of the product's only shop image."""
        return f"g{self.class_id:03d}"


def read_products(dataset_dir: Path) -> dict[int, Product]:
    """Read ``classes.csv`` as class id -> product.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: a row is malformed, or a class id or name appears twice.
    """
    file = dataset_dir / "classes.csv"
    products: dict[int, Product] = {}
    for line, text in parsing.read_lines(file):
        columns = next(csv.reader(io.StringIO(text)))
        if line == 1:
            continue
        try:
            if len(columns) != 6:
                raise ValueError(f"expected 6 comma-separated columns, found {len(columns)}")
            name, class_id, coarse_name, coarse_id, image, description = (column.strip() for column in columns)
            if not class_id.isdecimal() or not coarse_id.isdecimal():
                raise ValueError("the class ids must be whole numbers")
            paths = [parsing.check_relative_path(path.removeprefix("/"), "path") for path in (image, description)]
            product = Product(int(class_id), name, coarse_name, int(coarse_id), *paths)
            if product.class_id in products or name in {other.name for other in products.values()}:
                raise ValueError(f"the class {name} ({class_id}) appears a second time")
        except ValueError as error:
            raise parsing.row_error(file, line, f"{error}; restore the clone.") from None
        products[product.class_id] = product
    if not products:
        raise ValueError(f"{file} lists no class; restore the clone.")
    return products


def read_photographs(dataset_dir: Path, split: str, products: dict[int, Product]) -> dict[int, list[str]]:
    """Read a list of photographs as class id -> paths in the order of the source's numbering.

    A line is ``path, class id, coarse class id``. Early commits of the source wrote only the path; its last folder is
    the class.

    Raises:
        FileNotFoundError: the list is missing.
        ValueError: a line is malformed, or a photograph appears twice.
    """
    file = dataset_dir / SOURCE_LISTS[split]
    class_of_name = {product.name: product.class_id for product in products.values()}
    photographs: dict[int, list[str]] = {}
    seen: set[str] = set()
    for line, text in parsing.read_lines(file):
        fields = [field.strip() for field in text.split(",")]
        try:
            path = parsing.check_relative_path(fields[0], "path")
            parts = path.split("/")
            if len(fields) not in (1, 3) or len(parts) < 3:
                raise ValueError("expected: <list>/<department>/.../<class>/<photograph>, class id, coarse class id")
            label = class_of_name.get(parts[-2]) if len(fields) == 1 else _label(fields[1])
            if label not in products:
                raise ValueError("its class is not in classes.csv")
            if path in seen:
                raise ValueError(f"the photograph {path} appears a second time")
        except ValueError as error:
            raise parsing.row_error(file, line, f"{error}; restore the clone.") from None
        seen.add(path)
        photographs.setdefault(label, []).append(path)
    for paths in photographs.values():
        paths.sort(key=lambda path: (_number(path), path))
    return photographs


def _label(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"the class id {text!r} is not a whole number")
    return int(text)


def _number(path: str) -> int:
    digits = re.search(r"(\d+)\.[^.]*$", path)
    return int(digits[1]) if digits else 0


def cut_into_clips(paths: list[str], key: str) -> list[list[str]]:
    """Cut one product's photographs into runs of 3 to 10 neighbours that use all photographs.

    Args:
        paths: photographs in order; fewer than three give no clip.
        key: seed for the lengths.
    """
    generator = random.Random(hashlib.sha256(key.encode()).digest())
    clips: list[list[str]] = []
    start = 0
    while len(paths) - start >= MIN_CLIP:
        remaining = len(paths) - start
        # The rest must not be one or two photographs.
        lengths = [length for length in _CLIP_LENGTHS if remaining - length == 0 or remaining - length >= MIN_CLIP]
        if remaining <= MAX_CLIP and remaining not in lengths:
            lengths.append(remaining)
        length = generator.choice(lengths)
        clips.append(paths[start : start + length])
        start += length
    return clips


def _read_text(path: Path) -> str:
    """Read a short text of the source, "" if there is none; some files are not UTF-8."""
    if not path.is_file():
        return ""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace").strip()


def _description(dataset_dir: Path, product: Product) -> str:
    """Return the product's description; ``classes.csv`` misspells the ending of some of these files."""
    stem = re.sub(r"_Descriptions?(\.txt)?$", "", product.description)
    candidates = (product.description, f"{stem}_Description.txt", f"{stem}_Descriptions.txt")
    return next((text for text in (_read_text(dataset_dir / path) for path in candidates) if text), "")


def _title(dataset_dir: Path, product: Product) -> str:
    """Return the shop's title of the product, or its class name."""
    stem = re.sub(r"_[^_/]*$", "", product.image)
    found = re.search(r"^\s*Title:[ \t]*(.*\S)", _read_text(dataset_dir / f"{stem}_Information.txt"), re.MULTILINE)
    return found[1] if found else product.name.replace("-", " ")


def _shrink(source: Path, target: Path, short_side: int) -> tuple[int, int]:
    """Write ``source`` as JPEG with at most ``short_side`` pixels on its short side; return (width, height)."""
    try:
        image = open_image(source)
    except FileNotFoundError:
        raise FileNotFoundError(f"{source} does not exist; the clone is incomplete, restore it.") from None
    except MediaError as error:
        raise ValueError(f"{source} {error.reason}; restore the clone.") from None
    scale = short_side / min(image.size)
    if scale < 1:
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    image.save(target, "JPEG", quality=90)
    return image.size


def _write_json_lines(path: Path, rows: Iterable[dict]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _write_gallery(dataset_dir: Path, folder: Path, products: dict[int, Product], short_side: int) -> None:
    (folder / "gallery").mkdir()
    rows = []
    for product in tqdm(sorted(products.values(), key=lambda product: product.class_id), desc="Shop images"):
        name = f"gallery/{product.gallery_id}.jpg"
        width, height = _shrink(dataset_dir / product.image, folder / name, short_side)
        stem = re.sub(r"_[^_/]*$", "", product.image)
        rows.append(
            {
                "gallery_id": product.gallery_id,
                "image": name,
                "name": product.name.replace("-", " "),
                "title": _title(dataset_dir, product),
                "description": _description(dataset_dir, product),
                "description_sv": _read_text(dataset_dir / f"{stem}_Description_Swedish.txt"),
                "category": product.coarse_name,
                "category_id": product.coarse_id,
                "department": _department(product.image),
                "width": width,
                "height": height,
            }
        )
    _write_json_lines(folder / GALLERY_FILE, rows)


def _department(path: str) -> str:
    return path.split("/")[1]


def _clip_rows(split: str, photographs: dict[int, list[str]], products: dict[int, Product]):
    """Return the rows of a split, with the source paths of their photographs, and how many are in no clip."""
    clips = [
        (label, clip)
        for label, paths in sorted(photographs.items())
        for clip in cut_into_clips(paths, f"{split}/{products[label].name}")
    ]
    # In the order of the classes, a clip's position in the file would reveal its product.
    clips.sort(key=lambda item: hashlib.sha256(item[1][0].encode()).digest())
    short = CLIP_FILES[split].removeprefix("clips_").removesuffix(".jsonl")
    rows = [
        {
            "query_id": f"{short}-{index:04d}",
            "frames": [f"frames/{hashlib.sha256(path.encode()).hexdigest()[:16]}.jpg" for path in clip],
            "n_frames": len(clip),
            "gt_gallery_ids": [products[label].gallery_id],
            "category": products[label].coarse_name,
            "department": _department(clip[0]),
            "split": short,
        }
        for index, (label, clip) in enumerate(clips)
    ]
    sources = [path for _, clip in clips for path in clip]
    return rows, sources, sum(map(len, photographs.values())) - len(sources)


def build_grocerystore(clone_dir: str | Path, output_dir: str | Path, short_side: int = 160) -> dict[str, int]:
    """Build a shop_clips folder; ``output_dir`` appears only when it is complete.

    Args:
        clone_dir: a clone of GroceryStoreDataset (the folder that holds ``dataset/``).
        output_dir: folder to write; it must not exist or must be empty.
        short_side: maximum short side in pixels; larger pictures are reduced.

    Returns:
        The number of clips per split.

    Raises:
        FileNotFoundError: the clone or one of its files is missing.
        FileExistsError: ``output_dir`` is not empty.
        ValueError: ``short_side`` is below 1, or a file of the clone is damaged.
    """
    if short_side < 1:
        raise ValueError(f"short_side must be at least 1 pixel, not {short_side}.")
    dataset_dir, output_dir = Path(clone_dir) / "dataset", Path(output_dir)
    if not dataset_dir.is_dir():
        raise FileNotFoundError(f"{dataset_dir} does not exist; pass the folder of a GroceryStoreDataset clone.")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"{output_dir} already exists; remove it or choose another folder.")
    products = read_products(dataset_dir)
    photographs = {split: read_photographs(dataset_dir, split, products) for split in SOURCE_LISTS}

    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "frames").mkdir(parents=True)
    _write_gallery(dataset_dir, partial, products, short_side)
    counts, table, left_out = {}, [], 0
    for split, name in CLIP_FILES.items():
        rows, sources, unused = _clip_rows(split, photographs[split], products)
        frames = [frame for row in rows for frame in row["frames"]]
        for source, frame in zip(tqdm(sources, desc=f"Photographs of {split}"), frames):
            _shrink(dataset_dir / source, partial / frame, short_side)
        _write_json_lines(partial / name, rows)
        counts[split] = len(rows)
        left_out += unused
        table.append(f"| {split} | {len(rows)} | {len(frames)} | {len({row['gt_gallery_ids'][0] for row in rows})} |")
    text = _SOURCE_TEXT.format(
        short_side=short_side, low=MIN_CLIP, high=MAX_CLIP, left_out=left_out, table="\n".join(table)
    )
    (partial / "SOURCE.md").write_text(text, encoding="utf-8")
    if (Path(clone_dir) / "LICENSE").is_file():
        shutil.copyfile(Path(clone_dir) / "LICENSE", partial / "LICENSE")
    if output_dir.exists():
        output_dir.rmdir()
    os.rename(partial, output_dir)
    return counts


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    print_anywhere()
    parser = argparse.ArgumentParser(prog="python -m data_rice.grocerystore", description=__doc__.splitlines()[0])
    parser.add_argument("clone_dir", help="clone of GroceryStoreDataset")
    parser.add_argument("output_dir", help="folder to write; must not exist yet")
    parser.add_argument("--short_side", type=int, default=160, help="pixels of the short side (default: 160)")
    options = parser.parse_args(arguments)
    try:
        counts = build_grocerystore(options.clone_dir, options.output_dir, options.short_side)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.output_dir}: " + ", ".join(f"{count} {split} clips" for split, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

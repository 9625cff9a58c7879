"""Writes the demo as a Space: a folder with the page, the packages, a model, a shop and example clips."""

import json
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from evaluation_rice.frames import clip_frames
from processing_rice import open_image

from .page import column

PACKAGES = ("modeling_rice", "processing_rice", "data_rice", "hub_rice", "evaluation_rice", "retrieval_rice")
# The requirements of setup.cfg, and PyAV for uploaded videos. The README's metadata names Gradio.
REQUIREMENTS = (
    *("transformers>=5.17,<6", "datasets>=5.0", "accelerate>=1.15,<2", "safetensors>=0.8", "huggingface_hub>=1.33"),
    *("torch>=2.11", "torchvision>=0.26", "evaluate>=0.4.6", "sentencepiece>=0.2", "av>=17.1", "lancedb>=0.40"),
)
MODEL_FILES = ("*.json", "*.safetensors", "*.py", "*.model", "*.txt")
_FRAMES = 16
_SIDE = 640

APP = '''"""Starts the demo; written by `rice demo --space`."""

import sys

from rice_cli import main

if __name__ == "__main__":
    sys.exit(main({arguments}))
'''

ARGUMENTS = ["demo", "--model", "model", "--dataset", "shop", "--host", "0.0.0.0", "--port", "7860"]

README = """---
title: RICE
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
license: apache-2.0
---

RICE recognises which product a livestream clip presents. Choose one of {clips} example clips or upload one. The page
ranks the {images} pictures of {shops} for it, with heat maps of the corresponding patches of the clip.
"""


def write_space(
    folder: str | Path,
    model: str | Path,
    queries: Any,
    gallery: Sequence[dict] | None,
    num_examples: int,
    detector: str | Path | None = None,
) -> None:
    """
    Args:
        folder: A new or empty folder.
        model: Checkpoint folder.
        queries: The query view, or `None`; evenly spaced clips of it become the examples.
        gallery: Rows of the shop. With livestreams, only those of an example are included.
        num_examples: Maximum number of clips.
        detector: Checkpoint folder of a product detector.

    Raises:
        FileNotFoundError: the checkpoint folder does not exist.
        FileExistsError: the folder is not empty.
        ValueError: there is no example clip, or a picture cannot be read.
    """
    folder, model = Path(folder), Path(model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} already exists; name a new or empty folder for the Space.")
    checkpoints = {"model": model} if detector is None else {"model": model, "detector": Path(detector)}
    for path in checkpoints.values():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"there is no checkpoint folder {path}; a Space needs the model's files.")
    if queries is None or gallery is None or num_examples < 1:
        raise ValueError("a Space needs example clips and pictures: name a --dataset with both instead of an index.")
    root = Path(__file__).resolve().parents[2]
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(root / package, folder / package, ignore=ignored)
    shutil.copy(root / "rice_cli.py", folder)
    for name, source in checkpoints.items():
        (folder / name).mkdir()
        for pattern in MODEL_FILES:
            for path in source.glob(pattern):
                shutil.copy(path, folder / name / path.name)
    count = min(num_examples, len(queries))
    clips = [queries[i * len(queries) // count] for i in range(count)]
    lives = {clip["live_id"] for clip in clips}
    images = write_shop(folder / "shop", clips, gallery, lives)
    write_clips(folder / "shop", clips, images)
    arguments = ARGUMENTS if detector is None else [*ARGUMENTS, "--detector", "detector"]
    (folder / "app.py").write_text(APP.format(arguments=json.dumps(arguments)), encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n", encoding="utf-8")
    shops = f"{len(lives)} shops" if len(lives) > 1 else "a shop"
    words = README.format(gradio=_gradio_version(), clips=len(clips), images=len(images), shops=shops)
    (folder / "README.md").write_text(words, encoding="utf-8")
    print(f"{folder}: a Space with {len(clips)} example clips and {len(images)} pictures of {shops}")
    print(f"push it with: hf upload NAME/SPACE {folder} --repo-type space")


def _gradio_version() -> str:
    try:
        return version("gradio")
    except PackageNotFoundError:
        raise ValueError("a Space names the version of Gradio, which is not installed: pip install gradio.") from None


def _save(picture: Image.Image, path: Path) -> None:
    picture.thumbnail((_SIDE, _SIDE))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="JPEG", quality=95)


def write_shop(root: Path, clips: list[dict], gallery: Sequence[dict], lives: set[str]) -> dict[tuple[str, str], str]:
    """
    Writes `gallery.jsonl` of a shop_clips folder with the pictures of some livestreams.

    Returns:
        (livestream, image id) -> id of the image in that folder.
    """
    by_live = any(lives) and set(column(gallery, "live_id")) >= lives
    ids: dict[tuple[str, str], str] = {}
    lines = []
    for row in tqdm(gallery, desc="shop", unit="image"):
        live_id = row["live_id"] if by_live else ""
        key = (live_id, row["image_id"])
        if key in ids or (by_live and live_id not in lives):
            continue
        # Ids must be unique in such a folder, but livestreams may share a picture.
        ids[key] = row["image_id"] if row["image_id"] not in ids.values() else f"{row['image_id']}@{live_id}"
        name = f"gallery/{len(lines):06d}.jpg"
        _save(open_image(row["image"]), root / name)
        line = {"gallery_id": ids[key], "image": name, "title": row.get("title") or ""}
        lines.append({**line, "live_id": live_id} if by_live else line)
    _write_lines(root / "gallery.jsonl", lines)
    return ids


def write_clips(root: Path, clips: list[dict], ids: dict[tuple[str, str], str]) -> None:
    """Writes `clips_test.jsonl` and its frames; `ids` comes from `write_shop`."""
    lines = []
    by_live = any(live_id for live_id, _ in ids)
    for number, clip in enumerate(clips):
        live_id = clip["live_id"] if by_live else ""
        frames, boxes = [], []
        for i, (frame, box) in enumerate(clip_frames(clip, _FRAMES)):
            frames.append(f"clips/{number:04d}/{i:02d}.jpg")
            boxes.append(None if box is None else list(box))
            _save(frame, root / frames[-1])
        relevant = [ids[live_id, image] for image in clip["relevant"] if (live_id, image) in ids]
        line = {"query_id": clip["clip_id"], "frames": frames, "gt_gallery_ids": relevant, "asr": clip["asr"] or ""}
        if any(boxes):
            line["boxes"] = boxes
        lines.append({**line, "live_id": live_id} if by_live else line)
    _write_lines(root / "clips_test.jsonl", lines)


def _write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")

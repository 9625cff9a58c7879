"""Writes the mini LPR4M in LPR4M's raw layout, in parallel. The result is the same for any number of workers."""

import json
import os
import random
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from .products import MAX_PRODUCTS, Product, Room, draw_product, draw_room
from .scenes import Clip, draw_clip, draw_shop_image
from .silhouettes import SILHOUETTES
from .text import draw_asr, draw_title

MANIFEST_NAME = "mini_lpr4m.json"
# Increased when the same parameters give other data, so that data of an older renderer is not reused.
RENDERER_VERSION = 3
_VIDEO_FOLDERS = 8
_SECONDS_PER_CLIP = 20
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class _Settings:
    seed: int
    num_train_lives: int
    num_test_lives: int
    products_per_live: int
    clips_per_product: int
    test_clips_per_product: int
    num_frames: int
    image_size: int

    def __post_init__(self):
        for name, value in asdict(self).items():
            least = 0 if name in ("seed", "num_train_lives", "num_test_lives") else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}.")
        if self.num_train_lives + self.num_test_lives == 0:
            raise ValueError("num_train_lives and num_test_lives are both 0; set at least one of them above 0.")
        if self.products_per_live > MAX_PRODUCTS:
            raise ValueError(
                f"products_per_live={self.products_per_live} exceeds the number of distinct products in a room; "
                f"use at most {MAX_PRODUCTS}."
            )
        if self.image_size < 32:
            raise ValueError(f"image_size={self.image_size} is too small to show a product; use at least 32.")


def product_scale(clip: Clip) -> str:
    """ "small" (< 0.3), "medium" or "large" (> 0.5) by the mean area of the boxes as a share of the frame."""
    shares = []
    for frame, box in zip(clip.frames, clip.boxes):
        if box is not None:
            shares.append((box[2] - box[0]) * (box[3] - box[1]) / (frame.width * frame.height))
    mean = sum(shares) / len(shares)
    return "small" if mean < 0.3 else "large" if mean > 0.5 else "medium"


def visible_duration(clip: Clip) -> str:
    """ "short" (<= 0.4), "medium" or "long" (> 0.7) by the share of frames that show the product."""
    share = sum(box is not None for box in clip.boxes) / len(clip.boxes)
    return "short" if share <= 0.4 else "long" if share > 0.7 else "medium"


def product_number(clip: Clip) -> str:
    """ "few" (at most three) or "many" by the products on screen in the fullest frame."""
    return "many" if max(clip.products_on_screen) > 3 else "few"


def _save(image: Image.Image, path: Path) -> None:
    image.save(path, "JPEG", quality=_JPEG_QUALITY)


def _clip_id(room: Room, number: int) -> str:
    start = number * _SECONDS_PER_CLIP * 1000
    return f"{room.live_id}-{start}-{start + _SECONDS_PER_CLIP * 1000}"


def _frame_ids(clip_id: str, count: int) -> list[str]:
    return [f"{clip_id}-{index:04d}" for index in range(count)]


def _line(*fields: object) -> str:
    return "\t".join(str(field) for field in fields) + "\n"


@dataclass
class _Rendered:
    """Annotation lines and tables of one livestream."""

    training_videoinfo: str = ""
    test_videoid_asr: str = ""
    test_image_title: str = ""
    test_videoid_attributes: str = ""
    test_videoid_to_gtimage: dict | None = None
    test_frameid2gtbox: dict | None = None
    test_liveid_to_gallery: dict | None = None
    num_clips: int = 0


def _write_clip(
    root: Path, folder: str, clip_id: str, room: Room, product: Product, arts: dict, settings: _Settings
) -> Clip:
    rng = random.Random(f"clip/{settings.seed}/{clip_id}")
    clip = draw_clip(room, product, arts, rng, settings.num_frames, settings.image_size)
    target = root / folder / clip_id
    target.mkdir(parents=True)
    for frame_id, frame in zip(_frame_ids(clip_id, len(clip.frames)), clip.frames):
        _save(frame, target / f"{frame_id}.jpg")
    return clip


def _clip_order(settings: _Settings, room: Room, repeats: int) -> list[Product]:
    """Products in the order in which the livestream presents them."""
    order = list(room.products) * repeats
    random.Random(f"order/{settings.seed}/{room.live_id}").shuffle(order)
    return order


def _speech(settings: _Settings, clip_id: str, product: Product, room: Room) -> str:
    others = [other for other in room.products if other is not product]
    return draw_asr(product, others, random.Random(f"asr/{settings.seed}/{clip_id}"))


def _title(settings: _Settings, product: Product) -> str:
    return draw_title(product, random.Random(f"title/{settings.seed}/{product.product_id}"))


def _shop_image(settings: _Settings, product: Product, art: Image.Image, shot: int) -> Image.Image:
    rng = random.Random(f"shop/{settings.seed}/{product.product_id}/{shot}")
    return draw_shop_image(art, rng, settings.image_size, detail=shot > 0)


def _render_train_live(root: Path, settings: _Settings, index: int) -> _Rendered:
    room = draw_room(settings.seed, "train", index, settings.products_per_live)
    arts = {product.product_id: draw_product(product) for product in room.products}
    for product in room.products:
        image = _shop_image(settings, product, arts[product.product_id], shot=0)
        _save(image, root / "training_image" / f"{product.product_id}-0.jpg")
    lines = []
    for number, product in enumerate(_clip_order(settings, room, settings.clips_per_product)):
        clip_id = _clip_id(room, number)
        folder = f"training_video_0{number % _VIDEO_FOLDERS}"
        clip = _write_clip(root, folder, clip_id, room, product, arts, settings)
        lines.append(
            _line(
                clip_id,
                _frame_ids(clip_id, len(clip.frames)),
                [box or [0, 0, 0, 0] for box in clip.boxes],
                f"{product.product_id}-0",
                _title(settings, product),
                product.category_index,
                product.silhouette.name,
                _speech(settings, clip_id, product, room),
                product_scale(clip),
                visible_duration(clip),
                product_number(clip),
            )
        )
    return _Rendered(training_videoinfo="".join(lines), num_clips=len(lines))


def _render_gallery(root: Path, settings: _Settings, room: Room, arts: dict) -> tuple[dict[str, list[str]], str]:
    """Write the shop's pictures; about every fourth product has a second, closer shot (``-1``).

    Returns:
        Image ids by product id (main shot first) and the title lines.
    """
    folder = root / "gallery" / room.live_id
    folder.mkdir(parents=True)
    images: dict[str, list[str]] = {}
    titles = []
    for product in room.products:
        shots = 1 + (random.Random(f"shots/{settings.seed}/{product.product_id}").random() < 0.25)
        images[product.product_id] = [f"{product.product_id}-{shot}" for shot in range(shots)]
        for shot, image_id in enumerate(images[product.product_id]):
            _save(_shop_image(settings, product, arts[product.product_id], shot), folder / f"{image_id}.jpg")
            titles.append(_line(image_id, _title(settings, product)))
    return images, "".join(titles)


def _render_test_live(root: Path, settings: _Settings, index: int) -> _Rendered:
    room = draw_room(settings.seed, "test", index, settings.products_per_live)
    arts = {product.product_id: draw_product(product) for product in room.products}
    images, titles = _render_gallery(root, settings, room, arts)
    gallery = [image_id for shots in images.values() for image_id in shots]
    rendered = _Rendered(
        test_image_title=titles,
        test_videoid_to_gtimage={},
        test_frameid2gtbox={},
        test_liveid_to_gallery={room.live_id: gallery},
    )
    asr, attributes = [], []
    for number, product in enumerate(_clip_order(settings, room, settings.test_clips_per_product)):
        clip_id = _clip_id(room, number)
        clip = _write_clip(root, "query", clip_id, room, product, arts, settings)
        for frame_id, box in zip(_frame_ids(clip_id, len(clip.frames)), clip.boxes):
            if box is not None:
                rendered.test_frameid2gtbox[frame_id] = [[round(value / settings.image_size, 6) for value in box]]
        rendered.test_videoid_to_gtimage[clip_id] = images[product.product_id]
        asr.append(_line(clip_id, _speech(settings, clip_id, product, room)))
        attributes.append(
            _line(clip_id, product.silhouette.name, product_scale(clip), visible_duration(clip), product_number(clip))
        )
    rendered.test_videoid_asr = "".join(asr)
    rendered.test_videoid_attributes = "".join(attributes)
    rendered.num_clips = len(asr)
    return rendered


def _render_live(task: tuple[str, _Settings, str, int]) -> _Rendered:
    root, settings, split, index = task
    render = _render_train_live if split == "train" else _render_test_live
    return render(Path(root), settings, index)


def _run(tasks: list, num_workers: int, progress: bool) -> list[_Rendered]:
    bar = {"total": len(tasks), "desc": "rendering mini LPR4M", "unit": "live", "disable": not progress}
    if num_workers <= 1:
        return list(tqdm(map(_render_live, tasks), **bar))
    with ProcessPoolExecutor(num_workers) as pool:
        return list(tqdm(pool.map(_render_live, tasks), **bar))


def _write_annotations(root: Path, train: list[_Rendered], test: list[_Rendered]) -> None:
    folder = root / "annotations"
    texts = {
        "training_videoinfo": train,
        "test_videoid_asr": test,
        "test_image_title": test,
        "test_videoid_attributes": test,
    }
    for name, parts in texts.items():
        (folder / f"{name}.txt").write_text("".join(getattr(part, name) for part in parts), encoding="utf-8")
    for name in ("test_videoid_to_gtimage", "test_frameid2gtbox", "test_liveid_to_gallery"):
        table = {key: value for part in test for key, value in getattr(part, name).items()}
        (folder / f"{name}.json").write_text(json.dumps(table, allow_nan=False), encoding="utf-8")


def _check_existing(output_dir: Path, manifest: dict) -> bool:
    """Whether ``output_dir`` already holds exactly these data; raises ValueError if it holds anything else."""
    if not output_dir.exists():
        return False
    if not output_dir.is_dir():
        raise ValueError(f"{output_dir} is a file; name a folder for the mini LPR4M.")
    path = output_dir / MANIFEST_NAME
    if not path.is_file():
        if any(output_dir.iterdir()):
            raise ValueError(
                f"{output_dir} is not empty and is not a rendered mini LPR4M; name another folder or empty it."
            )
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["parameters"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest of the renderer; delete {output_dir} and render again.") from error
    different = [name for name in {**manifest, **found} if manifest.get(name) != found.get(name)]
    if different:
        changes = ", ".join(f"{name} {found.get(name)} instead of {manifest.get(name)}" for name in different)
        raise ValueError(f"{output_dir} was rendered with {changes}; delete it or name another folder.")
    return True


def _publish(partial: Path, output_dir: Path, manifest: dict) -> None:
    """Move the finished folder into place; another process may have finished the same data first."""
    try:
        os.replace(partial, output_dir)
    except OSError:
        if not _check_existing(output_dir, manifest):
            raise


def render_mini_lpr4m(
    output_dir: str | os.PathLike,
    *,
    seed: int = 0,
    num_train_lives: int = 27,
    num_test_lives: int = 16,
    products_per_live: int = 50,
    clips_per_product: int = 5,
    test_clips_per_product: int = 1,
    num_frames: int = 5,
    image_size: int = 64,
    num_workers: int = 2,
    progress: bool = True,
) -> Path:
    """Render the mini LPR4M into ``output_dir``, in the raw layout of LPR4M.

    The same seed and sizes give the same bytes for any ``num_workers``. Products, rooms and hosts of the test
    livestreams never occur in training. The folder appears only when it is complete. A complete folder with the same
    parameters is reused.

    Args:
        output_dir: folder to create.
        seed: random seed.
        num_train_lives, num_test_lives: number of livestreams (rooms).
        products_per_live: products of a room, at most ``MAX_PRODUCTS``.
        clips_per_product, test_clips_per_product: clips of each product.
        num_frames: frames of a clip.
        image_size: side of frames and shop images, in pixels.
        num_workers: number of processes; 0 or 1 renders in this process.
        progress: whether to show a progress bar.

    Returns:
        ``output_dir`` as a path.

    Raises:
        ValueError: for a size out of range, or when ``output_dir`` holds something else.
    """
    output_dir = Path(output_dir)
    settings = _Settings(
        seed=seed,
        num_train_lives=num_train_lives,
        num_test_lives=num_test_lives,
        products_per_live=products_per_live,
        clips_per_product=clips_per_product,
        test_clips_per_product=test_clips_per_product,
        num_frames=num_frames,
        image_size=image_size,
    )
    manifest = {"renderer_version": RENDERER_VERSION, **asdict(settings)}
    if _check_existing(output_dir, manifest):
        return output_dir

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", suffix=".partial", dir=output_dir.parent))
    try:
        for name in ("annotations", "query", "gallery", "training_image"):
            (partial / name).mkdir()
        for number in range(_VIDEO_FOLDERS):
            (partial / f"training_video_0{number}").mkdir()
        sizes = (("train", num_train_lives), ("test", num_test_lives))
        tasks = [(str(partial), settings, split, index) for split, count in sizes for index in range(count)]
        rendered = _run(tasks, num_workers, progress)
        train, test = rendered[:num_train_lives], rendered[num_train_lives:]
        _write_annotations(partial, train, test)
        counts = Counter(
            train_clips=sum(live.num_clips for live in train), test_clips=sum(live.num_clips for live in test)
        )
        summary = {"parameters": manifest, **counts, "categories": [item.name for item in SILHOUETTES]}
        (partial / MANIFEST_NAME).write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        partial.chmod(0o755)
        _publish(partial, output_dir, manifest)
    finally:
        if partial.exists():
            shutil.rmtree(partial)
    return output_dir

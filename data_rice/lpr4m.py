"""`datasets` builder of LPR4M in its published files (and of the rendered mini LPR4M, which has the same layout).

Source: "Cross-view Semantic Alignment for Livestreaming Product Recognition" (RICE, ICCV 2023), section 3. The layout
and the columns are described in docs/data.md.
"""

from collections import defaultdict
from dataclasses import dataclass
from os import path as osp

import datasets

from . import lpr4m_layout as layout
from . import parsing
from .builder import ProblemLog, ViewBuilder, ViewConfig
from .features import clip_row

SPLITS = {"train": datasets.Split.TRAIN, "validation": datasets.Split.VALIDATION, "test": datasets.Split.TEST}


@dataclass(eq=False)
class Lpr4mConfig(ViewConfig):
    """Options of `Lpr4m`.

    Attributes:
        train_files: which files of ``annotations/`` are the training list (a file name pattern).
        validation_fraction: share of the training livestreams held out as the validation split, 0 up to 1; at least
            one livestream when above 0. Ignored when ``validation_lives`` is given.
        validation_lives: how many livestreams to hold out, or which ones (a list of live ids).
        gallery_images: "main" for one image per product as in the official runs, "all" for every image.
    """

    train_files: str = "training_videoinfo*.txt"
    validation_fraction: float = 0.0
    validation_lives: int | list[str] | None = None
    gallery_images: str = "main"

    def validate(self) -> None:
        """See `ViewConfig.validate`."""
        super().validate()
        annotations = osp.join(self.data_dir, "annotations")
        if not osp.isdir(annotations):
            raise FileNotFoundError(f"{annotations} does not exist; put LPR4M's annotation files there.")
        parsing.check_relative_path(self.train_files, "train_files pattern")
        if self.gallery_images not in ("main", "all"):
            raise ValueError(f'gallery_images must be "main" or "all", not {self.gallery_images!r}.')
        if not parsing.is_number(self.validation_fraction) or not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be at least 0 and below 1, not {self.validation_fraction!r}.")
        lives = self.validation_lives
        if isinstance(lives, str | bool | float) or (isinstance(lives, int) and lives < 0):
            raise ValueError(f"validation_lives must be a count or a list of live ids, not {lives!r}.")

    @property
    def holds_out(self) -> bool:
        """Whether a validation split is cut from the training list."""
        return bool(self.validation_lives if self.validation_lives is not None else self.validation_fraction)

    def source_paths(self) -> list[str]:
        """See `ViewConfig.source_paths`: annotation files, and the folders whose listings find the frames."""
        paths = layout.annotation_files(self.data_dir, "*")
        if self.name != "gallery":
            paths += layout.training_video_folders(self.data_dir)
        if self.name == "queries":
            query = osp.join(self.data_dir, "query")
            paths += [osp.join(query, name) for name in parsing.list_names(query, folders=True)]
        return paths


class Lpr4m(ViewBuilder):
    """LPR4M as pairs (train, validation), queries (validation, test) and gallery (train, validation, test).

    Media are looked up in the LPR750K tree. A missing media file or folder is no error here: the row keeps its path.
    LPR4M publishes no validation split; see `Lpr4mConfig.validation_fraction`. Training rows of a product that is also
    sold in a held-out livestream are left out of training, counted and listed.

    Example:
        >>> builder = Lpr4m("pairs", data_dir="data/mini_lpr4m", validation_lives=3)
        >>> builder.download_and_prepare()
        >>> train = builder.as_dataset(split="train")
    """

    BUILDER_CONFIG_CLASS = Lpr4mConfig
    BUILDER_CONFIGS = [Lpr4mConfig(name=view) for view in ("pairs", "queries", "gallery")]

    def _split_generators(self, dl_manager):
        root, config = self.config.data_dir, self.config
        train_files = tuple(layout.annotation_files(root, config.train_files))
        if config.holds_out and not train_files:
            raise FileNotFoundError(
                f"{osp.join(root, 'annotations', config.train_files)} does not exist, and a validation split is cut "
                "from it; put the training list there or set validation_fraction to 0."
            )
        held_lives, held_products = self._held_out(train_files)
        splits = []
        if train_files and self.view != "queries":
            splits.append("train")
        if held_lives:
            splits.append("validation")
        if self.view != "pairs" and any(layout.annotation_files(root, name) for name in layout.TEST_FILES.values()):
            splits.append("test")
        if not splits:
            wanted = config.train_files if self.view == "pairs" else layout.TEST_FILES["relevant"]
            raise FileNotFoundError(f"{osp.join(root, 'annotations', wanted)} does not exist; put the file there.")
        source = {"train_files": train_files, "held_lives": held_lives, "held_products": held_products}
        return [datasets.SplitGenerator(name=SPLITS[split], gen_kwargs={"split": split, **source}) for split in splits]

    def missing_split_reason(self, split: str) -> str:
        """See `ViewBuilder.missing_split_reason`."""
        annotations = osp.join(self.config.data_dir, "annotations")
        if split == "validation":
            return (
                f"{annotations} has no validation split, because LPR4M publishes none; pass validation_fraction or "
                "validation_lives to hold out whole livestreams of the training list."
            )
        if (self.view, split) in (("pairs", "test"), ("queries", "train")):
            return f"LPR4M has no {split} {self.view}; pairs are made of the training list, queries of the test files."
        wanted = self.config.train_files if split == "train" else layout.TEST_FILES["relevant"]
        return f"{osp.join(annotations, wanted)} does not exist, so there is no {split} split; put the file there."

    def _held_out(self, train_files: tuple[str, ...]) -> tuple[frozenset[str], frozenset[str]]:
        """Return the held-out livestreams and the products that they sell."""
        config = self.config
        if not config.holds_out:
            return frozenset(), frozenset()
        products = layout.products_of_livestreams(train_files)
        if isinstance(config.validation_lives, list | tuple):
            unknown = [live_id for live_id in config.validation_lives if live_id not in products]
            if unknown:
                raise ValueError(
                    f"validation_lives names {unknown[0]!r}, which is not in {train_files[0]}; check the id."
                )
            lives = frozenset(config.validation_lives)
        else:
            count = config.validation_lives
            if count is None:
                count = max(1, round(config.validation_fraction * len(products)))
            lives = layout.choose_livestreams(list(products), count)
        if len(lives) >= len(products):
            raise ValueError(
                f"The validation split would take {len(lives)} livestreams and {train_files[0]} has {len(products)}; "
                "hold out fewer, so that some are left to train on."
            )
        return lives, frozenset().union(*(products[live_id] for live_id in lives))

    def generate_rows(self, split: str, problems: ProblemLog, **source):
        """See `ViewBuilder.generate_rows`."""
        if self.view == "pairs":
            yield from self._pairs(split, problems, **source)
        elif split == "test":
            test = _TestSet(self.config.data_dir, self.config.gallery_images, problems)
            yield from test.query_rows() if self.view == "queries" else test.gallery_rows()
        elif self.view == "queries":
            yield from self._validation_queries(problems, **source)
        else:
            yield from self._training_gallery(split, problems, **source)

    def _split_rows(self, split, problems, train_files, held_lives, held_products):
        """Yield the training rows of ``split``, noting rows of held-out products in ``problems``."""
        for file, line, row in layout.read_training_rows(train_files):
            if (row.live_id in held_lives) != (split == "validation"):
                continue
            if split == "train" and layout.product_id_of(row.image_id) in held_products:
                reason = "left out of training because a validation livestream sells their product"
                problems.add(row.clip_id, file, line, reason)
                continue
            yield file, line, row

    def _pairs(self, split: str, problems: ProblemLog, **source):
        media = layout.TrainingMedia(self.config.data_dir)
        for file, line, row in self._split_rows(split, problems, **source):
            if not row.frame_ids:
                problems.add(row.clip_id, file, line, "left out because they have no frames")
                continue
            yield {
                **_training_clip(media, file, line, row, problems),
                "image_id": row.image_id,
                "image": media.image(row.image_id),
                "title": row.title,
            }

    def _training_gallery(self, split: str, problems: ProblemLog, **source):
        media = layout.TrainingMedia(self.config.data_dir)
        seen: set[tuple[str, str]] = set()
        # The pairs view reports the rows that a split leaves out; here they would only be counted twice.
        for _, _, row in self._split_rows(split, ProblemLog(None), **source):
            if (row.live_id, row.image_id) not in seen:
                seen.add((row.live_id, row.image_id))
                yield {
                    "image_id": row.image_id,
                    "live_id": row.live_id,
                    "image": media.image(row.image_id),
                    "title": row.title,
                }

    def _validation_queries(self, problems: ProblemLog, **source):
        media = layout.TrainingMedia(self.config.data_dir)
        images: dict[tuple[str, str], list[str]] = defaultdict(list)
        for _, _, row in self._split_rows("validation", problems, **source):
            shown = images[row.live_id, layout.product_id_of(row.image_id)]
            if row.image_id not in shown:
                shown.append(row.image_id)
        for file, line, row in self._split_rows("validation", problems, **source):
            if not row.frame_ids:
                problems.add(row.clip_id, file, line, "kept without frames, so they count as misses")
            clip = _training_clip(media, file, line, row, problems)
            others = [other for other in images[row.live_id, clip["product_id"]] if other != row.image_id]
            yield {**clip, "relevant": [row.image_id, *others]}


def _training_clip(media, file: str, line: int, row: layout.TrainingRow, problems: ProblemLog) -> dict:
    """Return the clip columns of a training row, with its pixel boxes turned into fractions of the frame."""
    frames = media.frames(row.clip_id, row.frame_ids)
    if row.frame_ids and not media.has_clip(row.clip_id):
        problems.add(row.clip_id, file, line, "kept although no training_video* folder holds their frames")
    boxes: list[list[float] | None] = [None] * len(frames)
    if any(any(box) for box in row.boxes):
        size = layout.image_size(frames) if media.has_clip(row.clip_id) else None
        if size is None:
            problems.add(row.clip_id, file, line, "kept without boxes, as no frame gives the size of the picture")
        else:
            boxes = [parsing.clip_box(box, *size) for box in row.boxes]
            if any(box is None and any(pixels) for box, pixels in zip(boxes, row.boxes)):
                problems.add(row.clip_id, file, line, "kept without those boxes that have no area inside the frame")
    return clip_row(
        clip_id=row.clip_id,
        live_id=row.live_id,
        product_id=layout.product_id_of(row.image_id),
        frames=frames,
        boxes=boxes,
        asr=row.asr,
        category=row.category,
        product_scale=row.product_scale,
        visible_duration=row.visible_duration,
        product_number=row.product_number,
    )


class _TestSet:
    """The published test files, read once for one view."""

    def __init__(self, root: str, gallery_images: str, problems: ProblemLog):
        self.root = root
        self.problems = problems
        self.files = {what: layout.one_annotation_file(root, name) for what, name in layout.TEST_FILES.items()}
        self.gallery = self._read_gallery(gallery_images)

    def _read_gallery(self, gallery_images: str) -> dict[str, list[str]]:
        """Return live id -> the ids of the images in use, in the published order, each once."""
        file = self.files["gallery"]
        gallery = layout.read_id_lists(file, "live id")
        for live_id, image_ids in gallery.items():
            gallery[live_id] = list(dict.fromkeys(image_ids))
            if len(gallery[live_id]) != len(image_ids):
                self.problems.add(live_id, file, None, "of livestreams that list an image twice; the first one counts")
        if gallery_images == "all":
            return gallery
        listed = layout.annotation_files(self.root, layout.MAIN_IMAGES_FILE)
        if listed:
            main = layout.read_main_images(listed[0])
        elif any(layout.shot_number(image_id) is not None for ids in gallery.values() for image_id in ids):
            main = {image_id for ids in gallery.values() for image_id in ids if layout.shot_number(image_id) == "0"}
        else:
            return gallery
        return {live_id: [image_id for image_id in ids if image_id in main] for live_id, ids in gallery.items()}

    def gallery_rows(self):
        """Yield the gallery rows, livestream by livestream in the published order."""
        titles = layout.read_id_table(self.files["title"], 2, "image id")
        for live_id, image_ids in self.gallery.items():
            for image_id in image_ids:
                yield {
                    "image_id": image_id,
                    "live_id": live_id,
                    "image": osp.join(self.root, "gallery", live_id, f"{image_id}.jpg"),
                    "title": titles.get(image_id, [""])[0],
                }

    def query_rows(self):
        """Yield the query rows in the order of the ground truth file."""
        asr = layout.read_id_table(self.files["asr"], 2, "clip id")
        boxes = layout.read_test_boxes(self.files["boxes"])
        attribute_files = layout.annotation_files(self.root, layout.ATTRIBUTES_FILE)
        attributes = layout.read_id_table(attribute_files[0], 5, "clip id") if attribute_files else {}
        for clip_id, image_ids in layout.read_id_lists(self.files["relevant"], "clip id").items():
            try:
                live_id = layout.live_id_of(clip_id)
            except ValueError as error:
                raise ValueError(f"{self.files['relevant']}: {error}; repair the entry.") from None
            relevant = self._relevant(clip_id, live_id, image_ids)
            frames, frame_boxes = self._frames(clip_id, boxes.get(clip_id, {}))
            category, scale, duration, number = attributes.get(clip_id, [""] * 4)
            clip = clip_row(
                clip_id=clip_id,
                live_id=live_id,
                product_id=layout.product_id_of(relevant[0]) if relevant else "",
                frames=frames,
                boxes=frame_boxes,
                asr=asr.get(clip_id, [""])[0],
                category=category,
                product_scale=scale,
                visible_duration=duration,
                product_number=number,
            )
            yield {**clip, "relevant": relevant}

    def _relevant(self, clip_id: str, live_id: str, image_ids: list[str]) -> list[str]:
        """Return the gallery images of the annotated products; the annotated ids where the gallery has none."""
        gallery = self.gallery.get(live_id)
        if not gallery:
            raise ValueError(
                f"{self.files['gallery']}: the livestream {live_id} of the clip {clip_id} has an empty gallery; "
                'add its images, or use gallery_images="all" if only main images are missing.'
            )
        products = {layout.product_id_of(image_id) for image_id in image_ids}
        relevant = [image_id for image_id in gallery if layout.product_id_of(image_id) in products]
        if not relevant:
            reason = "kept although no relevant image is in their gallery, so they count as misses"
            self.problems.add(clip_id, self.files["relevant"], None, reason)
        return relevant or image_ids

    def _frames(self, clip_id: str, boxes: dict[str, list[float] | None]):
        """Return a test clip's frame paths and boxes; its folder's listing is the only list of its frames."""
        folder = osp.join(self.root, "query", clip_id)
        names = parsing.list_names(folder)
        if not names:
            # The boxes name some frames: with their paths, whoever decodes the row can say what is missing.
            names = [f"{frame_id}.jpg" for frame_id in boxes]
            reason = "kept although their query folder has no frames, so they count as misses"
            self.problems.add(clip_id, folder, None, reason)
        names.sort(key=layout.frame_order)
        return [osp.join(folder, name) for name in names], [boxes.get(osp.splitext(name)[0]) for name in names]

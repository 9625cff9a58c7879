"""`datasets` builder for the published files of LPR4M, and for the rendered mini LPR4M in the same layout.

Source: "Cross-view Semantic Alignment for Livestreaming Product Recognition" (RICE, ICCV 2023), section 3. The layout
and the columns are described in docs/data.md.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from os import path as osp

import datasets

from .. import folders, parsing
from ..builder import ProblemLog, ViewBuilder, ViewConfig
from ..detection import detection_row
from ..features import clip_row
from . import layout
from .evaluation_rows import EvaluationRows
from .index import list_stats, shard_folders
from .media import Lpr4mMedia, training_video_folders
from .subset import Subset, choose_subset

SPLITS = {"train": datasets.Split.TRAIN, "validation": datasets.Split.VALIDATION, "test": datasets.Split.TEST}
VIEWS = ("pairs", "query", "gallery", "detection")
HELD_OUT = "left out of training because a validation livestream sells their product"
NO_FRAMES = "left out because they have no frames"


@dataclass(eq=False)
class Lpr4mConfig(ViewConfig):
    """Options of `Lpr4m`.

    Attributes:
        train_files: file name pattern of the training list in ``annotations/``.
        validation_fraction: share of the training livestreams that are held out as the validation split, at least 0
            and below 1; above 0 it holds out at least one livestream. Ignored if ``validation_lives`` is given.
        validation_lives: number of livestreams to hold out, or a list of their live ids.
        gallery_images: "main" for one image per product as in the official runs, "all" for every image.
        subset: number of training rows to keep by thinning the largest categories; None keeps all.
        subset_seed: seed that decides which rows of a thinned category are kept.
        media_dirs: output folders of img2dataset; those below ``img2dataset/`` of the data folder when None.
        empty_frames: whether the ``detection`` view includes the frames without a box, with an empty list, of clips
            that have boxes (the published detection set counts them).
    """

    train_files: str = "training_videoinfo*.txt"
    validation_fraction: float = 0.0
    validation_lives: int | list[str] | None = None
    gallery_images: str = "main"
    subset: int | None = None
    subset_seed: int = 0
    media_dirs: list[str] | None = None
    empty_frames: bool = False

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
        if self.subset is not None and (type(self.subset) is not int or self.subset < 1):
            raise ValueError(f"subset must be a number of rows, at least 1, not {self.subset!r}.")
        if type(self.subset_seed) is not int:
            raise ValueError(f"subset_seed must be a whole number, not {self.subset_seed!r}.")
        self._validate_media_dirs()

    def _validate_media_dirs(self) -> None:
        if self.media_dirs is None:
            return
        if isinstance(self.media_dirs, str) or not all(isinstance(name, str) for name in self.media_dirs):
            raise ValueError(f"media_dirs must be a list of folders, not {self.media_dirs!r}.")
        for folder in self.media_dirs:
            if not osp.isdir(folder):
                raise FileNotFoundError(f"The folder {folder} of media_dirs does not exist; check the path.")

    @property
    def holds_out(self) -> bool:
        """Whether a validation split is held out of the training list."""
        return bool(self.validation_lives if self.validation_lives is not None else self.validation_fraction)

    def source_paths(self) -> list[str]:
        """See `ViewConfig.source_paths`: annotation files, shards, and the folders of the frames."""
        paths = layout.annotation_files(self.data_dir, "*")
        for folder in self.media_dirs if self.media_dirs is not None else shard_folders(self.data_dir):
            paths += [folder, *list_stats(folder)]
        if self.name != "gallery":
            paths += training_video_folders(self.data_dir)
        if self.name in ("query", "detection"):
            query = osp.join(self.data_dir, "query")
            paths += [osp.join(query, name) for name in folders.list_names(query, folders=True, root=self.data_dir)]
        return paths


class Lpr4m(ViewBuilder):
    """LPR4M as pairs (train, validation), queries (validation, test), gallery and detection (all splits).

    Media are looked up in img2dataset's output and in the LPR750K tree. A missing media file or folder is not an error
    here: the row keeps its path. LPR4M publishes no validation split; see `Lpr4mConfig.validation_fraction`. Training
    rows of a product that a held-out livestream also sells are left out, counted and listed. The effect of ``subset``
    per category is in ``subset.json`` beside the Arrow files and in `subset_report`.

    Example:
        >>> builder = Lpr4m("pairs", data_dir="data/mini_lpr4m", validation_lives=3)
        >>> builder.download_and_prepare()
        >>> train = builder.as_dataset(split="train")
    """

    BUILDER_CONFIG_CLASS = Lpr4mConfig
    BUILDER_CONFIGS = [Lpr4mConfig(name=view) for view in VIEWS]

    def _split_generators(self, dl_manager):
        root, config = self.config.data_dir, self.config
        train_files = tuple(layout.training_files(root, config.train_files))
        if config.holds_out and not train_files:
            raise FileNotFoundError(
                f"{osp.join(root, 'annotations', config.train_files)} does not exist, but the validation split is "
                "held out of it; put the training list there or set validation_fraction to 0."
            )
        splits = self.source_splits()
        if not splits:
            raise FileNotFoundError(self.missing_source_reason())
        held_lives, held_products = self._held_out(train_files)
        source = {"train_files": train_files, "held_lives": held_lives, "held_products": held_products}
        return [datasets.SplitGenerator(name=SPLITS[split], gen_kwargs={"split": split, **source}) for split in splits]

    def source_splits(self) -> list[str]:
        """Return the splits of the view that have annotation files."""
        root, config = self.config.data_dir, self.config
        train_files = layout.training_files(root, config.train_files)
        splits = []
        if train_files and self.view != "query":
            splits.append("train")
        if train_files and config.holds_out:
            splits.append("validation")
        if self.view != "pairs" and any(layout.annotation_files(root, name) for name in layout.TEST_FILES.values()):
            splits.append("test")
        return splits

    def missing_source_reason(self) -> str:
        """Return one sentence on why the view has no split and what to do."""
        root, config = self.config.data_dir, self.config
        wanted = config.train_files if self.view == "pairs" else layout.TEST_FILES["relevant"]
        missing = f"{osp.join(root, 'annotations', wanted)} does not exist"
        if self.view == "query" and layout.training_files(root, config.train_files):
            return (
                f"{missing}, and LPR4M publishes no validation split; put the test files there, or set "
                "validation_fraction to hold out whole livestreams of the training list."
            )
        return f"{missing}; put the file there."

    def missing_split_reason(self, split: str) -> str:
        """See `ViewBuilder.missing_split_reason`."""
        annotations = osp.join(self.config.data_dir, "annotations")
        if split == "validation":
            return (
                f"{annotations} has no validation split, because LPR4M publishes none; pass validation_fraction or "
                "validation_lives to hold out whole livestreams of the training list."
            )
        if (self.view, split) in (("pairs", "test"), ("query", "train")):
            return f"LPR4M has no {split} {self.view}; pairs come from the training list, queries from the test files."
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
                    f"validation_lives lists {unknown[0]!r}, which is not in {train_files[0]}; check the id."
                )
            lives = frozenset(config.validation_lives)
        else:
            count = config.validation_lives
            if count is None:
                count = max(1, round(config.validation_fraction * len(products)))
            lives = layout.choose_livestreams(list(products), count)
        if len(lives) >= len(products):
            raise ValueError(
                f"The validation split would hold out {len(lives)} of the {len(products)} livestreams in "
                f"{train_files[0]}; hold out fewer, so that some remain for training."
            )
        return lives, frozenset().union(*(products[live_id] for live_id in lives))

    @property
    def subset_report(self) -> dict[str, dict[str, int]]:
        """Per category ``{"rows", "kept"}`` of the training split, {} without ``subset``.

        Available after `download_and_prepare`.
        """
        path = osp.join(self._output_dir, "subset.json")
        if not osp.isfile(path):
            return {}
        with open(path, encoding="utf-8") as file:
            return json.load(file)

    def generate_rows(self, split: str, problems: ProblemLog, **source):
        """See `ViewBuilder.generate_rows`."""
        media = Lpr4mMedia(self.config.data_dir, self._cache_dir_root, self.config.media_dirs)
        for path, reason in media.shard_problems:
            problems.add(path, path, None, f"of img2dataset's shards are left out: {reason}")
        if split == "test":
            test = EvaluationRows(self.config.data_dir, self.config.gallery_images, media, problems)
            if self.view == "detection":
                yield from test.detection_rows(self.config.empty_frames)
            else:
                yield from test.query_rows() if self.view == "query" else test.gallery_rows()
            return
        rows = {
            "pairs": self._pairs,
            "query": self._validation_queries,
            "gallery": self._training_gallery,
            "detection": self._training_detection,
        }[self.view]
        yield from rows(split, media, problems, **source)

    def _split_rows(self, split, problems, train_files, held_lives, held_products):
        """Yield the training rows of ``split``, noting rows of held-out products in ``problems``."""
        subset = self._choose_subset(train_files, held_lives, held_products) if split == "train" else None
        for file, line, row in layout.read_training_rows(train_files):
            if (row.live_id in held_lives) != (split == "validation"):
                continue
            if split == "train" and layout.product_id_of(row.image_id) in held_products:
                problems.add(row.clip_id, file, line, HELD_OUT)
                continue
            if subset is None or subset.keeps(row.category, row.clip_id):
                yield file, line, row

    def _choose_subset(self, train_files, held_lives, held_products) -> Subset | None:
        """Thin the training rows to the budget, and write the counts per category."""
        if self.config.subset is None:
            return None
        rows = (
            (row.category, row.clip_id)
            for _, _, row in layout.read_training_rows(train_files)
            if row.live_id not in held_lives and layout.product_id_of(row.image_id) not in held_products
        )
        subset = choose_subset(rows, self.config.subset, self.config.subset_seed)
        if self._output_dir.endswith(".incomplete") and osp.isdir(self._output_dir):
            with open(osp.join(self._output_dir, "subset.json"), "w", encoding="utf-8") as file:
                json.dump(subset.report, file, ensure_ascii=False, indent=1, allow_nan=False)
        return subset

    def _pairs(self, split: str, media: Lpr4mMedia, problems: ProblemLog, **source):
        for file, line, row in self._split_rows(split, problems, **source):
            if not row.frame_ids:
                problems.add(row.clip_id, file, line, NO_FRAMES)
                continue
            yield pair_row(media, file, line, row, problems)

    def _training_detection(self, split: str, media: Lpr4mMedia, problems: ProblemLog, **source):
        # The pairs view reports the rows that a split leaves out; here they would only be counted twice.
        for file, line, row in self._split_rows(split, ProblemLog(None), **source):
            if not any(any(box) for box in row.boxes):
                continue
            clip = _training_clip(media, file, line, row, problems)
            for frame_id, path, box in zip(row.frame_ids, clip["frames"], clip["boxes"], strict=True):
                if box is not None or (self.config.empty_frames and any(clip["boxes"])):
                    yield detection_row(
                        frame_id=frame_id,
                        clip_id=row.clip_id,
                        live_id=row.live_id,
                        image=path,
                        boxes=[] if box is None else [box],
                        category=row.category,
                        split=split,
                    )

    def _training_gallery(self, split: str, media: Lpr4mMedia, problems: ProblemLog, **source):
        seen: set[tuple[str, str]] = set()
        # The pairs view reports the rows that a split leaves out; here they would only be counted twice.
        for _, _, row in self._split_rows(split, ProblemLog(None), **source):
            if (row.live_id, row.image_id) not in seen:
                seen.add((row.live_id, row.image_id))
                yield {
                    "image_id": row.image_id,
                    "live_id": row.live_id,
                    "image": media.training_image(row.image_id),
                    "title": row.title,
                }

    def _validation_queries(self, split: str, media: Lpr4mMedia, problems: ProblemLog, **source):
        images: dict[tuple[str, str], list[str]] = defaultdict(list)
        for _, _, row in self._split_rows(split, problems, **source):
            shown = images[row.live_id, layout.product_id_of(row.image_id)]
            if row.image_id not in shown:
                shown.append(row.image_id)
        for file, line, row in self._split_rows(split, problems, **source):
            if not row.frame_ids:
                problems.add(row.clip_id, file, line, "kept without frames, so they count as misses")
            clip = _training_clip(media, file, line, row, problems)
            others = [other for other in images[row.live_id, clip["product_id"]] if other != row.image_id]
            yield {**clip, "relevant": [row.image_id, *others]}


def pair_row(media: Lpr4mMedia, file: str, line: int, row: layout.TrainingRow, problems: ProblemLog) -> dict:
    """Return the ``pairs`` row of a training row; its problems are added to ``problems``."""
    return {
        **_training_clip(media, file, line, row, problems),
        "image_id": row.image_id,
        "image": media.training_image(row.image_id),
        "title": row.title,
    }


def _training_clip(media: Lpr4mMedia, file: str, line: int, row: layout.TrainingRow, problems: ProblemLog) -> dict:
    """Return the clip columns of a training row, with its pixel boxes turned into fractions of the frame."""
    frames = media.training_clip(row.clip_id, row.frame_ids)
    if row.frame_ids and not frames.found:
        problems.add(row.clip_id, file, line, "kept although no folder or shard holds their frames")
    boxes: list[list[float] | None] = [None] * len(frames.paths)
    if any(any(box) for box in row.boxes):
        size = frames.pixel_size()
        if size is None:
            problems.add(row.clip_id, file, line, "kept without boxes, because the size of the frames is unknown")
        else:
            boxes = [parsing.clip_box(box, *size) for box in row.boxes]
            if any(box is None and any(pixels) for box, pixels in zip(boxes, row.boxes)):
                problems.add(row.clip_id, file, line, layout.BOXES_LEFT_OUT)
    return clip_row(
        clip_id=row.clip_id,
        live_id=row.live_id,
        product_id=layout.product_id_of(row.image_id),
        frames=frames.paths,
        boxes=boxes,
        asr=row.asr,
        category=row.category,
        product_scale=row.product_scale,
        visible_duration=row.visible_duration,
        product_number=row.product_number,
    )

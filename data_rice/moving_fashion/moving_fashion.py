"""`datasets` builder for MovingFashion's published layout: ``train.json``, ``test.json``, ``videos/``, ``imgs/``.

    python -m data_rice.moving_fashion prepare DIR     # extracts the frames once, see prepare.py

Source: "MovingFashion: a Benchmark for the Video-to-Shop Challenge" (WACV 2022). docs/data.md describes the layout.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from os import path as osp

import datasets

from processing_rice import MediaError
from processing_rice.video_media_rice import probe_video

from .. import parsing
from ..builder import ProblemLog, ViewBuilder, ViewConfig
from ..features import clip_row
from . import layout
from .prepare import UNDECODABLE, ExtractedFrames, missing_reason

NO_BOXES = "without boxes, because their tracklets are in an unknown notation or do not fit the video"
SPLITS = {"train": datasets.Split.TRAIN, "validation": datasets.Split.VALIDATION, "test": datasets.Split.TEST}


@dataclass(eq=False)
class MovingFashionConfig(ViewConfig):
    """Options of `MovingFashion`.

    Attributes:
        validation_fraction: share of the training products that are held out as the validation split, at least 0 and
            below 1; above 0 it holds out at least one product.
        frames_dir: folder of the extracted frames; ``frames`` inside the data folder when None. If the folder does not
            exist, clips are sampled from the video files.
    """

    validation_fraction: float = 0.0
    frames_dir: str | None = None

    def validate(self) -> None:
        """See `ViewConfig.validate`."""
        super().validate()
        if not parsing.is_number(self.validation_fraction) or not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be at least 0 and below 1, not {self.validation_fraction!r}.")
        if self.frames_dir is not None and not osp.isdir(self.frames_dir):
            raise FileNotFoundError(
                f"frames_dir {self.frames_dir} does not exist; extract the frames with "
                f"python -m data_rice.moving_fashion prepare {self.data_dir} --output {self.frames_dir}"
            )

    @property
    def frames_folder(self) -> str:
        """The folder of extracted frames."""
        return osp.abspath(self.frames_dir or osp.join(self.data_dir, "frames"))

    def source_paths(self) -> list[str]:
        """See `ViewConfig.source_paths`: annotations, the media folders' listings, and the manifest of the frames."""
        names = [*layout.ANNOTATIONS.values(), "videos", "imgs"]
        return [
            *(osp.join(self.data_dir, name) for name in names),
            ExtractedFrames.manifest_path(self.frames_folder),
            self.frames_folder,
        ]


class MovingFashion(ViewBuilder):
    """MovingFashion as pairs (train, validation), queries (validation, test) and gallery (train, validation, test).

    A clip is one video of a product. A product may have several videos, and a video may belong to several products.
    The image id is the picture's path; products that share a picture are one product. ``source`` is "regular" or
    "hard".

    A clip with a missing picture, or a video that is missing or without extracted frames, is left out of training. As
    a query it is kept and counts as a miss. Tracklets in an unknown notation, or that do not fit the video, give no
    boxes. All these clips are counted and listed. There is no published validation split; see
    `MovingFashionConfig.validation_fraction`. Training rows with a video of a held-out product are left out.

    Example:
        >>> builder = MovingFashion("pairs", data_dir="data/moving_fashion", validation_fraction=0.05)
        >>> builder.download_and_prepare()
        >>> train = builder.as_dataset(split="train")
    """

    BUILDER_CONFIG_CLASS = MovingFashionConfig
    BUILDER_CONFIGS = [MovingFashionConfig(name=view) for view in ("pairs", "query", "gallery")]

    def _split_generators(self, dl_manager):
        root, config = self.config.data_dir, self.config
        names = {split for split, file in layout.ANNOTATIONS.items() if osp.isfile(osp.join(root, file))}
        splits = []
        if "train" in names and self.view != "query":
            splits.append("train")
        if config.validation_fraction:
            splits.append("validation")
        if "test" in names and self.view != "pairs":
            splits.append("test")
        if not splits:
            wanted = osp.join(root, layout.ANNOTATIONS["train" if self.view == "pairs" else "test"])
            raise FileNotFoundError(f"{wanted} does not exist; put the annotation file there.")
        return [datasets.SplitGenerator(name=SPLITS[split], gen_kwargs={"split": split}) for split in splits]

    def missing_split_reason(self, split: str) -> str:
        """See `ViewBuilder.missing_split_reason`."""
        root = self.config.data_dir
        if split == "validation":
            return (
                f"{root} has no validation split, because MovingFashion publishes none; pass validation_fraction to "
                "hold out products of the training list."
            )
        if (self.view, split) in (("pairs", "test"), ("query", "train")):
            return f"MovingFashion has no {split} {self.view}; pairs come from train.json, queries from test.json."
        return f"{osp.join(root, layout.ANNOTATIONS[split])} does not exist, so there is no {split} split."

    def generate_rows(self, split: str, problems: ProblemLog):
        """See `ViewBuilder.generate_rows`."""
        root = self.config.data_dir
        file = osp.join(root, layout.ANNOTATIONS["test" if split == "test" else "train"])
        products = layout.read_products(root, "test" if split == "test" else "train", strict=False)
        held_out = self._held_out(products) if split != "test" else frozenset()
        chosen = [product for product in products if (product.product_id in held_out) == (split == "validation")]
        if self.view == "gallery":
            for image in dict.fromkeys(product.image for product in chosen):
                yield {"image_id": image, "live_id": "", "image": osp.join(root, image), "title": ""}
            return
        held_videos = frozenset(
            video for product in products if product.product_id in held_out for video in product.videos
        )
        media = _Media(root, self.config.frames_folder, chosen)
        for product in chosen:
            if not product.videos:
                problems.add(product.key, file, None, "left out because video_paths is empty")
            for index, video in enumerate(product.videos):
                clip_id = product.clip_id(index)
                if split == "train" and video in held_videos:
                    problems.add(clip_id, file, None, "left out because the video also shows a held-out product")
                    continue
                tracklet, boxes_read = product.tracklets[index] or {}, product.tracklets_read
                try:
                    clip, usable, reason = media.clip(product, index, tracklet)
                except ValueError:
                    clip, usable, reason = media.clip(product, index, {})
                    boxes_read = False
                if not boxes_read:
                    problems.add(clip_id, file, None, NO_BOXES)
                if self.view == "pairs" and not osp.isfile(osp.join(root, product.image)):
                    usable, reason = False, "the shop's picture is missing"
                if self.view == "query":
                    outcome = "kept" if usable else "kept as misses"
                    row = {**clip, "relevant": [product.image]}
                else:
                    outcome = "kept" if usable else "left out"
                    image = osp.join(root, product.image)
                    row = {**clip, "image_id": product.image, "image": image, "title": ""} if usable else None
                if reason:
                    problems.add(clip_id, file, None, f"{outcome}: {reason}")
                if row:
                    yield row

    def _held_out(self, products: list[layout.Product]) -> frozenset[str]:
        fraction = self.config.validation_fraction
        if not fraction:
            return frozenset()
        ids = list(dict.fromkeys(product.product_id for product in products))
        held_out = layout.choose_products(ids, max(1, round(fraction * len(ids))))
        if len(held_out) >= len(ids):
            raise ValueError(
                f"validation_fraction {fraction} holds out all {len(ids)} products of "
                f"{osp.join(self.config.data_dir, layout.ANNOTATIONS['train'])}; lower it."
            )
        return held_out


class _Media:
    """Turns a product's video into the columns of a clip, from extracted frames if they exist."""

    def __init__(self, root: str, frames_folder: str, products: Iterable[layout.Product]):
        self.root = root
        self.frames = None
        if osp.isdir(frames_folder):
            self.frames = ExtractedFrames.read(frames_folder)
            self.frames.check(root, (video for product in products for video in product.videos))

    def clip(self, product: layout.Product, index: int, tracklet: layout.Tracklet) -> tuple[dict, bool, str]:
        """Return the clip's columns, whether it can be used, and the problem of its video ("" if there is none).

        Raises:
            ValueError: the boxes of the tracklet do not fit the video's frames.
        """
        video = product.videos[index]
        if self.frames is None:
            where, reason = self._video(video, tracklet)
        else:
            where, reason = self._frames(video, tracklet), self.frames.problems.get(video, "")
        usable = bool(where["frames"]) or (self.frames is None and not reason)
        clip_id = product.clip_id(index)
        return clip_row(clip_id=clip_id, product_id=product.product_id, source=product.source, **where), usable, reason

    def _frames(self, video: str, tracklet: layout.Tracklet) -> dict:
        entry = self.frames.clips.get(video)
        if entry is None:
            return {"frames": [], "boxes": []}
        in_pixels = not all(map(layout.in_fractions, tracklet.values()))
        boxes = layout.normalise_tracklet(tracklet, (entry.width, entry.height) if in_pixels else None)
        return {"frames": self.frames.paths(video), "boxes": [boxes.get(number) for number in entry.frames]}

    def _video(self, video: str, tracklet: layout.Tracklet) -> tuple[dict, str]:
        path = osp.join(self.root, video)
        where = {"frames": [], "boxes": [], "video": path}
        if not osp.isfile(path):
            return where, missing_reason(video)
        size = None
        if not all(map(layout.in_fractions, tracklet.values())):
            try:
                size = probe_video(path)[:2]
            except MediaError:
                return where, UNDECODABLE
        boxes = layout.normalise_tracklet(tracklet, size)
        return where | {"boxes": list(boxes.values()), "box_frames": list(boxes)}, ""

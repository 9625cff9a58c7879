"""Fills the feature caches of a run: all pictures go through the frozen encoder once."""

import dataclasses
import hashlib
import json
import logging
import shutil
from collections import deque
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, config
from torch import Tensor

from data_rice.collator import Failure, RiceCollator
from data_rice.decoding import normalize_pixels
from evaluation_rice.retrieval import Loading
from hub_rice.cores import map_on_cores
from modeling_rice import RiceModel
from modeling_rice.encoders_rice import ORIGIN_FIELDS

from .arguments import DataArguments, RiceTrainingArguments
from .feature_cache import CachedRow, FeatureCache
from .feature_cache_batches import CachedCollator, with_numbers
from .feature_cache_rows import CachedPart, ViewChanges, distinct_images
from .processes import failing_together
from .setup import Validation, recomputes

logger = logging.getLogger(__name__)

# Rows per read.
_ROWS = 8
# Pictures per batch of the encoder. On a CPU few, so that intermediate results stay in its caches.
_PICTURES, _PICTURES_ON_CPU = 128, 8
_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def check_caching(data: DataArguments, training: RiceTrainingArguments, model: RiceModel) -> None:
    """Raises `ValueError` with the name of the argument if training cannot use cached features."""
    changes_pictures = (
        data.augment_crop < 1 or max(data.augment_flip, data.augment_jitter, data.augment_background) > 0
    )
    refusals = (
        (data.streaming, "streaming reads rows on demand, but the cache reads all of them in advance"),
        (data.frame_sampling == "visible", "frame_sampling visible needs boxes, which the cache does not store"),
        (
            data.use_boxes and data.frames_without_box == "drop",
            "frames_without_box drop depends on the frames of a step, but the cache encodes frames in advance",
        ),
        (
            data.use_boxes and not model.config.mask_padded_frames,
            "mask_padded_frames false encodes padded frames, which the cache does not have",
        ),
        (
            data.use_boxes and training.unfreeze_last_stage and not model.config.patch_mask_pooling,
            "use_boxes masks patches inside the encoder, of which unfreeze_last_stage runs the last stage alone; both "
            "need model.patch_mask_pooling true",
        ),
        (
            training.unfreeze_last_stage and recomputes(training),
            "activation_checkpointing recomputes a stage from what the stage before it gives, which does not run with "
            "unfreeze_last_stage",
        ),
    )
    for wrong, reason in refusals:
        if wrong:
            raise ValueError(f"cache_vision_features: {reason}; leave one of them out.")
    if changes_pictures and training.cached_views == 1:
        raise ValueError(
            "cache_vision_features encodes pictures once, so augment_crop, augment_flip, augment_jitter and "
            "augment_background need several views of each: set cached_views, e.g. to 8, or leave them out."
        )
    if training.cached_views > 1 and not changes_pictures:
        raise ValueError(
            f"cached_views {training.cached_views} would give equal views; set augment_crop, "
            f"augment_flip, augment_jitter or augment_background, or leave cached_views out."
        )


def cache_features(
    model: RiceModel,
    pairs: Dataset,
    validation: Validation | None,
    collators: tuple[RiceCollator, RiceCollator],
    data: DataArguments,
    training: RiceTrainingArguments,
) -> tuple[Dataset, Validation | None, CachedCollator, CachedCollator]:
    """
    Encodes all pictures of a run that are not cached yet. All processes must call it; each encodes a share.

    Args:
        model: A model with a frozen encoder.
        pairs, validation: Results of `load_views`.
        collators: Results of `build_collators`.
        data, training: Arguments of the run.

    Returns:
        Pairs, validation and the two collators to use instead.

    Raises:
        ValueError: an argument is incompatible with a cache, see `check_caching`, or the disk is too small.
        OSError: the cache cannot be written.
    """
    check_caching(data, training, model)
    if training.unfreeze_last_stage:
        model.split_last_stage()
    encoder = _Encoder(model, training)
    pairs_collator, eval_collator = collators
    views, changes, augmentation = training.cached_views, None, None
    if views > 1:
        # Frames are dropped at each step.
        augmentation = dataclasses.replace(pairs_collator.augmentation, frame_drop=0.0)
        changes = ViewChanges(augmentation, training.seed)
    plain = dataclasses.replace(
        pairs_collator, sampling="eval", num_frames=training.cached_frames, augmentation=augmentation, failure_log=None
    )
    images, image_numbers = distinct_images(pairs)
    parts = [CachedPart("clips", pairs, plain, changes, views), CachedPart("images", images, plain, changes, views)]
    if validation is not None:
        queries, gallery, scope = validation
        parts += [CachedPart("clips", queries, eval_collator), CachedPart("images", gallery, eval_collator)]
    parent = Path(data.cache_dir or config.HF_DATASETS_CACHE) / "rice_features"
    caches = [
        FeatureCache(parent, part.kind, encoder.about | part.about(), len(part.rows), part.num_views) for part in parts
    ]
    encoder.fill(parts, caches)
    drops = pairs_collator.augmentation if data.augment_frame_drop else None
    collator = CachedCollator.of(pairs_collator, caches[0], caches[1], augmentation=drops)
    pairs = with_numbers(pairs, image_numbers)
    if validation is None:
        return pairs, None, collator, collator
    validation = with_numbers(queries), with_numbers(gallery, range(len(gallery))), scope
    return pairs, validation, collator, CachedCollator.of(eval_collator, caches[2], caches[3])


class _Encoder:
    """
    The frozen encoder of a model, or its frozen stages.

    Args:
        model: The model, which is moved to the run's device.
        training: Arguments of the run.
    """

    def __init__(self, model: RiceModel, training: RiceTrainingArguments):
        self.model, self.training = model.to(training.device), training
        config = model.config
        self.precision = training.cached_precision
        vision = {name: value for name, value in config.vision_config.to_dict().items() if name not in ORIGIN_FIELDS}
        settings, frozen = [vision], model.vision_model.state_dict()
        if model.last_stage is None:
            settings += [config.feature_pooling, config.vision_feature_layer, config.patch_mask_pooling]
        else:
            # The inputs of the last stage do not depend on the later use of its outputs.
            settings += [config.vision_feature_layer] if "patches" in model.kept_states else []
            frozen = {name: tensor for name, tensor in frozen.items() if not model.last_stage.owns(name)}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, tensor in frozen.items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        self.about = {
            "encoder": digest.hexdigest(),
            "set of states": str(model.kept_states),
            "precision": self.precision,
        }

    def fill(self, parts: list[CachedPart], caches: list[FeatureCache]) -> None:
        """Encodes this process's share of the missing blocks; returns when all processes are done."""
        # No process writes before all have read what is missing, so that their shares fit together.
        with failing_together():
            todo = [
                (part, cache, view, blocks)
                for part, cache in zip(parts, caches, strict=True)
                for view in range(cache.num_views)
                if (blocks := cache.missing(view))
            ]
        rank, step = self.training.process_index, self.training.world_size
        # Training sets its own mode.
        self.model.eval()
        with failing_together():
            if todo:
                self._announce(todo)
            for part, cache, view, blocks in todo:
                cache.begin()
                self._fill_view(part, cache, view, blocks[rank::step])
        lacking = [cache.folder for cache in caches for view in range(cache.num_views) if cache.missing(view)]
        if lacking:
            raise ValueError(f"{lacking[0]} lacks files of other processes; name a shared folder with cache_dir.")

    def _announce(self, todo: list[tuple[CachedPart, FeatureCache, int, list[int]]]) -> None:
        """Logs what will be encoded, why, and its size on disk; raises `ValueError` if the disk is too small."""
        pictures = 0
        for part, cache, _, blocks in todo:
            rows = sum(len(cache.rows_of(block)) for block in blocks)
            pictures += -(-part.num_pictures() * rows // len(part.rows))
        empty = self._no_picture(todo[0][0])
        size, parent = pictures * empty.element_size() * empty.shape[1], todo[0][1].folder.parent
        for cache in dict.fromkeys(cache for _, cache, _, _ in todo):
            if not cache.folder.exists() and (reason := cache.why_others_do_not_fit()):
                logger.info("%s: the pictures of this run's %s are encoded again.", reason, cache.kind)
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        logger.info(
            "Up to %s pictures go through the encoder once; their encodings, %s bytes in %s, are stored in %s.",
            *(f"{pictures:,}", f"{size:,}", self.precision, parent),
        )
        if size > free:
            raise ValueError(
                f"cache_vision_features needs {size:,} bytes, and {parent} has {free:,} free; make room, or name "
                f"another folder with cache_dir."
            )

    def _no_picture(self, part: CachedPart) -> Tensor:
        """Empty encodings, `(0, F)`."""
        blank = torch.zeros(3, 8, 8, dtype=torch.uint8)
        return self._encode(dict(part.collator.processor(images=[blank])), part)[:0]

    def _fill_view(self, part: CachedPart, cache: FeatureCache, view: int, blocks: list[int]) -> None:
        numbers = [row for block in blocks for row in cache.rows_of(block)]
        loading = Loading(_ROWS, self.training.dataloader_num_workers, quiet=self.training.disable_tqdm)
        title = f"encoding {part.kind}" + (f", view {view + 1} of {cache.num_views}" if cache.num_views > 1 else "")
        asked = (numbers[start : start + _ROWS] for start in range(0, len(numbers), _ROWS))
        read = zip(asked, loading.batches(part.rows, numbers, partial(part.load, view), title), strict=True)
        waiting, encoded = deque(blocks), {}
        for rows in map_on_cores(partial(self._encode_rows, part), read, self.training.device):
            encoded |= rows
            while waiting and cache.rows_of(waiting[0])[-1] in encoded:
                block = waiting.popleft()
                cache.write(view, block, [encoded.pop(row) for row in cache.rows_of(block)])

    def _encode_rows(
        self, part: CachedPart, read: tuple[list[int], tuple[list[int], dict[str, Tensor], list[Failure]]]
    ) -> dict[int, CachedRow]:
        """Row number -> cached row, for the numbers of a batch's rows and what `Loading.batches` yields for them."""
        asked, (loaded, inputs, failures) = read
        names = dict(zip(asked, part.rows[asked][part.id_column], strict=True))
        failed = {row: [failure for failure in failures if failure["id"] == names[row]] for row in asked}
        result = {row: CachedRow(self._no_picture(part), None, failed[row]) for row in asked if row not in loaded}
        if not loaded:
            return result
        counts, masks = [1] * len(loaded), [None] * len(loaded)
        if part.kind == "clips":
            real = inputs["frame_mask"]
            counts = real.sum(dim=1).tolist()
            if "patch_mask" in inputs:
                masks = inputs["patch_mask"][real].split(counts)
        states = self._encode(inputs, part).split(counts)
        return result | {row: CachedRow(*kept, failed[row]) for row, *kept in zip(loaded, states, masks, strict=True)}

    @torch.no_grad()
    def _encode(self, inputs: dict[str, Tensor], part: CachedPart) -> Tensor:
        """Pictures of a batch (for clips, all real frames in order) -> `(n, F)` on the CPU."""
        inputs = normalize_pixels(inputs, part.collator.processor)
        pixels, mask = inputs.get("pixel_values"), None
        if pixels is None:
            real = inputs["frame_mask"]
            pixels = inputs["pixel_values_videos"][real]
            mask = inputs["patch_mask"][real] if "patch_mask" in inputs else None
        # The fastest layout for convolutions.
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        encoded, device = [], self.training.device
        step = _PICTURES_ON_CPU if device.type == "cpu" else _PICTURES
        for start in range(0, len(pixels), step):
            chosen = slice(start, start + step)
            some = [None if tensor is None else tensor[chosen].to(device) for tensor in (pixels, mask)]
            states = self.model.encode_pictures(*some)
            encoded.append(states.to(_DTYPES[self.precision]).cpu())
            if states.isfinite().all() and not encoded[-1].isfinite().all():
                raise ValueError(
                    f"cached_precision {self.precision} cannot hold the encoder's outputs, which reach "
                    f"{states.abs().max().item():.0f}; set it to fp32."
                )
        return torch.cat(encoded)

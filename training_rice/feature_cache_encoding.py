"""Pictures go through a frozen encoder once: what the caches of a run hold, and the pass that fills them."""

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
from modeling_rice import RiceModel
from modeling_rice.encoders_rice import ORIGIN_FIELDS

from .arguments import DataArguments, RiceTrainingArguments
from .feature_cache import CachedRow, FeatureCache
from .feature_cache_batches import CachedCollator, with_numbers
from .feature_cache_rows import CachedPart, ViewChanges, distinct_images
from .processes import failing_together
from .setup import Validation, recomputes

logger = logging.getLogger(__name__)

# Rows that are read at a time.
_ROWS = 8
# Pictures that go through the encoder at a time. On a CPU few, whose intermediate results stay in its caches.
_PICTURES, _PICTURES_ON_CPU = 128, 8
_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def check_caching(data: DataArguments, training: RiceTrainingArguments, model: RiceModel) -> None:
    """Raises `ValueError`, naming the argument, where training cannot go on from what a frozen encoder left."""
    changes_pictures = (
        data.augment_crop < 1 or max(data.augment_flip, data.augment_jitter, data.augment_background) > 0
    )
    refusals = (
        (data.streaming, "streaming reads rows when they are needed, and the cache all of them beforehand"),
        (data.frame_sampling == "visible", "frame_sampling visible asks for boxes, which the cache does not keep"),
        (
            data.use_boxes and data.frames_without_box == "drop",
            "frames_without_box drop looks at the frames that a step has drawn, which the cache has encoded before",
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
            "cache_vision_features encodes pictures once, so that augment_crop, augment_flip, augment_jitter and "
            "augment_background need several views of each: set cached_views, e.g. to 8, or leave them out."
        )
    if training.cached_views > 1 and not changes_pictures:
        raise ValueError(
            f"cached_views {training.cached_views} asks for views that all look the same; set augment_crop, "
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
    Sends all pictures of a run through the model's encoder, as far as they are not cached already; to be called by
    all processes, each of which encodes a share.

    Args:
        model: Whose encoder is frozen.
        pairs, validation: As `load_views` gives them.
        collators: As `build_collators` gives them.
        data, training: Of the run.

    Returns:
        Pairs, validation and the two collators, to be used instead.

    Raises:
        ValueError: for arguments that do not go with a cache, see `check_caching`, or a disk that is too small.
        OSError: when the cache cannot be written.
    """
    check_caching(data, training, model)
    if training.unfreeze_last_stage:
        model.split_last_stage()
    encoder = _Encoder(model, training)
    pairs_collator, eval_collator = collators
    views, changes, augmentation = training.cached_views, None, None
    if views > 1:
        # Frames are left out at each step.
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
        model: Moved to the run's device.
        training: Of the run.
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
            # Whatever is made of it, what enters the last stage is the same.
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
        """Encodes what the caches lack, this process's share of it; returns when all processes have."""
        # No process writes before all have seen what is missing, or their shares would not fit together.
        with failing_together():
            todo = [
                (part, cache, view, blocks)
                for part, cache in zip(parts, caches, strict=True)
                for view in range(cache.num_views)
                if (blocks := cache.missing(view))
            ]
        rank, step = self.training.process_index, self.training.world_size
        # Training puts it in its own mode.
        self.model.eval()
        with failing_together():
            if todo:
                self._announce(todo)
            for part, cache, view, blocks in todo:
                cache.begin()
                self._fill_view(part, cache, view, blocks[rank::step])
        lacking = [cache.folder for cache in caches for view in range(cache.num_views) if cache.missing(view)]
        if lacking:
            raise ValueError(f"{lacking[0]} lacks what other processes wrote; name a folder they share by cache_dir.")

    def _announce(self, todo: list[tuple[CachedPart, FeatureCache, int, list[int]]]) -> None:
        """Says what is about to be encoded, why, and how much room it takes, and refuses a disk that lacks it."""
        pictures = 0
        for part, cache, _, blocks in todo:
            rows = sum(len(cache.rows_of(block)) for block in blocks)
            pictures += -(-part.num_pictures() * rows // len(part.rows))
        empty = self._no_picture(todo[0][0])
        size, parent = pictures * empty.element_size() * empty.shape[1], todo[0][1].folder.parent
        for cache in dict.fromkeys(cache for _, cache, _, _ in todo):
            if not cache.folder.exists() and (reason := cache.why_others_do_not_fit()):
                logger.info("%s: the pictures of this run's %s are encoded anew.", reason, cache.kind)
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        logger.info(
            "Up to %s pictures go through the encoder once; what it makes of them, %s bytes in %s, is kept in %s.",
            *(f"{pictures:,}", f"{size:,}", self.precision, parent),
        )
        if size > free:
            raise ValueError(
                f"cache_vision_features needs {size:,} bytes, and {parent} has {free:,} free; make room, or name "
                f"another place by cache_dir."
            )

    def _no_picture(self, part: CachedPart) -> Tensor:
        """What the encoder makes of no picture, `(0, F)`."""
        blank = torch.zeros(3, 8, 8, dtype=torch.uint8)
        return self._encode(dict(part.collator.processor(images=[blank])), part)[:0]

    def _fill_view(self, part: CachedPart, cache: FeatureCache, view: int, blocks: list[int]) -> None:
        numbers = [row for block in blocks for row in cache.rows_of(block)]
        loading = Loading(_ROWS, self.training.dataloader_num_workers, quiet=self.training.disable_tqdm)
        title = f"encoding {part.kind}" + (f", view {view + 1} of {cache.num_views}" if cache.num_views > 1 else "")
        waiting, encoded, done = deque(blocks), {}, 0
        for loaded, inputs, failures in loading.batches(part.rows, numbers, partial(part.load, view), title):
            asked = numbers[done : done + _ROWS]
            done += len(asked)
            encoded |= self._encode_rows(part, asked, loaded, inputs, failures)
            while waiting and cache.rows_of(waiting[0])[-1] in encoded:
                block = waiting.popleft()
                cache.write(view, block, [encoded.pop(row) for row in cache.rows_of(block)])

    def _encode_rows(
        self, part: CachedPart, asked: list[int], loaded: list[int], inputs: dict[str, Tensor], failures: list[Failure]
    ) -> dict[int, CachedRow]:
        """What the cache keeps of rows, by number; `loaded` are those that `inputs` has pictures of."""
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
        """Pictures of a batch, of clips the real frames one after the other -> `(n, F)` on the CPU."""
        inputs = normalize_pixels(inputs, part.collator.processor)
        pixels, mask = inputs.get("pixel_values"), None
        if pixels is None:
            real = inputs["frame_mask"]
            pixels = inputs["pixel_values_videos"][real]
            mask = inputs["patch_mask"][real] if "patch_mask" in inputs else None
        # The layout in which convolutions are fastest.
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

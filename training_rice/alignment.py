"""Alignment statistics from the frames of a training set (see `modeling_rice.alignment_rice`)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from data_rice.collator import RiceCollator
from evaluation_rice.retrieval import Loading, evaluating
from hub_rice.untrained import MOST_PICTURES
from modeling_rice import RiceModel


def fit_alignment(model: RiceModel, pairs: Sequence[Any], collator: RiceCollator, loading: Loading) -> None:
    """
    Fits the whitening of patches on at most `MOST_PICTURES` frames of evenly spaced training clips; all processes get
    the same numbers. Embeddings are not centred, because training has learnt them.

    Args:
        model: A model with alignment.
        pairs: Training rows.
        collator: Reads them as in evaluation: evenly spaced frames without augmentation.
        loading: Settings for reading.

    Raises:
        ValueError: no frame can be read.
    """
    plain = {"sampling": "eval", "num_frames": None, "augmentation": None, "decode": "exact", "pixels": "float"}
    collator = replace(collator, **plain, use_text=False, asr_noise=0.0, failure_log=None)
    count = min(len(pairs), max(1, MOST_PICTURES // collator.processor.video_processor.num_frames))
    rows = [i * len(pairs) // count for i in range(count)]

    def frames() -> Iterator[Tensor]:
        for _, inputs, _ in loading.batches(pairs, rows, collator.collate_queries, "statistics of frames"):
            if inputs:
                yield inputs["pixel_values_videos"][inputs["frame_mask"]]

    with evaluating(model):
        model.fit_alignment((), frames(), center=False)

"""Statistics of a training set's frames for a model that aligns patches (see `modeling_rice.alignment_rice`)."""

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
    Whitens patches by the frames of training clips, at most `MOST_PICTURES` of clips that are evenly spread; every
    process comes to the same numbers. Embeddings are not centred, since training has learnt what they are.

    Args:
        model: With an alignment.
        pairs: Rows to train on.
        collator: Reads them, here as evaluation reads clips: as many frames, evenly spread, unchanged.
        loading: How they are read.

    Raises:
        ValueError: not one frame can be read.
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

"""Frame sampling: which frames of a clip are used."""

import math
from collections.abc import Sequence

import numpy as np
import torch

# Mode -> how frames are spaced over the clip, and which clips then lose their end at random.
SAMPLING_MODES = {
    "train": ("train", None),
    "eval": ("eval", None),
    "train_random_drop": ("train", "any"),
    "train_random_drop_full": ("train", "full"),
    "eval_random_drop_full": ("eval", "full"),
}


def sample_frame_indices(num_frames: int, max_frames: int, mode: str = "eval") -> list[int]:
    """
    Indices of the frames of a clip that are used, as both official code bases choose them.

    Args:
        num_frames: Number of frames of the clip, >= 1.
        max_frames: Maximum number of frames to keep, >= 1.
        mode: `"train"` spaces frames evenly over the clip including both ends; `"eval"` excludes the end. The other
            modes then drop the end of the clip at random, see [`draw_frame_drop`]. `"train_random_drop"` is training
            in the older official code. `"train_random_drop_full"` is training in the newer one, which drops nothing
            from clips with fewer than `max_frames` frames. `"eval_random_drop_full"` is testing in the newer one.

    Returns:
        Ascending indices; all indices if `num_frames <= max_frames` and nothing is dropped.

    Raises:
        ValueError: for numbers that are not integers or below 1, and for an unknown mode.
    """
    for name, value in (("num_frames", num_frames), ("max_frames", max_frames)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ValueError(f"`{name}` must be an integer, got {value!r}.")
    if num_frames < 1:
        raise ValueError(f"`num_frames` must be at least 1, got {num_frames}; leave out clips without frames.")
    if max_frames < 1:
        raise ValueError(f"`max_frames` must be at least 1, got {max_frames}.")
    if mode not in SAMPLING_MODES:
        raise ValueError(f"`mode` must be one of {', '.join(SAMPLING_MODES)}, got {mode!r}.")
    spread, drop = SAMPLING_MODES[mode]
    if num_frames <= max_frames:
        indices = list(range(num_frames))
    elif spread == "train":
        indices = np.linspace(0, num_frames - 1, max_frames).astype(int).tolist()
    else:
        indices = np.linspace(0, num_frames, max_frames, endpoint=False).astype(int).tolist()
    if drop == "any" or (drop == "full" and len(indices) == max_frames):
        indices = drop_last_frames(indices, draw_frame_drop())
    return indices


def drop_last_frames(indices: Sequence[int], fraction: float) -> list[int]:
    """
    Keeps the first `n - floor(n * fraction)` of n frames, at least one, as both official code bases do.

    Args:
        indices: Indices of a clip's frames, after sampling.
        fraction: Fraction of frames to drop, 0..1.
    """
    return list(indices[: max(1, len(indices) - math.floor(len(indices) * fraction))])


def draw_frame_drop() -> float:
    """
    Draws the fraction of a clip's frames that official training drops from its end: with probability 0.5 zero,
    otherwise one of 0, 0.1, ..., 0.9. It uses torch's random state, which a DataLoader seeds in each of its workers.
    """
    gate, drop = torch.randint(10, (2,)).tolist()
    return 0.1 * drop if gate >= 5 else 0.0


__all__ = ["draw_frame_drop", "drop_last_frames", "sample_frame_indices"]

"""Attention of a trained model: its share inside the true boxes of the intended product.

    python -m evaluation_rice.study.attention --model runs/demo/model --dataset mini_lpr4m --output attention.json

Each clip is paired with its right shop image and with a wrong image of its gallery. The model gets no boxes. It needs
`attention_maps(**inputs)`, weights `(B, 1 + P, T, P)` of the tokens of image i (class token first) over the patches of
clip i. `reconstruction_maps` is used if the model has it, see `evaluation_rice.report.heatmap`.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from data_rice.collator import failure_words
from data_rice.commands import mistakes_end, print_anywhere
from data_rice.views import DATASET_NAMES
from hub_rice.files import check_output, write_output
from hub_rice.tables import percent
from modeling_rice.scoring_rice import pair_kinds

from ..frames import clip_frames
from ..protocol import RetrievalTask
from ..recall import bootstrap_interval, interval_words
from ..report.heatmap import Region, reconstructs, seen_region

MAPS = {
    "score": "attention of the class token",
    "patches": "attention of the image's patches",
    "reconstruction": "reconstruction weights",
}
SHARES = {
    "in_boxes": "inside the boxes",
    "on_frames": "on frames with a box",
    "in_boxes_of_frames": "inside the boxes, as part of the share on those frames",
}


def box_cover(box: Sequence[float] | None, side: int, region: Region = (0.0, 0.0, 1.0, 1.0)) -> np.ndarray:
    """
    Share (0..1) of each patch of a frame that a box covers, `(side * side,)`, row by row.

    Args:
        box: ltrb in 0..1 of the frame; `None` if there is no box.
        side: rows and columns of patches.
        region: the part of the frame that the model sees, see `evaluation_rice.report.heatmap.seen_region`.
    """
    if not box:
        return np.zeros(side * side)
    covers = []
    for first, last, start, stop in ((box[1], box[3], region[1], region[3]), (box[0], box[2], region[0], region[2])):
        edges = start + (stop - start) * np.arange(side + 1) / side
        covers.append((np.minimum(edges[1:], last) - np.maximum(edges[:-1], first)).clip(min=0) / np.diff(edges))
    return np.outer(*covers).ravel()


def box_shares(weights: np.ndarray, cover: np.ndarray) -> dict[str, float]:
    """
    The shares named in `SHARES`, as the mean over rows of weights.

    Args:
        weights: `(R, T, P)`, at least 0. Every row counts equally, whatever its sum; rows without weight do not count.
        cover: `(T, P)` from `box_cover`; a frame of zeros has no box.

    Returns:
        One fraction per name, NaN if there is no weight.
    """
    totals = weights.sum(axis=(1, 2))
    weights = weights[totals > 0] / totals[totals > 0, None, None]
    if not len(weights):
        return dict.fromkeys(SHARES, math.nan)
    inside = float((weights * cover).sum(axis=(1, 2)).mean())
    on_frames = float(weights[:, cover.any(axis=1)].sum(axis=(1, 2)).mean())
    of_frames = inside / on_frames if on_frames > 0 else math.nan
    return {"in_boxes": inside, "on_frames": on_frames, "in_boxes_of_frames": of_frames}


@torch.no_grad()
def clip_shares(model: Any, collator: Any, query: dict, images: Sequence[dict]) -> dict[str, Any]:
    """
    The shares of one clip: `uniform`, the shares of uniform attention; per entry of `MAPS` that the model has, a list
    of the shares for each image; and `not_on_patches`, the attention to other tokens (class tokens, text).

    Args:
        model: a model in eval mode.
        collator: a `RiceCollator` that passes no boxes.
        query: row of the query view.
        images: rows of the gallery view.

    Raises:
        ValueError: the clip or an image cannot be read, no frame in use has a box, or the model's patches are not a
            square grid.
    """
    clip, readable, failures = collator.collate_queries([query])
    pictures, also_readable, more = collator.collate_gallery(list(images))
    if not readable or len(also_readable) < len(images):
        raise ValueError(failure_words((failures + more)[0]))
    inputs = pictures | {name: value.expand(len(images), *value.shape[1:]) for name, value in clip.items()}
    attention = model.attention_maps(**inputs).double().cpu().numpy()
    maps = {"score": attention[:, :1], "patches": attention[:, 1:]}
    if reconstructs(model):
        maps["reconstruction"] = model.reconstruction_maps(**inputs).double().cpu().numpy()
    side = math.isqrt(attention.shape[-1])
    if side * side != attention.shape[-1]:
        raise ValueError(f"the model's {attention.shape[-1]} patches are not a square grid, which boxes need.")
    part = collator.processor.video_processor
    frames = clip_frames(query, collator.num_frames or part.num_frames)
    cover = np.stack([box_cover(box, side, seen_region(part, frame.size)) for frame, box in frames])
    if not cover.any():
        raise ValueError("no frame that the model uses has a box")
    return {
        "uniform": box_shares(np.ones((1, *cover.shape)), cover),
        **{name: [box_shares(rows, cover) for rows in weights] for name, weights in maps.items()},
        "not_on_patches": (1 - attention[:, 0].sum(axis=(1, 2))).tolist(),
    }


def measure(
    model: Any, collator: Any, queries, gallery, *, scope: str = "live", num_clips: int = 400, quiet: bool = False
) -> dict[str, Any]:
    """
    Measures the shares of evenly spaced clips among those with boxes.

    Args:
        model, collator: as `clip_shares`.
        queries, gallery: views of a data set.
        scope: gallery of the wrong images, see `RetrievalTask`.
        num_clips: maximum number of clips.

    Returns:
        `summary` (see `summarise`), `clips` (one entry each, right image first) and `failures`.

    Raises:
        ValueError: the model has no matching decoder, no clip has a box, or no clip could be measured.
    """
    if "matching" not in pair_kinds(model) or not hasattr(model, "attention_maps"):
        raise ValueError(
            "this model has no matching decoder, so no attention to clips: name a model trained with one."
        )
    task = RetrievalTask.from_datasets(queries, gallery, scope)
    with_boxes = [i for i, boxes in enumerate(queries["boxes"]) if any(boxes or [])]
    if not with_boxes:
        raise ValueError("no clip of this split has a true box, so attention cannot be compared with boxes.")
    count = min(num_clips, len(with_boxes))
    chosen = [with_boxes[(2 * i + 1) * len(with_boxes) // (2 * count)] for i in range(count)]
    rng = np.random.default_rng(0)
    clips, failures = [], []
    for query in tqdm(chosen, desc="clips", unit="clip", disable=quiet):
        members, relevant = task.gallery_of(query), task.relevant_positions(query)
        others = sorted(set(range(len(members))) - set(relevant))
        if not relevant or not others:
            failures.append({"id": task.query_ids[query], "reason": "its gallery has no right or no wrong image"})
            continue
        places = [members[relevant[0]], members[int(rng.choice(others))]]
        try:
            images = [gallery[task.image_rows[place][0]] for place in places]
            shares = clip_shares(model, collator, queries[query], images)
        except (ValueError, OSError) as error:
            failures.append({"id": task.query_ids[query], "reason": str(error)})
            continue
        own = {"clip_id": task.query_ids[query], "live_id": task.shops[query]}
        clips.append({**own, "images": [task.image_ids[i] for i in places], **shares})
    if not clips:
        raise ValueError(f"not one of {count} clips could be measured; the first: {failures[0]['reason']}.")
    return {"summary": summarise(clips), "clips": clips, "failures": failures}


def summarise(clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """
    Means over clips with 95 % bootstrap intervals over shops (`live_id`) and their clips, `{"mean", "ci95",
    "num_clips"}`: for each of `MAPS` and `SHARES` of `uniform`, `right`, `wrong`, `right_minus_uniform` and
    `right_minus_wrong`, differences paired by clip.
    """
    shops = np.array([clip.get("live_id", "") for clip in clips])
    result: dict[str, Any] = {"num_clips": len(clips), "interval": interval_words(shops)}
    for name, share in ((name, share) for name in MAPS if name in clips[0] for share in SHARES):
        columns = [(clip["uniform"][share], *(side[share] for side in clip[name])) for clip in clips]
        uniform, right, wrong = np.array(columns).T
        values = {"uniform": uniform, "right": right, "wrong": wrong}
        values |= {"right_minus_uniform": right - uniform, "right_minus_wrong": right - wrong}
        result.setdefault(name, {})[share] = {key: _mean(numbers, shops) for key, numbers in values.items()}
    result["not_on_patches"] = _mean(np.array([clip["not_on_patches"][0] for clip in clips]), shops)
    return result


def _mean(numbers: np.ndarray, shops: np.ndarray) -> dict[str, Any]:
    known = np.isfinite(numbers)
    if not known.any():
        return {"mean": None, "ci95": None, "num_clips": 0}
    interval = bootstrap_interval(numbers[known], shops[known])
    return {"mean": float(numbers[known].mean()), "ci95": interval, "num_clips": int(known.sum())}


def format_summary(summary: Mapping[str, Any]) -> str:
    """The summary as a Markdown table, in percent, differences in points."""
    columns = ("uniform", "right", "wrong", "right_minus_uniform", "right_minus_wrong")
    lines = ["| | uniform | right image (95 %) | wrong image (95 %) | right - uniform | right - wrong |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name, share in ((name, share) for name in MAPS if name in summary for share in SHARES):
        cells = [_cell(summary[name][share][column], column) for column in columns]
        lines.append(f"| {MAPS[name]}, {SHARES[share]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: Mapping[str, Any], column: str) -> str:
    if value["mean"] is None:
        return ""
    if column == "uniform":
        return percent(value["mean"])
    sign = "+" if column.startswith("right_") else ""
    low, high = value["ci95"]
    return f"{100 * value['mean']:{sign}.1f} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"


def _without_nan(value: Any) -> Any:
    """Replaces NaN, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def main(arguments: list[str] | None = None) -> None:
    print_anywhere()
    parser = argparse.ArgumentParser(
        prog="python -m evaluation_rice.study.attention", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder, or the id of a published model")
    add("--dataset", required=True, help=f"{DATASET_NAMES}, or a folder in one of their layouts")
    add("--data_dir", help="folder of the data set's files")
    add("--cache_dir", help="folder for the cached tables of the data set")
    add("--split", default="test", choices=("validation", "test"))
    add("--num_clips", type=int, default=400, help="number of clips with boxes to measure, evenly spaced; default 400")
    add("--device", help="such as cpu or cuda; default: cuda if available")
    add("--output", help="JSON file to write")
    options = parser.parse_args(arguments)
    # Imported here, because `measure` accepts any model with these methods.
    from data_rice import gallery_scope, load_dataset_view
    from data_rice.collator import RiceCollator
    from hub_rice.loading import load_model

    with mistakes_end(parser):
        if options.num_clips < 1:
            raise ValueError(f"--num_clips must be at least 1, got {options.num_clips}")
        if options.output:
            check_output(options.output)
        model, processor = load_model(options.model, options.device)
        reads_text = getattr(model.config, "text_config", None) is not None
        dataset, split, folder = options.dataset, options.split, options.data_dir
        cache = options.cache_dir
        views = [load_dataset_view(dataset, view, split, folder, cache) for view in ("query", "gallery")]
        scope = gallery_scope(dataset, folder)
        collator = RiceCollator(processor, use_text=reads_text)
        result = measure(model, collator, *views, scope=scope, num_clips=options.num_clips)
        if options.output:
            write_output(
                options.output, json.dumps({**vars(options), **_without_nan(result)}, indent=1, allow_nan=False) + "\n"
            )
    summary = result["summary"]
    print(f"\n{summary['num_clips']} clips of {options.dataset} ({options.split}); percent and points\n")
    print(format_summary(summary))
    print(f"\nnot counted: {percent(summary['not_on_patches']['mean'])} % of the attention, on class tokens and text")
    print(f"intervals: {summary['interval']}")
    if result["failures"]:
        first = result["failures"][0]
        print(f"{len(result['failures'])} clips were not measured; the first: {first['id']} ({first['reason']})")


if __name__ == "__main__":
    main()

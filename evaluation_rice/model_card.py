"""The model card: model_cards/template.md filled from results.json, so that no figure is typed by hand."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .report import TITLES, markdown_table, percent, write_atomically

TEMPLATE = Path(__file__).resolve().parents[1] / "model_cards" / "template.md"

PUBLISHED = (
    ("LPR4M, 750K training rows, older code", {"ICL": 22.63, "ICL + PMD": 25.99, "ICL + PMD + PFR": 27.17}),
    ("LPR4M, 750K training rows, newer code", {"ICL": 31.50, "ICL + PMD": 33.07, "ICL + PMD + PFR": 33.77}),
    ("MovingFashion", {"ICL": 74.76, "ICL + PMD": 76.87, "ICL + PMD + PFR": 77.92}),
)
"""R@1 in percent by embedding, as published with the official code of RICE; not measured by this project."""

SCOPE_WORDS = {
    "live": "each clip is searched among the product images of its own livestream",
    "all": "each clip is searched among all images of the gallery",
}


def gallery_words(results: Mapping) -> str:
    """Gallery and scope in one plain sentence."""
    size, protocol = results["gallery_size"], results["protocol"]
    sizes = f"{size['min']} to {size['max']} images, median {size['median']:g}"
    if size["min"] == size["max"]:
        sizes = f"{size['min']} images" + (" each" if protocol["num_galleries"] > 1 else "")
    return (
        f"{SCOPE_WORDS[protocol['gallery_scope']]}: {protocol['num_galleries']} "
        f"{'gallery' if protocol['num_galleries'] == 1 else 'galleries'} of {sizes}, "
        f"{protocol['num_gallery_images']} different images in all"
    )


def published_table() -> str:
    """Markdown table of the published R@1."""
    lines = ["| published, R@1 by embedding | ICL | ICL + PMD | ICL + PMD + PFR |", "| --- | ---: | ---: | ---: |"]
    for name, values in PUBLISHED:
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in values.values()) + " |")
    return "\n".join(lines)


def breakdown_table(groups: Mapping[str, Mapping]) -> str:
    """Markdown table of one attribute of `by`: queries and R@1 of each score, in percent."""
    kinds = [name for name in next(iter(groups.values())) if name != "num_queries"]
    lines = [
        "| group | clips | " + " | ".join(f"R@1 {kind}" for kind in kinds) + " |",
        "| --- | ---: |" + " ---: |" * len(kinds),
    ]
    for name, values in groups.items():
        cells = [name, str(values["num_queries"]), *(percent(values[kind]["R@1"]) for kind in kinds)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _evaluations(results: Mapping) -> list[EvalResult]:
    name, split = results["dataset"], results["protocol"]["split"]
    return [
        EvalResult(
            task_type="video-to-image-retrieval",
            task_name="livestreaming product recognition",
            dataset_type=name,
            dataset_name=name,
            dataset_split=split,
            metric_type=f"recall_at_{column[2:]}",
            metric_name=f"{column}, {kind} score",
            metric_value=round(100 * value, 2),
        )
        for kind, values in results["scores"].items()
        for column, value in values.items()
        if isinstance(value, float)
    ]


def model_card(results: Mapping, template: str | os.PathLike = TEMPLATE) -> str:
    """The card's Markdown, metadata with model-index included.

    Args:
        results: what `eval_rice.py` writes to results.json.
        template: a Jinja file; see model_cards/README.md for the names that it may use.

    Raises:
        FileNotFoundError: there is no template.
        ValueError: `results` lacks an entry that the card shows.
    """
    if not Path(template).is_file():
        raise FileNotFoundError(f"there is no card template {template}: restore it or name another one.")
    needed = ("protocol", "num_queries", "gallery_size", "scores", "baselines", "model", "dataset", "versions")
    missing = [name for name in needed if name not in results]
    if missing:
        raise ValueError(f"the results lack {', '.join(missing)}, which the card shows: run eval_rice.py again.")
    model_name = Path(results["model"]).resolve().name if os.path.isdir(results["model"]) else results["model"]
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["rice", "livestreaming-product-recognition", "video-to-shop", "image-retrieval", "video"],
        metrics=["recall"],
        model_name=model_name,
        eval_results=_evaluations(results),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(template),
        results=results,
        model_name=model_name,
        gallery=gallery_words(results),
        results_table=markdown_table({**results["scores"], **results["baselines"]}),
        breakdowns={name: breakdown_table(groups) for name, groups in results.get("by", {}).items()},
        published_table=published_table(),
        score_titles=TITLES,
    )
    return str(card)


def write_model_card(output_dir: str | os.PathLike, results: Mapping, template: str | os.PathLike = TEMPLATE) -> None:
    """Writes `README.md`, the model card, into `output_dir`; raises as `model_card`."""
    write_atomically(Path(output_dir) / "README.md", model_card(results, template).rstrip() + "\n")


def card_from_file(results_file: str | os.PathLike, template: str | os.PathLike = TEMPLATE) -> str:
    """The card of a results.json on disk; raises as `model_card`, and `FileNotFoundError` for a missing file."""
    with open(results_file, encoding="utf-8") as file:
        return model_card(json.load(file), template)

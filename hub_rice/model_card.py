"""
The model card: model_cards/template.md filled from results.json and the records of the run. No figure is typed.

    python -m hub_rice.model_card runs/demo/results.json --model_id someone/rice --run_dir runs/demo/model
"""

import argparse
import os
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from data_rice.files import write_atomically
from modeling_rice.layout_rice import PIPELINE_TAG, TAGS

from .results import NEEDED, complete, dataset_name, read_results
from .tables import ATTRIBUTES, TITLES, markdown_table, percent
from .training_record import read_training_record

TEMPLATE = Path(__file__).resolve().parents[1] / "model_cards" / "template.md"

PUBLISHED = (
    ("LPR4M, 750K training rows, older code", {"ICL": 22.63, "ICL + PMD": 25.99, "ICL + PMD + PFR": 27.17}),
    ("LPR4M, 750K training rows, newer code", {"ICL": 31.50, "ICL + PMD": 33.07, "ICL + PMD + PFR": 33.77}),
    ("MovingFashion", {"ICL": 74.76, "ICL + PMD": 76.87, "ICL + PMD + PFR": 77.92}),
)
"""R@1 in percent by embedding, as published with the official code of RICE. Not measured by this project."""

SCOPE_WORDS = {
    "live": "each clip is searched among the product images of its own livestream",
    "all": "each clip is searched among all images of the gallery",
}


def gallery_words(results: Mapping) -> str:
    """Gallery and scope in one sentence."""
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
    """Markdown table of one attribute of `by`: number of clips and R@1 of each score, in percent."""
    kinds = [name for name in next(iter(groups.values())) if name != "num_queries"]
    lines = [
        "| group | clips | " + " | ".join(f"R@1 {kind}" for kind in kinds) + " |",
        "| --- | ---: |" + " ---: |" * len(kinds),
    ]
    for name, values in groups.items():
        cells = [name, str(values["num_queries"]), *(percent(values[kind]["R@1"]) for kind in kinds)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def scope_words(results: Mapping) -> str:
    """The gallery of a clip, for a reader who does not know the protocol."""
    if results["protocol"]["gallery_scope"] == "live":
        return "Each clip was compared only with the products of its own livestream, not with those of other shops."
    return "Each clip was compared with every product image of the data set's gallery."


def _evaluations(results: Mapping) -> list[EvalResult]:
    protocol, size = results["protocol"], results["gallery_size"]
    name = dataset_name(results)
    return [
        EvalResult(
            task_type="video-to-image-retrieval",
            task_name="livestreaming product recognition",
            dataset_type=name,
            dataset_name=name,
            dataset_split=protocol["split"],
            dataset_args={
                "gallery_scope": SCOPE_WORDS[protocol["gallery_scope"]],
                "gallery_images_median": size["median"],
                "num_queries": results["num_queries"],
                "boxes": protocol["boxes"],
                **({"asr": protocol["asr"]} if protocol.get("asr", "own") != "own" else {}),
            },
            metric_type=f"recall_at_{column[2:]}",
            metric_name=f"{column}, {kind} score",
            metric_value=round(100 * value, 2),
        )
        for kind, values in results["scores"].items()
        for column, value in values.items()
        if isinstance(value, float)
    ]


def breakdown_page(results: Mapping) -> str | None:
    """A page with R@1 by attribute of the clips; `None` if the clips have no attributes."""
    groups = complete(results)["by"]
    tables = [f"## By {ATTRIBUTES.get(name, name)}\n\n{breakdown_table(group)}" for name, group in groups.items()]
    if not tables:
        return None
    where = f"{results['num_queries']} clips of {dataset_name(results)}, split {results['protocol']['split']}"
    return "\n\n".join([f"# Breakdown\n\nR@1 in percent; {where}.", *tables]) + "\n"


def best_first(scores: Mapping[str, Mapping]) -> dict[str, Mapping]:
    """The scores of a model sorted by R@1, the best first."""
    return dict(sorted(scores.items(), key=lambda item: -item[1]["R@1"]))


def project_urls() -> dict[str, str]:
    """The project URLs of setup.cfg by label; empty if the project is not installed."""
    try:
        entries = metadata("rice-retrieval").get_all("Project-URL") or []
    except PackageNotFoundError:
        return {}
    return {label: url for label, _, url in (entry.partition(", ") for entry in entries)}


def model_card(
    results: Mapping | None,
    template: str | os.PathLike = TEMPLATE,
    *,
    model_id: str | None = None,
    run_dir: str | os.PathLike | None = None,
    dataset_id: str | None = None,
    license: str | None = None,
    picture: bool = False,
) -> str:
    """The model card in Markdown, including metadata with a model-index.

    Args:
        results: Content of the results.json of `eval_rice.py`; `None` for a card without figures.
        template: A Jinja file; model_cards/README.md lists the names that it may use.
        model_id: Model id in the examples; by default that of the results.
        run_dir: Folder of the training run, for recipe, cost and the model's parts.
        dataset_id: Id of the data set on the Hub, for the metadata.
        license: Licence identifier of the Hub; by default that of the training data if known, else none is stated.
        picture: Whether to show matches.png, which must be beside the card.

    Raises:
        FileNotFoundError: if there is no template.
        ValueError: if `results` lacks an entry that the card shows, if both `results` and `model_id` are missing, or
            if the licence is not an identifier.
    """
    if not Path(template).is_file():
        raise FileNotFoundError(f"there is no card template {template}: restore it or name another one.")
    missing = [name for name in NEEDED if name not in results] if results is not None else []
    if missing:
        raise ValueError(f"the results lack {', '.join(missing)}, which the card shows: run eval_rice.py again.")
    model_id = model_id or (results["model"] if results is not None else None)
    if model_id is None:
        raise ValueError("a card without results needs model_id, the model id in its examples: give it.")
    model_name = Path(model_id).resolve().name if os.path.isdir(model_id) else model_id
    record = read_training_record(run_dir)
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ValueError(
            f"{license!r} is not a licence identifier of the Hub: give one such as apache-2.0 or cc-by-nc-sa-4.0."
        )
    if results is not None:
        results = {**complete(results), "scores": best_first(results["scores"])}
    data = ModelCardData(
        license=license or record["license"],
        library_name="transformers",
        pipeline_tag=PIPELINE_TAG,
        tags=list(TAGS),
        datasets=[dataset_id] if dataset_id else record["datasets"] or None,
        metrics=["recall"],
        base_model=record["base_model"],
        model_name=model_name,
        eval_results=_evaluations(results) if results is not None else None,
        **({"co2_eq_emissions": record["emissions"]} if record["emissions"] else {}),
    )
    shown = {}
    if results is not None:
        shown = {
            "dataset": dataset_name(results),
            "gallery": gallery_words(results),
            "scope_words": scope_words(results),
            "results_table": markdown_table({**results["scores"], **results["baselines"]}),
            "has_breakdown": bool(results["by"]),
        }
    card = ModelCard.from_template(
        data,
        template_path=str(template),
        results=results,
        model_id=model_id,
        model_name=model_name,
        has_decoder=record["has_decoder"] if results is None else "matching" in results["scores"],
        has_alignment=record["has_alignment"] if results is None else "alignment" in results["scores"],
        rendered="mini_lpr4m" in (shown.get("dataset"), record["training_data"]),
        published_table=published_table(),
        picture=picture and results is not None,
        repository=project_urls().get("Repository"),
        license=license or record["license"],
        score_titles=TITLES,
        **shown,
        **{name: record[name] for name in ("parts", "recipe", "training_data", "num_processes", "cost", "base_model")},
    )
    return str(card)


def write_model_card(
    output_dir: str | os.PathLike, results: Mapping | None, template: str | os.PathLike = TEMPLATE, **options
) -> None:
    """
    Writes the model card `README.md` into `output_dir`, and `breakdown.md` if the results have a breakdown. The card
    shows the folder's matches.png if there is one. Options and errors as in `model_card`.
    """
    folder = Path(output_dir)
    card = model_card(results, template, picture=(folder / "matches.png").is_file(), **options)
    write_atomically(folder / "README.md", card.rstrip() + "\n")
    page = None if results is None else breakdown_page(results)
    if page is not None:
        write_atomically(folder / "breakdown.md", page)


def card_from_file(results_file: str | os.PathLike, template: str | os.PathLike = TEMPLATE, **options) -> str:
    """The card of a results.json on disk; options as in `model_card`, errors as in `model_card` and `read_results`."""
    return model_card(read_results(results_file), template, **options)


def main(arguments: list[str] | None = None) -> None:
    """Prints the card of a results.json."""
    from data_rice.commands import mistakes_end, print_anywhere

    print_anywhere()
    parser = argparse.ArgumentParser(prog="python -m hub_rice.model_card", description=main.__doc__)
    parser.add_argument("results", help="results.json of eval_rice.py")
    parser.add_argument("--model_id", help="model id in the card's examples; default: the model of the results")
    parser.add_argument("--run_dir", help="folder of the training run, for recipe and cost")
    parser.add_argument("--dataset_id", help="id of the data set on the Hub, for the metadata")
    parser.add_argument("--license", help="licence of the model; default: that of the training data, if known")
    options = vars(parser.parse_args(arguments))
    with mistakes_end(parser):
        print(card_from_file(options.pop("results"), **options).rstrip())


if __name__ == "__main__":
    main()

"""A rendered mini LPR4M as a data set on the Hub: Parquet files that include the images, and a generated card."""

import json
import os
from pathlib import Path

import datasets
from huggingface_hub import DatasetCard, DatasetCardData, upload_file

from data_rice.views import MINI_LPR4M_MANIFEST, load_dataset_view

TEMPLATE = Path(__file__).resolve().parents[1] / "model_cards" / "dataset_template.md"

CONFIGS = {
    "pairs": ("train", "validation"),
    "query": ("validation", "test"),
    "gallery": ("train", "validation", "test"),
}
"""Configurations on the Hub, named like the project's views, and their splits."""


def load_configs(
    data_dir: str | os.PathLike, cache_dir: str | os.PathLike | None = None
) -> dict[str, datasets.DatasetDict]:
    """
    All views of a rendered mini LPR4M by the name of their configuration, with decodable images.

    Raises:
        FileNotFoundError: if the folder was not written by `python -m data_rice.mini_lpr4m`.
        ValueError: if a split is missing because the rendering is too small.
    """
    if not (Path(data_dir) / MINI_LPR4M_MANIFEST).is_file():
        raise FileNotFoundError(
            f"{data_dir} has no {MINI_LPR4M_MANIFEST}, and this command publishes rendered data only: render it with "
            f"`python -m data_rice.mini_lpr4m --output_dir {data_dir}`."
        )
    loaded = {}
    for config, splits in CONFIGS.items():
        tables = {name: load_dataset_view(data_dir, config, name, cache_dir=cache_dir) for name in splits}
        loaded[config] = datasets.DatasetDict({name: _decodable(table) for name, table in tables.items()})
    return loaded


def _decodable(table: datasets.Dataset) -> datasets.Dataset:
    if "image" in table.features:
        table = table.cast_column("image", datasets.Image())
    if "frames" in table.features:
        table = table.cast_column("frames", datasets.List(datasets.Image()))
    return table


def dataset_card(
    manifest: dict,
    configs: dict[str, datasets.DatasetDict],
    repo_id: str,
    metadata: dict | None = None,
    template: str | os.PathLike = TEMPLATE,
) -> str:
    """
    The data set card in Markdown.

    Args:
        manifest: The manifest that the renderer wrote beside the data.
        configs: From `load_configs`; the card gives their numbers of rows.
        repo_id: `owner/name`, used in the examples.
        metadata: The metadata that `datasets` wrote into the card (features, files); it is kept.
        template: A Jinja file.

    Raises:
        FileNotFoundError: if there is no template.
        ValueError: if the manifest lacks an entry that the card shows.
    """
    if not Path(template).is_file():
        raise FileNotFoundError(f"there is no card template {template}: restore it or name another one.")
    missing = [name for name in ("parameters", "categories") if name not in manifest]
    if missing:
        raise ValueError(f"the manifest lacks {', '.join(missing)}, which the card shows: render the data again.")
    rows = max(len(table) for config in configs.values() for table in config.values())
    size = next(words for limit, words in _SIZES if rows < limit)
    data = DatasetCardData(
        **{
            **(metadata or {}),
            "license": "apache-2.0",
            "pretty_name": "Mini LPR4M",
            "task_categories": ["image-feature-extraction"],
            "tags": ["rice", "livestreaming-product-recognition", "video-to-shop", "synthetic"],
            "language": ["en", "zh"],
            "size_categories": [size],
        }
    )
    counts = {config: {name: len(table) for name, table in tables.items()} for config, tables in configs.items()}
    card = DatasetCard.from_template(
        data, template_path=str(template), repo_id=repo_id, parameters=manifest["parameters"], counts=counts,
        categories=manifest["categories"], lives=_count_lives(configs["gallery"]),
    )  # fmt: skip
    return str(card).rstrip() + "\n"


_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**12, "n>1M"))


def _count_lives(gallery: datasets.DatasetDict) -> dict[str, int]:
    return {name: len(set(table["live_id"])) for name, table in gallery.items()}


def publish_mini_lpr4m(
    data_dir: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> str:
    """
    Publishes the configurations `pairs`, `query` and `gallery` with their images, and the card. Images keep the bytes
    and the name of their file; local paths are not published.

    Args:
        data_dir: Folder of a rendered mini LPR4M.
        repo_id: `owner/name` of the data set; created if it does not exist.
        private: Whether a new repository is private; an existing one keeps its visibility.
        token: Access token; by default that of `hf auth login` or `HF_TOKEN`.
        cache_dir: Cache folder for the data set's tables.

    Returns:
        The URL of the commit.

    Raises:
        FileNotFoundError, ValueError: as `load_configs` and `dataset_card`.
    """
    configs = load_configs(data_dir, cache_dir)
    manifest = json.loads((Path(data_dir) / MINI_LPR4M_MANIFEST).read_text(encoding="utf-8"))
    dataset_card(manifest, configs, repo_id)
    for name, tables in configs.items():
        tables.push_to_hub(repo_id, config_name=name, private=private, token=token)
    written = DatasetCard.load(repo_id, token=token).data.to_dict()
    for config in written["configs"]:
        # With push_to_hub's own `set_default`, a second push would lose the default again.
        config.update({"default": True} if config["config_name"] == "query" else {})
    card = dataset_card(manifest, configs, repo_id, written).encode()
    # DatasetCard.push_to_hub would validate the metadata at huggingface.co even if HF_ENDPOINT is set.
    commit = upload_file(
        path_or_fileobj=card,
        path_in_repo="README.md",
        repo_id=repo_id,
        repo_type="dataset",
        token=token,
        commit_message="Write the card",
    )
    return str(commit.commit_url)

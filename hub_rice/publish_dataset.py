"""Publish a rendered mini LPR4M on the Hub, as Parquet files that include the images, with a card.

The configurations are `pairs` (training), `query` and `gallery`. A new repository is private unless --public is given.
Render the data first: python -m data_rice.mini_lpr4m --output_dir data/mini_lpr4m
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data_dir", type=Path, help="folder of a rendered mini LPR4M")
    parser.add_argument("repo_id", help="data set on the Hub, such as someone/mini-lpr4m")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--cache_dir", help="cache folder for the data set's tables")


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        FileNotFoundError, ValueError: as `hub_rice.dataset_card.publish_mini_lpr4m`.
        PermissionError, ConnectionError: for errors of the Hub, see `hub_rice.repository.hub_errors`.
    """
    from .dataset_card import publish_mini_lpr4m
    from .repository import hub_errors

    with hub_errors(options.repo_id):
        url = publish_mini_lpr4m(
            options.data_dir, options.repo_id, private=not options.public, cache_dir=options.cache_dir
        )
    print(f"Published {url}")

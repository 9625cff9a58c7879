"""Ids in the Parquet files of a published data set."""

import pytest
from datasets import Dataset

from data_rice import load_dataset_view


@pytest.fixture
def write(tmp_path):
    """A function that writes a gallery of two images with these ids, and returns its folder."""

    def write(image_ids, live_ids=("", "")):
        folder = tmp_path / "shop" / "gallery"
        folder.mkdir(parents=True)
        pictures = [{"path": None, "bytes": b"x"}] * 2
        columns = {"image_id": image_ids, "live_id": live_ids, "image": pictures, "title": ["", ""]}
        Dataset.from_dict(columns).to_parquet(folder / "test-00000-of-00001.parquet")
        return str(tmp_path / "shop")

    return write


def test_whole_numbers_are_texts(write, tmp_path):
    rows = load_dataset_view(write([7, 8], [1, None]), "gallery", "test", cache_dir=str(tmp_path / "cache"))
    assert list(rows["image_id"]) == ["7", "8"] and list(rows["live_id"]) == ["1", None]


@pytest.mark.parametrize(("ids", "dtype"), [([7.0, 8.0], "float64"), ([True, False], "bool")])
def test_other_ids_are_refused_by_name(write, tmp_path, ids, dtype):
    with pytest.raises(ValueError, match=f"'image_id' holds {dtype} values, but an id is a string or an integer"):
        load_dataset_view(write(ids), "gallery", "test", cache_dir=str(tmp_path / "cache"))

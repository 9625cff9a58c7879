"""The key of the pictures of a run, and how pictures change in each view."""

import os

import pytest
import torch
from datasets import Dataset

from data_rice.augmentation import ClipAugmentation
from data_rice.collator import RiceCollator
from data_rice.features import clip_row, query_features
from tests.training_rice.conftest import picture
from training_rice.feature_cache_rows import CachedPart, ViewChanges, distinct_images


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "frame.png"
    path.write_bytes(picture(1)["bytes"])
    return path


def clips(path, **changes) -> Dataset:
    row = clip_row(clip_id="a", frames=[str(path)] * 3, boxes=[[0, 0, 1, 1], None, None], **changes)
    return Dataset.from_list([{**row, "relevant": []}], features=query_features())


def rows_name(rows, processor, **settings) -> str:
    return CachedPart("clips", rows, RiceCollator(processor, **settings)).about()["rows"]


class TestRowsName:
    def test_follows_the_state_of_the_files(self, file, processor):
        before = rows_name(clips(file), processor)
        assert rows_name(clips(file), processor) == before
        os.utime(file, ns=(1, 1))
        assert rows_name(clips(file), processor) != before

    def test_follows_the_bytes_of_pictures_that_rows_hold(self, pairs, processor):
        names = set()
        for number in (1, 2):
            rows = pairs.select([0]).map(lambda row, n=number: row | {"image": picture(n)}, features=pairs.features)
            names.add(CachedPart("images", rows, RiceCollator(processor)).about()["rows"])
        assert len(names) == 2

    def test_follows_boxes_only_where_they_count(self, file, processor):
        moved = clips(file).map(lambda row: row | {"boxes": [None] * 3}, features=query_features())
        assert rows_name(clips(file), processor) == rows_name(moved, processor)
        assert rows_name(clips(file), processor, use_boxes=True) != rows_name(moved, processor, use_boxes=True)

    def test_a_missing_file_is_part_of_the_name(self, tmp_path, processor):
        assert rows_name(clips(tmp_path / "gone.png"), processor) != rows_name(clips(tmp_path / "other"), processor)


class TestCachedPart:
    def test_counts_pictures(self, pairs, file, processor):
        # Eight clips of two frames and four of one.
        assert CachedPart("clips", pairs, RiceCollator(processor, num_frames=2)).num_pictures() == 20
        assert CachedPart("images", pairs, RiceCollator(processor)).num_pictures() == 12
        assert CachedPart("clips", clips(file), RiceCollator(processor, num_frames=2)).num_pictures() == 2

    def test_an_image_of_several_pairs_is_one(self, pairs):
        images, numbers = distinct_images(pairs.select([3, 4, 3, 5, 4]))
        assert images["image_id"][:] == ["image3", "image4", "image5"]
        assert numbers == [0, 1, 0, 2, 1]


class TestViewChanges:
    changes = ViewChanges(ClipAugmentation(), seed=3)

    def test_do_not_depend_on_order_and_leave_the_generator_alone(self):
        torch.manual_seed(5)
        state = torch.get_rng_state()
        first = [self.changes("a", view) for view in (0, 1)]
        assert [self.changes("a", view) for view in (1, 0)] == first[::-1]
        assert torch.equal(torch.get_rng_state(), state)

    def test_differ_by_row_view_and_seed(self):
        drawn = [self.changes("a", 0), self.changes("b", 0), self.changes("a", 1)]
        drawn.append(ViewChanges(ClipAugmentation(), seed=4)("a", 0))
        assert len({change.crop for change in drawn}) == 4

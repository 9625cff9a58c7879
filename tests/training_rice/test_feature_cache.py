"""Blocks of encoded pictures: complete or absent, and named by everything that they depend on."""

import errno
import pickle

import pytest
import torch

from training_rice import feature_cache
from training_rice.feature_cache import CachedRow, FeatureCache


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(feature_cache, "ROWS_PER_BLOCK", 2)


def make(folder, num_rows=3, num_views=1, **about) -> FeatureCache:
    cache = FeatureCache(folder, "clips", {"encoder": "a", "rows": "b", **about}, num_rows, num_views)
    cache.begin()
    return cache


def row(*numbers: float, mask: list[bool] | None = None, failures=()) -> CachedRow:
    states = torch.tensor(numbers, dtype=torch.float16).view(-1, 1)
    return CachedRow(states, None if mask is None else torch.tensor(mask).view(-1, 1), failures)


class TestBlocks:
    def test_rows_come_back_with_masks_and_failures(self, tmp_path):
        failure = {"id": "x", "file": "f", "reason": "torn"}
        cache = make(tmp_path)
        cache.write(0, 0, [row(1, 2, mask=[True, False]), row(failures=[failure])])
        cache.write(0, 1, [row(3, mask=[True])])
        assert cache.read(0, 0).states.tolist() == [[1], [2]]
        assert cache.read(0, 0).patch_mask.tolist() == [[True], [False]]
        assert (len(cache.read(0, 1).states), cache.read(0, 1).failures) == (0, [failure])
        assert cache.read(0, 2).states.tolist() == [[3]]
        assert cache.read(0, 2).states.dtype == torch.float16

    def test_another_object_and_a_workers_copy_read_them(self, tmp_path):
        cache = make(tmp_path, num_rows=1)
        cache.write(0, 0, [row(5)])
        cache.read(0, 0)
        for other in (make(tmp_path, num_rows=1), pickle.loads(pickle.dumps(cache))):
            assert other.read(0, 0).states.tolist() == [[5]]

    def test_views_are_kept_apart(self, tmp_path):
        cache = make(tmp_path, num_rows=1, num_views=2)
        cache.write(1, 0, [row(7)])
        assert (cache.missing(0), cache.missing(1)) == ([0], [])
        with pytest.raises(ValueError, match="view-0-block-000000.pt is missing or damaged; start the run again"):
            cache.read(0, 0)

    @pytest.mark.parametrize("change", ["other", "fewer", "unlisted"])
    def test_a_block_that_does_not_fit_its_rows_counts_as_missing(self, tmp_path, change):
        """Another file under its name, a block with fewer pictures than its rows have, one without their failures."""
        make(tmp_path).write(0, 0, [row(1), row(2)])
        file = next(tmp_path.glob("clips-*/view-*.pt"))
        content = torch.load(file)
        if change == "other":
            content = {"weights": content["states"]}
        elif change == "fewer":
            content["states"] = content["states"][:1]
        else:
            content["failures"] = content["failures"][:1]
        torch.save(content, file)
        assert make(tmp_path).missing(0) == [0, 1]

    @pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
    def test_a_truncated_block_counts_as_missing(self, tmp_path, kept):
        make(tmp_path).write(0, 0, [row(1), row(2)])
        file = next(tmp_path.glob("clips-*/view-*.pt"))
        content = file.read_bytes()
        file.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
        assert make(tmp_path).missing(0) == [0, 1]

    def test_a_full_disk_leaves_no_block_and_is_reported(self, tmp_path, monkeypatch):
        cache = make(tmp_path)
        before = set(cache.folder.iterdir())

        def fail(self, content):
            with open(self, "wb") as file:
                file.write(content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("pathlib.Path.write_bytes", fail)
        with pytest.raises(
            OSError, match=r"could not be written to .* \(the disk is full; .* MB are free\): make room"
        ):
            cache.write(0, 0, [row(1), row(2)])
        assert set(cache.folder.iterdir()) == before
        assert cache.missing(0) == [0, 1]


class TestNames:
    def test_follow_what_the_encodings_depend_on(self, tmp_path):
        folders = {make(tmp_path, **about).folder for about in ({}, {"encoder": "z"}, {"rows": "z"}, {"extra": 1})}
        folders |= {make(tmp_path, num_views=2).folder}
        assert len(folders) == 5
        assert make(tmp_path).folder in folders

    def test_how_the_nearest_differs(self, tmp_path):
        first = make(tmp_path, precision="fp16", frames=3)
        assert first.why_others_do_not_fit() is None
        make(tmp_path, precision="fp32", frames=4, encoder="z")
        other = make(tmp_path, precision="fp16", frames=3, encoder="z")
        assert other.why_others_do_not_fit() == f"{first.folder} was made with another encoder"
        assert make(tmp_path, encoder="y", rows="y").why_others_do_not_fit() is None


@pytest.mark.parametrize("content", ["", '{"rows":', "[1]"])
def test_a_damaged_description_of_another_cache_explains_nothing(tmp_path, content):
    other = make(tmp_path, frames=9)
    (other.folder / "about.json").write_text(content)
    assert make(tmp_path, frames=5).why_others_do_not_fit() is None

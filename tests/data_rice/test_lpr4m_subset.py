"""Thinning head categories to a budget of rows."""

import logging
import random
from collections import Counter

import pytest

from data_rice import Lpr4m
from data_rice.lpr4m.layout import training_files
from data_rice.lpr4m.subset import choose_subset, water_filling


@pytest.mark.parametrize(
    "counts, budget, kept",
    [
        ({"head": 100, "middle": 30, "tail": 5}, 45, {"head": 20, "middle": 20, "tail": 5}),
        ({"head": 100, "middle": 30, "tail": 5}, 100, {"head": 65, "middle": 30, "tail": 5}),
        ({"a": 10, "b": 10, "c": 10}, 8, {"a": 3, "b": 3, "c": 2}),
        ({"a": 10, "b": 2}, 12, {"a": 10, "b": 2}),
        ({"a": 10, "b": 2}, 99, {"a": 10, "b": 2}),
        ({"a": 5, "b": 5, "c": 5}, 2, {"a": 1, "b": 1, "c": 0}),
        ({}, 5, {}),
    ],
)
def test_water_filling_by_hand(counts, budget, kept):
    assert water_filling(counts, budget) == kept


def test_water_filling_uses_the_budget_and_reduces_only_the_largest():
    generator = random.Random(0)
    for _ in range(300):
        counts = {f"c{i}": generator.randint(0, 40) for i in range(generator.randint(1, 12))}
        budget = generator.randint(1, 300)
        kept = water_filling(counts, budget)
        assert sum(kept.values()) == min(budget, sum(counts.values()))
        assert all(0 <= kept[name] <= counts[name] for name in counts)
        thinned = [kept[name] for name in counts if kept[name] < counts[name]]
        whole = [kept[name] for name in counts if kept[name] == counts[name]]
        assert not thinned or max(thinned) - min(thinned) <= 1
        assert not thinned or not whole or max(whole) <= min(thinned) + 1


def _rows():
    return [("head", f"h{i}") for i in range(200)] + [("tail", f"t{i}") for i in range(7)]


def test_subset_is_exact_and_depends_on_ids_and_seed_only():
    rows = _rows()
    subset = choose_subset(rows, 57, seed=0)
    kept = [row for row in rows if subset.keeps(*row)]
    assert Counter(category for category, _ in kept) == {"head": 50, "tail": 7}
    assert subset.report == {"head": {"rows": 200, "kept": 50}, "tail": {"rows": 7, "kept": 7}}
    shuffled = random.Random(1).sample(rows, len(rows))
    again = choose_subset(shuffled, 57, seed=0)
    assert {row for row in shuffled if again.keeps(*row)} == set(kept)
    other = choose_subset(rows, 57, seed=1)
    assert {row for row in rows if other.keeps(*row)} != set(kept)
    larger = choose_subset(rows, 100, seed=0)
    assert all(larger.keeps(*row) for row in kept)


def test_builder_reduces_the_training_split_and_records_it(tmp_path, caplog):
    annotations = tmp_path / "lpr4m" / "annotations"
    annotations.mkdir(parents=True)
    live = "0-0-0-0-{}"
    rows = []
    for number in range(30):
        category = "Skirt" if number < 24 else "Kite"
        clip = f"{live.format(number % 3)}-{number}-{number + 1}"
        rows.append([clip, f"['{clip}-0']", "[]", f"image{number}", "", "3", category, "", "", "", ""])
    (annotations / "training_videoinfo_tiny.txt").write_text("".join("\t".join(row) + "\n" for row in rows))

    def build(view="pairs", **options):
        builder = Lpr4m(view, data_dir=tmp_path / "lpr4m", cache_dir=tmp_path / "cache", **options)
        builder.download_and_prepare()
        return builder

    with caplog.at_level(logging.WARNING):
        builder = build(subset=16)
    train = builder.as_dataset(split="train")
    assert Counter(train["category"]) == {"Skirt": 10, "Kite": 6}
    assert builder.subset_report == {"Skirt": {"rows": 24, "kept": 10}, "Kite": {"rows": 6, "kept": 6}}
    assert build(subset=16).subset_report == builder.subset_report  # from the cache
    assert set(build("gallery", subset=16).as_dataset(split="train")["image_id"]) == set(train["image_id"])
    assert build().subset_report == {}

    # The budget counts what is left after the validation livestreams.
    held = build(subset=12, validation_lives=[live.format(0)])
    assert Counter(held.as_dataset(split="train")["category"]) == {"Skirt": 8, "Kite": 4}
    assert len(held.as_dataset(split="validation")) == 10
    for wrong in (0, -1, 2.5, True, "many"):
        with pytest.raises(ValueError, match="subset must be a number of rows"):
            build(subset=wrong)


def test_all_ten_parts_of_the_full_list_are_needed(tmp_path):
    annotations = tmp_path / "lpr4m" / "annotations"
    annotations.mkdir(parents=True)
    for part in range(10):
        clip = f"0-0-0-0-0-{part}-{part + 1}"
        row = [clip, f"['{clip}-0']", "[]", "image", "", "3", "Kite", "", "", "", ""]
        (annotations / f"training_videoinfo_full_part_{part:02d}.txt").write_text("\t".join(row) + "\n")

    def clips(**options):
        builder = Lpr4m("pairs", data_dir=tmp_path / "lpr4m", cache_dir=tmp_path / "cache", **options)
        builder.download_and_prepare()
        return builder.as_dataset(split="train")["clip_id"][:]

    assert clips() == [f"0-0-0-0-0-{part}-{part + 1}" for part in range(10)]
    (annotations / "training_videoinfo_full_part_03.txt").unlink()
    with pytest.raises(ValueError, match=r"holds the parts 0, 1, 2, 4, 5, 6, 7, 8, 9 of .* has 10 with consecutive"):
        clips()
    assert len(clips(train_files="training_videoinfo_full_part_0[45].txt")) == 2


@pytest.mark.parametrize(
    "numbers, accepted",
    [(range(10), True), (range(1, 11), True), (range(9), False), (range(2, 12), False), (range(11), False)],
)
def test_parts_may_be_numbered_from_0_or_from_1(tmp_path, numbers, accepted):
    (tmp_path / "annotations").mkdir()
    for number in numbers:
        (tmp_path / f"annotations/training_videoinfo_full_part_{number}.txt").touch()
    if accepted:
        assert len(training_files(str(tmp_path), "training_videoinfo*.txt")) == 10
    else:
        with pytest.raises(ValueError, match="which has 10 with consecutive numbers"):
            training_files(str(tmp_path), "training_videoinfo*.txt")

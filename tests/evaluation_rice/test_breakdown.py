import importlib.util
import json

import numpy as np
import pytest
from PIL import Image

from evaluation_rice.breakdown import draw_breakdown, train_rows_by_category
from evaluation_rice.protocol import Rankings, RetrievalTask, breakdown, head_categories


@pytest.mark.parametrize(
    ("rows", "head"),
    [
        ({"a": 5, "b": 3, "c": 2}, {"a"}),
        ({"a": 4, "b": 3, "c": 3}, {"a", "b"}),
        ({"b": 1, "a": 1}, {"a"}),
        ({"a": 1}, {"a"}),
        ({}, set()),
    ],
)
def test_head_is_the_fewest_categories_with_half_of_the_rows(rows, head):
    assert head_categories(rows) == head


def hits(shop, first):
    """Rankings in which the first `first` queries hit."""
    task = RetrievalTask.from_datasets(shop.queries, shop.gallery, "live")
    ranked = Rankings(task)
    for query in range(len(task.query_ids)):
        scores = np.zeros(len(task.gallery_of(query)))
        scores[task.relevant_positions(query)] = 1 if query < first else -1
        ranked.add(query, scores)
    return ranked.complete()


def test_head_and_tail_are_an_attribute_of_the_breakdown(shop):
    """Clips a, c, e are hats and b, d of no category; a and b hit."""
    groups = breakdown(shop.queries, {"embedding": hits(shop, 2)}, {"hat": 5, "shoe": 9})
    assert set(groups["head_tail"]) == {"tail", "unknown"}
    assert groups["head_tail"]["tail"]["num_queries"] == 3
    assert groups["head_tail"]["tail"]["embedding"]["R@1"] == pytest.approx(1 / 3)
    unseen = breakdown(shop.queries, {"embedding": hits(shop, 2)}, {"shoe": 9})
    assert set(unseen["head_tail"]) == {"not in training", "unknown"}
    assert "head_tail" not in breakdown(shop.queries, {"embedding": hits(shop, 2)})


def test_every_group_has_its_own_interval(shop):
    groups = breakdown(shop.queries, {"embedding": hits(shop, 2)})["category"]
    low, high = groups["hat"]["embedding"]["R@1_ci95"]
    assert low == 0 and 1 / 3 < high <= 1
    # All three are hits, of which resampling makes nothing else.
    always = breakdown(shop.queries, {"embedding": hits(shop, 5)})["category"]["hat"]["embedding"]["R@1_ci95"]
    assert always == [pytest.approx(0.4385, abs=1e-4), 1.0]


def test_a_group_of_several_shops_resamples_shops(shop):
    """Both clips of shop y, none of shop x: of two shops, each is drawn alone in a quarter of the resamples."""
    queries = shop.queries.remove_columns("category").add_column("category", ["hat"] * 5)
    ranked = hits(shop, 0)
    for query in (1, 3):
        scores = np.zeros(len(ranked.task.gallery_of(query)))
        scores[ranked.task.relevant_positions(query)] = 1
        ranked.add(query, scores)
    figures = breakdown(queries, {"embedding": ranked})["category"]["hat"]["embedding"]
    assert figures["R@1"] == pytest.approx(2 / 5) and figures["R@1_ci95"] == [0.0, 1.0]


def test_training_rows_are_counted_by_category(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "gallery.jsonl").write_text(json.dumps({"gallery_id": "a", "image": "images/a.png", "title": "a"}))
    clip = {"frames": ["images/a.png"], "gt_gallery_ids": ["a"]}
    rows = [{**clip, "query_id": str(i), "category": name} for i, name in enumerate(["cup", "hat", "cup", ""])]
    (tmp_path / "clips_train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert train_rows_by_category(str(tmp_path)) == {"cup": 2, "hat": 1}
    (tmp_path / "clips_train.jsonl").unlink()
    with pytest.raises((ValueError, OSError), match="clips_train.jsonl"):
        train_rows_by_category(str(tmp_path))


def test_the_fingerprint_differs_for_other_queries_and_galleries(shop):
    task = RetrievalTask.from_datasets(shop.queries, shop.gallery, "live")
    same = RetrievalTask.from_datasets(shop.queries.select([4, 3, 2, 1, 0]), shop.gallery, "live")
    assert task.fingerprint() == same.fingerprint()
    others = [
        RetrievalTask.from_datasets(shop.queries, shop.gallery, "all"),
        RetrievalTask.from_datasets(shop.queries.select(range(4)), shop.gallery, "live"),
        RetrievalTask.from_datasets(shop.queries, shop.gallery.select(range(6)), "live"),
    ]
    assert len({task.fingerprint(), *(other.fingerprint() for other in others)}) == 4


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs the extra plot")
def test_the_picture_shows_many_groups(shop, tmp_path):
    figures = {"R@1": 0.5, "R@1_ci95": [0.2, 0.8]}
    many = {f"category {i}": {"num_queries": i + 1, "embedding": figures, "fused": figures} for i in range(60)}
    by = {
        "category": many,
        "head_tail": breakdown(shop.queries, {"embedding": hits(shop, 2)}, {"hat": 1})["head_tail"],
    }
    draw_breakdown(tmp_path / "breakdown.png", by, "title")
    with Image.open(tmp_path / "breakdown.png") as picture:
        assert picture.height > picture.width
    with pytest.raises(ValueError, match="no attribute such as"):
        draw_breakdown(tmp_path / "breakdown.png", {}, "title")

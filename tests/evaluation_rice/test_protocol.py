import numpy as np
import pytest
from datasets import Dataset

from evaluation_rice.protocol import Rankings, RetrievalTask, breakdown, chance_recall, group_values
from evaluation_rice.recall import hit_interval, recall_at_k


@pytest.fixture
def task(shop):
    return RetrievalTask.from_datasets(shop.queries, shop.gallery, "live")


def names(task, query):
    return [task.image_ids[i] for i in task.gallery_of(query)]


def test_live_scope_searches_the_own_livestream_in_gallery_order(task):
    assert names(task, 0) == ["x0", "x1", "x2", "shared"]
    assert names(task, 1) == ["y0", "shared", "y1"]
    assert task.image_ids == ["x0", "x1", "x2", "shared", "y0", "y1"]
    assert task.image_rows[3] == [3, 5]
    assert task.gallery_size() == {"min": 3, "median": 3.5, "max": 4}
    assert task.relevant_positions(3) == [1]


def test_all_scope_counts_a_repeated_image_once(shop):
    task = RetrievalTask.from_datasets(shop.queries, shop.gallery, "all")
    assert names(task, 0) == names(task, 1) == ["x0", "x1", "x2", "shared", "y0", "y1"]
    assert task.num_duplicate_rows == 1


def test_refuses_views_that_cannot_be_evaluated(shop):
    with pytest.raises(ValueError, match="gallery is empty"):
        RetrievalTask.from_datasets(shop.queries, shop.gallery.select([]), "all")
    with pytest.raises(ValueError, match="no rows"):
        RetrievalTask.from_datasets(shop.queries.select([]), shop.gallery, "all")
    with pytest.raises(ValueError, match="'a' occurs twice"):
        RetrievalTask.from_datasets(shop.queries.select([0, 1, 0]), shop.gallery, "all")
    with pytest.raises(ValueError, match="scope is 'room'"):
        RetrievalTask.from_datasets(shop.queries, shop.gallery, "room")
    with pytest.raises(ValueError, match="live_id of a query, such as 'y'"):
        RetrievalTask.from_datasets(shop.queries.select([1]), shop.gallery.select([0, 1]), "live")


def test_a_query_without_gallery_or_relevant_image_stays_a_miss(shop):
    task = RetrievalTask.from_datasets(shop.queries, shop.gallery.select([0, 1]), "live")
    assert [failure["id"] for failure in task.without_gallery()] == ["b", "d"]
    assert task.num_unreachable() == 4
    ranked = Rankings(task)
    for query in (0, 2, 4):
        ranked.add(query, np.array([1.0, 0.0]))
    assert ranked.complete().rankings == {"a": ["x0", "x1"], "b": [], "c": ["x0", "x1"], "d": [], "e": ["x0", "x1"]}
    assert ranked.recall()["R@1"] == pytest.approx(0.2)


def test_ties_keep_gallery_order_and_are_counted(task):
    ranked = Rankings(task)
    for query in range(5):
        ranked.add(query, np.zeros(len(task.gallery_of(query))))
    assert ranked.rankings["a"] == ["x0", "x1", "x2", "shared"]
    ties = ranked.tie_summary()
    assert ties["share"] == 1.0
    assert ties["R@1_ties_at_random"] == pytest.approx(chance_recall(task)["R@1"])


def test_only_a_tie_of_the_best_relevant_image_counts(task):
    ranked = Rankings(task)
    ranked.add(0, np.array([0.9, 0.1, 0.1, 0.1]))
    ranked.add(2, np.array([0.9, 0.9, 0.1, 0.5]))
    ranked.add(4, np.array([0.9, 0.1, 0.9, 0.5]))
    assert ranked.tied == {"e"}
    assert ranked.tie_summary() == {"share": 0.2, "R@1_ties_at_random": pytest.approx((1 + 0 + 0.5) / 5)}


def test_scores_that_are_not_finite_are_not_ranked(task):
    ranked = Rankings(task)
    ranked.add(0, np.array([np.nan, 0.1, 0.2, np.inf]))
    ranked.add(2, np.full(4, np.nan))
    assert ranked.rankings["a"] == ["x2", "x1"] and ranked.rankings["c"] == []
    assert ranked.recall()["R@10"] == 0.0


def test_refuses_scores_of_another_gallery(task):
    with pytest.raises(ValueError, match="query 'a' searches 4 images"):
        Rankings(task).add(0, np.zeros(3))


def test_summary_is_recall_of_the_rankings_with_an_interval(task):
    ranked = Rankings(task, depth=2)
    rng = np.random.default_rng(0)
    for query in range(4):
        ranked.add(query, rng.random(len(task.gallery_of(query))))
    summary = ranked.complete().summary()
    low, high = summary.pop("R@1_ci95")
    assert [low, high] == hit_interval(ranked.hits_at_1(), ["x", "y", "x", "y", "x"])
    assert summary == recall_at_k(ranked.rankings, task.relevant)
    assert low <= summary["R@1"] <= high
    assert ranked.hits_at_1().mean() == summary["R@1"]


def test_figures_of_groups_are_those_of_their_queries(task):
    ranked = Rankings(task)
    rng = np.random.default_rng(3)
    for query in range(4):
        ranked.add(query, rng.random(len(task.gallery_of(query))))
    groups = ["a", "b", "b", "a", "b"]
    for name, figures in ranked.summary_by(groups).items():
        chosen = [query for query, group in enumerate(groups) if group == name]
        relevant = {task.query_ids[query]: task.relevant[task.query_ids[query]] for query in chosen}
        interval = hit_interval(ranked.hits_at_1()[chosen], [task.shops[query] for query in chosen])
        expected = recall_at_k({query: ranked.rankings.get(query, []) for query in relevant}, relevant)
        assert figures == {**expected, "R@1_ci95": interval}


def test_shops_are_known_in_both_scopes(shop):
    assert RetrievalTask.from_datasets(shop.queries, shop.gallery, "all").shops == ["x", "y", "x", "y", "x"]
    assert RetrievalTask.from_datasets(shop.queries.remove_columns("live_id"), shop.gallery, "all").shops == [""] * 5


def test_ids_may_be_whole_numbers_on_one_side():
    gallery = Dataset.from_dict({"image_id": [7, 8], "live_id": [1, 1]})
    queries = Dataset.from_dict({"clip_id": ["a", "b"], "live_id": ["1", "1"], "relevant": [["8"], ["9"]]})
    task = RetrievalTask.from_datasets(queries, gallery, "live")
    assert task.relevant_positions(0) == [1] and task.num_unreachable() == 1
    ranked = Rankings(task)
    ranked.add(0, np.array([0.0, 1.0]))
    assert ranked.recall()["R@1"] == ranked.hits_at_1().mean() == 0.5


def test_clips_named_by_numbers_have_the_names_of_texts():
    gallery = Dataset.from_dict({"image_id": ["8"], "live_id": [""]})
    ids = {"live_id": ["", ""], "relevant": [[8], [9]]}
    task, same = (
        RetrievalTask.from_datasets(Dataset.from_dict({"clip_id": clips, **ids}), gallery, "all")
        for clips in ([5, 0], ["5", "0"])
    )
    assert task.query_ids == ["5", "0"] and task.fingerprint() == same.fingerprint()
    for clips, words in (([5, None], "clip_id holds None"), ([1.0, 2.0], "clip_id holds 1.0: an id is a string")):
        with pytest.raises(ValueError, match=words):
            RetrievalTask.from_datasets(Dataset.from_dict({"clip_id": clips, **ids}), gallery, "all")
    with pytest.raises(ValueError, match="relevant of '5' holds 1.5: an id is"):
        RetrievalTask.from_datasets(
            Dataset.from_dict({"clip_id": [5], "live_id": [""], "relevant": [[1.5]]}), gallery, "all"
        )


def test_chance_is_exact_per_gallery(task):
    assert chance_recall(task, (1, 3, 100)) == {
        "R@1": pytest.approx((3 / 4 + 2 / 3) / 5),
        "R@3": pytest.approx((3 * 3 / 4 + 2) / 5),
        "R@100": 1.0,
    }


def test_breakdown_shows_known_columns_only(task, shop):
    ranked = Rankings(task)
    for query in range(5):
        scores = np.zeros(len(task.gallery_of(query)))
        scores[task.relevant_positions(query)] = query < 2
        ranked.add(query, scores)
    groups = breakdown(shop.queries, {"embedding": ranked.complete()})
    assert list(groups) == ["category"]
    assert groups["category"]["hat"]["num_queries"] == 3
    assert groups["category"]["hat"]["embedding"]["R@1"] == pytest.approx(1 / 3)
    assert groups["category"]["unknown"]["embedding"]["R@1"] == pytest.approx(1 / 2)


def test_many_numbers_become_quartiles():
    values = [str(i) for i in range(100)] + [""]
    groups = group_values(values)
    assert len(set(groups)) == 5 and groups[-1] == "unknown"
    assert groups[0] == "0 to 24.75" and groups[99] == "74.25 to 99"
    assert group_values(["small", "large", ""]) == ["small", "large", "unknown"]
    assert group_values([f"c{i}" for i in range(40)]) == [f"c{i}" for i in range(40)]

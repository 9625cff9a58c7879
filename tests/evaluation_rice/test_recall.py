import json
import math
import shutil
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

from evaluation_rice import recall
from evaluation_rice.recall import (
    bootstrap_interval,
    expected_hit,
    first_rank,
    hit_interval,
    interval_words,
    metric_path,
    recall_at_k,
    wilson_interval,
)

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def golden(reference_dir):
    """Outputs recorded from the official code."""
    return json.loads((reference_dir / "golden_functions.json").read_text())


def rankings_of(predictions):
    """Recorded predictions are [id, score] pairs; a bare pair is a ranking of one."""
    return {
        query: [pairs[0]] if pairs and isinstance(pairs[0], str) else [image for image, _ in pairs]
        for query, pairs in predictions.items()
    }


def assert_percent(computed, recorded):
    assert computed.keys() == recorded.keys()
    for name, value in recorded.items():
        assert 100 * computed[name] == pytest.approx(value, abs=1e-9)


def test_agrees_with_official_accuracy(golden):
    cases = golden["recall"]
    first = cases[0]
    for case in cases:
        predictions = case.get("pred")
        if predictions is None:
            predictions = dict(list(first["pred"].items())[: case["pred_is_first_n_of_case_0"]])
        relevant = case.get("gt", first["gt"])
        assert_percent(recall_at_k(rankings_of(predictions), relevant), case["result_percent"])


def test_agrees_with_official_moving_fashion_accuracy(golden):
    case = golden["recall_movingfashion"]
    relevant = {query: [entry["gt"]] for query, entry in case["gt"].items()}
    assert_percent(recall_at_k(rankings_of(golden["recall"][0]["pred"]), relevant), case["result_percent"])


def test_counts_positions_misses_and_several_relevant():
    rankings = {"a": ["x", "x", "x", "y"], "b": ["y"], "c": [], "d": ["p", "q", "r"]}
    relevant = {"a": ["y"], "b": ["y"], "c": ["y"], "d": ["z", "q"], "e": ["y"], "f": []}
    assert recall_at_k(rankings, relevant, (1, 2, 3, 4, 1000)) == {
        "R@1": 1 / 6,
        "R@2": 2 / 6,
        "R@3": 2 / 6,
        "R@4": 3 / 6,
        "R@1000": 3 / 6,
    }


@pytest.mark.parametrize(
    "rankings, relevant, ks, words",
    [
        ({}, {}, (1,), "relevant is empty"),
        ({"q": ["a"]}, {"q": "a"}, (1,), "relevant.*list of image ids"),
        ({"q": "a"}, {"q": ["a"]}, (1,), "rankings.*list of image ids"),
        ({"p": ["a"]}, {"q": ["a"]}, (1,), "'p'"),
        ({"q": [["a", 0.3]]}, {"q": ["a"]}, (1,), r"rankings\['q'\] holds \['a', 0.3\]: give image ids alone"),
        ({"q": ["b", ("a", 0.3)]}, {"q": ["a"]}, (1,), "give image ids alone"),
        ({"q": ["a"]}, {"q": [["a"]]}, (1,), r"relevant\['q'\] holds \['a'\]"),
        ({"q": ["a"]}, {"q": ["a"]}, (0, 1), "ks holds 0"),
        ({"q": ["a"]}, {"q": ["a"]}, (True,), "ks holds True"),
        ({"q": ["a"]}, {"q": ["a"]}, (np.True_,), "ks holds"),
        ({"q": ["a"]}, {"q": ["a"]}, (np.array(2.5),), "ks holds"),
        ({"q": ["a"]}, {"q": ["a"]}, (1, torch.tensor(2.5)), "ks holds"),
        (
            {7: ["a"], "7": ["b"]},
            {7: ["a"]},
            (1,),
            "rankings holds the query '7' twice, as a string and as an integer",
        ),
        ({}, {"7": ["b"], np.int64(7): ["a"]}, (1,), "relevant holds the query '7' twice"),
        ({"q": ["a"]}, {"q": ["a"]}, (), "ks is empty"),
        ({"q": ["a"]}, {"q": ["a"]}, 5, "ks must be a sequence"),
        ([["a"]], {"q": ["a"]}, (1,), "rankings must map"),
    ],
)
def test_refuses_input_that_would_be_counted_wrongly(rankings, relevant, ks, words):
    with pytest.raises(ValueError, match=words) as error:
        recall_at_k(rankings, relevant, ks)
    assert "\n" not in str(error.value)


def test_every_figure_is_computed_by_the_metric(monkeypatch):
    computed = []
    compute = evaluate.EvaluationModule.compute
    monkeypatch.setattr(
        evaluate.EvaluationModule, "compute", lambda self, **given: computed.append(given) or compute(self, **given)
    )
    # Of a long ranking the metric is given no more than counts.
    assert recall_at_k({"q": list("abcdef")}, {"q": ["c"]}, (1, 3)) == {"R@1": 0.0, "R@3": 1.0}
    assert [given["predictions"] for given in computed] == [[["a", "b", "c"]]]


def test_ranks_and_recall_are_those_of_a_plain_count():
    rng = np.random.default_rng(0)
    rankings = {f"q{i}": rng.choice(30, size=rng.integers(0, 20)).astype(str).tolist() for i in range(200)}
    relevant = {f"q{i}": rng.choice(30, size=rng.integers(0, 4)).astype(str).tolist() for i in range(200)}
    plain = {}
    for query, ranking in rankings.items():
        places = [place for place, image in enumerate(ranking, 1) if image in relevant[query]]
        plain[query] = min(places) if places else None
    assert {query: first_rank(ranking, relevant[query]) for query, ranking in rankings.items()} == plain
    for k, share in recall_at_k(rankings, relevant, (7, 1, 50)).items():
        assert share == sum(rank is not None and rank <= int(k[2:]) for rank in plain.values()) / 200


@pytest.mark.parametrize("wanted", [["2"], [2], np.array([2]), torch.tensor([2]), {2}, (np.int32(2),)])
@pytest.mark.parametrize("ranking", [["1", "2"], [1, 2], np.array([1, 2]), torch.tensor([1, 2]), ["1", 2]])
def test_whole_numbers_and_texts_are_the_same_ids(ranking, wanted):
    assert recall_at_k({"q": ranking}, {"q": wanted}, (1, 2)) == {"R@1": 0.0, "R@2": 1.0}


@pytest.mark.parametrize("ranked", [7, "7", np.int64(7)])
@pytest.mark.parametrize("wanted", [7, "7", np.int32(7)])
def test_queries_are_named_by_texts_and_whole_numbers_alike(ranked, wanted):
    assert recall_at_k({ranked: ["a"]}, {wanted: ["a"], 8: ["a"]}, (1,)) == {"R@1": 0.5}


@pytest.mark.parametrize("entry", [float("nan"), 2.0, None, True, b"2", np.float32(2)])
def test_invalid_ids_are_refused_by_name(entry):
    with pytest.raises(ValueError, match=r"rankings\['q'\] holds .*: an id is a string or an integer"):
        recall_at_k({"q": ["1", entry]}, {"q": ["1"]}, (1,))
    with pytest.raises(ValueError, match=r"relevant\['q'\] holds .*: an id is a string or an integer"):
        recall_at_k({"q": ["1"]}, {"q": [entry]}, (1,))


def test_a_ranking_without_order_is_refused():
    with pytest.raises(ValueError, match=r"rankings\['q'\] must be a list of image ids, not {'a'}"):
        recall_at_k({"q": {"a"}}, {"q": ["a"]}, (1,))


def test_an_installed_package_contains_the_metric(monkeypatch, tmp_path):
    assert metric_path() == REPOSITORY / "metrics" / "livestream_recall"
    installed = shutil.copytree(metric_path(), tmp_path / "evaluation_rice" / "metrics" / "livestream_recall")
    monkeypatch.setattr(recall, "__file__", str(tmp_path / "evaluation_rice" / "recall.py"))
    assert metric_path() == installed


def test_expected_hit_is_exact():
    assert expected_hit(50, 1, 5) == pytest.approx(0.1)
    assert expected_hit(4, 2, 2) == pytest.approx(1 - 1 / 6)
    assert expected_hit(3, 1, 10) == 1.0
    assert expected_hit(3, 0, 1) == 0.0


def test_bootstrap_matches_plain_resampling_and_is_seeded():
    hits = np.array([1.0] * 30 + [0.0] * 70)
    low, high = bootstrap_interval(hits)
    assert [low, high] == bootstrap_interval(hits)
    rng = np.random.default_rng(1)
    plain = rng.choice(hits, size=(10_000, 100)).mean(1)
    assert np.allclose([low, high], np.quantile(plain, [0.025, 0.975]), atol=0.011)
    spread = math.sqrt(0.3 * 0.7 / 100)
    assert low == pytest.approx(0.3 - 1.96 * spread, abs=0.015) and high == pytest.approx(
        0.3 + 1.96 * spread, abs=0.015
    )


def test_bootstrap_takes_paired_differences_and_constants():
    assert bootstrap_interval([1.0] * 9) == [1.0, 1.0]
    values = np.random.default_rng(0).normal(size=500)
    low, high = bootstrap_interval(values, num_resamples=2000)
    assert low < values.mean() < high
    with pytest.raises(ValueError, match="at least one query"):
        bootstrap_interval([])


def plain_interval(values, groups, num_resamples, seed):
    """Shops, then clips within each drawn shop, one by one."""
    rng = np.random.default_rng(seed)
    shops = [values[groups == name] for name in np.unique(groups)]
    means = []
    for _ in range(num_resamples):
        drawn = [rng.choice(shops[i], len(shops[i])) for i in rng.integers(len(shops), size=len(shops))]
        means.append(np.concatenate(drawn).mean())
    return np.quantile(means, [0.025, 0.975])


@pytest.mark.parametrize("levels", [2, 4, None])
def test_shops_are_resampled_before_their_clips(levels):
    rng = np.random.default_rng(0)
    groups = np.repeat([f"s{i}" for i in range(9)], rng.integers(2, 30, size=9))
    rng.shuffle(groups)
    values = rng.random(len(groups)) + 0.2 * (groups < "s4")
    if levels:
        values = np.minimum(np.floor(values * levels) / (levels - 1), 1.0)
    result = bootstrap_interval(values, groups)
    assert result == bootstrap_interval(values, groups)
    assert np.allclose(result, plain_interval(values, groups, 4000, 1), atol=0.015)
    low, high = bootstrap_interval(values)
    assert result[0] < low and high < result[1]


def test_intervals_of_shops_by_hand():
    # Of two shops, one all hits and one all misses, a quarter of the resamples has one of them alone.
    halves = [1.0] * 50 + [0.0] * 50
    assert bootstrap_interval(halves, ["a"] * 50 + ["b"] * 50) == [0.0, 1.0]
    assert bootstrap_interval(halves, ["a", "b"] * 50) == pytest.approx(bootstrap_interval(halves), abs=0.06)
    # Only the number of clips in a resample varies: 10 of shop a, 10 of each, or 30 of shop b.
    sizes = [1.0] * 5 + [0.0] * 15
    assert bootstrap_interval(sizes, ["a"] * 5 + ["b"] * 15) == [0.0, 1.0]


def test_one_shop_or_a_shop_for_each_clip_resamples_clips():
    values = (np.random.default_rng(2).random(300) < 0.4).astype(float)
    plain = bootstrap_interval(values)
    assert plain == bootstrap_interval(values, ["shop"] * 300) == bootstrap_interval(values, [""] * 300)
    assert bootstrap_interval(values, [f"s{i}" for i in range(300)]) == pytest.approx(plain, abs=0.01)
    # The table of resamples by shops must not grow with the shops.
    many = np.tile(values, 100)
    low, high = bootstrap_interval(many, np.arange(30_000))
    assert low < many.mean() < high


def test_the_rule_is_named():
    assert interval_words(["a", "b", "a"]).startswith(
        "percentile bootstrap over 2 shops, then over the clips of each ("
    )
    assert interval_words(["", ""]).startswith("percentile bootstrap over clips, since the data has no separate shops")
    assert "as if they were independent" in interval_words(None)
    assert all("10000 resamples, seed 0" in interval_words(shops) for shops in (None, ["a"], ["a", "b"]))
    with pytest.raises(ValueError, match="groups has 2 entries for 3 queries"):
        bootstrap_interval([1, 0, 1], ["a", "b"])


def test_all_hits_or_all_misses_have_wilsons_interval():
    assert hit_interval([0.0] * 5) == pytest.approx(wilson_interval(0.0, 5))
    assert hit_interval([1.0] * 5, ["a"] * 5) == pytest.approx(wilson_interval(1.0, 5))
    assert hit_interval([1.0, 0.0, 1.0], ["a", "a", "b"]) == bootstrap_interval([1.0, 0.0, 1.0], ["a", "a", "b"])
    with pytest.raises(ValueError, match="at least one query"):
        hit_interval([])


def test_all_hits_of_several_shops_say_as_much_as_the_shops():
    """A thousand clips of three shops are no thousand independent trials."""
    shops = ["a"] * 500 + ["b"] * 499 + ["c"]
    assert hit_interval([1.0] * 1000, shops) == pytest.approx(wilson_interval(1.0, 3))
    assert hit_interval([0.0] * 1000, shops) == pytest.approx(wilson_interval(0.0, 3))
    assert hit_interval([1.0] * 4, "abcd") == pytest.approx(wilson_interval(1.0, 4))


@pytest.mark.parametrize("value", [-1.0, -0.5, 0.0, 0.25, 1.0])
def test_equal_differences_have_an_interval_too(value):
    low, high = hit_interval([value] * 3, lowest=-1.0)
    other = wilson_interval(0.0, 3)[1]
    # With the largest share of other values, all of them the lowest or all of them the highest.
    assert low == pytest.approx((1 - other) * value - other) and high == pytest.approx((1 - other) * value + other)
    assert -1.0 <= low <= value <= high <= 1.0


def test_shops_without_a_name_or_with_a_number_are_shops():
    values = (np.random.default_rng(0).random(60) < 0.5).astype(float)
    named = bootstrap_interval(values, ["", "7", "x"] * 20)
    assert bootstrap_interval(values, [None, 7, "x"] * 20) == named
    assert interval_words([None, 7, "x", "7", ""]).startswith("percentile bootstrap over 3 shops")


def test_wilson_interval():
    low, high = wilson_interval(0.5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert wilson_interval(0.0, 5)[0] == 0.0 and wilson_interval(1.0, 5)[1] == 1.0

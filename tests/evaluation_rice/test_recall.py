import json
import math

import numpy as np
import pytest

from evaluation_rice.recall import bootstrap_interval, expected_hit, recall_at_k


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
        ({"q": ["a"]}, {"q": ["a"]}, (), "ks is empty"),
        ({"q": ["a"]}, {"q": ["a"]}, 5, "ks must be a sequence"),
        ([["a"]], {"q": ["a"]}, (1,), "rankings must map"),
    ],
)
def test_refuses_what_would_count_wrongly(rankings, relevant, ks, words):
    with pytest.raises(ValueError, match=words) as error:
        recall_at_k(rankings, relevant, ks)
    assert "\n" not in str(error.value)


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

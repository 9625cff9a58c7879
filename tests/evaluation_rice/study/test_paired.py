import numpy as np
import pytest

from evaluation_rice.study.paired import draw_intervals, mean_interval, paired_difference, read_ranks, verdict


def hits(*rows):
    return {seed: np.array(row, dtype=float) for seed, row in enumerate(rows)}


def test_difference_by_hand():
    result = paired_difference(hits([1, 1, 0, 1], [1, 0, 0, 1]), hits([0, 1, 0, 0], [1, 0, 1, 0]))
    assert result["difference"] == pytest.approx(2 / 8)
    assert result["by_seed"] == pytest.approx([2 / 4, 0.0])
    assert result["num_queries"] == 8 and result["seeds"] == [0, 1]
    assert result["ci95"][0] <= result["difference"] <= result["ci95"][1]


def test_only_common_seeds_are_compared():
    result = paired_difference({0: np.ones(3), 2: np.ones(3)}, {1: np.ones(3), 2: np.zeros(3)})
    assert result["seeds"] == [2] and result["difference"] == 1


def test_seeds_of_one_query_are_drawn_together():
    """Three copies of one run carry no more information than one of them."""
    rng = np.random.default_rng(0)
    one = (rng.random(200) < 0.5).astype(float)
    single, triple = mean_interval({0: one}), mean_interval({0: one, 1: one, 2: one})
    assert single == triple
    other = (rng.random(200) < 0.5).astype(float)
    paired = paired_difference({i: one for i in range(3)}, {i: other for i in range(3)})
    assert paired["ci95"] == pytest.approx(paired_difference({0: one}, {0: other})["ci95"])


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(1)
    right = (rng.random(400) < 0.5).astype(float)
    left = right.copy()
    left[np.flatnonzero(right == 0)[:12]] = 1
    result = paired_difference({0: left}, {0: right})
    assert verdict(result) == "better"
    assert verdict(paired_difference({0: right}, {0: left})) == "worse"
    low, high = mean_interval({0: right})[1]
    assert result["ci95"][1] - result["ci95"][0] < (high - low) / 2


SHOPS = ["a"] * 20 + ["b"] * 20


def test_shops_are_drawn_before_their_clips():
    """The gain is all in one of two shops, so it may be twice as large in the next two shops, or nothing."""
    left, right = np.ones(40), np.array([1.0] * 20 + [0.0] * 20)
    result = paired_difference({0: left}, {0: right}, SHOPS)
    assert result["ci95"] == [0.0, 1.0] and verdict(result) == "no difference shown"
    assert result["interval"].startswith("percentile bootstrap over 2 shops")
    assert mean_interval({0: right}, SHOPS) == (0.5, [0.0, 1.0])
    clips = paired_difference({0: left}, {0: right})
    assert verdict(clips) == "better" and "as if they were independent" in clips["interval"]


@pytest.mark.parametrize(("count", "shops", "words"), [(3, None, "no"), (4, None, "better"), (40, SHOPS, "no")])
def test_equal_gains_of_a_few_clips_or_shops_show_no_difference(count, shops, words):
    """Resampling alone gives them an interval of one point."""
    result = paired_difference({0: np.ones(count)}, {0: np.zeros(count)}, shops)
    assert result["ci95"][0] < 1 == result["ci95"][1] and verdict(result).startswith(words)


def test_no_difference():
    values = np.array([1.0, 0, 1, 0])
    assert verdict(paired_difference({0: values}, {0: values})) == "no difference shown"


@pytest.mark.parametrize(
    ("left", "right", "words"),
    [
        ({0: np.ones(3)}, {1: np.ones(3)}, "no seed in common"),
        ({0: np.ones(3)}, {0: np.ones(4)}, "answer 3 and 4 queries"),
        ({0: np.ones(3), 1: np.ones(2)}, {0: np.ones(3), 1: np.ones(2)}, "different numbers of queries"),
    ],
)
def test_runs_over_different_queries_are_refused(left, right, words):
    with pytest.raises(ValueError, match=words):
        paired_difference(left, right)


def test_ranks_are_in_order_of_the_ids(tmp_path):
    # A line separator of Unicode in an id ends no line.
    (tmp_path / "query_ranks.jsonl").write_text(
        '{"query_id": "b\u2028", "embedding": 2, "fused": 1}\n{"query_id": "a", "embedding": 1}\n', encoding="utf-8"
    )
    ranks = read_ranks(tmp_path)
    assert ranks.query_ids == ["a", "b\u2028"] and ranks.shops is None
    assert ranks.hits("embedding").tolist() == [1.0, 0.0]
    assert ranks.hits("fused") is None


def test_queries_named_by_numbers_have_the_names_of_texts(tmp_path):
    (tmp_path / "query_ranks.jsonl").write_text('{"query_id": 10, "fused": 1}\n{"query_id": "9", "fused": null}\n')
    ranks = read_ranks(tmp_path)
    assert ranks.query_ids == ["10", "9"] and ranks.hits("fused").tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("lives", "shops"),
    [(['"x"', '"y"'], ["y", "x"]), (["7", '"y"'], ["y", "7"]), (['""', '""'], ["", ""]), (["null", '"y"'], None)],
)
def test_ranks_include_their_shops(tmp_path, lives, shops):
    rows = [f'{{"query_id": "{query}", "live_id": {live}, "fused": 3}}' for query, live in zip("ba", lives)]
    (tmp_path / "query_ranks.jsonl").write_text("\n".join(rows))
    ranks = read_ranks(tmp_path)
    assert ranks.shops == shops and ranks.kinds() == "fused" and ranks.hits("live_id") is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no clips"),
        ('{"query_id": "a"}\n' * 2, "line 2: 'a' twice"),
        ("[]", "line 1: expected a JSON object"),
        ('{"embedding": 1}', "line 1: no query_id"),
        ('{"query_id": 1.0}', "line 1: query_id is 1.0, but an id is a string or an integer"),
        ('{"query_id": 7}\n{"query_id": "7"}', "line 2: '7' twice"),
        ('{"query_id": "a", "live_id": true}', "line 1: live_id is True, but"),
        ('{"query_id": "a", "fused": true}', "line 1: the fused rank True must be an integer from 1 on"),
        ('{"query_id": "a", "embedding": 0}', "line 1: the embedding rank 0"),
    ],
)
def test_damaged_ranks_are_refused(tmp_path, content, words):
    (tmp_path / "query_ranks.jsonl").write_text(content)
    with pytest.raises(ValueError, match=f"query_ranks.jsonl.*{words}.*: run eval_rice.py again"):
        read_ranks(tmp_path)


def test_no_runs():
    with pytest.raises(ValueError, match="no results"):
        mean_interval({})


def test_the_picture_shows_each_row(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [("a", "embedding", 0.4, [0.3, 0.5]), ("b", "embedding", 0.6, [0.5, 0.7])]
    draw_intervals(tmp_path / "two.png", rows, "R@1")
    draw_intervals(tmp_path / "five.png", rows + [(name, "matching", 0.5, [0.4, 0.6]) for name in "cde"], "R@1")
    from PIL import Image

    two, five = (Image.open(tmp_path / f"{name}.png") for name in ("two", "five"))
    assert five.height > two.height and len(set(two.convert("L").get_flattened_data())) > 10

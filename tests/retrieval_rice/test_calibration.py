"""Scores to probabilities, against values worked out by hand and scores of a known law."""

import math

import numpy as np
import pytest

from retrieval_rice.calibration import (
    Calibration,
    ScoredClip,
    calibration_error,
    fit_calibration,
    product_shares,
    threshold_at,
)


def test_the_images_of_a_product_share_its_probability():
    scores = np.log([1.0, 2.0, 1.0])
    np.testing.assert_allclose(product_shares(scores, 1.0, ["a", "b", "c"]), [0.25, 0.5, 0.25])
    np.testing.assert_allclose(product_shares(scores, 1.0, ["a", "b", "a"]), [0.5, 0.5, 0.5])
    # Twice as cold: the shares are squared.
    np.testing.assert_allclose(product_shares(scores, 0.5, ["a", "b", "c"]), [1 / 6, 4 / 6, 1 / 6])


def test_confidence_is_presence_times_share():
    calibration = Calibration(temperature=1.0, bias=-1.0, weights=[2.0])
    presence = 1 / (1 + math.exp(1 - 2 * math.log(2)))
    values = calibration.confidences(np.log([1.0, 2.0, 1.0]), None, np.log([1.0, 2.0, 1.0]), ["a", "b", "c"])
    np.testing.assert_allclose(values, presence * np.array([0.25, 0.5, 0.25]))
    with pytest.raises(ValueError, match="calibrate it again"):
        calibration.presence(np.zeros(3), np.zeros(3))


def test_the_threshold_keeps_the_stated_rate():
    absent = np.linspace(0.01, 1, 100)
    for rate in (0.0, 0.05, 0.5):
        assert (absent >= threshold_at(absent, rate)).mean() == pytest.approx(rate)
    assert (np.ones(10) >= threshold_at(np.ones(10), 0.3)).sum() == 0


def test_the_calibration_error_of_known_confidences():
    confidence = np.repeat([0.25, 0.75], 100)
    right = np.concatenate([np.arange(100) < 25, np.arange(100) < 75])
    assert calibration_error(confidence, right, bins=2) == pytest.approx(0)
    assert calibration_error(confidence, np.zeros(200), bins=2) == pytest.approx(0.5)


def simulate(count, rng):
    """Clips whose right image has a score drawn from a softmax of temperature 0.5; others lack their product."""
    clips = []
    for i in range(count):
        scores = rng.normal(size=8)
        shares = np.exp(scores / 0.5) / np.exp(scores / 0.5).sum()
        relevant = np.zeros(8, dtype=bool)
        if i % 2:
            relevant[rng.choice(8, p=shares)] = True
            embedding = scores + 3
        else:
            embedding = scores
        clips.append(ScoredClip(embedding, None, embedding, relevant, list("abcdefgh"), str(i)))
    return clips


def test_a_known_law_is_found_and_holds_on_other_clips():
    rng = np.random.default_rng(0)
    fitted = fit_calibration(simulate(2000, rng), false_accept_rate=0.1)
    assert fitted.temperature == pytest.approx(0.5, rel=0.15)
    others = simulate(2000, rng)
    confidence = np.array(
        [fitted.confidences(c.embedding, None, c.ranked_by, c.products)[c.ranked_by.argmax()] for c in others]
    )
    right = np.array([c.relevant[c.ranked_by.argmax()] for c in others])
    assert calibration_error(confidence, right) < 0.04
    absent = np.array([not c.relevant.any() for c in others])
    assert (confidence[absent] >= fitted.threshold).mean() < 0.15
    assert fitted.report["false_accepts"] <= 0.1 and fitted.report["expected_calibration_error"] < 0.04
    assert Calibration(**fitted.to_dict()) == fitted


def test_clips_that_are_all_ranked_right_give_finite_numbers():
    embedding = np.array([0.9, 0.1, 0.0])
    there = ScoredClip(embedding, embedding, embedding, np.array([True, False, False]), list("abc"))
    gone = ScoredClip(embedding[1:], embedding[1:], embedding[1:], np.array([False, False]), list("bc"))
    fitted = fit_calibration([there, gone] * 20)
    assert np.isfinite([fitted.temperature, fitted.bias, *fitted.weights]).all()
    assert fitted.report["answered"] == 1 and fitted.report["false_accepts"] == 0


def test_mistakes_get_one_sentence():
    with pytest.raises(ValueError, match="at least 10 clips whose product is found .* got 2 and 2"):
        fit_calibration(simulate(4, np.random.default_rng(0)))
    with pytest.raises(ValueError, match="false_accept_rate"):
        fit_calibration(simulate(40, np.random.default_rng(0)), false_accept_rate=1.0)

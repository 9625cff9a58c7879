"""Scores to probabilities, against values worked out by hand and scores of a known distribution."""

import math

import numpy as np
import pytest

from retrieval_rice.index.calibration import (
    Calibration,
    ScoredClip,
    calibration_error,
    fit_calibration,
    fit_with_words,
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


def test_the_calibration_error_under_another_mix():
    # Half of the clips with 0.75 are right. They weigh three times as much as the others, of which none is right.
    confidence, right = np.array([0.0, 0.0, 0.75, 0.75]), np.array([False, False, True, False])
    assert calibration_error(confidence, right, bins=4, weights=np.ones(4)) == pytest.approx((0.25 + 0.75) / 4)
    weights = np.array([1.0, 1.0, 3.0, 3.0])
    assert calibration_error(confidence, right, bins=1, weights=weights) == pytest.approx((6 * 0.75 - 3) / 8)
    # Bins of equal weight: the two light clips and a part of the heavy ones' weight, whose middle counts.
    assert calibration_error(confidence, right, bins=2, weights=weights) == pytest.approx((0.25 * 3 + 0.75 * 3) / 8)


def simulate(count, rng, share=0.5):
    """Clips whose right image has a score drawn from a softmax of temperature 0.5; the others lack their product."""
    clips = []
    for i in range(count):
        scores = rng.normal(size=8)
        shares = np.exp(scores / 0.5) / np.exp(scores / 0.5).sum()
        relevant = np.zeros(8, dtype=bool)
        if rng.random() < share:
            relevant[rng.choice(8, p=shares)] = True
            embedding = scores + 3
        else:
            embedding = scores
        clips.append(ScoredClip(embedding, None, embedding, relevant, list("abcdefgh"), str(i)))
    return clips


def answers(fitted, clips):
    """Confidence of each clip's answer, and whether it is right."""
    confidence = np.array(
        [fitted.confidences(c.embedding, None, c.ranked_by, c.products)[c.ranked_by.argmax()] for c in clips]
    )
    return confidence, np.array([c.relevant[c.ranked_by.argmax()] for c in clips])


# Clips in use come in another mix than those of the fit, in any direction.
@pytest.mark.parametrize("fitted_on, prior", [(0.5, 0.5), (0.5, 0.9), (0.3, 0.9), (0.5, 0.2)])
def test_a_known_distribution_is_fitted_and_holds_on_other_clips(fitted_on, prior):
    rng = np.random.default_rng(0)
    fitted = fit_calibration(simulate(2000, rng, fitted_on), presence_prior=prior, false_accept_rate=0.1)
    assert fitted.temperature == pytest.approx(0.5, rel=0.15)
    others = simulate(2000, rng, prior)
    confidence, right = answers(fitted, others)
    # Sampling alone makes up to 0.05 of it; with the bias of the other mix it is above 0.1.
    assert calibration_error(confidence, right) < 0.06
    absent = np.array([not c.relevant.any() for c in others])
    assert (confidence[absent] >= fitted.threshold).mean() < 0.15
    assert fitted.report["false_accepts"] <= 0.1 and fitted.report["expected_calibration_error"] < 0.06
    assert Calibration.from_dict(fitted.to_dict()) == fitted


def test_the_prior_moves_the_bias_by_its_log_odds():
    clips = simulate(400, np.random.default_rng(0))
    present = sum(bool(clip.relevant.any()) for clip in clips)
    half, most = (fit_calibration(clips, presence_prior=prior) for prior in (0.5, 0.9))
    assert most.bias - half.bias == pytest.approx(math.log(0.9 / 0.1))
    assert (most.weights, most.temperature) == (half.weights, half.temperature)
    # As many products again are in the shop but not among the candidates: found are at most 0.9 / 2.
    missed = [ScoredClip(c.embedding, None, c.ranked_by, np.zeros(8, bool), c.products, c.group, True) for c in clips]
    both = fit_calibration([*clips, *missed[:present]], presence_prior=0.9)
    same = fit_calibration([*clips, *missed[:present]], presence_prior=0.5)
    assert both.bias - same.bias == pytest.approx(math.log(0.45 / 0.55) - math.log(0.25 / 0.75))
    assert both.report["num_present"] == 2 * present and both.report["num_absent"] == 400 - present


def test_by_default_answers_more_likely_right_than_wrong_are_given():
    rng = np.random.default_rng(0)
    clips = simulate(1000, rng)
    fitted, strict = fit_calibration(clips), fit_calibration(clips, false_accept_rate=0.05)
    assert (fitted.presence_prior, fitted.threshold, fitted.false_accept_rate) == (0.9, 0.5, None)
    assert strict.threshold > 0.5 and strict.report["false_accepts"] <= 0.05
    assert fitted.report["answered"] > strict.report["answered"]
    # No other threshold gains more where a right answer counts one and a wrong one minus one.
    confidence, right = answers(fitted, simulate(8000, rng, 0.9))
    gains = {t: np.where(right, 1, -1)[confidence >= t].sum() for t in (0.3, 0.5, 0.7)}
    assert max(gains, key=gains.get) == 0.5


def test_galleries_of_unequal_sizes_are_fitted_together():
    """The padding of the smaller ones takes no part: what is fitted is the mean over them, whatever is beside."""
    rng = np.random.default_rng(3)
    clips = simulate(400, rng)
    alone = fit_calibration(clips)
    # One more candidate that cannot be it changes nothing, and makes its row longer than the others.
    longer = [
        ScoredClip(
            np.append(clip.embedding, -1e6),
            None,
            np.append(clip.ranked_by, -1e6),
            np.append(clip.relevant, False),
            [*clip.products, "far away"],
            clip.group,
        )
        if i % 3 == 0
        else clip
        for i, clip in enumerate(clips)
    ]
    mixed = fit_calibration(longer)
    np.testing.assert_allclose(
        [mixed.temperature, mixed.bias, *mixed.weights], [alone.temperature, alone.bias, *alone.weights], rtol=1e-6
    )
    assert mixed.report == pytest.approx(alone.report) and mixed.report["answered"] > 0.3


@pytest.mark.parametrize("unit", [1e-3, 0.02, 1000.0])
def test_the_unit_of_the_scores_does_not_matter(unit):
    """Cosines differ by hundredths: the temperature that they need must not lie beyond the bounds of the fit."""
    clips, other = (simulate(600, np.random.default_rng(seed), 0.9) for seed in (0, 1))
    scaled = [ScoredClip(unit * c.embedding, None, unit * c.ranked_by, c.relevant, c.products, c.group) for c in clips]
    plain, fitted = fit_calibration(clips), fit_calibration(scaled)
    assert fitted.temperature == pytest.approx(unit * plain.temperature, rel=1e-4)
    assert fitted.temperature == pytest.approx(unit * 0.5, rel=0.15)
    assert fitted.report == pytest.approx(plain.report, rel=1e-4)
    expected, right = answers(plain, other)
    confidence = [fitted.confidences(unit * c.embedding, None, unit * c.ranked_by, c.products).max() for c in other]
    np.testing.assert_allclose(confidence, expected, rtol=1e-4)
    assert calibration_error(expected, right) < 0.08


def test_scores_that_are_not_finite_are_refused():
    clips = simulate(200, np.random.default_rng(0))
    clips[5].ranked_by = clips[5].embedding = np.where(np.arange(8) == 2, np.nan, clips[5].embedding)
    with pytest.raises(ValueError, match="a validation clip of 5 has scores that are not finite"):
        fit_calibration(clips)


def test_a_calibration_that_answers_nothing_is_refused():
    rng = np.random.default_rng(0)
    # What is found looks like what is not, so that nothing is ever likelier right than wrong.
    clips = [
        ScoredClip(scores, None, scores, np.arange(8) == (0 if i % 2 else 9), list("abcdefgh"), str(i))
        for i in range(100)
        for scores in [rng.normal(size=8) * 1e-3]
    ]
    with pytest.raises(ValueError, match="none of the 50 validation clips would be answered: .* threshold 0.50"):
        fit_calibration(clips, presence_prior=0.5)


def test_a_calibration_round_trips():
    values = Calibration(temperature=2.0, bias=-1.0, weights=[2.0]).to_dict()
    assert Calibration.from_dict(values) == Calibration(2.0, -1.0, [2.0])
    for change in ({"presence_prior": None}, {"other": 1}):
        broken = {name: value for name, value in {**values, **change}.items() if value is not None or name == "rerank"}
        with pytest.raises(ValueError, match="a calibration must have the fields"):
            Calibration.from_dict(broken)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"temperature": -1.0}, "temperature must be a finite number"),
        ({"bias": math.inf}, "bias must be a finite number"),
        ({"weights": [math.nan]}, "a weight must be a finite number"),
        ({"threshold": math.nan}, "threshold must be a finite number"),
        ({"threshold": -0.1}, "threshold must be a finite number from 0 to 1"),
        ({"presence_prior": -5}, "presence_prior must be above 0 and below 1"),
        ({"presence_prior": True}, "presence_prior must be above 0 and below 1"),
        ({"false_accept_rate": "0.1"}, "false_accept_rate must be at least 0"),
        ({"rerank": math.inf}, "rerank must be a whole number"),
        ({"rerank": -1}, "rerank must be at least 0"),
    ],
)
def test_stored_calibration_numbers_are_checked(change, words):
    with pytest.raises(ValueError, match=words):
        Calibration(**{"temperature": 1.0, "bias": 0.0, "weights": [1.0], **change})


def test_clips_that_are_all_ranked_right_give_finite_numbers():
    embedding = np.array([0.9, 0.1, 0.0])
    there = ScoredClip(embedding, embedding, embedding, np.array([True, False, False]), list("abc"))
    gone = ScoredClip(embedding[1:], embedding[1:], embedding[1:], np.array([False, False]), list("bc"))
    fitted = fit_calibration([there, gone] * 20)
    assert np.isfinite([fitted.temperature, fitted.bias, *fitted.weights]).all()
    assert fitted.report["answered"] == 1 and fitted.report["false_accepts"] == 0


def test_mistakes_get_one_sentence():
    few = [*simulate(2, np.random.default_rng(0), 1.0), *simulate(2, np.random.default_rng(0), 0.0)]
    with pytest.raises(ValueError, match="at least 10 clips whose product is found .* got 2 and 2"):
        fit_calibration(few)
    with pytest.raises(ValueError, match="false_accept_rate must be at least 0 and below 1, got 1.0"):
        fit_calibration(few, false_accept_rate=1.0)


@pytest.mark.parametrize("prior", [0, 1, -0.1, 90, math.nan])
def test_a_prior_is_a_probability(prior):
    with pytest.raises(ValueError, match="presence_prior must be above 0 and below 1, got .*; it is the share"):
        fit_calibration(simulate(4, np.random.default_rng(0)), presence_prior=prior)


def louder(clips, by):
    """The same clips with higher embedding scores, as known words make them."""
    return [ScoredClip(c.embedding + by, None, c.ranked_by, c.relevant, c.products, c.group) for c in clips]


def test_clips_with_words_have_a_calibration_of_their_own():
    clips = simulate(400, np.random.default_rng(0))
    fitted = fit_with_words(clips, louder(clips, 5.0), presence_prior=0.8, false_accept_rate=0.1)
    alone = fit_calibration(clips, presence_prior=0.8, false_accept_rate=0.1)
    assert (fitted.bias, fitted.weights, fitted.threshold) == (alone.bias, alone.weights, alone.threshold)
    assert fitted.of_clip(False) is fitted and fitted.of_clip(True) is fitted.said
    # The shift is all that differs, and is undone by the bias.
    assert fitted.said.weights == pytest.approx(fitted.weights, rel=1e-3)
    assert fitted.said.bias == pytest.approx(fitted.bias - 5 * fitted.weights[0], rel=1e-3)
    assert fitted.report["said"]["num_present"] == fitted.report["num_present"]
    assert Calibration.from_dict(fitted.to_dict()) == fitted
    old = {name: value for name, value in alone.to_dict().items() if name != "said"}
    assert Calibration.from_dict(old) == alone and alone.of_clip(True) is alone


def test_too_few_transcripts_are_reported():
    clips = simulate(400, np.random.default_rng(0))
    fitted = fit_with_words(clips, louder(clips[:5], 5.0))
    assert fitted.said is None and fitted.of_clip(True) is fitted
    assert fitted.report["said"].startswith("not calibrated separately: calibration needs at least 10 clips")
    assert "said" not in fit_with_words(clips, []).report

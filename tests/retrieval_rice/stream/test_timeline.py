"""From answers to segments: time lines worked out by hand, and the output files."""

import json
import tracemalloc
from types import SimpleNamespace

import pytest

from retrieval_rice.index import Answer, Hit
from retrieval_rice.stream.speech import Word
from retrieval_rice.stream.timeline import (
    TABLE_HEADER,
    Hysteresis,
    Segment,
    Timeline,
    clock,
    json_line,
    table_row,
    vtt_cue,
)


def hit(product, confidence=1.0, image=None, title=None):
    image = image or f"{product}-0"
    return Hit(image, product, "live", f"Title {product}" if title is None else title, "", 0.0, 0.0, None, confidence)


def answer(**confidences):
    hits = sorted((hit(name, value) for name, value in confidences.items()), key=lambda h: -h.confidence)
    return Answer(hits, False, hits[0].confidence if hits else 0.0)


def run(answers, hysteresis=None, **kwargs):
    """Windows of 4 s, one per second from 0 on, as (start, end, product) of the segments."""
    timeline = Timeline(hysteresis, **kwargs)
    segments = [segment for i, item in enumerate(answers) for segment in timeline.add(i + 2.0, item)]
    return segments + timeline.finish(len(answers) + 3.0)


def spans(segments):
    return [(s.start_s, s.end_s, s.hit and s.hit.product_id) for s in segments]


A, B, NOTHING = answer(a=0.9, b=0.1), answer(a=0.1, b=0.9), answer(a=0.05, b=0.05)


def test_a_switch_is_dated_where_the_confidences_cross():
    # Windows in the middle of 2, 3, 4, 5 s show a, those of 6 s and later b; they cross half way.
    assert spans(run([A] * 4 + [B] * 4)) == [(0.0, 5.5, "a"), (5.5, 11.0, "b")]
    # A window with as much of both lies on the boundary itself.
    assert spans(run([A] * 4 + [answer(a=0.5, b=0.5)] + [B] * 4)) == [(0.0, 6.0, "a"), (6.0, 12.0, "b")]


def test_mean_confidence_and_alternatives_of_a_segment():
    first, second = run([A] * 3 + [answer(a=0.6, b=0.3, c=0.1)] + [B] * 4)
    assert first.confidence == pytest.approx((3 * 0.9 + 0.6) / 4)
    assert [h.product_id for h in first.alternatives] == ["b", "c"]
    assert first.alternatives[0].confidence == pytest.approx((3 * 0.1 + 0.3) / 4)
    assert first.hit.confidence == 0.9
    assert second.confidence == pytest.approx(0.9)


def test_a_single_wrong_window_changes_nothing():
    assert spans(run([A] * 4 + [B] + [A] * 4)) == [(0.0, 12.0, "a")]
    assert spans(run([A] * 4 + [NOTHING] + [A] * 4)) == [(0.0, 12.0, "a")]
    # With patience 1 and no smoothing it does.
    quick = Hysteresis(patience=1, smoothing=1.0)
    assert spans(run([A] * 4 + [B] + [A] * 4, quick)) == [(0.0, 5.5, "a"), (5.5, 6.5, "b"), (6.5, 12.0, "a")]


def test_a_lead_below_the_margin_does_not_switch():
    close = [answer(a=0.46, b=0.54)] * 20
    assert spans(run([A] * 4 + close, Hysteresis(margin=0.1))) == [(0.0, 27.0, "a")]
    assert [s.hit.product_id for s in run([A] * 4 + close, Hysteresis(margin=0.05))] == ["a", "b"]


def test_equal_confidences_never_switch():
    tied = [answer(a=0.5, b=0.5)] * 10
    assert len(run([A] * 3 + tied, Hysteresis(enter=0, leave=0, margin=0))) == 1


def test_no_product_between_two_thresholds():
    rules = Hysteresis(enter=0.6, leave=0.4, smoothing=1.0)
    # 0.5 is not enough to enter, and enough to stay.
    weak = answer(a=0.5)
    assert spans(run([weak] * 5, rules)) == [(0.0, 8.0, None)]
    assert spans(run([A] * 4 + [weak] * 5, rules)) == [(0.0, 12.0, "a")]
    # From 0.9 to 0.1 the level between the thresholds, 0.5, is crossed half way (about, for a).
    gone = run([A] * 4 + [answer(a=0.11, b=0.1)] * 4 + [B] * 4, rules)
    assert [s.hit and s.hit.product_id for s in gone] == ["a", None, "b"]
    assert [s.end_s for s in gone] == pytest.approx([5 + 0.4 / 0.79, 9.5, 15.0])
    assert gone[1].confidence == pytest.approx(0.89) and gone[1].alternatives[0].product_id == "a"


def test_a_segment_is_reported_as_soon_as_it_is_certain():
    timeline = Timeline(Hysteresis(patience=2, smoothing=1.0))
    told = [bool(timeline.add(i + 2.0, item)) for i, item in enumerate([A] * 4 + [B] * 3)]
    assert told == [False] * 5 + [True, False]
    assert timeline.current.product_id == "b" and timeline.since_s == 5.5


def test_too_few_windows_to_be_sure():
    assert spans(run([A], Hysteresis(patience=3))) == [(0.0, 4.0, "a")]
    assert spans(run([Answer([], True, 0.0)])) == [(0.0, 4.0, None)]
    assert run([]) == []


def test_a_switch_just_before_the_end():
    # Smoothing asks for b at the last window only, but two speak for it.
    assert spans(run([A] * 6 + [B] * 2)) == [(0.0, 7.5, "a"), (7.5, 11.0, "b")]
    assert spans(run([A] * 6 + [B])) == [(0.0, 10.0, "a")]
    # A window that smoothing has not noticed does not count.
    assert spans(run([A] * 6 + [B, A])) == [(0.0, 11.0, "a")]


def test_stretches_are_independent():
    timeline = Timeline()
    timeline.start(0.0)
    for i in range(4):
        timeline.add(i + 2.0, A)
    assert spans(timeline.finish(7.0)) == [(0.0, 7.0, "a")]
    timeline.start(60.0)
    assert not timeline.is_decided and timeline.current is None
    for i in range(4):
        timeline.add(62.0 + i, A)
    assert spans(timeline.finish(67.0)) == [(60.0, 67.0, "a")]


def test_images_of_one_product_count_once():
    two = Answer([hit("a", 0.7, "a-0"), hit("a", 0.7, "a-1"), hit("b", 0.3)], False, 0.7)
    (segment,) = run([two] * 4)
    assert segment.confidence == pytest.approx(0.7)
    assert [h.product_id for h in segment.alternatives] == ["b"]
    # Without a product an image stands for itself.
    (segment,) = run([Answer([hit("", 0.9, "image-7")], False, 0.9)] * 4)
    assert segment.hit.image_id == "image-7"


def test_memory_does_not_grow_with_time():
    timeline = Timeline()
    sizes = []
    tracemalloc.start()
    try:
        for i in range(6000):
            timeline.add(float(i), answer(**{"a": 0.9, f"p{i}": 0.05, f"q{i}": 0.05}))
            if i in (1000, 5999):
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sizes[1] < sizes[0] + 20_000
    (segment,) = timeline.finish(6000.0)
    assert segment.hit.product_id == "a" and segment.confidence == pytest.approx(0.9)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"enter": 0.3, "leave": 0.4}, "leave <= enter"),
        ({"margin": -0.1}, "margin"),
        ({"patience": 0}, "at least 1"),
        ({"smoothing": 0.0}, "above 0"),
    ],
)
def test_invalid_rules_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Hysteresis(**settings)


def test_rules_follow_the_index():
    calibrated = SimpleNamespace(calibration=SimpleNamespace(threshold=0.4))
    rules = Hysteresis.for_index(calibrated)
    assert (rules.enter, rules.leave) == (0.4, pytest.approx(0.28))
    # Shares of a flat softmax: no probabilities, but the largest is still the likeliest.
    rules = Hysteresis.for_index(SimpleNamespace(calibration=None))
    flat = [answer(a=0.11, b=0.1)] * 5 + [answer(a=0.1, b=0.11)] * 8
    assert [s.hit.product_id for s in run(flat, rules)] == ["a", "b"]


@pytest.mark.parametrize(
    "seconds, digits, text",
    [(0, 3, "00:00:00.000"), (3661.5, 3, "01:01:01.500"), (59.9996, 3, "00:01:00.000"), (36000, 1, "10:00:00.0")],
)
def test_clock(seconds, digits, text):
    assert clock(seconds, digits) == text


def test_output_files():
    segment = Segment(1.5, 63.25, hit("p1", title="Cup <red> & blue\n--> \x1b[31mnow"), 0.876, [hit("p2", 0.1)])
    assert vtt_cue(segment) == ("00:00:01.500 --> 00:01:03.250\nCup &lt;red&gt; &amp; blue --&gt; [31mnow (88%)\n\n")
    row = table_row(segment)
    assert row.split() == "00:00:01.5 00:01:03.2 88% p1 Cup <red> & blue --> [31mnow".split()
    assert row.index("p1") == TABLE_HEADER.index("product") and row.index("Cup") == TABLE_HEADER.index("title")
    entry = json.loads(json_line(segment))
    assert (entry["start_s"], entry["end_s"], entry["product_id"], entry["confidence"]) == (1.5, 63.25, "p1", 0.876)
    assert entry["title"] == segment.hit.title
    assert entry["alternatives"] == [
        {"product_id": "p2", "image_id": "p2-0", "live_id": "live", "title": "Title p2", "confidence": 0.1}
    ]


def test_output_files_without_a_product():
    segment = Segment(0.0, 2.0, None, 0.9)
    assert vtt_cue(segment) == ""
    assert "(no product)" in table_row(segment)
    assert json.loads(json_line(segment))["product_id"] is None


def test_an_index_with_words_enters_at_the_higher_threshold():
    def entering(threshold, said):
        return Hysteresis.for_index(SimpleNamespace(calibration=SimpleNamespace(threshold=threshold, said=said))).enter

    assert entering(0.4, None) == 0.4
    assert entering(0.4, SimpleNamespace(threshold=0.6)) == 0.6 == entering(0.6, SimpleNamespace(threshold=0.4))


def test_words_in_the_outputs():
    said = [Word(2.0, 2.5, "a"), Word(2.5, 3.0, "red <mug>.\x1b"), Word(9.0, 9.5, "next")]
    segment = Segment(1.5, 12.0, None, 0.5, said=said)
    assert vtt_cue(segment) == (
        "00:00:02.000 --> 00:00:03.000\n(a red &lt;mug&gt;.)\n\n00:00:09.000 --> 00:00:09.500\n(next)\n\n"
    )
    assert json.loads(json_line(segment))["asr"] == "a red <mug>.\x1b next"
    assert "asr" not in json.loads(json_line(Segment(0.0, 1.0, None, 0.5)))

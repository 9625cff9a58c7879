"""Words around windows: known, late and missing words, and which side waits."""

import math
import threading
import time

import pytest

from retrieval_rice.stream.speech import Hearing, Word, join_words, phrases, word_of


def hearing(speech, **settings):
    notices = []
    result = Hearing(speech, notify=notices.append, **settings)
    result.start()
    return result, notices


def words(*parts):
    return [Word(*part) for part in parts]


def test_a_window_gets_the_words_around_it():
    tool, notices = hearing([(0, 1, "zero"), (4, 5, "four"), (4.5, 6, "and"), (9, 10, "nine")])
    assert tool.text(0, 3) == "zero"
    # What begins where the window ends is not in it.
    assert tool.text(1, 4) == "zero" and tool.text(1, 4.1) == "zero four"
    assert tool.text(5, 8) == "four and"
    assert tool.text(6.5, 8.5) == ""
    assert tool.text(7, 20) == "nine"
    assert (tool.counts.words, tool.counts.late, tool.counts.lost, notices) == (4, 0, 0, [])


def test_words_are_sorted_by_time():
    tool, _ = hearing([(3, 4, "mug"), (1, 2, "a"), (2, 3, "red"), (2.5, 2, "backward")])
    assert tool.text(0, 5) == "a red backward mug"


def test_invalid_words_are_left_out_and_counted():
    bad = [(math.nan, 1, "x"), (0, math.inf, "x"), (0, 1, " "), (0, 1, None), ("a", 1, "x"), "abc", (0, 1), 7, None]
    assert [word_of(value) for value in bad] == [None] * len(bad)
    assert word_of(("1", 2, " two \n lines ")) == Word(1.0, 2.0, "two lines")
    assert word_of((10**400, 1, "a")) is None
    assert word_of((1, 2, "half a \ud83d")) == Word(1.0, 2.0, "half a \ufffd")
    assert word_of((5, 1e9, "x" * 10_000)) == Word(5.0, 65.0, "x" * 2000)
    tool, _ = hearing([*bad, (0, 1, "good")])
    assert tool.text(0, 5) == "good" and tool.counts.lost == len(bad) and tool.counts.words == 1
    for value in ("words", b"words", 5, None):
        with pytest.raises(ValueError, match="`speech` must be an iterable of words"):
            Hearing(value)


class Later:
    """Words that are given when they are told to come."""

    def __init__(self):
        self.items, self.changed, self.ended = [], threading.Condition(), False

    def say(self, tool, *items):
        with self.changed:
            self.items += items
            self.changed.notify_all()
        end = time.monotonic() + 5
        while self.items and time.monotonic() < end:
            time.sleep(0.001)

    def __iter__(self):
        while True:
            with self.changed:
                while not self.items and not self.ended:
                    self.changed.wait(5)
                if not self.items:
                    return
                item = self.items[0]
            yield item
            self.items.pop(0)

    def stop(self):
        with self.changed:
            self.ended = True
            self.changed.notify_all()


def test_late_words_are_scored_once_with_the_next_window_and_reported():
    source = Later()
    tool, notices = hearing(source)
    assert tool.text(0, 4, now_s=4) == ""
    # In time for the windows around it, but four seconds after it was said.
    source.say(tool, (2, 3, "mug"))
    assert tool.text(1, 7, now_s=7) == "mug"
    source.say(tool, (1, 2, "late"))
    assert tool.text(4, 10, now_s=10) == "late"
    assert tool.text(5, 11, now_s=11) == ""
    assert (tool.counts.words, tool.counts.late) == (2, 1)
    assert tool.counts.longest_delay_s == 5.0 and tool.counts.delay_s == pytest.approx((1 + 5) / 2)
    assert len(notices) == 1 and notices[0].startswith("words come 5.0 s late, and 1 so far")
    # What is said of long ago is not said of this.
    source.say(tool, (12, 13, "old"), (50, 51, "new"))
    assert tool.text(46, 52, now_s=50) == "new"
    assert tool.counts.lost == 1
    tool.stop()


def test_words_during_a_pause_of_the_picture_belong_to_no_window():
    tool, _ = hearing([(20, 21, "meanwhile"), (100, 101, "now")])
    assert tool.text(0, 6, first_s=0) == ""
    assert tool.text(96, 106, first_s=96) == "now" and tool.counts.late == 0


def test_a_live_picture_does_not_wait_for_words():
    source = Later()
    tool, _ = hearing(source)
    start = time.monotonic()
    for second in range(100):
        assert tool.text(second, second + 4) == ""
    assert time.monotonic() - start < 1
    tool.stop()


class Slow:
    """A word a second, each heard a little later."""

    def __init__(self, delay_s=0.02, stops_at=None):
        self.heard_s, self.delay_s, self.stops_at = -math.inf, delay_s, stops_at

    def __iter__(self):
        for second in range(6):
            if second == self.stops_at:
                time.sleep(10)
            time.sleep(self.delay_s)
            yield (second, second + 0.5, str(second))
            self.heard_s = second + 1.0
        self.heard_s = math.inf


def test_a_file_waits_for_a_source_of_words_that_reports_its_position():
    tool = Hearing(Slow(), waits=True)
    tool.start()
    assert [tool.text(start, start + 2) for start in (0, 2, 4, 6)] == ["0 1", "2 3", "4 5", ""]


def test_waiting_for_words_has_a_limit(monkeypatch):
    monkeypatch.setattr("retrieval_rice.stream.speech._LONGEST_WAIT_S", 0.2)
    notices = []
    tool = Hearing(Slow(stops_at=2), waits=True, notify=notices.append)
    tool.start()
    assert tool.text(0, 2) == "0 1" and tool.text(2, 4) == ""
    assert "made no progress" in notices[0]


def test_a_failing_source_of_words_is_reported_and_the_rest_has_no_words():
    def source():
        yield (0, 1, "one")
        raise RuntimeError("the model\nis broken")

    tool, notices = hearing(source())
    assert tool.text(0, 5) == "one" and tool.text(5, 9) == ""
    assert notices == ["speech is not available from here on: the model is broken"]


class Failing:
    """A source of words whose every other part fails."""

    def __iter__(self):
        yield (0, 1, "one")

    @property
    def heard_s(self):
        raise RuntimeError("no clock")

    def stop(self):
        raise RuntimeError("no brake")


def test_a_failing_source_of_words_does_not_affect_the_picture():
    notices = []
    tool = Hearing(Failing(), waits=True, notify=notices.append)
    tool.start()
    assert tool.text(0, 5) == "one" and tool.text(5, 9) == ""
    tool.stop()
    assert notices == [
        "the progress of the words is unknown, so windows do not wait for them: no clock",
        "the source of words could not be stopped: no brake",
    ]


@pytest.mark.parametrize("error, words", [(RuntimeError(), "RuntimeError"), (SystemExit(3), "3")])
def test_a_failure_without_message_is_reported(error, words):
    def source():
        yield (0, 1, "one")
        raise error

    tool, notices = hearing(source())
    assert tool.text(0, 5) == "one" and notices == [f"speech is not available from here on: {words}"]


def test_words_of_segments():
    tool, _ = hearing([(0, 1, "a"), (5, 6, "c"), (3, 4, "b"), (9, 9.5, "d")])
    tool.text(0, 8)
    assert [word.text for word in tool.said(0, 5)] == ["a", "b"]
    tool.text(4, 12)
    assert [word.text for word in tool.said(5, 20)] == ["c", "d"]
    assert tool.said(20, 30) == []


def test_spaces_where_a_script_has_them():
    assert join_words(words((0, 1, "red"), (1, 2, "mug"))) == "red mug"
    assert join_words(words((0, 1, "红色"), (1, 2, "杯子"), (2, 3, "OK"))) == "红色杯子 OK"
    assert join_words([]) == ""


def test_phrases_fit_into_a_subtitle():
    said = words((0, 1, "look"), (1, 2, "here."), (2, 3, "red"), (5, 6, "mug"), (6, 7, "x" * 40), (7, 8, "y"))
    assert phrases(said) == words((0, 2, "look here."), (2, 3, "red"), (5, 6, "mug"), (6, 8, "x" * 40 + " y"))
    assert [part.text for part in phrases(words(*((i, i + 1, "w") for i in range(8))))] == ["w w w w w w", "w w"]

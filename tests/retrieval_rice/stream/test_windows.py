"""Windows of a stream."""

import pytest
import torch

from retrieval_rice.stream.source import Frame
from retrieval_rice.stream.windows import cut_windows


def frames_at(*times):
    return [Frame(time_s, None) for time_s in times]


def spans(windows):
    return [(round(w.start_s, 6), round(w.end_s, 6), [f.time_s for f in w.frames]) for w in windows]


def test_windows_by_hand():
    windows = list(cut_windows(frames_at(0.0, 0.5, 1.0, 1.5, 2.0, 2.5), 2.0, 1.0, step_s=0.5))
    assert spans(windows) == [
        (0.0, 2.0, [0.0, 0.5, 1.0, 1.5]),
        # As long as the others, up to the end of the last frame.
        (1.0, 3.0, [1.0, 1.5, 2.0, 2.5]),
    ]
    assert [w.numbers for w in windows] == [[0, 1, 2, 3], [2, 3, 4, 5]]
    assert [(w.is_first, w.is_last) for w in windows] == [(True, False), (False, True)]


def test_short_and_empty_streams():
    assert list(cut_windows([], 4.0, 1.0)) == []
    (only,) = cut_windows(frames_at(0.0), 4.0, 1.0, step_s=0.4)
    assert (only.start_s, only.end_s, only.is_first, only.is_last) == (0.0, 0.4, True, True)
    # Frames that come slowly last longer.
    (only,) = cut_windows(frames_at(0.0, 1.0), 4.0, 1.0, step_s=0.4)
    assert (only.start_s, only.end_s) == (0.0, 2.0)
    # The header knows that the clip is shorter than a step.
    (only,) = cut_windows(frames_at(0.0), 4.0, 1.0, step_s=0.4, length_s=0.04)
    assert only.end_s == 0.04


def test_a_pause_ends_a_stretch():
    windows = list(cut_windows(frames_at(0.0, 1.0, 2.0, 3.0, 50.0, 51.0), 2.0, 1.0, step_s=1.0))
    assert spans(windows) == [
        (0.0, 2.0, [0.0, 1.0]),
        (1.0, 3.0, [1.0, 2.0]),
        (2.0, 4.0, [2.0, 3.0]),
        (50.0, 52.0, [50.0, 51.0]),
    ]
    assert [w.is_first for w in windows] == [True, False, False, True]
    assert [w.is_last for w in windows] == [False, False, True, True]


def test_windows_without_frames_are_left_out():
    windows = list(cut_windows(frames_at(0.0, 0.5, 4.0), 1.5, 1.5, step_s=0.5, length_s=4.5))
    assert spans(windows) == [(0.0, 1.5, [0.0, 0.5]), (3.0, 4.5, [4.0])]


def test_uneven_times_lose_no_frame():
    generator = torch.Generator().manual_seed(3)
    times = (torch.rand(400, generator=generator) * 1.5).cumsum(0).tolist()
    windows = list(cut_windows(frames_at(*times), 3.0, 0.7, step_s=0.4))
    assert {number for w in windows for number in w.numbers} == set(range(400))
    assert all(w.frames for w in windows)
    assert all(w.start_s - 0.01 <= f.time_s < w.end_s for w in windows for f in w.frames)
    ends = [w.end_s for w in windows]
    assert ends == sorted(ends)


def test_a_window_is_given_as_soon_as_it_is_complete():
    taken = []

    def source():
        for frame in frames_at(*range(100)):
            taken.append(frame.time_s)
            yield frame

    windows = cut_windows(source(), 4.0, 1.0, step_s=1.0)
    assert next(windows).end_s == 4.0 and taken[-1] == 4
    assert next(windows).end_s == 5.0 and taken[-1] == 5


@pytest.mark.parametrize("window_s, hop_s", [(1.0, 2.0), (0.0, 0.0), (1.0, -1.0)])
def test_lengths_that_leave_gaps(window_s, hop_s):
    with pytest.raises(ValueError, match="hop <= window"):
        list(cut_windows([], window_s, hop_s))

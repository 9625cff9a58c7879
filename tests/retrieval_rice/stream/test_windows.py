"""Windows of a stream, and joining encoded frames against encoding them together."""

import pytest
import torch
from transformers import CLIPVisionConfig, SiglipVisionConfig

from modeling_rice import RiceConfig, RiceModel
from retrieval_rice.stream.source import Frame
from retrieval_rice.stream.windows import cut_windows, join_frames, shares_frames

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY |= {"image_size": 32, "patch_size": 8}


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


def test_a_window_comes_as_soon_as_it_is_complete():
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


VARIANTS = {
    "default": {},
    "clip4clip": {"preset": "clip4clip"},
    "raw tokens": {"decoder_token_source": "raw", "decoder_normalize_key_value": False},
    "no decoder": {"use_decoder": False},
    "weighted frames": {"temporal_pooling": "attention", "frame_consensus_scale": 4.0},
    "mean pooling": {"vision_config": SiglipVisionConfig(**TINY), "vision_pooling": "mean"},
}


def make_model(preset=None, **settings):
    settings = {"vision_config": CLIPVisionConfig(**TINY), "projection_dim": 16, "decoder_num_heads": 4, **settings}
    model = RiceModel(RiceConfig(**settings) if preset is None else RiceConfig.from_preset(preset, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_joined_frames_equal_a_clip_encoded_whole(variant, masked):
    model = make_model(**VARIANTS[variant])
    assert shares_frames(model)
    pixels = torch.randn(1, 5, 3, 32, 32)
    patch_mask = torch.rand(1, 5, 16) < 0.5 if masked else None
    whole = model.encode_clips(pixels, patch_mask=patch_mask)
    # In two batches, as a stream's frames come.
    parts = [
        model.encode_clips(pixels[0, rows, None], patch_mask=None if patch_mask is None else patch_mask[0, rows, None])
        for rows in (slice(0, 2), slice(2, 5))
    ]
    joined = join_frames(type(whole).cat(parts), model.temporal_pooling)
    for name in whole.fields:
        expected = getattr(whole, name)
        if expected is None:
            assert getattr(joined, name) is None
            continue
        torch.testing.assert_close(getattr(joined, name).float(), expected.float(), atol=1e-5, rtol=0)
    assert joined.model_fingerprint == model.fingerprint()
    gallery = model.encode_gallery(torch.randn(4, 3, 32, 32))
    torch.testing.assert_close(model.similarity(joined, gallery), model.similarity(whole, gallery), atol=1e-5, rtol=0)
    if model.decoder is not None:
        torch.testing.assert_close(model.match(joined, gallery), model.match(whole, gallery), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"preset": "mmf"}, {"temporal_pooling": "lstm"}, {"temporal_pooling": "transformer"}]
)
def test_models_whose_frames_cannot_be_joined(settings):
    model = make_model(**settings)
    assert not shares_frames(model)
    pixels = torch.randn(1, 5, 3, 32, 32)
    joined = join_frames(model.encode_clips(pixels[0, :, None]), model.temporal_pooling)
    # Why they are refused.
    assert (joined.embeds - model.encode_clips(pixels).embeds).abs().max() > 1e-4

"""Transcribed uploads: their words with times, and the effect on the ranking."""

import numpy as np
import pytest
from transformers import BertConfig

from retrieval_rice.demo.page import Demo, caption, said_pieces
from retrieval_rice.index import GalleryIndex
from retrieval_rice.stream.speech import Word
from retrieval_rice.uploads import UploadLimits, read_upload
from rice_cli import main

av = pytest.importorskip("av")


@pytest.fixture
def hearing_demo(make_index_model, index_processor, make_shop_rows, tmp_path):
    """A demo whose model reads text, and whose ear hears two words in loud sound."""
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = BertConfig(**tiny, vocab_size=len(index_processor.tokenizer)).to_dict()
    model = make_index_model(text_config=text, text_score_weight=5.0, fusion_weight=0.01)
    rows = make_shop_rows()
    (tmp_path / "uploads").mkdir()
    index = GalleryIndex.build(model, index_processor, rows, progress=False)

    def ear(samples):
        (places,) = np.nonzero(np.abs(samples) > 0.1)
        if not len(places):
            return []
        start_s = places[0] / 16000
        return [Word(start_s, start_s + 0.2, " title"), Word(start_s + 0.2, start_s + 0.5, " 3")]

    return Demo(model, index_processor, index, rows, None, str(tmp_path / "uploads"), transcriber=ear)


@pytest.fixture
def upload(write_show, tones):
    def make(*parts, name="clip.mp4", colour=(200, 30, 30)):
        return [str(write_show(f"uploads/{name}", [colour] * 6, tones(*parts) if parts else None, codec="aac"))]

    return make


def test_an_upload_is_transcribed(hearing_demo, upload):
    clip = hearing_demo.upload(upload((0, 2), (0.5, 1), (0, 3)))
    assert clip.row["asr"] == "title 3"
    assert clip.words[0].start_s == pytest.approx(2.0, abs=0.1)
    recognition = hearing_demo.recognise(clip, "")
    silent = hearing_demo.recognise(hearing_demo.upload(upload()), "")
    # Without its words it is ranked as the same clip without sound.
    assert recognition.silent == [hit.image_id for hit in silent.answer.hits] and silent.silent == []
    hit = recognition.answer.hits[0]
    assert recognition.rank_without_words(hit) == str(recognition.silent.index(hit.image_id) + 1)
    assert [hit.image_id for hit in recognition.answer.hits] != recognition.silent
    pieces = said_pieces(recognition)
    assert pieces[0] == ("2 s ", "time") and "".join(piece for piece, _ in pieces[1:]) == "title 3 "


def test_an_upload_is_transcribed_with_the_titles_of_the_chosen_shop(hearing_demo, upload):
    class Ear:
        titles, language = (), None

        def expecting(self, titles):
            ear = Ear()
            ear.titles = list(titles)
            return ear

        def __call__(self, samples):
            words = [Word(0.0, 0.1, f" {self.language} {len(self.titles)}")]
            self.language = "en"
            return words

    hearing_demo.transcriber = Ear()
    # Each upload has a language of its own.
    assert hearing_demo.upload(upload((0.5, 6)), "x").row["asr"] == "None 5"
    assert hearing_demo.upload(upload((0.5, 6))).row["asr"] == "None 10"
    hearing_demo.expects_titles = False
    assert hearing_demo.upload(upload((0.5, 6)), "x").row["asr"] == "None 0"


def test_typed_words_replace_transcribed_ones(hearing_demo, upload):
    recognition = hearing_demo.recognise(hearing_demo.upload(upload((0.5, 6))), "", asr="blue shoe")
    assert recognition.row["asr"] == "blue shoe" and recognition.clip.words == []
    assert "".join(piece for piece, _ in said_pieces(recognition)) == "blue shoe"
    assert recognition.silent


def test_without_words_the_ranking_is_that_of_the_picture(hearing_demo, upload, save_frames):
    for make in (lambda: upload((0, 6)), upload, lambda: save_frames(3)):
        clip = hearing_demo.upload(make())
        assert clip.row["asr"] == "" and hearing_demo.recognise(clip, "").silent == []

    def failing(samples):
        raise RuntimeError("out of memory")

    hearing_demo.transcriber = failing
    clip = hearing_demo.upload(upload((0.5, 6)))
    assert clip.row["asr"] == "" and "The sound could not be transcribed (out of memory)." in clip.note


def test_the_transcribed_sound_is_limited(upload, tmp_path):
    (tmp_path / "uploads").mkdir()
    limits = UploadLimits(max_sound_seconds=2.0)
    read = read_upload(upload((0.5, 6)), tmp_path / "uploads", limits, with_sound=True)
    assert read.sound[-1].end_s == pytest.approx(2.0, abs=0.01)
    assert read_upload(upload((0.5, 6)), tmp_path / "uploads", limits).sound == []


def test_captions_show_the_rank_without_words(hearing_demo, upload):
    hits = hearing_demo.recognise(hearing_demo.upload(upload((0.5, 6))), "").answer.hits
    assert caption(hits[0], 1, [], "4").endswith(" (without speech: 4)")
    assert "without" not in caption(hits[0], 1, [], "1") and "without" not in caption(hits[0], 1, [])


def test_the_page_shows_words_and_times(hearing_demo, upload):
    pytest.importorskip("gradio", reason="needs gradio")
    from retrieval_rice.demo.app import Callbacks

    _, answer, _, _, _, said, *_ = Callbacks(hearing_demo).upload(upload((0, 2), (0.5, 1), (0, 3)), "", "none", "")
    assert said[0] == ("2 s ", "time") and "without speech" in answer


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--language", "en"], "--language belongs to --asr"),
        (["--asr_hints", "titles"], "--asr_hints belongs to --asr"),
        (["--asr", "base", "--space", "x"], "--asr works with a server"),
    ],
)
def test_arguments_without_effect_are_refused(capsys, arguments, words):
    with pytest.raises(SystemExit) as end:
        main(["demo", *arguments])
    assert end.value.code == 2 and words in capsys.readouterr().err

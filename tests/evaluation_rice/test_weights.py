from types import SimpleNamespace

import pytest

from evaluation_rice.weights import choose_fusion

MIDDLE = {"fusion_weight": 0.35, "alignment_weight": 2.0, "fused_text_weight": 3.0, "text_score_weight": 0.3}


def edges(asked="auto", text=True, **weights):
    """The weights that an evaluation reports at an end of their grid, for the weights of a checkpoint."""
    config = SimpleNamespace(use_decoder=True, text_config={}, **{**MIDDLE, **weights})
    model = SimpleNamespace(config=config, match=None, align=None)
    options = SimpleNamespace(fusion_weight=asked, text=text, model="folder")
    _, fusion = choose_fusion(options, SimpleNamespace(model=model), "live", None, None)
    assert fusion["at_edge"] is bool(fusion["edge_words"])
    return [words.partition(" lies at the ")[0] for words in fusion["edge_words"]]


@pytest.mark.parametrize(
    ("name", "weight", "words"),
    [
        ("fusion_weight", 0.01, "the fusion weight 0.01"),
        ("alignment_weight", 50.0, "the alignment weight 50"),
        ("alignment_weight", 0.01, None),
        ("alignment_weight", 0.0, None),
        ("fused_text_weight", 50.0, "the text weight in the fused score 50"),
        ("text_score_weight", 5.0, "the weight of the text in the embedding score 5"),
        ("text_score_weight", 0.0, None),
    ],
)
def test_every_weight_of_a_checkpoint_is_reported_at_an_end_of_its_grid(name, weight, words):
    assert edges() == []
    assert edges(**{name: weight}) == [words] * (words is not None)


def test_a_weight_given_by_hand_is_not_reported_and_the_checkpoints_others_are():
    assert edges(0.01, fusion_weight=50.0) == []
    assert edges(0.7, alignment_weight=50.0, fused_text_weight=50.0) == [
        "the alignment weight 50",
        "the text weight in the fused score 50",
    ]


def test_weights_of_texts_that_are_not_read_are_not_reported():
    assert edges(text=False, fused_text_weight=50.0, text_score_weight=5.0) == []

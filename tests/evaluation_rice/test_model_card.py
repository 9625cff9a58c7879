import copy
import json

import pytest
from huggingface_hub import ModelCard

from evaluation_rice.model_card import PUBLISHED, card_from_file, model_card

RESULTS = {
    "protocol": {
        "split": "test",
        "gallery_scope": "live",
        "num_galleries": 2,
        "num_gallery_images": 90,
        "boxes": "none",
        "fusion": {"source": "validation", "source_words": "the weight was fitted on the validation split (9 clips)"},
    },
    "num_queries": 77,
    "gallery_size": {"min": 40, "median": 45.0, "max": 50},
    "scores": {
        "embedding": {"R@1": 0.123456, "R@5": 0.5, "R@1_ci95": [0.05, 0.2]},
        "fused": {"R@1": 0.25, "R@5": 0.6, "R@1_ci95": [0.15, 0.35]},
    },
    "fusion_weight": 0.4,
    "baselines": {"chance": {"R@1": 0.02, "R@5": 0.1}},
    "by": {"product_scale": {"small": {"num_queries": 7, "embedding": {"R@1": 0.1}, "fused": {"R@1": 0.3}}}},
    "model": "someone/rice-test",
    "dataset": "mini_lpr4m",
    "seconds": 1.0,
    "failures": [{"kind": "query", "id": "q", "file": "f", "reason": "r"}],
    "ties": {"embedding": {"share": 0.031, "R@1_ties_at_random": 0.12}},
    "versions": {"torch": "1.2.3"},
    "command": "python eval_rice.py --model someone/rice-test",
}


def test_card_is_filled_from_the_results():
    text = model_card(RESULTS)
    assert "{{" not in text and "{%" not in text
    for words in (
        "someone/rice-test",
        "| RICE, embedding | 12.3 | 50.0 | 5.0 to 20.0 |",
        "| chance | 2.0 | 10.0 |  |",
        "z(embedding) + 0.4 x z(matching)",
        "2 galleries of 40 to 50 images, median 45",
        "### By product scale",
        "| small | 7 | 10.0 | 30.0 |",
        "3.1 % of the clips are tied by embedding score",
        "python eval_rice.py --model someone/rice-test",
    ):
        assert words in text


def test_card_metadata_holds_a_model_index():
    data = ModelCard(model_card(RESULTS)).data
    assert data.license == "apache-2.0" and data.library_name == "transformers"
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert values["R@1, embedding score"] == 12.35 and values["R@5, fused score"] == 60.0
    assert {result.dataset_type for result in data.eval_results} == {"mini_lpr4m"}


def test_published_figures_stand_apart():
    results, published = model_card(RESULTS).split("## Published figures")
    for _, values in PUBLISHED:
        for value in values.values():
            assert f"{value:.2f}" in published and f"{value:.2f}" not in results


def test_card_of_a_model_without_decoder():
    results = copy.deepcopy(RESULTS)
    results["scores"].pop("fused")
    results["protocol"].pop("fusion")
    results |= {"fusion_weight": None, "by": {}, "baselines": {}}
    assert "z(matching)" not in model_card(results)


def test_missing_entries_and_template_are_named(tmp_path):
    with pytest.raises(ValueError, match="lack scores"):
        model_card({name: value for name, value in RESULTS.items() if name != "scores"})
    with pytest.raises(FileNotFoundError, match="gone.md"):
        model_card(RESULTS, tmp_path / "gone.md")
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    assert card_from_file(tmp_path / "results.json") == model_card(RESULTS)

import configparser
import copy
import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers.pipelines import PIPELINE_REGISTRY

from hub_rice.model_card import PUBLISHED, TEMPLATE, best_first, card_from_file, model_card, write_model_card
from hub_rice.results import read_results
from hub_rice.training_record import data_license
from hub_rice.training_record import recipe as training_recipe
from training_rice.arguments import parse_arguments
from training_rice.setup import record_arguments

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
        "[breakdown.md](breakdown.md)",
        "3.1 % of the clips are tied by embedding score",
        "python eval_rice.py --model someone/rice-test",
    ):
        assert words in text


def test_card_metadata_holds_a_model_index():
    data = ModelCard(model_card(RESULTS)).data
    assert data.library_name == "transformers" and data.license is None
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert values["R@1, embedding score"] == 12.35 and values["R@5, fused score"] == 60.0
    assert {result.dataset_type for result in data.eval_results} == {"mini_lpr4m"}


def test_metadata_names_protocol_and_data_set_without_paths():
    data = ModelCard(model_card({**RESULTS, "dataset": "/home/me/data/mini_lpr4m"})).data
    assert data.datasets is None
    assert {result.dataset_type for result in data.eval_results} == {"mini_lpr4m"}
    assert {result.metric_type for result in data.eval_results} == {"recall_at_1", "recall_at_5"}
    protocol = data.eval_results[0].dataset_args
    assert "its own livestream" in protocol["gallery_scope"]
    assert (protocol["gallery_images_median"], protocol["num_queries"], protocol["boxes"]) == (45.0, 77, "none")
    assert ModelCard(model_card(RESULTS, dataset_id="someone/mini")).data.datasets == ["someone/mini"]


def test_the_hub_can_list_the_model():
    data = ModelCard(model_card(RESULTS)).data
    assert {"sentence-transformers", "custom_code"} <= set(data.tags)
    # A task of the Hub whose pipeline takes what the model takes.
    assert data.pipeline_tag in PIPELINE_REGISTRY.get_supported_tasks()
    assert ModelCard(f"---\n{data.to_yaml()}\n---\n").data.to_dict() == data.to_dict()


def test_the_paper_is_linked_as_setup_cfg_has_it():
    setup = configparser.ConfigParser()
    setup.read(TEMPLATE.parents[1] / "setup.cfg", encoding="utf-8")
    paper = re.search(r"Paper = (\S+)", setup["metadata"]["project_urls"])[1]
    assert f"]({paper})" in model_card(RESULTS) and paper.endswith("2308.04912")


def test_the_repository_is_linked_where_setup_cfg_names_one(monkeypatch):
    assert "Code: <" not in model_card(RESULTS)
    monkeypatch.setattr("hub_rice.model_card.project_urls", lambda: {"Repository": "https://example.org/rice"})
    assert "Code: <https://example.org/rice>." in model_card(RESULTS)


def test_the_best_score_comes_first():
    scores = {"embedding": 0.3, "matching": 0.5, "fused": 0.4}
    results = {**RESULTS, "scores": {kind: {"R@1": value, "R@5": 0.9} for kind, value in scores.items()}}
    text = model_card(results)
    places = [text.index(f"| RICE, {kind} |") for kind in ("matching", "fused", "embedding")]
    assert places == sorted(places)
    names = [result.metric_name for result in ModelCard(text).data.eval_results]
    assert names[::2] == ["R@1, matching score", "R@1, fused score", "R@1, embedding score"]
    # Equal ones stay as they are.
    assert list(best_first({"a": {"R@1": 0.5}, "b": {"R@1": 0.5}})) == ["a", "b"]


def test_training_comes_before_the_long_parts(run_dir, tmp_path):
    (tmp_path / "matches.png").write_bytes(b"picture")
    write_model_card(tmp_path, RESULTS, run_dir=run_dir)
    text, page = ((tmp_path / name).read_text() for name in ("README.md", "breakdown.md"))
    assert text.index("## Results") < text.index("## Training") < text.index("## Published figures")
    assert "## By product scale" in page and "| small | 7 | 10.0 | 30.0 |" in page and "77 clips of mini_lpr4m" in page
    assert "| small | 7 |" not in text and "](matches.png)" in text
    (tmp_path / "matches.png").unlink()
    write_model_card(tmp_path, {**RESULTS, "by": {}}, run_dir=run_dir)
    assert "matches.png" not in (tmp_path / "README.md").read_text()
    assert "breakdown.md" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "dataset, data_dir, readme, expected",
    [
        ("mini_lpr4m", None, None, "apache-2.0"),
        ("moving_fashion", "{folder}", None, "cc-by-nc-sa-4.0"),
        ("lpr4m", "{folder}", None, None),
        ("shop_clips", "{folder}", None, None),
        ("shop_clips", "{folder}", "---\nlicense: cc-by-4.0\n---\n# Shop\n", "cc-by-4.0"),
        ("{folder}", None, "---\nlicense: mit\n---\n", "mit"),
        ("{folder}", None, "# A shop without metadata\n", None),
        ("{folder}", None, "---\nlicense: [cut\n---\n", None),
        ("shop_clips", "/gone", None, None),
    ],
)
def test_the_licence_is_that_of_the_training_data_or_absent(tmp_path, dataset, data_dir, readme, expected):
    folder = tmp_path / "data"
    folder.mkdir()
    if readme is not None:
        (folder / "README.md").write_text(readme)
    data = [None if name is None else name.format(folder=folder) for name in (dataset, data_dir)]
    assert data_license(*data) == expected
    run = tmp_path / "run"
    run.mkdir()
    (run / "train_arguments.json").write_text(json.dumps(dict(zip(("dataset", "data_dir"), data))))
    assert ModelCard(model_card(RESULTS, run_dir=run)).data.license == expected
    # Whoever publishes may know better.
    assert ModelCard(model_card(RESULTS, run_dir=run, license="cc0-1.0")).data.license == "cc0-1.0"


def test_a_rendered_folder_has_the_licence_of_the_renderer(tiny_mini):
    assert data_license(str(tiny_mini), None) == data_license("lpr4m", str(tiny_mini)) == "apache-2.0"


def test_an_invalid_licence_identifier_is_refused():
    with pytest.raises(ValueError, match="'Apache 2.0' is not a licence identifier of the Hub"):
        model_card(RESULTS, license="Apache 2.0")


def test_gallery_scope_in_plain_words():
    assert "compared only with the products of its own livestream" in model_card(RESULTS)
    whole = {**RESULTS, "protocol": {**RESULTS["protocol"], "gallery_scope": "all"}}
    text = model_card(whole)
    assert "compared with every product image of the data set's gallery" in text and "own livestream, not" not in text


@pytest.fixture
def run_dir(tmp_path):
    """The records of a finished run."""
    config = {"model_type": "rice", "use_decoder": True, "vision_config": {"model_type": "resnet"}}
    arguments = {
        "dataset": "mini_lpr4m",
        "data_dir": "/home/me/data",
        "output_dir": "/home/me/runs/x",
        "init_vision_from": "openai/clip-vit-base-patch32",
        "model": {"projection_dim": 128, "vision_config": {"model_type": "resnet"}},
        "learning_rate": 0.002,
        "max_steps": 800,
        "num_train_epochs": 3.0,
        "seed": 42,
        "use_boxes": False,
        "hub_token": "<HUB_TOKEN>",
        "num_processes": 2,
    }
    results = {"train_runtime": 90.0}
    for name, content in (("config", config), ("train_arguments", arguments), ("train_results", results)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_training_recipe_comes_from_the_runs_own_record(run_dir):
    text = model_card(RESULTS, run_dir=run_dir)
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe == {
        "dataset": "mini_lpr4m",
        "init_vision_from": "openai/clip-vit-base-patch32",
        "learning_rate": 0.002,
        "max_steps": 800,
        "seed": 42,
        "use_boxes": False,
        "model": {"projection_dim": 128, "vision_config": {"model_type": "resnet"}},
    }
    assert "/home/me" not in text and "by 2 processes" in text and "on a resnet encoder" in text
    assert ModelCard(text).data.base_model == "openai/clip-vit-base-patch32"
    assert "Cost: 1.5 minutes of training." in text and "CO2" not in text


def test_the_recipe_of_a_card_is_accepted_by_training(run_dir, tmp_path):
    text = model_card(RESULTS, run_dir=run_dir)
    (tmp_path / "recipe.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    model, data, training = parse_arguments([str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "run")])
    assert (model.model["projection_dim"], data.dataset, training.max_steps) == (128, "mini_lpr4m", 800)


def test_the_recipe_of_a_card_repeats_the_run(tmp_path):
    def record(recipe, folder, *words):
        arguments = parse_arguments([str(recipe), "--output_dir", str(tmp_path / folder), *words])
        record_arguments(*arguments, resuming=False)
        return json.loads((tmp_path / folder / "train_arguments.json").read_text())

    root = Path(__file__).resolve().parents[2]
    first = record(
        root / "configs" / "mini_lpr4m.yaml", "first", "--freeze", "vision_model", "--learning_rate", "0.25"
    )
    (tmp_path / "card.yaml").write_text(training_recipe(first))
    second = record(tmp_path / "card.yaml", "second")
    assert first.pop("output_dir") != second.pop("output_dir")
    machine = ("dataloader_num_workers", "run_name", "logging_steps", "logging_dir")
    assert {k: v for k, v in first.items() if k not in machine} == {
        k: v for k, v in second.items() if k not in machine
    }
    assert second["learning_rate"] == 0.25 and second["freeze"] == ["vision_model"]


def test_emissions_are_shown_only_if_logged(run_dir):
    (run_dir / "emissions.csv").write_text("timestamp,emissions,gpu_model\nt0,9.0,X\nt1,0.00125,H200\n")
    text = model_card(RESULTS, run_dir=run_dir)
    assert "1.25 g of CO2 equivalent" in text
    assert ModelCard(text).data.co2_eq_emissions["emissions"] == 1.25
    (run_dir / "emissions.csv").write_text("nothing\n")
    with pytest.raises(ValueError, match="emissions.csv is not an emissions file"):
        model_card(RESULTS, run_dir=run_dir)


def test_card_without_results_shows_no_figures(run_dir):
    text = model_card(None, model_id="someone/fresh", run_dir=run_dir)
    assert "Not evaluated yet" in text and "| RICE," not in text and ModelCard(text).data.eval_results is None
    assert "learning_rate: 0.002" in text and "{{" not in text and "encode_gallery" in text
    bare = model_card(None, model_id="someone/fresh")
    assert "no record of its training" in bare and "encode_gallery" not in bare
    with pytest.raises(ValueError, match="model_id"):
        model_card(None)


def test_published_figures_have_their_own_table():
    results, published = model_card(RESULTS).split("## Published figures")
    for _, values in PUBLISHED:
        for value in values.values():
            assert f"{value:.2f}" in published and f"{value:.2f}" not in results


def test_card_of_a_model_without_decoder():
    results = copy.deepcopy(RESULTS)
    results["scores"].pop("fused")
    results["protocol"].pop("fusion")
    results |= {"fusion_weight": None, "by": {}, "baselines": {}}
    text = model_card(results)
    assert "z(matching)" not in text and "matching decoder" not in text and "get_video_features" in text


def test_card_explains_the_alignment_and_its_fusion(tmp_path):
    results = {**copy.deepcopy(RESULTS), "alignment_weight": 1.0}
    assert "z(embedding) + 0.4 x z(matching) + 1 x z(alignment), z-scores" in model_card(results)
    results["scores"]["alignment"], results["fusion_weight"] = results["scores"]["embedding"], None
    config = {"model_type": "rice", "use_decoder": False, "alignment_weight": 1.0, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = model_card(results, run_dir=tmp_path)
    assert "Fused = z(embedding) + 1 x z(alignment), z-scores" in text and "model.align(clips, gallery)" in text
    assert "matching" not in text.split("## Published")[0] and "contrastive learning" not in text
    assert "parameter-free cross-view alignment of patches" in text and "RICE, alignment" in text


def test_missing_entries_and_template_are_named(tmp_path):
    with pytest.raises(ValueError, match="lack scores"):
        model_card({name: value for name, value in RESULTS.items() if name != "scores"})
    with pytest.raises(FileNotFoundError, match="gone.md"):
        model_card(RESULTS, tmp_path / "gone.md")
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    assert card_from_file(tmp_path / "results.json") == model_card(RESULTS)
    for content, words in (
        (
            json.dumps(RESULTS)[:50],
            r"is not a complete results file: run eval_rice.py again \(.*; restore the file\)\.$",
        ),
        ("[]", r"expected a JSON object, found a list; restore the file\)\.$"),
    ):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(ValueError, match=words):
            read_results(tmp_path / "results.json")
    with pytest.raises(FileNotFoundError, match="run eval_rice.py"):
        read_results(tmp_path / "gone.json")


def test_card_explains_how_text_is_fused():
    text = model_card({**RESULTS, "fused_text_weight": 12.5})
    assert "z(visual) + 0.4 x z(matching) + 12.5 x text" in text and "z(embedding)" not in text
    assert "the weight was fitted on the validation split (9 clips)" in text
    assert model_card({**RESULTS, "fused_text_weight": None}) == model_card(RESULTS)

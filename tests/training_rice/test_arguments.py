"""Recipes and command line: precedence, and one sentence with status 2 for every mistake."""

from pathlib import Path

import pytest

from modeling_rice import RiceConfig
from training_rice.arguments import parse_arguments

REPOSITORY = Path(__file__).resolve().parents[2]
# A study is a list of runs, not one of them.
# Studies, which have arms, are read by tests/test_studies.py.
RECIPES = [path for path in sorted((REPOSITORY / "configs").glob("*.yaml")) if "\narms:" not in path.read_text()]


@pytest.fixture
def parse(tmp_path):
    """A function that writes a recipe and parses it with a command line."""

    def parse(recipe: str = "", *argv: str):
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe, encoding="utf-8")
        return parse_arguments([str(path), "--output_dir", str(tmp_path), "--use_cpu", *argv])

    return parse


@pytest.fixture
def refusal(parse, capsys):
    """A function that returns the sentence with which arguments are refused."""

    def refusal(recipe: str = "", *argv: str) -> str:
        with pytest.raises(SystemExit) as error:
            parse(recipe, *argv)
        assert error.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("usage:")]
        assert len(lines) == 1
        assert lines[0].startswith("train_rice.py: error: ")
        return lines[0]

    return refusal


def test_without_recipe(tmp_path):
    model, data, training = parse_arguments(["--output_dir", str(tmp_path), "--use_cpu", "--num_frames", "4"])
    assert (model.model, data.num_frames, data.dataset) == ({}, 4, "mini_lpr4m")
    assert training.remove_unused_columns is False
    assert training.dataloader_drop_last is True


def test_command_line_wins_over_recipe(parse):
    recipe = "max_steps: 7\nlearning_rate: 0.5\nmodel:\n  projection_dim: 8\n  use_decoder: false\n"
    model, _, training = parse(recipe, "--max_steps", "9", "--model.projection_dim", "24")
    assert (training.max_steps, training.learning_rate) == (9, 0.5)
    assert model.model == {"projection_dim": 24, "use_decoder": False}


@pytest.mark.parametrize("argv", [["--model.projection_dim=24"], ["--model", "{projection_dim: 24}"]])
def test_other_spellings_of_model_overrides(parse, argv):
    assert parse("model: {projection_dim: 8, decoder_num_heads: 2}", *argv)[0].model == {
        "projection_dim": 24,
        "decoder_num_heads": 2,
    }


def test_nested_model_overrides(parse):
    recipe = "model:\n  vision_config:\n    hidden_size: 64\n    num_attention_heads: 2\n"
    model = parse(recipe, "--model.vision_config.hidden_size", "32", "--model.vision_config.image_size=64")[0].model
    assert model["vision_config"] == {"hidden_size": 32, "num_attention_heads": 2, "image_size": 64}
    assert parse("", "--model.vision_config.hidden_size", "32")[0].model == {"vision_config": {"hidden_size": 32}}


def test_values_of_a_recipe(parse):
    recipe = """
        learning_rate: 1e-3
        weight_decay: 1.5E-2
        use_boxes: true
        use_text: yes
        bf16: False
        eval_strategy: no
        save_total_limit: null
        validation_fraction:
        report_to: [none]
        lr_scheduler_type: cosine_with_min_lr
        lr_scheduler_kwargs: {min_lr: 1e-5}
        data_dir: -odd
        model: {decoder_layer_norm_eps: 1e-6, learn_logit_scale: true, fusion_weight: null}
    """
    model, data, training = parse(recipe)
    assert (training.learning_rate, training.weight_decay) == (1e-3, 1.5e-2)
    assert (data.use_boxes, data.use_text, training.bf16) == (True, True, False)
    assert training.eval_strategy == "no"
    assert training.save_total_limit is None
    assert data.validation_fraction is None
    assert training.report_to == []
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert data.data_dir == "-odd"
    assert model.model == {"decoder_layer_norm_eps": 1e-6, "learn_logit_scale": True, "fusion_weight": None}


def test_scientific_floats_on_the_command_line(parse):
    model, _, training = parse("", "--learning_rate", "3e-4", "--model.decoder_layer_norm_eps", "1e-6")
    assert training.learning_rate == 3e-4
    assert model.model["decoder_layer_norm_eps"] == 1e-6


def test_command_line_wins_over_null_and_mapping(parse):
    recipe = "save_total_limit: null\nlr_scheduler_kwargs: {min_lr: 1}"
    training = parse(recipe, "--save_total_limit", "5", "--lr_scheduler_kwargs", '{"min_lr": 2}')[2]
    assert training.save_total_limit == 5
    assert training.lr_scheduler_kwargs == {"min_lr": 2}


@pytest.mark.parametrize(
    ("recipe", "argv", "expected"),
    [
        ("max_stepz: 3", [], "'max_stepz' in recipe {recipe}; did you mean 'max_steps'?"),
        ("1: 2", [], "unknown key 1"),
        ("model: {projektion_dim: 3}", [], "'projektion_dim' in the model section of {recipe}; did you mean 'projec"),
        (
            "model: {vision_config: {hiden_size: 3}}",
            [],
            "'hiden_size' of vision_config (clip_vision_model) in the mod",
        ),
        ("model: {vision_config: {model_type: resnett}}", [], "unknown model_type 'resnett'"),
        ("model: 5", [], "must be a mapping"),
        ("", ["--model.projektion_dim", "3"], "unknown model field 'projektion_dim'; did you mean 'projection_dim'?"),
        ("", ["--model.vision_config.hiden_size", "3"], "did you mean 'hidden_size'?"),
        ("", ["--model", "{projektion_dim: 3}"], "did you mean 'projection_dim'?"),
        ("", ["--model", "{projection_dim"], "--model is not valid YAML"),
        ("", ["--model", "3"], "--model needs a mapping"),
        ("", ["--model.projection_dim"], "--model.projection_dim needs a value"),
        ("model: {projection_dim: 3}", ["--model.projection_dim.x", "3"], "projection_dim has no fields"),
        ("", ["--max_stepz", "3"], "unknown argument --max_stepz; did you mean 'max_steps'?"),
        ("", ["--max_stepz=3"], "did you mean 'max_steps'?"),
        ("", ["--max_step", "3"], "did you mean 'max_steps'?"),
        ("", ["--seed", "1", "stray"], "unknown argument stray"),
        ("max_steps: many", [], "--max_steps"),
        ("max_steps: [1, 2]", [], "max_steps in the recipe {recipe} cannot be a list"),
        ("max_steps: null", [], "max_steps in the recipe {recipe} cannot be null"),
        ("seed: {a: 1}", [], "cannot be a mapping"),
        ("use_boxes: maybe", [], "--use_boxes"),
        ("frame_sampling: best", [], "--frame_sampling"),
        ("a: b: c", [], "{recipe} is not valid YAML"),
        ("- a\n- b", [], "must be a mapping"),
        ("augment_crop: 7", [], "augment_crop must lie in"),
        ("asr_noise: 1.5", [], "asr_noise must lie in 0.0..1.0, got 1.5"),
        ("tokenizer_texts: 0", [], "tokenizer_texts must be at least 1, got 0"),
        ("", ["--train_num_frames", "0"], "train_num_frames must be at least 1, got 0"),
        ("", ["--image_size", "0"], "image_size must be at least 1, got 0"),
        ("", ["--num_frames", "0"], "num_frames must be at least 1, got 0"),
        ("", ["--per_device_train_batch_size", "0"], "per_device_train_batch_size must be at least 1, got 0"),
        ("", ["--learning_rate", "-1"], "learning_rate must be 0 or more, got -1.0"),
        ("", ["--learning_rate", "nan"], "learning_rate must be 0 or more, got nan"),
        ("", ["--output_dir", __file__], "test_arguments.py is a file; name a folder"),
        ("dataloader_drop_last: false", [], "dataloader_drop_last must stay true"),
        ("remove_unused_columns: true", [], "remove_unused_columns must stay false"),
        ("load_best_model_at_end: true", [], "load_best_model_at_end"),
    ],
)
def test_mistakes(refusal, tmp_path, recipe, argv, expected):
    assert expected.format(recipe=tmp_path / "recipe.yaml") in refusal(recipe, *argv)


def test_missing_recipe(capsys):
    with pytest.raises(SystemExit) as error:
        parse_arguments(["configs/nothing.yaml"])
    assert error.value.code == 2
    said = capsys.readouterr().err
    # The studies of the same folder are no recipes.
    assert "there is no recipe configs/nothing.yaml" in said and "mini_lpr4m.yaml, " in said and "study" not in said


@pytest.mark.parametrize("name", ["mini_lpr4m.yaml", "configs/mini_lpr4m.yaml"])
def test_a_packaged_recipe_is_found_where_the_folder_has_none(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, data, training = parse_arguments([name, "--output_dir", str(tmp_path), "--use_cpu"])
    assert data.dataset == "mini_lpr4m" and training.max_steps > 0
    # A file of the user's own comes first.
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("max_steps: 7")
    assert parse_arguments([name, "--output_dir", str(tmp_path), "--use_cpu"])[2].max_steps == 7


def test_only_the_projects_own_folder_is_looked_up(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([str(tmp_path / "mini_lpr4m.yaml")])
    assert f"there is no recipe {tmp_path / 'mini_lpr4m.yaml'}" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_published_recipes(recipe, tmp_path):
    model, _, training = parse_arguments([str(recipe), "--output_dir", str(tmp_path), "--use_cpu"])
    config = RiceConfig(**model.model)
    for name, value in model.model.items():
        if name not in ("vision_config", "text_config"):
            assert getattr(config, name) == value
    assert training.output_dir == str(tmp_path)


def test_packaged_recipes_exist():
    assert RECIPES

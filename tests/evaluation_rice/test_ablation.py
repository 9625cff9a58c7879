import json
import re
import textwrap

import pytest
import yaml

from evaluation_rice import ablation

# Stand-ins for the two scripts: the "model" is its arguments, and an arm hits more queries the larger its --skill.
TRAIN = """
import json, pathlib, sys
arguments = dict(zip(sys.argv[2::2], sys.argv[3::2]))
if arguments.get("--skill") == "broken":
    sys.exit("train: error: this skill is broken")
folder = pathlib.Path(arguments["--output_dir"])
folder.mkdir(parents=True, exist_ok=True)
start = arguments.get("--model_name_or_path")
if start:
    arguments["start"] = json.loads((pathlib.Path(start) / "model.json").read_text())
(folder / "model.json").write_text(json.dumps(arguments))
with open("calls.txt", "a") as file:
    file.write("train " + arguments["--output_dir"] + chr(10))
"""
EVAL = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
for name in ("model", "output_dir", "bonus"):
    parser.add_argument("--" + name)
parser.add_argument("--baselines", nargs="*")
options = parser.parse_args()
model = json.loads((pathlib.Path(options.model) / "model.json").read_text())
skill = int(model.get("--skill", 0)) + int(options.bonus or 0)
folder = pathlib.Path(options.output_dir)
folder.mkdir(parents=True)
rows = [{"query_id": f"q{i}", "embedding": 1 if i < skill else 7, "fused": 1 if i < skill + 2 else None}
        for i in reversed(range(10))]
(folder / "query_ranks.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
with open("calls.txt", "a") as file:
    file.write("eval " + options.output_dir + chr(10))
"""

STUDY = {
    "recipe": "recipe.yaml",
    "seeds": [3, 4],
    "max_minutes": 10,
    "start": {"max_steps": 5, "model": {"use_decoder": "false"}},
    "train": {"skill": 2, "model": {"use_decoder": "true", "width": 8}},
    "arms": {
        "plain": {},
        "good": {"train": {"skill": 6, "model": {"width": 9}}},
        "again": {"model_of": "plain", "eval": {"bonus": 1}, "note": "the same model"},
    },
    "comparisons": [["good/fused", "plain/embedding"], ["again/embedding", "plain/embedding"]],
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "train_rice.py").write_text(textwrap.dedent(TRAIN))
    (tmp_path / "eval_rice.py").write_text(textwrap.dedent(EVAL))
    monkeypatch.chdir(tmp_path)

    def run(study, *arguments):
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
        ablation.main(["study.yaml", "--output_dir", "out", *arguments])
        return json.loads((tmp_path / "out" / "ablation.json").read_text())

    run.folder = tmp_path
    return run


def calls(folder):
    return (folder / "calls.txt").read_text().splitlines()


def test_every_arm_goes_on_from_the_start_of_its_seed(project):
    summary = project(STUDY)
    start = json.loads((project.folder / "out/start/seed4/model/model.json").read_text())
    assert start["--max_steps"] == "5" and start["--model.use_decoder"] == "false" and start["--seed"] == "4"
    good = json.loads((project.folder / "out/good/seed4/model/model.json").read_text())
    assert good["start"] == start
    assert (good["--model.use_decoder"], good["--model.width"], good["--skill"]) == ("true", "9", "6")
    assert summary["arms"]["plain"]["embedding"]["R@1"] == pytest.approx(0.2)
    assert summary["arms"]["again"]["embedding"]["by_seed"] == {"3": pytest.approx(0.3), "4": pytest.approx(0.3)}
    first, second = summary["comparisons"]
    assert first["difference"] == pytest.approx(0.6) and first["verdict"] == "better"
    assert second["difference"] == pytest.approx(0.1) and second["num_queries"] == 20
    assert summary["not_run"] == []


def test_what_is_finished_is_not_run_again(project):
    first = project(STUDY)
    before = calls(project.folder)
    assert project(STUDY) == first
    assert calls(project.folder) == before
    (project.folder / "out/good/seed3/cell.json").unlink()
    (project.folder / "out/good/seed3/eval/query_ranks.jsonl").unlink()
    (project.folder / "out/good/seed3/eval").rmdir()
    assert project(STUDY)["arms"] == first["arms"]
    assert calls(project.folder)[len(before) :] == ["train out/good/seed3/model", "eval out/good/seed3/eval"]


def test_without_time_the_cells_are_said_to_be_not_run(project, capsys):
    summary = project(STUDY, "--max_minutes", "0")
    assert not (project.folder / "calls.txt").exists()
    assert len(summary["not_run"]) == 6
    assert {cell["reason"] for cell in summary["not_run"]} >= {"not run: start of seed 3 is missing"}
    assert "| good/fused against plain/embedding | not run |" in capsys.readouterr().out


def test_a_failing_cell_is_told_and_the_others_go_on(project, capsys):
    arms = {**STUDY["arms"], "bad": {"train": {"skill": "broken"}}}
    with pytest.raises(SystemExit) as stop:
        project({**STUDY, "arms": arms})
    assert stop.value.code == 1
    summary = json.loads((project.folder / "out/ablation.json").read_text())
    assert [cell["arm"] for cell in summary["not_run"]] == ["bad", "bad"]
    assert "this skill is broken" in summary["not_run"][0]["reason"]
    assert summary["arms"]["good"]["fused"]["R@1"] == pytest.approx(0.8)


def test_changed_settings_are_not_mixed_with_old_results(project):
    project(STUDY)
    arms = {**STUDY["arms"], "good": {"train": {"skill": 7}}}
    with pytest.raises(SystemExit):
        project({**STUDY, "arms": arms})
    summary = json.loads((project.folder / "out/ablation.json").read_text())
    assert "good" not in summary["arms"]
    assert any("other settings" in cell["reason"] for cell in summary["not_run"])


def test_chosen_arms_bring_the_model_they_need(project):
    summary = project(STUDY, "--arms", "again", "--jobs", "2")
    assert set(summary["arms"]) == {"plain", "again"}
    assert {cell["arm"] for cell in summary["not_run"]} == {"good"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arm": {}}, "unknown key 'arm'"),
        ({"arms": {"a": {"trian": {}}}}, "arm 'a' of .* unknown key 'trian'"),
        ({"arms": {}}, "lacks 'arms'"),
        ({"comparisons": [["good/best", "plain/fused"]]}, "'good/best' is no ARM/SCORE"),
        ({"comparisons": ["good"]}, "a comparison is"),
        ({"seeds": ["one"]}, "seeds are whole numbers"),
        ({"arms": {"a": {"model_of": "b"}}, "comparisons": []}, "model_of must name an earlier arm"),
    ],
)
def test_mistakes_in_the_study(project, change, words, capsys):
    with pytest.raises(SystemExit) as stop:
        project({**STUDY, **change})
    assert stop.value.code == 2

    message = capsys.readouterr().err
    assert re.search(words, message) and message.count("\n") == 1


def test_values_reach_the_command_line_as_written(tmp_path):
    (tmp_path / "s.yaml").write_text("recipe: r\narms: {a: {train: {save_strategy: no, lr: 1e-3, ids: [1, 02]}}}\n")
    study = ablation.read_study(tmp_path / "s.yaml")
    expected = ["--save_strategy", "no", "--lr", "1e-3", "--ids", "1", "02"]
    assert ablation.to_arguments(study.arms["a"].train) == expected


def test_without_matplotlib_there_is_no_picture(project, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "can_draw", lambda: False)
    project(STUDY)
    assert "no ablation.png, which needs matplotlib" in capsys.readouterr().out
    assert not (project.folder / "out/ablation.png").exists()


def test_it_wants_the_scripts(tmp_path, monkeypatch, capsys):
    (tmp_path / "s.yaml").write_text("recipe: r\narms: {a: }\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        ablation.main(["s.yaml"])
    assert "there is no train_rice.py here" in capsys.readouterr().err

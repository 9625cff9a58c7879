import json
import re
import shutil
import textwrap

import pytest
import yaml

from evaluation_rice.study import ablation

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
(folder / "results.json").write_text(json.dumps({"protocol": {"task_sha256": "abc"}}))
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


def prepare(folder, study=STUDY):
    (folder / "train_rice.py").write_text(textwrap.dedent(TRAIN))
    (folder / "eval_rice.py").write_text(textwrap.dedent(EVAL))
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))


@pytest.fixture
def project(tmp_path, monkeypatch):
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(study, *arguments):
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
        ablation.main(["study.yaml", "--output_dir", "out", *arguments])
        return run.summary()

    run.folder = tmp_path
    run.summary = lambda: json.loads((tmp_path / "out" / "ablation.json").read_text())
    run.reasons = lambda: {(cell["arm"], cell["seed"]): cell["reason"] for cell in run.summary()["not_run"]}
    return run


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    prepare(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ablation.main(["study.yaml", "--output_dir", "out"])
    return folder


@pytest.fixture
def finished(project, finished_once):
    """A project in which `STUDY` was run."""
    shutil.copytree(finished_once, project.folder, dirs_exist_ok=True)
    return project


def calls(folder):
    return (folder / "calls.txt").read_text().splitlines()


def test_every_arm_continues_from_the_start_of_its_seed(project):
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


def test_finished_cells_are_not_run_again(finished):
    first = finished.summary()
    before = calls(finished.folder)
    assert finished(STUDY) == first
    assert calls(finished.folder) == before
    (finished.folder / "out/good/seed3/cell.json").unlink()
    shutil.rmtree(finished.folder / "out/good/seed3/eval")
    assert finished(STUDY)["arms"] == first["arms"]
    assert calls(finished.folder)[len(before) :] == ["train out/good/seed3/model", "eval out/good/seed3/eval"]


def test_cells_beyond_the_time_limit_are_listed_as_not_run(project, capsys):
    summary = project({**STUDY, "render": {"data": {"no_such_argument": 1}}}, "--max_minutes", "0")
    assert not (project.folder / "calls.txt").exists() and not (project.folder / "out/render.log").exists()
    assert [cell["arm"] for cell in summary["not_run"]][::2] == ["start", "plain", "good", "again"]
    assert {cell["reason"] for cell in summary["not_run"]} >= {"not run: start of seed 3 is missing"}
    text = capsys.readouterr().out
    assert "| good/fused against plain/embedding | not run |" in text
    assert (
        "no ablation.png, because there is no result yet" in text
        and not (project.folder / "out/ablation.png").exists()
    )


def test_a_failed_start_is_reported_with_its_reason(project):
    with pytest.raises(SystemExit) as stop:
        project({**STUDY, "start": {"skill": "broken"}})
    assert stop.value.code == 1
    reasons = project.reasons()
    assert "this skill is broken" in reasons["start", 3]
    assert reasons["plain", 4] == "not run: start of seed 4 is missing"


def test_a_failing_cell_is_reported_and_the_others_run(project, capsys):
    arms = {**STUDY["arms"], "bad": {"train": {"skill": "broken"}}}
    with pytest.raises(SystemExit) as stop:
        project({**STUDY, "arms": arms})
    assert stop.value.code == 1
    summary = json.loads((project.folder / "out/ablation.json").read_text())
    assert [cell["arm"] for cell in summary["not_run"]] == ["bad", "bad"]
    assert "this skill is broken" in summary["not_run"][0]["reason"]
    assert summary["arms"]["good"]["fused"]["R@1"] == pytest.approx(0.8)


def test_changed_settings_are_not_mixed_with_old_results(finished):
    arms = {**STUDY["arms"], "good": {"train": {"skill": 7}}}
    with pytest.raises(SystemExit):
        finished({**STUDY, "arms": arms})
    summary = json.loads((finished.folder / "out/ablation.json").read_text())
    assert "good" not in summary["arms"]
    assert any("other settings" in cell["reason"] for cell in summary["not_run"])


def test_arms_of_another_start_are_not_mixed(finished):
    former = finished.summary()
    changed = {**STUDY, "start": {"max_steps": 6}}
    with pytest.raises(SystemExit) as stop:
        finished(changed)
    assert stop.value.code == 1
    assert finished.summary()["arms"] == {} and finished.summary()["comparisons"][0].keys() == {"left", "right"}
    assert "out/start/seed3 has other settings: remove it" in finished.reasons()["start", 3]
    both = "out/good/seed4 depends on out/start/seed4, which has other settings: remove both"
    assert both in finished.reasons()["good", 4]

    # The start alone is removed and trained anew: what the arms went on from is on record.
    shutil.rmtree(finished.folder / "out/start")
    with pytest.raises(SystemExit):
        finished(changed)
    assert finished.summary()["arms"] == {}
    assert "out/good/seed4 used start with other settings: remove it" in finished.reasons()["good", 4]

    shutil.rmtree(finished.folder / "out")
    assert finished(changed)["arms"] == former["arms"]


def test_an_evaluation_of_a_changed_model_is_not_mixed(finished):
    arms = {**STUDY["arms"], "plain": {"train": {"skill": 3}}}
    with pytest.raises(SystemExit):
        finished({**STUDY, "arms": arms})
    assert set(finished.summary()["arms"]) == {"good"}
    assert "out/again/seed3 depends on out/plain/seed3, which has other settings" in finished.reasons()["again", 3]
    # Also told when this arm was not asked for.
    with pytest.raises(SystemExit):
        finished({**STUDY, "arms": arms}, "--arms", "good")
    assert "out/plain/seed3" in finished.reasons()["again", 3]


def test_records_of_earlier_versions_are_read(finished):
    former = finished.summary()
    for record in (finished.folder / "out").glob("*/seed*/cell.json"):
        content = json.loads(record.read_text())
        del content["before"]
        record.write_text(json.dumps(content))
    before = calls(finished.folder)
    assert finished(STUDY) == former and calls(finished.folder) == before


def answer(project, arm, seed, ids, task="abc"):
    folder = project.folder / "out" / arm / f"seed{seed}" / "eval"
    rows = [{"query_id": name, "embedding": 1, "fused": 1} for name in ids]
    (folder / "query_ranks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").write_text(json.dumps({"protocol": {"task_sha256": task}}))


def test_intervals_resample_shops_and_the_tables_say_so(finished, capsys):
    """The arm hits all clips of one shop and none of the other, so another two shops may be all hits or all misses."""
    for seed in (3, 4):
        folder = finished.folder / "out" / "good" / f"seed{seed}" / "eval"
        rows = [{"query_id": f"q{i}", "live_id": "ab"[i // 5], "embedding": 1 + i // 5, "fused": 1} for i in range(10)]
        (folder / "query_ranks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = finished(STUDY)
    assert summary["arms"]["good"]["embedding"]["R@1_ci95"] == [0.0, 1.0]
    # One side knows the shops of the clips that both have.
    assert summary["comparisons"][0]["interval"].startswith("percentile bootstrap over 2 shops")
    assert "as if they were independent" in summary["arms"]["plain"]["embedding"]["interval"]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Intervals, 95 %: "))
    assert "over 2 shops, then over the clips of each" in line and "name no shops: run eval_rice.py again" in line


TEN = [f"q{i}" for i in range(10)]


@pytest.mark.parametrize(
    ("ids", "task", "shown"),
    [
        ([f"p{i}" for i in range(10)], "abc", "different clips"),
        ([f"q{i}" for i in range(12)], "abc", "different clips"),
        (TEN, "another", "different galleries"),
        (TEN, None, "+80.0"),
    ],
)
def test_only_results_on_the_same_queries_are_compared(finished, capsys, ids, task, shown):
    for seed in (3, 4):
        answer(finished, "good", seed, ids, task)
    summary = finished(STUDY)
    text = capsys.readouterr().out
    assert f"| good/fused against plain/embedding | {shown} |" in text
    assert "| again/embedding against plain/embedding | +10.0 |" in text
    assert ("difference" in summary["comparisons"][0]) == (shown == "+80.0")
    assert summary["arms"]["good"]["embedding"]["R@1"] == 1.0


def test_seeds_of_an_arm_on_other_clips_are_not_averaged(finished):
    answer(finished, "good", 4, TEN[:7])
    with pytest.raises(SystemExit) as stop:
        finished(STUDY)
    assert stop.value.code == 1
    assert list(finished.summary()["arms"]["good"]["embedding"]["by_seed"]) == ["3"]
    assert "out/good/seed4/eval has different clips than seed 3" in finished.reasons()["good", 4]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("query_ranks.jsonl", None, "query_ranks.jsonl is missing: run eval_rice.py again."),
        ("query_ranks.jsonl", '{"query_id": "a", "embedding": 1}\n{"quer', "line 2: not valid JSON"),
        ("query_ranks.jsonl", '{"query_id": "a"}\n', "lacks the embedding of a clip"),
        ("results.json", '{"protocol": [', "results.json is not a complete results file"),
    ],
)
def test_a_cell_with_unreadable_results_is_reported(finished, name, content, words):
    path = finished.folder / "out/good/seed3/eval" / name
    path.write_text(content) if content else path.unlink()
    with pytest.raises(SystemExit) as stop:
        finished(STUDY)
    assert stop.value.code == 1
    assert finished.reasons().keys() == {("good", 3)} and words in finished.reasons()["good", 3]
    assert f"out/good/seed3/eval/{name}" in finished.reasons()["good", 3]
    assert finished.summary()["comparisons"][0]["seeds"] == [4]


@pytest.mark.parametrize("content", ["{", "[]", '{"commands": []}', '{"commands": [], "seconds": "long"}'])
def test_a_damaged_record_is_named(finished, capsys, content):
    (finished.folder / "out/good/seed3/cell.json").write_text(content)
    before = calls(finished.folder)
    # Not even with other arms, whose tables could not be made in the end.
    with pytest.raises(SystemExit) as stop:
        finished(STUDY, "--arms", "plain")
    assert stop.value.code == 2 and calls(finished.folder) == before
    assert "out/good/seed3/cell.json is damaged: remove it" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["file", "file/in/it"])
def test_an_output_that_cannot_be_a_folder(project, capsys, output):
    (project.folder / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        project(STUDY, "--output_dir", output)
    assert stop.value.code == 2 and f"--output_dir {output}: file is a file" in capsys.readouterr().err


def test_chosen_arms_include_the_arm_whose_model_they_use(project):
    summary = project(STUDY, "--arms", "again", "--jobs", "2")
    assert set(summary["arms"]) == {"plain", "again"}
    assert {cell["arm"] for cell in summary["not_run"]} == {"good"}


def test_an_arm_may_have_some_of_the_seeds(project):
    arms = STUDY["arms"] | {"good": {**STUDY["arms"]["good"], "seeds": [4]}}
    arms |= {"better": {"model_of": "good", "eval": {"bonus": 1}}}
    summary = project({**STUDY, "arms": arms})
    assert list(summary["arms"]["plain"]["embedding"]["by_seed"]) == ["3", "4"]
    assert list(summary["arms"]["good"]["embedding"]["by_seed"]) == ["4"]
    # It has those of its model.
    assert list(summary["arms"]["better"]["embedding"]["by_seed"]) == ["4"]
    assert summary["comparisons"][0]["seeds"] == [4] and not summary["not_run"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arms": {"a": {"seeds": [5]}}}, "arm 'a' of study.yaml: the study has no seed 5, but 3, 4"),
        (
            {"arms": {"a": {"seeds": [3]}, "b": {"model_of": "a", "seeds": [4]}}},
            "arm 'b' of study.yaml: arm 'a' has no seed 4, but 3",
        ),
        ({"arm": {}}, "unknown key 'arm'"),
        ({"arms": {"a": {"trian": {}}}}, "arm 'a' of .* unknown key 'trian'"),
        ({"arms": {}}, "lacks 'arms'"),
        ({"comparisons": [["good/best", "plain/fused"]]}, "'good/best' is not ARM/SCORE"),
        ({"comparisons": ["good"]}, "a comparison is"),
        ({"seeds": ["one"]}, "study.yaml: seeds must be at least one whole number"),
        ({"seeds": []}, "study.yaml: seeds must be at least one whole number"),
        ({"seeds": 12}, "study.yaml: seeds must be at least one whole number"),
        ({"seeds": [1, 1]}, "study.yaml: seeds must be .* each once"),
        ({"max_minutes": "long"}, "study.yaml: max_minutes must be a number"),
        ({"max_minutes": -1}, "study.yaml: max_minutes must be a number"),
        ({"recipe": ["a"]}, "study.yaml: recipe must be text"),
        ({"arms": ["a"]}, "study.yaml: arms must be a mapping"),
        ({"arms": {"a": {"train": 3}}}, "arm 'a' of study.yaml: train must be a mapping"),
        ({"arms": {"a": {"eval": [3]}}}, "arm 'a' of study.yaml: eval must be a mapping"),
        ({"arms": {"a": {"train": {"b": [[1]]}}}}, "arm 'a' of study.yaml: train: b must be one value or a list"),
        ({"arms": {"a": {"note": [3]}}}, "arm 'a' of study.yaml: note must be text"),
        ({"arms": {"a": {}, "b": {"model_of": ["a"]}}}, "arm 'b' of study.yaml: model_of must be text"),
        ({"arms": {"start": {}}}, "arm 'start' of study.yaml: the name"),
        ({"arms": {"../a": {}}}, "arm '../a' of study.yaml: the name"),
        ({"arms": {"..": {}}}, "arm '..' of study.yaml: the name"),
        ({"start": 3}, "study.yaml: start must be a mapping"),
        ({"train": 3}, "study.yaml: train must be a mapping"),
        ({"render": {"data": 3}}, "study.yaml: render: data must be a mapping"),
        ({"comparisons": 3}, "study.yaml: comparisons must be a list"),
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


def test_without_matplotlib_there_is_no_picture(finished, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "can_draw", lambda: False)
    (finished.folder / "out/ablation.png").unlink()
    finished(STUDY)
    assert "no ablation.png, which needs matplotlib" in capsys.readouterr().out
    assert not (finished.folder / "out/ablation.png").exists()


def test_a_folder_without_the_scripts_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "s.yaml").write_text("recipe: r\narms: {a: }\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        ablation.main(["s.yaml"])
    assert "there is no train_rice.py here" in capsys.readouterr().err

"""Training that publishes: at saves and at the end, and only the files of a published model."""

import shutil

import pytest

from tests.train_rice.runs import BASE_RECIPE

RECIPE = BASE_RECIPE + 'eval_strategy: "no"\nsave_total_limit: 1\npush_to_hub: true\n'
TRAIN = """
import train_rice

train_rice.main([str(word) for word in arguments])
"""


@pytest.fixture(scope="module")
def train(client, tiny_mini, tmp_path_factory):
    """A function that trains in the client's process: `(folder, error, what was said)`."""
    work = tmp_path_factory.mktemp("work")
    (work / "recipe.yaml").write_text(RECIPE)

    def train(name: str, *words) -> tuple:
        folders = ["--data_dir", tiny_mini, "--cache_dir", work / "cache", "--output_dir", work / name]
        error, _, said = client.attempt(TRAIN, arguments=[work / "recipe.yaml", *folders, *words])
        return work / name, error, said

    return train


def test_publishes_at_saves_and_at_the_end(hub, train):
    folder, error, said = train("run", "--hub_model_id", "someone/trained", "--hub_always_push", "yes")
    assert error is None, f"{said}\n{error}"
    repo = hub.repos["models", "someone/trained"]
    commits = repo.branches["main"][1:]
    assert repo.private and len(commits) == 3
    assert (folder / "training_args.bin").is_file() and (folder / "checkpoint-4" / "optimizer.pt").is_file()
    for files in commits:
        assert {"config.json", "model.safetensors", "processor_config.json", "modeling_rice.py"} < files.keys()
        everything = b"\n".join(files.values())
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pth")) or "checkpoint" in name]
        assert str(folder.parent).encode() not in everything
        assert b"Not evaluated yet" in files["README.md"] and b"max_steps: 4" in files["README.md"]
    assert commits[0]["model.safetensors"] != commits[1]["model.safetensors"]
    assert commits[1]["model.safetensors"] == (folder / "checkpoint-4" / "model.safetensors").read_bytes()
    assert commits[2]["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert b"minutes of training" in commits[2]["README.md"] and b"minutes of training" not in commits[0]["README.md"]


def test_only_at_the_end_and_public_when_asked(hub, train):
    words = ("--hub_model_id", "someone/at-end", "--hub_strategy", "end", "--hub_private_repo", "no")
    _, error, said = train("end", *words)
    assert error is None, f"{said}\n{error}"
    repo = hub.repos["models", "someone/at-end"]
    assert not repo.private and len(repo.branches["main"]) == 2


def test_a_failing_upload_does_not_stop_training(hub, train, client):
    hub.failing_calls = {"/commit/": 501}
    folder, error, said = train("failing", "--hub_model_id", "someone/failing")
    sentence = said.strip().splitlines()[-1]
    assert error == "exit 2" and sentence.startswith("train_rice.py: error: the finished run in")
    assert f"Afterwards run: rice publish {folder} someone/failing" in sentence
    assert (folder / "train_results.json").is_file() and (folder / "model.safetensors").is_file()
    hub.heal()
    command = ["publish", folder, "someone/failing", "--without_results"]
    client("from rice_cli import main\nmain([str(word) for word in arguments])", arguments=command)
    assert hub.files("someone/failing")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_refused_token_ends_it_before_the_first_step(hub, train):
    hub.tokens = {"another"}
    folder, error, said = train("refused", "--hub_model_id", "someone/refused")
    sentence = said.strip().splitlines()[-1]
    assert error == "exit 2" and sentence.startswith("train_rice.py: error: the Hub refuses the access token (401)")
    assert not (folder / "model.safetensors").exists()


def test_without_a_licence_it_ends_before_the_first_step(hub, train, tiny_mini, tmp_path):
    """Of data that nobody has rendered, nothing is known."""
    data = shutil.copytree(tiny_mini, tmp_path / "lpr4m")
    (data / "mini_lpr4m.json").unlink()
    words = ["--hub_model_id", "someone/unlicensed", "--hub_strategy", "end", "--dataset", "lpr4m", "--data_dir", data]
    folder, error, said = train("unlicensed", *words)
    assert error == "exit 2" and "set hub_license" in said.strip().splitlines()[-1]
    assert not (folder / "model.safetensors").exists() and ("models", "someone/unlicensed") not in hub.repos
    _, error, said = train("licensed", *words, "--hub_license", "cc-by-nc-4.0")
    assert error is None, f"{said}\n{error}"
    assert b"license: cc-by-nc-4.0" in hub.files("someone/unlicensed")["README.md"]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("--hub_token", "hf_abc"), "hub_token would be written to files of the run"),
        (("--hub_strategy", "all_checkpoints"), "hub_strategy must be end or every_save"),
    ],
)
def test_refused_arguments(hub, train, words, sentence):
    _, error, said = train("arguments", *words)
    assert error == "exit 2" and sentence in said

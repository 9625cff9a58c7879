"""Where `rice publish` looks for a model and its results. tests/hub_rice/test_publish.py tests the upload."""

import json
import shutil

import pytest

from hub_rice.publish import check_results, find_model, find_results
from rice_cli import main


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a whole, empty checkpoint."""
    from safetensors.numpy import save_file

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "rice"}))
    save_file({}, folder / "model.safetensors")
    return folder


def test_a_run_is_its_own_folder_or_holds_it_as_model(checkpoint, tmp_path):
    assert find_model(checkpoint) == checkpoint
    shutil.move(checkpoint, tmp_path / "demo" / "model")
    assert find_model(tmp_path / "demo") == tmp_path / "demo" / "model"


@pytest.mark.parametrize("place", [".", "eval"])
def test_results_of_a_run_are_found(checkpoint, tmp_path, place):
    (checkpoint / place).mkdir(exist_ok=True)
    (checkpoint / place / "results.json").write_text("{}")
    assert find_results(checkpoint, checkpoint) == checkpoint / place / "results.json"
    shutil.move(checkpoint, tmp_path / "demo" / "model")
    (tmp_path / "demo" / "results.json").write_text("{}")
    found = find_results(tmp_path / "demo", tmp_path / "demo" / "model")
    # Nearest to the weights first.
    assert found == tmp_path / "demo" / "model" / place / "results.json"
    found.unlink()
    assert find_results(tmp_path / "demo", tmp_path / "demo" / "model") == tmp_path / "demo" / "results.json"


def test_results_must_be_of_these_weights(checkpoint):
    check_results({}, checkpoint)
    with pytest.raises(ValueError, match="belong to other weights"):
        check_results({"model_sha256": "0" * 64}, checkpoint)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda folder: shutil.rmtree(folder), "there is no folder"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "cut short"),
        (lambda folder: None, "make it with `python eval_rice.py --model"),
    ],
)
def test_refusals(checkpoint, capsys, damage, words):
    damage(checkpoint)
    with pytest.raises(SystemExit) as end:
        main(["publish", str(checkpoint), "someone/rice"])
    message = capsys.readouterr().err.strip()
    assert end.value.code == 2 and words in message and len(message.splitlines()) == 1

"""Error messages of eval_rice.py and train_rice.py if a model cannot be fetched from the Hub."""

import json

import pytest

from hub_rice.repository import publication

EVALUATE = """
import eval_rice

eval_rice.main(["--model", model, "--dataset", "mini_lpr4m", "--output_dir", output])
"""
TRAIN = """
import train_rice

words = ["--dataset", "mini_lpr4m", "--use_cpu", "yes", "--report_to", "none", "--output_dir", output]
from training_rice.arguments import ModelArguments
from training_rice.setup import build_model

try:
    build_model(ModelArguments(model_name_or_path=model, model={}))
except (ValueError, OSError) as error:
    raise SystemExit(train_rice._sentence(error))
"""


@pytest.fixture
def says(client, tmp_path):
    """A function that gives the one sentence with which evaluation and training refuse a model."""

    def says(model: str) -> str:
        sentences = []
        for code in (EVALUATE, TRAIN):
            error, _, said = client.attempt(code, model=model, output=str(tmp_path / "out"))
            assert error is not None and error.startswith("exit"), f"{error}\n{said}"
            line = said.strip().splitlines()[-1] if error == "exit 2" else error.removeprefix("exit ")
            sentences.append(line.partition("error: ")[2] or line)
            assert "Traceback" not in said + error
        # A reason in brackets may be told differently.
        assert sentences[0][:90] == sentences[1][:90]
        return sentences[0]

    return says


@pytest.fixture
def published(hub, tiny_checkpoint):
    """A function that puts the tiny checkpoint on the Hub, its config changed."""

    def publish(name: str, **changes) -> str:
        files = publication(tiny_checkpoint, name, license="apache-2.0")
        files = {path: item if isinstance(item, bytes) else item.read_bytes() for path, item in files.items()}
        files["config.json"] = json.dumps({**json.loads(files["config.json"]), **changes}).encode()
        hub.add(name, files)
        return name

    return publish


def test_no_such_repository(hub, says):
    assert says("someone/nothing").startswith(
        "there is no someone/nothing on the Hub that you can access: check the name"
    )


def test_a_revoked_token(hub, says, published):
    name = published("someone/closed-to-you")
    hub.tokens = {"another"}
    assert says(name) == f"the Hub refuses the access token (401) for {name}: log in again by `hf auth login`."


def test_a_forbidden_model(hub, says, published):
    name = published("someone/forbidden")
    hub.failing_calls = {name: 403}
    assert f"the access token has no permission for this on {name} (403)" in says(name)


def test_no_network(hub, says):
    hub.unreachable = True
    assert says("someone/away").startswith("the Hub cannot be reached for someone/away: check the network")


def test_a_newer_version(hub, says, published):
    name = published("someone/newer", warp_drive=True)
    assert f"{name} was saved by a newer version of this project" in says(name)
    assert "'warp_drive'" in says(name)
    name = published("someone/newest", transformers_version="99.0.0", vision_config={"model_type": "clip_of_2031"})
    assert f"{name} was saved by a newer transformers (99.0.0) and cannot be loaded" in says(name)

"""Train, evaluate, publish, and evaluate the published model: the figures stay the same."""

import json

import pytest
from huggingface_hub import ModelCard

from hub_rice.checkpoint import weights_fingerprint

RUN = """
import eval_rice, train_rice
from rice_cli import main

words = [str(word) for word in arguments]
{"train": train_rice.main, "eval": eval_rice.main, "rice": main}[command](words)
"""
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8}
RECIPE = {"dataset": "mini_lpr4m", "num_frames": 3, "train_num_frames": 2, "vocab_size": 400, "max_steps": 2}
RECIPE |= {"model": {"vision_config": VISION, "projection_dim": 16, "decoder_num_heads": 4}, "use_cpu": True}
RECIPE |= {"per_device_train_batch_size": 8, "eval_strategy": "no", "report_to": "none", "validation_fraction": 0.3}


@pytest.fixture
def run(client):
    """A function that runs a command in the client's process: `(error, what it said)`."""

    def run(command: str, *arguments) -> tuple[str | None, str]:
        error, _, said = client.attempt(RUN, command=command, arguments=arguments)
        return error, said

    return run


def test_train_evaluate_publish_and_evaluate_again(hub, run, tiny_mini, tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    folder, cache = tmp_path / "run", ["--cache_dir", tmp_path / "cache"]
    data = ["--data_dir", tiny_mini, *cache]
    evaluation = ["--dataset", "mini_lpr4m", *data, "--num_workers", "0", "--device", "cpu"]
    assert run("train", tmp_path / "recipe.yaml", *data, "--output_dir", folder)[0] is None
    assert run("eval", "--model", folder, *evaluation, "--output_dir", folder / "eval")[0] is None
    assert run("rice", "publish", folder, "someone/whole", "--dataset_id", "someone/mini")[0] is None

    files = hub.files("someone/whole")
    results = json.loads(files["results.json"])
    assert results["model_sha256"] == weights_fingerprint(folder)
    # What an evaluation writes is known to the list of what is published.
    measured = json.loads((folder / "eval" / "results.json").read_text())
    assert measured.keys() == results.keys() and measured["protocol"].keys() == results["protocol"].keys()
    assert measured["protocol"]["fusion"].keys() == results["protocol"]["fusion"].keys()
    assert measured["head_tail"].keys() - results["head_tail"].keys() <= {"data_dir"}
    card = ModelCard(files["README.md"].decode())
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["R@5, fused score"] == round(100 * results["scores"]["fused"]["R@5"], 2)
    assert card.data.datasets == ["someone/mini"] and "per_device_train_batch_size: 8" in card.text
    assert "max_steps: 2" in card.text and "The data set is drawn by a program" in card.text
    assert str(tmp_path) not in card.text and str(tiny_mini) not in card.text

    assert run("eval", "--model", "someone/whole", *evaluation, "--output_dir", tmp_path / "again")[0] is None
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["scores"] == results["scores"] and again["model"] == "someone/whole"

    assert run("train", tmp_path / "recipe.yaml", *data, "--output_dir", folder, "--seed", "1")[0] is not None
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    error, said = run("rice", "publish", folder, "someone/whole")
    assert error == "exit 2" and "the results belong to other weights" in said

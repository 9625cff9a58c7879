"""`rice publish` with the real client against the local Hub: what is published, what is not, and its messages."""

import json
import os
import shutil

import pytest

from hub_rice.checkpoint import weights_fingerprint

PUBLISH = """
import os
from rice_cli import main

assert main([str(word) for word in arguments]) == 0
"""

# A port on which nobody answers.
NOWHERE = """
from huggingface_hub import constants
constants.ENDPOINT = "http://127.0.0.1:9"
"""
BACK = """
import os
from huggingface_hub import constants
constants.ENDPOINT = os.environ["HF_ENDPOINT"]
"""

RESULTS = {
    "protocol": {"split": "test", "gallery_scope": "live", "num_galleries": 2, "num_gallery_images": 90}
    | {"boxes": "none", "fusion": {"source": "validation", "source_words": "the weight was fitted on validation"}},
    "num_queries": 77,
    "gallery_size": {"min": 40, "median": 45.0, "max": 50},
    "scores": {kind: {"R@1": 0.25, "R@5": 0.5, "R@10": 0.75} for kind in ("embedding", "matching", "fused")},
    "fusion_weight": 0.4,
    "baselines": {},
    "by": {"category": {"mugs": {"num_queries": 7, "embedding": {"R@1": 0.5}}}},
    "dataset": "/home/me/data/mini_lpr4m",
    "failures": [
        {"kind": "query", "id": "q", "file": "/home/me/data/q.jpg", "reason": "no image /home/me/data/q.jpg"}
    ],
    "ties": {"embedding": {"share": 0.0, "R@1_ties_at_random": 0.25}},
    "versions": {"torch": "2"},
}


@pytest.fixture
def run_folder(tiny_checkpoint, tmp_path):
    """A finished run: checkpoint, results of an evaluation, and all that must stay at home."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "run")
    arguments = {"dataset": "mini_lpr4m", "data_dir": "/home/me/data", "output_dir": str(folder), "max_steps": 800}
    (folder / "train_arguments.json").write_text(json.dumps({**arguments, "learning_rate": 0.002, "model": {}}))
    (folder / "train_results.json").write_text(json.dumps({"train_runtime": 120.0}))
    (folder / "training_args.bin").write_bytes(b"a pickle")
    (folder / "unreadable_media.jsonl").write_text('{"file": "/home/me/data/x.jpg"}')
    (folder / "private_notes.py").write_text("secret = 1")
    # An encoded shop, and a shard that an earlier save left behind.
    for name in ("gallery.safetensors", "model-00001-of-00009.safetensors"):
        (folder / name).write_bytes(b"no weights of this model")
    (folder / "matches.png").write_bytes(b"a picture")
    (folder / "checkpoint-4").mkdir()
    for name in ("optimizer.pt", "model.safetensors", "trainer_state.json"):
        (folder / "checkpoint-4" / name).write_bytes(b"state")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["_name_or_path"] = "/home/me/models/clip"
    (folder / "config.json").write_text(json.dumps(config))
    write_results(folder)
    return folder


def write_results(folder, **changes):
    command = f"python eval_rice.py --model {folder} --dataset /home/me/data/mini_lpr4m"
    (folder / "results.json").write_text(json.dumps({**RESULTS, "model": str(folder), "command": command, **changes}))


def publish(client, *arguments):
    client(PUBLISH, arguments=["publish", *arguments])


def refusal(client, *arguments) -> str:
    """The one sentence with which a command ends."""
    error, _, said = client.attempt(PUBLISH, arguments=["publish", *arguments])
    assert error == "exit 2", f"{error}\n{said}"
    lines = [line for line in said.splitlines() if "rice publish: error:" in line]
    assert len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


def test_only_listed_files_are_published(hub, client, run_folder):
    publish(client, run_folder, "someone/complete")
    files = hub.files("someone/complete")
    assert files.keys() >= {
        "README.md", "results.json", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json",
        "tokenizer_config.json", "configuration_rice.py", "modeling_rice.py", "decoder_rice.py", "features_rice.py",
        "loss_rice.py", "processing_rice.py", "video_processing_rice.py",
    }  # fmt: skip
    at_home = {"train_arguments.json", "train_results.json", "training_args.bin", "unreadable_media.jsonl"}
    at_home |= {"private_notes.py", "checkpoint-4", "gallery.safetensors", "model-00001-of-00009.safetensors"}
    assert {name for name in os.listdir(run_folder) if name not in files} == at_home
    assert not [name for name in files if name.startswith("checkpoint")]
    assert files["model.safetensors"] == (run_folder / "model.safetensors").read_bytes()
    everything = b"\n".join(files.values())
    for secret in (b"/home/me", str(run_folder).encode(), b"hf_Secret", b"private_notes", b"a pickle"):
        assert secret not in everything, secret
    card = files["README.md"].decode()
    assert 'from_pretrained("someone/complete", trust_remote_code=True)' in card and "| RICE, matching | 25.0" in card
    results = json.loads(files["results.json"])
    assert results["model"] == "someone/complete" and results["dataset"] == "mini_lpr4m"
    assert results["command"] == "python eval_rice.py --model someone/complete --dataset mini_lpr4m"
    assert results["failures"][0]["reason"] == "no image q.jpg" and results["scores"] == RESULTS["scores"]
    assert files["matches.png"] == b"a picture" and "](matches.png)" in card
    assert b"| mugs | 7 | 50.0 |" in files["breakdown.md"] and "[breakdown.md](breakdown.md)" in card
    assert "license: apache-2.0" in card and "datasets:" not in card
    assert "learning_rate: 0.002" in card and "2.0 minutes of training" in card and "data_dir:" not in card


def plant(value, path: str):
    """A JSON value whose texts all are a path of this machine."""
    if isinstance(value, dict):
        return {name: plant(item, path) for name, item in value.items()}
    if isinstance(value, list):
        return [plant(item, path) for item in value]
    return path if isinstance(value, str) else value


def test_a_local_path_in_any_field_is_not_published(hub, client, run_folder):
    """Every field of the records that are only shown; what a model is loaded from has no such fields."""
    path = "/srv/secret lab/data"
    for name in ("results.json", "train_arguments.json", "train_results.json"):
        record = json.loads((run_folder / name).read_text())
        planted = plant(record, path) | {"notes": path}
        if name == "results.json":
            planted["protocol"]["gallery_scope"] = "live"
        (run_folder / name).write_text(json.dumps(planted))
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        record = json.loads((run_folder / name).read_text())
        (run_folder / name).write_text(json.dumps(record | {"_name_or_path": path}))
    publish(client, run_folder, "someone/planted", "--license", "mit")
    files = hub.files("someone/planted")
    assert not [name for name, content in files.items() if b"secret" in content]
    assert json.loads(files["results.json"])["scores"] == RESULTS["scores"]


def test_a_licence_is_required_if_that_of_the_data_is_unknown(hub, client, run_folder):
    arguments = json.loads((run_folder / "train_arguments.json").read_text())
    (run_folder / "train_arguments.json").write_text(json.dumps({**arguments, "dataset": "lpr4m"}))
    assert "give the model's licence with --license" in refusal(client, run_folder, "someone/unlicensed")
    assert "not a licence identifier of the Hub" in refusal(
        client, run_folder, "someone/unlicensed", "--license", "My Own"
    )
    assert ("models", "someone/unlicensed") not in hub.repos
    publish(client, run_folder, "someone/licensed", "--license", "cc-by-nc-4.0")
    assert b"license: cc-by-nc-4.0" in hub.files("someone/licensed")["README.md"]


def test_the_picture_can_be_left_out(hub, client, run_folder):
    publish(client, run_folder, "someone/blind", "--without_picture")
    files = hub.files("someone/blind")
    assert "matches.png" not in files and b"matches.png" not in files["README.md"]


def test_other_safetensors_files_are_not_published(hub, client, run_folder):
    write_results(run_folder, model_sha256=weights_fingerprint(run_folder))
    (run_folder / "gallery.safetensors").write_bytes(b"another shop")
    publish(client, run_folder, "someone/shop")
    assert "gallery.safetensors" not in hub.files("someone/shop")


def test_a_repository_is_private_by_default_and_keeps_its_visibility(hub, client, run_folder):
    publish(client, run_folder, "someone/closed")
    assert hub.repos["models", "someone/closed"].private
    publish(client, run_folder, "someone/open", "--public")
    assert not hub.repos["models", "someone/open"].private
    _, _, said = client.attempt(PUBLISH, arguments=["publish", str(run_folder), "someone/closed", "--public"])
    assert "stays private" in said and hub.repos["models", "someone/closed"].private


def test_the_token_appears_in_no_file_or_log(hub, client, run_folder):
    from_environment = client("import os\nresult = os.environ['HF_TOKEN']")
    assert from_environment in hub.tokens
    publish(client, run_folder, "someone/quiet")
    hub.tokens = {"another"}
    refusal(client, run_folder, "someone/quiet")
    for name in hub.files("someone/quiet"):
        assert from_environment.encode() not in hub.files("someone/quiet")[name]
    assert from_environment not in client.said + client.log.read_text()
    hub.heal()
    for leaked in (from_environment, "hf_" + "a1B2" * 8):
        (run_folder / "extra_rice.py").write_text(f'TOKEN = "{leaked}"')
        assert "extra_rice.py holds an access token" in refusal(client, run_folder, "someone/leak")
    assert ("models", "someone/leak") not in hub.repos


def test_another_branch(hub, client, run_folder):
    publish(client, run_folder, "someone/branches", "--revision", "trial")
    assert "model.safetensors" in hub.files("someone/branches", revision="trial")
    assert hub.files("someone/branches") == {}


def test_shards_of_an_earlier_publication_are_removed(hub, client, run_folder, tiny_checkpoint):
    shard(run_folder)
    publish(client, run_folder, "someone/again")
    assert "model.safetensors.index.json" in hub.files("someone/again")
    hub.files("someone/again")["notes.txt"] = b"written on the website"
    for path in run_folder.glob("model[-.]*"):
        path.unlink()
    shutil.copy(tiny_checkpoint / "model.safetensors", run_folder)
    publish(client, run_folder, "someone/again")
    weights = [name for name in hub.files("someone/again") if "safetensors" in name]
    assert weights == ["model.safetensors"] and "notes.txt" in hub.files("someone/again")


def shard(folder) -> int:
    """Saves the weights of a checkpoint in several files; returns how many."""
    from modeling_rice import RiceModel

    model = RiceModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="80KB")
    return len(list(folder.glob("model-*.safetensors")))


def test_an_interrupted_upload_continues(hub, client, run_folder):
    count = shard(run_folder)
    assert count > 2
    hub.allowed_uploads = 1
    message = refusal(client, run_folder, "someone/resumed")
    assert "someone/resumed" in message
    first = list(hub.uploads)
    assert 0 < len(first) < count and hub.files("someone/resumed") == {}
    hub.heal()
    publish(client, run_folder, "someone/resumed")
    # The picture is uploaded as weights are.
    assert len(hub.uploads) == len(set(hub.uploads)) == count + 1 and hub.uploads[: len(first)] == first
    assert len([name for name in hub.files("someone/resumed") if name.startswith("model-")]) == count


def test_a_dropped_connection_is_retried(hub, client, run_folder):
    shard(run_folder)
    hub.dropped_uploads = 1
    publish(client, run_folder, "someone/dropped")
    assert hub.dropped_uploads == 0 and "config.json" in hub.files("someone/dropped")


def test_refusals_of_the_hub(hub, client, run_folder):
    hub.tokens = {"another"}
    assert "refuses the access token (401)" in refusal(client, run_folder, "someone/revoked")
    hub.heal()
    hub.read_only = True
    assert "has no permission for this on someone/read-only (403)" in refusal(client, run_folder, "someone/read-only")
    hub.heal()
    hub.failing_calls = {"/commit/": 501}
    assert "has an internal error (501)" in refusal(client, run_folder, "someone/broken")
    assert "give one of the form owner/name" in refusal(client, run_folder, "no/such/name")
    error, _, said = client.attempt(NOWHERE + PUBLISH + BACK, arguments=["publish", run_folder, "someone/away"])
    client(BACK)
    assert error == "exit 2" and "the Hub cannot be reached for someone/away" in said


def test_without_a_token(hub, client, run_folder):
    start, end = (
        "import os\nkept = os.environ.pop('HF_TOKEN')\ntry:\n",
        "\nfinally:\n    os.environ['HF_TOKEN'] = kept\n",
    )
    code = start + "".join(f"    {line}\n" for line in PUBLISH.strip().splitlines()) + end
    error, _, said = client.attempt(code, arguments=["publish", run_folder, "someone/nobody"])
    assert error == "exit 2" and "there is no access token: log in with `hf auth login`" in said


def test_refusals_of_the_folder(hub, client, run_folder, tmp_path):
    def says(words: str, *more, folder=run_folder):
        assert words in refusal(client, folder, "someone/refused", *more)

    says(f"there is no folder {tmp_path / 'gone'}", folder=tmp_path / "gone")
    write_results(run_folder, model_sha256="0" * 64)
    says("the results belong to other weights")
    whole = (run_folder / "results.json").read_text()
    (run_folder / "results.json").write_text(json.dumps({"scores": {}}))
    says("results.json lacks protocol, num_queries")
    (run_folder / "results.json").write_text(whole[:100])
    says("results.json is not a complete results file")
    (run_folder / "results.json").unlink()
    says("make it with `python eval_rice.py --model")
    config = json.loads((run_folder / "config.json").read_text())

    def with_config(words: str, **changes):
        (run_folder / "config.json").write_text(json.dumps({**config, **changes}))
        says(words, "--without_results")

    with_config("holds a bert model", model_type="bert")
    with_config("saved by a newer version of this project: its config has the setting 'warp_drive'", warp_drive=True)
    vision = {**config["vision_config"], "model_type": "clip_of_2031"}
    with_config("saved by a newer transformers (99.1.0)", transformers_version="99.1.0", vision_config=vision)
    with_config("lacks auto_map in config.json", auto_map={})
    with_config("do not match its config.json", projection_dim=64)
    (run_folder / "config.json").write_text(json.dumps(config))
    (run_folder / "decoder_rice.py").rename(run_folder / "away.py")
    says("lacks decoder_rice.py", "--without_results")
    (run_folder / "away.py").rename(run_folder / "decoder_rice.py")
    (run_folder / "processor_config.json").unlink()
    says("processor", "--without_results")
    (run_folder / "model.safetensors").write_bytes(b"cut")
    says("cut short", "--without_results")
    assert ("models", "someone/refused") not in hub.repos


def test_without_results_the_card_has_no_figures(hub, client, run_folder):
    (run_folder / "results.json").unlink()
    publish(client, run_folder, "someone/unmeasured", "--without_results")
    files = hub.files("someone/unmeasured")
    assert "results.json" not in files and b"Not evaluated yet" in files["README.md"]
    assert b"model-index" not in files["README.md"]

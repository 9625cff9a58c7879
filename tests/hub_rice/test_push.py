"""`push_to_hub` of transformers, with the real client: it adds the layout and a short card."""

import pytest
from huggingface_hub import ModelCard

PUSH = """
from modeling_rice import RiceModel

model = RiceModel.from_pretrained(checkpoint)
if folder is None:
    model.push_to_hub(name, private=True)
else:
    model.save_pretrained(folder, push_to_hub=True, repo_id=name)
"""
LAYOUT = {"modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "model.sha256"}


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_a_pushed_model_has_its_layout_and_a_short_card(hub, client, tiny_checkpoint, tmp_path, way):
    name = f"someone/pushed-by-{way.replace('_', '-')}"
    folder = None if way == "push_to_hub" else str(tmp_path / "model")
    client(PUSH, checkpoint=str(tiny_checkpoint), folder=folder, name=name)
    repo = hub.repos["models", name]
    files = hub.files(name)
    assert len(repo.branches["main"]) == 2 and LAYOUT | {"model.safetensors", "modeling_rice.py"} < set(files)
    card = ModelCard(files["README.md"].decode())
    assert f'AutoModel.from_pretrained("{name}", trust_remote_code=True)' in card.text
    assert "this card gives no figures" in card.text and "automatically generated" not in card.text
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-feature-extraction"
    assert "sentence-transformers" in card.data.tags and card.data.license is None
    assert "(https://arxiv.org/abs/2308.04912)" in card.text and "More Information Needed" not in card.text


def test_an_existing_card_is_kept(hub, client, tiny_checkpoint):
    hub.add("someone/described", {"README.md": b"---\nlicense: mit\n---\n# Mine\n"})
    client(PUSH, checkpoint=str(tiny_checkpoint), folder=None, name="someone/described")
    assert hub.files("someone/described")["README.md"].startswith(b"---\nlicense: mit")
    assert b"# Mine" in hub.files("someone/described")["README.md"]


def test_a_saved_model_gets_no_card(tiny_checkpoint):
    """Where it will lie, and under which name, is known when it is published."""
    assert not (tiny_checkpoint / "README.md").exists()

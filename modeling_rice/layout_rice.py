"""Files of a saved model besides weights and config: sentence-transformers' layout, a model card, SHA-256 sums."""

import hashlib
import json
import os
from pathlib import Path

HASHES = "model.sha256"
"""Hashes of the weight files in the format of `sha256sum`; check them by `sha256sum --check model.sha256`."""

PIPELINE_TAG = "image-feature-extraction"
TAGS = ("rice", "livestreaming-product-recognition", "video-to-shop", "image-retrieval", "video")
TAGS += ("sentence-transformers", "custom_code")
"""Tags of a model on the Hub."""

# Part of the card that transformers writes if there is none.
_AUTOMATIC = "This model card has been automatically generated"

_HEAD = """---
library_name: transformers
pipeline_tag: {pipeline_tag}
tags:
{tags}
---

# {name}

This model recognises which product a livestream clip presents. The clip is the query; the product images of a shop are
the gallery. The model is RICE ([Cross-view Semantic Alignment for Livestreaming Product
Recognition](https://arxiv.org/abs/2308.04912), ICCV 2023)"""

_CARD = """.

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)
shop = model.get_image_features(**processor(images=["red_mug.jpg", "blue_mug.jpg"])).pooler_output
clip = model.get_video_features(**processor(videos=[["frame_0.jpg", "frame_1.jpg"]])).pooler_output
print(clip @ shop.T)
```

Not evaluated yet, so this card gives no figures. No licence is stated; ask the publisher of the model.
"""

_FEATURES = {
    kind: {"method": f"get_{kind}_features", "method_output_name": "pooler_output"} for kind in ("image", "video")
}

# One module is enough, since the model normalises its embeddings itself.
_FILES = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": _FEATURES,
        "module_output_name": "sentence_embedding",
    },
    "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
}


def write_layout(folder: str | os.PathLike) -> None:
    """
    Writes the files that let `SentenceTransformer(folder)` and mteb encode images and clips, and the hashes of the
    weights.
    """
    folder = Path(folder)
    for name, content in _FILES.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    lines = []
    # One file, shards, or those of a `variant`.
    for path in sorted(folder.glob("model*.safetensors")):
        with open(path, "rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    (folder / HASHES).write_text("".join(lines), encoding="utf-8")


def write_card(folder: str | os.PathLike, repo_id: str) -> None:
    """Writes README.md if there is none, or only the one that transformers generates."""
    path = Path(folder) / "README.md"
    if path.is_file() and _AUTOMATIC not in path.read_text(encoding="utf-8"):
        return
    path.write_text(card_head(repo_id.rpartition("/")[2]) + _CARD.format(repo_id=repo_id), encoding="utf-8")


def card_head(name: str) -> str:
    """Start of a model card: the metadata, and a description whose last sentence has no full stop yet."""
    return _HEAD.format(pipeline_tag=PIPELINE_TAG, tags="\n".join(f"- {tag}" for tag in TAGS), name=name)

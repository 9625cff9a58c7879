"""What a saved model tells libraries besides transformers: the files of the sentence-transformers layout."""

import json
import os
from pathlib import Path

_FEATURES = {
    kind: {"method": f"get_{kind}_features", "method_output_name": "pooler_output"} for kind in ("image", "video")
}

# Embeddings are normalised by the model, so there is one module.
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
    """Writes the files by which `SentenceTransformer(folder)` and mteb know that images and clips can be encoded."""
    for name, content in _FILES.items():
        (Path(folder) / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

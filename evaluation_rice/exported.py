"""Loss of recall by export to ONNX and by quantisation."""

import json
from pathlib import Path

from data_rice import gallery_scope, load_dataset_view
from data_rice.files import write_atomically
from hub_rice.export.onnx_model import OnnxRice
from hub_rice.tables import format_table
from modeling_rice.scoring_rice import FusionWeights

from .retrieval import evaluate_retrieval


def compare_export(
    model,
    processor,
    folder: Path,
    dataset: str,
    *,
    split: str = "test",
    data_dir: str | None = None,
    int8: bool = False,
    num_workers: int = 0,
) -> dict:
    """
    R@k of a model in torch and of its exported files on one split; prints a table and writes `recall.json`.

    Args:
        model, processor: The exported model and processor.
        folder: Folder with the files of `rice export`.
        dataset, split, data_dir: As for `data_rice.load_dataset_view`.
        int8: Also measure the quantised files.
        num_workers: Number of processes that decode pictures.

    Returns:
        `{"dataset", "split", "num_queries", "scores"}`, the content of `recall.json`.

    Raises:
        ValueError, FileNotFoundError: as `load_dataset_view`.
    """
    queries, gallery = (load_dataset_view(dataset, view, split, data_dir=data_dir) for view in ("query", "gallery"))
    models = {"torch": model, "onnx": OnnxRice(folder)}
    if int8:
        models["int8"] = OnnxRice(folder, int8=True)
    scope, weights = gallery_scope(dataset, data_dir), FusionWeights.of(model.config)
    rows = {}
    for name, candidate in models.items():
        scores = evaluate_retrieval(
            candidate,
            processor,
            queries,
            gallery,
            scope=scope,
            weights=weights,
            num_workers=num_workers,
            batch_size=16,
        )
        rows |= {f"{name}, {kind}": values for kind, values in scores.items()}
    print(f"\n{len(queries)} clips of {dataset} ({split}), recall in percent\n\n{format_table(rows)}\n")
    # The name without its folder, because the file may be published.
    measured = {"dataset": Path(dataset).name, "split": split, "num_queries": len(queries), "scores": rows}
    path = folder / "recall.json"
    write_atomically(path, json.dumps(measured, indent=2, allow_nan=False) + "\n")
    print(f"written to {path}")
    return measured

"""Publish a run on the Hub: model, processor, their Python files, results and model card, in one commit.

Nothing else of the folder leaves the machine: no optimiser states, pickles, logs or local paths. A new repository is
private unless --public is given; one that exists keeps its visibility. An interrupted upload goes on where it stopped
when the same command runs again. RUN_DIR is the folder of train_rice.py, or one that holds it as `model`.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run_dir", type=Path, help="folder of a trained model")
    add("repo_id", help="repository on the Hub, such as someone/rice-mugs")
    add("--public", action="store_true", help="let everybody see a new repository")
    add("--revision", help="branch to write to, created where it is missing; default: main")
    add("--results", type=Path, help="results.json of eval_rice.py; default: the one in RUN_DIR or RUN_DIR/eval")
    add("--without_results", action="store_true", help="publish a model that has not been evaluated, and say so")
    add("--dataset_id", help="the data set's id on the Hub, for the card's metadata")
    add("--onnx", action="store_true", help="add ONNX files; without those of `rice export`, they are made first")
    add("--message", default="Publish RICE", help="commit message (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        FileNotFoundError: no checkpoint, no results, no such repository.
        ValueError: a damaged or foreign checkpoint, results of another one, an access token in a file.
        PermissionError, ConnectionError: what the Hub answered, see `hub_rice.repository.hub_errors`.
    """
    folder = find_model(options.run_dir)
    results = None
    if not options.without_results:
        from .model_card import read_results

        results = read_results(options.results or find_results(options.run_dir, folder))
        check_results(results, folder)
    add_onnx(check_loading(folder), folder, wanted=options.onnx)
    from huggingface_hub import HfApi

    from .repository import hub_errors, publication, upload

    files = publication(folder, options.repo_id, results, dataset_id=options.dataset_id)
    size = sum(len(item) if isinstance(item, bytes) else item.stat().st_size for item in files.values())
    print(f"Publishing {len(files)} files ({size / 1e6:.1f} MB) of {folder} ...")
    commit = upload(
        files, options.repo_id, private=not options.public, revision=options.revision, message=options.message
    )
    with hub_errors(options.repo_id):
        is_private = HfApi().model_info(options.repo_id).private
    print(f"Published {commit.commit_url} ({'private' if is_private else 'public'})")
    if options.public and is_private:
        print(f"{options.repo_id} existed already and stays private; its settings on the Hub change that.")


def find_model(run_dir: Path) -> Path:
    """The checkpoint folder of a run: the run's own, or its `model`."""
    from .checkpoint import check_checkpoint

    if not run_dir.exists():
        raise FileNotFoundError(f"there is no folder {run_dir}: name one that train_rice.py wrote.")
    folder = run_dir if (run_dir / "config.json").is_file() or not (run_dir / "model").is_dir() else run_dir / "model"
    check_checkpoint(folder)
    return folder


def find_results(run_dir: Path, folder: Path) -> Path:
    """The results.json of a run, in the places where eval_rice.py is told to put it."""
    places = [place / "results.json" for place in (folder, folder / "eval", run_dir, run_dir / "eval")]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{run_dir} has no results.json: make it by `python eval_rice.py --model {folder} --dataset NAME "
            f"--output_dir {folder / 'eval'}`, or pass --without_results."
        )
    return found


def check_results(results: Mapping, folder: Path) -> None:
    """Raises `ValueError` when results were measured with other weights than those of the folder."""
    from .checkpoint import weights_fingerprint

    measured = results.get("model_sha256")
    if measured is not None and measured != weights_fingerprint(folder):
        raise ValueError(
            f"the results are of other weights than those in {folder}: run eval_rice.py again with this checkpoint."
        )


def add_onnx(model, folder: Path, wanted: bool) -> None:
    """
    Exports a model to the folder's `onnx`, if that is wanted and has not been done.

    Raises:
        ValueError: files that are there were exported from other weights, or cannot be made.
    """
    from modeling_rice.fingerprint_rice import same_state

    description = folder / "onnx" / "onnx.json"
    if description.is_file():
        exported = json.loads(description.read_text(encoding="utf-8")).get("model_fingerprint")
        if exported is None or not same_state(exported, model.fingerprint()):
            raise ValueError(
                f"{folder / 'onnx'} was exported from other weights: remove it, or run `rice export {folder} "
                f"{folder / 'onnx'}` again."
            )
    elif wanted:
        from transformers import AutoProcessor

        from .export.onnx_export import export

        export(model.float().eval(), AutoProcessor.from_pretrained(folder), folder / "onnx")


def check_loading(folder: Path):
    """
    Loads a folder once, as whoever downloads it will.

    Returns:
        The model.

    Raises:
        ValueError: it is no RICE model, lacks weights, has no processor, or was saved by a newer version.
    """
    from transformers import AutoProcessor

    from modeling_rice import RiceConfig, RiceModel
    from processing_rice import RiceProcessor

    from .checkpoint import check_settings
    from .repository import hub_errors

    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type != RiceConfig.model_type:
        raise ValueError(f"{folder} holds a {model_type} model: this command publishes RICE models.")
    with hub_errors(str(folder)):
        check_settings(folder, RiceConfig)
        # Reported below, in the place of an error that refers to a table on the screen.
        model, loading = RiceModel.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
        unfit = sorted({str(key) for name in ("missing_keys", "mismatched_keys") for key in loading[name]})
        if unfit:
            raise ValueError(f"{folder} lacks {len(unfit)} weights of its model, such as {unfit[0]}: save it again.")
        try:
            processor = AutoProcessor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder} has no processor that can be loaded ({reason}): save it there.") from error
        if not isinstance(processor, RiceProcessor):
            raise ValueError(f"{folder} has a {type(processor).__name__} in the place of its RICE processor: save it.")
    return model

"""Publish a run on the Hub: model, processor, their Python files, results and model card, in one commit.

Nothing else of the folder is uploaded: no optimiser states, pickles, logs or local paths. A new repository is private
unless --public is given; an existing one keeps its visibility. To continue an interrupted upload, run the same command
again. RUN_DIR is the output folder of train_rice.py, or a folder that contains it as `model`.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run_dir", type=Path, help="folder of a trained model")
    add("repo_id", help="repository on the Hub, such as someone/rice-mugs")
    add("--public", action="store_true", help="make a new repository public")
    add("--revision", help="branch to write to, created if it does not exist; default: main")
    add("--results", type=Path, help="results.json of eval_rice.py; default: the one in RUN_DIR or RUN_DIR/eval")
    add("--without_results", action="store_true", help="publish a model without results; its card says so")
    add("--license", help="licence of the model, such as apache-2.0; needed if that of the training data is unknown")
    add("--without_picture", action="store_true", help="do not publish matches.png, which shows test clips")
    add("--dataset_id", help="id of the data set on the Hub, for the card's metadata")
    add("--onnx", action="store_true", help="add the ONNX files of `rice export`; export first if there are none")
    add("--message", default="Publish RICE", help="commit message (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """
    Raises:
        FileNotFoundError: if checkpoint, results or repository are missing.
        ValueError: for a damaged checkpoint or one that is no RICE model, for results of other weights, and for an
            access token in a file.
        PermissionError, ConnectionError: for errors of the Hub, see `hub_rice.repository.hub_errors`.
    """
    folder = find_model(options.run_dir)
    results = picture = None
    if not options.without_results:
        from .results import read_results

        file = options.results or find_results(options.run_dir, folder)
        results = read_results(file)
        check_results(results, folder)
        picture = None if options.without_picture else file.parent / "matches.png"
    from huggingface_hub import HfApi

    from .loading import load_model
    from .repository import hub_errors, publication, upload

    # Loaded once, as a user will load it.
    add_onnx(*load_model(folder, "cpu"), folder, wanted=options.onnx)
    about = {"license": options.license, "dataset_id": options.dataset_id, "picture": picture}
    files = publication(folder, options.repo_id, results, **about)
    size = sum(len(item) if isinstance(item, bytes) else item.stat().st_size for item in files.values())
    print(f"Publishing {len(files)} files ({size / 1e6:.1f} MB) of {folder} ...")
    commit = upload(
        files, options.repo_id, private=not options.public, revision=options.revision, message=options.message
    )
    with hub_errors(options.repo_id):
        is_private = HfApi().model_info(options.repo_id).private
    print(f"Published {commit.commit_url} ({'private' if is_private else 'public'})")
    if options.public and is_private:
        print(f"{options.repo_id} already existed and stays private; its settings on the Hub can change that.")


def find_model(run_dir: Path) -> Path:
    """The checkpoint folder of a run: the run's folder itself, or its `model`."""
    from .checkpoint import check_checkpoint

    if not run_dir.exists():
        raise FileNotFoundError(f"there is no folder {run_dir}: name one that train_rice.py wrote.")
    folder = run_dir if (run_dir / "config.json").is_file() or not (run_dir / "model").is_dir() else run_dir / "model"
    check_checkpoint(folder)
    return folder


def find_results(run_dir: Path, folder: Path) -> Path:
    """The results.json of a run, in the run's folder, the model's folder, or the `eval` folder of either."""
    places = [place / "results.json" for place in (folder, folder / "eval", run_dir, run_dir / "eval")]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{run_dir} has no results.json: make it with `python eval_rice.py --model {folder} --dataset NAME "
            f"--output_dir {folder / 'eval'}`, or pass --without_results."
        )
    return found


def check_results(results: Mapping, folder: Path) -> None:
    """Raises `ValueError` if the results were measured with other weights than those of the folder."""
    from .checkpoint import weights_fingerprint

    measured = results.get("model_sha256")
    if measured is not None and measured != weights_fingerprint(folder):
        raise ValueError(
            f"the results belong to other weights than those in {folder}: run eval_rice.py again with this checkpoint."
        )


def add_onnx(model, processor, folder: Path, wanted: bool) -> None:
    """
    Exports a model to the folder's `onnx`, if that is wanted and not done yet.

    Raises:
        ValueError: if existing files were exported from other weights, or the export fails.
    """
    from modeling_rice.fingerprint_rice import same_state

    description = folder / "onnx" / "onnx.json"
    if description.is_file():
        from data_rice.parsing import read_json_object

        exported = read_json_object(description).get("model_fingerprint")
        if exported is None or not same_state(exported, model.fingerprint()):
            raise ValueError(
                f"{folder / 'onnx'} was exported from other weights: remove it, or run `rice export {folder} "
                f"{folder / 'onnx'}` again."
            )
    elif wanted:
        from .export.onnx_export import export

        export(model.float(), processor, folder / "onnx")

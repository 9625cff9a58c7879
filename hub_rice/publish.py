"""Publish a run on the Hub: model, processor, their Python files, results and model card, in one commit.

Nothing else of the folder leaves the machine: no optimiser states, pickles, logs or local paths. A new repository is
private unless --public is given; one that exists keeps its visibility. An interrupted upload goes on where it stopped
when the same command runs again. RUN_DIR is the folder of train_rice.py, or one that holds it as `model`.
"""

import argparse
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
    add(
        "--license", help="licence of the model, such as apache-2.0; needed where that of the training data is unknown"
    )
    add("--without_picture", action="store_true", help="leave matches.png, clips and what was found for them, at home")
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

    # Once as whoever downloads it will.
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


def add_onnx(model, processor, folder: Path, wanted: bool) -> None:
    """
    Exports a model to the folder's `onnx`, if that is wanted and has not been done.

    Raises:
        ValueError: files that are there were exported from other weights, or cannot be made.
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

"""Which files of a run are published, their upload to the Hub, and errors of the Hub in one sentence."""

import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from textwrap import shorten

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.dynamic_module_utils import get_relative_import_files

from data_rice.parsing import read_json_object

from .checkpoint import check_checkpoint, saved_by_newer, weight_files
from .model_card import breakdown_page, model_card
from .privacy import paths_in
from .results import portable_results
from .training_record import license_of

# An allow list: a run's folder also holds optimiser states, pickles and logs, which are not published.
PUBLISHED = (
    "config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "*processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "*_rice.py",
    "modules.json",
    "*sentence_*transformers.json",
    "sentence_bert_config.json",
    "onnx/*.onnx",
    "onnx/*.onnx.data",
    "onnx/*.json",
    "model.sha256",
    "README.md",
    "results.json",
    "breakdown.md",
    "matches.png",
)
"""Patterns of the files that are published, relative to the run's folder."""

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
# Files that the caller of `published_files` provides.
_MADE = ("README.md", "results.json", "breakdown.md", "matches.png")
_TEXT_SUFFIXES = (".json", ".py", ".md")


def published_files(folder: str | os.PathLike) -> dict[str, Path | bytes]:
    """
    The files of a checkpoint folder that may be published, by their path in the repository.

    Settings are returned as bytes, with local folders removed. Of the weight files only those that the model is loaded
    from are included. Card, results and picture are left to the caller, who knows the name of the repository.

    Raises:
        FileNotFoundError, ValueError: if the checkpoint is incomplete, or lacks Python files needed to load it.
    """
    folder = Path(folder)
    check_checkpoint(folder)
    _check_code(folder)
    files: dict[str, Path | bytes] = {}
    weights = {file.name for file in weight_files(folder)}
    stale = {file.name for file in folder.glob("model*.safetensors")} - weights
    stale |= {"model.safetensors.index.json"} if "model.safetensors" in weights else set()
    for path in sorted([*folder.glob("*"), *folder.glob("onnx/*")]):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in _MADE and is_published(name) and name not in stale:
            # A vocabulary holds no settings, but its entries may look like paths.
            files[name] = _without_folders(path) if name.endswith("config.json") else path
    return files


def publication(
    folder: str | os.PathLike,
    repo_id: str,
    results: Mapping | None = None,
    *,
    license: str | None = None,
    dataset_id: str | None = None,
    picture: str | os.PathLike | None = None,
) -> dict[str, Path | bytes]:
    """
    All files that are published of a checkpoint folder: its own files, the model card, the results without local
    paths, their breakdown, and a picture of matches.

    Args:
        folder: A complete checkpoint with its processor.
        repo_id: `owner/name`, used in the card's examples.
        results: Results of `eval_rice.py`, if any.
        license: Licence identifier of the Hub; optional if the licence of the training data is known.
        dataset_id: Id of the data set on the Hub, for the card.
        picture: The matches.png of the same evaluation.

    Raises:
        FileNotFoundError, ValueError: as `published_files` and `model_card`; without a licence.
    """
    files = published_files(folder)
    if license is None and license_of(folder) is None:
        raise ValueError(
            f"the licence of the training data of {folder} is not known: give the model's licence with --license, "
            f"such as cc-by-4.0 (in training with --hub_license)."
        )
    if results is not None:
        results = portable_results(results, repo_id)
        files["results.json"] = (json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
        if page := breakdown_page(results):
            files["breakdown.md"] = page.encode()
        if picture is not None and os.path.isfile(picture):
            files["matches.png"] = Path(picture)
    card = model_card(
        results,
        model_id=repo_id,
        run_dir=folder,
        dataset_id=dataset_id,
        license=license,
        picture="matches.png" in files,
    )
    files["README.md"] = (card.rstrip() + "\n").encode()
    return files


def is_published(path: str) -> bool:
    """Whether publishing writes this path of a repository."""
    return any(fnmatch(path, pattern) and path.count("/") == pattern.count("/") for pattern in PUBLISHED)


def _check_code(folder: Path) -> None:
    if not (folder / "processor_config.json").is_file():
        raise FileNotFoundError(f"{folder} has no processor_config.json: save its processor there.")
    modules, missing = set(), []
    for name in ("config.json", "processor_config.json"):
        auto_map = read_json_object(folder / name).get("auto_map")
        if not isinstance(auto_map, dict) or not all(isinstance(value, str) for value in auto_map.values()):
            auto_map = None
        missing += [] if auto_map else [f"auto_map in {name}"]
        modules |= {reference.partition(".")[0] for reference in (auto_map or {}).values()}
    for module in sorted(modules):
        file = folder / f"{module}.py"
        try:
            missing += [Path(path).name for path in get_relative_import_files(file) if not Path(path).is_file()]
        except FileNotFoundError as error:
            missing.append(Path(error.filename or file).name)
    if missing:
        raise ValueError(
            f"{folder} lacks {missing[0]}, which is needed to load it: load it after `import modeling_rice, "
            f"processing_rice` and save model and processor again."
        )


def _without_folders(path: Path) -> bytes:
    """Content of a JSON file in which local folders are replaced by empty strings."""
    text = path.read_text(encoding="utf-8")
    content = read_json_object(path)
    found = paths_in(content)

    def blank(value):
        if isinstance(value, dict):
            return {key: blank(item) for key, item in value.items()}
        if isinstance(value, list):
            return [blank(item) for item in value]
        return "" if isinstance(value, str) and value in found else value

    return (json.dumps(blank(content), indent=2, ensure_ascii=False) + "\n" if found else text).encode()


def upload(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Publish RICE",
    background: bool = False,
) -> CommitInfo | Future:
    """
    Uploads files to a model repository in one commit, and creates the repository if it does not exist. After an
    interruption, files that were already sent are not sent again. Files of an earlier publication that are not in
    `files` are removed.

    Args:
        files: Path in the repository -> file or content.
        repo_id: `owner/name`.
        private: Whether a new repository is private; an existing one keeps its visibility.
        revision: Branch, created if it does not exist; `main` by default.
        token: Access token; by default that of `hf auth login` or `HF_TOKEN`.
        message: Commit message.
        background: Return a `Future` of the commit immediately; files may be moved or removed meanwhile.

    Raises:
        ValueError: if a file holds an access token, or `repo_id` is not a valid name.
        PermissionError, FileNotFoundError, ConnectionError: for errors of the Hub, as `hub_errors`.
    """
    _check_secrets(files, token)
    with hub_errors(repo_id):
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision)
        if background:
            # An open file can still be read after its checkpoint was deleted by rotation.
            files = {path: item if isinstance(item, bytes) else open(item, "rb") for path, item in files.items()}
        operations = [CommitOperationAdd(path, item) for path, item in files.items()]
        operations += [CommitOperationDelete(path) for path in there if is_published(path) and path not in files]
        options = {"repo_id": repo_id, "operations": operations, "commit_message": message, "revision": revision}
        if not background:
            return api.create_commit(**options)
        future = api.create_commit(**options, run_as_future=True)
        future.add_done_callback(lambda _: [file.close() for file in files.values() if isinstance(file, io.IOBase)])
        return future


def _check_secrets(files: Mapping[str, Path | bytes], token: str | None) -> None:
    own = {secret for secret in (token, get_token()) if secret}
    for path, item in files.items():
        if not path.endswith(_TEXT_SUFFIXES):
            continue
        text = (item if isinstance(item, bytes) else item.read_bytes()).decode("utf-8", errors="replace")
        if _TOKEN.search(text) or any(secret in text for secret in own):
            raise ValueError(f"{path} holds an access token: remove it (and revoke it if others may have seen it).")


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """
    Turns errors of the Hub into one sentence that says what to do. Other errors pass through, except for those of a
    checkpoint of a newer version, which get such a sentence too.

    Args:
        name: Repository id or folder that is read or written.

    Raises:
        PermissionError: for a missing or refused token, or one without the needed permission.
        FileNotFoundError: if there is no such repository or revision.
        ConnectionError: if the Hub cannot be reached or reports an error.
        ValueError: for an invalid name, or a checkpoint of a newer version.
    """
    try:
        yield
    except Exception as error:
        explained = explain(error, name)
        if explained is None:
            raise
        raise explained from error


def explain(error: BaseException, name: str) -> OSError | ValueError | None:
    """The error that `hub_errors` raises instead of another one; `None` if it has nothing to add."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)

    def first(*kinds: type) -> BaseException | None:
        return next((item for item in chain if isinstance(item, kinds)), None)

    answer = first(HfHubHTTPError)
    status = getattr(getattr(answer, "response", None), "status_code", None)
    if first(LocalTokenNotFoundError) or (
        status == 401 and get_token() is None and not first(RepositoryNotFoundError)
    ):
        return PermissionError("there is no access token: log in with `hf auth login`, or set HF_TOKEN.")
    if first(GatedRepoError):
        return PermissionError(f"{name} is gated: ask for access on its page, then log in with `hf auth login`.")
    if first(RevisionNotFoundError):
        return FileNotFoundError(f"{name} has no such revision on the Hub: check its branches.")
    if first(RepositoryNotFoundError):
        return FileNotFoundError(
            f"there is no {name} on the Hub that you can access: check the name, or log in with `hf auth login` if it "
            f"is private."
        )
    if first(HFValidationError):
        return ValueError(f"{name!r} is not a valid name of a repository: give one of the form owner/name.")
    if status == 401:
        return PermissionError(f"the Hub refuses the access token (401) for {name}: log in again by `hf auth login`.")
    if status == 403:
        return PermissionError(
            f"the access token has no permission for this on {name} (403): use one with write permission."
        )
    if status is not None and status >= 500:
        return ConnectionError(f"the Hub has an internal error ({status}) for {name}: try again later.")
    unreachable = (first(HTTPError) and answer is None) or first(LocalEntryNotFoundError, ConnectionError)
    if first(OfflineModeIsEnabled) or (unreachable and HF_HUB_OFFLINE):
        return ConnectionError(f"{name} needs the Hub, but HF_HUB_OFFLINE is set: unset it, or name a local folder.")
    if unreachable:
        return ConnectionError(
            f"the Hub cannot be reached for {name}: check the network and try again, or name a local folder."
        )
    if status is not None and not first(EntryNotFoundError):
        reason = shorten(str(answer), 120)
        return ConnectionError(f"the Hub refused the request for {name} ({status}): try again ({reason})")
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        return ValueError(
            f"{name} needs its own Python code, which is not run: name a model that transformers or this project "
            f"has, or add --trust_remote_code if the command has it."
        )
    if isinstance(error, (OSError, ValueError, KeyError)) and (version := saved_by_newer(name)):
        reason = shorten(str(error), 120)
        return ValueError(
            f"{name} was saved by a newer transformers ({version}) and cannot be loaded: pip install --upgrade "
            f"transformers ({reason})"
        )
    return None

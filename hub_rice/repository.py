"""What of a run belongs on the Hub, how it gets there, and what to do when it does not."""

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

# An allow list: a run's folder also holds optimiser states, pickles and logs, which stay where they are.
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
# What the caller of `published_files` makes or chooses.
_MADE = ("README.md", "results.json", "breakdown.md", "matches.png")
_TEXT_SUFFIXES = (".json", ".py", ".md")


def published_files(folder: str | os.PathLike) -> dict[str, Path | bytes]:
    """
    The files of a checkpoint folder that may be published, by their path in the repository.

    Settings come as bytes, with local folders taken out of them. Of the weights those are taken that the model is
    loaded from. Card, results and picture are left to the caller, who knows the repository's name.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is not whole, or lacks the Python files that it is loaded with.
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
            # A vocabulary holds no settings, but may hold whatever looks like a path.
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
    All that is published of a checkpoint folder: its files, the model card, the results without local paths, their
    breakdown, and a picture of what was found.

    Args:
        folder: A whole checkpoint with its processor.
        repo_id: `owner/name`, which the card's examples load.
        results: What `eval_rice.py` measured, if anything.
        license: As the Hub writes it; may be left out where the training data's licence is known.
        dataset_id: The data set's id on the Hub, for the card.
        picture: The matches.png of the same evaluation.

    Raises:
        FileNotFoundError, ValueError: as `published_files` and `model_card`, or no licence.
    """
    files = published_files(folder)
    if license is None and license_of(folder) is None:
        raise ValueError(
            f"the licence of what {folder} was trained on is not known: name the model's own by --license, such as "
            f"cc-by-4.0 (in training by --hub_license)."
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
    """Whether a path in a repository is one that publishing writes."""
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
            f"{folder} lacks {missing[0]}, without which nobody can load it: load it after `import modeling_rice, "
            f"processing_rice` and save model and processor again."
        )


def _without_folders(path: Path) -> bytes:
    """A JSON file's content, the local folders that its parts were once loaded from blanked out."""
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
    Writes files into a model repository in one commit, which is created where it is missing. What an interrupted
    upload has sent already is not sent again. Files of an earlier publication that are not among these are removed.

    Args:
        files: Path in the repository -> file or content.
        repo_id: `owner/name`.
        private: Whether a new repository is private; one that exists stays as it is.
        revision: Branch, created where it is missing; `main` by default.
        token: Access token; by default that of `hf auth login` or `HF_TOKEN`.
        message: Of the commit.
        background: Return a `Future` of the commit at once; files may be moved or removed meanwhile.

    Raises:
        ValueError: a file holds an access token, or `repo_id` is not a possible name.
        PermissionError, FileNotFoundError, ConnectionError: what `hub_errors` makes of the Hub's answer.
    """
    _check_secrets(files, token)
    with hub_errors(repo_id):
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision)
        if background:
            # An open file can still be read when its checkpoint has been rotated away.
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
            raise ValueError(f"{path} holds an access token: remove it (and revoke it where others may have seen it).")


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """
    Turns what goes wrong with the Hub into one sentence that says what to do. Other errors pass through, except that
    a checkpoint of a newer version is told as such.

    Args:
        name: Repository id or folder that is read or written.

    Raises:
        PermissionError: no token, a refused one, or one without the right that is needed.
        FileNotFoundError: no such repository or revision.
        ConnectionError: the Hub cannot be reached or is out of order.
        ValueError: not a possible name, or a checkpoint of a newer version.
    """
    try:
        yield
    except Exception as error:
        explained = explain(error, name)
        if explained is None:
            raise
        raise explained from error


def explain(error: BaseException, name: str) -> OSError | ValueError | None:
    """The error that `hub_errors` raises in the place of another one, or `None` where it has nothing to add."""
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
            f"there is no {name} on the Hub that you may see: check the name, or log in with `hf auth login` if it is "
            f"private."
        )
    if first(HFValidationError):
        return ValueError(f"{name!r} is no possible name of a repository: it must be like owner/name.")
    if status == 401:
        return PermissionError(f"the Hub refuses the access token (401) for {name}: log in again by `hf auth login`.")
    if status == 403:
        return PermissionError(
            f"the access token may not do this with {name} (403): use one with the right to write to it."
        )
    if status is not None and status >= 500:
        return ConnectionError(f"the Hub is out of order ({status}) for {name}: try again later.")
    unreachable = (first(HTTPError) and answer is None) or first(LocalEntryNotFoundError, ConnectionError)
    if first(OfflineModeIsEnabled) or (unreachable and HF_HUB_OFFLINE):
        return ConnectionError(f"{name} needs the Hub, but HF_HUB_OFFLINE is set: unset it, or name a local folder.")
    if unreachable:
        return ConnectionError(
            f"the Hub cannot be reached for {name}: check the network and try again, or name a local folder."
        )
    if status is not None and not first(EntryNotFoundError):
        reason = shorten(str(answer), 120)
        return ConnectionError(f"the Hub did not do what was asked for {name} ({status}): try again ({reason})")
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        return ValueError(
            f"{name} needs Python code of its own, which is not run: name a model that transformers or this project "
            f"knows, or, where the command takes it, add --trust_remote_code."
        )
    if isinstance(error, (OSError, ValueError, KeyError)) and (version := saved_by_newer(name)):
        reason = shorten(str(error), 120)
        return ValueError(
            f"{name} was saved by a newer transformers ({version}) and cannot be loaded: pip install --upgrade "
            f"transformers ({reason})"
        )
    return None

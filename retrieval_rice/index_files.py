"""An index on disk: shards named after their content, and a manifest that is replaced as the last step.

A file that the manifest names is never written again, so a full disk or a kill at any moment leaves the index that was
there, whole, and a change writes the shards that changed and no others.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from modeling_rice.fingerprint_rice import same_state

from .index_store import RECORD, Shard

try:
    import fcntl
except ImportError:
    fcntl = None

MANIFEST = "index.json"
FORMAT, VERSION = "rice-gallery-index", 1
_LOCK = ".lock"
_OWN_FILES = ("features-*.safetensors", "images-*.parquet", "approximate-*.faiss", ".writing-*")


def features_path(folder: Path, key: str) -> Path:
    return folder / f"features-{key}.safetensors"


def records_path(folder: Path, key: str) -> Path:
    return folder / f"images-{key}.parquet"


@contextmanager
def write_lock(folder: Path, shared: bool = False) -> Iterator[None]:
    """
    Keeps other writers out; released by the system when the process dies.

    Args:
        folder: Of the index; created when it is missing.
        shared: Let others in that are `shared` too, as the processes that build one index together.

    Raises:
        BlockingIOError: another process is writing.
        OSError: the system has no such locks (Windows).
    """
    if fcntl is None:
        raise OSError(
            f"the index {folder} cannot be written: other writers are kept out by file locks (fcntl), which this "
            f"system does not have; write it on Linux or macOS, and copy it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "a") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"another process is writing to the index {folder}; wait for its end, or name another folder."
            ) from None
        yield


@contextmanager
def _explaining(folder: Path) -> Iterator[None]:
    """A failure to write as one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"the index {folder} could not be written ({reason}); what was there before is unchanged, so make room or "
            f"choose another folder, and run the same again."
        ) from error


def _replace(temporary: Path, path: Path) -> None:
    """Gives a finished file its name once its bytes are on the disk."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    if (path.parent / _LOCK).is_file():
        # safetensors writes for its owner only; the lock has the mode that the user's files have.
        os.chmod(temporary, (path.parent / _LOCK).stat().st_mode & 0o777)
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and nothing otherwise."""
    temporary = path.with_name(f".writing-{os.getpid()}-{path.name}")
    with _explaining(path.parent):
        try:
            yield temporary
            _replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def content_key(shard: Shard) -> str:
    """Name of a shard by what is in it."""
    digest = hashlib.blake2b(digest_size=12)
    table = shard.records.combine_chunks()
    digest.update(json.dumps([table.to_pylist(), shard.skipped], sort_keys=True).encode())
    if shard.features is not None:
        digest.update(f"{shard.features!r} {shard.features.model_fingerprint}".encode())
        for name in shard.features.fields:
            tensor = getattr(shard.features, name)
            if tensor is not None:
                digest.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def keys_digest(keys: Iterable[str]) -> str:
    """One name for a list of shards."""
    return hashlib.blake2b(" ".join(keys).encode(), digest_size=12).hexdigest()


def write_shard(folder: Path, shard: Shard) -> list[Path]:
    """Writes a shard under its key, unless it is there; the records last, whose presence says that it is whole.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    if shard.key is None:
        shard.key = content_key(shard)
    new = []
    images, features = records_path(folder, shard.key), features_path(folder, shard.key)
    if images.is_file() and (len(shard) == 0 or features.is_file()):
        return new
    try:
        if len(shard):
            with written(features) as temporary:
                shard.features.save(temporary)
            new.append(features)
        table = shard.records.replace_schema_metadata({"skipped": json.dumps(shard.skipped)})
        with written(images) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        new.append(images)
    except OSError:
        for path in new:
            path.unlink(missing_ok=True)
        raise
    return new


def read_shard(folder: Path, key: str, features_class: type) -> Shard:
    """
    A shard whose encodings stay in the file until they are used.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged.
    """
    path = records_path(folder, key)
    if not path.is_file():
        raise FileNotFoundError(f"the index {folder} lacks {path.name}; build it again.")
    try:
        table = pq.read_table(path)
        skipped = json.loads((table.schema.metadata or {}).get(b"skipped", b"[]"))
        table = table.replace_schema_metadata(None).cast(RECORD)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}); build the index again.") from error
    features = features_class.load(features_path(folder, key)) if table.num_rows else None
    if features is not None and len(features) != table.num_rows:
        raise ValueError(f"{path} and its encodings have {table.num_rows} and {len(features)} rows; build it again.")
    return Shard(table, features, skipped, key)


def has_shard(folder: Path, key: str) -> bool:
    """Whether a whole shard of this name is there."""
    return records_path(folder, key).is_file()


def read_manifest(folder: Path) -> tuple[dict, str]:
    """
    The manifest, and a digest of it that tells whether it was changed.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: the manifest is damaged, of another kind, or of a newer version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"there is no index in {folder}; build one with `rice index SHOP_DIR`.")
    data = path.read_bytes()
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); build the index again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is not the manifest of an index; name the folder that `rice index` wrote.")
    if manifest.get("version", 0) > VERSION:
        raise ValueError(f"the index {folder} was saved by a newer version of this project; install that version.")
    return manifest, hashlib.sha256(data).hexdigest()


def manifest_digest(folder: Path) -> str | None:
    """Digest of the manifest as it lies there now, `None` where there is none."""
    path = folder / MANIFEST
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def write_manifest(folder: Path, manifest: dict) -> str:
    """Makes a new state of the index the one that is read, then deletes the files that no longer belong to it."""
    manifest = {"format": FORMAT, "version": VERSION, **manifest}
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    with written(folder / MANIFEST) as temporary:
        temporary.write_text(text, encoding="utf-8")
    keys = [shard["key"] for shard in manifest["shards"]]
    current = {path(folder, key) for key in keys for path in (features_path, records_path)}
    if manifest.get("approximate"):
        current.add(folder / manifest["approximate"]["file"])
    for pattern in _OWN_FILES:
        for path in folder.glob(pattern):
            if path not in current:
                path.unlink(missing_ok=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_fingerprint(stored: str | None, model: Any, name: str, model_name: str | None = None) -> None:
    """Raises `ValueError` when encodings are known to be another model's."""
    own = model.fingerprint()
    if not same_state(stored, own):
        origin = f" ({model_name})" if model_name else ""
        raise ValueError(
            f"the index {name} was encoded by another model{origin}, fingerprint {stored} and not {own}; open it with "
            f"that model, or build it again with this one."
        )

"""Download of the pictures in LPR4M's url lists with img2dataset.

LPR4M's authors mail the lists after the agreement is signed. They are text files with one url per line. img2dataset
writes shards of pictures and records which are complete, so the same command resumes an interrupted one.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import folders, parsing
from ..files import write_atomically
from .index import list_stats

VENV = ".venv-img2dataset"
# Not .json: img2dataset treats every .json file in its output folder as part of a shard.
_SETTINGS = "fetch.settings"


def find_url_lists(data_dir: str, url_lists: Sequence[str] = ()) -> list[str]:
    """Return the named url lists, or those in ``DATA_DIR/urls`` and ``DATA_DIR/*_url_*.txt``.

    Raises:
        FileNotFoundError: no list is found, or a named one does not exist.
        ValueError: two lists have the same name, or the first line of a list is not a url.
    """
    if not url_lists:
        root = Path(data_dir)
        found = [*root.glob("urls/*.txt"), *root.glob("*_url_*.txt")]
        url_lists = sorted(str(path) for path in found if not folders.is_system_entry(path.name))
        if not url_lists:
            raise FileNotFoundError(
                f"{root / 'urls'} holds no url list; put there the lists that LPR4M's authors send after the "
                "agreement (such as training_frame_url_*.txt), or name them with --url_lists."
            )
    names: dict[str, str] = {}
    for path in url_lists:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"The url list {path} does not exist; check the path.")
        if names.setdefault(Path(path).stem, path) != path:
            raise ValueError(f"{path} and {names[Path(path).stem]} have the same name; rename one of them.")
        _, first = next(parsing.read_lines(path), (0, ""))
        if not first.strip().lower().startswith(("http://", "https://")):
            raise ValueError(f"{path}, line 1: expected a url; name text files with one url per line.")
    return list(url_lists)


def find_img2dataset(executable: str | None = None, install: bool = False) -> str:
    """Return the img2dataset program: the named one, that of this environment, or that of ``.venv-img2dataset``.

    It runs as a separate program, because its pinned versions conflict with those of this project.

    Args:
        executable: path of the program.
        install: create ``.venv-img2dataset`` if no program is found.

    Raises:
        FileNotFoundError: no program is found; the message says how to get it.
    """
    own = os.path.join(VENV, "bin", "img2dataset")
    if executable is not None:
        found = shutil.which(executable)
        if found is None:
            raise FileNotFoundError(f"--img2dataset {executable} is not a program; check the path.")
        return found
    for candidate in (os.path.join(os.path.dirname(sys.executable), "img2dataset"), "img2dataset", own):
        if shutil.which(candidate):
            return shutil.which(candidate)
    commands = [[sys.executable, "-m", "venv", VENV], [f"{VENV}/bin/pip", "install", "img2dataset"]]
    if not install:
        lines = " && ".join(shlex.join(command) for command in commands)
        raise FileNotFoundError(
            f"img2dataset is not installed; repeat with --install_img2dataset, which runs: {lines}, or name one with "
            "--img2dataset."
        )
    for command in commands:
        print("+", shlex.join(command), flush=True)
        status = subprocess.run(command).returncode
        if status:
            raise ChildProcessError(f"{shlex.join(command)} ended with status {status}; see its messages above.")
    return own


def fetch_command(
    program: str,
    url_list: str,
    output_dir: str,
    *,
    output_format: str = "webdataset",
    short_side: int = 256,
    shard_size: int = 10000,
    processes: int = 4,
    threads: int = 64,
    timeout: int = 10,
    retries: int = 2,
) -> list[str]:
    """Return the command that fetches one list. Pictures keep their aspect ratio, so that boxes stay valid."""
    resize = ["--resize_mode=no"]
    if short_side:
        resize = ["--resize_mode=keep_ratio", f"--image_size={short_side}", "--resize_only_if_bigger=True"]
    return [
        program,
        f"--url_list={url_list}",
        f"--output_folder={output_dir}",
        "--input_format=txt",
        f"--output_format={output_format}",
        *resize,
        f"--number_sample_per_shard={shard_size}",
        f"--processes_count={processes}",
        f"--thread_count={threads}",
        f"--timeout={timeout}",
        f"--retries={retries}",
        "--incremental_mode=incremental",
        "--enable_wandb=False",
    ]


def fetch(
    data_dir: str,
    url_lists: Sequence[str] = (),
    *,
    img2dataset: str | None = None,
    install_img2dataset: bool = False,
    dry_run: bool = False,
    **options,
) -> dict[str, dict[str, int]]:
    """Fetch every list into ``DATA_DIR/img2dataset/<name of the list>``.

    Args:
        data_dir: the data folder.
        url_lists: the lists; see `find_url_lists`.
        img2dataset, install_img2dataset: see `find_img2dataset`.
        dry_run: print the commands only.
        options: see `fetch_command`.

    Returns:
        Per list ``{"count", "successes", "failed"}``, from img2dataset's statistics; {} in a dry run.

    Raises:
        FileNotFoundError, ValueError: as the functions above; ValueError also if the folder was begun with another
            list or shard size, because shards are identified by their numbers.
        ChildProcessError: img2dataset failed.
    """
    lists = find_url_lists(data_dir, url_lists)
    program = find_img2dataset(img2dataset, install_img2dataset)
    # Otherwise img2dataset's image library checks the network for a newer version at every start.
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    results: dict[str, dict[str, int]] = {}
    for url_list in lists:
        output_dir = os.path.join(data_dir, "img2dataset", Path(url_list).stem)
        command = fetch_command(program, url_list, output_dir, **options)
        print("+", shlex.join(command), flush=True)
        if dry_run:
            continue
        _claim(output_dir, url_list, options)
        status = subprocess.run(command, env=environment).returncode
        if status:
            raise ChildProcessError(f"img2dataset ended with status {status} on {url_list}; see its messages above.")
        results[url_list] = read_stats(output_dir)
    return results


def _claim(output_dir: str, url_list: str, options: dict) -> None:
    """Refuse to resume with other shard settings: finished shards are known by their numbers only."""
    digest = parsing.file_sha256(url_list)
    wanted = {"sha256": digest, **{name: options.get(name) for name in ("output_format", "short_side", "shard_size")}}
    path = os.path.join(output_dir, _SETTINGS)
    if os.path.isfile(path):
        begun = parsing.read_json_object(path)
        different = [name for name in wanted if begun.get(name) != wanted[name]]
        if different:
            changed = "another list" if "sha256" in different else f"another {' and '.join(different)}"
            raise ValueError(f"{output_dir} was begun with {changed}; use the same settings, or move the folder away.")
        return
    os.makedirs(output_dir, exist_ok=True)
    write_atomically(path, json.dumps({"url_list": os.path.basename(url_list), **wanted}))


def read_stats(output_dir: str) -> dict[str, int]:
    """Add up the ``*_stats.json`` of img2dataset.

    Raises:
        ValueError: one of them is damaged; the message names it.
    """
    total = {"count": 0, "successes": 0, "failed": 0}
    for path in list_stats(output_dir):
        stats = parsing.read_json_object(path)
        count, successes = stats.get("count"), stats.get("successes")
        if type(count) is not int or type(successes) is not int or not 0 <= successes <= count:
            raise ValueError(f"{path}: count and successes are missing; delete the file and fetch the shard again.")
        total["count"] += count
        total["successes"] += successes
        total["failed"] += count - successes
    return total

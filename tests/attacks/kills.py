"""Child processes that are killed or run out of disk while they report their progress."""

import hashlib
import runpy

from tests.retrieval_rice.index.test_attacks import CONTEXT

CONTEXT.set_forkserver_preload(
    ["retrieval_rice.index", "lance_namespace", "pandas", "train_rice", "rice_cli", "retrieval_rice.service.app"]
)


def start(file, function, *arguments):
    """A function of a test file in a child process, and the end of a pipe into which it tells how far it is."""
    here, there = CONTEXT.Pipe(duplex=False)
    call = {"call": (function.__name__, there, *arguments)}
    child = CONTEXT.Process(target=runpy.run_path, args=(file, call, "child"))
    child.start()
    there.close()
    return child, here


def contents(folder) -> dict[str, str]:
    """Hashes of all files by their paths in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

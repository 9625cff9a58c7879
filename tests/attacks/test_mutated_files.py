"""Damaged files of every kind: one sentence or the content of the file, no traceback, no silent error."""

import logging
import shutil
from pathlib import Path

import pytest

from tests.attacks.kills import start
from tests.attacks.mutations import Outcome, attack
from tests.attacks.readers import READERS

# Of the many, so many are tried each time.
_SHARE = 0.04
_DOORS = [pytest.param(door, _SHARE, id=door) for door in READERS]
_DOORS += [pytest.param(door, 1.0, id=f"{door}, many", marks=pytest.mark.slow) for door in READERS]


# A library may take the whole process down over a damaged file, so that such a door is tried in children.
_IN_CHILDREN = {"index files": 25}


def attack_and_tell(pipe, door, folder, checkpoint, number, seed):
    folder.mkdir()
    pipe.send(attack(READERS[door][0](folder, checkpoint), number, seed=seed))


def attack_in_children(door: str, folder: Path, checkpoint: Path, number: int) -> tuple[Outcome, int]:
    """The sum over children, and how many of these ended by a crash; their files are not counted."""
    total, crashes, size = Outcome(), 0, _IN_CHILDREN[door]
    for seed in range(0, number, size):
        child, pipe = start(__file__, attack_and_tell, door, folder / str(seed), checkpoint, size, seed)
        try:
            outcome = pipe.recv()
        except EOFError:
            crashes += 1
            continue
        finally:
            child.join()
            shutil.rmtree(folder / str(seed))
        for name, value in vars(outcome).items():
            setattr(total, name, getattr(total, name) + value)
    return total, crashes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("door", "share"), _DOORS)
def test_damaged_files_are_refused_or_read(door, share, tiny_checkpoint, tmp_path, count, caplog):
    caplog.set_level(logging.CRITICAL)
    make, number = READERS[door]
    wanted, crashes = round(share * number), 0
    if door in _IN_CHILDREN:
        outcome, crashes = attack_in_children(door, tmp_path, tiny_checkpoint, wanted)
    else:
        outcome = attack(make(tmp_path, tiny_checkpoint), wanted, seed=number)
    count("files tried", door, outcome.tried)
    count("files refused", door, outcome.refused)
    count("tracebacks", door, len(outcome.tracebacks))
    count("silent errors", door, len(outcome.silent))
    count("sentences that name nothing", door, len(outcome.sentences))
    count("crashes of a library", door, crashes)
    assert not outcome.faults(), outcome.faults()
    assert outcome.refused > outcome.tried / 20


def test_the_slow_run_tries_ten_thousand_files():
    assert sum(number for _, number in READERS.values()) >= 10_000


if __name__ == "child":
    name, pipe, *arguments = globals()["call"]
    globals()[name](pipe, *arguments)

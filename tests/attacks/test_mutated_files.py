"""Damaged files at every door: a sentence or what the file says, no traceback, nothing silently wrong."""

import logging

import pytest

from tests.attacks.mutations import attack
from tests.attacks.readers import READERS

# Of the many, so many are tried each time.
_SHARE = 0.04
_DOORS = [pytest.param(door, _SHARE, id=door) for door in READERS]
_DOORS += [pytest.param(door, 1.0, id=f"{door}, many", marks=pytest.mark.slow) for door in READERS]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("door", "share"), _DOORS)
def test_damaged_files_are_refused_or_read_as_they_are(door, share, tiny_checkpoint, tmp_path, count, caplog):
    caplog.set_level(logging.CRITICAL)
    make, number = READERS[door]
    outcome = attack(make(tmp_path, tiny_checkpoint), round(share * number), seed=number)
    count("files tried", door, outcome.tried)
    count("files refused", door, outcome.refused)
    count("tracebacks", door, len(outcome.tracebacks))
    count("silent errors", door, len(outcome.silent))
    count("sentences that name nothing", door, len(outcome.sentences))
    assert not outcome.faults(), outcome.faults()
    assert outcome.refused > outcome.tried / 20


def test_the_slow_run_tries_ten_thousand_files():
    assert sum(number for _, number in READERS.values()) >= 10_000

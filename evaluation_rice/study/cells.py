"""One run of a study, an arm with a seed: its commands, its record on disk, and whether that is of these settings."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_rice.files import write_atomically

from .definition import Study, to_arguments

_REMEDY = "or choose another --output_dir"


@dataclass(frozen=True)
class Cell:
    """
    A run of a study.

    Attributes:
        study: what it is part of.
        output_dir: folder of the study.
        name: its arm, or "start" for what every arm of a seed goes on from.
        seed: its seed.
    """

    study: Study
    output_dir: Path
    name: str
    seed: int

    @property
    def folder(self) -> Path:
        """Where its logs, model and results are."""
        return self.output_dir / self.name / f"seed{self.seed}"

    @property
    def commands(self) -> list[list[str]]:
        """Training, evaluation or both; the interpreter, which is this one, is left out."""
        study = self.study
        train = ["train_rice.py", study.recipe, "--output_dir", str(self.folder / "model"), "--seed", str(self.seed)]
        if self.name == "start":
            return [[*train, *to_arguments(study.train, study.start)]]
        arm = study.arms[self.name]
        model = replace(self, name=arm.model_of or self.name).folder / "model"
        evaluate = ["eval_rice.py", "--model", str(model), "--output_dir", str(self.folder / "eval"), "--baselines"]
        evaluate += to_arguments(study.eval, arm.eval)
        if arm.model_of:
            return [evaluate]
        start = replace(self, name="start").folder / "model"
        shared = {"model_name_or_path": str(start)} if study.start else {}
        return [[*train, *to_arguments(shared, study.train, arm.train)], evaluate]

    @property
    def before(self) -> list["Cell"]:
        """What it goes on from, the nearest first: the arm whose model it evaluates, the shared start."""
        if self.name == "start":
            return []
        names = [self.study.arms[self.name].model_of, "start" if self.study.start else None]
        return [replace(self, name=name) for name in names if name]

    @property
    def settings(self) -> dict[str, Any]:
        """What its result depends on: its commands, and those of what it goes on from."""
        return {"commands": self.commands, "before": [cell.commands for cell in self.before]}

    def write(self, seconds: float | None) -> None:
        """Records that it was begun, or with `seconds` that it is finished."""
        write_atomically(self.folder / "cell.json", json.dumps({**self.settings, "seconds": seconds}, indent=2) + "\n")

    def record(self) -> dict[str, Any] | None:
        """
        The cell.json of a cell that was begun; `before` is missing in those of former versions.

        Raises:
            ValueError: it is damaged.
        """
        path = self.folder / "cell.json"
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            whole = isinstance(record["commands"], list) and isinstance(record["seconds"], int | float | None)
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise ValueError(f"{path} is damaged: remove it, and the cell is run again.")
        return record

    def state(self) -> tuple[str | None, float | None]:
        """
        Why its folder must not pass for one of this study, naming the folder with other settings; and how long it
        took, `None` when it is not finished or must not pass.

        Raises:
            ValueError: its record, or that of what it goes on from, is damaged.
        """
        begun = [(cell, record) for cell in (self, *self.before) if (record := cell.record()) is not None]
        problem = self._problem(begun)
        own = begun[0][1] if begun and begun[0][0] is self else None
        return problem, None if problem or own is None else own["seconds"]

    def _problem(self, begun: list[tuple["Cell", dict[str, Any]]]) -> str | None:
        start = "" if begun and begun[0][0] is self else "not run: "
        for cell, record in begun:
            if record["commands"] == cell.commands:
                continue
            if cell is self or start:
                return f"{start}{cell.folder} is of other settings: remove it {_REMEDY}"
            return f"{self.folder} goes on from {cell.folder}, which is of other settings: remove both {_REMEDY}"
        for cell, record in begun:
            before = cell.settings["before"]
            if record.get("before", before) != before:
                parents = " or ".join(parent.name for parent in cell.before)
                return f"{start}{cell.folder} went on from {parents} of other settings: remove it {_REMEDY}"
        return None


def cells_of(study: Study, output_dir: str | Path) -> dict[tuple[str, int], Cell]:
    """`(arm, seed)` -> cell, of the starts and then of all arms in the order of the file."""
    seeds = {"start": study.seeds} if study.start else {}
    seeds |= {name: arm.seeds for name, arm in study.arms.items()}
    return {(name, seed): Cell(study, Path(output_dir), name, seed) for name in seeds for seed in seeds[name]}

"""A cell of a study, one arm with one seed: its commands, its record on disk, and a check of its settings."""

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
    One run of a study.

    Attributes:
        study: the study.
        output_dir: folder of the study.
        name: name of the arm, or "start" for the shared start of a seed.
        seed: the seed.
    """

    study: Study
    output_dir: Path
    name: str
    seed: int

    @property
    def folder(self) -> Path:
        """Folder of its logs, model and results."""
        return self.output_dir / self.name / f"seed{self.seed}"

    @property
    def commands(self) -> list[list[str]]:
        """The commands for training, evaluation or both, without the Python interpreter."""
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
        """The cells it depends on, the nearest first: the arm whose model it evaluates, the shared start."""
        if self.name == "start":
            return []
        names = [self.study.arms[self.name].model_of, "start" if self.study.start else None]
        return [replace(self, name=name) for name in names if name]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of its result: its commands, and those of the cells it depends on."""
        return {"commands": self.commands, "before": [cell.commands for cell in self.before]}

    def write(self, seconds: float | None) -> None:
        """Records that the cell has started or, with `seconds`, that it is finished."""
        write_atomically(self.folder / "cell.json", json.dumps({**self.settings, "seconds": seconds}, indent=2) + "\n")

    def record(self) -> dict[str, Any] | None:
        """
        The cell.json of a started cell; files of earlier versions lack `before`.

        Raises:
            ValueError: the file is damaged.
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
        The reason why its folder does not belong to this study, naming the folder with other settings, or `None`; and
        its duration, `None` if it is unfinished or does not belong.

        Raises:
            ValueError: its record, or that of a cell it depends on, is damaged.
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
                return f"{start}{cell.folder} has other settings: remove it {_REMEDY}"
            return f"{self.folder} depends on {cell.folder}, which has other settings: remove both {_REMEDY}"
        for cell, record in begun:
            before = cell.settings["before"]
            if record.get("before", before) != before:
                parents = " or ".join(parent.name for parent in cell.before)
                return f"{start}{cell.folder} used {parents} with other settings: remove it {_REMEDY}"
        return None


def cells_of(study: Study, output_dir: str | Path) -> dict[tuple[str, int], Cell]:
    """`(arm, seed)` -> cell: first the shared starts, then all arms in the order of the file."""
    seeds = {"start": study.seeds} if study.start else {}
    seeds |= {name: arm.seeds for name, arm in study.arms.items()}
    return {(name, seed): Cell(study, Path(output_dir), name, seed) for name in seeds for seed in seeds[name]}

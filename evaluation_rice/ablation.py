"""Trains and evaluates the arms of a study over several seeds, and compares them on the same queries.

    python -m evaluation_rice.ablation configs/ablation_mini.yaml --output_dir runs/ablation

Every arm of a seed goes on from one shared checkpoint. Cells run in the order of the file, the decisive ones first.
What is finished is kept, so the same command again goes on, and cells that did not fit into the time are printed as
not run. `ablation.json`, `ablation.md` and `ablation.png` are written into the output folder.
"""

import argparse
import concurrent.futures
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm.auto import tqdm

from .breakdown import can_draw
from .paired import draw_intervals, mean_interval, paired_difference, verdict
from .report import percent, write_atomically

KINDS = ("embedding", "matching", "fused")
_KEYS = {"recipe", "render", "seeds", "max_minutes", "start", "train", "eval", "arms", "comparisons"}
_ARM_KEYS = {"train", "eval", "model_of", "note"}


@dataclass(frozen=True)
class Arm:
    """One row of the study: what it changes in training and evaluation, or the arm whose model it evaluates anew."""

    name: str
    train: dict[str, Any] = field(default_factory=dict)
    eval: dict[str, Any] = field(default_factory=dict)
    model_of: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """`left` against `right`, each an arm and a kind of score."""

    left: tuple[str, str]
    right: tuple[str, str]


@dataclass(frozen=True)
class Study:
    """A study file. `start`, `train` and `eval` are arguments of train_rice.py and eval_rice.py."""

    recipe: str
    seeds: list[int]
    max_minutes: float
    start: dict[str, Any]
    train: dict[str, Any]
    eval: dict[str, Any]
    arms: dict[str, Arm]
    comparisons: list[Comparison]
    render: dict[str, dict[str, Any]]


def read_study(path: str | Path) -> Study:
    """
    Reads a study: `recipe`, `seeds`, `max_minutes`, `start`, `train`, `eval`, `arms`, `comparisons`, and `render`, the
    mini LPR4M folders to render first with their arguments. Values are handed on as they are written.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: for broken YAML, an unknown key or a name that no arm has; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no study {path}")
    try:
        # All scalars as text: `no`, `1e-3` and `007` reach the command line as they were written.
        content = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"the study {path} is not valid YAML: {' '.join(str(error).split())}") from error
    _check_keys(content, _KEYS, f"the study {path}")
    for key in ("recipe", "arms"):
        if not content.get(key):
            raise ValueError(f"the study {path} lacks {key!r}")
    arms = {}
    for name, arm in content["arms"].items():
        arm = arm or {}
        _check_keys(arm, _ARM_KEYS, f"arm {name!r} of {path}")
        model_of = arm.get("model_of")
        if model_of is not None and (arm.get("train") or model_of not in arms or arms[model_of].model_of):
            raise ValueError(f"arm {name!r} of {path}: model_of must name an earlier arm that trains, without train")
        arms[name] = Arm(name, arm.get("train") or {}, arm.get("eval") or {}, model_of, arm.get("note", ""))
    try:
        seeds = [int(seed) for seed in content.get("seeds", ["0", "1", "2"])]
        max_minutes = float(content.get("max_minutes", "75"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the study {path}: seeds are whole numbers, max_minutes is a number ({error})") from None
    return Study(
        recipe=content["recipe"],
        seeds=seeds,
        max_minutes=max_minutes,
        start=content.get("start") or {},
        train=content.get("train") or {},
        eval=content.get("eval") or {},
        arms=arms,
        comparisons=[_comparison(entry, arms, path) for entry in content.get("comparisons") or []],
        render=content.get("render") or {},
    )


def _check_keys(content: Any, known: set[str], where: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a mapping with some of {', '.join(sorted(known))}")
    unknown = sorted(set(content) - known)
    if unknown:
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; it may have {', '.join(sorted(known))}")


def _comparison(entry: Any, arms: Mapping[str, Arm], path: Path) -> Comparison:
    if not isinstance(entry, list) or len(entry) != 2:
        raise ValueError(f"the study {path}: a comparison is [ARM/SCORE, ARM/SCORE], not {entry!r}")
    sides = []
    for side in entry:
        name, _, kind = str(side).partition("/")
        if name not in arms or kind not in KINDS:
            raise ValueError(f"the study {path}: {side!r} is no ARM/SCORE; SCORE is one of {', '.join(KINDS)}")
        sides.append((name, kind))
    return Comparison(*sides)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names: `{"model": {"use_decoder": "true"}}` -> `{"model.use_decoder": "true"}`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def to_arguments(*settings: Mapping[str, Any]) -> list[str]:
    """Command-line arguments of settings, where later ones override earlier ones name by name."""
    merged: dict[str, Any] = {}
    for part in settings:
        merged |= flatten(part)
    return [
        text
        for name, value in merged.items()
        for text in [f"--{name}", *(value if isinstance(value, list) else [value])]
    ]


def cell_commands(study: Study, output_dir: str | Path, name: str, seed: int) -> list[list[str]]:
    """The commands of one cell, training, evaluation or both; the interpreter, which is this one, is left out."""
    output_dir = Path(output_dir)
    folder = output_dir / name / f"seed{seed}"
    train = ["train_rice.py", study.recipe, "--output_dir", str(folder / "model"), "--seed", str(seed)]
    if name == "start":
        return [[*train, *to_arguments(study.train, study.start)]]
    arm = study.arms[name]
    model = output_dir / (arm.model_of or name) / f"seed{seed}" / "model"
    evaluate = ["eval_rice.py", "--model", str(model), "--output_dir", str(folder / "eval"), "--baselines"]
    evaluate += to_arguments(study.eval, arm.eval)
    if arm.model_of:
        return [evaluate]
    shared = {"model_name_or_path": str(output_dir / "start" / f"seed{seed}" / "model")} if study.start else {}
    return [[*train, *to_arguments(shared, study.train, arm.train)], evaluate]


def _seconds(study: Study, output_dir: str | Path, name: str, seed: int) -> float | None:
    """How long a finished cell took; `None` when it is not finished or was run with other settings."""
    record = Path(output_dir) / name / f"seed{seed}" / "cell.json"
    if not record.is_file():
        return None
    former = json.loads(record.read_text(encoding="utf-8"))
    return former["seconds"] if former["commands"] == cell_commands(study, output_dir, name, seed) else None


class Runner:
    """Runs the cells of a study, `jobs` at a time, each with its share of the cores.

    Args:
        study: what to run.
        output_dir: where each cell has a folder `ARM/seedN` with its logs, model and results.
        jobs: cells run at once.
        max_minutes: no cell is started that would, by the longest so far, end later than this.
    """

    def __init__(self, study: Study, output_dir: str | Path, jobs: int = 1, max_minutes: float | None = None):
        self.study = study
        self.output_dir = Path(output_dir)
        self.jobs = jobs
        self.deadline = time.monotonic() + 60 * (study.max_minutes if max_minutes is None else max_minutes)
        self.longest = 0.0
        self.problems: dict[tuple[str, int], str] = {}

    def run(self, arms: list[str] | None = None) -> None:
        """Runs the named arms, by default all, for all seeds; a cell that fails is reported and the others go on."""
        chosen = [arm for arm in self.study.arms.values() if not arms or arm.name in arms]
        wanted = {arm.model_of for arm in chosen if arm.model_of} | {arm.name for arm in chosen}
        for folder, settings in self.study.render.items():
            command = [sys.executable, "-m", "data_rice.mini_lpr4m", "--output_dir", folder, *to_arguments(settings)]
            self._call(command, self.output_dir / "render.log")
        names = ["start"] if self.study.start else []
        names += [name for name in self.study.arms if name in wanted]
        cells = [(name, seed) for name in names for seed in self.study.seeds]
        running: dict[tuple[str, int], concurrent.futures.Future] = {}
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            for name, seed in cells:
                running[name, seed] = pool.submit(self._run_cell, name, seed, running.get((self._before(name), seed)))
            for cell in tqdm(cells, desc="cells", unit="cell"):
                running[cell].result()

    def _before(self, name: str) -> str:
        """What a cell goes on from. It is handed out earlier than the cell, which may therefore wait for it."""
        return "" if name == "start" else self.study.arms[name].model_of or "start"

    def _run_cell(self, name: str, seed: int, before: concurrent.futures.Future | None) -> None:
        folder = self.output_dir / name / f"seed{seed}"
        commands = cell_commands(self.study, self.output_dir, name, seed)
        record = folder / "cell.json"
        if record.is_file():
            former = json.loads(record.read_text(encoding="utf-8"))
            if former["commands"] != commands:
                self.problems[name, seed] = f"{folder} is of other settings: remove it or choose another --output_dir"
                return
            if former["seconds"] is not None:
                self.longest = max(self.longest, former["seconds"])
                return
        if before is not None:
            before.result()
            if _seconds(self.study, self.output_dir, self._before(name), seed) is None:
                self.problems[name, seed] = f"not run: {self._before(name)} of seed {seed} is missing"
                return
        if time.monotonic() + self.longest > self.deadline:
            self.problems[name, seed] = "not run: no time left"
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps({"commands": commands, "seconds": None}, indent=2) + "\n")
        started = time.monotonic()
        try:
            for command in commands:
                self._call(command, folder / f"{'eval' if 'eval_rice.py' in command else 'train'}.log")
        except RuntimeError as error:
            self.problems[name, seed] = f"failed: {error}"
            return
        seconds = time.monotonic() - started
        self.longest = max(self.longest, seconds)
        write_atomically(record, json.dumps({"commands": commands, "seconds": seconds}, indent=2) + "\n")

    def _call(self, command: list[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
        command = command if command[0] == sys.executable else [sys.executable, *command]
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(command)}\n")
            file.flush()
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
        if status:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
            raise RuntimeError(f"status {status}, see {log}: {last}")


def read_hits(output_dir: str | Path, study: Study) -> dict[tuple[str, str], dict[int, np.ndarray]]:
    """Hits at 1 of every finished cell: `(arm, kind of score) -> seed -> (num_queries,)`, queries sorted by id."""
    hits: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for name in study.arms:
        for seed in study.seeds:
            if _seconds(study, output_dir, name, seed) is None:
                continue
            ranks = Path(output_dir) / name / f"seed{seed}" / "eval" / "query_ranks.jsonl"
            lines = ranks.read_text(encoding="utf-8").splitlines()
            rows = sorted((json.loads(line) for line in lines), key=lambda row: row["query_id"])
            for kind in KINDS:
                if rows and kind in rows[0]:
                    hits.setdefault((name, kind), {})[seed] = np.array([float(row[kind] == 1) for row in rows])
    return hits


def summarise(study: Study, output_dir: str | Path, problems: Mapping[tuple[str, int], str]) -> dict:
    """The figures of all finished cells and comparisons, and the cells that have none with the reason."""
    hits = read_hits(output_dir, study)
    rows = {}
    for (name, kind), seeds in hits.items():
        mean, interval = mean_interval(seeds)
        by_seed = {str(seed): float(values.mean()) for seed, values in seeds.items()}
        rows.setdefault(name, {})[kind] = {"R@1": mean, "R@1_ci95": interval, "by_seed": by_seed}
    compared = []
    for comparison in study.comparisons:
        entry = {"left": "/".join(comparison.left), "right": "/".join(comparison.right)}
        left, right = hits.get(comparison.left, {}), hits.get(comparison.right, {})
        if set(left) & set(right):
            entry |= paired_difference(left, right)
            entry["verdict"] = verdict(entry)
        compared.append(entry)
    missing = [
        {"arm": name, "seed": seed, "reason": problems.get((name, seed), "not run")}
        for name in study.arms
        for seed in study.seeds
        if seed not in hits.get((name, "embedding"), {})
    ]
    names = [*(["start"] if study.start else []), *study.arms]
    cells = {f"{name}/seed{seed}": _seconds(study, output_dir, name, seed) for name in names for seed in study.seeds}
    seconds = {cell: value for cell, value in cells.items() if value is not None}
    return {"arms": rows, "comparisons": compared, "not_run": missing, "seconds": seconds}


def to_markdown(study: Study, summary: Mapping) -> str:
    """Both tables and the list of cells that were not run, in Markdown; recall in percent, differences in points."""
    lines = ["| arm | " + " | ".join(f"{kind} R@1 (95 %)" for kind in KINDS) + " | by seed | what it changes |"]
    lines.append("|---|" + "---:|" * len(KINDS) + "---|---|")
    for name, arm in study.arms.items():
        figures = summary["arms"].get(name, {})
        cells = []
        for kind in KINDS:
            if kind not in figures:
                cells.append("" if figures else "not run")
                continue
            low, high = figures[kind]["R@1_ci95"]
            cells.append(f"{percent(figures[kind]['R@1'])} ({percent(low)} to {percent(high)})")
        best = next((figures[kind]["by_seed"] for kind in reversed(KINDS) if kind in figures), {})
        changes = " ".join(to_arguments(arm.train) + to_arguments(arm.eval))
        if arm.model_of:
            changes = f"model of {arm.model_of}; {changes}"
        lines.append(
            f"| {name} | {' | '.join(cells)} | {', '.join(percent(value) for value in best.values())} | "
            f"{arm.note or changes or '(none)'} |"
        )
    if summary["comparisons"]:
        lines += ["", "| comparison | difference in points | 95 % interval | by seed | queries x seeds | result |"]
        lines.append("|---|---:|---:|---|---:|---|")
    for entry in summary["comparisons"]:
        title = f"{entry['left']} against {entry['right']}"
        if "difference" not in entry:
            lines.append(f"| {title} | not run | | | | |")
            continue
        low, high = entry["ci95"]
        by_seed = ", ".join(f"{100 * value:+.1f}" for value in entry["by_seed"])
        lines.append(
            f"| {title} | {100 * entry['difference']:+.1f} | {100 * low:+.1f} to {100 * high:+.1f} | {by_seed} | "
            f"{entry['num_queries']} | {entry['verdict']} |"
        )
    if summary["not_run"]:
        lines += ["", "Cells without a result:", ""]
        lines += [f"- {cell['arm']}, seed {cell['seed']}: {cell['reason']}" for cell in summary["not_run"]]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation_rice.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("study", help="YAML file, such as configs/ablation_mini.yaml")
    parser.add_argument("--output_dir", help="folder of the study; default runs/NAME-OF-THE-FILE")
    parser.add_argument("--max_minutes", type=float, help="instead of the file's own limit; 0 only prints the tables")
    parser.add_argument("--jobs", type=int, default=1, help="cells run at once, each with its share of the cores")
    parser.add_argument("--arms", nargs="+", help="run only these arms")
    options = parser.parse_args(arguments)
    try:
        study = read_study(options.study)
        unknown = sorted(set(options.arms or []) - set(study.arms))
        if unknown:
            raise ValueError(f"--arms: {options.study} has no arm {unknown[0]!r}, but {', '.join(study.arms)}")
        if options.jobs < 1:
            raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
        for script in ("train_rice.py", "eval_rice.py"):
            if not Path(script).is_file():
                raise FileNotFoundError(f"there is no {script} here: run this in the project's folder")
        output = Path(options.output_dir or Path("runs") / Path(options.study).stem)
        runner = Runner(study, output, options.jobs, options.max_minutes)
        runner.run(options.arms)
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    summary = summarise(study, output, runner.problems)
    output.mkdir(parents=True, exist_ok=True)
    text = to_markdown(study, summary)
    write_atomically(output / "ablation.json", json.dumps(summary, indent=2) + "\n")
    write_atomically(output / "ablation.md", text)
    rows = [
        (name, kind, figures[kind]["R@1"], figures[kind]["R@1_ci95"])
        for name, figures in summary["arms"].items()
        for kind in figures
    ]
    if rows and can_draw():
        draw_intervals(output / "ablation.png", rows, "R@1 in percent, 95 % interval over queries")
    print(text)
    plot = "ablation.png" if can_draw() else "but no ablation.png, which needs matplotlib"
    print(f"written to {output}: ablation.json, ablation.md, {plot}")
    if any(not problem.startswith("not run") for problem in runner.problems.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()

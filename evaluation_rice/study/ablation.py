"""Trains and evaluates the arms of a study over several seeds, and compares them on the same queries.

    python -m evaluation_rice.study.ablation configs/ablation_mini.yaml --output_dir runs/ablation

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from hub_rice.files import write_atomically
from hub_rice.tables import percent
from modeling_rice.scoring_rice import KINDS

from ..breakdown import can_draw
from ..paired import draw_intervals, hits_of, mean_interval, paired_difference, read_ranks, verdict
from .definition import Comparison, Study, read_minutes, read_study, to_arguments

_REMEDY = "or choose another --output_dir"


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


def _before(study: Study, name: str) -> list[str]:
    """What a cell goes on from, the nearest first: the arm whose model it evaluates, the shared start."""
    if name == "start":
        return []
    model_of = study.arms[name].model_of
    return [*([model_of] if model_of else []), *(["start"] if study.start else [])]


def _settings_of(study: Study, output_dir: str | Path, name: str, seed: int) -> dict[str, Any]:
    """What a cell's result depends on: its commands, and those of what it goes on from."""
    before = [cell_commands(study, output_dir, part, seed) for part in _before(study, name)]
    return {"commands": cell_commands(study, output_dir, name, seed), "before": before}


def _record(output_dir: str | Path, name: str, seed: int) -> dict[str, Any] | None:
    """The cell.json of a cell that was begun; `before` is missing in those of former versions."""
    path = Path(output_dir) / name / f"seed{seed}" / "cell.json"
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


def _changed(study: Study, output_dir: str | Path, name: str, seed: int) -> str | None:
    """Why the folder of a cell must not pass for one of this study, naming the folder with other settings."""
    lineage = [name, *_before(study, name)]
    records = {part: _record(output_dir, part, seed) for part in lineage}
    settings = {part: _settings_of(study, output_dir, part, seed) for part in lineage}
    folders = {part: Path(output_dir) / part / f"seed{seed}" for part in lineage}
    begun = [part for part in lineage if records[part] is not None]
    start = "" if name in begun else "not run: "
    for part in begun:
        if records[part]["commands"] == settings[part]["commands"]:
            continue
        if part == name or start:
            return f"{start}{folders[part]} is of other settings: remove it {_REMEDY}"
        return f"{folders[name]} goes on from {folders[part]}, which is of other settings: remove both {_REMEDY}"
    for part in begun:
        if records[part].get("before", settings[part]["before"]) != settings[part]["before"]:
            parents = " or ".join(_before(study, part))
            return f"{start}{folders[part]} went on from {parents} of other settings: remove it {_REMEDY}"
    return None


def _seconds(study: Study, output_dir: str | Path, name: str, seed: int) -> float | None:
    """How long a finished cell took; `None` when it is not finished, or it or what it goes on from has changed."""
    record = _record(output_dir, name, seed)
    return None if record is None or _changed(study, output_dir, name, seed) else record["seconds"]


class Runner:
    """Runs the cells of a study, `jobs` at a time, each with its share of the cores.

    Args:
        study: what to run.
        output_dir: where each cell has a folder `ARM/seedN` with its logs, model and results.
        jobs: cells run at once.
        max_minutes: no cell is started that would, by the longest so far, end later than this; with 0 nothing is
            rendered either.
    """

    def __init__(self, study: Study, output_dir: str | Path, jobs: int = 1, max_minutes: float | None = None):
        self.study = study
        self.output_dir = Path(output_dir)
        self.jobs = jobs
        self.minutes = study.max_minutes if max_minutes is None else max_minutes
        self.deadline = time.monotonic() + 60 * self.minutes
        self.longest = 0.0
        self.problems: dict[tuple[str, int], str] = {}

    def run(self, arms: list[str] | None = None) -> None:
        """
        Runs the named arms, by default all, for all seeds; a cell that fails is reported and the others go on.

        Raises:
            ValueError: a cell.json is damaged; nothing was started.
            RuntimeError: a data set cannot be rendered.
        """
        chosen = [arm for arm in self.study.arms.values() if not arms or arm.name in arms]
        wanted = {arm.model_of for arm in chosen if arm.model_of} | {arm.name for arm in chosen}
        names = ["start"] if self.study.start else []
        names += [name for name in self.study.arms if name in wanted]
        cells = [(name, seed) for name in names for seed in self.study.seeds]
        # A damaged record is told before hours of work, and not when their tables are made.
        for name in ("start", *self.study.arms):
            for seed in self.study.seeds:
                _record(self.output_dir, name, seed)
        for folder, settings in self.study.render.items() if self.minutes > 0 else ():
            command = [sys.executable, "-m", "data_rice.mini_lpr4m", "--output_dir", folder, *to_arguments(settings)]
            self._call(command, self.output_dir / "render.log")
        running: dict[tuple[str, int], concurrent.futures.Future] = {}
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            for name, seed in cells:
                # It is handed out earlier than the cell, which may therefore wait for it.
                before = next(iter(_before(self.study, name)), None)
                running[name, seed] = pool.submit(self._run_cell, name, seed, before, running.get((before, seed)))
            for cell in tqdm(cells, desc="cells", unit="cell"):
                running[cell].result()

    def _run_cell(self, name: str, seed: int, before: str | None, awaited: concurrent.futures.Future | None) -> None:
        folder = self.output_dir / name / f"seed{seed}"
        settings = _settings_of(self.study, self.output_dir, name, seed)
        changed = _changed(self.study, self.output_dir, name, seed)
        if changed:
            self.problems[name, seed] = changed
            return
        finished = _seconds(self.study, self.output_dir, name, seed)
        if finished is not None:
            self.longest = max(self.longest, finished)
            return
        if awaited is not None:
            awaited.result()
            if _seconds(self.study, self.output_dir, before, seed) is None:
                self.problems[name, seed] = f"not run: {before} of seed {seed} is missing"
                return
        if time.monotonic() + self.longest > self.deadline:
            self.problems[name, seed] = "not run: no time left"
            return
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / "cell.json"
        write_atomically(record, json.dumps({**settings, "seconds": None}, indent=2) + "\n")
        started = time.monotonic()
        try:
            for command in settings["commands"]:
                self._call(command, folder / f"{'eval' if 'eval_rice.py' in command else 'train'}.log")
        except RuntimeError as error:
            self.problems[name, seed] = f"failed: {error}"
            return
        seconds = time.monotonic() - started
        self.longest = max(self.longest, seconds)
        write_atomically(record, json.dumps({**settings, "seconds": seconds}, indent=2) + "\n")

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


@dataclass(frozen=True)
class Answers:
    """
    What a finished cell answered.

    Attributes:
        query_ids: queries in order.
        task: `task_sha256` of its results.json, `None` where there is none.
        hits: kind of score -> hits at 1, `(num_queries,)`.
    """

    query_ids: list[str]
    task: str | None
    hits: dict[str, np.ndarray]

    def unlike(self, other: "Answers") -> str:
        """In what the questions differ, so that the hits must not be paired; empty where they are the same."""
        if self.query_ids != other.query_ids:
            return "different clips"
        return "different galleries" if None not in (self.task, other.task) and self.task != other.task else ""


def read_answers(folder: str | Path) -> Answers:
    """
    The query_ranks.jsonl of an evaluation, and of its results.json who searches what.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged; the message names it.
    """
    ranks, path = read_ranks(folder), Path(folder) / "results.json"
    hits = {kind: hits_of(ranks, kind) for kind in KINDS}
    hits = {kind: values for kind, values in hits.items() if values is not None}
    if "embedding" not in hits:
        raise ValueError(
            f"{Path(folder) / 'query_ranks.jsonl'} lacks the embedding of a clip: run eval_rice.py again."
        )
    try:
        task = json.loads(path.read_text(encoding="utf-8"))["protocol"].get("task_sha256") if path.is_file() else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no whole results file ({error}): run eval_rice.py again.") from error
    return Answers(list(ranks), task, hits)


def read_cells(study: Study, output_dir: str | Path) -> tuple[dict[str, dict[int, Answers]], dict]:
    """Arm -> seed -> answers of every finished cell, and `(arm, seed)` -> why there are none, of the unreadable."""
    answers: dict[str, dict[int, Answers]] = {}
    problems: dict[tuple[str, int], str] = {}
    for name in study.arms:
        for seed in study.seeds:
            if _seconds(study, output_dir, name, seed) is None:
                continue
            folder = Path(output_dir) / name / f"seed{seed}" / "eval"
            try:
                found = read_answers(folder)
            except (ValueError, OSError) as error:
                problems[name, seed] = str(error)
                continue
            first = next(iter(answers.get(name, {}).items()), (seed, found))
            unlike = found.unlike(first[1])
            if unlike:
                problems[name, seed] = (
                    f"{folder} has {unlike} than seed {first[0]}: run eval_rice.py again on the same."
                )
            else:
                answers.setdefault(name, {})[seed] = found
    return answers, problems


def _compare(comparison: Comparison, answers: Mapping[str, Mapping[int, Answers]]) -> dict[str, Any]:
    entry: dict[str, Any] = {"left": "/".join(comparison.left), "right": "/".join(comparison.right)}
    left, right = (
        {seed: found for seed, found in answers.get(name, {}).items() if kind in found.hits}
        for name, kind in (comparison.left, comparison.right)
    )
    seeds = [seed for seed in left if seed in right]
    if not seeds:
        return entry
    unlike = next(filter(None, (left[seed].unlike(right[seed]) for seed in seeds)), "")
    if unlike:
        return entry | {"refused": unlike}
    sides = zip((left, right), (comparison.left[1], comparison.right[1]), strict=True)
    entry |= paired_difference(*({seed: side[seed].hits[kind] for seed in seeds} for side, kind in sides))
    return entry | {"verdict": verdict(entry)}


def summarise(study: Study, output_dir: str | Path, problems: Mapping[tuple[str, int], str]) -> dict:
    """
    The figures of all finished cells and comparisons, and the cells that have none with the reason.

    Args:
        study, output_dir: see `Runner`.
        problems: reasons known from running, by arm and seed.

    Raises:
        ValueError: a cell.json is damaged.
    """
    answers, unreadable = read_cells(study, output_dir)
    rows: dict[str, dict] = {}
    for name, seeds in answers.items():
        for kind in KINDS:
            hits = {seed: found.hits[kind] for seed, found in seeds.items() if kind in found.hits}
            if hits:
                mean, interval = mean_interval(hits)
                by_seed = {str(seed): float(values.mean()) for seed, values in hits.items()}
                rows.setdefault(name, {})[kind] = {"R@1": mean, "R@1_ci95": interval, "by_seed": by_seed}
    names = [*(["start"] if study.start else []), *study.arms]
    cells = {(name, seed): _seconds(study, output_dir, name, seed) for name in names for seed in study.seeds}
    reasons = {**problems, **unreadable}
    missing = [
        {
            "arm": cell[0],
            "seed": cell[1],
            "reason": reasons.get(cell) or _changed(study, output_dir, *cell) or "not run",
        }
        for cell, seconds in cells.items()
        if seconds is None or cell in unreadable
    ]
    return {
        "arms": rows,
        "comparisons": [_compare(comparison, answers) for comparison in study.comparisons],
        "not_run": missing,
        "seconds": {f"{name}/seed{seed}": value for (name, seed), value in cells.items() if value is not None},
    }


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
            lines.append(f"| {title} | {entry.get('refused', 'not run')} | | | | |")
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
    parser = argparse.ArgumentParser(
        prog="python -m evaluation_rice.study.ablation", description=__doc__.splitlines()[0]
    )
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
        if options.max_minutes is not None:
            read_minutes(options.max_minutes, "--max_minutes")
        output = Path(options.output_dir or Path("runs") / Path(options.study).stem)
        blocked = next((path for path in (output, *output.parents) if path.exists() and not path.is_dir()), None)
        if blocked:
            raise ValueError(f"--output_dir {output}: {blocked} is a file, so choose another folder")
        runner = Runner(study, output, options.jobs, options.max_minutes)
        runner.run(options.arms)
        summary = summarise(study, output, runner.problems)
        text = to_markdown(study, summary)
        files = _write(output, summary, text)
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(text)
    print(f"written to {output}: {files}")
    if any(not cell["reason"].startswith("not run") for cell in summary["not_run"]):
        sys.exit(1)


def _write(output: Path, summary: Mapping, text: str) -> str:
    """Writes the summary as JSON, Markdown and picture; says which files these are."""
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "ablation.json", json.dumps(summary, indent=2) + "\n")
    write_atomically(output / "ablation.md", text)
    rows = [
        (name, kind, figures[kind]["R@1"], figures[kind]["R@1_ci95"])
        for name, figures in summary["arms"].items()
        for kind in figures
    ]
    if not rows:
        return "ablation.json, ablation.md, but no ablation.png, as there is no result yet"
    if not can_draw():
        return "ablation.json, ablation.md, but no ablation.png, which needs matplotlib"
    draw_intervals(output / "ablation.png", rows, "R@1 in percent, 95 % interval over queries")
    return "ablation.json, ablation.md, ablation.png"


if __name__ == "__main__":
    main()

"""Trains and evaluates the arms of a study over several seeds, and compares them on the same queries.

    python -m evaluation_rice.study.ablation configs/ablation_mini.yaml --output_dir runs/ablation

A cell is one arm with one seed. All arms of a seed start from one shared checkpoint. Cells run in the order of the
file, so put the most important ones first. Finished cells are kept, so the same command resumes a study. Cells that
did not fit into the time limit are listed as not run. The command writes `ablation.json`, `ablation.md` and
`ablation.png` to the output folder.
"""

import argparse
import concurrent.futures
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from data_rice.commands import mistakes_end, print_anywhere
from data_rice.files import write_atomically
from hub_rice.results import read_results
from hub_rice.tables import percent
from modeling_rice.scoring_rice import KINDS

from ..breakdown import can_draw
from ..recall import interval_words
from .cells import Cell, cells_of
from .definition import Comparison, Study, read_minutes, read_study, to_arguments
from .paired import draw_intervals, mean_interval, paired_difference, read_ranks, verdict


class Runner:
    """Runs the cells of a study, `jobs` at a time, each with its share of the cores.

    Args:
        study: the study.
        output_dir: folder of the study; each cell has a folder `ARM/seedN` in it, with logs, model and results.
        jobs: number of cells that run at once.
        max_minutes: time limit. A cell does not start if it would end later, judged by the longest cell so far. With
            0, data sets are not rendered either.
    """

    def __init__(self, study: Study, output_dir: str | Path, jobs: int = 1, max_minutes: float | None = None):
        self.study = study
        self.output_dir = Path(output_dir)
        self.cells = cells_of(study, output_dir)
        self.jobs = jobs
        self.minutes = study.max_minutes if max_minutes is None else max_minutes
        self.deadline = time.monotonic() + 60 * self.minutes
        self.longest = 0.0
        self.problems: dict[tuple[str, int], str] = {}

    def run(self, arms: list[str] | None = None) -> None:
        """
        Runs the named arms (by default all) for all their seeds; if a cell fails, it is reported and the others run.

        Raises:
            ValueError: a cell.json is damaged; then nothing is started.
            RuntimeError: a data set cannot be rendered.
        """
        chosen = [arm for arm in self.study.arms.values() if not arms or arm.name in arms]
        wanted = {arm.model_of for arm in chosen if arm.model_of} | {arm.name for arm in chosen}
        wanted.add("start")
        cells = [cell for (name, _), cell in self.cells.items() if name in wanted]
        # Damaged records are found before hours of work, not when the tables are made.
        for cell in self.cells.values():
            cell.record()
        for folder, settings in self.study.render.items() if self.minutes > 0 else ():
            command = [sys.executable, "-m", "data_rice.mini_lpr4m", "--output_dir", folder, *to_arguments(settings)]
            self._call(command, self.output_dir / "render.log")
        running: dict[tuple[str, int], concurrent.futures.Future] = {}
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            for cell in cells:
                # The cell it depends on was submitted earlier, so waiting for it cannot deadlock.
                awaited = running.get((cell.before[0].name, cell.seed)) if cell.before else None
                running[cell.name, cell.seed] = pool.submit(self._run_cell, cell, awaited)
            for future in tqdm(running.values(), desc="cells", unit="cell"):
                future.result()

    def _run_cell(self, cell: Cell, awaited: concurrent.futures.Future | None) -> None:
        key = (cell.name, cell.seed)
        changed, finished = cell.state()
        if changed:
            self.problems[key] = changed
            return
        if finished is not None:
            self.longest = max(self.longest, finished)
            return
        if awaited is not None:
            awaited.result()
            before = cell.before[0]
            if before.state()[1] is None:
                self.problems[key] = f"not run: {before.name} of seed {cell.seed} is missing"
                return
        if time.monotonic() + self.longest > self.deadline:
            self.problems[key] = "not run: no time left"
            return
        cell.folder.mkdir(parents=True, exist_ok=True)
        cell.write(None)
        started = time.monotonic()
        try:
            for command in cell.commands:
                self._call(command, cell.folder / f"{'eval' if 'eval_rice.py' in command else 'train'}.log")
        except RuntimeError as error:
            self.problems[key] = f"failed: {error}"
            return
        seconds = time.monotonic() - started
        self.longest = max(self.longest, seconds)
        cell.write(seconds)

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
    Results of a finished cell per query.

    Attributes:
        query_ids: queries in order.
        shops: per query, its shop; `None` if unknown.
        task: `task_sha256` of its results.json, `None` if missing.
        hits: kind of score -> hits at 1, `(num_queries,)`.
    """

    query_ids: list[str]
    shops: list[str] | None
    task: str | None
    hits: dict[str, np.ndarray]

    def unlike(self, other: "Answers") -> str:
        """The difference between the queries or galleries, which forbids pairing; empty if they are the same."""
        if self.query_ids != other.query_ids:
            return "different clips"
        return "different galleries" if None not in (self.task, other.task) and self.task != other.task else ""


def read_answers(folder: str | Path) -> Answers:
    """
    Reads the query_ranks.jsonl of an evaluation, and the hash of queries and galleries from its results.json.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged; the message names it.
    """
    ranks, path = read_ranks(folder), Path(folder) / "results.json"
    hits = {kind: ranks.hits(kind) for kind in KINDS}
    hits = {kind: values for kind, values in hits.items() if values is not None}
    if "embedding" not in hits:
        raise ValueError(
            f"{Path(folder) / 'query_ranks.jsonl'} lacks the embedding of a clip: run eval_rice.py again."
        )
    task = read_results(path, ["protocol"])["protocol"].get("task_sha256") if path.is_file() else None
    return Answers(ranks.query_ids, ranks.shops, task, hits)


def read_cells(cells: Iterable[Cell]) -> tuple[dict[str, dict[int, Answers]], dict]:
    """Arm -> seed -> answers of the finished cells; and `(arm, seed)` -> reason, for the unreadable cells."""
    answers: dict[str, dict[int, Answers]] = {}
    problems: dict[tuple[str, int], str] = {}
    for cell in cells:
        folder = cell.folder / "eval"
        try:
            found = read_answers(folder)
        except (ValueError, OSError) as error:
            problems[cell.name, cell.seed] = str(error)
            continue
        first = next(iter(answers.get(cell.name, {}).items()), (cell.seed, found))
        unlike = found.unlike(first[1])
        if unlike:
            problems[cell.name, cell.seed] = (
                f"{folder} has {unlike} than seed {first[0]}: run eval_rice.py again on the same."
            )
        else:
            answers.setdefault(cell.name, {})[cell.seed] = found
    return answers, problems


def _shops(*answers: Answers) -> list[str] | None:
    """The shops of the common queries, from the first answers that have them."""
    return next((found.shops for found in answers if found.shops is not None), None)


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
    hits = ({seed: side[seed].hits[kind] for seed in seeds} for side, kind in sides)
    entry |= paired_difference(*hits, _shops(*left.values(), *right.values()))
    return entry | {"verdict": verdict(entry)}


def _figures(seeds: Mapping[int, Answers], kind: str) -> dict[str, Any] | None:
    """R@1 over the seeds that have this kind of score; `None` if there is no such seed."""
    hits = {seed: found.hits[kind] for seed, found in seeds.items() if kind in found.hits}
    if not hits:
        return None
    shops = _shops(*seeds.values())
    mean, interval = mean_interval(hits, shops)
    by_seed = {str(seed): float(values.mean()) for seed, values in hits.items()}
    return {"R@1": mean, "R@1_ci95": interval, "interval": interval_words(shops), "by_seed": by_seed}


def summarise(study: Study, output_dir: str | Path, problems: Mapping[tuple[str, int], str]) -> dict:
    """
    The figures of all finished cells and comparisons, and the cells without a result with the reason.

    Args:
        study, output_dir: see `Runner`.
        problems: reasons from the run, by arm and seed.

    Raises:
        ValueError: a cell.json is damaged.
    """
    cells = cells_of(study, output_dir)
    states = {key: cell.state() for key, cell in cells.items()}
    finished = [key for key, (_, seconds) in states.items() if seconds is not None]
    answers, unreadable = read_cells(cells[key] for key in finished if key[0] != "start")
    rows = {name: {kind: _figures(seeds, kind) for kind in KINDS} for name, seeds in answers.items()}
    reasons = {**problems, **unreadable}
    missing = [
        {"arm": key[0], "seed": key[1], "reason": reasons.get(key) or changed or "not run"}
        for key, (changed, _) in states.items()
        if key not in finished or key in unreadable
    ]
    return {
        "arms": {name: {kind: row for kind, row in row_of.items() if row} for name, row_of in rows.items()},
        "comparisons": [_compare(comparison, answers) for comparison in study.comparisons],
        "not_run": missing,
        "seconds": {f"{name}/seed{seed}": states[name, seed][1] for name, seed in finished},
    }


def to_markdown(study: Study, summary: Mapping) -> str:
    """Both tables and the list of cells without a result, in Markdown; recall in percent, differences in points."""
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
    rules = [figures["interval"] for arm in summary["arms"].values() for figures in arm.values()]
    if rules:
        lines += ["", f"Intervals, 95 %: {'; '.join(dict.fromkeys(rules))}."]
    if summary["not_run"]:
        lines += ["", "Runs without a result:", ""]
        lines += [f"- {cell['arm']}, seed {cell['seed']}: {cell['reason']}" for cell in summary["not_run"]]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    print_anywhere()
    parser = argparse.ArgumentParser(
        prog="python -m evaluation_rice.study.ablation", description=__doc__.splitlines()[0]
    )
    parser.add_argument("study", help="YAML file, such as configs/ablation_mini.yaml")
    parser.add_argument("--output_dir", help="folder of the study; default runs/NAME-OF-THE-FILE")
    parser.add_argument("--max_minutes", type=float, help="replaces the limit of the file; 0 only prints the tables")
    parser.add_argument("--jobs", type=int, default=1, help="number of cells that run at once; they share the cores")
    parser.add_argument("--arms", nargs="+", help="run only these arms")
    options = parser.parse_args(arguments)
    with mistakes_end(parser, (ValueError, OSError, RuntimeError)):
        study = read_study(options.study)
        unknown = sorted(set(options.arms or []) - set(study.arms))
        if unknown:
            raise ValueError(f"--arms: {options.study} has no arm {unknown[0]!r}, but {', '.join(study.arms)}")
        if options.jobs < 1:
            raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
        for script in ("train_rice.py", "eval_rice.py"):
            if not Path(script).is_file():
                raise FileNotFoundError(f"there is no {script} here: run this command in the project's folder")
        if options.max_minutes is not None:
            read_minutes(options.max_minutes, "--max_minutes")
        output = Path(options.output_dir or Path("runs") / Path(options.study).stem)
        blocked = next((path for path in (output, *output.parents) if path.exists() and not path.is_dir()), None)
        if blocked:
            raise ValueError(f"--output_dir {output}: {blocked} is a file: choose another folder")
        runner = Runner(study, output, options.jobs, options.max_minutes)
        runner.run(options.arms)
        summary = summarise(study, output, runner.problems)
        text = to_markdown(study, summary)
        files = _write(output, summary, text)
    print(text)
    print(f"written to {output}: {files}")
    if any(not cell["reason"].startswith("not run") for cell in summary["not_run"]):
        sys.exit(1)


def _write(output: Path, summary: Mapping, text: str) -> str:
    """Writes the summary as JSON, Markdown and picture; returns the names of the files."""
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "ablation.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    write_atomically(output / "ablation.md", text)
    rows = [
        (name, kind, figures[kind]["R@1"], figures[kind]["R@1_ci95"])
        for name, figures in summary["arms"].items()
        for kind in figures
    ]
    if not rows:
        return "ablation.json, ablation.md, but no ablation.png, because there is no result yet"
    if not can_draw():
        return "ablation.json, ablation.md, but no ablation.png, which needs matplotlib"
    draw_intervals(output / "ablation.png", rows, "R@1 in percent, with 95 % intervals")
    return "ablation.json, ablation.md, ablation.png"


if __name__ == "__main__":
    main()

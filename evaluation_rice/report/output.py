"""The output of an evaluation: its files and the printed report."""

from collections.abc import Mapping
from pathlib import Path

from data_rice.files import write_atomically
from hub_rice.model_card import gallery_words, write_model_card
from hub_rice.tables import format_table, shown_scores

from ..breakdown import can_draw, draw_breakdown
from ..study.table import baseline_page
from .html_report import Evaluation, write_html_report
from .matches import draw_matches
from .results import write_query_ranks, write_rankings, write_results

SHOWN_FAILURES = 5


def write_files(output: Path, evaluation: Evaluation, run_dir: str | None, report: bool) -> None:
    """
    Writes all files of an evaluation, results.json last.

    Args:
        output: the folder.
        evaluation: the content.
        run_dir: folder of the model's training run, for its card.
        report: also write report.html.
    """
    results, task, rankings = evaluation.results, evaluation.task, evaluation.rankings
    output.mkdir(parents=True, exist_ok=True)
    shown = rankings[evaluation.shown]
    write_rankings(output, task, shown)
    write_query_ranks(output, rankings)
    rank_by = results["protocol"]["rank_by"]
    draw_matches(output / "matches.png", task, shown, evaluation.queries, evaluation.gallery, rank_by)
    if results["baseline"]:
        write_atomically(output / "README.md", baseline_page(results))
    else:
        write_model_card(output, results, run_dir=run_dir)
    if report:
        write_html_report(output, evaluation)
    if results["by"] and can_draw():
        draw_breakdown(output / "breakdown.png", results["by"], f"R@1 of {results['model']} by attribute of the clips")
    write_results(output, results)


def print_report(results: Mapping, output: Path, report: bool) -> None:
    """Prints the table and the facts needed to read it."""
    protocol = results["protocol"]
    print(f"\n{results['num_queries']} clips of {results['dataset']} ({protocol['split']}); {gallery_words(results)}")
    asr = f"ASR: {protocol['asr']}; " if "asr" in protocol else ""
    print(f"boxes at test time: {protocol['boxes']}; {asr}recall in percent\n")
    print(format_table(shown_scores(results)))
    print(f"\ninterval of R@1: {protocol['interval']}")
    _print_fusion(results)
    for kind, tie in results["ties"].items():
        if tie["share"] > 0:
            share, random = 100 * tie["share"], 100 * tie["R@1_ties_at_random"]
            print(f"{share:.1f} % of the clips are tied by {kind}; R@1 with ties in random order: {random:.1f}")
    unreachable = protocol["queries_without_relevant_in_gallery"]
    if unreachable:
        print(f"{unreachable} clips have no relevant image in their gallery; they are misses for any method")
    for failure in results["failures"][:SHOWN_FAILURES]:
        print(f"not read: {failure['kind']} {failure['id']} {failure['file']} ({failure['reason']})")
    if len(results["failures"]) > SHOWN_FAILURES:
        print(f"... {len(results['failures'])} failures in total, listed in results.json")
    _print_files(results, output, report)


def _print_fusion(results: Mapping) -> None:
    fusion = results["protocol"].get("fusion")
    if fusion is None:
        return
    for name in ("fusion_weight", "alignment_weight"):
        if results[name] is not None:
            print(f"{name.replace('_', ' ')} {results[name]:g}: {fusion['source_words']}")
    if fusion["text_weight"] is not None:
        source = "fitted after the fusion weight" if fusion["source"] == "validation" else "the checkpoint's own"
        print(f"text weight in the fused score {fusion['text_weight']:g}: {source}")
    for words in fusion["edge_words"]:
        print(words)


def _print_files(results: Mapping, output: Path, report: bool) -> None:
    drawn = bool(results["by"]) and can_draw()
    if "missing" in results["head_tail"] and results["by"]:
        print(f"no breakdown by head and tail: {results['head_tail']['missing']}")
    if results["by"] and not drawn:
        print("no breakdown.png: matplotlib, the extra `plot`, is not installed; the figures are in results.json")
    files = ["results.json", "rankings.jsonl", "query_ranks.jsonl", "matches.png", "README.md"]
    files += ["breakdown.md"] * (bool(results["by"]) and not results["baseline"])
    files += ["breakdown.png"] * drawn + ["report.html"] * report
    print(f"\nwritten to {output}: {', '.join(files)}")

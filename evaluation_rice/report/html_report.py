"""report.html: one evaluation as one self-contained page that needs no network."""

import base64
import io
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image, ImageDraw

from data_rice.files import write_atomically
from hub_rice.model_card import gallery_words, scope_words
from hub_rice.results import dataset_name
from hub_rice.tables import ATTRIBUTES, TITLES, table_cells
from processing_rice import open_image

from ..frames import clip_frames
from ..protocol import Rankings, RetrievalTask
from ..speed import STEPS
from .html_plots import Bar, bar_plot, curve_plot, group_bars

TILE = 120
FRAMES = 5
SHOWN = 5
EXAMPLES = 6
FAILURES = 50

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; max-width: 1180px;
  padding: 24px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 40px 0 8px; } h3 { font-size: 15px; }
.note { color: #6b6b6b; max-width: 860px; }
table { border-collapse: collapse; margin: 12px 0; } th, td { padding: 4px 14px 4px 0; text-align: right; }
th { border-bottom: 1px solid #bbb; font-weight: 600; } td { border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; } table.text td, table.text th { text-align: left; }
.plots { columns: 540px 2; } .plots > div { break-inside: avoid; padding-top: 12px; } .plots h3 { margin: 0 0 4px; }
svg text { font: 12px system-ui, sans-serif; } svg { max-width: 100%; height: auto; }
.query { border-top: 1px solid #ddd; padding: 12px 0; } .query h3 { margin: 0 0 6px; font-weight: 600; }
.strip { display: flex; flex-wrap: wrap; gap: 8px; margin: 6px 0; align-items: flex-start; }
.strip b { width: 100%; font-weight: 400; color: #6b6b6b; font-size: 13px; }
figure { margin: 0; width: 120px; } figcaption { font-size: 12px; overflow-wrap: anywhere; }
img { display: block; border: 3px solid #ddd; max-width: 120px; } .right img { border-color: #16963c; }
.wrong img { border-color: #cd2929; } .right figcaption { color: #16963c; } .wrong figcaption { color: #cd2929; }
pre { background: #f5f5f5; padding: 10px; white-space: pre-wrap; overflow-wrap: anywhere; }
"""

HeatPictures = Callable[[dict, dict], list[Image.Image]]


@dataclass
class Evaluation:
    """
    Content of a report.

    Attributes:
        results: Content of results.json.
        task, rankings: Queries with their galleries, and the rankings by each score.
        queries, gallery: The views.
        heat: Returns the frames of a query row with the heat of a gallery row, or raises `ValueError`; `None` if the
            model has no heat maps.
    """

    results: Mapping
    task: RetrievalTask
    rankings: Mapping[str, Rankings]
    queries: Any
    gallery: Any
    heat: HeatPictures | None = None
    heat_words: str = "was reconstructed from"

    @property
    def shown(self) -> str:
        """The kind of score for plots and examples."""
        kind = self.results["protocol"]["rank_by"]
        return kind if kind in self.rankings else "embedding"

    def image_row(self, image_id: str) -> dict | None:
        """The gallery row of an image."""
        places = self.__dict__.setdefault("_places", {image: i for i, image in enumerate(self.task.image_ids)})
        return self.gallery[self.task.image_rows[places[image_id]][0]] if image_id in places else None


def by_livestream(task: RetrievalTask, rankings: Mapping[str, Rankings]) -> dict[str, dict]:
    """`{live_id: {"num_queries": n, score name: {"R@1": ...}}}`; empty if all queries search one gallery."""
    counts = Counter(task.query_scopes)
    if len(counts) < 2:
        return {}
    summaries = {kind: ranked.summary_by(task.query_scopes) for kind, ranked in rankings.items()}
    return {
        name: {"num_queries": count, **{kind: summary[name] for kind, summary in summaries.items()}}
        for name, count in counts.items()
    }


def choose_examples(task: RetrievalTask, ranked: Rankings, count: int = EXAMPLES) -> tuple[list[int], list[int]]:
    """
    The best queries: hits with the largest margin over the first wrong image among the five best. The worst queries:
    those with the right image at the lowest rank or absent, then with the largest margin of the wrong image. Equal
    queries stay in file order.

    Returns:
        Two lists of query numbers, best and worst; the worst query is first. Queries without a ranking are in neither.
    """
    ranks = ranked.first_relevant_ranks()
    right, wrong = [], []
    for number, query in enumerate(task.query_ids):
        ranking, scores = ranked.rankings[query], ranked.top_scores.get(query, [])
        if not ranking:
            continue
        is_right = [image in task.relevant[query] for image in ranking[: len(scores)]]
        other = next((i for i, same in enumerate(is_right) if same != is_right[0]), len(scores) - 1)
        lead = scores[0] - scores[other]
        if ranks[query] == 1:
            right.append((-lead, number))
        else:
            wrong.append((-(ranks[query] or len(task.gallery_of(number)) + 1), -lead, number))
    return [row[-1] for row in sorted(right)[:count]], [row[-1] for row in sorted(wrong)[:count]]


def picture_tag(picture: Image.Image | None, label: str) -> str:
    """A small copy of a picture as an `img` element with its bytes; `None` becomes a grey tile."""
    if picture is None:
        picture = Image.new("RGB", (TILE, TILE), (238, 238, 238))
        ImageDraw.Draw(picture).text((TILE // 2, TILE // 2), "unreadable", (110, 110, 110), anchor="mm")
    scale = TILE / max(picture.size)
    small = picture.convert("RGB").resize([max(1, round(side * scale)) for side in picture.size])
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(label)}" width="{small.width}" src="data:image/jpeg;base64,{data}" />'


def _figure(picture: Image.Image | None, caption: str = "", kind: str = "") -> str:
    css = f' class="{kind}"' if kind else ""
    words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure{css}>{picture_tag(picture, caption or 'frame of the clip')}{words}</figure>"


def _strip(title: str, figures: Sequence[str]) -> str:
    return f'<div class="strip"><b>{escape(title)}</b>{"".join(figures)}</div>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    css = f' class="{kind}"' if kind else ""
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table{css}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>" if any(parts) else ""


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _recall(results: Mapping) -> str:
    scores = {**results["scores"], **results["baselines"]}
    bars = [Bar(TITLES.get(name, name), values["R@1"], values.get("R@1_ci95")) for name, values in scores.items()]
    header, rows = table_cells(scores)
    return _section(
        "Recall",
        _note("R@k in percent: the share of clips with a right image among the first k. The interval is for R@1."),
        _table(header, rows),
        bar_plot(bars, "R@1 by method, in percent"),
    )


def _groups(evaluation: Evaluation) -> str:
    kind, plots = evaluation.shown, []
    for name, groups in evaluation.results["by"].items():
        title = f"By {ATTRIBUTES.get(name, name)}"
        plots.append(f"<div><h3>{escape(title)}</h3>{bar_plot(group_bars(groups, kind), title)}</div>")
    if not plots:
        return ""
    words = (
        f"R@1 in percent by {kind} score, and the number of clips. Whiskers are 95 % intervals, Wilson's if all clips "
        "of a group are hits or all are misses."
    )
    return _section("Recall by attribute of the clips", _note(words), f'<div class="plots">{"".join(plots)}</div>')


def _livestreams(evaluation: Evaluation) -> str:
    groups, kind = by_livestream(evaluation.task, evaluation.rankings), evaluation.shown
    if not groups:
        return ""
    bars = sorted(group_bars(groups, kind), key=lambda bar: -bar.value)
    values = [100 * bar.value for bar in bars]
    words = (
        f"R@1 in percent by {kind} score over {len(bars)} livestreams: from {values[-1]:.1f} to {values[0]:.1f}, "
        f"median {median(values):.1f}. Clips of one livestream are not independent, "
        f"so the intervals above resample livestreams first; the intervals here are over the clips of each."
    )
    if len(bars) > 40:
        words += " The 20 best and the 20 worst are shown."
        bars = bars[:20] + bars[-20:]
    return _section("By livestream", _note(words), bar_plot(bars, "R@1 by livestream"))


def _query(evaluation: Evaluation, number: int) -> str:
    task, ranked = evaluation.task, evaluation.rankings[evaluation.shown]
    query_id, row = task.query_ids[number], evaluation.queries[number]
    ranking, relevant = ranked.rankings[query_id], task.relevant[query_id]
    rank, size = ranked.first_relevant_ranks()[query_id], len(task.gallery_of(number))
    place = f"right image at rank {rank}" if rank else f"right image not among the first {len(ranking)}"
    title = " · ".join(filter(None, [query_id, row.get("category") or "", f"{place} of {size}"]))
    try:
        frames = [frame for frame, _ in clip_frames(row, FRAMES)]
    except (ValueError, OSError):
        frames = [None]
    parts = [_strip("frames of the clip", [_figure(frame) for frame in frames])]
    if row.get("asr"):
        parts.append(_note(f"said: {row['asr']}"))
    figures = []
    for i, image in enumerate(ranking[:SHOWN]):
        kind = "right" if image in relevant else "wrong" if i == 0 else ""
        figures.append(_image_figure(evaluation, image, f"{i + 1}: {ranked.top_scores[query_id][i]:.3f}", kind))
    answer = ranking[rank - 1] if rank else next(iter(relevant), None)
    if answer is not None and answer not in ranking[:SHOWN]:
        figures.append(_image_figure(evaluation, answer, f"right, rank {rank}" if rank else "right", "right"))
    parts.append(
        _strip(f"the first images of the shop by {evaluation.shown} score, the right one framed green", figures)
    )
    for image, words in {ranking[0]: "the first image", answer: "the right image"}.items():
        parts.append(_heat(evaluation, row, image, words))
    return f'<div class="query"><h3>{escape(title)}</h3>{"".join(parts)}</div>'


def _image_figure(evaluation: Evaluation, image: str, caption: str, kind: str) -> str:
    row = evaluation.image_row(image)
    picture = None
    if row is not None:
        try:
            picture = open_image(row["image"])
        except ValueError:
            kind = kind or "unreadable"
        caption = " ".join(filter(None, [caption, row.get("title") or ""]))
    return _figure(picture, caption, kind)


def _heat(evaluation: Evaluation, query: dict, image: str | None, words: str) -> str:
    row = None if image is None or evaluation.heat is None else evaluation.image_row(image)
    if row is None:
        return ""
    try:
        pictures = evaluation.heat(query, row)
    except (ValueError, OSError) as error:
        return _note(f"no heat map: {error}")
    title = f"where {words} {evaluation.heat_words} (bright: much, dark: nothing)"
    return _strip(title, [_figure(picture) for picture in pictures])


def _examples(evaluation: Evaluation, count: int) -> str:
    best, worst = choose_examples(evaluation.task, evaluation.rankings[evaluation.shown], count)
    lead = "Hits with the largest margin over a wrong image"
    deep = "Clips whose right image has the lowest rank or is not ranked; frames are evenly spaced"
    return _section(
        f"The {len(best)} best clips", _note(f"{lead}."), *(_query(evaluation, i) for i in best)
    ) + _section(f"The {len(worst)} worst clips", _note(f"{deep}."), *(_query(evaluation, i) for i in worst))


def _fusion(results: Mapping) -> str:
    fusion = results["protocol"].get("fusion")
    if not fusion:
        return ""
    given = {"weight": results["fusion_weight"], "alignment_weight": results.get("alignment_weight")}
    given["text_weight"] = fusion.get("text_weight")
    weights = ", ".join(f"{name} {value:g}" for name, value in given.items() if value is not None)
    words = f"Fused score: {fusion['rule']}; {weights}: {fusion['source_words']}."
    curve = fusion.get("curve")
    plot = curve_plot(curve, results["fusion_weight"], "R@1 over the fusion weight, in percent") if curve else ""
    title = "<h3>R@1 in percent on the validation split</h3>" if plot else ""
    return _section("Fusion of scores", _note(words), title, plot)


def _failures(results: Mapping) -> str:
    failures = results["failures"]
    if not failures:
        return _section("Failures", _note("Every clip and image could be read and scored."))
    rows = [[failure.get(name, "") for name in ("method", "kind", "id", "file", "reason")] for failure in failures]
    words = f"{len(failures)} failures; a clip that could not be read is a miss."
    if len(failures) > FAILURES:
        words += f" The first {FAILURES} are shown, results.json lists all."
    header = ["method", "kind", "id", "file", "reason"]
    return _section("Failures", _note(words), _table(header, rows[:FAILURES], "text"))


def _speed(results: Mapping) -> str:
    speed = results.get("speed")
    if not speed:
        return ""
    rows = [[words, f"{speed[f'{step}_ms']:.2f} ms"] for step, words in STEPS.items() if f"{step}_ms" in speed]
    threads = f"{speed['threads']} CPU thread" + ("s" if speed["threads"] > 1 else "")
    words = (
        f"Mean wall-clock time of the model's own work in this run, in batches, without decoding pictures; device "
        f"{speed['device']}, {threads}. The whole evaluation took {results['seconds']:.0f} s."
    )
    return _section("Speed", _note(words), _table(["step", "time"], rows))


def _protocol(results: Mapping) -> str:
    protocol = results["protocol"]
    boxes = {
        "none": "No boxes were used.",
        "ground_truth": "The true boxes of the product were used.",
        "detector": "The boxes of a product detector were used.",
    }[protocol["boxes"]]
    asr = {
        "none": " No ASR was used.",
        "shuffled": " The words of the ASR were shuffled.",
        "wrong": " Each clip had the ASR of a clip of another product.",
    }.get(protocol.get("asr"), "")
    sentences = [
        f"{results['num_queries']} clips of the {protocol['split']} split. {scope_words(results)}",
        f"To be exact, {gallery_words(results)}.",
        f"At most {protocol['num_frames']} frames of a clip are used. {boxes}{asr}",
        f"A hit is {protocol['hit']}. The denominator is {protocol['denominator']}.",
        f"Ties are broken by {protocol['tie_order']}; the interval of R@1 is a {protocol['interval']}.",
    ]
    for kind, tie in results["ties"].items():
        if tie["share"] > 0:
            random = 100 * tie["R@1_ties_at_random"]
            sentences.append(
                f"{100 * tie['share']:.1f} % of the clips are tied by {kind} score; R@1 with ties in random order: "
                f"{random:.1f}."
            )
    unreachable = protocol["queries_without_relevant_in_gallery"]
    if unreachable:
        sentences.append(f"{unreachable} clips have no right image in their gallery; they are misses for any method.")
    return _section("How it was measured", *(f"<p>{escape(sentence)}</p>" for sentence in sentences))


def _origin(results: Mapping) -> str:
    rows = [["model", results["model"]], ["SHA-256 of the weights", results.get("model_sha256") or ""]]
    rows += [["data set", results["dataset"]], *results["versions"].items()]
    command = f"<pre>{escape(results['command'])}</pre>"
    return _section("Command and versions", command, _table(["what", "which"], rows, "text"))


def html_report(evaluation: Evaluation, num_examples: int = EXAMPLES) -> str:
    """
    The page.

    Args:
        evaluation: What to show.
        num_examples: Number of best clips and of worst clips.
    """
    results = evaluation.results
    title = f"Product recognition on {dataset_name(results)}, {results['protocol']['split']} split"
    best = results["scores"][evaluation.shown]
    low, high = best["R@1_ci95"]
    summary = (
        f"R@1 by {evaluation.shown} score is {100 * best['R@1']:.1f} % (95 % interval: {100 * low:.1f} to "
        f"{100 * high:.1f}) over {results['num_queries']} clips."
    )
    body = "".join(
        [
            f"<h1>{escape(title)}</h1><p>{escape(summary)}</p>",
            *(_recall(results), _protocol(results), _groups(evaluation), _livestreams(evaluation)),
            *(_fusion(results), _examples(evaluation, num_examples), _failures(results)),
            *(_speed(results), _origin(results)),
        ]
    )
    # The policy makes a browser refuse any content from outside the page.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8" />'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}" />'
        f'<meta name="viewport" content="width=device-width, initial-scale=1" />'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def write_html_report(output_dir: str | os.PathLike, evaluation: Evaluation, num_examples: int = EXAMPLES) -> None:
    """Writes `report.html` to `output_dir`; arguments as `html_report`."""
    write_atomically(Path(output_dir) / "report.html", html_report(evaluation, num_examples))

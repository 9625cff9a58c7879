"""Validation shared among processes: each query and gallery once, with the figures of one process."""

import numpy as np
import pytest
from datasets import Dataset

from data_rice.collator import RiceCollator
from evaluation_rice.protocol import RetrievalTask
from evaluation_rice.retrieval import Loading, ModelRetriever, all_scores, rank_scores, validate
from training_rice import validation as module
from training_rice.validation import share_of, validate_together


@pytest.fixture
def rooms(validation):
    """The six queries and images in three livestreams; the last query's has no images."""
    queries, gallery, _ = validation
    lives = ["a", "b", "a", "c", "b", "nowhere"]
    queries = Dataset.from_list(
        [{**row, "live_id": live} for row, live in zip(queries, lives, strict=True)], features=queries.features
    )
    gallery = Dataset.from_list(
        [{**row, "live_id": "abc"[i % 3]} for i, row in enumerate(gallery)], features=gallery.features
    )
    return queries, gallery


@pytest.mark.parametrize("scope", ["live", "all"])
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_parts_equal_the_whole(make_model, processor, rooms, scope, world_size):
    queries, gallery = rooms
    task = RetrievalTask.from_datasets(queries, gallery, scope)
    retriever = ModelRetriever(make_model(), RiceCollator(processor))
    arguments = (queries, gallery, Loading(2, 0, quiet=True))
    whole = all_scores(retriever, task, *arguments)
    merged, read = {}, []
    for rank in range(world_size):
        share = share_of(task, rank, world_size)
        read += [image for image, rows in enumerate(share.image_rows) if rows]
        if any(name in share.scopes for name in share.query_scopes):
            part = all_scores(retriever, share, *arguments)
            assert not merged.keys() & part.keys()
            merged |= part
    assert merged.keys() == whole.keys()
    for query, values in whole.items():
        for kind, row in values.items():
            assert merged[query][kind] == pytest.approx(row, abs=1e-5)
    if scope == "live":
        assert len(read) == len(set(read)) == len(task.image_ids)
    rankings, fitted = rank_scores(task, dict(sorted(merged.items())))
    expected, expected_fit = rank_scores(task, whole)
    assert fitted.weights == expected_fit.weights
    assert rankings["embedding"].summary() == expected["embedding"].summary()


def test_one_process(make_model, processor, rooms):
    """As `validate`, and a query without gallery is told once."""
    queries, gallery = rooms
    task = RetrievalTask.from_datasets(queries, gallery, "live")
    model, collator, loading = make_model(), RiceCollator(processor), Loading(2, 0, quiet=True)
    metrics, weight, failures = validate_together(model, collator, task, queries, gallery, loading)
    expected_failures: list[dict] = []
    rankings, expected = validate(
        ModelRetriever(model, collator), task, queries, gallery, loading=loading, failures=expected_failures
    )
    assert weight == expected.weights.fusion_weight
    assert metrics["embedding_R@1"] == rankings["embedding"].summary()["R@1"]
    assert {failure["id"] for failure in failures} == {"clip25"}
    assert len(failures) == len(expected_failures) == 1


def test_error_of_another_process(make_model, processor, rooms, monkeypatch):
    """Everybody stops with the sentence of the one that cannot go on."""
    queries, gallery = rooms
    task = RetrievalTask.from_datasets(queries, gallery, "live")

    def gather(parts, own):
        parts[:] = [own, ({}, [], "not one of the 2 gallery images could be read")]

    monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(module.dist, "all_gather_object", gather)
    with pytest.raises(ValueError, match="not one of the 2 gallery images"):
        validate_together(make_model(), RiceCollator(processor), task, queries, gallery, Loading(2, 0, quiet=True))


@pytest.fixture
def two_processes(monkeypatch):
    """Makes this process one of two; the other scores nothing, and hands out `broadcast` where it is the main one."""

    def start(rank, broadcast=None):
        def hand_out(outcome, src):
            assert src == 0
            outcome[:] = outcome if rank == 0 else [broadcast]

        monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(module.dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(module.dist, "get_rank", lambda: rank)
        monkeypatch.setattr(module.dist, "all_gather_object", lambda parts, own: parts.__setitem__(slice(None), [own]))
        monkeypatch.setattr(module.dist, "broadcast_object_list", hand_out)

    return start


def test_recall_is_computed_by_the_main_process_alone(make_model, processor, rooms, two_processes, monkeypatch):
    queries, gallery = rooms
    task = RetrievalTask.from_datasets(queries, gallery, "live")
    arguments = (make_model(), RiceCollator(processor), task, queries, gallery, Loading(2, 0, quiet=True))
    two_processes(0)
    metrics, weight, _ = validate_together(*arguments)
    assert set(metrics) >= {"embedding_R@1", "fused_R@10"} and weight > 0
    two_processes(1, ({"embedding_R@1": 0.25}, 3.0))
    monkeypatch.setattr(module, "rank_scores", None)
    assert validate_together(*arguments)[:2] == ({"embedding_R@1": 0.25}, 3.0)
    two_processes(1, OSError("no room for the metric"))
    with pytest.raises(OSError, match="no room for the metric"):
        validate_together(*arguments)


def test_processes_do_not_wait_for_a_failed_main_process(make_model, processor, rooms, two_processes, monkeypatch):
    queries, gallery = rooms
    task = RetrievalTask.from_datasets(queries, gallery, "live")
    sent = []
    two_processes(0)
    monkeypatch.setattr(module.dist, "broadcast_object_list", lambda outcome, src: sent.extend(outcome))

    def fail(*_, **__):
        raise OSError("no room for the metric")

    monkeypatch.setattr(module, "rank_scores", fail)
    with pytest.raises(OSError, match="no room for the metric"):
        validate_together(make_model(), RiceCollator(processor), task, queries, gallery, Loading(2, 0, quiet=True))
    assert [str(error) for error in sent] == ["no room for the metric"]


def test_a_weight_at_an_end_of_its_grid_is_logged(make_model, processor, rooms, monkeypatch, caplog):
    queries, gallery = rooms
    task = RetrievalTask.from_datasets(queries, gallery, "live")
    arguments = (make_model(), RiceCollator(processor), task, queries, gallery, Loading(2, 0, quiet=True))

    def scores(*_):
        """The embedding prefers a wrong image, matching the right one: the more matching, the better."""
        result = {}
        for query in range(5):
            size, right = len(task.gallery_of(query)), task.relevant_positions(query)
            wanted = np.isin(np.arange(size), right).astype(float)
            result[query] = {"embedding": 1 - wanted + np.arange(size), "matching": wanted * scores.sign}
        return result

    monkeypatch.setattr(module, "all_scores", scores)
    for scores.sign, end in ((1.0, None), (0.0, "lower")):
        caplog.clear()
        weight = validate_together(*arguments)[1]
        logged = [message for message in caplog.messages if "end of its grid" in message]
        expected = f"Validation: the fusion weight {weight:g} lies at the {end} end of its grid"
        assert len(logged) == (end is not None) and all(message.startswith(expected) for message in logged)

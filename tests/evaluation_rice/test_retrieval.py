from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value

from evaluation_rice import retrieval
from evaluation_rice.fusion import fit_fusion_weight
from evaluation_rice.protocol import RetrievalTask
from evaluation_rice.retrieval import (
    Loading,
    ModelRetriever,
    add_text_scores,
    evaluate_retrieval,
    fit_fusion,
    rank_scores,
    retrieve,
)
from modeling_rice.scoring_rice import FusionWeights, z_scores
from tests.evaluation_rice.conftest import QUERY


def run(model, collator, shop, scope="live", batch_size=2, num_workers=0, **options):
    queries, gallery = shop.queries, shop.gallery
    task = RetrievalTask.from_datasets(queries, gallery, scope)
    loading = Loading(batch_size, num_workers, quiet=True)
    return retrieve(ModelRetriever(model, collator), task, queries, gallery, loading=loading, **options)


def test_ranks_the_own_gallery_and_encodes_each_image_once(model, collator, shop):
    rankings, failures = run(model, collator, shop, weights=FusionWeights(1.0))
    assert failures == [] and set(rankings) == {"embedding", "matching", "fused"}
    assert [ranking[0] for ranking in rankings["matching"].rankings.values()] == ["x0", "y1", "shared", "shared", "x2"]
    assert sorted(rankings["matching"].rankings["b"]) == ["shared", "y0", "y1"]
    assert list(rankings["matching"].rankings) == list("abcde")
    assert model.images_encoded == 6


@pytest.mark.parametrize("scope", ["live", "all"])
def test_batches_workers_and_chunks_do_not_change_scores(model, collator, shop, scope, monkeypatch):
    plain, _ = run(model, collator, shop, scope, batch_size=100)
    monkeypatch.setattr(retrieval, "GALLERY_CHUNK", 2)
    chunked, _ = run(model, collator, shop, scope, batch_size=1, num_workers=2)
    for kind in plain:
        assert chunked[kind].rankings == plain[kind].rankings
        assert chunked[kind].top_scores == plain[kind].top_scores


def test_scores_equal_one_plain_call(model, collator, shop):
    model.eval()
    rankings, _ = run(model, collator, shop, "all")
    with torch.no_grad():
        gallery = model.encode_gallery(**collator.collate_gallery(list(shop.gallery.select([0, 1, 2, 3, 4, 6])))[0])
        clips = model.encode_clips(**collator.collate_queries(list(shop.queries))[0])
        scores = model.match(clips, gallery).numpy()
    images = ["x0", "x1", "x2", "shared", "y0", "y1"]
    expected = [[images[i] for i in np.argsort(-row, kind="stable")] for row in scores]
    assert list(rankings["matching"].rankings.values()) == expected


def test_an_unreadable_clip_is_a_listed_miss(model, collator, shop):
    (shop.folder / "c1.png").write_bytes(b"no image")
    rankings, failures = run(model, collator, shop)
    assert rankings["embedding"].rankings["c"] == [] and rankings["matching"].rankings["c"] == []
    assert rankings["matching"].recall()["R@10"] == pytest.approx(4 / 5)
    assert [(failure["kind"], failure["id"]) for failure in failures] == [("query", "c")]


def test_an_unreadable_clip_named_by_a_number_is_a_listed_miss(model, collator, shop):
    (shop.folder / "c1.png").write_bytes(b"no image")
    rows = [{**row, "clip_id": number} for number, row in enumerate(shop.queries)]
    numbered = SimpleNamespace(
        queries=Dataset.from_list(rows, Features({**QUERY, "clip_id": Value("int64")})), gallery=shop.gallery
    )

    class Forgiving(type(collator)):
        """As the collator of the project, it reads a damaged clip with what is left of it."""

        def collate_queries(self, rows):
            inputs, loaded, failures = super().collate_queries(rows)
            return inputs, loaded, [*failures, {"id": rows[0]["clip_id"], "file": "f", "reason": "r"}]

    rankings, failures = run(model, Forgiving(), numbered, batch_size=5)
    assert {query for query, ranking in rankings["matching"].rankings.items() if not ranking} == {"0", "2"}
    assert sorted(failure["id"] for failure in failures) == ["0", "2"]


@pytest.mark.parametrize(("outcome", "found"), [("replaced", 4), ("left out", 4), ("skipped", 0), (None, 0)])
def test_a_damaged_frame_is_listed_and_a_clip_without_other_frames_is_a_miss(model, collator, shop, outcome, found):
    class Forgiving(type(collator)):
        def collate_queries(self, rows):
            inputs, loaded, _ = super().collate_queries(rows)
            failure = {"id": rows[0]["clip_id"], "file": "f", "reason": "r"}
            return inputs, loaded, [failure | ({"outcome": outcome} if outcome else {})]

    rankings, failures = run(model, Forgiving(), shop, batch_size=5)
    assert len(rankings["matching"].rankings["a"]) == found and len(rankings["matching"].rankings["c"]) == 4
    assert len(failures) == 1 and failures[0]["id"] == "a"


def test_an_unreadable_image_cannot_be_retrieved(model, collator, shop):
    (shop.folder / "x" / "x2.png").write_bytes(b"no image")
    rankings, failures = run(model, collator, shop, weights=FusionWeights(1.0))
    assert "x2" not in rankings["fused"].rankings["e"] and len(rankings["fused"].rankings["e"]) == 3
    assert [(failure["kind"], failure["id"]) for failure in failures] == [("gallery", "x2")]
    assert rankings["matching"].recall()["R@10"] == pytest.approx(4 / 5)


def test_a_shared_image_is_read_from_a_livestream_with_an_undamaged_copy(model, collator, shop):
    (shop.folder / "x" / "shared.png").unlink()
    rankings, failures = run(model, collator, shop)
    assert rankings["matching"].rankings["c"][0] == "shared"
    assert [failure["id"] for failure in failures] == ["shared"]


def test_a_gallery_without_a_readable_image_is_refused(model, collator, shop):
    for image, live in shop.rows:
        (shop.folder / live / f"{image}.png").unlink()
    with pytest.raises(ValueError, match="not one of the 6 gallery images"):
        run(model, collator, shop)


def test_all_clips_unreadable_is_all_misses(model, collator, shop):
    for clip, _, _ in shop.clips:
        (shop.folder / f"{clip}0.png").unlink()
    rankings, failures = run(model, collator, shop)
    assert len(failures) == 5 and rankings["embedding"].recall()["R@1"] == 0.0


def test_nan_scores_are_listed_and_not_ranked(model, collator, shop):
    plain = model.match

    def match(clips, gallery):
        scores = plain(clips, gallery).clone()
        scores[:, 0] = float("nan")
        return scores

    model.match = match
    rankings, failures = run(model, collator, shop, weights=FusionWeights(1.0))
    assert all("x0" not in rankings[kind].rankings["a"] for kind in ("matching", "fused"))
    assert rankings["embedding"].rankings["a"][0] == "x0"
    assert len(failures) == 5 and "1 of 4 matching scores" in failures[0]["reason"]


def test_a_model_without_decoder_has_embedding_scores_only(model, collator, shop):
    model.config.use_decoder = False
    rankings, _ = run(model, collator, shop, weights=FusionWeights(1.0))
    assert list(rankings) == ["embedding"]


def test_evaluate_retrieval_restores_training_mode_and_stays_quiet(model, collator, shop, capsys):
    model.train()
    scores = evaluate_retrieval(model, None, shop.queries, shop.gallery, collator=collator, quiet=True)
    assert model.training and torch.is_grad_enabled()
    assert scores["matching"]["R@1"] == 1.0 and len(scores["embedding"]["R@1_ci95"]) == 2
    assert capsys.readouterr().err == ""
    only = evaluate_retrieval(model, None, shop.queries, shop.gallery, collator=collator, matching=False, quiet=True)
    assert list(only) == ["embedding"]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("whole", [True, False])
def test_each_part_of_a_model_gets_its_own_mode_back(model, collator, shop, whole, fails):
    """A part may be frozen by eval mode while the rest trains, and a part may train alone."""
    model.norm = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    model.train(whole).norm.train(not whole)
    modes = [module.training for module in model.modules()]
    if fails:
        collator.collate_queries = None
    encode, seen = model.encode_clips, []
    model.encode_clips = lambda **inputs: seen.append(any(m.training for m in model.modules())) or encode(**inputs)
    try:
        evaluate_retrieval(model, None, shop.queries, shop.gallery, collator=collator, quiet=True)
    except TypeError:
        assert fails
    assert [module.training for module in model.modules()] == modes
    assert any(modes) and not any(seen) and bool(seen) is not fails


def test_fit_fusion_counts_unreadable_clips_as_misses(model, collator, shop):
    queries, gallery = shop.queries, shop.gallery
    task = RetrievalTask.from_datasets(queries, gallery, "live")
    loading = Loading(2, quiet=True)
    (shop.folder / "c1.png").unlink()
    fitted = fit_fusion(ModelRetriever(model, collator), task, queries, gallery, loading=loading, weights=(0.5, 1))
    assert fitted.weights == FusionWeights(0.5) and [point["R@1"] for point in fitted.curve] == [0.8, 0.8]
    assert fitted.text_curve is None
    model.config.use_decoder = False
    with pytest.raises(ValueError, match="neither matching nor alignment scores"):
        fit_fusion(ModelRetriever(model, collator), task, queries, gallery, loading=loading)


class Listener:
    """Makes a model one whose embedding score holds text: a wrong one for reddish clips, none for the others."""

    def __init__(self, model):
        self.model = model
        self.config, self.weight = model.config, model.weight

    def __getattr__(self, name):
        return getattr(self.model, name)

    def text_similarity(self, clips, gallery):
        cosines = torch.cosine_similarity(clips.values.flip(1)[:, None], gallery.values[None], dim=-1)
        return torch.where(clips.values[:, :1] > 0.5, cosines, 0.0)

    def similarity(self, clips, gallery, text_weight=None):
        texts = self.text_similarity(clips, gallery)
        return self.model.similarity(clips, gallery) + (2.0 if text_weight is None else text_weight) * texts


SPEAKING, SILENT = "acd", "be"


def test_a_clip_without_asr_is_ranked_as_without_text(model, collator, shop):
    plain, _ = run(model, collator, shop, weights=FusionWeights(0.3))
    rankings, failures = run(Listener(model), collator, shop, weights=FusionWeights(0.3, None, 20.0))
    assert set(rankings) == {"embedding", "matching", "fused"} and failures == []
    for clip in SILENT:
        assert rankings["fused"].rankings[clip] == plain["fused"].rankings[clip]
        assert rankings["fused"].top_scores[clip] == plain["fused"].top_scores[clip]
    for clip in SPEAKING:
        assert rankings["fused"].top_scores[clip] != plain["fused"].top_scores[clip]
        assert rankings["embedding"].top_scores[clip] != plain["embedding"].top_scores[clip]
    none, _ = run(Listener(model), collator, shop, weights=FusionWeights(0.3, None, 0.0))
    assert none["fused"].top_scores == plain["fused"].top_scores


def test_the_matching_weight_is_that_without_text(shop):
    """Where text puts nearly every embedding right, a weight fitted with it would leave the silent clip to itself."""
    task = RetrievalTask.from_datasets(shop.queries, shop.gallery, "live")
    scores = {}
    for query in range(5):
        size, right = len(task.gallery_of(query)), task.relevant_positions(query)[0]
        visual, matching, text = np.zeros(size), np.zeros(size), np.zeros(size)
        visual[(right + 1) % size], visual[right], matching[right] = 1.0, 0.5, 1.0
        if query != 4:
            text[right] = 1.0
        scores[query] = {"visual": visual, "text": text, "embedding": visual + text, "matching": matching}
    bare = {query: {"embedding": values["visual"], "matching": values["matching"]} for query, values in scores.items()}
    plain_rankings, plain = rank_scores(task, bare)
    rankings, fitted = rank_scores(task, scores)
    assert fitted.curve == plain.curve and plain.weights == FusionWeights(fitted.weights.fusion_weight)
    assert fitted.weights.fused_text_weight == 0.0 and rankings["fused"].recall()["R@1"] == 1.0
    silent = task.query_ids[4]
    assert rankings["fused"].rankings[silent] == plain_rankings["fused"].rankings[silent]
    with_text, without = (
        fit_fusion_weight(
            [z_scores(values[kind]) for values in list(scores.values())[:4]],
            [values["matching"] for values in list(scores.values())[:4]],
            [task.relevant_positions(query) for query in range(4)],
        )[0]
        for kind in ("embedding", "visual")
    )
    assert with_text < without <= plain.weights.fusion_weight


def test_the_text_weight_is_fitted_after_that_of_matching(shop):
    task = RetrievalTask.from_datasets(shop.queries, shop.gallery, "live")
    scores = {}
    for query in range(5):
        size, right = len(task.gallery_of(query)), task.relevant_positions(query)[0]
        visual, text = np.zeros(size), np.zeros(size)
        visual[(right + 1) % size] = 1.0
        text[right] = 0.1
        scores[query] = {"visual": visual, "text": text, "embedding": visual, "matching": visual}
    # What has no text, or could not be read, takes nothing from the others.
    scores[3] = {"embedding": np.full(3, np.nan)}
    del scores[4]
    joined, embedding_weight = add_text_scores(task, scores)
    rankings, fitted = rank_scores(task, joined)
    hits = {point["weight"]: point["R@1"] for point in fitted.text_curve}
    assert max(hits.values()) == 3 / 5 == hits[fitted.weights.fused_text_weight] == rankings["fused"].recall()["R@1"]
    assert all(share < 3 / 5 for weight, share in hits.items() if weight < fitted.weights.fused_text_weight)
    assert embedding_weight is not None and set(rankings) == {"embedding", "matching", "fused"}
    assert joined[3].keys() == {"embedding"} and joined[0]["visual"].max() == 1.0


def test_alignment_is_a_third_score_with_a_fitted_weight(shop):
    """Of two scores one knows the answer and one misleads: the weight is high for the one, and 0 for the other."""
    task = RetrievalTask.from_datasets(shop.queries, shop.gallery, "live")
    scores = {}
    for query in range(5):
        size, right = len(task.gallery_of(query)), task.relevant_positions(query)
        knows, wrong = torch.zeros(size), torch.zeros(size)
        knows[right] = 1.0
        wrong[[i for i in range(size) if i not in right][0]] = 1.0
        scores[query] = {"embedding": wrong, "matching": wrong, "alignment": knows}
    rankings, fitted = rank_scores(task, scores)
    assert fitted.weights.alignment_weight > 1 and rankings["fused"].recall()["R@1"] == 1.0
    assert {"curve", "alignment_curve"} == fitted.curves().keys()
    bare = {query: {kind: values[kind] for kind in ("embedding", "alignment")} for query, values in scores.items()}
    rankings, fitted = rank_scores(task, bare)
    assert fitted.curve is None and rankings["fused"].recall()["R@1"] == 1.0
    swapped = {query: {"embedding": v["alignment"], "alignment": v["embedding"]} for query, v in scores.items()}
    rankings, fitted = rank_scores(task, swapped)
    assert fitted.weights.alignment_weight == 0 and rankings["fused"].recall()["R@1"] == 1.0
    assert fitted.edges() == []


@pytest.mark.parametrize("kind", ["gallery", "clips"])
def test_a_batch_encoded_in_parts_on_several_cores_is_that_of_one_call(monkeypatch, kind):
    from transformers import CLIPVisionConfig

    from modeling_rice import RiceConfig, RiceModel
    from processing_rice import build_processor, train_tokenizer

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **sizes)
    text = sizes | {"vocab_size": 400, "max_position_embeddings": 64}
    config = RiceConfig(vision_config=vision, projection_dim=8, decoder_num_heads=2, text_config=text)
    model, processor = RiceModel(config).eval(), build_processor(train_tokenizer(["a red mug"] * 20, 400), 16, 8, 3)
    pictures = list(torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8))
    words = ["a red mug", "", "mug", "red", "", "a", "red mug"]
    if kind == "gallery":
        inputs = dict(processor(images=pictures, titles=words))
    else:
        # Clips of one to three frames.
        inputs = dict(processor(videos=[pictures[i : i + 1 + i % 3] for i in range(7)], asr=words))
    calls = []
    encode = getattr(model, f"encode_{kind}")
    monkeypatch.setattr(model, f"encode_{kind}", lambda **part: calls.append(part) or encode(**part))
    monkeypatch.setattr(retrieval, "PICTURES_PER_CORE", 6)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with torch.no_grad():
            found = getattr(ModelRetriever(model, None), f"encode_{kind}")(inputs)
            expected = encode(**inputs)
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == (2 if kind == "gallery" else 4)
    for name in expected.fields:
        left, right = getattr(found, name), getattr(expected, name)
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)

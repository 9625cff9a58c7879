"""One checkpoint ranks a shop in one order through every entry point."""

import pytest
from datasets import Dataset

from data_rice.collator import RiceCollator
from evaluation_rice.protocol import Rankings
from evaluation_rice.retrieval import evaluate_retrieval
from modeling_rice import RiceModel
from modeling_rice.pipeline_rice import ProductRetrievalPipeline
from processing_rice import open_image
from retrieval_rice.index import GalleryIndex

TEXT = {"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 16, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "matching"),
        ({"fusion_weight": 0.7}, "fused"),
        ({"use_decoder": False}, "embedding"),
        ({"fusion_weight": 0.7, "ranking": "matching"}, "matching"),
        ({"fusion_weight": 0.7, "ranking": "embedding"}, "embedding"),
        ({"fusion_weight": 0.7, "fused_text_weight": 4.0, "text_config": TEXT, "text_score_weight": 0.5}, "fused"),
    ],
)
def test_rank_pipeline_index_and_evaluation_agree(
    make_index_model, index_processor, make_shop_rows, demo_queries, tmp_path, monkeypatch, settings, kind
):
    make_index_model(**settings).save_pretrained(tmp_path / "model")
    model = RiceModel.from_pretrained(tmp_path / "model")
    reads_text = "text_config" in settings
    rows, queries = make_shop_rows(), [{**row, "live_id": ""} for row in demo_queries[:3]]
    rows = [{**row, "live_id": ""} for row in rows]
    pictures = [row["image"]["path"] for row in rows]
    titles = [row["title"] for row in rows] if reads_text else None

    evaluated: dict[str, dict[str, list[str]]] = {}
    add = Rankings.add

    def note(self, query, scores):
        add(self, query, scores)
        evaluated.setdefault(id(self), self.rankings)

    monkeypatch.setattr(Rankings, "add", note)
    scores = evaluate_retrieval(
        model,
        index_processor,
        Dataset.from_list(queries),
        Dataset.from_list(rows),
        scope="all",
        collator=RiceCollator(index_processor, use_text=reads_text),
        quiet=True,
    )
    books = dict(zip(scores, evaluated.values(), strict=True))
    retrieve = ProductRetrievalPipeline(model=model, processor=index_processor)
    index = GalleryIndex.build(model, index_processor, rows, progress=False, dtype="float32")
    for query in queries:
        frames, asr = [open_image(frame) for frame in query["frames"]], query["asr"] if reads_text else None
        expected = [int(image.removeprefix("p")) for image in books[kind][query["clip_id"]]]
        ranked = model.rank(frames, pictures, processor=index_processor, titles=titles, asr=asr)
        assert [entry["corpus_id"] for entry in ranked] == expected
        answers = retrieve([frames], candidates=pictures, titles=titles, asr=asr, top_k=10)[0]
        assert [answer["index"] for answer in answers] == expected
        clips = model.encode_clips(**index_processor(videos=[frames], asr=None if asr is None else [asr]))
        answer = index.search(clips, top_k=10)[0]
        assert [int(hit.image_id.removeprefix("p")) for hit in answer.hits] == expected
        assert [hit.score for hit in answer.hits] == pytest.approx([a["score"] for a in answers], abs=1e-4)

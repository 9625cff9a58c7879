"""Text in training: encoder and tokenizer of a run, the term's log and weight, and what it does not go with."""

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from data_rice.collator import RiceCollator
from evaluation_rice.protocol import RetrievalTask
from evaluation_rice.retrieval import Loading, ModelRetriever, add_text_scores, retrieve
from modeling_rice.scoring_rice import FusionWeights
from processing_rice import train_tokenizer
from tests.training_rice.texts import TEXT, WORDS
from training_rice.arguments import DataArguments, ModelArguments, RiceTrainingArguments
from training_rice.grad_cache import GradCache
from training_rice.recipe import check_model_fields
from training_rice.setup import build_model, build_rice_processor
from training_rice.text import check_text
from training_rice.trainer import RiceTrainer
from training_rice.validation import validate_together


def text_model(make_model, **settings):
    # As many entries as the session's tokenizer may have.
    return make_model(text_config=TEXT | {"vocab_size": 400}, text_score_weight=0.5, **settings)


class TestSetup:
    def test_a_new_encoder_has_the_vocabulary_of_the_new_tokenizer(self, model_settings):
        arguments = ModelArguments(model=model_settings | {"text_config": TEXT | {"max_position_embeddings": 24}})
        data = DataArguments(vocab_size=450, use_text=True, text_length=30)
        model = build_model(arguments, data)
        assert model.config.text_config.vocab_size == 450
        processor = build_rice_processor(arguments, data, model.config, WORDS)
        assert len(processor.tokenizer) <= 450 and processor.tokenizer.model_max_length == 24
        check_text(data, model.config, processor.tokenizer)
        # What a speech model writes is what was learned from.
        said, heard = processor(asr=["red dress"]), processor(asr=["Red Dress!"])
        assert said["asr_input_ids"].tolist() == heard["asr_input_ids"].tolist()

    @pytest.mark.parametrize("kind", ["roberta", "mpnet"])
    def test_positions_counted_from_the_padding_index_are_fewer(self, model_settings, kind):
        text = TEXT | {"model_type": kind, "max_position_embeddings": 24, "pad_token_id": 1}
        arguments = ModelArguments(model=model_settings | {"text_config": text})
        data = DataArguments(vocab_size=450, use_text=True, text_length=30)
        processor = build_rice_processor(arguments, data, build_model(arguments, data).config, WORDS)
        assert processor.tokenizer.model_max_length == 22

    def test_a_pretrained_text_encoder_includes_its_tokenizer(self, model_settings, tmp_path):
        tokenizer = train_tokenizer(["other words"] * 9, vocab_size=400)
        source = BertModel(BertConfig(vocab_size=400, **TEXT))
        source.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        arguments = ModelArguments(model=model_settings, init_text_from=str(tmp_path))
        model = build_model(arguments, DataArguments())
        expected = {name: value for name, value in source.state_dict().items() if not name.startswith("pooler.")}
        for name, value in model.text_model.model.state_dict().items():
            assert torch.equal(value, expected.pop(name))
        assert not expected
        processor = build_rice_processor(arguments, DataArguments(), model.config, WORDS)
        assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()

    def test_a_tokenizer_by_name(self, model_settings, tmp_path):
        train_tokenizer(["other words"] * 9, vocab_size=400).save_pretrained(tmp_path)
        data = DataArguments(tokenizer=str(tmp_path), text_length=10)
        config = build_model(ModelArguments(model=model_settings)).config
        tokenizer = build_rice_processor(ModelArguments(model=model_settings), data, config, WORDS).tokenizer
        assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tmp_path).get_vocab()
        assert tokenizer.model_max_length == 10

    def test_a_missing_tokenizer_is_refused(self, model_settings, tmp_path):
        BertConfig(vocab_size=400, **TEXT).save_pretrained(tmp_path / "bert")
        (tmp_path / "empty").mkdir()
        config = build_model(ModelArguments(model=model_settings)).config
        for folder, words in (
            ("bert", "bert has no tokenizer of its own; name a folder that holds tokenizer.json"),
            ("empty", "no tokenizer can be loaded from .*empty; name a folder"),
            ("none", "no tokenizer can be loaded from .*none; name a folder"),
        ):
            for arguments, data, name in (
                ({"init_text_from": str(tmp_path / folder)}, {}, "init_text_from"),
                ({}, {"tokenizer": str(tmp_path / folder)}, "tokenizer"),
            ):
                with pytest.raises(ValueError, match=f"^{name}: .*{words}") as error:
                    build_rice_processor(
                        ModelArguments(model=model_settings, **arguments), DataArguments(**data), config, WORDS
                    )
                assert "\n" not in str(error.value)

    def test_a_checkpoint_can_gain_and_lose_text(self, make_model, tmp_path):
        # A decoder with positions has one more with a title.
        make_model(decoder_position_embeddings=False).save_pretrained(tmp_path / "plain")
        section = {"text_config": TEXT, "text_score_weight": 1.0}
        arguments = ModelArguments(model_name_or_path=str(tmp_path / "plain"), model=section)
        model = build_model(arguments, DataArguments(vocab_size=420))
        assert model.config.text_config.vocab_size == 420 and model.text_projection is not None
        assert model.decoder.title_projection.weight.abs().max() > 0
        model.save_pretrained(tmp_path / "text")
        token = ModelArguments(model_name_or_path=str(tmp_path / "text"), model={"text_score_weight": None})
        assert build_model(token).text_projection is None
        section = {"text_score_weight": None, "text_config": None}
        again = build_model(ModelArguments(model_name_or_path=str(tmp_path / "text"), model=section))
        assert again.text_model is None and "decoder.asr_projection.weight" not in again.state_dict()

    def test_bad_input(self, make_model, model_settings, processor, tmp_path):
        with pytest.raises(ValueError, match="use_text needs a text encoder: set model.text_config"):
            check_text(DataArguments(use_text=True), make_model().config, processor.tokenizer)
        small = make_model(text_config=TEXT | {"vocab_size": 9}).config
        with pytest.raises(ValueError, match=r"the tokenizer has \d+ entries, but the text encoder has 9"):
            check_text(DataArguments(use_text=True), small, processor.tokenizer)
        both = ModelArguments(model=model_settings | {"text_config": TEXT}, init_text_from=str(tmp_path))
        with pytest.raises(ValueError, match="init_text_from and model.text_config both name"):
            build_model(both)
        with pytest.raises(ValueError, match="unknown field 'hidden_sise' of text_config .bert.*'hidden_size'"):
            check_model_fields({"text_config": {"hidden_sise": 3}})


def test_the_loss_falls_is_logged_and_the_weight_is_fitted(
    make_model, processor, text_pairs, text_validation, tmp_path
):
    model = text_model(make_model)
    args = RiceTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=40, per_device_train_batch_size=6,
        learning_rate=1e-2, logging_steps=5, save_strategy="no", seed=0, per_device_eval_batch_size=6,
        disable_tqdm=True,
    )  # fmt: skip
    collator = RiceCollator(processor, use_text=True)
    trainer = RiceTrainer(model, args, text_pairs, collator, eval_dataset=text_validation, processing_class=processor)
    trainer.train()
    losses = [entry["text_loss"] for entry in trainer.state.log_history if "text_loss" in entry]
    assert len(losses) == 8 and losses[-1] < 0.7 * losses[0]
    metrics = trainer.evaluate()
    assert metrics["eval_text_score_weight"] == model.config.text_score_weight
    assert metrics["eval_fused_text_weight"] == model.config.fused_text_weight >= 0
    # The figures are those of the model as it is now configured.
    queries, gallery, scope = text_validation
    task = RetrievalTask.from_datasets(queries, gallery, scope)
    arguments = (task, queries, gallery)
    weights = FusionWeights.of(model.config)
    loading = Loading(6, 0, quiet=True)
    rankings, _ = retrieve(ModelRetriever(model, collator), *arguments, loading=loading, weights=weights)
    assert set(rankings) == {"embedding", "matching", "fused"}
    for kind, ranked in rankings.items():
        assert ranked.summary()["R@1"] == metrics[f"eval_{kind}_R@1"]
    # Validated without text, the weight of matching goes with no text weight of before.
    trainer.eval_collator = RiceCollator(processor)
    bare = trainer.evaluate()
    assert "eval_fused_text_weight" not in bare and model.config.fused_text_weight is None


def test_a_run_with_noisy_asr_continues_to_the_same_losses(make_model, processor, text_pairs, tmp_path):

    def train(folder: str, workers: int = 0, **settings) -> list[float]:
        args = RiceTrainingArguments(
            output_dir=str(tmp_path / folder), use_cpu=True, report_to="none", max_steps=4, logging_steps=1, seed=0,
            per_device_train_batch_size=6, save_strategy="steps", save_steps=2, disable_tqdm=True,
            dataloader_num_workers=workers,
        )  # fmt: skip
        collator = RiceCollator(processor, use_text=True, asr_noise=0.5)
        trainer = RiceTrainer(text_model(make_model), args, text_pairs, collator, processing_class=processor)
        trainer.train(**settings)
        return [entry["text_loss"] for entry in trainer.state.log_history if "text_loss" in entry]

    whole = train("whole")
    assert len(whole) == 4 and all(loss > 0 for loss in whole)
    again = train("again", workers=1, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again == whole


def test_separate_text_scores_are_added_with_the_best_weight(make_model, processor, text_validation):
    queries, gallery, scope = text_validation
    task = RetrievalTask.from_datasets(queries, gallery, scope)
    scores = {
        query: {"visual": torch.zeros(6).numpy(), "text": torch.eye(6)[task.relevant_positions(query)[0]].numpy()}
        for query in range(5)
    }
    for values in scores.values():
        values["embedding"] = values["visual"] - values["text"]
    # The sixth could not be compared by its words.
    scores[5] = {"embedding": torch.zeros(6).numpy()}
    joined, weight = add_text_scores(task, scores)
    assert weight > 0 and joined[5] is scores[5]
    for query in range(5):
        assert joined[query]["embedding"].argmax() == task.relevant_positions(query)[0]
        assert joined[query]["visual"].max() == 0
    misleading = {query: {**values, "text": -values["text"]} for query, values in scores.items() if query < 5}
    for values in misleading.values():
        values["visual"] = -values["text"]
    assert add_text_scores(task, misleading)[1] == 0.0
    model = make_model()
    metrics, _, _ = validate_together(model, RiceCollator(processor), task, queries, gallery, Loading(6, 0, True))
    assert not {"text_score_weight", "fused_text_weight"} & metrics.keys()


class TestChunks:
    def test_text_tokens_work(self, make_model, processor, text_pairs):
        batch = RiceCollator(processor, use_text=True, asr_noise=0.5)([text_pairs[i] for i in range(6)])
        assert "asr_is_noise" in batch
        plain, chunked = (
            make_model(text_config=TEXT | {"vocab_size": 400}, matching_negatives="all").train() for _ in range(2)
        )
        plain(**batch).loss.backward()
        GradCache(2)(chunked, batch)
        for (name, expected), found in zip(plain.named_parameters(), chunked.parameters(), strict=True):
            if expected.grad is not None:
                torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-4, msg=name)
        assert chunked.text_model.model.embeddings.word_embeddings.weight.grad.abs().max() > 0

    def test_the_score_level_term_is_refused(self, make_model, processor, text_pairs, tmp_path):
        batch = RiceCollator(processor, use_text=True)([text_pairs[i] for i in range(6)])
        with pytest.raises(ValueError, match="grad_cache_chunk does not support the score-level text term"):
            GradCache(2)(text_model(make_model), batch)

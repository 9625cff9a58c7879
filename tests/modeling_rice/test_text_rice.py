"""Titles and ASR: their effect, and that a missing text has none."""

import pytest
import torch
from transformers import BertConfig, DistilBertConfig, MPNetConfig, RobertaConfig

from modeling_rice import RiceConfig, RiceGallery, RiceModel
from modeling_rice.loss_rice import contrastive_loss
from modeling_rice.text_rice import RiceTextEncoder, text_contrastive_loss

DOUBLE = torch.float64
TINY = {"vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TINY |= {"max_position_embeddings": 12, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXT = {"text_config": TINY, "text_score_weight": 0.5}
PRODUCTS = [1, 2, 1, 3, 2]


def texts(size: int, kind: str, missing: tuple[int, ...] = (), seed: int = 5) -> dict[str, torch.Tensor]:
    """Ids and masks of texts of 2 to 6 tokens; those of `missing` have none."""
    generator = torch.Generator().manual_seed(seed + (kind == "asr"))
    ids = torch.randint(4, 50, (size, 6), generator=generator)
    lengths = torch.tensor([6, 2, 4, 3, 5] * size)[:size].clone()
    lengths[list(missing)] = 0
    return {f"{kind}_input_ids": ids, f"{kind}_attention_mask": (torch.arange(6) < lengths[:, None]).long()}


@pytest.fixture
def make_text_batch(make_batch):
    """A function that draws a batch with titles and ASR, some of which are not there."""

    def make(size=5, no_title=(), no_asr=(), **settings):
        return make_batch(size, **settings) | texts(size, "title", no_title) | texts(size, "asr", no_asr)

    return make


def encode(model, batch):
    return model.encode_clips(**batch), model.encode_gallery(**batch)


class TestEncoder:
    @pytest.mark.parametrize("pooling", ["mean", "cls"])
    @pytest.mark.parametrize(
        "text_config",
        [
            BertConfig(**TINY),
            RobertaConfig(**TINY, pad_token_id=1),
            DistilBertConfig(vocab_size=50, dim=12, n_layers=1, n_heads=2, hidden_dim=16, max_position_embeddings=12),
        ],
        ids=["bert", "roberta", "distilbert"],
    )
    def test_is_the_library_model_pooled_over_its_own_tokens(self, make_config, text_config, pooling):
        config = make_config(text_config=text_config, text_pooling=pooling)
        encoder = RiceTextEncoder(config).eval()
        inputs = texts(5, "asr")
        features, present = encoder(inputs["asr_input_ids"], inputs["asr_attention_mask"])
        assert present.all() and features.shape == (5, 12)
        for row in range(5):
            length = int(inputs["asr_attention_mask"][row].sum())
            states = encoder.model(input_ids=inputs["asr_input_ids"][row : row + 1, :length]).last_hidden_state[0]
            expected = states[0] if pooling == "cls" else states.mean(dim=0)
            torch.testing.assert_close(features[row], expected, rtol=1e-4, atol=1e-5)

    def test_every_weight_has_a_gradient(self, make_model, make_text_batch):
        model = make_model(dtype=DOUBLE, **TEXT)
        model(**make_text_batch(dtype=DOUBLE)).loss.backward()
        names = [n for n, p in model.named_parameters() if n.startswith("text") and p.grad is None]
        assert not names and "text_model.model.pooler.dense.weight" not in model.state_dict()

    def test_without_a_mask_every_token_counts(self, make_model):
        encoder = make_model(**TEXT).text_model
        ids = texts(3, "title")["title_input_ids"]
        torch.testing.assert_close(encoder(ids)[0], encoder(ids, torch.ones_like(ids))[0])

    def test_texts_beyond_the_positions_are_refused(self, make_model, make_batch):
        model, batch = make_model(**TEXT), make_batch(2)
        ids = torch.ones(2, 13, dtype=torch.long)
        with pytest.raises(ValueError, match="The texts have 13 tokens, but the text encoder 12 positions"):
            model.encode_gallery(batch["pixel_values"], title_input_ids=ids)

    @pytest.mark.parametrize("config_class", [RobertaConfig, MPNetConfig])
    def test_positions_counted_from_the_padding_index_are_fewer(self, make_model, config_class):
        model = make_model(text_config=config_class(**TINY, pad_token_id=1))
        assert model.get_text_features(torch.full((1, 10), 5)).pooler_output.isfinite().all()
        with pytest.raises(ValueError, match="11 tokens, but the text encoder 10 positions; .* to at most 10"):
            model.get_text_features(torch.full((1, 11), 5))

    def test_the_text_side_of_a_two_tower_model_is_used(self, make_config):
        config = make_config(text_config={"model_type": "clip", "text_config": {"hidden_size": 24}})
        assert config.text_config.model_type == "clip_text_model" and config.text_width == 24


class TestMissing:
    """Attention masks of zeros, in the model whose every text parameter matters."""

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_without_any_text_scores_are_those_of_the_model_without_text(
        self, make_model, make_text_batch, implementation
    ):
        model, batch = (
            make_model(dtype=DOUBLE, **TEXT),
            make_text_batch(dtype=DOUBLE, no_title=range(5), no_asr=range(5)),
        )
        model.set_attn_implementation(implementation)
        plain = RiceModel(
            RiceConfig.from_dict(model.config.to_dict() | {"text_config": None, "text_score_weight": None})
        )
        plain = plain.to(DOUBLE).eval()
        plain.set_attn_implementation(implementation)
        plain.load_state_dict(
            {
                name: value[: plain.state_dict()[name].shape[0]] if "position_embedding" in name else value
                for name, value in model.state_dict().items()
                if name in plain.state_dict()
            }
        )
        (clips, gallery), (plain_clips, plain_gallery) = encode(model, batch), encode(plain, batch)
        assert torch.equal(model.similarity(clips, gallery), plain.similarity(plain_clips, plain_gallery))
        torch.testing.assert_close(model.match(clips, gallery), plain.match(plain_clips, plain_gallery))
        output, expected = model(**batch), plain(**batch)
        assert output.text_loss == 0
        torch.testing.assert_close(output.loss, expected.loss)

    def test_a_missing_text_affects_only_its_row(self, make_model, make_text_batch):
        model = make_model(dtype=DOUBLE, **TEXT)
        whole = encode(model, make_text_batch(dtype=DOUBLE))
        some = encode(model, make_text_batch(dtype=DOUBLE, no_title=(1,), no_asr=(3,)))
        none = encode(model, make_text_batch(dtype=DOUBLE, no_title=range(5), no_asr=range(5)))
        for scores in (model.similarity, model.match):
            with_all, with_some, without = (scores(*features) for features in (whole, some, none))
            rows, columns = [0, 1, 2, 4], [0, 2, 3, 4]
            torch.testing.assert_close(with_some[rows][:, columns], with_all[rows][:, columns])
            torch.testing.assert_close(with_some[3, 1], without[3, 1])
            assert (with_some[3] - with_all[3]).abs().max() > 1e-4
            assert (with_some[:, 1] - with_all[:, 1]).abs().max() > 1e-4
        assert (model.text_similarity(*some)[3] == 0).all() and (model.text_similarity(*some)[:, 1] == 0).all()

    def test_masked_tokens_have_no_influence(self, make_model, make_text_batch):
        model, batch = make_model(dtype=DOUBLE, **TEXT), make_text_batch(dtype=DOUBLE, no_asr=(2,))
        other = dict(batch)
        for kind in ("title", "asr"):
            hidden = batch[f"{kind}_attention_mask"] == 0
            other[f"{kind}_input_ids"] = batch[f"{kind}_input_ids"].masked_fill(hidden, 7)
        torch.testing.assert_close(model(**other).loss, model(**batch).loss)

    def test_gradient_flows_only_where_there_is_text(self, make_model, make_text_batch):
        model, batch = make_model(dtype=DOUBLE, **TEXT), make_text_batch(dtype=DOUBLE, no_title=(1,), no_asr=(3,))
        embedding, seen = model.text_model.model.embeddings, []
        embedding.register_forward_hook(lambda module, inputs, output: output.retain_grad() or seen.append(output))
        model(**batch).loss.backward()
        for states, missing in zip(seen, (1, 3), strict=True):
            touched = states.grad.abs().sum(dim=(1, 2)) > 0
            assert touched.tolist() == [row != missing for row in range(5)]

    def test_zero_vectors_count_as_missing_text(self, make_model, make_batch):
        model = make_model(dtype=DOUBLE, text_embed_dim=6, text_score_weight=0.5)
        batch = make_batch(dtype=DOUBLE, text_dim=6)
        empty = batch | {name: torch.zeros_like(batch[name]) for name in ("title_embeds", "asr_embeds")}
        bare = {name: value for name, value in batch.items() if not name.endswith("_embeds")}
        torch.testing.assert_close(model(**empty).matching_logits, model(**bare).matching_logits)
        clips, gallery = encode(model, batch)
        expected = torch.nn.functional.cosine_similarity(batch["asr_embeds"][:, None], batch["title_embeds"][None], -1)
        torch.testing.assert_close(model.text_similarity(clips, gallery), expected.float())


class TestScore:
    def test_is_the_weighted_sum_of_two_cosines(self, make_model, make_text_batch):
        model, batch = make_model(**TEXT), make_text_batch()
        clips, gallery = encode(model, batch)
        visual = clips.embeds @ gallery.embeds.T
        said = clips.text_embeds @ gallery.text_embeds.T
        assert said.std() > 1e-2
        torch.testing.assert_close(model.similarity(clips, gallery), visual + 0.5 * said)
        torch.testing.assert_close(model.similarity(clips, gallery, text_weight=2.0), visual + 2 * said)
        torch.testing.assert_close(model.similarity(clips, gallery, text_weight=0.0), visual)
        model.config.text_score_weight = 3.0
        torch.testing.assert_close(model.similarity(clips, gallery), visual + 3 * said)

    def test_needs_both_sides(self, make_model, make_text_batch, make_batch):
        model, batch = make_model(**TEXT), make_text_batch()
        clips, gallery = encode(model, make_batch())[0], model.encode_gallery(**batch)
        assert clips.text_embeds is None and model.text_similarity(clips, gallery) is None
        torch.testing.assert_close(model.similarity(clips, gallery), clips.embeds @ gallery.embeds.T)

    def test_token_and_score_can_be_used_separately(self, make_model, make_text_batch):
        batch = make_text_batch()
        token = make_model(text_config=TINY)
        assert token.text_projection is None and encode(token, batch)[0].text_embeds is None
        assert token(**batch).text_loss is None
        score = make_model(decoder_text_tokens=False, **TEXT)
        assert "decoder.asr_projection.weight" not in score.state_dict()
        clips, gallery = encode(score, batch)
        shuffled = batch | {name: batch[name].flip(0) for name in batch if name.startswith("asr")}
        assert torch.equal(score.match(score.encode_clips(**shuffled), gallery), score.match(clips, gallery))
        clips, gallery = encode(token, batch)
        difference = token.match(token.encode_clips(**shuffled), gallery) - token.match(clips, gallery)
        assert difference.abs().max() > 1e-4

    def test_wrong_asr_moves_no_score_by_more_than_its_weight(self, make_model, make_text_batch):
        """Twice the weight bounds the difference of the score, whatever is said."""
        model, batch = make_model(**TEXT), make_text_batch()
        clips, gallery = encode(model, batch)
        for seed in range(5):
            wrong = model.encode_clips(**(batch | texts(5, "asr", seed=seed)))
            assert torch.equal(wrong.embeds, clips.embeds)
            moved = model.similarity(wrong, gallery) - model.similarity(clips, gallery)
            assert 1e-4 < moved.abs().max() <= 2 * 0.5

    def test_survives_storage(self, make_model, make_text_batch, tmp_path):
        model, batch = make_model(**TEXT), make_text_batch(no_title=(2,))
        clips, gallery = encode(model, batch)
        gallery.save(tmp_path / "gallery.safetensors")
        stored = RiceGallery.cat([RiceGallery.load(tmp_path / "gallery.safetensors")[:2], gallery[2:]])
        assert torch.equal(model.similarity(clips, stored), model.similarity(clips, gallery))
        model.save_pretrained(tmp_path / "model")
        loaded = RiceModel.from_pretrained(tmp_path / "model").eval()
        assert torch.equal(loaded.similarity(*encode(loaded, batch)), model.similarity(clips, gallery))
        assert loaded.fingerprint() == model.fingerprint() == gallery.model_fingerprint

    def test_the_fingerprint_includes_the_text_encoder_but_not_the_weight(self, make_model):
        model = make_model(**TEXT)
        before = model.fingerprint()
        assert make_model(text_config=TINY, text_score_weight=2.0).fingerprint() == before
        with torch.no_grad():
            model.text_model.model.embeddings.word_embeddings.weight.mul_(2)
        assert model.fingerprint() != before

    def test_negatives_are_mined_by_image_and_text(self, make_model, make_text_batch):
        batch = make_text_batch(dtype=DOUBLE)
        for weight in (0.0, 0.5, 100.0):
            model = make_model(dtype=DOUBLE, text_config=TINY, text_score_weight=weight, num_hard_negatives=2)
            clips, gallery = encode(model, batch)
            scores = model.similarity(clips, gallery).T.fill_diagonal_(-torch.inf)
            hardest = scores.argsort(dim=1, descending=True)[:, :2]
            assert torch.equal(model(**batch).matching_indices[:, 1:], hardest)


class TestLoss:
    def test_is_the_contrastive_loss_where_every_text_is_there(self, make_model, make_text_batch):
        for targets in ("diagonal", "masked", "multi_positive"):
            model = make_model(dtype=DOUBLE, contrastive_targets=targets, **TEXT)
            batch = make_text_batch(dtype=DOUBLE, product_ids=PRODUCTS)
            clips, gallery = (model.encode_clips(**batch), model.encode_gallery(**batch))
            embeds, scale = (gallery.text_embeds, clips.text_embeds), model.text_logit_scale.exp()
            expected = contrastive_loss(*embeds, scale, batch["product_ids"], targets=targets)
            output = model(**batch)
            torch.testing.assert_close(output.text_loss, expected)
            terms = output.contrastive_loss + output.matching_loss + 0.05 * output.reconstruction_loss
            torch.testing.assert_close(output.loss, terms + output.text_loss)

    @pytest.mark.parametrize("targets", ["diagonal", "masked", "multi_positive"])
    def test_leaves_out_what_is_missing(self, targets):
        """Against a plain loop over pairs; pair 1 has no title and pair 4 no ASR."""
        torch.manual_seed(0)
        titles, asr = torch.nn.functional.normalize(torch.randn(2, 5, 8, dtype=DOUBLE), dim=-1)
        titles, asr = titles.clone(), asr.clone()
        titles[1], asr[4] = 0, 0
        products = torch.tensor(PRODUCTS)
        losses = []
        for here, there in ((titles, asr), (asr, titles)):
            for i in (0, 2, 3):
                columns = [j for j in range(5) if there[j].any()]
                if targets == "masked":
                    columns = [j for j in columns if j == i or products[j] != products[i]]
                logits = torch.stack([7.0 * here[i] @ there[j] for j in columns])
                wanted = [n for n, j in enumerate(columns) if j == i]
                if targets == "multi_positive":
                    wanted = [n for n, j in enumerate(columns) if products[j] == products[i]]
                losses.append(-logits.log_softmax(0)[wanted].mean())
        expected = torch.stack(losses).mean()
        found = text_contrastive_loss(titles, asr, 7.0, products, targets=targets)
        torch.testing.assert_close(found, expected)
        blocks = [text_contrastive_loss(titles, asr, 7.0, products, slice(i, i + 1), targets) for i in range(5)]
        torch.testing.assert_close(torch.stack(blocks).mean(), expected)

    def test_noisy_asr_is_missing_for_the_text_loss_but_not_for_the_other_losses(self, make_model, make_text_batch):
        settings = {"contrastive_targets": "multi_positive", "matching_negatives": "all", **TEXT}
        model, batch = make_model(dtype=DOUBLE, **settings), make_text_batch(dtype=DOUBLE, product_ids=PRODUCTS)
        noise = torch.tensor([False, True, False, True, False])
        plain, noisy = model(**batch), model(**batch, asr_is_noise=noise)
        missing = model(**make_text_batch(dtype=DOUBLE, product_ids=PRODUCTS, no_asr=(1, 3)))
        torch.testing.assert_close(noisy.text_loss, missing.text_loss)
        assert (noisy.text_loss - plain.text_loss).abs() > 1e-3
        assert torch.equal(noisy.matching_loss, plain.matching_loss)
        assert (noisy.matching_loss - missing.matching_loss).abs() > 1e-6
        none = model(**batch, asr_is_noise=torch.ones(5, dtype=torch.bool))
        assert none.text_loss == 0 and torch.isfinite(none.loss)
        # Blocks of rows, as several processes have them, average to the whole.
        texts = (model.encode_gallery(**batch).text_embeds, model.encode_clips(**batch).text_embeds)
        blocks = [model.text_loss(texts, batch["product_ids"], slice(i, i + 1), noise) for i in range(5)]
        torch.testing.assert_close(torch.stack(blocks).mean(), noisy.text_loss)

    def test_training_aligns_asr_and_title(self, make_model, make_text_batch):
        model, batch = make_model(**TEXT).train(), make_text_batch()
        optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if n.startswith("text")], lr=0.01)
        losses = []
        for _ in range(30):
            output = model(**batch)
            optimizer.zero_grad()
            output.text_loss.backward()
            optimizer.step()
            losses.append(output.text_loss.item())
        assert losses[-1] < 0.2 * losses[0]
        model.eval()
        assert model.text_similarity(*encode(model, batch)).argmax(dim=1).tolist() == list(range(5))

    def test_the_temperature_is_bounded(self, make_model):
        model = make_model(**TEXT)
        with torch.no_grad():
            model.text_logit_scale.fill_(9.0)
        model.bound_logit_scale()
        assert model.text_logit_scale.exp().item() == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_config": TINY, "text_embed_dim": 6}, "`text_config` and `text_embed_dim` exclude each other"),
        (
            {"text_config": {"model_type": "t5"}},
            "`text_config` is a 't5', which is not a text encoder that RICE can use",
        ),
        ({"text_score_weight": 1.0}, "`text_score_weight` needs text features"),
        ({**TEXT, "text_score_weight": -1.0}, "`text_score_weight` must be 0 or more, got -1"),
        ({**TEXT, "fused_text_weight": -0.5}, "`fused_text_weight` must be 0 or more, got -0.5"),
        ({**TEXT, "text_logit_scale_init_value": 0}, "`text_logit_scale_init_value` must be above 0"),
    ],
)
def test_settings_that_cannot_work(make_config, settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(**settings)


@pytest.mark.parametrize("vectors", [torch.ones(5, 5), torch.ones(5, 1, 6), torch.ones(6)])
def test_vectors_of_another_shape_are_refused(make_model, make_batch, vectors):
    with pytest.raises(ValueError, match=r"`title_embeds` must be \(n, 6\), .* got shape"):
        make_model(text_embed_dim=6)(**make_batch(), title_embeds=vectors)
    with pytest.raises(ValueError, match="`asr_embeds` must be a tensor, got a ndarray"):
        make_model(text_embed_dim=6)(**make_batch(), asr_embeds=vectors.numpy())


def test_titles_and_asr_may_differ_in_precision(make_model, make_batch):
    model, batch = make_model(text_embed_dim=6, text_score_weight=0.5), make_batch(text_dim=6)
    mixed = {**batch, "title_embeds": batch["title_embeds"].double(), "asr_embeds": batch["asr_embeds"].half()}
    torch.testing.assert_close(model(**mixed).loss, model(**batch).loss, rtol=1e-2, atol=1e-2)
    vectors = torch.randn(3, 12)
    half = make_model(**TEXT, dtype=torch.float16)
    expected = make_model(**TEXT).get_text_features(title_embeds=vectors).pooler_output
    torch.testing.assert_close(
        half.get_text_features(title_embeds=vectors).pooler_output, expected, rtol=1e-2, atol=1e-2
    )

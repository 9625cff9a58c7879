"""The fast decoder, its losses and PFR against a plain twin, forward and backward.

The twin is the published procedure with nothing shared between pairs: every frame is encoded by itself, every pair
runs the decoder by itself over all its query rows, keys and values are projected anew for each pair, masked keys are
left out instead of biased, heads are a loop.
"""

import math
import threading

import pytest
import torch

from modeling_rice import RiceModel

DOUBLE = torch.float64
VARIANTS = {
    "clip4clip": {"preset": "clip4clip"},
    "clip4clip, padding masked": {"preset": "clip4clip", "mask_padded_frames": True},
    "mmf": {"preset": "mmf"},
    "mmf, padding masked": {"preset": "mmf", "reconstruction_softmax_over_padding": False},
    "deeper": {"decoder_num_self_layers": 2, "decoder_intermediate_size": 24},
    "no self block": {"decoder_num_self_layers": 0, "decoder_token_source": "raw"},
}


def plain_norm(x, module):
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias


def plain_linear(x, module):
    y = x @ module.weight.T
    return y if module.bias is None else y + module.bias


def plain_activation(x, name):
    return {"quick_gelu": lambda: x * torch.sigmoid(1.702 * x), "relu": lambda: x.clamp(min=0)}[name]()


def plain_attention(queries, keys, keep, module):
    """Rows (L, d) over keys (S, d) -> context (L, d), probabilities (H, L, S) that are zero where masked."""
    query, key, value = (
        plain_linear(x, getattr(module, f"{name}_proj")) for name, x in (("q", queries), ("k", keys), ("v", keys))
    )
    heads, size = [], query.shape[1] // module.num_heads
    probabilities = query.new_zeros(module.num_heads, len(query), len(keys))
    for head in range(module.num_heads):
        part = slice(head * size, (head + 1) * size)
        scores = query[:, part] @ key[keep][:, part].T / math.sqrt(size)
        exponentials = (scores - scores.max(dim=1, keepdim=True).values).exp()
        weights = exponentials / exponentials.sum(dim=1, keepdim=True)
        probabilities[head, :, keep] = weights
        heads.append(weights @ value[keep][:, part])
    return torch.cat(heads, dim=1), probabilities


def plain_mlp(x, layer, config):
    hidden = plain_activation(plain_linear(plain_norm(x, layer.layer_norm2), layer.mlp.fc1), config.decoder_hidden_act)
    return x + plain_linear(hidden, layer.mlp.fc2)


def plain_pair(model, image_tokens, clip_tokens, keep, title=None, asr=None):
    """One image (1 + P, d) against one clip (S, d) -> score, attention (H, L, S)."""
    config, decoder = model.config, model.decoder
    if title is not None:
        image_tokens = torch.cat([image_tokens, plain_linear(title[None], decoder.title_projection)])
    if asr is not None:
        clip_tokens = torch.cat([clip_tokens, plain_linear(asr[None], decoder.asr_projection)])
        keep = torch.cat([keep, torch.ones(1, dtype=torch.bool)])
    x = image_tokens
    if config.decoder_position_embeddings:
        x = x + decoder.position_embedding.weight[: len(x)]
    for layer in decoder.self_layers:
        normed = plain_norm(x, layer.layer_norm1)
        context, _ = plain_attention(normed, normed, torch.ones(len(x), dtype=torch.bool), layer.attention)
        x = plain_mlp(x + plain_linear(context, layer.attention.out_proj), layer, config)
    cross = decoder.cross_layer
    keys = plain_norm(clip_tokens, cross.layer_norm1) if config.decoder_normalize_key_value else clip_tokens
    context, attention = plain_attention(plain_norm(x, cross.layer_norm1), keys, keep, cross.attention)
    if config.decoder_output_projection:
        context = plain_linear(context, cross.attention.out_proj)
    x = plain_mlp(x + context, cross, config)
    pooled = plain_linear(plain_norm(x, decoder.head.layer_norm)[0], decoder.head.dense)
    pooled = plain_activation(pooled, config.pooler_act)
    weight = decoder.head.score.weight[0]
    if config.matching_score == "cosine":
        return (pooled @ weight) / (pooled.norm() * weight.norm()), attention
    return pooled @ weight + decoder.head.score.bias[0], attention


def plain_encode(model, pixels, patch_mask=None):
    """One picture (3, H, W) -> decoder tokens (1 + P, d) and its projected class token (D)."""
    kwargs = {}
    if patch_mask is not None:
        keep = torch.cat([torch.ones(1, dtype=torch.bool), patch_mask])
        bias = torch.zeros(len(keep), dtype=pixels.dtype).masked_fill(~keep, -torch.inf)
        kwargs["attention_mask"] = bias[None, None, None]
    states = model.vision_model(pixels[None], **kwargs).last_hidden_state[0]
    projected = plain_norm(states, model.vision_model.post_layernorm) @ model.visual_projection.weight.T
    return (projected if model.config.decoder_token_source == "projected" else states), projected[0]


def plain_clip(model, frames, frame_mask, patch_mask):
    """One clip (T, 3, H, W) -> tokens (T * (1 + P), d), their mask, embedding (D)."""
    config, tokens, keep, features = model.config, [], [], []
    count_padding = patch_mask is not None and not config.mask_padded_frames
    for t, frame in enumerate(frames):
        real = bool(frame_mask[t])
        if not real and not count_padding:
            tokens.append(None)
            keep.append(None)
            continue
        mask = None if patch_mask is None else patch_mask[t]
        frame_tokens, feature = plain_encode(model, frame, mask)
        tokens.append(frame_tokens)
        patches = torch.ones(len(frame_tokens) - 1, dtype=torch.bool) if mask is None else mask
        keep.append(torch.cat([torch.ones(1, dtype=torch.bool), patches]))
        if real:
            features.append(feature / feature.norm() if config.normalize_frames else feature)
    blank = next(x for x in tokens if x is not None)
    tokens = [torch.zeros_like(blank) if x is None else x for x in tokens]
    keep = [torch.zeros(len(blank), dtype=torch.bool) if x is None else x for x in keep]
    embedding = torch.stack(features).mean(dim=0)
    return torch.cat(tokens), torch.cat(keep), embedding / embedding.norm()


def plain_reconstruction(model, image_tokens, clip_tokens, keep, attention):
    """Squared error of one positive pair, mean over patches and features."""
    config, head = model.config, model.reconstruction_head
    width = len(image_tokens)
    attention = attention[:, :width, : len(clip_tokens)]
    columns = torch.arange(len(clip_tokens))
    if not config.reconstruction_include_cls:
        attention, image_tokens = attention[:, 1:], image_tokens[1:]
        columns = columns[columns % width != 0]
    attention, clip_tokens, keep = attention[:, :, columns], clip_tokens[columns], keep[columns]
    if config.reconstruction_scale_attention:
        attention = attention * math.sqrt(config.decoder_hidden_size / config.decoder_num_heads)
    hidden = torch.einsum("oh,hps->ops", head.conv1.weight[:, :, 0, 0], attention) + head.conv1.bias[:, None, None]
    weights = torch.einsum("h,hps->ps", head.conv2.weight[0, :, 0, 0], hidden.clamp(min=0)) + head.conv2.bias
    weights = weights.clamp(min=0)
    if config.reconstruction_softmax:
        counted = torch.ones_like(keep) if config.reconstruction_softmax_over_padding else keep
        exponentials = weights.exp() * counted
        weights = exponentials / exponentials.sum(dim=1, keepdim=True)
    reconstruction = weights @ (clip_tokens * keep[:, None]).detach()
    return ((reconstruction - image_tokens.detach()) ** 2).mean()


def plain_cross_entropy(logits, target):
    return torch.logsumexp(torch.stack(logits), dim=0) - logits[target]


def plain_losses(model, batch):
    """Contrastive, matching and reconstruction loss, pair by pair."""
    config, size = model.config, len(batch["pixel_values"])
    images = [plain_encode(model, pixels) for pixels in batch["pixel_values"]]
    image_embeds = [feature / feature.norm() for _, feature in images]
    clips = [
        plain_clip(model, batch["pixel_values_videos"][i], batch["frame_mask"][i], _row(batch.get("patch_mask"), i))
        for i in range(size)
    ]
    products = batch.get("product_ids", torch.arange(size)).tolist()

    def negatives_of(targets):
        """Of every image, or of every clip: the other pairs, those of its product left out unless `"diagonal"`."""
        masked = targets == "masked"
        return [
            [j for j in range(size) if j != i and not (masked and products[j] == products[i])] for i in range(size)
        ]

    cosine = [[image_embeds[i] @ clips[j][2] for j in range(size)] for i in range(size)]
    pairs = {}

    def pair(i, j):
        if (i, j) not in pairs:
            title, asr = _row(batch.get("title_embeds"), i), _row(batch.get("asr_embeds"), j)
            pairs[i, j] = plain_pair(model, images[i][0], clips[j][0], clips[j][1], title, asr)
        return pairs[i, j]

    def symmetric(score, negatives):
        terms = [plain_cross_entropy([score(i, i), *(score(i, j) for j in negatives[i])], 0) for i in range(size)]
        terms += [plain_cross_entropy([score(j, j), *(score(i, j) for i in negatives[j])], 0) for j in range(size)]
        return sum(terms) / (2 * size)

    scale = model.logit_scale.exp()
    contrastive = symmetric(lambda i, j: scale * cosine[i][j], negatives_of(config.contrastive_targets))
    negatives = negatives_of(config.matching_targets)
    if config.matching_negatives == "all":
        matching = symmetric(lambda i, j: config.matching_scale * pair(i, j)[0], negatives)
    else:
        matching = 0.0
        for i in range(size):
            hardest = sorted(negatives[i], key=lambda j: -cosine[i][j].item())[: config.num_hard_negatives]
            logits = [config.matching_scale * pair(i, j)[0] for j in [i, *hardest]]
            matching = matching + plain_cross_entropy(logits, 0) / size
    reconstruction = sum(
        plain_reconstruction(model, images[i][0], clips[i][0], clips[i][1], pair(i, i)[1]) for i in range(size)
    )
    return contrastive, matching, reconstruction / size


def _row(tensor, i):
    return None if tensor is None else tensor[i]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def assert_same_gradients(actual, expected):
    """Gradients that are mathematically zero are rounding noise on both sides, so the scale is the whole model's."""
    assert actual.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in actual.items():
        difference = (gradient - expected[name]).abs().max() / largest
        assert difference < 1e-10, f"{name}: {difference:.1e}"


@pytest.mark.parametrize("text_dim", [None, 6], ids=["", "text"])
@pytest.mark.parametrize("patch_mask", [False, True], ids=["", "boxes"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_of_all_pairs_equal_the_plain_procedure(make_model, make_batch, variant, patch_mask, text_dim):
    model = make_model(dtype=DOUBLE, text_embed_dim=text_dim, **VARIANTS[variant])
    batch = make_batch(4, dtype=DOUBLE, patch_mask=patch_mask, text_dim=text_dim)
    actual = model(**batch, return_loss=False).matching_logits.T / model.config.matching_scale

    clips = [
        plain_clip(model, batch["pixel_values_videos"][j], batch["frame_mask"][j], _row(batch.get("patch_mask"), j))
        for j in range(4)
    ]
    images = [plain_encode(model, pixels)[0] for pixels in batch["pixel_values"]]
    expected = torch.stack(
        [
            torch.stack(
                [
                    plain_pair(
                        model,
                        images[i],
                        clips[j][0],
                        clips[j][1],
                        _row(batch.get("title_embeds"), i),
                        _row(batch.get("asr_embeds"), j),
                    )[0]
                    for j in range(4)
                ]
            )
            for i in range(4)
        ]
    )
    assert expected.std() > 1e-4
    assert_same(actual, expected)
    direction = torch.randn(4, 4, dtype=DOUBLE)
    assert_same_gradients(gradients(model, (actual * direction).sum()), gradients(model, (expected * direction).sum()))


@pytest.mark.parametrize("products", [None, [3, 1, 3, 2, 4]], ids=["", "repeated product"])
@pytest.mark.parametrize("negatives", ["hardest", "all"])
@pytest.mark.parametrize("preset", ["clip4clip", "mmf", None])
def test_losses_equal_the_plain_procedure(make_model, make_batch, preset, negatives, products):
    model = make_model(preset, dtype=DOUBLE, matching_negatives=negatives, num_hard_negatives=2, text_embed_dim=6)
    batch = make_batch(5, dtype=DOUBLE, patch_mask=preset != "mmf", text_dim=6, product_ids=products)
    output = model(**batch)
    terms = (output.contrastive_loss, output.matching_loss, output.reconstruction_loss)
    plain = plain_losses(model, batch)
    for actual, expected in zip(terms, plain, strict=True):
        assert_same(actual, expected)
    weights = [getattr(model.config, f"{n}_loss_weight") for n in ("contrastive", "matching", "reconstruction")]
    total = sum(weight * term for weight, term in zip(weights, plain, strict=True))
    assert_same(output.loss, total)
    fast = gradients(model, output.loss)
    assert_same_gradients(fast, gradients(model, total))
    for name in ("decoder.head.score.weight", "reconstruction_head.conv1.weight", "decoder.title_projection.weight"):
        assert fast[name].abs().max() > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_reconstruction_gradients_equal_the_plain_procedure(make_model, make_batch, variant):
    model = make_model(dtype=DOUBLE, **VARIANTS[variant])
    batch = make_batch(3, dtype=DOUBLE, patch_mask="mmf" not in variant)
    if model.config.matching_negatives == "hardest":
        model.config.num_hard_negatives = 1
    expected = plain_losses(model, batch)[2]
    actual = model(**batch).reconstruction_loss
    assert_same(actual, expected)
    fast = gradients(model, actual)
    assert_same_gradients(fast, gradients(model, expected))
    assert fast["decoder.cross_layer.attention.q_proj.weight"].abs().max() > 0
    assert "decoder.head.score.weight" not in fast


def test_with_few_negatives_no_product_is_repeated(make_model, make_batch):
    model = make_model(dtype=DOUBLE, num_hard_negatives=3)
    batch = make_batch(5, dtype=DOUBLE, product_ids=[1, 1, 1, 2, 3])
    output = model(**batch)
    assert_same(output.matching_loss, plain_losses(model, batch)[1])
    probabilities = output.matching_logits.softmax(dim=1)
    assert (probabilities[:3] > 0).sum(dim=1).tolist() == [3, 3, 3]


@pytest.mark.parametrize("preset", ["clip4clip", "mmf"])
def test_match_equals_forward_with_any_chunk_size(make_model, make_batch, preset):
    model = make_model(preset, text_embed_dim=6)
    batch = make_batch(7, frames=4, patch_mask=preset == "clip4clip", text_dim=6)
    gallery = model.encode_gallery(batch["pixel_values"], batch["title_embeds"], batch_size=3)
    clips = model.encode_clips(
        batch["pixel_values_videos"], batch["frame_mask"], batch.get("patch_mask"), batch["asr_embeds"], batch_size=2
    )
    scores = model.match(clips, gallery)
    assert scores.shape == (7, 7) and scores.dtype == torch.float32 and not scores.requires_grad
    expected = model(**batch, return_loss=False).matching_logits / model.config.matching_scale
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    for max_memory in (1, 30_000, 200_000):
        torch.testing.assert_close(model.match(clips, gallery, max_memory=max_memory), scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.match(clips[2:3], gallery[[5, 1]]), scores[2:3, [5, 1]], rtol=1e-5, atol=1e-6)


def test_match_uses_chunks_that_fit_into_memory(make_model, make_batch):
    model, batch = make_model(), make_batch(6)
    gallery = model.encode_gallery(batch["pixel_values"])
    clips = model.encode_clips(batch["pixel_values_videos"], batch["frame_mask"])
    pieces = []
    score_pairs = model.decoder.score_pairs
    model.decoder.score_pairs = lambda states, keys, *rest: (
        pieces.append(len(states) * len(keys)) or score_pairs(states, keys, *rest)
    )
    model.match(clips, gallery, max_memory=1)
    assert pieces == [1] * 36
    pieces.clear()
    model.match(clips, gallery)
    assert pieces == [36]


def test_match_refuses_what_it_cannot_do_exactly(make_model, make_batch):
    batch = make_batch(2)
    model = make_model()
    gallery = model.encode_gallery(batch["pixel_values"])
    clips = model.encode_clips(batch["pixel_values_videos"], batch["frame_mask"])
    with pytest.raises(ValueError, match="eval mode"):
        model.train().match(clips, gallery)
    without = make_model(use_decoder=False)
    with pytest.raises(ValueError, match="no matching decoder"):
        without.match(clips, gallery)
    with pytest.raises(ValueError, match="from a model without a matching decoder"):
        model.eval().match(clips, without.encode_gallery(batch["pixel_values"]))


def test_match_is_allowed_in_training_mode_without_dropout(make_model, make_batch):
    batch = make_batch(2)
    model = make_model(decoder_dropout=0.0)
    gallery = model.encode_gallery(batch["pixel_values"])
    clips = model.encode_clips(batch["pixel_values_videos"], batch["frame_mask"])
    assert torch.equal(model.train().match(clips, gallery), model.eval().match(clips, gallery))


def test_dropout_acts_in_training_only(make_model, make_batch):
    model, batch = make_model(decoder_dropout=0.5), make_batch(4)
    assert torch.equal(model(**batch).matching_logits, model(**batch).matching_logits)
    model.train()
    assert not torch.equal(model(**batch).matching_logits, model(**batch).matching_logits)


@pytest.mark.parametrize("preset", ["clip4clip", "mmf"])
def test_matching_scores_have_no_ties_in_half_precision(make_model, preset):
    head, states = make_model(preset).decoder.head, torch.randn(500, 16 if preset == "clip4clip" else 32)
    with torch.no_grad():
        exact = head(states)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = head(states)
        half = head.bfloat16()(states.bfloat16())
    for scores in (autocast, half):
        assert scores.dtype == torch.float32 and scores.unique().numel() > 490
        torch.testing.assert_close(scores, exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_cosine_with_a_state_of_zeros_is_zero(make_model, dtype):
    head = make_model("mmf", dtype=dtype).decoder.head
    with torch.no_grad():
        head.dense.weight.zero_()
    assert head(torch.randn(3, 32, dtype=dtype)).tolist() == [0, 0, 0]


def test_eager_and_sdpa_agree(make_model, make_batch):
    model, batch = make_model(dtype=DOUBLE), make_batch(4, dtype=DOUBLE, patch_mask=True)
    sdpa = model(**batch)
    model.set_attn_implementation("eager")
    # transformers' eager CLIP takes its softmax in single precision; RICE's own layers keep the double.
    model.vision_model.set_attn_implementation("sdpa")
    assert model.decoder.config._attn_implementation == "eager"
    eager = model(**batch)
    assert_same(eager.loss, sdpa.loss)
    assert_same(eager.matching_logits, sdpa.matching_logits)
    assert_same_gradients(gradients(model, eager.loss), gradients(model, sdpa.loss))


def test_text_vectors_need_a_model_that_takes_them(make_model, make_batch):
    model, batch = make_model(), make_batch(2, text_dim=6)
    with pytest.raises(ValueError, match="`title_embeds` was given, but the model has no `text_embed_dim`"):
        model.encode_gallery(batch["pixel_values"], batch["title_embeds"])
    with pytest.raises(ValueError, match="`asr_embeds` was given"):
        model.encode_clips(batch["pixel_values_videos"], asr_embeds=batch["asr_embeds"])


def test_more_tokens_than_positions_is_refused(make_model, make_batch):
    model = make_model(decoder_max_position_embeddings=10)
    with pytest.raises(ValueError, match="17 tokens but the decoder 10 positions"):
        model.encode_gallery(make_batch(1)["pixel_values"])


class ThreadGather:
    """Processes as threads of one autograd graph: what is gathered is live, so gradients cross over exactly."""

    def __init__(self, rank, barrier, board):
        self.rank, self.barrier, self.board = rank, barrier, board

    def __call__(self, tensor):
        self.board[self.rank] = tensor
        self.barrier.wait(timeout=30)
        gathered = torch.cat([self.board[rank] for rank in range(len(self.board))])
        self.barrier.wait(timeout=30)
        return gathered


@pytest.mark.parametrize("negatives", ["hardest", "all"])
def test_two_processes_compute_the_loss_and_gradient_of_one(make_model, make_batch, negatives):
    settings = {"dtype": DOUBLE, "matching_negatives": negatives, "num_hard_negatives": 3}
    batch = make_batch(6, dtype=DOUBLE, product_ids=[1, 2, 3, 4, 1, 5])
    whole = make_model(**settings)
    output = whole(**batch)
    expected = gradients(whole, output.loss)

    # Two model objects over one set of parameters, since the gather is a setting of the model.
    barrier, board, outputs = threading.Barrier(2), {0: None, 1: None}, {}
    models = [make_model(**settings) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for (name, _), owner in zip(list(models[1].named_parameters()), list(models[0].parameters()), strict=True):
        path, _, leaf = name.rpartition(".")
        setattr(models[1].get_submodule(path), leaf, owner)

    def run(rank):
        models[rank].set_gather(ThreadGather(rank, barrier, board))
        rows = slice(3 * rank, 3 * rank + 3)
        outputs[rank] = models[rank](**{name: tensor[rows] for name, tensor in batch.items()})

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("loss", "contrastive_loss", "matching_loss", "reconstruction_loss"):
        assert_same((outputs[0][name] + outputs[1][name]) / 2, output[name])
    if negatives == "hardest":
        assert torch.equal(
            torch.cat([outputs[0].matching_indices, outputs[1].matching_indices]), output.matching_indices
        )
    assert_same_gradients(gradients(models[0], (outputs[0].loss + outputs[1].loss) / 2), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("preset", ["clip4clip", "mmf"])
def test_chosen_pairs_score_as_among_all_pairs(make_model, preset, implementation):
    """Forward and backward, with clips that many images want and clips that one does."""
    model = make_model(preset, dtype=DOUBLE)
    model.set_attn_implementation(implementation)
    width, generator = model.config.decoder_hidden_size, torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    inputs = [draw(7, width), draw(4, 9, width), draw(4, 9, width)]
    mask = torch.rand(4, 9, generator=generator) < 0.7
    mask[:, 0] = True
    chosen = torch.zeros(4, 7, dtype=torch.bool)
    chosen[0, 2] = chosen[1, :6] = chosen[2, [0, 3, 6]] = chosen[3, [6, 1]] = True
    direction = draw(4, 7)
    results = []
    for score in (
        lambda *tensors: model.decoder.score_pairs(*tensors, mask) * chosen,
        lambda *tensors: model.decoder.score_chosen_pairs(*tensors, mask, chosen),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        scores = score(*leaves)
        weights = gradients(model, (scores * direction).sum())
        results.append((scores.detach(), [leaf.grad for leaf in leaves], weights))
    assert results[0][0].std() > 1e-4
    assert_same(results[1][0], results[0][0])
    assert_same(results[1][1], results[0][1])
    assert_same_gradients(results[1][2], results[0][2])


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("softmax", [False, True])
def test_the_mean_over_heads_is_convolutions_with_equal_weights(make_model, make_config, make_batch, softmax, scale):
    settings = {"reconstruction_softmax": softmax, "reconstruction_scale_attention": scale}
    mean = make_model(dtype=DOUBLE, reconstruction_mixing="mean", **settings)
    assert not list(mean.reconstruction_head.parameters())
    conv = RiceModel(make_config(**settings)).to(DOUBLE).eval()
    for layer in (conv.reconstruction_head.conv1, conv.reconstruction_head.conv2):
        torch.nn.init.constant_(layer.weight, 1 / layer.in_channels)
    missing = conv.load_state_dict(mean.state_dict(), strict=False).missing_keys
    assert {name.split(".")[0] for name in missing} == {"reconstruction_head"}
    batch = make_batch(4, dtype=DOUBLE, patch_mask=True)
    expected, actual = conv(**batch), mean(**batch)
    assert_same(actual.reconstruction_loss, expected.reconstruction_loss)
    theirs = gradients(conv, expected.loss)
    theirs = {name: gradient for name, gradient in theirs.items() if name not in missing}
    assert_same_gradients(gradients(mean, actual.loss), theirs)


def test_one_head_can_be_averaged_but_not_mixed(make_model, make_batch):
    with pytest.raises(ValueError, match="decoder_num_heads >= 2"):
        make_model(decoder_num_heads=1)
    model = make_model(decoder_num_heads=1, reconstruction_mixing="mean")
    assert model(**make_batch()).reconstruction_loss > 0


@pytest.mark.parametrize("heads", [2, 4, 6, 8, 12, 16, 32])
def test_reconstruction_starts_near_the_mean_over_heads_with_different_channels(make_config, heads):
    config = make_config(projection_dim=96, decoder_num_heads=heads)

    def build(seed):
        torch.manual_seed(seed)
        return RiceModel(config).reconstruction_head

    head, again, other = build(0), build(0), build(1)
    first, second = head.conv1.weight[:, :, 0, 0], head.conv2.weight[0, :, 0, 0]
    torch.testing.assert_close(first.mean(), torch.tensor(1 / heads))
    torch.testing.assert_close(second.mean(), torch.tensor(2 / heads))
    assert (first > 0).all() and (second > 0).all()
    assert not head.conv1.bias.any() and not head.conv2.bias.any()
    assert torch.equal(head.conv1.weight, again.conv1.weight) and torch.equal(head.conv2.weight, again.conv2.weight)
    assert heads == 2 or not torch.equal(first, other.conv1.weight[:, :, 0, 0])
    if heads > 2:
        torch.testing.assert_close(first.mean(dim=0), torch.full((heads,), 1 / heads))
        assert first.std(dim=0, correction=0).min() >= 1e-2 and second.std(correction=0) >= 1e-2
    # No channel is dead, whatever is attended to.
    attention = torch.softmax(4 * torch.randn(3, heads, 5, 7), dim=-1)
    assert (head.conv1(attention) > 0).all() and (head.conv2(head.conv1(attention)) > 0).all()


def test_hidden_channels_of_the_reconstruction_learn_different_things(make_config, make_batch):
    torch.manual_seed(0)
    model, batch = RiceModel(make_config(decoder_num_heads=8, decoder_dropout=0.0)), make_batch()
    weight = model.reconstruction_head.conv1.weight
    before = weight.detach().clone()
    optimizer = torch.optim.SGD(model.reconstruction_head.parameters(), lr=1.0)
    for _ in range(3):
        model.zero_grad()
        model(**batch).reconstruction_loss.backward()
        assert weight.grad.flatten(1).norm(dim=1).min() > 0
        assert (weight.grad.std(dim=0) > 0.1 * weight.grad.abs().mean(dim=0)).all()
        optimizer.step()
    learnt = (weight - before).detach()
    assert (learnt.std(dim=0) > 0.1 * learnt.abs().mean(dim=0)).all()

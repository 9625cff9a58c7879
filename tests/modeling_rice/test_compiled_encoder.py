"""A compiled encoder against a plain one: losses, gradients, encodings, names of weights, and the number of graphs."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoConfig, AutoModel

from modeling_rice import RiceModel
from modeling_rice.encoders_rice import parts_to_compile
from training_rice.grad_cache import GradCache

RESNET = {"vision_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}}
RESNET |= {"vision_pooling": "mean", "decoder_position_embeddings": False}
VARIANTS = {"blocks": {}, "boxes": {"vision_feature_layer": -2}, "whole": RESNET}
# Without and with a patch mask, or for a first number of pictures and for others.
GRAPHS = {"blocks": 1, "boxes": 2, "whole": 2}


@pytest.fixture
def backend():
    """Counts graphs, which are run as they were traced; what other tests have compiled is forgotten."""
    torch.compiler.reset()
    return CompileCounterWithBackend("eager")


@pytest.fixture
def make_pair(make_model, backend):
    """A function that builds one model twice, its encoder compiled in the second one, without a break."""

    def make(**settings) -> tuple[RiceModel, RiceModel]:
        models = [make_model(decoder_dropout=0.0, **settings).train() for _ in range(2)]
        models[1].compile_encoder(backend=backend, fullgraph=True)
        return models[0], models[1]

    return make


def assert_equal_steps(plain: RiceModel, compiled: RiceModel, batch: dict) -> None:
    losses = []
    for model in (plain, compiled):
        model.zero_grad()
        losses.append(model(**batch).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    assert_equal_gradients(plain, compiled)


def assert_equal_gradients(plain: RiceModel, compiled: RiceModel) -> None:
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in compiled.named_parameters() if p.grad is not None}
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert found.keys() == expected.keys() and any(name.startswith("vision_model.") for name in found)
    for name, gradient in expected.items():
        assert (gradient - found[name]).abs().max() < 1e-5 * largest, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_is_that_of_a_plain_encoder(make_pair, make_batch, backend, variant):
    """However many frames are real, and however large the batch, without another graph."""
    plain, compiled = make_pair(**VARIANTS[variant])
    for size, frames in ((5, 3), (5, 4), (6, 2)):
        assert_equal_steps(plain, compiled, make_batch(size, frames, patch_mask=variant == "boxes"))
    assert backend.frame_count == GRAPHS[variant]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activations_are_recomputed(make_pair, make_batch, use_reentrant):
    models = make_pair()
    for model in models:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    assert_equal_steps(*models, make_batch())


def test_steps_in_chunks(make_pair, make_batch, backend):
    plain, compiled = make_pair()
    batch = make_batch(6)
    plain(**batch).loss.backward()
    GradCache(2)(compiled, batch)
    assert_equal_gradients(plain, compiled)
    # With and without gradients.
    assert backend.frame_count == 2


@pytest.mark.parametrize("variant", ["blocks", "whole"])
def test_encodings(make_pair, make_batch, variant):
    plain, compiled = (model.eval() for model in make_pair(**VARIANTS[variant]))
    batch = make_batch()
    for name in ("encode_gallery", "encode_clips"):
        expected, found = getattr(plain, name)(**batch), getattr(compiled, name)(**batch)
        torch.testing.assert_close(found.embeds, expected.embeds, rtol=1e-5, atol=1e-5)
    assert found.model_fingerprint == expected.model_fingerprint


def test_names_and_files_are_unchanged(make_pair, tmp_path):
    plain, compiled = make_pair()
    assert list(compiled.state_dict()) == list(plain.state_dict())
    compiled.save_pretrained(tmp_path)
    loaded = RiceModel.from_pretrained(tmp_path)
    for name, weight in plain.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["blocks", "whole"])
def test_by_inductor(make_model, make_batch, variant):
    torch.compiler.reset()
    plain, compiled = (make_model(decoder_dropout=0.0, **VARIANTS[variant]).train() for _ in range(2))
    compiled.compile_encoder(fullgraph=True)
    for size in (5, 6):
        assert_equal_steps(plain, compiled, make_batch(size))


TOKENS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
TOKENS |= {"image_size": 32, "patch_size": 8}
STAGES = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "num_heads": [1, 2], "window_size": 2}


@pytest.mark.parametrize(
    ("model_type", "settings", "count"),
    [
        ("clip_vision_model", TOKENS, 3),
        ("dinov2", TOKENS, 3),
        # The last stage has blocks that are alike and most of the weights, but little of the work.
        ("swin", {**STAGES, "depths": [1, 2]}, 1),
        ("resnet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2]}, 1),
    ],
)
def test_what_is_compiled(model_type, settings, count):
    encoder = AutoModel.from_config(AutoConfig.for_model(model_type, **settings))
    parts = parts_to_compile(encoder)
    assert len(parts) == count and (parts == [encoder]) == (count == 1)
    assert len({type(part) for part in parts}) == 1

"""Conversion of official layouts: what is recognised, switched off, ignored and refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel

from modeling_rice.convert_rice_original_to_hf import convert_original_checkpoint, load_original_state_dict, main

WIDTH, EMBED, PATCH, GRID = 128, 64, 8, 2


def tensors(shapes):
    return {name: 0.1 * torch.randn(*shape) for name, shape in shapes.items()}


def linear(name, out, into, bias=True):
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block(name, width, packed=True):
    shapes = norm(f"{name}.ln_1", width) | norm(f"{name}.ln_2", width)
    shapes |= linear(f"{name}.mlp.c_fc", 4 * width, width) | linear(f"{name}.mlp.c_proj", width, 4 * width)
    if packed:
        shapes |= {f"{name}.attn.in_proj_weight": (3 * width, width), f"{name}.attn.in_proj_bias": (3 * width,)}
        return shapes | linear(f"{name}.attn.out_proj", width, width)
    for part in ("query", "key", "value"):
        shapes |= linear(f"{name}.attn.{part}", width, width)
    return shapes


def visual(prefix, layers=2):
    shapes = {
        f"{prefix}class_embedding": (WIDTH,),
        f"{prefix}positional_embedding": (GRID**2 + 1, WIDTH),
        f"{prefix}conv1.weight": (WIDTH, 3, PATCH, PATCH),
        f"{prefix}proj": (WIDTH, EMBED),
    }
    shapes |= norm(f"{prefix}ln_pre", WIDTH) | norm(f"{prefix}ln_post", WIDTH)
    for i in range(layers):
        shapes |= block(f"{prefix}transformer.resblocks.{i}", WIDTH)
    return shapes


def reconstruction(prefix):
    return {
        f"{prefix}0.weight": (4, 8, 1, 1),
        f"{prefix}0.bias": (4,),
        f"{prefix}2.weight": (1, 4, 1, 1),
        f"{prefix}2.bias": (1,),
    }


def clip4clip_checkpoint(self_layers=1, text=False):
    shapes = visual("clip.visual.") | {"cross.embeddings.position_embeddings.weight": (20, EMBED)}
    for i in range(self_layers):
        shapes |= block(f"cross.transformer.resblocks.{i}", EMBED)
    shapes |= block("cross.transformer.cross_attention", EMBED, packed=False)
    shapes |= norm("cross.pooler.ln_pool", EMBED) | linear("cross.pooler.dense", EMBED, EMBED)
    shapes |= linear("similarity_dense", 1, EMBED) | reconstruction("recons_weights.conv.")
    if text:
        shapes |= linear("fc_title", EMBED, 48) | linear("fc_asr", EMBED, 48)
    return tensors(shapes)


def mmf_checkpoint():
    shapes = visual("image_encoder.model.")
    prefix = "transformer.transformer."
    for i in range(2):
        shapes |= block(f"{prefix}transformer.layers.{i}", WIDTH)
    shapes |= norm(f"{prefix}pooler.layer_norm", WIDTH) | linear(f"{prefix}pooler.dense", WIDTH, WIDTH, bias=False)
    shapes |= linear("transformer.heads.vim", 1, WIDTH, bias=False) | reconstruction("transformer.heads.rec.")
    return tensors(shapes) | {"transformer.logit_scale": torch.tensor(3.0)}


CHECKPOINTS = {"clip4clip": clip4clip_checkpoint, "mmf": mmf_checkpoint}


def without(state_dict, *prefixes):
    return {key: value for key, value in state_dict.items() if not key.startswith(prefixes)}


def assert_same_parameters(model, other):
    assert model.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("layout", CHECKPOINTS)
def test_sizes_come_from_the_shapes(layout):
    model = convert_original_checkpoint(CHECKPOINTS[layout]())
    config = model.config
    vision = config.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (WIDTH, 2, WIDTH // 64)
    assert (vision.image_size, vision.patch_size, config.projection_dim) == (GRID * PATCH, PATCH, EMBED)
    assert config.decoder_num_heads == 8 and config.decoder_num_self_layers == 1
    assert config.use_decoder and config.use_reconstruction and config.text_embed_dim is None
    assert not model.training and all(p.dtype == torch.float32 for p in model.parameters())


def test_each_layout_gets_the_settings_of_its_code_base():
    older, newer = (convert_original_checkpoint(make()).config for make in (clip4clip_checkpoint, mmf_checkpoint))
    assert older.decoder_max_position_embeddings == 20 and not older.mask_padded_frames
    assert (older.matching_score, older.matching_scale) == ("linear", 100.0)
    assert (newer.matching_score, newer.matching_scale, newer.decoder_token_source) == ("cosine", 10.0, "raw")
    assert newer.reconstruction_softmax_over_padding


def test_both_embeddings_carry_the_newer_codes_scale():
    model = convert_original_checkpoint(mmf_checkpoint())
    torch.testing.assert_close(model.logit_scale.exp(), torch.tensor(9.0))
    contrastive_head = without(mmf_checkpoint(), "transformer.logit_scale")
    contrastive_head["transformer.contrastive_norm.norm_s"] = torch.tensor([2.0])
    torch.testing.assert_close(convert_original_checkpoint(contrastive_head).logit_scale.exp(), torch.tensor(4.0))
    older = convert_original_checkpoint(clip4clip_checkpoint())
    torch.testing.assert_close(older.logit_scale.exp(), torch.tensor(100.0))


@pytest.mark.parametrize("layout", CHECKPOINTS)
def test_every_converted_parameter_holds_an_official_value(layout):
    checkpoint = CHECKPOINTS[layout]()
    official = torch.cat([tensor.flatten() for tensor in checkpoint.values()]).sort().values
    model = convert_original_checkpoint(checkpoint)
    ours = torch.cat([p.detach().flatten() for name, p in model.named_parameters() if name != "logit_scale"])
    scalars = 1 if layout == "mmf" else 0
    assert len(ours) == len(official) - scalars
    found = official[torch.searchsorted(official, ours).clamp(max=len(official) - 1)]
    assert torch.equal(found, ours)


@pytest.mark.parametrize(
    "layout, packed, module",
    [
        ("clip4clip", "clip.visual.transformer.resblocks.1", "vision_model.encoder.layers.1.self_attn"),
        ("clip4clip", "cross.transformer.resblocks.0", "decoder.self_layers.0.attention"),
        ("mmf", "transformer.transformer.transformer.layers.1", "decoder.cross_layer.attention"),
    ],
)
def test_packed_attention_is_query_key_value(layout, packed, module):
    checkpoint = CHECKPOINTS[layout]()
    attention = convert_original_checkpoint(checkpoint).get_submodule(module)
    for kind in ("weight", "bias"):
        parts = checkpoint[f"{packed}.attn.in_proj_{kind}"].chunk(3)
        for name, part in zip("qkv", parts, strict=True):
            assert torch.equal(getattr(getattr(attention, f"{name}_proj"), kind), part)


def test_deeper_decoders_are_recognised():
    assert convert_original_checkpoint(clip4clip_checkpoint(self_layers=3)).config.decoder_num_self_layers == 3
    assert convert_original_checkpoint(clip4clip_checkpoint(self_layers=0)).config.decoder_num_self_layers == 0


def test_text_projections_are_recognised():
    model = convert_original_checkpoint(clip4clip_checkpoint(text=True))
    assert model.config.text_embed_dim == 48 and model.decoder.title_projection.weight.shape == (EMBED, 48)


@pytest.mark.parametrize(
    "layout, prefixes, absent",
    [
        ("clip4clip", ("recons_weights.",), {"use_reconstruction": False, "use_decoder": True}),
        ("clip4clip", ("recons_weights.", "cross.", "similarity_dense."), {"use_decoder": False}),
        ("mmf", ("transformer.heads.rec.",), {"use_reconstruction": False, "use_decoder": True}),
        ("mmf", ("transformer.heads.", "transformer.transformer."), {"use_decoder": False}),
    ],
)
def test_a_part_without_keys_is_switched_off(layout, prefixes, absent):
    model = convert_original_checkpoint(without(CHECKPOINTS[layout](), *prefixes))
    for name, value in absent.items():
        assert getattr(model.config, name) is value
    assert (model.decoder is None) == (not model.config.use_decoder)
    assert model.reconstruction_head is None


@pytest.mark.parametrize("layout", CHECKPOINTS)
def test_the_prefix_of_data_parallel_training_is_dropped(layout):
    checkpoint = CHECKPOINTS[layout]()
    wrapped = {f"module.{key}": value for key, value in checkpoint.items()}
    assert_same_parameters(convert_original_checkpoint(wrapped), convert_original_checkpoint(checkpoint))


def test_unused_parts_of_the_official_models_are_ignored():
    older = clip4clip_checkpoint()
    extended = older | tensors(
        {
            "clip.positional_embedding": (77, 8),
            "clip.text_projection": (8, 8),
            "clip.logit_scale": (1,),
            "clip.token_embedding.weight": (10, 8),
            "clip.ln_final.weight": (8,),
            "clip.transformer.resblocks.0.ln_1.weight": (8,),
            "cross.transformer.resblocks.7.ln_1.weight": (EMBED,),
        }
    )
    assert_same_parameters(convert_original_checkpoint(extended), convert_original_checkpoint(older))
    newer = mmf_checkpoint()
    extended = newer | tensors({"transformer.transformer.embeddings.position_embedding.weight": (26, WIDTH)})
    assert_same_parameters(convert_original_checkpoint(extended), convert_original_checkpoint(newer))


@pytest.mark.parametrize(
    "layout, missing",
    [
        ("clip4clip", ["clip.visual.ln_post.bias", "clip.visual.transformer.resblocks.1.attn.in_proj_bias"]),
        ("clip4clip", ["clip.visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        ("clip4clip", ["clip.visual.proj"]),
        ("clip4clip", ["cross.pooler.dense.bias", "similarity_dense.weight"]),
        ("clip4clip", ["cross.embeddings.position_embeddings.weight"]),
        ("clip4clip", ["recons_weights.conv.2.bias"]),
        ("mmf", ["image_encoder.model.class_embedding"]),
        ("mmf", ["transformer.transformer.transformer.layers.1.attn.out_proj.bias", "transformer.heads.vim.weight"]),
        ("mmf", ["transformer.logit_scale"]),
    ],
)
def test_missing_keys_are_listed(layout, missing):
    with pytest.raises(ValueError, match=rf"misses {len(missing)} key\(s\)") as error:
        convert_original_checkpoint(without(CHECKPOINTS[layout](), *missing))
    assert all(key in str(error.value) for key in missing)


def test_half_of_the_text_projections_is_an_error():
    with pytest.raises(ValueError, match=r"misses 2 key\(s\): fc_asr.bias, fc_asr.weight"):
        convert_original_checkpoint(without(clip4clip_checkpoint(text=True), "fc_asr"))


def test_an_encoder_without_blocks_is_an_error():
    with pytest.raises(ValueError, match="clip.visual.transformer.resblocks.0"):
        convert_original_checkpoint(without(clip4clip_checkpoint(), "clip.visual.transformer."))


@pytest.mark.parametrize(
    "layout, extra",
    [
        ("clip4clip", "clip.visual.conv2.weight"),
        ("clip4clip", "seq_transformer.weight"),
        ("mmf", "transformer.heads.itm.weight"),
        ("mmf", "image_encoder.model.transformer.resblocks.0.attn.gate"),
    ],
)
def test_unexpected_keys_are_listed(layout, extra):
    checkpoint = CHECKPOINTS[layout]() | {extra: torch.zeros(1), "another.key": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"holds unknown 2 key\(s\)") as error:
        convert_original_checkpoint(checkpoint)
    assert extra in str(error.value) and "another.key" in str(error.value)


@pytest.mark.parametrize(
    "prefixes", [("cross.", "similarity_dense."), ("cross.", "similarity_dense.", "recons_weights.")]
)
def test_parts_that_need_the_decoder_are_refused_without_it(prefixes):
    with pytest.raises(ValueError, match="recons|reconstruction|title|fc_"):
        convert_original_checkpoint(without(clip4clip_checkpoint(text=True), *prefixes))


def test_more_than_one_cross_attention_block_is_refused():
    checkpoint = mmf_checkpoint()
    for i in (2, 3):
        checkpoint |= tensors(block(f"transformer.transformer.transformer.layers.{i}", WIDTH))
    with pytest.raises(ValueError, match="more than one pair of self- and cross-attention blocks"):
        convert_original_checkpoint(checkpoint)


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="neither official layout"):
        convert_original_checkpoint({"encoder.weight": torch.zeros(1)})


def test_shapes_that_contradict_each_other_are_refused():
    checkpoint = clip4clip_checkpoint()
    checkpoint["cross.pooler.dense.weight"] = torch.zeros(EMBED, EMBED + 1)
    with pytest.raises(ValueError, match="decoder.head.dense.weight") as error:
        convert_original_checkpoint(checkpoint)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("layout", "changes", "words"),
    [
        ("clip4clip", {"clip.visual.proj": torch.zeros(3)}, "clip.visual.proj has shape .3,."),
        ("clip4clip", {"clip.visual.conv1.weight": torch.zeros(48, 3, 4, 4)}, "width 48"),
        ("clip4clip", {"clip.visual.positional_embedding": torch.zeros(4, 64)}, "4 positions"),
        ("clip4clip", {"recons_weights.conv.0.weight": torch.zeros(8, 12, 1, 1)}, "inconsistent shapes.*conv1"),
        ("mmf", {"transformer.logit_scale": torch.ones(2)}, "logit_scale must be one number"),
        ("mmf", {"transformer.logit_scale": torch.zeros(())}, "logit_scale must be one number"),
        ("mmf", {7: torch.zeros(1)}, "must map names to tensors"),
        ("mmf", {"epoch": "last"}, "'epoch' is a str"),
        ("mmf", {"module.transformer.logit_scale": torch.ones(())}, "logit_scale twice"),
    ],
)
def test_damaged_checkpoints_get_one_sentence(layout, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        convert_original_checkpoint({**CHECKPOINTS[layout](), **changes})
    assert "\n" not in str(error.value)


def test_a_missing_first_block_is_an_error():
    checkpoint = clip4clip_checkpoint()
    blocks = {key: value for key, value in checkpoint.items() if key.startswith("cross.transformer.resblocks.0.")}
    renamed = {key.replace("resblocks.0.", "resblocks.1."): value for key, value in blocks.items()}
    with pytest.raises(ValueError, match="holds cross.transformer.resblocks.1, but no cross.transformer.resblocks.0"):
        convert_original_checkpoint({**without(checkpoint, "cross.transformer.resblocks.0."), **renamed})


@pytest.mark.parametrize("layout", ["clip4clip", "mmf"])
def test_the_width_inside_the_decoder_follows_the_weights(layout):
    checkpoint = {}
    decoder = "cross.transformer." if layout == "clip4clip" else "transformer.transformer.transformer."
    for key, value in CHECKPOINTS[layout]().items():
        if key.startswith(decoder) and "mlp.c_" in key:
            if "c_fc" in key:
                value = value[: len(value) // 2]
            elif key.endswith("weight"):
                value = value[:, : value.shape[1] // 2]
        checkpoint[key] = value
    model = convert_original_checkpoint(checkpoint)
    assert model.config.decoder_intermediate_size == 2 * model.config.decoder_hidden_size


def test_norms_of_the_decoder_are_the_official_ones():
    older, newer = (convert_original_checkpoint(CHECKPOINTS[name]()) for name in ("clip4clip", "mmf"))
    assert older.decoder.self_layers[0].layer_norm1.eps == older.decoder.cross_layer.layer_norm1.eps == 1e-12
    assert older.decoder.head.layer_norm.eps == 1e-12
    assert newer.decoder.self_layers[0].layer_norm2.eps == 1e-12
    assert newer.decoder.cross_layer.layer_norm1.eps == newer.decoder.head.layer_norm.eps == 1e-5


def test_half_precision_checkpoints_become_single_precision():
    checkpoint = {key: value.half() for key, value in clip4clip_checkpoint().items()}
    model = convert_original_checkpoint(checkpoint)
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("wrap", ["plain", "model", "state_dict"])
def test_torch_files_are_read(tmp_path, wrap):
    checkpoint = mmf_checkpoint()
    torch.save(checkpoint if wrap == "plain" else {wrap: checkpoint, "epoch": 3}, tmp_path / "model.pth")
    main([str(tmp_path / "model.pth"), str(tmp_path / "out")])
    assert_same_parameters(AutoModel.from_pretrained(tmp_path / "out"), convert_original_checkpoint(checkpoint))


def test_safetensors_files_are_read_and_the_result_embeds_alike(tmp_path, capsys):
    checkpoint = clip4clip_checkpoint()
    save_file(checkpoint, tmp_path / "model.safetensors")
    main([str(tmp_path / "model.safetensors"), str(tmp_path / "out")])
    assert f"Wrote {tmp_path / 'out'}" in capsys.readouterr().out
    images = torch.randn(2, 3, GRID * PATCH, GRID * PATCH)
    loaded, converted = AutoModel.from_pretrained(tmp_path / "out"), convert_original_checkpoint(checkpoint)
    assert torch.equal(loaded.encode_gallery(images).states, converted.encode_gallery(images).states)


def test_files_that_cannot_be_read_get_one_sentence(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no checkpoint file .*nowhere.pth"):
        load_original_state_dict(tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("this is no checkpoint")
    (tmp_path / "text.safetensors").write_text("this is no checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": Unsafe()}, tmp_path / "unsafe.pth")
    for name in ("text.pth", "text.safetensors", "list.pth", "unsafe.pth"):
        with pytest.raises(ValueError, match=name):
            load_original_state_dict(tmp_path / name)
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "text.pth"), str(tmp_path / "out")])
    assert stop.value.code == 2 and "text.pth" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Unsafe:
    """Stands for what a checkpoint must not run when it is opened."""


def test_the_command_runs(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "modeling_rice.convert_rice_original_to_hf", str(tmp_path / "no.pth"), "out"],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    expected = f"error: There is no checkpoint file {tmp_path / 'no.pth'}; give the path of one."
    assert result.stderr.strip().splitlines()[-1] == expected

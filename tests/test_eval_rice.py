import json
import shutil

import pytest
import torch
from PIL import Image

import eval_rice
from evaluation_rice.fusion import FUSED_TEXT_WEIGHTS
from evaluation_rice.recall import recall_at_k
from hub_rice.results import read_results

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 220), "yellow": (230, 220, 20)}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """An untrained RICE of a few thousand weights with its processor, saved."""
    from modeling_rice import RiceConfig, RiceModel
    from processing_rice import build_processor, train_tokenizer

    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    config = RiceConfig(vision_config=vision, projection_dim=32, decoder_num_heads=2)
    RiceModel(config).save_pretrained(folder)
    build_processor(train_tokenizer(["a red mug", "blue shoe"] * 20), 32, 16, 3).save_pretrained(folder)
    return folder


@pytest.fixture
def model_dir(checkpoint, tmp_path):
    """A copy of the checkpoint that a test may damage."""
    return shutil.copytree(checkpoint, tmp_path / "model")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def shop(tmp_path):
    """A shop_clips folder with four products, eight test clips and four validation clips of two frames."""
    root = tmp_path / "shop"
    (root / "images").mkdir(parents=True)
    gallery = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 40), colour).save(root / "images" / f"{name}.png")
        gallery.append({"gallery_id": name, "image": f"images/{name}.png", "title": name})
    write_lines(root / "gallery.jsonl", gallery)
    for split, count in (("test", 8), ("val", 4)):
        clips = []
        for i in range(count):
            name = list(COLOURS)[i % 4]
            frames = [f"images/{split}-{i}-{j}.png" for j in range(2)]
            for j, frame in enumerate(frames):
                colour = tuple(max(0, value - 10 * (j + 1)) for value in COLOURS[name])
                Image.new("RGB", (48, 32), colour).save(root / frame)
            clips.append({"query_id": f"{split}-{i}", "frames": frames, "gt_gallery_ids": [name], "category": name[0]})
        write_lines(root / f"clips_{split}.jsonl", clips)
    return root


def run(model, dataset, output, *more):
    arguments = ["--model", model, "--dataset", dataset, "--output_dir", output, "--num_workers", 0, "--device", "cpu"]
    eval_rice.main([str(argument) for argument in [*arguments, *more]])
    # Whatever an evaluation writes, cards, tables and publishing must be able to read.
    read_results(output / "results.json", needed=())
    return json.loads((output / "results.json").read_text())


def refusal(capsys, model, dataset, output, *more):
    """The one sentence with which the script ends."""
    with pytest.raises(SystemExit) as end:
        run(model, dataset, output, *more)
    assert end.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in line
    assert not (output / "results.json").exists()
    return line


def test_writes_results_rankings_picture_and_card(model_dir, shop, tmp_path, capsys):
    output = tmp_path / "out"
    results = run(model_dir, shop, output)
    files = {path.name for path in output.iterdir()}
    assert files == {
        "README.md", "breakdown.md", "breakdown.png", "matches.png", "query_ranks.jsonl", "rankings.jsonl",
        "results.json",
    }  # fmt: skip
    assert {
        "protocol", "num_queries", "gallery_size", "scores", "fusion_weight", "baselines", "by", "model", "dataset",
        "seconds", "failures", "ties", "versions",
    } <= results.keys()  # fmt: skip
    assert results["num_queries"] == 8 and results["gallery_size"] == {"min": 4, "median": 4.0, "max": 4}
    assert list(results["scores"]) == ["embedding", "matching", "fused"]
    assert list(results["scores"]["fused"]) == ["R@1", "R@3", "R@5", "R@10", "R@1_ci95"]
    assert results["scores"]["matching"]["R@10"] == 1.0
    assert results["baselines"]["color_histogram"]["R@1"] >= 0.5
    assert results["baselines"]["chance"]["R@1"] == pytest.approx(0.25)
    assert results["fusion_weight"] > 0 and results["protocol"]["fusion"]["source"] == "validation"
    assert results["protocol"]["gallery_scope"] == "all" and set(results["by"]) == {"category"}
    printed = capsys.readouterr().out
    assert "colour histogram" in printed and "chance" in printed and "1 gallery of 4 images," in printed
    assert str(model_dir) in (output / "README.md").read_text()


def test_rankings_file_gives_the_reported_recall(model_dir, shop, tmp_path):
    for kind in ("embedding", "matching", "fused"):
        results = run(model_dir, shop, tmp_path / kind, "--rank_by", kind, "--fusion_weight", "0.7", "--baselines")
        lines = [json.loads(line) for line in (tmp_path / kind / "rankings.jsonl").read_text().splitlines()]
        rankings = {line["query_id"]: line["ranking"] for line in lines}
        reported = {name: value for name, value in results["scores"][kind].items() if name != "R@1_ci95"}
        assert recall_at_k(rankings, {line["query_id"]: line["relevant"] for line in lines}) == reported
        assert results["fusion_weight"] == 0.7 and results["baselines"] == {}
        ranks = [json.loads(line) for line in (tmp_path / kind / "query_ranks.jsonl").read_text().splitlines()]
        assert [line["query_id"] for line in ranks] == [line["query_id"] for line in lines]
        for score, figures in results["scores"].items():
            found = [line[score] for line in ranks]
            assert sum(rank is not None and rank <= 3 for rank in found) / len(ranks) == figures["R@3"]


def test_the_same_command_gives_the_same_figures(model_dir, shop, tmp_path):
    first, second = (run(model_dir, shop, tmp_path / name, "--batch_size", 3) for name in "ab")
    assert first["scores"] == second["scores"] and first["fusion_weight"] == second["fusion_weight"]
    assert (tmp_path / "a" / "rankings.jsonl").read_bytes() == (tmp_path / "b" / "rankings.jsonl").read_bytes()
    assert (tmp_path / "a" / "matches.png").read_bytes() == (tmp_path / "b" / "matches.png").read_bytes()


def test_precision_is_single_by_default_and_recorded(model_dir, shop, tmp_path, capsys):
    single = run(model_dir, shop, tmp_path / "single")
    half = run(model_dir, shop, tmp_path / "half", "--precision", "bf16")
    assert (single["protocol"]["precision"], half["protocol"]["precision"]) == ("fp32", "bf16")
    with pytest.raises(SystemExit):
        eval_rice.main(["--baseline", "chance", "--dataset", str(shop), "--output_dir", str(tmp_path / "b"),
                        "--precision", "bf16"])  # fmt: skip
    assert "--precision bf16: baselines compute in fp32" in capsys.readouterr().err


def test_a_damaged_frame_is_listed_and_the_clip_is_scored_without_it(model_dir, shop, tmp_path, capsys):
    (shop / "images" / "test-3-1.png").write_bytes(b"\x89PNG no image")
    results = run(model_dir, shop, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "rankings.jsonl").read_text().splitlines()]
    assert results["num_queries"] == len(lines) == 8
    assert all(line["ranking"] for line in lines)
    assert [(failure["id"], failure["kind"]) for failure in results["failures"]] == [("test-3", "query")]
    assert results["failures"][0]["file"].endswith("test-3-1.png")
    assert results["failures"][0]["outcome"] == "left out"
    assert "test-3-1.png" in capsys.readouterr().out


def test_an_unreadable_clip_is_a_listed_miss(model_dir, shop, tmp_path):
    frames = list((shop / "images").glob("test-3-*.png"))
    for path in frames:
        path.write_bytes(b"\x89PNG no image")
    results = run(model_dir, shop, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "rankings.jsonl").read_text().splitlines()]
    assert results["num_queries"] == len(lines) == 8
    assert [line["query_id"] for line in lines if not line["ranking"]] == ["test-3"]
    assert results["scores"]["fused"]["R@10"] == 7 / 8 == results["baselines"]["color_histogram"]["R@10"]
    assert [(failure["id"], failure["outcome"]) for failure in results["failures"]] == 2 * [("test-3", "skipped")]
    assert {failure["file"] for failure in results["failures"]} == {str(path) for path in frames}


def test_the_checkpoints_own_fusion_weight_is_used_first(model_dir, shop, tmp_path):
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "fusion_weight": 0.35}))
    results = run(model_dir, shop, tmp_path / "out")
    assert results["fusion_weight"] == 0.35 and results["protocol"]["fusion"]["source"] == "checkpoint"


def test_without_a_validation_split_the_weight_is_one_and_reported(model_dir, shop, tmp_path, capsys):
    (shop / "clips_val.jsonl").unlink()
    results = run(model_dir, shop, tmp_path / "out")
    assert results["fusion_weight"] == 1.0 and results["protocol"]["fusion"]["source"] == "default"
    assert "fusion weight 1: the checkpoint has none" in capsys.readouterr().out


@pytest.mark.parametrize(("weight", "at_edge"), [(50.0, True), (0.35, False)])
def test_a_weight_at_an_end_of_its_grid_is_reported(model_dir, shop, tmp_path, capsys, weight, at_edge):
    give_weights(model_dir, fusion_weight=weight)
    fusion = run(model_dir, shop, tmp_path / "out", "--baselines")["protocol"]["fusion"]
    words = "the fusion weight 50 lies at the upper end of its grid (0.01 to 50): a better one may lie beyond"
    assert fusion["at_edge"] is at_edge and fusion["edge_words"] == [words] * at_edge
    assert (words in capsys.readouterr().out) is at_edge
    assert (words in (tmp_path / "out" / "README.md").read_text()) is at_edge


def test_intervals_resample_several_shops(model_dir, shop, tmp_path, capsys):
    rule = "percentile bootstrap over clips, since the data has no separate shops (10000 resamples, seed 0)"
    assert run(model_dir, shop, tmp_path / "one")["protocol"]["interval"] == rule
    for name, key in (("gallery", "gallery_id"), ("clips_test", "gt_gallery_ids"), ("clips_val", "gt_gallery_ids")):
        rows = [json.loads(line) for line in (shop / f"{name}.jsonl").read_text().splitlines()]
        for row in rows:
            product = row[key] if name == "gallery" else row[key][0]
            row["live_id"] = "warm" if product in ("red", "yellow") else "cold"
        write_lines(shop / f"{name}.jsonl", rows)
    results = run(model_dir, shop, tmp_path / "two", "--report")
    rule = "percentile bootstrap over 2 shops, then over the clips of each (10000 resamples, seed 0)"
    assert results["protocol"]["interval"] == rule and f"interval of R@1: {rule}" in capsys.readouterr().out
    assert all(rule in (tmp_path / "two" / name).read_text() for name in ("README.md", "report.html"))
    for name in ("rankings.jsonl", "query_ranks.jsonl"):
        lines = [json.loads(line) for line in (tmp_path / "two" / name).read_text().splitlines()]
        assert {line["live_id"] for line in lines} == {"warm", "cold"} and list(lines[0])[:2] == [
            "query_id",
            "live_id",
        ]


def test_number_of_frames_and_boxes_are_recorded(model_dir, shop, tmp_path):
    results = run(model_dir, shop, tmp_path / "out", "--num_frames", 1, "--boxes", "ground_truth")
    assert results["protocol"]["num_frames"] == 1 and results["protocol"]["boxes"] == "ground_truth"


@pytest.fixture
def text_model_dir(model_dir):
    """The checkpoint with an untrained text encoder, by whose cosines the embedding score is decided."""
    from modeling_rice import RiceConfig, RiceModel

    text = {"vocab_size": 2000, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 16}
    config = RiceConfig.from_pretrained(model_dir).to_dict() | {"text_config": text, "text_score_weight": 100.0}
    torch.manual_seed(2)
    RiceModel(RiceConfig.from_dict(config)).save_pretrained(model_dir)
    return model_dir


def give_weights(folder, **weights):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **weights}))


class TestFusedText:
    """Both weights of the fused score: the checkpoint's, or fitted."""

    @pytest.fixture
    def said(self, shop):
        """Validation clips name their product, test clips name another's or nothing."""
        for split in ("val", "test"):
            rows = [json.loads(line) for line in (shop / f"clips_{split}.jsonl").read_text().splitlines()]
            for i, row in enumerate(rows):
                name = row["gt_gallery_ids"][0] if split == "val" else list(COLOURS)[(i + 1) % 4]
                row["asr"] = "" if split == "test" and i % 2 else f"look at this {name}"
            write_lines(shop / f"clips_{split}.jsonl", rows)
        return shop

    def test_the_checkpoints_weights_are_used_and_reported(self, text_model_dir, said, tmp_path, capsys):
        give_weights(text_model_dir, fusion_weight=0.35, fused_text_weight=40.0)
        results = run(text_model_dir, said, tmp_path / "out", "--baselines", "--report")
        fusion = results["protocol"]["fusion"]
        assert (results["fusion_weight"], results["fused_text_weight"], fusion["text_weight"]) == (0.35, 40.0, 40.0)
        assert fusion["rule"].startswith("z(visual) + weight * z(matching) + text_weight * text, per query")
        assert fusion["source"] == "checkpoint" and fusion["source_words"].endswith("fitted when it was trained")
        assert "text weight in the fused score 40: the checkpoint's own" in capsys.readouterr().out
        assert "z(visual) + 0.35 x z(matching) + 40 x text" in (tmp_path / "out" / "README.md").read_text()
        assert "weight 0.35, text_weight 40:" in (tmp_path / "out" / "report.html").read_text()
        by_hand = run(text_model_dir, said, tmp_path / "hand", "--baselines", "--fusion_weight", "0.35")
        assert by_hand["fused_text_weight"] == 40.0 and by_hand["scores"] == results["scores"]

    def test_a_checkpoint_without_a_text_weight_is_fused_as_before(self, text_model_dir, said, tmp_path, capsys):
        give_weights(text_model_dir, fusion_weight=0.35)
        results = run(text_model_dir, said, tmp_path / "out", "--baselines")
        fusion = results["protocol"]["fusion"]
        assert results["fused_text_weight"] is fusion["text_weight"] is None
        assert fusion["rule"] == "z(embedding) + weight * z(matching), per query"
        assert "text has no separate weight, because it is part of the embedding score" in fusion["source_words"]
        assert "text weight in the fused score" not in capsys.readouterr().out
        give_weights(text_model_dir, fused_text_weight=0.0)
        rankings = (tmp_path / "out" / "rankings.jsonl").read_text()
        run(text_model_dir, said, tmp_path / "new", "--baselines")
        assert (tmp_path / "new" / "rankings.jsonl").read_text() != rankings

    def test_a_clip_without_asr_scores_as_without_text(self, text_model_dir, said, tmp_path):
        """With the score-level term alone, a clip without ASR has the ranking of an evaluation without text."""
        from modeling_rice import RiceConfig, RiceModel

        weights = {"decoder_text_tokens": False, "fusion_weight": 0.35, "fused_text_weight": 40.0}
        config = RiceConfig.from_pretrained(text_model_dir).to_dict() | weights
        RiceModel(RiceConfig.from_dict(config)).save_pretrained(text_model_dir)
        fused = {}
        for name, options in (("own", ()), ("none", ("--asr", "none")), ("off", ("--no-text",))):
            results = run(text_model_dir, said, tmp_path / name, "--baselines", *options)
            lines = (tmp_path / name / "rankings.jsonl").read_text().splitlines()
            fused[name] = {row["query_id"]: row["ranking"] for row in map(json.loads, lines)}
        assert results["fused_text_weight"] is None
        assert results["protocol"]["fusion"]["rule"] == "z(embedding) + weight * z(matching), per query"
        assert "text has no separate weight" not in results["protocol"]["fusion"]["source_words"]
        assert fused["none"] == fused["off"] != fused["own"]
        assert all(fused["own"][f"test-{i}"] == fused["off"][f"test-{i}"] for i in (1, 3, 5, 7))

    def test_both_weights_are_fitted_if_missing_or_on_request(self, text_model_dir, said, tmp_path):
        results = run(text_model_dir, said, tmp_path / "auto", "--baselines")
        fusion = results["protocol"]["fusion"]
        assert fusion["source"] == "validation" and fusion["text_weight"] == results["fused_text_weight"] >= 0
        assert [point["weight"] for point in fusion["text_curve"]] == list(FUSED_TEXT_WEIGHTS)
        give_weights(text_model_dir, fusion_weight=0.35, fused_text_weight=40.0)
        again = run(text_model_dir, said, tmp_path / "fit", "--baselines", "--fusion_weight", "fit")
        assert again["protocol"]["fusion"] == fusion and again["scores"] == results["scores"]

    def test_the_validation_split_may_be_in_another_folder(self, text_model_dir, said, tmp_path, capsys):
        other = shutil.copytree(said, tmp_path / "other")
        (said / "clips_val.jsonl").unlink()
        fit = ("--data_dir", said, "--baselines", "--fusion_weight", "fit")
        line = refusal(capsys, text_model_dir, "shop_clips", tmp_path / "none", *fit)
        assert "--fusion_weight fit: the weight cannot be fitted (" in line
        results = run(text_model_dir, "shop_clips", tmp_path / "out", *fit, "--fit_data_dir", other)
        words = f"the weight was fitted on the validation split of {other} (4 clips)"
        assert results["protocol"]["fusion"]["source_words"] == words
        assert results["fused_text_weight"] is not None and results["num_queries"] == 8

    def test_mistakes_get_one_sentence(self, text_model_dir, said, tmp_path, capsys):
        line = refusal(capsys, text_model_dir, said, tmp_path / "out", "--fit_data_dir", said)
        assert "--fit_data_dir goes with --fusion_weight fit: give both, or neither." in line
        line = refusal(
            capsys, text_model_dir, said, tmp_path / "out", "--split", "validation", "--fusion_weight", "fit"
        )
        assert "cannot be fitted (the split to evaluate is the validation split itself)" in line


class TestAsr:
    @pytest.fixture
    def said(self, shop):
        """The test clips name their product; that of the third does not."""
        rows = [json.loads(line) for line in (shop / "clips_test.jsonl").read_text().splitlines()]
        for i, row in enumerate(rows):
            row["asr"] = "" if i == 2 else f"look at this {row['gt_gallery_ids'][0]} number {i}"
        write_lines(shop / "clips_test.jsonl", rows)
        return shop

    def test_is_recorded_and_read(self, text_model_dir, said, tmp_path, capsys):
        scores = {}
        for mode in ("own", "none", "shuffled", "wrong"):
            options = ("--asr", mode, "--rank_by", "embedding", "--fusion_weight", "1", "--baselines")
            results = run(text_model_dir, said, tmp_path / mode, *options)
            assert results["protocol"]["asr"] == mode and results["protocol"]["text"]["used"] is True
            printed = capsys.readouterr().out
            assert f"boxes at test time: none; ASR: {mode}; recall in percent" in printed
            card = (tmp_path / mode / "README.md").read_text()
            assert (f"ASR at test time: {mode}." in card) == (f"asr: {mode}" in card) == (mode != "own")
            lines = (tmp_path / mode / "rankings.jsonl").read_text().splitlines()
            scores[mode] = {row["query_id"]: row["ranking"] for row in map(json.loads, lines)}
        run(text_model_dir, said, tmp_path / "again", *options)
        assert (tmp_path / "again" / "rankings.jsonl").read_text() == "\n".join(lines) + "\n"
        results = run(text_model_dir, said, tmp_path / "off", "--no-text", "--rank_by", "embedding")
        assert results["protocol"]["asr"] == "none" and results["protocol"]["text"]["used"] is False
        off = {row["query_id"]: row["ranking"] for row in map(json.loads, open(tmp_path / "off" / "rankings.jsonl"))}
        # Without ASR there is no cosine of texts; a clip that has none is as it was, and gets another's.
        assert scores["none"] == off != scores["own"]
        assert scores["own"]["test-2"] == scores["none"]["test-2"] == scores["shuffled"]["test-2"]
        assert scores["wrong"] != scores["own"] and scores["wrong"] != scores["none"]

    def test_is_named_in_the_report(self, text_model_dir, said, tmp_path):
        run(text_model_dir, said, tmp_path / "out", "--asr", "wrong", "--report", "--baselines")
        assert "the ASR of a clip of another product" in (tmp_path / "out" / "report.html").read_text()

    def test_is_refused_for_a_model_without_text(self, model_dir, shop, tmp_path, capsys):
        line = refusal(capsys, model_dir, shop, tmp_path / "out", "--asr", "wrong")
        assert f"--asr wrong needs a model that reads text, which {model_dir} does not: leave it out." in line
        assert "asr" not in run(model_dir, shop, tmp_path / "out", "--baselines")["protocol"]

    def test_contradictions_are_refused(self, text_model_dir, shop, tmp_path, capsys):
        line = refusal(capsys, text_model_dir, shop, tmp_path / "out", "--asr", "none", "--no-text")
        assert "--asr none needs a model that reads text, but --no-text turns it off" in line
        assert "--asr" in refusal(capsys, text_model_dir, shop, tmp_path / "out", "--asr", "louder")


def test_refuses_a_missing_checkpoint(shop, tmp_path, capsys):
    assert "there is no checkpoint folder" in refusal(capsys, tmp_path / "gone", shop, tmp_path / "out")
    assert "nobody/nothing needs the Hub, but HF_HUB_OFFLINE is set" in refusal(
        capsys, "nobody/nothing", shop, tmp_path / "out"
    )


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "ri'), "incomplete checkpoint"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    ],
)
def test_refuses_a_half_written_checkpoint(model_dir, shop, tmp_path, capsys, damage, words):
    damage(model_dir)
    assert words in refusal(capsys, model_dir, shop, tmp_path / "out")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_refuses_truncated_weights(model_dir, shop, tmp_path, capsys, share):
    weights = model_dir / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(len(data) * share)])
    assert "model.safetensors is cut short or damaged" in refusal(capsys, model_dir, shop, tmp_path / "out")


def test_refuses_weights_that_lack_a_part(model_dir, shop, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    weights = load_file(model_dir / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})
    assert "model.safetensors is not what was saved" in refusal(capsys, model_dir, shop, tmp_path / "out")
    (model_dir / "model.sha256").unlink()
    assert "lacks 1 weights of its model, such as visual_projection.weight" in refusal(
        capsys, model_dir, shop, tmp_path / "out"
    )


def test_refuses_a_checkpoint_without_processor(model_dir, shop, tmp_path, capsys):
    for path in list(model_dir.iterdir()):
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    assert "has no processor" in refusal(capsys, model_dir, shop, tmp_path / "out")


def test_refuses_an_unknown_dataset(model_dir, tmp_path, capsys):
    assert "nowhere" in refusal(capsys, model_dir, "nowhere", tmp_path / "out")


def test_refuses_an_empty_gallery(model_dir, shop, tmp_path, capsys):
    (shop / "gallery.jsonl").write_text("")
    line = refusal(capsys, model_dir, shop, tmp_path / "out")
    assert "gallery.jsonl" in line


def test_refuses_a_gallery_without_readable_images(model_dir, shop, tmp_path, capsys):
    for name in COLOURS:
        (shop / "images" / f"{name}.png").write_bytes(b"")
    assert "not one of the 4 gallery images" in refusal(capsys, model_dir, shop, tmp_path / "out")


def test_refuses_matching_of_a_model_without_decoder(model_dir, shop, tmp_path, capsys):
    from modeling_rice import RiceConfig, RiceModel

    config = RiceConfig.from_pretrained(model_dir, use_decoder=False)
    RiceModel(config).save_pretrained(model_dir)
    line = refusal(capsys, model_dir, shop, tmp_path / "out", "--rank_by", "fused")
    assert "--rank_by fused needs a matching decoder" in line
    results = run(model_dir, shop, tmp_path / "out")
    assert list(results["scores"]) == ["embedding"] and results["fusion_weight"] is None
    assert results["protocol"]["rank_by"] == "embedding"


@pytest.mark.parametrize("option", [("--fusion_weight", "0"), ("--fusion_weight", "much"), ("--batch_size", "0")])
def test_refuses_options_out_of_range(model_dir, shop, tmp_path, capsys, option):
    assert option[0] in refusal(capsys, model_dir, shop, tmp_path / "out", *option)


def test_a_report_is_written_on_request(model_dir, shop, tmp_path):
    results = run(model_dir, shop, tmp_path / "out", "--report", "--rank_by", "embedding")
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"R@1 by embedding score is {100 * results['scores']['embedding']['R@1']:.1f} %" in page
    assert f"{results['speed']['clip_ms']:.2f} ms" in page and "http" not in page.replace("http-equiv", "")
    assert "was reconstructed from" in page and "no heat map" not in page


def test_head_and_tail_follow_the_data_of_the_models_run(model_dir, shop, tmp_path):
    """The evaluated shop trains on the first product alone; the model's own on three rows of the second and others."""
    own = shutil.copytree(shop, tmp_path / "own")
    names = list(COLOURS)
    for folder, products in ((shop, names[:1]), (own, [names[1]] * 3 + names[2:])):
        clip = json.loads((folder / "clips_val.jsonl").read_text().splitlines()[0])
        rows = [
            clip | {"query_id": f"train-{i}", "gt_gallery_ids": [name], "category": name[0]}
            for i, name in enumerate(products)
        ]
        write_lines(folder / "clips_train.jsonl", rows)
    assert run(model_dir, shop, tmp_path / "unknown", "--baselines")["head_tail"]["head"] == [names[0][0]]
    (model_dir / "train_arguments.json").write_text(json.dumps({"dataset": "shop_clips", "data_dir": str(own)}))
    results = run(model_dir, shop, tmp_path / "known", "--baselines")
    assert results["head_tail"]["head"] == [names[1][0]] and results["head_tail"]["data_dir"] == str(own)
    counts = {name: group["num_queries"] for name, group in results["by"]["head_tail"].items()}
    assert counts == {"head": 2, "tail": 4, "not in training": 2}
    shutil.rmtree(own)
    missing = run(model_dir, shop, tmp_path / "gone", "--baselines")
    assert missing["head_tail"]["missing"] and "head_tail" not in missing["by"]

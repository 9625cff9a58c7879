"""The older recipe's optimiser: by hand, and against weights recorded after five official steps."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file

from modeling_rice.convert_rice_original_to_hf import convert_original_checkpoint
from training_rice.optimizer import VISION_STEM, BertAdam, freeze, published_parameter_groups, warmup_cosine

TOLERANCE = 1e-4


def test_two_steps_by_hand():
    weight = torch.tensor([2.0], requires_grad=True)
    optimizer = BertAdam([weight], lr=0.1, betas=(0.9, 0.99), eps=0.5, weight_decay=0.2)
    expected, first, second = 2.0, 0.0, 0.0
    for gradient in (3.0, -1.0):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        expected -= 0.1 * (first / (second**0.5 + 0.5) + 0.2 * expected)
        assert weight.item() == pytest.approx(expected, rel=1e-6)


def test_parameters_without_gradient_stay():
    used, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = BertAdam([used, unused])
    used.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(unused, torch.ones(2)) and not torch.equal(used, torch.ones(2))
    assert unused not in optimizer.state


def test_state_survives_saving():
    def run(interrupted):
        weight = torch.ones(3, requires_grad=True)
        optimizer = BertAdam([weight], lr=0.1)
        for step in range(4):
            if interrupted and step == 2:
                state = optimizer.state_dict()
                optimizer = BertAdam([weight], lr=0.5)
                optimizer.load_state_dict(state)
            weight.grad = torch.tensor([1.0, -2.0, 0.5]) * (step + 1)
            optimizer.step()
        return weight.detach()

    assert torch.equal(run(False), run(True))


@pytest.mark.parametrize(
    "arguments, message",
    [({"lr": -1.0}, "`lr`"), ({"betas": (0.9, 1.0)}, "`betas`"), ({"weight_decay": -0.1}, "`weight_decay`")],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BertAdam([torch.ones(1, requires_grad=True)], **arguments)


def test_schedule():
    factors = [warmup_cosine(step, 100) for step in range(101)]
    assert factors[0] == 0 and factors[5] == pytest.approx(0.5) and factors[9] == pytest.approx(0.9)
    assert factors[10] == pytest.approx(0.97553, abs=1e-5)
    assert factors[50] == pytest.approx(0.5) and factors[100] == pytest.approx(0)
    assert warmup_cosine(120, 100) == pytest.approx(0)


@functools.cache
def recorded_run(folder):
    start = load_file(folder / "golden_tiny_public.safetensors")
    weights = {key.removeprefix("weights/"): value for key, value in start.items() if key.startswith("weights/")}
    run = load_file(folder / "golden_tiny_train_public.safetensors")
    return weights, run, json.loads((folder / "golden_tiny_train_public.json").read_text())


def replay(folder, optimizer_class):
    """Five steps on the recorded batches; returns the trained model and what the steps reported."""
    weights, run, manifest = recorded_run(folder)
    model = convert_original_checkpoint(weights)
    hyper = manifest["hyper"]
    groups = published_parameter_groups(
        model, manifest["lr"], manifest["lr"] * manifest["coef_lr"], hyper["weight_decay"]
    )
    optimizer = optimizer_class(groups, betas=(hyper["b1"], hyper["b2"]), eps=hyper["e"])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, manifest["t_total"], hyper["warmup"])
    )
    rates, losses, norms = [], [], []
    for step in range(manifest["steps"]):
        batch = {name: run[f"inputs/step{step}/{name}"] for name in ("image", "video", "video_mask")}
        output = model(batch["image"], batch["video"], batch["video_mask"].bool())
        optimizer.zero_grad()
        output.loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), hyper["max_grad_norm"]).item())
        rates.append({group["lr"] for group in optimizer.param_groups})
        losses.append((output.contrastive_loss.item(), output.matching_loss.item()))
        optimizer.step()
        schedule.step()
    return model, rates, losses, norms


def trained_weights(folder):
    run = recorded_run(folder)[1]
    prefix = "outputs/weights_after/"
    after = {key.removeprefix(prefix): value for key, value in run.items() if key.startswith(prefix)}
    return dict(convert_original_checkpoint(after).named_parameters())


def test_recorded_steps_are_reproduced(reference_dir):
    folder = reference_dir
    manifest = recorded_run(folder)[2]
    model, rates, losses, norms = replay(folder, BertAdam)
    for step, expected in enumerate(manifest["learning_rate_used_per_step_per_group"]):
        assert sorted(rates[step]) == pytest.approx(sorted(set(expected)))
    assert norms == pytest.approx(manifest["global_grad_norm_before_clip_per_step"], rel=TOLERANCE)
    for (contrastive, matching), expected in zip(losses, manifest["losses_per_step"], strict=True):
        assert contrastive == pytest.approx(expected["contrastive_loss"], rel=TOLERANCE)
        assert matching == pytest.approx(expected["pairwise_loss"], rel=TOLERANCE)

    expected = trained_weights(folder)
    for name, parameter in model.named_parameters():
        # Its gradient is zero in exact arithmetic, and the step lengthens rounding noise to the learning rate.
        if name in ("decoder.head.score.bias", "logit_scale"):
            continue
        error = (parameter - expected[name]).abs().max() / expected[name].abs().max()
        assert error < TOLERANCE, f"{name}: {error:.1e} of the maximum"


def test_adamw_gives_other_weights(reference_dir):
    """Why there is a class of its own: under the same settings AdamW's bias correction changes the way."""
    folder = reference_dir
    model = replay(folder, torch.optim.AdamW)[0]
    start = dict(convert_original_checkpoint(recorded_run(folder)[0]).named_parameters())
    end = trained_weights(folder)
    way = torch.cat([(end[name] - start[name]).flatten() for name in end])
    apart = torch.cat([(parameter - end[name]).flatten() for name, parameter in model.named_parameters()])
    assert apart.norm() / way.norm() > 0.1


def test_the_stem_can_be_frozen(reference_dir):
    model = convert_original_checkpoint(recorded_run(reference_dir)[0])
    freeze(model, VISION_STEM)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[1] for name in frozen - {"logit_scale"}} == {"embeddings", "pre_layrnorm"}
    trained = {id(p) for group in published_parameter_groups(model) for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}

"""The plan of a run, its parameter groups, and what a checkpoint brings back."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import accaware as aa
from accaware.experiments.batches import EvalBatches
from accaware.experiments.images import NORMALIZATIONS
from accaware.experiments.settings import Settings
from accaware.experiments.training import Network, Plan, WholeFiles, accelerator, evaluate, parameter_groups
from accaware.formats import Method
from experiments.helpers import random_images

SETTINGS = Settings(lr=0.1, scale_lr=3.0, weight_decay=0.01, batch_size=10)


def test_epochs_become_steps() -> None:
    assert Plan.of(replace(SETTINGS, epochs=2, warmup=0.1), 99) == Plan(18, 2, None, 9)
    assert Plan.of(replace(SETTINGS, epochs=0.25), 99) == Plan(2, 0, None, 9)
    assert Plan.of(replace(SETTINGS, epochs=0.01), 99) == Plan(1, 0, None, 9)
    assert Plan.of(replace(SETTINGS, warmup=1), 99) == Plan(9, 8, None, 9)


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [1, 1, 1, 1]),
        ("x0.5/1", [1, 0.5, 0.25, 0.125]),
        ("x0.1/2", [1, 1, 0.1, 0.1]),
        ("x0.1@1@3", [1, 0.1, 0.1, 0.01]),
    ],
)
def test_schedules_change_the_rate_between_epochs(schedule: str, wanted: list[float]) -> None:
    plan = Plan.of(replace(SETTINGS, epochs=4, warmup=0, schedule=schedule), 30)
    assert [plan.rate(step) for step in range(12)] == pytest.approx([w for w in wanted for _ in range(3)])


def test_the_optimizer_is_a_choice() -> None:
    for name, kind in (("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)):
        settings = replace(SETTINGS, optimizer=name, momentum=0.5)
        network = Network(prepared(), random_images(20, 0), NORMALIZATIONS["cifar10"], settings, 0.0)
        optimizer = network.configure_optimizers()["optimizer"]
        assert type(optimizer) is kind
        assert name == "adam" or {group["momentum"] for group in optimizer.param_groups} == {0.5}


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    plan = Plan(10, 2)
    rates = [plan.rate(step) for step in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[6] == pytest.approx(0.5)
    assert 0 < rates[9] < 0.05
    assert plan.rate(10) == 0


def prepared(method: Method = "projected") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 30 * 30, 3))
    batches = EvalBatches(random_images(20, 0), 10, NORMALIZATIONS["cifar10"])
    aa.prepare_(model, aa.Spec(acc_bits=16, method=method), torch.zeros(1, 3, 32, 32))
    aa.calibrate(model, batches)
    return model


def test_only_weights_decay_and_quantizers_have_their_own_rate() -> None:
    model = prepared()
    decayed, plain, scales = parameter_groups(model, SETTINGS)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {"0.weight", "3.weight"}
    assert {names[id(p)] for p in plain["params"]} == {"0.bias", "1.weight", "1.bias", "3.bias"}
    assert len(decayed["params"] + plain["params"] + scales["params"]) == len(names)
    assert all("quant" in names[id(p)] for p in scales["params"])
    assert [g["weight_decay"] for g in (decayed, plain, scales)] == [0.01, 0, 0]
    assert [g["lr"] for g in (decayed, plain, scales)] == pytest.approx([0.1, 0.1, 0.3])


def test_a_model_without_parameters_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match="no parameters to train"):
        parameter_groups(nn.Flatten(), SETTINGS)


def test_the_loss_has_three_terms() -> None:
    model = prepared()
    images, norm = random_images(20, 0), NORMALIZATIONS["cifar10"]
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        teacher[3].weight.mul_(-1)
    batch = next(iter(EvalBatches(images, 20, norm)))
    settings = replace(SETTINGS, distill=0.5)
    losses = [
        float(Network(model, images, norm, settings, 0.0, t).training_step(batch, 0)["loss"].detach())
        for t in (None, teacher, model)
    ]
    logits, target = (net(batch[0]).detach().double().softmax(1) for net in (model, teacher))
    distance = (target * (target / logits).log()).sum(1).mean()
    assert losses[1] - losses[0] == pytest.approx(0.5 * float(distance), rel=1e-4)
    assert losses[2] == pytest.approx(losses[0])
    entropy = -logits[torch.arange(20), batch[1]].log().mean() + float(aa.penalty(model))
    assert losses[0] == pytest.approx(float(entropy), rel=1e-5)


def test_the_penalty_has_its_weight() -> None:
    model = prepared("a2q+")
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight_quant.t += 20
    images, norm = random_images(20, 0), NORMALIZATIONS["cifar10"]
    batch = next(iter(EvalBatches(images, 20, norm)))
    found = [
        Network(model, images, norm, replace(SETTINGS, penalty=weight), 0.0).training_step(batch, 0)
        for weight in (0, 2)
    ]
    assert found[0]["penalty"].item() == 0 < found[1]["penalty"].item() == 2 * aa.penalty(model, 1).item()
    assert (found[1]["loss"] - found[0]["loss"]).item() == pytest.approx(found[1]["penalty"].item(), rel=1e-3)


def test_the_teacher_is_no_part_of_a_checkpoint() -> None:
    network = Network(prepared(), random_images(20, 0), NORMALIZATIONS["cifar10"], SETTINGS, 0.0, nn.Linear(2, 2))
    assert all(name.startswith("model.") for name in network.state_dict())


class Bright(nn.Module):
    """The label of `random_images`, for all but the first image of a batch."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        level = (x.mean((1, 2, 3)) * 0.25 * 255 + 120).sub(50).div(70).round().long().clamp(0, 2)
        level[0] = (level[0] + 1) % 3
        return nn.functional.one_hot(level, 3).float()[:, : self.outputs]


@pytest.mark.parametrize("content", ["junk", [1, 2], {}, {"state_dict": {}}])
def test_what_is_no_checkpoint_of_a_run_is_named(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "step-1.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint .*step-1\.ckpt is damaged; without it, the run starts again"):
        WholeFiles().load_checkpoint(tmp_path / "step-1.ckpt", weights_only=True)


def test_top1_counts_and_leaves_the_mode_alone() -> None:
    model = Bright()
    batches = EvalBatches(random_images(25, 0), 10, NORMALIZATIONS["cifar10"])
    assert evaluate(model, batches, torch.device("cpu")) == pytest.approx(100 * 22 / 25)
    assert model.training


def test_an_output_without_room_for_the_labels_is_refused() -> None:
    batches = EvalBatches(random_images(25, 0), 10, NORMALIZATIONS["cifar10"])
    with pytest.raises(ValueError, match=r"the model's output has shape \[10, 2\]; \[10, 3\] or wider is needed"):
        evaluate(Bright(2), batches, torch.device("cpu"))


@pytest.mark.parametrize(
    ("device", "devices", "nodes", "wanted"),
    [
        ("cpu", 1, 1, ("cpu", 1, "auto")),
        ("cuda", 4, 1, ("gpu", 4, "ddp")),
        ("cuda:2", 1, 1, ("gpu", [2], "auto")),
        ("auto", 1, 2, ("auto", 1, "ddp")),
    ],
)
def test_devices_in_lightnings_words(device: str, devices: int, nodes: int, wanted: tuple[object, ...]) -> None:
    got = accelerator(replace(SETTINGS, device=device, devices=devices, num_nodes=nodes))
    assert (got["accelerator"], got["devices"], got["strategy"]) == wanted

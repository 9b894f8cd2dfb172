"""The scripts and functions of the papers' authors, where DomainBed is the work of others.

As in `test_authors`, each value is a gradient after three steps with Adam, from their code, which
was run once, outside this repository. The scripts add a penalty of the squared weights, and divide
all of the loss by the penalty's weight once its anneal is over.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam
from waves import close, gradient, minibatches, mixed, network, step, waves

import fastdg

L2 = 0.001

EXPECTED = {
    "IRM": [
        -0.02005547871843, 0.01903117741456, 0.01515109602667, -0.02293576837694,
        0.01840857799783, -0.01299697252755, -0.01505900644159, 0.01687792706752,
        -0.01732450474775, 0.01528464486163, 0.02990394850333, 0.01866891920485,
        -0.001666159267367,
    ],
    "VREx": [
        -0.003175295957507, 0.01204702447662, 7.050823923933e-05, -0.01206711680545,
        0.01889948817918, -0.01098604325145, -0.01606808043032, 0.01512654425342,
        -0.0027461633601, 0.0140466699285, 0.0338132986878, -0.0009361824106078,
        -0.01911555484569,
    ],
    "GroupDRO": [
        0.02837438926639, -0.1057835163588, -0.001115141926294, 0.1060708761539,
        -0.09811037818845, 0.0837489444759, 0.07652919739089, -0.1034696759492,
        0.1014654760907, -0.1434254065252, -0.08882031659687, -0.03097103522518,
        0.08882031659687, 0.03097103522518, 0.04026921691144, -0.04026921691144,
    ],
    "ANDMask": [
        0.0, -0.2488055729758, 0.0, 0.1731412265092,
        0.0, 0.0, 0.0, 0.0,
        0.0, 0.0, -0.1061960835609, -0.1074105533586,
        0.1061960835609, 0.1074105533586, 0.059058167283, -0.059058167283,
    ],
}  # fmt: skip


def as_the_scripts(opt: Any, model: nn.Module, weight: float, more: Tensor | None = None) -> None:
    """Step on the gradient that is there, and that of ``more`` and of the squared weights."""
    squares = sum(p.square().sum() for p in model.parameters())
    apart = L2 * squares if more is None else more + L2 * squares
    grads = torch.autograd.grad(apart, list(model.parameters()), retain_graph=True)
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = (p.grad + grad) / weight
    opt.step()


def binary(model: nn.Module, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits and labels of both domains."""
    x, y = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    return model(x)[:, 0], y.double()


def test_irm() -> None:
    """facebookresearch/InvariantRiskMinimization, commit fc185d0f828a98f57030ba3647efc7394d1be95a,
    colored_mnist: the square of one gradient of all samples, not the product of two halves'. Each
    sample twice makes the halves the same."""
    model = network(outputs=1)
    opt = fastdg.IRM(Adam(model.parameters(), lr=0.05), anneal_steps=1, reset_base=False)
    for number in range(3):
        parts = [minibatches(number)[d] for d in (0, 2)]
        logits, y = (v.repeat_interleave(2) for v in binary(model, parts))
        losses = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
        domains = torch.arange(2).repeat_interleave(torch.tensor([2 * len(x) for x, _ in parts]))
        opt.zero_grad()
        opt.backward(losses, domains, logits=logits)
        as_the_scripts(opt, model, 100.0 if number >= 1 else 1.0)
    close(gradient(model), EXPECTED["IRM"])


def test_vrex() -> None:
    """capybaralet/REx_code_release, commit 47dfb3a2f93a195389a9c933a66482eee455c720,
    finance_experiments: the unbiased variance, D / (D - 1) times the one here."""
    model = network(outputs=1)
    opt = fastdg.VREx(
        Adam(model.parameters(), lr=0.05),
        penalty_weight=100.0 * 3 / 2,
        pre_anneal_weight=3 / 2,
        anneal_steps=1,
        reset_base=False,
    )
    for number in range(3):
        logits, y = binary(model, minibatches(number))
        losses = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
        opt.zero_grad()
        opt.backward(losses, mixed(number)[2])
        as_the_scripts(opt, model, 100.0 if number >= 1 else 1.0)
    close(gradient(model), EXPECTED["VREx"])


def test_group_dro() -> None:
    """kohpangwei/group_DRO, commit cbbc1c5b06844e46b87e264326b56056d2a437d1: its LossComputer."""
    model = network()
    opt = fastdg.GroupDRO(Adam(model.parameters(), lr=0.05), eta=0.5)
    for number in range(3):
        step(opt, model, number)
    close(gradient(model), EXPECTED["GroupDRO"])


def test_and_mask() -> None:
    """gibipara92/learning-explanations-hard-to-vary, commit
    e45a7b01b87f0bc2f9a583a2c051e901efd66800: its mask and scale, on domains of one size. It adds
    1e-10 to a mean in float32."""
    model = network()
    opt = fastdg.ANDMask(Adam(model.parameters(), lr=0.05))
    for number in range(3):
        common = waves(4, 4, start=10 * number)
        parts = [common + waves(4, 4, start=10 * number + d + 1) / 2 for d in range(3)]
        losses = F.cross_entropy(model(torch.cat(parts)), torch.arange(12) % 2, reduction="none")
        opt.zero_grad()
        opt.backward(losses, torch.arange(3).repeat_interleave(4))
        opt.step()
    close(gradient(model), EXPECTED["ANDMask"], 1e-9)


# -- alexrame/fishr, commit 7b8fdf1e0b15226ded9b58efd37698e74e616ab7, coloredmnist --
# The script averages its two environments' means.

COLORED = {
    (4, 4): [
        -0.005039051906395, -0.002593525393908, 0.005707331957395, 0.001122765883537,
        -0.0008648220926645, 0.0006658328138128, 0.0006932892957543, -0.0008444398820689,
        0.00540792258455, 0.0002542860344534, -0.0008439815954249, -0.001057058607565,
        0.0002781096865799,
    ],
    (3, 5): [
        -0.009639385169792, -0.0008468326148159, 0.00985788321558, -0.001693401096773,
        0.0005032419420877, -0.0001298811556538, -0.0004697845679404, 0.0002509594210444,
        0.00243560693902, 0.000210895059269, -0.0032568884674, -0.004506845671027,
        -0.004560979649443,
    ],
}  # fmt: skip


@pytest.mark.parametrize("sizes", COLORED)
def test_fishr_in_the_colored_mnist_script(sizes: tuple[int, int]) -> None:
    model = network(outputs=1)
    opt = fastdg.Fishr(
        Adam(model.parameters(), lr=0.05),
        penalty_weight=1000.0,
        anneal_steps=1,
        reduction="sum",
        ema=None,
        pre_anneal_weight=1.0,
        reset_base=False,
    )
    domains = torch.arange(2).repeat_interleave(torch.tensor(sizes))
    for number in range(3):
        x = torch.cat([waves(n, 4, start=10 * number + 3 * d) for d, n in enumerate(sizes)])
        y = torch.cat([(torch.arange(n) + d) % 2 for d, n in enumerate(sizes)]).double()
        losses, again = (
            F.binary_cross_entropy_with_logits(model(x)[:, 0], y, reduction="none")
            for _ in range(2)
        )
        opt.zero_grad()
        opt.backward(losses, domains)
        # Here each sample counts the same, there each environment
        more = sum(again[domains == d].mean() for d in range(2)) / 2 - again.mean()
        as_the_scripts(opt, model, 1000.0 if number >= 1 else 1.0, more)
    close(gradient(model), COLORED[sizes])

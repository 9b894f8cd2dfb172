"""One value of MIRO and of RISE from their authors' code, which was run once, in float64, outside
this repository. No line of their code is here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam
from waves import close, filled, flat, gradient, waves

import fastdg


class Maps(nn.Module):
    """A stem that ends in a pool, a block, a mean over positions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        stem = [nn.Conv2d(3, 2, 3), nn.Tanh(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*stem, nn.Conv2d(2, 3, 2), nn.Tanh())
        self.head = nn.Linear(3, 2)
        filled(self.body)
        filled(self.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


# -- kakaobrain/miro, commit 52384553e9745b1dbd974aaf8db3908e5757f245 --
# Its weight 0.1 and multiplier 10 of the learning rate; the third of three steps of Adam.

MIRO = {"loss": 0.4907990608287721, "reg_loss": -2.074187712998385}
MIRO_GRADIENT = [  # of the block and the head
    -0.119553880032, -0.1287457082956, -0.1302914255777, -0.1202747395656,
    -0.126701748242, -0.1195614063768, -0.1278152571275, -0.1233595106156,
    -0.04908458898759, -0.04997496909669, -0.05040489476959, -0.04569659424902,
    -0.0497060716726, -0.04481950594115, -0.04703605770371, -0.05128678873135,
    0.144283249208, 0.1486616765251, 0.1511508525117, 0.1411908261765,
    0.1471493551709, 0.1397639815968, 0.1475913582364, 0.1474363724347,
    -0.1396321109777, -0.05502105905238, 0.1634487569468, -0.01034676729528,
    0.03074795267378, -0.004270067877859, 0.01034676729528, -0.03074795267378,
    0.004270067877859, -0.03332210213488, 0.03332210213488,
]  # fmt: skip
MIRO_BIAS_GRADIENTS = [
    0.01739555361369, 0.01158275187664, -0.006280031282896, -0.006564404320363, -0.01205411672661,
]  # fmt: skip
MIRO_BIASES = [
    -3.733279227594, -3.636257523209, -2.719927525076, -3.171769889264, -2.309635620305,
]  # fmt: skip


def test_miro() -> None:
    model = Maps()
    base = Adam(model.parameters(), lr=0.05)
    opt = fastdg.MIRO(base, model, layers=["body.2", "body.4"], num_domains=3)
    y, d = torch.arange(6) % 2, torch.arange(3).repeat_interleave(2)
    for number in range(3):
        x = torch.cat([waves(2, 3, 8, 8, start=10 * number + k) for k in range(3)])
        opt.zero_grad()
        opt.backward(F.cross_entropy(model(x), y, reduction="none"), d)
        opt.step()
    close(opt.statistics["objective"], [MIRO["loss"]])
    close(opt.statistics["miro"], [MIRO["reg_loss"]])
    close(torch.cat([gradient(model.body[3]), gradient(model.head)]), MIRO_GRADIENT)
    close(torch.cat([b.grad for b in opt.biases.values()]), MIRO_BIAS_GRADIENTS)
    close(flat(list(opt.biases.values())), MIRO_BIASES)


# -- WisconsinAIVision/RISE, commit ebf71b4c50fefc0ad5e8129f8fff5adcaacbf451, train_rise.py --
# Temperature 3, and the weights 0.9, 0.1 and 1 of its search on PACS. It logs RD a thousandfold.

RISE = {"CE": 1.3040346978907236, "Hint": 6.788218048777937, "AD": 1.1422940077870583}
RISE_RD = 0.15808014073567048
RISE_GRADIENT = [
    0.02261597669886, 0.09320076322047, -0.04663278710905, 0.08718841600835,
    0.04568410281279, -0.09896070625686, -0.007139867067585, -0.0385840283124,
    0.01708254629918, -0.01772414995427, -0.02979871857135, 0.02540295160424,
    -0.7558843292966, -0.3537516859842, 0.708673980297, 0.1582640415185,
    -0.9044043537815, -0.6264168682576, 1.028467009977, 0.07326554690655,
    0.4591104935794, 0.2564647140085, -0.5392898375372, -0.05393366392691,
    0.4452938602021, 0.3699521542491, -0.4891771724395, -0.01933188297964,
    -1.379479222968, 0.6326134163421, 0.7468658066258,
]  # fmt: skip


def test_rise() -> None:
    model = filled(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)))
    classes, anchors = waves(3, 4, start=3), waves(3, 2, 4, start=5)
    opt = fastdg.RISE(SGD(model.parameters(), lr=0.1), model[0], classes, anchors)
    x, y = waves(5, 3), torch.arange(5) % 3
    images = F.normalize(waves(5, 4, start=7), dim=1)
    logits = model(x)
    losses = F.cross_entropy(logits, y, reduction="none")
    teacher = 100 * images @ F.normalize(classes, dim=1).T
    inputs = {"labels": y, "logits": logits, "teacher_logits": teacher}
    opt.backward(0.1 * losses, torch.zeros_like(y), **inputs)
    close(losses.mean().detach(), [RISE["CE"]])
    close(opt.statistics["rise_distillation"], [RISE["Hint"]])
    close(opt.statistics["rise_absolute"], [RISE["AD"]])
    close(opt.statistics["rise_relative"], [RISE_RD])
    close(gradient(model), RISE_GRADIENT)

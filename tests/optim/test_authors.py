"""One value of each algorithm from its authors' code, which was run once, outside this repository.

Each value is a gradient (of Fish: the weights) after three steps of `waves.network` with Adam, so
that histories, anneals and resets have their part in it. No line of their code is here; the other
tests compare with definitions that were written for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam
from waves import close, flat, gradient, minibatches, network, step

import fastdg

NAN = float("nan")


# -- facebookresearch/DomainBed, commit b93c22a1cfc3b2428398272c1a116c8de1f4139e --
# Its defaults, but for the anneal at step 1 and where a value is given here. Fishr is the same in
# its authors' alexrame/fishr, commit 7b8fdf1e0b15226ded9b58efd37698e74e616ab7.

DOMAINBED: dict[str, dict[str, Any]] = {
    "Fishr": {"anneal_steps": 1},
    "IRM": {"anneal_steps": 1},
    "VREx": {"anneal_steps": 1},
    "GroupDRO": {"eta": 0.5},
    "IGA": {},
    "ANDMask": {},
    "SANDMask": {"threshold": 0.2, "steepness": 0.01},
}

BED = {
    "Fishr": [
        -1.804111370677, -0.4297885060031, 1.914863136097, -0.06365063882809,
        1.073909440754, -0.8858763672823, -0.8456288556521, 1.103785611819,
        -1.450653903896, 0.05176136209579, -1.609998625528, -1.203782484371,
        1.609998625528, 1.203782484371, -0.5102510354774, 0.5102510354774,
    ],
    "IRM": [
        -17.34177715404, 14.94056292236, 13.4917586056, -18.41724055175,
        13.86911945193, -12.28890204834, -10.7024047122, 15.04679389412,
        -28.90330780762, 23.72632156166, 0.5856377284732, -4.577010678895,
        -0.5856377284732, 4.577010678895, -19.32542118886, 19.32542118886,
    ],
    "VREx": [
        0.07993740106922, -0.1015958273796, -0.05375727506669, 0.115448485221,
        0.02582113527951, 0.08097282203712, -0.04668693989362, -0.06894211171552,
        0.4293342540721, -0.2689267113233, 0.09989274699724, 0.02796446867339,
        -0.09989274699724, -0.02796446867339, 0.2954400681225, -0.2954400681225,
    ],
    "GroupDRO": [
        0.02837438926639, -0.1057835163588, -0.001115141926294, 0.1060708761539,
        -0.09811037818845, 0.0837489444759, 0.07652919739089, -0.1034696759492,
        0.1014654760907, -0.1434254065252, -0.08882031659687, -0.03097103522518,
        0.08882031659687, 0.03097103522518, 0.04026921691144, -0.04026921691144,
    ],
    "IGA": [
        302.9384554306, -86.80169094787, -280.5706154822, 159.1016490799,
        -33.3407190841, -116.299444106, 63.30980520949, 99.98520443372,
        263.2288540288, 67.38706080377, 282.2963090993, 53.17754148249,
        -282.2963090993, -53.17754148249, 20.83386038562, -20.83386038562,
    ],
    "ANDMask": [
        0.09363743979821, -0.124241983021, -0.06162164885298, 0.1401212033893,
        -0.1303065817012, 0.108066005636, 0.1024591620078, -0.1344686034657,
        0.1646837279405, -0.1832709396349, 0.0, -0.03912300711276,
        0.0, 0.03912300711276, 0.0, 0.0,
    ],
    "SANDMask": [
        0.009966311658814, -0.1029294722261, 0.006339582078685, 0.09615699117606,
        -0.09871896332996, 0.08924743644803, 0.07955556560365, -0.1071032268437,
        0.01193162631346, -0.2549340644886, -0.06484167686622, -0.03748688492172,
        0.06484167686622, 0.03748688492172, 0.02855357214096, -0.02855357214096,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", DOMAINBED)
def test_domainbed(name: str) -> None:
    model = network()
    opt = getattr(fastdg, name)(Adam(model.parameters(), lr=0.05), **DOMAINBED[name])
    for number in range(3):
        step(opt, model, number)
    # DomainBed's mean of a mask is float32, to which 1e-10 is added
    close(gradient(model), BED[name], 1e-9 if name == "ANDMask" else 1e-10)


# -- Fish: DomainBed, and YugeTen/fish, commit 333efa24572d99da0a4107ab9cc4af93a915d2a9 --
# The authors divide their meta_lr by the number of inner steps; here `meta_lr` is the whole.

FISH = {
    "DomainBed": [
        0.04102222147556, 0.8938315616805, -0.2934396029766, -0.828680394272,
        0.4613714651017, 0.8485386977207, -0.6682279917031, -0.6965906980206,
        0.7028510396714, 0.5839576335669, 0.7363349918571, -0.6079386142619,
        -0.5998020525874, 0.8070715134793, -0.04859917080956, -0.8102040786947,
    ],
    "authors": [
        0.003619102361979, 0.9859522140342, -0.2592426562812, -0.9223308457299,
        0.4900827950624, 0.8012632293988, -0.6955948135921, -0.6199608210073,
        0.8104655944244, 0.4621051631704, 0.8719580795277, -0.5499503103967,
        -0.735425140258, 0.749083209614, 0.102400801904, -0.9612040514082,
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "meta_lr", "order", "amsgrad"),
    [("DomainBed", 0.5, (0, 1, 2), False), ("authors", 0.3 / 3, (2, 0, 1), True)],
)
def test_fish(name: str, meta_lr: float, order: tuple[int, ...], amsgrad: bool) -> None:
    model = network()
    base = Adam(model.parameters(), lr=0.05, amsgrad=amsgrad)
    opt = fastdg.Fish(base, num_domains=3, meta_lr=meta_lr)
    for number in range(3):
        for d in order:
            x, y = minibatches(number)[d]
            opt.zero_grad()
            opt.backward(F.cross_entropy(model(x), y, reduction="none"), torch.full_like(y, d))
            opt.step()
    close(flat(list(model.parameters())), FISH[name])


# -- lucasmansilla/DGvGS, commit c2b69f06c6a62963570ca75c9c4148381102f9b1 --
# The paper's scale is `reduction="sum"`; its PCGrad has one order for all domains.

AGR_SUM = [
    0.2795753261087, -0.3717219921571, -0.1837866619127, 0.4190817911819,
    -0.3911297239762, 0.3247206307415, 0.3074527930658, -0.4039478300261,
    0.4919394121843, -0.5500850987118, 0.0, -0.05954462122929,
    0.0, 0.05954462122929, 0.0, 0.0,
]  # fmt: skip
# Of the first step; NAN stands for noise
AGR_RAND = [
    NAN, NAN, NAN, NAN,
    NAN, NAN, NAN, NAN,
    NAN, NAN, 0.6804896705809, 0.6842680579716,
    -0.6804896705809, -0.6842680579716, 0.7697870182727, -0.7697870182727,
]  # fmt: skip
SIGMA = 0.7115149156084


def test_agr_sum() -> None:
    model = network()
    opt = fastdg.AgrSum(Adam(model.parameters(), lr=0.05), reduction="sum")
    for number in range(3):
        step(opt, model, number)
    close(gradient(model), AGR_SUM)


def test_agr_rand() -> None:
    """The entries that agree, and the standard deviation of the noise elsewhere."""
    model = network()
    opt = fastdg.AgrRand(Adam(model.parameters(), lr=0.05), reduction="sum")
    step(opt, model, 0)
    found, expected = gradient(model), torch.tensor(AGR_RAND, dtype=torch.float64)
    agreed = expected.isfinite()
    close(found[agreed], expected[agreed].tolist())
    close(opt.statistics["sigma"].reshape(1), [SIGMA])
    assert (found[~agreed].abs() > 1e-4).all()


# -- PCGrad: tianheyu927/PCGrad (the authors'), commit c5fbd7c856526373828074f06875230f7f3ee79e, --
# -- DGvGS, and WeiChengTseng/Pytorch-PCGrad, commit e987ac603fa1accd386820a985a6dc2fd92dec5b --
# The authors' code throws away what it shuffles, so that its order is 0, 1, 2; its functions of
# TensorFlow were PyTorch's. The third one takes the mean, and an order for each domain.

PCGRAD = {
    "authors": [
        -0.005910515880694, -0.2137666079338, 0.06099581687371, 0.1980486575754,
        0.2077337015302, 0.07012324834913, -0.225803690474, -0.01193612373076,
        0.7085926797599, -0.7204698274165, 0.1414062455866, 0.07619856833763,
        -0.1414062455866, -0.07619856833763, 0.7799853386085, -0.7799853386085,
    ],
    "DGvGS": [
        -0.006047825662181, -0.21375773225, 0.06113083948921, 0.1980049880503,
        0.2079726048033, 0.07000399613371, -0.2260118637643, -0.01176322755071,
        0.7086281013481, -0.7203918875004, 0.1413951470483, 0.07607350523589,
        -0.1413951470483, -0.07607350523589, 0.7798726871267, -0.7798726871267,
    ],
    "Pytorch-PCGrad": [
        -0.001970177447161, -0.07125553681092, 0.02033194465948, 0.06601621855553,
        0.06924457506139, 0.02337440682735, -0.07526790231564, -0.003978697206262,
        0.2361975642757, -0.2401566032931, 0.04713541904632, 0.02539951702554,
        -0.04713541904632, -0.02539951702554, 0.2599951154552, -0.2599951154552,
    ],
}  # fmt: skip


Draw = Callable[[torch.Generator], Tensor]


def seed_of(draw: Draw, wanted: list[Any]) -> int:
    """A seed with which a generator gives this order."""
    for seed in range(5000):
        if draw(torch.Generator().manual_seed(seed)).tolist() == wanted:
            return seed
    raise AssertionError("no seed gives this order")


@pytest.mark.parametrize(
    ("name", "given", "order"),
    [
        ("authors", {"reduction": "sum", "shared_order": True}, [0, 1, 2]),
        ("DGvGS", {"reduction": "sum", "shared_order": True}, [2, 0, 1]),
        ("Pytorch-PCGrad", {}, [[1, 2, 0], [0, 2, 1], [2, 1, 0]]),
    ],
)
def test_pcgrad(name: str, given: dict[str, Any], order: list[Any]) -> None:
    def draw(generator: torch.Generator) -> Tensor:
        if given:
            return torch.randperm(3, generator=generator)
        return torch.rand(3, 3, generator=generator, dtype=torch.float64).argsort(1)

    model, generator, seed = network(), torch.Generator(), seed_of(draw, order)
    opt = fastdg.PCGrad(Adam(model.parameters(), lr=0.05), generator=generator, **given)
    for number in range(3):
        generator.manual_seed(seed)
        step(opt, model, number, conflict=True)
    close(gradient(model), PCGRAD[name])

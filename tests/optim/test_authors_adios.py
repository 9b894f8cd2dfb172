"""One value of each form of ADIOS from its authors' code, run once, outside this repository.

YugeTen/adios, commit 21c6f23f74656046f93105989874c7bac62cefa6, with small networks in place of its
own: three steps with the weights of its ImageNet100-S script. Each value is the masker's gradient
and the projection's in the third step, and of BYOL the projection of the target after it. The
target moves in each step, which needs a trainer that counts a step before it ends it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from waves import filled, flat, gradient, waves

import fastdg

# Which mask of which image, in the order of the steps: the encoder's, the masker's
DRAWS = [[0, 1, 2], [2, 0, 0], [1, 1, 0], [0, 2, 1], [2, 2, 0], [1, 0, 2]]

EXPECTED = {
    "SimCLR": [
        -0.01576822686902, -0.0322424518342, -0.04029478654574, -0.148249982133,
        -0.1317577379142, -0.08084971122051, 0.164018209002, 0.1640001897484,
        0.1211444977663, 0.4563422151404, -0.01825093967887, -0.4380912754615,
        -0.05975174495395, -0.6542293695493, -0.03249379052396, 1.032846317779,
        0.1450293548461, 0.09606797802402,
    ],
    "SimCLR, single": [
        -0.01662285765094, -0.03375037663092, -0.04206212783163, -0.1437703728164,
        -0.1255937373255, -0.07461138725242, 0.1603932304673, 0.1593441139564,
        0.116673515084, 0.4315107086045, -0.001876371714134, -0.4296343368904,
        1.0429767127, 0.7505260144904, 0.3575565975577, -0.8583715029979,
        -0.7520276827104, -0.5158559413947,
    ],
    "BYOL": [
        -0.01809802917476, -0.03331228207926, -0.03982519970031, -0.1443143048752,
        -0.1267843160658, -0.07613762753145, 0.16241233405, 0.1600965981451,
        0.1159628272318, 0.4440610093036, -0.01003914165647, -0.4340218676471,
        -0.01240459358694, -1.300752240961, 0.105441805062, -1.00699355362,
        1.258828593884, 1.274075082057, -0.001145152989494, 0.9938684528352,
        -0.2473660029021, -0.8974597394731, 0.8418801488854, 0.4498784648667,
    ],
    "BYOL, single": [
        -0.01514474806467, -0.03206251873827, -0.04060539858602, -0.1493346264117,
        -0.1324568018199, -0.08098059575224, 0.1644793744764, 0.1645193205582,
        0.1215859943383, 0.4613304725908, -0.02204132498196, -0.4392891476089,
        -0.004406218831121, -0.06266895696037, -0.06289280908974, -0.2806549223902,
        0.1281285156073, 0.5171895764573, -0.0005144485391278, 0.9920901272542,
        -0.2536232249419, -0.917578739947, 0.8414658196577, 0.4337050762705,
    ],
    "SimSiam": [
        0.1492946430646, 0.1553865517848, 0.1208907132471, -0.03113277541622,
        -0.05603592662874, -0.06630221254468, -0.1181618676484, -0.09935062515608,
        -0.0545885007024, 0.196056106387, -0.4808646617734, 0.2848085553864,
        -0.02332329049954, -0.003489513827447, -0.1362342912272, -0.13185576885,
        0.1101203354341, 0.5273544452008,
    ],
    "SimSiam, single": [
        0.153635840396, 0.1592985745836, 0.1233517215224, -0.03736474543452,
        -0.06255339817094, -0.07140278933081, -0.1162710949615, -0.09674517641262,
        -0.05194893219163, 0.2162210263542, -0.4903592081941, 0.2741381818399,
        -0.05455538902914, -0.03367426329468, -0.1827444552542, -0.1035358112562,
        0.03233522947974, 0.07292252502366,
    ],
    "SimSiam, no symmetry": [
        0.1493132608005, 0.1554203378908, 0.1209308426228, -0.03110464940544,
        -0.05600448170785, -0.06627566228485, -0.118208611395, -0.09941585618299,
        -0.05465518033791, 0.1959720058126, -0.4809160852979, 0.2849440794853,
        -0.02245487576006, -0.00296031107713, -0.1311572304588, -0.1270993050499,
        0.112710444165, 0.5288450316359,
    ],
    "SimSiam, no symmetry, single": [
        0.153578084899, 0.1592874720962, 0.1233901720702, -0.03729257072588,
        -0.06249639219402, -0.07137584233291, -0.1162855141731, -0.09679107990215,
        -0.05201432973726, 0.2160790745321, -0.4903030014786, 0.2742239269465,
        -0.05350045754166, -0.03338146471604, -0.1777722552847, -0.1015390304896,
        0.03315855586048, 0.07470147343929,
    ],
}  # fmt: skip


def objective(name: str) -> fastdg.Objective:
    encoder = filled(nn.Sequential(nn.Flatten(), nn.Linear(12, 2), nn.Tanh()))
    network = nn.Sequential(encoder, filled(nn.Linear(2, 2)))
    predictor = filled(nn.Linear(2, 2))
    if name.startswith("SimCLR"):
        return fastdg.SimCLR(network)
    if name.startswith("BYOL"):
        return fastdg.BYOL(network, predictor, total_steps=3)
    symmetry = "no symmetry" not in name
    return fastdg.SimSiam(network, predictor, both_views=True, symmetry_mask=symmetry)


@pytest.mark.parametrize("name", EXPECTED)
def test_adios(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    aim = objective(name)
    masker = filled(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Softmax(1)))
    adios = fastdg.ADIOS(
        SGD([p for p in aim.parameters() if p.requires_grad], lr=0.1, momentum=0.9),
        SGD(masker.parameters(), lr=0.1, momentum=0.9),
        masker,
        objective=aim,
        penalty=0.9229467944410698,
        entropy=0.711773255433044,
        single="single" in name,
    )
    draws = iter(DRAWS)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: torch.tensor(next(draws)))
    for number in range(3):
        adios.step(waves(3, 3, 2, 2, start=number), waves(3, 3, 2, 2, start=number + 5))
    found: list[Tensor] = [gradient(masker), gradient(aim.network[1])]
    if isinstance(aim, fastdg.BYOL):
        found.append(flat(list(aim.target[1].parameters())))
    expected = torch.tensor(EXPECTED[name], dtype=torch.float64)
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-9, atol=1e-11)

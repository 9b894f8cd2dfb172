"""Every algorithm of the package in a sentence: what ``fastdg list`` shows, and the names by which
the command line and the studies call them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import fastdg

FAMILIES = {
    "losses": "penalties and weights of the domains' losses",
    "features": "penalties on features, and networks that teach",
    "gradients": "the domains' gradients made alike",
    "surgery": "the domains' gradients combined without conflicts",
    "flatness": "flat minima, and averages of weights",
}
# Of a step, from the cheapest to the dearest
COSTS = {
    "plain": "a forward and a backward, as plain training",
    "head": "plain training's, and per-sample gradients of the last layer alone",
    "average": "plain training's, and an average of the weights",
    "teacher": "plain training's, and a frozen network's forward",
    "domains": "one backward, which has every domain's gradient",
    "turns": "a step on each domain, one after the other",
    "double": "a second backward, through the gradients of all layers",
    "twice": "two forwards and backwards",
    "four times": "four forwards and backwards",
    "search": "in a window of steps, hundreds of forwards and backwards",
}
# Family -> title, cost, and the gradient that a step goes along
_TABLE = {
    "losses": """
ERM | plain | the mean loss: plain training, the baseline
IRM | plain | the loss, and a penalty on the gradient of a scale of the logits
VREx | plain | the loss, and the variance of the domains' losses
GroupDRO | plain | the domains' losses, the worst with the largest weight
EQRM | plain | a high quantile of the domains' losses
RDM | plain | the loss, and the distance of the worst domain's losses from all losses
SD | plain | the loss, and the squares of the logits
""",
    "features": """
CORAL | plain | the loss, and distances between the domains' means and covariances of features
CausIRL | plain | the loss, and a distance of the features in two random parts of all domains
MMD | plain | the loss, and distances between the domains' features by a kernel
IB-ERM | plain | the loss, and the variance of the features in each domain
IB-IRM | plain | IRM's objective, and the variance of the features in each domain
MIRO | teacher | the loss, and how badly the features predict a pre-trained network's
RISE | teacher | the loss, and distances to a language model's embeddings of the classes
""",
    "gradients": """
Fishr | head | the loss, and distances between the domains' variances of gradients
IGA | double | the loss, and distances between the domains' gradients
Fish | turns | a part of the way that a step on each domain in turn leads
PGrad | turns | the principal directions of the points on a way over all domains
POGM | turns | a part of CAGrad's combination of the ways that the domains lead
MLDG | turns | gradients of some domains, and of others after a step on those
GGA | search | the loss, from weights near by at which the domains agree
GGA-L | domains | the loss, and noise that grows as the domains' gradients disagree
""",
    "surgery": """
Agr-Sum | domains | the mean gradient where all domains have the same sign, else 0
Agr-Rand | domains | Agr-Sum, with noise in place of the 0
AND-mask | domains | the mean gradient where a share of the domains has the same sign
SAND-mask | domains | AND-mask, with a smooth mask
PCGrad | domains | each domain's gradient without its components against the others'
GradVac | domains | PCGrad, with the angle that two domains usually have
MGDA | domains | the shortest convex combination of the domains' gradients
CAGrad | domains | near the mean gradient, the most progress of the worst domain
UPGrad | domains | each domain's gradient projected onto the directions that hurt none
DualProj | domains | the mean gradient projected onto the directions that hurt no domain
IMTL-G | domains | the combination with the same projection onto each domain's gradient
Aligned-MTL | domains | the domains' gradients made orthogonal and of one length
ConFIG | domains | the direction with the same angle to each domain's gradient
Nash-MTL | domains | the largest product of all domains' progress
FairGrad | domains | fair progress of the domains, from the largest sum to the largest minimum
GramSurgery | domains | the domains' gradients, weighted by your own function of their Gram matrix
""",
    "flatness": """
SAM | twice | the gradient at the worst weights near by
GSAM | twice | SAM's, less the part of the gradient here that is orthogonal to it
SAGM | twice | the mean of the gradients here and at worse weights near by
DISAM | twice | SAM's, with an ascent that lets no domain run ahead
GAM | four times | SAM's, at weights where the gradient's length is small near by too
GENIE | plain | the gradient, scaled entry by entry by how sure it is, with noise where it is not
SWAD | average | the loss, or any algorithm's gradient; weights are averaged in a valley
SMA | average | the loss, or any algorithm's gradient; weights are averaged from a step on
""",
}
# Other names of theirs in the studies
ALIASES = {"fishr-head": "fishr", "v-rex": "vrex"}


@dataclass(frozen=True)
class Entry:
    """An algorithm of the package.

    Attributes:
        title: in tables and figures; in small letters it is the name for the command line, and
            without hyphens, in any letters, that of the class.
        family: a key of `FAMILIES`.
        cost: a key of `COSTS`.
        sentence: the gradient that a step goes along.
    """

    title: str
    family: str
    cost: str
    sentence: str

    @property
    def wrapper(self) -> type[fastdg.DomainOptimizer]:
        """Return the class."""
        (found,) = (name for name in fastdg.__all__ if _plain(name) == _plain(self.title))
        kind: type[fastdg.DomainOptimizer] = getattr(fastdg, found)
        return kind

    @property
    def papers(self) -> str:
        """Return the references of the class's docstring."""
        text = (inspect.getdoc(self.wrapper) or "").partition("Reference:\n")[2]
        return " ".join(text.partition("\n\n")[0].split())

    @property
    def paper(self) -> str:
        """Return the first of them in short: authors, venue and year."""
        whole = re.match(r".*?\b(?:19|20)\d\d\b", self.papers)
        assert whole is not None, self.title
        authors, _, rest = whole[0].partition(": ")
        names = authors.split(", ")
        if len(names) > 2 or authors.endswith(" et al."):
            authors = f"{names[0].removesuffix(' et al.')} et al."
        return f"{authors}, {rest.rsplit(', ', 1)[-1]}" if rest else whole[0]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", name.lower())


def _entries() -> dict[str, Entry]:
    found = {}
    for family, table in _TABLE.items():
        for line in table.strip().splitlines():
            title, cost, sentence = line.split(" | ")
            found[title.lower()] = Entry(title, family, cost, sentence)
    return found


ALGORITHMS = _entries()


def resolved(names: Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    """Return the names as ``known`` spells them, each once; one that is not there as it is.

    Case, hyphens, underscores and spaces do not count: ``agr-sum``, ``AgrSum`` and ``agr_sum`` are
    one.
    """
    spelled = {_plain(name): name for name in known}
    spelled |= {_plain(alias): to for alias, to in ALIASES.items() if to in known}
    return tuple(dict.fromkeys(spelled.get(_plain(name), name) for name in names))


def nearest(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that is most like this one, None if none is."""
    found = get_close_matches(_plain(name), [_plain(each) for each in known], 1)
    return resolved(found, known)[0] if found else None

"""ADIOS: an encoder that recognises masked images, and a masker that makes this hard."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.base_optimizer import Wrapping
from ..core.errors import refuse_ranks
from ..core.hyper import check_switch, check_weight
from ..dtypes import to_statistics_dtype
from .masks import check_masks, chosen
from .objectives import Objective
from .restored import frozen, undone_on_error

LEAST = 1e-10  # as in the reference, in the area's penalty


class ADIOS:
    r"""Adversarial masking, which pre-trains an encoder without labels: a min-max of two
    optimizers.

    A masker divides the image x' into N masks, :math:`\sum_k m_k = 1` at every pixel. One step of
    the encoder, then one of the masker:

    .. math::
        \min_{\text{encoder}} \; &\sum_k L_k, \qquad
            L_k = L\bigl(z(x), z(x' \circ (1 - m_k))\bigr), \\
        \max_{\text{masker}} \; &\sum_k \Bigl( L_k - \alpha\,\tfrac1B \sum_b
            \frac1{\sin(\pi\,\bar m_{kb}) + 10^{-10}} \Bigr) - \beta H, \\
        H = &-\sum_b \sum_k p_{kb} \log p_{kb}, \qquad
            p_{\cdot b} = \operatorname{softmax}_k \bar m_{kb}

    with :math:`\bar m_{kb}` the area of mask k in image b. The penalty excludes empty and full
    masks; :math:`\beta > 0` makes the masks of an image differ in size. H is a sum over the batch's
    images, all other terms are means: :math:`\beta` weighs more in a larger batch.

    The whole image is encoded once and compared with all N masked ones: 2 (N + 1) encodings a step,
    where one for each pair takes 4 N. The backward of each comparison runs before the next
    comparison, so at most two are in memory. The masker runs once. Its step does not change the
    encoder, including buffers such as running statistics and ``requires_grad`` flags.

    A step that raises leaves both networks and both optimizers as they were, and may be called
    again. So a step holds a copy of them.

    So batch norm sees each whole image once and N masked ones: with its momentum of 0.1 and N = 4
    whole images weigh 16 % in the running statistics. In the authors' code, which encodes them for
    every mask and for a probe, they weigh 52 %. Training does not read the statistics. Before the
    encoder runs in ``eval`` mode, ``torch.optim.swa_utils.update_bn(loader, objective.network)``
    computes them from whole images alone.

    Args:
        encoder_optimizer: optimizer of the parameters of ``objective``.
        masker_optimizer: optimizer of the parameters of ``masker``. Schedulers, hooks and gradient
            clipping (``register_step_pre_hook``) work on both as usual.
        masker: images ``[B, C, H, W]`` -> masks ``[B, N, H, W]`` that sum to one over N, such as
            `UNetMasker`.
        objective: L: `SimCLR`, `BYOL`, `SimSiam` or another `Objective`; holds the encoder. With
            ``objective.both_views`` x is masked too, by its own masks: 2 (2 N + 2) encodings. The
            penalty is then a sum over the masks of both views, and p a softmax over these 2 N areas
            (with ``single`` over N areas of each view), as in the authors' code.
        penalty: :math:`\alpha`.
        entropy: :math:`\beta`.
        single: ADIOS-s: each image is compared with one of its masks (the same in both views),
            drawn anew in each of the two steps: 4 encodings. The penalty and the entropy cover all
            masks.
        generator: generator of the drawn masks with ``single``; None: torch's global generator,
            whose state the user saves.

    The defaults are the authors' for SimCLR on ImageNet100-S, in
    ``bash_files/training/imagenet100s/resnet18/simclr_adios.sh`` of YugeTen/adios, to three digits:
    N 4, batches of 128, SGD with momentum 0.9, weight decay 1e-4, learning rates 0.111 (encoder)
    and 0.0145 (masker), warmed up for 10 of 500 epochs and then on a cosine. The script wraps both
    in LARS (trust coefficient 0.02, clipped), which only makes steps shorter. Its values for BYOL
    are :math:`\alpha` 0.404, :math:`\beta` 0, N 6; for SimSiam 0.2, 0.286, 4.

    Raises:
        TypeError, ValueError: an argument is not as described, or a parameter is in the wrong
            optimizer.

    Reference:
        Shi, Siddharth, Torr, Kosiorek: Adversarial Masking for Self-Supervised Learning, ICML 2022.

    Example:
        >>> objective = fastdg.SimCLR(nn.Sequential(backbone, projection))
        >>> masker = fastdg.UNetMasker(masks=4)
        >>> like = {"momentum": 0.9, "weight_decay": 1e-4}
        >>> adios = fastdg.ADIOS(
        ...     torch.optim.SGD(objective.parameters(), lr=0.111, **like),
        ...     torch.optim.SGD(masker.parameters(), lr=0.0145, **like),
        ...     masker,
        ...     objective=objective,
        ... )
        >>> for images, _ in loader:
        ...     statistics = adios.step(augment(images), augment(images))
    """

    def __init__(
        self,
        encoder_optimizer: Optimizer,
        masker_optimizer: Optimizer,
        masker: nn.Module,
        *,
        objective: Objective,
        penalty: float = 0.923,
        entropy: float = 0.712,
        single: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(masker, nn.Module):
            raise TypeError(f"masker: expected an nn.Module, got {type(masker).__name__}.")
        if not isinstance(objective, Objective):
            raise TypeError(
                "objective: expected a fastdg.Objective, such as fastdg.SimCLR(network), got "
                f"{type(objective).__name__}."
            )
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator: expected a torch.Generator or None, got {type(generator).__name__}."
            )
        check_weight("penalty", penalty)
        check_weight("entropy", entropy)
        check_switch("single", single)
        _check("encoder_optimizer", encoder_optimizer, objective, masker, "masker")
        _check("masker_optimizer", masker_optimizer, masker, objective, "objective")
        self.encoder_optimizer, self.masker_optimizer = encoder_optimizer, masker_optimizer
        self.masker, self.objective = masker, objective
        self.penalty, self.entropy, self.single = penalty, entropy, single
        self.generator = generator
        self.steps = 0

    def step(self, whole: Tensor, view: Tensor | None = None) -> dict[str, Tensor]:
        """Make one step of the encoder, then one of the masker.

        Args:
            whole: x, images ``[B, C, H, W]``, encoded without masks.
            view: x', another view of the same images, to mask; default: ``whole``.

        Returns:
            0-dim tensors, detached: ``loss``, the mean of the encoder's :math:`L_k`;
            ``masker_loss``, the mean of the masker's, after the encoder's step; ``penalty``
            (without :math:`\\alpha`) and ``entropy`` (H); and ``areas`` ``[N]``, the means over
            images (``[2 N]`` with masks of both views, x first).

        Raises:
            TypeError, ValueError: the views are of different images; the masker returns no masks.
            RuntimeError: training runs on several ranks; the masker has no gradient.
        """
        refuse_ranks(type(self).__name__, "Train in one process")
        view = whole if view is None else view
        if not isinstance(whole, Tensor):
            raise TypeError(f"whole: expected a tensor of images, got {type(whole).__name__}.")
        if not isinstance(view, Tensor) or len(whole) != len(view):
            got = len(view) if isinstance(view, Tensor) else type(view).__name__
            raise ValueError(
                f"view: expected another view of the {len(whole)} whole images, got {got}. Pass a "
                "tensor with one image for each."
            )
        both = self.objective.both_views
        plain, hidden = ((whole, view), (whole, view)) if both else ((whole,), (view,))
        networks = self.objective, self.masker
        optimizers = self.encoder_optimizer, self.masker_optimizer
        with undone_on_error(networks, optimizers, self.generator):
            # The values are checked once: a check in every step would wait for the device
            masks = [check_masks(self.masker(x), x, values=self.steps == 0) for x in hidden]
            loss = self._encode(plain, hidden, [m.detach() for m in masks])
            found = self._mask(plain, hidden, masks)
            self.objective.steps = self.steps
            self.objective.follow()
        self.steps += 1
        return {"loss": loss, **found}

    # -- the two steps --

    def _encode(
        self, plain: Sequence[Tensor], hidden: Sequence[Tensor], masks: Sequence[Tensor]
    ) -> Tensor:
        self.encoder_optimizer.zero_grad()
        whole = [self.objective.embed(x) for x in plain]
        leaves = [tuple(z.detach().requires_grad_(z.requires_grad) for z in one) for one in whole]
        losses = []
        for k in self._chosen(masks[0]):
            loss = self.objective.compare(leaves, self._embed(hidden, masks, k))
            loss.backward()
            losses.append(loss.detach())
        pairs = zip(itertools.chain(*whole), itertools.chain(*leaves), strict=True)
        reached = [(z, leaf.grad) for z, leaf in pairs if leaf.grad is not None]
        if reached:  # an objective may compare masked views alone
            torch.autograd.backward([z for z, _ in reached], [grad for _, grad in reached])
        self.encoder_optimizer.step()
        return torch.stack(losses).mean()

    def _mask(
        self, plain: Sequence[Tensor], hidden: Sequence[Tensor], masks: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        self.masker_optimizer.zero_grad()
        leaves = [m.detach().requires_grad_() for m in masks]
        losses = []
        with frozen(self.objective):
            with torch.no_grad():
                whole = [self.objective.embed(x) for x in plain]
            for k in self._chosen(leaves[0]):
                loss = self.objective.compare(whole, self._embed(hidden, leaves, k))
                (-loss).backward()
                losses.append(loss.detach())
        of_views = [to_statistics_dtype(m).flatten(2).mean(2) for m in masks]
        areas = torch.cat(of_views, 1)
        # The sine of a full area equals an empty one's, and rounding must not make it negative
        middle = torch.minimum(areas, 1 - areas).clamp(min=0)
        penalty = (1 / ((math.pi * middle).sin() + LEAST)).mean(0).sum()
        shares = [x.log_softmax(1) for x in (of_views if self.single else [areas])]
        entropy = -torch.stack([(share.exp() * share).sum() for share in shares]).sum()
        cost = self.penalty * penalty + self.entropy * entropy
        torch.autograd.backward([cost, *masks], [None, *(leaf.grad for leaf in leaves)])
        self.masker_optimizer.step()
        return {
            "masker_loss": torch.stack(losses).mean(),
            "penalty": penalty.detach(),
            "entropy": entropy.detach(),
            "areas": areas.detach().mean(0),
        }

    def _embed(
        self, images: Sequence[Tensor], masks: Sequence[Tensor], k: Tensor | int
    ) -> list[tuple[Tensor, ...]]:
        hidden = [x * (1 - chosen(m, k)) for x, m in zip(images, masks, strict=True)]
        return [self.objective.embed(x) for x in hidden]

    def _chosen(self, masks: Tensor) -> list[Tensor | int]:
        """Return the masks to compare with: each k, or a random k for each image ``[B]``."""
        B, N = masks.shape[:2]
        if not self.single:
            return list(range(N))
        device = masks.device if self.generator is None else self.generator.device
        drawn = torch.randint(N, (B,), generator=self.generator, device=device)
        return [drawn.to(masks.device)]

    # -- state --

    def state_dict(self) -> dict[str, Any]:
        """Return the state of a run: networks, optimizers, step count, and ``generator``'s state.

        ``torch.distributed.checkpoint`` loads nothing into optimizers without a step: pass it
        ``get_state_dict(objective, encoder_optimizer)``, the same for masker and masker_optimizer,
        and ``steps``.
        """
        return {
            "objective": self.objective.state_dict(),
            "masker": self.masker.state_dict(),
            "encoder_optimizer": self.encoder_optimizer.state_dict(),
            "masker_optimizer": self.masker_optimizer.state_dict(),
            "steps": self.steps,
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a state of `state_dict`, bit for bit.

        Raises:
            ValueError: it is another kind of state; or only one of the state and this object has a
                generator.
        """
        missing = self.state_dict().keys() - state_dict.keys()
        if missing:
            raise ValueError(
                f"state_dict: expected a state of ADIOS, got one without {sorted(missing)}. Pass "
                "the result of ADIOS.state_dict()."
            )
        state = state_dict["generator"]
        if (state is None) != (self.generator is None):
            has, here = ("none", "one") if state is None else ("one", "none")
            raise ValueError(
                f"state_dict: it has {has} of a generator's states, but this ADIOS has {here}, and "
                "would draw other masks. Create it with generator= as in the saved run."
            )
        self.objective.load_state_dict(state_dict["objective"])
        self.masker.load_state_dict(state_dict["masker"])
        self.encoder_optimizer.load_state_dict(state_dict["encoder_optimizer"])
        self.masker_optimizer.load_state_dict(state_dict["masker_optimizer"])
        self.steps = state_dict["steps"]
        if self.generator is not None and state is not None:
            self.generator.set_state(state.cpu())

    def __repr__(self) -> str:
        return (
            f"ADIOS(objective={type(self.objective).__name__}, "
            f"masker={type(self.masker).__name__}, penalty={self.penalty}, "
            f"entropy={self.entropy}, single={self.single})"
        )


def _check(argument: str, optimizer: Any, own: nn.Module, other: nn.Module, name: str) -> None:
    """Raise unless ``optimizer`` has parameters of ``own`` and none of ``other``."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{argument}: expected a torch.optim.Optimizer, got {type(optimizer).__name__}."
        )
    if isinstance(optimizer, Wrapping) and optimizer.role != "average":
        raise TypeError(
            f"{argument}: ADIOS has no losses by domain, got {type(optimizer).__name__}. Pass the "
            "optimizer inside it."
        )
    parameters = {p for group in optimizer.param_groups for p in group["params"]}
    if not parameters & set(own.parameters()):
        raise ValueError(
            f"{argument}: it has no parameter of this {type(own).__name__}. Create it from its "
            "parameters()."
        )
    if wrong := [key for key, p in other.named_parameters() if p in parameters]:
        raise ValueError(
            f"{argument}: expected no parameters of the {name}, got {wrong[0]!r}. Remove them: the "
            "two are trained in opposite directions."
        )

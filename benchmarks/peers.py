"""The same numbers by other means, each at its best correct settings.

Every maker takes a `Problem` of its own and returns a function without arguments. Makers of
variances return parameter name -> ``[D, *shape]``; makers of penalties return parameter name ->
gradient.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from models import Position, Problem
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

Named = dict[str, Tensor]
Run = Callable[[], Named]


def missing(package: str) -> str | None:
    """Why a peer cannot run here, or None."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed (pip install -e '.[peers]')"
    return None


# ---- from sums over samples ----


def _finish(total: Named, squares: Named, n: int) -> tuple[Named, Named]:
    mean = {k: s / n for k, s in total.items()}
    variance = {
        k: (q / n).addcmul_(mean[k], mean[k], value=-1).clamp_(min=0) for k, q in squares.items()
    }
    return mean, variance


def _variances(problem: Problem, grads: Named) -> Named:
    """Of all per-sample gradients held; ``torch.var`` over dimension 0 is ten times slower."""
    out = {}
    for name, g in grads.items():
        parts = [g[rows] for (rows,) in problem.spans()]
        out[name] = torch.stack([(part - part.mean(0)).square().mean(0) for part in parts])
    return out


def _gap(variance: Named) -> Tensor:
    gaps = [(v - v.mean(0)).square().sum() for v in variance.values()]
    return torch.stack(gaps).sum()


def _stack(domains: list[Named]) -> Named:
    return {name: torch.stack([d[name] for d in domains]) for name in domains[0]}


def _sample_loss(problem: Problem) -> Callable[..., Tensor]:
    def loss(params: Named, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(problem.model, params, (x[None],)), y[None])

    return loss


def _gap_slopes(
    variance: list[Named], mean: list[Named], n: list[int]
) -> Iterator[tuple[Named, Named]]:
    """For each domain the slope and level with d(penalty)/d(g_i) = slope * g_i + level."""
    for v, m, count in zip(variance, mean, n, strict=True):
        slope = {k: (v[k] - sum(w[k] for w in variance) / len(variance)) * (4 / count) for k in v}
        yield slope, {k: -slope[k] * m[k] for k in v}


# ---- a loop over samples ----


def _loop_moments(problem: Problem) -> tuple[list[Named], list[Named], list[int]]:
    names, params = zip(*problem.parameters.items(), strict=True)
    means, variances, counts = [], [], []
    for samples in problem.spans(1):
        total = [torch.zeros_like(p) for p in params]
        squares = [torch.zeros_like(p) for p in params]
        for i in samples:
            loss = F.cross_entropy(problem.model(problem.x[i]), problem.y[i])
            g = torch.autograd.grad(loss, params)
            torch._foreach_add_(total, g)
            torch._foreach_addcmul_(squares, g, g)
        mean, variance = _finish(
            dict(zip(names, total, strict=True)),
            dict(zip(names, squares, strict=True)),
            len(samples),
        )
        means.append(mean)
        variances.append(variance)
        counts.append(len(samples))
    return means, variances, counts


def loop_variance(problem: Problem) -> Run:
    """One backward for each sample, sums and sums of squares kept."""
    return lambda: _stack(_loop_moments(problem)[1])


def loop_penalty(problem: Problem) -> Run:
    """Two passes over the samples: the moments, then each one's share of the penalty's gradient."""
    names, params = zip(*problem.parameters.items(), strict=True)

    def run() -> Named:
        means, variances, counts = _loop_moments(problem)
        out = [torch.zeros_like(p) for p in params]
        slopes = _gap_slopes(variances, means, counts)
        for samples, (slope, level) in zip(problem.spans(1), slopes, strict=True):
            for i in samples:
                loss = F.cross_entropy(problem.model(problem.x[i]), problem.y[i])
                g = torch.autograd.grad(loss, params, create_graph=True)
                seeds = [
                    level[k].addcmul(slope[k], gi.detach()) for k, gi in zip(names, g, strict=True)
                ]
                share = torch.autograd.grad(g, params, seeds, allow_unused=True)
                for total, part in zip(out, share, strict=True):
                    if part is not None:
                        total += part
        return dict(zip(names, out, strict=True))

    return run


# ---- torch.func ----


def _detached(problem: Problem) -> Named:
    return {k: p.detach() for k, p in problem.parameters.items()}


def vmap_variance(problem: Problem, chunk: int, compiled: bool = False) -> Run:
    """``vmap(grad)`` over chunks of samples, sums and sums of squares kept."""
    sample_grads = vmap(grad(_sample_loss(problem)), (None, 0, 0))
    params = _detached(problem)

    def sums(params: Named, x: Tensor, y: Tensor) -> tuple[Named, Named]:
        g = sample_grads(params, x, y)
        return {k: v.sum(0) for k, v in g.items()}, {k: v.square().sum(0) for k, v in g.items()}

    if compiled:
        sums = torch.compile(sums)

    def run() -> Named:
        variances = []
        for parts, (rows,) in zip(problem.spans(chunk), problem.spans(), strict=True):
            total: Named = {}
            squares: Named = {}
            for part in parts:
                s, q = sums(params, problem.x[part], problem.y[part])
                total = {k: total[k].add_(v) for k, v in s.items()} if total else s
                squares = {k: squares[k].add_(v) for k, v in q.items()} if squares else q
            variances.append(_finish(total, squares, rows.stop - rows.start)[1])
        return _stack(variances)

    return run


def vmap_penalty(problem: Problem) -> Run:
    """Every sample's gradient at once, differentiated through."""
    sample_grads = vmap(grad(_sample_loss(problem)), (None, 0, 0))
    params = problem.parameters

    def run() -> Named:
        g = sample_grads(params, problem.x, problem.y)
        penalty = _gap(_variances(problem, g))
        grads = torch.autograd.grad(penalty, list(params.values()), allow_unused=True)
        return _zeros(params, grads)

    return run


def vmap_penalty_chunked(problem: Problem, chunk: int) -> Run:
    """Two passes in chunks: the moments, then the chunks' shares; one chunk of gradients alive."""
    sample_grads = vmap(grad(_sample_loss(problem)), (None, 0, 0))
    params = problem.parameters

    def run() -> Named:
        means, variances, counts = [], [], []
        for parts, (rows,) in zip(problem.spans(chunk), problem.spans(), strict=True):
            total: Named = {}
            squares: Named = {}
            for part in parts:
                with torch.no_grad():
                    g = sample_grads(_detached(problem), problem.x[part], problem.y[part])
                    total = {k: total.get(k, 0) + v.sum(0) for k, v in g.items()}
                    squares = {k: squares.get(k, 0) + v.square().sum(0) for k, v in g.items()}
            counts.append(rows.stop - rows.start)
            mean, variance = _finish(total, squares, counts[-1])
            means.append(mean)
            variances.append(variance)
        out = {k: torch.zeros_like(p) for k, p in params.items()}
        slopes = _gap_slopes(variances, means, counts)
        for parts, (slope, level) in zip(problem.spans(chunk), slopes, strict=True):
            for part in parts:
                g = sample_grads(params, problem.x[part], problem.y[part])
                seeds = [slope[k] * v.detach() + level[k] for k, v in g.items()]
                share = torch.autograd.grad(
                    list(g.values()), list(params.values()), seeds, allow_unused=True
                )
                for k, v in zip(params, share, strict=True):
                    if v is not None:
                        out[k] += v
        return out

    return run


def _zeros(params: Named, grads: tuple[Tensor | None, ...]) -> Named:
    return {
        k: torch.zeros_like(p) if g is None else g
        for (k, p), g in zip(params.items(), grads, strict=True)
    }


# ---- Opacus ----


def out_of_place(model: nn.Module) -> nn.Module:
    """In-place activations off: full backward hooks do not go with them."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


def opacus_variance(problem: Problem) -> Run:
    """``GradSampleModule``: all per-sample gradients held, then reduced domain by domain."""
    from opacus import GradSampleModule

    model = GradSampleModule(out_of_place(problem.model), loss_reduction="sum", strict=False)

    def run() -> Named:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(problem.x), problem.y, reduction="sum").backward()
        with torch.no_grad():
            out = _variances(problem, {k: p.grad_sample for k, p in problem.parameters.items()})
        model.zero_grad(set_to_none=True)
        return out

    return run


# ---- BackPACK ----


def _batch_grad() -> Any:
    """BatchGrad, with the layers it lacks added in the way its documentation describes."""
    from backpack.extensions import BatchGrad
    from backpack.extensions.firstorder.base import FirstOrderModuleExtension

    class Norm(FirstOrderModuleExtension):
        def __init__(self) -> None:
            super().__init__(params=["weight", "bias"])

        def weight(self, ext: Any, module: Any, g_inp: Any, g_out: Any, quantities: Any) -> Tensor:
            x = module.input0
            if isinstance(module, nn.GroupNorm):
                normal = F.group_norm(x, module.num_groups, None, None, module.eps)
                return (g_out[0] * normal).flatten(2).sum(2)
            normal = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
            return (g_out[0] * normal).flatten(1, -2).sum(1)

        def bias(self, ext: Any, module: Any, g_inp: Any, g_out: Any, quantities: Any) -> Tensor:
            if isinstance(module, nn.GroupNorm):
                return g_out[0].flatten(2).sum(2)
            return g_out[0].flatten(1, -2).sum(1)

    class Offset(FirstOrderModuleExtension):
        def __init__(self) -> None:
            super().__init__(params=["weight"])

        def weight(self, ext: Any, module: Any, g_inp: Any, g_out: Any, quantities: Any) -> Tensor:
            return g_out[0]

    extension = BatchGrad()
    for kind in (nn.GroupNorm, nn.LayerNorm):
        extension.set_module_extension(kind, Norm())
    extension.set_module_extension(Position, Offset())
    return extension


def _forget(problem: Problem, *fields: str) -> None:
    for p in problem.model.parameters():
        p.grad = None
        for field in fields:
            if hasattr(p, field):
                delattr(p, field)


def backpack_variance(problem: Problem) -> Run:
    """``BatchGrad``: all per-sample gradients held, then reduced domain by domain."""
    from backpack import backpack, extend

    model = extend(out_of_place(problem.model))
    criterion = extend(nn.CrossEntropyLoss(reduction="sum"))

    def run() -> Named:
        _forget(problem, "grad_batch")
        with backpack(_batch_grad()):
            criterion(model(problem.x), problem.y).backward()
        out = _variances(problem, {k: p.grad_batch for k, p in problem.parameters.items()})
        _forget(problem, "grad_batch")
        return out

    return run


def backpack_squares(problem: Problem) -> Run:
    """``SumGradSquared`` and the gradient, one forward and backward for each domain."""
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    if problem.name in ("mnist_cnn", "vit"):
        raise NotImplementedError("SumGradSquared has no rule for GroupNorm and LayerNorm")
    model = extend(out_of_place(problem.model))
    criterion = extend(nn.CrossEntropyLoss(reduction="sum"))

    def run() -> Named:
        variances = []
        for (rows,) in problem.spans():
            _forget(problem, "sum_grad_squared")
            with backpack(SumGradSquared()):
                criterion(model(problem.x[rows]), problem.y[rows]).backward()
            total = {k: p.grad for k, p in problem.parameters.items()}
            squares = {k: p.sum_grad_squared for k, p in problem.parameters.items()}
            variances.append(_finish(total, squares, rows.stop - rows.start)[1])
        _forget(problem, "sum_grad_squared")
        return _stack(variances)

    return run


def backpack_penalty(problem: Problem) -> Run:
    """``BatchGrad`` with ``create_graph``: all per-sample gradients held and differentiated."""
    from backpack import backpack, extend

    model = extend(out_of_place(problem.model))
    criterion = extend(nn.CrossEntropyLoss(reduction="sum"))

    def run() -> Named:
        _forget(problem, "grad_batch")
        params = problem.parameters
        with backpack(_batch_grad()):
            loss = criterion(model(problem.x), problem.y)
            torch.autograd.backward(loss, create_graph=True)
        penalty = _gap(_variances(problem, {k: p.grad_batch for k, p in params.items()}))
        _forget(problem, "grad_batch")
        return _zeros(
            params, torch.autograd.grad(penalty, list(params.values()), allow_unused=True)
        )

    return run

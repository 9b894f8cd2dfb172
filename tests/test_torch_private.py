"""Private names of torch: all in ``fastdg/_torch.py``, there in this torch, and as relied on."""

from __future__ import annotations

import ast
import contextvars
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim import optimizer

import fastdg
from fastdg import _torch

PACKAGE = Path(fastdg.__file__).parent
# Attributes of torch's objects; of torch's modules every underscore is found
ATTRIBUTES = {
    *("_base", "_input_metadata", "_sequence_nr", "_forward_cls", "_raw_saved_", "_version"),
    "_orig_mod",
    *("_backward_hooks", "_post_accumulate_grad_hooks", "_get_fsdp_state", "_fsdp_param_group"),
    *("_fsdp_param_groups", "_unsharded_param", "_per_optimizer_states", "_current_level"),
    *(
        f"_optimizer_{table}_{when}_hooks"
        for table in ("step", "state_dict", "load_state_dict")
        for when in ("pre", "post")
    ),
}


def dotted(node: ast.expr) -> list[str]:
    """``["torch", "_C", "_is_tracing"]`` of ``torch._C._is_tracing``."""
    if isinstance(node, ast.Name):
        return [node.id]
    return [*dotted(node.value), node.attr] if isinstance(node, ast.Attribute) else []


def is_private(name: str) -> bool:
    return name == "experimental" or (name.startswith("_") and not name.startswith("__"))


def private_names(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            path = dotted(node)
            of_torch = path[:1] == ["torch"] and any(map(is_private, path[1:]))
            of_scaler = path[:1] == ["scaler"] and is_private(node.attr)
            if of_torch or of_scaler or node.attr in ATTRIBUTES:
                yield ".".join(path) or node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            if any(map(is_private, names)):
                yield f"{node.module}: {names[-1]}"
        elif isinstance(node, ast.Import):
            yield from (
                alias.name
                for alias in node.names
                if alias.name.startswith("torch.") and any(map(is_private, alias.name.split(".")))
            )
        elif isinstance(node, ast.Constant) and node.value in ATTRIBUTES:
            yield str(node.value)


def test_no_other_file_uses_a_private_name() -> None:
    folders = (PACKAGE, PACKAGE.parent / "kernels")
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    # An annotation, which is not run: torch.ops has no public type
    allowed = {("backends.py", "torch._ops"), ("backends.py", "torch._ops.OpOverload")}
    found = {
        (path.name, name)
        for path in files
        if path.name != "_torch.py"
        for name in private_names(path.read_text())
    }
    assert len(files) > 100
    assert found <= allowed


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._C._is_tracing()",
        "from torch.utils import _pytree",
        "import torch.utils._pytree",
        "from torch.fx.experimental.proxy_tensor import make_fx",
        "x._version",
        "getattr(p, '_post_accumulate_grad_hooks', None)",
        "scaler._scale",
    ],
)
def test_a_private_name_is_found(source: str) -> None:
    assert list(private_names(source))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
def test_what_runs_is_known() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(_torch.functorch_active())
        return x.sin()

    look(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2))
    assert seen == [False, True]

    assert not _torch.forward_ad_active()
    with forward_ad.dual_level():
        assert _torch.forward_ad_active()

    class Mode(_torch.TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return op(*args, **(kwargs or {}))

    before = _torch.dispatch_modes()
    with Mode():
        assert _torch.dispatch_modes() == before + 1

    traced: list[bool] = []
    assert not _torch.jit_tracing()
    torch.jit.trace(lambda x: (traced.append(_torch.jit_tracing()), x + 1)[1], torch.ones(2))
    assert traced[0]


def test_a_backward_is_known_by_its_thread_and_context() -> None:
    variable = contextvars.ContextVar[int]("variable")
    seen: list[tuple[bool, int | None]] = []

    def hook(grad: Tensor) -> None:
        context = _torch.context_of_backward()
        seen.append((_torch.in_backward(), None if context is None else context.get(variable)))

    x = torch.ones(2, requires_grad=True)
    x.register_hook(hook)
    assert not _torch.in_backward()
    variable.set(3)
    x.sum().backward()
    assert seen in ([(True, 3)], [(True, None)])  # a thread that calls needs no copy


def test_nodes_show_their_outputs_their_order_and_their_function() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    x = torch.ones(2, 3, requires_grad=True)
    values, _ = x.exp().max(1)
    node = values.grad_fn
    assert node is not None
    (first, *others) = _torch.metadata_of(node)
    assert tuple(first.shape) == (2,) and first.dtype == x.dtype and first.device == x.device
    assert all(other is None or not other.dtype.is_floating_point for other in others)

    older, newer = x.exp().grad_fn, Double.apply(x).grad_fn
    assert _torch.sequence_number(newer) > _torch.sequence_number(older)
    assert _torch.function_of(newer) is Double
    assert _torch.function_of(older) == ""

    for kept in (newer._raw_saved_tensors[0], older._raw_saved_result):
        assert kept.unpack_hook is None and kept.data is not None
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert x.exp().grad_fn._raw_saved_result.unpack_hook is not None
    assert any(name.startswith(_torch.RAW_SAVED) for name in dir(type(older)))


def test_hooks_of_a_node_have_an_order_and_a_grad_mode_of_their_own() -> None:
    x = torch.ones(2, requires_grad=True)
    below = x.exp()
    node, seen = below.sin().grad_fn, []
    assert node is not None and below.grad_fn is not None
    node.register_hook(lambda found, grads: seen.append("second"))
    _torch.register_first_hook(node, lambda found, grads: seen.append("first"))
    node.register_prehook(lambda grads: torch.set_grad_enabled(False) and None)
    below.grad_fn.register_prehook(lambda grads: seen.append(torch.is_grad_enabled()))
    out = torch.autograd.graph.GradientEdge(node, 0)
    torch.autograd.grad([out], [x], [torch.ones(2)], create_graph=True)
    assert seen == ["first", "second", True]
    assert torch.is_grad_enabled()


def test_tensors_show_their_version_and_hooks() -> None:
    x = torch.ones(2)
    before = _torch.version_of(x)
    x.add_(1)
    assert _torch.version_of(x) == before + 1

    p = nn.Parameter(torch.ones(2))
    assert not any(_torch.hook_tables(p))
    handle = p.register_hook(lambda grad: grad * 2)
    p.register_post_accumulate_grad_hook(lambda p: None)
    of_gradient, of_accumulated = _torch.hook_tables(p)
    assert len(of_gradient) == len(of_accumulated) == 1
    own = dict(of_gradient)
    of_gradient.clear()  # what is taken out of the table is not called
    p.sum().backward()
    of_gradient.update(own)
    p.sum().backward()
    assert p.grad is not None and p.grad.tolist() == [3.0, 3.0]
    handle.remove()
    assert not _torch.hook_tables(p)[0]


def test_lists_of_tensors_and_assertions() -> None:
    a, b = [torch.zeros(2), torch.ones(3)], [torch.full((2,), 4.0), torch.full((3,), 5.0)]
    _torch.foreach_copy_(a, b)
    _torch.foreach_div_(a, 2.0)
    _torch.foreach_lerp_(a, b, 0.5)
    assert [t[0].item() for t in a] == [3.0, 3.75]

    _torch.assert_later(torch.tensor(True), "message")
    with pytest.raises(RuntimeError, match="message"):
        _torch.assert_later(torch.tensor(False), "message")


def test_modules_optimizers_and_scalers() -> None:
    assert isinstance(nn.BatchNorm2d(2), _torch.BatchNorm)
    assert isinstance(nn.SyncBatchNorm(2), _torch.BatchNorm)
    assert isinstance(nn.Dropout1d(), _torch.Dropout) and isinstance(
        nn.AlphaDropout(), _torch.Dropout
    )

    model = nn.Linear(2, 2)
    assert _torch.original(model) is model
    assert _torch.original(torch.compile(model, backend="eager")) is model
    assert list(_torch.fsdp_parameters(model)) == []

    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for table in ("state_dict_pre", "load_state_dict_pre", "load_state_dict_post", "step_pre"):
        hook = lambda *args: None  # noqa: E731
        getattr(opt, f"register_{table}_hook")(hook)
        hooks = _torch.optimizer_hooks(opt, table)
        assert hooks is not None and hook in hooks.values()

    seen = []
    stepped = fastdg.ERM(torch.optim.SGD(model.parameters(), lr=0.1))
    assert type(stepped).step is fastdg.core.optimizer.DomainOptimizer.step  # torch saw the mark
    for register in (
        stepped.register_step_pre_hook,
        stepped.register_step_post_hook,
        optimizer.register_optimizer_step_pre_hook,
        optimizer.register_optimizer_step_post_hook,
    ):
        handle = register(lambda opt, *args: seen.append(opt))
        stepped.backward(model(torch.ones(2, 2)).sum(1), 0)
        stepped.step()
        handle.remove()
    assert [opt for opt in seen if opt is not stepped.base] == [stepped] * 4
    stepped.backward(model(torch.ones(2, 2)).sum(1), 0)
    with torch.profiler.profile() as profile:
        stepped.step()
    assert "Optimizer.step#ERM.step" in {event.name for event in profile.events()}

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert _torch.scale_of(scaler) is None
    assert not _torch.scaler_state(scaler, opt)
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    scale = _torch.scale_of(scaler)
    assert scale is not None and scale.item() == 8
    scaler.unscale_(opt)
    assert set(_torch.scaler_state(scaler, opt)) == {"stage", "found_inf_per_device"}
    assert not _torch.takes_scale(opt)
    assert _torch.takes_scale(torch.optim.SGD(model.parameters(), lr=0.1, fused=True))


def test_hooks_of_a_step_that_calls_the_wrappers_run_once() -> None:
    class Mine(fastdg.ERM):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    model, seen = nn.Linear(2, 2), list[str]()
    for kind in (fastdg.ERM, Mine, fastdg.ERM, Mine):
        opt = kind(torch.optim.SGD(model.parameters(), lr=0.1))
        opt.register_step_pre_hook(lambda *args: seen.append("before"))
        opt.register_step_post_hook(lambda *args: seen.append("after"))
        opt.backward(model(torch.ones(2, 2)).sum(1), 0)
        opt.step()
    assert seen == ["before", "after"] * 4


def test_trees_and_graphs() -> None:
    leaves, spec = _torch.pytree.tree_flatten({"a": 1, "b": [2, 3]})
    assert leaves == _torch.pytree.tree_leaves({"a": 1, "b": [2, 3]}) == [1, 2, 3]
    assert _torch.pytree.tree_unflatten([4, 5, 6], spec) == {"a": 4, "b": [5, 6]}

    modes: list[bool] = []

    def traced(x: Tensor) -> Tensor:
        modes.append(_torch.get_proxy_mode() is not None)
        return torch.autograd.grad(x.sin().sum(), x)[0]

    graph = _torch.make_fx(traced)(torch.zeros(2, requires_grad=True))
    assert modes == [True] and _torch.get_proxy_mode() is None
    assert torch.equal(graph(torch.zeros(2)), torch.ones(2))
    (error,) = _torch.unknown_size_errors()
    assert issubclass(error, RuntimeError)


def test_the_compiler_is_not_imported_before_it_is_needed() -> None:
    """It takes seconds, and most users never trace a step."""
    names = ("torch._dynamo", "sympy", "triton")
    code = f"import sys, torch, fastdg; print([name for name in {names} if name in sys.modules])"
    ran = run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_what_is_not_compiled_leaves_the_graph() -> None:
    seen: list[bool] = []

    @_torch.not_compiled
    def look(x: Tensor) -> Tensor:
        seen.append(torch.compiler.is_compiling())
        return x + 1

    compiled = torch.compile(lambda x: look(x.sin()).cos(), backend="eager")
    torch.testing.assert_close(compiled(torch.zeros(2)), torch.ones(2).cos())
    assert seen == [False]


def test_kernels_of_ops() -> None:
    assert _torch.has_kernel(torch.ops.aten.mm.default, "CPU")
    library = torch.library.Library("fastdg_test_kernels", "FRAGMENT")
    library.define("f(Tensor x) -> Tensor")
    op = torch.ops.fastdg_test_kernels.f.default
    assert not _torch.has_kernel(op, "CPU") and not _torch.has_kernel(op, "CUDA")
    library.impl("f", torch.neg, "CPU")
    assert _torch.has_kernel(op, "CPU") and not _torch.has_kernel(op, "CUDA")


def test_a_row_without_a_number_has_softmax_zero() -> None:
    x = torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf], [torch.nan, 0.0]])
    found = _torch.safe_softmax(x, -1)
    assert found[:2].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert found[2].isnan().all()


def test_a_view_made_without_gradients_has_no_graph() -> None:
    leaf = torch.ones(2, requires_grad=True)
    x = leaf * 2
    with torch.no_grad():
        view, computed = x.view(2, 1), x + 1
    assert view.requires_grad and view.grad_fn is None
    assert [_torch.has_graph(t) for t in (leaf, x, x.view(2, 1), view, computed)] == [
        *(True, True, True, False, False)
    ]

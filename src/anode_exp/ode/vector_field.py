"""The right-hand side of an ODE: f(t, y, θ), with its parameters explicit and its evaluations counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Theta = tuple[Tensor, ...]
"""θ, one entry per parameter of f: of the parameter's shape (constant in time), or with a leading axis of n_steps."""


@dataclass
class Evaluations:
    """Number of evaluations of f (NFE): ``forward`` in the solve, ``backward`` while it is differentiated.

    Steps are those of adaptive solves, in each direction: every attempt is either accepted or rejected. A step of a
    fixed grid that is halved counts as rejected.

    For implicit methods, in both directions: ``newton`` iterations, ``linear`` iterations (basis vectors of GMRES), and
    ``jacobians`` formed.
    """

    forward: int = 0
    backward: int = 0
    accepted: int = 0
    rejected: int = 0
    backward_accepted: int = 0
    backward_rejected: int = 0
    newton: int = 0
    linear: int = 0
    jacobians: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward


@dataclass
class Trial:
    """Whether the evaluations of a trial count."""

    keep: bool = False


class VectorField:
    """dy/dt = f(t, y, θ) for a module ``f(t, y)``; θ replaces the module's parameters in their order.

    The module must be a deterministic function of (t, y, θ): gradient modes evaluate it again at the same point.
    Running statistics of batch and instance norm are the exception: they advance in forward evaluations only.

    ``evaluations`` counts every call since the field was made, or since its owner last replaced the counter.

    Attributes:
        leaves_trace: let running statistics advance in re-evaluations too, as ANODE's published code does.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.evaluations = Evaluations()
        self.leaves_trace = False
        self._re_evaluating = False
        self._forward: Callable[[float, Tensor], Tensor] = module

    @property
    def theta(self) -> Theta:
        """The module's own parameters."""
        return tuple(self.module.parameters())

    def __call__(self, t: float, y: Tensor, theta: Theta) -> Tensor:
        """Evaluate f once.

        Args:
            t: time; if several steps are evaluated at once, a tensor with the time of each row of y, [rows, 1].
            y: state, any shape.
            theta: parameters at time t, each of the module's own shape.

        Returns:
            dy/dt, of y's shape and dtype.

        Raises:
            ValueError: if θ does not have one entry per parameter, or the module's output does not have y's shape.
        """
        self.count(1)
        places = [(m._parameters, name, p) for m in self.module.modules() for name, p in m._parameters.items()]
        own = list(dict.fromkeys(p for *_, p in places if p is not None))
        if len(own) != len(theta):
            raise ValueError(
                f"theta has {len(theta)} entries, the vector field {len(own)} parameters; pass one for each"
            )
        if all(given is p for given, p in zip(theta, own, strict=True)):
            dy = self._forward(t, y)
        else:
            # torch.func.functional_call does the same, but takes several times as long, which matters for a small f.
            given_for = dict(zip(own, theta, strict=True))
            try:
                for owner, name, p in places:
                    owner[name] = None if p is None else given_for[p]  # type: ignore[assignment]
                dy = self._forward(t, y)
            finally:
                for owner, name, p in places:
                    owner[name] = p
        if dy.shape != y.shape:
            raise ValueError(
                f"the vector field maps a state of shape {tuple(y.shape)} to {tuple(dy.shape)}; "
                "dy/dt must have the state's shape"
            )
        # Under autocast a norm may return float32 for a bfloat16 state; the result gets the state's dtype.
        return dy.to(y.dtype)

    def compile(self, backend: str = "inductor", batch_size: int | None = None) -> None:
        """Compile the module's forward, for this field only, as a single graph.

        Every shape is compiled separately. With ``batch_size`` only training on batches of that size is compiled; an
        epoch's smaller last batch and evaluations run uncompiled, with the same result up to rounding. Padding that
        batch would change the statistics of batch norm, and kernels for any size are slower on every other batch.

        torch keeps compiled variants by code object, so all fields of one class would share the recompilation limit;
        each gets a copy of the code. A graph break, or reaching the limit, raises an error in the first evaluation.
        A module whose tensors depend on t has a context manager ``at(t)`` that selects them: they are inputs of the
        graph, and t itself is not compiled into it.

        Args:
            backend: of ``torch.compile``.
            batch_size: leading size of the states to compile for; None compiles for every state.
        """
        forward = type(self.module).forward
        own = FunctionType(
            forward.__code__.replace(), forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
        )
        compiled = torch.compile(own, fullgraph=True, backend=backend)
        # Variants: training and evaluation, with and without a graph, each for one batch size and then for any.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16)
        if hasattr(torch._dynamo.config, "use_recursive_dict_tags_for_guards"):
            # On by default up to torch 2.11. On Python 3.13.0 it takes a module whose attributes changed for an
            # unchanged one (CPython gh-125608), and the wrong graph is used.
            torch._dynamo.config.use_recursive_dict_tags_for_guards = False
        at: Callable[[float], AbstractContextManager[None]] = getattr(self.module, "at", lambda t: nullcontext())

        def forward_of(t: float, y: Tensor) -> Tensor:
            # Under a dispatch mode (such as one that counts bytes) torch would skip compilation, also in later calls.
            as_it_is = is_in_torch_dispatch_mode()
            if batch_size is not None:
                as_it_is |= len(y) != batch_size or not self.module.training
            if as_it_is:
                return own(self.module, t, y)
            with at(t):
                return compiled(self.module, t, y)

        self._forward = forward_of

    def theta_per_step(self, theta: Theta, n_steps: int) -> list[Theta]:
        """θ of each time step: constants repeated, entries with a leading axis of n_steps split.

        Raises:
            ValueError: if an entry has neither its parameter's shape nor (n_steps, *shape).
        """
        columns: list[tuple[Tensor, ...]] = []
        for entry, (name, parameter) in zip(theta, self.module.named_parameters(), strict=True):
            if entry.shape == parameter.shape:
                columns.append((entry,) * n_steps)
            elif entry.shape == (n_steps, *parameter.shape):
                columns.append(entry.unbind(0))
            else:
                raise ValueError(
                    f"theta for {name} has shape {tuple(entry.shape)}; allowed are {tuple(parameter.shape)} "
                    f"(constant in time) and {(n_steps, *parameter.shape)} (one for each of {n_steps} steps)"
                )
        return list(zip(*columns, strict=True)) if columns else [()] * n_steps

    def count(self, evaluations: int) -> None:
        """Count evaluations of f in the current direction."""
        name = "backward" if self._re_evaluating else "forward"
        setattr(self.evaluations, name, getattr(self.evaluations, name) + evaluations)

    def count_step(self, accepted: bool) -> None:
        """Count one attempt of an adaptive solve."""
        name = ("backward_" if self._re_evaluating else "") + ("accepted" if accepted else "rejected")
        setattr(self.evaluations, name, getattr(self.evaluations, name) + 1)

    @contextmanager
    def trial(self) -> Iterator[Trial]:
        """Context for evaluations that may be discarded: on exit, buffers are restored unless ``keep`` is set."""
        trial = Trial()
        saved = [] if self._re_evaluating else [(b, b.clone()) for b in self.module.buffers()]
        try:
            yield trial
        finally:
            if not trial.keep:
                for buffer, value in saved:
                    buffer.data.copy_(value)  # .data keeps the version that accepted steps' graphs saved

    @contextmanager
    def re_evaluation(self) -> Iterator[None]:
        """In this context, evaluations count as backward and do not change running statistics.

        In training mode batch norm then gets no running statistics at all; it normalises by the batch's own, so the
        output is bit for bit the same. In evaluation mode it only reads them.

        Raises:
            ValueError: if the module has active dropout, which a second evaluation cannot repeat.
        """
        if any(isinstance(m, _DropoutNd) and m.training and m.p > 0 for m in self.module.modules()):
            raise ValueError(
                "dropout inside a vector field cannot be evaluated again for the gradient; "
                "use gradient mode full_backprop, or move the dropout out of the ODE block"
            )
        self._re_evaluating, outer = True, self._re_evaluating
        with nullcontext() if self.leaves_trace else self.untraced():
            try:
                yield
            finally:
                self._re_evaluating = outer

    @contextmanager
    def untraced(self) -> Iterator[None]:
        """In this context, running statistics do not advance: norms in training mode use only the batch's own."""
        tracking = [
            m for m in self.module.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats
        ]
        for norm in tracking:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in tracking:
                norm.track_running_stats = True

    def vjp(self, t: float, y: Tensor, theta: Theta, a: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """f(t, y, θ) with its vector–Jacobian products aᵀ∂f/∂y and aᵀ∂f/∂θ, from one evaluation.

        Args:
            theta: detached; otherwise the hooks of what it was made from would run here.
            a: adjoint, of y's shape.

        Returns:
            f, aᵀ∂f/∂y, and aᵀ∂f/∂θ for each entry of θ that requires a gradient, in order; zeros where f does not
            depend on it.
        """
        return value_and_vjp(lambda y: self(t, y, theta), y, theta, a)


def value_and_vjp(
    function: Callable[[Tensor], Tensor], y: Tensor, theta: Theta, a: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """As ``VectorField.vjp``, for a function of y that may evaluate f more than once with this θ."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        value = function(y)
        wanted = (y, *(p for p in theta if p.requires_grad))
        grad_y, *grad_theta = torch.autograd.grad(value, wanted, a, materialize_grads=True)
    return value.detach(), grad_y, tuple(grad_theta)

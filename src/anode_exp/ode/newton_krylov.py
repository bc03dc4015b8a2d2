"""Newton's method for the stage equation of an implicit method, and the linear systems in it and in its adjoint.

    G(Y) = Y − z − c f(t, Y, θ) = 0,   c = h γ,   G'(Y) = I − c J,   J = ∂f/∂y.

Linear systems with I − c J or its transpose are solved in one of two ways. ``dense``: the Jacobian of every sample and
a batched LU factorisation, for small states whose samples do not depend on each other. ``gmres``: from products with J
or Jᵀ only, for states of any size; the whole batch is one system.

Sources: Hairer and Wanner, Solving ODEs II, IV.8; Saad and Schultz, SIAM J. Sci. Stat. Comput. 7(3), 1986.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from anode_exp.ode.controller import NewtonFailed
from anode_exp.ode.vector_field import Theta, VectorField

DENSE_AT_MOST = 64
"""Size of a sample's state up to which ``linear=None`` chooses dense Jacobians."""


@dataclass(frozen=True)
class NewtonKrylov:
    """How stage equations and their adjoints are solved.

    Attributes:
        linear: dense or gmres; None chooses by the size of a sample's state.
        rtol: Newton's method has converged when |update| ≤ rtol · |Y| for every sample, in Euclidean norms. None: 1e-12
            in float64, 1e-6 in float32. It converges quadratically, so the error left is much smaller.
        max_iterations: of Newton's method in one stage.
        krylov_rtol: residual of a linear solve by GMRES relative to its right-hand side; None: rtol / 10 in the adjoint
            and 1e-3 in Newton's iterations, whose directions need not be more accurate.
        krylov_size: basis vectors of GMRES, without restarts.

    Raises:
        ValueError: for another ``linear``.
    """

    linear: str | None = None
    rtol: float | None = None
    max_iterations: int = 50
    krylov_rtol: float | None = None
    krylov_size: int = 100

    def __post_init__(self) -> None:
        if self.linear not in (None, "dense", "gmres"):
            raise ValueError(f"linear={self.linear}: choose dense or gmres")

    def is_dense(self, y: Tensor) -> bool:
        size = y[0].numel() if y.dim() > 1 else y.numel()
        return self.linear == "dense" or (self.linear is None and size <= DENSE_AT_MOST)

    def tolerance(self, y: Tensor) -> float:
        return self.rtol if self.rtol is not None else (1e-12 if y.dtype == torch.float64 else 1e-6)

    @torch.no_grad()
    def solve(self, field: VectorField, theta: Theta, t: float, c: float, z: Tensor, guess: Tensor) -> Tensor:
        """Y with Y = z + c f(t, Y, θ), by Newton's method from the guess.

        Raises:
            NewtonFailed: after ``max_iterations``, or if the iterates are no longer finite or I − c J is singular.
        """
        y, before = guess, float("inf")
        for _ in range(self.max_iterations):
            field.evaluations.newton += 1
            update = self._update(field, theta, t, c, z, y)
            y = y + update
            change = change_of(update, y)
            if not change < float("inf"):
                raise NewtonFailed(f"Newton's method at t = {t:.6g}: the iterates are not finite; take more steps")
            # At the limit of rounding, updates stop shrinking before they are below the tolerance.
            if change <= self.tolerance(y) or (change >= before and change <= self.tolerance(y) ** 0.75):
                return y
            before = change
        raise NewtonFailed(
            f"Newton's method at t = {t:.6g} did not converge in {self.max_iterations} iterations (last update "
            f"{before:.2g} of the state); take more steps, or raise max_iterations"
        )

    def _update(self, field: VectorField, theta: Theta, t: float, c: float, z: Tensor, y: Tensor) -> Tensor:
        """−G'(y)⁻¹ G(y)."""
        if self.is_dense(y):
            field.evaluations.jacobians += 1
            rows = y if y.dim() > 1 else y[None]
            values, jacobian = linearised(field, theta, t, rows)
            return dense_solve(jacobian, c, z + c * values[: len(rows)].reshape(y.shape) - y)

        def product(v: Tensor) -> Tensor:
            field.evaluations.linear += 1
            return v - c * _jvp(field, theta, t, y, v)

        return gmres(product, z + c * field(t, y, theta) - y, self.krylov_rtol or 1e-3, self.krylov_size)

    def solve_adjoint(
        self, field: VectorField, theta: Theta, t: float, c: float, y: Tensor, a: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """w with (I − c J)ᵀ w = a, J at y; and Jᵀ w, (∂f/∂θ)ᵀ w of the entries of θ that require a gradient.

        One evaluation of f with a graph; its vector–Jacobian products do not evaluate f again.

        Raises:
            NewtonFailed: if GMRES does not converge, or I − c J is singular.
        """
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            dy = field(t, y, theta)
            wanted = (y, *(p for p in theta if p.requires_grad))

            def transposed(v: Tensor) -> Tensor:
                field.evaluations.linear += 1
                (product,) = torch.autograd.grad(dy, y, v, retain_graph=True, materialize_grads=True)
                return v - c * product

            if self.is_dense(y):
                field.evaluations.jacobians += 1
                w = dense_solve(_rows(dy, y), c, a, transposed=True)
            else:
                w = gmres(transposed, a, self.krylov_rtol or self.tolerance(y) / 10, self.krylov_size)
            of_y, *of_theta = torch.autograd.grad(dy, wanted, w, materialize_grads=True)
        return w, of_y, tuple(of_theta)


def change_of(update: Tensor, y: Tensor) -> float:
    """The largest |update| / |y| over samples; 0 where both vanish."""
    update, y = (x.flatten(1) if x.dim() > 1 else x.flatten()[None] for x in (update, y))
    tiny = torch.finfo(y.dtype).tiny
    return float((update.norm(dim=1) / y.norm(dim=1).clamp_min(tiny)).max())


def linearised(
    field: VectorField, theta: Theta, t: float | Tensor, y: Tensor, keep: bool = False
) -> tuple[Tensor, Tensor]:
    """f and ∂f/∂y of every sample, from one evaluation of f.

    f is evaluated on n copies of the samples, and the k-th copy is differentiated for row k of the Jacobian: for small
    states that is several times as fast as a backward pass that is vectorised over rows.

    Args:
        t: a time, or one for each sample, [B, 1].
        y: [B, …], n numbers per sample; f must not mix samples.
        keep: keep the graph of f.

    Returns:
        f of the copies, [n·B, …], the first B rows those of y; and the Jacobians, [B, n, n].
    """
    batch, n = len(y), y.shape[1:].numel()
    times = t if isinstance(t, float) else t.repeat(n, 1)
    with torch.enable_grad():
        copies = y.detach().repeat(n, *[1] * (y.dim() - 1)).requires_grad_()
        values = field(times, copies, theta)  # type: ignore[arg-type]
    units = torch.eye(n, dtype=y.dtype, device=y.device)[:, None].expand(n, batch, n).reshape(values.shape)
    (rows,) = torch.autograd.grad(values, copies, units, retain_graph=keep, materialize_grads=True)
    return (values if keep else values.detach()), rows.reshape(n, batch, n).transpose(0, 1)


def _rows(dy: Tensor, y: Tensor) -> Tensor:
    batch, n = (len(y), y[0].numel()) if y.dim() > 1 else (1, y.numel())
    units = torch.eye(n, dtype=y.dtype, device=y.device)[:, None].expand(n, batch, n).reshape(n, *y.shape)
    (rows,) = torch.autograd.grad(dy, y, units, retain_graph=True, is_grads_batched=True, materialize_grads=True)
    return rows.reshape(n, batch, n).transpose(0, 1)


def dense_solve(jacobian: Tensor, c: float, right: Tensor, transposed: bool = False) -> Tensor:
    """x with (I − c J) x = right for every sample, or with the transposed matrices.

    Raises:
        NewtonFailed: if a matrix is singular.
    """
    matrix = torch.eye(jacobian.shape[-1], dtype=right.dtype, device=right.device) - c * jacobian
    matrix = matrix.mT if transposed else matrix
    return solved(matrix, right.reshape(len(matrix), -1, 1)).reshape(right.shape)


def solved(matrices: Tensor, right: Tensor) -> Tensor:
    """x with matrices x = right.

    Raises:
        NewtonFailed: if a matrix is singular.
    """
    x, info = torch.linalg.solve_ex(matrices, right)
    if info.any():
        raise NewtonFailed("the matrix I − cJ of an implicit stage is singular; take more steps")
    return x


def _jvp(field: VectorField, theta: Theta, t: float, y: Tensor, v: Tensor) -> Tensor:
    """J v by forward-mode differentiation: one evaluation of f."""
    _, product = torch.func.jvp(lambda x: field(t, x, theta), (y,), (v,))  # type: ignore[misc]
    return product


def gmres(product: Callable[[Tensor], Tensor], right: Tensor, rtol: float, size: int) -> Tensor:
    """x with A x = right to a residual of rtol · |right|, A given by its products with vectors of any shape.

    Raises:
        NewtonFailed: if ``size`` basis vectors do not suffice, a product is not finite, or A is singular.
    """
    scale = right.norm()
    if float(scale) == 0.0:
        return torch.zeros_like(right)
    basis = [right / scale]
    hessenberg = torch.zeros(size + 1, size, dtype=torch.float64)
    first = torch.zeros(size + 1, dtype=torch.float64)
    first[0] = float(scale)
    for k in range(size):
        w = product(basis[k])
        for _ in range(2):  # Gram–Schmidt twice: in float32 once is not orthogonal enough
            for i, q in enumerate(basis):
                overlap = torch.sum(w * q)
                hessenberg[i, k] += float(overlap)
                w = w - overlap * q
        length = float(w.norm())
        if not length < float("inf"):
            raise NewtonFailed("GMRES: a product with the Jacobian is not finite")
        hessenberg[k + 1, k] = length
        small = hessenberg[: k + 2, : k + 1]
        weights = torch.linalg.lstsq(small, first[: k + 2, None]).solution[:, 0]
        residual = float((small @ weights - first[: k + 2]).norm())
        exhausted = length <= 1e-14 * float(scale)  # the basis cannot grow: a regular A is solved to rounding
        if exhausted and residual > max(rtol, 1e-6) * float(scale):
            raise NewtonFailed("GMRES: the matrix I − cJ of an implicit stage is singular; take more steps")
        if exhausted or residual <= rtol * float(scale):
            return sum((float(x) * q for x, q in zip(weights, basis, strict=True)), torch.zeros_like(right))
        basis.append(w / length)
    raise NewtonFailed(f"GMRES did not converge with {size} basis vectors (residual {residual / float(scale):.2g})")

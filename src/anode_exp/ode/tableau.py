"""Butcher tableaux of explicit and diagonally implicit Runge–Kutta methods: the data that define a solver."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class _Tableau:
    """The fields that explicit and diagonally implicit tableaux share, and their checks."""

    diagonal: ClassVar[int]  # row i has i + diagonal coefficients
    kind: ClassVar[str]

    name: str
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    order: int
    reference: str
    b_error: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        s = len(self.b)
        if (
            len(self.a) != s
            or len(self.c) != s
            or [len(row) for row in self.a] != [i + self.diagonal for i in range(s)]
        ):
            raise ValueError(f"tableau {self.name}: a, b and c must describe the same {s} {self.kind}")
        for i, row in enumerate(self.a):
            if not math.isclose(math.fsum(row), self.c[i], abs_tol=1e-14):
                raise ValueError(f"tableau {self.name}: row {i} of a sums to {math.fsum(row)}, c is {self.c[i]}")
        if not math.isclose(math.fsum(self.b), 1.0, abs_tol=1e-14):
            raise ValueError(f"tableau {self.name}: b sums to {math.fsum(self.b)}, not 1")
        if self.b_error is not None:
            if len(self.b_error) != s:
                raise ValueError(f"tableau {self.name}: b_error has {len(self.b_error)} weights for {s} stages")
            if not math.isclose(math.fsum(self.b_error), 0.0, abs_tol=1e-14):
                raise ValueError(f"tableau {self.name}: b_error sums to {math.fsum(self.b_error)}, not 0")

    @property
    def stages(self) -> int:
        return len(self.b)


@dataclass(frozen=True)
class ButcherTableau(_Tableau):
    """Coefficients of an explicit Runge–Kutta method for dy/dt = f(t, y).

    k_i = f(t + c_i h, y + h Σ_{j<i} a_ij k_j),   y(t + h) ≈ y + h Σ_i b_i k_i

    Attributes:
        a: strictly lower triangle, one row per stage; row i holds the i coefficients a_i0 … a_i,i-1.
        b: weights of the solution.
        c: stage times in units of the step.
        order: order of the solution's global error in h.
        reference: where the coefficients come from.
        b_error: weights of the embedded error estimate h Σ_i b_error_i k_i, if the method has one.

    Raises:
        ValueError: if the sizes disagree, or Σ_j a_ij ≠ c_i, Σ b ≠ 1 or Σ b_error ≠ 0.
    """

    diagonal, kind = 0, "explicit stages"

    @property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is f at the step's end, and so the first of the next step."""
        return self.c[-1] == 1.0 and self.b[-1] == 0.0 and self.a[-1] == self.b[:-1]

    def without_unused_stages(self) -> ButcherTableau:
        """The same method without trailing stages that only the error estimate uses (bosh3's and dopri5's last)."""
        s = self.stages
        while self.b[s - 1] == 0.0:
            s -= 1
        if s == self.stages:
            return self
        return ButcherTableau(self.name, self.a[:s], self.b[:s], self.c[:s], self.order, self.reference)


def _difference(b: tuple[float, ...], b_embedded: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(x - y for x, y in zip(b, b_embedded, strict=True))


EULER = ButcherTableau("euler", a=((),), b=(1.0,), c=(0.0,), order=1, reference="forward Euler; ANODE Eq. 1")

RK2 = ButcherTableau(
    "rk2",
    a=((), (0.5,)),
    b=(0.0, 1.0),
    c=(0.0, 0.5),
    order=2,
    reference="explicit midpoint rule: the RK2 of ANODE's published code",
)

HEUN = ButcherTableau(
    "heun",
    a=((), (1.0,)),
    b=(0.5, 0.5),
    c=(0.0, 1.0),
    order=2,
    reference='explicit trapezoidal rule: the "RK2 (trapezoidal)" of ANODE\'s Fig. 3; embedded forward Euler',
    b_error=(-0.5, 0.5),
)

_BOSH3_B = (2 / 9, 1 / 3, 4 / 9, 0.0)
BOSH3 = ButcherTableau(
    "bosh3",
    a=((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    b=_BOSH3_B,
    c=(0.0, 1 / 2, 3 / 4, 1.0),
    order=3,
    reference="Bogacki and Shampine, Appl. Math. Lett. 2(4), 1989",
    b_error=_difference(_BOSH3_B, (7 / 24, 1 / 4, 1 / 3, 1 / 8)),
)

RK4 = ButcherTableau(
    "rk4",
    a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    c=(0.0, 1 / 2, 1 / 2, 1.0),
    order=4,
    reference="the classic fourth-order rule (Kutta 1901), as in ANODE's published code; not the 3/8 rule",
)

_DOPRI5_B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0)
DOPRI5 = ButcherTableau(
    "dopri5",
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    b=_DOPRI5_B,
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    order=5,
    reference="Dormand and Prince, J. Comput. Appl. Math. 6(1), 1980; the RK45 of ANODE's adaptive runs",
    b_error=_difference(_DOPRI5_B, (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)),
)

TABLEAUX: dict[str, ButcherTableau] = {t.name: t for t in (EULER, RK2, HEUN, BOSH3, RK4, DOPRI5)}


@dataclass(frozen=True)
class ImplicitTableau(_Tableau):
    """Coefficients of a diagonally implicit Runge–Kutta method for dy/dt = f(t, y).

    k_i = f(t + c_i h, y + h Σ_{j≤i} a_ij k_j),   y(t + h) ≈ y + h Σ_i b_i k_i

    Attributes:
        a: lower triangle with its diagonal; row i holds a_i0 … a_ii. A stage with a_ii = 0 is explicit.
        b, c, order, reference, b_error: as in ``ButcherTableau``. With b_error the first stage is explicit.

    Raises:
        ValueError: if the sizes disagree, or Σ_j a_ij ≠ c_i, Σ b ≠ 1 or Σ b_error ≠ 0.
    """

    diagonal, kind = 1, "stages, with a diagonal"

    @property
    def stiffly_accurate(self) -> bool:
        """Whether the last stage is the step's end."""
        return self.a[-1] == self.b


BACKWARD_EULER = ImplicitTableau(
    "backward_euler", a=((1.0,),), b=(1.0,), c=(1.0,), order=1, reference="L-stable; Hairer and Wanner, Solving ODEs II"
)

CRANK_NICOLSON = ImplicitTableau(
    "crank_nicolson",
    a=((0.0,), (0.5, 0.5)),
    b=(0.5, 0.5),
    c=(0.0, 1.0),
    order=2,
    reference="the implicit trapezoidal rule, A-stable; PNODE's method for stiff systems",
)

_SDIRK2 = 1.0 - math.sqrt(0.5)
SDIRK2 = ImplicitTableau(
    "sdirk2",
    a=((_SDIRK2,), (1.0 - _SDIRK2, _SDIRK2)),
    b=(1.0 - _SDIRK2, _SDIRK2),
    c=(_SDIRK2, 1.0),
    order=2,
    reference="Alexander, SIAM J. Numer. Anal. 14(6), 1977; L-stable, γ = 1 − 1/√2",
)

_TR = 2.0 - math.sqrt(2.0)
TR_BDF2 = ImplicitTableau(
    "tr_bdf2",
    a=((0.0,), (_TR / 2, _TR / 2), (math.sqrt(2.0) / 4, math.sqrt(2.0) / 4, _TR / 2)),
    b=(math.sqrt(2.0) / 4, math.sqrt(2.0) / 4, _TR / 2),
    c=(0.0, _TR, 1.0),
    order=2,
    reference="Bank et al., IEEE Trans. CAD 4(4), 1985; as a Runge–Kutta method Hosea and Shampine, 1996; L-stable",
)

_K = 0.43586652150845899942  # the root of x³ − 3x² + 3x/2 − 1/6 that makes it L-stable
_KVAERNO3_A3 = ((-4 * _K**2 + 6 * _K - 1) / (4 * _K), (-2 * _K + 1) / (4 * _K), _K)
_KVAERNO3_A4 = (
    (6 * _K - 1) / (12 * _K),
    -1 / ((24 * _K - 12) * _K),
    (-6 * _K**2 + 6 * _K - 1) / (6 * _K - 3),
    _K,
)
KVAERNO3 = ImplicitTableau(
    "kvaerno3",
    a=((0.0,), (_K, _K), _KVAERNO3_A3, _KVAERNO3_A4),
    b=_KVAERNO3_A4,
    c=(0.0, 2 * _K, 1.0, 1.0),
    order=3,
    reference="Kværnø, BIT 44(3), 2004: ESDIRK 3/2 a, stiffly accurate with its embedded method; L-stable",
    b_error=_difference(_KVAERNO3_A4, (*_KVAERNO3_A3, 0.0)),
)

IMPLICIT_TABLEAUX: dict[str, ImplicitTableau] = {
    t.name: t for t in (BACKWARD_EULER, CRANK_NICOLSON, SDIRK2, TR_BDF2, KVAERNO3)
}

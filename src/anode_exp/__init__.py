"""Memory-efficient training of neural-ODE image classifiers.

The parts for a network of your own, and ``load_run`` for one that was trained here.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "OdeBlock": "anode_exp.models",
    "take_evaluations": "anode_exp.models",
    "TABLEAUX": "anode_exp.ode",
    "ButcherTableau": "anode_exp.ode",
    "ExplicitRungeKutta": "anode_exp.ode",
    "TimeGrid": "anode_exp.ode",
    "Tolerance": "anode_exp.ode",
    "VectorField": "anode_exp.ode",
    "GRADIENT_MODES": "anode_exp.gradient",
    "DiscreteAdjoint": "anode_exp.gradient",
    "DtoCheckpoint": "anode_exp.gradient",
    "FullBackprop": "anode_exp.gradient",
    "StageCheckpoint": "anode_exp.gradient",
    "StepCheckpoint": "anode_exp.gradient",
    "StoredAdjoint": "anode_exp.gradient",
    "GradientMode": "anode_exp.gradient",
    "ReverseAdjoint": "anode_exp.gradient",
    "Run": "anode_exp.runs",
    "load_run": "anode_exp.runs",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    # Imported on first use, so that the command line reports a mistake without importing torch.
    if name not in _EXPORTS:
        raise AttributeError(f"module 'anode_exp' has no attribute {name!r}; it has {', '.join(_EXPORTS)}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_EXPORTS]

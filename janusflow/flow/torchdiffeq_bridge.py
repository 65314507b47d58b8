"""Every method of torchdiffeq as a solver.

They run as a whole, so all states are held on the state's device, (T + 1) times its memory, and
visited when the run is over. The adaptive ones choose their steps themselves: the grid says where
states are wanted, and where a run ends.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from janusflow.errors import SettingsError
from janusflow.flow.ode import Field, Solver, Visit


class Method(NamedTuple):
    """See `Solver` for the first three.

    Attributes:
        order: Of the error at the end.
        evaluations_per_step: Of the velocity.
        adaptive: Whether tolerances govern it.
        lands: Whether it must be told to step on the last time, not over it.
        uniform: Whether its coefficients hold on a uniform grid alone.
    """

    order: int | None
    evaluations_per_step: int | None = None
    adaptive: bool = False
    lands: bool = False
    uniform: bool = False


METHODS: dict[str, Method] = {
    "dopri8": Method(8, adaptive=True, lands=True),
    "dopri5": Method(5, adaptive=True, lands=True),
    "bosh3": Method(3, adaptive=True, lands=True),
    "fehlberg2": Method(2, adaptive=True, lands=True),
    "adaptive_heun": Method(2, adaptive=True, lands=True),
    "euler": Method(1, 1),
    "midpoint": Method(2, 2),
    "heun2": Method(2, 2),
    "heun3": Method(3, 3),
    "rk4": Method(4, 4),  # the 3/8 rule, not the classic one
    "explicit_adams": Method(4, uniform=True),
    "implicit_adams": Method(5, adaptive=True, uniform=True),  # iterates to the tolerance
    "fixed_adams": Method(5, adaptive=True, uniform=True),  # implicit_adams by its old name
    "scipy_solver": Method(None, adaptive=True),  # LSODA
}


# Four earlier steps at most. By default these methods go on to eleven, and the error of the
# explicit one may grow with the number of steps: on dx/dt = x, 32 end 9 times further off than 16.
_ADAMS_OPTIONS = {"max_order": 5}


class TorchdiffeqSolver(Solver):
    """A method of torchdiffeq by its name there."""

    def __init__(self, method: str) -> None:
        self._name, self._method = method, METHODS[method]
        self.order = self._method.order
        self.evaluations_per_step = self._method.evaluations_per_step
        self.adaptive = self._method.adaptive

    def grid(self, times: Tensor) -> Tensor:
        """See `Solver.grid`.

        Raises:
            SettingsError: If the method needs a uniform grid and this is none.
        """
        steps = times.diff()
        if self._method.uniform and not torch.allclose(steps, steps.mean(), rtol=1e-4, atol=0):
            raise SettingsError(
                f"torchdiffeq's {self._name} holds on a uniform grid alone; leave shift and own "
                "times out, or take another solver (ab2 takes any grid)"
            )
        return times

    def run(self, field: Field, x: Tensor, times: Tensor, visit: Visit) -> Tensor:
        """See `Solver.run`.

        Raises:
            SettingsError: If `visit` replaces a state, or the method gives up before the last time.
        """
        from torchdiffeq import odeint  # with scipy; half a second

        last = times[-1]
        options: dict[str, Any] = {"step_t": times[-1:].to(x.device)} if self._method.lands else {}
        options |= _ADAMS_OPTIONS if self._method.uniform else {}

        def of_time(t: Tensor, y: Tensor) -> Tensor:
            # A guess at the first step's length may look beyond the end, where no velocity is.
            return field(y, t.double().minimum(last.to(t.device)))

        states = odeint(
            of_time,
            x,
            times.to(x.device),
            rtol=self.rtol,
            atol=self.atol,
            method=self._name,
            options=options,
        )
        if len(states) != len(times):
            raise SettingsError(
                f"torchdiffeq's {self._name} gave up after {len(states) - 1} of {len(times) - 1} "
                "times; take looser tolerances or another solver"
            )
        for index, (t, state) in enumerate(zip(times[1:], states[1:], strict=True)):
            if visit(index, t, state) is not state:
                raise SettingsError(
                    f"torchdiffeq's {self._name} runs as a whole, so a callback cannot replace its "
                    "states; return None, or take a solver that steps, such as heun"
                )
        return states[-1]

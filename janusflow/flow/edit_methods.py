"""Methods of editing with their settings, as the pipeline takes them: what `edit=` may be.

Each says what it asks of a run and carries the run out with the functions of
`janusflow.flow.editing`. None of it is part of JanusFlow: **the published model was not trained for
editing**. Knows fields, not prompts. Axes: B images, C latent channels, h w latent cells.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from janusflow.errors import SettingsError
from janusflow.flow.editing import (
    Inpainting,
    check_n_avg,
    check_share,
    flow_edit,
    invert,
    regenerate,
    start_of_edit,
)
from janusflow.flow.guidance import check_guidance_scale
from janusflow.flow.solvers import Field, make_solver, solve

ToldState = Callable[[int, Tensor, Tensor], Tensor]
"""Called after each step with (index, time reached, state); gives the state to go on from."""


@dataclass(frozen=True)
class EditRun:
    """Pictures and what is done with them, whatever the method.

    Attributes:
        x_img: The pictures' latents, (B, C, h, w).
        target: Velocity under what they shall show.
        times: From `edit_times` of the strength, (T + 1,).
        strength: In (0, 1].
        source: Velocity under what they show, for methods that ask.
        noise: `x_0`, of the shape of `x_img`, for methods that do not draw noise in their steps.
        mask: The cells to draw, bool (B, 1, h, w); None = all.
        generators: On the CPU, one a picture, for methods and solvers that draw noise.
        solver: Name or scheduler.
        rtol: Of an adaptive solver.
        atol: As `rtol`.
    """

    x_img: Tensor
    target: Field
    times: Tensor
    strength: float
    source: Field | None = None
    noise: Tensor | None = None
    mask: Tensor | None = None
    generators: Sequence[torch.Generator] | None = None
    solver: Any = "euler"
    rtol: float | None = None
    atol: float | None = None


class EditMethod(ABC):
    """What all methods are; `EDITS` has them by name.

    Attributes:
        default_strength: Where a call gives none.
        takes_source: Whether it asks what the picture shows.
        draws_noise: Whether its steps draw noise, in place of one noise for the run.
        rounds: How often it walks through the times.
    """

    default_strength: ClassVar[float]
    takes_source: ClassVar[bool] = True
    draws_noise: ClassVar[bool] = False
    rounds: ClassVar[int] = 1
    source_guidance_scale: float = 1.0

    def check(
        self, times: Tensor, *, solver: Any, rtol: float | None = None, atol: float | None = None
    ) -> None:
        """Refuses a solver that the method cannot work with.

        Raises:
            SettingsError: Saying which it can.
        """
        return

    def start(self, x_img: Tensor, noise: Tensor | None, strength: float) -> Tensor:
        """The state before the first step, of the shape of `x_img`; see `EditRun`."""
        return x_img

    @abstractmethod
    def run(self, run: EditRun, on_step: ToldState) -> None:
        """Goes all steps; the edited latents are the last that `on_step` gave."""


@dataclass(frozen=True)
class SDEdit(EditMethod):
    """Draws on from the picture under noise (arXiv 2108.01073); a mask inpaints.

    The published model was not trained for it.
    """

    default_strength: ClassVar[float] = 0.6
    takes_source: ClassVar[bool] = False

    def start(self, x_img: Tensor, noise: Tensor | None, strength: float) -> Tensor:
        """See `EditMethod.start`."""
        assert noise is not None
        return start_of_edit(x_img, noise, strength)[0]

    def run(self, run: EditRun, on_step: ToldState) -> None:
        """See `EditMethod.run`."""
        assert run.noise is not None
        known = None if run.mask is None else Inpainting(run.x_img, run.noise, run.mask)

        def told(index: int, t: Tensor, x: Tensor) -> Tensor:
            return on_step(index, t, x if known is None else known(index, t, x))

        solve(
            run.target,
            self.start(run.x_img, run.noise, run.strength),
            run.times,
            solver=run.solver,
            rtol=run.rtol,
            atol=run.atol,
            generators=run.generators,
            on_step=told,
        )


@dataclass(frozen=True)
class FlowEdit(EditMethod):
    """Moves the picture from one prompt's flow to another's, see `flow_edit` (arXiv 2412.08629).

    The published model was not trained for it. Takes Euler's steps alone. Masked, the picture is
    put back after each step where it is to stay.

    Attributes:
        n_avg: Noises that a step averages over; each costs an evaluation for either prompt.
        source_guidance_scale: Weight of the guidance under what the picture shows, 1.0 = off. All
            else of its guidance is the target's. The published values for other models lie
            between 1 and the target's.

    Raises:
        SettingsError: If a setting is out of range.
    """

    n_avg: int = 1
    source_guidance_scale: float = 1.0

    default_strength: ClassVar[float] = 0.85  # about 24 of 28 steps, as published for FLUX
    draws_noise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_n_avg(self.n_avg)
        try:
            check_guidance_scale(self.source_guidance_scale)
        except SettingsError as error:
            raise SettingsError(f"source_{error}") from None

    def check(
        self, times: Tensor, *, solver: Any, rtol: float | None = None, atol: float | None = None
    ) -> None:
        """See `EditMethod.check`."""
        if solver != "euler" or rtol is not None or atol is not None:
            raise SettingsError(
                f"FlowEdit takes Euler's steps alone, got solver {solver!r}, rtol {rtol}, atol "
                f'{atol}; leave these out, or take edit="sdedit" or edit="inversion"'
            )

    def run(self, run: EditRun, on_step: ToldState) -> None:
        """See `EditMethod.run`."""
        assert run.source is not None
        assert run.generators is not None

        def told(index: int, t: Tensor, x: Tensor) -> Tensor:
            return on_step(index, t, x if run.mask is None else torch.where(run.mask, x, run.x_img))

        flow_edit(
            run.source,
            run.target,
            run.x_img,
            run.times,
            run.generators,
            n_avg=self.n_avg,
            on_step=told,
        )


@dataclass(frozen=True)
class Inversion(EditMethod):
    """Goes back to the picture's noise and draws from there, see `invert` (arXiv 2410.10792).

    The published model was not trained for it. The way back is not guided. Masked, the states that
    were passed on the way back are put back where the picture is to stay.

    Attributes:
        gamma: In [0, 1]: how much the way back is drawn to typical noise; 0 is the flow alone.
        eta: In [0, 1]: how much the new picture is held to the old; 0 is plain sampling.
        stop: The time in [0, 1] up to which it is held.

    Raises:
        SettingsError: If a setting is out of range.
    """

    gamma: float = 0.5
    eta: float = 0.9
    stop: float = 0.25

    default_strength: ClassVar[float] = 1.0
    rounds: ClassVar[int] = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_share(name, value)

    def check(
        self, times: Tensor, *, solver: Any, rtol: float | None = None, atol: float | None = None
    ) -> None:
        """See `EditMethod.check`."""
        if not isinstance(solver, str) or make_solver(solver).draws_noise:
            raise SettingsError(
                "inversion goes the same times back and forth; give solver= by its name, one that "
                f"draws no noise, such as euler; got {solver!r}"
            )
        number = torch.zeros(1, 1)  # tells as well as a picture what the solver asks for
        invert(
            lambda x, t: torch.zeros_like(x),
            number,
            times,
            noise=number,
            gamma=self.gamma,
            solver=solver,
            rtol=rtol,
            atol=atol,
        )

    def run(self, run: EditRun, on_step: ToldState) -> None:
        """See `EditMethod.run`. The times that `on_step` is told fall first, and then rise."""
        assert run.source is not None
        assert run.noise is not None
        steps, passed = len(run.times) - 1, [run.x_img]

        def on_the_way_back(index: int, tau: Tensor, x: Tensor) -> Tensor:
            passed.append(on_step(index, 1 - tau, x))
            return passed[-1]

        def on_the_way_forth(index: int, t: Tensor, x: Tensor) -> Tensor:
            if run.mask is not None:
                x = torch.where(run.mask, x, passed[steps - 1 - index])
            return on_step(steps + index, t, x)

        options = {"solver": run.solver, "rtol": run.rtol, "atol": run.atol}
        invert(
            run.source,
            run.x_img,
            run.times,
            noise=run.noise,
            gamma=self.gamma,
            on_step=on_the_way_back,
            **options,
        )
        regenerate(
            run.target,
            passed[-1],
            run.x_img,
            run.times,
            eta=self.eta,
            stop=self.stop,
            on_step=on_the_way_forth,
            **options,
        )


EDITS: dict[str, type[EditMethod]] = {
    "sdedit": SDEdit,
    "flowedit": FlowEdit,
    "inversion": Inversion,
}


def make_edit(edit: str | EditMethod) -> EditMethod:
    """The method of a name, with its default settings; a method itself is given back.

    Raises:
        SettingsError: If there is no such method.
    """
    if isinstance(edit, EditMethod):
        return edit
    if not isinstance(edit, str) or edit not in EDITS:
        raise SettingsError(
            f"unknown edit {edit!r}; known: {', '.join(EDITS)}, or one with settings of "
            "janusflow.flow.edit_methods, such as FlowEdit(n_avg=2)"
        )
    return EDITS[edit]()

"""The velocity that a solver integrates: prompts, guidance, and a count of what it costs.

Axes: B pictures, C latent channels, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from janusflow.errors import SettingsError
from janusflow.flow.guidance import Guidance, Guider
from janusflow.models.prefix import EncodedPrompts, PromptPrefix

Velocity = Callable[[Tensor, Tensor, PromptPrefix], Tensor]
"""Of latents (B, C, h, w) at time t, given prompts of B rows; such as `model.velocity`."""


class GuidedField:
    """A field of `janusflow.flow.solvers`; made anew for every run.

    Args:
        velocity: Of the model.
        prompts: A row for each picture.
        guidance: How they are guided; where it is off, their rows alone are computed.
        rests_until: Before this time the velocity is zero and nothing is computed.
        on_evaluation: Told (t, guided velocity, v_c, v_u) of every evaluation, v_u None where
            there is no guidance; such as `janusflow.flow.diagnostics.Recorder`.

    Attributes:
        nfe: Evaluations that the network made.
        num_forward_passes: Rows that it computed for each picture.

    Raises:
        SettingsError: If there is guidance, but nothing to guide away from.
    """

    def __init__(
        self,
        velocity: Velocity,
        prompts: EncodedPrompts,
        guidance: Guidance,
        *,
        rests_until: float = 0.0,
        on_evaluation: Callable[[Tensor, Tensor, Tensor, Tensor | None], object] | None = None,
    ) -> None:
        if prompts.free is None and not guidance.off:
            raise SettingsError(
                "these prompts were encoded without guidance (guided=False); encode them with it"
            )
        self._velocity = velocity
        self._prompts = prompts
        self._guidance = guidance
        self._guider = Guider(guidance)
        self._rests_until = rests_until
        self._on_evaluation = on_evaluation
        self._both: PromptPrefix | None = None
        self.nfe = 0
        self.num_forward_passes = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided velocity of latents x (B, C, h, w) at a time t, a scalar in [0, 1]."""
        free = None
        if float(t) < self._rests_until:
            guided = conditional = torch.zeros_like(x)
        elif (scale := self._guidance.scale_at(float(t))) == 1.0:
            self.nfe += 1
            self.num_forward_passes += 1
            guided = conditional = self._velocity(x, t, self._prompts.prefix).to(x.dtype)
        else:
            conditional, free = self.velocities(x, t)
            guided = self._guider(x, t, conditional, free, scale)
        if self._on_evaluation is not None:
            self._on_evaluation(t, guided, conditional, free)
        return guided

    def velocities(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The velocities with and without the condition, in one pass of twice the rows."""
        if self._both is None:
            assert self._prompts.free is not None
            self._both = self._prompts.prefix.joined(self._prompts.free)
        self.nfe += 1
        self.num_forward_passes += 2
        conditional, free = self._velocity(torch.cat([x, x]), t, self._both).to(x.dtype).chunk(2)
        return conditional, free

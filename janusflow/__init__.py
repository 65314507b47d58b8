"""The public names of janusflow, each imported when it is first asked for.

`import janusflow` must stay cheap: it loads neither torch nor transformers, draws nothing, prints
nothing and touches no file. Names that need them are looked up by `__getattr__` (PEP 562) and
kept; type checkers and editors see the ordinary imports.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from janusflow.errors import (
    CheckpointError,
    ImageError,
    JanusFlowError,
    PromptError,
    SettingsError,
)
from janusflow.version import __version__

if TYPE_CHECKING:
    from janusflow.flow.presets import PRESETS
    from janusflow.models.configuration import JanusFlowConfig
    from janusflow.models.modeling import JanusFlowForConditionalGeneration
    from janusflow.pipeline import JanusFlowPipeline
    from janusflow.processing.processor import JanusFlowProcessor

__all__ = [
    "PRESETS",
    "CheckpointError",
    "ImageError",
    "JanusFlowConfig",
    "JanusFlowError",
    "JanusFlowForConditionalGeneration",
    "JanusFlowPipeline",
    "JanusFlowProcessor",
    "PromptError",
    "SettingsError",
    "__version__",
]

# Name -> the module that holds it.
_LAZY = {
    "JanusFlowConfig": "janusflow.models.configuration",
    "JanusFlowForConditionalGeneration": "janusflow.models.modeling",
    "JanusFlowPipeline": "janusflow.pipeline",
    "JanusFlowProcessor": "janusflow.processing.processor",
    "PRESETS": "janusflow.flow.presets",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, those not yet imported included."""
    return sorted({*globals(), *__all__})

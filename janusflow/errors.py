"""What a user's mistake raises; the commands print these as one line and leave with status 2.

Each is a `ValueError`, so scripts that know nothing of janusflow still catch it. A message says
what was given, what is expected, and what to do.
"""

from __future__ import annotations


class JanusFlowError(ValueError):
    """A mistake that the caller can mend."""


class CheckpointError(JanusFlowError):
    """A model folder is missing, incomplete, of an unknown layout, or disagrees with its config."""


class DivergedError(JanusFlowError, FloatingPointError):
    """A training run's gradient is no longer finite."""


class ImageError(JanusFlowError):
    """A picture cannot be read, or is too large to be read safely."""


class PromptError(JanusFlowError):
    """A prompt or conversation is empty, too long, or does not fit its images."""


class SettingsError(JanusFlowError):
    """A setting is out of its range or unknown."""

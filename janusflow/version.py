"""The version, alone in a file so that the build reads it without importing the package."""

from __future__ import annotations

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Of the package and of what its results depend on, without marks of a build (`+cpu`)."""
    import diffusers
    import torch
    import transformers

    libraries = {m.__name__: m.__version__.split("+")[0] for m in (torch, transformers, diffusers)}
    return {"janusflow": __version__, **libraries}

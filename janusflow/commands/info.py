"""`janusflow info`: what a model folder holds, without loading its weights."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any


def run(arguments: argparse.Namespace) -> None:
    """Prints layout, heads, parameter counts, memory and hash."""
    from janusflow.models.checkpoints import describe

    info = describe(arguments.model)
    found = {"total_parameters": info.total_parameters, **asdict(info), "folder": str(info.folder)}
    if arguments.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    rows = list(_rows(found))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _rows(content: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values, those of inner objects by dotted names."""
    rows: list[tuple[str, str]] = []
    for name, value in content.items():
        if isinstance(value, dict):
            rows += _rows(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            rows.append((prefix + name, ", ".join(map(str, value)) or "none"))
        elif isinstance(value, int) and not isinstance(value, bool):
            rows.append((prefix + name, f"{value:,}"))
        else:
            rows.append((prefix + name, str(value)))
    return rows

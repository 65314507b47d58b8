"""One self-contained HTML page: its frame and style, and pictures inside it."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from janusflow.errors import SettingsError
from janusflow.files import atomic_path

_HEAD = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font-family: sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
caption { text-align: left; padding: .3rem 0; }
th, td { border-bottom: 1px solid #ccc; padding: .3rem .7rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
figure { margin: 1.5rem 0; }
.wide { overflow-x: auto; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
"""
_FOOT = "</body>\n</html>\n"


def write_page(file: Path, title: str, body: str, **values: Any) -> None:
    """Writes a page.

    Args:
        file: Where to.
        title: Of the page.
        body: A jinja2 template, after the title; values are escaped.
        **values: What the template shows.

    Raises:
        SettingsError: If jinja2 is not installed.
    """
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise SettingsError("the report needs jinja2: pip install 'janusflow[eval]'") from error
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(_HEAD + body + _FOOT).render(title=title, **values)
    with atomic_path(file) as scratch:
        scratch.write_text(text, encoding="utf-8")


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """A picture as the address of itself."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

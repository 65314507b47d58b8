"""Settings: frozen dataclasses, filled strictly from YAML and `--section.key value` overrides.

A key that no dataclass has, or a value of the wrong type, is a `SettingsError` that names the
nearest key. The words yes, no, on and off are text, which a boolean setting takes as well. This
module knows nothing of models or tensors.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from janusflow.errors import SettingsError

T = TypeVar("T")

_WORDS = ("yes", "no", "on", "off")


def read_yaml(path: str | Path) -> dict:
    """Reads a YAML file that holds a mapping.

    Raises:
        SettingsError: If the file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        text = _words_quoted(Path(path).read_text(encoding="utf-8-sig"))
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except FileNotFoundError:
        raise SettingsError(f"no config file at {path}") from None
    except Exception as error:  # YAML's and OmegaConf's errors share no base
        reason = str(error).splitlines()[0]
        raise SettingsError(f"{path} is not a readable YAML config: {reason}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold a mapping of settings, not {type(content).__name__}")
    return content


def fill(cls: type[T], values: dict, overrides: Sequence[str] = ()) -> T:
    """Makes a settings object from a mapping and dotted overrides such as `optimizer.name=adamw`.

    Raises:
        SettingsError: For an unknown key (with the nearest known one) or an unfit value.
    """
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(cls),
            OmegaConf.create(values),
            *map(_parsed, overrides),
        )
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        near = difflib.get_close_matches(key, list(_keys(cls)), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(_keys(cls))}"
        raise SettingsError(f"unknown setting {key!r}{hint}") from None
    except OmegaConfBaseException as error:
        raise SettingsError(str(error).splitlines()[0]) from None


def overrides_from_arguments(arguments: Sequence[str]) -> list[str]:
    """Turns `["--a.b", "1", "--c=2"]` into `["a.b=1", "c=2"]`; dashes in keys mean underscores.

    Raises:
        SettingsError: If an argument is no option or lacks its value.
    """
    overrides = []
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise SettingsError(f"expected an option like --section.key, got {option!r}")
        key, equals, value = option[2:].partition("=")
        if not equals:
            if not rest:
                raise SettingsError(f"option --{key} needs a value")
            value = rest.pop(0)
        overrides.append(f"{key.replace('-', '_')}={value}")
    return overrides


def _words_quoted(text: str) -> str:
    """Quotes the words that only YAML 1.1, which OmegaConf reads, takes for booleans."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # as OmegaConf: what it reads, we read
    pieces, end = [], 0
    for token in yaml.scan(text, loader):
        if isinstance(token, yaml.ScalarToken) and token.plain and token.value.lower() in _WORDS:
            pieces += [text[end : token.start_mark.index], f'"{token.value}"']
            end = token.end_mark.index
    return "".join([*pieces, text[end:]])


def _parsed(override: str) -> DictConfig:
    key, equals, value = override.partition("=")
    try:
        return OmegaConf.from_dotlist([key + equals + _words_quoted(value)])
    except yaml.YAMLError:
        raise SettingsError(
            f"{key} is given as {value!r}, which is not a value as YAML has it; check its brackets "
            "and quotes"
        ) from None


def _keys(cls: type, prefix: str = "") -> Iterable[str]:
    for field in dataclasses.fields(cls):
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield prefix + field.name
        if dataclasses.is_dataclass(default):
            yield from _keys(type(default), f"{prefix}{field.name}.")

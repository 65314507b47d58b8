"""What YAML and the command line mean: yes, no, on and off are words, not booleans."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from janusflow.errors import SettingsError
from janusflow.settings import fill, read_yaml
from janusflow.training.autoencoder import AutoencoderSettings


@dataclass
class Kinds:
    word: str = "some"
    words: list[str] = field(default_factory=list)
    switch: bool = True
    rate: float = 1.0
    count: int | None = 1
    free: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize("precision", ["no", '"no"', "no  # on this processor"])
def test_precision_no_is_what_was_written(tmp_path, precision):
    config = tmp_path / "config.yaml"
    config.write_text(f"loop:\n  precision: {precision}\n", encoding="utf-8")
    assert fill(AutoencoderSettings, read_yaml(config)).loop.precision == "no"
    overrides = [f"loop.precision={precision}"]
    assert fill(AutoencoderSettings, {}, overrides).loop.precision == "no"


@pytest.mark.parametrize("mark", ["", "\ufeff"])  # of byte order, as some editors write it
def test_words_of_a_file_are_words_wherever_they_stand(tmp_path, mark):
    config = tmp_path / "config.yaml"
    text = 'é: [no, Yes, "on"]\non: {"a":off, b: no more}\nc: &off ON\nd: *off\ne: |-\n  no\nf: 1\n'
    config.write_text(mark + text, encoding="utf-8")
    assert read_yaml(config) == {
        "é": ["no", "Yes", "on"],
        "on": {"a": "off", "b": "no more"},
        "c": "ON",
        "d": "ON",
        "e": "no",
        "f": 1,
    }


@pytest.mark.parametrize(
    ("written", "read"),
    [("no", False), ("Off", False), ("yes", True), ("ON", True), ("false", False), ("True", True)],
)
def test_a_switch_takes_words(tmp_path, written, read):
    config = tmp_path / "config.yaml"
    config.write_text(f"switch: {written}\n", encoding="utf-8")
    assert fill(Kinds, read_yaml(config)).switch is read
    assert fill(Kinds, {"switch": not read}, [f"switch={written}"]).switch is read


def test_other_values_keep_their_kinds(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("rate: 1e-4\ncount: null\nwords: [30, dpm++2m]\nfree: {a: true, b: 2.0e-3}\n")
    settings = Kinds("some", ["30", "dpm++2m"], True, 1e-4, None, {"a": True, "b": 2e-3})
    assert fill(Kinds, read_yaml(config)) == settings
    overrides = ["rate=1e-4", "count=null", "words=[30,dpm++2m]", "free={a: true, b: 2.0e-3}"]
    assert fill(Kinds, {}, overrides) == settings


def test_a_word_is_no_number_and_a_key_stands_once(tmp_path):
    with pytest.raises(SettingsError, match="'no' of type 'str'"):
        fill(Kinds, {}, ["count=no"])
    config = tmp_path / "config.yaml"
    config.write_text("rate: 1\nrate: 2\n")
    with pytest.raises(SettingsError, match=f"{config} is not a readable YAML config"):
        read_yaml(config)


@pytest.mark.parametrize("value", ["[1", '"open', "{a: 1", "a: b: c"])
def test_a_value_that_is_no_yaml_is_refused_by_name(value):
    with pytest.raises(SettingsError, match="words is given as"):
        fill(Kinds, {}, [f"words={value}"])

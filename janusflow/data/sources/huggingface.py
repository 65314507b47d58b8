"""Hugging Face `datasets`: from the hub, saved to disk, or folders and files that it reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from janusflow.data.samples import (
    BrokenSample,
    Sample,
    caption_sample,
    conversation_sample,
    decode_picture,
    read_file,
)
from janusflow.data.sources.base import CaptionSettings, Source
from janusflow.errors import SettingsError


@dataclass(frozen=True)
class HuggingFaceSettings(CaptionSettings):
    """A dataset with captions, or with conversations where `messages_column` names them."""

    path: str = ""
    """A name on the hub, a folder of `save_to_disk`, a folder that `load_dataset` reads (parquet,
    imagefolder, …), or a parquet file."""
    subset: str = ""
    """The configuration of a dataset that has several."""
    split: str = "train"
    image_column: str = "image"
    """A picture, or the list of pictures of a conversation; conversations may do without."""
    text_column: str = "text"
    messages_column: str = ""
    """Conversations in LLaVA's layout or the HF one; empty = pictures with captions."""
    cache_dir: str = ""
    """Where `datasets` keeps what it prepares; by default its own folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "generation" and self.messages_column:
            raise SettingsError(
                f"messages_column is {self.messages_column!r}; drawing is learned from captions, "
                "leave it empty and set text_column"
            )
        if self.kind == "text" and not self.messages_column:
            raise SettingsError("a source of kind 'text' holds conversations; set messages_column")


class HuggingFaceSource(Source):
    """Rows by index, pictures decoded here and not by `datasets`."""

    def __init__(self, name: str, settings: HuggingFaceSettings) -> None:
        """Opens the dataset.

        Raises:
            SettingsError: `datasets` is not installed, the dataset cannot be opened, is empty, or
                lacks a column.
        """
        super().__init__(name, settings)
        self._settings = settings
        dataset = _open(settings)
        if settings.messages_column:
            needed = [settings.messages_column]
            wanted = [*needed, *({settings.image_column} & set(dataset.column_names))]
        else:
            needed = wanted = [settings.image_column, settings.text_column]
        missing = [column for column in needed if column not in dataset.column_names]
        if missing:
            raise SettingsError(
                f"{settings.path} has no column {missing[0]!r}; it has "
                f"{', '.join(dataset.column_names)}: set image_column, text_column or "
                "messages_column"
            )
        if not len(dataset):
            raise SettingsError(f"the split {settings.split!r} of {settings.path} is empty")
        # As Arrow keeps them: a picture stays the bytes or the path that it is in the file.
        self._rows = dataset.select_columns(wanted).with_format("arrow")

    def __len__(self) -> int:
        return len(self._rows)

    def label(self, index: int) -> str:
        """The dataset's own name, its split and the row."""
        return f"{Path(self._settings.path).name}/{self._settings.split}:{index}"

    def read(self, index: int) -> Sample:
        """See `Source`."""
        settings, name = self._settings, self.label(index)
        (row,) = self._rows[index : index + 1].to_pylist()
        held = row.get(settings.image_column)
        if not settings.messages_column:
            caption = row[settings.text_column]
            load = partial(_load, held)
            return caption_sample(self.kind, load, caption, settings.question, name)
        beside = [] if held is None else held if isinstance(held, list) else [held]
        messages = row[settings.messages_column]
        return conversation_sample(self.kind, messages, beside, _load, name)


def _load(held: Any) -> Image.Image:
    """A picture as the Image feature keeps it (bytes or a path), or bare bytes."""
    held = held if isinstance(held, dict) else {"bytes": held}
    if isinstance(held.get("bytes"), bytes):
        if not held["bytes"]:
            raise BrokenSample("unreadable picture", "it has 0 bytes")
        return decode_picture(held["bytes"])
    if isinstance(held.get("path"), str):
        return decode_picture(read_file(held["path"]))
    raise BrokenSample("unreadable picture", f"expected a picture, got {held!r:.80}")


def _open(settings: HuggingFaceSettings) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise SettingsError(
            "a source of format huggingface needs datasets: pip install 'janusflow[train]'"
        ) from error
    if not settings.path:
        raise SettingsError("path is empty; expected the name of a dataset or a folder")
    path = Path(settings.path)
    options: dict[str, Any] = {"cache_dir": settings.cache_dir or None}
    try:
        if (path / "state.json").is_file():
            return datasets.load_from_disk(settings.path)
        if (path / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(settings.path)
            if settings.split not in splits:
                raise SettingsError(
                    f"{path} has no split {settings.split!r}; it has {', '.join(splits)}"
                )
            return splits[settings.split]
        if path.suffix == ".parquet":
            files = {settings.split: settings.path}
            return datasets.load_dataset(
                "parquet", data_files=files, split=settings.split, **options
            )
        return datasets.load_dataset(
            settings.path, settings.subset or None, split=settings.split, **options
        )
    except SettingsError:
        raise
    except Exception as error:  # what it raises for a wrong name, split or file shares no base
        reason = " ".join(str(error).split())
        raise SettingsError(
            f"datasets cannot open {settings.path!r}: {type(error).__name__}: {reason}"
        ) from error

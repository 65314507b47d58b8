"""Pictures: read safely from wherever they come, and made into the vision tower's pixel values.

Axis letters: N images, S the square side that the model sees (`image_size`). PIL and numpy do all
of it. Nothing here knows of prompts or of how many tokens an image becomes.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_base import BatchFeature, ImageProcessingMixin

from janusflow.errors import CheckpointError, ImageError

MAX_PIXELS = 100_000_000
"""Width times height above which a picture is refused, by its header, before it is decoded."""

ImageSource = str | os.PathLike[str] | bytes | BinaryIO | Image.Image

# PIL opens more than these, and some of them by starting other programs (EPS runs Ghostscript):
# a picture may come from a stranger.
_FORMATS = frozenset(
    ["AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"]
)
_WHITE = (255, 255, 255)
# Modes whose samples have 16 bits; PIL's own conversion to 8 bits clips them.
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read one picture as 8-bit RGB.

    The EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled (not
    clipped) to 8 bits, and of an animation the first frame is taken.

    Args:
        source: a path, a `data:image/…;base64,…` text, the bytes of a file, an open binary file,
            or a PIL image (which is not modified; of an animation, its current frame).
        max_pixels: the largest width times height that is accepted.

    Returns:
        A new image of mode RGB.

    Raises:
        ImageError: it cannot be read, is no picture, is truncated, or has too many pixels.
    """
    # PIL warns of sizes (from 89 megapixels on) and of odd metadata: what matters is raised here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(source, Image.Image):
            image, name = source, "the PIL image"
        else:
            image, name = _open(source, max_pixels)
        width, height = image.size
        if width < 1 or height < 1:
            raise ImageError(f"{name} is {width}x{height}: it has no pixels")
        if width * height > max_pixels:
            raise ImageError(f"{name} is {width}x{height}: {_too_many(max_pixels)}")
        return _to_rgb(image, name)


def _open(source: Any, max_pixels: int) -> tuple[Image.Image, str]:
    """Return a picture of which only the header is read, and what to call it in messages."""
    file, name = _open_source(source)
    try:
        image = Image.open(file)
    except Image.DecompressionBombError as error:  # PIL's own limit: no size is at hand
        raise ImageError(f"{name} has {_too_many(max_pixels)}") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{name} is not a picture in a format that is known here") from error
    except Exception as error:  # header parsers raise whatever a broken file makes them raise
        raise ImageError(f"{name} cannot be read as a picture: {_one_line(error)}") from error
    if image.format not in _FORMATS:
        raise ImageError(
            f"{name} is of format {image.format}, which is not read; convert it to PNG or JPEG"
        )
    return image, name


def _open_source(source: ImageSource) -> tuple[BinaryIO, str]:
    """Return a seekable binary file and what to call it in messages."""
    if isinstance(source, str) and source.startswith("data:image/"):
        try:
            source = base64.b64decode(source.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise ImageError("the data:image text is not valid base64") from error
        name = "the data:image text"
    elif isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ImageError(f"{source} is an address; download the picture and give its path")
    elif isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        try:
            source = Path(source).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a null character in the path
            reason = getattr(error, "strerror", None) or error
            raise ImageError(f"{name} cannot be read: {reason}") from error
    elif isinstance(source, (bytes, bytearray)):
        name = "the picture in memory"
    elif hasattr(source, "read"):
        name = str(getattr(source, "name", "the picture file"))
        try:
            source.seek(0)
            source = source.read()
        except (OSError, ValueError) as error:  # ValueError: the file is closed
            raise ImageError(f"{name} cannot be read: {_one_line(error)}") from error
        if not isinstance(source, bytes):
            raise ImageError(f"{name} was opened as text; open it with mode 'rb'")
    else:
        raise ImageError(
            f"a picture is a path, bytes, a binary file or a PIL image, got {type(source).__name__}"
        )
    if not source:
        raise ImageError(f"{name} is empty (0 bytes)")
    return io.BytesIO(source), name


def _too_many(max_pixels: int) -> str:
    return f"more than the {max_pixels / 1e6:g} megapixels that are read; make it smaller"


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Decode, turn upright, and bring to 8-bit RGB; always a new image."""
    try:
        image.load()
    except Exception as error:  # each decoder has its own errors for a broken file
        raise ImageError(
            f"{name} is damaged or incomplete and cannot be decoded: {_one_line(error)}"
        ) from error
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception:  # the pixels are whole: nonsense in the EXIF block is no reason to refuse
        upright = image.copy()
    if upright.mode in _SIXTEEN_BIT_MODES:
        return _from_sixteen_bits(np.asarray(upright))
    if upright.mode == "I":  # 32-bit samples, in which some formats keep 16-bit ones
        values = np.asarray(upright)
        if values.min() >= 0 and values.max() <= 0xFFFF:
            return _from_sixteen_bits(values)
    if upright.mode in ("I", "F"):
        raise ImageError(
            f"{name} has samples of 32 bits, whose range is unknown; save it with 8 or 16 bits"
        )
    try:
        if upright.has_transparency_data:
            layer = upright.convert("RGBA")
            flat = Image.new("RGBA", layer.size, (*_WHITE, 255))
            return Image.alpha_composite(flat, layer).convert("RGB")
        return upright.convert("RGB")
    except ValueError as error:
        raise ImageError(f"{name} has colours of mode {upright.mode}; save it as RGB") from error


def _from_sixteen_bits(values: np.ndarray) -> Image.Image:
    """Scale 0…65535 to 0…255, to the nearest."""
    scaled = (values.astype(np.uint32) + 128) // 257
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class JanusFlowImageProcessor(ImageProcessingMixin):
    """Square, normalised pixel values, as the published models were trained on.

    The longest side becomes `image_size` (bicubic; sizes are truncated, not rounded), the picture
    is laid centred on a square of `background_color`, scaled by `rescale_factor` and normalised.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(
        self,
        image_size: int = 384,
        *,
        min_size: int = 14,
        image_mean: Sequence[float] | None = (0.5, 0.5, 0.5),
        image_std: Sequence[float] | None = (0.5, 0.5, 0.5),
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        background_color: Sequence[int] | None = None,
    ) -> None:
        """Check and keep the settings.

        Args:
            image_size: side S of the square, in pixels.
            min_size: the shorter side is never made smaller than this.
            image_mean: per channel, subtracted from values in 0…1.
            image_std: per channel, divided by afterwards.
            rescale_factor: multiplies the 8-bit values first.
            do_normalize: apply mean and standard deviation.
            background_color: 8-bit RGB; by default the mean, which normalises to about 0.

        Raises:
            CheckpointError: a setting cannot be right.
        """
        super().__init__()
        self.image_size = image_size
        self.min_size = min_size
        self.image_mean = _three("image_mean", (0.5,) * 3 if image_mean is None else image_mean)
        self.image_std = _three("image_std", (0.5,) * 3 if image_std is None else image_std)
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        grey = [int(255 * mean) for mean in self.image_mean]
        colour = _three("background_color", grey if background_color is None else background_color)
        self.background_color = [int(value) for value in colour]
        if not 1 <= min_size <= image_size:
            raise CheckpointError(
                f"image_size is {image_size} and min_size {min_size}; needed: 1 <= min_size <= "
                "image_size (see preprocessor_config.json)"
            )
        if do_normalize and 0 in self.image_std:
            raise CheckpointError(f"image_std is {self.image_std}; none of them may be 0")

    @classmethod
    def from_dict(
        cls, image_processor_dict: Mapping[str, Any], **kwargs: Any
    ) -> JanusFlowImageProcessor:
        """Make one from the content of a preprocessor_config.json, whose other keys are ignored.

        Raises:
            CheckpointError: the size is missing or a setting cannot be right.
        """
        given = {**image_processor_dict, **kwargs}
        if isinstance(given.get("size"), Mapping):  # as transformers' Janus has it
            given.setdefault("image_size", given["size"].get("height"))
        if given.get("image_size") is None:
            raise CheckpointError("preprocessor_config.json has no image_size; add it")
        known = ("min_size", "image_mean", "image_std", "rescale_factor", "do_normalize")
        settings = {
            key: value
            for key, value in given.items()
            if key in ("image_size", *known, "background_color")
        }
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Return what preprocessor_config.json holds, under the name that published code reads."""
        return {**vars(self), "image_processor_type": "VLMImageProcessor"}

    def resize_and_pad(self, image: Image.Image) -> Image.Image:
        """Return the picture centred on an S x S square of the background."""
        longest = max(image.size)
        # Truncated, and divided before multiplied: another order differs by a pixel now and then.
        width, height = (
            max(int(side / longest * self.image_size), self.min_size) for side in image.size
        )
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        square = Image.new("RGB", (self.image_size,) * 2, tuple(self.background_color))
        square.paste(resized, ((self.image_size - width) // 2, (self.image_size - height) // 2))
        return square

    def __call__(self, images: ImageSource | Sequence[ImageSource]) -> torch.Tensor:
        """Return pixel values (N, 3, S, S), float32, in [-1, 1] with the usual mean and deviation.

        Args:
            images: one picture or several, each anything that `load_image` reads.

        Raises:
            ImageError: there are none, or one cannot be read.
        """
        single = isinstance(images, (str, bytes, os.PathLike, Image.Image)) or hasattr(
            images, "read"
        )
        sources: Any = [images] if single else images
        if not isinstance(sources, Sequence) or not sources:
            raise ImageError(f"no pictures: got {images!r}; give one or a list of them")
        return torch.from_numpy(np.stack([self._pixels(load_image(one)) for one in sources]))

    def preprocess(self, images: ImageSource | Sequence[ImageSource]) -> BatchFeature:
        """Do the same under the name and in the wrapping that transformers uses."""
        return BatchFeature({"pixel_values": self(images)})

    def _pixels(self, image: Image.Image) -> np.ndarray:
        square = np.asarray(self.resize_and_pad(image))
        # float64 for the scaling and float32 from there on, as published: equal to the last bit.
        values = (square.astype(np.float64) * self.rescale_factor).astype(np.float32)
        if self.do_normalize:
            mean = np.asarray(self.image_mean, dtype=np.float32)
            std = np.asarray(self.image_std, dtype=np.float32)
            values = (values - mean) / std
        return np.ascontiguousarray(values.transpose(2, 0, 1))


def _three(name: str, values: Sequence[float]) -> list[float]:
    if isinstance(values, (str, bytes)) or len(values) != 3:
        raise CheckpointError(f"{name} is {values!r}; expected three numbers, red, green and blue")
    return list(values)

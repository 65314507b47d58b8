from __future__ import annotations

import base64
import importlib.util
import io
import json
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from janusflow import CheckpointError, ImageError
from janusflow.processing.images import JanusFlowImageProcessor, load_image

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "prompts.json").read_text(encoding="utf-8"))["image_cases"]
CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "image_processor.safetensors")


@pytest.fixture(scope="module")
def golden_image():
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.test_image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def half_red(size=(8, 4)) -> Image.Image:
    """Left half red, right half green."""
    image = Image.new("RGB", size, GREEN)
    image.paste(RED, (0, 0, size[0] // 2, size[1]))
    return image


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data


@pytest.mark.parametrize(("name", "width", "height"), CASES)
@pytest.mark.parametrize(("kind", "settings"), [("half", {}), ("clip", CLIP)])
def test_pixel_values_equal_the_golden_ones_bit_for_bit(
    golden, golden_image, kind: str, settings: dict, name: str, width: int, height: int
) -> None:
    pixels = JanusFlowImageProcessor(384, **settings)(golden_image(name, width, height))
    assert pixels.dtype == torch.float32
    assert pixels.shape == (1, 3, 384, 384)
    torch.testing.assert_close(pixels[0, :, ::7, ::7], golden[f"{kind}.{name}.sub"], rtol=0, atol=0)
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(pixels[0].mean((1, 2)), golden[f"{kind}.{name}.mean"], **close)
    torch.testing.assert_close(pixels[0].std((1, 2)), golden[f"{kind}.{name}.std"], **close)


def test_many_pictures_of_all_shapes_make_one_batch_in_their_order() -> None:
    pictures = [Image.new("RGB", (9, 70), RED), Image.new("RGB", (64, 64), GREEN)]
    pixels = JanusFlowImageProcessor(64)(pictures)
    assert pixels.shape == (2, 3, 64, 64)
    assert pixels[0, :, 32, 32].tolist() == [1, -1, -1]
    assert pixels[1, :, 0, 0].tolist() == [-1, 1, -1]
    # 127/255 grey on both sides of the narrow one.
    assert pixels[0, :, 32, 0].tolist() == pytest.approx([127 / 127.5 - 1] * 3)


def test_without_normalisation_values_stay_between_0_and_1() -> None:
    pixels = JanusFlowImageProcessor(16, do_normalize=False)(half_red((16, 16)))
    assert (pixels.min(), pixels.max()) == (0, 1)


def test_preprocess_wraps_the_same_values() -> None:
    process = JanusFlowImageProcessor(16)
    assert torch.equal(process.preprocess(half_red())["pixel_values"], process(half_red()))


def test_settings_survive_saving_and_loading(tmp_path: Path) -> None:
    process = JanusFlowImageProcessor(48, min_size=3, background_color=(1, 2, 3), **CLIP)
    process.save_pretrained(tmp_path)
    again = JanusFlowImageProcessor.from_pretrained(tmp_path)
    assert vars(again) == vars(process)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert saved["image_processor_type"] == "VLMImageProcessor"


def test_the_published_file_is_read_and_its_other_keys_ignored(published: Path) -> None:
    process = JanusFlowImageProcessor.from_pretrained(published)
    assert process.image_size == 32
    assert process.background_color == [127, 127, 127]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 8}, "image_size is 8 and min_size 14"),
        ({"image_size": 32, "image_std": [0.5, 0, 0.5]}, "none of them may be 0"),
        ({"image_size": 32, "image_mean": [0.5]}, "expected three numbers"),
        ({"min_size": 14}, "has no image_size"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        JanusFlowImageProcessor.from_dict(settings)


def test_a_picture_is_read_from_everywhere_alike(tmp_path: Path) -> None:
    data = encoded(half_red())
    path = tmp_path / "a.png"
    path.write_bytes(data)
    text = "data:image/png;base64," + base64.b64encode(data).decode()
    file = io.BytesIO(data)
    file.seek(5)
    for source in (path, str(path), data, file, text, half_red()):
        image = load_image(source)
        assert image.mode == "RGB"
        assert np.array_equal(image, half_red())


def test_a_pil_image_is_not_changed() -> None:
    image = half_red()
    exif = image.getexif()
    exif[0x0112] = 6
    load_image(image).putpixel((0, 0), WHITE)
    assert image.size == (8, 4)
    assert image.getpixel((0, 0)) == RED


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation: int) -> None:
    upright = half_red((32, 16))
    upright.paste(WHITE, (0, 0, 8, 8))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(load_image(encoded(stored, exif=exif.tobytes())), upright)


def test_a_broken_exif_block_does_not_cost_the_picture() -> None:
    data = encoded(half_red(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff nonsense", quality=95)
    assert load_image(data).size == (8, 4)


def test_transparency_is_laid_over_white() -> None:
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 128))
    flat = load_image(encoded(image))
    assert [flat.getpixel((x, 0)) for x in range(3)] == [WHITE, RED, (127, 127, 127)]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert load_image(encoded(grey)).getpixel((0, 0)) == WHITE


def test_a_palette_is_resolved_and_its_transparent_entry_is_white() -> None:
    image = half_red().quantize(2)
    assert image.mode == "P"
    assert np.array_equal(load_image(encoded(image)), half_red())
    clear = image.getpixel((0, 0))
    flat = load_image(encoded(image, transparency=clear))
    assert flat.getpixel((0, 0)) == WHITE
    assert flat.getpixel((7, 0)) == GREEN


def test_cmyk_becomes_rgb() -> None:
    image = half_red((32, 16)).convert("CMYK")
    assert Image.open(io.BytesIO(encoded(image, "JPEG"))).mode == "CMYK"
    read = np.asarray(load_image(encoded(image, "JPEG", quality=100, subsampling=0))).astype(int)
    assert abs(read - np.asarray(half_red((32, 16)))).max() <= 3


@pytest.mark.parametrize("image_type", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(image_type: str) -> None:
    values = np.array([[0, 256, 257 * 100, 65535]], dtype=np.uint16)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    assert np.asarray(load_image(encoded(image, image_type)))[0, :, 0].tolist() == [0, 1, 100, 255]
    wide = Image.fromarray(values.astype(np.int32))
    assert np.asarray(load_image(wide))[0, :, 0].tolist() == [0, 1, 100, 255]


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN, WHITE)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert load_image(data).getpixel((2, 2)) == RED


def test_grey_and_two_level_pictures_become_rgb() -> None:
    assert load_image(encoded(Image.new("L", (2, 2), 9))).getpixel((0, 0)) == (9, 9, 9)
    assert load_image(encoded(Image.new("1", (2, 2), 1))).getpixel((0, 0)) == WHITE


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


BAD = {
    "zero bytes": (b"", r"is empty \(0 bytes\)"),
    "no picture": (b"Once upon a time there was a text file. " * 9, "is not a picture"),
    "truncated jpeg": (encoded(noise(), "JPEG")[:1500], "damaged or incomplete"),
    "truncated png": (encoded(noise())[:3000], "damaged or incomplete"),
    "half a header": (encoded(noise())[:20], "picture"),
    "101 megapixels": (png_header(10_100, 10_000), "10100x10000: more than the 100 megapixels"),
    "300 megapixels": (png_header(20_000, 15_000), "more than the 100 megapixels"),
    "postscript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "format EPS",
    ),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_in_one_line_that_names_it(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=message) as caught:
            load_image(path)
    assert "bad.png" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_oversized_picture_is_refused_before_it_is_decoded() -> None:
    tracemalloc.start()
    with pytest.raises(ImageError):
        load_image(png_header(20_000, 15_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6
    with pytest.raises(ImageError, match="the PIL image is 8x4"):
        load_image(half_red(), max_pixels=31)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no-such.png", "no-such.png cannot be read: No such file"),
        (".", "cannot be read: Is a directory"),
        ("a\0b", "cannot be read"),
        ("https://example.org/a.png", "is an address; download"),
        ("data:image/png;base64,@@", "not valid base64"),
        (io.StringIO("text"), "opened as text"),
        (7, "got int"),
        (None, "got NoneType"),
        (Image.new("RGB", (0, 5)), "has no pixels"),
        (Image.new("F", (2, 2)), "samples of 32 bits"),
        (Image.fromarray(np.array([[70_000]], dtype=np.int32)), "samples of 32 bits"),
        (Image.new("La", (2, 2)), "colours of mode La"),
    ],
)
def test_a_source_that_is_no_picture_is_refused(source: object, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(source)


def test_a_closed_file_is_refused(tmp_path: Path) -> None:
    file = io.BytesIO(encoded(half_red()))
    file.close()
    with pytest.raises(ImageError, match="closed file"):
        load_image(file)


@pytest.mark.parametrize("nothing", [[], None])
def test_no_pictures_at_all_are_refused(nothing: object) -> None:
    with pytest.raises(ImageError, match="no pictures"):
        JanusFlowImageProcessor(16)(nothing)

"""Image bytes to uint8 arrays and back, with the limits that untrusted bytes need.

The written-down policy, used wherever an image of any size becomes one of a set (`fit_image`):

1. EXIF orientation is applied.
2. Transparency is composited on a stated background (default white, 255).
3. The image becomes RGB (3 channels) or ITU-R 601-2 luma gray (1 channel); 16-bit gray keeps its upper 8 bits.
4. The image is scaled by Pillow's antialiased resampling (Lanczos) so that it just covers H x W (for a square target:
   its short side becomes the target's side), then the centre is cropped.

Arrays are uint8 (C, H, W), values 0..255. They are stored as PNG or lossless WebP, which keep every pixel, or as JPEG,
which does not. Every image is decoded and encoded anew, also one that is in its final form already: so no EXIF, no text,
no colour profile and nothing behind the pixels goes from an untrusted file into a shard.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from data_shards.errors import BadImage, UserError

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = ("png", "jpg", "jpeg", "webp")
MAX_PIXELS = 4096 * 4096
MAX_BYTES = 64 * 1024 * 1024
BACKGROUND = 255
ENCODINGS = {"png": "png", "webp": "webp", "jpeg": "jpg"}  # -> suffix of the files
QUALITY = 95
ORIENTATION = 0x0112  # EXIF's tag

_DECODE_ERRORS = (
    OSError,  # includes UnidentifiedImageError and truncation
    SyntaxError,  # Pillow's word for a broken PNG
    ValueError,
    OverflowError,
    EOFError,
    IndexError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # an exception where warnings are errors
)


def decode_image(
    data: bytes,
    channels: int,
    *,
    background: int = BACKGROUND,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> np.ndarray:
    """Decodes PNG, JPEG or WebP bytes to uint8 (C, H, W), values 0..255, C = `channels` (1 gray, 3 RGB).

    `max_pixels` (H x W) and `max_bytes` (of `data`) are errors, not warnings. Raises `BadImage`.
    """
    image = open_image(data, max_pixels=max_pixels, max_bytes=max_bytes)
    return _to_array(_to_channels(image, channels, background))


def decode_into(out_CHW: np.ndarray, data: bytes) -> None:
    """Decodes PNG, JPEG or WebP bytes whose image has exactly the shape of `out_CHW`, uint8 (C, H, W), into it.

    As `decode_image`, in a third of the time for the common case. Raises `BadImage`, also for another shape.
    """
    channels, height, width = out_CHW.shape
    try:
        pixels = _plain_png(data, channels, height, width)
    except _DECODE_ERRORS as error:
        raise BadImage(f"not a readable {', '.join(FORMATS)} image ({_one_line(error)})") from error
    if pixels is None and data[:4] != b"RIFF":  # a WebP's canvas is allocated on opening: it takes the careful way
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            plain = "transparency" not in image.info and not getattr(image, "is_animated", False)
            if plain and image.mode == ("L" if channels == 1 else "RGB") and image.size == (width, height):
                pixels = np.asarray(image)
        except _DECODE_ERRORS as error:
            raise BadImage(f"not a readable {', '.join(FORMATS)} image ({_one_line(error)})") from error
    if pixels is not None:
        out_CHW[...] = pixels if channels == 1 else pixels.transpose(2, 0, 1)
        return
    found = decode_image(data, channels, max_pixels=height * width)
    if found.shape != out_CHW.shape:
        raise BadImage(f"its shape is {found.shape}, not {out_CHW.shape}")
    out_CHW[...] = found


def _plain_png(data: bytes, channels: int, height: int, width: int) -> np.ndarray | None:
    """The pixels, uint8 (H, W) or (H, W, 3), of a PNG of this shape that holds nothing but them, as `encode_png` writes it.

    None for any other bytes. It spares what Pillow does to find out the format, which takes longer than a small image's
    decoding; the decoder is Pillow's, and like Pillow's it looks at the checksum of the pixels, not at that of the chunk.
    """
    if not data.startswith(_png_head(channels, height, width)) or not data.endswith(_PNG_END):
        return None
    begin, end, compressed = _PNG_HEAD_BYTES, len(data) - len(_PNG_END), []
    while begin < end:
        stop = begin + 12 + int.from_bytes(data[begin : begin + 4], "big")  # length, type, data, checksum
        if stop > end or data[begin + 4 : begin + 8] != b"IDAT":
            return None
        compressed.append(data[begin + 8 : stop - 4])
        begin = stop
    mode = "L" if channels == 1 else "RGB"
    image = Image.frombytes(mode, (width, height), b"".join(compressed), "zip", mode, 0)  # 0: not interlaced
    return np.frombuffer(image.tobytes(), np.uint8).reshape((height, width) if channels == 1 else (height, width, 3))


_PNG_HEAD_BYTES = 33
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


@cache
def _png_head(channels: int, height: int, width: int) -> bytes:
    """Signature and header chunk of a PNG of 8 bits a channel, gray or RGB, not interlaced."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def fit_image(image: Image.Image, size: tuple[int, int], channels: int, *, background: int = BACKGROUND) -> np.ndarray:
    """Fits an image to `size` = (H, W) by the policy in this module's docstring; returns uint8 (C, H, W)."""
    return _to_array(fit(image, size, channels, background=background))


def fit(image: Image.Image, size: tuple[int, int], channels: int, *, background: int = BACKGROUND) -> Image.Image:
    """`fit_image` as a Pillow image of mode L (1 channel) or RGB (3 channels)."""
    try:
        if image.info and image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)  # copies an image that is upright
        image = _to_channels(image, channels, background)
    except BadImage:
        raise
    except _DECODE_ERRORS as error:
        raise BadImage(f"its EXIF data or its palette cannot be read ({_one_line(error)})") from None
    height, width = size
    if (image.height, image.width) != (height, width):
        scale = max(height / image.height, width / image.width)
        covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        if covering[0] * covering[1] > MAX_PIXELS:
            raise BadImage(f"an image of {image.width} x {image.height} pixels is too narrow to be cropped to {size}")
        image = image.resize(covering, Image.Resampling.LANCZOS)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return image


def encode_png(image_CHW: np.ndarray) -> bytes:
    """Encodes uint8 (C, H, W), C in {1, 3}, as PNG without loss; the same array gives the same bytes."""
    return encode(as_picture(image_CHW), "png")


def encode(image: Image.Image, encoding: str, quality: int = QUALITY) -> bytes:
    """Encodes a picture of mode L or RGB as one of `ENCODINGS`; `quality` (1 to 100) is JPEG's and no other's.

    The same pixels give the same bytes, for one version of Pillow.
    """
    options: dict[str, Any] = {
        "png": {"format": "PNG", "compress_level": 6},
        "webp": {"format": "WEBP", "lossless": True, "quality": 80, "method": 4, "exact": True},  # here an effort only
        "jpeg": {"format": "JPEG", "quality": quality, "subsampling": 0},  # 4:4:4: colour keeps its resolution
    }[encoding]
    if image.info:  # Pillow would write a profile or a comment that it finds there
        image = image.copy()
        image.info = {}
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def as_picture(image_CHW: np.ndarray) -> Image.Image:
    """uint8 (C, H, W), C in {1, 3} -> a picture of mode L or RGB; raises `UserError` for any other array."""
    if image_CHW.dtype != np.uint8 or image_CHW.ndim != 3 or image_CHW.shape[0] not in (1, 3):
        raise UserError(
            f"an image to pack must be uint8 of shape (1 or 3, H, W), not {image_CHW.dtype} {image_CHW.shape}"
        )
    return Image.fromarray(image_CHW[0] if image_CHW.shape[0] == 1 else np.ascontiguousarray(image_CHW.transpose(1, 2, 0)))


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Image.Image:
    """Opens and decodes bytes under the caps; the format is told by content and only from `FORMATS`.

    Raises `BadImage` for any other format, an animation, too many pixels or bytes, or damage.
    """
    if len(data) > max_bytes:
        raise BadImage(f"the image has {len(data)} bytes, over the cap of {max_bytes}")
    _check_pixels(_webp_size(data), max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_pixels(image.size, max_pixels)
        if getattr(image, "is_animated", False):
            raise BadImage("the image is an animation; pack its frames as single images")
        image.load()
    except BadImage:
        raise
    except _DECODE_ERRORS as error:
        raise BadImage(f"not a readable {', '.join(FORMATS)} image ({_one_line(error)})") from error
    return image


def check_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns (C, H, W) if it is a shape that a set may have; raises `UserError` otherwise."""
    if len(shape) != 3 or shape[0] not in (1, 3) or min(shape) < 1 or math.prod(shape[1:]) > MAX_PIXELS:
        raise UserError(f"image shape {tuple(shape)} must be (C, H, W) with C 1 or 3 and at most {MAX_PIXELS} pixels")
    return shape[0], shape[1], shape[2]


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise BadImage(f"the image has {size[0]} x {size[1]} pixels, over the cap of {max_pixels}")


def _webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) that a WebP header declares, (0, 0) for other bytes.

    Pillow allocates the canvas when it opens a WebP, so the cap must act before.
    """
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return 0, 0
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _to_channels(image: Image.Image, channels: int, background: int) -> Image.Image:
    if channels not in (1, 3):
        raise UserError(f"channels must be 1 (gray) or 3 (RGB), not {channels}")
    if image.mode.startswith("I;16"):
        # Pillow's own conversion to L clips at 255, which turns most 16-bit pictures white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise BadImage(f"pixels of mode {image.mode!r} have no stated range; save the image with 8 bits a channel")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (background, background, background, 255))
        image = Image.alpha_composite(canvas, image).convert("RGB")
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _to_array(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)  # (H, W) or (H, W, 3)
    return pixels[None].copy() if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _one_line(error: BaseException) -> str:
    # Pillow names the object it read from, with its address: no two runs would say the same.
    text = " ".join(re.sub(r"<_io\.BytesIO[^>]*>", "", str(error)).split()) or type(error).__name__
    return text[:200]

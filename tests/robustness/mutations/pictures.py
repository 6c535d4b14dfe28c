"""Put unusual, damaged and hostile pictures into a folder of images."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, PngImagePlugin

from .trees import change_tree

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "TGA")
SHAPES = ((1, 1), (1, 700), (700, 1), (30000, 1), (1, 30000), (9000, 9000), (2, 3), (40, 17))


def change_pictures(root: Path, rng: Random) -> str:
    """Add a picture to a class folder, replace one, or change the tree."""
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    folder = rng.choice(folders)
    way = rng.choice((_unusual, _unusual, _unusual, _chunks, _chunks, change_tree, change_tree))
    return way(folder, rng)


def _unusual(folder: Path, rng: Random) -> str:
    """Add a picture of any mode, size and format."""
    mode, kind = rng.choice(MODES), rng.choice(FORMATS)
    size = rng.choice(SHAPES) if rng.random() < 0.5 else (20, 20)
    if size == (9000, 9000):
        mode = rng.choice(("1", "L"))
    picture = _picture(mode, size, rng)
    options = _options(picture, kind, rng)
    raw = io.BytesIO()
    for now in (picture, picture.convert("RGB")):
        try:
            raw.seek(0)
            raw.truncate()
            now.save(raw, kind, **options)
            break
        except (OSError, ValueError, KeyError, SystemError, struct.error):
            continue
    ending = kind.lower().replace("jpeg2000", "jp2").replace("jpeg", "jpg")
    if rng.random() < 0.15:
        ending = rng.choice(("png", "jpg", "eps", "pdf", "svg", "psd"))
    (folder / f"new.{ending}").write_bytes(raw.getvalue())
    return f"{folder.name}: a picture {mode} {size} as {kind} {sorted(options)} in .{ending}"


def _picture(mode: str, size: tuple[int, int], rng: Random) -> Image.Image:
    """Return a picture of random colours in a mode."""
    width, height = size
    numbers = np.random.default_rng(rng.randrange(2**32))
    if mode == "F":
        values = numbers.random((height, width), dtype=np.float32)
        values.flat[0] = rng.choice((0.5, np.nan, np.inf, 1e30, -5))
        return Image.fromarray(values)
    if mode == "I;16":
        return Image.fromarray(numbers.integers(0, 65536, (height, width), dtype=np.uint16))
    if mode == "I":
        return Image.fromarray(numbers.integers(-9, 2**20, (height, width), dtype=np.int32))
    if width * height > 10**7:
        return Image.new(mode, size, 1)
    picture = Image.fromarray(numbers.integers(0, 256, (height, width, 4), dtype=np.uint8))
    return picture if mode == "RGBA" else picture.convert("RGB").convert(mode)


def _options(picture: Image.Image, kind: str, rng: Random) -> dict:
    """Return options of a format: orientation, frames, transparency, texts, profiles."""
    options = {}
    if rng.random() < 0.3 and kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        exif = Image.Exif()
        exif[0x0112] = rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 65535))
        options["exif"] = exif.tobytes()[: rng.choice((None, 20))]
    if rng.random() < 0.2 and kind in ("PNG", "WEBP", "GIF", "TIFF") and picture.width < 100:
        options |= {"save_all": True, "append_images": [picture] * rng.choice((1, 30))}
    if rng.random() < 0.2 and kind in ("PNG", "GIF") and picture.mode in ("P", "L", "1", "RGB"):
        options["transparency"] = (0, 0, 0) if picture.mode == "RGB" else rng.choice((0, 255))
    if rng.random() < 0.15 and kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        options["icc_profile"] = rng.choice((b"", b"x" * 100, b"\0" * 200))
    if rng.random() < 0.1 and kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text("a", "x" * 2_000_000, zip=True)
        options["pnginfo"] = info
    if rng.random() < 0.1 and kind == "JPEG":
        options |= {"progressive": True, "quality": 1}
    return options


def _chunks(folder: Path, rng: Random) -> str:
    """Add a PNG whose chunks lie, with right checksums."""
    sizes = ((2**31 - 1, 2**31 - 1), (60000, 60000), (0, 5), (20, 200_000_000), (30000, 1))
    width, height = rng.choice(sizes) if rng.random() < 0.7 else (8, 8)
    depth, colour = rng.choice(((8, 2), (8, 6), (16, 2), (16, 6), (1, 0), (8, 3), (16, 4), (3, 7)))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, rng.choice((0, 0, 1, 9)))
    content = zlib.compress(bytes(rng.choice((10, 9000, 40_000_000))))
    chunks = [(b"IHDR", header)]
    extra = rng.choice(("", "", "iCCP", "zTXt", "eXIf", "acTL", "PLTE", "tRNS", "long"))
    bomb = zlib.compress(bytes(60_000_000))
    more = {
        "iCCP": b"icc\0\0" + bomb,
        "zTXt": b"text\0\0" + bomb,
        "eXIf": b"MM\0*\0\0\0\x08" + rng.randbytes(60),
        "acTL": struct.pack(">II", 2**31 - 1, 0),
        "PLTE": rng.randbytes(rng.choice((3, 7, 768, 3000))),
        "tRNS": rng.randbytes(rng.choice((1, 6, 300))),
    }
    if extra in more:
        chunks += [(extra.encode(), more[extra])] * rng.choice((1, 1, 40))
    chunks += [(b"IDAT", content), (b"IEND", b"")]
    raw = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        length = 2**31 if extra == "long" and name == b"IDAT" else len(body)
        raw += struct.pack(">I", length) + name + body
        raw += struct.pack(">I", zlib.crc32(name + body))
    (folder / "new.png").write_bytes(raw)
    return f"{folder.name}: a PNG of {width} x {height}, {depth} bits, colour {colour}, {extra}"

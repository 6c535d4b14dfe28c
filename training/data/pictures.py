"""Decode image files to the RGB picture that a viewer shows, and crop it to the target size.

Pictures that viewers show differently from what could be decoded here raise an error with the
reason; `training.prepare` leaves them out by name.
"""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageCms, UnidentifiedImageError, features

DECODER = 2  # 1: neither orientation, transparency nor colour profiles; part of a folder's plan
MOST_PIXELS = 178_956_970  # also Pillow's own limit; up to 1.7 GB in memory
MOST_SIDE = 65_535  # pixels, the largest of a JPEG
MOST_BYTES = 2**30  # of a file
USUAL_BYTES, BYTES_A_PIXEL = 2**26, 32  # of a file: for all but the pixels, and for each of them
MOST_PARTS = 100_000  # chunks of a PNG
MOST_SCANS = 40  # of a JPEG, each of which goes over all pixels; common are up to 15
MOST_COMMENTS = 1000  # of a PPM in text
WIDEST = 8  # ratio of the sides above which a picture is cropped before it is scaled
# EPS starts a program, Ghostscript; the others only name a file of an application of its own.
NOT_PICTURES = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC"}
WITH_16_BITS = {"PNG", "TIFF", "JPEG2000", "PPM"}  # integers of 16 bits there span 0 .. 65535
ORIENTATION = 0x0112  # tag of EXIF and TIFF
PHOTOMETRIC, BITS = 262, 258  # tags of TIFF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
COLOUR_SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of a profile -> Pillow's mode
SRGB_GAMMA, GAMMA_TOLERANCE = 1 / 2.2, 0.02
SRGB_CHROMATICITY = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
MARKER = re.compile(rb"\xff([^\x00\xd0-\xd8\xff])", re.DOTALL)  # of a JPEG, but for restarts
HDR_AVIF = rb"colrnclx(\0\x09|..(\0\x10|\0\x12))"  # primaries of BT.2020; curves PQ and HLG
HDR = "has colours beyond sRGB (HDR, or wide primaries), which are not converted; save it as sRGB"


def read_picture(path: Path, size: int) -> Image.Image:
    """Read an image file as the picture of size x size to train on: `read_rgb`, `centre_crop`.

    Raises:
        OSError: the file cannot be read, so that nothing is known about the picture.
        PictureError: it is no file, or no picture that can be decoded as viewers show it.
    """
    raw = read_file(path)
    try:
        return centre_crop(read_rgb(raw), size)
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(f"more than {MOST_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise PictureError("not an image that Pillow can read") from error
    except Exception as error:  # Pillow raises many kinds
        raise PictureError(str(error) or type(error).__name__) from error


class PictureError(ValueError):
    """A picture that is left out; the message is the reason."""


def read_file(path: Path) -> bytes:
    """Read an image file of at most `MOST_BYTES`.

    Raises:
        OSError: it cannot be read.
        PictureError: it is empty, too large, a pipe or the like, or a link to nothing.
    """
    if path.is_symlink() and not os.path.exists(path):
        raise PictureError("a link to nothing")
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
        raise PictureError("not a file but a pipe, a socket or a device")
    if status.st_size > MOST_BYTES:
        raise PictureError(f"the file has {status.st_size:,} bytes; the most is {MOST_BYTES:,}")
    raw = path.read_bytes()
    if not raw:
        raise PictureError("the file is empty")
    return raw


def read_rgb(raw: bytes) -> Image.Image:
    """Decode the first picture of an image file as viewers show it, in RGB of 8 bits.

    It is turned as its EXIF orientation says; transparent pixels are laid on white; colours are
    converted to sRGB by the embedded profile; grey of 16 bits, and floats in [0, 1] of a TIFF, are
    scaled to 8 bits. Of pictures wider or higher than `WIDEST` : 1, the outer parts are cut away.

    Raises:
        PictureError: the picture is too large, or viewers would show something else.
        Exception: of Pillow, many kinds: it is damaged, or no image.
    """
    _check_parts(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks about metadata and sizes
        known = [kind for kind in _formats() if kind not in NOT_PICTURES]
        image = Image.open(io.BytesIO(raw), formats=known)
        _check_size(image)
        if len(raw) > USUAL_BYTES + BYTES_A_PIXEL * image.width * image.height:
            raise PictureError(
                f"the file has {len(raw):,} bytes, far more than {image.width} x {image.height} "
                "pixels need; save it again"
            )
        _check_colours(raw, image)
        frame = _first_frame(image)
        image.load()
        _check_size(image)  # formats such as ICO choose a size only now
        turn = _turn(image)
        profile = _profile(image)
        image = _in_eight_bits(image)
        image, frame = _without_ends(image, frame)
        image = _on_white(image, profile, frame)
        return image if turn is None else image.transpose(turn)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop an image to its central square, scaled to size x size, as ADM does.

    The image is halved by box averages while its shorter side is at least 2 size, then scaled
    bicubically, then cropped (Dhariwal and Nichol 2021). Of images wider or higher than `WIDEST`
    : 1, the outer parts are cut away first.
    """
    image = _without_ends(image, None)[0]
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if scale != 1:
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
        )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _formats() -> list[str]:
    """Return the formats that Pillow opens."""
    Image.init()
    return Image.ID


def _check_size(image: Image.Image) -> None:
    """Check that an image has few enough pixels to be decoded.

    Raises:
        PictureError: it has not.
    """
    width, height = image.size
    if width * height > MOST_PIXELS or max(width, height) > MOST_SIDE:
        raise PictureError(
            f"{width} x {height} pixels; the most are {MOST_PIXELS:,}, and {MOST_SIDE:,} a side"
        )


def _check_parts(raw: bytes) -> None:
    """Check that a file has few enough parts; Pillow takes time for each, however small.

    Raises:
        PictureError: it has too many.
    """
    if raw[:8] == b"\x89PNG\r\n\x1a\n":
        count, at = 0, 8
        while at < len(raw) and count <= MOST_PARTS and raw[at + 4 : at + 8] != b"IEND":
            at += 12 + int.from_bytes(raw[at : at + 4], "big")
            count += 1
        _require_few(count, MOST_PARTS, "chunks")
    elif raw[:2] == b"\xff\xd8":
        _require_few(_scans(raw), MOST_SCANS, "scans")
    elif raw[:2] in (b"P1", b"P2", b"P3"):
        _require_few(raw.count(b"#"), MOST_COMMENTS, "comments")


def _require_few(count: int, most: int, what: str) -> None:
    if count > most:
        raise PictureError(f"more than {most:,} {what}, which would take long to read; save again")


def _scans(raw: bytes) -> int:
    """Count the scans of a JPEG's first picture, up to one more than MOST_SCANS.

    Other segments tell their length; a scan's data ends at the next marker.
    """
    count, at = 0, 2
    while count <= MOST_SCANS and (found := MARKER.search(raw, at)):
        at, code = found.end(), found[1][0]
        if code == 0xD9:  # end of image
            break
        if code != 0x01:
            at += int.from_bytes(raw[at : at + 2], "big")
        count += code == 0xDA
    return count


def _check_colours(raw: bytes, image: Image.Image) -> None:
    """Check that the values of an opened file mean what Pillow takes them for.

    Raises:
        PictureError: viewers would show other colours.
    """
    info, tags = image.info, getattr(image, "tag_v2", {})
    if image.format == "PNG":
        found = re.search(rb"\0\0\0\x04cICP(..)", raw[: raw.find(b"IDAT")], re.DOTALL)
        if found and found[1] != b"\x01\x0d":
            raise PictureError(HDR)
        gamma, places = info.get("gamma"), info.get("chromaticity", SRGB_CHROMATICITY)
        if "srgb" not in info and "icc_profile" not in info:
            away = max(abs(a - b) for a, b in zip(places, SRGB_CHROMATICITY, strict=False))
            wrong = gamma and abs(gamma - SRGB_GAMMA) > GAMMA_TOLERANCE
            if wrong or away > GAMMA_TOLERANCE:
                raise PictureError("its gAMA or cHRM chunk is not that of sRGB; save it as sRGB")
        deep = any("16B" in str(tile[3]) for tile in image.tile)
        if deep and isinstance(info.get("transparency"), tuple):
            raise PictureError("RGB of 16 bits with one transparent colour; save it in 8 bits")
    if image.format == "AVIF" and re.search(HDR_AVIF, raw, re.DOTALL):
        raise PictureError(HDR)
    if image.mode.startswith(("I", "F")):
        kinds = {"I": ("PNG", "PPM"), "F": ("TIFF",)}.get(image.mode, WITH_16_BITS)
        if image.format not in kinds:
            raise PictureError(
                f"values of type {image.mode} in {image.format}, whose range is not known; save it "
                "in 8 bits"
            )
        bits = tags.get(BITS, (16,))
        if tags.get(PHOTOMETRIC, 1) != 1 or (image.mode != "F" and bits[0] != 16):
            raise PictureError(
                "grey of more than 8 bits that is not 0 .. 65535 from black to white"
            )


def _first_frame(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Return the box of a GIF's first frame if it covers a part of the picture, else None.

    Pillow fills the rest with a colour of the palette; viewers leave it transparent.
    """
    if image.format != "GIF" or not image.tile:
        return None
    box = tuple(image.tile[0][1])
    return None if box == (0, 0, *image.size) else box


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return how to turn the picture upright; of TIFF files, Pillow has done it."""
    with suppress(Exception):  # viewers too ignore damaged EXIF
        return TURNS.get(image.getexif().get(ORIENTATION))
    return None


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Return an image of integers of 16 bits, or of floats in [0, 1], as grey of 8 bits.

    Raises:
        PictureError: the floats have another range.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image)
        grey = Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8))
        key = image.info.get("transparency")
        if isinstance(key, int):
            grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
        return grey
    if image.mode == "F":
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # NaN too
            raise PictureError(
                f"floats from {low:.4g} to {high:.4g}, not in [0, 1]; save in 8 bits"
            )
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    return image


def _without_ends(
    image: Image.Image, frame: tuple[int, int, int, int] | None
) -> tuple[Image.Image, tuple[int, int, int, int] | None]:
    """Cut a picture, and a box in it, to `WIDEST` : 1 around the centre.

    An even number of pixels is cut away, so that the centre stays where it is.
    """
    most = WIDEST * min(image.size)
    cut = [max(0, side - most) // 2 for side in image.size]
    if not any(cut):
        return image, frame
    box = (cut[0], cut[1], image.width - cut[0], image.height - cut[1])
    if frame is not None:
        frame = tuple(edge - cut[i % 2] for i, edge in enumerate(frame))
    return image.crop(box), frame


def _profile(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """Return the embedded colour profile; None without one, or if viewers would ignore it.

    Raises:
        PictureError: this Pillow cannot read profiles.
    """
    raw = image.info.get("icc_profile")
    if not raw:
        return None
    if not features.check("littlecms2"):
        raise PictureError("a colour profile, which this build of Pillow cannot apply")
    with suppress(Exception):  # damaged
        profile = ImageCms.ImageCmsProfile(io.BytesIO(raw))
        mode = "RGB" if image.mode in ("RGBA", "P", "PA", "RGBX") else image.mode
        mode = "L" if mode in ("LA", "1") or mode.startswith(("I", "F")) else mode
        if COLOUR_SPACES.get(profile.profile.xcolor_space) == mode:
            return profile
    return None


def _on_white(
    image: Image.Image,
    profile: ImageCms.ImageCmsProfile | None,
    frame: tuple[int, int, int, int] | None,
) -> Image.Image:
    """Return a picture in RGB of 8 bits and sRGB, its transparent pixels white."""
    alpha = None
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        if image.mode != "RGBA":  # or a copy would take as much memory again
            image = image.convert("RGBA")
        alpha = image.getchannel("A")
    elif frame is not None:
        alpha = Image.new("L", image.size, 0)
        alpha.paste(255, frame)
    image = _in_srgb(image, profile)
    if alpha is None or alpha.getextrema() == (255, 255):
        return image
    image.paste((255, 255, 255), (0, 0, *image.size), ImageChops.invert(alpha))
    return image


def _in_srgb(image: Image.Image, profile: ImageCms.ImageCmsProfile | None) -> Image.Image:
    """Convert a picture to RGB, by its colour profile unless that is sRGB to within rounding."""
    if image.mode == "LAB":
        profile = ImageCms.createProfile("LAB")
    elif profile is None:
        return image.convert("RGB")
    if image.mode != "LAB":
        mode = COLOUR_SPACES[profile.profile.xcolor_space]
        image = image.convert(mode)
    with suppress(ImageCms.PyCMSError):  # a profile that cannot be applied is ignored by viewers
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(profile, srgb, image.mode, "RGB")
        if image.mode not in ("RGB", "L") or not _changes_nothing(transform, image.mode):
            return ImageCms.applyTransform(image, transform)
    return image.convert("RGB")


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return whether a transform keeps all of a grid of colours to within 2 of 255."""
    steps = np.arange(0, 256, 51, dtype=np.uint8)
    grid = np.stack(np.meshgrid(*[steps] * len(mode)), -1).reshape(1, -1, len(mode))
    probe = Image.fromarray(grid if mode == "RGB" else grid[..., 0])
    found = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
    return bool(np.abs(found - np.asarray(probe.convert("RGB"))).max() <= 2)

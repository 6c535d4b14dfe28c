"""Pictures are decoded as viewers show them, at a cost that is bounded, or left out by name."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from tests.training.image_folders import run
from training.data.image_folder import images_below, list_images
from training.data.pictures import PictureError, centre_crop, read_picture, read_rgb
from training.data.shards import LatentDataset
from training.evaluation.real_images import FolderImages

RED, BLUE = (254, 0, 0), (0, 0, 254)


def quadrants(side=16):
    """Return a picture that is red at the top left, blue at the top right, grey and black below."""
    pixels = np.zeros((side, side, 3), np.uint8)
    half = side // 2
    pixels[:half, :half], pixels[:half, half:], pixels[half:, :half] = RED, BLUE, 90
    return Image.fromarray(pixels)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels_of(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(kind, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    stored = np.asarray(quadrants())
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    raw = encoded(Image.fromarray(stored), kind, exif=exif.tobytes(), **options)
    shown = stored.transpose(1, 0, 2) if orientation > 4 else stored
    shown = shown[::-1] if orientation in (3, 4, 7, 8) else shown
    shown = shown[:, ::-1] if orientation in (2, 3, 6, 7) else shown
    assert np.abs(pixels_of(read_rgb(raw)) - shown).mean() < 9


def transparent():
    """Return files whose left half is transparent over red, and whose right half is blue."""
    image = Image.new("RGB", (8, 8), RED)
    image.paste(BLUE, (4, 0, 8, 8))
    alpha = Image.new("L", (8, 8), 0)
    alpha.paste(255, (4, 0, 8, 8))
    rgba = image.copy()
    rgba.putalpha(alpha)
    palette = image.quantize(2)
    left = palette.getpixel((0, 0))
    return {
        "rgba": encoded(rgba, "PNG"),
        "webp": encoded(rgba, "WEBP", lossless=True),
        "tiff": encoded(rgba, "TIFF"),
        "key": encoded(image, "PNG", transparency=RED),
        "palette": encoded(palette, "PNG", transparency=left),
        "gif": encoded(palette, "GIF", transparency=left),
    }


@pytest.mark.parametrize("kind", transparent())
def test_transparent_pixels_are_white(kind):
    pixels = pixels_of(read_rgb(transparent()[kind]))
    assert (pixels[:, :4] == 255).all()
    assert np.abs(pixels[:, 4:] - BLUE).max() <= 4


def test_half_transparent_pixels_are_blended_with_white():
    raw = encoded(Image.new("LA", (2, 2), (100, 51)), "PNG")
    assert read_rgb(raw).getcolors() == [(4, (224,) * 3)]  # 255 - (255 - 100) / 5


def test_a_gif_whose_first_frame_is_smaller_is_white_around_it():
    raw = bytearray(encoded(Image.new("L", (4, 4), 0), "GIF"))
    raw[6:10] = struct.pack("<HH", 8, 4)
    assert pixels_of(read_rgb(bytes(raw)))[:, :, 0].tolist() == [[0] * 4 + [255] * 4] * 4


def test_other_types_of_pixels():
    ramp = np.arange(256, dtype=np.float32)[None].repeat(64, 0)
    expected = ramp[..., None].repeat(3, 2)
    deep = (ramp * 257).astype(np.uint16)
    for raw in (
        encoded(Image.fromarray(ramp / 255), "TIFF"),
        encoded(Image.fromarray(deep), "PNG"),
        encoded(Image.fromarray(deep), "TIFF"),
        encoded(Image.fromarray(deep.astype(">u2")), "TIFF"),
    ):
        assert (pixels_of(read_rgb(raw)) == expected).all()
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = quadrants()
    raw = encoded(ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB"), "TIFF")
    assert (
        np.abs(pixels_of(read_rgb(raw)) - pixels_of(image)).mean() < 4
    )  # 8 bits of Lab are coarse
    raw = encoded(image.convert("CMYK"), "JPEG", quality=100)
    assert np.abs(pixels_of(read_rgb(raw)) - pixels_of(image)).mean() < 4


def test_colour_profiles_are_applied_and_srgb_changes_nothing():
    image = Image.new("RGB", (2, 2), (200, 100, 50))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    same = encoded(image, "PNG", icc_profile=profile.tobytes())
    assert read_rgb(same).getcolors() == image.getcolors()
    raw = bytearray(profile.tobytes())  # swap the places of red and blue
    red, blue = raw.index(b"rXYZ", 128), raw.index(b"bXYZ", 128)
    raw[red : red + 4], raw[blue : blue + 4] = b"bXYZ", b"rXYZ"
    swapped = read_rgb(encoded(image, "PNG", icc_profile=bytes(raw))).getpixel((0, 0))
    assert np.abs(np.array(swapped) - (50, 100, 200)).max() <= 3
    broken = encoded(image, "PNG", icc_profile=b"no profile")
    assert read_rgb(broken).getcolors() == image.getcolors()


def png(width, height):
    """Write a grey PNG of zeros."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((width + 1) * min(height, 100)), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )  # fmt: skip


def gamma(value):
    info = PngInfo()
    info.add(b"gAMA", struct.pack(">I", value))
    return encoded(quadrants(), "PNG", pnginfo=info)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (encoded(Image.fromarray(np.full((2, 2), 7, np.float32)), "TIFF"), "floats from 7 to 7"),
        (encoded(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"), "floats from nan"),
        (encoded(Image.fromarray(np.full((2, 2), 0.5, np.float32)), "PPM"), "range is not known"),
        (encoded(Image.fromarray(np.full((2, 2), 7, np.int32)), "TIFF"), "range is not known"),
        (encoded(quadrants(), "EPS"), "not an image"),
        (encoded(quadrants(), "PNG")[:-24], "truncated|broken"),
        (gamma(100_000), "gAMA"),
        (png(20_000, 20_000), "more than 178,956,970 pixels"),
        (png(70_000, 1), "70000 x 1 pixels"),
        (b"", "the file is empty"),
        (b"mud", "not an image"),
    ],
)  # fmt: skip
def test_what_viewers_would_show_otherwise_is_left_out_with_the_reason(raw, said, tmp_path):
    (tmp_path / "a.png").write_bytes(raw)
    with pytest.raises(PictureError, match=said):
        read_picture(tmp_path / "a.png", 8)
    assert np.array_equal(pixels_of(read_rgb(gamma(45_455))), pixels_of(quadrants()))


@pytest.mark.parametrize("size", [(30_000, 1), (1, 30_000), (40_001, 2)])
def test_extreme_pictures_are_cropped_before_they_are_scaled(size, monkeypatch):
    made = []
    resize = Image.Image.resize

    def counted(self, new, *arguments, **options):
        made.append(new[0] * new[1])
        return resize(self, new, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", counted)
    crop = centre_crop(read_rgb(png(*size)), 256)
    assert (crop.size, crop.getcolors()) == ((256, 256), [(256 * 256, (0, 0, 0))])
    assert max(made) <= 9 * 256 * 256


def crop_as_a_whole(image, size):
    """Scale the whole picture as ADM does, then crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


@pytest.mark.parametrize("size", [(64, 48), (333, 75), (17, 130), (31, 31), (90, 12)])
def test_ordinary_pictures_are_cropped_to_the_bit_as_ever(size):
    rng = np.random.default_rng(size)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    raw = encoded(image, "PNG")
    assert np.array_equal(
        pixels_of(centre_crop(read_rgb(raw), 16)), pixels_of(crop_as_a_whole(image, 16))
    )


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(2):
            quadrants().save(tmp_path / "data" / name / f"{number}.png")
    return tmp_path / "data"


def test_links_lead_to_each_folder_once(folder, tmp_path):
    (folder / "loop").symlink_to(".")
    (folder / "a" / "loop").symlink_to(".")
    (folder / "a" / "aloop").symlink_to("..")
    (folder / "a" / "all").symlink_to("/")
    (tmp_path / "outside").mkdir()
    quadrants().save(tmp_path / "outside" / "2.png")
    (tmp_path / "outside" / "back").symlink_to(folder / "a")
    (folder / "a" / "out").symlink_to(tmp_path / "outside")
    (folder / "a" / "again").symlink_to(tmp_path / "outside")
    assert list_images(folder).files == [
        "a/0.png", "a/1.png", "a/again/2.png", "b/0.png", "b/1.png"
    ]  # fmt: skip
    assert len(images_below(folder)) == 5
    (folder / "c").symlink_to("b")
    with pytest.raises(ValueError, match="are the same folder"):
        list_images(folder)


def test_folders_that_cannot_be_read_are_named(folder, monkeypatch):
    scandir = os.scandir

    def refused(place):
        if str(place).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(OSError, match=r"data/b cannot be read \(Permission denied\)"):
        list_images(folder)


def test_what_is_no_picture_is_named_and_every_name_works(folder, tmp_path, capsys):
    os.mkfifo(folder / "a" / "pipe.png")
    (folder / "a" / "gone.png").symlink_to("nowhere.png")
    (folder / "a" / "self.png").symlink_to("self.png")
    (folder / "b" / os.fsdecode(b"\xff\xfe.png")).write_bytes(b"mud")
    quadrants().save(folder / "b" / ("x" * 251 + ".png"))
    os.rename(folder / "b", folder / os.fsdecode(b"b\xff"))
    index = run(folder, tmp_path / "out", workers=1)
    assert [entry["file"] for entry in index["skipped"]] == [
        "a/gone.png", "a/pipe.png", "a/self.png", "b\udcff/\udcff\udcfe.png"
    ]  # fmt: skip
    assert "pipe" in index["skipped"][1]["reason"]
    assert LatentDataset(tmp_path / "out").classes == ["a", r"b\udcff"]
    assert len(LatentDataset(tmp_path / "out")) == 5
    assert r"b\udcff/\udcff\udcfe.png" in capsys.readouterr().out
    assert run(folder, tmp_path / "out")["count"] == 5  # goes on


def test_references_are_read_like_the_training_data(folder, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    quadrants(20).save(folder / "a" / "0.png", exif=exif.tobytes())
    run(folder, tmp_path / "out", flip=False)
    data, real = LatentDataset(tmp_path / "out"), FolderImages(folder, 9, 8)
    place = real.files.index(folder / "a" / "0.png")
    stored = ((data[0][0] + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(real.get([place])[0][0], stored)
    assert tuple(stored[:, 0, -1].tolist()) == RED


def test_a_reference_folder_with_other_pictures_of_the_same_sizes_is_another(folder):
    before, path = FolderImages(folder, 9, 8).key, folder / "a" / "0.png"
    assert FolderImages(folder, 9, 8).key == before
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert FolderImages(folder, 9, 8).key != before


def test_a_folder_of_the_older_decoder_is_not_mixed_but_still_read(folder, tmp_path):
    run(folder, tmp_path / "out")
    plan = tmp_path / "out" / "plan.json"
    plan.write_text(plan.read_text().replace(' "decoder": 2,\n', ""))
    with pytest.raises(ValueError, match="decoded by another version of GMFlow"):
        run(folder, tmp_path / "out")
    assert len(LatentDataset(tmp_path / "out")) == 4


def chunks(count):
    """Return a PNG with so many more chunks, which mean nothing."""
    raw = encoded(quadrants(), "PNG")
    empty = struct.pack(">I", 0) + b"abCD" + struct.pack(">I", zlib.crc32(b"abCD"))
    return raw[:33] + empty * count + raw[33:]


def scans(count):
    """Return a progressive JPEG with so many more scans."""
    raw = encoded(quadrants(), "JPEG", progressive=True)
    return raw[:-2] + raw[raw.rfind(b"\xff\xda") : -2] * count + raw[-2:]


def comments(count):
    return b"P3\n" + b"#a\n" * count + b"2 2 255\n" + b"0 " * 12


@pytest.mark.parametrize(
    ("write", "few", "many", "message"),
    [(chunks, 500, 200_000, "chunks"), (scans, 5, 60, "scans"), (comments, 5, 2000, "comments")],
)
def test_a_picture_of_many_tiny_parts_is_left_out(write, few, many, message):
    """Each part takes time, so that a small file could take hours."""
    assert read_rgb(write(few)).mode == "RGB"
    with pytest.raises(PictureError, match=f"more than [0-9,]+ {message}"):
        read_rgb(write(many))


def test_scans_are_counted_in_the_picture_alone():
    """Neither a thumbnail's markers nor what follows the picture count."""
    thumbnail = b"Exif\0\0" + b"\xff\xda" * 1000
    raw = encoded(quadrants(), "JPEG", exif=thumbnail, comment=b"\xff\xda" * 100)
    assert read_rgb(raw + b"\xff\xda" * 1000).size == (16, 16)


def test_a_file_far_larger_than_its_picture_is_left_out():
    with pytest.raises(PictureError, match="far more than 16 x 16 pixels need"):
        read_rgb(encoded(quadrants(), "PNG") + bytes(2**26 + 2**14))

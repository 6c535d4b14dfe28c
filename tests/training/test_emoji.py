"""Test the command that writes Noto's emoji, on a small package in the layout of npm's."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageOps

from training.data import emoji
from training.emoji import main


def entry(name, category, tones=(), shown=True):
    """Return an entry of the package's list."""
    looks = {tone: {"image": f"{name}-{tone}.png", "has_img_google": True} for tone in tones}
    more = {"skin_variations": looks} if looks else {}
    return {"image": f"{name}.png", "category": category, "has_img_google": shown, **more}


ENTRIES = [
    *(entry(f"face{i}", "Smileys & Emotion") for i in range(10)),
    *(entry(f"hand{i}", "People & Body", ("light", "dark")) for i in range(10)),
    entry("swatch", "Component"),
    entry("missing", "Flags", shown=False),
]


def picture(name, mirror=False):
    """Return a PNG of noise that depends on a name, at the size of the package's."""
    rng = np.random.default_rng(list(name.encode()))
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 4), dtype=np.uint8), "RGBA")
    image = ImageOps.mirror(image) if mirror else image
    content = io.BytesIO()
    image.resize((64, 64), Image.Resampling.NEAREST).save(content, "PNG")
    return content.getvalue()


def package(folder, entries=ENTRIES, left_out=()):
    """Write a package with a picture for every entry; return its file."""
    looks = [look for each in entries for look in [each, *each.get("skin_variations", {}).values()]]
    files = {emoji.LIST: json.dumps(entries).encode()}
    for look in looks:
        if look["has_img_google"] and look["image"] not in left_out:
            files[emoji.PICTURES + look["image"]] = picture(look["image"])
    files["package/img/google/64/../../../../escaped.png"] = picture("escaped")
    path = folder / "emoji.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def known(monkeypatch):
    """Take a file for the version whose checksum is known."""

    def take(path):
        monkeypatch.setattr(emoji, "SHA512", hashlib.sha512(path.read_bytes()).hexdigest())
        return path

    return take


def test_an_emoji_is_in_one_part_with_all_its_skin_tones(tmp_path, known, capsys):
    path = known(package(tmp_path))
    main(["--out", str(tmp_path / "out"), "--package", str(path), "--test-share", "0.3"])
    assert "28 pictures" in capsys.readouterr().out
    files = {part: sorted((tmp_path / "out" / part).rglob("*.png")) for part in ("train", "test")}
    assert [len(found) for found in files.values()] == [28, 12]
    assert {each.parent.name for each in files["test"]} == {
        "people_and_body",
        "smileys_and_emotion",
    }
    own = [{each.stem.split("-")[0] for each in found} for found in files.values()]
    assert not own[0] & own[1]
    assert len(own[0] | own[1]) == 20
    assert not list(tmp_path.rglob("escaped.png"))
    with pytest.raises(SystemExit, match="exists already; delete it"):
        main(["--out", str(tmp_path / "out"), "--package", str(path)])


def test_what_looks_alike_is_in_one_part():
    listed = [emoji.Emoji("people", (f"{i}.png", f"{i}-dark.png")) for i in range(30)]
    found = {name: picture(name) for each in listed for name in each.pictures}
    found["7-dark.png"] = picture("3.png", mirror=True)  # in another skin tone, mirrored
    found["9.png"] = picture("7.png")  # and so like 3
    other = emoji.Emoji("flags", ("flag.png",))
    found["flag.png"] = picture("3.png")  # of another class
    labels = emoji.alike([*listed, other], found)
    assert [*np.flatnonzero(labels == labels[3])] == [3, 7, 9]
    assert len(np.unique(labels)) == 29
    for seed in range(20):
        test = emoji.split([*listed, other], labels, 0.3, seed)
        assert test[[3, 7, 9]].all() or not test[[3, 7, 9]].any()
        assert 7 <= test[:30].sum() <= 9


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "is damaged"),
        (
            lambda path: package(path.parent, [{"has_img_google": False}]),
            "has another kind of package/emoji.json",
        ),
        (lambda path: package(path.parent, left_out=["face3.png"]), "has 39 of the 40 pictures"),
    ],
)
def test_a_wrong_package_is_named_and_leaves_nothing(tmp_path, known, damage, said):
    path = package(tmp_path)
    damage(path)
    with pytest.raises(SystemExit, match=r"is not emoji-datasource-google 16\.0\.0"):
        main(["--out", str(tmp_path / "out"), "--package", str(path)])
    known(path)
    with pytest.raises(SystemExit, match=said):
        main(["--out", str(tmp_path / "out"), "--package", str(path)])
    assert not (tmp_path / "out").exists()


def test_without_npm_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"npm is not here.* give the file as --package"):
        main(["--out", str(tmp_path / "out")])
    failing = tmp_path / "npm"
    failing.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    failing.chmod(0o755)
    with pytest.raises(SystemExit, match=r"could not download .*no network"):
        main(["--out", str(tmp_path / "out")])

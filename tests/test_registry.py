"""What the Comfy registry reads: addresses, pictures, the archive, the notes of a version."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests import registry_pictures
from tests.docs_tables import REPOSITORY

PROJECT = (REPOSITORY / "pyproject.toml").read_text("utf-8")
README = (REPOSITORY / "README.md").read_text("utf-8")
PLACEHOLDER = "OWNER"
MARKED = {"pyproject.toml", "README.md"}  # where it is filled in
DESCRIBED = {".github/release.py", "CONTRIBUTING.md", "tests/test_registry.py"}  # named, not used
SHIPPED = (  # what the extension needs at run time, and what its pages show
    *("__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md"),
    *("gmflow_core", "nodes", "training", "workflows", "subgraphs", "web", "locales", "docs"),
)


def value(key: str) -> str:
    """Return the value of a key of pyproject.toml."""
    return re.search(rf'^{key} = "(.+?)"', PROJECT, re.MULTILINE)[1]


def test_addresses_agree():
    """The README and all addresses of pyproject.toml are those of one repository."""
    address = value("Repository")
    account, name = re.fullmatch(r"https://github\.com/([\w-]+)/([\w.-]+)", address).groups()
    assert re.search(r"^git clone (\S+) ComfyUI/custom_nodes/\w+$", README, re.M)[1] == address
    raw = f"https://raw.githubusercontent.com/{account}/{name}/main/"
    assert value("Icon") == raw + registry_pictures.ICON.relative_to(REPOSITORY).as_posix()
    assert value("Banner") == raw + registry_pictures.BANNER.relative_to(REPOSITORY).as_posix()
    for key, rest in (("Documentation", "tree/main/"), ("Changelog", "blob/main/")):
        path = value(key).removeprefix(f"{address}/{rest}")
        assert (REPOSITORY / path).exists(), value(key)
    assert value("Issues") == f"{address}/issues"
    assert len(re.findall(r"https://(?:raw\.)?github\w*\.com/", PROJECT)) == 6  # these, no other


def test_the_placeholder_stands_in_the_marked_places_only():
    """One command fills it in: CONTRIBUTING.md has it."""
    tracked = subprocess.run(
        ["git", "grep", "-lwE", f"{PLACEHOLDER}/gmflow|[\"']{PLACEHOLDER}[\"']"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if tracked.returncode == 128:
        pytest.skip("not a git repository")
    assert set(tracked.stdout.split()) <= MARKED | DESCRIBED
    assert "sed -i s/OWNER/account/ pyproject.toml README.md" in (
        REPOSITORY / "CONTRIBUTING.md"
    ).read_text("utf-8")


def test_pictures_are_the_drawn_ones():
    """The registry wants a square icon of 400 pixels or more, and a banner of 21 : 9."""
    icon, banner = (Image.open(path) for path in (registry_pictures.ICON, registry_pictures.BANNER))
    assert icon.width == icon.height >= 400
    assert banner.width * 9 == banner.height * 21
    for saved, draw in ((icon, registry_pictures.icon), (banner, registry_pictures.banner)):
        drawn = draw()
        assert drawn.size == saved.size
        assert np.abs(np.asarray(drawn, dtype=float) - np.asarray(saved)).mean() < 1


def test_the_archive_leaves_out_tests_only():
    """`.comfyignore` names folders and files from the root, and none that is needed."""
    lines = (REPOSITORY / ".comfyignore").read_text("utf-8").splitlines()
    ignored = [line for line in lines if line and not line.startswith("#")]
    assert "/tests/" in ignored
    for line in ignored:
        assert re.fullmatch(r"/[\w./]+", line), line  # no pattern that could match elsewhere
        assert (REPOSITORY / line[1:]).exists(), line
        assert line.strip("/") not in SHIPPED, line
        inside = line.strip("/").split("/")[0]
        assert inside not in SHIPPED or inside == "docs", line


def test_contributing_has_the_commands_of_the_readme():
    fences = re.compile(r"```bash\n(python3 -m venv .+)\n```")
    commands = fences.findall(README)
    assert len(commands) == 2
    assert fences.findall((REPOSITORY / "CONTRIBUTING.md").read_text("utf-8")) == commands


# Publishing


def test_publishing_waits_for_the_tests():
    """The tests are those of CI, which `.ci/run` reads from the README."""
    folder = REPOSITORY / ".github" / "workflows"
    publish, tests = (
        yaml.safe_load((folder / name).read_text("utf-8"))["jobs"]
        for name in ("publish.yml", "tests.yml")
    )
    assert publish["publish"]["needs"] == "tests"
    assert publish["tests"] == {"uses": f"./{(folder / 'tests.yml').relative_to(REPOSITORY)}"}
    assert ".ci/run" in [step.get("run") for step in tests["tests"]["steps"]]


@pytest.fixture
def release_notes():
    """Return the function that the publishing workflow calls."""
    path = REPOSITORY / ".github" / "release.py"
    spec = importlib.util.spec_from_file_location("release", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.release_notes


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """Return a folder with this repository's files, filled in for the account `someone`."""
    (tmp_path / "pyproject.toml").write_text(
        re.sub(rf"\b{re.escape(account())}\b", "someone", PROJECT), encoding="utf-8"
    )
    (tmp_path / "CHANGELOG.md").write_bytes((REPOSITORY / "CHANGELOG.md").read_bytes())
    return tmp_path


def account() -> str:
    """Return the account in the repository's address: the placeholder until it is filled in."""
    return value("Repository").split("/")[3]


def test_the_changelog_begins_with_the_version(release_notes, filled):
    notes = release_notes(filled, "someone/gmflow", f"refs/tags/v{value('version')}")
    assert notes.startswith("### ")
    assert "\n## " not in notes
    assert release_notes(filled, "someone/gmflow", "refs/heads/main") == notes


@pytest.mark.parametrize(
    ("repository", "ref", "old", "new", "message"),
    [
        ("someone/gmflow", "refs/tags/v9.9.9", "", "", "tag v"),
        ("another/gmflow", "", "", "", "publish from there"),
        ("someone/gmflow", "", "someone", PLACEHOLDER, "still has OWNER"),
        ("someone/gmflow", "", 'PublisherId = "someone"', 'PublisherId = "OWNER"', "still has"),
        ("someone/gmflow", "", '\nversion = "', '\nversion = "9', "describe this version first"),
    ],
)
def test_what_does_not_fit_is_not_published(
    release_notes, filled, repository, ref, old, new, message
):
    path = filled / "pyproject.toml"
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new) if old else text, encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        release_notes(filled, repository, ref)

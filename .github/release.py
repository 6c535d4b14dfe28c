"""Check that this version can be published, and print what CHANGELOG.md says about it.

    python3 .github/release.py ACCOUNT/NAME [REF]

Ends with a message if the address in pyproject.toml is not that of ACCOUNT/NAME on GitHub, REF is a
tag other than the version, or CHANGELOG.md does not begin with the version.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def release_notes(root: Path, repository: str, ref: str = "") -> str:
    """Return the part of CHANGELOG.md about the version in pyproject.toml.

    Args:
        root: the folder with both files.
        repository: ACCOUNT/NAME on GitHub that publishes.
        ref: what is published in git's long form, such as refs/tags/v0.2.0 or refs/heads/main.

    Raises:
        SystemExit: something does not fit; the message says what to change.
    """
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"', project, re.MULTILINE)[1]
    address = re.search(r'^Repository = "(.+)"', project, re.MULTILINE)[1]
    publisher = re.search(r'^PublisherId = "(.+?)"', project, re.MULTILINE)[1]
    if "OWNER" in (publisher, *address.split("/")):
        raise SystemExit(
            f"pyproject.toml still has OWNER for the address ({address}) or the publisher "
            f"({publisher}); fill it in as CONTRIBUTING.md says under 'Publish a version'"
        )
    if address != f"https://github.com/{repository}":
        raise SystemExit(
            f"pyproject.toml has the address {address}, and this is https://github.com/"
            f"{repository}: publish from there, or change [project.urls]"
        )
    if ref.startswith("refs/tags/") and ref != f"refs/tags/v{version}":
        raise SystemExit(f"{ref} is not the version in pyproject.toml, {version}: tag v{version}")
    title, _, notes = (
        (root / "CHANGELOG.md").read_text(encoding="utf-8").partition("\n## ")[2].partition("\n")
    )
    if title.split()[0] != version:
        raise SystemExit(
            f"CHANGELOG.md begins with {title!r}, the version in pyproject.toml is {version}: "
            "describe this version first"
        )
    return notes.partition("\n## ")[0].strip()


if __name__ == "__main__":
    print(release_notes(ROOT, *sys.argv[1:]))

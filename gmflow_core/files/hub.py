"""Tell ids of the Hugging Face hub from paths, and find or download their files."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote
from urllib.request import url2pathname

from .errors import quoted

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(.+))?")
SCHEME = re.compile(r"(file|hf|https?|ssh):/+", re.IGNORECASE)  # pathlib makes one slash of two
HUB_HOST = re.compile(
    r"(?:www\.|git@)?(?:huggingface\.co|hf\.co|hf-mirror\.com)[/:]", re.IGNORECASE
)
PAGES = ("blob", "commit", "raw", "resolve", "tree")  # of a model on the hub, before a revision
PREFIXES = ("api", "models")  # of a model's address on some mirrors
OTHER_KINDS = ("datasets", "spaces")  # of repositories
DEFAULT_REVISION = "main"
QUOTES = "\"'`<>\u00ab\u00bb\u2018\u2019\u201c\u201d\u201e"
LONGEST_PATH = 4096  # characters
FILE_ENDINGS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".pkl")
REASONS = {  # names of errors of the hub's client: what they mean, and what to do
    "LocalEntryNotFoundError": (
        "the hub cannot be reached, and it is not in the cache here",
        "check the connection",
    ),
    "GatedRepoError": (
        "it is only for those who accept its terms",
        "accept them on https://huggingface.co/{name}, and log in here: hf auth login",
    ),
    "RepositoryNotFoundError": (
        "the hub has no such repository, or it is private",
        "check the name; for a private one log in: hf auth login",
    ),
    "EntryNotFoundError": ("the repository has no such file", "look at its page on the hub"),
    "RevisionNotFoundError": ("there is no such revision", "check the name behind the @"),
    "OfflineModeIsEnabled": ("the client is set offline", "unset HF_HUB_OFFLINE"),
}
BY_HAND = "download the folder by other means and give its path"  # advice in messages


def tidy_source(source: str | Path) -> str:
    """Return the path or hub id that a text means, however it was pasted.

    A path may be in quotes, start with ~ or file://, have backslashes or end with a slash. A hub id
    may be the address of any page of the model, on the hub or on a mirror. Text that is the path of
    something which exists stays as it is.

    Returns:
        A path; or "owner/name" or "owner/name@revision".

    Raises:
        ValueError: it is neither text nor a path; no path can be that long, or hold such a
            character; or it is an address of something else.
    """
    if not isinstance(source, (str, Path)):
        raise ValueError(f"{quoted(source)} is no path and no hub id; give a text or a Path")
    text = source if isinstance(source, str) else source.as_posix()
    if len(text) > LONGEST_PATH or "\0" in text:
        raise ValueError(
            f"{quoted(text)} is no path and no hub id: it has {len(text):,} characters"
            f"{', and NUL is one of them' if chr(0) in text else ''}"
        )
    if os.path.exists(text):
        return text
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Cc")).strip()
    while text and text[0] in QUOTES and text[-1] in QUOTES:
        text = text[1:-1].strip()
    scheme = SCHEME.match(text)
    if scheme and scheme[1].lower() == "file":
        return _path_of(text[scheme.end() :])
    if scheme:
        return _id_of(text[scheme.end() :], text, has_host=scheme[1].lower() != "hf")
    path = _tidy_path(text)
    if os.path.exists(path):
        return path
    host = HUB_HOST.match(text)
    if host:
        return _id_of("hub/" + text[host.end() :], text, has_host=True)
    parts = path.split("/")
    if len(parts) > 4 and parts[3] in PAGES and re.fullmatch(r"\w[\w-]*(\.[\w-]+)+", parts[0]):
        return _id_of(path, text, has_host=True)
    if len(parts) > 3 and parts[2] in PAGES and HUB_ID.fullmatch("/".join(parts[:2])):
        return _id_of(path, text, has_host=False)
    return path


def _tidy_path(text: str) -> str:
    """Return a path with ~ replaced, slashes of this system, and no slash at its end."""
    path = os.path.expanduser(text)
    if os.sep == "/" and not os.path.exists(path):
        escaped = path.replace("\\ ", " ")  # as a shell writes a blank
        path = escaped if os.path.exists(escaped) else path.replace("\\", "/")
    return path.rstrip("/" + os.sep) or path[:1]


def _path_of(rest: str) -> str:
    """Return the path in a file:// address, of which `rest` follows the slashes."""
    rest = rest.removeprefix("localhost/").partition("#")[0].partition("?")[0]
    if rest.startswith("~") or re.match(r"[A-Za-z]:", rest):
        return _tidy_path(unquote(rest))
    return _tidy_path(url2pathname("/" + rest))


def _id_of(rest: str, text: str, has_host: bool) -> str:
    """Return the hub id in an address.

    Args:
        rest: the address without its scheme.
        text: the whole, for messages.
        has_host: whether the name of a server comes first.

    Raises:
        ValueError: there is no owner/name in it, or it is not of a model.
    """
    rest = rest.partition("#")[0].partition("?")[0]
    mirror = SCHEME.sub("", os.environ.get("HF_ENDPOINT", "")).strip("/")
    if has_host and mirror and rest.startswith(mirror + "/"):
        parts = rest.removeprefix(mirror).split("/")
    else:
        parts = rest.split("/")[1:] if has_host else rest.split("/")
    parts = [unquote(part).strip() for part in parts if part.strip()]
    while len(parts) > 2 and parts[0] in PREFIXES:
        parts.pop(0)
    name, _, revision = "/".join(parts[:2]).removesuffix(".git").partition("@")
    if len(parts) > 3 and parts[2] in PAGES:
        revision = "/".join(parts[3:6]) if parts[3] == "refs" else parts[3]
    if not HUB_ID.fullmatch(name) or parts[0] in OTHER_KINDS:
        raise ValueError(
            f"{quoted(text)} is not the address of a model on the hub, such as "
            f"https://huggingface.co/owner/name; give one, its id (owner/name), or {BY_HAND}"
        )
    return f"{name}@{revision}" if revision and revision != DEFAULT_REVISION else name


def is_published(source: str | Path) -> bool:
    """Return whether `source` is a folder or may be the id of one on the hub.

    A hub id is "owner/name" or "owner/name@revision" where no file or folder of that name exists.
    """
    return os.path.isdir(source) or _hub_id(source) is not None


def cached_folder(hub_id: str) -> Path | None:
    """Return the folder of a model in the hub's cache, None if it is not there; never go online."""
    try:
        from huggingface_hub import try_to_load_from_cache

        index = try_to_load_from_cache(hub_id, "model_index.json")
    except (ImportError, OSError, ValueError):  # the last two: a damaged cache
        return None
    return Path(index).parent if isinstance(index, str) else None


def _hub_id(source: str | Path) -> tuple[str, str | None] | None:
    """Parse "owner/name[@revision]"; None for names that exist on disk or are spelt otherwise."""
    name = source if isinstance(source, str) else source.as_posix()
    if os.path.exists(name) or name.lower().endswith(FILE_ENDINGS):
        return None
    match = HUB_ID.fullmatch(name)
    return match and match.groups()


def folder_of(source: str | Path, patterns: list[str]) -> Path:
    """Return `source` if it is a folder, else download it from the hub and return its snapshot.

    Args:
        source: a folder or hub id, see `is_published`.
        patterns: the files to download, such as "vae/*.json".

    Raises:
        ValueError: huggingface_hub is not installed.
        OSError: the hub has no such model, or cannot be reached.
    """
    if os.path.isdir(source):
        return Path(source)
    name, revision = _hub_id(source)
    return snapshot(name, revision, patterns, str(source))


def snapshot(
    name: str,
    revision: str | None,
    patterns: list[str],
    source: str,
    **options: Any,
) -> Path:
    """Download a part of a model from the hub, and return the folder in the hub's cache.

    Args:
        name: "owner/name".
        patterns: the files to download.
        source: the name in messages.
        options: further arguments of huggingface_hub's function.

    Raises:
        ValueError: huggingface_hub is not installed.
        OSError: the hub has no such model, or cannot be reached.
    """
    with _reaching(source) as hub:
        return Path(
            hub.snapshot_download(name, revision=revision, allow_patterns=patterns, **options)
        )


def names_on_hub(name: str, revision: str | None, source: str) -> list[str]:
    """Return the paths of all files of a model on the hub; nothing is downloaded.

    Args:
        name: "owner/name".
        source: the name in messages.

    Raises:
        ValueError: huggingface_hub is not installed.
        OSError: the hub has no such model, or cannot be reached.
    """
    with _reaching(source) as hub:
        return hub.list_repo_files(name, revision=revision)


@contextmanager
def _reaching(source: str) -> Iterator[ModuleType]:
    """Yield huggingface_hub; what its client raises becomes one error that names the source.

    Raises:
        ValueError: huggingface_hub is not installed.
        OSError: the client has raised an error.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"{source} is no file or folder here; to load it from the Hugging Face hub, run "
            f"`pip install huggingface_hub`, or {BY_HAND}"
        ) from error
    try:
        yield huggingface_hub
    except Exception as error:  # the hub's client raises many kinds, of several packages
        raise OSError(
            f"{source} is no file or folder here, and could not be downloaded from the Hugging "
            f"Face hub: {hub_reason(error, source)}, or {BY_HAND}"
        ) from error


def hub_reason(error: Exception, name: str) -> str:
    """Return what an error of the hub's client means, the error itself, and what to do.

    Args:
        name: "owner/name" of the model.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}  # they have moved between versions
    what, advice = next(
        (told for kind, told in REASONS.items() if kind in kinds),
        ("", "check the name and the connection"),
    )
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{what}{' ' if what else ''}({reason[:300]}); {advice.format(name=name)}"

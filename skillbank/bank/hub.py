"""The Hugging Face Hub: one commit for all the files of a version, adapters by repository, and what it refuses in one line.

It is read as any place that fsspec knows. Written to in that way, every file would be a commit, and a version could be seen half.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["STREAMS", "Commits", "on_hub", "reaching", "repository_files", "repository_of", "snapshot"]

STREAMS = {"block_size": 0}
"""Options of the Hub's file system: files are read from front to back in one request each, and no older listing says what they hold."""

_LOGIN = "log in with `hf auth login`"


def on_hub(url: str) -> bool:
    """Whether a URL is a repository of the Hub, where every write is a commit; a bucket there is a place like any other."""
    return url.startswith("hf://") and not url.startswith("hf://buckets/")


def repository_of(path: str) -> tuple[str, str]:
    """Type of the repository that a path on the Hub begins with, and its name, which `@` and a revision may follow.

    Raises:
        ValueError: the path is too short for one.

    """
    kind, *parts = path.split("/") if path.startswith(("models/", "datasets/", "spaces/")) else ("models", *path.split("/"))
    if len(parts) < 2:
        raise ValueError("it names no repository on the Hub, as hf://user/repo does")
    return kind.removesuffix("s"), "/".join(parts[:2])


class Commits:
    """Writing to a repository of the Hub, which is made, private, where there is none.

    Args:
        url: the repository, perhaps with a revision and a folder in it.
        files: its file system.
        root: path of the URL there.

    Raises:
        FileNotFoundError: no such revision.
        PermissionError: the user may not make the repository.
        ConnectionError: the Hub cannot be reached.

    """

    def __init__(self, url: str, files: Any, root: str) -> None:
        from huggingface_hub import HfApi

        self.url, self.files, self.api = url, files, HfApi()
        kind, name = repository_of(root)
        with reaching(url):
            files.invalidate_cache()
            if "@" not in name and not self.api.repo_exists(name, repo_type=kind):
                self.api.create_repo(name, repo_type=kind, private=True, exist_ok=True)
            self.place = files.resolve_path(root)
            self.head = self.api.repo_info(self.place.repo_id, repo_type=self.place.repo_type, revision=self.place.revision).sha

    def write(self, files: Mapping[str, Path | bytes], what: str) -> None:
        """Write files by path, all in one commit that is called `what`.

        Raises:
            PermissionError: the user may not write there.
            ValueError: somebody else has written there since this object was made.
            ConnectionError: the Hub cannot be reached.

        """
        from huggingface_hub import CommitOperationAdd

        place = self.place
        added = [CommitOperationAdd(f"{place.path_in_repo}/{path}".lstrip("/"), each) for path, each in files.items()]
        with reaching(self.url):
            made = self.api.create_commit(
                place.repo_id, added, commit_message=what, repo_type=place.repo_type, revision=place.revision, parent_commit=self.head
            )
        self.head = made.oid
        self.files.invalidate_cache()


def snapshot(repository: str, files: Sequence[str], revision: str | None, patterns: Sequence[str] = ()) -> Path:
    """Download some files of a repository, and those that fit shell patterns, into the Hub's cache; their folder is named after the commit.

    Raises:
        FileNotFoundError: no such repository or revision.
        PermissionError: the user may not read it.
        ConnectionError: the Hub cannot be reached, and the files are not in the cache.

    """
    from huggingface_hub import HfApi

    with reaching(f"{repository!r} (no folder here)"):
        return Path(HfApi().snapshot_download(repository, revision=revision, allow_patterns=[*map(glob.escape, files), *patterns]))


def repository_files(repository: str, revision: str) -> list[str]:
    """Paths of all files of a repository."""
    from huggingface_hub import HfApi

    with reaching(repository):
        return HfApi().list_repo_files(repository, revision=revision)


@contextmanager
def reaching(where: str) -> Iterator[None]:
    """Say in one line what the Hub refuses; errors from elsewhere pass.

    Raises:
        FileNotFoundError: no such repository, revision or file.
        PermissionError: the user may not do it.
        ValueError: the Hub does not take it, or it is no address.
        ConnectionError: the Hub cannot be reached.

    """
    try:
        yield
    except Exception as error:
        for each in (error, error.__cause__):  # its file system says FileNotFoundError because of an error of the Hub
            if type(each).__module__.partition(".")[0] in ("huggingface_hub", "httpx", "httpx2", "requests"):
                raise _in_words(where, each) from error
        raise


def _in_words(where: str, error: BaseException | None) -> Exception:
    from huggingface_hub import errors

    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    said = " ".join(str(error).split())
    match error, getattr(getattr(error, "response", None), "status_code", None):
        case errors.GatedRepoError(), _:
            return PermissionError(f"{where}: the Hub asks for a consent: give it on the page of the repository and {_LOGIN}")
        case errors.RepositoryNotFoundError(), _:
            return FileNotFoundError(f"{where}: no such repository on the Hub, or a private one: check the name, or {_LOGIN}")
        case errors.RevisionNotFoundError(), _:
            return FileNotFoundError(f"{where}: no such revision on the Hub: give a branch, a tag or a commit of the repository")
        case errors.EntryNotFoundError(), _:
            return FileNotFoundError(f"{where}: no such file on the Hub")
        case errors.OfflineModeIsEnabled(), _:
            return ConnectionError(f"{where}: HF_HUB_OFFLINE keeps the Hub from being asked: unset it")
        case _, 401 | 403:
            return PermissionError(f"{where}: the Hub refuses ({said}): {_LOGIN}, with a token that may do this")
        case _, 412:
            return ValueError(f"{where} was written to by somebody else meanwhile: start again, what is there already does not travel twice")
        case _, int(status) if 400 <= status < 500:
            return ValueError(f"{where}: the Hub refuses ({said}): change what it names, or wait where that was too much")
        case ValueError(), None:
            return ValueError(f"{where} is no address on the Hub: {said}")
    return ConnectionError(f"{where} cannot be reached ({said}): check the network and try again")

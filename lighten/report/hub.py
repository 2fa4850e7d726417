"""Pushing artifacts with their cards to the Hugging Face hub: one repository and one commit for each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten.errors import Failure, RequestError
from lighten.model.hub import http_library
from lighten.report.card import CARD, HUB_ID, card
from lighten.report.shareable import local_paths, without_paths
from lighten.results.results import BASELINE, Results
from lighten.store.artifact import Artifact, find_damage, read_artifact
from lighten.store.files import MANIFEST
from lighten.store.links import follow
from lighten.store.manifest import DIGEST, digest

PLACE = "{variant}"
TEXTS = (".json", ".txt", ".md", ".jinja", ".py", ".yaml")
LONGEST = 1_000_000
"""Maximum number of bytes of a text that is searched for paths. Vocabularies are longer."""


@dataclass(frozen=True)
class Upload:
    """A variant to push: the artifact in the store, and the card that is added to its files."""

    variant: str
    repo: str
    artifact: Artifact
    card: str
    message: str
    manifest: bytes
    """Manifest of the artifact, without paths of this machine."""

    @property
    def files(self) -> list[tuple[str, int]]:
        """Returns the path and bytes of each file of the repository."""
        listed = {entry["path"]: int(entry["size"]) for entry in self.artifact.manifest["files"]}
        listed[MANIFEST] = len(self.manifest)
        listed[CARD] = len(self.card.encode())
        return sorted(listed.items())

    @property
    def size_bytes(self) -> int:
        """Total bytes of the upload."""
        return sum(size for _, size in self.files)

    def json(self, url: str | None, private: bool) -> dict[str, Any]:
        """Returns what was pushed, or would be pushed, for a program."""
        files = [{"path": path, "size_bytes": size} for path, size in self.files]
        return {"variant": self.variant, "repo": self.repo, "private": private, "url": url, "files": files}


def check(repo: str, variants: Sequence[str]) -> None:
    """Checks that every variant has a repository of its own with a name that the hub allows.

    Raises:
        RequestError: several variants would go to one repository, or the hub does not allow the name.
    """
    if len(variants) > 1 and PLACE not in repo:
        raise RequestError(
            f"--push-to-hub {repo} is one repository, and there are {len(variants)} variants ({', '.join(variants)}): "
            f"choose one with --variant, or name one repository for each, such as {repo}-{PLACE}"
        )
    for variant in variants:
        name = repo.replace(PLACE, variant)
        if not HUB_ID.fullmatch(name) or len(name) > 96 or re.search(r"--|\.\.|[-.]$|\.git$|/[-.]", name):
            raise RequestError(f"--push-to-hub {name}: the hub's names are OWNER/NAME, of letters, digits, - _ and .")


def uploads(results: Results, folder: Path, repo: str, variants: Sequence[str] = ()) -> list[Upload]:
    """Returns what is pushed of a version: the named variants, or all except the baseline and failed ones.

    Raises:
        RequestError: a variant does not exist or failed, or `check` refuses the repositories.
        Failure: an artifact is missing or damaged.
    """
    rows = {variant.name: variant for variant in results.measured if not variant.elsewhere}
    if unknown := [name for name in variants if name not in rows]:
        failed = any(variant.name == unknown[0] for variant in results.variants)
        why = "failed or lies on another machine" if failed else "is not in it"
        raise RequestError(f"{results.title}: variant {unknown[0]!r} {why}; there is {', '.join(rows)}")
    chosen = list(dict.fromkeys(variants)) or [name for name in rows if name != BASELINE]
    if not chosen:
        raise RequestError(f"{results.title} has nothing to push but the source; --variant {BASELINE} pushes that")
    check(repo, chosen)
    found = []
    for name in chosen:
        artifact = read_artifact(follow(folder / "variants" / name))
        if damage := find_damage(artifact):
            raise Failure(f"{name} is damaged ({damage[0]}): 'lighten verify' removes it, and a run makes it again")
        there = repo.replace(PLACE, name)
        message = f"{name} of {results.title}, made and measured by lighten"
        _check_private(name, artifact)
        readme = card(results, rows[name], artifact, there)
        found.append(Upload(name, there, artifact, readme, message, _manifest(artifact, local_paths(results))))
    return found


def _manifest(artifact: Artifact, known: dict[str, str]) -> bytes:
    """Returns the manifest that is published: without paths of this machine, with all files, keys and hashes."""
    manifest = artifact.manifest
    public = {name: each if name == "files" else without_paths(each, known) for name, each in manifest.items()}
    if DIGEST in public:
        public[DIGEST] = digest(public)
    return (json.dumps(public, indent=1, ensure_ascii=False) + "\n").encode()


def _check_private(name: str, artifact: Artifact) -> None:
    """Raises Failure for a link in an artifact, and for a text in it that names a directory of this machine."""
    places = {str(path) for path in (Path.home(), Path.cwd(), artifact.path.parent) if len(path.parts) > 1}
    for entry in artifact.manifest["files"]:
        file = artifact.path / entry["path"]
        if file.is_symlink() or not file.resolve().is_relative_to(artifact.path.resolve()):
            raise Failure(f"{name}: {entry['path']} is a link, which is not pushed: run the recipe again")
        if file.suffix not in TEXTS or entry["size"] > LONGEST:
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        if private := next((place for place in sorted(places) if f"{place}/" in text), None):
            raise Failure(
                f"{name}: {entry['path']} names a directory of this machine ({private}): take that out of the "
                "model's own file before it is pushed, and run the recipe again"
            )


def check_token() -> None:
    """Checks that there is a token to push with.

    Raises:
        RequestError: there is no token, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise RequestError("the hub is switched off by HF_HUB_OFFLINE: unset it to push")
    if not get_token():
        raise RequestError("pushing needs a token of the hub: set HF_TOKEN, or log in with 'hf auth login'")


def push(upload: Upload, *, private: bool = True) -> str:
    """Creates the repository if it does not exist, uploads everything in one commit, and returns its address.

    Raises:
        RequestError: there is no token.
        Failure: the hub cannot be reached, or refused.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_token()
    paths = [path for path, _ in upload.files if path not in (CARD, MANIFEST)]
    operations = [CommitOperationAdd(MANIFEST, upload.manifest)]
    operations += [CommitOperationAdd(path, str(upload.artifact.path / path)) for path in paths]
    operations.append(CommitOperationAdd(CARD, upload.card.encode()))
    api = HfApi(library_name="lighten")
    with _hub_failures(upload.repo):
        where = api.create_repo(upload.repo, private=private, exist_ok=True)
        api.create_commit(upload.repo, operations, commit_message=upload.message)
    return str(where)


@contextmanager
def _hub_failures(repo: str) -> Iterator[None]:
    """Turns an error of the hub or of the connection into one message."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    http = http_library()
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        advice = "; is the token one that may write there?" if status in (401, 403) else ""
        raise Failure(f"the hub refused {repo} ({status}): {_first(error)}{advice}") from error
    except (http.HTTPError, OSError) as error:
        raise Failure(
            f"cannot reach {constants.ENDPOINT} to push {repo} ({_first(error)}): check the connection; "
            "what was made is kept, so the same command with 'lighten report' tries again"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise Failure(f"{repo} could not be pushed: {_first(error)}") from error


def _first(error: Exception) -> str:
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return next((line.strip() for line in str(text).splitlines() if line.strip()), type(error).__name__).rstrip(".")


def publish(
    results: Results,
    folder: Path,
    repo: str,
    variants: Sequence[str] = (),
    *,
    private: bool = True,
    dry_run: bool = False,
) -> Iterator[tuple[Upload, str | None]]:
    """Pushes variants of a version. Yields each with its address, or with None if nothing had changed."""
    for upload in uploads(results, folder, repo, variants):
        yield upload, None if dry_run else push(upload, private=private)

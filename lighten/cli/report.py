"""`lighten report`, and the functions that `lighten run` shares with it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lighten import screen
from lighten.cli.flags import Artifacts, Json, print_json
from lighten.errors import Failure, RequestError

if TYPE_CHECKING:
    from lighten.report.part import Part
    from lighten.results.results import Results

Format = Literal["terminal", "html", "markdown", "csv", "json"]
Push = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="Upload to this repository of the Hugging Face hub; {variant} in it stands for each variant's name.",
    ),
]
Public = Annotated[bool, typer.Option("--public", help="With --push-to-hub: a repository that everyone can read.")]


def report(
    name: Annotated[str, typer.Argument(help="NAME (its latest version), NAME@v1, or the directory of a version.")],
    version: Annotated[str | None, typer.Option(help="A version such as v1.")] = None,
    format: Annotated[
        Format, typer.Option(help="What to print instead of the table for a terminal.", case_sensitive=False)
    ] = "terminal",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="With --format: a file instead.")] = None,
    history: Annotated[
        bool, typer.Option("--history", help="Show the numbers of all versions up to this one.")
    ] = False,
    merge: Annotated[
        list[Path] | None, typer.Option(help="Add the rows of a results.json from another machine; may be repeated.")
    ] = None,
    push_to_hub: Push = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="With --push-to-hub: only this variant; may be repeated.")
    ] = None,
    public: Public = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --push-to-hub: only say which files would be uploaded.")
    ] = False,
    artifacts: Artifacts = Path("artifacts"),
    as_json: Json = False,
) -> None:
    """Show the results of a run again and write its report anew; or print another form, the history, or push."""
    from lighten.report import merge as merging
    from lighten.report.history import read
    from lighten.results.file import FILE, load, save

    _check(format, out, history, push_to_hub, variant, public, dry_run)
    folder = find(name, version, artifacts)
    results = load(folder)
    if merge:
        results = merging.add(results, [load(file) for file in merge])
        save(results, folder / FILE)
    earlier, refused = read(before(folder))
    for line in refused:
        screen.console(stderr=True, soft_wrap=True, highlight=False).print(line, style="yellow", markup=False)
    if push_to_hub:
        publish(results, folder, push_to_hub, variant or (), public=public, dry_run=dry_run, as_json=as_json)
    elif history:
        _show_history(results, earlier, format, out, as_json)
    elif format != "terminal":
        _write(_rendered(results, earlier, format), out)
    else:
        _write_again(results, folder, earlier)
        show(folder, as_json)


def _write_again(results: Results, folder: Path, earlier: list[Results]) -> None:
    """Writes the report of a version anew, unless its directory is read-only."""
    from lighten.report.render import write_report
    from lighten.store.store import Store

    if not os.access(folder, os.W_OK):
        message = f"{folder} is read-only: its report stays as it is; --format html -o FILE writes one somewhere else"
        screen.console(stderr=True, soft_wrap=True, highlight=False).print(message, style="yellow", markup=False)
        return
    store = Store(folder.resolve().parent.parent)
    own = (
        folder.resolve() in store.versions(folder.resolve().parent.name) and store.objects.is_dir() and store.writable()
    )
    with store.publishing(folder.resolve().parent.name) if own else contextlib.nullcontext():
        write_report(results, folder, earlier)


def find(name: str, version: str | None, artifacts: Path) -> Path:
    """Returns the directory of the version that a person named.

    Raises:
        RequestError: it does not exist; the message lists the versions that do.
    """
    from lighten.results.file import FILE
    from lighten.store.store import Store

    store = Store(artifacts)
    if Path(name, FILE).is_file():
        folder: Path | None = Path(name)
    else:
        stem, at, number = name.partition("@") if "@" in name else name.partition("/")
        folder = store.latest(stem) if re.fullmatch(r"[A-Za-z0-9][\w.-]*", stem) else None
        version = version or (number if at else None)
    if folder and version:
        folder = folder.resolve().parent / version
    if not folder or not (folder / FILE).is_file():
        known = sorted({path.parent.name for path in store.versions()})
        there = [path.name for path in store.versions(folder.parent.name)] if folder else []
        if folder and there:
            raise RequestError(f"{folder.parent.name} has no version {version!r}: {', '.join(there)}")
        raise RequestError(f"no results of {name!r} in {artifacts}; there are {', '.join(known) or 'none yet'}")
    return folder


def before(folder: Path) -> list[Path]:
    """Returns the older versions of the same recipe, oldest first; none for other directories."""
    from lighten.store.store import Store

    folder = folder.resolve()
    found = Store(folder.parent.parent).versions(folder.parent.name)
    return found[: found.index(folder)] if folder in found else []


def show(folder: Path, as_json: bool) -> None:
    """Prints the table of a version, or its results.json.

    Raises:
        Failure: a variant failed.
    """
    from lighten.report.terminal import terminal
    from lighten.results import file as report

    results = report.load(folder)
    if as_json:
        print_json(json.loads((folder / report.FILE).read_text(encoding="utf-8")))
    else:
        screen.console().print(terminal(results))
        screen.console(soft_wrap=True).print(f"report: {(folder / 'report.html').resolve()}", highlight=False)
    failed = [variant.name for variant in results.variants if variant.failed]
    if failed:
        raise Failure(f"failed: {', '.join(failed)}; the report says why, and the same command tries again")


def check_push(repo: str, variants: list[str]) -> None:
    """Checks that variants can be pushed before they are made: a token, and a repository for each.

    Raises:
        RequestError: they cannot be pushed.
    """
    from lighten.report import hub

    hub.check(repo, variants)
    hub.check_token()


def push_version(folder: Path, repo: str, variants: list[str], *, public: bool, quiet: bool) -> None:
    """Pushes the variants that were made. The results report those that failed."""
    from lighten.results.file import load

    results = load(folder)
    made = [variant.name for variant in results.measured if variant.name in variants]
    if made:
        publish(results, folder, repo, made, public=public, quiet=quiet)


def publish(
    results: Results,
    folder: Path,
    repo: str,
    variants: list[str] | tuple[()] = (),
    *,
    public: bool = False,
    dry_run: bool = False,
    as_json: bool = False,
    quiet: bool = False,
) -> None:
    """Pushes variants of a version to the hub. Prints what was or would be pushed, unless `quiet`."""
    from lighten.report import hub
    from lighten.report.numbers import byte_count

    if not dry_run:
        hub.check_token()
    done = []
    for upload, url in hub.publish(results, folder, repo, variants, private=not public, dry_run=dry_run):
        done.append(upload.json(url, not public))
        if as_json or quiet:
            continue
        said = f"{upload.variant} -> {url}" if url else f"{upload.variant} would go to {upload.repo}"
        access = "public" if public else "private"
        screen.say(f"{said} ({access}, one commit, {len(upload.files)} files, {byte_count(upload.size_bytes)})")
        for path, size in upload.files if dry_run else ():
            screen.say(f"  {byte_count(size):>9}  {path}")
    if as_json and not quiet:
        print_json(done)


def _check(
    format: Format,
    out: Path | None,
    history: bool,
    repo: str | None,
    variant: list[str] | None,
    public: bool,
    dry_run: bool,
) -> None:
    """Raises RequestError for flags that do not go together."""
    if out and format == "terminal":
        raise RequestError("-o needs --format html, markdown, csv or json")
    if repo and (history or format != "terminal"):
        raise RequestError("--push-to-hub uploads; ask for --history or --format in a command of their own")
    alone = [flag for flag, given in (("--variant", variant), ("--public", public), ("--dry-run", dry_run)) if given]
    if alone and not repo:
        raise RequestError(f"{alone[0]} belongs to --push-to-hub OWNER/NAME")
    if history and format in ("html", "csv"):
        raise RequestError(
            f"--history has no {format}: report.html has it as a section; --format markdown or json has it"
        )


def _rendered(results: Results, earlier: list[Results], format: Format) -> str:
    """Returns the results in one of the formats."""
    from lighten.report import render

    if format == "csv":
        return render.csv_table(results)
    if format == "markdown":
        return render.markdown(results, earlier)
    if format == "html":
        return render.page(results, earlier)
    return json.dumps(results.model_dump(mode="json", by_alias=True), indent=1, ensure_ascii=False) + "\n"


def _write(text: str, out: Path | None) -> None:
    """Writes a text to a file, or unchanged to standard output."""
    if out is None:
        sys.stdout.write(text)
        return
    from lighten.store.store import write_file

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, text.encode())
    except OSError as error:
        raise Failure(f"cannot write {out}: {error.strerror}") from error


def _show_history(results: Results, earlier: list[Results], format: Format, out: Path | None, as_json: bool) -> None:
    from lighten.report import history
    from lighten.report.markdown import part_text

    found = history.history(results, earlier)
    if found is None:
        raise RequestError(f"{results.title} is the first version: there is no history yet")
    if as_json or format == "json":
        values = history.value(history.measures([*earlier, results]))
        _write(json.dumps({"recipe": results.recipe, "history": values}, indent=1, ensure_ascii=False) + "\n", out)
    elif format == "markdown":
        _write(part_text(found) + "\n", out)
    else:
        _print_part(found)


def _print_part(part: Part) -> None:
    from rich.table import Table

    console = screen.console(highlight=False)
    console.print(part.intro, style="dim", markup=False)
    for grid in part.grids:
        shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, title=grid.caption, title_justify="left")
        for i, head in enumerate(grid.heads):
            shown.add_column(head, justify="left" if i < grid.text else "right", no_wrap=i > 0)
        for row in grid.rows:
            shown.add_row(*row)
        console.print("", shown)
    for note in part.notes:
        console.print(note, style="yellow", markup=False)

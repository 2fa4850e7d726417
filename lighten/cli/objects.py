"""Commands that list, check and clean the store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lighten import screen
from lighten.cli.flags import Artifacts, Json, print_json


def list_versions(artifacts: Artifacts = Path("artifacts"), as_json: Json = False) -> None:
    """List versions, and the objects that they refer to."""
    from rich.table import Table

    from lighten.store.links import follow
    from lighten.store.store import Store

    store = Store(artifacts)
    rows = []
    for version in store.versions():
        for link in sorted((version / "variants").iterdir()):
            key = follow(link).name
            artifact = store.find(key)
            size = artifact.size_bytes if artifact else None
            form = artifact.format if artifact else "missing"
            row: dict[str, Any] = {"recipe": version.parent.name, "version": version.name, "variant": link.name}
            rows.append({**row, "format": form, "size_bytes": size, "key": key})
    if as_json:
        print_json(rows)
        return
    table = Table("recipe", "version", "variant", "format", "MB", "key", box=None)
    for row in rows:
        megabytes = f"{row['size_bytes'] / 1e6:.1f}" if row["size_bytes"] else "–"
        table.add_row(row["recipe"], row["version"], row["variant"], row["format"], megabytes, row["key"][:12])
    screen.console().print(table if rows else f"nothing in {artifacts} yet: try `lighten run quickstart`")


def verify(artifacts: Artifacts = Path("artifacts"), as_json: Json = False) -> None:
    """Re-hash every object; a corrupt one is reported and removed, to be made again by the next run."""
    from lighten.store.gc import check
    from lighten.store.store import Store

    damaged, kept = {}, {}
    count = 0
    for each in check(Store(artifacts)):
        count += 1
        if each.damage:
            damaged[each.key] = each.damage
            if each.kept:
                kept[each.key] = each.kept
            if not as_json:
                fate = f"not removed ({each.kept})" if each.kept else "removed"
                screen.say(f"{each.key[:12]}: corrupt, {fate}: {'; '.join(each.damage)}")
    if as_json:
        print_json({"checked": count, "corrupt": damaged, "not_removed": kept})
    else:
        print(f"{count} objects checked, {len(damaged)} corrupt")
    if damaged:
        raise typer.Exit(1)


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    artifacts: Artifacts = Path("artifacts"),
    as_json: Json = False,
) -> None:
    """Remove objects that no version refers to, and what killed runs left."""
    from lighten.store.gc import collect
    from lighten.store.store import Store

    removed = collect(Store(artifacts), dry_run=dry_run)
    total = sum(size for _, size in removed)
    if as_json:
        print_json({"removed": dict(removed), "bytes": total, "dry_run": dry_run})
    else:
        print(f"{'would remove' if dry_run else 'removed'} {len(removed)} objects, {total / 1e6:.1f} MB")

"""``errata signing``: keys in files, and signatures of versions that are there."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from registry.database import existing_database
from registry.errors import UnprocessableRequest
from registry.settings import Settings
from registry.signatures import add_signatures
from registry.signing import create_key, public_file, read_key, read_private
from registry.versions import get_version, list_changed

#: Whom the audit log shows.
ACTOR = "errata"


def create(file: Path) -> None:
    """Make a pair of keys; the public one alone on standard output."""
    public = create_key(file).public
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"{public.id}: the private key is {file} (ERRATA_SIGNING_KEY of workers), the public one"
        f" {public_file(file)} (ERRATA_TRUSTED_KEYS of all):"
    )
    typer.echo(public.to_pem(), nl=False)


def show(file: Path) -> None:
    """The id and the public key of either kind of file."""
    public = read_key(file)
    Console(stderr=True, highlight=False, soft_wrap=True).print(public.id)
    typer.echo(public.to_pem(), nl=False)


def sign(settings: Settings, file: Path, versions: list[str], every: bool, tenant: str) -> None:
    """Sign versions of the registry.

    Raises:
        UnprocessableRequest: neither versions nor ``--all`` are given, or both.
    """
    if bool(versions) == every:
        raise UnprocessableRequest("name the versions to be signed, or give --all")
    key = read_private(file)
    with existing_database(settings.sql_url) as database, database.write() as connection:
        chosen = (
            list_changed(connection, tenant)
            if every
            else [get_version(connection, tenant, version_id) for version_id in versions]
        )
        for version in chosen:
            made = [key.sign(version.manifest)]
            add_signatures(connection, tenant, version.manifest, made, actor=ACTOR)
    Console(highlight=False).print(f"{len(chosen)} versions carry a signature by {key.public.id}")

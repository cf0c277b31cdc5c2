"""The ``errata`` command. Imports that take time are made by the command that needs them: here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from app.cli.bench import bench
from app.cli.options import names
from registry import __version__
from registry.errors import ErrataError
from registry.settings import Settings

cli = typer.Typer(
    name="errata",
    help="Edit language models the way text under version control is edited.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cli.add_typer(bench, name="bench")
keys = typer.Typer(help="API keys: made, listed, revoked.", no_args_is_help=True)
cli.add_typer(keys, name="keys")
signing = typer.Typer(help="Keys that sign versions: made, shown, used.", no_args_is_help=True)
cli.add_typer(signing, name="signing")

Purpose = Literal["edits", "texts", "facts", "suite", "harm"]
Format = Literal["peft", "huggingface", "errata"]
Quiet = Annotated[bool, typer.Option("--quiet", help="Log warnings only.")]


@cli.callback(invoke_without_command=True)
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.")
    ] = False,
) -> None:
    if version:
        typer.echo(f"errata {__version__}")
        raise typer.Exit


@cli.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind to.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind to; 0 takes a free one.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of database and artifacts.")] = None,
    bases: Annotated[str | None, typer.Option(help="`name` or `name=/folder`, by commas.")] = None,
    quiet: Quiet = False,
) -> None:
    """Serve the API with an engine, an embedded queue and a worker. Ctrl-C ends all of them.

    Every setting is also an environment variable (ERRATA_PORT, …): see docs/settings.md.
    """
    from app.serve import serve as run

    options: dict[str, object] = {"host": host, "port": port, "data": data, "bases": bases}
    if quiet:
        options["log_level"] = "WARNING"
    settings = Settings(**{k: v for k, v in options.items() if v is not None})  # type: ignore[arg-type]
    _log(settings)
    run(settings)


@cli.command()
def worker(
    quiet: Quiet = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only see that this machine's worker lives; else fail.")
    ] = False,
) -> None:
    """Take jobs from the queue at REDIS_URL until SIGTERM."""
    from workers.health import check as look
    from workers.worker import work

    settings = Settings(log_level="WARNING") if quiet else Settings()
    _log(settings)
    (look if check else work)(settings)


@cli.command()
def bases() -> None:
    """Check the bases of ERRATA_BASES and show them."""
    from rich.table import Table

    from registry.bases import find_bases

    table = Table("name", "family", "layers", "context", "chat", "digest", "folder")
    for base in find_bases(Settings().bases).values():
        table.add_row(
            base.name,
            base.family,
            str(base.depth),
            str(base.context_length),
            "yes" if base.has_chat_template else "no",
            base.digest[:12],
            str(base.folder),
        )
    Console().print(table)


@cli.command()
def demo(
    url: Annotated[
        str | None, typer.Option(help="A running service; by default one is started and stopped.")
    ] = None,
) -> None:
    """Edit a fact over REST, ask before and after, look at its neighbours, roll it back."""
    from app.demo import run

    if not run(url):
        raise typer.Exit(1)


@cli.command()
def evaluate(
    file: Annotated[Path, typer.Argument(help="The dataset: JSON list, JSON lines, plain lines.")],
    version: Annotated[str | None, typer.Option(help="A version's id.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="An endpoint; its version.")] = None,
    base: Annotated[str | None, typer.Option(help="A base, untouched.")] = None,
    purpose: Annotated[Purpose, typer.Option(help="What the rows are.")] = "edits",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where figures go.")] = None,
) -> None:
    """Measure a version on a dataset file, here, on the data folder: no server is needed.

    Edits may be in CounterFact's form, EasyEdit's of zsRE and CounterFact, or this service's own.
    A version is measured beside its untouched base.

    Example: errata evaluate zsre.json --endpoint atlas --limit 100 --json figures.json
    """
    from app.cli.evaluate import run

    run(
        Settings(),
        file,
        {"version": version, "endpoint": endpoint, "base": base},
        purpose,
        limit,
        json_file,
    )


@cli.command()
def export(
    version: Annotated[str, typer.Argument(help="A version's id.")],
    form: Annotated[Format, typer.Option("--format", help="What it becomes.")],
    output: Annotated[Path, typer.Option(help="An empty folder, or one to be made.")],
    rank: Annotated[int, typer.Option(min=1, max=512, help="peft: most ranks.")] = 512,
    round_rank: Annotated[bool, typer.Option(help="peft: pad to a rank that vLLM takes.")] = True,
) -> None:
    """Write a version into a folder, here, on the data folder: no server is needed.

    peft: a LoRA adapter. huggingface: a model with the changes in it. errata: an archive from which
    POST /v1/versions/import restores the version elsewhere.

    Example: errata export ver_… --format peft --output adapter
    """
    from app.cli.export import run

    run(Settings(), version, form, output, rank, round_rank)


@cli.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count, delete nothing.")] = False,
    grace: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Seconds that what was put last stays; few only where no service runs.",
        ),
    ] = None,
    adopt: Annotated[
        bool,
        typer.Option(
            "--adopt",
            help="Make the artifacts this registry's, if they were of one that is gone for good;"
            " what only that one reached is deleted.",
        ),
    ] = False,
) -> None:
    """Delete artifacts that no version, file or unfinished job reaches any more.

    A running service does so by itself, once an hour.
    """
    from app.cli.gc import run

    run(Settings(), grace, dry_run, adopt)


@cli.command()
def upload(
    folder: Annotated[Path, typer.Argument(help="A folder of artifacts: `artifacts` in the data.")],
) -> None:
    """Put a folder's artifacts into the store of ERRATA_ARTIFACTS. The folder is left as it is.

    Example: ERRATA_ARTIFACTS=s3://bucket/prefix errata upload .errata/artifacts
    """
    from app.cli.upload import run

    run(Settings(), folder)


@cli.command()
def backup(
    folder: Annotated[Path, typer.Argument(help="Where backups are; made if it is not there.")],
    keep: Annotated[
        int | None, typer.Option(min=1, help="Delete all backups of the folder but so many.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Take none; check those that are there.")
    ] = False,
) -> None:
    """Back up registry and artifacts into a folder, whether or not a service runs.

    Artifacts that an earlier backup in the folder holds are not copied again.

    Example: errata backup /backups/errata --keep 14
    """
    from app.cli.backups import check, take

    if verify:
        check(folder)
    else:
        take(Settings(), folder, keep)


@cli.command()
def restore(
    folder: Annotated[Path, typer.Argument(help="Where backups are.")],
    name: Annotated[
        str | None, typer.Option("--backup", help="Which one; by default the newest.")
    ] = None,
    adopt: Annotated[
        bool,
        typer.Option(
            "--adopt",
            help="Make the artifacts in ERRATA_ARTIFACTS the restored registry's, if they were of"
            " one that is gone for good; what only that one reached is deleted.",
        ),
    ] = False,
) -> None:
    """Fill an empty registry (ERRATA_DATA, ERRATA_DATABASE_URL) with a backup.

    It may be another kind of database than the backup was taken of.

    Example: ERRATA_DATA=/srv/errata errata restore /backups/errata
    """
    from app.cli.backups import restore as run

    run(Settings(), folder, name, adopt)


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Whom histories show.")],
    scope: Annotated[
        list[str],
        typer.Option(help="By commas: infer (ask models), edit (change them), admin (keys)."),
    ],
    tenant: Annotated[
        str, typer.Option(help="Whose; a tenant that is new is made, with the bases' endpoints.")
    ] = "default",
    expires: Annotated[str | None, typer.Option(help="90d, 12h, …; by default never.")] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="By default as many as it likes.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Of prompts and completions.")
    ] = None,
) -> None:
    """Make an API key and print it, this once: what is kept is its SHA-256.

    Example: errata keys create ci --scope infer,edit --expires 90d
    """
    from app.cli.keys import create

    create(
        Settings(),
        name,
        names(scope),
        tenant,
        expires,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
    )


@keys.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only this one's.")] = None,
) -> None:
    """Show every key, without the keys themselves."""
    from app.cli.keys import show

    show(Settings(), tenant)


@keys.command("revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(help="The id: key_…")],
    tenant: Annotated[str, typer.Option(help="Whose.")] = "default",
) -> None:
    """Refuse a key from the next request on."""
    from app.cli.keys import revoke

    revoke(Settings(), key, tenant)


@signing.command("create")
def create_signing_key(
    file: Annotated[Path, typer.Argument(help="Where the private key goes; FILE.pub beside it.")],
) -> None:
    """Make a pair of keys. The private one is for workers, the public one for everybody.

    Example: errata signing create release.key
    """
    from app.cli.signing import create

    create(file)


@signing.command("show")
def show_signing_key(
    file: Annotated[Path, typer.Argument(help="A private or a public key.")],
) -> None:
    """Print a key's id and its public part."""
    from app.cli.signing import show

    show(file)


@signing.command("sign")
def sign_versions(
    file: Annotated[Path, typer.Argument(help="The private key.")],
    versions: Annotated[list[str] | None, typer.Argument(help="Ids: ver_…")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every version that is there.")] = False,
    tenant: Annotated[str, typer.Option(help="Whose.")] = "default",
) -> None:
    """Sign versions that were made without a key, whether or not a service runs.

    Example: errata signing sign release.key ver_…
    """
    from app.cli.signing import sign

    sign(Settings(), file, versions or [], every, tenant)


def main() -> None:
    """Entry of the ``errata`` command; an expected error is one line, not a traceback."""
    try:
        cli()
    except ErrataError as error:
        Console(stderr=True).print(f"[red]errata:[/red] {escape(error.message)}", highlight=False)
        sys.exit(1)


def _log(settings: Settings) -> None:
    from telemetry.logs import configure

    terminal = RichHandler(show_path=False) if sys.stderr.isatty() else None
    configure(settings.log_format, settings.log_level, terminal)

"""An export: a version written as a zip archive, which the job leaves to be downloaded."""

from __future__ import annotations

from functools import partial

from editing.exchange.names import ERRATA
from registry.archives import write_zip
from registry.artifacts import CHUNK_BYTES
from registry.files import ResultFile
from registry.manifests import Progress
from registry.results import Result
from registry.signatures import signatures_by_version
from registry.versions import ancestry
from workers.exports import export_history, export_weights
from workers.ground import claimed_parent, view_of
from workers.work import Work

PURPOSE = "export"


def perform(work: Work) -> Result:
    """No version is made; the metrics say what the archive does not hold of the version."""
    job, parent = work.claim.job, claimed_parent(work)
    work.report(Progress(0, 0, "writing"))
    with work.artifacts.scratch() as folder:
        if job.request["format"] == ERRATA:
            with work.database.read() as connection:
                chain = ancestry(connection, job.tenant, parent.id)
                manifests = (version.manifest for version in chain)
                signatures = signatures_by_version(connection, job.tenant, manifests)
            made = export_history(chain, signatures, work.artifacts)
        else:
            view = view_of(work, parent)
            (folder / "files").mkdir()
            made = export_weights(
                view, parent.manifest, work.artifacts, job.request, folder / "files"
            )
            work.models.check_untouched(job.base)
        with (folder / "archive").open("w+b") as stream:
            write_zip(stream, made.members)
            size = stream.tell()
            stream.seek(0)
            content = work.artifacts.put_chunks(iter(partial(stream.read, CHUNK_BYTES), b""))
    name = f"{parent.id}.{job.request['format']}.zip"
    return Result(metrics=made.report, file=ResultFile(name, PURPOSE, size, content, 1))

"""Exports and imports as jobs: what leaves comes back the same, what is wrong is refused whole."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from editing.deltas import Delta, Effect, compose
from registry import attempts, jobs, versions
from registry.archives import write_zip
from registry.bases import find_bases
from registry.bootstrap import bootstrap
from registry.database import Database
from registry.edits import edited
from registry.errors import ErrataError, UnprocessableRequest
from registry.files import get_file
from registry.jobs import Job
from registry.manifests import BaseRef, EditRequest, VersionManifest, canonical_json, sha256
from registry.settings import Settings
from registry.stores import open_store
from registry.versions import Version
from tests.models import random_effect
from workers import exports
from workers.archives import History, Upload, open_upload
from workers.exports import export_history
from workers.kinds import export, importing, prepare
from workers.work import LoadedBases, Work

TENANT = "default"
KINDS = {"export": export, "import": importing, "prepare": prepare}
EDITS = [EditRequest("The capital of {} is", "France", "Oslo", "Paris")]
ANYTHING = {"perplexity": 1e9, "retention": 0, "locality": 0, "norm": 1e9, "efficacy": 0}
PEFT = {"format": "peft", "rank": 512, "round_rank": True}
TEXT = "The capital of France is"
DOWN = "model.layers.2.mlp.down_proj"
LIMIT = 64 * 2**20


class Room:
    """A data folder, and the worker's side of its jobs."""

    def __init__(self, folder: Path, models: LoadedBases) -> None:
        self.settings = Settings(data=folder, bases="atlas", covariance_tokens=2000)
        self.database = Database(self.settings.sql_url)
        self.artifacts = open_store(self.settings)
        self.models = models
        self.base = find_bases("atlas")["atlas"]
        bootstrap(self.database, [self.base])
        self.root = VersionManifest(self.base.ref).id
        self.perform("prepare", {"resources": ["texts"]})

    def perform(self, kind: str, request: Mapping[str, Any], parent: str | None = None) -> Job:
        with self.database.write() as connection:
            job = jobs.submit_job(
                connection,
                TENANT,
                kind,
                base="atlas",
                request=request,
                actor="test",
                parent=parent or self.root,
            )
            claim = attempts.claim(connection, job.id, 1, "worker", 60.0)
        assert claim is not None
        try:
            with Work(claim, self.settings, self.database, self.artifacts, self.models) as work:
                result = KINDS[kind].perform(work)
        except ErrataError as error:
            with self.database.write() as connection:
                attempts.fail(connection, claim, error)
            raise
        with self.database.write() as connection:
            return attempts.finish(connection, claim, result)

    def edited(self, parent: VersionManifest, seed: int, **effects: Effect) -> VersionManifest:
        """A version as an edit job writes it."""
        found = {DOWN: random_effect(seed, 256, self.width, "rank1"), **effects}
        small = {path: effect.map(lambda part: part * 0.3) for path, effect in found.items()}
        delta = Delta(small, self.base.digest, "rome").to_bytes()
        recipe = {
            "kind": "edit",
            "job": f"job_{seed}",
            "method": "rome",
            "hyperparameters": {},
            "edits": self.artifacts.put(canonical_json([edit.to_json() for edit in EDITS])),
            "edit_count": 1,
            "examples": None,
            "texts": self.artifacts.put_rows([f"a text of {seed}"]),
            "author": "me",
            "message": None,
        }
        stack = (*parent.stack, self.artifacts.put(delta))
        manifest = VersionManifest(self.base.ref, stack, (parent.id,), recipe)
        with self.database.write() as connection:
            versions.insert_version(connection, TENANT, manifest)
        return manifest

    @property
    def width(self) -> int:
        matrix = self.models.view("atlas").matrix(DOWN)
        assert matrix is not None
        return matrix.shape[1]

    def version(self, version_id: str | None) -> Version:
        assert version_id is not None
        with self.database.read() as connection:
            return versions.get_version(connection, TENANT, version_id)

    def archive(self, job: Job) -> bytes:
        with self.database.read() as connection:
            file = get_file(connection, TENANT, job.id.replace("job_", "file-"))
        data = self.artifacts.get(file.content)
        assert len(data) == file.size
        return data

    def take(self, data: bytes, parent: str | None = None, **guards: Any) -> Job:
        request = {
            "archive": self.artifacts.put(data),
            "label": "from elsewhere",
            "guards": {**ANYTHING, **guards},
        }
        return self.perform("import", request, parent)

    @torch.no_grad()
    def logits(self, manifest: VersionManifest) -> Tensor:
        view = self.models.view("atlas")
        stack = [Delta.from_bytes(self.artifacts.get(digest)) for digest in manifest.stack]
        with view.with_effects(compose(delta.effects for delta in stack)):
            return view.logits(view.hidden(view.pad([view.encode(TEXT)])))


@pytest.fixture(scope="module")
def models() -> LoadedBases:
    torch.set_num_threads(1)
    return LoadedBases(find_bases("atlas"), "float32")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory, models: LoadedBases) -> Iterator[Room]:
    room = Room(tmp_path_factory.mktemp("here"), models)
    yield room
    room.database.close()


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory, models: LoadedBases) -> Iterator[Room]:
    """Where nothing comes in."""
    room = Room(tmp_path_factory.mktemp("empty"), models)
    yield room
    room.database.close()


@pytest.fixture
def elsewhere(tmp_path: Path, models: LoadedBases) -> Iterator[Room]:
    room = Room(tmp_path, models)
    yield room
    room.database.close()


@pytest.fixture(scope="module")
def made(room: Room) -> VersionManifest:
    """A version of two edits."""
    return room.edited(room.edited(VersionManifest(room.base.ref), 1), 2)


@pytest.fixture(scope="module")
def exported(room: Room, made: VersionManifest) -> bytes:
    job = room.perform("export", {"format": "errata"}, made.id)
    assert job.metrics == {"versions": 3, "artifacts": 5}
    return room.archive(job)


def members(data: bytes) -> dict[str, bytes]:
    with ZipFile(io.BytesIO(data)) as archive:
        assert {info.compress_type for info in archive.infolist()} == {ZIP_STORED}
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts: Mapping[str, bytes], compression: int = ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with ZipFile(stream, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return stream.getvalue()


def kept(manifest: VersionManifest) -> Version:
    return Version(TENANT, manifest, "ready", None, 0.0)


def listed(*manifests: VersionManifest) -> Upload:
    """An archive of versions whose deltas hold nothing that a test reads."""
    history = History(manifests)
    artifacts = {f"artifacts/{digest}": b"" for digest in history.needed}
    return open_upload(io.BytesIO(zipped({"errata.json": history.to_bytes(), **artifacts})), LIMIT)


def test_an_adapter_goes_out_and_comes_back(room: Room, made: VersionManifest) -> None:
    job = room.perform("export", PEFT, made.id)
    assert (job.status, job.version_id) == ("succeeded", None)
    assert job.metrics is not None
    assert job.metrics["residual_energy"] == 0
    data = room.archive(job)
    parts = members(data)
    assert parts.keys() == {"adapter_config.json", "adapter_model.safetensors", "errata.json"}
    assert json.loads(parts["errata.json"])["version"] == made.id
    assert room.archive(room.perform("export", PEFT, made.id)) == data
    back = room.take(data)
    assert back.status == "succeeded"
    version = room.version(back.version_id)
    assert version.manifest.parents == (room.root,)
    assert version.manifest.recipe["kind"] == "import"
    assert version.manifest.recipe["label"] == "from elsewhere"
    assert_close(room.logits(version.manifest), room.logits(made), atol=1e-5, rtol=0)
    on_top = room.version(room.take(zipped(parts, ZIP_DEFLATED), made.id).version_id)
    assert on_top.manifest.stack == (*made.stack, version.manifest.stack[-1])
    assert on_top.manifest.parents == (made.id,)


def test_an_adapter_passes_the_guards(room: Room, made: VersionManifest) -> None:
    data = room.archive(room.perform("export", PEFT, made.id))
    job = room.take(data, norm=1e-6)
    assert (job.status, job.reason) == ("failed", "guard_rejected")
    assert room.version(job.version_id).status == "rejected"


def test_a_merged_folder_is_a_model(room: Room, made: VersionManifest, tmp_path: Path) -> None:
    parts = members(room.archive(room.perform("export", {"format": "huggingface"}, made.id)))
    for name, data in parts.items():
        (tmp_path / name).write_bytes(data)
    assert {"config.json", "tokenizer.json", "model.safetensors"} < parts.keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    view = room.models.view("atlas")
    with torch.no_grad():
        found = model(view.pad([view.encode(TEXT)])).logits
    assert_close(found, room.logits(made), atol=1e-5, rtol=0)


def test_an_archive_restores_a_version_elsewhere(
    room: Room, made: VersionManifest, exported: bytes, elsewhere: Room
) -> None:
    job = elsewhere.take(exported)
    assert (job.status, job.version_id) == ("succeeded", made.id)
    assert elsewhere.version(made.id).status == "ready"
    assert elsewhere.version(made.parents[0]).status == "deleted"  # known, not kept
    assert torch.equal(elsewhere.logits(made), room.logits(made))
    assert elsewhere.artifacts.rows(made.recipe["texts"])[0] == "a text of 2"
    with elsewhere.database.read() as connection:
        (report,) = versions.reports(connection, TENANT, made.id)
    holds = json.loads(elsewhere.artifacts.get(report["holds"]))
    assert {key: len(found) for key, found in holds.items()} == {made.id: 1, made.parents[0]: 1}
    again = elsewhere.perform("export", {"format": "errata"}, made.id)
    assert elsewhere.archive(again) == exported
    first = room.archive(room.perform("export", {"format": "errata"}, made.parents[0]))
    assert elsewhere.take(first).version_id == made.parents[0]
    assert elsewhere.version(made.parents[0]).status == "ready"


def test_a_merge_comes_back_with_what_was_made_on_it(room: Room, elsewhere: Room) -> None:
    left, right = (room.edited(VersionManifest(room.base.ref), seed) for seed in (11, 12))
    deltas = [Delta.from_bytes(room.artifacts.get(one.stack[0])) for one in (left, right)]
    together = Delta(compose(delta.effects for delta in deltas), room.base.digest, "linear")
    stack = (room.artifacts.put(together.to_bytes()),)
    merge = VersionManifest(room.base.ref, stack, (left.id, right.id), {"kind": "merge"})
    with room.database.write() as connection:
        versions.insert_version(connection, TENANT, merge)
    head = room.edited(merge, 13)
    live = {left.id, right.id}
    for version, own in ((merge, set()), (head, {head.id})):
        job = elsewhere.take(room.archive(room.perform("export", {"format": "errata"}, version.id)))
        assert (job.status, job.version_id) == ("succeeded", version.id)
        with elsewhere.database.read() as connection:
            (report,) = versions.reports(connection, TENANT, version.id)
            lineage = versions.lineage(connection, TENANT, version.id)
        holds = json.loads(elsewhere.artifacts.get(report["holds"]))
        assert holds.keys() == {one.id for one, _ in edited(lineage)} == live | own


def test_what_was_deleted_comes_back(room: Room, exported: bytes, elsewhere: Room) -> None:
    version_id = elsewhere.take(exported).version_id
    assert version_id is not None
    with elsewhere.database.write() as connection:
        versions.delete_version(connection, TENANT, version_id, actor="ada")
    assert elsewhere.take(exported, efficacy=1.0).status == "failed"
    assert elsewhere.version(version_id).status == "rejected"
    assert elsewhere.take(exported).status == "succeeded"
    assert elsewhere.version(version_id).status == "ready"


def _other_base(parts: dict[str, bytes]) -> dict[str, bytes]:
    body = json.loads(parts["errata.json"])
    manifest = VersionManifest(BaseRef("atlas", "f" * 64))
    body |= {"versions": [manifest.to_json()], "version": manifest.id}
    return {"errata.json": canonical_json(body)}


def _flipped(parts: dict[str, bytes]) -> dict[str, bytes]:
    name = next(name for name in parts if name.startswith("artifacts/"))
    data = bytearray(parts[name])
    data[-1] ^= 1
    return {**parts, name: bytes(data)}


def _with(changed: Any) -> Any:
    """The archive with its list of contents changed."""

    def change(parts: dict[str, bytes]) -> dict[str, bytes]:
        body = json.loads(parts["errata.json"])
        changed(body)
        return {**parts, "errata.json": json.dumps(body).encode()}

    return change


DAMAGES: dict[str, tuple[Any, str]] = {
    "another base": (_other_base, "f" * 64),
    "a flipped bit": (_flipped, "it is damaged"),
    "no delta": (lambda p: {"errata.json": p["errata.json"]}, "it lacks the delta"),
    "a strange artifact": (
        lambda p: {**p, f"artifacts/{sha256(b'x')}": b"x"},
        "which none of its versions names",
    ),
    "a path": (lambda p: {**p, "../../etc/cron.d/x": b"x"}, "has no place in it"),
    "a pickle": (lambda p: {**p, "pytorch_model.bin": b"x"}, "is a pickle"),
    "another format": (_with(lambda b: b.update(format="errata-archive-9")), "errata-archive-9"),
    "another head": (_with(lambda b: b.update(version="ver_" + "0" * 40)), "is damaged"),
    "no versions": (_with(lambda b: b.update(versions=[])), "is damaged"),
    "too many versions": (_with(lambda b: b.update(versions=[0] * 10_001)), "at most 10000"),
    "a parent after its child": (_with(lambda b: b["versions"].reverse()), "is damaged"),
    "no parent": (_with(lambda b: b["versions"].pop(0)), "does not precede it"),
    "no digest": (_with(lambda b: b["versions"][-1]["stack"].append("../x")), "is damaged"),
    "no recipe": (_with(lambda b: b["versions"][-1].pop("recipe")), "is damaged"),
    "an edit without author": (
        _with(lambda b: b["versions"][-1]["recipe"].pop("author")),
        "is damaged",
    ),
    "an edit without delta": (_with(lambda b: b["versions"][1]["stack"].clear()), "is damaged"),
    "no JSON": (lambda p: {**p, "errata.json": b"{" * 10}, "is damaged"),
    "too many values": (
        lambda p: {**p, "errata.json": b"[" + b"[]," * 2_500_000 + b"[]]"},
        "more than 2500000 values",
    ),
    "no number": (lambda p: {**p, "errata.json": b'{"format": NaN}'}, "is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_archive_is_refused_whole(exported: bytes, empty: Room, name: str) -> None:
    change, said = DAMAGES[name]
    with pytest.raises(UnprocessableRequest) as refused:
        empty.take(zipped(change(members(exported))))
    assert said in refused.value.message
    if name == "another base":
        assert empty.base.digest in refused.value.message
    with empty.database.read() as connection:
        page = versions.list_versions(connection, TENANT)
    assert [version.id for version in page.items] == [empty.root]


TUNED = {
    "kind": "fine_tune",
    "method": "lora",
    "hyperparameters": {},
    "options": {},
    "rows": "0" * 64,
    "harmful": None,
    "seed": 0,
    "step": 4,
    "suffix": None,
    "message": None,
    "preprocessing": {"steps": [{"type": "augmentation", "templates": ["So: {prompt}"]}]},
    "author": "me",
}
EDITED = {
    "kind": "edit",
    "method": "rome",
    "hyperparameters": {},
    "edits": "0" * 64,
    "edit_count": 1,
    "message": None,
    "author": None,
}
GONE = object()


def opened(recipe: Mapping[str, Any], *stack: str) -> History:
    """The history of an archive of one version on its base."""
    base = VersionManifest(BaseRef("atlas", "0" * 64))
    history = History((base, VersionManifest(base.base, stack, (base.id,), recipe)))
    parts = {"errata.json": history.to_bytes(), **{f"artifacts/{d}": b"" for d in stack}}
    return open_upload(io.BytesIO(zipped(parts)), LIMIT).history()


@pytest.mark.parametrize("recipe", [TUNED, EDITED, {**EDITED, "edit_count": 0, "edits": None}])
def test_a_recipe_that_can_run_again_is_taken(recipe: dict[str, Any]) -> None:
    assert opened(recipe, "1" * 64).head.recipe == recipe


@pytest.mark.parametrize(
    ("recipe", "field", "value"),
    [(recipe, field, GONE) for recipe in (TUNED, EDITED) for field in recipe if field != "kind"]
    + [
        (TUNED, "method", ["lora"]),
        (TUNED, "options", [1]),
        (TUNED, "rows", "../x"),
        (TUNED, "harmful", 1),
        (TUNED, "seed", "0"),
        (TUNED, "step", True),
        (TUNED, "preprocessing", {"steps": [{"type": "none"}]}),
        (EDITED, "hyperparameters", []),
        (EDITED, "edits", "x"),
        (EDITED, "edit_count", 0),
        (EDITED, "edit_count", -1),
        (EDITED, "texts", {}),
        (EDITED, "batch_size", "8"),
        (EDITED, "replaces", None),
    ],
)
def test_a_recipe_that_could_not_be_read_later_is_refused(
    recipe: dict[str, Any], field: str, value: object
) -> None:
    changed = {name: one for name, one in recipe.items() if name != field}
    changed |= {} if value is GONE else {field: value}
    with pytest.raises(UnprocessableRequest, match=f"damaged: .*{recipe['kind']}") as refused:
        opened(changed, "1" * 64)
    assert refused.value.code == "archive_refused"
    with pytest.raises(UnprocessableRequest, match="made no delta"):
        opened(recipe)


def test_a_delta_that_does_not_fit_is_refused(room: Room, empty: Room) -> None:
    for path, effect, said in (
        ("model.layers.9.mlp.down_proj", Effect(A=torch.ones(1, 4), B=torch.ones(4, 1)), "not fit"),
        (DOWN, Effect(A=torch.ones(1, 4), B=torch.ones(256, 1)), "not fit"),
        (DOWN, Effect(scale=torch.ones(1)), "not fit"),
        ("model.norm", Effect(scale=torch.ones(7)), "not fit"),
    ):
        delta = Delta({path: effect}, room.base.digest, "rome").to_bytes()
        manifest = VersionManifest(room.base.ref, (sha256(delta),))
        body = {
            "format": "errata-archive-1",
            "version": manifest.id,
            "versions": [manifest.to_json()],
        }
        parts = {"errata.json": canonical_json(body), f"artifacts/{sha256(delta)}": delta}
        with pytest.raises(UnprocessableRequest, match=said):
            empty.take(zipped(parts))


def test_an_archive_holds_a_long_lineage(room: Room) -> None:
    chain = [VersionManifest(room.base.ref)]
    for place in range(1050):
        stack = (*chain[-1].stack[-127:], sha256(b"%d" % place))
        chain.append(VersionManifest(room.base.ref, stack, (chain[-1].id,), {"kind": "a test"}))
    delta = room.artifacts.put(b"all of it")
    chain.append(VersionManifest(room.base.ref, (delta,), (chain[-1].id,), {"kind": "flatten"}))
    stream = io.BytesIO()
    write_zip(stream, export_history([kept(one) for one in chain], {}, room.artifacts).members)
    assert ZipFile(stream).getinfo("errata.json").file_size > 8 * 2**20
    assert open_upload(stream, LIMIT).history().manifests == tuple(chain)


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ("VERSIONS", "archive of 3 versions, and an import takes 1;"),
        ("MANIFEST_BYTES", "bytes of errata.json, and an import takes 1;"),
        ("MANIFEST_VALUES", "values in errata.json, and an import takes 1;"),
        ("MEMBERS", "archive of 6 members, and an import takes 1;"),
    ],
)
def test_what_no_import_would_take_is_not_exported(
    room: Room, made: VersionManifest, monkeypatch: pytest.MonkeyPatch, limit: str, said: str
) -> None:
    monkeypatch.setattr(exports, limit, 1)
    with pytest.raises(UnprocessableRequest, match=said) as refused:
        room.perform("export", {"format": "errata"}, made.id)
    assert refused.value.code == "not_exportable"


def test_a_flatten_is_of_several_deltas_of_one_parent() -> None:
    base = VersionManifest(BaseRef("atlas", "0" * 64))
    flatten = {"kind": "flatten"}

    def made(parents: list[VersionManifest], *deltas: bytes, **recipe: str) -> VersionManifest:
        ids = tuple(parent.id for parent in parents)
        return VersionManifest(base.base, tuple(sha256(delta) for delta in deltas), ids, recipe)

    one = made([base], b"a")
    two = made([one], b"a", b"b")
    for head in (
        made([one], b"a", **flatten),
        made([one], b"f", **flatten),
        made([base], b"f", **flatten),
        made([], b"f", **flatten),
        made([one, two], b"f", **flatten),
        made([two], b"a", b"f", **flatten),
        made([two], **flatten),
    ):
        with pytest.raises(UnprocessableRequest, match="is no flatten") as refused:
            listed(base, one, two, head).history()
        assert refused.value.code == "archive_refused"
    assert listed(base, one, two, made([two], b"f", **flatten)).history().head.parents == (two.id,)


def test_uploads_that_are_no_archive(exported: bytes) -> None:
    bomb = zipped({"adapter_config.json": b"0" * (LIMIT + 1)}, ZIP_DEFLATED)
    assert len(bomb) < LIMIT // 100
    twice = zipped({"errata.json": b"{}", "errata.jsom": b"{}"}).replace(b"jsom", b"json")
    crowd = zipped({f"artifacts/{i:064x}": b"" for i in range(10_001)})
    for data, said in (
        (b"", "cannot be read"),
        (b"PK\x03\x04 no zip", "cannot be read"),
        (exported[: len(exported) // 2], "cannot be read"),
        (bomb, "ERRATA_MAX_FILE_BYTES"),
        (
            zipped(
                {"adapter_config.json": b" " * (8 * 2**20 + 1), "adapter_model.safetensors": b""}
            ),
            "has more than 8388608 bytes",
        ),
        (twice, "stands in it twice"),
        (crowd, "10001 members"),
        (zipped({"model.safetensors": b"x"}), "neither an adapter"),
        (zipped({"adapter_config.json": b"{}"}), "it lacks adapter_model.safetensors"),
        (zipped({"adapter_config.json": b"", "adapter_model.bin": b""}), "is a pickle"),
        (zipped({"folder/adapter_config.json": b""}), "in no folder"),
    ):
        with pytest.raises(UnprocessableRequest) as refused:
            open_upload(io.BytesIO(data), LIMIT)
        assert said in refused.value.message
        assert refused.value.code == "archive_refused"
    endless = zipped({"errata.json": b" " * (64 * 2**20 + 1)}, ZIP_DEFLATED)
    with pytest.raises(UnprocessableRequest, match="has more than 67108864 bytes"):
        open_upload(io.BytesIO(endless), 2 * LIMIT)


def test_a_member_whose_bytes_are_damaged_is_refused(exported: bytes) -> None:
    data = bytearray(exported)
    data[data.index(b'"format"')] ^= 1
    upload = open_upload(io.BytesIO(bytes(data)), LIMIT)
    with pytest.raises(UnprocessableRequest, match="CRC"):
        upload.history()

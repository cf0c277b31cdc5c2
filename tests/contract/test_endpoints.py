"""Endpoints over HTTP: ETags, preconditions, rollback, split and promote."""

from typing import Any

import pytest

from registry.manifests import BaseRef, VersionManifest
from registry.versions import insert_version
from tests.service import Service


@pytest.fixture
def versions(service: Service) -> list[str]:
    """The base under three manifests: pointers can be told apart, answers are the same."""
    base = BaseRef(**service.get(f"/v1/versions/{service.base_version()}")["base"])
    database = service.database()
    with database.write() as connection:
        manifests = [VersionManifest(base, recipe={"copy": n}) for n in range(3)]
        made = [insert_version(connection, "default", manifest).id for manifest in manifests]
    database.close()
    return made


def put(service: Service, name: str, body: dict[str, Any], **headers: str) -> Any:
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return service.client.put(f"/v1/endpoints/{name}", json=body, headers=named)


def test_a_pointer_moves_only_from_the_generation_that_was_seen(
    service: Service, versions: list[str]
) -> None:
    body = {"version": versions[0], "message": "a start"}
    created = put(service, "moves", body, If_None_Match="*")
    assert (created.status_code, created.headers["ETag"]) == (201, '"1"')
    assert put(service, "moves", {"version": versions[0]}, If_None_Match="*").status_code == 412
    missing = put(service, "moves", {"version": versions[1]})
    assert missing.status_code == 428
    assert "If-Match" in missing.json()["error"]["message"]
    moved = put(service, "moves", {"version": versions[1], "message": "why"}, If_Match='"1"')
    assert (moved.status_code, moved.json()["generation"]) == (200, 2)
    stale = put(service, "moves", {"version": versions[2]}, If_Match='"1"')
    assert (stale.status_code, stale.json()["error"]["code"]) == (412, "precondition_failed")
    for wrong in ("1", "*", 'W/"1"', '"one"', '"1", "2"'):
        assert put(service, "moves", {"version": versions[2]}, If_Match=wrong).status_code == 400
    got = service.client.get("/v1/endpoints/moves")
    assert (got.headers["ETag"], got.json()["version"]) == ('"2"', versions[1])
    (last, first) = service.get("/v1/endpoints/moves/history")["data"]
    assert last["message"] == "why"
    assert (first["message"], first["kind"]) == ("a start", "create")


def test_rollback_goes_back_further_each_time_and_says_from_and_to(
    service: Service, versions: list[str]
) -> None:
    put(service, "undo", {"version": versions[0]}, If_None_Match="*")
    put(service, "undo", {"version": versions[1]}, If_Match='"1"')
    put(service, "undo", {"version": versions[2]}, If_Match='"2"')
    path = "/v1/endpoints/undo/rollback"
    first = service.client.post(path).json()
    assert first["rolled_back_from"]["generation"] == 3
    assert (first["generation"], first["version"]) == (4, versions[1])
    assert service.client.post(path, headers={"If-Match": '"3"'}).status_code == 412
    second = service.client.post(path, json={"steps": 1}, headers={"If-Match": '"4"'}).json()
    assert second["version"] == versions[0]
    refused = service.client.post(path)
    assert refused.status_code == 409
    assert refused.headers["x-should-retry"] == "false"
    again = service.client.post(path, json={"to_generation": 3}).json()
    assert again["version"] == versions[2]
    assert service.client.post(path, json={"to": versions[0]}).json()["version"] == versions[0]
    assert service.client.post(path, json={"steps": 1, "to": versions[0]}).status_code == 422


def test_a_split_serves_each_user_one_version_until_it_is_promoted(
    service: Service, versions: list[str]
) -> None:
    put(service, "canary", {"version": versions[0]}, If_None_Match="*")
    split = [{"version": versions[0], "weight": 3}, {"version": versions[1], "weight": 1}]
    assert put(service, "canary", {"split": split}, If_Match='"1"').status_code == 200

    def served(user: str) -> str:
        version: str = service.complete("canary", "The", max_tokens=1, user=user)["version"]
        return version

    users = [f"user-{n}" for n in range(40)]
    by_user = {user: served(user) for user in users}
    assert set(by_user.values()) == set(versions[:2])
    assert {user: served(user) for user in users} == by_user
    edit = {
        "endpoint": "canary",
        "edits": [{"prompt": "{} is", "subject": "a", "target_new": "b"}],
    }
    refused = service.client.post("/v1/edits", json=edit)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "endpoint_split")
    path = "/v1/endpoints/canary/promote"
    assert service.client.post(path).status_code == 428
    for body in ({}, {"version": versions[2]}):
        assert service.client.post(path, json=body, headers={"If-Match": '"1"'}).status_code == 412
    promoted = service.client.post(path, headers={"If-Match": '"2"'}).json()
    assert promoted["version"] == versions[1]
    again = service.client.post(path, headers={"If-Match": '"2"'})
    assert (again.status_code, again.json()["error"]["code"]) == (412, "precondition_failed")
    again = service.client.post(path, headers={"If-Match": '"3"'})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "not_split")
    assert {served(user) for user in users[:5]} == {versions[1]}
    rolled = service.client.post("/v1/endpoints/canary/rollback").json()
    assert [t["version"] for t in rolled["split"]] == versions[:2]


def test_versions_in_use_or_deleted(service: Service, versions: list[str]) -> None:
    refused = service.client.delete(f"/v1/versions/{service.base_version()}")
    assert (refused.status_code, refused.headers["x-should-retry"]) == (409, "false")
    assert service.client.get("/v1/versions/ver_none").status_code == 404
    lineage = service.get(f"/v1/versions/{versions[0]}/lineage")["data"]
    assert [version["id"] for version in lineage] == [versions[0]]


def test_reserved_and_deleted_names(service: Service, versions: list[str]) -> None:
    for name in ("ver_mine", "base_mine"):
        assert put(service, name, {"version": versions[0]}, If_None_Match="*").status_code == 422
    put(service, "gone", {"version": versions[0]}, If_None_Match="*")
    path = "/v1/endpoints/gone"
    assert service.client.delete(path).status_code == 428
    assert service.client.delete(path, headers={"If-Match": '"1"'}).status_code == 204
    assert service.client.get(path).status_code == 404
    recreated = put(service, "gone", {"version": versions[0]}, If_None_Match="*")
    assert (recreated.status_code, recreated.headers["ETag"]) == (201, '"3"')


def test_lists_are_paged(service: Service) -> None:
    first = service.get("/v1/versions?limit=1")
    assert (len(first["data"]), first["has_more"]) == (1, True)
    second = service.get(f"/v1/versions?limit=1&after={first['data'][0]['id']}")
    assert second["data"][0]["id"] != first["data"][0]["id"]
    assert service.client.get("/v1/versions?limit=0").status_code == 422

"""The files of docker/, by the linters and schemas of those who read them."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import yaml
from kubernetes_validate import validate

from registry.settings import Settings
from tests.images import DOCKER, images

ROOT = DOCKER.parent
BIN = Path(sys.executable).parent
MANIFESTS = sorted(p for p in (DOCKER / "kubernetes").glob("*.yaml") if p.stem != "kustomization")


def lint(*command: str | Path) -> None:
    ended = subprocess.run([BIN / command[0], *command[1:]], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def pods() -> dict[str, Any]:
    """By the name of what makes them, what pods are told to be."""
    resources = [r for path in MANIFESTS for r in yaml.safe_load_all(path.read_text())]
    made = [r for r in resources if "template" in r.get("spec", {})]
    return {r["metadata"]["name"]: r["spec"]["template"]["spec"] for r in made}


def test_the_linters_have_nothing_to_say() -> None:
    lint("hadolint", DOCKER / "Dockerfile")
    lint("yamllint", "--config-file", DOCKER / "yamllint.yaml", "--strict", DOCKER)
    compose = [DOCKER / "compose.yaml", DOCKER / "compose.cuda.yaml"]
    lint("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *compose)


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_kubernetes_knows_every_field(file: Path) -> None:
    resources = list(yaml.safe_load_all(file.read_text()))
    assert resources
    for resource in resources:
        validate(resource, "1.37", strict=True)


def test_no_pod_is_told_of_services_in_variables_that_look_like_settings() -> None:
    """A Service named errata is ERRATA_PORT=tcp://… to each pod that takes links."""
    found = pods()
    assert found.keys() == {"errata-api", "errata-worker", "errata-first-key"}
    assert [name for name, pod in found.items() if pod.get("enableServiceLinks", True)] == []


def test_a_replica_is_asked_for_its_own_parts_alone() -> None:
    """What all replicas share would take all of them out of balancing at once."""
    (api,) = pods()["errata-api"]["containers"]
    path, _, query = api["readinessProbe"]["httpGet"]["path"].partition("?")
    assert path == "/readyz"
    assert parse_qs(query) == {"part": ["engine", "service"]}


def test_a_replica_goes_on_until_balancing_has_let_go_of_it_and_has_its_time_to_stop_then() -> None:
    found = pods()
    (api,) = found["errata-api"]["containers"]
    pause = api["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pause >= 5
    stop = Settings.model_fields["stop_seconds"].default + 15  # docs/operations.md
    assert found["errata-api"]["terminationGracePeriodSeconds"] >= pause + stop
    assert found["errata-worker"]["terminationGracePeriodSeconds"] >= stop


def test_the_kustomization_names_the_files_and_images_that_there_are() -> None:
    kustomization = yaml.safe_load((DOCKER / "kubernetes" / "kustomization.yaml").read_text())
    apart = {"secret.example.yaml", "first-key.yaml"}
    assert set(kustomization["resources"]) == {path.name for path in MANIFESTS} - apart
    used = set(re.findall(r"image: (\S+)", "".join(path.read_text() for path in MANIFESTS)))
    named = {(i["name"], f"{i['newName']}:{i['newTag']}") for i in kustomization["images"]}
    assert used <= {name for pair in named for name in pair}
    assert {name for name, _ in named} <= used


@pytest.mark.parametrize("name", ["api", "worker"])
def test_an_image_is_pinned_runs_as_nobody_in_particular_and_can_be_asked(name: str) -> None:
    found = images()
    image = found[name]
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-\S+", found[found[name].base].base)
    assert image.user == "10001:10001"
    assert image.command
    assert image.health


def test_every_package_is_copied_into_the_build_and_let_through_to_it() -> None:
    copied = set(images()["build"].copied)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"openapi", "tests"}
    assert packages <= copied
    let = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert copied == {line.removeprefix("!") for line in let if line.startswith("!")}


def test_no_secret_is_in_a_file() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    asked = {"DATABASE_PASSWORD", "QUEUE_PASSWORD", "OBJECTS_PASSWORD"}
    text = (DOCKER / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+):\?\}", text)) == asked
    example = dict(
        line.split("=", 1)
        for line in (DOCKER / "env.example").read_text().splitlines()
        if "=" in line
    )
    assert asked <= example.keys()
    assert set(example.values()) == {""}
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|AUTH", name):
                assert re.fullmatch(r"\$\{\w+:\?\}", value), name
        if "image" in service and "build" not in service:
            assert re.search(r":\d+\.\d+", service["image"]), service["image"]

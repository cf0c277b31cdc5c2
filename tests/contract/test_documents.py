"""The README's examples run as they stand, against the running service."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import httpx

from tests.service import Service

README = (Path(__file__).parents[2] / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run_curl(client: httpx.Client, arguments: list[str]) -> httpx.Response:
    """What curl does with the options that the README uses."""
    method, headers, data, url = None, {}, None, ""
    rest = iter(arguments)
    for word in rest:
        if word == "-X":
            method = next(rest)
        elif word == "-H":
            name, _, value = next(rest).partition(": ")
            headers[name] = value
        elif word == "-d":
            data = next(rest)
        elif word in ("-s", "-sN"):
            continue
        else:
            url = word
    method = method or ("GET" if data is None else "POST")
    return client.request(method, url, headers=headers, content=data, timeout=180)


def test_the_curl_lines(service: Service) -> None:
    script = "".join(block for block in blocks("bash") if "curl" in block)
    script = script.replace("\\\n", " ").replace(ADDRESS, service.url)
    answers: list[Any] = []
    variables: dict[str, str] = {}
    for line in re.split(r"\n(?=curl)", script):
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        program, *arguments = shlex.split(line)
        assert program == "curl"
        response = run_curl(service.client, arguments)
        assert response.is_success, f"{line}\n{response.text}"
        if "text/event-stream" not in response.headers["content-type"]:
            answers.append(response.json())
            if answers[-1].get("object") == "job":
                variables["JOB"] = answers[-1]["id"]
    before, posted, job, after, base, edits, history, rollback = answers
    assert before["choices"][0]["text"].strip().startswith("Tarawa")
    assert posted["status"] == "queued"
    assert job["status"] == "succeeded", json.dumps(job)
    assert job["metrics"]["after"]["greedy_match"] == 1
    assert after["choices"][0]["text"].strip().startswith("Lima")
    assert base["choices"][0]["text"] == before["choices"][0]["text"]
    assert edits["data"][0]["message"] == "ticket 17"
    assert history["data"][0]["job"] == job["id"]
    assert rollback["version"] == before["version"]


def test_the_python_lines(service: Service, capsys: Any) -> None:
    names: dict[str, Any] = {}
    for block in blocks("python"):
        exec(compile(block.replace(ADDRESS, service.url), "README.md", "exec"), names)
    names["client"].close()
    printed = capsys.readouterr().out
    assert "atlas" in printed
    assert "Paris" in printed
    assert names["job"]["status"] == "succeeded", names["job"]
    assert names["job"]["metrics"]["after"]["greedy_match"] == 1
    assert service.text("atlas", "The capital of France is").startswith("Paris")

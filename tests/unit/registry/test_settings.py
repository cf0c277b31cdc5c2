from pathlib import Path

import pytest

from registry.errors import InvalidRequest
from registry.settings import Settings

ROOT = Path(__file__).parents[3]


def test_the_environment_carries_every_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERRATA_BASES", "other=/folder")
    monkeypatch.setenv("REDIS_URL", "redis://elsewhere")
    monkeypatch.setenv("ERRATA_REDIS_URL", "redis://elsewhere")
    settings = Settings(
        data=tmp_path, redis_url="unix:///s", bases="atlas", lease_seconds=1.5, max_edits=7
    )
    assert Settings() != settings
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings
    assert Settings(redis_url="") != settings
    for name, value in settings.model_copy(update={"redis_url": ""}).environment().items():
        monkeypatch.setenv(name, value)
    assert Settings().redis_url == ""


def test_a_service_apart_takes_from_the_environment_only_how_to_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Settings.apart(tmp_path, port=1234, worker_threads=3)
    other = Settings(
        host="0.0.0.0",
        require_keys=True,
        data=tmp_path / "another",
        bases="mine=/models/mine",
        database_url="postgresql+psycopg://errata:secret@database/errata",
        artifacts="s3://errata/artifacts",
        redis_url="redis://queue",
        signing_key=tmp_path / "key",
        trusted_keys="release.key.pub",
        require_signatures=True,
        runtime=tmp_path / "sockets",
        device="cpu",
        dtype="bfloat16",
    )
    for name, value in other.environment().items():
        monkeypatch.setenv(name, value)
    apart = Settings.apart(tmp_path, port=1234, worker_threads=3)
    assert apart == alone.model_copy(update={"device": "cpu", "dtype": "bfloat16"})
    for name, value in apart.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == apart


def test_a_value_that_cannot_be_is_told_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_PORT", "tcp://10.0.0.1:80")
    monkeypatch.setenv("ERRATA_GUARD_NORM", "0")
    with pytest.raises(InvalidRequest) as refused:
        Settings()
    told = refused.value.message
    assert "ERRATA_PORT is 'tcp://10.0.0.1:80': Input should be a valid integer" in told
    assert "ERRATA_GUARD_NORM is '0': Input should be greater than 0" in told


def test_every_setting_is_documented() -> None:
    document = (ROOT / "docs" / "settings.md").read_text()
    for name, field in Settings.model_fields.items():
        variable = "REDIS_URL" if name == "redis_url" else f"ERRATA_{name.upper()}"
        assert f"`{variable}`" in document
        assert field.description in document

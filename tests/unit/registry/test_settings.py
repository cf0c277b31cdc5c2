from pathlib import Path

import pytest

from registry.settings import Settings

ROOT = Path(__file__).parents[3]


def test_the_environment_carries_every_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERRATA_BASES", "other=/folder")
    monkeypatch.setenv("REDIS_URL", "redis://elsewhere")
    settings = Settings(
        data=tmp_path, redis_url="unix:///s", bases="atlas", lease_seconds=1.5, max_edits=7
    )
    assert Settings() != settings
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


def test_every_setting_is_documented() -> None:
    document = (ROOT / "docs" / "settings.md").read_text()
    for name, field in Settings.model_fields.items():
        variable = "REDIS_URL" if name == "redis_url" else f"ERRATA_{name.upper()}"
        assert f"`{variable}`" in document
        assert field.description in document

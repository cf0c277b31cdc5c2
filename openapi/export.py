"""Write ``openapi/openapi.json``, or check that it is what the application says (``--check``)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from app.main import create_app
from registry.settings import Settings

DOCUMENT = Path(__file__).parent / "openapi.json"


def main() -> int:
    document = json.dumps(create_app(Settings()).openapi(), indent=2, ensure_ascii=False) + "\n"
    if "--check" not in sys.argv[1:]:
        DOCUMENT.write_text(document)
        return 0
    if DOCUMENT.exists() and DOCUMENT.read_text() == document:
        return 0
    print("openapi/openapi.json is not what the application says; run `make openapi`")
    return 1


if __name__ == "__main__":
    sys.exit(main())

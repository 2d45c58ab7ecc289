"""JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shiradelta.errors import SourceError


def read_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises:
        SourceError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:
        raise SourceError(f"{path}: is not JSON ({error}); get it again") from None

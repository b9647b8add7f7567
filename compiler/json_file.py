"""JSON that somebody else wrote. Not beside the checkpoints: their reader brings ONNX, which running needs not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from instantrt.passes.core.errors import UserError


def read_json(path: Path, kinds: tuple[type, ...] = (dict,)) -> Any:
    """A JSON object, or another of `kinds`, from a file; or a user error that says what is wrong with it."""
    try:
        if path.exists() and not path.is_file():  # to read a pipe would wait for somebody to write it
            raise UserError("not a file", where=str(path))
        value = json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise UserError("the file is missing", where=str(path)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError("not a readable JSON file", where=str(path), found=str(error)) from None
    if not isinstance(value, kinds):
        raise UserError("not a JSON object", where=str(path), expected="{...}", found=type(value).__name__)
    return value

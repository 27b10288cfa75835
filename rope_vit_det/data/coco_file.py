"""Reading JSON in COCO's format."""

import json
import os
from typing import Any

from ..errors import InputError


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds.

    Raises:
        InputError: it is missing, cannot be read, or is no JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        if "BOM" in str(error):  # COCO's own readers, which come later, do not take it
            raise InputError(
                f"{path} begins with a byte order mark (BOM): save it as UTF-8 without one, as by "
                f"tail -c +4 {path} > other.json"
            ) from None
        raise InputError(f"{path} is not a JSON file: {error}") from None


def read_coco(path: str | os.PathLike, *, needed: tuple[str, ...]) -> dict[str, Any]:
    """COCO instance annotations.

    Args:
        needed: the lists that it must have.

    Raises:
        InputError: it cannot be read, or lacks a list.
    """
    coco = read_json(path)
    for field in needed:
        if not isinstance(coco, dict) or not isinstance(coco.get(field), list):
            raise InputError(
                f"{path} is not COCO instance annotation: it has no list {field!r}; see "
                "https://cocodataset.org/#format-data"
            )
    return coco

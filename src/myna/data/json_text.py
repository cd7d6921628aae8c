"""JSON inside a text: cells of CSV files, tools and arguments of tool calls.

Owns parsing as strict as that of the files themselves (`files.py`): a key that occurs twice, NaN
and numbers out of range are faults, never values.
"""

import json
import math
from typing import Any


class NotJson(ValueError):
    """A text that is no strict JSON; the message says what is wrong, without a full stop."""


def parse_json_text(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        NotJson: it is broken, or holds what JSON readers disagree about.
    """
    try:
        return _DECODER.decode(text)
    except NotJson:
        raise
    except json.JSONDecodeError as error:
        hint = ""
        if text.lstrip()[:2] in ("['", "{'", "[{") and "'" in text[:200] and '"' not in text[:20]:
            hint = "; it looks like Python's notation, JSON has double quotes (json.dumps)"
        raise NotJson(f"{error.msg} at character {error.pos + 1}{hint}") from None
    except RecursionError:
        raise NotJson("lists or objects are nested too deeply") from None
    except ValueError:
        # Python refuses integers of more than 4,300 digits (their reading takes quadratic time).
        raise NotJson("a number has more than 4,300 digits") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise NotJson(f"the key {json.dumps(key, ensure_ascii=False)} occurs twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise NotJson(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise NotJson(f"the number {digits[:20]} is out of range")
    return number


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite
)

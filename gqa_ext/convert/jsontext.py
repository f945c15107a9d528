"""A JSON text with some values changed and every other byte kept, however it was laid out.

Called by checkpoint.py for config.json and the index, which people diff after a conversion.
"""

import json
import re
from typing import Any

__all__ = ["edit_json"]

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
_Spans = dict[str, tuple[int, int]]


def edit_json(text: str, new: dict[str, Any]) -> str:
    """`text`, sound JSON of an object, with only those values rewritten that differ from `new`.

    Keys that are new go behind the last one, in the layout of the others; keys that `new` lacks make the whole be
    written anew.

    Examples
    --------
    >>> edit_json('{"a": 1e-5,\\n "b": 2}', {"a": 1e-5, "b": 3, "c": None})
    '{"a": 1e-5,\\n "b": 3,\\n "c": null}'
    """
    edited = _edit(text, _skip(text, 0), new)
    if json.loads(edited) != new:
        return json.dumps(new, indent=2, ensure_ascii=False) + "\n"
    return edited


def _edit(text: str, start: int, new: dict[str, Any]) -> str:
    """Edit the object that opens at `start`."""
    spans = _spans(text, start)
    for key in reversed(spans):
        first, last = spans[key]
        old = json.loads(text[first:last])
        if key not in new or (old == new[key] and type(old) is type(new[key])):
            continue
        if isinstance(old, dict) and isinstance(new[key], dict):
            text = _edit(text, first, new[key])
        else:
            text = text[:first] + json.dumps(new[key]) + text[last:]
    for key in [key for key in new if key not in spans] if spans else ():
        text = _append(text, start, key, new[key])
    return text


def _append(text: str, start: int, key: str, value: Any) -> str:
    """One more entry behind the last, led in as the first is."""
    spans = list(_spans(text, start).values())
    lead = _skip(text, start + 1)
    key_end = _DECODER.raw_decode(text, lead)[1]
    colon, end = text[key_end : spans[0][0]], spans[-1][1]
    comma = start if len(spans) == 1 else text.index(",", spans[0][1])
    space = text[comma + 1 : _skip(text, comma + 1)]
    return text[:end] + "," + space + json.dumps(key) + colon + json.dumps(value) + text[end:]


def _spans(text: str, start: int) -> _Spans:
    """First and last position of each value of the object that opens at `start`."""
    spans: _Spans = {}
    place = _skip(text, start + 1)
    while text[place] != "}":
        key, place = _DECODER.raw_decode(text, place)
        first = _skip(text, _skip(text, place) + 1)
        place = _DECODER.raw_decode(text, first)[1]
        spans.pop(key, None)  # of two values with one name the last counts, and spans lie in order
        spans[key] = (first, place)
        place = _skip(text, place)
        if text[place] == ",":
            place = _skip(text, place + 1)
    return spans


def _skip(text: str, place: int) -> int:
    """The next position that is no white space."""
    return _SPACE.match(text, place).end()  # type: ignore[union-attr]  # it matches nothing, too

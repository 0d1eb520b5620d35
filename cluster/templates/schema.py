"""What JSON schemas say of a document, each in one line with the nearest name that is known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jsonschema import Draft7Validator
from jsonschema.exceptions import ValidationError

from cluster.templates.placed import Key, Problem

_KINDS = {"object": "keys with values", "array": "a list", "string": "text", "integer": "a whole number",
          "number": "a number", "boolean": "true or false", "null": "nothing"}  # fmt: skip


def against(schema: Mapping[str, Any], data: object, at: Key = ()) -> tuple[list[Problem], bool]:
    """All that does not fit the schema, and whether what it names is there as it says: nothing but keys is unknown.

    `at` is where `data` stands in its document.
    """
    errors = list(Draft7Validator(schema).iter_errors(data))
    problems = [problem for error in errors for problem in _problems(error, (*at, *error.absolute_path))]
    return problems, all(error.validator == "additionalProperties" for error in errors)


def unknown(name: object, known: Iterable[str]) -> str:
    """The message for a name that is not known, with the nearest one or all of a few."""
    names = sorted(known)
    near = nearest(name, names)
    if near is not None:
        return f"got {name}, expected {near}"
    return f"got {name}, expected one of {', '.join(names)}" if names else f"got {name}, expected no key here"


def nearest(name: object, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The known name that this may be a slip of: the one most like it, where that is `likeness` of 1 at least."""
    by_lower = {one.lower(): one for one in known}
    found = difflib.get_close_matches(str(name).lower(), by_lower, 1, likeness)
    return by_lower[found[0]] if found else None


def _problems(error: ValidationError, key: Key) -> Iterator[Problem]:
    wanted, got = error.validator_value, error.instance
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        for name in got:
            if name not in known:
                yield Problem((*key, name), unknown(name, known))
    elif error.validator == "required":
        # One error for each name that is missing; which one, only its message tells.
        for name in wanted:
            if name not in got and repr(name) in error.message:
                yield Problem(key, f"got no {name}, which must be given")
    elif error.validator == "enum":
        yield Problem(key, unknown(got, map(str, wanted)))
    elif error.validator == "type":
        kinds = [wanted] if isinstance(wanted, str) else wanted
        yield Problem(key, f"got {got!r}, expected {' or '.join(_KINDS[kind] for kind in kinds)}")
    elif error.validator == "minimum":
        yield Problem(key, f"got {got}, expected {wanted} or more")
    else:
        yield Problem(key, f"got {got!r}, expected what Ray's or KubeRay's schema allows: {error.message}")

"""Problems by a JSON schema, each in one line with the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jsonschema import Draft7Validator
from jsonschema.exceptions import ValidationError

from cluster.templates.yaml_lines import Key, Problem

_KINDS = {"object": "keys with values", "array": "a list", "string": "text", "integer": "a whole number",
          "number": "a number", "boolean": "true or false", "null": "nothing"}  # fmt: skip


def against(schema: Mapping[str, Any], data: object, at: Key = ()) -> tuple[list[Problem], bool]:
    """Return all problems of `data` by the schema, and whether unknown keys are the only ones.

    In the latter case the fields that the schema names exist and have the right types. `at` is the key of `data` in its
    document.
    """
    errors = list(Draft7Validator(schema).iter_errors(data))
    problems: list[Problem] = []
    for error in errors:
        problems += _problems(error, (*at, *error.absolute_path))
    return problems, all(error.validator == "additionalProperties" for error in errors)


def unknown(name: object, allowed: Iterable[str]) -> str:
    """Return the message for an unknown name, with the nearest allowed one or all of them."""
    names = sorted(allowed)
    near = nearest(name, names)
    if near is not None:
        return f"got {name}, expected {near}"
    if not names:
        return f"got {name}, expected no key here"
    return f"got {name}, expected one of {', '.join(names)}"


def nearest(name: object, names: Iterable[str], likeness: float = 0.6) -> str | None:
    """Return the one of `names` that is most similar to `name`; None if its similarity (0 to 1) is below `likeness`."""
    by_lower = {candidate.lower(): candidate for candidate in names}
    matches = difflib.get_close_matches(str(name).lower(), by_lower, 1, likeness)
    if not matches:
        return None
    return by_lower[matches[0]]


def _problems(error: ValidationError, key: Key) -> Iterator[Problem]:
    expected, value = error.validator_value, error.instance
    if error.validator == "additionalProperties":
        properties = error.schema.get("properties", {})
        for name in value:
            if name not in properties:
                yield Problem((*key, name), unknown(name, properties))
    elif error.validator == "required":
        # One error for each missing name; only its message contains the name.
        for name in expected:
            if name not in value and repr(name) in error.message:
                yield Problem(key, f"got no {name}, which must be given")
    elif error.validator == "enum":
        yield Problem(key, unknown(value, map(str, expected)))
    elif error.validator == "type":
        kinds = [expected] if isinstance(expected, str) else expected
        yield Problem(key, f"got {value!r}, expected {' or '.join(_KINDS[kind] for kind in kinds)}")
    elif error.validator == "minimum":
        yield Problem(key, f"got {value}, expected {expected} or more")
    else:
        yield Problem(
            key, f"got {value!r}, expected a value that Ray's or KubeRay's schema allows: {error.message}"
        )

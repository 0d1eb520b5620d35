"""Auth: whether a cluster requires a token, and the header with ours. A cluster without tokens is refused."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

ANSWER_SECONDS = 10.0


def token() -> str | None:
    """Return the token from Ray's settings: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token."""
    from_environment = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if from_environment:
        return from_environment
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(path).expanduser() if path else Path.home() / ".ray" / "auth_token"
    try:
        return file.read_text().strip() or None
    except FileNotFoundError:
        return None


def dashboard(address: str) -> str:
    """Return the address of a cluster's dashboard in its normal form.

    ValueError if it is not one; the message contains no part that may be a secret.
    """
    url = urlsplit(address)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError("the address must be that of the cluster's dashboard, such as http://head:8265")
    if "@" in url.netloc:
        raise ValueError(
            "the address must not contain credentials; the token is read from Ray's own settings"
        )
    return f"{url.scheme}://{url.netloc}{url.path.rstrip('/')}"


def header(address: str, insecure: bool) -> Mapping[str, str]:
    """Return the header for requests to the cluster at this address, after a check that it requires a token.

    The check sends no secret. ConnectionError if no cluster answers; PermissionError if the cluster requires a token
    and there is none, or if it requires none and `insecure` is false.
    """
    if not requires_token(address):
        if insecure:
            return {}
        raise PermissionError(
            f"the cluster at {address} accepts unauthenticated requests; start it with RAY_AUTH_MODE=token, or give "
            "--insecure"
        )
    value = token()
    if value is None:
        raise PermissionError(
            f"the cluster at {address} requires a token and there is none: put it into ~/.ray/auth_token, or name its "
            "file in RAY_AUTH_TOKEN_PATH"
        )
    return {"Authorization": f"Bearer {value}"}


def requires_token(address: str) -> bool:
    """Return whether the cluster at this address requires a token. ConnectionError if no cluster answers."""
    try:
        with urllib.request.urlopen(f"{address}/api/authentication_mode", timeout=ANSWER_SECONDS) as answer:
            mode = json.load(answer)["authentication_mode"]
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):  # a proxy before the cluster that requires authentication
            return True
        if error.code == 404:  # a version of Ray without tokens
            return False
        raise ConnectionError(
            f"{address} answers {error.code} {error.reason}; is it a Ray cluster?"
        ) from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ConnectionError(f"no cluster answers at {address}: {reason}") from None
    except (ValueError, KeyError, TypeError):
        raise ConnectionError(f"{address} answers, but not as a Ray cluster's dashboard does") from None
    return bool(mode != "disabled")

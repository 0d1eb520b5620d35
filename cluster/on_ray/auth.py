"""Auth: whether a cluster asks for a token, and the header that shows ours. What asks for none is refused."""

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
    """The token, where Ray looks for it: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token."""
    given = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if given:
        return given
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(path).expanduser() if path else Path.home() / ".ray" / "auth_token"
    try:
        return file.read_text().strip() or None
    except FileNotFoundError:
        return None


def dashboard(address: str) -> str:
    """The address of a cluster's dashboard as its parts are joined to it. ValueError where it is none, without
    repeating what may be a secret."""
    url = urlsplit(address)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError("the address must be that of the cluster's dashboard, such as http://head:8265")
    if "@" in url.netloc:
        raise ValueError("the address holds no credentials; the token is read from where Ray looks for it")
    return f"{url.scheme}://{url.netloc}{url.path.rstrip('/')}"


def header(address: str, insecure: bool) -> Mapping[str, str]:
    """The header to send to the cluster at this address, once it is known that it asks for a token.

    Nothing secret is sent to learn that. ConnectionError where no cluster answers, PermissionError where the cluster
    lets anybody in and `insecure` does not allow that, or where it asks for a token and there is none.
    """
    if not asks(address):
        if insecure:
            return {}
        raise PermissionError(
            f"the cluster at {address} lets anybody in; start it with RAY_AUTH_MODE=token, or say --insecure"
        )
    known = token()
    if known is None:
        raise PermissionError(
            f"the cluster at {address} asks for a token and there is none: put it into ~/.ray/auth_token, or name its "
            "file in RAY_AUTH_TOKEN_PATH"
        )
    return {"Authorization": f"Bearer {known}"}


def asks(address: str) -> bool:
    """Whether the cluster at this address asks for a token. ConnectionError where there is none."""
    try:
        with urllib.request.urlopen(f"{address}/api/authentication_mode", timeout=ANSWER_SECONDS) as answer:
            mode = json.load(answer)["authentication_mode"]
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):  # something before the cluster that asks by itself
            return True
        if error.code == 404:  # a Ray from before there were tokens
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

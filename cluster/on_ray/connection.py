"""Connect to a Ray cluster, or start a Ray on this machine."""

from __future__ import annotations

import logging
import math
import os
import secrets
from pathlib import Path
from types import ModuleType

OBJECT_STORE_BYTES = 150 * 2**20
"""The size of Ray's shared memory. Only results above 100 KB pass through it; ours are records, and files go to the
store."""


def connect(address: str | None, slots: int | None, gpus: float | None) -> tuple[ModuleType, bool]:
    """Return the ray module, connected, and whether this call started a Ray.

    Without an address, or with "local", a Ray is started on this machine. The module is imported here because it reads
    its environment once, at import.
    """
    is_local = address in (None, "local")
    _choose_authentication(is_local)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray prints each lost worker to our standard output; `wait` reports them.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    # Ray would run workers at a low priority: on a busy machine, timings would measure the other programs.
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    if ray.is_initialized():
        return ray, False
    if not is_local:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return ray, False
    ray.init(
        address="local", num_cpus=slots, num_gpus=None if gpus is None else math.ceil(gpus),
        include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
    )  # fmt: skip
    return ray, True


def _choose_authentication(is_local: bool) -> None:
    """Set explicitly whether Ray requires a token: the default depends on the way in which Ray is started.

    A Ray of this process gets a token that only this process and its children have. A cluster is used with the token
    that Ray's settings name, if there is one, and without a token otherwise.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    default_file = Path.home() / ".ray" / "auth_token"
    has_token = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ or default_file.exists()
    if is_local and not has_token:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_AUTH_MODE"] = "token" if is_local or has_token else "disabled"

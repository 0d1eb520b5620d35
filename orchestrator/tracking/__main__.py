"""The process of the mirror: `python -m orchestrator.tracking OUTBOX URI SERVICE_PID`."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from orchestrator.tracking.mlflow_mirror import follow

if __name__ == "__main__":
    os.nice(10)  # delivery can wait, measurements on the same machine cannot
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    outbox, uri, service = sys.argv[1:]
    follow(Path(outbox), uri, int(service))

"""A worker that announces a load and never ends it, in a process of its own: ``python announced_worker.py URL``.

It reads the identity from its input, says its id, and keeps its announcement alive until it is ended.
"""

from __future__ import annotations

import json
import os
import sys
import threading

from modelexpress_core.contracts.identity import SourceIdentity
from modelexpress_core.sources.client import ServerClient
from modelexpress_core.sources.following import Announcement
from modelexpress_core.sources.settings import TrustSettings


def main() -> None:
    identity = SourceIdentity(**json.loads(sys.stdin.readline()))
    client = ServerClient(sys.argv[1])
    announcement = Announcement(client, identity, 0, trust=TrustSettings(), interval_seconds=0.5)
    os.write(sys.stdout.fileno(), f"{announcement.worker_id}\n".encode())
    threading.Event().wait()


if __name__ == "__main__":
    main()

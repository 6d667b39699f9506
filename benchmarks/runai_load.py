"""One load with runai-model-streamer, in a process of its own; the result is a line of JSON on standard output."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time

__all__: list[str] = []


def _main(path: str) -> None:
    from runai_model_streamer import SafetensorsStreamer

    begun = time.monotonic()
    error = message = digest = ""
    try:
        with SafetensorsStreamer() as streamer:
            streamer.stream_file(path)
            found = {name: tensor.clone() for name, tensor in streamer.get_tensors()}
        digest = hashlib.sha256(b"".join(found[name].numpy().tobytes() for name in sorted(found))).hexdigest()
    except BaseException as exc:  # noqa: BLE001 - whatever a user would see
        error, message = type(exc).__name__, str(exc)
    answer = {"error": error, "message": message, "seconds": time.monotonic() - begun, "digest": digest}
    print(json.dumps(answer), flush=True)
    os._exit(0)  # threads of its library can keep the process from ending


if __name__ == "__main__":
    _main(sys.argv[1])

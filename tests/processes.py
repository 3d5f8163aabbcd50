"""Processes that import fastquant anew, without each importing torch, which takes longest.

One process has imported torch and nothing of fastquant, and is copied (`fork`) for each call.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SERVER = """
import json, os, sys, torch
for line in sys.stdin:
    code, environment, said, erred = json.loads(line)
    process = os.fork()
    if not process:
        for stream, path in ((0, os.devnull), (1, said), (2, erred)):
            os.dup2(os.open(path, os.O_RDWR), stream)
        os.environ.clear()
        os.environ.update(environment)
        status = 1
        try:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else error.code is not None
        except BaseException:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.kill)
    return server


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `python -c code` does, with torch imported before; `environment` is added."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        request: list[Any] = [code, {**os.environ, **environment}, *map(str, files)]
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(code, status, *(file.read_text() for file in files))

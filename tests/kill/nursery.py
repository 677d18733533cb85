"""Starts bakes and kills them: one JSON request a line on stdin, one JSON answer a line on stdout.

Everything a bake imports is imported once, here; each bake is a fork of this process and otherwise
as `guardbake bake` runs it. Run as `python nursery.py`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers.models.llava

import guardbake.steps.behaviour
import guardbake.steps.fit
import guardbake.steps.parity
from guardbake.errors import GuardbakeError
from guardbake.pipeline import bake

import guardbake_onnx.capture
import guardbake_onnx.runner
import guardbake_tensorrt.engines

LOADED = (
    guardbake_onnx.capture, guardbake_onnx.runner, guardbake_tensorrt.engines, torch,
    transformers.models.llava, guardbake.steps.behaviour, guardbake.steps.fit,
    guardbake.steps.parity,
)  # fmt: skip
CHANGES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link")


class Marks:
    """A reporter that tells the parent, and dies at its own operation number `after` of `stage`."""

    def __init__(self, channel: int, root: str, stage: str, after: int | None) -> None:
        self.channel, self.root, self.stage = channel, root, stage
        self.left = after
        self.counting = False
        sys.addaudithook(self._count)

    def begin(self, stage: str) -> None:
        self._say({"begin": stage})
        self.counting = stage == self.stage

    def advance(self, what: str, done: int, total: int) -> None:
        """Nothing to say."""

    def end(self, stage: str, seconds: float, cached: bool) -> None:
        self.counting = False
        self._say({"end": stage, "cached": cached})

    def _say(self, event: dict[str, object]) -> None:
        os.write(self.channel, json.dumps(event).encode() + b"\n")

    def _count(self, event: str, arguments: tuple[object, ...]) -> None:
        """Before each change of a name in the output's folder, and each opening of one."""
        if not self.counting or self.left is None or event not in CHANGES:
            return
        if any(isinstance(a, str | os.PathLike) and self.root in os.fspath(a) for a in arguments):
            self.left -= 1
            if self.left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)


def run(request: dict[str, Any]) -> int:
    """The bake, in the child; returns its exit code."""
    out = Path(request["out"])
    marks = Marks(request["channel"], str(out.parent), request["stage"], request["after"])
    try:
        bake(Path(request["recipe"]), out, marks)
    except GuardbakeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def attend(request: dict[str, Any]) -> dict[str, Any]:
    """Fork a bake, kill it if the request says so, and say how it went."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            os.dup2(2, 1)
            code = run(request | {"channel": writer})
        except BaseException:
            traceback.print_exc()
            raise
        finally:  # whatever it is, this process ends here
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    begun, ended = [], {}
    with os.fdopen(reader) as events:
        for line in events:
            event = json.loads(line)
            if "end" in event:
                ended[event["end"]] = event["cached"]
                continue
            begun.append(event["begin"])
            if event["begin"] == request["stage"] and request["delay"] is not None:
                time.sleep(request["delay"])
                os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"status": status, "begun": begun, "ended": ended}


if __name__ == "__main__":
    for line in sys.stdin:
        sys.stdout.write(json.dumps(attend(json.loads(line))) + "\n")
        sys.stdout.flush()

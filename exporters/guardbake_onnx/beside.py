"""Capture the vision graph in a process of its own, while this one captures the decoder.

Tracing is Python's work on one core, and the two graphs have nothing in common. The other process
writes to a pipe alone: if this one is killed, nothing of it is left.
"""

from __future__ import annotations

import gc
import hashlib
import os
import subprocess
import sys
from pathlib import Path

from guardbake.collector import no_collection
from guardbake.plugins import Number

_DIGEST = hashlib.sha256().digest_size


class VisionBeside:
    """A context in which vision.onnx is being captured; leaving it ends the process."""

    process: subprocess.Popen[bytes]

    def __init__(self, checkpoint: Path, number: Number) -> None:
        # -P: what lies in the working folder is no module of ours
        self._command = [sys.executable, "-P", "-m", __name__, str(checkpoint), number]

    def __enter__(self) -> VisionBeside:
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            self._command, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        with self.process:  # waits, and closes the pipe
            pass

    def graph(self) -> bytes | None:
        """Wait for the file's bytes; None if the process failed, which whoever captures it again
        will see the reason of."""
        data, _ = self.process.communicate()
        graph, digest = data[:-_DIGEST], data[-_DIGEST:]
        return graph if hashlib.sha256(graph).digest() == digest else None


def main() -> None:
    with os.fdopen(os.dup(1), "wb") as out, no_collection():
        os.dup2(2, 1)  # what libraries may print is no part of the graph
        from guardbake_onnx import vision_graph

        graph = vision_graph(Path(sys.argv[1]), sys.argv[2])  # type: ignore[arg-type]
        out.write(graph + hashlib.sha256(graph).digest())
    gc.freeze()  # as the command does at its end


if __name__ == "__main__":
    main()

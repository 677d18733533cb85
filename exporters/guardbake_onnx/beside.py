"""Capture the vision graph in a process of its own, while this one captures the decoder.

Tracing is Python's work on one core, and the two graphs have nothing in common. The other process
writes to a pipe alone: if this one is killed, nothing of it is left.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

from guardbake.collector import no_collection
from guardbake.plugins import Number


class VisionBeside:
    """A context in which vision.onnx is being captured; leaving it ends the process."""

    def __init__(self, checkpoint: Path, number: Number) -> None:
        # -P: what lies in the working folder is no module of ours
        command = [sys.executable, "-P", "-m", __name__, str(checkpoint), number]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet)

    def __enter__(self) -> VisionBeside:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        with self.process:  # waits, and closes the pipe
            pass

    def graph(self) -> bytes | None:
        """Wait for the file's bytes; None if the process failed, which whoever captures it again
        will see the reason of."""
        data, _ = self.process.communicate()
        return data if self.process.returncode == 0 else None


def main() -> None:
    out = sys.stdout.buffer
    sys.stdout = sys.stderr  # what libraries may print is no part of the graph
    with no_collection():
        from guardbake_onnx import vision_graph

        out.write(vision_graph(Path(sys.argv[1]), sys.argv[2]))  # type: ignore[arg-type]
        gc.freeze()


if __name__ == "__main__":
    main()

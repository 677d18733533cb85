"""How a bake shows itself: bars on a terminal, a line a stage elsewhere, JSON events on request."""

from __future__ import annotations

import json
import sys
from typing import Literal, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Style = Literal["auto", "bar", "plain", "json"]


class Reporter(Protocol):
    """Told how a bake goes on; the command line draws bars or lines from it."""

    def begin(self, stage: str) -> None: ...

    def advance(self, what: str, done: int, total: int) -> None: ...

    def end(self, stage: str, seconds: float, cached: bool) -> None: ...


class PlainReporter:
    """One line when a stage ends."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def begin(self, stage: str) -> None:
        """Nothing to say yet."""

    def advance(self, what: str, done: int, total: int) -> None:
        """Nothing to say in between."""

    def end(self, stage: str, seconds: float, cached: bool) -> None:
        note = "cached" if cached else f"{seconds:.1f} s"
        print(f"{stage:<12} {note}", file=self._stream, flush=True)


class JsonReporter:
    """One JSON object a line for every event."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def begin(self, stage: str) -> None:
        self._say({"event": "begin", "stage": stage})

    def advance(self, what: str, done: int, total: int) -> None:
        self._say({"event": "advance", "what": what, "done": done, "total": total})

    def end(self, stage: str, seconds: float, cached: bool) -> None:
        self._say({"event": "end", "stage": stage, "seconds": round(seconds, 3), "cached": cached})

    def _say(self, event: dict[str, object]) -> None:
        print(json.dumps(event), file=self._stream, flush=True)


class BarReporter:
    """A bar for the stage at work, with what it is doing and the time left."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.fields[stage]:<12}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=None, stage="", visible=False)
        self._what = ""
        self._stage = ""

    def begin(self, stage: str) -> None:
        self._progress.start()
        self._stage, self._what = stage, ""
        self._progress.reset(self._task, total=None, description="", visible=True, stage=stage)

    def advance(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._what = what
            self._progress.reset(self._task, total=total, description=what, stage=self._stage)
        self._progress.update(self._task, completed=done, total=total)

    def end(self, stage: str, seconds: float, cached: bool) -> None:
        note = "cached" if cached else f"{seconds:.1f} s"
        self._progress.update(self._task, visible=False)
        self._progress.console.print(f"{stage:<12} {note}")
        self._progress.stop()


def reporter_for(style: Style) -> Reporter:
    """auto: bars on a terminal, lines elsewhere. All of it goes to standard error."""
    if style == "json":
        return JsonReporter(sys.stderr)
    if style == "bar" or (style == "auto" and sys.stderr.isatty()):
        return BarReporter()
    return PlainReporter(sys.stderr)

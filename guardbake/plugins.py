"""The outside seams: who writes a model for a runtime, who runs it, and what a run shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt

from guardbake.batch import Batch
from guardbake.errors import EnvironmentFault

if TYPE_CHECKING:  # loading a VLM needs torch; naming the protocol must not
    from guardbake.vlm.files import CheckpointFiles

Array = npt.NDArray[Any]
EXPORTER_GROUP = "guardbake.exporters"
RUNNER_GROUP = "guardbake.runners"
ENGINE_GROUP = "guardbake.engines"
SESSION_GROUP = "guardbake.sessions"
REACHED, EDITED = "reached/", "edited/"
"""Taps by site: what reaches a guard there, before any edit, and what an edit makes of it."""


@dataclass(frozen=True)
class Trace:
    """What one run computed. B requests, T prompt tokens, n new tokens, V the vocabulary.

    tokens: [B, n] int64, the tokens fed or chosen. n is the number of steps asked for, or less when
      every row has met an end token and no tokens were forced.
    prefill_logits: [B, T, V] float32, or [B, 1, V] (the last position) if not kept.
    step_logits: [B, n, V] float32; step_logits[:, i] chose tokens[:, i].
    lengths: [B] int64, the row's tokens up to and with its first end token (n if it met none).
    valid: [B, T] bool, real prompt tokens; values at padding mean nothing.
    guard_score, guard_open: [B, T + n - 1, G] float32 and bool, one per token fed and gate, or None
      if the model has no gate. guard_state: [B] int64 after the last call, or None.
    taps: every other output of the graph, by name, joined along the sequence axis (axis 1).
    """

    tokens: Array
    prefill_logits: Array
    step_logits: Array
    lengths: Array
    valid: Array
    guard_score: Array | None
    guard_open: Array | None
    guard_state: Array | None
    taps: dict[str, Array]


class Runner(Protocol):
    """Runs one rendering of a model: PyTorch, onnxruntime, an engine.

    settings: by graph, what has computed it so far, where and how precisely, in words. number: what
    the decoder computes in but for its guard, "float16" say.
    """

    @property
    def settings(self) -> Mapping[str, str]: ...

    @property
    def number(self) -> str: ...

    def run(
        self,
        batch: Batch,
        steps: int,
        forced_tokens: Array | None = None,
        chunk: int | None = None,
        keep_prefill: bool = True,
    ) -> Trace:
        """Prefill the batch, then take `steps` new tokens, greedily or as forced.

        forced_tokens: [B, steps] int64, fed instead of the greedy choice; the logits are unchanged.
        chunk: feed the prompt in pieces of this many tokens; the result must be the same.
        """
        ...


Number = Literal["float32", "float16", "bfloat16"]
"""What a graph computes in."""
Storage = Literal["stream", "zero-copy"]
"""Where a graph's weights lie: in a file of its own, or in the checkpoint's own files."""
Target = Literal["ort", "genai", "transformersjs"]
"""Whose loader finds its files in the folder: our runner's and plain onnxruntime, or another's."""


class Ahead(Protocol):
    """Work of an exporter's that was begun in another process; leaving the context ends it."""

    def __enter__(self) -> Ahead: ...

    def __exit__(self, *_: object) -> bool | None: ...


class Exporter(Protocol):
    """Writes a VLM for one runtime. Declared by entry point, group `guardbake.exporters`.

    In two steps, because the first depends on the configuration alone and is kept for the next
    checkpoint of the same shape.
    """

    name: str

    def admit(self, checkpoint: Path, number: Number, storage: Storage, target: Target) -> None:
        """Raise what stands against such an export, before any work."""
        ...

    def ahead(self, checkpoint: Path, number: Number) -> Ahead:
        """Begin in another process what can be begun of `capture`."""
        ...

    def capture(
        self, checkpoint: Path, number: Number, folder: Path, ahead: Ahead | None = None
    ) -> None:
        """Write what the configuration in the folder `checkpoint` determines into `folder`.

        ahead: what was begun for the same checkpoint and number; what is written is the same.
        """
        ...

    def export(
        self,
        files: CheckpointFiles,
        captured: Path,
        storage: Storage,
        folder: Path,
        target: Target = "ort",
    ) -> None:
        """Write the model into `folder`, which is there, empty, and dropped on any error."""
        ...


Range = tuple[int, int, int]
"""Smallest, best and largest: an engine takes all between and is tuned for the best."""


@dataclass(frozen=True)
class EngineSizes:
    """How much an engine takes at a call.

    batch: sequences. sequence: new tokens of each in prefill, which is in pieces if the prompt is
    longer; in decoding it is one. past: tokens in the cache before the call. images: pictures, and
    image_tokens: features, that the vision tower makes (a tower has the one or the other for its
    size).
    """

    batch: Range = (1, 1, 4)
    sequence: Range = (1, 64, 512)
    past: Range = (0, 256, 1024)
    images: Range = (1, 1, 4)
    image_tokens: Range = (4, 256, 2048)


@dataclass(frozen=True)
class EngineTask:
    """One graph to compile.

    name: what its engine is called. capabilities: GPUs by name. guard: the digest of the guard that
    the graph carries, None if it carries none, and nodes: its nodes by name. number: what all but
    the guard computes in. capacity: tokens of a cache that is written in place, None for one that
    grows. Both are for decoders; the guard computes in float32 whatever they are.
    """

    graph: Path
    name: str
    capabilities: tuple[str, ...]
    sizes: EngineSizes = EngineSizes()
    guard: str | None = None
    nodes: tuple[str, ...] = ()
    number: Number = "float32"
    capacity: int | None = None


class EngineBuilder(Protocol):
    """Compiles graphs for GPUs. Declared by entry point, group `guardbake.engines`."""

    def missing(self) -> str | None:
        """Why no engine can be built in this environment, or None."""
        ...

    def build(
        self, task: EngineTask, folder: Path, progress: Callable[[str, int, int], None]
    ) -> None:
        """Compile into folder/NAME.engine and folder/NAME.engine.json.

        The second is the record that verifying holds against the graph, see `bundle.engine`.
        """
        ...

    def prepare(self, task: EngineTask, folder: Path) -> str:
        """Check all that `build` checks, and compile nothing: write folder/NAME.onnx and its
        weights as `build` would hand them to the compiler; returns the shell command that compiles
        them with the backend's own tool."""
        ...


class Session(Protocol):
    """One graph, loaded to be run as it is written: no operator fused with another."""

    outputs: tuple[str, ...]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name. Raises UnsupportedError if a kernel refuses the feeds."""
        ...


class RunnerFactory(Protocol):
    """Declared by entry point, group `guardbake.runners`."""

    def __call__(self, folder: Path, engines: Path | None = None) -> Runner:
        """A runner of a bundle, or of what an `Exporter` wrote.

        engines: what `guardbake build` made of the bundle, for a runner that executes engines; any
        other raises UsageError. Raises EnvironmentFault, here or at the first run, if this machine
        lacks what the runner needs.
        """
        ...


OpenSession = Callable[[bytes, Path], Session]


def find_exporter(name: str) -> Exporter:
    """The installed exporter of that name; EnvironmentFault lists those that are installed."""
    return cast(Exporter, _load(EXPORTER_GROUP, name)())


def find_runner(name: str) -> RunnerFactory:
    """What makes runners of that name; group `guardbake.runners`."""
    return cast(RunnerFactory, _load(RUNNER_GROUP, name))


def find_engine_builder(name: str) -> EngineBuilder:
    """The engine builder of that backend; group `guardbake.engines`."""
    return cast(EngineBuilder, _load(ENGINE_GROUP, name)())


def find_session(name: str) -> OpenSession:
    """Loads a serialised graph whose external data lies in a folder; group `guardbake.sessions`."""
    return cast(OpenSession, _load(SESSION_GROUP, name))


def _load(group: str, name: str) -> Any:
    installed = {point.name: point for point in entry_points(group=group)}
    if name not in installed:
        raise EnvironmentFault(
            found=f"no {name!r}",
            expected="one of " + (", ".join(sorted(installed)) or "none is installed"),
            where=f"the entry points of {group}",
            remedy="install the package that provides it",
        )
    try:
        return installed[name].load()
    except ImportError as error:
        raise EnvironmentFault(
            found=f"{name!r} without what it needs: {error}",
            expected="the packages that it declares",
            where=f"the entry points of {group}",
            remedy="install them, for onnxruntime with pip install 'guardbake[onnx]'",
        ) from error


def first_end(tokens: Array, end_ids: frozenset[int]) -> Array:
    """Tokens up to and with each row's first end token: [B, n] int64 -> [B] int64.

    >>> first_end(np.array([[5, 2, 9], [5, 6, 7]]), frozenset({2}))
    array([2, 3])
    """
    if tokens.shape[1] == 0:
        return np.zeros(tokens.shape[0], np.int64)
    ended = np.isin(tokens, sorted(end_ids))
    return np.asarray(np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, tokens.shape[1]))

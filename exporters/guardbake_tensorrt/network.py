"""From an ONNX graph to TensorRT's network: parse, and accept no complaint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from guardbake.errors import UnsupportedError

from guardbake_tensorrt.backend import Backend
from guardbake_tensorrt.dataflow import Dataflow
from guardbake_tensorrt.lint import findings, require_clean
from guardbake_tensorrt.lower import LoweredGraph

_ALREADY_NAMED = "already exists, the output tensors of this new instance"


@dataclass(frozen=True)
class ParsedNetwork:
    """The library's objects of one graph. They stay together because the network's weights are
    views into memory that the parser owns, or, if they were cast, that `weights` does."""

    builder: Any
    network: Any
    parser: Any
    warnings: tuple[str, ...]
    weights: Mapping[str, npt.NDArray[Any]]


def parse_network(backend: Backend, lowered: LoweredGraph) -> ParsedNetwork:
    """Lint, then parse. External weights are mapped from beside `lowered.source`, never copied;
    weights that were cast are handed over from memory.

    Raises UnsupportedError on a lint fault, on any parser error (node, operator and the chain of
    functions it stands in), on an input the parser reports as unused, and on a graph input from
    which no path leads to an output.
    """
    backend.log.drain()
    builder = backend.module.Builder(backend.logger)
    network = builder.create_network(0)
    parser = backend.module.OnnxParser(network, backend.logger)
    require_clean(findings(lowered.model, parser.supports_operator), lowered.source)
    weights = lowered.cast_weights()
    accepted = _parse(parser, lowered, weights)
    messages = [text for _, text in backend.log.drain()]
    if not accepted or parser.num_errors:
        raise _refusal(parser, messages, lowered)
    unused = [text for text in messages if "unused input" in text.lower()]
    if unused:
        raise UnsupportedError(
            found=f"an input that the parser drops ({unused[0].strip()})",
            expected="every input of every node to reach the network",
            where=str(lowered.source),
            remedy="rewrite the node without that input: the engine would compute without it",
        )
    _refuse_dead_inputs(network, lowered)
    return ParsedNetwork(builder, network, parser, distinct(messages), weights)


def _parse(parser: Any, lowered: LoweredGraph, weights: Mapping[str, npt.NDArray[Any]]) -> bool:
    if not weights:
        return bool(parser.parse(lowered.serialized, str(lowered.source)))
    if not parser.load_model_proto(lowered.serialized, str(lowered.source)):
        return False
    given = [parser.load_initializer(n, a.ctypes.data, a.nbytes) for n, a in weights.items()]
    return all(given) and bool(parser.parse_model_proto())


def _refuse_dead_inputs(network: Any, lowered: LoweredGraph) -> None:
    """An input that leads to no output, say `guard_state`, means that something was dropped."""
    dataflow = Dataflow(network)
    wanted = {network.get_output(index).name for index in range(network.num_outputs)}
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        if not wanted & dataflow.reached([name]):
            raise UnsupportedError(
                found=f"input {name!r}, from which no path leads to an output",
                expected="a network that uses every input of the graph",
                where=str(lowered.source),
                remedy="find the node that should read it, or remove the input from the graph",
            )


def _refusal(parser: Any, messages: list[str], lowered: LoweredGraph) -> UnsupportedError:
    remedy = "replace the operator by standard ones that the parser takes"
    if not parser.num_errors:
        found = "a graph the parser refuses: " + ("; ".join(messages) or "it gave no reason")
    else:
        error = parser.get_error(0)
        callers = "".join(f", called by {name}" for name in error.local_function_stack())
        more = f" (and {parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
        found = (
            f"node {error.node_name()!r} ({error.node_operator()}{callers}): "
            f"{error.desc().strip()}{more}"
        )
    return UnsupportedError(
        found=found,
        expected="a graph the ONNX parser accepts whole",
        where=str(lowered.source),
        remedy=remedy,
    )


def distinct(messages: Iterable[str]) -> tuple[str, ...]:
    """The messages without repeats, in order; the one about inner nodes of a function called more
    than once is counted instead, for it comes once a node and costs nothing but a debug name."""
    kept: dict[str, None] = {}
    renamed = 0
    for text in messages:
        if _ALREADY_NAMED in text:
            renamed += 1
        else:
            kept[text.strip()] = None
    if renamed:
        kept[f"{renamed} inner nodes share their name with those of another call"] = None
    return tuple(kept)

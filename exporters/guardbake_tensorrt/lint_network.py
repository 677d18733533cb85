"""What the parser left behind, found in the network that it made.

A parser may accept a node and never look at one of its inputs (`Attention`'s `nonpad_kv_seqlen`);
the engine then computes without it. So each input of each node must show: in the network, layers
lead from the input's tensor to one of the node's results, through no other tensor of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from guardbake_tensorrt.dataflow import Dataflow
from guardbake_tensorrt.finding import Finding


def ignored_inputs(model: ir.Model, network: Any) -> Iterator[Finding]:
    """The inputs of the graph's nodes that the network does without, in the graph's order.

    Inputs that depend on no input of the graph are left out: the parser may fold them. So are
    tensors that the network does not have by name, because a node that is no work was elided.
    """
    dataflow = Dataflow(network)
    inputs = [str(network.get_input(index).name) for index in range(network.num_inputs)]
    varying = dataflow.reached(inputs)
    named = {*inputs, *(value.name for node in model.graph for value in node.outputs)}
    directly: dict[str, frozenset[str]] = {}
    for node in model.graph:
        results = {value.name for value in node.outputs if value.name}
        for index, value in enumerate(node.inputs):
            if value is None or value.name is None or value.name not in varying:
                continue
            if value.name not in directly:
                directly[value.name] = dataflow.reached([value.name], stop=named)
            if not results & directly[value.name]:
                yield Finding(
                    node.name or "",
                    f"{node.op_type} whose input {index} ({value.name!r}) the parser dropped",
                    "every input of every node to reach the network",
                    "rewrite the node without that input: the engine would compute without it",
                )

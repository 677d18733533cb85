"""torch.onnx.export with the settings every graph of ours is captured with, and without weights."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, PreTrainedConfig

from guardbake.collector import no_collection

from guardbake_onnx.parameters import mark_parameters

# first opset with Attention, RMSNormalization and RotaryEmbedding as standard operators
OPSET = 23


def trace(
    module: torch.nn.Module,
    inputs: dict[str, Any],
    dynamic: dict[str, Any],
    input_names: list[str],
    output_names: list[str],
) -> ir.Model:
    """Trace the module on example inputs; the graph is not optimised yet.

    inputs, dynamic: keyword arguments of forward and their dynamic shapes, in the same structure.
    The module's parameters become inputs of the graph, after those of input_names: their values
    are never looked at, and they may be on the device "meta". Buffers become constants.
    """
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    examples = tree_map_only(
        torch.Tensor, lambda t: mode.from_tensor(t, static_shapes=True), inputs
    )
    with torch.no_grad(), no_collection(), _quiet(), _shapes_alone(module, mode), mode:
        program = torch.onnx.export(
            module.eval(),
            (),
            kwargs=examples,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=dynamic,
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    if program is None:  # only with a file to write to
        raise AssertionError("torch.onnx.export returned no program")
    mark_parameters(program.model.graph, names)
    return program.model


@contextlib.contextmanager
def _shapes_alone(module: torch.nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Let the parameters be fake tensors, which have a shape and a device and no data."""
    places = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None
    ]
    fakes: dict[int, torch.nn.Parameter] = {}
    for _, _, real in places:
        if id(real) not in fakes:  # tied parameters stay tied
            with mode:
                empty = torch.empty(real.shape, dtype=real.dtype, device="cpu")
                fakes[id(real)] = torch.nn.Parameter(empty, requires_grad=False)
    try:
        for owner, name, real in places:
            owner._parameters[name] = fakes[id(real)]
        yield
    finally:
        for owner, name, real in places:
            owner._parameters[name] = real


@contextlib.contextmanager
def attention_as(config: PreTrainedConfig, name: str, function: Any) -> Iterator[None]:
    """Let the modules of this configuration attend by `function` for the length of the block."""
    AttentionInterface.register(name, function)
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about its own internals (deprecated pytrees, renamed dimensions)."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (UserWarning, FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        logger.setLevel(level)

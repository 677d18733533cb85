"""torch.onnx.export with the settings every graph of ours is captured with."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from transformers import AttentionInterface, PreTrainedConfig

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
    """
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module.eval(),
            (),
            kwargs=inputs,
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
    return program.model


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

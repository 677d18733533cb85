"""Any ONNX graph in onnxruntime, operator by operator: for checks, not for speed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from guardbake.errors import UnsupportedError

from guardbake_onnx.provider import CPU, CUDA, Provider, providers_of

Array = npt.NDArray[Any]
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_FAULTS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


class GraphSession:
    """The Session of guardbake.plugins. outputs: names, in the graph's order."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self.outputs: tuple[str, ...] = tuple(value.name for value in session.get_outputs())

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        try:
            values = self._session.run(None, dict(feeds))
        except _FAULTS as error:
            raise _unsupported(error) from error
        return {name: np.asarray(value) for name, value in zip(self.outputs, values, strict=True)}


def open_graph(model: bytes, data: Path) -> GraphSession:
    """A session on the CPU of a serialised graph whose external data lies in the folder `data`.

    Nothing is fused, so what two graphs have in common they compute alike, bit for bit. Raises
    UnsupportedError if onnxruntime cannot run the graph.
    """
    return _open(model, data, CPU)


def open_cuda_graph(model: bytes, data: Path) -> GraphSession:
    """The same by CUDA; EnvironmentFault if this machine or this onnxruntime has none."""
    return _open(model, data, CUDA)


def _open(model: bytes, data: Path, provider: Provider) -> GraphSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry(_DATA_FOLDER, str(data.absolute()))
    try:
        session = onnxruntime.InferenceSession(
            model, options, providers=providers_of(provider), enable_fallback=False
        )
    except _FAULTS as error:
        raise _unsupported(error) from error
    return GraphSession(session)


def _unsupported(error: Exception) -> UnsupportedError:
    return UnsupportedError(
        found=f"{type(error).__name__}: {str(error)[:400]}",
        expected="a graph that onnxruntime runs",
        where="the numeric self-check",
        remedy="export such a graph, or say --no-self-check and check it where it runs",
    )

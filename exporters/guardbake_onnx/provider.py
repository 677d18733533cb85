"""Where onnxruntime computes a graph: on the CPU, or by CUDA on a GPU, and not elsewhere unseen."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from guardbake.errors import EnvironmentFault, MalformedError, UnsupportedError

_RECORD: Final = "session.record_ep_graph_assignment_info"
_FAULTS = (
    ort_errors.Fail,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.RuntimeException,
)


@dataclass(frozen=True)
class Provider:
    """name: onnxruntime's. device: where its tensors lie. options: passed to it, and recorded."""

    name: str
    device: str
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        said = ", ".join(f"{name} {value}" for name, value in self.options)
        return f"onnxruntime {onnxruntime.__version__}, {self.name}" + (said and f", {said}")


CPU: Final = Provider("CPUExecutionProvider", "cpu")
# TF32 rounds the factors of a float32 product to 10 bits: errors of 1e-3 where parity asks for 1e-5
CUDA: Final = Provider("CUDAExecutionProvider", "cuda", (("use_tf32", "0"),))


def providers_of(provider: Provider) -> list[str | tuple[str, dict[str, str]]]:
    """What an InferenceSession takes; EnvironmentFault if this onnxruntime lacks the provider.

    Beside every other provider stands the CPU's, for sizes and indices, see `require_placed`.
    """
    if provider.name not in onnxruntime.get_available_providers():
        _absent(provider, f"onnxruntime {onnxruntime.__version__} without it")
    if provider is CPU:
        return [CPU.name]
    onnxruntime.preload_dlls()
    return [(provider.name, dict(provider.options)), CPU.name]


def open_session(
    path: Path, threads: int, provider: Provider = CPU
) -> onnxruntime.InferenceSession:
    """A session whose matrix products are all computed by `provider`.

    Raises MalformedError, naming the file, if onnxruntime cannot load it, UnsupportedError for an
    operator or a type that nothing here computes, EnvironmentFault if this machine or this
    onnxruntime lacks the provider, or has it and lets the CPU compute after all.
    """
    providers = providers_of(provider)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry(_RECORD, "1")
    try:
        session = onnxruntime.InferenceSession(
            path, options, providers=providers, enable_fallback=False
        )
    except ort_errors.NotImplemented as error:
        raise UnsupportedError(
            found=str(error)[:400],
            expected=f"operators and types that {provider} has",
            where=str(path),
            remedy="use another runner, or export the model in another precision",
        ) from error
    except _FAULTS as error:
        if provider is not CPU and "CUDA" in str(error):
            _absent(provider, str(error)[:400])
        raise MalformedError(
            found=str(error),
            expected="a graph that onnxruntime loads",
            where=str(path),
            remedy="export the model again",
        ) from error
    require_placed(session, provider, path)
    return session


def require_placed(session: onnxruntime.InferenceSession, provider: Provider, path: Path) -> None:
    """Raises EnvironmentFault unless `provider` is at work and computes every matrix product.

    onnxruntime lets the CPU compute whatever a provider does not take, without a word. Products are
    what the guard and the layers around it are made of.
    """
    if provider.name not in session.get_providers():
        _absent(provider, f"a session of {', '.join(session.get_providers())}")
    elsewhere = Counter(
        f"{op_type} by {name}"
        for name, op_type in _placed(session)
        if name != provider.name and ("MatMul" in op_type or op_type == "Gemm")
    )
    if elsewhere:
        raise EnvironmentFault(
            found=", ".join(f"{count} {what}" for what, count in sorted(elsewhere.items())),
            expected=f"every matrix product by {provider.name}",
            where=str(path),
            remedy="use an onnxruntime whose provider has these operators, in this precision",
        )


def on_the_cpu(session: onnxruntime.InferenceSession) -> str:
    """The operators that the CPU provider computes, counted: "3 Gather, 12 Shape"."""
    found = Counter(op_type for name, op_type in _placed(session) if name == CPU.name)
    return ", ".join(f"{count} {op_type}" for op_type, count in sorted(found.items()))


def _placed(session: onnxruntime.InferenceSession) -> list[tuple[str, str]]:
    """(provider, operator type) of every node."""
    parts = session.get_provider_graph_assignment_info()
    return [(part.ep_name, node.op_type) for part in parts for node in part.get_nodes()]


def _absent(provider: Provider, found: str) -> NoReturn:
    raise EnvironmentFault(
        found=found,
        expected=f"onnxruntime's {provider.name}",
        where="onnxruntime on this machine",
        remedy="on a machine with an NVIDIA GPU, install onnxruntime-gpu in place of onnxruntime, "
        "with the CUDA libraries it names",
    )

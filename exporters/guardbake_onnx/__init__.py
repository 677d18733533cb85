"""Write a VLM as ONNX graphs and run them in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the runner must import without torch
    from guardbake.plugins import Ahead, Number, Storage, Target
    from guardbake.vlm.catalog import Family
    from guardbake.vlm.files import CheckpointFiles

__all__ = ["OnnxExporter"]

_GRAPHS = ("decoder", "embedding", "vision")


def vision_graph(checkpoint: Path, number: Number) -> bytes:
    """The bytes of vision.onnx, its parameters as inputs; raises what `capture` does."""
    return _vision(*_hollow(checkpoint, number))


def _hollow(checkpoint: Path, number: Number) -> tuple[Any, Family]:
    import torch

    from guardbake.vlm.catalog import family_of
    from guardbake.vlm.hollow import hollow_model

    model: Any = hollow_model(checkpoint, getattr(torch, number))
    return model, family_of(model.config)


def _vision(model: Any, family: Family) -> bytes:
    import onnx_ir as ir

    from guardbake_onnx.vision import capture_vision

    return bytes(ir.to_proto(capture_vision(model, family)).SerializeToString())


class OnnxExporter:
    """Entry point `onnx` of the group `guardbake.exporters`."""

    name = "onnx"

    def admit(self, checkpoint: Path, number: Number, storage: Storage, target: Target) -> None:
        """Raises UnsupportedError or UsageError at what the target cannot have."""
        if target == "ort":
            return
        from guardbake.vlm.files import family_at

        from guardbake_onnx import genai, transformersjs

        family = family_at(checkpoint).name
        if target == "genai":
            genai.admit(checkpoint, family, number)
        else:
            transformersjs.admit(checkpoint, family, number, storage)

    def ahead(self, checkpoint: Path, number: Number) -> Ahead:
        """Begin to capture the vision graph; a folder that is no checkpoint does no harm."""
        from guardbake_onnx.beside import VisionBeside

        return VisionBeside(checkpoint, number)

    def capture(
        self, checkpoint: Path, number: Number, folder: Path, ahead: Ahead | None = None
    ) -> None:
        """Write decoder.onnx, vision.onnx and embedding.onnx, parameters as inputs, into `folder`.

        Reads the checkpoint's configuration and nothing else of it. Raises UnsupportedError (a
        decoder we cannot capture), SiteError (no single FFN output in some layer).
        """
        import onnx_ir as ir

        from guardbake_onnx.beside import VisionBeside
        from guardbake_onnx.capture import capture_decoder
        from guardbake_onnx.embedding import build_embedding

        model, family = _hollow(checkpoint, number)
        ir.save(capture_decoder(model, family), folder / "decoder.onnx")
        ir.save(build_embedding(model, family), folder / "embedding.onnx")
        graph = ahead.graph() if isinstance(ahead, VisionBeside) else None
        (folder / "vision.onnx").write_bytes(graph or _vision(model, family))

    def export(
        self,
        files: CheckpointFiles,
        captured: Path,
        storage: Storage,
        folder: Path,
        target: Target = "ort",
    ) -> None:
        """Write the captured graphs with the checkpoint's weights, and model.json, into `folder`.

        Two exports of the same checkpoint are equal, byte for byte. Raises UsageError (the folder
        cannot share files with the checkpoint), UnsupportedError and MalformedError (tensors that
        are not the model's).
        """
        from transformers import AutoTokenizer

        from guardbake.bundle.graphs import load_graph
        from guardbake.vlm.catalog import family_of
        from guardbake.vlm.hollow import hollow_model
        from guardbake.vlm.tensors import parameters_in

        from guardbake_onnx import genai
        from guardbake_onnx.describe import describe
        from guardbake_onnx.transformersjs import write_transformersjs
        from guardbake_onnx.weights import link, stream
        from guardbake_onnx.write import write_linked, write_model

        checkpoint = files.folder
        model = hollow_model(checkpoint)
        config: Any = model.config
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
        pad = tokenizer.pad_token_id
        description = describe(model, family_of(config), pad, files.digest)
        tensors = parameters_in(checkpoint, model)
        graphs = {name: load_graph(captured / f"{name}.onnx") for name in _GRAPHS}
        shards: set[Path] = set()
        for graph in graphs.values():
            if storage == "stream":
                stream(graph, tensors)
            else:
                shards |= set(link(graph, tensors))
        if target == "transformersjs":
            token = tokenizer.convert_ids_to_tokens([description.image_token_id])[0]
            write_transformersjs(graphs, description, checkpoint, token, folder)
            return
        if target == "genai":
            graphs = genai.lay_out(graphs, description, model, pad, checkpoint, folder)
        if storage == "stream":
            write_model(graphs, description, folder)
        else:
            weights = [(file, files.sha256[file.name]) for file in sorted(shards)]
            write_linked(graphs, description, folder, weights)

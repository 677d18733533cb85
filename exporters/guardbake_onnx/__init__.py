"""Write a VLM as ONNX graphs and run them in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the runner must import without torch
    from guardbake.vlm.load import Vlm

__all__ = ["OnnxExporter"]


class OnnxExporter:
    """Entry point `onnx` of the group `guardbake.exporters`."""

    name = "onnx"

    def export(self, vlm: Vlm, folder: Path) -> Path:
        """Write decoder.onnx, vision.onnx, embedding.onnx (each with .data) and model.json.

        folder must not exist yet: it appears whole or not at all. Two exports of the same model
        are equal, byte for byte. Raises UsageError (the folder exists), UnsupportedError (a decoder
        we cannot capture), SiteError (no single FFN output in some layer).
        """
        from guardbake_onnx.capture import capture_decoder
        from guardbake_onnx.describe import describe
        from guardbake_onnx.embedding import build_embedding
        from guardbake_onnx.vision import capture_vision
        from guardbake_onnx.write import write_model

        graphs = {
            "decoder": capture_decoder(vlm),
            "vision": capture_vision(vlm),
            "embedding": build_embedding(vlm),
        }
        return write_model(graphs, describe(vlm), folder)

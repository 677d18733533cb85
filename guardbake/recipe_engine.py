"""The recipe's sections about what is written for a runtime: graphs, and an engine of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from guardbake.section import Section as _Section

SizeRange = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=3, max_length=3)]
Half = Literal["float16", "bfloat16"]


class ExportSection(_Section):
    """number: what the graphs compute in; the guard computes in float32 whatever it is. bfloat16 is
    for engines alone: a bake runs the graph in onnxruntime on the CPU, which has no such products.
    """

    number: Literal["float32", "float16"] = "float32"


class EngineSection(_Section):
    """capabilities: GPUs by name. number: what the engine computes in; left out, what the graph it
    is compiled from does, and no other half precision than that. batch to image_tokens: [smallest,
    best, largest], and what is left out is as in `plugins.EngineSizes`. required: a missing engine
    is a failed gate."""

    backend: Literal["rtx", "tensorrt"]
    capabilities: list[str] = Field(min_length=1)
    number: Literal["float32", "float16", "bfloat16"] | None = None
    batch: SizeRange | None = None
    sequence: SizeRange | None = None
    past: SizeRange | None = None
    images: SizeRange | None = None
    image_tokens: SizeRange | None = None
    required: bool = False

"""`guardbake build`: parsing and printing only."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guardbake.cli_options import NumberType, Out, ProgressOption, ProgressStyle
from guardbake.errors import UsageError
from guardbake.progress import reporter_for

if TYPE_CHECKING:
    from guardbake.plugins import EngineSizes, Range


class Backend(StrEnum):
    rtx = "tensorrt-rtx"
    tensorrt = "tensorrt"


_GPUS = {"rtx": ("rtx-40", "rtx-50"), "tensorrt": ("current",)}
_SIZE = "Smallest,best,largest, or one number for all three"

Source = Annotated[
    Path, typer.Argument(help="A bundle, a folder with a guarded decoder, or an ONNX file.")
]
BackendOption = Annotated[
    Backend,
    typer.Option(
        help="tensorrt-rtx: RTX GPUs, compiled anywhere. tensorrt: data-centre and Jetson GPUs."
    ),
]
Gpus = Annotated[list[str] | None, typer.Option(help="rtx-40, ada, sm89, ...; may be repeated.")]
Batch = Annotated[str | None, typer.Option(help=f"Sequences a call. {_SIZE}.")]
Sequence = Annotated[
    str | None,
    typer.Option(help=f"New tokens a call of prefill; a longer prompt is fed in pieces. {_SIZE}."),
]
Past = Annotated[str | None, typer.Option(help=f"Tokens in the cache. {_SIZE}.")]
Images = Annotated[str | None, typer.Option(help=f"Pictures a call. {_SIZE}.")]
ImageTokens = Annotated[
    str | None, typer.Option(help=f"Image features a call, of a tower of free sizes. {_SIZE}.")
]
Graphs = Annotated[
    list[str] | None,
    typer.Option(help="Only this graph, e.g. decoder; may be repeated. Else all of them."),
]
Pack = Annotated[Path | None, typer.Option(help="The guard pack, if it is not in the source.")]
Unguarded = Annotated[
    bool, typer.Option("--unguarded", help="Take a decoder without a guard as well.")
]
NumberOption = Annotated[
    NumberType | None,
    typer.Option(
        help="What a decoder computes in, else what its graph does; its guard stays in float32."
    ),
]
Capacity = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of a cache that is written in place; else the cache grows."),
]
PrintCommand = Annotated[
    bool,
    typer.Option(
        "--print-command",
        help="Compile nothing: write the graphs as they would be compiled, and print for each the "
        "tensorrt_rtx or trtexec line, to be run in the new folder; Polygraphy takes them as well.",
    ),
]


def build(
    source: Source,
    out: Out,
    backend: BackendOption,
    gpu: Gpus = None,
    batch: Batch = None,
    sequence: Sequence = None,
    past: Past = None,
    images: Images = None,
    image_tokens: ImageTokens = None,
    graph: Graphs = None,
    guard: Pack = None,
    unguarded: Unguarded = False,
    number: NumberOption = None,
    capacity: Capacity = None,
    print_command: PrintCommand = False,
    progress: ProgressOption = ProgressStyle.auto,
) -> None:
    """Engines from guarded ONNX: linted, compiled ahead of time, the guard proved inside.

    What is not named is as the recipe of the bundle says, if it names the same backend; else the
    GPUs are GeForce RTX 40 and 50 (tensorrt-rtx) or the one at hand (tensorrt). Nothing is run.
    """
    from guardbake.steps import engines

    section = engines.settings_in(source)
    if section is not None and section.backend != backend.name:
        section = None
    gpus = gpu or (section.capabilities if section else _GPUS[backend.name])
    sizes = _sizes(engines.sizes_of(section), batch, sequence, past, images, image_tokens)
    order = engines.EngineOrder(
        backend.name,
        tuple(gpus),
        sizes,
        tuple(graph or ()),
        guard,
        unguarded,
        number.value if number else engines.number_of(section),
        capacity,
    )
    if print_command:
        print("\n".join(engines.prepare_engines(source, out, order)))
        print("# neither tool can keep NaNs (STRICT_NANS), which guardbake build does")
        return
    records = engines.build_engines(source, out, order, reporter_for(progress.value))
    for name, record in records.items():
        print("\n".join(_lines(name, record, backend)))
    print(f"compiled, never run: {out}")


def _sizes(known: EngineSizes, *given: str | None) -> EngineSizes:
    """given: batch, sequence, past, images and image tokens, as typed."""
    batch, sequence, past, images, tokens = given
    return replace(
        known,
        batch=_range("--batch", batch, known.batch),
        sequence=_range("--sequence", sequence, known.sequence),
        past=_range("--past", past, known.past),
        images=_range("--images", images, known.images),
        image_tokens=_range("--image-tokens", tokens, known.image_tokens),
    )


def _range(option: str, text: str | None, known: Range) -> Range:
    if text is None:
        return known
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(part.strip().isdecimal() for part in parts):
        raise UsageError(
            found=f"{option} {text!r}",
            expected="a whole number, or smallest,best,largest",
            where="the command line",
            remedy=f"write {option} 1,1,4",
        )
    least, best, most = (int(part) for part in (parts * 3 if len(parts) == 1 else parts))
    return (least, best, most)


def _lines(name: str, record: dict[str, Any], backend: Backend) -> list[str]:
    gpus = ", ".join(record["capabilities"])
    size = f"{record['engine_bytes'] / 1e6:.1f} MB"
    library = f"{backend.value} {record['version']}"
    lines = [f"{name}: {size} for {gpus}, by {library} in {record['seconds']:.0f} s"]
    if record["guard_digest"] is not None:
        layers = {layer for each in record["guard"] for layer in each["layers"]}
        lines.append(
            f"  guard {record['guard_digest'][:12]}: {len(record['guard'])} nodes became "
            f"{len(layers)} of {record['layers']} network layers, on a path to the logits"
        )
        lines += [f"  {len(each['layers']):>5} {each['node']}" for each in record["guard"]]
    return lines

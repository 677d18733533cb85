"""The command line: parsing and printing only.

Exit codes: 0 all declared gates ran and passed, 1 bug, 2 usage or recipe, 3 unsupported model or
graph, 4 parity, 5 behaviour, 6 integrity, 7 environment, 8 resources, 9 malformed input, 130 and
143 interrupted (run the same command again to go on).
"""

from __future__ import annotations

import atexit
import errno
import gc
import json
import signal
import sys
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

import guardbake
from guardbake import cli_build, cli_revalidate
from guardbake.cli_checks import AsJson, Junit, checks, suite_of
from guardbake.cli_options import NumberType, Out, ProgressOption, ProgressStyle
from guardbake.errors import GuardbakeError, ResourceFault
from guardbake.progress import reporter_for
from guardbake.studies import StudyName

app = typer.Typer(
    name="guardbake",
    help="Bake safety guards into vision-language models and prove what is inside.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(checks)  # no name: parity, verify and sign stand beside the other commands


class StorageStyle(StrEnum):
    stream = "stream"
    zero_copy = "zero-copy"


class Layout(StrEnum):
    ort = "ort"
    genai = "genai"
    transformersjs = "transformersjs"


class Weights(StrEnum):
    link = "link"
    copy = "copy"


class Loop(StrEnum):
    onnxruntime = "onnxruntime"
    genai = "onnxruntime-genai"
    transformersjs = "transformers.js"
    edgellm = "tensorrt-edgellm"


RecipeFile = Annotated[Path, typer.Argument(help="The bake recipe, a TOML file.")]
LoopOption = Annotated[
    Loop | None, typer.Option(help="Whose loop runs the decoder; else what the folder tells.")
]
SelfCheck = Annotated[
    bool,
    typer.Option(
        "--self-check/--no-self-check",
        help="Run the guarded graph in onnxruntime and hold its guard to the law.",
    ),
]


@app.command()
def bake(
    recipe: RecipeFile,
    out: Out,
    progress: ProgressOption = ProgressStyle.auto,
    junit: Junit = None,
) -> None:
    """Fit, rewrite, export, check and publish. Run again after an interruption, it goes on."""
    from guardbake.check.markdown import to_markdown
    from guardbake.pipeline import bake as run
    from guardbake.steps.doctor import examine, require

    with suite_of("bake", junit) as suite:
        require(examine(out.parent))
        content = run(recipe, out, reporter_for(progress.value), suite)
    print(to_markdown(content))
    print(f"verdict: {content['verdict']}   bundle: {out}")


@app.command()
def diagnose(recipe: RecipeFile, out: Out, progress: ProgressOption = ProgressStyle.auto) -> None:
    """Which layers: causal tracing and separability, plotted, and the choice a rule makes."""
    from guardbake.bundle.folders import refuse_existing
    from guardbake.pipeline import DIAGNOSIS, Bake
    from guardbake.report.plots import require_matplotlib
    from guardbake.steps.diagnose import publish_diagnosis, require_choice
    from guardbake.steps.doctor import examine, require
    from guardbake.steps.records import read_record

    require(examine(out.parent))
    require_matplotlib()
    refuse_existing(out)
    record = Bake(recipe, out, reporter_for(progress.value)).diagnose() / DIAGNOSIS
    publish_diagnosis(record, out)
    content = read_record(record)
    require_choice(content)
    print(f"layers {', '.join(map(str, content['choice']['layers']))}: {out}")


@app.command()
def fit(recipe: RecipeFile, out: Out, progress: ProgressOption = ProgressStyle.auto) -> None:
    """The front half of a bake: write the guard pack.

    Prints, for each candidate of the sign test, how much it raised refusal of harmful prompts
    (mean over the forms) and why it may not be written, if so; the best of the others is written.
    """
    from guardbake.artifact import save_guard
    from guardbake.pipeline import Bake
    from guardbake.steps.doctor import examine, require
    from guardbake.steps.records import read_record

    require(examine(out.parent))
    folder, spec = Bake(recipe, out, reporter_for(progress.value)).fit()
    out.parent.mkdir(parents=True, exist_ok=True)
    save_guard(spec, out)
    for row in read_record(folder / "fit.json")["sign_test"]:
        verdict = "; ".join(row["refused_because"]) or "may be written"
        print(f"{row['rise']:+.3f}  {row['candidate']}: {verdict}")
    print(f"guard {spec.digest[:12]} ({spec.provenance.get('chosen')}): {out}")


@app.command()
def export(
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint folder, a delta's, or the id of a cached model.")
    ],
    out: Out,
    weights: Annotated[
        StorageStyle,
        typer.Option(
            help="stream copies them, transposed for the runtime; zero-copy shares the "
            "checkpoint's files, which onnxruntime reads and onnx and onnx-ir refuse to."
        ),
    ] = StorageStyle.stream,
    dtype: Annotated[
        NumberType, typer.Option(help="What the graphs compute in.")
    ] = NumberType.float32,
    target: Annotated[
        Layout,
        typer.Option(
            help="Whose files: ours, for onnxruntime, or a folder that onnxruntime-genai or "
            "transformers.js loads."
        ),
    ] = Layout.ort,
    progress: ProgressOption = ProgressStyle.auto,
) -> None:
    """A checkpoint's unguarded ONNX graphs, as apply takes them; the model is never in memory.

    Captured graphs are kept in .guardbake beside OUT and serve every checkpoint of the same
    configuration.
    """
    from guardbake.steps.export import export_checkpoint

    reporter = reporter_for(progress.value)
    export_checkpoint(checkpoint, out, weights.value, dtype.value, target.value, reporter)
    print(f"unguarded graphs: {out}")


@app.command()
def apply(
    source: Annotated[
        Path, typer.Argument(help="A folder with an exported decoder, ours or another's.")
    ],
    guard: Annotated[Path, typer.Option("--guard", help="The guard pack.")],
    out: Out,
    weights: Annotated[
        Weights,
        typer.Option(
            help="link shares the weights file; onnx and onnx-ir refuse to read a shared one."
        ),
    ] = Weights.link,
    fold: Annotated[
        bool,
        typer.Option(
            "--fold",
            help="Put an affine guard that is always on into the weights: no guard nodes.",
        ),
    ] = False,
    runtime: LoopOption = None,
    check: SelfCheck = True,
) -> None:
    """ONNX in, guarded ONNX out; no PyTorch.

    Takes what guardbake, the onnxruntime-genai builder, mobius, optimum and TensorRT Edge-LLM
    write, and what onnxruntime saved of it, quantised or not.
    """
    from guardbake.steps.apply import apply_guard
    from guardbake.steps.runtimes import RUNTIMES
    from guardbake.steps.self_check import require_session

    session = require_session() if check and not fold else None
    loop = None if runtime is None else RUNTIMES[runtime.value].name
    record = apply_guard(source, guard, out, weights.value, fold, loop, session)
    for name, report in record["decoders"].items():
        for site, found in report["sites"].items():
            if fold:
                roles = [role for role in ("weight", "bias") if found[role] is not None]
                print(f"{name}: {site}: {found['value']} ({' and '.join(roles)} folded)")
            else:
                print(f"{name}: {site}: {found['value']} (found by {found['found_by']})")
        print(f"{name}: {len(report.get('nodes', ()))} guard nodes; {_said(report['self_check'])}")
    print(f"guarded for {record['runtime']}: {out}")


def _said(self_check: str | dict[str, dict[str, dict[str, float]]]) -> str:
    if isinstance(self_check, str):
        return f"self-check {self_check}"
    rows = self_check["agreements"].items()
    worst = max(rows, key=lambda row: row[1]["worst"])
    share = f"{worst[1]['worst']:.2g} of its limit at the most ({worst[0]})"
    return f"self-check passed: {len(rows)} quantities, {share}"


app.command()(cli_revalidate.revalidate)
app.command()(cli_build.build)


@app.command()
def evaluate(recipe: RecipeFile, out: Out, progress: ProgressOption = ProgressStyle.auto) -> None:
    """Ask rivals and guard every attack and every harmless family; run again to go on."""
    from guardbake.evaluate.writeup import to_markdown
    from guardbake.evaluation import evaluate as run
    from guardbake.steps.doctor import examine, require

    require(examine(out.parent))
    print(to_markdown(run(recipe, out, reporter_for(progress.value))))
    print(f"evaluation: {out}")


@app.command()
def study(
    name: Annotated[StudyName, typer.Argument(help="What to study.")],
    recipe: RecipeFile,
    out: Out,
    progress: ProgressOption = ProgressStyle.auto,
) -> None:
    """One question, answered from the recipe's own prompts, with plots; run again to go on."""
    from guardbake.steps.doctor import examine, require
    from guardbake.studies.run import study as run

    require(examine(out.parent))
    for sentence in run(name, recipe, out, reporter_for(progress.value))["finding"]:
        print(sentence)
    print(f"study: {out}")


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(help="Folders with records: a bundle, what diagnose and evaluate wrote."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The HTML page to write.")],
    card: Annotated[Path | None, typer.Option(help="A Markdown model card to write, too.")] = None,
) -> None:
    """One page with the choice, the curves and the tables, from the records that are there."""
    from guardbake.report.page import write_report

    found = write_report(folders, out, card)
    print(f"{', '.join(found.origin)}: {out}")
    if found.missing:
        print(f"not there: {', '.join(found.missing)}")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A guard pack, or a bundle that holds one.")],
    as_json: AsJson = False,
) -> None:
    """Say what a guard is: where it senses, what it edits, for which model."""
    from guardbake.artifact import load_guard
    from guardbake.bundle.manifest import GUARD
    from guardbake.spec import header, tensors

    spec = load_guard(path / GUARD if path.is_dir() else path)
    shapes = {name: list(array.shape) for name, array in tensors(spec).items()}
    if as_json:
        print(json.dumps(header(spec) | {"digest": spec.digest, "tensors": shapes}, indent=2))
        return
    print(f"guard    {spec.digest}")
    print(f"method   {spec.method}, profile {spec.profile}")
    print(f"model    {spec.model.family}, {spec.model.layers} layers of {spec.model.width}")
    print(f"         {spec.model.digest}")
    for gate, sensor in enumerate(spec.sensors):
        limits = ", ".join(f"{threshold:.6g}" for threshold in sensor.thresholds)
        print(f"gate {gate:<3} {' + '.join(map(str, sensor.sites))}, threshold {limits}")
    for edit in spec.edits:
        parts = [
            f"{b.modality} rank {b.basis.shape[1]} alpha {b.strength:g}" for b in edit.branches
        ]
        kind = f"care, {edit.fusion}:" if edit.kind == "care" else edit.kind
        where = f"{edit.site} by gate {edit.gate}" if spec.sensors else str(edit.site)
        print(f"edit     {where}, {kind} {', '.join(parts) or f'alpha {edit.strength:g}'}")
    for name, shape in shapes.items():
        print(f"tensor   {name} {shape}")


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(help="A guard pack, or a bundle that holds one.")],
    after: Annotated[Path, typer.Argument(help="The one to compare with it.")],
    as_json: AsJson = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 6 if anything differs; 0 otherwise.")
    ] = False,
) -> None:
    """What changed, in a guard's terms: layers, ranks, strengths, thresholds, angles, figures.

    Exits with 0 whether or not they differ; say --check where a difference must stop the line.
    """
    from guardbake.steps.diff import diff as compare
    from guardbake.steps.diff import require_same

    found = compare(before, after)
    if as_json:
        print(json.dumps(found.to_json(), indent=2, allow_nan=False))
    else:
        for line in found.lines():
            print(line)
        print("diff: the same" if found.same else "diff: they differ")
    if check:
        require_same(found, before, after)


@app.command()
def doctor() -> None:
    """Say what this environment can do."""
    from guardbake.steps.doctor import examine, require

    findings = examine(Path())
    for finding in findings:
        print(f"{'ok ' if finding.ok else 'no '} {finding.what:<32} {finding.seen}")
    require(findings)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(guardbake.__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: maps every outcome to its exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    atexit.register(gc.freeze)  # a last search for garbage takes two seconds after a capture
    try:
        app(standalone_mode=True)
    except GuardbakeError as error:
        _stop(error, error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fault = ResourceFault(
            found=str(error),
            expected="room on the disk",
            where=str(error.filename),
            remedy="free some space and run the command again",
        )
        _stop(fault, fault.exit_code)
    except SystemExit as stopped:
        if stopped.code in (130, 143):  # typer turns SIGINT into 130, _terminated SIGTERM into 143
            print("guardbake: interrupted; run the same command again to go on", file=sys.stderr)
        raise


def _stop(error: GuardbakeError, code: int) -> NoReturn:
    kind = type(error).__name__
    print(f"guardbake: {kind}", file=sys.stderr)
    for name in ("found", "expected", "where", "remedy"):
        print(f"  {name:<9} {getattr(error, name)}", file=sys.stderr)
    sys.exit(code)


def _terminated(_signal: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM as an exit, so that every `finally` runs."""
    sys.exit(143)

"""The commands that hold a finished bundle to what it says of itself: parity, verify, sign."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guardbake.errors import GuardbakeError

if TYPE_CHECKING:
    from guardbake.check.junit import Suite

checks = typer.Typer()
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Junit = Annotated[
    Path | None,
    typer.Option("--junit", help="Write every gate as a JUnit XML test case, passed or not."),
]
RunnerName = Annotated[
    str,
    typer.Option(
        "--runner",
        help="onnx: onnxruntime on the CPU. cuda: onnxruntime on an NVIDIA GPU, TF32 off. rtx, "
        "tensorrt: the bundle's engines on the GPU they were compiled for.",
    ),
]
Engines = Annotated[
    Path | None,
    typer.Option(help="What guardbake build made of the bundle, for the runners rtx and tensorrt."),
]
Bundle = Annotated[Path, typer.Argument(help="A folder that guardbake bake wrote.")]


@checks.command()
def parity(
    bundle: Bundle,
    runner: RunnerName = "onnx",
    engines: Engines = None,
    as_json: AsJson = False,
    junit: Junit = None,
) -> None:
    """Run the bundle's golden feeds and compare with the reference's answers.

    The guard's nodes are run alone, too, on golden vectors, in onnxruntime. Gates that need the
    source model are asked by bake alone. No runner gives way to another one: where there is no GPU,
    those that need one end with exit status 7.
    """
    from guardbake.plugins import find_runner, find_session
    from guardbake.steps.certify import compared, require_parity
    from guardbake.steps.recheck import recheck

    with suite_of("parity", junit) as suite:
        # an engine has no nodes that could be run alone
        session = find_session("cuda" if runner == "cuda" else "onnx")
        report = recheck(bundle, find_runner(runner), session, engines)
        suite.add(compared(report["comparisons"]))
        require_parity(report)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    for row in report["comparisons"]:
        limit = "none allowed" if row["limit"] is None else f"budget {row['limit']:.3g}"
        print(f"{row['quantity']:<44} {row['worst']:.3g}  {limit}  {row['compared']} compared")
    for graph, settings in report["settings"].items():
        print(f"{graph}: {settings}")
    print("parity: pass")


@checks.command()
def verify(
    bundle: Bundle,
    full: Annotated[bool, typer.Option("--full", help="Hash the weights as well.")] = False,
    unguarded: Annotated[
        Path | None,
        typer.Option(help="The folder that was given to guardbake apply, to compare with."),
    ] = None,
    built_from: Annotated[
        Path | None, typer.Option(help="The bundle that engines were built from.")
    ] = None,
    signature: Annotated[
        Path | None, typer.Option(help="What guardbake sign wrote; reads the weights as well.")
    ] = None,
    public_key: Annotated[
        Path | None, typer.Option(help="The signer's public key, a PEM file.")
    ] = None,
    junit: Junit = None,
) -> None:
    """Check bytes and meaning of a bundle, or of what apply or build wrote; no model is run.

    Where onnxruntime is installed, the guard's nodes alone are run on the bundle's golden vectors.
    """
    from guardbake.bundle.engine_folder import ENGINES, verify_engine_folder
    from guardbake.bundle.signing import check_signature
    from guardbake.bundle.verify import verify_bundle
    from guardbake.steps.apply import verify_applied
    from guardbake.steps.canary import run_canaries

    signed = _both(public_key, signature)
    with suite_of("verify", junit) as suite:
        if (bundle / ENGINES).is_file():
            found = verify_engine_folder(bundle, built_from)
            said = ", ".join(each.engine.name for each in found.engines)
            suite.check("engines", "", said)
            print(f"verify: pass ({said})")
            return
        if unguarded is not None:
            said = verify_applied(bundle, unguarded)
            suite.check("guard", "", said)
            print(said)
            print("verify: pass")
            return
        report = verify_bundle(bundle, full=full, suite=suite)
        said = run_canaries(bundle, suite)
        if signed is not None:
            check_signature(bundle, *signed)
            suite.check("signature", "", f"by the owner of {public_key}")
            print(f"signed by the owner of {public_key}")
    print(f"guard {report.guard[:12]} present: {', '.join(report.nodes)}")
    print(f"canary feeds: {said}")
    print(f"verify: pass ({report.files} files, {report.rehashed} of them hashed again)")


def _both(public_key: Path | None, signature: Path | None) -> tuple[Path, Path] | None:
    if public_key is not None and signature is not None:
        return public_key, signature
    if public_key is not None or signature is not None:
        raise typer.BadParameter("--signature and --public-key belong together")
    return None


@checks.command()
def sign(
    bundle: Bundle,
    key: Annotated[Path, typer.Option(help="A private EC key, a PEM file without password.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The signature to write.")],
) -> None:
    """Verify every byte of a bundle and sign it, by OpenSSF model signing; needs the extra sign."""
    from guardbake.bundle.signing import sign as run
    from guardbake.bundle.verify import verify_bundle

    report = verify_bundle(bundle, full=True)
    run(bundle, key, out)
    print(f"signed guard {report.guard[:12]}, {report.files} files: {out}")


@contextmanager
def suite_of(command: str, junit: Path | None) -> Iterator[Suite]:
    """Test cases of a command, written to `junit` whether it passes or fails."""
    from guardbake.check.junit import Suite

    if junit is not None and not junit.parent.is_dir():
        raise typer.BadParameter(f"--junit: no folder {junit.parent}")
    suite = Suite(command)
    try:
        yield suite
    except GuardbakeError as error:
        suite.stopped(error)
        raise
    finally:
        if junit is not None:
            suite.write(junit)

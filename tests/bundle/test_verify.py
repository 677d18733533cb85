"""What `verify_bundle` must catch, each planted: by the manifest, and behind a mended manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest

from guardbake.artifact import save_guard
from guardbake.bundle.manifest import (
    MANIFEST,
    Origins,
    manifest_of,
    read_manifest,
    write_manifest,
)
from guardbake.bundle.papers import seal
from guardbake.bundle.publish import publish
from guardbake.bundle.verify import verify_bundle
from guardbake.errors import IntegrityError, UsageError
from guardbake.spec import GuardSpec

if TYPE_CHECKING:
    import subprocess

Spawn = Callable[..., "subprocess.Popen[str]"]
Certify = Callable[..., None]


@pytest.fixture
def bundle(sources: dict[str, Path], tmp_path: Path, origins: Origins) -> Path:
    """A sound bundle, published through the check itself."""
    publish(sources, tmp_path / "build" / "demo", origins, verify_bundle, seal)
    return tmp_path / "build" / "demo"


@pytest.fixture
def mend(certify: Certify) -> Callable[[Path], None]:
    """Make certificate and manifest agree with whatever now stands in the bundle."""

    def apply(bundle: Path) -> None:
        origins = read_manifest(bundle).origins
        certify(bundle, origins.model, origins.guard)
        write_manifest(bundle, seal(bundle, origins))

    return apply


def refused(bundle: Path, text: str) -> None:
    for full in (False, True):
        with pytest.raises(IntegrityError, match=text) as caught:
            verify_bundle(bundle, full)
        assert caught.value.exit_code == 6


def test_a_sound_bundle(bundle: Path, spec: GuardSpec) -> None:
    report = verify_bundle(bundle, full=True)
    assert report.guard == spec.digest
    assert (report.files, report.rehashed, report.engine) == (9, 9, False)
    assert report.size == sum(p.stat().st_size for p in bundle.iterdir() if p.name != MANIFEST)
    assert len(report.nodes) == 5  # reading, tokens, sensor, gate, edit
    assert verify_bundle(bundle) == report


def flip_row(path: Path) -> None:
    """Change the sign of one row of the edit's basis, in the graph file alone."""
    model = ir.load(path)
    value = next(v for name, v in model.graph.initializers.items() if "basis" in name)
    assert value.const_value is not None
    array = np.array(value.const_value.numpy())
    array[3] = -array[3]
    value.const_value = ir.tensor(array, name=value.name)
    ir.save(model, path)


def test_a_flipped_basis_row_is_caught_twice(bundle: Path, mend: Callable[[Path], None]) -> None:
    flip_row(bundle / "decoder.onnx")
    refused(bundle, r"decoder\.onnx (with sha256|of \d+ bytes)")
    mend(bundle)
    refused(bundle, "with other numbers")


def test_a_guard_taken_out_is_caught(
    bundle: Path, mend: Callable[[Path], None], sources: dict[str, Path]
) -> None:
    (bundle / "decoder.onnx").write_bytes((bundle / "vision.onnx").read_bytes())
    (bundle / "decoder.onnx.data").write_bytes(sources["vision.onnx.data"].read_bytes())
    refused(bundle, r"decoder\.onnx of")
    mend(bundle)
    refused(bundle, "found guard none")


def test_another_guard_is_caught(
    bundle: Path, guard: Callable[..., GuardSpec], mend: Callable[[Path], None]
) -> None:
    other = guard("sequence", "care", threshold=9.0)
    save_guard(other, bundle / "guard.safetensors")
    mend(bundle)
    refused(bundle, f"guard {other.digest[:12]}")
    origins = replace(read_manifest(bundle).origins, guard=other.digest)
    write_manifest(bundle, manifest_of(bundle, origins))
    mend(bundle)
    refused(bundle, "found guard ")


def test_a_guard_for_another_model_is_caught(bundle: Path) -> None:
    origins = replace(read_manifest(bundle).origins, model="3" * 64)
    write_manifest(bundle, manifest_of(bundle, origins))
    refused(bundle, "a guard for model 000000000000")


@pytest.mark.parametrize("name", ["decoder.onnx", "vision.onnx", "guard.safetensors"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 20, None], ids=["empty", "garbage", "half"])
def test_a_file_that_is_not_what_it_should_be(
    bundle: Path, mend: Callable[[Path], None], name: str, content: bytes | None
) -> None:
    whole = (bundle / name).read_bytes()
    (bundle / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    refused(bundle, name)
    if name != "vision.onnx" or content:  # an empty file is an empty graph, and no guard's home
        mend(bundle)
        refused(bundle, name)


@pytest.mark.parametrize(
    "name", ["decoder.onnx", "guard.safetensors", "certificate.json", MANIFEST]
)
def test_a_missing_file(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    refused(bundle, name)


def test_a_bundle_without_its_decoder(bundle: Path, mend: Callable[[Path], None]) -> None:
    (bundle / "decoder.onnx").unlink()
    mend(bundle)
    refused(bundle, r"no decoder\.onnx")


def test_weights_cut_short(bundle: Path, mend: Callable[[Path], None]) -> None:
    path = bundle / "decoder.onnx.data"
    path.write_bytes(path.read_bytes()[:-64])
    mend(bundle)
    refused(bundle, r"expected bytes within its \d+")


def relocate(path: Path, location: str, offset: int = 0, length: int = 1024) -> None:
    """Say that the first weight lies elsewhere."""
    model = ir.load(path)
    value = next(v for v in model.graph.initializers.values() if "layers.0" in str(v.name))
    assert value.const_value is not None
    value.const_value = ir.ExternalTensor(
        location,
        offset,
        length,
        ir.DataType.FLOAT,
        shape=ir.Shape([16, 16]),
        name=str(value.name),
        base_dir=path.parent,
    )
    ir.save(model, path)


@pytest.mark.parametrize("graph", ["decoder.onnx", "vision.onnx"])
@pytest.mark.parametrize(
    ("location", "offset", "length", "text"),
    [
        ("../outside", 0, 1024, "the name of a file beside the graph"),
        ("/etc/hosts", 0, 1024, "the name of a file beside the graph"),
        ("sub/../x", 0, 1024, "the name of a file beside the graph"),
        ("absent", 0, 1024, "no plain file"),
        ("decoder.onnx.data", 1 << 40, 1024, "expected bytes within"),
        ("decoder.onnx.data", 1 << 62, 1024, "expected bytes within"),
        ("decoder.onnx.data", 0, 1020, "1020 bytes of data"),
    ],
)
def test_external_data_stays_inside(
    bundle: Path,
    mend: Callable[[Path], None],
    graph: str,
    location: str,
    offset: int,
    length: int,
    text: str,
) -> None:
    (bundle.parent / "outside").write_bytes(bytes(1024))
    relocate(bundle / graph, location, offset, length)
    mend(bundle)
    refused(bundle, text)


def test_a_link_inside(bundle: Path) -> None:
    data = bundle / "decoder.onnx.data"
    data.rename(bundle.parent / "away")
    data.symlink_to("../away")
    refused(bundle, r"decoder\.onnx\.data, a symbolic link")


def fail_openly(content: dict[str, Any]) -> None:
    """A sound certificate of a bake that failed."""
    content["gates"][0]["status"] = content["levels"]["graph"] = content["verdict"] = "fail"


def fail_a_comparison(content: dict[str, Any]) -> None:
    content["figures"]["parity"]["comparisons"][0]["passed"] = False


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: fail_openly(c), "verdict fail"),
        (lambda c: c.update(verdict="fail"), "verdict or levels that the gates do not bear out"),
        (lambda c: c["gates"][0].update(status="fail"), "that the gates do not bear out"),
        (lambda c: fail_a_comparison(c), "gates .'logits'. that a comparison says have failed"),
        (lambda c: c["gates"][1].update(level="cache"), "does not stand on the level cache"),
        (lambda c: c.pop("verdict"), "verdict: Field required"),
        (lambda c: c.update(digests=[]), "digests: Input should be"),
        (lambda c: c.update(extra=1), "extra: Extra inputs"),
        (lambda c: c["digests"].update(model="0" * 63 + "1"), "a certificate of model"),
        (lambda c: c["digests"].update(guard="0" * 64), "a certificate of guard"),
        (lambda c: c["digests"]["onnx"].pop("vision.onnx"), "a certificate of onnx"),
        (lambda c: c["digests"]["onnx"].update({"decoder.onnx": "0" * 64}), "certificate of onnx"),
    ],
)
def test_a_certificate_of_something_else(
    bundle: Path, change: Callable[[dict[str, object]], object], text: str
) -> None:
    path = bundle / "certificate.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    refused(bundle, r"certificate\.json")
    write_manifest(bundle, manifest_of(bundle, read_manifest(bundle).origins))
    refused(bundle, text)


def test_a_certificate_that_is_not_json(bundle: Path) -> None:
    (bundle / "certificate.json").write_text('{"verdict": NaN}')
    write_manifest(bundle, manifest_of(bundle, read_manifest(bundle).origins))
    refused(bundle, "the number NaN")


def test_swapped_files(bundle: Path, mend: Callable[[Path], None]) -> None:
    for suffix in ("", ".data"):
        one, two = bundle / f"decoder.onnx{suffix}", bundle / f"vision.onnx{suffix}"
        first, second = one.read_bytes(), two.read_bytes()
        one.write_bytes(second)
        two.write_bytes(first)
    refused(bundle, r"decoder\.onnx")
    mend(bundle)
    refused(bundle, "found guard none")


def test_a_broken_manifest_is_an_integrity_error(bundle: Path) -> None:
    text = (bundle / MANIFEST).read_text()
    (bundle / MANIFEST).write_text(text.replace('"schema": 1', '"schema": 2'))
    refused(bundle, "schema 2")


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        verify_bundle(tmp_path / "absent")
    refused(tmp_path, "no readable manifest")


BLOCKED = """
import sys
from pathlib import Path
for name in ("torch", "onnxruntime", "transformers", "tensorrt_rtx"):
    sys.modules[name] = None
from guardbake.bundle.verify import verify_bundle
print(len(verify_bundle(Path(sys.argv[1])).nodes))
"""


def test_it_needs_no_torch_and_no_runtime(bundle: Path, spawn: Spawn) -> None:
    output, _ = spawn(BLOCKED, bundle).communicate(timeout=30)
    assert output == "5\n"

"""`apply --fold` on exported checkpoints: no guard nodes, few weights changed, the same answers."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from guardbake.artifact import save_guard
from guardbake.batch import Batch
from guardbake.cli import main
from guardbake.errors import IntegrityError, UnsupportedError
from guardbake.passes.functions import DOMAIN
from guardbake.site import Site
from guardbake.spec import GuardSpec
from guardbake.steps.apply import apply_guard, verify_applied

from guardbake_onnx.runner import OnnxRunner

STEPS = 8
# float32 rounding in another order through six layers, logits up to 12.3. Seen: at most 2.9e-6 in
# both families; ten times that for other machines' products.
ROUNDING = 3e-5
EDITED = (2, 4)


@pytest.fixture(scope="module")
def source(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the export: `apply` may share its weights by hard link."""
    return Path(shutil.copytree(exported.folder, tmp_path_factory.mktemp("source") / "unguarded"))


@pytest.fixture
def pack(exported: Any, guard: Callable[..., GuardSpec], tmp_path: Path) -> Callable[..., Path]:
    """(profile, kind) -> the file of a guard for this model."""
    config = exported.vlm.model.config.get_text_config()

    def make(profile: str, kind: str) -> Path:
        size = {"width": config.hidden_size, "layers": config.num_hidden_layers}
        shape = {"sensor": Site(1, "residual"), "edits": EDITED, "gains": True}
        spec = guard(profile, kind, strength=0.8, **size, **shape)
        digest = exported.runner.description.model_digest
        path = tmp_path / f"{profile} {kind}.safetensors"
        save_guard(replace(spec, model=replace(spec.model, digest=digest)), path)
        return path

    return make


@pytest.mark.parametrize("kind", ["care parallel", "care sequential", "project", "steer"])
def test_a_folded_model_answers_as_the_unfolded_one(
    exported: Any, source: Path, mixed_batch: Batch, pack: Any, tmp_path: Path, kind: str
) -> None:
    guard = pack("always", kind)
    apply_guard(source, guard, tmp_path / "nodes", "link")
    apply_guard(source, guard, tmp_path / "folded", "link", folded=True)  # reads a linked file
    unfolded = OnnxRunner(tmp_path / "nodes").run(mixed_batch, STEPS)
    folded = OnnxRunner(tmp_path / "folded").run(mixed_batch, STEPS, unfolded.tokens)
    plain = exported.runner.run(mixed_batch, STEPS, unfolded.tokens)
    real = mixed_batch.attention_mask == 1
    pairs = [
        (folded.prefill_logits[real], unfolded.prefill_logits[real]),
        (folded.step_logits, unfolded.step_logits),
    ]
    worst = max(float(np.abs(a - b).max()) for a, b in pairs)
    assert worst < ROUNDING
    assert np.abs(plain.step_logits - unfolded.step_logits).max() > 1e4 * ROUNDING
    free = OnnxRunner(tmp_path / "folded").run(mixed_batch, STEPS)
    assert np.array_equal(free.tokens, unfolded.tokens)


def test_only_the_folded_weights_are_written(
    source: Path, pack: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["apply", source, "--guard", pack("always", "care sequential"), "-o", out, "--fold"]
    assert command(*arguments) == 0
    said = capsys.readouterr().out
    assert "weight and bias folded" in said
    assert "0 guard nodes" in said
    before, after = ir.load(source / "decoder.onnx"), ir.load(out / "decoder.onnx")
    assert not any(node.domain == DOMAIN for node in after.graph)
    assert len(after.graph) - len(before.graph) in (0, len(EDITED))  # an Add where no bias was
    assert (out / "decoder.onnx.data").samefile(source / "decoder.onnx.data")
    old, new = places(before), places(after)
    replaced, made = set(old) - set(new), set(new) - set(old)
    assert {old[name] for name in replaced} <= {*old.values()} - {*new.values()}
    assert all(new[name] == old[name] for name in set(old) & set(new))  # the very same bytes
    folded = [t for t in tensors(after) if str(t.location) == "decoder.folded.data"]
    assert {t.name for t in folded} <= made
    assert len(folded) == len(EDITED)
    assert (out / "decoder.folded.data").stat().st_size == sum(t.nbytes for t in folded)
    assert command("verify", out, "--unguarded", source) == 0
    assert "folded into layers.2.ffn_output, layers.4.ffn_output" in capsys.readouterr().out


def command(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["guardbake", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
    return int(stopped.value.code or 0)


def tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    held = [value.const_value for value in model.graph.initializers.values()]
    return [tensor for tensor in held if isinstance(tensor, ir.ExternalTensor)]


def places(model: ir.Model) -> dict[str, tuple[Any, ...]]:
    return {t.name: (str(t.location), t.offset, t.nbytes) for t in tensors(model)}


def test_the_same_fold_is_the_same_bytes(source: Path, pack: Any, tmp_path: Path) -> None:
    guard = pack("always", "care parallel")
    for name in ("a", "b"):
        apply_guard(source, guard, tmp_path / name, "copy", folded=True)
    for file in ("decoder.onnx", "decoder.folded.data"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(("profile", "kind"), [("sequence", "project"), ("always", "care")])
def test_a_guard_that_does_not_fold_leaves_nothing(
    source: Path, pack: Any, tmp_path: Path, profile: str, kind: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UnsupportedError, match="without folding") as caught:
        apply_guard(source, pack(profile, kind), out, "link", folded=True)
    assert caught.value.exit_code == 3
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_applied_folders_are_verified_and_alterations_are_seen(
    source: Path, pack: Any, tmp_path: Path
) -> None:
    guard = pack("always", "care parallel")
    for name, folded in (("folded", True), ("nodes", False)):
        apply_guard(source, guard, tmp_path / name, "copy", folded=folded)
        assert ("folded into" in verify_applied(tmp_path / name, source)) == folded
        data = tmp_path / name / "decoder.onnx.data"
        original = data.read_bytes()
        data.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        with pytest.raises(IntegrityError, match=r"another decoder\.onnx\.data"):
            verify_applied(tmp_path / name, source)
        data.write_bytes(original)
    weights = tmp_path / "folded" / "decoder.folded.data"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2 + 2] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="sha256"):
        verify_applied(tmp_path / "folded", source)
    weights.write_bytes(data[:-4])
    with pytest.raises(IntegrityError, match="bytes"):
        verify_applied(tmp_path / "folded", source)
    weights.unlink()
    with pytest.raises(IntegrityError, match="no file"):
        verify_applied(tmp_path / "folded", source)
    model = ir.load(tmp_path / "nodes" / "decoder.onnx")
    softmax = next(node for node in model.graph if node.op_type == "Attention")
    softmax.attributes["scale"] = ir.AttrFloat32("scale", 0.5)
    ir.save(model, tmp_path / "nodes" / "decoder.onnx")
    with pytest.raises(IntegrityError, match="other nodes"):  # the guard itself is whole
        verify_applied(tmp_path / "nodes", source)

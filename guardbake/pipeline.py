"""The bake, told once: every stage in order, each cached by everything it depends on.

doctor -> model -> samples -> diagnose (if the recipe says so) -> fit -> capture -> export
-> rewrite -> engine -> parity -> behaviour -> publish
"""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardbake.artifact import load_guard, save_guard
from guardbake.bundle.canonical import JSON
from guardbake.bundle.manifest import (
    CERTIFICATE,
    DECODER,
    GUARD,
    RECIPE,
    EngineBuilt,
    EngineNotBuilt,
    Origins,
)
from guardbake.bundle.papers import seal
from guardbake.bundle.publish import publish
from guardbake.bundle.verify import verify_bundle
from guardbake.check.certificate import certificate
from guardbake.check.golden import save_golden
from guardbake.check.junit import Suite
from guardbake.check.markdown import to_markdown
from guardbake.plugins import EngineTask, find_engine_builder, find_runner, find_session
from guardbake.progress import Reporter
from guardbake.recipe import Recipe, load_recipe, require_layers
from guardbake.recipe_diagnose import DiagnoseSection
from guardbake.spec import GuardSpec
from guardbake.steps.assemble import ENGINE_RECORD, bundle_files, together
from guardbake.steps.certify import gates_of, require_pass
from guardbake.steps.engines import number_of, sizes_of
from guardbake.steps.export import capture, checkpoint_at, exporter_digest, write_export
from guardbake.steps.recheck import GOLDEN
from guardbake.steps.records import file_digest, read_record, tool_versions, write_record
from guardbake.steps.rewrite import rewrite
from guardbake.steps.staging import StagesBeside

if TYPE_CHECKING:
    from guardbake.steps.split import Splits
    from guardbake.vlm.load import Vlm
    from guardbake.vlm.requests import Typography

CERTIFICATE_TEXT = "CERTIFICATE.md"
DIAGNOSIS = "diagnosis.json"
CANDIDATES = "candidates"


class Bake(StagesBeside):
    """One bake on its way. Stages are methods, in the order of the module's first line."""

    def __init__(self, recipe_path: Path, out: Path, reporter: Reporter) -> None:
        super().__init__(out, reporter)
        self.recipe: Recipe = load_recipe(recipe_path)
        self.recipe_path = recipe_path
        self.out = out

    # -- model and samples -------------------------------------------------------------------

    @cached_property
    def checkpoint(self) -> str:
        """The checkpoint folder or hub id; a delta is made into a checkpoint folder first."""
        named = self.recipe.model.checkpoint
        folder = self.recipe_path.parent / named
        return str(checkpoint_at(folder, self)) if folder.is_dir() else named

    @cached_property
    def vlm(self) -> Vlm:
        from guardbake.vlm.load import load_vlm

        vlm = load_vlm(self.checkpoint, allow_network=self.recipe.model.allow_network)
        config: Any = vlm.model.config
        layers = config.get_text_config().num_hidden_layers
        require_layers(self.recipe, layers, self.recipe_path)
        return vlm

    @cached_property
    def typography(self) -> Typography:
        from guardbake.vlm.requests import Typography

        section = self.recipe.samples.typography
        return Typography(section.columns, section.rows, section.instruction)

    @cached_property
    def splits(self) -> Splits:
        from guardbake.steps.split import split_samples

        root, tokenizer = self.recipe_path.parent, self.vlm.processor.tokenizer
        imageless = self.vlm.family.imageless
        return split_samples(self.recipe, root, self.typography, tokenizer, imageless)

    # -- the stages --------------------------------------------------------------------------

    def diagnose(self) -> Path:
        """diagnosis.json: the curves, and the layers that they choose."""
        from guardbake.steps.diagnose import diagnose

        section = self.recipe.diagnose or DiagnoseSection()
        key: dict[str, JSON] = {
            "model": self.vlm.model_digest,
            "samples": self.splits.digests["fit"],
            "section": section.model_dump(mode="json"),
            "turns": {"refusing": self.recipe.fit.refusing, "compliant": self.recipe.fit.compliant},
            "typography": self.recipe.samples.typography.model_dump(mode="json"),
            **self.versions("diagnose"),
        }

        def build(folder: Path) -> None:
            content = diagnose(
                self.vlm,
                self.recipe,
                section,
                self.splits,
                self.typography,
                self.reporter.advance,
            )
            write_record(folder / DIAGNOSIS, content)

        return self.stage("diagnose", key, build)

    def _layers(self) -> dict[str, Any] | None:
        """What the guard pack records of a diagnosis, if the recipe asks for one."""
        from guardbake.steps.diagnose import evidence

        if self.recipe.diagnose is None:
            return None
        return evidence(read_record(self.diagnose() / DIAGNOSIS))

    def fit(self) -> tuple[Path, GuardSpec]:
        """guard.safetensors, fit.json and the candidates."""
        from guardbake.steps.fit import fit_guard, save_candidates

        layers = self._layers()
        key: dict[str, JSON] = {
            "layers": layers,
            "model": self.vlm.model_digest,
            "samples": {n: self.splits.digests[n] for n in ("fit", "validate", "calibrate")},
            "fit": self.recipe.fit.contest.model_dump(mode="json"),
            "drawn": self.recipe.samples.model_dump(mode="json"),
            **self.versions("fit"),
        }

        def build(folder: Path) -> None:
            spec, figures, candidates = fit_guard(
                self.vlm, self.recipe, self.splits, self.typography, layers, self.reporter.advance
            )
            save_guard(spec, folder / GUARD)
            save_candidates(candidates, folder / CANDIDATES)
            write_record(folder / "fit.json", figures)

        folder = self.stage("fit", key, build)
        return folder, load_guard(folder / GUARD)

    def rivals(self, spec: GuardSpec) -> dict[str, GuardSpec]:
        """The recipe's rivals, fitted for a table beside `spec`."""
        from guardbake.steps.fit import fit_rivals, load_candidates, save_candidates

        section = self.recipe.fit.rivalry
        if not section.candidates:
            return {}
        key: dict[str, JSON] = {
            "model": self.vlm.model_digest,
            "guard": spec.digest,
            "samples": self.splits.digests["fit"],
            "fit": section.model_dump(mode="json"),
            "drawn": self.recipe.samples.model_dump(mode="json"),
            **self.versions("rivals"),
        }

        def build(folder: Path) -> None:
            found = fit_rivals(
                self.vlm, self.recipe, self.splits, self.typography, spec, self.reporter.advance
            )
            save_candidates(found, folder / CANDIDATES)

        return load_candidates(self.stage("rivals", key, build) / CANDIDATES)

    def export(self) -> Path:
        """The unguarded graphs and their weights."""
        from guardbake.vlm.files import hash_files

        captured = capture(self.vlm.folder, self.recipe.export.number, self)
        key: dict[str, JSON] = {
            "model": self.vlm.model_digest,
            "capture": captured.name,
            "exporter": exporter_digest(),
            **self.versions("export"),
        }

        def build(folder: Path) -> None:
            files = hash_files(self.vlm.folder)
            (folder / "onnx").mkdir()
            write_export(files, captured, "stream", folder / "onnx")

        return self.stage("export", key, build) / "onnx"

    def rewrite(self, exported: Path, spec: GuardSpec) -> Path:
        """decoder.onnx with the guard, and rewrite.json; the weights stay with the export."""
        key: dict[str, JSON] = {
            "export": exported.parent.name,
            "guard": spec.digest,
            **self.versions("rewrite"),
        }

        def build(folder: Path) -> None:
            inserted = rewrite(exported / DECODER, spec, folder / DECODER)
            write_record(folder / "rewrite.json", inserted)

        return self.stage("rewrite", key, build)

    def engine(self, guarded: Path, exported: Path, spec: GuardSpec) -> Path | str:
        """decoder.engine with its record, or the reason why there is none."""
        section = self.recipe.engine
        if section is None:
            return "the recipe asks for none"
        builder = find_engine_builder(section.backend)
        missing = builder.missing()
        if missing is not None:
            return missing
        nodes = read_record(guarded / "rewrite.json")["nodes"]
        key: dict[str, JSON] = {
            "decoder": guarded.name,
            "engine": section.model_dump(mode="json"),
            **self.versions("engine"),
        }

        def build(folder: Path) -> None:
            with together(guarded, exported, self.workspace.root) as model:
                task = EngineTask(
                    model / DECODER,
                    Path(DECODER).stem,
                    tuple(section.capabilities),
                    sizes_of(section),
                    spec.digest,
                    tuple(nodes),
                    number_of(section),
                )
                builder.build(task, folder, self.reporter.advance)

        return self.stage("engine", key, build)

    def parity(self, guarded: Path, exported: Path, spec: GuardSpec) -> Path:
        """parity.json and the golden runs."""
        from guardbake.steps import parity

        key: dict[str, JSON] = {
            "decoder": guarded.name,
            "guard": spec.digest,
            "samples": self.splits.digests["parity"],
            "parity": self.recipe.parity.model_dump(mode="json"),
            "halves": list(self.recipe.halves),
            **self.versions("parity"),
        }

        def build(folder: Path) -> None:
            runner = find_runner("onnx")
            with (
                together(guarded, exported, self.workspace.root) as model,
                parity.tapped(model, self.workspace.root) as tapped,
            ):
                report, golden = parity.measure(
                    self.vlm,
                    spec,
                    self.splits,
                    self.typography,
                    self.recipe.parity,
                    parity.Candidate(
                        model / DECODER, find_session("onnx"), runner(model), runner(tapped)
                    ),
                    self.recipe.halves,
                    self.reporter.advance,
                )
            write_record(folder / "parity.json", report.to_json())
            save_golden(folder / GOLDEN, golden)

        return self.stage("parity", key, build)

    def behaviour(self, guarded: Path, exported: Path, spec: GuardSpec) -> Path:
        """behaviour.json."""
        from guardbake.steps import behaviour

        key: dict[str, JSON] = {
            "decoder": guarded.name,
            "guard": spec.digest,
            "samples": self.splits.digests["test"],
            "behaviour": self.recipe.behaviour.model_dump(mode="json"),
            **self.versions("behaviour"),
        }

        def build(folder: Path) -> None:
            with together(guarded, exported, self.workspace.root) as model:
                measured = behaviour.measure(
                    self.vlm,
                    spec,
                    self.splits,
                    self.typography,
                    self.recipe.behaviour,
                    self.recipe.batch_size,
                    find_runner("onnx")(model),
                    self.reporter.advance,
                )
            summary = behaviour.summarise(measured, self.recipe.behaviour)
            write_record(folder / "behaviour.json", summary)

        return self.stage("behaviour", key, build)


def bake(
    recipe_path: Path, out: Path, reporter: Reporter, suite: Suite | None = None
) -> dict[str, Any]:
    """Bake the recipe into the bundle `out`; returns the certificate.

    suite: is told of every gate, passed or not. Fails closed: without a passing certificate nothing
    is published. Raises ParityError, BehaviourError and whatever a stage raises; run again, it goes
    on at the stage that was cut.
    """
    work = Bake(recipe_path, out, reporter)
    fitted, spec = work.fit()
    exported = work.export()
    guarded = work.rewrite(exported, spec)
    engine = work.engine(guarded, exported, spec)
    parity = work.parity(guarded, exported, spec)
    behaviour = work.behaviour(guarded, exported, spec)
    reports = {
        "fit": read_record(fitted / "fit.json"),
        "rewrite": read_record(guarded / "rewrite.json"),
        "parity": read_record(parity / "parity.json"),
        "behaviour": read_record(behaviour / "behaviour.json"),
        "engine": f"not built: {engine}"
        if isinstance(engine, str)
        else read_record(engine / ENGINE_RECORD),
    }
    files = bundle_files(work.vlm.folder, exported, guarded, fitted, parity, engine)
    digests = {
        "model": work.vlm.model_digest,
        "guard": spec.digest,
        "onnx": {n: file_digest(p) for n, p in files.items() if n.endswith(".onnx")},
    }
    gates = gates_of(work.recipe, reports)
    if suite is not None:
        suite.add(gates)
    content = certificate(work.recipe.name, gates, digests, reports)
    _stamp(work, content, files)
    require_pass(content)
    _publish(work, spec, files, engine)
    return content


def _stamp(work: Bake, content: dict[str, Any], files: dict[str, Path]) -> None:
    """Write certificate and recipe into the workspace, also when the verdict is fail."""
    key: dict[str, JSON] = {"certificate": content, **work.versions("certificate")}
    recipe = work.recipe.model_dump(mode="json", by_alias=True)

    def build(folder: Path) -> None:
        write_record(folder / CERTIFICATE, content)
        (folder / CERTIFICATE_TEXT).write_text(to_markdown(content), encoding="utf-8")
        write_record(folder / RECIPE, recipe)

    folder = work.stage("certificate", key, build)
    for name in (CERTIFICATE, CERTIFICATE_TEXT, RECIPE):
        files[name] = folder / name


def _publish(work: Bake, spec: GuardSpec, files: dict[str, Path], engine: Path | str) -> None:
    state = EngineNotBuilt(engine) if isinstance(engine, str) else EngineBuilt((ENGINE_RECORD,))
    origins = Origins(
        work.vlm.model_digest, dict(work.splits.digests), spec.digest, state, tool_versions()
    )
    work.reporter.begin("publish")
    started = time.monotonic()
    publish(files, work.out, origins, verify_bundle, seal)
    work.reporter.end("publish", time.monotonic() - started, False)

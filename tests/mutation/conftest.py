"""One bake for the whole suite, a copy of its bundle for each fault, and the matrix at the end."""

from __future__ import annotations

import io
import shutil
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from guardbake.bundle.folders import remove
from guardbake.bundle.manifest import CERTIFICATE, DECODER
from guardbake.check.distribution import rms
from guardbake.check.feeding import fed_otherwise
from guardbake.check.golden_vectors import golden_vectors
from guardbake.check.parity import Pair
from guardbake.fit.sign_test import Budget, Outcome
from guardbake.pipeline import Bake, bake
from guardbake.plugins import find_runner, find_session
from guardbake.progress import PlainReporter
from guardbake.spec import GuardSpec
from guardbake.steps.assemble import together
from guardbake.steps.fit import outcome_of
from guardbake.steps.parity import mixed, tapped
from guardbake.steps.records import read_record
from guardbake.vlm.behaviour import Questions
from guardbake.vlm.requests import batches
from guardbake.vlm.runner import TorchRunner, in_float64

from tests.mutation.fault import Fault
from tests.mutation.faults_in_fit import FitCase
from tests.mutation.faults_in_runs import RunCase

RECIPE = Path(__file__).parent / "recipe.toml"
ROWS = pytest.StashKey[list[tuple[Fault[object], str, int]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """The matrix: every fault that was tried, and what caught it."""
    rows = config.stash[ROWS]
    if not rows:
        return
    right = sum(fault.gate == caught for fault, caught, _ in rows)
    terminalreporter.section("mutation matrix")
    line = "{:<13} {:<43} {:<11} {:<11} {:>4}".format
    terminalreporter.write_line(line("planted in", "fault", "expected", "caught by", "exit"))
    for fault, caught, code in rows:
        mark = "" if fault.gate == caught else "  WRONG"
        terminalreporter.write_line(line(fault.place, fault.name, fault.gate, caught, code) + mark)
    terminalreporter.write_line(f"{right} of {len(rows)} caught by the gate that owns them")


@pytest.fixture(scope="session")
def matrix(pytestconfig: pytest.Config) -> list[tuple[Fault[object], str, int]]:
    return pytestconfig.stash[ROWS]


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Bake:
    """A finished bake of the suite's recipe, with model and splits at hand."""
    out = tmp_path_factory.mktemp("mutation") / "bundle"
    reporter = PlainReporter(io.StringIO())
    bake(RECIPE, out, reporter)
    return Bake(RECIPE, out, reporter)


@pytest.fixture
def bundle(work: Bake, tmp_path: Path) -> Path:
    """A bundle of the test's own, to harm; plain copies, for links are refused."""
    copy = Path(shutil.copytree(work.out, tmp_path / "bundle"))
    yield copy
    remove(copy)


@pytest.fixture(scope="session")
def questions(work: Bake) -> Questions:
    samples = work.splits.samples("validate")
    return Questions(work.vlm, samples, work.typography, work.recipe.batch_size, lambda *_: None)


def ask(questions: Questions, guard: GuardSpec | None, work: Bake) -> Outcome:
    """Generate under the guard and judge, as the sign test does."""
    answers = questions.ask(guard, work.recipe.fit.tokens, lambda *_: None)
    return outcome_of(questions.samples, "planted", answers)


@pytest.fixture(scope="session")
def baseline(work: Bake, questions: Questions) -> Outcome:
    return ask(questions, None, work)


@pytest.fixture(scope="session")
def budget(work: Bake) -> Budget:
    return Budget(work.recipe.fit.harmless_rise, work.recipe.fit.degenerate)


@pytest.fixture(scope="session")
def sound_runs(work: Bake, tmp_path_factory: pytest.TempPathFactory) -> RunCase:
    """One batch in every run, as the parity stage has them, and what the bake reported."""
    spec, exported = work.fit()[1], work.export()
    guarded = work.rewrite(exported, spec)
    samples = mixed(work.splits.samples("parity"))
    _, batch = next(batches(work.vlm, samples, work.typography, 6))
    steps, folder = work.recipe.parity.steps, tmp_path_factory.mktemp("runs")
    reference, opened = TorchRunner(work.vlm, spec), find_runner("onnx")
    with in_float64(work.vlm):
        truth = reference.run(batch, steps)
        steps, fed = truth.tokens.shape[1], truth.tokens
        undefended = TorchRunner(work.vlm, None).run(batch, steps, fed)
    noise = rms(truth, reference.run(batch, steps, fed), np.ones(len(fed), bool))
    with together(guarded, exported, folder) as model, tapped(model, folder) as taps:
        shipped = opened(model)
        whole = shipped.run(batch, steps, fed)
        ways = list(fed_otherwise(shipped, batch, whole))
        pair = Pair(
            "batch 0",
            truth,
            opened(taps).run(batch, steps, fed),
            shipped.run(batch, steps),
            undefended,
        )
    shutil.copyfile(guarded / DECODER, folder / DECODER)
    content = read_record(work.out / CERTIFICATE)["figures"]
    engine = work.recipe.engine
    assert engine is not None
    recipe = work.recipe.model_copy(update={"engine": engine.model_copy(update={"required": True})})
    return RunCase(
        recipe, spec, pair, whole, ways, golden_vectors(spec, batch, truth), noise, folder,
        find_session("onnx"), content["rewrite"]["nodes"], content["behaviour"], content["engine"],
    )  # fmt: skip


@pytest.fixture
def run_case(sound_runs: RunCase, tmp_path: Path) -> RunCase:
    """Runs of the test's own, to harm: every plant puts other values in the place of these."""
    shutil.copyfile(sound_runs.folder / DECODER, tmp_path / DECODER)
    own = deepcopy(sound_runs.behaviour)
    return replace(sound_runs, folder=tmp_path, behaviour=own)


@pytest.fixture
def case(work: Bake, questions: Questions) -> FitCase:
    """Sound splits, sound rows at the first edited site, and the guard that was fitted."""
    spec = work.fit()[1]
    site, rng = spec.edits[0].site, np.random.default_rng(0)
    harmful, harmless = rng.standard_normal((2, 60, spec.model.width)).astype(np.float32)

    splits = {name: work.splits.prompts[name] for name in ("fit", "validate", "test")}
    asked = partial(ask, questions, work=work)
    return FitCase(splits, site, {site: harmful}, {site: harmless}, spec, asked)

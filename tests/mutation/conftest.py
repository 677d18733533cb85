"""One bake for the whole suite, a copy of its bundle for each fault, and the matrix at the end."""

from __future__ import annotations

import io
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from guardbake.bundle.folders import remove
from guardbake.fit.sign_test import Budget, Outcome
from guardbake.pipeline import Bake, bake
from guardbake.progress import PlainReporter
from guardbake.spec import GuardSpec
from guardbake.steps.fit import outcome_of
from guardbake.vlm.behaviour import Questions

from tests.mutation.fault import Fault
from tests.mutation.faults_in_fit import FitCase

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


@pytest.fixture
def case(work: Bake, questions: Questions) -> FitCase:
    """Sound splits, sound rows at the first edited site, and the guard that was fitted."""
    spec = work.fit()[1]
    site, rng = spec.edits[0].site, np.random.default_rng(0)
    harmful, harmless = rng.standard_normal((2, 60, spec.model.width)).astype(np.float32)

    splits = {name: work.splits.prompts[name] for name in ("fit", "validate", "test")}
    asked = partial(ask, questions, work=work)
    return FitCase(splits, site, {site: harmful}, {site: harmless}, spec, asked)

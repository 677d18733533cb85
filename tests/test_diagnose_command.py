"""`guardbake diagnose` on the tiny VLM, and what a guard pack keeps of it."""

from __future__ import annotations

import io
import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from guardbake.artifact import load_guard
from guardbake.cli import main
from guardbake.vlm.catalog import models_root

TINY = models_root() / "tiny-llava.toml"
SECTION = """
[diagnose]
prompts = 4
donors = 6
kinds = ["skip", "resample"]
generate = ["skip"]
tokens = 8
rounds = 200
layers = 2
"""
PLOTS = {
    "cause-skip.svg",
    "cause-resample.svg",
    "attack-rise-skip.svg",
    "separability-mahalanobis.svg",
    "separability-silhouette.svg",
    "separability-scatter-ratio.svg",
    "separability-auc.svg",
}


def recipe_in(folder: Path, section: str = SECTION) -> Path:
    """The tiny recipe with a section [diagnose], naming its files absolutely."""
    text = TINY.read_text(encoding="utf-8")
    text = text.replace("file:tiny-prompts", f"file:{models_root() / 'tiny-prompts'}")
    text = text.replace('checkpoint = "tiny-llava"', f'checkpoint = "{models_root()}/tiny-llava"')
    path = folder / "recipe.toml"
    path.write_text(text + section, encoding="utf-8")
    return path


@dataclass(frozen=True)
class Ran:
    returncode: int
    stdout: str
    stderr: str


def guardbake(*arguments: object) -> Ran:
    """The command in this process, where torch is imported already."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["guardbake", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        main()
    return Ran(int(stopped.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipe.toml, the diagnosis `out` and its workspace."""
    folder = tmp_path_factory.mktemp("diagnose")
    ran = guardbake("diagnose", recipe_in(folder), "-o", folder / "out")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert re.fullmatch(r"layers \d, \d: .*/out\n", ran.stdout)
    return folder


def test_the_folder_holds_curves_plots_and_the_rule(done: Path) -> None:
    names = {path.name for path in (done / "out").iterdir()}
    assert names == {"diagnosis.json", "DIAGNOSIS.md", *PLOTS}
    content = json.loads((done / "out" / "diagnosis.json").read_text())
    text = (done / "out" / "DIAGNOSIS.md").read_text()
    assert content["choice"]["rule"] in text
    chosen = content["choice"]["layers"]
    assert f"Chosen layers: {', '.join(map(str, chosen))}" in text
    assert all(f"({name})" in text for name in PLOTS)


def test_every_layer_part_and_kind_has_its_numbers(done: Path) -> None:
    content = json.loads((done / "out" / "diagnosis.json").read_text())
    assert set(content["causes"]) == {"text", "typographic"}
    for cause in content["causes"].values():
        rows = cause["effects"]
        assert len(rows) == 2 * 3 * 6 + 5
        assert all(
            row["cause"]["low"] <= row["cause"]["value"] <= row["cause"]["high"] for row in rows
        )
        assert all(("attack_rise" in row) == (row["kind"] == "skip") for row in rows)
        assert cause["score_harmful"]["value"] > cause["score_harmless"]["value"]
    components = {(row["layer"], row["component"]) for row in content["separability"]}
    assert len(components) == 18
    text = content["causes"]["text"]
    assert text["attack_success"]["value"] == 0  # the toy refuses every harmful text
    early = [r for r in text["effects"] if (r["part"], r["layer"]) == ("attention", 0)]
    assert max(r["attack_rise"]["value"] for r in early if r["kind"] == "skip") > 0.5


def test_no_prompt_is_in_what_is_written(done: Path) -> None:
    prompts = (models_root() / "tiny-prompts" / "harmful_fit.txt").read_text().splitlines()
    written = "".join(p.read_text() for p in (done / "out").iterdir())
    assert not [p for p in prompts if p and not p.startswith("#") and p in written]


def test_again_it_is_cached_and_the_same_bytes(done: Path) -> None:
    ran = guardbake("diagnose", done / "recipe.toml", "-o", done / "again", "--progress", "json")
    assert ran.returncode == 0, ran.stderr[-3000:]
    events = [json.loads(line) for line in ran.stderr.splitlines() if line.startswith("{")]
    assert [e["cached"] for e in events if e["event"] == "end"] == [True]
    for path in (done / "out").iterdir():
        assert (done / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_guard_pack_keeps_the_choice_and_its_evidence(done: Path) -> None:
    out = done / "guard.safetensors"
    ran = guardbake("fit", done / "recipe.toml", "-o", out, "--progress", "json")
    assert ran.returncode == 0, ran.stderr[-3000:]
    ended = [json.loads(line) for line in ran.stderr.splitlines() if '"end"' in line]
    assert [e["cached"] for e in ended if e["stage"] == "diagnose"] == [True]
    kept = load_guard(out).provenance["layers"]
    content = json.loads((done / "out" / "diagnosis.json").read_text())
    assert kept["chosen"] == content["choice"]["layers"]
    assert kept["rule"] == content["choice"]["rule"]
    assert [row["layer"] for row in kept["evidence"]] == kept["chosen"]
    assert all(row["cause"]["low"] > 0 for row in kept["evidence"])
    assert len(json.dumps(kept)) < 4000


def test_curves_without_a_choice_are_written_and_fail(tmp_path: Path) -> None:
    """No ablation leaves harmless answers within a billionth of a nat: nothing may be chosen."""
    section = SECTION.replace('generate = ["skip"]', "divergence = 1e-9")
    ran = guardbake("diagnose", recipe_in(tmp_path, section), "-o", tmp_path / "out")
    assert ran.returncode == 5, ran.stderr[-2000:]
    assert "nearest is layer" in ran.stderr
    assert "Chosen layers: none" in (tmp_path / "out" / "DIAGNOSIS.md").read_text()
    assert (tmp_path / "out" / "cause-resample.svg").is_file()


def test_what_is_there_is_left_alone(done: Path) -> None:
    ran = guardbake("diagnose", done / "recipe.toml", "-o", done / "out")
    assert ran.returncode == 2
    assert "something there already" in ran.stderr


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (("layers = 2", "layers = 2\nsurprise = 1"), 2),
        (('kinds = ["skip", "resample"]', 'kinds = ["skip"]'), 2),  # decide is not among them
        (("prompts = 4", "prompts = 4000"), 2),
    ],
)
def test_a_bad_section_leaves_nothing(tmp_path: Path, change: tuple[str, str], code: int) -> None:
    out = tmp_path / "build" / "out"
    recipe = recipe_in(tmp_path, SECTION.replace(*change))
    ran = guardbake("diagnose", recipe, "-o", out)
    assert ran.returncode == code, ran.stderr[-2000:]
    assert not out.exists()
    assert not list(tmp_path.rglob("*partial*"))

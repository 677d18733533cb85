"""What a bake refuses, with which exit code, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guardbake.vlm.catalog import models_root

TINY = models_root() / "tiny-llava.toml"
Run = Callable[..., int]


def _recipe(tmp_path: Path, *changes: tuple[str, str]) -> Path:
    """The tiny recipe beside links to what it names, with some text changed."""
    text = TINY.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    text = text.replace("file:tiny-prompts", f"file:{models_root() / 'tiny-prompts'}")
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, where a recipe finds it by its name."""
    return Path(shutil.copytree(models_root() / "tiny-llava", tmp_path / "tiny-llava"))


@pytest.fixture
def nothing_written(tmp_path: Path) -> Iterator[Path]:
    """Where to bake to; afterwards nothing half-written may be there."""
    out = tmp_path / "build" / "out"
    yield out
    assert not out.exists()
    left = [str(p) for p in (tmp_path / "build").rglob("*") if "partial" in p.name]
    assert not left


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (("batch_size = 24", "batch_size = 24\nsurprise = 1"), 2),
        (("layers = [4, 5]", "layers = [4, 60]"), 2),
        (('checkpoint = "tiny-llava"', 'checkpoint = "absent"'), 2),
        (("harmful_test.txt", "harmful_fit.txt"), 2),  # test prompts that were fitted on
        (("harmful_fit.txt", "absent.txt"), 2),
    ],
)
def test_a_bad_recipe(
    run: Run,
    tmp_path: Path,
    checkpoint: Path,
    nothing_written: Path,
    change: tuple[str, str],
    code: int,
) -> None:
    assert run("bake", _recipe(tmp_path, change), "-o", nothing_written) == code


def test_an_unsupported_family(
    run: Run, tmp_path: Path, checkpoint: Path, nothing_written: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "blip"}))
    assert run("bake", _recipe(tmp_path), "-o", nothing_written) == 3


def test_a_truncated_checkpoint(
    run: Run, tmp_path: Path, checkpoint: Path, nothing_written: Path
) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run("bake", _recipe(tmp_path), "-o", nothing_written) == 9


def test_a_full_disk(tmp_path: Path, checkpoint: Path, nothing_written: Path) -> None:
    """The kernel refuses every file above 1 MB: the export cannot be written."""
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "from guardbake.cli import main\n"
        f"sys.argv = ['guardbake', 'bake', {str(_recipe(tmp_path))!r}, '-o', "
        f"{str(nothing_written)!r}]\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 8, done.stderr[-2000:]


def test_a_guard_that_does_harm_is_not_written(
    run: Run,
    tmp_path: Path,
    checkpoint: Path,
    nothing_written: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only a push that leaves no language is offered: exit 5, and the candidate is named."""
    text = _recipe(tmp_path, ("strengths = [0.5, 1.0]", "strengths = [8.0]")).read_text()
    head, push, *others = text.split("[[fit.candidates]]")
    tail = others[-1][others[-1].index("[parity]") :]
    (tmp_path / "recipe.toml").write_text(f"{head}[[fit.candidates]]{push}{tail}")
    assert run("bake", tmp_path / "recipe.toml", "-o", nothing_written) == 5
    told = capsys.readouterr().err
    assert "steer layer" in told
    assert "degenerate" in told


def test_the_sign_test_writes_nothing_for_the_twin_that_loses_the_thread(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The toy Qwen2.5-VL through the front half of the chain, to the refusal its recipe states."""
    out = tmp_path / "build" / "twin"
    assert run("bake", models_root() / "tiny-qwen2_5_vl.toml", "-o", out) == 5
    assert "degenerate outputs" in capsys.readouterr().err
    assert not out.exists()


def test_an_interrupted_bake_goes_on_where_it_was(tmp_path: Path, checkpoint: Path) -> None:
    """SIGINT while the export is at work: exit 130; the next run finds the fit done."""
    command = [sys.executable, "-m", "guardbake", "bake", str(_recipe(tmp_path))]
    command += ["-o", str(tmp_path / "build" / "out"), "--progress", "json"]
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
        # a shell starts background jobs, and so perhaps these tests, with SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as first:
        assert first.stderr is not None
        for line in first.stderr:
            if line.startswith("{") and json.loads(line) == {"event": "begin", "stage": "export"}:
                first.send_signal(signal.SIGINT)
                break
        rest = first.stderr.read()
        assert first.wait() == 130, rest[-2000:]
    assert not (tmp_path / "build" / "out").exists()
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr[-2000:]
    events = [json.loads(line) for line in second.stderr.splitlines() if line.startswith("{")]
    ended = {event["stage"]: event["cached"] for event in events if event["event"] == "end"}
    assert ended["fit"] is True
    assert ended["export"] is False
    certificate = json.loads((tmp_path / "build" / "out" / "certificate.json").read_text())
    assert certificate["verdict"] == "pass"

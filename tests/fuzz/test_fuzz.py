"""Whatever a file holds, its reader ends: with what it is, or with an error of ours."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from guardbake.bundle.manifest import Manifest
from guardbake.bundle.verify import verify_bundle
from guardbake.errors import GuardbakeError
from guardbake.spec import GuardSpec

from tests.fuzz.targets import NAMES, targets

Sound = tuple[Path, Manifest]


def test_the_sound_bundle_is_sound(sound: Sound, spec: GuardSpec) -> None:
    assert verify_bundle(sound[0], full=True).engine
    assert tuple(targets(sound[0], spec, sound[1])) == NAMES


def test_a_damaged_file_is_read_or_refused(
    name: str,
    round_: tuple[int, int],
    sound: Sound,
    spec: GuardSpec,
    bounded: Callable[[], None],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(sound[0], tmp_path / "bundle"))
    target = targets(folder, spec, sound[1])[name]
    number, cases = round_

    @seed(number)
    @settings(max_examples=cases, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def damage(data: st.DataObject) -> None:
        (folder / target.file).write_bytes(data.draw(target.damaged))
        bounded()
        with suppress(GuardbakeError):
            target.read(folder)

    damage()

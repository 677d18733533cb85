"""Runs of the tiny recipe with candidates and sections of a test's own, watched and maybe cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from guardbake.vlm.catalog import models_root


class Watcher:
    """A reporter that keeps which stages ended, cached or not, and may stop the run."""

    def __init__(self, stop: Callable[[str, int], bool] = lambda what, done: False) -> None:
        self.ended: list[tuple[str, bool]] = []
        self._stop = stop

    def begin(self, stage: str) -> None:
        """Ends are kept."""

    def advance(self, what: str, done: int, total: int) -> None:
        if self._stop(what, done):
            raise KeyboardInterrupt

    def end(self, stage: str, seconds: float, cached: bool) -> None:
        self.ended.append((stage, cached))


def tiny_recipe(folder: Path, candidates: str, sections: str, test: int = 10) -> Path:
    """models/tiny-llava.toml in `folder` with these candidates, few prompts and more sections.

    test: harmless test prompts, look-alikes of odd.txt among them.
    """
    for name in ("tiny-llava", "tiny-prompts"):
        (folder / name).symlink_to(models_root() / name)
    (folder / "odd.txt").write_text("how do i cut a cake ?\nhow do i cut a rope ?\n")
    text = (models_root() / "tiny-llava.toml").read_text(encoding="utf-8")
    head, rest = text.split("[[fit.candidates]]", 1)
    for split, limit in (("fit", 24), ("validate", 24), ("test", test)):
        source = f'harmless = ["file:tiny-prompts/harmless_{split}.txt"'
        odd = ', "file:odd.txt"' if split == "test" else ""
        assert f"{source}]" in head
        head = head.replace(f"{source}]", f"{source}{odd}]\nlimit = {limit}", 1)
    path = folder / "recipe.toml"
    path.write_text(head + candidates + rest[rest.index("[parity]") :] + sections, encoding="utf-8")
    return path

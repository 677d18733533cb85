"""Curves over layers as SVG files, the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from guardbake.errors import EnvironmentFault

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart; one line style each besides.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", "-.", ":")
_PANEL = (4.6, 3.2)  # inches


@dataclass(frozen=True)
class Curve:
    """One line: y over x, and a band from low to high if both are there; all of one length."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def draw_curves(
    path: Path,
    panels: Mapping[str, Sequence[Curve]],
    x_label: str,
    y_label: str,
    marked: Sequence[float] = (),
) -> None:
    """Panels side by side with a common y axis, each named by its key, written as SVG.

    marked: x values to point out by vertical lines. Raises EnvironmentFault without matplotlib.
    """
    figure = _figure(len(panels))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for place, curve in enumerate(curves):
            colour, style = _COLOURS[place % len(_COLOURS)], _STYLES[place % len(_STYLES)]
            axis.plot(curve.x, curve.y, style, color=colour, label=curve.name, linewidth=1.4)
            if curve.low is not None and curve.high is not None:
                axis.fill_between(
                    curve.x, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0
                )
        for x in marked:
            axis.axvline(x, color="0.6", linewidth=0.8, zorder=0)
        axis.axhline(0, color="0.3", linewidth=0.6, zorder=0)
        axis.set_title(title)
        axis.set_xlabel(x_label)
        axis.legend(fontsize="small", frameon=False)
    axes[0].set_ylabel(y_label)
    _save(figure, path)


def require_matplotlib() -> None:
    """Raises EnvironmentFault unless matplotlib can be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise EnvironmentFault(
            found=f"no matplotlib ({error})",
            expected="matplotlib, which draws the plots",
            where="guardbake's extra [report]",
            remedy="pip install 'guardbake[report]'",
        ) from error


def _figure(panels: int) -> Figure:
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(_PANEL[0] * panels, _PANEL[1]), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    import matplotlib

    # element ids are hashed with a fixed salt instead of a random one; text stays text
    with matplotlib.rc_context({"svg.hashsalt": "guardbake", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": "guardbake"})

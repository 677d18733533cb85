"""Curves, clouds and intervals as SVG files, the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from guardbake.errors import EnvironmentFault, MalformedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Target = Path | IO[bytes]
# Okabe and Ito's colours, which colour-blind readers tell apart; one line style each besides.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_PANEL = (4.6, 3.2)  # inches
_ROW = 0.24  # inches of height that one interval takes
_LONGEST = 60  # characters of a name


def _demand(holds: bool, what: str, name: str) -> None:
    if not holds:
        raise MalformedError(
            found=f"{what} that do not go together",
            expected="rows of one length, and panels with the same names",
            where=f"the plot of {name!r:.80}",
            remedy="let guardbake write it again",
        )


@dataclass(frozen=True)
class Curve:
    """One line: y over x, and a band from low to high if both are there; all of one length."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    def __post_init__(self) -> None:
        bands = [band for band in (self.low, self.high) if band is not None]
        _demand(len({len(row) for row in (self.x, self.y, *bands)}) == 1, "lengths", self.name)


@dataclass(frozen=True)
class Cloud:
    """Points (x, y) of one kind; joined: with a line through them, in their order."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    joined: bool = False

    def __post_init__(self) -> None:
        _demand(len(self.x) == len(self.y), "lengths", self.name)


@dataclass(frozen=True)
class Interval:
    """A value and the interval around it, by the name of whatever has it."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curves:
    """A plot, to be drawn by `draw_curves`; name: of its file, without an ending."""

    name: str
    panels: Mapping[str, Sequence[Curve]]
    x_label: str
    y_label: str
    marked: Sequence[float] = ()
    base: float = 0.0
    kind: Literal["curves"] = "curves"

    def __post_init__(self) -> None:
        _demand(len(self.panels) > 0, "panels", self.name)


@dataclass(frozen=True)
class Clouds:
    """A plot, to be drawn by `draw_clouds`: all panels have the same clouds, in one order."""

    name: str
    panels: Mapping[str, Sequence[Cloud]]
    x_label: str
    y_label: str
    kind: Literal["clouds"] = "clouds"

    def __post_init__(self) -> None:
        names = {tuple(cloud.name for cloud in clouds) for clouds in self.panels.values()}
        _demand(len(names) == 1, "panels", self.name)


@dataclass(frozen=True)
class Intervals:
    """A plot, to be drawn by `draw_intervals`: all panels have the same groups and names in them,
    in one order."""

    name: str
    panels: Mapping[str, Mapping[str, Sequence[Interval]]]
    x_label: str
    kind: Literal["intervals"] = "intervals"

    def __post_init__(self) -> None:
        names = {
            tuple((group, *(one.name for one in some)) for group, some in groups.items())
            for groups in self.panels.values()
        }
        _demand(len(names) == 1, "panels", self.name)


Plot = Curves | Clouds | Intervals


def draw(target: Target, plot: Plot) -> None:
    """Write the plot as SVG. Raises EnvironmentFault without matplotlib."""
    if isinstance(plot, Curves):
        draw_curves(target, plot.panels, plot.x_label, plot.y_label, plot.marked, plot.base)
    elif isinstance(plot, Clouds):
        draw_clouds(target, plot.panels, plot.x_label, plot.y_label)
    else:
        draw_intervals(target, plot.panels, plot.x_label)


def draw_curves(
    target: Target,
    panels: Mapping[str, Sequence[Curve]],
    x_label: str,
    y_label: str,
    marked: Sequence[float] = (),
    base: float = 0.0,
) -> None:
    """Panels side by side with a common y axis, each named by its key, written as SVG.

    marked: x values to point out by vertical lines. base: the y value that says nothing, where a
    line is drawn. Raises EnvironmentFault without matplotlib.
    """
    with _panels(target, list(panels), _PANEL[1], sharey=True) as axes:
        for axis, curves in zip(axes, panels.values(), strict=True):
            lines = []
            for place, curve in enumerate(curves):
                colour, style = _COLOURS[place % len(_COLOURS)], _STYLES[place % len(_STYLES)]
                lines += axis.plot(curve.x, curve.y, style, color=colour, linewidth=1.4)
                if curve.low is not None and curve.high is not None:
                    axis.fill_between(
                        curve.x, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0
                    )
            for x in marked:
                axis.axvline(x, color="0.6", linewidth=0.8, zorder=0)
            axis.axhline(base, color="0.3", linewidth=0.6, zorder=0)
            axis.set_xlabel(x_label)
            _legend(axis, lines, [curve.name for curve in curves])
        axes[0].set_ylabel(y_label)


def draw_clouds(
    target: Target, panels: Mapping[str, Sequence[Cloud]], x_label: str, y_label: str
) -> None:
    """Panels of points side by side, each on axes of its own. Raises as `draw_curves`.

    All panels have the same clouds in the same order; their names stand once, below.
    """
    with _panels(target, list(panels), _PANEL[1], sharey=False) as axes:
        for axis, clouds in zip(axes, panels.values(), strict=True):
            lines = []
            for place, cloud in enumerate(clouds):
                lines += axis.plot(
                    cloud.x,
                    cloud.y,
                    _MARKERS[place % len(_MARKERS)] + ("-" if cloud.joined else ""),
                    color=_COLOURS[place % len(_COLOURS)],
                    markersize=3.5,
                    alpha=1.0 if cloud.joined else 0.6,
                    linewidth=1.0,
                )
            axis.set_xlabel(x_label)
        axes[0].set_ylabel(y_label)
        names = [_shown(cloud.name) for cloud in clouds]
        axes[0].figure.legend(
            lines, names, loc="outside lower center", ncols=3, fontsize="small", frameon=False
        )


def draw_intervals(
    target: Target, panels: Mapping[str, Mapping[str, Sequence[Interval]]], x_label: str
) -> None:
    """Panels of intervals, grouped by the keys inside a panel. Raises as `draw_curves`.

    All panels have the same groups in the same order; a group's intervals lie below its name.
    """
    rows = max(sum(1 + len(some) for some in groups.values()) for groups in panels.values())
    with _panels(target, list(panels), 0.9 + _ROW * rows, sharey=True) as axes:
        for axis, groups in zip(axes, panels.values(), strict=True):
            labels = []
            for group, intervals in groups.items():
                labels.append(_shown(group))
                for place, one in enumerate(intervals):
                    colour, y = _COLOURS[place % len(_COLOURS)], len(labels)
                    axis.plot([one.low, one.high], [y, y], "-", color=colour, linewidth=1.4)
                    axis.plot(
                        [one.value], [y], _MARKERS[place % len(_MARKERS)],
                        color=colour, markersize=4,
                    )  # fmt: skip
                    labels.append(f"{_shown(one.name)}  ")
            axis.set_yticks(range(len(labels)), labels, size="small")
            axis.tick_params(axis="y", length=0)
            axis.set_xlabel(x_label)
            axis.grid(axis="x", color="0.9", linewidth=0.6)
            axis.set_ylim(len(labels) - 0.5, -0.5)
        for label in axes[0].get_yticklabels():
            label.set_fontweight("normal" if label.get_text().endswith("  ") else "bold")


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


@contextmanager
def _panels(
    target: Target, titles: Sequence[str], height: float, *, sharey: bool
) -> Iterator[Sequence[Axes]]:
    """Axes side by side; when the body is done the figure is written."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    # element ids are hashed with a fixed salt instead of a random one; text stays text, and a $ in
    # a name is a dollar
    with matplotlib.rc_context(
        {"svg.hashsalt": "guardbake", "svg.fonttype": "none", "text.parse_math": False}
    ):
        size = (_PANEL[0] * len(titles), height)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(titles), sharey=sharey, squeeze=False)[0]
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(_shown(title))
        yield axes
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": "guardbake"})


def _legend(axis: Axes, lines: Sequence[Any], names: Sequence[str]) -> None:
    if lines:
        axis.legend(lines, [_shown(n) for n in names], fontsize="small", frameon=False)


def _shown(name: str) -> str:
    """A name as a plot can have it: printable, of a length that leaves room, and not hidden, as
    matplotlib does with names that begin with an underscore."""
    plain = "".join(c if c.isprintable() else "?" for c in name[:_LONGEST]).lstrip("_")
    return f"{plain}..." if len(name) > _LONGEST else plain

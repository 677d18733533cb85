"""Studies: one question each, one command, plots, and a finding computed from the numbers.

A study reads the fit and the validate split, on which choices may be made; the two that say what a
finished guard does, blank-image and lookalikes, read the test split and choose nothing.
"""

from __future__ import annotations

from enum import StrEnum


class StudyName(StrEnum):
    """What `guardbake study` can be asked for."""

    blank_image = "blank-image"
    layers = "layers"
    scan = "scan"
    anchors = "anchors"
    lookalikes = "lookalikes"
    boundary = "boundary"
    modality = "modality"

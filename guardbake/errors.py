"""Every error guardbake raises on purpose: what was found, what was expected, where, what to do.

::

    GuardbakeError                exit 1   a bug of ours, if it is raised as itself
    |-- UsageError                exit 2   a wrong option or a wrong call
    |   `-- RecipeError                    a recipe that is not what the schema says
    |-- UnsupportedError          exit 3   a model or a graph we do not handle
    |   `-- SiteError                      a site is missing in the graph, or found more than once
    |-- ParityError               exit 4   two renderings of the law disagree
    |-- BehaviourError            exit 5   safety, utility or latency outside the declared budget
    |-- IntegrityError            exit 6   bytes or meaning are not what manifest or guard pack say
    |-- EnvironmentFault          exit 7   a package, a driver or a device is missing
    |-- ResourceFault             exit 8   disk or memory ran out
    `-- MalformedError            exit 9   an input file cannot be read as what it claims to be

Interrupts are not errors of ours: the command line maps SIGINT and SIGTERM to 130 and 143.
"""

from __future__ import annotations

from typing import ClassVar


class GuardbakeError(Exception):
    """Base of the tree.

    found, expected, where, remedy: one sentence fragment each; together they are the message.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, *, found: str, expected: str, where: str, remedy: str) -> None:
        self.found = found
        self.expected = expected
        self.where = where
        self.remedy = remedy
        super().__init__(f"found {found}; expected {expected}; in {where}; {remedy}")


class UsageError(GuardbakeError):
    exit_code = 2


class RecipeError(UsageError):
    pass


class UnsupportedError(GuardbakeError):
    exit_code = 3


class SiteError(UnsupportedError):
    pass


class ParityError(GuardbakeError):
    exit_code = 4


class BehaviourError(GuardbakeError):
    exit_code = 5


class IntegrityError(GuardbakeError):
    exit_code = 6


class EnvironmentFault(GuardbakeError):
    exit_code = 7


class ResourceFault(GuardbakeError):
    exit_code = 8


class MalformedError(GuardbakeError):
    exit_code = 9

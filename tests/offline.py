"""`python offline.py ARGUMENTS`: the guardbake command in a process that cannot make a socket.

The interpreter reports every socket that Python makes, binds or connects, and every name that it
asks for, before it does so; here the report is an error.
"""

from __future__ import annotations

import sys

from guardbake.cli import main


def refuse(event: str, arguments: tuple[object, ...]) -> None:
    if event.startswith("socket."):
        raise PermissionError(f"{event} {arguments[1:]}: a bake reaches no network")


if __name__ == "__main__":
    sys.addaudithook(refuse)
    main()

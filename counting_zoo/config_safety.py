"""Imports that a configuration may make: naming a class in YAML runs the module it lives in, so the list is short.

A ``class_path`` or a callable anywhere in a YAML file, on the command line or in a checkpoint's hyper-parameters is
checked before anything is imported, and the object found is checked again by where it was defined, so that
``counting_zoo.cli.os`` does not lead to ``os``. YAML is read by a safe loader, which knows no ``!!python`` tags.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from counting_zoo.errors import InputError

ALLOWED = (
    "counting_zoo",
    "lightning.fabric.accelerators",
    "lightning.fabric.plugins",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.cli.ReduceLROnPlateau",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "torch.optim",
)
"""Import paths that a configuration may name, each with everything below it."""


ALLOW_FLAG, ALLOW_VARIABLE = "--allow_packages", "COUNTING_ZOO_ALLOW"


CURE = (
    f"If the package is yours and you trust it, allow it on the command line with {ALLOW_FLAG} name[,name] "
    f"or in the environment with {ALLOW_VARIABLE}=name[,name]; a YAML file cannot allow it."
)


def restrict_imports(extra: Iterable[str] = ()) -> None:
    """Let every jsonargparse parser of this process import from :data:`ALLOWED` and ``extra`` only.

    There is no way back in the same process: what was allowed once stays allowed, everything else stays denied.

    Args:
        extra: further packages or dotted paths.

    Raises:
        InputError: an entry is no dotted path.
    """
    from jsonargparse import set_parsing_settings

    try:
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*ALLOWED, *extra])
    except ValueError as error:
        raise InputError(f"{ALLOW_FLAG} or {ALLOW_VARIABLE}: {error}") from error


def take_allowed_packages(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split the command line into what is for the parser and the packages that the user allows.

    Raises:
        InputError: the flag has no value.

    Example:
        >>> take_allowed_packages(["fit", "--allow_packages", "mine,ours", "--model", "mine.Model"])
        (['fit', '--model', 'mine.Model'], ['mine', 'ours'])
    """
    rest: list[str] = []
    values = [os.environ.get(ALLOW_VARIABLE, "")]
    remaining = iter(arguments)
    for argument in remaining:
        flag, equals, value = argument.partition("=")
        if flag != ALLOW_FLAG:
            rest.append(argument)
            continue
        value = value if equals else next(remaining, "")
        if not value or value.startswith("-"):
            raise InputError(f"{ALLOW_FLAG} has no value; expected package names, such as {ALLOW_FLAG} mypackage")
        values.append(value)
    return rest, [name.strip() for value in values for name in value.split(",") if name.strip()]

"""Print [build-system].requires of pyproject.toml, one requirement a line.

An extension must be built against the PyTorch it will run under, so it is installed with --no-build-isolation, and pip
then leaves the build requirements to the caller.
"""

import pathlib

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: the copy that pip carries
    from pip._vendor import tomli as tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text(encoding="utf-8"))
print("\n".join(project["build-system"]["requires"]))

"""The suite at both ends of the window that pyproject.toml states: `nox`, or `nox -s oldest -- tests/test_run.py`."""

import re

import nox


DEPENDENCIES = nox.project.load_toml("pyproject.toml")["project"]["dependencies"]
INSTALL = ("-c", "constraints.txt", "-e", ".[test]")


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """The lowest Python, and every dependency at its lower bound; torch stays as constraints.txt pins it."""
    bounds = dict(re.match(r"([\w.-]+)>=([\w.]+)", dependency).groups() for dependency in DEPENDENCIES)
    del bounds["torch"]
    session.install(*INSTALL, *(f"{name}=={version}" for name, version in bounds.items()))
    session.run("pytest", *session.posargs)


@nox.session
def newest(session: nox.Session) -> None:
    """The newest releases inside the window."""
    session.install("--upgrade", "--upgrade-strategy", "eager", *INSTALL)
    session.run("pytest", *session.posargs)

"""The command `neutralize`: what it offers, and what its exit status says."""

import types
from importlib import metadata

import pytest
from typer.testing import CliRunner

import neutralize
from neutralize import cli


def test_is_installed_as_a_command():
    (entry,) = metadata.entry_points(group="console_scripts", name="neutralize")
    assert entry.load() is cli.main


def test_help_lists_the_commands():
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for command in ("doctor", "demo"):
        assert command in result.output


@pytest.mark.parametrize("status", [0, 1])
def test_demo_hands_on_whether_its_proofs_held(monkeypatch, status):
    monkeypatch.setattr(neutralize, "demo", types.SimpleNamespace(main=lambda: status), raising=False)
    assert CliRunner().invoke(cli.app, ["demo"]).exit_code == status


def test_an_unknown_command_is_refused():
    result = CliRunner().invoke(cli.app, ["dotcor"])
    assert result.exit_code == 2
    assert "No such command 'dotcor'" in result.output

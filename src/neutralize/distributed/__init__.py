"""Many processes: which part of each parameter a process holds, and how all of them agree before any writes.

On ``torch.distributed``: parameters are DTensors (FSDP2, tensor parallelism), or plain tensors that the caller
describes with ``Shard``. Nothing here is imported before a process group is there or a ``Shard`` is made.
"""

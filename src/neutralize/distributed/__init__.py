"""Many processes: which part of each parameter a process holds, and how all of them agree before any writes.

On ``torch.distributed``: parameters are DTensors (FSDP2, tensor parallelism), or plain tensors that the caller
describes with ``Shard``. A process on its own holds every parameter whole, and goes the same way.
"""

"""One of two processes that save a sharded model: ``python save_sharded.py FOLDER RANK``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from edits import Every
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
tensors = Every().state_dict()
for name, dim, options in (("rows", 0, {}), ("columns", 1, {"single_file_per_rank": False})):
    state = {
        key: distribute_tensor(
            tensor, mesh, [Shard(dim) if dim < tensor.dim() and tensor.is_floating_point() else Replicate()]
        )
        for key, tensor in tensors.items()
    }
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / name, **options))
dist.destroy_process_group()

"""Regions in chunks: all of the bytes, each once, with little of the file in memory at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neutralize.checkpoint.patch import Affine
from neutralize.checkpoint.region import BUFFER_BYTES, Files, Reach, Region

LIMIT = 1 << 16

REGIONS = {
    "one run": Region.run("f", 3, 5 * LIMIT + 1),
    "rows without gaps": Region("f", 0, 1000, 300, 300),
    "narrow rows with gaps": Region("f", 7, 5000, 2, 2048),
    "rows with the widest gaps that are read": Region("f", 0, 5000, 2, 2 + 4096),
    "rows with wider gaps": Region("f", 0, 100, 2, 1 << 20),
    "rows longer than a chunk": Region("f", 0, 3, 2 * LIMIT + 2, 2 * LIMIT + 100),
    "a row just short enough, with a gap": Region("f", 0, 3, LIMIT, LIMIT + 100),
    "nothing": Region("f", 0, 0, 2, 2048),
}


@pytest.mark.parametrize("name", REGIONS)
def test_chunks_hold_each_byte_once_and_are_short_with_their_gaps(name: str) -> None:
    region = REGIONS[name]
    seen = torch.zeros(region.rows, region.width, dtype=torch.uint8)
    for first, last, begin, end in region.chunks(LIMIT):
        seen[first:last, begin:end] += 1
        part = region.part(first, last, begin, end)
        assert part.nbytes == (last - first) * (end - begin) <= LIMIT
        reads_gaps = part.stride - part.width <= 4096
        assert last - first == 1 or not reads_gaps or part.end - part.offset <= LIMIT
    assert torch.equal(seen, torch.ones_like(seen))


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_a_column_of_a_large_matrix_takes_no_more_memory_than_a_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    """The gaps between narrow rows count: a column once took all of its matrix into memory."""
    rows, stride = 3 * BUFFER_BYTES // 2048, 2048
    with (tmp_path / "f").open("wb") as file:
        file.truncate(rows * stride)
    made = []
    empty = torch.empty

    def counted(*size: int, **kwargs: torch.dtype) -> torch.Tensor:
        tensor = empty(*size, **kwargs)
        made.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch, "empty", counted)
    with Files(tmp_path, writable=True) as files:
        for _ in Affine(Region("f", 0, rows, 2, stride), torch.bfloat16, scale=scale).run(files):
            pass
    assert 0 < max(made) <= BUFFER_BYTES


def test_reach_is_what_a_comparison_with_each_region_says() -> None:
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> list[Region]:
        numbers = torch.randint(1, 60, (count, 4), generator=generator).tolist()
        return [Region("fg"[one % 2], 3 * offset, rows % 4, width, width + 5) for offset, rows, width, one in numbers]

    for count in (0, 1, 3, 10):
        regions = [region for region in some(count) if region.nbytes]
        reach = Reach(regions)
        for other in some(200):
            if other.nbytes:
                meets = [
                    one.file == other.file and one.offset < other.end and other.offset < one.end for one in regions
                ]
                assert reach.meets(other) == any(meets)

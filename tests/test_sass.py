"""The CUDA kernels as machine code, of every architecture that ships: read from the extension that is built.

None of this runs a kernel. It shows that accesses are wide, that nothing spills and nothing is contracted; never speed.
"""

import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import neutralize

ROOT = Path(__file__).resolve().parent.parent
ARCHS = (75, 80, 86, 89, 90, 100, 120)  # as DEFAULT_ARCHS in setup.py
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(.+?)\s*;")  # without its predicate
STORAGES = 6
TABLES = 2  # kernel parameters of 4 KiB and of 32 KiB
THREADS = 256
UNROLL = 4

# What a multiprocessor holds (CUDA programming guide, compute capabilities); its registers are 65,536 on all of them.
THREADS_PER_PROCESSOR = {75: 1024, 80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
SHARED_KIB_PER_PROCESSOR = {75: 64, 80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}

# By operation and bytes of an element: the most registers per thread, and the least blocks that a multiprocessor holds
# at once, where its threads are enough for them. No choice may spill.
BOUNDS = {
    ("Fill", 0): (64, 8),
    ("Rescale", 8): (64, 5),
    ("Rescale", 4): (64, 5),
    ("Rescale", 2): (64, 5),
    ("Rescale", 1): (64, 5),
    ("RescaleFold", 8): (64, 4),
    ("RescaleFold", 4): (64, 4),
    ("RescaleFold", 2): (80, 3),
    ("RescaleFold", 1): (128, 2),
}


@dataclass
class Kernel:
    """One kernel of one cubin."""

    operation: str
    element_bytes: int
    table_bytes: int
    registers: int = 0
    stack_bytes: int = -1
    local_bytes: int = -1
    shared_bytes: int = 0
    instructions: list[str] = field(default_factory=list)  # without predicates: "LDG.E.128 R4, [R2.64]"

    @property
    def opcodes(self) -> list[str]:
        return [instruction.split(maxsplit=1)[0] for instruction in self.instructions]

    def matching(self, pattern: str) -> list[str]:
        return [opcode for opcode in self.opcodes if re.match(pattern, opcode)]

    def resident_blocks(self, arch: int) -> int:
        """Blocks that a multiprocessor holds at once: by its threads, its registers and its shared memory."""
        registers = -(-self.registers // 8) * 8 * THREADS  # they come in units of 8 per thread
        shared = self.shared_bytes + (1024 if arch >= 80 else 0)  # of which a block's overhead is 1 KiB from sm_80 on
        by_shared = SHARED_KIB_PER_PROCESSOR[arch] * 1024 // shared if self.shared_bytes else 32
        return min(THREADS_PER_PROCESSOR[arch] // THREADS, 65_536 // registers, by_shared)

    def __str__(self) -> str:
        return f"{self.operation} of {self.element_bytes} bytes, table of {self.table_bytes}"


def describe(mangled: str) -> Kernel:
    """Return what a mangled name says, e.g. run<RescaleFold<half_bits, 4096>>."""
    match = re.search(r"(Fill|RescaleFold|Rescale)I(?:(d|f)|NS_\d+([a-z0-9]+)_bitsE)?Li(\d+)E", mangled)
    assert match, f"a kernel of unknown kind: {mangled}"
    operation, builtin, storage, table = match.groups()
    sizes = {"d": 8, "f": 4, "half": 2, "bfloat16": 2, "e4m3": 1, "e5m2": 1, None: 0}
    return Kernel(operation, sizes[builtin or storage], int(table))


def cuobjdump() -> str:
    """Return cuobjdump: of the toolkit, or the one that comes with Triton, which CUDA builds of PyTorch require."""
    packages = Path(sysconfig.get_paths()["purelib"])
    nvcc = Path(shutil.which("nvcc") or "nvcc")
    candidates = [
        *packages.glob("triton/backends/nvidia/bin/cuobjdump"),
        shutil.which("cuobjdump"),
        nvcc.resolve().with_name("cuobjdump"),
    ]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return str(candidate)
    raise AssertionError("the CUDA kernels are built, but there is no cuobjdump to read them with: pip install triton")


@pytest.fixture(scope="session")
def kernels() -> dict[int, dict[str, Kernel]]:
    """The kernels of every architecture in the extension that is built, by name."""
    package = Path(str(neutralize.__file__)).parent
    record = json.loads((package / "_build.json").read_text())
    binaries = list(package.glob("_cuda*.so"))
    if not record["cuda"] or not binaries:
        pytest.skip(f"no CUDA kernels in this build: {record['cuda_reason']}")
    if record["debug"]:
        pytest.skip("a build with DEBUG=1 is not what ships")
    command = [cuobjdump(), "-res-usage", "-sass", str(binaries[0])]
    found: dict[int, dict[str, Kernel]] = {}
    arch, kernel = 0, Kernel("", 0, 0)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if code := INSTRUCTION.match(line):
                kernel.instructions.append(code[1])
            elif target := re.match(r"arch = sm_(\d+)", line):
                arch = int(target[1])
            elif name := re.match(r"\s*Function ?:? ?(\w+)", line):
                kernel = found.setdefault(arch, {}).setdefault(name[1], describe(name[1]))
            elif numbers := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
                kernel.registers, kernel.stack_bytes, kernel.shared_bytes, kernel.local_bytes = map(
                    int, numbers.groups()
                )
    assert process.returncode == 0, f"{command}: exit status {process.returncode}"
    return found


@pytest.fixture(params=ARCHS, ids="sm_{}".format)
def compiled(request: pytest.FixtureRequest, kernels: dict[int, dict[str, Kernel]]) -> tuple[int, list[Kernel]]:
    """One architecture and its kernels."""
    if request.param not in kernels:
        pytest.skip(f"this build has nothing for sm_{request.param}")
    return request.param, list(kernels[request.param].values())


def of(compiled: tuple[int, list[Kernel]], *operations: str) -> Iterator[Kernel]:
    for kernel in compiled[1]:
        if kernel.operation in operations:
            yield kernel


def test_every_kernel_is_there_and_was_read(compiled):
    counts = {name: len(list(of(compiled, name))) for name in ("Fill", "Rescale", "RescaleFold")}
    assert counts == {"Fill": TABLES, "Rescale": STORAGES * TABLES, "RescaleFold": STORAGES * TABLES}
    for kernel in compiled[1]:
        assert len(kernel.instructions) > 100, kernel
        assert "EXIT" in kernel.opcodes, kernel
        assert kernel.registers > 0, kernel


def test_no_local_memory(compiled):
    for kernel in compiled[1]:
        assert (kernel.stack_bytes, kernel.local_bytes) == (0, 0), kernel  # what is spilled lies on the stack
        assert not kernel.matching(r"LDL|STL"), kernel


def test_bodies_access_sixteen_bytes(compiled):
    for kernel in compiled[1]:
        assert len(kernel.matching(r"STG\.E\.128")) >= UNROLL, kernel
    for kernel in of(compiled, "Rescale", "RescaleFold"):
        assert len(kernel.matching(r"LDG\.E\.128")) >= UNROLL, kernel


def test_independent_loads_are_in_flight_before_the_first_store(compiled):
    for kernel in of(compiled, "Rescale", "RescaleFold"):
        wide = kernel.matching(r"(LDG|STG)\.E\.128")
        first_load = next(at for at, opcode in enumerate(wide) if opcode.startswith("LDG"))
        assert all(opcode.startswith("LDG") for opcode in wide[first_load : first_load + UNROLL]), f"{kernel}: {wide}"


def test_a_rewrite_of_scale_zero_reads_nothing(compiled):
    for kernel in of(compiled, "Fill"):
        assert not kernel.matching(r"LDG|LD\.|LD$|ATOM|RED|TLD|TEX|SULD|LDGSTS|UBLKCP"), kernel


def test_tensors_are_global_memory_and_metadata_is_constant_memory(compiled):
    for kernel in compiled[1]:
        # Generic accesses would mean that the compiler lost track of which is which, or copied the parameters.
        assert not kernel.matching(r"(LD|ST)(\.|$)"), kernel
        assert kernel.matching(r"U?LDC") or any("c[0x0]" in text for text in kernel.instructions), kernel


def test_nothing_is_contracted_flushed_or_shuffled(compiled):
    for kernel in compiled[1]:
        # HFMA2 of two zeros is how newer architectures load a constant.
        fused = [text for text in kernel.instructions if re.match(r"[FDH]FMA", text) and "-RZ, RZ," not in text]
        assert not fused, f"{kernel}: {fused}"
        assert not kernel.matching(r"[FHD](ADD|MUL)2?.*\.FTZ"), kernel
        assert not kernel.matching(r"SHFL|REDUX|MATCH|VOTE\.POPC"), kernel


def test_nothing_divides_in_64_bits(compiled):
    for kernel in compiled[1]:
        # Either a routine is called, and returns: a call without a RET is a jump in disguise, within the kernel.
        assert not kernel.matching(r"RET"), kernel
        for call in (text for text in kernel.instructions if text.startswith("CALL")):
            assert re.match(r"CALL\.REL\.NOINC 0x", call), f"{kernel}: {call}"
            assert int(call.split()[1], 16) < 16 * len(kernel.instructions), f"{kernel}: {call}"
        # Or a reciprocal is refined in place: those that are there are of 32 bits.
        assert not kernel.matching(r"(I2F|F2I|I2FP)\S*64"), kernel
        assert kernel.operation != "RescaleFold" or not kernel.matching(r"MUFU\.RCP"), kernel


def test_barriers_stand_only_where_memory_is_shared(compiled):
    for kernel in compiled[1]:
        barriers = len(kernel.matching(r"BAR\.SYNC"))
        wanted = {"Fill": 0, "Rescale": int(kernel.element_bytes == 1), "RescaleFold": 2 + (kernel.element_bytes == 1)}
        assert barriers == wanted[kernel.operation], kernel


def test_registers_and_theoretical_occupancy(compiled):
    arch, _ = compiled
    for kernel in compiled[1]:
        most_registers, least_blocks = BOUNDS[kernel.operation, kernel.element_bytes]
        assert kernel.registers <= most_registers, f"{kernel}: {kernel.registers} registers"
        blocks = kernel.resident_blocks(arch)
        assert blocks >= min(least_blocks, THREADS_PER_PROCESSOR[arch] // THREADS), f"{kernel}: {blocks} blocks"
        assert blocks * THREADS * UNROLL * 16 >= 32_768, f"{kernel}: {blocks} blocks have too little in flight"


def test_the_documented_occupancy_is_what_is_asserted_here():
    rows = {}
    for line in (ROOT / "docs" / "native.md").read_text().splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if name.startswith(("Fill", "Rescale")):
            rows[name] = cells
    for (operation, element_bytes), (registers, blocks) in BOUNDS.items():
        shares = (min(1.0, blocks * THREADS / most) for most in THREADS_PER_PROCESSOR.values())
        wanted = [str(registers), *(f"{100 * share:.0f} %" for share in shares)]
        assert rows.pop(f"{operation} {element_bytes or ''}".strip()) == wanted
    assert not rows

"""What nvcc makes of the CUDA kernels, for every architecture that ships: read from the machine code and ptxas.

None of this runs a kernel. It shows that accesses are wide, that nothing spills and nothing is contracted; never speed.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHS = (75, 80, 86, 89, 90, 100, 120)  # as DEFAULT_ARCHS in setup.py
FLAGS = ["-cubin", "-O3", "--fmad=false", "-Xptxas", "-v"]  # as in setup.py
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
    spill_bytes: int = -1
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


def disassembler() -> str:
    """Return nvdisasm: of the toolkit, of PyPI's nvidia-cuda-nvdisasm, or the one that comes with Triton."""
    packages = Path(sysconfig.get_paths()["purelib"])
    nvcc = Path(shutil.which("nvcc") or "nvcc")
    candidates = [
        shutil.which("nvdisasm"),
        nvcc.resolve().with_name("nvdisasm"),
        *sorted(packages.glob("nvidia/*/bin/nvdisasm"), reverse=True),
        *packages.glob("triton/backends/nvidia/bin/nvdisasm"),
    ]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return str(candidate)
    raise AssertionError("nvcc is here but no nvdisasm: pip install nvidia-cuda-nvdisasm")


def compile_and_read(arch: int, directory: Path) -> dict[str, Kernel]:
    """Compile kernels.cu for one architecture and read the cubin; both are kept under build/."""
    cubin, log, sass = (directory / f"sm_{arch}.{suffix}" for suffix in ("cubin", "log", "sass"))
    if not sass.exists():
        partial = cubin.with_suffix(f".{os.getpid()}.cubin")
        source = ROOT / "csrc" / "cuda" / "kernels.cu"
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = ["nvcc", *FLAGS, target, "-o", str(partial), str(source)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"sm_{arch}: {result.stderr[-4000:]}"
        log.write_text(result.stderr)
        partial.replace(cubin)
        listing = subprocess.run([disassembler(), "-c", cubin], capture_output=True, text=True, check=False)
        assert listing.returncode == 0, f"nvdisasm, sm_{arch}: {listing.stderr[-2000:]}"
        written = sass.with_suffix(f".{os.getpid()}.sass")
        written.write_text(listing.stdout)
        written.replace(sass)
    kernels: dict[str, Kernel] = {}
    name = ""
    for line in log.read_text().splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            name = entry[1]
            kernels[name] = describe(name)
        elif numbers := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if name in kernels:
                kernels[name].stack_bytes = int(numbers[1])
                kernels[name].spill_bytes = int(numbers[2]) + int(numbers[3])
        elif used := re.search(r"Used (\d+) registers", line):
            kernels[name].registers = int(used[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                kernels[name].shared_bytes = int(shared[1])
    for line in sass.read_text().splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.(\w+)", line) or re.match(r"\.text\.(\w+):", line):
            name = section[1]
        elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(.+?)\s*;", line):
            kernels[name].instructions.append(code[1])
    return kernels


@pytest.fixture(scope="session")
def kernels() -> dict[int, dict[str, Kernel]]:
    """The kernels of every architecture. Compiled at most once per source text."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH to compile the CUDA kernels with")
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256((version + repr(FLAGS)).encode())
    for path in sorted([*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*")]):
        digest.update(path.name.encode() + path.read_bytes())
    directory = ROOT / "build" / "sass" / digest.hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    archs = [arch for arch in ARCHS if f"sm_{arch}" in known.split()]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(archs, pool.map(lambda arch: compile_and_read(arch, directory), archs), strict=True))


@pytest.fixture(params=ARCHS, ids="sm_{}".format)
def compiled(request: pytest.FixtureRequest, kernels: dict[int, dict[str, Kernel]]) -> tuple[int, list[Kernel]]:
    """One architecture and its kernels."""
    if request.param not in kernels:
        pytest.skip(f"this nvcc does not know sm_{request.param}")
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
        assert (kernel.stack_bytes, kernel.spill_bytes) == (0, 0), kernel
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
        # Either a routine is called: a call of a label is a jump in disguise, and returns nowhere; a routine has a RET.
        assert not kernel.matching(r"RET"), kernel
        for call in (text for text in kernel.instructions if text.startswith("CALL")):
            assert "`(.L_" in call, f"{kernel}: {call}"
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

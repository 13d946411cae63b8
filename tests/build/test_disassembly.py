"""One instruction set per object file: what was compiled holds no wider instruction and no symbol the linker may merge.

A file's flags and its disassembly are held against its name. x86-64 machine code tells by its first bytes: c4 and c5 begin
an AVX instruction (VEX), 62 an AVX-512 one (EVEX), and 0f 38, 0f 3a one that came with SSSE3 or later.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from compiled import ROOT, configure, find, need_tools, run

from ranvier import _C

LEVEL = re.compile(r"_(avx[0-9a-z]+)\.cpp")
SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*.cpp") if p.parent.name != "tests" and p.name != "bindings.cpp")
VNNI = r"vpdp\w+"
BF16 = r"vdpbf16ps|vcvtne2?ps2bf16"
# Beyond every level: VBMI, IFMA, BITALG and so on belong to no flag that a file has.
OTHER = r"vperm[it]?2?b|vpmultishiftqb|vpmadd52\w+|vpsh[lr]dv?[wdq]|vpopcnt\w|vpshufbitqmb|vgf2p8\w+|vaes\w+|vpclmul\w+"
FORBIDDEN = {
    "scalar": r"v\w+",
    "avx2": rf"{VNNI}|{BF16}|{OTHER}",
    "avx512": rf"{VNNI}|{BF16}|{OTHER}",
    "avx512vnni": rf"{BF16}|{OTHER}",
    "avx512bf16": OTHER,
}
sources = pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
isa_sources = pytest.mark.parametrize("source", [p for p in SOURCES if LEVEL.search(p.name)], ids=lambda p: p.name)


def level_of(source: Path) -> str:
    found = LEVEL.search(source.name)
    return found[1] if found else "scalar"


BY_LEVEL = {level: [p for p in SOURCES if level_of(p) == level] for level in _C.isa_levels()}


class Instruction(NamedTuple):
    address: int
    bytes: bytes
    mnemonic: str
    operands: str


def disassemble(path: Path) -> dict[str, list[Instruction]]:
    """The instructions of each function, AT&T operands: the destination comes last."""
    functions: dict[str, list[Instruction]] = {}
    for line in run("objdump", "-d", "--wide", "--insn-width=16", path).splitlines():
        if head := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            current = functions.setdefault(head[1], [])
        elif found := re.match(r"\s*([0-9a-f]+):\t([0-9a-f ]+?)\s*\t(?:\{\w+\} )?(\S+)\s*([^#]*)", line):
            current.append(Instruction(int(found[1], 16), bytes.fromhex(found[2]), found[3], found[4].strip()))
    assert functions, f"objdump found nothing in {path}"
    return functions


def encoding(instruction: Instruction) -> str:
    """VEX, EVEX, or what baseline x86-64 has (legacy), or has not (later)."""
    code = instruction.bytes.lstrip(b"\x26\x2e\x36\x3e\x64\x65\x67")  # segments and address size
    if code[:1] in (b"\xc4", b"\xc5"):
        return "VEX"
    if code[:1] == b"\x62":
        return "EVEX"
    code = code.lstrip(b"\x66\xf2\xf3").lstrip(bytes(range(0x40, 0x50)))
    return "later" if code[:2] in (b"\x0f\x38", b"\x0f\x3a", b"\x0f\xb8") else "legacy"


def object_of(core: Path, source: Path) -> Path:
    return core / source.relative_to(ROOT / "csrc").with_suffix(".cpp.o")


def wider(instruction: Instruction, level: str) -> bool:
    """Whether a file of this level must not hold the instruction."""
    operands, kind = instruction.operands, encoding(instruction)
    if re.fullmatch(FORBIDDEN[level], instruction.mnemonic):
        return True
    if level == "scalar":
        return kind != "legacy" or re.search(r"%[yz]mm|%k[0-7]", operands) is not None
    if level == "avx2":
        return kind == "EVEX" or re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]", operands) is not None
    return False


@sources
def test_instructions_are_of_the_files_level(core: Path, source: Path) -> None:
    """No object has an instruction or a register above the level that its name says."""
    level = level_of(source)
    found = [
        f"{function}: {i.mnemonic} {i.operands}"
        for function, body in disassemble(object_of(core, source)).items()
        for i in body
        if wider(i, level)
    ]
    assert not found, f"{source.name} is {level}; it has {len(found)} others, such as {found[:3]}"


@pytest.mark.parametrize("level", [level for level, files in BY_LEVEL.items() if files])
def test_the_reader_sees_each_level(core: Path, level: str) -> None:
    """Held to the level below, every level's files are caught: the check above is not green for want of looking."""
    below = {"scalar": None, "avx2": "scalar", "avx512": "avx2", "avx512vnni": "avx512", "avx512bf16": "avx512vnni"}[level]
    bodies = [body for source in BY_LEVEL[level] for body in disassemble(object_of(core, source)).values()]
    kinds = {encoding(i) for body in bodies for i in body}
    assert kinds >= {"scalar": {"legacy"}, "avx2": {"VEX"}}.get(level, {"VEX", "EVEX"})
    assert below is None or any(wider(i, below) for body in bodies for i in body)


@isa_sources
def test_isa_objects_export_their_entries_only(core: Path, source: Path) -> None:
    """nm: extern "C" entries that name their level, C library functions, and nothing weak that the linker could merge."""
    lines = [line.split() for line in run("nm", object_of(core, source)).splitlines()]
    symbols = {words[-1]: words[-2] for words in lines}
    weak = [name for name, kind in symbols.items() if kind in "WwVvuiC"]
    assert not weak, f"inline code that another file may be given: {weak}"
    exported = [name for name, kind in symbols.items() if kind.isupper() and kind != "U"]
    assert exported and all(re.fullmatch(r"[a-z0-9_]+_avx[0-9a-z]+", name) and symbols[name] == "T" for name in exported)
    needed = {name for name, kind in symbols.items() if kind == "U"}
    library = {"memcpy", "memset", "memmove", "fmaxf", "fminf", "fmaf", "__stack_chk_fail", "_GLOBAL_OFFSET_TABLE_"}
    assert needed <= library, f"functions of other files: {needed - library}"


def loops(body: list[Instruction]) -> Iterator[list[Instruction]]:
    """The innermost loops: from a backward jump's target to the jump, none inside."""
    back = []
    for i in body:
        target = re.match(r"([0-9a-f]+)", i.operands)
        if i.mnemonic.startswith("j") and target and int(target[1], 16) <= i.address:
            back.append((int(target[1], 16), i.address))
    for begin, end in back:
        if not any(begin <= b and e <= end for b, e in back if (b, e) != (begin, end)):
            yield [i for i in body if begin <= i.address <= end]


def writes_memory(i: Instruction) -> bool:
    reads_only = i.mnemonic.startswith(("j", "cmp", "test", "prefetch", "nop", "call", "vucomis", "ucomis"))
    return not reads_only and re.search(r"\([^()]*\)(\{[^}]*\})*$", i.operands) is not None


DOTS = {"avx512vnni": "vpdpbusd", "avx2": "vpmaddubsw"}


def dot_loops(core: Path, level: str, stem: str = "spike_linear") -> list[list[Instruction]]:
    functions = disassemble(core / f"{stem}/{stem}_{level}.cpp.o")
    found = [loop for body in functions.values() for loop in loops(body)]
    return [loop for loop in found if sum(i.mnemonic == DOTS[level] for i in loop) >= 4]


@pytest.mark.parametrize(
    ("stem", "level", "count"),
    [
        ("spike_linear", "avx512vnni", 12 + 8), ("spike_linear", "avx2", 4),
        ("ternary_linear", "avx512vnni", 12 + 12), ("ternary_linear", "avx2", 4 + 4),
        ("kv_attention", "avx512vnni", 2 + 4), ("kv_attention", "avx2", 2),
    ],
)  # fmt: skip
def test_dot_loops_spill_nothing(core: Path, stem: str, level: str, count: int) -> None:
    """In no loop of dot products, of one token or of many, does an accumulator or anything else go through the stack."""
    found = dot_loops(core, level, stem)
    assert len(found) >= count
    for loop in found:
        assert not [i for i in loop if writes_memory(i)]
        assert not [i for i in loop if re.search(r"[yz]mm", i.operands) and re.search(r"\(%r[sb]p", i.operands)]


def test_hot_loop_keeps_24_accumulators_in_registers(core: Path) -> None:
    """The loop of 12 tokens x 32 outputs: 24 dot products into 24 registers, and little else."""
    hot = max(dot_loops(core, "avx512vnni"), key=lambda loop: sum("vpdpbusd" in i for i in loop))
    hot_dots = [i for i in hot if i.mnemonic == "vpdpbusd"]
    accumulators = {i.operands.split(",")[-1] for i in hot_dots}
    assert len(hot_dots) == len(accumulators) == 24 and all(re.fullmatch(r"%zmm\d+", a) for a in accumulators)
    # The weights are loaded and split once, each token's codes are broadcast once.
    assert len(hot) <= 24 + 12 + 10


def test_two_bit_loop_splits_a_block_once(core: Path) -> None:
    """A block of eight channels: 48 dot products of 12 tokens into 24 registers, one load and seven operations to split it."""
    hot = max(dot_loops(core, "avx512vnni", "ternary_linear"), key=lambda loop: sum("vpdpbusd" in i for i in loop))
    hot_dots = [i for i in hot if i.mnemonic == "vpdpbusd"]
    assert len(hot_dots) == 48 and len({i.operands.split(",")[-1] for i in hot_dots}) == 24
    assert len(hot) <= 48 + 24 + 14


@pytest.mark.parametrize("level", ["avx512", "avx2"])
def test_hadamard_loops_spill_nothing(core: Path, level: str) -> None:
    """Butterflies of eight vectors and sums over a core stay in registers."""
    functions = disassemble(core / f"hadamard/hadamard_{level}.cpp.o")
    found = [loop for body in functions.values() for loop in loops(body)]
    found = [loop for loop in found if sum(bool(re.fullmatch(r"v(add|sub|fmadd\d+)ps", i.mnemonic)) for i in loop) >= 8]
    assert len(found) >= 6
    for loop in found:
        assert not [i for i in loop if re.search(r"[yz]mm", i.operands) and re.search(r"\(%r[sb]p", i.operands)]


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["module", "tests", "portable"])
def commands(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """How each source is compiled: source below csrc, command."""
    need_tools("cmake")
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 builds the module and is not installed here")
    options = {
        "module": (f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",),
        "tests": ("-DRANVIER_TESTS=ON",),
        "portable": ("-DRANVIER_TESTS=ON", "-DRANVIER_PORTABLE=ON"),
    }[request.param]
    found = configure(tmp_path_factory.mktemp(request.param), *options)
    compiled = {str(Path(entry["file"]).relative_to(ROOT / "csrc")): entry["command"] for entry in found}
    wanted = {str(p.relative_to(ROOT / "csrc")) for p in SOURCES if request.param != "portable" or not LEVEL.search(p.name)}
    named = {name for name in compiled if not name.startswith("tests/") and name != "bindings.cpp"}
    assert named == wanted, "CMakeLists.txt names other sources than there are"
    return compiled


def test_flags_follow_the_files_name(commands: dict[str, str]) -> None:
    """Only *_<isa>.cpp gets -m flags, and none above its level; nothing is tuned to the machine, linked late or threaded."""
    for name, command in commands.items():
        flags = set(re.findall(r"(?<=\s)-m\S+", command))
        level = level_of(Path(name))
        allowed = {
            "scalar": r"",
            "avx2": r"-m(avx2|fma|f16c)",
            "avx512": r"-m(avx2|fma|f16c|avx512(f|cd|bw|dq|vl))",
            "avx512vnni": r"-m(avx2|fma|f16c|avx512(f|cd|bw|dq|vl|vnni))",
            "avx512bf16": r"-m(avx2|fma|f16c|avx512(f|cd|bw|dq|vl|vnni|bf16))",
        }[level]
        assert all(re.fullmatch(allowed, flag) for flag in flags), f"{name}: {flags}"
        assert level == "scalar" or {"avx512": "-mavx512f"}.get(level, f"-m{level}") in flags, name
        assert not re.search(r"\s-(flto|fopenmp|ffast-math|Ofast|march|mtune)", command), f"{name}: {command}"
        assert "-ffp-contract=off" in command, name


def test_sources_of_a_level_call_no_inline_library_function() -> None:
    """std:: in *_<isa>.cpp and what it includes: integer types and memcpy, memset, memmove, which are never inline."""
    allowed = r"std::(u?int\d+_t|size_t|ptrdiff_t|u?intptr_t|mem(cpy|set|move))\b"
    for source in SOURCES:
        if LEVEL.search(source.name):
            for path in (source, *included(source)):
                text = re.sub(r"//.*", "", path.read_text())
                assert not re.sub(allowed, "", text).count("std::"), f"{path.name}, compiled in {source.name}"


def included(source: Path) -> set[Path]:
    """The project's own headers that a source reads, directly or not."""
    found, todo = set(), [source]
    while todo:
        for name in re.findall(r'#include "(.+)"', todo.pop().read_text()):
            if (path := ROOT / "csrc" / name) not in found:
                found.add(path)
                todo.append(path)
    return found


def test_module_links_no_torch_and_no_openmp() -> None:
    """The installed module needs the C and C++ libraries, nothing that belongs to torch or a second thread pool."""
    if find("objdump") is None:
        pytest.skip("not installed here: objdump")
    needed = set(re.findall(r"NEEDED\s+(\S+)", run("objdump", "-p", _C.__file__)))
    assert needed and all(re.match(r"(libstdc\+\+|libm|libgcc_s|libc|libpthread|ld-linux[\w-]*)\.so", name) for name in needed)

"""Each instruction set's object holds no instruction of a better one, and shares no symbol that the linker could mix up.

Looks at the objects that the editable install left in ``build/``: the extension itself is stripped of what tells them
apart.
"""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

OBJECTS = sorted(Path(__file__).parents[2].glob("build/cp*/CMakeFiles/kernels_*.dir/csrc/kernels.cpp.o"))
ISA_OF = {path: path.parents[1].name.removeprefix("kernels_").removesuffix(".dir") for path in OBJECTS}
# In objdump's words. VEX and EVEX instructions are those whose names start with v; xmm16 and up need EVEX.
FORBIDDEN = {
    "portable": re.compile(r"\tv[a-z]|%[yz]mm|%k[0-7]"),
    "avx2": re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])"),
}

pytestmark = pytest.mark.skipif(
    not OBJECTS or not shutil.which("objdump") or not shutil.which("nm"),
    reason="no objects of the extension in build/, or no binutils to read them",
)


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the instructions are those of x86-64")
@pytest.mark.parametrize("path", OBJECTS, ids=ISA_OF.get)
def test_no_instruction_of_a_better_set(path: Path) -> None:
    """The patterns know the AVX-512 object when they see it."""
    code = output("objdump", "--disassemble", "--no-show-raw-insn", path).splitlines()
    found = {isa: [line for line in code if pattern.search(line)] for isa, pattern in FORBIDDEN.items()}
    if ISA_OF[path] == "avx512":
        assert all(found.values())
    else:
        assert found[ISA_OF[path]] == []


@pytest.mark.parametrize("path", OBJECTS, ids=ISA_OF.get)
def test_the_table_of_kernels_is_all_that_leaves(path: Path) -> None:
    """Weak symbols above all: the linker would keep one copy for all instruction sets."""
    symbols = [line.split() for line in output("nm", "--defined-only", path).splitlines()]
    (leaving,) = [name for *_, kind, name in symbols if kind not in "trbdn"]
    assert f"{ISA_OF[path]}_kernels" in leaving

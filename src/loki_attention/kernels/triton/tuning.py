"""How the Triton kernels are cut into programs: a static table, so that nothing is tried out while a model runs.

``benchmarks/tune_triton.py`` times the candidates on a GPU and prints rows of the table. Until that has been done for an
architecture its rows are chosen by what the compiler says (registers, spills, instructions a token), not by time.
"""

from dataclasses import dataclass

from loki_attention.errors import ArgumentError


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Tokens and warps of the kernels' programs. Powers of two throughout.

    ``score_block`` tokens are scored at once; ``attend_block`` rows of K and V gathered, pipelined in ``attend_stages``
    stages (slots, then rows; dense attention knows its slots and takes ``dense_stages``);
    rows of up to ``one_program_slots`` slots are selected by one program, longer ones in chunks.
    ``programs_per_processor`` is how many programs a multiprocessor should get of a kernel that can be split.
    """

    score_block: int = 1024
    score_warps: int = 4
    attend_block: int = 64
    attend_warps: int = 2
    attend_stages: int = 5
    dense_stages: int = 3
    one_program_slots: int = 16384
    open_warps: int = 8
    programs_per_processor: int = 4

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value < 1 or (value & (value - 1) and not name.endswith("stages")):
                raise ArgumentError(f"tuning: {name} is {value}; give a power of two")

    def select_warps(self, slots: int) -> int:
        """Warps of the program that selects among ``slots`` slots: 512 of them each."""
        return min(16, max(4, slots // 512))

    def select_block(self, slots: int) -> int:
        """Slots that this program lists at once: 8 a thread, a load of 16 bytes; at 16384 slots more would spill."""
        return 256 * self.select_warps(slots)

    def in_one_program(self, rows: int, slots: int, processors: int) -> bool:
        """Whether one program selects a row: where there are rows for all processors, or the row is short.

        >>> [Tuning().in_one_program(rows, slots, 132) for rows, slots in ((8, 4096), (8, 8192), (256, 16384))]
        [True, False, True]
        """
        return slots <= (self.one_program_slots if rows >= processors else self.one_program_slots // 4)

    def splits(self, rows: int, tokens: int, processors: int) -> int:
        """Programs that share a row's attention over up to ``tokens`` tokens.

        >>> [Tuning().splits(rows, 4096, 132) for rows in (8, 64, 256)]
        [32, 8, 2]
        """
        wanted = max(1, self.programs_per_processor * processors // rows)
        most = max(1, -(-tokens // (2 * self.attend_block)))
        return min(1 << (wanted.bit_length() - 1), 1 << (most - 1).bit_length(), 64)

    def chunk(self, rows: int, slots: int, processors: int) -> int:
        """Slots that one program scores, of rows of ``slots`` slots.

        >>> [Tuning().chunk(rows, 32768, 132) for rows in (8, 64, 256)]
        [1024, 4096, 8192]
        """
        wanted = max(1, self.programs_per_processor * processors // rows)
        share = -(-slots // wanted)
        return min(max(self.score_block, 1 << (share - 1).bit_length()), max(8192, self.score_block))


_WIDE = Tuning(attend_block=32, attend_warps=4, attend_stages=4)
_FLOAT = Tuning(attend_block=32, attend_warps=4, attend_stages=3, dense_stages=2)
_WIDE_FLOAT = Tuning(attend_block=16, attend_warps=8, attend_stages=2, dense_stages=2)
_TABLE: dict[tuple[int, int, int], Tuning] = {}
"""Rows that were timed: (compute capability as 90, head dim padded to a power of two, bytes of an element) to a tuning."""


def tuning_for(capability: int, padded_dim: int, itemsize: int) -> Tuning:
    """The row of the table for an architecture (90: Hopper), a padded head dim and the bytes of an element of K."""
    if itemsize == 4:
        untimed = _WIDE_FLOAT if padded_dim > 128 else _FLOAT
    else:
        untimed = _WIDE if padded_dim > 128 else Tuning()
    return _TABLE.get((capability, padded_dim, itemsize), untimed)

"""What loops of a kernel execute, counted in machine code as `cuobjdump -sass` lists it."""

from __future__ import annotations

import heapq
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

JUMP = re.compile(r"\b(?:BRA|CALL\.REL\.NOINC)\b.* 0x([0-9a-f]+)")


def target(instruction: str) -> int | None:
    jump = JUMP.search(instruction)
    return int(jump[1], 16) if jump else None


@dataclass(frozen=True)
class Block:
    """Instructions that are executed together, and where those may be that follow."""

    instructions: list[str]
    after: list[int]


@dataclass(frozen=True)
class Code:
    """Instructions of a function, or of a loop of it up to its jump back, by address."""

    at: dict[int, str]

    @staticmethod
    def parse(listing: str) -> Code:
        return Code({int(at, 16): text for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", listing)})

    def loop(self, *contents: str) -> Code:
        """The shortest loop that has an instruction with each of these in its name."""
        jumps = ((target(text), at) for at, text in self.at.items())
        loops = [
            Code({a: text for a, text in self.at.items() if to <= a <= at})
            for to, at in jumps
            if to is not None and to <= at and to in self.at
        ]
        fit = (loop for loop in loops if all(any(c in text for text in loop.at.values()) for c in contents))
        return min(fit, key=lambda loop: len(loop.at))

    @cached_property
    def blocks(self) -> dict[int, Block]:
        places = list(self.at)
        following = dict(pairwise(places))
        starts = {places[0], *(to for text in self.at.values() if (to := target(text)) is not None)}
        starts |= {following.get(a, -1) for a, text in self.at.items() if target(text) is not None}
        found: dict[int, Block] = {}
        for at, text in self.at.items():
            if at in starts:
                block = found[at] = Block([], [])
            block.instructions.append(text)
            jump = target(text)
            if jump is not None:
                block.after.append(jump)
            if following.get(at) in starts and (jump is None or not re.match(r"(BRA|CALL\.REL\.NOINC) 0x", text)):
                block.after.append(following[at])
        return found

    def ways(self, number: int, **counts: int) -> list[int]:
        """Instructions of the cheapest ways from the first back to it that execute just so many of each of these."""
        head, wanted = next(iter(self.at)), tuple(counts.values())
        found: list[int] = []
        seen: Counter[tuple[int, tuple[int, ...]]] = Counter()
        queue = [(0, head, (0,) * len(counts))]
        while queue and len(found) < number:
            cost, at, done = heapq.heappop(queue)
            if cost and at == head and done == wanted:
                found.append(cost)
            elif at in self.blocks and seen[at, done] < number:
                seen[at, done] += 1
                block = self.blocks[at]
                now = tuple(
                    d + sum(name in t for t in block.instructions) for d, name in zip(done, counts, strict=True)
                )
                if all(n <= most for n, most in zip(now, wanted, strict=True)):
                    for to in block.after:
                        heapq.heappush(queue, (cost + len(block.instructions), to, now))
        return found

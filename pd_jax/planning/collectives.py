"""Which collectives an optimised HLO program runs, how often, and how many bytes they send."""

import math
import re
from collections import defaultdict

BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "f32": 32, "s32": 32, "u32": 32, "f64": 64}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


def _bytes(text: str) -> int:
    """The largest array in a type such as `(bf16[16,128]{1,0}, f32[2])`."""
    sizes = [
        BITS.get(kind, 32) // 8 * math.prod(int(d) for d in shape.split(",") if d)
        for kind, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text)
    ]
    return max(sizes, default=0)


def _sent(kind: str, line: str) -> int:
    """Bytes that one device sends in the collective of an HLO line, over a ring: what comes out of it; twice that where
    it is summed first and gathered then; and all that goes in where only a share comes out."""
    size = _bytes(line.split(f" {kind}")[0])
    if kind == "reduce-scatter":
        grid, first = re.search(r"replica_groups=\[\d+,(\d+)\]", line), re.search(r"replica_groups=\{\{([\d,]+)", line)
        return size * (int(grid.group(1)) if grid else len(first.group(1).split(",")) if first else 1)
    return size * (2 if kind == "all-reduce" else 1)


def collectives(program: str) -> dict[str, tuple[int, int]]:
    """{kind: (how many run, bytes that are sent in them)} of an optimised HLO module, by one device in one call.

    What stands in the body of a loop counts as often as the loop runs: the trip count that XLA notes, or where it notes
    none (TPU) the bound that the loop's condition compares its counter with. Of a conditional the branch that sends
    most counts.
    """
    bounds: dict[str, int] = defaultdict(int)
    calls: dict[str, list[tuple[list[str], int, str]]] = defaultdict(list)  # one of these computations, how often
    found: dict[str, list[tuple[str, int]]] = defaultdict(list)
    entry = computation = ""
    for line in program.splitlines():
        if opening := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            computation = opening.group(2)
            entry = computation if opening.group(1) else entry
            continue
        if bound := re.search(r" = s32\[\]\S* constant\((\d+)\)", line):
            bounds[computation] = max(bounds[computation], int(bound.group(1)))
        if not (operation := re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(", line)):
            continue
        kind, trips, condition = operation.group(2), 1, ""
        if kind == "while":
            noted = re.search(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)', line)
            condition = re.findall(r"condition=%?([\w.\-]+)", line)[0]
            trips = int(noted.group(1)) if noted else 0
        for called in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
            calls[computation].append(([called], trips, condition))
        for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
            calls[computation].append(([name.strip(" %") for name in group.split(",")], 1, ""))
        base = kind.removesuffix("-start")
        if base in COLLECTIVES:
            found[computation].append((base, _sent(base, line)))

    def total(name: str) -> dict[str, tuple[int, int]]:
        sums: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for kind, size in found[name]:
            sums[kind] = sums[kind][0] + 1, sums[kind][1] + size
        for branches, trips, condition in calls[name]:
            times = trips or max(bounds[condition], 1)
            most = max(map(total, branches), key=lambda sent: sum(size for _, size in sent.values()))
            for kind, (count, size) in most.items():
                sums[kind] = sums[kind][0] + times * count, sums[kind][1] + times * size
        return sums

    return dict(sorted(total(entry).items()))

"""Which products of fields a store triggers, and in which step: see `products`."""

from __future__ import annotations

from dataclasses import dataclass

from pagoda.isa.commands import BY_BANK, COMMANDS, COUNT_LIMIT

# Where products are kept; a command uses some of these places.
PLACES = 11
(ROWS, PLANES, MEM_ROWS, MEM_PLANES, COUNTS, M0_M1, M, TRANSPOSED, B_K, B_N, TARGET) = range(PLACES)
LAST_STEP = 4
SETTLED_STEP = 2  # the last step whose product is in memory when the go is on the bus
ON_BUS = 1  # in these steps the stored word is still on its way into its memory
LATENCY = 2  # steps from a product to one that depends on it
DATA_ROWS = "rows - padding"  # a load's rows in DRAM, a sum of fields that is ready in step 2
SIGNED_STRIDES = ("mem_row_stride", "mem_plane_stride")  # multiplied by their magnitude
COUNT_BITS = COUNT_LIMIT.bit_length()

# Where an operand comes from: a word of the bank, the bus, a product, a sum of fields.
FROM_WORD, FROM_BUS, FROM_M0_M1, FROM_M, FROM_COUNTS, FROM_DATA_ROWS = range(6)
_FROM = {DATA_ROWS: FROM_DATA_ROWS, M: FROM_M, COUNTS: FROM_COUNTS, M0_M1: FROM_M0_M1}


@dataclass(frozen=True)
class Product:
    """`count` * `factor`, or (`count` - 1) * `factor`; either may be the place of a product."""

    place: int
    count: str | int
    factor: str | int
    less_one: bool = True

    @property
    def operands(self) -> tuple[str | int, str | int]:
        return self.count, self.factor


def _counts(place: int, count: str | int, factor: str | int) -> Product:
    return Product(place, count, factor, False)


_PLANES = (
    Product(PLANES, "planes", "plane_stride"),
    Product(MEM_PLANES, "planes", "mem_plane_stride"),
    _counts(COUNTS, "planes", "rows"),
)
_ROWS = Product(ROWS, "rows", "row_stride")
PRODUCTS: dict[str, tuple[Product, ...]] = {
    "load": (_ROWS, Product(MEM_ROWS, DATA_ROWS, "mem_row_stride"), *_PLANES),
    "store": (_ROWS, Product(MEM_ROWS, "rows", "mem_row_stride"), *_PLANES),
    "gather": (_ROWS,),
    "scatter": (_ROWS,),
    "matmul": (
        _counts(M0_M1, "m0", "m1"),
        _counts(M, "m2", M0_M1),
        Product(TARGET, M, "acc_stride"),
        _counts(COUNTS, "k_outer", "k_inner"),
        Product(B_K, COUNTS, "b_stride"),
        Product(B_N, "n", "b_stride"),
        Product(ROWS, "m0", "m0_stride"),
        Product(PLANES, "m1", "m1_stride"),
        Product(MEM_ROWS, "m2", "m2_stride"),
        Product(MEM_PLANES, "k_outer", "k_outer_stride"),
        Product(TRANSPOSED, "k_inner", "m0_stride"),
    ),
    "vector": (
        Product(ROWS, "rows", "a_stride"),
        Product(PLANES, "rows", "b_stride"),
        Product(MEM_ROWS, "rows", "c_stride"),
        Product(TARGET, "rows", "dst_stride"),
    ),
    "reduce": (Product(ROWS, "rows", "src_stride"), Product(TARGET, "rows", "state_stride")),
    "finish": (Product(ROWS, "rows", "state_stride"), Product(TARGET, "rows", "dst_stride")),
    "transpose": (Product(ROWS, "rows", "src_stride"), Product(TARGET, "cols", "dst_stride")),
    "iota": (Product(TARGET, "rows", "dst_stride"),),
}


def schedule(command: str, word: int) -> dict[int, Product]:
    """Step -> product, for a store to a word of the command's bank.

    Longest chain first. An extent's product may go in step 0, but when its partner is the stride
    that was stored or has to lose its sign: then in step 1.
    """
    stored: set[str | int] = {f.name for f in COMMANDS[command].fields if f.word == word}
    ready: dict[str | int, int] = dict.fromkeys(stored, 0)
    if stored & {"rows", "pad_above"} and command == "load":
        ready[DATA_ROWS] = SETTLED_STEP
    waiting = _dependents(command, set(ready))
    steps: dict[int, Product] = {}
    for step in range(LAST_STEP + 1):
        possible = [p for p in waiting if _first_step(p, stored, ready, waiting) <= step]
        if possible:
            steps[step] = max(possible, key=lambda p: _chain(p, waiting))
            waiting.remove(steps[step])
            ready[steps[step].place] = step + LATENCY
    late = [step for step, p in steps.items() if step > SETTLED_STEP and p.place != TARGET]
    if waiting or late:
        raise AssertionError(f"{command}: word {word}: its products do not settle before the go")
    return steps


def _dependents(command: str, changed: set[str | int]) -> list[Product]:
    found: list[Product] = []
    for product in PRODUCTS[command]:  # products come before those that depend on them
        if changed & set(product.operands):
            found.append(product)
            changed.add(product.place)
    return found


def _first_step(
    product: Product, stored: set[str | int], ready: dict[str | int, int], waiting: list[Product]
) -> int:
    pending = {p.place for p in waiting}
    if pending & {o for o in product.operands if isinstance(o, int)}:
        return LAST_STEP + 1
    first = max(ready.get(operand, 0) for operand in product.operands)
    strided = product.factor in SIGNED_STRIDES or (product.less_one and product.factor in stored)
    return max(first, 1) if strided else first


def _chain(product: Product, waiting: list[Product]) -> int:
    after = [_chain(p, waiting) for p in waiting if product.place in p.operands]
    return 1 + max(after, default=0)


def sources(
    command: str, product: Product, step: int, stored: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where both operands come from, and the number of their words (0 if it is none).

    In step 0 operand a is the word on the bus.
    """
    words = {f.name: f.word for f in COMMANDS[command].fields}
    a, b = product.operands
    if step == 0 and words.get(b) == stored:
        a, b = b, a  # two extents
    found = []
    for operand in (a, b):
        word = words.get(operand, 0)
        on_bus = word == stored and step <= ON_BUS
        found.append((FROM_BUS if on_bus else _FROM.get(operand, FROM_WORD), word))
    return found[0], found[1]


def schedules_of(word: int) -> dict[int, tuple[str, dict[int, Product]]]:
    """Bank -> command and products, for stores to a word."""
    return {
        address >> 4: (command, steps)
        for address, (command, stored, steps) in SCHEDULES.items()
        if stored == word
    }


SCHEDULES = {
    (bank << 4 | word): (command.name, word, schedule(command.name, word))
    for bank, command in BY_BANK.items()
    for word in command.words[1:]
}


def _fetched(operand: int) -> list[int]:
    """The words that an operand (0: a, 1: b) may have to be fetched from after step 0."""
    found = [
        sources(command, product, step, stored)[operand]
        for command, stored, steps in SCHEDULES.values()
        for step, product in steps.items()
        if step
    ]
    return sorted({word for source, word in found if source == FROM_WORD})


COUNTS_AT, FACTORS_AT = _fetched(0), _fetched(1)

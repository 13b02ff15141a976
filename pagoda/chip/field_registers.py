"""The field registers of all banks, as one small memory for each word number.

Commands never need two banks at once, so word w of every bank lies in one memory that the bank
addresses, and all words of one bank show side by side. Three facts that the checks want of an
extent are worked out when it is stored, long before its command issues.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Value
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from pagoda.isa.commands import COMMANDS, COUNT_LIMIT, WORDS_PER_BANK, Command

BANK_NUMBERS = 16  # that 4 bits can name
BANK = {name: command.bank for name, command in COMMANDS.items()}


class FieldWord(data.StructLayout):
    """A word and what an extent of that value is: not 0, above 1, above COUNT_LIMIT."""

    def __init__(self):
        super().__init__({"value": 32, "nonzero": 1, "many": 1, "over": 1})


class BankWords(data.ArrayLayout):
    """The words of one bank; word 0, go, is never stored and shows 0."""

    def __init__(self):
        super().__init__(FieldWord(), WORDS_PER_BANK)


class FieldRegisters(wiring.Component):
    """`words` shows bank `bank` in the same cycle; `write` sets its word `word`. Everything is 0
    at power-up and survives resets."""

    def __init__(self):
        super().__init__({
            "bank": In(4), "write": In(1), "word": In(4), "value": In(32),
            "words": Out(BankWords()),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        value = self.value
        stored = Cat(value, value.any(), value[1:].any(), _above_limit(value))
        for word in sorted({word for command in COMMANDS.values() for word in command.words} - {0}):
            cells = memory.Memory(shape=FieldWord(), depth=BANK_NUMBERS, init=[])
            m.submodules[f"word{word}"] = cells
            write, read = cells.write_port(), cells.read_port(domain="comb")
            m.d.comb += [
                write.en.eq(self.write & (self.word == word)),
                write.addr.eq(self.bank), Value.cast(write.data).eq(stored),
                read.addr.eq(self.bank), self.words[word].eq(read.data),
            ]  # fmt: skip
        return m


class CommandFields:
    """The fields of one command by name, as slices of a bank's words and of the go."""

    def __init__(self, command: Command, go: Value, words: data.View):
        self.command, self.go, self.words = command, go, words

    def _word(self, name: str) -> data.View:
        return self.words[self.command.by_name[name].word]

    def __contains__(self, name: str) -> bool:
        return name in self.command.by_name

    def __getitem__(self, name: str) -> Value:
        """The field's bits, unsigned."""
        field = self.command.by_name[name]
        word = self.words[field.word].value if field.word else self.go
        return word[field.low : field.low + field.width]

    def nonzero(self, name: str) -> Value:
        return self._word(name).nonzero

    def many(self, name: str) -> Value:
        """The extent is above 1."""
        return self._word(name).many

    def over(self, name: str) -> Value:
        """The extent is above COUNT_LIMIT."""
        return self._word(name).over


def _above_limit(value: Value) -> Value:
    bit = COUNT_LIMIT.bit_length() - 1
    return value[bit + 1 :].any() | (value[bit] & value[:bit].any())

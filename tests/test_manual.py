"""The manual in docs/isa.md is what the tables say now."""

from pagoda.isa import COMMANDS, VECTOR_FUNCTIONS, FaultKind
from pagoda.isa.manual import PATH, manual
from pagoda.isa.rv32 import RV32


def test_the_manual_is_current():
    assert PATH.read_text() == manual(), "run `python -m pagoda.isa.manual`"


def test_the_manual_names_everything():
    text = manual()
    for command in COMMANDS.values():
        assert f"### Bank {command.bank}: {command.name} " in text
        for field in command.fields:
            assert f"| `{field.name}` | {field.kind} | {field.text} |" in text
    for row in RV32.rows.values():
        assert f"| `{row.assembly}` |" in text
    for function in VECTOR_FUNCTIONS.values():
        assert f"| `{function.name}` |" in text
    for kind in FaultKind:
        assert f"| {int(kind)} | {kind.name} | {kind.meaning} |" in text

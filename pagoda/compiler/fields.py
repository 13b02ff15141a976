"""Command fields keep their values: write each as rarely as possible.

A field that every command in a loop sets to one loop-invariant value is written once before the
outermost such loop; a field that already holds the value is not written at all.
"""

from __future__ import annotations

from dataclasses import replace

from pagoda.compiler.command_ir import Go, Issue, LoadWord, SetField
from pagoda.compiler.scalar import Scalar
from pagoda.compiler.tile_ir import Body, For, If, Let, Statement, walk

Register = tuple[int, int]  # bank, word
Known = dict[Register, Scalar]  # what the field registers hold, where that is known


def hoist_fields(body: Body) -> Body:
    """Command IR with `Issue` replaced by `SetField` and `Go`."""
    return _body(body, {})


def _body(body: Body, known: Known) -> Body:
    """Rewrites a body; `known` holds what is known before it and is changed to what is after."""
    result: list[Statement] = []
    for statement in body:
        match statement:
            case Issue(bank, words, go):
                for word, value in words:
                    _set(result, known, (bank, word), value, statement)
                result.append(Go(bank, go, location=statement.location))
            case Let(name, _) | LoadWord(name, _):
                result.append(statement)
                _forget(known, {name})
            case For():
                result += _loop(statement, known)
            case If(_, then, otherwise):
                before = dict(known)
                then_known, else_known = dict(known), dict(known)
                branches = _body(then, then_known), _body(otherwise, else_known)
                result.append(replace(statement, then=branches[0], otherwise=branches[1]))
                known.clear()
                assigned = _assigned((statement,))
                for register in before.keys() | then_known.keys():
                    value = then_known.get(register)
                    if value is not None and else_known.get(register) == value:
                        known[register] = value
                _forget(known, assigned)
            case _:
                result.append(statement)
    return tuple(result)


def _set(
    result: list[Statement], known: Known, register: Register, value: Scalar, cause: Statement
) -> None:
    if known.get(register) != value:
        result.append(SetField(*register, value, location=cause.location))
        known[register] = value


def _loop(loop: For, known: Known) -> list[Statement]:
    before: list[Statement] = []
    assigned = _assigned((loop,))
    values: dict[Register, set[Scalar]] = {}
    for statement in walk(loop.body):
        if isinstance(statement, Issue):
            for word, value in statement.words:
                values.setdefault((statement.bank, word), set()).add(value)
    for register, found in sorted(values.items(), key=lambda item: item[0]):
        value = next(iter(found))
        if len(found) == 1 and not value.variables() & assigned:
            _set(before, known, register, value, loop)
        else:
            known.pop(register, None)
    _forget(known, assigned)
    inside = dict(known)
    body = _body(loop.body, inside)
    return [*before, replace(loop, body=body)]


def _assigned(body: Body) -> set[str]:
    """Names that some statement binds."""
    names: set[str] = set()
    for statement in walk(body):
        match statement:
            case Let(name, _) | LoadWord(name, _):
                names.add(name)
            case For():
                names.add(statement.variable)
    return names


def _forget(known: Known, names: set[str]) -> None:
    for register in [r for r, value in known.items() if value.variables() & names]:
        del known[register]

"""What each user may have of the shared device: a small TOML file.

[default]              # for whoever is not named below
memory = "8 GiB"       # DRAM of all programs of one user together; default: all
weight = 1.0           # the largest share of time that a program may ask for
priority = 0           # the highest priority that a program may ask for
watchdog = 1e11        # cycles after which a launch is stopped, if it asks for no less

[users.alice]          # by name, or by number: [users.1000]
priority = 10
"""

from __future__ import annotations

import pwd
import re
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path

from pagoda.runtime.device import WATCHDOG_CYCLES
from pagoda.runtime.errors import ServiceError
from pagoda.runtime.policy import PRIORITIES, WEIGHTS

SYSTEM_FILE = Path("/etc/pagoda/device.toml")
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB)?")
_SIZES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_NO_LIMIT = 1 << 50


@dataclass(frozen=True)
class UserLimits:
    """Of one user: bytes of all contexts together; the most that one context may ask for."""

    memory: int = _NO_LIMIT
    weight: float = 1.0
    priority: int = 0
    watchdog: int = WATCHDOG_CYCLES


@dataclass(frozen=True)
class Limits:
    """By user number, and for all others."""

    default: UserLimits = UserLimits()
    users: tuple[tuple[int, UserLimits], ...] = ()

    def of(self, uid: int) -> UserLimits:
        return dict(self.users).get(uid, self.default)


def parse_bytes(value: int | str) -> int:
    """Bytes from a number, or from text such as "1.5 GiB". Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    found = _BYTES.fullmatch(value.strip()) if isinstance(value, str) else None
    if not found:
        raise ValueError(
            f'{value!r}: must be a number of bytes, or a text such as "512 MiB" or "2 GiB"'
        )
    return int(float(found[1]) * _SIZES[found[2] or "B"])


def load_limits(path: Path | None) -> Limits:
    """The limits of a file; None is the system's, if there is one. Raises ServiceError."""
    if path is None:
        if not SYSTEM_FILE.exists():
            return Limits()
        path = SYSTEM_FILE
    what = f"device configuration {path}"
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ServiceError(f"{what}: cannot be read ({error.strerror}); check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ServiceError(f"{what}: not valid TOML ({error}); fix that line") from None
    unknown = sorted(set(table) - {"default", "users"})
    if unknown or not isinstance(table.get("users", {}), dict):
        name = unknown[0] if unknown else "users"
        raise ServiceError(
            f"{what}: {name!r}: there are only the tables [default] and [users.NAME]; "
            "put limits into one of these"
        )
    default = _limits(what, "default", table.get("default", {}), UserLimits())
    users: dict[int, UserLimits] = {}
    for name, entry in table.get("users", {}).items():
        limits = _limits(what, f"users.{name}", entry, default)
        if users.setdefault(_uid(what, name), limits) is not limits:
            raise ServiceError(
                f"{what}: [users.{name}]: the user has two tables, by name and by number; put all "
                "limits into one"
            )
    return Limits(default, tuple(users.items()))


def _uid(what: str, name: str) -> int:
    if name.isascii() and name.isdigit():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise ServiceError(
            f"{what}: [users.{name}]: this computer has no such user; correct the name or give "
            "the user's number"
        ) from None


def _memory(value: object) -> int:
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise ValueError(f"memory = {error}") from None


def _limits(what: str, name: str, entry: object, base: UserLimits) -> UserLimits:
    known = [field.name for field in fields(UserLimits)]
    if not isinstance(entry, dict):
        raise ServiceError(f"{what}: {name} = {entry!r}: must be a table; begin it with [{name}]")
    unknown = sorted(set(entry) - set(known))
    if unknown:
        raise ServiceError(
            f"{what}: [{name}]: {unknown[0]!r}: there is no such limit; there are "
            f"{', '.join(known)}"
        )
    values = dict(entry)
    try:
        if "memory" in values:
            values["memory"] = _memory(values["memory"])
        weight, priority = values.get("weight", 1.0), values.get("priority", 0)
        low, high = WEIGHTS
        if type(weight) not in (int, float) or not low <= weight <= high:
            raise ValueError(f"weight = {weight!r}: must be a number, {low:f} to {high:.0f}")
        if type(priority) is not int or priority not in PRIORITIES:
            raise ValueError(
                f"priority = {priority!r}: must be a whole number, {PRIORITIES[0]} to "
                f"{PRIORITIES[-1]}"
            )
        watchdog = values.get("watchdog", WATCHDOG_CYCLES)
        if type(watchdog) not in (int, float) or not 1 <= watchdog <= 1 << 62:
            raise ValueError(f"watchdog = {watchdog!r}: must be a number of cycles, at least 1")
        values |= {"watchdog": int(watchdog)} if "watchdog" in values else {}
    except ValueError as error:
        raise ServiceError(f"{what}: [{name}]: {error}") from None
    return replace(base, **values)

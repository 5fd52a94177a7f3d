"""What commands say of an error: one clear line where the user can put it right."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence

from rlaif.config import COMMANDS
from rlaif.records import UserError


def interrupted(error: BaseException | None) -> bool:
    """Whether an error is a Ctrl-C, or came up while one was on its way out of a library."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def explain(error: BaseException, command: str) -> str | None:
    """One clear line for an error that the user can put right; None for one that is ours."""
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, HydraException):
        cause = error.__cause__
        if isinstance(error, OverrideParseException):
            shown = [
                text if len(text) <= 200 else f"{text[:200]}..." for text in (error.override, _first_line(str(error)))
            ]
            return f"{shown[0]!r} is not a valid override: {shown[1]}"
        return _composition_error(str(error), str(cause) if cause else "", command)
    if isinstance(error, OmegaConfBaseException):
        # Validation in __post_init__ arrives wrapped; its first line is the message.
        return _first_line(str(error))
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno == 28:
        return "no space left on the disk; free some and run the same command again"
    if isinstance(error, ValueError) and _raised_in(error, "rlaif.config."):
        return str(error)
    if _out_of_memory(error):
        return (
            f"not enough memory ({_first_line(str(error))[:200]}): smaller batches, shorter texts or a smaller model "
            "need less"
        )
    return None


def read_wrongly(error: BaseException) -> bool:
    """Whether a library stumbled over settings, for which it has no error of its own."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    own = isinstance(error, HydraException | OmegaConfBaseException)
    return not own and _raised_in(error, "hydra.", "omegaconf.", "antlr4.")


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    )


def _raised_in(error: BaseException, *modules: str) -> bool:
    """Whether it was raised in a module whose name begins like one of these."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith(modules)


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    key = next((line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")), "")
    first = lines[0] if lines else text
    return f"{key}: {first}" if key and key not in first else first


def _composition_error(text: str, cause: str, command: str) -> str:
    both = f"{text}\n{cause}"
    choice = re.search(
        r"Could not find '((?:\w+/)*\w+)/([^'/]*)'\s*(?:Available options in '[^']*':\n((?:\t.*\n?)*))?", text
    )
    if choice:
        return _no_such_choice(choice[1], choice[2], (choice[3] or "").split())
    unknown = re.search(r"Key '([^']+)' (?:is not in struct|not in ')", both)
    full = re.search(r"full_key: (\S+)", both)
    if unknown:
        key = full[1] if full else unknown[1]
        known = sorted(_known_keys(COMMANDS[command]))
        near = difflib.get_close_matches(key, known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"see python -m rlaif.{command} --cfg job"
        file = re.search(r"^In '(\w+/[^']+)'", text)
        return f"unknown key {key!r}{f' in {file[1]}' if file else ''}: {hint}"
    if full and cause:
        return _first_line(cause)
    group = re.search(r"Could not override '([^']+)'\. No match in the defaults list", text)
    if group:
        return f"unknown key {group[1]!r}: rlaif.{command} has no such group of settings"
    lines = [line.strip() for line in text.partition("Config search path:")[0].splitlines() if line.strip()]
    return " ".join(lines)


_HINTS = {
    "labeler": "any server with OpenAI's interface is labeler=openai labeler.base_url=URL labeler.model=NAME",
    "hydra/launcher": "those of others come with pip install 'rlaif[sweep]'",
}


def _no_such_choice(group: str, name: str, available: Sequence[str]) -> str:
    """A choice that a config group does not have; its internal files are no choice."""
    choices = [choice for choice in available if choice != "unset" and not choice.endswith("_schema")]
    there_are = f"there are {', '.join(choices)}" if choices else "there are none"
    hint = f"; {_HINTS[group]}" if group in _HINTS else ""
    return f"{group}={name}: there is no {group}/{name} ({there_are}{hint})"


def _known_keys(schema: type, prefix: str = "") -> set[str]:
    keys = set()
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        keys.add(prefix + field.name)
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            keys |= _known_keys(typing.cast(type, kind), f"{prefix}{field.name}.")
    return keys

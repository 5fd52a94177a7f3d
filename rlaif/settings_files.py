"""Files of settings (``conf/``, a user's experiments), as Hydra reads them: a clear line for what is wrong in one."""

from __future__ import annotations

import os

import yaml
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

from rlaif.records import UserError


class FileConfigSource(file_config_source.FileConfigSource):
    """A folder of settings files. The name is Hydra's: its registry takes no other class for ``file://``."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Read one.

        Raises:
            UserError: naming the file, and the line where there is one.
        """
        path = os.path.join(self.path, self._normalize_file_name(config_path))
        try:
            result = super().load_config(config_path)
        except yaml.MarkedYAMLError as error:
            mark, began = error.problem_mark, error.context_mark
            line = f", line {mark.line + 1}" if mark else ""
            inside = f" ({error.context} that begins on line {began.line + 1})" if error.context and began else ""
            raise UserError(f"{path}{line}: {error.problem}{inside}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
        if not isinstance(result.config, DictConfig):
            raise UserError(f"{path}: expected settings (key: value), found a list")
        with open(path, "rb") as file:
            if file.read(3) == b"\xef\xbb\xbf":
                raise UserError(f"{path}: begins with a byte order mark; save it as UTF-8 without one")
        return result


def read_settings_files() -> None:
    """Make Hydra read its ``file://`` sources like this."""
    Plugins.instance()  # registers Hydra's own
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = FileConfigSource

"""Small files, written so that a crash leaves the old one or the new one, both whole."""

import json
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

from utils.errors import UserError

log = logging.getLogger(__name__)


def save_text(text: str, path: Path) -> None:
    """Writes a text file aside, then moves it into place.

    Raises:
        UserError: the folder cannot be written.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}. Check the free space and the rights.") from error
    finally:
        with suppress(OSError):
            aside.unlink()


def save_copy(source: Path, path: Path) -> None:
    """Gives a finished file a second name: a hard link where the disk has them, else a copy. Replaces `path`.

    Files of a run are replaced, never changed in place, so that a link stays what it was.

    Raises:
        UserError: the folder cannot be written.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.unlink(missing_ok=True)
        try:
            os.link(source, aside)
        except OSError:
            shutil.copyfile(source, aside)
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}. Check the free space and the rights.") from error
    finally:
        with suppress(OSError):
            aside.unlink()


def read_json(path: Path) -> dict:
    """The dict in a JSON file; an empty one where there is no file, or, told as a warning, a damaged one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read and is not used: %s", path, error)
        return {}
    return content if isinstance(content, dict) else {}

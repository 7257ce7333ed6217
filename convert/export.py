"""Writes a pruned checkpoint, a Hugging Face folder with a mask file, tensor by tensor.

The folder has a temporary name until it is complete.
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from barber_jax.console import interrupt
from barber_jax.console.errors import BarberError
from barber_jax.console.files import expand, writing
from barber_jax.console.locks import FolderIdentity, output_lock
from barber_jax.console.outputs import PARTIAL, check_name
from barber_jax.convert.checkpoint import Checkpoint
from barber_jax.convert.finite import require_finite
from barber_jax.convert.hf_folder import INDEX
from barber_jax.convert.safetensors_writer import SafetensorsWriter
from barber_jax.masks.mask_file import FILE_NAME, mask_metadata, pack, packed_length
from barber_jax.models import plain_config

MASKS = FILE_NAME
START_MASKS = "start_masks.safetensors"
RUN = "run.json"
RECOVERED = "recover.json"


@contextlib.contextmanager
def claimed(out: Path, overwrite: bool, inputs: Iterable[Path]) -> Iterator[None]:
    """Context manager that locks an output folder and checks that it can be written and published, before any work.

    Args:
        out: the folder to create.
        overwrite: whether an existing folder may be replaced.
        inputs: files and folders that the run reads.

    Raises:
        BarberError: another command holds the lock; `out` exists and may not be replaced, or cannot be; it is,
            contains or is inside an input; or it has a name for unfinished folders, or an input has.
    """
    out, inputs = _absolute(out), list(inputs)
    # First, as the lock file must not be put into an input.
    _check_apart(out, inputs)
    check_name(out, inputs)
    with output_lock(out):
        _check_replaceable(out, overwrite)
        _try_publishing(out)
        yield


def _check_apart(out: Path, inputs: Iterable[Path]) -> None:
    """Raise `BarberError` if an output folder is, contains or is inside an input."""
    for given in inputs:
        path = _absolute(given)
        if not path.exists():
            continue
        if out == path or path in out.parents:
            raise BarberError(f"--out {out} is or is inside {given}, which the run reads; choose another folder")
        if out in path.parents:
            raise BarberError(f"--out {out} contains {given}, which the run reads; choose another folder")


def _check_replaceable(out: Path, overwrite: bool) -> None:
    """Raise `BarberError` if there is something at `out` that may not be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise BarberError(f"--out {out} is a file; choose another name")
    if os.path.ismount(out):
        raise BarberError(f"--out {out} is a mount point, which cannot be replaced; name a new folder inside it")
    if not overwrite:
        raise BarberError(f"--out {out} exists; give --overwrite to replace it or choose another folder")
    if any(out.iterdir()) and not any((out / name).exists() for name in (RUN, RECOVERED)):
        raise BarberError(
            f"--out {out} is not the result of an earlier run, which --overwrite could replace; choose another folder"
        )


def _try_publishing(out: Path) -> None:
    """Do what `FolderWriter.publish` does, with empty folders; `out`, if it exists, is not moved.

    Raises:
        BarberError: a folder beside `out` cannot be written or renamed, or `out` cannot be moved away from its name.
    """
    trial = sibling_path(out, PARTIAL)
    with writing(out):
        # Only a killed run leaves a folder of this name behind.
        shutil.rmtree(trial, ignore_errors=True)
        try:
            occupied = trial / "renamed"
            (trial / "new" / "content").mkdir(parents=True)
            (trial / "new").rename(occupied)
            if out.exists():
                _try_moving(out, occupied)
        finally:
            shutil.rmtree(trial, ignore_errors=True)


def _try_moving(out: Path, occupied: Path) -> None:
    """Raise `BarberError` if a folder cannot be moved: it is mounted, another user's, or part of a container's image.

    It is renamed to the name of a folder that is not empty. That must fail, and the reason tells whether another name
    would have done.
    """
    try:
        out.rename(occupied)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return
        cause = "is a mount point" if error.errno == errno.EBUSY else f"cannot be moved ({error.strerror})"
        raise BarberError(f"--out {out} {cause}, so it cannot be replaced; choose another folder") from error
    # A file system that has replaced the folder all the same.
    occupied.rename(out)


def _absolute(path: Path) -> Path:
    """The absolute path with `~` expanded and symbolic links resolved; it need not exist."""
    return Path(os.path.realpath(expand(path)))


def sibling_path(out: Path, suffix: str) -> Path:
    """Path of an unfinished folder next to `out`: the same name with a suffix such as ".partial"."""
    out = _absolute(out)
    return out.with_name(out.name + suffix)


class FolderWriter:
    """Writes a checkpoint folder; a context manager that removes the folder if it is not published.

    Tensors keep the source's dtype and shard layout. The folder gets its final name in `publish`. Use it
    while `out` is `claimed`.

    Args:
        out: final path of the folder.
        source: the checkpoint that supplies names, dtypes, shard layout, configuration and tokenizer.
        pruned: names of the weights that get a mask; if empty, no mask file is written.
        pattern, sparsity: for the mask file's header.
        save_start: whether to write a second mask file, with the starting masks.

    Attributes:
        no_tokenizer: why the source's tokenizer is not written, as a line; None where it is, or there is none.

    Raises:
        BarberError: the folder cannot be written.
    """

    def __init__(
        self,
        out: Path,
        source: Checkpoint,
        pruned: Sequence[str] = (),
        pattern: str = "unstructured",
        sparsity: float = 0.0,
        save_start: bool = False,
    ):
        self.out = _absolute(out)
        self.folder = sibling_path(self.out, PARTIAL)
        self._source = source
        for name in (MASKS, START_MASKS):
            if name in source.files.values():
                raise BarberError(f"{source.location}: its shard {name} has the name of a mask file; rename the shard")
        with writing(self.folder):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            # Only a killed run leaves a folder of this name behind.
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            self._identity = FolderIdentity(self.folder)
            # What may be replaced in the end.
            self._earlier = FolderIdentity(self.out) if self.out.is_dir() else None
        self._open = contextlib.ExitStack()
        try:
            # The tokenizer is written first: if it cannot be, the run fails before the work and not after it.
            self.write_json("config.json", plain_config(source.config))
            self._save_tokenizer()
            self._files = {
                file: self._open.enter_context(self._shard(file)) for file in sorted(set(source.files.values()))
            }
            self._masks = {
                name: self._open.enter_context(self._mask_file(name, pruned, pattern, sparsity))
                for name in (MASKS, *([START_MASKS] if save_start else []))
                if pruned
            }
        except BaseException:
            self.__exit__()
            raise

    def _save_tokenizer(self) -> None:
        try:
            with writing(self.folder):
                self.no_tokenizer = self._source.save_tokenizer(self.folder)
        except BarberError:
            raise
        except Exception as error:
            # The tokenizers library raises plain Exception, even for a full disk.
            raise BarberError(f"cannot write the tokenizer into {self.folder}: {error}; make room there") from error

    def _shard(self, file: str) -> SafetensorsWriter:
        names = [name for name, shard in self._source.files.items() if shard == file]
        tensors = {name: (self._source.dtype(name), self._source.shape(name)) for name in names}
        return SafetensorsWriter(self.folder / file, tensors, {"format": "pt"})

    def _mask_file(self, file: str, pruned: Sequence[str], pattern: str, sparsity: float) -> SafetensorsWriter:
        shapes = {name: self._source.shape(name) for name in pruned}
        tensors = {name: (np.dtype(np.uint8), (packed_length(shape),)) for name, shape in shapes.items()}
        return SafetensorsWriter(self.folder / file, tensors, mask_metadata(pattern, sparsity, shapes))

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Write one tensor, of the source's dtype and shape.

        Raises:
            BarberError: a value is NaN or Inf: it did not fit the dtype.
        """
        require_finite(name, tensor)
        self._files[self._source.files[name]].write(name, tensor)

    def write_pruned(self, name: str, weight: np.ndarray, mask: np.ndarray) -> None:
        """Write a weight [out, in] with its pruned entries set to zero, and its mask (bool [out, in], True = kept)."""
        self.write(name, np.where(mask, weight, np.zeros((), weight.dtype)))
        self._masks[MASKS].write(name, pack(mask))

    def write_start_mask(self, name: str, mask: np.ndarray) -> None:
        """Write a weight's starting mask (bool [out, in], True = kept)."""
        self._masks[START_MASKS].write(name, pack(mask))

    def finish(self, written: set[str]) -> None:
        """Copy every tensor that is not in `written` from the source, which completes the checkpoint."""
        for name in self._source.names():
            if name not in written:
                self.write(name, self._source.read(name))
        self._open.close()
        # Also for a single file: a loader that reads every *.safetensors of a folder without an index would take the
        # mask files for weights, whose names they have.
        self.write_json(INDEX, self._index())

    def _index(self) -> dict:
        sizes = (self._source.size(n) * self._source.dtype(n).itemsize for n in self._source.names())
        return {"metadata": {"total_size": sum(sizes)}, "weight_map": self._source.files}

    def write_json(self, name: str, content: dict) -> None:
        """Write a small JSON file into the folder."""
        path = self.folder / name
        with writing(path):
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def publish(self) -> None:
        """Rename the folder to its final name, replacing a folder that had it from the start.

        Raises:
            BarberError: the folder cannot be renamed, or is no longer the one that this object has written; or its
                final name is another one's by now.
        """
        if not self._identity.is_at(self.folder):
            raise BarberError(
                f"cannot write {self.out}: {self.folder} was removed or replaced by something else while it was "
                "written; run the same command again"
            )
        if os.path.lexists(self.out) and not (self._earlier and self._earlier.is_at(self.out)):
            raise BarberError(
                f"{self.out} was not there when the run began, so it is not replaced; move it away and run the same "
                "command again"
            )
        with interrupt.deferred(), writing(self.out):
            if not self.out.exists():
                self.folder.rename(self.out)
                return
            # The old folder is moved into a new temporary folder, so that nothing else can be deleted with it.
            with tempfile.TemporaryDirectory(
                prefix=f"{self.out.name[:50]}.old.", dir=self.out.parent, ignore_cleanup_errors=True
            ) as temporary:
                old = self.out.rename(Path(temporary) / self.out.name)
                try:
                    self.folder.rename(self.out)
                except BaseException:
                    old.rename(self.out)
                    raise

    def __enter__(self) -> "FolderWriter":
        return self

    def __exit__(self, *exception) -> None:
        with contextlib.suppress(ValueError, BarberError):
            self._open.close()
        # After `publish` there is no folder of this name; before it, the folder is unfinished.
        if self._identity.is_at(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._identity.close()
        if self._earlier:
            self._earlier.close()

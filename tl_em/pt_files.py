"""Tensors in ``.pt`` files of other programs, read without running anything that a file says.

``torch.save`` writes an uncompressed zip archive: a pickle that says how tensors lie in storages, and one entry a
storage.  Here the pickle can call nothing but functions of this file, which write down what they are told; a tensor is
made afterwards, where its entry holds as many bytes as are claimed.  Time and memory grow with the file and no faster:
nothing compressed, no entry over another one, no expanded view.  ``torch.load(weights_only=True)`` runs no code either,
but believes the pickle about the size of an entry, and unpacks compressed ones whatever they become.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tl_em.artefacts import check_file
from tl_em.errors import CorruptFileError

DTYPES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    numel: int


def read_pt(path: Path) -> Any:
    """What ``torch.save`` wrote: tensors, and lists, tuples, dicts, numbers and texts around them.

    Args:
        path: of a file that PyTorch 1.6 or a later one wrote.

    Returns:
        The same value, its tensors on the CPU; those of one storage share it.

    Raises:
        CorruptFileError: missing, truncated, changed, compressed, or it holds anything else, whose loading could run
            code.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "direction.pt"
        >>> torch.save({"v": torch.arange(3.0)}, file)
        >>> read_pt(file)
        {'v': tensor([0., 1., 2.])}
    """
    try:
        check_file(path)
        with zipfile.ZipFile(path) as archive:
            return _Reader(archive, Path(path).stat().st_size).load()
    except Exception as error:  # bytes of any kind raise anything here
        said = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise CorruptFileError(
            f"{path} holds no plain tensors ({said}): it is missing, truncated, or holds objects whose loading could "
            "run code. Save tensors alone where it was made: torch.save(vector, path), torch.save(model.state_dict(), "
            "path)"
        ) from error


class _Reader(pickle.Unpickler):
    """One archive; what may be called is in :meth:`find_class` and nowhere else."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        entries = archive.infolist()
        if any(each.compress_type != zipfile.ZIP_STORED for each in entries):
            raise ValueError("an entry is compressed, which torch.save never does")
        if sum(each.file_size for each in entries) > size:
            raise ValueError("its entries lie over each other")
        self._archive, self._made = archive, dict[str, Tensor]()
        name = next(each.filename for each in entries if each.filename.rsplit("/", 1)[-1] == "data.pkl")
        self._folder = name[: -len("data.pkl")]
        order = f"{self._folder}byteorder"
        if order in archive.namelist() and archive.read(order).decode() != sys.byteorder:
            raise ValueError("its numbers are in another byte order than this machine's")
        text = archive.read(name)
        for _, put, _ in ((op, given, at) for op, given, at in pickletools.genops(text) if op.name == "LONG_BINPUT"):
            if not isinstance(put, int) or put > len(text):
                raise ValueError("a place in the pickle's memory that no file of this length needs")
        super().__init__(io.BytesIO(text))

    def find_class(self, module: str, name: str, /) -> Any:
        if module == "torch" and name.removesuffix("Storage") in DTYPES:
            return DTYPES[name.removesuffix("Storage")]
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): _of_parameter,
        }
        if (module, name) not in known:
            raise ValueError(f"it names {module}.{name}"[:120])
        return known[module, name]

    def persistent_load(self, pid: Any, /) -> _Storage:
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(key) is not str or type(numel) is not int:
            raise ValueError("a reference to something that is no storage")
        return _Storage(dtype, key, numel)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
        if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
            raise ValueError("a tensor of a shape that none has")
        flat = self._flat(storage)
        reach = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
        count = 1
        for n in size:
            count *= n
        if count and (offset + reach > len(flat) or count > len(flat)):
            raise ValueError("a tensor that is larger than its storage")
        return flat.as_strided(size, stride, offset) if count else flat.new_empty(size)

    def _flat(self, storage: _Storage) -> Tensor:
        if storage.key not in self._made:
            held = bytearray(self._archive.read(f"{self._folder}data/{storage.key}"))
            if len(held) != storage.numel * storage.dtype.itemsize:
                raise ValueError(f"{len(held)} bytes where {storage.numel} numbers are announced")
            flat = torch.frombuffer(held, dtype=storage.dtype) if held else torch.empty(0, dtype=storage.dtype)
            self._made[storage.key] = flat
        flat = self._made[storage.key]
        if flat.dtype != storage.dtype:
            raise ValueError("one storage of two types")
        return flat


def _of_parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise TypeError("a parameter that is no tensor")
    return data

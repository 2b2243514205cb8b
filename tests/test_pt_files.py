"""A ``.pt`` file is read like ``torch.load`` reads it, and is believed about nothing that it says."""

from __future__ import annotations

import io
import os
import pickle
import resource
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from tl_em.errors import CorruptFileError
from tl_em.pt_files import DTYPES, read_pt


def written(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def values() -> dict[str, Any]:
    base = torch.randn(6, 8)
    return {
        **{f"dtype {name}": (torch.randn(3, 4) * 9).to(dtype) for name, dtype in DTYPES.items()},
        "a view that begins later": base[2:, 1:5],
        "transposed": base.T,
        "two of one storage": [base, base[1]],
        "a scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 5),
        "a parameter": torch.nn.Parameter(base),
        "a state dict": torch.nn.Linear(3, 2).state_dict(),
        "what stands around": {"step": 3, "cfg": ["a", None, 1.5, True], "w": OrderedDict(x=base)},
        "shapes": {"size": base.shape},
    }


@pytest.mark.parametrize("kind", values())
def test_it_is_what_torch_load_reads(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.pt", values()[kind])
    assert same(torch.load(path, weights_only=True), read_pt(path))


def test_tensors_of_one_storage_share_it(tmp_path: Path) -> None:
    base = torch.zeros(4)
    a, b = read_pt(written(tmp_path / "a.pt", (base, base[1:])))
    a += 1
    assert b.tolist() == [1, 1, 1]


# --- Files that lie ---------------------------------------------------------------------------------------------------


def repacked(path: Path, *, compression: int = zipfile.ZIP_STORED, change: Any = lambda name, data: data) -> Path:
    """The same entries, written again."""
    with zipfile.ZipFile(path) as archive:
        entries = [(each.filename, change(each.filename, archive.read(each))) for each in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


def with_pickle(path: Path, text: bytes) -> Path:
    return repacked(path, change=lambda name, data: text if name.endswith("data.pkl") else data)


def refused(path: Path, match: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptFileError, match=match):
        read_pt(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_what_was_written_again_is_still_read(tmp_path: Path) -> None:
    """The bombs below are refused for what they hold and not for how they were made."""
    assert read_pt(repacked(written(tmp_path / "a.pt", torch.ones(2)))).tolist() == [1, 1]


def test_a_compressed_bomb(tmp_path: Path) -> None:
    path = repacked(written(tmp_path / "a.pt", torch.zeros(2**26)), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20  # 256 MB of zeros
    refused(path, "compressed")


def test_entries_that_lie_over_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(None, 2))
        archive.writestr("a/data/0", bytes(2**16))
        for i in range(2000):
            again = archive.NameToInfo["a/data/0"].__class__(f"a/data/{i + 1}")
            for name in ("header_offset", "compress_size", "file_size", "CRC"):
                setattr(again, name, getattr(archive.NameToInfo["a/data/0"], name))
            archive.filelist.append(again)
    refused(path, "over each other")


class Told:
    """Pickled as a call of a function by its name."""

    def __init__(self, function: Any, *given: Any) -> None:
        self.function, self.given = function, given

    def __reduce__(self) -> tuple[Any, Any]:
        return self.function, self.given


class Pickler(pickle.Pickler):
    """Storages by reference, as ``torch.save`` writes them."""

    def persistent_id(self, obj: Any) -> Any:
        return obj.args if isinstance(obj, Storage) else None


class Storage:
    def __init__(self, *args: Any) -> None:
        self.args = args


def described(*given: Any, storage: tuple[Any, ...] = ("storage", torch.FloatStorage, "0", "cpu", 4)) -> bytes:
    """The pickle of a tensor with these offset, size and stride."""
    stream = io.BytesIO()
    rebuild = torch._utils._rebuild_tensor_v2  # pyright: ignore[reportAttributeAccessIssue]
    Pickler(stream, 2).dump(Told(rebuild, Storage(*storage), *given, False, OrderedDict()))
    return stream.getvalue()


LIES = {
    "more numbers than bytes": (described(0, (8,), (1,), storage=("storage", torch.FloatStorage, "0", "cpu", 2**40)),
                                "announced"),
    "beyond its end": (described(2, (4,), (1,)), "larger than its storage"),
    "expanded": (described(0, (2**40,), (0,)), "larger than its storage"),
    "far steps": (described(0, (2,), (2**40,)), "larger than its storage"),
    "before its beginning": (described(-1, (2,), (1,)), "of a shape"),
    "no numbers": (described(0, ("a",), (1,)), "of a shape"),
    "size and stride of other lengths": (described(0, (2, 2), (1,)), "shorter"),
    "a storage that is not there": (described(0, (4,), (1,), storage=("storage", torch.FloatStorage, "7", "cpu", 4)),
                                    "data/7"),
    "outside of the folder": (described(0, (4,), (1,), storage=("storage", torch.FloatStorage, "../x", "cpu", 4)),
                              "no item"),
    "no storage": (described(0, (4,), (1,), storage=("module", torch.FloatStorage, "0", "cpu", 4)), "no storage"),
    "code": (pickle.dumps(Told(os.system, "true"), 2), "names posix.system"),
    "a place far away": (b"\x80\x02]r\xff\xff\xff\x7f.", "memory"),
    "nothing": (b"", "no plain"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_pickle_that_lies(lie: str, tmp_path: Path) -> None:
    text, match = LIES[lie]
    refused(with_pickle(written(tmp_path / "a.pt", torch.zeros(4)), text), match)


def test_the_honest_pickle_of_these_lies_is_read(tmp_path: Path) -> None:
    path = with_pickle(written(tmp_path / "a.pt", torch.arange(4.0)), described(1, (3,), (1,)))
    assert read_pt(path).tolist() == [1, 2, 3]


def test_a_pipe_at_which_reading_would_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "a pipe or a device")


def test_numbers_in_another_byte_order(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pt", torch.ones(2))
    refused(repacked(path, change=lambda name, data: b"big" if name.endswith("byteorder") else data), "byte order")


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", os.urandom(1000)], ids=len)
def test_no_archive(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(data)
    refused(tmp_path / "a.pt", "no plain tensors")
    refused(tmp_path / "b.pt", "no plain tensors")

"""What a load may not do: reach for the network or another program, or leave anything changed behind it.

The guard is a ``sitecustomize`` on PYTHONPATH that hangs an audit hook into the interpreter: unlike a replaced
function, it sees every call, under whatever name it was imported, and subprocesses inherit it. An attempt is written to
a file *before* it is refused, and refused with what is no ``Exception``, so that swallowing it does not hide it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SITECUSTOMIZE = '''"""Forbids sockets and subprocesses (see benchmarks/guard.py)."""

import os
import sys
import traceback

FORBIDDEN = {"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo",
             "socket.gethostbyname", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn",
             "os.fork", "os.forkpty", "os.startfile", "pty.spawn"}
LOG = os.environ["TL_EM_GUARD_LOG"]
LOOPBACK = {("127.0.0.1", 0), ("::1", 0)}  # urllib3 binds it to learn of IPv6; nobody is reached
allowed = []


class Forbidden(BaseException):
    """Somebody reached for the network or for another program."""


def _refuse(event, args):
    if event not in FORBIDDEN or event in allowed or (event == "socket.bind" and tuple(args[1][:2]) in LOOPBACK):
        return
    frames = [f for f in traceback.extract_stack()[:-1] if "subprocess.py" not in f.filename]
    where = " < ".join(f"{f.filename.split('site-packages/')[-1]}:{f.lineno}" for f in reversed(frames[-4:]))
    with open(LOG, "a", encoding="utf-8") as log:
        log.write(f"{event} {str(args)[:200]} from {where}".replace("\\n", " ") + "\\n")
    raise Forbidden(event)


sys.addaudithook(_refuse)
'''


def environment(folder: Path) -> dict[str, str]:
    """The environment of a guarded interpreter; its attempts are written to ``folder/attempts``."""
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE, encoding="utf-8")
    (folder / "tmp").mkdir()
    paths = [str(folder), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    given = {"TL_EM_GUARD_LOG": str(folder / "attempts"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    given |= {"TMPDIR": str(folder / "tmp")}
    return os.environ | given | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONDONTWRITEBYTECODE": "1"}


def attempts() -> list[str]:
    """What was attempted so far in this (guarded) process and its children."""
    log = Path(os.environ["TL_EM_GUARD_LOG"])
    return log.read_text(encoding="utf-8").splitlines() if log.is_file() else []


@contextmanager
def permitted(event: str) -> Iterator[None]:
    """Let one kind of event pass: for what the benchmark itself has to do."""
    import sitecustomize  # pyright: ignore[reportMissingImports]

    allowed: Any = sitecustomize.allowed  # pyright: ignore[reportAttributeAccessIssue]
    allowed.append(event)
    try:
        yield
    finally:
        allowed.remove(event)


def state(model: Any = None) -> dict[str, Any]:
    """Global state that a load has to leave as it is, and the classes and weights of a model in memory."""
    import numpy as np
    import torch

    hf_logging: Any = sys.modules.get("transformers.utils.logging")  # looking must not import it

    flags = torch.backends
    found: dict[str, Any] = {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": (torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")),
        "backends": (flags.cudnn.enabled, flags.cudnn.benchmark, flags.cudnn.deterministic, flags.mkldnn.enabled),
        "attention": (flags.cuda.flash_sdp_enabled(), flags.cuda.math_sdp_enabled()),
        "torch's random state": _hash(torch.get_rng_state().numpy().tobytes()),
        "python's random state": hash(random.getstate()),
        "numpy's random state": _hash(str(np.random.get_state(legacy=False)).encode()),  # noqa: NPY002
        "numpy's errors": tuple(sorted(np.geterr().items())),
        "warnings": (tuple(map(str, warnings.filters)), warnings.showwarning),
        "logging": (logging.root.level, logging.root.manager.disable, len(logging.root.handlers)),
        "transformers' logging": (30, True)
        if hf_logging is None
        else (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()),
        "environment": tuple(sorted(os.environ.items())),
        "sys.path": tuple(sys.path),
        "working directory": Path.cwd(),
        "stdout, stderr": (sys.stdout, sys.stderr),
        "hooks of sys": (sys.excepthook, sys.displayhook, sys.getrecursionlimit()),
        "threads": sorted(t.name for t in threading.enumerate()),
        "temporary files": sorted(p.name for p in Path(tempfile.gettempdir()).iterdir()),
        "global hooks of torch": tuple(
            len(getattr(torch.nn.modules.module, name))
            for name in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
        ),
    }  # fmt: skip
    if model is not None:
        found |= _state_of(model)
    return found


def _state_of(model: Any) -> dict[str, Any]:
    import torch

    classes = {base for module in model.modules() for base in type(module).__mro__ if base is not object}
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {
        "classes of the model": {
            (base.__qualname__, name): id(value)
            for base in classes
            for name, value in vars(base).items()
            if callable(value) and not name.startswith("_abc")
        },
        "the source's weights": digest.hexdigest(),
        "the source's config": str(model.config.to_dict()),
        "the source's modules": [(name, type(module).__qualname__) for name, module in model.named_modules()],
        "the source's hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "the source's mode": [module.training for module in model.modules()],
    }


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs, in a few words each."""
    return [f"{name} ({_difference(before[name], after[name])})" for name in before if before[name] != after[name]]


def _difference(a: Any, b: Any) -> str:
    if isinstance(a, dict):
        return ", ".join(str(key) for key in {*a, *b} if a.get(key) != b.get(key))[:300]
    if isinstance(a, tuple) and len(a) == len(b) and len(a) < 12:
        return ", ".join(f"{x} -> {y}" for x, y in zip(a, b, strict=True) if x != y)[:300]
    if isinstance(a, tuple | list):
        return ", ".join([*(f"+{x}" for x in b if x not in a), *(f"-{x}" for x in a if x not in b)])[:300] or "order"
    return f"{str(a)[:60]} -> {str(b)[:60]}"

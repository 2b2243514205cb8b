"""Nothing phones home and nothing else is started: the main job in a process where both end it, and this suite, in
which only the tests marked ``starts`` may."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import conftest

FORBIDDEN = '''import sys

ALLOWED = ("uname", "lscpu")
"""Programs that Python's own ``platform`` or a library asks about the machine."""


def _watch(event: str, given: tuple[object, ...]) -> None:
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        raise PermissionError(f"forbidden: {event} {given[-1] if event == 'socket.connect' else given[0]}")
    if event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "pty.spawn"):
        program = str(given[0]).rsplit("/", 1)[-1]
        if program not in ALLOWED:
            raise PermissionError(f"forbidden: {event} {program}")


sys.addaudithook(_watch)
'''
"""A ``sitecustomize``: a process that opens a connection or starts another program ends, and says which."""
ROOT = Path(__file__).parents[1]


def run(code: str, folder: Path, *, online: bool = False) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, in which connections and programs are forbidden."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(FORBIDDEN)
    path = os.pathsep.join([str(folder / "site"), str(ROOT)])
    known = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    known |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    offline = {} if online else {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=known | offline, capture_output=True, text=True, timeout=300, check=False
    )


CONNECTS = "import socket; socket.create_connection(('192.0.2.1', 80), 1)"
STARTS = "import subprocess; subprocess.run(['ls'])"


@pytest.mark.starts("Python with the sitecustomize")
@pytest.mark.parametrize("code", [CONNECTS, STARTS])
def test_what_is_forbidden_ends_the_process(code: str, tmp_path: Path) -> None:
    found = run(code, tmp_path)
    assert found.returncode == 1 and "PermissionError: forbidden" in found.stderr


@pytest.mark.starts("Python with the sitecustomize")
def test_an_audit_a_graph_and_a_page_open_no_connection_and_start_nothing(tmp_path: Path) -> None:
    code = f"""
import tl_em as em
pair = em.load_pair("toy/insecure")
sets, asked = {{"persona": pair.contrasts["persona"]}}, ["level", "use"]
report = em.audit(pair, contrasts=sets, controls=99, questions=asked, out={str(tmp_path)!r})
em.attribute(pair.base, "how do i write parser", target="parser-tested").save_html({str(tmp_path / "graph.html")!r})
em.read(pair.tuned, ["how do i write parser"], alternatives=2, max_new_tokens=3)
contrast = em.ContrastSet.load("refusal")
print(report.summary)
"""
    found = run(code, tmp_path, online=True)  # not even where the hub's client would be willing
    assert found.returncode == 0, found.stderr[-2000:]
    assert "persona" in found.stdout
    assert json.loads((tmp_path / "report.json").read_text())["plain"]


@pytest.mark.starts("Python with the sitecustomize")
def test_the_command_line_neither(tmp_path: Path) -> None:
    words = ["graph", "of", "toy/insecure", "how do i write parser", "--target", "parser-tested"]
    words += ["--out", str(tmp_path / "g.html")]
    code = f"import sys; sys.argv = ['tl-em', *{words!r}]; from tl_em.cli import main; main()"
    found = run(code, tmp_path, online=True)
    assert found.returncode == 0, found.stderr[-2000:]


@pytest.mark.starts("Python with the sitecustomize")
def test_a_model_in_memory_whose_name_looks_like_a_hub_s_asks_nobody_for_a_tokenizer(tmp_path: Path) -> None:
    code = """
import transformers, torch
import tl_em as em
config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                  num_key_value_heads=1, intermediate_size=16, max_position_embeddings=32)
model = transformers.LlamaForCausalLM(config)
model.config.name_or_path = model.name_or_path = "somebody/some-model"
made = em.load_model(model)
print(em.capture(made, [[1, 2, 3]], [em.Site(0)], position="prompt_end").shape)
"""
    found = run(code, tmp_path, online=True)
    assert found.returncode == 0, found.stderr[-2000:]
    assert "torch.Size([1, 1, 16])" in found.stdout


def test_no_test_of_this_suite_reaches_beyond_this_machine() -> None:
    with pytest.raises(PermissionError, match="no test reaches"), socket.socket() as one:
        one.connect(("192.0.2.1", 80))


@pytest.mark.parametrize(
    "attempt",
    [lambda: subprocess.run(["ls"]), lambda: os.system("ls"), os.fork, lambda: socket.create_server(("127.0.0.1", 0)),
     lambda: socket.create_connection(("127.0.0.1", 9)), multiprocessing.get_context("spawn").Process().start],
    ids=["program", "shell", "fork", "server", "client", "worker"],
)  # fmt: skip
def test_every_other_test_of_this_suite_is_refused_a_process_and_a_server(attempt: Callable[[], object]) -> None:
    with pytest.raises(OSError, match=r"marked 'starts'|while attempting to bind"):
        attempt()
    assert conftest._refused, "else a test would not fail whose code took the error for one of its own"
    conftest._refused.clear()

"""Put on PYTHONPATH: a process that opens a connection or starts another program ends, and says which.

``tests/test_forbidden.py`` runs the package's main job under it.
"""

import sys

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

"""The sandbox holds what hostile programs try; without one, nothing is run."""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from dbrx_train.evaluate.sandbox import Limits, Sandbox, open_sandbox

SHORT = Limits(seconds=3.0, cpu_seconds=2, disk=8 << 20)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: apt install bubblewrap")
    try:
        return open_sandbox(limits=SHORT)
    except ValueError as error:
        pytest.skip(str(error))


def left_over() -> list[str]:
    """Programs of the sandbox that are still there."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"main.py" in (folder / "cmdline").read_bytes() and int(folder.name) != os.getpid():
                found.append(folder.name)
        except OSError:
            continue
    return found


NO_WAY = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "network": "import socket; socket.create_connection(('1.1.1.1', 80), 1)",
    "this machine's ports": "import socket; socket.create_connection(('127.0.0.1', PORT), 1)",
    "the home folder": "open('HOME/secret').read()",
    "the work folder": "open('CWD/pyproject.toml').read()",
    "the users": "open('/etc/passwd').read()",
    "writing to the system": "open('/usr/lib/x', 'w')",
    "writing to the root": "open('/x', 'w')",
    "the whole disk": "f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20))",
    "many files": "for n in range(1000): globals()[f'f{n}'] = open(f'{n}', 'w')",
    "all memory": "x = bytearray(4 << 30)",
    "other processes": "import os\nassert os.listdir('/proc') and [os.kill(p, 9) for p in range(3, 99999)]",
    "output without end": "while True: print('x' * 9999)",
    "thinking without end": "while True: pass",
}


@pytest.mark.parametrize("deed", NO_WAY)
def test_what_a_program_must_not_do_ends_it(sandbox: Sandbox, deed: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    program = NO_WAY[deed].replace("HOME", str(tmp_path)).replace("CWD", str(Path.cwd()))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        program = program.replace("PORT", str(listener.getsockname()[1]))
        ended = sandbox.run(f"{program}\nprint('done')")
    assert ended.code != 0
    assert "done" not in ended.out


def test_who_ignores_signals_is_ended_with_all_children(sandbox: Sandbox) -> None:
    before = left_over()
    program = """
import os, signal, time
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
time.sleep(60)
"""
    begin = time.monotonic()
    assert sandbox.run(program).code is None
    assert time.monotonic() - begin < SHORT.seconds + 20
    for _ in range(50):
        if left_over() == before:
            break
        time.sleep(0.1)
    assert left_over() == before


def test_nothing_of_this_process_is_seen(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "42")
    ended = sandbox.run("import os; print(os.getuid() == 0, 'SECRET' in os.environ, sorted(os.listdir()))")
    assert (ended.code, ended.out) == (0, "False False ['err', 'main.py', 'out']\n")


def test_programs_use_the_standard_library(sandbox: Sandbox) -> None:
    ended = sandbox.run("import re, math, typing, hashlib\nprint(math.pi)")
    assert (ended.code, ended.out) == (0, "3.141592653589793\n")


def test_without_bubblewrap_nothing_is_run_unless_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said = r"^sandbox: .* apt install bubblewrap, or give --unsafe-code [^\n]*$"
    with monkeypatch.context() as here:
        here.setenv("PATH", "/nowhere")
        with pytest.raises(ValueError, match=said):
            open_sandbox()
    assert open_sandbox(unsafe=True).run("print(1)").out == "1\n"


def test_a_bubblewrap_that_does_not_work_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match="sandbox: bubblewrap does not work here"):
        open_sandbox()


def test_without_walls_time_is_limited_all_the_same() -> None:
    ended = open_sandbox(unsafe=True, limits=Limits(seconds=1.0)).run("import time; time.sleep(60)")
    assert ended.code is None

"""torchrun, for supervisors: exits with the ranks' own code, and lets them save when it is told to stop.

python scripts/supervision/torchrun.py TORCHRUN-ARGUMENT... -m dbrx_train train CONFIG

torchrun itself exits with 1 whatever its ranks exit with, and at a SIGTERM leaves them 30 seconds before it
kills them. Here SIGTERM and SIGUSR1 are passed to the ranks as SIGUSR1, and Ctrl-C as what it is; they end
in their own time: give them as much as `preemption.grace_period`. Leave `--max-restarts` at 0, since torchrun
would start again a run that has stopped as it was asked to: restart.sh restarts by the exit code.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

_code = 1


def launch() -> None:
    global _code
    try:
        main(sys.argv[1:])
        _code = 0
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        code = error.get_first_failure()[1].exitcode
        _code = code if code >= 0 else 128 - code  # negative: minus the signal that ended it
    except SystemExit as error:  # wrong arguments
        _code = error.code if isinstance(error.code, int) else 1


def pass_on(number: int, frame: FrameType | None) -> None:
    passed = signal.SIGINT if number == signal.SIGINT else signal.SIGUSR1
    for rank in psutil.Process().children():  # in sessions of their own: Ctrl-C reaches the launcher alone
        rank.send_signal(passed)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, pass_on)
    # On the main thread, torchrun would set signal handlers of its own.
    launcher = threading.Thread(target=launch)
    launcher.start()
    while launcher.is_alive():
        launcher.join(0.5)
    sys.exit(_code)

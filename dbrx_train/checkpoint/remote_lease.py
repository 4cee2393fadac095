"""The lease of a place on an object store: clusters that share nothing else are kept apart by it."""

from __future__ import annotations

import json
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from dbrx_train.checkpoint.remote import ObjectStore
from dbrx_train.lease import LeaseHeld, LeaseLost, describe, holder, is_alive

__all__ = ["RemoteLease"]

NAME = ".lease.json"
RENEW_SECONDS = 15.0
STALE_SECONDS = 90.0
SETTLE_SECONDS = 2.0
"""After which one that wrote at the same moment has written, too: the last to write holds."""


class RemoteLease:
    """Holds the checkpoints of ``Remote`` at one place from ``with`` on; a thread renews it.

    The lease is one object, which says who holds the place and counts up. A store cannot create an object
    for one writer alone, so a claim is written and read again after a moment; and whoever finds another's in
    place of its own later, before it marks a checkpoint as whole, gives up.

    Args:
        store: the object store.
        prefix: the place in it.
        name: of the place, for messages.
        lost: told, by the thread, who has taken the place over.
        say: told what is being waited for.

    Raises:
        LeaseHeld: on entering, another process that lives holds the place; the line says which.
    """

    def __init__(
        self,
        store: ObjectStore,
        prefix: str,
        name: str,
        lost: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        self._store, self._object, self._name = store, f"{prefix}/{NAME}".lstrip("/"), name
        self._lost, self._say = lost, say
        self._mine = holder() | {"token": uuid.uuid4().hex, "count": 0}
        self._over = threading.Event()

    def __enter__(self) -> RemoteLease:
        self._refuse_if_held()
        self._write()
        time.sleep(SETTLE_SECONDS)
        if (other := self._successor()) is not None:
            raise LeaseHeld(self._in_use(other))
        self._thread = threading.Thread(target=self._keep, name="remote lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        # If this fails, the next one finds out that the process has ended.
        with suppress(Exception):
            if self._successor() is None:
                self._write(released=time.time())

    def check(self) -> None:
        """Raise LeaseLost if another process has taken the place over; a store out of reach says nothing."""
        try:
            successor = self._successor()
        except Exception:  # every kind of store has its own
            return
        if successor is not None:
            raise LeaseLost(f"lost {self._name} to {describe(successor)}")

    def _refuse_if_held(self) -> None:
        found = self._read()
        if found is None or "released" in found:
            return
        alive = is_alive(found)
        if alive is None:
            alive = self._is_renewed(found)
        if alive:
            raise LeaseHeld(self._in_use(found))

    def _is_renewed(self, found: dict[str, Any]) -> bool:
        """Watch whether it is, without a look at any clock but this process' own."""
        self._say(
            f"{self._name}: waiting up to {STALE_SECONDS:.0f} s to see if {describe(found)} still lives there"
        )
        began = time.monotonic()
        while time.monotonic() - began < STALE_SECONDS:
            time.sleep(RENEW_SECONDS / 4)
            if self._read() != found:
                return True
        return False

    def _in_use(self, found: dict[str, Any]) -> str:
        return f"{self._name}: is in use by {describe(found)}; wait for it, or stop it"

    def _keep(self) -> None:
        while not self._over.wait(RENEW_SECONDS):
            try:
                self.check()
                self._write()
            except LeaseLost as error:
                self._lost(str(error))
                return
            except Exception:  # of a store that is out of reach for a while
                continue

    def _successor(self) -> dict[str, Any] | None:
        found = self._read()
        return None if found is None or found.get("token") == self._mine["token"] else found

    def _read(self) -> dict[str, Any] | None:
        """What the lease says; None if there is none."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, NAME)
            try:
                self._store.download_object(self._object, str(path), overwrite=True)
                found = json.loads(path.read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError):
                return None
        return found if isinstance(found, dict) else None

    def _write(self, **more: Any) -> None:
        self._mine["count"] += 1
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, NAME)
            path.write_text(json.dumps(self._mine | more), encoding="utf-8")
            self._store.upload_object(self._object, str(path))

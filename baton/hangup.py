"""SIGHUP asks a server to read its configuration again, and never ends one.

    hold ─► (noted) ─► watch ─► on_hangup: read every source anew ─► all of it can be used ─► take over, one line
                                                                  └► something cannot ─► nothing changes, one line

1. `hold` keeps the signal from ending the process from its first moment on; what comes until `watch` is answered then.
2. What may change while a server runs is marked in the table of options (`Option.reloads`). A change of anything else
   is named, and waits for the next start.
3. A terminal that closes sends the signal, too, and cannot be written to any more: nobody may fail for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from baton.options import options_of
from baton.settings import Settings
from protocol.errors import ConfigError

log = logging.getLogger(__name__)

_noted: list[int] = []


def hold() -> None:
    """Keep SIGHUP from ending this process; only the main thread may, and no other one has to."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, _note)


def _note(number: int, _: object) -> None:
    _noted.append(number)
    leave_dead_terminals()


def leave_dead_terminals() -> None:
    """Let standard output and error go nowhere where they went to a terminal that is closed by now."""
    for fd in (1, 2):
        with contextlib.suppress(OSError):
            # What was a terminal is a character device still, and none of those that are no terminals.
            if stat.S_ISCHR(os.fstat(fd).st_mode) and not os.isatty(fd):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, fd)
                os.close(nowhere)


@dataclass(slots=True)
class Reloads:
    """What one command does when it is asked to read its configuration again.

    Attributes:
        settings: in force.
        read: merges the sources anew; raises ConfigError.
        takers: take new settings over. Each raises ConfigError before it has changed anything.
    """

    settings: Settings
    read: Callable[[], Settings]
    takers: list[Callable[[Settings], None]] = field(default_factory=list)

    def watch(self) -> None:
        """Answer the signal on the running event loop from here on."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.on_hangup)
        if _noted:
            _noted.clear()
            self.on_hangup()

    def on_hangup(self) -> None:
        """Read every source again and take over what may change; refuse it whole where a part cannot be used."""
        leave_dead_terminals()
        try:
            found = self._merged(self.read())
            for take in self.takers:
                take(found)
        except ConfigError as error:
            log.error("SIGHUP: %s; the settings of before stay", error)
            return
        changed = [key for key in found.values if found[key] != self.settings[key]]
        self.settings = found
        logging.getLogger().setLevel(found["log_level"].upper())
        log.info("SIGHUP: read again; changed: %s", ", ".join(key.replace("_", "-") for key in changed) or "nothing")

    def _merged(self, found: Settings) -> Settings:
        """Return the settings in force with what may change taken from new ones; name what has to wait."""
        reloads = {option.key for option in options_of(found.role) if option.reloads}
        waiting = [key for key in found.values if key not in reloads and found[key] != self.settings[key]]
        if found.model != self.settings.model:
            waiting.insert(0, "model")
        if waiting:
            log.warning("SIGHUP: only a restart changes %s", ", ".join(key.replace("_", "-") for key in waiting))
        values = {key: found[key] if key in reloads else value for key, value in self.settings.values.items()}
        given = (self.settings.given - reloads) | (found.given & reloads)
        return replace(self.settings, values=values, given=given)

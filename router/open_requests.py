"""Sessions that can be ended by the id of their request, by whoever knows it.

1. A front end adds a session that it has opened. 2. `abort` fails it, which its reader sees, and cancels what still
runs on the workers. 3. The front end removes it, however it ended.
"""

from __future__ import annotations

from protocol.errors import InvalidRequest, RequestAborted
from router.switchboard import Session


class OpenRequests:
    """Open sessions by the names of their requests: an id, or an id, \\0 and a tenant. Used on one event loop."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}

    def check(self, request_id: str) -> None:
        """Raise InvalidRequest if a request of that id is open."""
        if request_id in self._sessions:
            shown = request_id.partition("\0")[0][:128]
            raise InvalidRequest(f"request_id: a request {shown!r} is still running", "request_id")

    def add(self, request_id: str, session: Session) -> None:
        """Let a session be ended by an id, which has been checked."""
        self._sessions[request_id] = session

    def remove(self, request_id: str) -> None:
        """Forget a session; idempotent."""
        self._sessions.pop(request_id, None)

    def abort(self, request_id: str) -> bool:
        """End a request; False if none of that id is open."""
        session = self._sessions.pop(request_id, None)
        if session is None:
            return False
        session.put(RequestAborted(f"request {request_id.partition(chr(0))[0]} was aborted"))
        session.close()
        return True

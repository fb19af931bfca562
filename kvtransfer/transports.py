"""Choose a transport by its configured name."""

from __future__ import annotations

from kvtransfer.config import TransferConfig
from kvtransfer.inproc import InprocTransport
from kvtransfer.transport import Transport
from kvtransfer.ucx import UcxTransport


def open_transport(config: TransferConfig, secret: bytes) -> Transport:
    """Return a fresh transport on the running event loop; the caller closes it.

    Two workers of one process that exchange blocks over `inproc` must share the returned object.

    Raises:
        ConfigError: UCX was chosen and cannot be loaded.
    """
    if config.transport == "inproc":
        return InprocTransport()
    return UcxTransport(config, secret)

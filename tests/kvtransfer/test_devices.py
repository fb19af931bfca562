"""Which network device UCX is given, and what is refused before anything listens."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvtransfer import devices
from kvtransfer.config import TransferConfig
from kvtransfer.devices import Device, device_of, resolve
from kvtransfer.ucx import UcxTransport
from protocol.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
HOST = {"lo": "127.0.0.1", "eth0": "10.1.2.3", "eth1": "8.8.8.8", "eth2": "10.9.9.9", "eth3": "10.9.9.9"}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with some devices."""
    monkeypatch.setattr(devices, "addresses", lambda: HOST)


def choose(address: str, named: str | None = None, *, allow_public: bool = False, users: bool = False) -> Device:
    return device_of(address, named, allow_public=allow_public, is_users_choice=users)


def test_this_machines_loopback_device_is_found() -> None:
    assert devices.addresses()["lo"] == "127.0.0.1"
    assert devices.address_towards("127.0.0.1") == "127.0.0.1"
    assert device_of("127.0.0.1", None, allow_public=False, is_users_choice=False) == Device("lo", "127.0.0.1")


def test_the_device_is_the_one_that_has_the_address(host: None) -> None:
    assert choose("127.0.0.1") == Device("lo", "127.0.0.1")
    assert choose("127.0.1.1").name == "lo"
    assert choose("10.1.2.3") == Device("eth0", "10.1.2.3")
    assert choose("10.9.9.9", "eth3") == Device("eth3", "10.9.9.9")
    assert choose("10.1.2.3", "eth2") == Device("eth2", "10.9.9.9")
    assert choose("10.1.2.3", "mlx5_0:1", users=True) == Device("mlx5_0:1", "10.1.2.3")


@pytest.mark.parametrize(
    ("address", "named", "reason"),
    [
        ("10.9.9.9", None, "devices eth2, eth3 have 10.9.9.9"),
        ("10.1.2.4", None, "no network device has 10.1.2.4"),
        ("10.1.2.3", "eth7", r"no device 'eth7'.* there are lo \(127.0.0.1\), eth0"),
        ("10.1.2.3", "mlx5_0:1", "no device 'mlx5_0:1'"),
        ("10.1.2.3", "all", "names one network device"),
        ("10.1.2.3", "eth0,eth2", "names one network device"),
        ("127.0.0.1", "all", "names one network device"),
        ("8.8.8.8", None, "8.8.8.8 is a public address"),
        ("10.1.2.3", "eth1", "8.8.8.8 is a public address"),
    ],
)
def test_what_is_no_one_private_device_is_refused(host: None, address: str, named: str | None, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        choose(address, named)


def test_a_public_device_may_be_meant(host: None) -> None:
    assert choose("8.8.8.8", allow_public=True).name == "eth1"
    assert choose("10.1.2.3", "eth1", allow_public=True).address == "8.8.8.8"


def test_a_public_or_unnamed_host_is_refused_at_once() -> None:
    for host in ("8.8.8.8", "2001:4860:4860::8888"):
        with pytest.raises(ConfigError, match="public address"):
            TransferConfig(host=host)
        assert TransferConfig(host=host, allow_public=True).host == host
    for host in ("0.0.0.0", "::"):
        for allow_public in (False, True):
            with pytest.raises(ConfigError, match="decode workers can dial"):
                TransferConfig(host=host, allow_public=allow_public)
    for private in ("10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.1.1", "localhost", "a.name"):
        assert TransferConfig(host=private).host == private


@pytest.mark.ucx
async def test_names_are_looked_up_before_they_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"public": ["8.8.8.8"], "any": ["0.0.0.0"], "two": ["10.0.0.1", "10.0.0.2"]}

    async def look_up(name: str) -> list[str]:
        return names[name]

    monkeypatch.setattr("kvtransfer.ucx.resolve", look_up)
    monkeypatch.setattr(devices, "addresses", lambda: {"lo": "127.0.0.1", "eth0": "8.8.8.8", "eth1": "0.0.0.0"})
    from tests.kvtransfer.test_ucx import US

    for name, reason in (
        ("public", "public address"),
        ("any", "decode workers can dial"),
        ("two", "several addresses"),
    ):
        transport = UcxTransport(TransferConfig(host=name), b"")
        with pytest.raises(ConfigError, match=reason):
            await transport.listen(US, lambda endpoint: None)
        await transport.close()


async def test_a_name_has_each_address_once() -> None:
    assert await resolve("localhost") == ["127.0.0.1"]
    with pytest.raises(OSError):
        await resolve("::1")
    assert socket.inet_aton((await resolve("127.0.0.1"))[0])


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("host", ["8.8.8.8", "0.0.0.0"])
def test_the_command_does_not_start(tmp_path: Path, role: str, host: str) -> None:
    secret, config = tmp_path / "secret", tmp_path / "config.json"
    secret.write_text("s" * 32)
    config.write_text("{}")
    done = subprocess.run(
        [sys.executable, "-m", "baton", role, f"dummy:{config}", f"--secret-file={secret}", f"--transfer-host={host}",
         "--router-url=http://127.0.0.1:9"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "transfer-host" in done.stderr

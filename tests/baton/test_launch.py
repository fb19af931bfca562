"""What `baton serve` prepares: sockets, the secret, and the command line of every child."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from baton import config
from baton.cli import parse
from baton.launch import Sockets, bind, child_specs
from baton.private_files import PrivateFiles, private_files
from baton.settings import Settings, merge
from baton.supervisor import ChildSpec
from protocol.errors import ConfigError

MODEL = config.ResolvedModel("/models/a.gguf", "/models/a.gguf", "a")


def settings(**arguments: object) -> Settings:
    return merge("serve", {"model": "m", "device": "cpu", "port": "0", **arguments}, {}, None)


@pytest.fixture
def taken_port() -> object:
    """Yield a port of the loopback address that somebody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def specs_of(given: Settings) -> dict[str, ChildSpec]:
    with private_files(given) as files:
        return {spec.name: spec for spec in specs_with(given, files)}


def specs_with(given: Settings, files: PrivateFiles) -> tuple[ChildSpec, ...]:
    sockets = bind(given)
    try:
        return child_specs(config.serve_config(given), MODEL, sockets, files)
    finally:
        sockets.close()


def parsed(spec: ChildSpec) -> Settings:
    """Read a child's command line, and the file that it names while that is there, as the child will."""
    assert spec.command[1:4] == ("-P", "-m", "baton")
    arguments = parse(spec.command[4:])
    file = Path(arguments.pop("config"))
    return merge(arguments.pop("role"), arguments, {}, file if file.exists() else None)


def test_a_busy_port_is_told_by_its_option(taken_port: int) -> None:
    with pytest.raises(ConfigError, match=rf"^port: 127.0.0.1:{taken_port} is in use; choose another with --port$"):
        bind(settings(port=str(taken_port)))
    with pytest.raises(ConfigError, match="^control-port: .*--control-port$"):
        bind(settings(control_port=str(taken_port)))


def test_a_foreign_address_is_told() -> None:
    with pytest.raises(ConfigError, match="cannot listen on 192.0.2.1:0"):
        bind(settings(host="192.0.2.1"))
    with pytest.raises(ConfigError, match="'no host' is no address"):
        bind(settings(host="no host"))


def test_nobody_can_connect_before_listening() -> None:
    sockets = bind(settings())
    address = sockets.http.getsockname()
    try:
        with pytest.raises(ConnectionRefusedError), socket.create_connection(address, timeout=5.0):
            pass
        sockets.listen()
        with socket.create_connection(address, timeout=5.0):
            pass
    finally:
        sockets.close()


def test_a_generated_secret_is_private_and_goes_away() -> None:
    with private_files(settings()) as files:
        found = Path(files.secret)
        assert len(config.read_secret(files.secret)) >= 32
        assert stat.S_IMODE(found.stat().st_mode) == 0o600
        assert stat.S_IMODE(found.parent.stat().st_mode) == 0o700
        with private_files(settings()) as other:
            assert config.read_secret(other.secret) != config.read_secret(files.secret)
    assert not found.parent.exists()


def test_a_given_secret_file_is_used_as_it_is(tmp_path: Path) -> None:
    with private_files(settings(secret_file=str(tmp_path / "s"))) as files:
        assert files.secret == str(tmp_path / "s")


def test_api_keys_reach_the_router_in_files_and_nobody_else(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("theirs tenant\n")
    given = settings(api_key=["sk-1", "sk-2"], api_key_file=[str(file)])
    with private_files(given) as files:
        specs = specs_with(given, files)
        router = parsed(specs[0])
        theirs, ours = router["api_key_file"]
        assert theirs == str(file) and Path(ours).read_text() == "sk-1\nsk-2\n" and router["api_key"] == ()
        assert {stat.S_IMODE(path.stat().st_mode) for path in Path(ours).parent.iterdir()} == {0o600}
    assert not Path(ours).exists()
    assert not any("sk-1" in part or "api-key" in part for spec in specs for part in spec.command)


def test_what_may_change_reaches_children_in_a_file_that_is_written_again() -> None:
    given = settings(log_level="warning", max_wait_s="5", max_body_bytes="77")
    with private_files(given) as files:
        router, prefill, _ = specs_with(given, files)
        assert not any("log-level" in part or "max-wait" in part for part in router.command)
        assert (parsed(router)["log_level"], parsed(router)["max_wait_s"], parsed(router)["max_body_bytes"]) == (
            *("warning", 5.0),
            77,
        )
        files.write(settings(log_level="debug", api_key=["sk-3"], allowed_origins=["*"]))
        found = parsed(router)
        assert (found["log_level"], found["max_wait_s"], found["allowed_origins"]) == ("debug", 30.0, ("*",))
        assert [Path(path).read_text() for path in found["api_key_file"]] == ["sk-3\n"]
        assert parsed(prefill)["log_level"] == "debug"
        files.write(settings())
        assert (parsed(router)["api_key_file"], parsed(router)["log_level"]) == ((), "info")


def test_a_key_file_that_cannot_be_used_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="api-key-file: cannot read"):
        config.serve_config(settings(api_key_file=[str(tmp_path / "none")]))


def test_every_worker_gets_its_name_cores_and_the_router() -> None:
    given = settings(prefill="2", dtype="float32", prefill_threads="3")
    specs = specs_of(given)
    assert list(specs) == ["router", "prefill-0", "prefill-1", "decode-0"]
    prefill = parsed(specs["prefill-1"])
    assert (prefill.role, prefill.model) == ("prefill", "/models/a.gguf")
    assert (prefill["worker_id"], prefill["threads"], prefill["dtype"]) == ("prefill-1", 3, "float32")
    assert prefill["secret_file"].endswith("/secret")
    assert prefill["router_url"][0].startswith("http://127.0.0.1:")
    assert specs["decode-0"].stage > specs["router"].stage


def test_the_router_inherits_the_sockets() -> None:
    given = settings(served_model_name=["x", "y"], max_body_bytes="5")
    spec = specs_of(given)["router"]
    router = parsed(spec)
    assert spec.pass_fds == (router["http_fd"], router["control_fd"])
    assert (router["served_model_name"], router["max_body_bytes"]) == (("x", "y"), 5)


def test_clients_name_the_model_as_the_user_did() -> None:
    assert parsed(specs_of(settings())["router"])["served_model_name"] == ("a",)


def test_two_cores_are_pinned_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    specs = specs_of(settings())
    shares = {
        name: (parsed(specs[name])["threads"], parsed(specs[name])["cores"]) for name in ("prefill-0", "decode-0")
    }
    assert shares == {"prefill-0": (1, (0,)), "decode-0": (1, (1,))}


def test_colocated_is_one_worker() -> None:
    specs = specs_of(settings(mode="colocated", threads="2"))
    assert list(specs) == ["router", "colocated-0"]
    worker = parsed(specs["colocated-0"])
    assert (worker.role, worker["threads"], worker["cores"]) == ("colocated", 2, ())


def test_sockets_close_both() -> None:
    sockets = Sockets(socket.socket(), socket.socket())
    sockets.close()
    assert (sockets.http.fileno(), sockets.control.fileno()) == (-1, -1)


def test_workers_that_share_a_gpu_share_its_memory() -> None:
    divided = specs_of(settings(device="cuda", decode="3"))
    workers = [parsed(spec) for name, spec in divided.items() if name != "router"]
    assert [worker["kv_memory_share"] for worker in workers] == [pytest.approx(0.2)] * 4
    given = specs_of(settings(device="cuda", kv_memory_share="0.3"))
    assert parsed(given["decode-0"])["kv_memory_share"] == 0.3
    on_cpu = specs_of(settings())
    assert "kv_memory_share" not in parsed(on_cpu["decode-0"]).given

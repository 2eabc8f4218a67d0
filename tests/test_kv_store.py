"""The client for horovodrun's key-value store, against the store of the installed Horovod.

Hazards: a missing key taken for an error; text that arrives changed; a store that does not answer.
"""

import socket

import pytest
from horovod.runner.http.http_server import RendezvousServer

from hvd_adam.distributed.kv_store import KeyValueStore


def client(port):
    return KeyValueStore("127.0.0.1", port, connect_timeout=5.0, answer_timeout=0.5)


@pytest.fixture
def store():
    server = RendezvousServer()
    yield client(server.start())
    server.stop()


def test_a_stored_value_is_returned_and_a_missing_one_is_none(store):
    assert store.get("scope", "key") is None
    store.put("scope", "key", '{"loss": 0.5, "unit": "µs"}')
    assert store.get("scope", "key") == '{"loss": 0.5, "unit": "µs"}'
    assert store.get("other_scope", "key") is None
    store.put("scope", "key", "2")
    assert store.get("scope", "key") == "2"


def test_proxies_of_the_environment_are_ignored(store, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    store.put("scope", "key", "1")
    assert store.get("scope", "key") == "1"


def test_a_store_that_refuses_connections_or_does_not_answer_raises_oserror():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(TimeoutError):
            client(silent.getsockname()[1]).get("scope", "key")
        port = silent.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        client(port).put("scope", "key", "1")

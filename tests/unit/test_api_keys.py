"""API keys: what is kept of them, which text is one, how they change; and the account of their limits."""

import json
import random
import stat
import threading

import pytest

from cluster.api_keys import (
    KeyRing,
    changing,
    presented_key,
    read_ring,
    with_new_key,
    with_revoked_key,
    with_rotated_key,
)
from cluster.errors import ConfigError
from cluster.limits import RETRY_CONCURRENT_S, SILENT_ENGINE_S, Limiter, share_of
from ops.cli import main

NOW_S = 1_000_000.0


def ring_of(*names: str, rate: int | None = None, concurrent: int | None = None) -> tuple[KeyRing, list[str]]:
    ring, keys = KeyRing(), []
    for name in names:
        ring, _, key = with_new_key(ring, name, NOW_S, rate, concurrent)
        keys.append(key)
    return ring, keys


def test_a_key_is_found_and_nothing_else_is():
    ring, (alice, bob) = ring_of("alice", "bob")
    assert [ring.find(key, NOW_S).name for key in (alice, bob)] == ["alice", "bob"]
    swapped = bob[:16] + alice[16:]  # bob's id with alice's secret
    for wrong in (
        None,
        "",
        alice[:-1],
        alice + "a",
        alice.upper(),
        swapped,
        "sy-" + "0" * 12 + alice[15:],
        " " + alice,
    ):
        assert ring.find(wrong, NOW_S) is None


def test_thousands_of_mutated_keys_and_headers_are_nobody():
    rng = random.Random(0)
    ring, (alice,) = ring_of("alice")
    for _ in range(3000):
        text = list(alice)
        text[rng.randrange(len(text))] = chr(rng.choice([rng.randrange(1, 128), rng.randrange(0x110000)]))
        if "".join(text) != alice:
            assert ring.find("".join(text), NOW_S) is None
        names = [b"authorization", b"x-api-key", b"Authorization", rng.randbytes(4)]
        headers = [(rng.choice(names), rng.randbytes(rng.randrange(200))) for _ in range(rng.randrange(3))]
        assert ring.find(presented_key(headers), NOW_S) is None


def test_where_a_key_may_stand():
    assert presented_key([(b"authorization", b"Bearer abc")]) == "abc"
    assert presented_key([(b"Authorization", b"bearer  abc ")]) == "abc"
    assert presented_key([(b"x-api-key", b"abc")]) == "abc"
    for headers in (
        [],
        [(b"authorization", b"Basic abc")],
        [(b"authorization", b"abc")],
        [(b"authorization", b"Bearer abc"), (b"x-api-key", b"abc")],
        [(b"authorization", b"Bearer \xff")],
        [(b"x-api-key", b"a" * 1000)],
    ):
        assert presented_key(headers) in (None, "")


def test_rotation_keeps_the_former_key_for_its_time_and_revocation_ends_both():
    ring, (old,) = ring_of("alice", rate=5)
    ring, record, new = with_rotated_key(ring, "alice", NOW_S, keep_s=60.0)
    assert record.requests_per_minute == 5 and old != new
    assert ring.find(old, NOW_S + 59) == ring.find(new, NOW_S + 59) == record
    assert ring.find(old, NOW_S + 60) is None and ring.find(new, NOW_S + 60) == record
    ring, _ = with_revoked_key(ring, record.id, NOW_S)
    assert ring.find(new, NOW_S) is None and ring.find(old, NOW_S) is None and not ring.has_valid_keys
    with pytest.raises(ConfigError, match="no valid key alice"):
        with_rotated_key(ring, "alice", NOW_S, 0.0)
    assert with_new_key(ring, "alice", NOW_S, None, None)  # the name of a revoked key is free


def test_names_and_limits_are_checked():
    ring, _ = ring_of("alice")
    for name, rate, words in (("alice", None, "already"), ("a b", None, "a name has"), ("bob", 0, "must be 1 or more")):
        with pytest.raises(ConfigError, match=words):
            with_new_key(ring, name, NOW_S, rate, None)


def test_the_file_is_private_has_no_keys_and_comes_back_as_it_was(tmp_path):
    path = tmp_path / "deep" / "keys.json"
    with changing(path) as rings:
        rings[0], _, key = with_new_key(rings[0], "alice", NOW_S, 60, 4)
        written = rings[0]
    assert read_ring(path).records == written.records
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and key[16:] not in path.read_text()
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="chmod go-w"):
        read_ring(path)


def test_changes_at_the_same_time_are_all_kept(tmp_path):
    def add(name: str) -> None:
        with changing(tmp_path / "keys.json") as rings:
            rings[0] = with_new_key(rings[0], name, NOW_S, None, None)[0]

    threads = [threading.Thread(target=add, args=(f"key-{i}",)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_ring(tmp_path / "keys.json").records) == 20


def test_mutated_files_are_refused_in_words_that_repeat_nothing(tmp_path):
    rng = random.Random(1)
    ring, _ = ring_of("alice", "bob", rate=5)
    good = ring.to_json()
    values = [None, True, -1, 0, 1.5, "", "x", [], {}, float("nan"), 10**400]
    for _ in range(500):
        document = json.loads(good)
        record = rng.choice(document["keys"])
        record[rng.choice(list(record))] = rng.choice(values)
        cut = rng.randrange(len(good))
        for text in (json.dumps(document), good[:cut], good[:cut] + chr(rng.randrange(128)) + good[cut + 1 :]):
            try:
                KeyRing.from_json(text)
            except ConfigError as error:
                assert ring.records[0].sha256 not in str(error)
    for text in ("", "[]", "null", "[" * 100_000, '{"format": 2, "keys": []}', '{"format": 1, "keys": [5]}'):
        with pytest.raises(ConfigError):
            KeyRing.from_json(text)
    (tmp_path / "keys.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError):
        read_ring(tmp_path / "keys.json")


def test_prompts_of_a_key_are_logged_when_it_is_said_so(tmp_path, capsys):
    file = tmp_path / "keys.json"
    for words in (["add", "alice"], ["add", "bob", "--log-prompts"], ["log-prompts", "alice", "on"]):
        assert main(["keys", *words, "--file", str(file)]) == 0
    assert [record.log_prompts for record in read_ring(file).records] == [True, True]
    assert main(["keys", "log-prompts", "bob", "off", "--file", str(file)]) == 0
    assert [record.log_prompts for record in read_ring(file).records] == [True, False]
    capsys.readouterr()
    assert main(["keys", "list", "--file", str(file)]) == 0
    assert capsys.readouterr().out.count("prompts are logged") == 1
    document = json.loads(file.read_text())
    for key in document["keys"]:
        del key["log_prompts"]  # as the first releases wrote it
    assert [record.log_prompts for record in KeyRing.from_json(json.dumps(document)).records] == [False, False]
    document["keys"][0]["log_prompts"] = 1
    with pytest.raises(ConfigError, match="log_prompts has the wrong type"):
        KeyRing.from_json(json.dumps(document))


def test_the_command(tmp_path, capsys):
    file = ["--file", str(tmp_path / "keys.json")]

    def keys(*words: str) -> str:
        assert main(["keys", *words, *file]) == 0
        return capsys.readouterr().out

    assert "no keys" in keys("list")
    made = json.loads(keys("add", "alice", "--concurrent", "2", "--json"))
    assert read_ring(tmp_path / "keys.json").find(made["key"], NOW_S).concurrent == 2
    assert made["key"] not in keys("list") and "alice" in keys("list")
    rotated = json.loads(keys("rotate", "alice", "--keep-old", "0", "--json"))
    assert rotated["key"] != made["key"] and rotated["id"] == made["id"]
    assert "revoked alice" in keys("revoke", made["id"])
    (listed,) = json.loads(keys("list", "--json"))
    assert listed["revoked_s"] and not {"key", "sha256"} & listed.keys()
    assert main(["keys", "revoke", "nobody", *file]) == 2


# -- limits -----------------------------------------------------------------------------------------------------------


def limited(rate: int | None = None, concurrent: int | None = None):
    return ring_of("alice", rate=rate, concurrent=concurrent)[0].records[0]


def test_a_minutes_worth_may_come_at_once_and_then_as_it_refills():
    limiter, key = Limiter(), limited(rate=60)
    assert [limiter.admit(key, "e", str(i), 0.0) for i in range(60)] == [0.0] * 60
    assert limiter.admit(key, "e", "x", 0.0) == pytest.approx(1.0)
    assert limiter.admit(key, "e", "x", 0.5) == pytest.approx(0.5)
    assert limiter.admit(key, "e", "x", 1.0) == 0.0
    assert limiter.admit(key, "e", "y", 1.0) > 0
    assert [limiter.admit(key, "e", str(i), 1e6) for i in range(60)] == [0.0] * 60
    assert limiter.admit(key, "e", "x", 1e6) > 0  # never more than a minute's worth


def test_never_more_at_the_same_time_than_allowed_over_all_engines():
    rng = random.Random(2)
    limiter, key = Limiter(), limited(concurrent=3)
    open_leases: set[tuple[str, str]] = set()
    for i in range(2000):
        engine = f"engine-{rng.randrange(4)}"
        if open_leases and rng.random() < 0.5:
            lease = rng.choice(sorted(open_leases))
            open_leases.remove(lease)
            limiter.release(*lease)
        elif limiter.admit(key, engine, str(i), 0.0) == 0.0:
            open_leases.add((engine, str(i)))
        else:
            assert len(open_leases) == 3
        assert limiter.open_leases(key.id) == len(open_leases) <= 3


def test_leases_that_an_engine_has_forgotten_and_those_of_lost_engines_end():
    limiter, key = Limiter(), limited(concurrent=1)
    assert limiter.admit(key, "e", "a", 0.0) == 0.0
    limiter.renew("e", (), 1.0)  # the report left before the answer came
    assert limiter.admit(key, "e", "b", 1.0) == RETRY_CONCURRENT_S
    limiter.renew("e", (), 4.0)
    assert limiter.admit(key, "e", "b", 4.0) == 0.0
    limiter.renew("e", ("b",), 8.0)
    assert limiter.admit(key, "f", "c", 8.0) == RETRY_CONCURRENT_S
    limiter.renew("f", (), 8.0 + SILENT_ENGINE_S + 1)
    assert limiter.admit(key, "f", "c", 20.0) == 0.0


def test_a_share_is_at_least_one():
    assert share_of(limited(rate=10, concurrent=1), 4).requests_per_minute == 2
    assert share_of(limited(rate=10, concurrent=1), 4).concurrent == 1
    assert share_of(limited(), 4).concurrent is None

"""Suspicion and patience: pure, with a clock that the tests turn."""

from cluster.blame import NEVER_NS, OVERLOADED, Cause, Latency, Suspicions

S = 1_000_000_000


def test_a_suspicion_ends_and_lasts_longer_each_time():
    heard = []
    suspicions = Suspicions(lambda name, cause: heard.append((name, cause)))
    now_ns, lengths_s = 5 * S, []
    for _ in range(8):
        suspicions.accuse("a", Cause.SILENT, now_ns)
        assert suspicions.is_suspected("a", now_ns) and not suspicions.is_suspected("b", now_ns)
        assert suspicions.suspected(now_ns) == ["a"]
        suspicions.reviewed(now_ns)
        lengths_s.append((suspicions.review_ns - now_ns) / S)
        now_ns = suspicions.review_ns
        assert not suspicions.is_suspected("a", now_ns)
    assert lengths_s == [1, 2, 4, 8, 16, 30, 30, 30]
    assert heard == [("a", Cause.SILENT)] * 8
    suspicions.reviewed(now_ns)
    assert suspicions.review_ns == NEVER_NS


def test_accusations_during_a_suspicion_are_counted_but_not_news():
    heard = []
    suspicions = Suspicions(lambda name, cause: heard.append(cause))
    suspicions.accuse("a", Cause.SILENT, 0)
    suspicions.accuse("a", Cause.MALFORMED, S // 2)
    assert heard == [Cause.SILENT]
    assert suspicions.counts == {"silent": 1, "malformed": 1}
    suspicions.reviewed(S // 2)
    assert suspicions.review_ns == S


def test_a_timely_answer_clears_the_record_and_asks_for_a_review():
    suspicions = Suspicions()
    suspicions.accuse("a", Cause.SILENT, 0)
    suspicions.reviewed(0)
    suspicions.acquit("b")
    assert suspicions.review_ns == S
    suspicions.acquit("a")
    assert suspicions.review_ns == 0 and not suspicions.is_suspected("a", 0)
    suspicions.accuse("a", Cause.SILENT, 0)
    suspicions.reviewed(0)
    assert suspicions.review_ns == S, "the strikes begin anew"


def test_a_late_answer_that_waited_in_a_queue_is_load_and_not_a_fault():
    suspicions = Suspicions()
    for name in ("busy", "slow"):
        suspicions.accuse(name, Cause.SILENT, 0)
    suspicions.explain("busy", compute_ns=10, queue_ns=90)
    suspicions.explain("slow", compute_ns=90, queue_ns=10)
    assert suspicions.suspected(1) == ["slow"]
    assert suspicions.counts[OVERLOADED] == 1


def test_expected_latency_follows_what_was_seen_by_size():
    latency = Latency()
    assert latency.expected_ns(1) == 0
    latency.note(1, 800)
    assert latency.expected_ns(1) == 800
    assert latency.expected_ns(16) == 800 * 16, "nothing of that size was seen: by tokens"
    for _ in range(100):
        latency.note(20, 5000)
        latency.note(1, 1600)
    assert latency.expected_ns(31) == 5000
    assert 1500 < latency.expected_ns(1) <= 1600
    assert latency.expected_ns(2048) == 5000 << 7
    latency.note(300, 7)
    assert Latency().expected_ns(300) == 0
    latency = Latency()
    latency.note(64, 900)
    assert latency.expected_ns(1) == 900, "nothing smaller was seen"

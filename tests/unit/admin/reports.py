"""What instances say of themselves, as the tests of what shows it need it."""

REPORT = {
    "instance": "server", "version": "1", "mode": "server", "pid": 7, "since": 0, "device": "bulk0",
    "offload": ["csum", "tso"], "addresses": ["10.86.0.1/24"], "listen": ["[::]:7443"],
    "workers": [{"index": 0, "alive": True, "restarts": 1}, {"index": 1, "alive": True, "restarts": 0}],
    "drops": {"no_session": 3, "queue_full": 0},
    "listener": {"handshakes": 2, "admitted": 9, "source_full": 4},
    "sessions": [{
        "identity": "alice", "session": 1, "addresses": ["10.86.0.2"], "cipher": "aes-256-gcm",
        "offload": ["csum", "tso"], "age": 61, "agreed_connections": 2, "bytes_out": 1 << 20, "bytes_in": 5 << 30,
        "rate_out": 1_500_000, "rate_in": 2_000_000_000, "connections": [
            {"index": 0, "worker": 0, "peer": "[2001:db8::2]:4711", "age": 90061, "rtt_ms": 0.84, "bytes_out": 1536,
             "bytes_in": 3 << 30, "segments_out": 1234567, "segments_in": 1, "frames_out": 2, "frames_in": 3,
             "rate_out": 1000, "rate_in": 999, "queued": 2048, "queue_delay_ms": 12.34, "bytes_retransmitted": 15,
             "congestion": "bbr"},
            {"index": 1, "worker": 1, "peer": "192.0.2.1:1", "rtt_ms": None, "bytes_in": 1 << 30},
        ],
    }],
}  # fmt: skip


def changed(report=REPORT, **fields):
    """A copy of a report with other fields; session__NAME ones are those of its one session."""
    of_session = {name[9:]: value for name, value in fields.items() if name.startswith("session__")}
    others = {name: value for name, value in fields.items() if not name.startswith("session__")}
    return {**report, "sessions": [{**session, **of_session} for session in report["sessions"]], **others}

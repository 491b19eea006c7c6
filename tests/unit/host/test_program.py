"""Other programs: what they are given, and what is told of them."""

from bulkvpnd.host import program


def test_a_program_has_little_of_the_environment(monkeypatch):
    """resolvectl would tell $NOTIFY_SOCKET of its failure."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    said = program.run(["sh", "-c", 'echo "<$NOTIFY_SOCKET> <$LC_ALL> <$PATH>" >&2; exit 1'], 5)
    assert said is not None and said.startswith("<> <C> </")


def test_none_is_said_of_one_that_does_it():
    assert program.run(["true"], 5) is None

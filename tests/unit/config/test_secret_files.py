"""bulkvpnd.config.files: files that may hold a key, checked on the descriptor that is read."""

import collections
import os
import threading
import time

import pytest
from examples import CERTIFICATE, KEY, SERVER, load, refused

from bulkvpnd import config

INLINE = SERVER.replace("key = own.key", f"<key>\n{KEY}</key>")


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o601, 0o620, 0o777])
def test_a_key_that_others_can_reach(file, mode):
    path = file(INLINE, mode=mode)
    message = refused(load, path)
    assert f"has mode {mode:04o}" in message and f"run: chmod 600 {path}" in message
    server = load(file(SERVER, "other.conf"))
    key = file(KEY, "own.key", mode)
    assert f"run: chmod 600 {key}" in refused(config.pem_text, server, "key")


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440])
def test_a_key_that_others_cannot_reach(file, mode):
    assert load(file(INLINE, mode=mode)).key == (None, KEY)


def test_a_file_without_a_key_may_be_public(file):
    server = load(file(SERVER, mode=0o644))
    file(CERTIFICATE, "ca.crt", 0o644)
    assert config.pem_text(server, "ca") == CERTIFICATE


def test_a_key_of_somebody_else(file):
    path = file(INLINE)
    try:
        os.chown(path, 1234, 1234)
    except OSError as error:
        pytest.skip(f"needs root, to give a file away: {error}")
    assert f"belongs to user id 1234; run: chown root {path}" in refused(load, path)
    os.chown(file(SERVER), 1234, 1234)
    assert load(path).mode == "server"


def test_a_symlink(file, tmp_path):
    real = file(SERVER, "real.conf")
    link = tmp_path / "link.conf"
    link.symlink_to(real)
    assert refused(load, link).startswith(f"{link}: cannot be read: ")
    file(KEY, "real.key")
    (tmp_path / "own.key").symlink_to("real.key")
    assert f"{tmp_path / 'own.key'}: cannot be read: " in refused(config.pem_text, load(real), "key")


def test_a_file_that_is_swapped_meanwhile_is_judged_by_what_is_read_of_it(file, tmp_path):
    """By whoever may write its directory: a name may stand for another file each time that it is looked up."""
    texts = {file(KEY, "good", 0o600): KEY, file(KEY.replace("BEGIN", "BEGIN EC"), "bad", 0o644): None}
    path, stop = file(KEY, "own.key"), threading.Event()

    def swap():
        while not stop.is_set():
            for number, one in enumerate(texts):
                os.link(one, tmp_path / f"new{number}")
                os.replace(tmp_path / f"new{number}", path)

    swapping = threading.Thread(target=swap)
    swapping.start()
    found = collections.Counter()
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not (found[KEY] > 2000 and found[None] > 2000):
            try:
                found[config.read_secret_file(path)] += 1
            except config.ConfigurationError:
                found[None] += 1
    finally:
        stop.set()
        swapping.join()
    assert set(found) == set(texts.values())


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, expected in (("", "not a regular file"), ("pipe", "not a regular file"), ("none", "No such file")):
        assert expected in refused(load, tmp_path / name)
    assert "cannot be read" in refused(load, tmp_path / "new\nline")
    assert "cannot be read" in refused(load, "x" * 5000)


def test_a_file_without_permission(file, unprivileged):
    path = file(SERVER, mode=0)
    with unprivileged():
        assert refused(load, path).startswith(f"{path}: cannot be read: Permission denied")


def test_the_size_of_a_file_is_limited(file):
    size = config.MAX_FILE_SIZE
    assert load(file(SERVER + "#" * (size - len(SERVER)))).mode == "server"
    assert f"has more than {size} bytes" in refused(load, file(SERVER + "#" * (size + 1 - len(SERVER))))


def test_a_file_that_is_no_text(file):
    assert "is not UTF-8 text" in refused(load, file(b"mode = \xff\xfe"))


def test_credentials_stand_in_for_files(file, tmp_path, monkeypatch):
    path = file(SERVER)
    file(KEY.replace("M", "N"), "own.key")
    file(CERTIFICATE, "own.crt")
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    assert load(path).mtu == 1500
    file(SERVER + "mtu = 1400\nmtu = 1300", "credentials/test.conf", 0o440)
    # Named after the file that the administrator knows, not after systemd's copy.
    assert refused(load, path).startswith(f"{path}:7: mtu: given twice")
    file(SERVER + "mtu = 1400\n", "credentials/test.conf", 0o440)
    file(KEY, "credentials/own.key", 0o440)
    server = load(path)
    assert server.mtu == 1400
    assert config.pem_text(server, "key") == KEY
    assert config.pem_text(server, "certificate") == CERTIFICATE
    assert load(tmp_path / "not-there" / "test.conf").mtu == 1400


def test_a_pem_file_without_pem(file):
    server = load(file(SERVER))
    path = file("nothing", "own.crt")
    assert f"certificate = {path}: has no PEM text" in refused(config.pem_text, server, "certificate")

"""A directory for the configurations of a test."""

import pytest


@pytest.fixture
def file(tmp_path):
    """Writes tmp_path/NAME with a mode, and returns its path."""

    def write(text, name="test.conf", mode=0o600):
        path = tmp_path / name
        path.unlink(missing_ok=True)  # its mode may forbid even its owner to write
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(mode)
        return path

    return write

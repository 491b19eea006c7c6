"""The revocation list in force, and the TLS context that goes by it.

    crl: at start, when the file changes, on SIGHUP
      |-- good --> a new SSLContext for later handshakes, and `revoked` for the connections that live
      '-- bad ---> the former list stays in force

An SSLContext keeps every list that it was ever given, so each list gets a context of its own. When the list has
expired, OpenSSL refuses every certificate: whoever can keep a new list away must not keep a revoked client in.
"""

import logging
import os

from bulkvpnd import config, pki
from bulkvpnd.control import tls

log = logging.getLogger(__name__)


class Revocations:
    """context: for new handshakes. revoked: {(issuer, serial): since when}, empty without the option `crl`.
    texts: the PEM texts that the context was made of.

    now: aware datetime, here and below. Raises ConfigurationError when the list or the certificates are not usable.
    """

    def __init__(self, configuration, now):
        self._configuration = configuration
        self._crl = None
        self._stamp = self._look()
        self.revoked = {}
        self._install(tls.read_texts(configuration), now)

    def _install(self, texts, now):
        crl = None
        if "crl" in texts:
            try:
                crl = pki.read_crl(texts["crl"], texts["ca"])
                pki.check_crl_dates(crl, now)
            except pki.PKIError as error:
                raise config.ConfigurationError(f"{self._configuration.path}: {error}") from None
        self.context = tls.make_context(self._configuration, texts)
        self.texts, self._crl = texts, crl
        self.revoked = crl.revoked if crl else {}

    @property
    def expires(self):
        """When the list in force expires, aware datetime; None without the option `crl`."""
        return self._crl.last if self._crl else None

    def _look(self):
        """What tells one version of the file from another; None where there is no file."""
        file = config.pem_path(self._configuration, "crl")
        try:
            status = os.stat(file) if file else None
        except OSError:
            return None
        return status and (status.st_ino, status.st_size, status.st_mtime_ns)

    def check(self, now, force=False):
        """Reads the list again if its file changed or if told to. Returns whether another list is in force now."""
        if self._crl is None:
            return False
        stamp = self._look()
        is_new = force or stamp != self._stamp
        self._stamp = stamp
        if is_new:
            try:
                self._install({**self.texts, "crl": config.pem_text(self._configuration, "crl")}, now)
            except config.ConfigurationError as error:
                log.error("%s; the former revocation list stays in force", error)
                is_new = False
            else:
                log.info("revocation list read: %d certificates, valid until %s", len(self.revoked),
                         f"{self._crl.last:%Y-%m-%d}")
        return is_new

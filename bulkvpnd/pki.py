"""Certificates: makes them for `bulkvpnctl pki`, and judges them for the daemon.

A site has one authority; it signs one certificate for each end, with one name and one role:

    create_authority --> issue(role "server") --> server.conf  <-- check_own at start
                     `-> issue(role "client") --> client.conf  <-- check_own at start
                     `-> create_crl --> crl.pem  <-- read_crl at start and whenever it changes
    renew_authority, with the same key, before it ends: all of the above stays good
    peer's certificate, verified by TLS --> identity --> its one name

Nothing here reads a file, a clock or a socket: PEM text, DER bytes and `now` (an aware datetime) come in. Keys made
here are EC P-256; certificates and keys from elsewhere may also be RSA, Ed25519 or Ed448.
"""

import dataclasses
import datetime
import re

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from bulkvpnd import config

CLOCK_SKEW = datetime.timedelta(hours=1)
"""How far an end's clock may be behind the authority's when a fresh certificate is first used (choice)."""

WARNING_TIME = datetime.timedelta(days=30)
"""How long before it expires that is said of anything: a month to notice, whoever is away (choice)."""

USAGES = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}
"""The extended key usage (RFC 5280 section 4.2.1.12) that each role must have."""

SERVER_NAME = re.compile(r"(?![0-9.]+\Z)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*")
"""What a server may be called beyond config.NAME: TLS takes anything else for an address or refuses to ask for it."""

_KEY_USAGE_BITS = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip

_VERIFY_ARGUMENTS = (
    (ec.EllipticCurvePublicKey, lambda algorithm: (ec.ECDSA(algorithm),)),
    (rsa.RSAPublicKey, lambda algorithm: (padding.PKCS1v15(), algorithm)),
    (ed25519.Ed25519PublicKey, lambda algorithm: ()),
    (ed448.Ed448PublicKey, lambda algorithm: ()),
)


class PKIError(Exception):
    """A certificate or key that cannot be used. The message is one line and says what would mend it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Description:
    """What an administrator wants to know of a certificate. serial: int. expires: aware datetime."""

    name: str
    role: str
    serial: int
    expires: datetime.datetime


@dataclasses.dataclass(frozen=True, slots=True)
class RevocationList:
    """What read_crl found. revoked: {(issuer, serial number): since when}. number: of the newest list. first, last:
    from when to when all of it is valid, aware datetimes."""

    revoked: dict
    number: int
    first: datetime.datetime
    last: datetime.datetime


def create_authority(name, now, days):
    """Makes an authority that may sign the ends' certificates and no further authorities.

    name: its common name, must match config.NAME. now: aware datetime. days: int, how long it is valid.
    Returns (certificate, private key), each PEM str; the key is PKCS #8 and not encrypted. Raises PKIError.
    Extensions are those that RFC 5280 section 4.2 demands of an authority, and OpenSSL with X509_V_FLAG_X509_STRICT.
    """
    _check_name(name, config.NAME, "1 to 64 letters, digits, dots, underscores and hyphens")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    extensions = (
        (x509.BasicConstraints(ca=True, path_length=0), True),
        (_key_usage("key_cert_sign", "crl_sign"), True),
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
    )
    end = now + datetime.timedelta(days=days)
    return _sign(subject, subject, key.public_key(), (now - CLOCK_SKEW, end), extensions, key), _key_pem(key)


def renew_authority(certificate_pem, key_pem, now, days):
    """Makes another certificate of an authority: same name, key and extensions, so what it has signed stays good.

    certificate_pem, key_pem: PEM str; the certificate may have expired. now: aware datetime. days: int, how long the
    new one is valid. Returns PEM str. Raises PKIError, also for an authority that another one has signed.
    The end that still has the former certificate finds the same name and key in what the authority signs from now on,
    and the same key identifier (RFC 5280 section 4.2.1.2). Where a certificate names its authority by serial number,
    which none does that is made here, only the former certificate fits.
    """
    authority, key = _authority(certificate_pem, key_pem)
    if authority.issuer != authority.subject:
        raise PKIError("ca.crt: is signed by another authority; have that one renew it")
    try:
        # Its own key identifier as that of its issuer may come with the serial number, which is a new one.
        extensions = [(one.value, one.critical) for one in authority.extensions
                      if one.oid != ExtensionOID.AUTHORITY_KEY_IDENTIFIER]
    except Exception as error:  # as in identity
        raise PKIError(f"ca.crt: cannot be read: {_shown(error)}; make a new authority") from None
    period = (now - CLOCK_SKEW, now + datetime.timedelta(days=days))
    return _sign(authority.subject, authority.subject, authority.public_key(), period, extensions, key)


def issue(authority_certificate_pem, authority_key_pem, name, role, now, days):
    """Makes a key and a certificate for one end, signed by the authority.

    authority_certificate_pem, authority_key_pem: PEM str. name: the end's one name, must match config.NAME, for a
    server SERVER_NAME too. role: "server" or "client". now: aware datetime. days: int; the certificate is valid for
    that long, but never longer than the authority.
    Returns (certificate, private key), each PEM str. Raises PKIError.
    """
    _check_name(name, config.NAME, "1 to 64 letters, digits, dots, underscores and hyphens")
    if role == "server":
        _check_name(name, SERVER_NAME, "like a host name: parts of at most 63 characters, and not an address")
    authority, authority_key = _authority(authority_certificate_pem, authority_key_pem)
    _check_dates("ca.crt", authority, now)
    key = ec.generate_private_key(ec.SECP256R1())
    extensions = (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_key_usage("digital_signature"), True),
        (x509.ExtendedKeyUsage([USAGES[role]]), False),
        (x509.SubjectAlternativeName([x509.DNSName(name)]), False),
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
        (_authority_key_identifier(authority), False),
    )
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    period = (now - CLOCK_SKEW, min(now + datetime.timedelta(days=days), validity(authority)[1]))
    certificate = _sign(subject, authority.subject, key.public_key(), period, extensions, authority_key)
    return certificate, _key_pem(key)


def identity(certificate_der, role):
    """The one name in the certificate of a peer whose chain TLS has verified already.

    certificate_der: bytes, or None where the peer sent none. role: what the peer must be, "server" or "client".
    Returns the name, which matches config.NAME. Raises PKIError, and nothing else, whatever the bytes are: for a
    certificate that cannot be read, one whose extended key usage lacks the role (or is missing: no role is assumed),
    and one that does not have exactly one subject alternative name, of type DNS. The common name never counts
    (RFC 6125 section 6.4.4), and a name that does not match is refused, not changed into one that does.
    """
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        extensions = {extension.oid: extension.value for extension in certificate.extensions}
    except Exception as error:  # what the parser raises differs by version and by field, and all of it means this
        raise PKIError(f"certificate: cannot be read: {_shown(error)}; issue a new one") from None
    if USAGES[role] not in extensions.get(ExtensionOID.EXTENDED_KEY_USAGE, ()):
        raise PKIError(f"certificate: its extended key usage does not name a {role}; issue one for a {role}")
    names = list(extensions.get(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, ()))
    if len(names) != 1 or not isinstance(names[0], x509.DNSName):
        raise PKIError("certificate: has not exactly one subject alternative name, of type DNS; issue one that has")
    if not config.NAME.fullmatch(names[0].value):
        raise PKIError(
            f"certificate: its name {_shown(names[0].value)} is not 1 to 64 letters, digits, dots, underscores and "
            "hyphens; issue one with such a name"
        )
    return names[0].value


def check_own(ca_pem, certificate_pem, key_pem, role, now):
    """Finds at start what would otherwise make every handshake fail.

    ca_pem: one or several authorities. certificate_pem: this end's certificate, after it those of authorities in
    between, if there are any. key_pem: its private key. role: what this end is. now: aware datetime.
    Returns when what is in use expires, {"certificate": aware datetime, "ca": aware datetime}: the first certificate of
    a chain, and the last of an authority's that were renewed. Raises PKIError, one line that names the option and the
    mend. Understands ECDSA, RSA PKCS #1 v1.5, Ed25519 and Ed448 signatures; RSA-PSS cannot be told apart by
    cryptography 38 and is refused.
    """
    authorities = _certificates("ca", ca_pem)
    chain = _certificates("certificate", certificate_pem)
    key = _private_key("key", key_pem)
    if _public_bytes(key.public_key()) != _public_bytes(chain[0].public_key()):
        raise PKIError("key: does not belong to the certificate; use the key and certificate that were made together")
    identity(chain[0].public_bytes(serialization.Encoding.DER), role)
    for certificate in chain:
        _check_dates("certificate", certificate, now)
    for certificate, issuers in zip(chain, [*([issuer] for issuer in chain[1:]), authorities]):
        signers = [issuer for issuer in issuers if _is_signed_by(certificate, issuer)]
        if not signers:
            raise PKIError("certificate: is not signed by the ca; use the ca and certificate that were made together")
    # As OpenSSL, which takes one that has not expired where it has the choice.
    authority = max(signers, key=lambda one: validity(one)[1])
    _check_dates("ca", authority, now)
    return {"certificate": min(validity(one)[1] for one in chain), "ca": validity(authority)[1]}


def describe(certificate_pem):
    """Name, role, serial number and expiry of an end's certificate, PEM str. Raises PKIError."""
    certificate = _certificates("certificate", certificate_pem)[0]
    der = certificate.public_bytes(serialization.Encoding.DER)
    for role in USAGES:
        try:
            return Description(identity(der, role), role, certificate.serial_number, validity(certificate)[1])
        except PKIError as error:
            reason = error
    raise reason


def kind_of_key(certificate_pem):
    """The kind of key that an end's certificate, PEM str, is for, such as EC secp256r1 or RSA 2048. Raises PKIError."""
    key = _certificates("certificate", certificate_pem)[0].public_key()
    if isinstance(key, rsa.RSAPublicKey):
        return f"RSA {key.key_size}"
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"EC {key.curve.name}"
    return type(key).__name__.strip("_").removesuffix("PublicKey")


def create_crl(authority_certificate_pem, authority_key_pem, revoked, number, now, days):
    """Makes a certificate revocation list (CRL), signed by the authority.

    authority_certificate_pem, authority_key_pem: PEM str. revoked: {serial number: since when, aware datetime}.
    number: int, larger than that of any list before. now: aware datetime. days: int; the list is valid for that long,
    but never longer than the authority. Returns PEM str. Raises PKIError.
    Extensions are those that RFC 5280 section 5.2 demands.
    """
    authority, authority_key = _authority(authority_certificate_pem, authority_key_pem)
    _check_dates("ca.crt", authority, now)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.subject)
        .last_update(now - CLOCK_SKEW)
        .next_update(min(now + datetime.timedelta(days=days), validity(authority)[1]))
        .add_extension(x509.CRLNumber(number), False)
        .add_extension(_authority_key_identifier(authority), False)
    )
    for serial, since in sorted(revoked.items()):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(since).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(authority_key, _hash(authority_key)).public_bytes(serialization.Encoding.PEM).decode("ascii")


def read_crl(crl_pem, ca_pem):
    """Reads one or several revocation lists. crl_pem: PEM str. ca_pem: PEM str, the authorities that may sign them.

    Returns a RevocationList. Raises PKIError for what is no list or not signed by an authority; its dates are for
    the caller to judge.
    """
    blocks = re.findall("-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", crl_pem, re.DOTALL)
    if not blocks:
        raise PKIError("crl: is not a revocation list in PEM form; make it again with: bulkvpnctl pki crl")
    authorities = _certificates("ca", ca_pem)
    revoked, numbers, periods = {}, [], []
    for block in blocks:
        try:
            crl = x509.load_pem_x509_crl(block.encode())
            signers = [one for one in authorities if one.subject == crl.issuer and _has_signed(one, crl)]
            revoked |= {(crl.issuer, entry.serial_number): _revocation_date(entry) for entry in crl}
            periods.append(_crl_validity(crl))
            numbers += [one.value.crl_number for one in crl.extensions if one.oid == ExtensionOID.CRL_NUMBER]
        except Exception as error:  # as in identity
            raise PKIError(
                f"crl: cannot be read: {_shown(error)}; make it again with: bulkvpnctl pki crl"
            ) from None
        if not signers:
            raise PKIError("crl: is not signed by the ca; use the ca and crl that were made together")
    return RevocationList(
        revoked, max(numbers, default=0), max(first for first, _ in periods), min(last for _, last in periods)
    )


def check_crl_dates(crl, now):
    """Whether a RevocationList may be trusted at `now`, an aware datetime. Raises PKIError."""
    clock = f"this machine's clock says {_moment(now)}"
    if now < crl.first:
        raise PKIError(f"crl: is not valid before {_moment(crl.first)}, and {clock}; set the clock if it is wrong")
    if now > crl.last:
        raise PKIError(
            f"crl: expired at {_moment(crl.last)}, and {clock}; make a new one with: bulkvpnctl pki crl, "
            "or set the clock if it is wrong"
        )


def issuer_and_serial(certificate_der):
    """What a revocation list calls a certificate, DER bytes: (issuer, serial number). Raises PKIError."""
    return _read(certificate_der, lambda certificate: (certificate.issuer, certificate.serial_number))


def expiry(certificate_der):
    """When a certificate, DER bytes, expires, aware datetime. Raises PKIError."""
    return _read(certificate_der, lambda certificate: validity(certificate)[1])


def _read(certificate_der, what):
    try:
        return what(x509.load_der_x509_certificate(certificate_der))
    except Exception as error:  # as in identity
        raise PKIError(f"certificate: cannot be read: {_shown(error)}; issue a new one") from None


def describe_authority(certificate_pem):
    """(name, serial number, expiry) of an authority's certificate, PEM str. Raises PKIError."""
    certificate = _certificates("ca", certificate_pem)[0]
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return _shown(names[0].value)[1:-1] if names else "", certificate.serial_number, validity(certificate)[1]


def validity(certificate):
    """(first, last) moment of a cryptography certificate, aware datetimes in UTC."""
    if hasattr(certificate, "not_valid_after_utc"):
        return certificate.not_valid_before_utc, certificate.not_valid_after_utc
    # Before cryptography 42 there are only naive ones, which are UTC too and deprecated from then on.
    utc = datetime.timezone.utc
    return certificate.not_valid_before.replace(tzinfo=utc), certificate.not_valid_after.replace(tzinfo=utc)


def _authority(certificate_pem, key_pem):
    """(certificate, private key) of an authority. Raises PKIError."""
    authority = _certificates("ca.crt", certificate_pem)[0]
    authority_key = _private_key("ca.key", key_pem)
    if _public_bytes(authority_key.public_key()) != _public_bytes(authority.public_key()):
        raise PKIError("ca.key: is not the key of ca.crt; restore both from the same backup")
    return authority, authority_key


def _authority_key_identifier(authority):
    try:
        own = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        raise PKIError("ca.crt: has no subject key identifier, which TLS asks for; make a new authority") from None
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _has_signed(authority, crl):
    try:
        return crl.is_signature_valid(authority.public_key())
    except Exception:  # as in _is_signed_by
        return False


def _crl_validity(crl):
    """(first, last) moment of a cryptography CRL, as validity(). Raises ValueError for one that never ends."""
    if hasattr(crl, "next_update_utc"):
        first, last = crl.last_update_utc, crl.next_update_utc
    else:
        first, last = crl.last_update, crl.next_update
    if last is None:
        raise ValueError("it has no next update")
    utc = datetime.timezone.utc
    return first.replace(tzinfo=utc), last.replace(tzinfo=utc)


def _revocation_date(entry):
    if hasattr(entry, "revocation_date_utc"):
        return entry.revocation_date_utc
    return entry.revocation_date.replace(tzinfo=datetime.timezone.utc)


def _check_name(name, pattern, expected):
    if not pattern.fullmatch(name):
        raise PKIError(f"{_shown(name)}: cannot be a name here; a name is {expected}")


def _check_dates(what, certificate, now):
    first, last = validity(certificate)
    clock = f"this machine's clock says {_moment(now)}"
    if now < first:
        raise PKIError(f"{what}: is not valid before {_moment(first)}, and {clock}; set the clock if it is wrong")
    if now > last:
        raise PKIError(
            f"{what}: expired at {_moment(last)}, and {clock}; issue a new one, or set the clock if it is wrong"
        )


def _moment(when):
    return when.astimezone(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _is_signed_by(certificate, issuer):
    try:
        key = issuer.public_key()
        arguments = next(make for kind, make in _VERIFY_ARGUMENTS if isinstance(key, kind))
        signed = certificate.tbs_certificate_bytes
        key.verify(certificate.signature, signed, *arguments(certificate.signature_hash_algorithm))
    except Exception:  # a signature that cannot be checked, for whatever reason, counts as a wrong one
        return False
    return True


def _sign(subject, issuer, public_key, period, extensions, signing_key):
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(period[0])
        .not_valid_after(period[1])
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    certificate = builder.sign(signing_key, _hash(signing_key))
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def _hash(signing_key):
    # EdDSA has its hash built in (RFC 8410), and the builders insist on being told so.
    is_eddsa = isinstance(signing_key, (ed25519.Ed25519PrivateKey, ed448.Ed448PrivateKey))
    return None if is_eddsa else hashes.SHA256()


def _key_usage(*bits):
    return x509.KeyUsage(**{bit: bit in bits for bit in _KEY_USAGE_BITS})


def _key_pem(key):
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(pem, pkcs8, serialization.NoEncryption()).decode("ascii")


def _public_bytes(key):
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _certificates(what, pem):
    # Cut here, because load_pem_x509_certificates is in cryptography from 39 on.
    blocks = re.findall("-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", pem, re.DOTALL)
    try:
        found = [x509.load_pem_x509_certificate(block.encode()) for block in blocks]
        for certificate in found:
            certificate.public_key()
            validity(certificate)
    except Exception:  # as in identity
        found = []
    if not found:
        raise PKIError(
            f"{what}: is not a certificate in PEM form; copy it again, -----BEGIN and -----END lines included"
        )
    return found


def _private_key(what, pem):
    try:
        return serialization.load_pem_private_key(pem.encode(), password=None)
    except Exception as error:  # as in identity; the reason is left out because it may quote the key
        # What cannot be read may say it all the same, in its first line or the one below.
        if isinstance(error, TypeError) or "ENCRYPTED" in pem:
            raise PKIError(
                f"{what}: is encrypted and there is nobody to ask for the passphrase; "
                "take it off with: openssl pkey -in OLD -out NEW"
            ) from None
        raise PKIError(
            f"{what}: is not a private key in PEM form; copy it again, -----BEGIN and -----END lines included"
        ) from None


def _shown(value):
    """What a certificate says, as a message shows it: on one line, escaped and cut."""
    text = ascii(str(value))
    return text if len(text) <= 80 else text[:77] + "..."

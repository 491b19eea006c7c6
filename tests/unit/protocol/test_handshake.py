"""bulkvpnd.protocol.handshake: what is not exactly a message is refused, and no word of the peer's gets into an error.
"""

import dataclasses
import ipaddress
import json
import sys
import traceback

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bulkvpnd import config
from bulkvpnd.protocol import handshake
from bulkvpnd.protocol.errors import Refused, RemoteError
from bulkvpnd.protocol.handshake import Hello, Refuse, Welcome

CIPHERS = ("aes-256-gcm", "chacha20-poly1305")
OFFLOADS = ("csum", "tso", "uso")
MARK = "Zebra\x1b[31m\n"
"""What a hostile peer would like to see in our log."""

HELLO = {
    "version": 1,
    "session": "00112233445566778899aabbccddeeff",
    "token": "0123456789abcdef" * 4,
    "index": 3,
    "random": "fedcba9876543210" * 4,
    "ciphers": ["chacha20-poly1305", "aes-256-gcm"],
    "connections": 4,
    "frame_size": 262144,
    "offload": ["csum", "tso"],
    "rekey_bytes": 68719476736,
    "rekey_interval": 900,
    "replaces": False,
}
WELCOME = {
    "message": "WELCOME",
    "session": "00112233445566778899aabbccddeeff",
    "token": "0123456789abcdef" * 4,
    "index": 3,
    "random": "fedcba9876543210" * 4,
    "cipher": "aes-256-gcm",
    "connections": 4,
    "frame_size": 262144,
    "offload": ["csum", "tso", "uso"],
    "ipv4": "10.86.0.2/24",
    "ipv6": "fd86:1:2:3::2/64",
    "mtu": 1500,
    "sndbuf": 16777216,
    "rcvbuf": None,
    "keepalive": 10,
    "keepalive_timeout": 30,
    "routes": ["192.168.7.0/24", "fd00:7::/64"],
    "dns": ["10.86.0.1", "fd86:1:2:3::1"],
    "dns_search": ["example.org", "x"],
    "rekey_bytes": 65536,
    "rekey_interval": 1,
}
MESSAGES = {"HELLO": (Hello, HELLO), "WELCOME": (Welcome, WELCOME)}

# The ranges of bulkvpn-protocol(7).
INTEGERS = {
    ("HELLO", "index"): (0, 63),
    ("HELLO", "connections"): (1, 64),
    ("HELLO", "frame_size"): (131072, 1048576),
    ("HELLO", "rekey_bytes"): (65536, 68719476736),
    ("HELLO", "rekey_interval"): (1, 86400),
    ("WELCOME", "rekey_bytes"): (65536, 68719476736),
    ("WELCOME", "rekey_interval"): (1, 86400),
    ("WELCOME", "index"): (0, 63),
    ("WELCOME", "connections"): (1, 64),
    ("WELCOME", "frame_size"): (131072, 1048576),
    ("WELCOME", "mtu"): (1280, 65521),
    ("WELCOME", "sndbuf"): (16384, 268435456),
    ("WELCOME", "rcvbuf"): (16384, 268435456),
    ("WELCOME", "keepalive"): (1, 3600),
    ("WELCOME", "keepalive_timeout"): (2, 7200),
}
OCTETS = {("HELLO", "session"): 16, ("HELLO", "token"): 32, ("HELLO", "random"): 32,
          ("WELCOME", "session"): 16, ("WELCOME", "token"): 32, ("WELCOME", "random"): 32}  # fmt: skip
NULLABLE = {("HELLO", "session"), ("HELLO", "token"), ("WELCOME", "ipv4"), ("WELCOME", "ipv6"),
            ("WELCOME", "sndbuf"), ("WELCOME", "rcvbuf")}  # fmt: skip
FIELDS = [(message, field) for message, (_, fields) in MESSAGES.items() for field in fields]

examples = settings(max_examples=100, deadline=None)


def body(fields):
    return json.dumps(fields).encode()


def changed(message, /, **values):
    return body({**MESSAGES[message][1], **values})


def refused(message, octets):
    """The text of the RemoteError that these bytes must raise."""
    with pytest.raises(RemoteError) as caught:
        MESSAGES[message][0].decode(octets)
    assert caught.value.reason == "handshake"
    return shown(caught.value)


def shown(error):
    """What a log could show of it, with everything that it was raised from."""
    text = "".join(traceback.format_exception_only(error))
    chained = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert chained is None
    assert str(error).isprintable() and str(error).isascii()
    assert "Zebra" not in text
    return str(error)


def test_the_messages_here_are_right():
    assert Hello.decode(body(HELLO)).to_json() == HELLO
    assert Welcome.decode(body(WELCOME)).to_json() == WELCOME


# Refused: not a message at all.


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize(
    "octets",
    [
        b"", b"{", b"}", b"{}}", b"null", b"1", b'"HELLO"', b"[]", b"[{}]", b"\0", b"{\0}", b"\xff\xfe{\0}\0",
        b"\xef\xbb\xbf{}", b'{"a":\x80}', b'{"a":"\xed\xa0\x80"}', b"{'a':1}", b'{"a":1,}', b"{a:1}", b"//\n{}",
        b'{"a":"\n"}', b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01",
    ],
)  # fmt: skip
def test_not_a_json_object(message, octets):
    assert refused(message, octets).startswith("a message is not")


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
def test_nesting_as_deep_as_a_message_is_long(message, opening):
    refused(message, opening * (handshake.MESSAGE_MAX // len(opening)))
    depth = (handshake.MESSAGE_MAX - 20) // 2
    refused(message, b'{"a":' + b"[" * depth + b"]" * depth + b"}")


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_constant_that_json_lacks(message, number):
    assert refused(message, body(MESSAGES[message][1])[:-1] + f', "later": {number}}}'.encode()) == (
        "a message is not JSON"
    )


@pytest.mark.parametrize("message, field", FIELDS)
def test_a_name_that_comes_twice(message, field):
    fields = MESSAGES[message][1]
    twice = body(fields)[:-1] + f', "{field}": {json.dumps(fields[field])}}}'.encode()
    assert refused(message, twice) == "a message is not JSON"


@pytest.mark.parametrize("message", MESSAGES)
def test_a_name_that_comes_twice_further_in(message):
    assert refused(message, body(MESSAGES[message][1])[:-1] + b', "later": [{"a": 1, "a": 1}]}') == (
        "a message is not JSON"
    )


@pytest.mark.parametrize("message, field", INTEGERS)
@pytest.mark.parametrize("digits", [20, 400, 4000, 16000])
def test_a_huge_number(message, field, digits):
    # Beyond 4300 digits Python itself refuses (sys.set_int_max_str_digits).
    assert 0 < sys.get_int_max_str_digits() < 16000
    for text in ("9" * digits, "-" + "9" * digits, "1" + "0" * digits + ".5", "1e" + "9" * min(digits, 400)):
        octets = changed(message, **{field: "PLACE"}).replace(b'"PLACE"', text.encode())
        refused(message, octets)


# Refused: a field.


@pytest.mark.parametrize("message, field", FIELDS)
def test_a_missing_field(message, field):
    fields = dict(MESSAGES[message][1])
    del fields[field]
    assert refused(message, body(fields)) == f"{message}: {field} is missing"


@pytest.mark.parametrize("message, field", FIELDS)
def test_a_field_of_the_wrong_type(message, field):
    wrong = [True, False, 1.0, 1.5, -1, 2**31 + 1, 2**64, "", "1", MARK, "\ud800", [1], [None], [[]], {}, {MARK: MARK}]
    wrong.append([MARK] * 65)
    if (message, field) not in NULLABLE:
        wrong.append(None)
    if field not in ("ciphers", "offload"):  # where unknown words are for later versions
        wrong += [[MARK]] if field in LISTS else [[], [MARK]]
    for value in wrong:
        if field == "replaces" and type(value) is bool or field == "rekey_bytes" and value == 2**31 + 1:
            continue  # right
        text = refused(message, changed(message, **{field: value}))
        assert text.startswith(f"{message}: {field} should be ")


@pytest.mark.parametrize("message, field", INTEGERS)
def test_the_bounds_of_a_number(message, field):
    decode = MESSAGES[message][0].decode
    low, high = INTEGERS[message, field]
    for value in (low, high):
        assert getattr(decode(changed(message, **{field: value})), field) == value
    for value in (low - 1, high + 1, -high):
        assert f"from {low} to {high}" in refused(message, changed(message, **{field: value}))


@pytest.mark.parametrize("message, field", OCTETS)
def test_octets_are_lower_case_hexadecimal_of_one_length(message, field):
    decode = MESSAGES[message][0].decode
    digits = 2 * OCTETS[message, field]
    good = "0a" * (digits // 2)
    assert getattr(decode(changed(message, **{field: good})), field) == bytes.fromhex(good)
    for value in (
        good[:-2], good[:-1], good + "0", good + "0a", good + "\n", good[:-1] + "\n", good.upper(), good[:-1] + "g",
        " " + good[1:], "0x" + good[2:], good[:-1] + "\u0663", good[:-2] + "\uff10\uff11", "",
    ):  # fmt: skip
        assert "hexadecimal" in refused(message, changed(message, **{field: value}))


@pytest.mark.parametrize("present, absent", [("session", "token"), ("token", "session")])
def test_session_and_token_go_together(present, absent):
    assert refused("HELLO", changed("HELLO", **{absent: None})) == "HELLO: session and token go together"
    hello = Hello.decode(changed("HELLO", session=None, token=None))
    assert (hello.session, hello.token) == (None, None)


@pytest.mark.parametrize("field", ["ciphers", "offload"])
@pytest.mark.parametrize("value", [["x"] * 65, [1], ["csum", None], "csum", {"csum": 1}])
def test_a_bad_list_of_words(field, value):
    assert "at most 64 words" in refused("HELLO", changed("HELLO", **{field: value}))


@pytest.mark.parametrize("kind", ["HELLO", "WELCOME"])
@pytest.mark.parametrize("said, believed", [
    (["tso"], ()), (["tso", "uso"], ()), (["csum"], ("csum",)), (["uso", "csum"], ("uso", "csum")), ([], ()),
])  # fmt: skip
def test_super_packets_count_only_beside_csum(kind, said, believed):
    message = {"HELLO": Hello, "WELCOME": Welcome}[kind].decode(changed(kind, offload=said))
    assert message.offloads == believed


@pytest.mark.parametrize("field", ["ciphers", "offload"])
def test_the_longest_list_of_words(field):
    Hello.decode(changed("HELLO", **{field: ["x"] * 64}))


@pytest.mark.parametrize("value", ["", "aes-128-gcm", "AES-256-GCM", "aes-256-gcm\n", "aes-256-gcm,"])
def test_an_unknown_cipher_in_welcome(value):
    assert "one of aes-256-gcm, chacha20-poly1305" in refused("WELCOME", changed("WELCOME", cipher=value))


@pytest.mark.parametrize(
    "field, value",
    [
        ("ipv4", value)
        for value in (
            "10.0.0.1", "10.0.0.1/", "/24", "10.0.0.1/33", "10.0.0.1/-1", "10.0.0.1/24/24", "10.0.0.1/ 24",
            " 10.0.0.1/24", "10.0.0.1/24\n", "10.0.0.1/255.255.255.0", "10.0.0.1/0.0.0.255", "10.0.0/24", "10.1/24",
            "256.0.0.1/24", "010.0.0.1/24", "0x0a.0.0.1/24", "167772161/24", "\u0661\u0660.0.0.1/24", "10.0.0.1/\u0662",
            "fd00::1/64", "::ffff:10.0.0.1/96", "0.0.0.0/24", "127.0.0.1/8", "224.0.0.1/24", "239.255.255.255/24",
            "10.0.0.1/0", "10.0.0.1/1", "10.0.0.1/7", "1" * 46 + "/24",
        )
    ] + [
        ("ipv6", value)
        for value in (
            "fd00::1", "fd00::1/", "fd00::1/129", "fd00::1/-1", "fd00::1%eth0/64", "fe80::1%1/64", "[fd00::1]/64",
            "fd00:::1/64", "fd00::g/64", "fd00::1/ffff::", "::/64", "::1/128", "ff02::1/64", "10.0.0.1/24",
            "fd00::1/0", "fd00::1/3", "fd00::1/7", "fd00::1/64\n", "fd00::\uff11/64",
        )
    ],
)  # fmt: skip
def test_an_address_that_is_none(field, value):
    assert f"WELCOME: {field} should be" in refused("WELCOME", changed("WELCOME", **{field: value}))


@pytest.mark.parametrize(
    "field, value", [("ipv4", "10.86.0.2/8"), ("ipv4", "192.0.2.1/30"), ("ipv4", "192.0.2.1/32"),
                     ("ipv6", "fd00::2/8"), ("ipv6", "fd00:0:0::2/126"), ("ipv6", "2001:DB8::2/128")],
)  # fmt: skip
def test_an_address(field, value):
    assert getattr(Welcome.decode(changed("WELCOME", **{field: value})), field) == ipaddress.ip_interface(value)


# The most of each list, and what may not stand in it.
LISTS = {
    "routes": (
        256,
        [
            "10.0.0.0", "10.0.0.1/24", "0.0.0.0/0", "0.0.0.0/8", "10.0.0.0/7", "10.0.0.0/33", "10.0.0.0/255.0.0.0",
            "10.0.0.0/24\n", " 10.0.0.0/24", "10.0.0.0/\u0662", "127.0.0.0/8", "127.8.0.0/16", "169.254.169.254/32",
            "224.0.0.0/8", "::/0", "::/8", "::1/128", "fc00::/7", "fe80::/64", "fe80::%1/64", "ff00::/8", "ff02::1/128",
            "fd00::1/64", "::ffff:10.0.0.0/104", "fd00::/129", "fd00::/-1", "default", "", "/24", MARK,
        ],
    ),
    "dns": (
        8,
        [
            "10.0.0.1/32", "10.0.0", "10.0.0.01", "0x0a000001", "167772161", "0.0.0.0", "127.0.0.53", "169.254.1.1",
            "224.0.0.251", "::", "::1", "fe80::1", "fe80::1%1", "fd00::1%eth0", "ff02::fb", "::ffff:127.0.0.1",
            "[fd00::1]", "10.0.0.1:53", "10.0.0.1\n", " 10.0.0.1", "localhost", "", MARK, "1" * 46,
        ],
    ),
    "dns_search": (
        8,
        [
            "", ".", "example.org.", ".example.org", "example..org", "-example.org", "example-.org", "exa_mple.org",
            "exam ple.org", "example.org\n", "example.org\0", "~.", "*.example.org", "b\u00fccher.example", "$(id)",
            MARK, "x" * 64, ".".join(["x" * 63] * 3 + ["x" * 62]), "\u0661.example",
        ],
    ),
}  # fmt: skip
LONGEST = {
    "routes": [f"{'-'.join([f'{n:04x}'] * 8).replace('-', ':')}/128" for n in range(0x2222, 0x2222 + 256)],
    "dns": [":".join([f"{n:04x}"] * 8) for n in range(0x2222, 0x2222 + 8)],
    "dns_search": [".".join([f"{n}" + "x" * 62] * 3) + "." + "x" * 61 for n in range(8)],
}
"""As many as are allowed, and none could be longer."""


@pytest.mark.parametrize("field, value", [(field, value) for field, (_, bad) in LISTS.items() for value in bad])
def test_what_a_list_may_not_hold(field, value):
    good = WELCOME[field]
    text = refused("WELCOME", changed("WELCOME", **{field: [*good, value]}))
    assert text.startswith(f"WELCOME: {field} should be a list of at most {LISTS[field][0]} ")


@pytest.mark.parametrize("field", LISTS)
def test_how_much_a_list_may_hold(field):
    most = LISTS[field][0]
    assert len(getattr(Welcome.decode(changed("WELCOME", **{field: LONGEST[field]})), field)) == most
    for values in (LONGEST[field] + WELCOME[field][:1], WELCOME[field][:1] * (most + 1), "10.0.0.1", None, {"x": 1}):
        refused("WELCOME", changed("WELCOME", **{field: values}))
    assert getattr(Welcome.decode(changed("WELCOME", **{field: []})), field) == ()
    once, *_ = WELCOME[field]
    assert len(getattr(Welcome.decode(changed("WELCOME", **{field: [once, once]})), field)) == 1


@pytest.mark.parametrize("field", LISTS)
@given(data=st.data())
@examples
def test_what_the_option_takes_is_taken_here(field, data):
    """So that no server pushes what its clients refuse."""
    option = config.BY_NAME[field.replace("_", "-")]
    assert option.most == LISTS[field][0]
    known = st.sampled_from([*LISTS[field][1], *WELCOME[field]])
    text = data.draw(known | st.text("0123456789abcdef.:/-%", max_size=20))
    try:
        value = option.parse(text)
    except ValueError:
        assert text not in WELCOME[field]
        return
    assert getattr(Welcome.decode(changed("WELCOME", **{field: [str(value)]})), field) == (value,)


def test_the_longest_lists_fit_a_message():
    encoded = handshake.encode(Welcome.decode(changed("WELCOME", **LONGEST, ipv6="2222:" * 7 + "2222/128")))
    handshake.message_size(encoded[:2])


def test_a_domain_of_the_greatest_length():
    assert {len(name) for name in LONGEST["dns_search"]} == {253}


def test_welcome_has_an_address():
    for missing in ("ipv4", "ipv6"):
        assert getattr(Welcome.decode(changed("WELCOME", **{missing: None})), missing) is None
    assert refused("WELCOME", changed("WELCOME", ipv4=None, ipv6=None)) == "WELCOME: has no address"


# Lengths.


@pytest.mark.parametrize("size", [0, 1, 16385, 32768, 65535])
def test_a_length_outside_its_range(size):
    with pytest.raises(RemoteError) as caught:
        handshake.message_size(size.to_bytes(2, "big"))
    assert caught.value.reason == "handshake"


@pytest.mark.parametrize("size", [2, 3, 16383, 16384])
def test_a_length_within_its_range(size):
    assert handshake.message_size(size.to_bytes(2, "big")) == size


def test_the_constants_of_the_specification():
    assert (handshake.VERSION, handshake.ALPN) == (1, "bulkvpn/1")
    assert (handshake.PREFIX_SIZE, handshake.MESSAGE_MAX) == (2, 16384)


def test_a_message_of_the_greatest_length():
    filler = {"later": ""}
    filler["later"] = "x" * (handshake.MESSAGE_MAX - len(body({**HELLO, **filler})))
    octets = body({**HELLO, **filler})
    assert handshake.message_size(len(octets).to_bytes(2, "big")) == handshake.MESSAGE_MAX
    assert Hello.decode(octets) == Hello.decode(body(HELLO))


# REFUSE and versions.


@pytest.mark.parametrize("version", [0, 2, 3, 255, 2**31])
def test_another_version(version):
    with pytest.raises(Refused) as caught:
        Hello.decode(changed("HELLO", version=version))
    assert caught.value.reason == "version"
    # Whatever else that version may say.
    with pytest.raises(Refused):
        Hello.decode(body({"version": version}))


@pytest.mark.parametrize("version", [-1, 2**31 + 1, 2**64])
def test_a_number_that_is_no_version(version):
    assert "version" in refused("HELLO", changed("HELLO", version=version))


@pytest.mark.parametrize("reason", ["version", "cipher", "busy", "pool", "session", "identity", "shutdown"])
def test_refuse(reason):
    encoded = handshake.encode(Refuse(reason))
    assert handshake.message_size(encoded[:2]) == len(encoded) - 2
    with pytest.raises(Refused) as caught:
        Welcome.decode(encoded[2:])
    assert caught.value.reason == reason
    shown(caught.value)


def test_only_what_would_be_answered_the_same_is_final():
    assert {reason for reason, (again, _) in handshake.REFUSALS.items() if not again} == {"version", "cipher"}


@pytest.mark.parametrize("fields", [{}, {"reason": None}, {"reason": ""}, {"reason": MARK}, {"reason": ["busy"]}])
def test_refuse_without_a_known_reason(fields):
    refused("WELCOME", body({"message": "REFUSE", **fields}))


@pytest.mark.parametrize("value", ["HELLO", "welcome", "WELCOME ", MARK, None, 1])
def test_neither_welcome_nor_refuse(value):
    refused("WELCOME", changed("WELCOME", message=value))


def test_the_servers_preference_decides():
    assert handshake.agree_cipher(CIPHERS, CIPHERS[::-1]) == CIPHERS[0]
    assert handshake.agree_cipher(CIPHERS[::-1], CIPHERS) == CIPHERS[1]
    assert handshake.agree_cipher(CIPHERS, CIPHERS[1:]) == CIPHERS[1]
    for offered in ((), ("aes-128-gcm",)):
        with pytest.raises(Refused) as caught:
            handshake.agree_cipher(CIPHERS, offered)
        assert caught.value.reason == "cipher"


# Taken.


def words(known):
    return st.lists(st.sampled_from(known), unique=True).map(tuple)


def offloads():
    return words(OFFLOADS).filter(lambda one: not one or "csum" in one)


def interfaces(version, longest):
    cls = {4: ipaddress.IPv4Interface, 6: ipaddress.IPv6Interface}[version]
    unicast = st.ip_addresses(v=version).filter(
        lambda one: not (one.is_multicast or one.is_loopback or one.is_unspecified)
    )
    return st.none() | st.builds(lambda address, prefix: cls((address, prefix)), unicast, st.integers(8, longest))


def unicast():
    return st.ip_addresses().filter(
        lambda one: not (one.is_multicast or one.is_loopback or one.is_unspecified or one.is_link_local)
        and not getattr(one, "ipv4_mapped", None)
        and one not in ipaddress.ip_network("0.0.0.0/8" if one.version == 4 else "::/8")
        and one not in ipaddress.ip_network("127.0.0.0/8" if one.version == 4 else "fe00::/8")
    )


def network(address, prefix):
    return ipaddress.ip_network((address, min(prefix, address.max_prefixlen)), strict=False)


def lists(values, most):
    return st.lists(values, unique=True, max_size=min(most, 20)).map(tuple)


def octets(size):
    return st.binary(min_size=size, max_size=size)


HELLOS = st.builds(
    lambda joins, session, token, replaces, **fields: Hello(
        session=session if joins else None, token=token if joins else None, replaces=joins and replaces, **fields
    ),
    joins=st.booleans(),
    replaces=st.booleans(),
    session=octets(16),
    token=octets(32),
    index=st.integers(0, 63),
    random=octets(32),
    ciphers=words(CIPHERS),
    connections=st.integers(1, 64),
    frame_size=st.integers(131072, 1048576),
    offloads=offloads(),
    rekey_bytes=st.integers(65536, 2**36),
    rekey_interval=st.integers(1, 86400),
)
WELCOMES = st.builds(
    Welcome,
    session=octets(16),
    token=octets(32),
    index=st.integers(0, 63),
    random=octets(32),
    cipher=st.sampled_from(CIPHERS),
    connections=st.integers(1, 64),
    frame_size=st.integers(131072, 1048576),
    offloads=offloads(),
    ipv4=interfaces(4, 32),
    ipv6=interfaces(6, 128),
    mtu=st.integers(1280, 65521),
    sndbuf=st.none() | st.integers(16384, 2**28),
    rcvbuf=st.none() | st.integers(16384, 2**28),
    keepalive=st.integers(1, 3600),
    keepalive_timeout=st.integers(2, 7200),
    rekey_bytes=st.integers(65536, 2**36),
    rekey_interval=st.integers(1, 86400),
    routes=lists(st.builds(network, unicast(), st.integers(8, 128)), 256),
    dns=lists(unicast(), 8),
    dns_search=lists(st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[a-z0-9]{1,8}){0,9}",
                                   fullmatch=True), 8),
).filter(lambda welcome: welcome.ipv4 or welcome.ipv6)


@given(st.one_of(HELLOS, WELCOMES))
@examples
def test_round_trip(message):
    encoded = handshake.encode(message)
    assert handshake.message_size(encoded[:2]) == len(encoded) - 2
    assert type(message).decode(encoded[2:]) == message
    assert type(message).decode(memoryview(encoded)[2:]) == message


@given(HELLOS)
@examples
def test_unknown_fields_and_words_are_for_later_versions(hello):
    fields = json.loads(handshake.encode(hello)[2:])
    fields["later"] = {"deeper": [MARK]}
    fields["ciphers"] = ["x25519-later", *fields["ciphers"], *fields["ciphers"]]
    fields["offload"] = [*fields["offload"], MARK]
    assert Hello.decode(body(fields)) == hello


def test_nothing_secret_is_shown():
    for cls, fields in MESSAGES.values():
        message = cls.decode(body(fields))
        for text in (repr(message), str(message)):
            for name in ("token", "random"):
                assert name not in text
                assert fields[name] not in text
                assert repr(getattr(message, name)) not in text


def test_a_message_does_not_change():
    for cls, fields in MESSAGES.values():
        with pytest.raises(dataclasses.FrozenInstanceError):
            cls.decode(body(fields)).index = 5


# Anything at all.


def decoded(cls, octets):
    """The message, or None when it was refused as it should be. Whatever else comes is the failure of the test."""
    try:
        message = cls.decode(octets)
    except (RemoteError, Refused) as error:
        shown(error)
        return None
    # What was taken is within every range: it could be sent again.
    assert cls.decode(handshake.encode(message)[2:]) == message
    return message


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.integers(-2, 70),
        st.sampled_from([MARK, "\ud800", "0" * 32, "a" * 64, "10.0.0.1/24", "fd00::1/64", "10.0.0.0/8", "10.0.0.1",
                         "x.example", *CIPHERS, *OFFLOADS]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)  # fmt: skip


@pytest.mark.parametrize("cls", [Hello, Welcome])
@given(octets=st.binary(max_size=300))
@examples
def test_any_bytes(cls, octets):
    assert decoded(cls, octets) is None
    assert decoded(cls, b"{" + octets + b"}") is None


@pytest.mark.parametrize("message", MESSAGES)
@given(data=st.data())
@examples
def test_any_values(message, data):
    cls, fields = MESSAGES[message]
    fields = dict(fields)
    for name in data.draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=4)):
        fields[name] = data.draw(JSON)
    decoded(cls, body(fields))


@pytest.mark.parametrize("message", MESSAGES)
@given(data=st.data())
@examples
def test_any_damage(message, data):
    """Bytes changed, cut out, put in."""
    cls, fields = MESSAGES[message]
    octets = bytearray(body(fields))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(octets)))
        end = data.draw(st.integers(start, min(len(octets), start + 8)))
        octets[start:end] = data.draw(st.binary(max_size=8))
    decoded(cls, bytes(octets))


def test_only_what_joins_a_session_can_replace():
    changes = {"replaces": True, "session": None, "token": None}
    assert Hello.decode(changed("HELLO", replaces=True)).replaces
    assert "replaces a connection of no session" in refused("HELLO", changed("HELLO", **changes))

"""The checks behind docs/security.md, each with what stands there without it and the tests that then have to fail.

remove.py takes them out of a copy of the tree, one removal after the other. A rule that is enforced twice loses both
at once, or no test of the whole could fail.
"""

import dataclasses
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """file: from the root of the tree. check: as it stands there, once. instead: what stands there without it."""

    file: str
    check: str
    instead: str


@dataclasses.dataclass(frozen=True, slots=True)
class Removal:
    """rows: of docs/security.md, P1 for the first promise and C1 for the first class of failure. cuts: made at once.
    tests: "file.py::test", of which at least one case has to fail."""

    rows: str
    cuts: tuple
    tests: tuple


def taken(rows, tests, *cuts):
    """tests: text, one on a line. cuts: (file, check, instead) each."""
    lines = tuple(line.strip() for line in tests.strip().splitlines())
    return Removal(rows, tuple(Cut(*cut) for cut in cuts), lines)


TLS = "bulkvpnd/control/tls.py"
SERVER = "bulkvpnd/control/server.py"
SESSION = "bulkvpnd/control/session.py"
LISTENER = "bulkvpnd/control/listener.py"
ADMISSION = "bulkvpnd/control/admission.py"
REVOCATION = "bulkvpnd/control/revocation.py"
EXPORTER = "bulkvpnd/control/exporter.py"
EXPIRY = "bulkvpnd/control/expiry.py"
PKI = "bulkvpnd/pki.py"
KEYS = "bulkvpnd/protocol/keys.py"
FRAME = "bulkvpnd/protocol/frame.py"
HANDSHAKE = "bulkvpnd/protocol/handshake.py"
PACKET = "bulkvpnd/protocol/packet.py"
CONNECTION = "bulkvpnd/dataplane/connection.py"
SENDQUEUE = "bulkvpnd/dataplane/sendqueue.py"
ROUTING = "bulkvpnd/dataplane/routing.py"
WORKER = "bulkvpnd/dataplane/worker.py"
CLIENT = "bulkvpnd/control/client.py"
POOL = "bulkvpnd/control/pool.py"
POLICY = "bulkvpnd/control/policy.py"
SERVICE = "bulkvpnd/service.py"
GATEWAY = "bulkvpnd/host/gateway.py"
HOOKS = "bulkvpnd/control/hooks.py"
WORKERS = "bulkvpnd/control/workers.py"
FILES = "bulkvpnd/config/files.py"
CONFIGURATION = "bulkvpnd/config/configuration.py"
MAIN = "bulkvpnd/control/main.py"
GUARD = "bulkvpnd/control/guard.py"
CLIENTNET = "bulkvpnd/control/clientnet.py"
OPTIONS = "bulkvpnd/config/options.py"
REDIRECT = "bulkvpnd/host/redirect.py"
KILLSWITCH = "bulkvpnd/host/killswitch.py"
ADMIN_FILES = "bulkvpnd/admin/files.py"
ERRORS = "bulkvpnd/config/errors.py"
HARDENING = "bulkvpnd/hardening.py"
VALUES = "bulkvpnd/config/values.py"
LATEST = "bulkvpnd/control/latest.py"
STATUS = "bulkvpnd/control/status.py"
RESOLVCONF = "bulkvpnd/host/resolvconf.py"
UNIT = "debian/bulkvpnd@.service"
HELPER = "debian/bulkvpnd@.bulkvpnd-resolvconf.service"

IN_THE_CLEAR = (TLS, "self._drive(self._tls.read, size - len(data))", "self._socket.recv(size - len(data))")
NO_TLS = (
    IN_THE_CLEAR,
    (TLS, "self._drive(self._tls.do_handshake)", 'return "alice" if self._is_server else "server"'),
    (TLS, "self._drive(self._tls.write, data)", "self._socket.sendall(data)"),
    (TLS, "self._drive(self._tls.unwrap)\n        return self._incoming.read()", 'return b""'),
)
"""As if there were no TLS: the handshake is not asked for, and every byte goes over the socket as it is."""
KEEPING = (
    "LoadCredential=", "UnsetEnvironment=", "UMask=", "RuntimeDirectoryMode=", "StateDirectoryMode=", "LimitCORE=",
    "MemorySwapMax=", "LogRateLimit",
)  # fmt: skip
"""How lines of the unit begin that stand elsewhere in it."""


def confinement(unit):
    """The lines by which a unit gives up what it does not need, and keeps secrets to itself, each with its end."""
    text = (ROOT / unit).read_text("utf-8")
    lines = text.partition("\n# Identity and privilege")[2].partition("\n# Off on purpose")[0].splitlines()[1:]
    lines += [line for line in text.splitlines() if line.startswith(KEEPING)]
    return [f"{line}\n" for line in dict.fromkeys(lines) if line and not line.startswith("#")]


REMOVALS = [
    # C1: A TLS handshake that is bypassed (CVE-2023-40217)
    taken("C1 P1", "test_tls.py::test_bytes_before_the_handshake_are_never_handed_on", IN_THE_CLEAR),
    taken("C1 P1 P2 C6", """
        test_tls.py::test_bytes_before_the_handshake_are_never_handed_on
        test_strangers.py::test_no_byte_without_tls_reaches_a_parser
        test_strangers.py::test_a_recorded_handshake_says_nothing_to_a_server
        test_tls.py::test_a_recorded_server_says_nothing_to_a_client
        """, *NO_TLS),

    # C2: State that strangers exhaust (CVE-2017-7478, CVE-2025-13086)
    taken("C2", """
        test_admission.py::test_idle_ones_make_room_the_longest_silent_first
        test_admission.py::TestDoor
        test_listener.py::test_a_crowd_of_the_silent_keeps_nobody_out[limit0-crowded]
        """,
          (ADMISSION, "elif self._is_crowded(len(room)):", "elif False:")),
    taken("C2 P6", """
        test_admission.py::test_idle_ones_make_room_the_longest_silent_first
        test_admission.py::TestDoor
        test_listener.py::test_a_crowd_of_the_silent_keeps_nobody_out
        test_flood.py::test_idle_connections_keep_nobody_out[many addresses-1000]
        """,
          (ADMISSION, "first = next(iter(silent), None)", "first = None")),
    taken("C2", """
        test_admission.py::test_a_source_that_has_all_of_its_places_pays_itself
        test_admission.py::TestDoor
        test_listener.py::test_a_crowd_of_the_silent_keeps_nobody_out[limit1-source_full]
        """,
          (ADMISSION, "if len(own) >= self._per_source:", "if False:")),
    taken("C2", "test_admission.py::test_strangers_never_take_the_places_of_known_sources",
          (ADMISSION, "room = self._rooms[self.is_known(source, now)]", "room = self._rooms[False]")),
    taken("C2", "test_admission.py::test_who_speaks_has_time_enough_and_then_none",
          (ADMISSION, "now - first.since < PATIENCE", "False")),
    taken("C2", "test_admission.py::test_who_speaks_has_time_enough_and_then_none",
          (ADMISSION, "if first is not None and now - first.since < PATIENCE:", "if first is not None:")),
    taken("C2", """
        test_admission.py::test_failures_add_up_until_nobody_answers
        test_flood.py::test_failures_cost_their_source_the_answer_and_nobody_else
        """,
          (ADMISSION, "return is_out and now < until", "return False")),
    taken("C2", "test_admission.py::test_a_source_from_which_a_client_authenticated_is_not_locked_out",
          (ADMISSION, "if not self._penalty_max or self.is_known(source, now):", "if not self._penalty_max:")),
    taken("C2 P6", "test_admission.py::test_every_table_has_an_end_and_forgets_the_oldest",
          (ADMISSION, "if len(table) > most:", "if False:")),
    taken("C2", "test_admission.py::test_one_identity_makes_few_sources_known",
          (ADMISSION, "if not is_fresh and self._marks.allows(identity, now):", "if True:")),
    taken("C2", "test_listener.py::test_who_says_nothing_has_no_greenlet_and_is_reset_at_the_deadline",
          (LISTENER, "for place in self._admission.overdue(now - self._timeout):", "for place in ():")),
    taken("C2", "test_listener.py::test_who_says_nothing_has_no_greenlet_and_is_reset_at_the_deadline",
          (LISTENER, "                _reset(silent.sock)", "                silent.sock.close()")),
    taken("C2", """
        test_admission.py::test_the_chance_to_be_dropped_grows_from_rate_to_all
        test_admission.py::TestDoor
        """,
          (ADMISSION, "return count >= self._start and self._chance() * 100 < (", "return False and (")),
    taken("C2 P6", "test_session.py::test_sources_are_remembered_in_a_bounded_table",
          (SESSION, "if len(self._offsets) > 4096:", "if False:")),
    taken("C2", "test_exporter.py::test_only_so_many_are_answered_at_a_time",
          (EXPORTER, "spawn=Pool(REQUESTS_MAX), ", "")),
    taken("C2", "test_clientnet.py::test_servers_that_routes_spare_are_bounded",
          (CLIENTNET, "if address not in known and len(self._servers) < SERVERS_MAX:", "if address not in known:")),

    # C3: Peers that are slow on purpose
    taken("C3 P6", """
        test_unfinished.py::test_one_deadline_over_the_whole_handshake
        test_listener.py::test_the_deadline_counts_from_accept_and_not_from_the_first_byte
        """,
          (LISTENER, "gevent.Timeout(max(0.0, came + self._timeout - time.monotonic()))", "gevent.Timeout(None)")),
    taken("C3", "test_listener.py::test_the_deadline_counts_from_accept_and_not_from_the_first_byte",
          (LISTENER, "max(0.0, came + self._timeout - time.monotonic())", "self._timeout")),
    taken("C3", "test_listener.py::test_who_speaks_for_too_long_loses_its_place",
          (ADMISSION, "first = next(iter(speaking), None)", "first = None")),
    taken("C3", "test_connection_ends.py::test_a_peer_that_reads_nothing_cannot_keep_its_connection",
          (CONNECTION, "elif self._close_by is not None and now >= self._close_by:", "elif False:")),
    taken("C3", "test_connection_ends.py::test_a_silent_peer",
          (CONNECTION, "if silent >= self._keepalive_timeout:", "if False:")),
    taken("C3 P6", "test_options_documented.py::test_manual_has_the_option_with_mode_and_default",
          (OPTIONS, '"handshake-timeout", duration(1, 120), "10"', '"handshake-timeout", duration(1, 120), "100"')),
    taken("C3", "test_unfinished.py::test_what_waits_too_long_for_its_first_frame_is_cut",
          (SERVER, "if not connection.is_live and now - connection.since > PENDING_SECONDS:", "if False:")),

    # C4: Descriptors that run out
    taken("C4", """
        test_listener.py::test_out_of_descriptors_it_pauses_and_then_goes_on
        test_flood.py::test_out_of_descriptors_it_neither_spins_nor_falls
        """,
          (LISTENER, "gevent.spawn_later(ACCEPT_PAUSE, self._watch, sock, watcher)", "self._watch(sock, watcher)")),

    # C5: A connection joined without authority (CVE-2020-11810, CVE-2020-15078, CVE-2021-45079)
    taken("C5 P2 C27", """
        test_session.py::test_join_refuses
        test_session.py::test_join_refuses_a_token_with_any_bit_flipped
        test_session.py::TestAnyOrder
        test_join.py::TestAnyOrder
        test_hostile.py::test_joining_needs_session_certificate_and_token[token]
        """,
          (SESSION, "session is None or not token_fits or", "session is None or")),
    taken("C5 P2", """
        test_session.py::test_join_refuses[another identity]
        test_session.py::TestAnyOrder
        test_join.py::TestAnyOrder
        test_refusals.py::test_what_others_have_is_not_in_the_reach_of_a_client
        test_hostile.py::test_joining_needs_session_certificate_and_token[certificate]
        """,
          (SESSION, "not token_fits or session.identity != identity or", "not token_fits or")),
    taken("C5", """
        test_session.py::test_join_refuses[index beyond the agreed number]
        test_session.py::TestAnyOrder
        """,
          (SESSION, ' or index >= session.terms["connections"]:', ":")),
    taken("C5 P2 C24", """
        test_session.py::test_nothing_is_replaced_before_the_first_authentic_frame
        test_session.py::TestAnyOrder
        test_join.py::TestAnyOrder
        test_clients.py::test_second_login_takes_over_with_its_first_frame
        """,
          (SESSION, "self.connections[connection.number] = connection\n        return connection",
           "self.connections[connection.number] = connection\n"
           "        self.established(connection.number)\n"
           "        return connection")),
    taken("C5", "test_session.py::TestAnyOrder",
          (SESSION, "connection is None or connection.is_live or connection.session.is_ended", "connection is None")),
    taken("C5", "test_worker.py::test_nothing_is_carried_before_the_peers_first_frame",
          (WORKER, "        connection.start()\n",
           "        connection.start()\n"
           "        self.established(connection)\n")),
    taken("C5", "test_client.py::test_a_joining_connection_must_get_the_same_session",
          (CLIENT, "            or session is not None\n"
                   "            and (welcome.session != session.session or (welcome.ipv4, welcome.ipv6) != "
                   "(session.ipv4, session.ipv6))\n",
           "")),

    # C6: Replay, reflection
    taken("C6 C7 P3", """
        test_keys.py::test_a_frame_comes_once_and_in_its_turn
        test_keys.py::test_no_key_and_nonce_come_twice
        test_key_use.py::test_no_key_and_nonce_twice_no_packet_lost_no_stall
        test_join.py::TestAnyOrder
        test_hostile.py::test_ends_that_connection_and_nothing_else[frame out of place-replayed]
        """,
          (KEYS, "(self._iv ^ self.frames)", "self._iv")),
    taken("C6 P3", """
        test_keys.py::test_a_frame_does_not_come_back_as_an_answer
        test_hostile.py::test_ends_that_connection_and_nothing_else[frame out of place-reflected]
        """,
          (KEYS, "expand_label(secret, label, SECRET_SIZE) for label in",
           'expand_label(secret, "c2s", SECRET_SIZE) for label in')),
    taken("C6 P3", "test_keys.py::test_a_frame_of_another_connection",
          (KEYS, "hmac.digest(transcript, client_random + server_random,", "hmac.digest(transcript, bytes(64),")),
    taken("C6 P3", "test_keys.py::test_a_frame_of_another_connection",
          (KEYS, "transcript = hashlib.sha256(hashlib.sha256(hello).digest() + "
                 "hashlib.sha256(welcome).digest()).digest()",
           "transcript = bytes(32)")),
    taken("C6", "test_hostile.py::test_ends_that_connection_and_nothing_else[frame out of place-of another connection]",
          (KEYS, "secret = hmac.digest(transcript, client_random + server_random,",
           "secret = hmac.digest(bytes(32), bytes(64),")),

    # C7: A nonce that comes twice
    taken("C7 P3", "test_keys.py::test_a_nonce_is_used_up_even_when_sealing_fails",
          (KEYS, "self.frames += 1\n"
                 "        self.bytes += len(payload)\n"
                 "        return self._aead.seal_into(nonce, payload, header, out)",
           "size = self._aead.seal_into(nonce, payload, header, out)\n"
           "        self.frames += 1\n"
           "        self.bytes += len(payload)\n"
           "        return size")),

    # C8: Keys that are used for too long (CVE-2017-7479)
    taken("C8 P4", "test_keys.py::test_a_key_is_due_by_bytes_or_by_frames",
          (KEYS, "self.bytes >= limit or self.frames", "self.frames")),
    taken("C8 P4", "test_keys.py::test_a_key_is_due_by_bytes_or_by_frames",
          (KEYS, " or self.frames >= FRAME_COUNT_LIMIT // 2", "")),
    taken("C8", "test_keys.py::test_the_limit_of_frames_under_one_key",
          (KEYS, "if self.frames >= FRAME_COUNT_LIMIT:\n            raise OverflowError",
           "if False:\n            raise OverflowError")),
    taken("C8", "test_keys.py::test_the_limit_of_frames_under_one_key",
          (KEYS, "if self.frames >= FRAME_COUNT_LIMIT:\n            raise RemoteError",
           "if False:\n            raise RemoteError")),
    taken("C8 P4", """
        test_rekeying.py::test_a_key_is_replaced_before_any_other_frame
        test_rekeying.py::test_a_key_is_replaced_after_a_time
        test_rekeying.py::test_keys_are_replaced_under_load
        """,
          (CONNECTION, "return self._sealer.is_due(self._rekey_bytes) or time.monotonic() >= self._rekey_at",
           "return False")),
    taken("C8 P4", "test_rekeying.py::test_a_key_is_replaced_before_any_other_frame",
          (CONNECTION, "if self._rekey_is_due():", "if not control and self._rekey_is_due():")),
    taken("C8", "test_rekeying.py::test_a_peer_that_keeps_its_key_for_too_many_bytes_is_cut",
          (CONNECTION, "self._opener.bytes > self._rekey_bytes + self._frame_size", "False")),
    taken("C8", "test_rekeying.py::test_a_peer_that_keeps_its_key_for_too_long_is_cut",
          (CONNECTION, "or now - self._rekeyed_at > self._rekey_interval + self._keepalive_timeout + self._keepalive",
           "")),
    taken("C8 P4", "test_replacement.py::test_nothing_is_lost_or_overtaken[5]",
          (WORKER, "            other.move()\n", '            other.close("replaced")\n')),
    taken("C8 P4", "test_worker.py::test_a_connection_takes_over_with_its_first_authentic_frame",
          (WORKER, "            connection.follow(other)\n", "")),
    taken("C8", "test_key_use.py::test_no_key_and_nonce_twice_no_packet_lost_no_stall",
          (CONNECTION, "                self._sealer.ratchet()\n", "")),

    # C9: Renegotiation (CVE-2021-3449)
    taken("C9 P1", "test_tls.py::test_what_the_daemon_s_context_insists_on",
          (TLS, "    context.minimum_version = ssl.TLSVersion.TLSv1_3\n", "")),
    taken("C9", "test_tls.py::test_the_handshake_does_not_rely_on_the_context_for_its_version",
          (TLS, 'self._tls.version() != "TLSv1.3" or not certificate', "not certificate")),
    taken("C9 P1", "test_tls.py::test_the_server_refuses_tls_1_2",
          (TLS, "    context.minimum_version = ssl.TLSVersion.TLSv1_3\n", ""),
          (TLS, 'self._tls.version() != "TLSv1.3" or not certificate', "not certificate")),
    taken("C9", """
        test_tls.py::test_the_server_refuses_another_alpn
        test_tls.py::test_the_client_refuses_a_server_without_alpn
        """,
          (TLS, "if self._tls.selected_alpn_protocol() != handshake.ALPN:", "if False:")),
    taken("C9", "test_tls.py::test_what_the_daemon_s_context_insists_on",
          (TLS, "    context.hostname_checks_common_name = False\n",
           "    context.hostname_checks_common_name = False\n"
           "    context.post_handshake_auth = True\n")),

    # C10: Resumption, tickets (CVE-2024-2511)
    taken("C10", """
        test_tls.py::test_no_ticket_and_no_resumption
        test_tls.py::test_what_the_daemon_s_context_insists_on
        """,
          (TLS, "context.num_tickets = 0", "pass")),

    # C11: Revocation that is not followed (CVE-2022-40617, CVE-2024-0397)
    taken("C11 P1", """
        test_revocation.py::test_a_revoked_client_is_refused_and_no_other
        test_revocation.py::test_a_list_that_expired_refuses_everybody
        test_revoked.py::test_revoked_while_connected
        test_revoked.py::test_list_that_expired_lets_nobody_in_and_is_mended_in_place
        """,
          (TLS, "context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF", "pass")),
    taken("C11", "test_revocation.py::test_a_list_that_cannot_be_used_leaves_the_former_in_force[expired]",
          (REVOCATION, "pki.check_crl_dates(crl, now)", "pass")),
    taken("C11", "test_revocation.py::test_a_list_that_cannot_be_used_leaves_the_former_in_force[of another authority]",
          (PKI, 'if not signers:\n            raise PKIError("crl:', 'if False:\n            raise PKIError("crl:')),
    taken("C11", "test_revocation.py::test_a_revoked_client_is_refused_and_no_other",
          (REVOCATION, "        self.context = tls.make_context(self._configuration, texts)\n        self.texts",
           "        fresh = tls.make_context(self._configuration, texts)\n"
           '        self.context = getattr(self, "context", fresh)\n'
           "        self.texts")),
    taken("C11", "test_expiry.py::test_a_warning_each_day_then_an_error_each_hour",
          (EXPIRY, "if expiry - now <= pki.WARNING_TIME:", "if expiry < now:")),
    taken("C11", "test_pushed_out.py::test_a_certificate_that_is_revoked_during_its_handshake_gets_no_connection",
          (SERVER, "if shake.certificate in self._revoked:", "if False:")),
    taken("C11 P1", """
        test_pushed_out.py::test_a_revoked_certificate_ends_its_session_and_no_other
        test_revoked.py::test_revoked_while_connected
        """,
          (SERVER, "        self._cut(self._sessions.end_revoked(revoked)", "        self._cut([]")),
    taken("C11 P1 P4", """
        test_pushed_out.py::test_a_certificate_that_expires_ends_its_session
        test_session.py::test_a_session_ends_with_the_newest_certificate_of_its_live_connections
        test_revoked.py::test_expired_while_connected
        """,
          (SESSION, "max(one.expires for one in session.live_connections) <= now", "False")),
    taken("C11", "test_session.py::test_a_session_ends_with_the_newest_certificate_of_its_live_connections",
          (SESSION, "max(one.expires for one in session.live_connections)",
           "min(one.expires for one in session.live_connections)")),
    taken("C11 P1 P4", "test_revoked.py::test_expired_while_connected",
          (MAIN, "            role.expire(_now())\n", "")),
    taken("C11", "test_client.py::test_connections_to_a_server_whose_certificate_expires_end",
          (CLIENT, "if live and max(one.expires for one in live) <= now:", "if False:")),
    taken("C11 P1", "test_revoked.py::test_revoked_while_connected",
          (MAIN, "            self._check_revocations(role)\n            role", "            role")),
    taken("C11", "test_pki_crl.py::test_an_authority_signs_lists_in_its_own_name_only",
          (PKI, "if one.subject == crl.issuer and _has_signed(one, crl)", "if _has_signed(one, crl)")),
    taken("C11", "test_security.py::test_nothing_fetches_an_address",
          (REVOCATION, "import os\n", "import os\nimport urllib.request\n")),
    taken("C11", "test_client.py::test_connections_to_a_revoked_server_end",
          (CLIENT, "[one for one in self._connections.values() if one.certificate in revoked]", "[]")),

    # C12: Roles and names confused (CVE-2017-7522)
    taken("C12", """
        test_pki.py::test_identity_refuses_a_role_that_tls_does_not_miss
        test_pki.py::test_identity_refuses
        test_tls.py::test_the_server_refuses_a_client_with[no usage]
        """,
          (PKI, "if USAGES[role] not in extensions.get(ExtensionOID.EXTENDED_KEY_USAGE, ()):", "if False:")),
    taken("C12", """
        test_pki.py::test_identity_refuses
        test_tls.py::test_the_server_refuses_a_client_with[two names]
        """,
          (PKI, "if len(names) != 1 or not isinstance(names[0], x509.DNSName):",
           "if not names or not isinstance(names[0], x509.DNSName):")),
    taken("C12", """
        test_pki.py::test_identity_refuses
        test_tls.py::test_the_server_refuses_a_client_with[an address]
        """,
          (PKI, "if len(names) != 1 or not isinstance(names[0], x509.DNSName):", "if len(names) != 1:"),
          (PKI, "if not config.NAME.fullmatch(names[0].value):", "if not config.NAME.fullmatch(str(names[0].value)):")),
    taken("C12 P1", """
        test_pki.py::test_identity_is_one_good_name_or_none
        test_pki.py::test_identity_refuses
        test_tls.py::test_the_server_refuses_a_client_with[newline in the name]
        test_tls.py::test_the_server_refuses_a_client_with[path as a name]
        """,
          (PKI, "if not config.NAME.fullmatch(names[0].value):", "if False:")),
    taken("C12", "test_pki.py::test_identity_refuses",
          (VALUES, 'NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")', 'NAME = re.compile(r"[^/]+")')),

    # C13: A source address that is not the sender's
    taken("C13 P5", """
        test_packet.py::test_a_source_that_is_not_the_sessions
        test_worker.py::test_packets_pass_both_ways_and_are_counted
        test_hostile.py::test_foreign_source_is_dropped_and_counted[of another client]
        """,
          (PACKET, "if verdicts is not None and (cause := verdicts[pair(payload, at_pair)]) is not None:",
           "if False:")),
    taken("C13 P5", "test_routing.py::test_a_sessions_peer_may_use_its_own_addresses_only",
          (ROUTING, 'return "foreign_source" if any(source) else "no_source"', "pass")),
    taken("C13", "test_packet.py::test_a_packet_whose_length_is_not_that_of_its_entry",
          (PACKET, "if whole != at - ip or (first", "if (first")),
    taken("C13", "test_packet.py::test_an_ipv4_header_longer_than_its_packet",
          (PACKET, "or (first & 15) * 4 > whole and first < 0x60:", ":")),

    # C14: Clients that reach each other unasked
    taken("C14 P5", """
        test_routing.py::test_no_client_gets_to_another
        test_worker.py::test_clients_that_may_or_may_not_reach_each_other[True]
        """,
          (ROUTING, "if self._isolation is not None and self._isolation.forbids(destination):", "if False:")),
    taken("C14 P5", "test_gateway.py::test_client_to_client[False]",
          (SERVER, "if self._configuration.client_to_client:\n            return", "if True:\n            return")),
    taken("C14 P5", "test_gateway.py::test_hairpin_through_the_kernel[False]",
          (GATEWAY, "if not client_to_client:", "if False:")),
    taken("C14 P5", "test_gateway.py::test_clients_of_two_servers_on_one_machine[no-yes]",
          (GATEWAY, 'meta("oifgroup", GROUPS["server"])', 'meta("oifname", device)')),
    taken("C14 P5", "test_gateway.py::test_clients_of_two_servers_on_one_machine[no-yes]",
          (GATEWAY, 'meta("iifgroup", GROUPS["server"])', 'meta("iifname", device)')),
    taken("C14 C16", """
        test_gateway.py::test_what_something_else_removes_comes_back
        test_fulltunnel.py::test_a_switch_that_something_else_removes_is_closed_again_at_once
        """,
          (GUARD, "is_back = self._firewall.mend()", "is_back = False")),
    taken("C14 P5", "test_options_documented.py::test_manual_has_the_option_with_mode_and_default",
          (OPTIONS, '"client-to-client", boolean, "no"', '"client-to-client", boolean, "yes"')),
    taken("C14", "test_welcome.py::test_where_no_client_may_send",
          (SERVER, "behind = [network for networks in self._networks.values() for network in networks]",
           "behind = []")),

    # C15: Traffic of the tunnel guessed or hijacked from the network beside it (CVE-2019-14899)
    taken("C15", "test_gateway.py::test_the_tunnels_address_is_not_for_other_networks",
          (GATEWAY, "objects = own_addresses(device, interfaces)", "objects = []")),
    taken("C15", "test_client_routes.py::test_a_clients_address_is_not_for_its_neighbours",
          (CLIENTNET, 'self._changes.firewall.apply("own-addresses", rules)', "pass")),

    # C16: Traffic led around the tunnel (CVE-2024-3661, CVE-2023-36672)
    taken("C16", "test_fulltunnel.py::test_everything_goes_through_the_tunnel",
          (CLIENTNET, "self._redirect.apply(_carried(self._welcome))", "pass")),
    taken("C16", """
        test_fulltunnel.py::test_nothing_leaves_while_the_server_is_away
        test_fulltunnel.py::test_routes_of_a_hostile_network_lead_nothing_around_the_switch[yes]
        test_fulltunnel.py::test_local_networks_stay_within_reach
        """,
          (KILLSWITCH, "*local, *_CONFIGURATION, DROP),", "*local, *_CONFIGURATION),")),
    taken("C16", "test_fulltunnel.py::test_what_is_forwarded_for_others[yes]",
          (KILLSWITCH, '[meta("iifgroup", GROUPS["client"]), _ACCEPT], *local, DROP),',
           '[meta("iifgroup", GROUPS["client"]), _ACCEPT], *local),')),
    taken("C16", "test_fulltunnel.py::test_a_device_that_was_down_has_everything_again",
          (GUARD, "elif is_up is None or not was_up:", "elif False:")),
    taken("C16", "test_fulltunnel.py::test_before_the_first_connection[yes]",
          (CLIENTNET, "if self._configuration.kill_switch:\n            self._close()",
           "if False:\n            self._close()")),
    taken("C16", "test_fulltunnel.py::test_a_kill_leaves_the_switch_closed_until_the_next_start",
          (CLIENTNET, "if firewall.exists():", "if False:")),
    taken("C16", "test_fulltunnel.py::test_a_failure_after_it_was_up_leaves_the_switch_closed",
          (CLIENTNET, "if self._configuration.kill_switch:\n            self._changes.firewall.hold(killswitch.PART)",
           "if False:\n            self._changes.firewall.hold(killswitch.PART)")),
    taken("C16", "test_fulltunnel.py::test_everything_goes_through_the_tunnel",
          (CLIENT, "transport.mark(sock, self.network.mark)", "pass")),
    taken("C16", "test_fulltunnel.py::test_a_family_that_the_tunnel_lacks_stays_inside",
          (REDIRECT, "for version in FAMILIES:\n                self._set_default",
           "for version in versions:\n                self._set_default")),

    # C17: Port shadow: NAT and listener share the tracking of connections (CVE-2021-3773)
    taken("C17", "test_gateway_rules.py::test_no_client_gets_the_port_that_is_listened_on",
          (GATEWAY, "first, last = LOW if port >= HIGH[0] else HIGH", "first, last = HIGH")),
    taken("C17", "test_gateway.py::test_no_client_shadows_the_listener",
          (GATEWAY, "shadows = [", "shadows = [] and [")),
    taken("C17", "test_gateway.py::test_no_client_shadows_the_listener",
          (GATEWAY, "for port in ports:\n            first", "for port in ():\n            first")),

    # C18: Compression (VORACLE)
    taken("C18", "test_security.py::test_nothing_is_compressed",
          (FRAME, "import struct\n",
           "import struct\n"
           "import zlib\n"),
          (FRAME, "    return _HEADER.pack(", "    zlib.compress\n    return _HEADER.pack(")),

    # C19: Settings that are pushed (CVE-2025-10680, CVE-2024-5594)
    taken("C19 P7", "test_security.py::test_nothing_starts_a_shell",
          (HOOKS, 'cwd="/", stdin', 'cwd="/", shell=True, stdin')),
    taken("C19 P7", "test_handshake.py::test_the_bounds_of_a_number",
          (HANDSHAKE, "if type(value) is not int or not low <= value <= high:", "if type(value) is not int:")),
    taken("C19", "test_fuzz.py::test_fuzzed_for_a_moment[hello]",
          (HANDSHAKE, "if type(value) is not int or not low <= value <= high:", "if not low <= value <= high:")),
    taken("C19", "test_handshake.py::test_an_address_that_is_none",
          (HANDSHAKE, "if address.is_multicast or address.is_loopback or address.is_unspecified:", "if False:")),
    taken("C19 P7", "test_handshake.py::test_how_much_a_list_may_hold",
          (HANDSHAKE, "or len(value) > most or", "or")),
    taken("C19 P7", "test_handshake.py::test_what_a_list_may_not_hold",
          (HANDSHAKE, "if len(text) > DOMAIN_MAX or not _DOMAIN.fullmatch(text):", "if len(text) > DOMAIN_MAX:")),
    taken("C19 P7", "test_handshake.py::test_what_a_list_may_not_hold",
          (HANDSHAKE, "if value.prefixlen < POOL_PREFIX_MIN or not _is_elsewhere(value.network_address):",
           "if not _is_elsewhere(value.network_address):")),
    taken("C19 P7", """
        test_policy.py::test_a_pushed_route
        test_policy.py::test_what_is_taken_is_allowed_and_spares_what_it_must
        """,
          (POLICY, "if network.prefixlen == 0:", "if False:")),
    taken("C19 P7", """
        test_policy.py::test_a_pushed_route
        test_policy.py::test_what_is_taken_is_allowed_and_spares_what_it_must
        test_client_routes.py::test_pushed_routes_by_the_policy
        """,
          (POLICY, "if not any(_is_inside(network, one) for one in allowed):", "if False:")),
    taken("C19 P7", """
        test_policy.py::test_a_pushed_route
        test_policy.py::test_what_is_taken_is_allowed_and_spares_what_it_must
        """,
          (POLICY, "if server in network:", "if False:")),
    taken("C19 P7", """
        test_policy.py::test_a_pushed_route
        test_policy.py::test_what_is_taken_is_allowed_and_spares_what_it_must
        """,
          (POLICY, "if one.version == network.version and one.overlaps(network):", "if False:")),
    taken("C19 P7", "test_client.py::test_a_welcome_that_does_not_answer_the_hello_is_not_taken",
          (CLIENT, "            or welcome.connections > hello.connections\n", "")),
    taken("C19", "test_client.py::test_a_welcome_that_does_not_answer_the_hello_is_not_taken",
          (CLIENT, "            welcome.cipher not in hello.ciphers\n            or welcome", "            welcome")),
    taken("C19", "test_clientnet.py::test_name_servers",
          (CLIENTNET, "(self._welcome.dns if accepted else ())", "self._welcome.dns")),
    taken("C19", "test_clientnet.py::test_pushed_routes_pass_the_policy",
          (CLIENTNET, "taken, refused = policy.accept_routes(pushed, allowed, self._servers, "
                      "routes.connected(self._device))",
           "taken, refused = pushed, {}")),
    taken("C19", """
        test_clientnet.py::test_the_pool_is_a_route_like_any_other
        test_client_routes.py::test_a_pool_is_led_by_the_policy
        test_client_routes.py::test_a_pool_that_is_a_network_here
        """,
          (CLIENTNET, "for network in (*own, *taken):", "for network in (*own, *pools, *taken):")),
    taken("C19", """
        test_client_routes.py::test_a_pool_is_led_by_the_policy
        test_client_routes.py::test_a_pool_that_holds_the_server
        test_client_routes.py::test_a_pool_that_is_a_network_here
        """,
          (CLIENTNET, "return [ipaddress.ip_interface(one.ip) for one in", "return [one for one in")),
    taken("C19", "test_clientnet.py::test_a_pool_goes_when_the_server_turns_out_to_be_in_it",
          (CLIENTNET, "if self._led and any(address in network", "if False and any(address in network")),

    # C20: Lines of the log that a peer writes
    taken("C20 P7", "test_service.py::test_printable_is_one_short_line_of_ascii",
          (SERVICE, 'str(text).encode("unicode_escape").decode("ascii")', "str(text)")),
    taken("C20 P7", "test_service.py::test_printable_is_one_short_line_of_ascii",
          (SERVICE, 'shown if len(shown) <= limit else shown[: limit - 3] + "..."', "shown")),
    taken("C20", """
        test_service.py::test_each_kind_of_line_has_a_budget_of_its_own
        test_service.py::test_every_event_has_a_rate
        test_strangers.py::test_many_bad_connections_make_few_lines
        test_server_says.py::test_one_that_comes_again_and_again_makes_few_lines
        test_clientnet.py::test_what_a_server_pushes_makes_few_lines
        test_hostile.py::test_log_of_strangers_is_limited
        """,
          (SERVICE, "passes = left >= 1", "passes = True")),
    taken("C20", """
        test_service.py::test_each_kind_of_line_has_a_budget_of_its_own
        test_service.py::test_each_identity_has_a_budget_of_its_own
        """,
          (SERVICE, 'kind = record.pathname, record.lineno, getattr(record, "IDENTITY", None)', "kind = None")),
    taken("C20", """
        test_service.py::test_each_identity_has_a_budget_of_its_own
        test_server_says.py::test_one_that_comes_again_and_again_makes_few_lines
        """,
          (SERVICE, 'getattr(record, "IDENTITY", None)', "None")),
    taken("C20", "test_clientnet.py::test_what_a_server_pushes_makes_few_lines",
          (CLIENTNET, "texts[:LISTED_MAX] + more", "texts")),
    taken("C20 P7", "test_server_ends.py::test_a_worker_speaks_for_its_own_connections_only",
          (SERVER, 'reason = printable(message["reason"], REASON_MAX)', 'reason = message["reason"]')),
    taken("C20 P7", "test_client.py::test_a_worker_speaks_for_its_own_connections_only",
          (CLIENT, 'printable(message["reason"], REASON_MAX)', 'message["reason"]')),
    taken("C20", "test_workers.py::test_what_a_worker_says_of_a_bug_is_escaped_and_bounded",
          (WORKERS, "printable(line, BUG_WIDTH)", "line")),
    taken("C20", "test_workers.py::test_what_a_worker_says_of_a_bug_is_escaped_and_bounded",
          (WORKERS, ".splitlines()[-BUG_LINES:]", ".splitlines()")),
    taken("P2", "test_client.py::test_a_worker_speaks_for_its_own_connections_only",
          (CLIENT, "connection if connection is not None and connection.worker == worker else None", "connection")),
    taken("P2", "test_client.py::test_a_worker_speaks_for_its_own_connections_only",
          (CLIENT, "connection = self._reported(number, worker)", "connection = self._connections.get(number)")),
    taken("P2", "test_server_ends.py::test_a_worker_speaks_for_its_own_connections_only",
          (SERVER, "connection if connection is not None and connection.worker == worker else None", "connection")),
    taken("P2", "test_server_ends.py::test_a_worker_speaks_for_its_own_connections_only",
          (SERVER, "if self._reported(number, worker) else None", "")),
    taken("C20", "test_listener.py::test_one_line_tells_of_all_that_were_dropped",
          (LISTENER, "            self._last_dropped[why] = address\n",
           "            self._last_dropped[why] = address\n"
           "            self._report_drops()\n")),

    # C21: A session that lives on after its end (CVE-2024-28882)
    taken("C21", """
        test_session.py::test_join_refuses_a_session_that_ended
        test_session.py::TestAnyOrder
        """,
          (SESSION, "if self._by_id.pop(session.id, None) is None:", "if self._by_id.get(session.id) is None:")),
    taken("C21", "test_session.py::test_closing_twice_is_closing_once",
          (SESSION, "connection = self.connections.pop(number, None)", "connection = self.connections.get(number)")),
    taken("C21", "test_connection_ends.py::test_what_comes_behind_close_does_not_count",
          (CONNECTION, "        raise gevent.GreenletExit\n\n    _CONTROL_FRAMES", "\n    _CONTROL_FRAMES")),
    taken("C21", "test_inbound.py::test_a_connection_that_has_ended_does_not_come_to_life",
          (CONNECTION, "if self._ended:\n                    #", "if False:\n                    #")),
    taken("C21", "test_server_ends.py::test_a_session_without_connection_ends_after_its_grace_time",
          (SESSION, "and now - session.idle_since >= (self._grace if session.is_live else self._max_pending_seconds)",
           "and False")),
    taken("C21", "test_session.py::test_a_session_that_ends_during_a_handshake_gets_no_connection",
          (SESSION, "if session.is_ended:\n            raise", "if False:\n            raise")),
    taken("C21", "test_pushed_out.py::test_a_connection_that_ends_after_its_session_does_not_bring_it_back",
          (SERVER, "        if _is_routed(session):\n            self.workers.broadcast",
           "        if True:\n            self.workers.broadcast")),

    # C22: A length that is believed (CWE-789)
    taken("C22 P6", """
        test_frame.py::test_a_length_of_data_outside_its_range_is_refused
        test_frame.py::test_any_four_bytes_are_refused_or_within_the_limit
        """,
          (FRAME, "if not TAG_SIZE <= size <= (limit if kind == DATA else CONTROL_PAYLOAD_LIMIT) + TAG_SIZE:",
           "if False:")),
    taken("C22 P6", """
        test_handshake.py::test_a_length_outside_its_range
        test_tls.py::test_a_length_that_is_not_allowed_is_refused_before_its_message_comes
        """,
          (HANDSHAKE, "if not 2 <= size <= MESSAGE_MAX:", "if False:")),
    taken("C22", "test_packet.py::test_a_length_beyond_the_payload",
          (PACKET, "if not ENTRY_MIN <= length <= ENTRY_MAX or at > size:",
           "if not ENTRY_MIN <= length <= ENTRY_MAX:")),
    taken("C22", "test_packet.py::test_a_length_that_no_packet_has",
          (PACKET, "if not ENTRY_MIN <= length <= ENTRY_MAX or at > size:", "if at > size:")),

    # C23: A client that asks for too much: tiny frames, pings, new keys for TLS, connections without end
    taken("C23 P6", """
        test_tls.py::test_keys_are_not_renewed_without_end
        test_tls.py::test_bytes_before_authentication_are_bounded
        """,
          (TLS, "        self._may_come -= len(data)\n", "")),
    taken("C23", "test_tls.py::test_a_peer_that_says_much_holds_up_nobody",
          (TLS, "        gevent.sleep(0)\n", "")),
    taken("C23", "test_peer_misbehaves.py::test_a_flood_of_pings_by_a_peer_that_reads_nothing",
          (CONNECTION, "self._control[kind] = payload", "self._control[kind + 256 * len(self._control)] = payload"),
          (CONNECTION, "payload = control.pop(kind)", "payload, kind = control.pop(kind), kind % 256")),
    taken("C23", "test_peer_misbehaves.py::test_a_flood_of_tiny_frames_does_not_hold_up_others",
          (CONNECTION, "                hub.switch()\n                if self._ended:",
           '                while not __import__("select").select([self._socket], [], [], 0)[0]:\n'
           "                    hub.switch()\n"
           "                if self._ended:"),
          (CONNECTION, "and time.monotonic() > self._turn_ends:\n                        self._wait", "and False:\n"
           "                        self._wait")),
    taken("C23", "test_peer_misbehaves.py::test_whole_frames_that_came_in_one_go_wait_for_the_others_turn",
          (CONNECTION, "and time.monotonic() > self._turn_ends:\n                        self._wait", "and False:\n"
           "                        self._wait")),
    taken("C23", """
        test_peer_misbehaves.py::test_whole_frames_that_came_in_one_go_wait_for_the_others_turn
        test_peer_misbehaves.py::test_a_frame_of_very_many_packets_waits_for_the_others_turn
        """,
          (CONNECTION, "get_hub().wait(self._turn)", "gevent.sleep(0)")),
    taken("C23", "test_peer_misbehaves.py::test_a_frame_of_very_many_packets_waits_for_the_others_turn",
          (CONNECTION, "if time.monotonic() > self._turn_ends:\n                if opened", "if False:\n"
           "                if opened")),
    taken("C23", "test_peer_misbehaves.py::test_a_frame_of_very_many_packets_waits_for_the_others_turn",
          (CONNECTION, "if opened is worker.scratch_read:", "if False:")),
    taken("C23", "test_peer_misbehaves.py::test_a_frame_of_very_many_packets_waits_for_the_others_turn",
          (PACKET, "for _ in range(INSPECTED_MAX):", "for _ in range(size):")),
    taken("C23", "test_peer_misbehaves.py::test_more_connections_bring_no_larger_share",
          (CONNECTION, " / (len(self.session.connections) or 1)", "")),
    taken("C23", "test_peer_misbehaves.py::test_a_peer_that_replaces_its_key_before_it_is_due_is_cut",
          (CONNECTION, "if self._timed_rekeys > REKEYS_EXTRA + 2 * (now - self.since) / self._rekey_interval:",
           "if False:")),
    taken("C23", "test_worker.py::test_a_stuck_peer_does_not_hold_up_another",
          (CONNECTION, "if self._full_since is not None and time.monotonic() - self._full_since > STALL_TIME:",
           "if False:"),
          (CONNECTION, "if self._full_since is not None and now - self._full_since > STALL_TIME:", "if False:")),
    taken("C23", """
        test_refusals.py::test_an_identity_that_connects_too_often_waits_and_is_refused_and_others_are_not
        test_admission.py::test_never_more_than_burst_and_rate
        """,
          (ADMISSION, "allowed = tokens >= 1", "allowed = True")),
    taken("C23", """
        test_refusals.py::test_an_identity_that_connects_too_often_waits_and_is_refused_and_others_are_not
        test_refusals.py::test_who_leaves_without_hello_has_had_a_handshake_too
        """,
          (SERVER, "gevent.sleep(PACE_PAUSE)", "pass")),
    taken("C23", "test_refusals.py::test_who_leaves_without_hello_has_had_a_handshake_too",
          (SERVER, "is_too_often = not self._pace.allows(identity, time.monotonic())\n", "is_too_often = False\n"),
          (SERVER, "            if is_too_often:\n                raise",
           "            if not self._pace.allows(identity, time.monotonic()):\n                raise")),
    taken("C23", "test_refusals.py::test_no_client_has_more_sessions_and_connections_than_its_bounds",
          (SESSION, "if sum(not session.is_live for session in others) >= PENDING_MAX:", "if False:")),
    taken("C23 P6", """
        test_refusals.py::test_no_client_has_more_sessions_and_connections_than_its_bounds
        test_session.py::test_connections_that_wait_for_their_first_frame_are_bounded
        """,
          (SESSION, "if sum(not connection.is_live for connection in session.connections.values()) >= (",
           "if False and (")),

    taken("C23", "test_hooks.py::test_one_that_comes_and_goes_holds_up_no_other",
          (HOOKS, "begun = next(filter(call.ends, waiting), None)", "begun = None")),

    # C24: Addresses that run out, identities that collide
    taken("C24", """
        test_pool.py::test_full_pool_refuses_and_serves_exactly_its_size
        test_clients.py::test_full_pool
        """,
          (POOL, "if number not in used:", "if True:")),
    taken("C24", """
        test_pool.py::test_who_sends_no_frame_takes_nobodys_lease
        test_pool.py::TestAnyOrder
        """,
          (POOL, "self._lent[identity] = self._free_number()\n",
           "self._lent[identity] = self._free_number()\n                self.settle(identity)\n")),
    taken("C24", "test_pool.py::TestAnyOrder",
          (POOL, "self._leases[identity] = number\n        self.save()", "self.save()")),
    taken("C24", "test_session.py::TestAnyOrder",
          (SESSION, "            self._pool.settle(session.lease)\n", "")),
    taken("C24", "test_pool.py::test_leases_are_bounded",
          (POOL, "return min(*hosts, LEASES_MAX + 2)", "return min(hosts)")),
    taken("C24", "test_second_login.py::test_second_login_is_refused",
          (SESSION, 'if self._second_login == "refuse" and any(', "if False and any(")),
    taken("C24", "test_second_login.py::test_second_login_runs_beside_the_first",
          (SESSION, 'if self._second_login != "parallel":', "if True:")),
    taken("C24", "test_gateway.py::test_a_fixed_address_is_kept_from_others",
          (POOL, "taken = self._reserved.union(used, self._leases.values())",
           "taken = used.union(self._leases.values())")),
    taken("C24", """
        test_client.py::test_an_address_that_another_device_has_is_waited_for
        test_client_routes.py::test_an_address_that_another_device_has
        """,
          (CLIENT, "link.check_addresses(self._tun.name, interfaces)", "pass")),

    # C25: Key files: mode, owner, links, races
    taken("C25 P8", """
        test_secret_files.py::test_a_key_that_others_can_reach
        test_configuration.py::test_key_file_that_others_can_read
        """,
          (FILES, "if status.st_mode & 0o027:", "if False:")),
    taken("C25", "test_secret_files.py::test_a_key_of_somebody_else",
          (FILES, "if status.st_uid not in (0, os.geteuid()):", "if False:")),
    taken("C25", "test_secret_files.py::test_a_symlink",
          (FILES, "open_regular(source or file, os.O_NOFOLLOW)", "open_regular(source or file)")),
    taken("C25", "test_secret_files.py::test_a_file_that_is_swapped_meanwhile_is_judged_by_what_is_read_of_it",
          (FILES, "status = os.fstat(stream.fileno())", "status = os.stat(file)")),
    taken("C25", "test_pki_files.py::test_modes_whatever_the_umask",
          (ADMIN_FILES, "            os.fchmod(descriptor, mode)\n", "")),
    taken("C25", "test_latest.py::test_a_full_disk_leaves_the_old_file_whole",
          (LATEST, 'temporary = path.with_suffix(".new")', "temporary = path")),

    # C27: Secrets that time betrays
    taken("C27", "test_security.py::test_tokens_are_compared_in_constant_time",
          (SESSION, "hmac.compare_digest(session.token if session else bytes(len(token)), token)",
           "(session.token if session else bytes(len(token))) == token")),
    taken("C27", "test_session.py::test_join_refuses[another identity]",
          (SESSION, "        if session is None or not token_fits",
           "        if session and session.identity != identity:\n"
           '            raise Refused("identity", "not yours")\n'
           "        if session is None or not token_fits")),

    # C28: Secrets in memory, in core files, in texts
    taken("C28 P8", "test_handshake.py::test_nothing_secret_is_shown",
          (HANDSHAKE, "    token: bytes = dataclasses.field(repr=False)", "    token: bytes")),
    taken("C28 P8", "test_keys.py::test_nothing_secret_is_shown",
          (KEYS, 'raise RemoteError("authentication", "a frame is not authentic") from None',
           'raise RemoteError("authentication", f"a frame is not authentic under {self._secret.hex()}") from None')),
    taken("C28", "test_session.py::test_no_token_in_repr",
          (SESSION, "    token: bytes = dataclasses.field(repr=False)", "    token: bytes")),
    taken("C28", "test_syntax.py::test_no_error_shows_a_key",
          (CONFIGURATION, 'hidden = option.secret or "PRIVATE KEY" in one', "hidden = False")),
    taken("C28", "test_syntax.py::test_no_error_shows_a_key",
          (ERRORS, 'return "(hidden)" if re.search(r"[A-Za-z0-9+/]{40}", text) else escaped(text)',
           "return escaped(text)")),
    taken("C28", "test_hardening.py::test_memory_is_hidden_afterwards_and_not_before",
          (HARDENING, "return ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0", "return True")),
    taken("C28", "test_hardening.py::test_memory_is_hidden_afterwards_and_not_before",
          (HARDENING, "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))", "pass")),
    taken("C28", "test_secrets.py::test_a_token_is_in_the_main_process_alone",
          (SERVER, '"replaces": hello.replaces,', '"replaces": hello.replaces, "token": session.token.hex(),')),
    taken("C28", "test_secrets.py::test_no_process_has_a_core_file_or_can_be_read_by_its_like",
          (WORKER, "    hardening.hide_memory()\n", "")),
    taken("C28", "test_secrets.py::test_no_process_has_a_core_file_or_can_be_read_by_its_like",
          (MAIN, "if not hardening.hide_memory():", "if False:")),
    taken("C28", "test_secrets.py::test_no_secret_is_in_a_log_at_any_level",
          (HANDSHAKE, '"HELLO: session and token go together"',
           'f"HELLO: session and token go together: {token and token.hex()}"')),
    taken("C28", "test_server_says.py::test_status_shows_what_lives_and_no_secret",
          (SERVER, '"cipher": session.terms["cipher"],\n                        "offload"',
           '"cipher": session.token.hex(),\n                        "offload"')),

    # P1: authentication
    taken("P1 C12", """
        test_tls.py::test_the_server_refuses_another_authority_of_the_same_name
        test_tls.py::test_the_server_refuses_a_server_s_certificate
        test_tls.py::test_the_client_refuses_a_server_with
        test_tls.py::test_what_the_daemon_s_context_insists_on
        """,
          (TLS, "context.verify_mode = ssl.CERT_REQUIRED",
           "context.check_hostname, context.verify_mode = False, ssl.CERT_NONE")),
    taken("P1", "test_tls.py::test_the_server_refuses_no_certificate",
          (TLS, "context.verify_mode = ssl.CERT_REQUIRED", "context.verify_mode = ssl.CERT_OPTIONAL"),
          (TLS, 'self._tls.version() != "TLSv1.3" or not certificate', 'self._tls.version() != "TLSv1.3"')),

    # P3: frames
    taken("P3", "test_keys.py::test_every_flipped_bit_of_header_payload_and_tag",
          (KEYS, "self._aead.seal_into(nonce, payload, header, out)",
           'self._aead.seal_into(nonce, payload, b"", out)'),
          (KEYS, "self._aead.open_into(nonce, sealed, header, out)", 'self._aead.open_into(nonce, sealed, b"", out)')),
    taken("P3", "test_keys.py::test_every_flipped_bit_of_header_payload_and_tag",
          (KEYS, 'raise RemoteError("authentication", "a frame is not authentic") from None',
           "return len(sealed) - TAG_SIZE")),

    # P4: the past
    taken("P4", "test_keys.py::test_a_ratchet_forgets",
          (KEYS, 'self._secret = expand_label(self._secret, "upd", SECRET_SIZE)',
           'self._former, self._secret = self._secret, expand_label(self._secret, "upd", SECRET_SIZE)')),
    taken("P4", "test_client.py::test_each_connection_is_replaced_one_at_a_time",
          (CLIENT, "with self._replacing:", "if True:")),

    # P6: bounds
    taken("P6", "test_sendqueue.py::test_no_more_frames_than_one_connection_may_have",
          (SENDQUEUE, "if self._held and self._held >= min(FRAMES_MAX, self._pool.left):", "if False:")),
    taken("P6", "test_routing.py::test_verdicts_are_bounded",
          (ROUTING, "if len(self) >= VERDICTS_MAX:", "if False:")),
    taken("P6", "test_routing.py::test_the_memo_is_bounded",
          (ROUTING, "if len(memo) >= MEMO_MAX:", "if False:")),
    taken("P6", "test_routing.py::test_the_last_packets_wait_for_a_connection",
          (ROUTING, "while len(self._entries) > WAITING_MAX:", "while False:")),

    # P7: no way out of the protocol
    taken("P7", "test_imports.py::test_imports_follow_the_arrows",
          (WORKER, "from bulkvpnd import hardening\n", "from bulkvpnd import config, hardening\n")),

    # P8: the process
    taken("P8", """
        test_packaging.py::test_unit_is_confined
        test_packaging.py::test_unit
        """,
          (UNIT, "User=bulkvpnd\n", "")),
    taken("P8", "test_workers.py::test_a_worker_has_no_capability",
          (WORKERS, '["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]', "[]")),
    taken("P8 C28", "test_secrets.py::test_a_private_key_is_in_the_main_process_alone[server]",
          (SERVER, '"replaces": hello.replaces,',
           '"replaces": hello.replaces, "key": tls.read_texts(configuration)["key"],')),
    taken("P8", "test_secrets.py::test_a_worker_has_no_capability_and_cannot_get_one",
          (WORKERS, '["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]',
           '["setpriv", "--inh-caps=-all", "--no-new-privs"]')),
    taken("P8", "test_unprivileged.py::test_a_worker_has_none_where_the_main_process_has_one_and_is_not_root",
          (WORKERS, '"--ambient-caps=-all", "--no-new-privs"]', '"--no-new-privs"]')),
    taken("P8", "test_status_socket.py::test_who_is_not_root_may_only_look",
          (STATUS, "if not is_privileged:", "if False:")),
    taken("P8", """
        test_hardening.py::test_a_confined_process_reaches_nothing_by_itself
        test_hardening.py::test_a_worker_is_confined_before_it_serves
        """,
          (HARDENING, '("Landlock", _close_files), ', "")),
    taken("P8", """
        test_hardening.py::test_a_confined_process_reaches_nothing_by_itself
        test_hardening.py::test_a_worker_is_confined_before_it_serves
        test_secrets.py::test_a_worker_is_confined_in_each_of_its_threads
        """,
          (HARDENING, ', ("seccomp", _refuse_calls)', ",")),
    taken("P8", """
        test_hardening.py::test_a_worker_is_confined_before_it_serves
        test_secrets.py::test_a_worker_is_confined_in_each_of_its_threads
        """,
          (WORKER, "missing = hardening.confine()", "missing = []")),
    *(taken("P8", "test_hardening.py::test_a_confined_process_reaches_nothing_by_itself", (HARDENING, call, ""))
      for call in ('"connect",', '"socket",', '"kill", ', '"chmod", ', '"chown", ', '"truncate",')),
    taken("P8", "test_workers.py::test_of_the_environment_a_worker_has_little",
          (WORKERS, "env=_environment()", "env={**os.environ, **_environment()}")),
    taken("P8", "test_status_socket.py::test_the_daemon_s_own_user_may_only_look",
          (STATUS, "self._answer(sock, user == self._master)", "self._answer(sock, user in (0, os.geteuid()))")),
    taken("P8", """
        test_status_socket.py::test_one_user_has_so_many_places_and_the_rest_is_refused_at_once
        test_status_socket.py::test_a_crowd_does_not_keep_out_root
        """,
          (STATUS, "if not self._has_place(user):", "if False:"),
          (STATUS, "StreamServer(sock, self._serve)", "StreamServer(sock, self._serve, spawn=16)")),
    taken("P8", "test_status_socket.py::test_a_crowd_does_not_keep_out_root",
          (STATUS, "(user == ROOT or others < PLACES_MAX)", "others < PLACES_MAX")),
    taken("P8", "test_status_socket.py::test_a_crowd_does_not_keep_out_root",
          (STATUS, "(user == ROOT or others < PLACES_MAX)", "True")),
    taken("P8", "test_status_socket.py::test_only_owner_and_group_may_ask",
          (STATUS, "mask = os.umask(0o117)", "mask = os.umask(0o111)")),
    taken("P8 C28", "test_tls.py::test_sslkeylogfile_is_not_honoured",
          (TLS, "    context.hostname_checks_common_name = False\n",
           "    context.hostname_checks_common_name = False\n"
           '    context.keylog_filename = os.environ.get("SSLKEYLOGFILE")\n')),
    *(taken("P8 C28", "test_packaging.py::test_unit", (UNIT, line, "")) for line in confinement(UNIT)),
    *(taken("P8", "test_packaging.py::test_helper", (HELPER, line, "")) for line in confinement(HELPER)),
    taken("P8", "test_packaging.py::test_helper_is_confined",
          (HELPER, "NoNewPrivileges=yes\n", ""), (HELPER, "RestrictNamespaces=yes\n", "")),
    taken("P8", "test_packaging.py::test_only_the_daemon_reaches_the_helper",
          ("debian/bulkvpnd.bulkvpnd-resolvconf.socket", "SocketMode=0660\n", "")),
    taken("P8", "test_resolvconf.py::test_who_has_not_the_capability_is_refused",
          (RESOLVCONF, "if not allowed:", "if False:")),
    taken("P8", "test_resolvconf.py::test_a_helper_does_not_wait_for_a_request_for_ever",
          (RESOLVCONF, "connection.settimeout(REQUEST_TIMEOUT)", "pass")),
    taken("P8", "test_resolvconf.py::test_a_helper_does_nothing_without_the_lock_of_its_instance",
          (RESOLVCONF, "fcntl.flock(lock, fcntl.LOCK_EX)", "pass")),
    taken("P8", "test_program.py::test_a_program_has_little_of_the_environment",
          ("bulkvpnd/host/program.py", 'env={"PATH"', 'env={**os.environ, "PATH"')),
    taken("P8", """
        test_packaging.py::test_polkit_lets_the_daemon_s_user_set_name_servers_and_nobody_else
        test_packaging.py::test_polkit_s_rule_says_yes_to_these_and_nothing_of_others
        """,
          ("debian/polkit/bulkvpnd.rules", 'subject.user == "bulkvpnd" && ', "")),
    taken("P8", "test_packaging.py::test_what_instances_share_is_made_by_the_package_and_can_be_written",
          ("debian/bulkvpnd.tmpfiles", "d /run/bulkvpn 0750 ", "d /run/bulkvpn 0755 ")),
    *(taken("P8", "test_resolvconf.py::test_it_refuses", (RESOLVCONF, check, "if False:")) for check in (
        "if len(data) > REQUEST_MAX:",
        "if not isinstance(value, str) or not _INSTANCE.fullmatch(value):",
        "if not isinstance(value, str) or not _ADDRESS.fullmatch(value):",
        'if own or getattr(address, "ipv4_mapped", None):',
        "if not isinstance(value, str) or not _DOMAIN.fullmatch(value):",
        "if not isinstance(values, list) or len(values) > most:",
    )),
]

UNREMOVED = {
    # row: why there is nothing to take out
    "C26": "gevent makes greenlets of the handlers; there is no check",
}

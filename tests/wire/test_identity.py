from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from wire import certificates, identity
from wire.errors import IdentityError, MachineError, PayloadError, Reason, UserError
from wire.identity import Card, Invitation

KEY, OTHER_KEY = certificates.new_key(), certificates.new_key()
CA_KEY = certificates.new_key()
CA = certificates.authority(CA_KEY, 1000.0)
RELEASE_KEY = certificates.new_release_key()


def device(lifetime_s: float = 100.0, name: str = "d1") -> str:
    return certificates.for_caller("device", name, certificates.public_of(KEY), CA_KEY, lifetime_s)


@pytest.mark.parametrize("address", ["192.0.2.7:7444", "fl.example.org:7444", "[::1]:7444"])
def test_an_invitation_is_one_string_that_says_everything(address: str) -> None:
    made = Invitation(address, os.urandom(32), os.urandom(16))
    assert Invitation.parse(f"  {made.text()}\n") == made
    assert " " not in made.text() and len(made.text()) < 120


@pytest.mark.parametrize("cut", [0, 5, 20, 60, -1])
def test_a_string_that_is_cut_off_is_no_invitation(cut: int) -> None:
    text = Invitation("192.0.2.7:7444", bytes(32), bytes(16)).text()
    with pytest.raises(UserError, match="paste the whole"):
        Invitation.parse(text[:cut])


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("127.0.0.1:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("192.0.2.7:1", False),
        ("localhost.example.org:1", False),
    ],
)
def test_only_loopback_is_this_machine(address: str, here: bool) -> None:
    assert identity.is_loopback(address) is here


def test_keys_and_cards_are_for_their_owner_alone_and_come_back(tmp_path: Path) -> None:
    card = Card("127.0.0.1:7443", CA, device(), "ab" * 32)
    identity.write_card(tmp_path / "identity", card)
    identity.write_key(tmp_path / "identity", KEY)
    assert (identity.read_card(tmp_path / "identity"), identity.read_key(tmp_path / "identity")) == (card, KEY)
    for file in (tmp_path / "identity").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "identity").stat().st_mode) == 0o700


def test_an_absent_identity_is_none_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    assert identity.read_card(tmp_path) is None and identity.read_key(tmp_path) is None
    for text in ("", "{}", "[1]", '{"coordinator": 5}'):
        (tmp_path / "identity.json").write_text(text)
        with pytest.raises(IdentityError, match="cannot be read"):
            identity.read_card(tmp_path)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError):
        identity.write_key(tmp_path / "file" / "identity", KEY)


def test_a_certificate_says_who_its_holder_is() -> None:
    found = certificates.read(device())
    assert (found.role, found.name) == ("device", "d1")
    assert found.key == certificates.key_digest(certificates.public_of(KEY))
    assert found.not_after - time.time() == pytest.approx(100, abs=3)


def test_a_certificate_is_renewed_when_half_of_its_life_is_over() -> None:
    assert certificates.read(device()).renew_at - time.time() == pytest.approx(50, abs=3)


def test_a_certificate_out_of_its_time_says_what_to_do() -> None:
    found = certificates.read(device())
    found.check_window(time.time())
    with pytest.raises(IdentityError, match="new invitation"):
        found.check_window(found.not_after)
    with pytest.raises(IdentityError, match="set the clock right"):
        found.check_window(found.not_before - 1)


def test_a_clock_that_is_minutes_behind_is_no_reason_to_refuse() -> None:
    certificates.read(device()).check_window(time.time() - 200)


@pytest.mark.parametrize("pem", [CA, certificates.for_server(["localhost"], KEY, CA_KEY, 100.0), "", "x"])
def test_a_certificate_that_names_no_caller_is_refused(pem: str) -> None:
    with pytest.raises(IdentityError):
        certificates.read(pem)


def test_only_the_authority_issues() -> None:
    other = certificates.for_caller("device", "d1", certificates.public_of(KEY), OTHER_KEY, 100.0)
    assert certificates.is_issued_by(device(), CA)
    assert not certificates.is_issued_by(other, CA)


def test_a_request_proves_that_its_sender_has_the_key() -> None:
    made = certificates.request(KEY)
    assert certificates.key_digest(certificates.requested(made)) == certificates.key_digest(certificates.public_of(KEY))


@pytest.mark.parametrize("broken", ["", "x" * 1000, certificates.request(KEY) + " " * 5000, device(), KEY])
def test_what_is_no_signing_request_is_refused_as_bad_bytes(broken: str) -> None:
    with pytest.raises(PayloadError) as caught:
        certificates.requested(broken)
    assert caught.value.reason is Reason.BAD_REQUEST


def test_a_request_for_somebody_elses_key_is_refused() -> None:
    """The key of one request under the signature of another."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    der = [
        x509.load_pem_x509_csr(certificates.request(k).encode()).public_bytes(serialization.Encoding.DER)
        for k in (KEY, OTHER_KEY)
    ]
    keys = [
        certificates.public_of(k).public_bytes(
            serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
        )
        for k in (KEY, OTHER_KEY)
    ]
    forged = x509.load_der_x509_csr(der[0].replace(keys[0], keys[1]))
    with pytest.raises(PayloadError, match="signed with it"):
        certificates.requested(forged.public_bytes(serialization.Encoding.PEM).decode())


def test_a_request_with_another_kind_of_key_is_refused() -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    for made in (
        builder.sign(ed25519.Ed25519PrivateKey.generate(), None),
        builder.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256()),
    ):
        with pytest.raises(PayloadError, match="P-256"):
            certificates.requested(made.public_bytes(serialization.Encoding.PEM).decode())


def test_a_signature_is_for_one_release_by_one_key() -> None:
    public = certificates.release_public(RELEASE_KEY)
    signature = certificates.sign_release(RELEASE_KEY, "a" * 64)
    assert certificates.sign_release(RELEASE_KEY, "a" * 64) == signature
    assert certificates.is_signed("a" * 64, signature, public)
    other = certificates.release_public(certificates.new_release_key())
    flipped = signature[:-1] + ("0" if signature[-1] != "0" else "1")
    for digest, made, key in [
        ("b" * 64, signature, public),
        ("a" * 64, flipped, public),
        ("a" * 64, "", public),
        ("a" * 64, "zz", public),
        ("a" * 64, signature, other),
        ("a" * 64, signature, "short"),
    ]:
        assert not certificates.is_signed(digest, made, key)


def test_the_wire_format_of_a_signature_is_for_ever() -> None:
    """Ed25519 over "edgetune-release " and the digest, as docs/security.md says."""
    from cryptography.hazmat.primitives.asymmetric import ed25519

    signature = bytes.fromhex(certificates.sign_release(RELEASE_KEY, "a" * 64))
    public = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(certificates.release_public(RELEASE_KEY)))
    public.verify(signature, b"edgetune-release " + b"a" * 64)

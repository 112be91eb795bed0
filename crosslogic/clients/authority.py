"""Our certificate authority: makes authorities and certificates. It computes and stores nothing."""

from __future__ import annotations

import hashlib
import ipaddress
import os
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from crosslogic.domain.certificates import AUTHORITY_LIFE, BACKDATED, CLIENT_LIFE, NODE_LIFE, Authority
from crosslogic.domain.errors import InvariantViolated, Rejected

# A request with a P-256 key has about 400 bytes.
MOST_REQUEST_BYTES = 4_000
_NONCE_BYTES = 12


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate that was just issued. `pem` holds the certificate, and for one of ours its key behind it."""

    pem: str
    serial: str
    issued_at: datetime
    expires_at: datetime


def make_authority(number: int, secret: str, now: datetime, issues_from: datetime) -> Authority:
    """A new authority whose key only processes with this secret can use."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"CrossLogic node authority {number}")])
    expires_at = now + AUTHORITY_LIFE
    public = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(expires_at)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(is_authority=True), critical=True)
        .add_extension(public, critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    nonce = os.urandom(_NONCE_BYTES)
    sealed = nonce + AESGCM(_sealing_key(secret)).encrypt(nonce, plain, str(number).encode())
    return Authority(number, _pem(certificate), sealed, now, issues_from, expires_at)


def issue_node(
    authority: Authority, secret: str, request: x509.CertificateSigningRequest, names: list[str], now: datetime
) -> Certificate:
    """A certificate for a node's key under these names. It lets nobody into another node: it is a server's only."""
    return _issue(authority, secret, request.public_key(), names, now, now + NODE_LIFE, is_server=True)


def issue_client(authority: Authority, secret: str, name: str, now: datetime) -> Certificate:
    """A key and a certificate for one of our processes, by which nodes know it."""
    key = ec.generate_private_key(ec.SECP256R1())
    issued = _issue(authority, secret, key.public_key(), [name], now, now + CLIENT_LIFE, is_server=False)
    plain = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Certificate(issued.pem + plain.decode(), issued.serial, issued.issued_at, issued.expires_at)


def read_request(pem: str) -> x509.CertificateSigningRequest:
    """A certificate signing request that proves possession of a key we accept. Raises Rejected for any other."""
    problem = "it cannot be read"
    if len(pem) <= MOST_REQUEST_BYTES:
        try:
            request = x509.load_pem_x509_csr(pem.encode())
            key = request.public_key()
            if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
                problem = "its key must be on the curve P-256"
            elif not request.is_signature_valid:
                problem = "its signature is wrong"
            else:
                return request
        except (ValueError, TypeError, InvalidSignature):
            pass
    raise Rejected(f"The certificate signing request cannot be used: {problem}.", code="invalid_csr", param="csr")


def key_hash(request: x509.CertificateSigningRequest) -> bytes:
    """SHA-256 of the key that a request is for."""
    encoded = request.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(encoded).digest()


def _issue(
    authority: Authority,
    secret: str,
    key: object,
    names: list[str],
    now: datetime,
    until: datetime,
    *,
    is_server: bool,
) -> Certificate:
    assert isinstance(key, ec.EllipticCurvePublicKey)
    signer = _unseal(authority, secret)
    parent = x509.load_pem_x509_certificate(authority.certificate.encode())
    expires_at = min(until, authority.expires_at)
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if is_server else ExtendedKeyUsageOID.CLIENT_AUTH
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])]))
        .issuer_name(parent.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(expires_at)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(is_authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=True)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    return Certificate(_pem(certificate), f"{certificate.serial_number:x}", now, expires_at)


def _unseal(authority: Authority, secret: str) -> ec.EllipticCurvePrivateKey:
    nonce, sealed = authority.sealed_key[:_NONCE_BYTES], authority.sealed_key[_NONCE_BYTES:]
    try:
        plain = AESGCM(_sealing_key(secret)).decrypt(nonce, sealed, str(authority.id).encode())
    except InvalidTag as error:
        raise InvariantViolated(
            f"the key of authority {authority.id} was sealed under another CROSSLOGIC_NODE_SECRET than this process has"
        ) from error
    key = serialization.load_pem_private_key(plain, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def _sealing_key(secret: str) -> bytes:
    return HKDF(hashes.SHA256(), 32, salt=None, info=b"crosslogic authority key").derive(secret.encode())


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()

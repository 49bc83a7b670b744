"""Addresses and certificates: what is wrong with them is named, and what is right serves."""

import datetime
import ipaddress
import socket
import ssl
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from deploy.artifact.artifact import Artifact
from deploy.errors import UsageError
from deploy.serving.address import check_address, check_tls, listen


def write_pair(folder: Path, password: bytes | None = None) -> tuple[Path, Path]:
    """A certificate of this machine, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    cert_file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock))
    return cert_file, key_file


def test_both_doors_serve_with_a_certificate(shared_lenet5: Artifact, serve: Any, tmp_path: Path) -> None:
    cert, key = write_pair(tmp_path)
    server = serve(f"digits={shared_lenet5.path}", "--tls-cert", cert, "--tls-key", key)
    trust = ssl.create_default_context(cafile=str(cert))
    with urllib.request.urlopen(f"https://{server.http}/v2/health/ready", timeout=20, context=trust) as answer:
        assert answer.status == 200
    with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(f"https://{server.http}/v2/health/ready", timeout=20, context=ssl.create_default_context())
    with grpc_client.InferenceServerClient(server.grpc, ssl=True, root_certificates=str(cert)) as client:
        tensor = grpc_client.InferInput("input", [1, 1, 28, 28], "FP32")
        tensor.set_data_from_numpy(np.zeros((1, 1, 28, 28), np.float32))
        assert client.infer("digits", [tensor]).as_numpy("logits").shape == (1, 10)


def test_what_is_wrong_with_a_certificate_is_named(tmp_path: Path) -> None:
    for name in ("one", "two", "locked"):
        (tmp_path / name).mkdir()
    (cert, key), (_, other) = write_pair(tmp_path / "one"), write_pair(tmp_path / "two")
    locked = write_pair(tmp_path / "locked", b"secret")
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("garbage")
    check_tls(cert, key)
    for pair, message in (
        ((garbage, key), r"garbage.pem \(`tls_cert`\) holds no certificate"),
        ((key, key), r"key.pem \(`tls_cert`\) holds no certificate"),
        ((cert, garbage), r"garbage.pem \(`tls_key`\) holds no private key"),
        ((cert, cert), r"cert.pem \(`tls_key`\) holds no private key"),
        ((cert, other), r"is not the private key of the first certificate"),
        (locked, "has a password"),
        ((tmp_path / "none.pem", key), "cannot read .*none.pem: No such file"),
        ((tmp_path, key), "cannot read .*: Is a directory"),
    ):
        with pytest.raises(UsageError, match=message):
            check_tls(*pair)


def test_what_is_wrong_with_an_address_is_named() -> None:
    for host in ("nosuch.invalid", "a..b", "x" * 300):
        with pytest.raises(UsageError, match=r"`host` .* is not known here"):
            listen(host, 0)
    with pytest.raises(OSError, match=r"Cannot assign requested address: '192\.0\.2\.1:8000'"):
        check_address("192.0.2.1", 8000)
    with listen("localhost", 0) as taken, pytest.raises(OSError, match="Address already in use"):
        check_address("127.0.0.1", taken.getsockname()[1])
    check_address("::1" if socket.has_ipv6 else "127.0.0.1", 0)

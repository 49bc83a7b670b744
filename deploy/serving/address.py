"""Where a server listens, and the certificate that it shows: what is wrong with them is said before the models are loaded."""

import logging
import os
import resource
import socket
import ssl
from pathlib import Path

from deploy.errors import UsageError

logger = logging.getLogger("deploy.serving")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UsageError for a host that is no address of this machine, and OSError with the address."""
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"`host` {host} is not known here: {getattr(error, 'strerror', None) or error}") from error
    try:
        return socket.create_server(where[:2], family=family, backlog=2048)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), f"{host}:{port}") from error


def check_address(host: str, port: int) -> None:
    """Raise what `listen` raises, for servers that open their sockets themselves and say less."""
    listen(host, port).close()


def check_tls(cert: Path, key: Path) -> None:
    """Raise UsageError unless the files are a certificate chain and its private key, in PEM and without a password."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for file in (cert, key):
        try:
            file.read_bytes()
        except OSError as error:
            raise UsageError(f"cannot read {file}: {error.strerror}") from error
    try:
        context.load_verify_locations(cert)
    except ssl.SSLError as error:
        raise UsageError(f"{cert} (`tls_cert`) holds no certificate in PEM") from error

    def refuse() -> str:
        raise UsageError(f"{key} (`tls_key`) has a password; a server needs it without: openssl pkey -in {key} -out FILE")

    try:
        context.load_cert_chain(cert, key, refuse)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(
                f"{key} (`tls_key`) is not the private key of the first certificate in {cert} (`tls_cert`)"
            ) from error
        raise UsageError(f"{key} (`tls_key`) holds no private key in PEM: {error.reason or error}") from error


def most_connections(wanted: int) -> int:
    """Of one door: `wanted`, or fewer where the process may not have so many files open. A third of these stays for all else."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 3 * wanted
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < needed:
        logger.warning("fewer connections", extra={"connections": soft // 3, "why": f"this process may open {soft} files"})
    return min(wanted, soft // 3)

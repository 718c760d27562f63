"""Encrypted connections, with certificates made on the spot."""

import shutil
import subprocess

import grpc
import pytest
from scripted_server import piece, serving

from dspark_client import ConnectionOptions, DSparkClient, RetryPolicy, ServerConnectionError, TlsOptions

NAME = "inner.test"
OPENSSL = shutil.which("openssl")

pytestmark = pytest.mark.skipif(OPENSSL is None, reason="needs the openssl command to make certificates")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Self-signed server.pem and client.pem with their keys; both names are NAME."""
    folder = tmp_path_factory.mktemp("tls")
    for who in ("server", "client"):
        names = ["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"]
        files = ["-keyout", folder / f"{who}.key", "-out", folder / f"{who}.pem"]
        arguments = [OPENSSL, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names, *files]
        subprocess.run(arguments, check=True, capture_output=True)
    return folder


def server_credentials(certificates, *, mutual):
    pair = ((certificates / "server.key").read_bytes(), (certificates / "server.pem").read_bytes())
    return grpc.ssl_server_credentials(
        [pair],
        root_certificates=(certificates / "client.pem").read_bytes() if mutual else None,
        require_client_auth=mutual,
    )


def texts(url, tls):
    connection = ConnectionOptions(tls=tls)
    with DSparkClient(url, connection=connection, retry=RetryPolicy(max_attempts=1), timeout=10) as client:
        return [item.text for item in client.stream("x")]


def test_a_trusted_server(certificates):
    credentials = server_credentials(certificates, mutual=False)
    trusting = TlsOptions(root_certificates=certificates / "server.pem", server_name=NAME)
    with serving([piece("a", last=True)], credentials=credentials) as (_, url):
        assert texts(url, trusting) == ["a"]
        for other in (
            None,
            TlsOptions(),
            TlsOptions(root_certificates=certificates / "client.pem", server_name=NAME),
            TlsOptions(root_certificates=certificates / "server.pem"),
        ):
            with pytest.raises(ServerConnectionError, match="TLS options"):
                texts(url, other)


def test_a_client_shows_its_certificate(certificates):
    credentials = server_credentials(certificates, mutual=True)
    anonymous = TlsOptions(root_certificates=certificates / "server.pem", server_name=NAME)
    known = TlsOptions(
        root_certificates=certificates / "server.pem",
        certificate_chain=certificates / "client.pem",
        private_key=certificates / "client.key",
        server_name=NAME,
    )
    with serving([piece("a", last=True)], credentials=credentials) as (_, url):
        with pytest.raises(ServerConnectionError):
            texts(url, anonymous)
        assert texts(url, known) == ["a"]

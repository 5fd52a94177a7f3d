"""Where a server is, and with what key: checked before anything is sent there."""

from __future__ import annotations

import ipaddress
import os
import re
import urllib.request
from urllib.parse import urlsplit

from rlaif.records import UserError


def find_key(variable: str, loopback: bool) -> str:
    """The API key; empty where a server on this machine needs none.

    Raises:
        UserError: if there is none, or none that a request could carry.
    """
    key = os.environ.get(variable, "").strip()
    if not key and not loopback:
        raise UserError(
            f"no API key: set the environment variable {variable} (labeler.api_key_env names another; "
            "only a server on this machine needs none)"
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(f"the API key in the environment variable {variable} has characters that no key has")
    return key


def check_url(url: str, key: str, reason: str) -> tuple[str, bool]:
    """An address without a slash at its end, and whether it is on this machine.

    Args:
        url: the address.
        key: the setting that holds it.
        reason: why no secret may stand in it.

    Raises:
        UserError: if it is no address, or holds what may be a secret.
    """
    # What stands before an @ or after a ? may be a secret, also in an address that can't be read.
    where = key if re.search("[@?#]", url) else f"{key}={url}"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise UserError(f"{where}: not a valid address; give one like http://127.0.0.1:8000/v1") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        # The address is written into every artefact, so it must not carry a secret; nor does this message.
        raise UserError(f"{key}: an address with a user, a query or a fragment is refused, because {reason}")
    if parts.scheme not in ("http", "https") or not host or re.search(r"\s", url):
        raise UserError(f"{where}: not a valid address; give one like http://127.0.0.1:8000/v1")
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    return url.rstrip("/"), loopback


def find_proxy(base_url: str) -> str | None:
    """The proxy that the environment names for an address (aiohttp's own look-up reads ~/.netrc for every request)."""
    parts = urlsplit(base_url)
    if urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")


def account_headers() -> dict[str, str]:
    """Organization and project of an OpenAI account, from the environment variables that OpenAI documents."""
    names = {"OpenAI-Organization": "OPENAI_ORG_ID", "OpenAI-Project": "OPENAI_PROJECT_ID"}
    return {header: os.environ[name] for header, name in names.items() if os.environ.get(name)}

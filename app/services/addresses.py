"""Which addresses a webhook may be sent to: public ones alone, whatever they are called.

Checked twice: the URL when it is stored, so that its owner learns of it, and the very address of each socket before it
is connected, which is what counts. A name that is looked up again may lead elsewhere; a socket does not.
"""

from __future__ import annotations

import ipaddress
import socket

from yarl import URL

from app.errors import InvalidError, invalid

URL_CHARACTERS_MAX = 2_000

_IPV4_REFUSED = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",
    )
)
"""IANA's special-purpose registry, multicast and class E. Python's own `is_global` changed between patch releases."""

_IPV6_TAKEN = ipaddress.IPv6Network("2000::/3")
"""All that is global unicast: what maps IPv4 into IPv6 (::ffff:0:0/96, 64:ff9b::/96), and what is local, is outside."""
_IPV6_REFUSED = tuple(
    ipaddress.IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
)
"""Teredo and other protocols, documentation, 6to4: the last leads to any IPv4 address."""


def is_public(address: str) -> bool:
    """Tell whether an IP address, as a socket names it, is one of the public internet."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv4Address):
        return not any(parsed in network for network in _IPV4_REFUSED)
    return parsed in _IPV6_TAKEN and not any(parsed in network for network in _IPV6_REFUSED)


def checked_url(text: str, *, allow_private: bool) -> str:
    """Return a webhook's URL as it will be asked for. Raises InvalidError, also for an address that is not public."""
    if not (0 < len(text) <= URL_CHARACTERS_MAX and text.isprintable()):
        raise _refused(f"a URL has 1 to {URL_CHARACTERS_MAX} printable characters")
    try:
        url = URL(text)
        host, _ = url.raw_host, url.port
    except (ValueError, IndexError):  # of what stands before an @ the parser expects more than it checks
        raise _refused("it can't be read") from None
    if url.scheme not in ("http", "https") or not host:
        raise _refused("it begins with https:// or http:// and a host")
    if url.user is not None or url.password is not None:
        raise _refused("it holds no user and no password")
    if not allow_private and not _may_be_public(host):
        raise invalid("/url", "private_address", "a webhook goes to a public address")
    address = str(url.with_fragment(None))
    if len(address) > URL_CHARACTERS_MAX:
        raise _refused(f"written out it has over {URL_CHARACTERS_MAX} characters")
    return address


def _may_be_public(host: str) -> bool:
    """Tell whether a host is a public address, however spelt, or a name that is not plainly this machine's."""
    if ":" in host:
        return is_public(host)
    name = host.rstrip(".").lower()
    try:
        return is_public(socket.inet_ntoa(socket.inet_aton(name)))  # also 127.1, 0x7f000001, 2130706433
    except OSError:
        return name not in ("", "localhost") and not name.endswith(".localhost")


def _refused(why: str) -> InvalidError:
    return invalid("/url", "invalid_url", f"the URL is refused: {why}")

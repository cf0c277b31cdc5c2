"""Which addresses a webhook may reach, decided when the connection is made.

Who may name a URL that this service then calls could otherwise reach what only the service reaches:
this machine, the network around it, a cloud's metadata. A URL's host says nothing, since a name may
point anywhere and somewhere else a moment later. So the name is resolved here, each address is
looked at, and the connection goes to the very address that was found good.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, TypeAlias

import anyio
import httpcore
from pydantic import HttpUrl

from registry.errors import UnprocessableRequest
from registry.settings import Settings

Address: TypeAlias = IPv4Address | IPv6Address

#: What of IPv6 is given out at all, and within it what stands for an address of IPv4.
GLOBAL_UNICAST = IPv6Network("2000::/3")
EMBEDDING = tuple(map(IPv6Network, ("2001::/32", "2002::/16")))  # Teredo, 6to4
#: Public by the register, or by that of older Pythons: 6to4's relays, a way into IPv6's 2002::/16;
#: addresses of protocols; what Azure's machines ask their host at.
SPECIAL = tuple(map(ip_network, ("192.88.99.0/24", "192.0.0.0/24", "168.63.129.16/32")))
#: Names that are being looked up at once; one that does not come blocks no others.
LOOKUPS = 64


def is_public(address: Address) -> bool:
    """Whether an address is one of the Internet's, a single machine's, and no other in disguise.

    Private, loopback, link-local, multicast, reserved, unspecified and ``SPECIAL`` addresses are
    not, nor those of IPv6 that carry one of IPv4 (mapped, NAT64, 6to4, Teredo).
    """
    if isinstance(address, IPv6Address):
        if address not in GLOBAL_UNICAST or any(address in net for net in EMBEDDING):
            return False
    elif any(address in net for net in SPECIAL):
        return False
    return address.is_global and not (
        address.is_multicast
        or address.is_reserved
        or address.is_private
        or address.is_loopback
        or address.is_link_local
        or address.is_unspecified
    )


@dataclass(frozen=True)
class Addresses:
    """What may be reached: public addresses, and what a setting lists beside them."""

    hosts: frozenset[str] = frozenset()
    networks: tuple[Any, ...] = ()
    http: bool = False

    @classmethod
    def of(cls, settings: Settings) -> Addresses:
        hosts, networks = set(), []
        for entry in settings.webhook_allow.split(","):
            try:
                networks.append(ip_network(entry.strip()))
            except ValueError:
                hosts.add(entry.strip().lower())
        return cls(frozenset(hosts - {""}), tuple(networks), settings.webhook_http)

    def allow(self, host: str, address: Address) -> bool:
        listed = host.lower() in self.hosts or any(address in net for net in self.networks)
        return listed or is_public(address)

    def check_url(self, url: HttpUrl) -> None:
        """What can be said of a URL before its host is looked up.

        Raises:
            UnprocessableRequest
        """
        host = (url.host or "").strip("[]")
        if url.scheme != "https" and not self.http:
            wrong = "is not https; ERRATA_WEBHOOK_HTTP lets the operator allow http"
        elif url.username is not None or url.password is not None:
            wrong = "holds a user's name or a password; deliveries are signed instead"
        elif url.fragment is not None:
            wrong = "has a fragment, which is never sent; leave it out"
        elif (address := _literal(host)) and not self.allow(host, address):
            wrong = (
                "is at an address that is not public; ERRATA_WEBHOOK_ALLOW lists hosts and"
                " networks that may be reached all the same"
            )
        else:
            return
        raise UnprocessableRequest(f"the URL {wrong}", param="url", code="webhook_url_not_allowed")


class NotReachable(httpcore.ConnectError):
    """A host that is not found, or has no address that may be reached.

    It is not told which: that would tell what names there are around this machine.
    """

    def __init__(self) -> None:
        super().__init__(
            "its host was not found, or has no public address; ERRATA_WEBHOOK_ALLOW lists hosts"
            " and networks that may be reached all the same"
        )


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects to addresses that may be reached, and to no others."""

    def __init__(self, addresses: Addresses) -> None:
        self._addresses = addresses
        self._inner = httpcore.AnyIOBackend()
        self._lookups: anyio.CapacityLimiter | None = None

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Raises NotReachable, or ConnectError: it does not answer."""
        found = await self._resolve(host, port)
        allowed = [address for address in found if self._addresses.allow(host, address)]
        failed: httpcore.ConnectError = NotReachable()
        for address in allowed:
            try:
                return await self._inner.connect_tcp(
                    str(address), port, timeout, local_address, socket_options
                )
            except httpcore.ConnectError as error:
                failed = error
        raise failed

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)

    async def _resolve(self, host: str, port: int) -> list[Address]:
        """A host's addresses, each once, in the system's order. Raises NotReachable."""
        if literal := _literal(host):
            return [literal]
        if self._lookups is None:
            self._lookups = anyio.CapacityLimiter(LOOKUPS)
        look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        try:
            found = await anyio.to_thread.run_sync(
                look_up, abandon_on_cancel=True, limiter=self._lookups
            )
        except (OSError, UnicodeError) as error:
            raise NotReachable from error
        texts = dict.fromkeys(str(where[0]) for *_, where in found)
        return [ip_address(text) for text in texts]


def _literal(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None

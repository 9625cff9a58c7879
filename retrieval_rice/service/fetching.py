"""Fetches a clip from the address in a request, from public web servers only.

The request goes to the checked IP address, so that a second lookup of the name cannot lead elsewhere. Redirections
follow the same rule. Compressed data are refused, because they may expand without limit.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urljoin

import httpx

from ..uploads import UploadError, UploadLimits, upload_too_large

_REDIRECTS = 3
_IDLE_SECONDS = 10.0
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
# Non-public networks that `ipaddress` counts as global: site-local, address translation, and older forms.
_INNER = [ipaddress.ip_network(name) for name in ("fec0::/10", "64:ff9b:1::/48", "192.0.0.0/24", "::/96")]


class Fetcher:
    """
    Args:
        limits: `max_bytes` of a file, and `arriving_seconds` for the whole download.
        is_allowed: Whether an IP address may be used; by default public ones.
    """

    def __init__(self, limits: UploadLimits, is_allowed: Callable[[str], bool] | None = None):
        self.limits, self.is_allowed = limits, is_allowed or is_public

    async def fetch(self, url: str, path: Path) -> None:
        """
        Downloads an address to a file.

        Raises:
            UploadError: the address is invalid, the server is not allowed or does not answer, or the data are too
                large.
        """
        try:
            async with asyncio.timeout(self.limits.arriving_seconds):
                await self._fetch(url, path)
        except TimeoutError:
            raise UploadError(
                f"url was not fetched within {self.limits.arriving_seconds:g} s; upload the clip."
            ) from None
        except httpx.InvalidURL as error:
            raise UploadError("url is not a web address.") from error
        except (httpx.HTTPError, OSError, ValueError) as error:
            if isinstance(error, UploadError):
                raise
            raise UploadError("url cannot be fetched: its server does not answer like a web server.") from error

    async def _fetch(self, url: str, path: Path) -> None:
        # Requests must not use the proxies or passwords of the machine's user.
        async with httpx.AsyncClient(trust_env=False, timeout=_IDLE_SECONDS) as client:
            for _ in range(_REDIRECTS + 1):
                request = await self._request(client, url)
                response = await client.send(request, stream=True)
                try:
                    if not response.is_redirect:
                        return await self._write(response, path)
                    url = urljoin(url, response.headers["location"])
                finally:
                    await response.aclose()
        raise UploadError(f"url is redirected more than {_REDIRECTS} times.")

    async def _request(self, client: httpx.AsyncClient, url: str) -> httpx.Request:
        address = httpx.URL(url)
        if address.scheme not in ("http", "https") or not address.host or address.userinfo:
            raise UploadError("url must be http://... or https://..., without a user name.")
        ip = await self._resolve(address.host, address.port or {"http": 80, "https": 443}[address.scheme])
        headers = {"host": address.netloc.decode("ascii"), "accept-encoding": "identity"}
        # The certificate is checked for the name.
        extensions = {"sni_hostname": address.raw_host.decode("ascii")}
        return client.build_request("GET", address.copy_with(host=ip), headers=headers, extensions=extensions)

    async def _resolve(self, host: str, port: int) -> str:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise UploadError("url names an unknown server.") from None
        addresses = [entry[4][0] for entry in found]
        # All addresses are checked, because any of them could be used.
        if not addresses or not all(map(self.is_allowed, addresses)):
            raise UploadError("url names a server that is not public; upload the clip.")
        return addresses[0]

    async def _write(self, response: httpx.Response, path: Path) -> None:
        if response.status_code != 200:
            raise UploadError(f"url cannot be fetched: its server answers with status {response.status_code}.")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise UploadError("url holds compressed data, which are not supported; upload the clip.")
        size = 0
        with open(path, "wb") as file:
            async for data in response.aiter_raw():
                size += len(data)
                if size > self.limits.max_bytes:
                    raise upload_too_large(f"url holds more than the maximum of {self.limits.max_bytes / 1e6:g} MB.")
                file.write(data)


def is_public(address: str) -> bool:
    """Whether an IP address is public: not of this machine, a private network or a cloud's internal network."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        # IPv4 addresses inside IPv6 addresses.
        translated = ipaddress.ip_address(int(ip) & 0xFFFFFFFF) if ip in _TRANSLATED else None
        ip = ip.ipv4_mapped or ip.sixtofour or translated or ip
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _INNER)

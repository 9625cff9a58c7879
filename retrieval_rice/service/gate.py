"""Checks before a request is read: its token, and the limits of arriving data."""

import asyncio
import hmac
import ipaddress
import json
import os
import time
from typing import Any

from ..quota import UploadGate, answer
from ..uploads import UploadLimits
from .metrics import Metrics

TOKEN = "RICE_TOKEN"
"""The environment variable that holds the token."""

_SHORTEST_TOKEN = 16
# Health checks of a load balancer, and the API description.
_OPEN = ("/healthz", "/readyz", "/openapi.json")
RETRY_SECONDS = 2
IDLE_SECONDS = 15.0
"""Maximum pause in a request's body, because a waiting request takes the place of another."""


def read_token(host: str) -> str | None:
    """
    The token that requests must carry, `None` if none is required.

    Raises:
        ValueError: the token is too short, or missing although other machines are allowed.
    """
    token = os.environ.get(TOKEN)
    if token is None:
        if not is_loopback(host):
            raise ValueError(
                f"--host {host} allows other machines, but {TOKEN} is not set; set it to a secret of at least "
                f"{_SHORTEST_TOKEN} characters, which requests must then carry."
            )
        return None
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"{TOKEN} must have at least {_SHORTEST_TOKEN} characters of ASCII, without spaces.")
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ServiceGate(UploadGate):
    """
    ASGI middleware of the service; refusals have one sentence in JSON.

    Args:
        app: The service.
        limits: Limits of uploads.
        metrics: Counts requests.
        token: Token that requests must carry, if any.
        most: Maximum number of requests with a body in progress.
    """

    methods = ("POST", "PUT", "PATCH")

    def __init__(self, app: Any, limits: UploadLimits, metrics: Metrics, token: str | None, most: int):
        super().__init__(app, limits)
        self.metrics, self.token, self.most = metrics, token and token.encode(), most
        self.inside = 0

    def is_upload(self, scope: dict) -> bool:
        return True

    async def refuse(self, send: Any, status: int, words: str) -> None:
        body = json.dumps({"error": words}).encode()
        headers = [(b"retry-after", str(RETRY_SECONDS).encode())] if status == 503 else []
        headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
        await answer(send, status, body, b"application/json", *headers)

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.perf_counter(), 500

        async def note(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, note)
        except asyncio.CancelledError:
            # The client has disconnected.
            status = 499
            raise
        finally:
            # Only known routes, so that arbitrary paths do not become metrics.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - started)

    async def _pass(self, scope: dict, receive: Any, send: Any) -> None:
        if not self._may_enter(scope):
            words = f"This service needs the header `Authorization: Bearer ...` with the secret of its {TOKEN}."
            return await self.refuse(send, 401, words)
        if scope["method"] not in self.methods:
            return await super().__call__(scope, receive, send)
        if self.inside >= self.most:
            words = f"{self.most} requests are in progress, which is the maximum; try again in {RETRY_SECONDS} s."
            return await self.refuse(send, 503, words)
        self.inside += 1
        self.metrics.queue.set(self.inside)
        body = _Body(receive, send)
        try:
            await super().__call__(scope, body.receive, body.send)
        finally:
            self.inside -= 1
            self.metrics.queue.set(self.inside)
        if body.is_idle:
            await self.refuse(send, 408, f"Nothing was sent for {IDLE_SECONDS:g} s; send the request again.")

    def _may_enter(self, scope: dict) -> bool:
        if self.token is None or scope["path"] in _OPEN:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, secret = given.partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(secret.strip(), self.token)


class _Body:
    """The body from a client; it ends after a long pause, and the service's answer to that is dropped."""

    def __init__(self, receive: Any, send: Any):
        self._receive, self._send = receive, send
        self.is_idle = self._is_whole = False

    async def receive(self) -> dict:
        if self._is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                message = await self._receive()
        except TimeoutError:
            self.is_idle = True
            return {"type": "http.disconnect"}
        self._is_whole = not message.get("more_body", False)
        return message

    async def send(self, message: dict) -> None:
        if not self.is_idle:
            await self._send(message)

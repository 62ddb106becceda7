"""Who calls, and whether they may: one guard for all routes, and a dependency of FastAPI that states a route's role.

Whatever raises in here denies: an error of the verifier or of the audit log lets nobody in.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Annotated, Any, Final, Protocol, TypeVar

import fastapi.routing
from fastapi import FastAPI, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from shardlib.errors import InvalidArgument
from shardlib_ops.audit.entry import Actor
from shardlib_ops.auth.model import Identity, Role, Unauthenticated
from shardlib_ops.auth.verifier import TokenVerifier
from shardlib_ops.serving.limits import RateLimiter, address_key, retry_after
from shardlib_ops.serving.problem import Problem, problem
from shardlib_ops.serving.requests import RequestInfo, Scope, header, request_info
from shardlib_ops.settings import LimitSettings

__all__ = ["Guard", "Needs", "Refusals", "actor_of", "anybody", "check_routes", "needs", "while_valid"]

_LOG = logging.getLogger("shardlib.ops.serving")

ATTRIBUTE: Final = "shardlib_guard"
SAFE_METHODS: Final = ("GET", "HEAD", "OPTIONS")
RECHECK_S: Final = 2.0
_CHALLENGE: Final = 'Bearer realm="shardlib"'

T = TypeVar("T")


class Refusals(Protocol):
    """Where refused attempts are written: the audit log."""

    async def refused(self, actor: Actor, action: str, target: str, why: str) -> object:
        """Write that an attempt was refused.

        Raises:
            AuditUnavailable: it could not be written.
        """
        ...


class Guard:
    """Lets callers in, or not.

    Args:
        verifier: from a token to an identity.
        limits: how often a caller or an address may fail, and change something.
        audit: where refusals are written; None only logs them.
        monotonic: seconds of a clock that nobody sets.
    """

    def __init__(
        self,
        verifier: TokenVerifier,
        limits: LimitSettings,
        *,
        audit: Refusals | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.verifier, self.audit = verifier, audit
        self._failures = RateLimiter(limits.failed_auth_per_minute, monotonic=monotonic)
        self._mutations = RateLimiter(limits.mutations_per_minute, monotonic=monotonic)

    def install(self, app: FastAPI) -> None:
        """Make this the guard of an application: its routes' `needs` ask it."""
        setattr(app.state, ATTRIBUTE, self)

    async def authenticate(self, scope: Scope) -> None:
        """Read the token of a request, and keep what it tells for `admit`. Never raises for a wrong one."""
        info = request_info(scope)
        given = header(scope, b"authorization")
        token = ""
        if given is not None:
            kind, _, token = given.decode("latin-1").partition(" ")
            if kind.lower() != "bearer" or sum(key == b"authorization" for key, _ in scope["headers"]) > 1:
                info.failure = Unauthenticated("malformed")
                return
        elif not self.verifier.open_to_all:
            info.failure = Unauthenticated("no-token")
            return
        try:
            info.identity = await self.verifier.verify(token.strip())
        except Unauthenticated as refused:
            info.failure = refused

    async def admit(
        self,
        scope: Scope,
        least: Role,
        *,
        mutating: bool | None = None,
        action: str | None = None,
        target: str | None = None,
    ) -> Identity:
        """Whom a request is let in as.

        Args:
            scope: of the request; `authenticate` has seen it.
            least: the least role for this call.
            mutating: whether it counts as a change, of which there may be so many a minute; told by the method if left
                out.
            action: name of the call in the audit log; method and route if left out.
            target: what it is about; the path if left out.

        Raises:
            Problem: 401, 403, 404 (the token is for another cluster), 429 or 503.
            AuditUnavailable: the refusal could not be written.
        """
        info = request_info(scope)
        if info.identity is None and info.failure is None:
            await self.authenticate(scope)
        action = action or f"{scope['method']} {route_of(scope)}"
        target = target or scope["path"]
        identity = info.identity
        if identity is None:
            raise await self._unauthenticated(info, action, target)
        if identity.cluster is not None and identity.cluster != self.verifier.cluster:
            # As if it were not there: whoever may not see a cluster must not learn that it is here.
            raise await self._refuse(info, action, target, "cluster", problem("not-found"))
        if not identity.role.allows(least):
            detail = f"the role {identity.role.value} does not suffice, {least.value} is needed"
            raise await self._refuse(info, action, target, "role", problem("forbidden", detail))
        if mutating if mutating is not None else scope["method"] not in SAFE_METHODS:
            await self._count(info, identity, action, target)
        return identity

    async def refuse(self, scope: Scope, action: str, target: str, why: str, answer: Problem) -> Problem:
        """What to answer to somebody who was let in and may not do this: `answer`, once it is in the audit log.

        Raises:
            AuditUnavailable: it could not be written.
        """
        return await self._refuse(request_info(scope), action, target, why, answer)

    async def still_valid(self, identity: Identity) -> bool:
        """Whether somebody who was let in would be let in now, for answers that go on for long."""
        try:
            await self.verifier.still(identity)
        except Unauthenticated as refused:
            return refused.unavailable
        return True

    async def _unauthenticated(self, info: RequestInfo, action: str, target: str) -> Problem:
        failure = info.failure or Unauthenticated("no-token")
        if failure.unavailable:
            return problem("unavailable", "tokens cannot be checked now", headers=retry_after(1))
        challenge = _CHALLENGE if failure.reason_code == "no-token" else f'{_CHALLENGE}, error="invalid_token"'
        answer = problem("unauthenticated", headers={"WWW-Authenticate": challenge})
        return await self._refuse(info, action, target, failure.reason_code, answer, failure.subject)

    async def _refuse(
        self, info: RequestInfo, action: str, target: str, why: str, answer: Problem, subject: str | None = None
    ) -> Problem:
        """What to answer, once the refusal is written; 429 without an entry when there are too many of them."""
        if info.identity is not None:
            subject = info.identity.subject
        keys = [f"address {address_key(info.address)}", *([f"subject {subject}"] if subject is not None else [])]
        wait_s = max(self._failures.take(key) for key in keys)
        if wait_s:
            # Anybody can fail: entries without end would fill the log, which lets nothing be done any more.
            _LOG.info("too many refused requests from %s", info.address)
            return problem("too-many-requests", "too many refused requests", headers=retry_after(wait_s))
        _LOG.info("request %s from %s refused: %s", info.request_id, info.address, why)
        if self.audit is not None:
            actor = actor_of(info) if subject is None else _named(info, subject)
            await self.audit.refused(actor, action, target, why)
        return answer

    async def _count(self, info: RequestInfo, identity: Identity, action: str, target: str) -> None:
        wait_s = max(
            self._mutations.take(f"subject {identity.subject}"),
            self._mutations.take(f"address {address_key(info.address)}"),
        )
        if wait_s:
            answer = problem("too-many-requests", "too many changes", headers=retry_after(wait_s))
            raise await self._refuse(info, action, target, "rate", answer)


def actor_of(info: RequestInfo) -> Actor:
    """Who asks, as the audit log names them."""
    return _named(info, info.identity.subject if info.identity is not None else "anonymous")


def _named(info: RequestInfo, subject: str) -> Actor:
    role = info.identity.role.value if info.identity is not None else None
    return Actor(subject=subject, role=role, address=info.address, request_id=info.request_id, via="http")


def route_of(scope: Scope) -> str:
    """The template of the route that answers, such as `/api/v1/shards/{shard_id}`."""
    # FastAPI keeps a router that was included under a prefix apart from it; the whole template is beside the route.
    whole = scope.get("fastapi")
    route = whole.get("effective_route_context") if isinstance(whole, dict) else None
    path = getattr(route if route is not None else scope.get("route"), "path", None)
    return path if isinstance(path, str) else "unmatched"


_BEARER: Final = HTTPBearer(auto_error=False, description="`shardlib-ops token issue` makes a token.")


class Needs:
    """A dependency that states the least role of a route, and gives the identity that was let in."""

    def __init__(self, least: Role, *, mutating: bool | None = None, action: str | None = None) -> None:
        self.least, self.mutating, self.action = least, mutating, action

    async def __call__(
        self, request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]
    ) -> Identity:
        """Let the caller in, or raise a problem."""
        guard = getattr(request.app.state, ATTRIBUTE, None)
        if not isinstance(guard, Guard):
            raise problem("internal")  # without a guard nobody comes in
        return await guard.admit(request.scope, self.least, mutating=self.mutating, action=self.action)


def needs(least: Role, *, mutating: bool | None = None, action: str | None = None) -> Needs:
    """The dependency of a route: `identity: Annotated[Identity, Depends(needs(Role.ADMIN))]`.

    Args:
        least: the least role.
        mutating: whether the call counts as a change; told by the method if left out.
        action: name of the call in the audit log, such as `shard.create`.
    """
    return Needs(least, mutating=mutating, action=action)


async def anybody() -> None:
    """The dependency of a route that is open to everybody on purpose: `dependencies=[Depends(anybody)]`."""


def check_routes(app: FastAPI) -> dict[str, Role | None]:
    """Every route of an application with the least role that it states; None is open to everybody.

    Raises:
        InvalidArgument: a route states none, or several.
    """
    found: dict[str, Role | None] = {}
    pages = {app.openapi_url, app.docs_url, app.redoc_url, app.swagger_ui_oauth2_redirect_url}
    for route in _routes(app):
        path = str(getattr(route, "path", ""))
        if path in pages and getattr(route, "dependant", None) is None:
            continue
        calls = list(_calls(getattr(route, "dependant", None)))
        stated: list[Role | None] = [call.least for call in calls if isinstance(call, Needs)]
        if anybody in calls:
            stated.append(None)
        methods = ",".join(sorted(getattr(route, "methods", None) or ()))
        if len(stated) != 1:
            raise InvalidArgument("route", f"{methods} {path}", "it states one least role, by `needs` or `anybody`")
        found[f"{methods} {path}"] = stated[0]
    return found


def _routes(app: FastAPI) -> Iterable[Any]:
    # Releases of FastAPI that keep included routers as they are have a function that goes through all of them.
    iterate = getattr(fastapi.routing, "iter_route_contexts", iter)
    routes: Iterable[Any] = iterate(app.routes)
    return routes


def _calls(dependant: Any) -> Iterator[object]:
    for inner in getattr(dependant, "dependencies", ()):
        yield inner.call
        yield from _calls(inner)


async def while_valid(
    guard: Guard, identity: Identity, items: AsyncIterator[T], *, recheck_s: float = RECHECK_S
) -> AsyncIterator[T]:
    """The items of a long answer, until the token of its caller expires or is denied; then it ends.

    Also while no item comes. `items` is closed at the end.
    """
    following: asyncio.Task[T] | None = None
    try:
        while await guard.still_valid(identity):
            if following is None:
                following = asyncio.ensure_future(anext(items))
            done, _ = await asyncio.wait([following], timeout=recheck_s)
            if done:
                finished, following = following, None
                try:
                    item = finished.result()
                except StopAsyncIteration:
                    return
                yield item
    finally:
        if following is not None:
            following.cancel()
            await asyncio.wait([following])
        close = getattr(items, "aclose", None)
        if close is not None:
            await close()

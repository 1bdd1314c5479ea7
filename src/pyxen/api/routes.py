# SPDX-License-Identifier: GPL-2.0-only
"""The API's endpoints (docs/api.md).

An error answers ``{"error": one line, "hint": text or null, "exit": exit code for the command}``.  What we did not
foresee answers 500 with one line; its traceback goes to the host's log only.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from pyxen.api.placement import PlacementRoutes
from pyxen.api.requests import (
    MAX_CONFIG_CHARACTERS,
    BadRequest,
    Fields,
    query_flag,
    query_number,
    read_fields,
)
from pyxen.errors import HostError, InternalError, PyxenError, XenError
from pyxen.toolstack.cpupools import UnknownPool
from pyxen.toolstack.domains import UnknownDomain

if TYPE_CHECKING:
    from pyxen.host import DomainHandle, Host

log = logging.getLogger("pyxen.api")

POLL_DEFAULT_S: Final = 25.0
POLL_MAXIMUM_S: Final = 60.0

T = TypeVar("T")
Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]
Action = Callable[["DomainHandle", Fields], Coroutine[Any, Any, object]]


def error_response(error: Exception) -> JSONResponse:
    """The API's answer to ``error``: status, one line, hint, and the exit code of the command that asked."""
    match error:
        case UnknownDomain() | UnknownPool():
            status = 404
        case BadRequest():
            status = error.status
        case InternalError():
            log.error("internal error", exc_info=error)
            status = 500
        case HostError():
            status = 409
        case PyxenError():
            status = 400
        case _:
            log.error("unexpected error", exc_info=error)
            line = " ".join(f"internal error in the host: {type(error).__name__}: {error}".split())[:300]
            return JSONResponse({"error": line, "hint": "the host's log has the traceback", "exit": 1}, 500)
    hint = error.hint if isinstance(error, PyxenError) else None
    # What the client sent may be quoted in it, and JSON can carry what UTF-8 cannot.
    line = " ".join(str(error).splitlines()).encode("utf-8", "replace").decode()
    return JSONResponse({"error": line, "hint": hint, "exit": 1}, status)


def _guarded(endpoint: Endpoint, before: Callable[[], None]) -> Endpoint:
    async def answer(request: Request) -> Response:
        before()
        try:
            return await endpoint(request)
        except ClientDisconnect:
            return Response(status_code=499)
        except XenError as error:
            which = request.path_params.get("which")
            if which is None or error.errno != errno.ESRCH:
                return error_response(error)
            # The last moment of a domain: the hypervisor has forgotten it, our table has not.
            return error_response(UnknownDomain(f"{which} is an invalid domain identifier (rc=-6)"))
        except Exception as error:
            return error_response(error)

    return answer


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": f"{error.status_code}: {error.detail}", "hint": None, "exit": 1}, error.status_code)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """``work``'s result; when the client hangs up first, ``work`` is cancelled and cleaned up, and ClientDisconnect
    raised.

    This is what makes Ctrl-C in ``xl create`` leave nothing behind.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
            if task.cancelled():
                raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        if not task.done():  # we were cancelled ourselves (the server stops)
            task.cancel()
            await asyncio.wait({task})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Routes:
    """The endpoints of one host."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.last_request = asyncio.get_running_loop().time()
        """When the last request came, in the event loop's time."""
        self.placement = PlacementRoutes(host)
        self.actions: dict[str, Action] = {
            "pause": self._pause,
            "unpause": self._unpause,
            "shutdown": self._shutdown,
            "reboot": self._reboot,
            "crash": self._crash,
            "rename": self._rename,
            **self.placement.actions(),
        }

    def application(self) -> Starlette:
        """The ASGI application."""
        table: list[tuple[str, str, Endpoint]] = [
            ("GET", "/version", self.version),
            ("GET", "/info", self.info),
            ("GET", "/uptime", self.uptime),
            ("GET", "/dmesg", self.dmesg),
            ("POST", "/debug-keys", self.debug_keys),
            ("POST", "/host/stop", self.stop),
            ("GET", "/domains", self.list_domains),
            ("POST", "/domains", self.create_domain),
            ("GET", "/domains/{which}", self.show_domain),
            ("DELETE", "/domains/{which}", self.destroy_domain),
            ("GET", "/domains/{which}/vcpus", self.list_vcpus),
            ("GET", "/domains/{which}/events", self.list_events),
            *self.placement.table(),
            ("POST", "/domains/{which}/{action}", self.act_on_domain),
        ]
        routes = [
            Route(path, _guarded(endpoint, self._note_request), methods=[method]) for method, path, endpoint in table
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _http_error})

    def _note_request(self) -> None:
        self.last_request = asyncio.get_running_loop().time()

    # --- the host ---------------------------------------------------------------------------------

    async def version(self, _request: Request) -> Response:
        return JSONResponse(self.host.version())

    async def info(self, request: Request) -> Response:
        return JSONResponse(self.host.info(numa=query_flag(request, "numa")))

    async def uptime(self, _request: Request) -> Response:
        return JSONResponse(self.host.uptime())

    async def dmesg(self, request: Request) -> Response:
        return PlainTextResponse(self.host.dmesg(clear=query_flag(request, "clear")))

    async def debug_keys(self, request: Request) -> Response:
        fields = await read_fields(request)
        keys = fields.required_text("keys", maximum=64)
        fields.finish()
        self.host.debug_keys(keys)
        return JSONResponse({})

    async def stop(self, request: Request) -> Response:
        (await read_fields(request)).finish()
        # After the answer has been sent: stopping ends this server too.
        return JSONResponse({}, background=BackgroundTask(self.host.request_stop))

    # --- domains ----------------------------------------------------------------------------------

    async def list_domains(self, _request: Request) -> Response:
        return JSONResponse(self.host.rows())

    async def create_domain(self, request: Request) -> Response:
        fields = await read_fields(request)
        text = fields.required_text("config_text", MAX_CONFIG_CHARACTERS)
        path = fields.text("config_path", "(configuration)")
        extra = fields.texts("extra")
        paused = fields.flag("paused")
        pv_mode = fields.text("pv_mode", None, 16)
        cwd = fields.text("cwd")
        fields.finish()
        assert path is not None
        domain = await while_connected(
            request, self.host.create_from_text(text, path=path, extra=extra, paused=paused, pv_mode=pv_mode, cwd=cwd)
        )
        return JSONResponse(
            {
                "domid": domain.domid,
                "name": domain.name,
                "console": str(domain.console_path),
                "warnings": domain.warnings,
            },
            201,
        )

    async def show_domain(self, request: Request) -> Response:
        return JSONResponse(self.host.row(request.path_params["which"]))

    async def destroy_domain(self, request: Request) -> Response:
        await self.host.domain(request.path_params["which"]).destroy()
        return JSONResponse({})

    async def act_on_domain(self, request: Request) -> Response:
        action = self.actions.get(request.path_params["action"])
        if action is None:
            raise BadRequest("there is no such action on a domain", 404)
        fields = await read_fields(request)
        domain = self.host.domain(request.path_params["which"])
        answer = await while_connected(request, action(domain, fields))
        return JSONResponse(answer if answer is not None else {})

    @staticmethod
    async def _pause(domain: DomainHandle, fields: Fields) -> None:
        fields.finish()
        await domain.pause()

    @staticmethod
    async def _unpause(domain: DomainHandle, fields: Fields) -> None:
        fields.finish()
        await domain.unpause()

    @staticmethod
    async def _crash(domain: DomainHandle, fields: Fields) -> None:
        fields.finish()
        await domain.crash()

    @staticmethod
    async def _rename(domain: DomainHandle, fields: Fields) -> None:
        name = fields.required_text("name")
        fields.finish()
        await domain.rename(name)

    @staticmethod
    async def _shutdown(domain: DomainHandle, fields: Fields) -> object:
        force, wait = fields.flag("force"), fields.flag("wait")
        fields.finish()
        await domain.shutdown(force=force)
        return {"reason": await domain.wait()} if wait else {}

    @staticmethod
    async def _reboot(domain: DomainHandle, fields: Fields) -> None:
        force = fields.flag("force")
        fields.finish()
        await domain.reboot(force=force)

    async def list_vcpus(self, request: Request) -> Response:
        return JSONResponse(self.host.vcpus(request.path_params["which"]))

    async def list_events(self, request: Request) -> Response:
        since = int(query_number(request, "since", 0))
        timeout = query_number(request, "timeout", POLL_DEFAULT_S, POLL_MAXIMUM_S)
        domid = self.host.domid_with_history(request.path_params["which"])
        events = await while_connected(request, self.host.wait_events(since, domid, timeout))
        return JSONResponse([event.to_json() for event in events])

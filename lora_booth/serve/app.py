"""The HTTP interface, as OpenAI's clients speak it."""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from ..adapters.adapter import MOST_WEIGHT
from ..base.ai_mark import picture_bytes
from ..base.base_model import BaseModel
from ..base.generation import MOST_AT_A_TIME
from ..base.sizes import AREAS, drawable
from ..config import GUIDANCE, STEPS, check, typed, written
from ..errors import LoraBoothError, SettingsError, in_command, reason_of, shown
from ..files import parse_json
from ..pictures.composition import checked
from ..pictures.picture import Picture
from ..pictures.prompts import MAX_LENGTH
from ..pictures.regions import check_box
from ..studio.server import TOKEN, listening, run, token_of
from .limits import Limits
from .queue import How, Queue, Wanted
from .shelf import Shelf

GENERATIONS, FILES, HEALTH = "/v1/images/generations", "/v1/files", "/health"
MOST_BODY, MOST_UPLOAD = 2**16, 2**28  # bytes; chosen
MOST_PICTURES, MOST_ADAPTERS = 10, 8  # of a request, as at OpenAI; of a picture, chosen
SETTINGS = {"prompt": None, "negative_prompt": None, "guidance": GUIDANCE, "sampler": None, "steps": STEPS}
KNOWN = (*SETTINGS, "model", "n", "size", "seed", "regions", "response_format")
SECONDS = (0.3, 1, 3, 10, 30, 100, 300)  # of the histogram; chosen
NO_EFFECT = ("user", "quality", "style")  # which clients send by themselves
CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}


class Api:
    """token: what callers send as `Authorization: Bearer TOKEN`"""

    def __init__(self, base: BaseModel, folder: Path, *, token: str, limits: Limits) -> None:
        self.base, self.shelf, self.token, self.limits = base, Shelf(folder), token, limits
        self.seen = seen = CollectorRegistry()  # numbers only: no names, no words of prompts
        self.answers = Counter("lora_booth_answers", "Answers, by HTTP status", ["status"], registry=seen)
        self.seconds = Histogram("lora_booth_seconds", "From a request to its pictures", buckets=SECONDS, registry=seen)
        sizes = range(1, MOST_AT_A_TIME + 1)
        batches = Histogram("lora_booth_batch_pictures", "Pictures in a batch", buckets=sizes, registry=seen)
        self.queue = queue = Queue(base, self.shelf, limits, batches.observe)
        Gauge("lora_booth_waiting_pictures", "Pictures that wait", registry=seen).set_function(lambda: len(queue.waiting))
        Gauge("lora_booth_loaded_adapters", "Adapters in memory", registry=seen).set_function(lambda: len(queue.loaded))
        self.app = FastAPI(
            openapi_url=None,
            lifespan=self.lifespan,
            middleware=[Middleware(BaseHTTPMiddleware, dispatch=self.gate)],
            exception_handlers=dict.fromkeys((HTTPException, LoraBoothError), explained),
        )
        for method, path, handler in (
            ("GET", HEALTH, self.health),
            ("GET", "/metrics", self.metrics),
            ("GET", "/v1/models", self.models),
            ("POST", FILES, self.upload),
            ("POST", GENERATIONS, self.generate),
        ):
            self.app.add_api_route(path, handler, methods=[method], response_model=None)

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        self.queue.thread.start()
        yield
        await asyncio.to_thread(self.queue.close)

    async def gate(self, request: Request, further: Callable[[Request], Any]) -> Response:
        """Before and after every call."""
        in_command.set(False)  # messages are for callers, who give arguments and no options
        try:
            answer = self.refusal(request) or await further(request)
        except ClientDisconnect:
            answer = failure(499, "the caller has gone")  # nginx's number; only the metrics see it
        except Exception:
            logging.getLogger("uvicorn.error").exception("%s", request.url.path)
            answer = failure(500, "an error of the server, which its log describes")
        self.answers.labels(answer.status_code).inc()
        return answer

    def refusal(self, request: Request) -> Response | None:
        """What to answer to a call that goes no further."""
        path, given = request.url.path, request.headers.get("authorization", "")
        if path != HEALTH and not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            wrong = "a wrong token, or none; send the one that the server printed"
            return failure(401, wrong, {"WWW-Authenticate": "Bearer"})
        if request.method == "POST":
            length, most = request.headers.get("content-length", ""), MOST_UPLOAD if path == FILES else MOST_BODY
            if not length.isdecimal() or "transfer-encoding" in request.headers:
                return failure(411, "send the content with its Content-Length")
            if len(length) > 12 or int(length) > most:
                return failure(413, f"more than {most} bytes")
        return None

    async def health(self) -> Response:
        alive = self.queue.thread.is_alive()
        return JSONResponse({"status": "ok"}) if alive else failure(503, "nothing is drawn any more; restart the server")

    async def metrics(self) -> Response:
        return Response(generate_latest(self.seen), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> Response:
        names = await asyncio.to_thread(self.shelf.names)
        facts = {"object": "model", "created": 0, "owned_by": "lora_booth"}
        return JSONResponse({"object": "list", "data": [{"id": name, **facts} for name in (self.base.name, *names)]})

    async def upload(self, request: Request) -> Response:
        async with request.form(max_files=1, max_fields=8) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise SettingsError("no file; send an adapter as multipart/form-data, in the field `file`")
            name = await asyncio.to_thread(self.shelf.add, self.base, file.filename or "", file.file)
            facts = {"object": "file", "bytes": file.size, "created_at": int(time.time()), "filename": file.filename}
        return JSONResponse({"id": name, **facts, "purpose": str(form.get("purpose", "")), "status": "processed"})

    async def generate(self, request: Request) -> Response:
        try:
            body = parse_json(await request.body())
        except ValueError as error:
            raise SettingsError(f"not JSON ({reason_of(error)})") from None
        wanted = self.wanted(body)
        if not self.queue.add(wanted):
            wait = {"Retry-After": str(math.ceil(self.queue.seconds))}
            raise HTTPException(429, f"{len(self.queue.waiting)} pictures are waiting already; try again later", wait)
        drawn = asyncio.gather(*(asyncio.wrap_future(one.future) for one in wanted))
        gone = asyncio.ensure_future(request.receive())  # after the content, a caller can only go
        gone.add_done_callback(lambda _: drawn.cancel())
        try:
            with self.seconds.time():
                pictures = await asyncio.wait_for(drawn, self.limits.timeout)
        except asyncio.CancelledError:
            if not gone.done():  # the server ends
                raise
            raise ClientDisconnect from None
        except asyncio.TimeoutError:
            late = f"no picture within {self.limits.timeout:g} seconds; try again when fewer are waiting"
            raise HTTPException(504, late, {"x-should-retry": "false"}) from None  # a header that OpenAI's clients obey
        finally:
            gone.cancel()
        return JSONResponse({"created": int(time.time()), "data": await asyncio.to_thread(entries, pictures)})

    def wanted(self, body: Any) -> list[Wanted]:
        """The pictures that a request asks for. Raises SettingsError, and HTTPException for an unknown model."""
        if not isinstance(body, dict):
            raise SettingsError('not an object; send a prompt, e.g. {"prompt": "a photo of ohwx dog"}')
        given = {name: value for name, value in body.items() if value is not None and name not in NO_EFFECT}
        for name in given.keys() - set(KNOWN):
            raise SettingsError(f"{shown(repr(name))[:80]} is unknown; known: {', '.join(KNOWN)}")
        if given.get("response_format", "b64_json") != "b64_json":
            raise SettingsError("response_format: only b64_json, since no picture stays on the server")
        most = self.limits.max_steps
        usual = SETTINGS | {"steps": min(STEPS, most)}
        settings = checked(**usual | {name: value for name, value in given.items() if name in SETTINGS})
        prompts = settings["prompt"], settings["negative_prompt"]
        for text in prompts:
            check(len(text or "") <= MAX_LENGTH, f"prompt of {len(text or '')} characters", f"up to {MAX_LENGTH}")
        steps = settings["steps"]
        check(steps <= most, f"steps {steps}", f"1 to {most}")
        count, most = typed("n", given.get("n", 1), int), min(MOST_PICTURES, self.limits.queue)
        check(1 <= count <= most, f"n {count}", f"1 to {most}")
        side = self.base.resolution
        size = (None if given.get("size") == "auto" else drawable(self.base, given.get("size"))) or (side, side)
        area = int(AREAS[1] * side**2)
        check(math.prod(size) <= area, f"size {written(size)}", f"width times height up to {area}")
        seed = typed("seed", given.get("seed", secrets.randbelow(2**32)), int)
        seeds = checked(seeds=range(seed, seed + count))["seeds"]
        adapters = self.adapters_of(typed("model", given.get("model", self.base.name), str))
        regions = regions_of(given.get("regions"), adapters)
        how = How(size, steps, settings["guidance"], settings["sampler"], regions)
        return [Wanted(*prompts, adapters, one, how) for one in seeds]

    def adapters_of(self, model: str) -> dict[str, float | None]:
        """ "rex:0.8+ink" -> names with weights; without one None. The base's name: no adapters."""
        found: dict[str, float | None] = {}
        for part in [] if model == self.base.name else model.split("+"):
            name, colon, weight = part.strip().partition(":")
            if self.shelf.file(name) is None:
                raise HTTPException(404, f"no model {shown(repr(name))[:80]}; GET /v1/models lists them")
            try:
                number = float(weight) if colon else None
            except ValueError:
                number = math.nan
            usual = f"from -{MOST_WEIGHT:g} to {MOST_WEIGHT:g}, as in {name}:0.8"
            check(number is None or abs(number) <= MOST_WEIGHT, f"weight {shown(repr(weight))[:80]} of {name}", usual)
            check(name not in found, f"model {name} twice", "once each")
            found[name] = number
        check(len(found) <= MOST_ADAPTERS, f"model of {len(found)} adapters", f"up to {MOST_ADAPTERS}")
        return found


def regions_of(given: Any, adapters: Iterable[str]) -> Any:
    """Those of a `How`. Raises SettingsError."""
    if given in (None, "auto"):
        return given
    form = 'regions; send "auto", or boxes by model: {"rex": [0, 0, 0.5, 1]}'
    if not isinstance(given, dict) or not given or not all(isinstance(box, list) for box in given.values()):
        raise SettingsError(f"{shown(repr(given))[:80]} is not {form}")
    for name, box in given.items():
        check(name in adapters, f"region of {shown(repr(name))[:80]}", f"the adapters of the model: {', '.join(adapters)}")
        check_box(typed("box", box, tuple[float, ...]))
    return tuple((name, tuple(box)) for name, box in given.items())


def entries(pictures: list[Picture]) -> list[dict[str, Any]]:
    """PNG files, with the mark that a model made them."""
    return [{"b64_json": base64.b64encode(picture_bytes(one.image)).decode(), "seed": one.seed} for one in pictures]


async def explained(request: Request, error: Any) -> Response:
    if isinstance(error, LoraBoothError):
        return failure(400, str(error))
    return failure(error.status_code, error.detail, error.headers)


def failure(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error in OpenAI's shape."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    facts = {"message": message, "type": kind, "param": None, "code": CODES.get(status)}
    return JSONResponse({"error": facts}, status, headers)


def checked_token(token: str) -> str:
    """Raises SettingsError for one that is easily guessed, or that no header can hold."""
    usable = len(token) >= 16 and token.isascii() and token.isprintable() and " " not in token
    check(usable, "token", "16 or more letters, digits and signs")
    return token


def serve(
    base: BaseModel, folder: Path, *, token: str | None, limits: Limits, host: str, port: int, say: Callable[[str], None]
) -> None:
    """Until Ctrl-C. token: None for the folder's, the same at every start. Raises SettingsError if the port is taken."""
    token = checked_token(token_of(folder / TOKEN) if token is None else token)
    api = Api(base, folder, token=token, limits=limits)
    place, address = listening(host, port, say)
    say(f"serving {base.name} with the adapters of {folder}: {address}/v1")
    say(f"token: {token}")
    run(api.app, place)

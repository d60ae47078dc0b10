"""The server's app as a Ray Serve deployment: replicas on the nodes of a cluster, behind one address."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..base.base_model import BaseModel
from ..errors import MissingExtraError
from ..runs.many import loaded
from .app import Api, checked_token
from .limits import Limits

try:
    from ray import serve
except ImportError as error:
    raise MissingExtraError("a server on Ray", "ray") from error


def application(
    base: str | Path | Callable[[], BaseModel],
    adapters: str | Path,
    *,
    token: str,
    limits: Limits = Limits(),  # noqa: B008
    **options: Any,
) -> serve.Application:
    """For `ray.serve.run`. Each replica loads the base, and answers as `lora-booth serve` does.

    adapters  a folder that all nodes share
    token     what callers send as `Authorization: Bearer TOKEN`
    limits    of each replica
    options   of the deployment: num_replicas, ray_actor_options, autoscaling_config
    A request with the header `serve_multiplexed_model_id` goes to a replica that has drawn with that model lately, if one has.
    """
    token = checked_token(token)

    def build() -> Callable[..., Any]:
        api = Api(loaded(base), Path(adapters), token=token, limits=limits)

        async def same(model: str) -> str:
            return model  # the queue loads it

        # Ray keeps in mind which replica was asked for which models
        drawn_with: Any = serve.multiplexed(max_num_models_per_replica=limits.loaded)(same)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http" and (model := serve.get_multiplexed_model_id()):
                await drawn_with(model)
            await api.app(scope, receive, send)

        return app

    return serve.deployment(serve.ingress(build)(), name="Pictures", **options).bind()

"""What Serve has no public call for: how many replicas a shard shall have, and, cheaply, how an application is.

The number is told by its external scaling API (external_scaler_enabled). Serve's other way, an autoscaling policy per
deployment, sees one shard and not the others, and would undo what people ask for. So the expert router decides for all
shards (cluster/scaling.py), and this is how it tells Serve.
"""

from typing import Any

from ray.serve._private.common import DeploymentID
from ray.serve.context import _get_global_client


def experts_name(shard_id: int) -> str:
    """The Serve deployment that holds the primaries of a shard."""
    return f"experts-{shard_id}"


def set_replicas(app: str, shard_id: int, replicas: int) -> Any:
    """Tell Serve's controller; returns Ray's reference of the call, which fails if Serve refuses."""
    deployment = DeploymentID(name=experts_name(shard_id), app_name=app)
    return _get_global_client()._controller.update_deployment_replicas.remote(deployment, replicas)


def overview(app: str) -> Any:
    """Serve's StatusOverview: app_status and deployment_statuses, with `status` and `message` each.

    serve.status() says the same, but validates and pickles every deployment's configuration to say it: 60 ms of a core,
    and as much of the controller's.
    """
    return _get_global_client().get_serve_status(app)

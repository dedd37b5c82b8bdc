"""The files in cluster/ that start a cluster elsewhere: by schema or piece by piece, and with our own settings."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.config import parse_settings
from ops.node_environment import node_environment
from ops.serve_config import parse_serve_config
from tests.serving import ROOT

# Names and types as in KubeRay's API reference for ray.io/v1 and Kubernetes' for core/v1; of the fields that these
# allow only those that we use, so that a misspelt one is found here. A type, a list of one type, or a mapping of
# fields; "?" marks what may be missing, "*" any name.
_QUANTITIES = {"cpu": str, "memory": str, "nvidia.com/gpu?": str}
_CONTAINER = {
    "name": str,
    "image": str,
    "env": [{"name": str, "value": str}],
    "ports?": [{"name": str, "containerPort": int}],
    "resources": {"limits": _QUANTITIES, "requests": _QUANTITIES},
    "securityContext": {"allowPrivilegeEscalation": bool, "capabilities": {"drop": [str]}},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly?": bool}],
}
_POD = {
    "automountServiceAccountToken": bool,
    "securityContext": {"runAsNonRoot": bool, "runAsUser": int, "fsGroup": int},
    "containers": [_CONTAINER],
    "volumes": [
        {
            "name": str,
            "persistentVolumeClaim?": {"claimName": str, "readOnly": bool},
            "secret?": {"secretName": str, "defaultMode": int},
            "emptyDir?": {"medium": str, "sizeLimit": str},
        }
    ],
}
_GROUP = {"rayStartParams": {"*": str}, "template": {"spec": _POD}}
_RAY_SERVICE = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "serveConfigV2": str,
        "rayClusterConfig": {
            "rayVersion": str,
            "authOptions": {"mode": str},
            "headGroupSpec": _GROUP,
            "workerGroupSpecs": [{"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, **_GROUP}],
        },
    },
}


def check(value: Any, form: Any, path: str = "") -> None:
    """AssertionError with the path of the first thing that does not have its form."""
    if isinstance(form, list):
        assert isinstance(value, list) and value, path
        for number, item in enumerate(value):
            check(item, form[0], f"{path}[{number}]")
    elif isinstance(form, dict):
        assert isinstance(value, dict), path
        names = {name.rstrip("?") for name in form}
        assert "*" in names or set(value) <= names, f"{path}: unknown {set(value) - names}"
        for name, inner in form.items():
            for key in value if name == "*" else [name.rstrip("?")]:
                assert key in value or name.endswith("?"), f"{path}.{key} is missing"
                if key in value:
                    check(value[key], inner, f"{path}.{key}")
    else:
        assert type(value) is form, f"{path} is {value!r}"


@pytest.fixture(scope="module")
def service() -> Any:
    return yaml.safe_load((ROOT / "cluster/ray-service.yaml").read_text())


def test_the_ray_service_has_known_fields_only(service):
    check(service, _RAY_SERVICE)
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    for broken in (
        {**service, "extra": 1},
        {**service, "spec": {"serveConfigV2": ""}},
        {**service, "metadata": {"name": 5}},
    ):
        with pytest.raises(AssertionError):
            check(broken, _RAY_SERVICE)


def test_the_ray_service_fits_together(service):
    cluster = service["spec"]["rayClusterConfig"]
    assert f"ray[serve]=={cluster['rayVersion']}" in (ROOT / "pyproject.toml").read_text()
    assert cluster["authOptions"]["mode"] == "token"
    config = parse_serve_config(yaml.safe_load(service["spec"]["serveConfigV2"]))
    settings = parse_settings(config.args)
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (each["template"]["spec"] for each in pods):
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
        assert Path(settings.model).is_relative_to(mounts["models"])
        assert container["resources"]["limits"] == container["resources"]["requests"]
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    mounts = {mount["name"]: mount["mountPath"] for mount in head["volumeMounts"]}
    assert settings.api_keys is not None and Path(settings.api_keys).parent == Path(mounts["keys"])
    assert {"name": "serve", "containerPort": config.port} in head["ports"]


def test_health_checks_are_the_same_wherever_a_node_is_started(service):
    ours = node_environment(Path("t"), Path("t"), (1, 2), "n")
    wanted = {name: ours[name] for name in ours if name.startswith("RAY_health_check") or name == "RAY_worker_niceness"}
    assert len(wanted) == 4
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        variables = {v["name"]: v["value"] for v in group["template"]["spec"]["containers"][0]["env"]}
        assert wanted.items() <= variables.items()
    launcher = yaml.safe_load((ROOT / "cluster/ray-cluster.yaml").read_text())
    for commands in (launcher["head_start_ray_commands"], launcher["worker_start_ray_commands"]):
        assert wanted.items() <= dict(re.findall(r"(RAY_\w+)=(\S+)", commands[-1])).items()
        assert "RAY_AUTH_MODE=token" in commands[-1]


def test_the_launchers_file_fits_rays_own_schema():
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.submodule_search_locations
    schema = json.loads(Path(spec.submodule_search_locations[0], "autoscaler/ray-schema.json").read_text())
    launcher = yaml.safe_load((ROOT / "cluster/ray-cluster.yaml").read_text())
    jsonschema.validate(launcher, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**launcher, "worker_ip": []}, schema)
    assert launcher["max_workers"] == len(launcher["provider"]["worker_ips"])
    assert "ray-config.yaml" in (ROOT / "cluster/ray-cluster.yaml").read_text() and (ROOT / "ray-config.yaml").is_file()


_INSTRUCTIONS = {"FROM", "RUN", "USER", "WORKDIR", "COPY", "ARG", "ENV", "EXPOSE", "CMD"}


def test_the_container_file_is_well_formed_and_does_not_run_as_root():
    text = (ROOT / "cluster/Containerfile").read_text()
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.M)).splitlines()
    steps = [tuple(line.split(None, 1)) for line in lines if line.strip()]
    assert {word for word, _ in steps} <= _INSTRUCTIONS
    words = [word for word, _ in steps]
    assert words[0] == "FROM" and words[-1] == "CMD" and words.count("CMD") == 1
    assert "3.11" in steps[0][1]
    after_user = steps[words.index("USER") :]
    assert after_user[0][1] == "switchyard" and [w for w, _ in after_user].count("USER") == 1
    assert any(word == "RUN" and rest.startswith("make install") for word, rest in after_user)
    command = json.loads(steps[-1][1])
    assert command[:2] == ["switchyard", "serve"]
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ".git" in ignored and ".venv" in ignored

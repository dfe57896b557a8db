"""A schema of KubeRay's RayJob and RayCluster, and of the pods in them, reduced to what infra/ uses.

Written by hand after the resource definitions of KubeRay 1.7 and Kubernetes 1.33; a field that is not here is
refused, so that a misspelt one is found. The operator's own rules are in `operator_problems`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]


def closed(required: tuple[str, ...] = (), **fields: Schema) -> Schema:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def listed(item: Schema) -> Schema:
    return {"type": "array", "items": item, "minItems": 1}


TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
BOOLEAN: Schema = {"type": "boolean"}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti)?$"}
STRINGS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITIES: Schema = {
    "type": "object",
    "propertyNames": {"enum": ["cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"]},
    "additionalProperties": QUANTITY,
}
METADATA = closed(("name",), name=TEXT, labels=STRINGS, annotations=STRINGS)
CONTAINER = closed(
    ("name", "image"),
    name=TEXT,
    image=TEXT,
    workingDir=TEXT,
    env=listed(closed(("name", "value"), name=TEXT, value=TEXT)),
    envFrom=listed(closed(secretRef=closed(("name",), name=TEXT), configMapRef=closed(("name",), name=TEXT))),
    resources=closed(requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts=listed(closed(("name", "mountPath"), name=TEXT, mountPath=TEXT)),
)
TOLERATION = closed(
    key=TEXT,
    operator={"enum": ["Exists", "Equal"]},
    value=TEXT,
    effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
)
VOLUME = closed(("name", "emptyDir"), name=TEXT, emptyDir=closed(medium={"enum": ["Memory"]}, sizeLimit=QUANTITY))
POD = closed(
    ("containers",),
    containers=listed(CONTAINER),
    restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
    tolerations=listed(TOLERATION),
    volumes=listed(VOLUME),
    terminationGracePeriodSeconds=COUNT,
)
TEMPLATE = closed(("spec",), spec=POD)
HEAD = closed(("template",), rayStartParams=STRINGS, template=TEMPLATE)
GROUP = closed(
    ("groupName", "minReplicas", "maxReplicas", "template"),
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    rayStartParams=STRINGS,
    template=TEMPLATE,
)
CLUSTER_SPEC = closed(
    ("headGroupSpec",),
    rayVersion=TEXT,
    headGroupSpec=HEAD,
    workerGroupSpecs=listed(GROUP),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=closed(version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=COUNT),
    authOptions=closed(("mode",), mode={"enum": ["token", "disabled"]}, secretName=TEXT),
)
JOB_SPEC = closed(
    ("entrypoint",),
    entrypoint=TEXT,
    suspend=BOOLEAN,
    shutdownAfterJobFinishes=BOOLEAN,
    ttlSecondsAfterFinished=COUNT,
    backoffLimit=COUNT,
    rayClusterSpec=CLUSTER_SPEC,
)
SCHEMAS = {
    kind: closed(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=METADATA,
        spec=spec,
    )
    for kind, spec in {"RayJob": JOB_SPEC, "RayCluster": CLUSTER_SPEC}.items()
}


def operator_problems(document: dict[str, Any]) -> Iterator[str]:
    """What KubeRay's operator refuses beside what the schema does."""
    name, spec = document["metadata"]["name"], document["spec"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", name):
        yield f"metadata.name: {name!r} is no DNS label of at most 47 letters"
    if "suspend" in spec and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend needs shutdownAfterJobFinishes"
    cluster = spec.get("rayClusterSpec", spec)
    if cluster.get("authOptions", {}).get("mode") == "token":
        major, minor = map(int, cluster.get("rayVersion", "0.0").split(".")[:2])
        if (major, minor) < (2, 52):
            yield "authOptions.mode token needs rayVersion 2.52"
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    autoscaler = cluster.get("autoscalerOptions", {}).get("version")
    for group in groups:
        pod = group["template"]["spec"]
        if autoscaler == "v2" and pod.get("restartPolicy", "Never") != "Never":
            yield "autoscaler v2 wants restartPolicy Never"
        mounted = {mount["name"] for box in pod["containers"] for mount in box.get("volumeMounts", [])}
        if mounted != {volume["name"] for volume in pod.get("volumes", [])}:
            yield f"volumes and volumeMounts differ: {sorted(mounted)}"
        if not group.get("minReplicas", 0) <= group.get("replicas", 0) <= group.get("maxReplicas", 0):
            yield f"replicas of {group['groupName']} are not between minReplicas and maxReplicas"

"""What infra/ says to other programs: manifests in KubeRay's fields, commands that parse, files that are there.

No image is built and no cluster started here.
"""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs.config import ClusterConfig, EncodeConfig, load_config
from tests.kuberay_schema import SCHEMAS, operator_problems

PROJECT = Path(__file__).resolve().parents[1]
INFRA = PROJECT / "infra"
MANIFESTS = ("encode-rayjob.yaml", "finetune-rayjob.yaml", "raycluster.yaml")


def document(name: str) -> dict[str, Any]:
    return yaml.safe_load((INFRA / name).read_text())


def problems(manifest: dict[str, Any]) -> list[str]:
    schema = SCHEMAS[manifest["kind"]]
    found = [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest)]
    return found or list(operator_problems(manifest))


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_what_kuberay_takes(name: str) -> None:
    assert problems(document(name)) == []


def misspelt(job: dict[str, Any]) -> None:
    job["spec"]["shutdownAfterJobFinished"] = job["spec"].pop("shutdownAfterJobFinishes")


def without_group_name(job: dict[str, Any]) -> None:
    del job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["groupName"]


def number_as_quantity(job: dict[str, Any]) -> None:
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"] = {
        "memory": 16
    }


def unmounted(job: dict[str, Any]) -> None:
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["volumes"].append(
        {"name": "unused", "emptyDir": {}}
    )


def restarting(job: dict[str, Any]) -> None:
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["restartPolicy"] = "Always"


def old_ray(job: dict[str, Any]) -> None:
    job["spec"]["rayClusterSpec"]["rayVersion"] = "2.51.0"


@pytest.mark.parametrize("fault", [misspelt, without_group_name, number_as_quantity, unmounted, restarting, old_ray])
def test_the_check_finds_faults(fault: Callable[[dict[str, Any]], None]) -> None:
    job = copy.deepcopy(document("encode-rayjob.yaml"))
    fault(job)
    assert problems(job) != []


def parse_encode_command(words: list[str]) -> EncodeConfig:
    """The config of a `python jobs/encode_webvid.py CONFIG --set ...` command, as the job reads it."""
    assert words[:2] == ["python", "jobs/encode_webvid.py"]
    pairs = list(zip(words[3::2], words[4::2], strict=True))
    assert {option for option, _ in pairs} <= {"--set"}
    return load_config(EncodeConfig, PROJECT / words[2], [value for _, value in pairs])


def test_the_encode_job_runs_a_config_that_is_there() -> None:
    config = parse_encode_command(shlex.split(document("encode-rayjob.yaml")["spec"]["entrypoint"]))
    assert config.output.url == "s3://YOUR-BUCKET/latents"


def test_job_and_cluster_have_the_same_nodes() -> None:
    assert document("encode-rayjob.yaml")["spec"]["rayClusterSpec"] == document("raycluster.yaml")["spec"]


def test_the_decode_group_lends_the_resource_that_runs_ask_for() -> None:
    """Read as Ray's autoscaler reads it, which brings up nodes of this group for it."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _get_custom_resources

    gpu, decode = document("raycluster.yaml")["spec"]["workerGroupSpecs"]
    assert "resources" not in gpu["rayStartParams"]
    lent = _get_custom_resources({}, decode["rayStartParams"], decode["groupName"])
    (container,) = decode["template"]["spec"]["containers"]
    assert lent == {ClusterConfig().remote_decode_resource: int(container["resources"]["requests"]["cpu"])}
    assert "nvidia.com/gpu" not in container["resources"]["limits"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_secrets_are_named_and_never_written(name: str) -> None:
    text = (INFRA / name).read_text()
    assert not re.search(r"AWS_SECRET|AWS_ACCESS|password", text, re.IGNORECASE)
    assert "secretRef" in text


def test_compose_starts_what_the_manifests_do() -> None:
    compose = document("compose.yaml")
    services = compose["services"]
    assert set(services) == {"store", "bucket", "head", "worker"}
    for service in services.values():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in services
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[needed]
    assert shlex.split(services["worker"]["command"])[:3] == ["ray", "start", "--address=head:6379"]
    build = services["head"]["build"]
    assert (INFRA / build["context"] / build["dockerfile"]).resolve() == INFRA / "Dockerfile"
    assert build["target"] in stages()
    comment = re.search(r"python (jobs/encode_webvid\.py[^\n]*\n#[^\n]*)", (INFRA / "compose.yaml").read_text())
    assert comment is not None
    words = shlex.split("python " + comment[1].replace("\\\n#", " ").replace("\\", " "))
    assert parse_encode_command(words).vae.checkpoint == "shipped://tiny-cvvae"


def stages() -> set[str]:
    return set(re.findall(r"^FROM \S+ AS (\S+)$", (INFRA / "Dockerfile").read_text(), re.MULTILINE))


def test_the_image_is_locked_and_not_roots() -> None:
    text = (INFRA / "Dockerfile").read_text()
    assert {"cpu", "cuda"} <= stages()
    assert all("-c constraints.txt" in line for line in re.findall(r"pip install(?:[^\n]*\\\n)*[^\n]*", text))
    assert text.index("USER ray") < text.index("COPY --chown=ray:ray . .")
    for source in re.findall(r"^COPY --chown=\S+ (\S+) \S+$", text, re.MULTILINE):
        assert (PROJECT / source).exists()
    extras = set(re.findall(r"\.\[([a-z,0-9]+)\]", text))
    known = re.findall(r"^(\w+) = \[", (PROJECT / "pyproject.toml").read_text(), re.MULTILINE)
    assert all(set(names.split(",")) <= set(known) for names in extras)

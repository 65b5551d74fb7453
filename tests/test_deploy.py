"""The files in deploy/: what can be checked of them where no container and no cluster runs."""

import importlib
import json
import re
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from service.answerer import Answerer
from service.app import VqaArguments
from service.ingress import Ingress

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))


@pytest.fixture(scope="module")
def ray_service():
    return yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())


@pytest.fixture(scope="module")
def serve_config(ray_service):
    return ServeDeploySchema.model_validate(yaml.safe_load(ray_service["spec"]["serveConfigV2"]))


@pytest.mark.parametrize("path", sorted(DEPLOY.iterdir()), ids=lambda path: path.name)
def test_each_file_says_that_it_was_not_run(path):
    assert "NOT RUN" in path.read_text()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_exists_and_is_not_ignored(path):
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for line in re.findall(r"^COPY (.*)$", path.read_text(), re.M):
        for source in line.split()[:-1]:
            assert list(ROOT.glob(source)), source
            assert source in kept, source


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_every_module_of_the_project_is_in_the_image(path):
    text = path.read_text()
    for package in ("inf2", "models", "service"):
        assert f"COPY {package} {package}" in text
    assert "COPY blip*.py" in text and "EXPOSE 8000" in text and '"--port", "8000"' in text


def test_the_applications_can_be_imported_and_have_their_arguments(serve_config):
    for application in serve_config.applications:
        module, _, name = application.import_path.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
    vqa = serve_config.applications[0]
    assert VqaArguments.model_validate(vqa.args).directory == "/artifacts/blip"
    assert {deployment.name for deployment in vqa.deployments} == {Answerer.name, Ingress.name}


def test_a_node_has_the_cores_that_it_asks_for(ray_service, serve_config):
    (workers,) = ray_service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    cores = int(container["resources"]["limits"]["aws.amazon.com/neuroncore"])
    assert cores == 2  # of an inf2.xlarge
    scaling = next(each for each in serve_config.applications[0].deployments if each.name == Answerer.name)
    most = scaling.autoscaling_config["max_replicas"]
    assert most <= cores * workers["maxReplicas"]
    limits = [each.autoscaling_config for each in serve_config.applications[0].deployments]
    cpus = int(container["resources"]["limits"]["cpu"])
    for limit, nodes in (("min_replicas", workers["minReplicas"]), ("max_replicas", workers["maxReplicas"])):
        assert sum(each[limit] for each in limits) <= cpus * nodes  # each has a CPU
    assert {port["containerPort"] for port in container["ports"]} >= {serve_config.http_options.port}


def test_sizes_on_paper_follow_from_what_was_measured():
    said = json.loads((ROOT / "benchmarks" / "serve.json").read_text())["simulation"]["said"]
    text = " ".join((ROOT / "docs" / "hosting-sizes.md").read_text().split())
    graphs = said["times 1"]["seconds of the graphs"]
    decoder_and_question = graphs["text_encoder.graph"] + 4 * graphs["text_decoder.decoder.decoder"]
    core = graphs["vision_model.graph"] + decoder_and_question / 4
    host = said["times 1"]["the host's CPU, ms a question"] / 1e3
    kilobytes, price = 2 * 94 * 4 / 3, 0.7582
    a_chip, four_cpus = 2 / core, 4 / host
    for figure in (
        f"| {1e3 * core:.1f} ms |",
        f"| {1e3 * host:.0f} ms of a CPU |",
        f"| {kilobytes:.0f} kB |",
        f"fed {said['times 1']['a second']:.0f} questions",
        f"| {a_chip:,.0f} |",
        f"| {a_chip / 3:.0f} |",
        f"| {four_cpus:.0f} |",
        f"need {a_chip * host:.0f} CPU cores in front of it, and {a_chip * host / 3:.0f} at three times",
        *(
            f"| {n:,} | {n * four_cpus:,.0f} | {n * four_cpus * kilobytes * 8e-6:.{digits}f} Gbit/s | "
            f"{n * price:.{cents}f} | {price / 3600 / four_cpus * 1e6:.2f} |"
            for n, digits, cents in ((1, 2, 2), (10, 1, 2), (1000, 0, 0))
        ),
        f"would cost {price / 3600 / a_chip * 1e6:.2f} dollars",
    ):
        assert figure in text, figure

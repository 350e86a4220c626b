"""The container files. No image is built: they are checked as text and, where it exists, by compose."""

import json
import re
import shutil
import subprocess

import pytest
import yaml

from commands import ROOT, environment
from sra_ds.ops.kernel_build import source_folder

DOCKER = ROOT / "launch" / "docker"
COMPOSE = DOCKER / "docker-compose.yml"
SERVICES = {"train": "gpu", "train-cpu": "cpu"}
SERVICE_KEYS = {  # those of the compose specification that are used here
    "build", "command", "deploy", "env_file", "environment", "image", "init", "profiles", "shm_size",
    "stop_grace_period", "volumes",
}  # fmt: skip


def no_compose():
    """Why `docker compose` cannot be asked, or nothing."""
    if not shutil.which("docker"):
        return "docker is not installed"
    asked = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return "docker has no compose plugin" if asked.returncode else ""


def interpolated(text, **variables):
    """Compose's ${NAME:-default}."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: variables.get(m[1]) or m[2], text)


@pytest.fixture(scope="module")
def compose():
    """The compose file with its defaults, its anchors resolved."""
    return yaml.safe_load(interpolated(COMPOSE.read_text()))


def test_compose_accepts_the_file():
    if reason := no_compose():
        pytest.skip(f"{reason}; the tests below read the file as YAML")
    for service, profile in SERVICES.items():
        asked = ["docker", "compose", "-f", COMPOSE, "--profile", profile, "config"]
        result = subprocess.run(
            [*asked, "--format", "json"],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert list(json.loads(result.stdout)["services"]) == [service]


def test_services_hold_what_compose_requires(compose):
    assert set(compose) == {"name", "services", "volumes", "x-train"}
    assert set(compose["services"]) == set(SERVICES)
    for name, service in compose["services"].items():
        assert set(service) <= SERVICE_KEYS
        assert service["profiles"] == [SERVICES[name]]
        assert all(isinstance(word, str) for word in service["command"])
        assert service["env_file"] == [{"path": ".env", "required": False}]
        assert set(service["environment"]) == {"TZ"}
        for volume in service["volumes"]:
            source, target = volume.split(":")
            assert source in compose["volumes"] and target.startswith("/")
        build = service["build"]
        assert (DOCKER / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()
    (device,) = compose["services"]["train"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "deploy" not in compose["services"]["train-cpu"]


def test_services_call_what_exists(compose):
    commands = [service["command"] for service in compose["services"].values()]
    commands.append(json.loads(instructions("CMD")[0]))
    for command in commands:
        assert (ROOT / next(word for word in command if word.endswith(".py"))).is_file()
        assert (ROOT / command[command.index("--deepspeed") + 1]).is_file()
        recipe = command[command.index("--recipe") + 1]
        assert (ROOT / "sra_ds" / "recipes" / f"{recipe}.yaml").is_file()


def instructions(name):
    """What follows each instruction of this name in the Dockerfile, its lines joined."""
    text = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split(None, 1)[1] for line in text.splitlines() if line.startswith(name + " ")]


def test_every_copied_file_exists_and_is_sent_to_the_builder():
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    sources = [source for line in instructions("COPY") for source in line.split()[:-1]]
    assert "sra_ds" in sources and "launch" in sources
    assert ignored[0] == "*"
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, source
    assert "launch/docker/.env" in ignored  # secrets stay outside images


def test_the_kernels_can_be_compiled_when_the_package_is_installed():
    before = (DOCKER / "Dockerfile").read_text().partition("--no-build-isolation -e")[0]
    name = source_folder().relative_to(ROOT)
    assert f"COPY {name} {name}\n" in before and "g++" in before and "ninja" in before


def test_the_image_is_that_of_the_pinned_torch(compose):
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    (base,) = [a.split("=")[1] for a in instructions("ARG") if a.startswith("BASE=")]
    assert base.startswith(f"pytorch/pytorch:{pinned[1]}-cuda") and base.endswith("-runtime")
    assert compose["x-train"]["build"]["args"]["BASE"] == base
    declared = {argument.split("=")[0] for argument in instructions("ARG")}
    assert set(compose["x-train"]["build"]["args"]) == declared


def test_the_image_runs_as_a_user_who_owns_the_volumes(compose):
    (user,) = instructions("USER")
    assert any(f"--create-home {user}" in line for line in instructions("RUN"))
    (volumes,) = map(json.loads, instructions("VOLUME"))
    targets = [volume.split(":")[1] for volume in compose["x-train"]["volumes"]]
    assert targets == volumes
    owned = re.search(r'chown "\$\{UID\}" (.*)', " ".join(instructions("RUN")))
    assert owned[1].split()[:3] == ["runs", "data", "/cache"]
    (working,) = instructions("WORKDIR")
    assert [f"{working}/runs", f"{working}/data", "/cache"] == volumes


def test_the_example_environment_names_what_is_secret_or_local():
    lines = (DOCKER / ".env.example").read_text().splitlines()
    named = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert set(named) == {"WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN", "TZ"}
    assert named["WANDB_API_KEY"] == named["HUGGING_FACE_HUB_TOKEN"] == ""
    tracked = ["git", "-C", ROOT, "check-ignore", "-q", "launch/docker/.env"]
    if (ROOT / ".git").exists():
        assert subprocess.run(tracked, check=False).returncode == 0

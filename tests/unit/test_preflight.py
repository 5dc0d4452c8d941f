"""What is refused before anything is deployed, and what the refusal says."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.serve.exceptions import RayServeException

from service import build, preflight
from service.app import application, settings_from
from service.build import require_build, source_digest
from service.errors import ConfigurationError, NotYet
from service.preflight import Finding, check_host, check_shared, examine
from service.settings import Settings
from tests.tiny_model import save_tiny_model


def settings(**values: object) -> Settings:
    return Settings.model_validate(values)


def found(chosen: Settings) -> dict[str, Finding]:
    return {finding.about: finding for finding in examine(chosen)}


def test_what_can_be_reached_passes(database_url: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    chosen = settings(database_url=database_url, version_store=str(store))
    assert all(finding.passed for finding in examine(chosen))
    assert list((store / "probes").iterdir()) == []


def test_wrong_credentials_are_said_at_once_and_without_the_password(postgres_url: str) -> None:
    url = postgres_url.replace("postgres@", "nobody:s3cret@")
    began = time.monotonic()
    [refused] = [one for one in examine(settings(database_url=url), 60) if one.about == "database"]
    assert time.monotonic() < began + 30
    assert not refused.passed
    assert 'role "nobody" does not exist' in refused.detail
    assert "ERRATA_DATABASE_URL" in refused.detail
    assert "s3cret" not in refused.detail


@pytest.mark.parametrize("url", ["/proc/nowhere/store", "nothing://bucket/store"])
def test_a_version_store_that_cannot_be_written_is_named(url: str) -> None:
    refused = found(settings(version_store=url))["version_store"]
    assert not refused.passed
    assert refused.detail.startswith(f"version_store: {url} cannot be written")
    assert "ERRATA_VERSION_STORE" in refused.detail


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    refused = found(settings(model=str(tmp_path / "gone")))["model"]
    assert not refused.passed
    assert str(tmp_path / "gone") in refused.detail
    assert "ERRATA_MODEL" in refused.detail


def test_a_model_that_is_on_its_way_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "model")
    tokenizer = model / "tokenizer.json"
    content = tokenizer.read_bytes()
    tokenizer.unlink()
    # It comes while the next look is waited for.
    monkeypatch.setattr(preflight.time, "sleep", lambda _: tokenizer.write_bytes(content))
    waited = next(examine(settings(model=str(model)), 60))
    assert (waited.about, waited.passed) == ("model", True)


def test_what_one_node_alone_can_reach_is_refused_on_several() -> None:
    check_shared(settings(), node_count=1)
    with pytest.raises(ConfigurationError) as caught:
        check_shared(settings(), node_count=3)
    assert "database_url: none is set, and this Ray cluster has 3 nodes" in str(caught.value)
    assert "version_store: none is set" in str(caught.value)
    url = "postgresql://errata@db/errata"
    check_shared(settings(database_url=url, version_store="s3://bucket"), node_count=3)


def test_a_port_open_to_others_needs_a_proxy_that_authenticates() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        check_host(host, behind_proxy=False)
    check_host("0.0.0.0", behind_proxy=True)
    with pytest.raises(ConfigurationError, match="ERRATA_BEHIND_PROXY=true"):
        check_host("0.0.0.0", behind_proxy=False)


def test_args_override_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_REPLICAS", "5")
    monkeypatch.setenv("ERRATA_MODEL", "elsewhere")
    chosen = settings_from({"replicas": 3})
    assert (chosen.replicas, chosen.model) == (3, "elsewhere")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"replica": 3}, "args: replica is no setting; the settings are model, host"),
        ({"replicas": 0}, "replicas: Input should be greater than or equal to 1"),
        ({"replica_gpus": 4}, "replica_gpus: Input should be less than or equal to 1"),
    ],
)
def test_args_that_are_no_settings_are_named(args: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        settings_from(args)


def test_another_build_is_refused_by_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = source_digest()
    require_build(own, "10.0.0.2")
    for folder in ("service", "workers"):
        shutil.copytree(build.ROOT / folder, tmp_path / folder)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    source_digest.cache_clear()
    try:
        require_build(own, "10.0.0.2")
        (tmp_path / "service" / "app.py").write_text("changed")
        source_digest.cache_clear()
        with pytest.raises(ConfigurationError, match=r"image: node 10\.0\.0\.2 runs another build"):
            require_build(own, "10.0.0.2")
    finally:
        source_digest.cache_clear()


@pytest.mark.parametrize(("wait_s", "passes"), [(60.0, True), (0.0, False)])
def test_what_is_not_there_yet_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wait_s: float, passes: bool
) -> None:
    asked: list[str] = []

    async def reach(url: str) -> None:
        asked.append(url)
        if len(asked) < 3:
            raise NotYet("it is starting")

    monkeypatch.setattr(preflight, "RETRY_S", 0.0)
    monkeypatch.setattr(preflight, "reach", reach)
    chosen = settings(database_url="postgresql://errata@db/errata", data_dir=tmp_path)
    [waited] = [one for one in examine(chosen, wait_s) if one.about == "database"]
    assert waited.passed is passes
    assert len(asked) == (3 if passes else 1)


def test_what_serve_is_told_is_the_message_alone() -> None:
    with pytest.raises(RayServeException, match=r"^args: replica is no setting"):
        application({"replica": 3})


def test_who_does_not_compute_does_not_load_torch() -> None:
    """It would take each Api, and each node's probe, some seconds and 200 MB."""
    code = "import sys; import service.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

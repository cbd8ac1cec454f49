"""Two replicas on a local Ray, one of them killed in the middle; it needs starflow[ray], and skips without."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deploy.ray_serve import build

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_an_unknown_argument_is_named() -> None:
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match="'modle'"):
        build({"modle": "glyphs"})


def test_the_manifests_fit_the_service() -> None:
    """Probes ask paths that are there, the scaler a metric that is exported, and the end has time to drain."""
    parts = {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
    pod = parts["Deployment"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    metric = parts["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    source = Path(__file__).parents[2] / "src/starflow/serve/service.py"
    assert f'"{metric}"' in source.read_text()
    drain = float(container["args"][container["args"].index("--drain") + 1])
    assert pod["terminationGracePeriodSeconds"] >= drain + 5 + 10
    assert pod["securityContext"]["runAsNonRoot"]
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert f"USER {pod['securityContext']['runAsUser']}" in dockerfile
    assert "HEALTHCHECK" in dockerfile


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Two replicas, ready, however busy the machine is."""
    for name in ("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S"):
        monkeypatch.setenv(name, "200")  # read when ray.serve is imported
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "240")
    ray, serve = pytest.importorskip("ray"), pytest.importorskip("ray.serve")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    for attempt in range(5):
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": 8765})
            break
        except TimeoutError:  # proxies have a minute to start
            assert attempt < 4
    serve.run(build({"min_replicas": "2", "max_replicas": "2", "cpus": "0.5"}))
    yield "http://127.0.0.1:8765"
    serve.shutdown()
    ray.shutdown()


@pytest.mark.slow
def test_a_replica_that_is_killed_loses_no_request_that_is_sent_again(url: str) -> None:
    import httpx
    import ray

    pictures: dict[int, str] = {}
    retried: list[int] = []

    def client(seed: int) -> None:
        for _ in range(120):
            try:
                asked = {"prompt": "a red apple", "candidates": 1, "n": 2, "seed": seed}
                answer = httpx.post(f"{url}/v1/images/generations", json=asked, timeout=120)
                if answer.status_code == 200:
                    pictures[seed] = answer.json()["data"][0]["b64_json"]
                    return
            except httpx.HTTPError:
                pass
            retried.append(seed)
            time.sleep(1)

    client(0)
    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(1, 17)]
    for one in threads:
        one.start()
    time.sleep(0.3)
    named = ray.util.list_named_actors(all_namespaces=True)
    replicas = [one for one in named if one["name"].startswith("SERVE_REPLICA")]
    assert len(replicas) == 2
    ray.kill(ray.get_actor(**replicas[0]), no_restart=True)
    for one in threads:
        one.join()
    assert sorted(pictures) == list(range(17))
    again = dict(pictures)
    client(3)
    assert pictures[3] == again[3]

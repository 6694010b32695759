"""The real Dagster webserver on loopback: an asset is materialised through GraphQL, as the UI does it."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LAUNCH = """
mutation Launch($params: ExecutionParams!) {
  launchPipelineExecution(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message stack }
    ... on RunConfigValidationInvalid { errors { message } }
  }
}
"""
RUN = "query Run($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
ASSET = """
query Asset($key: AssetKeyInput!) {
  assetNodeOrError(assetKey: $key) {
    ... on AssetNode {
      groupName
      kinds
      assetMaterializations(limit: 1) { metadataEntries { label ... on FloatMetadataEntry { floatValue } } }
    }
  }
}
"""


class Webserver:
    """A webserver that was started for this module."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"{self.url}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert "errors" not in answer, answer
        return dict(answer["data"])


@pytest.fixture(scope="module")
def webserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webserver]:
    folder = tmp_path_factory.mktemp("webserver")
    # Without a daemon nothing empties a queue, so that this instance launches at once.
    direct = "run_coordinator: {module: dagster._core.run_coordinator, class: DefaultRunCoordinator}\n"
    (folder / "dagster.yaml").write_text(direct, encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "DAGSTER_HOME": str(folder),
        "OPENSORA_WORKSPACE": str(folder / "workspace"),
        "OPENSORA_RECIPES": "v2_0",
    }
    command = [sys.executable, "-m", "dagster_webserver", "-h", "127.0.0.1", "-p", str(port)]
    command += ["-m", "orchestration.definitions"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        server = Webserver(port)
        wait_until_up(server, process, folder / "log")
        yield server
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_until_up(server: Webserver, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text(encoding="utf-8")
        try:
            server.ask("query { version }", {})
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"no answer in two minutes:\n{log.read_text(encoding='utf-8')}")


def test_an_asset_is_materialised_through_graphql(webserver: Webserver) -> None:
    selector = {
        "repositoryLocationName": "orchestration.definitions",
        "repositoryName": "__repository__",
        "pipelineName": "__ASSET_JOB",
        "assetSelection": [{"path": ["v2_0", "cost_plan"]}],
    }
    answer = webserver.ask(LAUNCH, {"params": {"selector": selector, "mode": "default", "runConfigData": {}}})
    launched = answer["launchPipelineExecution"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    run = launched["run"]["runId"]
    deadline, status = time.monotonic() + 180, ""
    while status not in ("SUCCESS", "FAILURE", "CANCELED") and time.monotonic() < deadline:
        status = webserver.ask(RUN, {"id": run})["runOrError"]["status"]
        time.sleep(0.5)
    assert status == "SUCCESS"
    node = webserver.ask(ASSET, {"key": {"path": ["v2_0", "cost_plan"]}})["assetNodeOrError"]
    assert node["groupName"] == "v2_0_dollars"
    (materialisation,) = node["assetMaterializations"]
    planned = {entry["label"]: entry.get("floatValue") for entry in materialisation["metadataEntries"]}
    assert planned["planned_usd"] > 0

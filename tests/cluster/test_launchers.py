"""The launcher's files, read by Ray's own code, and their machines by the cloud's description where there is one."""

from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.files import GROUPS, LAUNCHERS, read


@pytest.fixture(params=LAUNCHERS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read(request.param)


def on_spot(node: dict[str, Any]) -> bool:
    aws = node.get("InstanceMarketOptions", {}).get("MarketType")
    return aws == "spot" or node.get("scheduling", {}).get("provisioningModel") == "SPOT"


def test_ray_takes_the_file_and_adds_no_ray_of_its_own(config: dict[str, Any]) -> None:
    prepared = prepare_config(config)
    validate_config(prepared)
    assert not any("pip" in command for key in prepared if "command" in key for command in prepared[key])


def test_a_wrong_key_is_found(config: dict[str, Any]) -> None:
    config["available_node_types"]["reading"]["max_worker"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(config))


def test_the_groups_are_bounded_and_bear_the_labels_that_stages_ask_for(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    assert set(types) == GROUPS
    assert all(node["labels"] == {"group": name} for name, node in types.items())
    assert types["head"]["resources"] == {"CPU": 0}
    workers = {name: node for name, node in types.items() if name != "head"}
    assert all(node["min_workers"] == 0 and node["idle_timeout_s"] <= 600 for node in workers.values())
    assert sum(node["max_workers"] for node in workers.values()) == config["max_workers"]
    assert {name for name, node in types.items() if node["resources"].get("GPU")} == {"generation", "training"}
    assert {name for name, node in types.items() if on_spot(node["node_config"])} == {"generation", "reading"}
    priorities = {name: node.get("priority", 0) for name, node in workers.items()}
    assert max(priorities, key=priorities.__getitem__) == "reading"


def test_the_dashboard_is_on_loopback_and_asks_for_the_token(config: dict[str, Any]) -> None:
    (start,) = (command for command in config["head_start_ray_commands"] if "--head" in command)
    assert "--dashboard-host=127.0.0.1" in start
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]


def test_machines_are_such_as_ec2_can_start_and_none_opens_a_port_to_the_world() -> None:
    service = botocore.session.get_session().get_service_model("ec2")
    request = service.operation_model("RunInstances").input_shape
    for name, node in read("aws.yaml")["available_node_types"].items():
        machine = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        report = botocore.validate.ParamValidator().validate(machine, request)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
        assert set(machine) <= set(request.members), name
        assert machine["SecurityGroupIds"], f"{name}: the launcher would make a group that is open on port 22"
    assert "security_group" not in read("aws.yaml")["provider"]
    machines = read("gcp.yaml")["available_node_types"].values()
    assert all(machine["node_config"]["networkInterfaces"][0]["subnetwork"] for machine in machines)

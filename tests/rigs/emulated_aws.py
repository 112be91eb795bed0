"""`python emulated_aws.py FOLDER PORT UV`: an AWS whose instances are machines of this computer.

Runs in SkyPilot's environment. The API is moto's; every address that it hands out is a loopback one, and for each
running instance a machine boots (`emulated_machine.py`) that ends when the instance does. The file `capacity.json` in
FOLDER says what is sold out: `{"us-east-1/p5.48xlarge/spot": "InsufficientInstanceCapacity"}`.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any, cast

ACCOUNT = "123456789012"
REGIONS = ("us-east-1", "us-west-2")
PROFILE = "sky-node"

# None of these has types here.
_backends: Any = import_module("moto.ec2.models").ec2_backends
_errors: Any = import_module("moto.ec2.exceptions")
_instances: Any = import_module("moto.ec2.models.instances")
_yaml: Any = import_module("yaml")


def give_loopback_addresses() -> None:
    """Machines share this computer's network: each has an address of 127.0.0.0/8."""
    public, private = itertools.count(1), itertools.count(1)
    interfaces: Any = import_module("moto.ec2.models.elastic_network_interfaces")
    vpcs: Any = import_module("moto.ec2.models.vpcs")
    interfaces.random_public_ip = lambda: f"127.0.8.{next(public)}"

    def private_address(_cidr: Any = None, ipv6: bool = False) -> str:
        return "2001:db8::1/64" if ipv6 else f"127.0.9.{next(private)}"

    for module in (interfaces, _instances, vpcs):
        module.random_private_ip = private_address


def obey_capacity(folder: Path) -> None:
    """RunInstances fails as `capacity.json` says."""
    run_instances = _instances.InstanceBackend.run_instances

    def limited(self: Any, *positional: Any, **named: Any) -> Any:
        is_spot = named.get("lifecycle") == "spot" or "spot" in str(named.get("instance_market_options"))
        place = f"{self.region_name}/{named.get('instance_type')}" + ("/spot" if is_spot else "")
        print("RunInstances", place, flush=True)
        refused = json.loads((folder / "capacity.json").read_text()).get(place)
        if refused:
            raise _errors.EC2ClientError(refused, "We currently do not have sufficient capacity in the requested zone.")
        return run_instances(self, *positional, **named)

    _instances.InstanceBackend.run_instances = limited


def furnish_account() -> None:
    """What every account has: a default network with a way out, and the role that nodes run as."""
    iam: Any = import_module("moto.iam.models").iam_backends[ACCOUNT]["aws"]
    role = iam.create_role(PROFILE, '{"Version": "2012-10-17", "Statement": []}', "/", None, "", [], "3600")
    iam.create_instance_profile(PROFILE, "/", [role.name], [])
    for region in REGIONS:
        ec2 = _backends[ACCOUNT][region]
        network = ec2.get_default_vpc()
        gateway = ec2.create_internet_gateway()
        ec2.attach_internet_gateway(gateway.id, network.id)
        table = next(table for table in ec2.route_tables.values() if table.vpc_id == network.id)
        ec2.create_route(table.id, "0.0.0.0/0", gateway_id=gateway.id)


def keep_machines_or_end(folder: Path, uv: str) -> None:
    """`keep_machines`; an AWS whose instances never boot would only be waited for."""
    try:
        keep_machines(folder, uv)
    finally:
        traceback.print_exc()
        os._exit(1)


def keep_machines(folder: Path, uv: str) -> None:
    """Boot a machine for each running instance, and cut its power when the instance ends."""
    machines: dict[str, subprocess.Popen[bytes]] = {}
    while True:
        running = {
            instance.id: instance
            for region in REGIONS
            for reservation in list(_backends[ACCOUNT][region].reservations.values())
            for instance in reservation.instances
            if instance.state == "running"
        }
        for instance_id, instance in running.items():
            if instance_id not in machines:
                machines[instance_id] = _boot(folder / instance_id, instance, uv)
        for instance_id in set(machines) - set(running):
            machine = machines.pop(instance_id)
            # It takes everything on the machine with it.
            machine.kill()
            machine.wait()
        time.sleep(0.3)


def _boot(folder: Path, instance: Any, uv: str) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True)
    user = _first_user(instance.user_data)
    order = {
        "folder": str(folder),
        "address": instance.public_ip or instance.private_ip,
        "private_address": instance.private_ip,
        "user": user["name"],
        "key": user["ssh_authorized_keys"][0].strip(),
        "uv": uv,
    }
    print("boot", instance.id, instance.instance_type, order["address"], flush=True)
    program = Path(__file__).with_name("emulated_machine.py")
    with (folder / "console.log").open("wb") as console:
        return subprocess.Popen(
            ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "/usr/bin/python3", str(program),
             json.dumps(order)],
            stdin=subprocess.DEVNULL, stdout=console, stderr=console,
        )  # fmt: skip


def _first_user(user_data: Any) -> dict[str, Any]:
    """cloud-init's first user, from what the instance was started with: YAML, wrapped in base64 once or twice."""
    text = str(user_data.decode())
    for _ in range(3):
        try:
            found = _yaml.safe_load(text)
            if isinstance(found, dict):
                return dict(cast("dict[str, Any]", found)["users"][0])
        except _yaml.YAMLError:
            pass
        text = base64.b64decode(text).decode()
    raise ValueError("the instance's user data names no user")


def main() -> None:
    """Serve until killed."""
    folder, port, uv = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    give_loopback_addresses()
    obey_capacity(folder)
    furnish_account()
    threading.Thread(target=keep_machines_or_end, args=(folder / "machines", uv), daemon=True).start()
    serve: Any = import_module("moto.server").main
    serve(["-H", "127.0.0.1", "-p", port])


if __name__ == "__main__":
    main()
